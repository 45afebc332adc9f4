"""The definition of every op in plain PyTorch, never optimised.

All other implementations are tested against it.
The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.

Forward-mode AD works through them, also under ``vmap``: a value that depends on an input is never
written into a tensor that does not.

One file per op, with the same name as its file in `fastlm/ops`. The other files hold what several
ops share. `rope`, `rope_append`, `paged_append`, `paged_attention` and `adamw` each
name a file and a function: as attributes of this package they are the functions.
"""

from fastlm.reference.adamw import (
    RANDOM_CHUNK,
    STATE_BLOCK,
    AdamWOptions,
    AdamWTensor,
    adamw,
    join_master,
    mix32,
    pack_state,
    round_stochastic,
    split_master,
    step_key,
    unpack_state,
)
from fastlm.reference.attention import AttentionOptions, attention_backward, attention_forward
from fastlm.reference.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    cross_entropy_loss,
    cross_entropy_loss_backward,
)
from fastlm.reference.dropout import dropout_factor, philox
from fastlm.reference.glu import activation, glu_backward, glu_forward, glu_round
from fastlm.reference.layer_norm import layer_norm_backward, layer_norm_forward
from fastlm.reference.linear import linear_backward, linear_forward
from fastlm.reference.linear_cross_entropy import (
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_loss,
    linear_cross_entropy_loss_backward,
)
from fastlm.reference.linear_distillation import (
    linear_distillation_backward,
    linear_distillation_forward,
)
from fastlm.reference.linear_logprobs import linear_logprobs_backward, linear_logprobs_forward
from fastlm.reference.paged_append import paged_append
from fastlm.reference.paged_attention import paged_attention
from fastlm.reference.quantized_linear import (
    RUN_MAX,
    dequantize,
    int8_rows,
    quantized_linear_backward,
    quantized_linear_forward,
    round_rows,
    rounded_linear,
    unpack_rows,
)
from fastlm.reference.rms_norm import rms_norm_backward, rms_norm_forward, rms_norm_round
from fastlm.reference.rope import rope
from fastlm.reference.rope_append import rope_append
from fastlm.reference.target import bad_target, check_target
from fastlm.reference.varlen_attention import varlen_attention_backward, varlen_attention_forward

__all__ = [
    "RANDOM_CHUNK",
    "RUN_MAX",
    "STATE_BLOCK",
    "AdamWOptions",
    "AdamWTensor",
    "AttentionOptions",
    "activation",
    "adamw",
    "attention_backward",
    "attention_forward",
    "bad_target",
    "check_target",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cross_entropy_loss",
    "cross_entropy_loss_backward",
    "dequantize",
    "dropout_factor",
    "glu_backward",
    "glu_forward",
    "glu_round",
    "int8_rows",
    "join_master",
    "layer_norm_backward",
    "layer_norm_forward",
    "linear_backward",
    "linear_cross_entropy_backward",
    "linear_cross_entropy_forward",
    "linear_cross_entropy_loss",
    "linear_cross_entropy_loss_backward",
    "linear_distillation_backward",
    "linear_distillation_forward",
    "linear_forward",
    "linear_logprobs_backward",
    "linear_logprobs_forward",
    "mix32",
    "pack_state",
    "paged_append",
    "paged_attention",
    "philox",
    "quantized_linear_backward",
    "quantized_linear_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "rms_norm_round",
    "rope",
    "rope_append",
    "round_rows",
    "round_stochastic",
    "rounded_linear",
    "split_master",
    "step_key",
    "unpack_rows",
    "unpack_state",
    "varlen_attention_backward",
    "varlen_attention_forward",
]
