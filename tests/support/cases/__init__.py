"""Every op as a table of cases (base.py says of what): the tests that all ops pass (contract.py)
and the fuzz runs draw from it.
"""

from cases import attention, cross_entropy, glu, paged_attention, rms_norm, rope, varlen_attention

OPS = {
    "attention": attention.OP,
    "cross_entropy": cross_entropy.OP,
    "glu": glu.OP,
    "paged_attention": paged_attention.OP,
    "rms_norm": rms_norm.OP,
    "rope": rope.OP,
    "varlen_attention": varlen_attention.OP,
}
