"""Tests of the C++ product alone."""

from contract import (  # noqa: F401
    test_matches_float64,
    test_same_bits_on_any_number_of_threads,
)
