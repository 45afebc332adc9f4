"""A canary: a second model that gets a share of the conversations until a test decides."""
