"""The question sets: a module reads the sets of one kind and lists them (`fastlm.evals.listed`)."""
