"""How safe a model is: sets from packages, judges whose error is measured, gates."""
