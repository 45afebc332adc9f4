"""The ops: autograd, ``torch.compile(fullgraph=True)``, CPU and GPU. One file an op; see each function's docstring."""

import torch  # noqa: F401  (before _cpu: its OpenMP then resolves to torch's and shares the threads)

from fastlm.ops.attention import attention
from fastlm.ops.paged_attention import paged_attention
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.varlen_attention import varlen_attention

__all__ = ["attention", "paged_attention", "rms_norm", "varlen_attention"]
