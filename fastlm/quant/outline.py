"""A model without its weights, from its config: a recipe's plan finds what cannot be quantized or
exported before the model is trained.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm.checkpoint.config import ModelConfig
from fastlm.model.causal_lm import CausalLM
from fastlm.ops.quantized_weight import QuantizedWeight, check_group_size
from fastlm.quant.plan import Target


def outline(config: ModelConfig) -> CausalLM:
    """The model on the meta device."""
    with torch.device("meta"):
        return CausalLM(config)


def stored_outline(
    model: CausalLM, targets: Sequence[Target] = ()
) -> dict[str, Tensor | QuantizedWeight]:
    """What `CausalLM.stored` returns once `targets` are quantized, on the meta device."""
    state = model.stored()
    for target in targets:
        state[f"{target.name}.weight"] = _weight(target)
    return state


def _weight(target: Target) -> QuantizedWeight:
    (n, k), scheme = target.module.weight.shape, target.scheme
    groups = -(-k // check_group_size(scheme.group_size, k))
    width, dtype = (k, torch.int8) if scheme.bits == 8 else (-(-k // 2), torch.uint8)
    qdata = torch.empty(n, width, dtype=dtype, device="meta")
    scales = torch.empty(n, groups, dtype=scheme.scale_dtype, device="meta")
    zeros = None if scheme.symmetric else torch.empty_like(scales)
    return QuantizedWeight(qdata, scales, zeros, scheme.bits, scheme.group_size, (n, k))
