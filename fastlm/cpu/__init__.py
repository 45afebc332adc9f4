"""Host side of the C++ kernels (csrc/cpu), one file per op. Allocates and calls ``fastlm._cpu``."""
