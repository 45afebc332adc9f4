"""Quantize a `CausalLM` one decoder layer after another. The input of each layer is the output of
the quantized layers before it. In memory are the calibration tokens' hidden states and one layer in
float32.

With a folder, finished layers are read back after an interruption. The hidden states are
recomputed, so the result is bitwise the same.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.model.layers import DecoderLayer, ForwardContext
from fastlm.ops import quantize_weight
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.progress import silent
from fastlm.quant.awq import find_folds, scale_features
from fastlm.quant.gptq import gptq
from fastlm.quant.options import QuantizeOptions
from fastlm.quant.rounding import learn_rounding
from fastlm.quant.step_result import (
    StepResult,
    cache_key,
    get_weight,
    load_step_result,
    relative_error,
    round_to_nearest,
    save_step_result,
)
from fastlm.quant.targets import Target, find_head

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

VERSION = 3  # raised when the same model, text and options give other weights
# Weight of the errors of a tied embedding's rows, which are looked up, too: a share of the head's
# mean square. On the 5.1 M model of docs/quantization.md, the embedding alone quantized, KL was
# 0.0094, 0.0077, 0.0069 and 0.0081 with 4, 1, 0.1 and 0.
LOOKUP = 0.1
_TOKENS = 4096  # per forward of a layer: activations stay below a few hundred MB


class _Moments:
    """Sums of ``x x^T`` (or of ``x^2``) over the inputs x of linear layers until `close`. Layers
    with the same input tensor share one sum.
    """

    def __init__(self, modules: Mapping[str, nn.Module], full: bool):
        self.full = full
        self.sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._hooks = [m.register_forward_pre_hook(self._hook(n)) for n, m in modules.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: self._add(name, args[0])

    def _add(self, name: str, x: Tensor) -> None:
        if name not in self.owner:
            same = (n for n, other in self._inputs.items() if other is x)
            self.owner[name] = next(same, name)
            self._inputs[name] = x
        if self.owner[name] != name:
            return
        rows = x.flatten(0, -2).float()
        total = rows.t() @ rows if self.full else rows.square().sum(0)
        self.sums[name] = self.sums[name] + total if name in self.sums else total

    def next(self) -> None:
        """Forget the inputs: the owners are known after one forward."""
        self._inputs.clear()

    def close(self) -> dict[str, Tensor]:
        """Remove the hooks and return the sum of each layer."""
        for hook in self._hooks:
            hook.remove()
        return {name: self.sums[owner] for name, owner in self.owner.items()}


class LayerwiseQuantizer:
    """Quantize the layers `targets` of `model`. `ids`: (windows, S), the calibration text."""

    def __init__(
        self,
        model: "CausalLM",
        targets: Sequence[Target],
        ids: Tensor,
        options: QuantizeOptions,
        *,
        folder: Path | None = None,
        track: Callable = silent,
        log: Callable[[str], None] = lambda line: None,
    ):
        if options.awq:
            check_folds(model, targets)
        self.model, self.targets, self.options = model, targets, options
        self.ids, self.track, self.log, self.folder = ids, track, log, folder
        self.key = _key(model, targets, ids, options) if folder is not None else ""
        self.batch = max(1, _TOKENS // ids.shape[1])
        rotary = model.model.rotary(0, ids.shape[1], ids.shape[1], model.device)
        self.context = ForwardContext(None, None, None, rotary)

    @torch.no_grad()
    def run(self) -> Iterator[StepResult]:
        """Yield the steps in order. The model is not changed."""
        decoder, head = self.model.model, find_head(self.model)
        step = self._cached("embeddings", self._quantize_embeddings)
        yield step
        hidden = self._embed(step.weights)
        plain = self._embed({}) if self.options.method == "autoround" else None
        for index in self.track(range(len(decoder.layers)), "quantize", unit="layers"):
            name = f"model.layers.{index}"
            layer = copy.deepcopy(decoder.layers[index]).float().requires_grad_(False)
            assert isinstance(layer, DecoderLayer)
            targets = layer_targets(self.targets, index)
            target_outputs = None if plain is None else self._run_layer(layer, plain)
            step = self._cached(
                f"layer-{index:05d}",
                partial(self._quantize_layer, layer, targets, hidden, target_outputs, index),
            )
            for short, target in targets.items():
                get_weight(layer, short).copy_(step.weights[target.name].dequantize())
            for full, value in step.floats.items():
                layer.get_parameter(full.removeprefix(f"{name}.")).copy_(value)
            hidden, plain = self._run_layer(layer, hidden), target_outputs
            if step.errors:
                mean = sum(step.errors.values()) / len(step.errors)
                self.log(f"{name}: error {100 * mean:.3g} % of its linear layers' outputs")
            yield step
        if head_targets := [t for t in self.targets if t.module is head]:
            moments = self._head_moments(hidden)
            yield self._cached("head", lambda: self._quantize_matrices(head_targets, moments))

    def _cached(self, name: str, work: Callable[[], StepResult]) -> StepResult:
        """Read the step back if it was finished, else do it and store it."""
        if self.folder is None:
            return work()
        file = self.folder / f"{name}.safetensors"
        if (step := load_step_result(file, self.key)) is None:
            save_step_result(file, self.key, step := work())
        return step

    def _quantize_embeddings(self) -> StepResult:
        """Quantize the embedding; if it is tied to the head, by the head's inputs."""
        decoder = self.model.model
        targets = [t for t in self.targets if t.module is decoder.embed_tokens]
        if not targets or self.model.head_weight is not decoder.embed_tokens.weight:
            return self._quantize_matrices(targets, None)
        hidden = self._embed({})
        for layer in self.track(decoder.layers, "head's inputs", unit="layers"):
            hidden = self._run_layer(copy.deepcopy(layer).float(), hidden)
        moments = self._head_moments(hidden)
        if moments.dim() == 2:  # it is looked up, too: weigh each row's error
            moments.diagonal().add_(LOOKUP * moments.diagonal().mean())
        return self._quantize_matrices(targets, moments)

    def _quantize_matrices(self, targets: Sequence[Target], moments: Tensor | None) -> StepResult:
        """Quantize the embedding or the head, with moments of the head's inputs."""
        step = StepResult()
        for target in targets:
            if moments is None or moments.dim() == 1:
                step.add(round_to_nearest(target, moments))
                continue
            w = target.module.weight.detach()
            q = gptq(w, moments, target.scheme, name=target.name, warn=step.warnings.append)
            step.weights[target.name] = q
            step.errors[target.name] = relative_error(w, q, moments)
        return step

    def _quantize_layer(
        self, layer: DecoderLayer, targets: Mapping[str, Target], hidden: Tensor,
        target_outputs: Tensor | None, index: int,
    ) -> StepResult:  # fmt: skip
        options, step = self.options, StepResult()
        modules = {short: layer.get_submodule(short) for short in targets}
        moments = _Moments(modules, full=options.method == "gptq" or bool(options.awq))
        for part in hidden.split(self.batch):
            layer(part, None, self.context)
            moments.next()
        sums = moments.close()
        if options.awq:
            original, name = self.model.model.layers[index], f"model.layers.{index}"
            powers, floats = scale_features(
                layer, {short: target.scheme for short, target in targets.items()}, sums,
                {n: p.dtype for n, p in original.named_parameters()},
            )  # fmt: skip
            step.powers = {f"{name}.{short}": power for short, power in powers.items()}
            step.floats = {f"{name}.{short}": value for short, value in floats.items()}
        quantized: dict[str, QuantizedWeight] = {}
        for short, target in targets.items():
            w, total = get_weight(layer, short), sums[short]
            if options.method == "gptq":
                quantized[short] = gptq(
                    w, total, target.scheme, name=target.name, warn=step.warnings.append
                )
            else:
                squares = total.diagonal() if total.dim() == 2 else total
                quantized[short] = quantize_weight(w, **vars(target.scheme), importance=squares)
        if target_outputs is not None and targets:
            with torch.enable_grad():
                quantized = learn_rounding(
                    layer, quantized, hidden, target_outputs, self.context,
                    iterations=options.iterations, seed=options.seed * 100_003 + index,
                )  # fmt: skip
        for short, target in targets.items():
            w = get_weight(layer, short)
            step.weights[target.name] = quantized[short]
            step.errors[target.name] = relative_error(w, quantized[short], sums[short])
        return step

    def _embed(self, weights: Mapping[str, QuantizedWeight]) -> Tensor:
        """Return the input of the first layer, (windows, S, E) float32."""
        decoder = self.model.model
        quantized = weights.get("model.embed_tokens")
        table = decoder.embed_tokens.weight.detach()
        if quantized is not None:
            table = quantized.dequantize(table.dtype)
        hidden = table[self.ids].float()
        return hidden * decoder.embedding_scale(table.dtype)

    def _run_layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        for part, out_part in zip(hidden.split(self.batch), out.split(self.batch)):
            stream, branch = layer(part, None, self.context)
            torch.add(stream, branch, out=out_part)
        return out

    def _head_moments(self, hidden: Tensor) -> Tensor:
        """Return the sum of ``x x^T`` over the head's inputs x, (E, E), or for "rtn" its diagonal,
        (E,). ``hidden``: the last layer's output.
        """
        norm = copy.deepcopy(self.model.model.norm).float()
        width, full = hidden.shape[-1], self.options.method != "rtn"
        total = hidden.new_zeros((width, width) if full else (width,))
        for part in hidden.split(self.batch):
            x = norm(part).flatten(0, -2)
            total += x.t() @ x if full else x.square().sum(0)
        return total


def layer_targets(targets: Sequence[Target], index: int) -> dict[str, Target]:
    """Return the targets in a decoder layer, by their names in it."""
    start = f"model.layers.{index}."
    return {t.name.removeprefix(start): t for t in targets if t.name.startswith(start)}


def has_folds(model: "CausalLM", targets: Sequence[Target]) -> bool:
    """Return whether AWQ's scales can be folded into a layer of `model`."""
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        if find_folds(layer, layer_targets(targets, index)):
            return True
    return False


def check_folds(model: "CausalLM", targets: Sequence[Target]) -> None:
    """Raise InputError if AWQ's scales can be folded into no layer of `model`."""
    if has_folds(model, targets):
        return
    raise InputError(
        "awq: expected layers with inputs from a norm or a quantized layer (all of q_proj,"
        " k_proj and v_proj; gate_proj and up_proj; up_proj and down_proj; v_proj and o_proj), got"
        f" {len(targets)} layers without"
    )


def _key(
    model: "CausalLM", targets: Sequence[Target], ids: Tensor, options: QuantizeOptions
) -> str:
    """Return a hash of what a stored step depends on."""
    values = [
        VERSION, [[t.name, vars(t.scheme)] for t in targets], list(ids.shape),
        model.config.to_dict(),
        options.method, options.iterations, options.seed, options.awq,
    ]  # fmt: skip
    return cache_key(values, ids, *model.parameters(), *model.buffers())
