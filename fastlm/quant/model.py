"""Replace nn.Linear and nn.Embedding of any model by quantized modules, in place.

A weight that several modules share (an embedding tied to the head) is quantized once and stays
shared. Rejected: tensor subclasses instead of parameters, since every op of a model would have to
handle them.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.model.quantized_modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    quantization_config,
    set_quantized_weight,
)
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.progress import silent
from fastlm.quant.options import QuantizeOptions
from fastlm.quant.step_result import StepResult, round_to_nearest
from fastlm.quant.targets import select_targets

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def quantize(
    model: nn.Module,
    format: str,
    *,
    group_size: int | None = None,
    method: str = "rtn",
    calibration: Any = None,
    awq: bool = False,
    embeddings: int | None = 0,
    head: int | None = 0,
    overrides: Mapping[str, str | int] | None = None,
    symmetric: bool = True,
    require_divisible_groups: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    iterations: int = 200,
    distill_steps: int = 0,
    distill_data: Any = None,
    seed: int = 0,
    checkpoint_dir: Path | None = None,
    track: Callable | None = None,
    on_step: Callable[[StepResult], None] = lambda step: None,
    log: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Replace every ``nn.Linear`` by `QuantizedLinear` and every ``nn.Embedding`` by
    `QuantizedEmbedding`, in place.

    Args:
        model: any module tree; returned.
        format: w4a16, w8a16, w8a8 or w4a8: bits of the weights and of the activations of the linear
            layers.
        group_size: columns per scale, see `fastlm.ops.quantize_weight`. None: the largest of 128,
            64 and 32 that divides the width of every layer to quantize, 32 if none does.
        method: "rtn": round to nearest with searched scales. "gptq": `fastlm.quant.gptq`.
            "autoround": learned rounding, `fastlm.quant.rounding`. Embeddings and head are rounded
            to nearest by each.
        calibration: token ids (windows, length) of text like the model's future inputs
            (`fastlm.quant.calibration` makes them). `model` must then be a `fastlm.CausalLM`. With
            it rtn weighs errors by the mean squares of activations. The other methods need it.
        awq: scale features by AWQ before the method rounds, see `fastlm.quant.awq`; needs a
            calibration. Norms (and biases) change with the weights.
        embeddings: bits of the embeddings: 4, 8, 16 or None (unchanged), or 0 (as `format`).
        head: bits of the head, likewise. The head is the linear layer that
            `model.get_output_embeddings()` or an attribute `lm_head` names. A head tied to an
            embedding shares its quantized weight, so both need the same bits.
        overrides: glob pattern of layer names -> a format, or bits (4, 8, 16: unchanged), such
            as ``{"*.down_proj": "w8a16"}``. If several match a layer, the last one counts. It
            takes precedence over `embeddings` and `head`.
        symmetric: store no offsets, see `fastlm.ops.quantize_weight`.
        require_divisible_groups: refuse a `group_size` that does not divide the width of every
            layer. Other programs' formats demand that; here a row's last group may be short.
        scale_dtype: dtype of the scales.
        iterations: steps of "autoround" per decoder layer.
        distill_steps: steps of quantization-aware distillation after that, see
        `fastlm.quant.distill`:
            scales, offsets and norms are trained on text. Activations are not rounded, not even for
            the a8 formats. 0: none.
        distill_data: its text as token ids (windows, length). None: `calibration`.
        seed: of the random draws of "autoround" and of the distillation.
        checkpoint_dir: with text, a folder that keeps finished layers and the distillation's state:
        the
            same call continues from there, to the same bits.
        track: shows the progress, as in `fastlm.progress`.
        on_step: receives the result of each step: weights, errors and warnings.
        log: receives a line per decoder layer, with its error.

    Raises:
        InputError: an unknown format or method, sizes that do not fit, a pattern that matches no
            layer, tied weights with different bits, a model with quantized layers.
    """
    options = QuantizeOptions(
        format, group_size, method, awq, 16 if embeddings is None else embeddings,
        16 if head is None else head, tuple(f"{p}={f}" for p, f in (overrides or {}).items()),
        symmetric, require_divisible_groups, iterations, distill_steps, seed,
    )  # fmt: skip
    options.check()
    track = track or silent
    check_unquantized(model)
    ids = None if calibration is None else _check_windows(model, calibration, "calibration")
    distill_ids = (
        ids if distill_data is None else _check_windows(model, distill_data, "distill_data")
    )
    if ids is None and (method != "rtn" or awq):
        needs = method if method != "rtn" else "awq"
        raise InputError(f"calibration: expected token ids (windows, length) for {needs}, got none")
    if distill_steps and (distill_ids is None or len(distill_ids) < 2):
        got = "none" if distill_ids is None else "1"
        name = "calibration" if distill_data is None else "distill_data"
        raise InputError(f"{name}: expected 2 or more windows of token ids to distill, got {got}")
    targets = select_targets(model, options, scale_dtype)
    if not targets:
        raise InputError(
            f"model: {type(model).__name__} has no nn.Linear or nn.Embedding to quantize"
        )
    quantized: dict[int, QuantizedWeight] = {}
    floats: dict[str, Tensor] = {}

    def add(step: StepResult) -> None:
        floats.update(step.floats)
        for target in targets:
            if target.name in step.weights:
                quantized[id(target.module.weight)] = step.weights[target.name]
        on_step(step)

    reports = {"folder": checkpoint_dir, "track": track, "log": log}
    causal = cast("CausalLM", model)  # with text, `_check_windows` has checked that
    if ids is None:
        for target in track(targets, "quantize", total=len(targets), unit="layers"):
            if id(target.module.weight) not in quantized:
                add(round_to_nearest(target))
    else:
        from fastlm.quant.layerwise import LayerwiseQuantizer

        for step in LayerwiseQuantizer(causal, targets, ids, options, **reports).run():
            add(step)
    if distill_ids is not None and distill_steps:
        from fastlm.quant.distill import Distillation

        weights = {target.name: quantized[id(target.module.weight)] for target in targets}
        distillation = Distillation(
            causal, targets, weights, floats, distill_ids, steps=distill_steps, seed=seed, **reports
        )
        add(distillation.run())
    with torch.no_grad():
        for name, value in floats.items():
            model.get_parameter(name).copy_(value)
    for target in targets:
        weight = quantized[id(target.module.weight)]
        model = set_quantized_weight(model, target.name, weight, act_bits=target.act_bits)
    _describe_in_config(model, format, method)
    return model


def _describe_in_config(model: nn.Module, format: str, method: str) -> None:
    """Describe the stored weights in the config of each transformers model in `model`.

    Its ``save_pretrained`` then writes the same entry as `save_hf`. Without the entry, transformers
    would open the folder and fill the layers with fresh weights; with it, it refuses.
    """
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:
        return
    inner: set[nn.Module] = set()  # models inside a described model
    for module in model.modules():
        if module in inner or not isinstance(module, transformers.PreTrainedModel):
            continue
        inner.update(module.modules())
        sizes = {m.group_size for m in module.modules() if isinstance(m, QuantizedLinear)}
        entry = quantization_config(
            module, format, group_size=sizes.pop() if len(sizes) == 1 else None, method=method
        )
        config: Any = module.config
        described = copy.copy(config)
        described.quantization_config = {"fastlm": entry}
        for part in module.modules():  # a copy, since another model may share the config
            if vars(part).get("config") is config:
                part.config = described


def check_unquantized(model: nn.Module) -> None:
    """Raise InputError if a layer of `model` is quantized already."""
    types = (QuantizedLinear, QuantizedEmbedding)
    names = [name for name, m in model.named_modules() if isinstance(m, types)]
    if names:
        raise InputError(
            f"model: expected an unquantized model, got {len(names)} quantized layers"
            f" ({names[0] or type(model).__name__}): load it with keep_quantized=False (the"
            " command: --dequantize)"
        )


def _check_windows(model: nn.Module, ids: Any, name: str) -> Tensor:
    """Return the windows `ids`, (n, S), as int64. InputError, about the argument `name`: another
    shape, ids outside the vocabulary, windows longer than the context, another model class than
    `CausalLM`.
    """
    # the config of a CausalLM; its module imports this one
    if not isinstance(getattr(model, "config", None), ModelConfig):
        raise InputError(
            f"{name}: expected a fastlm.CausalLM as the model, got {type(model).__name__}"
            " (fastlm.CausalLM.from_pretrained reads Hugging Face folders)"
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids)
        raise InputError(f"{name}: expected token ids (windows, length), got {got}")
    causal = cast("CausalLM", model)
    try:
        causal.check_ids(ids)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    if ids.shape[1] > causal.context_limit:
        raise InputError(
            f"{name}: expected windows of at most the context of {causal.context_limit} tokens,"
            f" got {ids.shape[1]}"
        )
    return ids.long()
