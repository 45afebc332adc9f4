"""Triton kernels, one file per op; installed as ``fastlm.kernels``."""

if __name__ != "fastlm.kernels":
    raise ImportError(
        f"{__file__} is fastlm.kernels, imported as {__name__!r}:"
        " the repository root is on sys.path (use `python -P`)"
    )
