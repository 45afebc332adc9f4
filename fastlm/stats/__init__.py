"""Intervals, paired and sequential tests, power, drift, agreement."""
