"""The ops, with autograd and ``torch.compile(fullgraph=True)``, on CPU and GPU.

One file per op; see each function's docstring.
"""

import torch  # noqa: F401  (before _cpu: its OpenMP then resolves to torch's)

from fastlm.ops import adamw  # noqa: F401  (declares it; `fastlm.AdamW` calls it)
from fastlm.ops.attention import attention
from fastlm.ops.cross_entropy import cross_entropy
from fastlm.ops.glu import glu
from fastlm.ops.layer_norm import layer_norm
from fastlm.ops.linear import linear
from fastlm.ops.linear_cross_entropy import linear_cross_entropy
from fastlm.ops.linear_distillation import linear_distillation
from fastlm.ops.linear_logprobs import linear_logprobs
from fastlm.ops.paged_append import paged_append
from fastlm.ops.paged_attention import paged_attention
from fastlm.ops.quantize_weight import quantize_weight
from fastlm.ops.quantized_linear import quantized_linear
from fastlm.ops.rms_norm import rms_norm
from fastlm.ops.rope import rope
from fastlm.ops.rope_append import rope_append  # noqa: F401  declared for the decoder's steps
from fastlm.ops.varlen_attention import varlen_attention

__all__ = [
    "attention",
    "cross_entropy",
    "glu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "paged_append",
    "paged_attention",
    "quantize_weight",
    "quantized_linear",
    "rms_norm",
    "rope",
    "varlen_attention",
]
