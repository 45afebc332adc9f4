"""Every op as a table of cases (base.py has its types). The tests that all ops pass (contract.py)
and the fuzz runs draw from it.
"""

from cases import (
    adamw,
    attention,
    cross_entropy,
    glu,
    joined_rounding,
    layer_norm,
    linear,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    matmul,
    paged_append,
    paged_attention,
    quantized_linear,
    rms_norm,
    rope,
    rope_append,
    varlen_attention,
)

OPS = {
    "adamw": adamw.OP,
    "attention": attention.OP,
    "cross_entropy": cross_entropy.OP,
    "glu": glu.OP,
    "glu_round": joined_rounding.GLU,
    "layer_norm": layer_norm.OP,
    "matmul": matmul.OP,
    "linear": linear.OP,
    "linear_cross_entropy": linear_cross_entropy.OP,
    "linear_distillation": linear_distillation.OP,
    "linear_logprobs": linear_logprobs.OP,
    "paged_append": paged_append.OP,
    "paged_attention": paged_attention.OP,
    "quantized_linear": quantized_linear.OP,
    "rms_norm": rms_norm.OP,
    "rms_norm_round": joined_rounding.RMS_NORM,
    "rope": rope.OP,
    "rope_append": rope_append.OP,
    "varlen_attention": varlen_attention.OP,
}
