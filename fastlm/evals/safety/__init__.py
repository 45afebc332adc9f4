"""Safety tests: sets from packages, judges with measured errors, gates."""
