"""Host side of the C++ kernels (csrc/cpu), one file per op: allocates, calls ``fastlm._cpu``."""
