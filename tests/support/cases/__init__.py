"""Every op as a table of cases (base.py says of what): the tests that all ops pass (contract.py)
and the fuzz runs draw from it.
"""

from cases import adamw, cross_entropy, glu, paged_append, rms_norm, rope, rope_append

OPS = {
    "adamw": adamw.OP,
    "cross_entropy": cross_entropy.OP,
    "glu": glu.OP,
    "paged_append": paged_append.OP,
    "rms_norm": rms_norm.OP,
    "rope": rope.OP,
    "rope_append": rope_append.OP,
}
