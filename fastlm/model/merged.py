"""Adapters merged for the time of a generation."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fastlm.model.cpu_decode import decode_plan
from fastlm.model.lora import lora_of
from fastlm.model.quantized_modules import replace_module

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


@contextmanager
def merged(model: "CausalLM") -> Iterator[None]:
    """Context in which the adapters are merged, and none can be trained: for a long generation,
    which then runs at the speed of a plain model. It takes a copy of the adapted weights.
    """
    found = lora_of(model)
    for name, module in found.items():
        replace_module(model, name, module.merged(model.dtype).requires_grad_(False))
    try:
        yield
    finally:
        for name, module in found.items():
            replace_module(model, name, module)
        if found:
            decode_plan(model)  # drops the plan, which keeps the merged weights alive
