"""Every op as a table of cases (base.py says of what): the tests that all ops pass (contract.py)
and the fuzz runs draw from it.
"""

from cases import (
    cross_entropy,
    glu,
    joined_rounding,
    layer_norm,
    quantized_linear,
    rms_norm,
    rope,
)

OPS = {
    "cross_entropy": cross_entropy.OP,
    "glu": glu.OP,
    "glu_round": joined_rounding.GLU,
    "layer_norm": layer_norm.OP,
    "quantized_linear": quantized_linear.OP,
    "rms_norm": rms_norm.OP,
    "rms_norm_round": joined_rounding.RMS_NORM,
    "rope": rope.OP,
}
