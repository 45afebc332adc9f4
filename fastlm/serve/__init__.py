"""Serve models over HTTP, and generate text with them on the command line."""
