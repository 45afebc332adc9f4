"""The question sets: a module reads the sets of one kind and has a `TaskSpec` of each."""
