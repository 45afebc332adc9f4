"""Host side of the C++ kernels (csrc/cpu), one file per op: allocates and calls ``fastlm._cpu``."""
