"""Merge the adapters of a model for the time of a generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastlm.model.cpu_decode import decode_plan
from fastlm.model.lora import lora_layers
from fastlm.model.quantized_modules import replace_module

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


@contextmanager
def merged_lora(model: "CausalLM") -> Iterator[None]:
    """Return a context in which the adapters are merged and cannot be trained. A long generation
    then runs at the speed of a model without adapters. It takes a copy of the adapted weights.
    """
    layers = lora_layers(model)
    for name, module in layers.items():
        replace_module(model, name, module.merge(model.dtype).requires_grad_(False))
    try:
        yield
    finally:
        for name, module in layers.items():
            replace_module(model, name, module)
        if layers:
            decode_plan(model)  # drops the plan, which keeps the merged weights alive
