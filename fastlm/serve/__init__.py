"""Talk with a model."""
