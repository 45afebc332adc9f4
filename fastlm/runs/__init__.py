"""Recipes and the folders they run in."""
