"""One training loop, and the objectives that run on it."""
