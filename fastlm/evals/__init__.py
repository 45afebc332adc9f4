"""Evaluation: question sets, bits per byte, and safety tests."""
