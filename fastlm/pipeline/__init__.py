"""The contract of a stage, recipes, and the folders they run in. Knows no stage and no model."""
