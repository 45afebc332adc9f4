"""A user's own tasks, in the format of lm-evaluation-harness: YAML and local data files."""
