"""The ops: autograd, ``torch.compile(fullgraph=True)``, CPU and GPU. One file an op; see each function's docstring."""

import torch  # noqa: F401  (before _cpu: its OpenMP then resolves to torch's and shares the threads)

from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.rms_norm import rms_norm

__all__ = ["cross_entropy", "linear_cross_entropy", "rms_norm"]
