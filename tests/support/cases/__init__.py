"""Every op as a table of cases (base.py says of what): the tests that all ops pass (contract.py)
and the fuzz runs draw from it.
"""

from cases import (
    cross_entropy,
    glu,
    linear,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    rms_norm,
    rope,
)

OPS = {
    "cross_entropy": cross_entropy.OP,
    "glu": glu.OP,
    "linear": linear.OP,
    "linear_cross_entropy": linear_cross_entropy.OP,
    "linear_distillation": linear_distillation.OP,
    "linear_logprobs": linear_logprobs.OP,
    "rms_norm": rms_norm.OP,
    "rope": rope.OP,
}
