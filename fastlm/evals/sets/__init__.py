"""Question sets: each module reads the sets of one kind and has a `TaskSpec` for each."""
