"""paged_append by torch: its definition."""

from fastlm.reference import paged_append

__all__ = ["paged_append"]
