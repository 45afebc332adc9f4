"""Quantize a `CausalLM` one decoder layer after another, each by what the quantized layers before
it pass on: in memory are the calibration tokens' hidden states and one layer in float32.

With a folder to keep them in, finished layers are read back after an interruption. The hidden
states are computed again, so the end is the same to the last bit.
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
from fastlm.quant.awq import folds, scale_features
from fastlm.quant.gptq import gptq
from fastlm.quant.options import QuantizeOptions
from fastlm.quant.rounding import learn_rounding
from fastlm.quant.step_result import (
    StepResult,
    digest,
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
# A tied embedding is looked up, too: errors of its rows count like so much of the head's mean
# square. On the 5.1 M model of docs/quantization.md, the embedding alone quantized, KL was 0.0094,
# 0.0077, 0.0069 and 0.0081 with 4, 1, 0.1 and 0.
LOOKUP = 0.1
_TOKENS = 4096  # per forward of a layer: activations stay below a few hundred MB


class _Moments:
    """Sums of ``x x^T`` (or of ``x^2``) over the inputs x of linear layers, while it is open.
    Layers that get the same tensor share one sum.
    """

    def __init__(self, modules: Mapping[str, nn.Module], full: bool):
        self.full = full
        self.sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self._inputs: dict[str, Tensor] = {}
        self._hooks = [m.register_forward_pre_hook(self._hook(n)) for n, m in modules.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: self._take(name, args[0])

    def _take(self, name: str, x: Tensor) -> None:
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
        """The owners are known after one forward: forget its inputs."""
        self._inputs.clear()

    def close(self) -> dict[str, Tensor]:
        for hook in self._hooks:
            hook.remove()
        return {name: self.sums[owner] for name, owner in self.owner.items()}


class LayerwiseQuantizer:
    """One quantization of `model` as planned. `ids`: (windows, S), the calibration text."""

    def __init__(
        self,
        model: "CausalLM",
        plan: Sequence[Target],
        ids: Tensor,
        options: QuantizeOptions,
        *,
        folder: Path | None = None,
        track: Callable = silent,
        log: Callable[[str], None] = lambda line: None,
    ):
        if options.awq:
            check_folds(model, plan)
        self.model, self.plan, self.options = model, plan, options
        self.ids, self.track, self.log, self.folder = ids, track, log, folder
        self.key = _key(model, plan, ids, options) if folder is not None else ""
        self.batch = max(1, _TOKENS // ids.shape[1])
        rotary = model.model.rotary(0, ids.shape[1], ids.shape[1], model.device)
        self.context = ForwardContext(None, None, None, rotary)

    @torch.no_grad()
    def run(self) -> Iterator[StepResult]:
        """Yield the steps in order. The model is not changed."""
        decoder, head = self.model.model, find_head(self.model)
        step = self._kept("embeddings", self._embeddings)
        yield step
        hidden = self._embedded(step.weights)
        plain = self._embedded({}) if self.options.method == "autoround" else None
        for index in self.track(range(len(decoder.layers)), "quantize", unit="layers"):
            name = f"model.layers.{index}"
            layer = copy.deepcopy(decoder.layers[index]).float().requires_grad_(False)
            assert isinstance(layer, DecoderLayer)
            targets = target_layers(self.plan, index)
            wanted = None if plain is None else self._through(layer, plain)
            step = self._kept(
                f"layer-{index:05d}", partial(self._layer, layer, targets, hidden, wanted, index)
            )
            for short, target in targets.items():
                get_weight(layer, short).copy_(step.weights[target.name].dequantize())
            for full, value in step.floats.items():
                layer.get_parameter(full.removeprefix(f"{name}.")).copy_(value)
            hidden, plain = self._through(layer, hidden), wanted
            if step.errors:
                mean = sum(step.errors.values()) / len(step.errors)
                self.log(f"{name}: error {100 * mean:.3g} % of its linear layers' outputs")
            yield step
        if last := [t for t in self.plan if t.module is head]:
            moments = self._final(hidden)
            yield self._kept("head", lambda: self._outer(last, moments))

    def _kept(self, name: str, work: Callable[[], StepResult]) -> StepResult:
        """Read the step back if it was finished, else do it and keep it."""
        if self.folder is None:
            return work()
        file = self.folder / f"{name}.safetensors"
        if (step := load_step_result(file, self.key)) is None:
            save_step_result(file, self.key, step := work())
        return step

    def _embeddings(self) -> StepResult:
        """Quantize the embedding; one that is the head, too, by the head's inputs."""
        decoder = self.model.model
        targets = [t for t in self.plan if t.module is decoder.embed_tokens]
        if not targets or self.model.head_weight is not decoder.embed_tokens.weight:
            return self._outer(targets, None)
        hidden = self._embedded({})
        for own in self.track(decoder.layers, "head's inputs", unit="layers"):
            hidden = self._through(copy.deepcopy(own).float(), hidden)
        moments = self._final(hidden)
        if moments.dim() == 2:  # looked up, too: by each row's error
            moments.diagonal().add_(LOOKUP * moments.diagonal().mean())
        return self._outer(targets, moments)

    def _outer(self, targets: Sequence[Target], moments: Tensor | None) -> StepResult:
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

    def _layer(
        self, layer: DecoderLayer, targets: Mapping[str, Target], hidden: Tensor,
        wanted: Tensor | None, index: int,
    ) -> StepResult:  # fmt: skip
        options, step = self.options, StepResult()
        modules = {short: layer.get_submodule(short) for short in targets}
        moments = _Moments(modules, full=options.method == "gptq" or options.awq)
        for part in hidden.split(self.batch):
            layer(part, None, self.context)
            moments.next()
        sums = moments.close()
        if options.awq:
            own, name = self.model.model.layers[index], f"model.layers.{index}"
            powers, floats = scale_features(
                layer, {short: target.scheme for short, target in targets.items()}, sums,
                {n: p.dtype for n, p in own.named_parameters()},
            )  # fmt: skip
            step.powers = {f"{name}.{short}": power for short, power in powers.items()}
            step.floats = {f"{name}.{short}": value for short, value in floats.items()}
        found: dict[str, QuantizedWeight] = {}
        for short, target in targets.items():
            w, total = get_weight(layer, short), sums[short]
            if options.method == "gptq":
                found[short] = gptq(
                    w, total, target.scheme, name=target.name, warn=step.warnings.append
                )
            else:
                squares = total.diagonal() if total.dim() == 2 else total
                found[short] = quantize_weight(w, **vars(target.scheme), importance=squares)
        if wanted is not None and targets:
            with torch.enable_grad():
                found = learn_rounding(
                    layer, found, hidden, wanted, self.context, iterations=options.iterations,
                    seed=options.seed * 100_003 + index,
                )  # fmt: skip
        for short, target in targets.items():
            w = get_weight(layer, short)
            step.weights[target.name] = found[short]
            step.errors[target.name] = relative_error(w, found[short], sums[short])
        return step

    def _embedded(self, weights: Mapping[str, QuantizedWeight]) -> Tensor:
        """What enters the first layer, (windows, S, E) float32."""
        decoder = self.model.model
        found = weights.get("model.embed_tokens")
        table = decoder.embed_tokens.weight.detach()
        if found is not None:
            table = found.dequantize(table.dtype)
        hidden = table[self.ids].float()
        return hidden * decoder.embedding_scale(table.dtype)

    def _through(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        for part, place in zip(hidden.split(self.batch), out.split(self.batch)):
            stream, branch = layer(part, None, self.context)
            torch.add(stream, branch, out=place)
        return out

    def _final(self, hidden: Tensor) -> Tensor:
        """The head's inputs x, of what left the last layer: the sum of ``x x^T``, (E, E), or for
        "rtn" its diagonal, (E,).
        """
        norm = copy.deepcopy(self.model.model.norm).float()
        width, full = hidden.shape[-1], self.options.method != "rtn"
        total = hidden.new_zeros((width, width) if full else (width,))
        for part in hidden.split(self.batch):
            x = norm(part).flatten(0, -2)
            total += x.t() @ x if full else x.square().sum(0)
        return total


def target_layers(plan: Sequence[Target], index: int) -> dict[str, Target]:
    """The targets in a decoder layer, by their names in it."""
    start = f"model.layers.{index}."
    return {t.name.removeprefix(start): t for t in plan if t.name.startswith(start)}


def check_folds(model: "CausalLM", plan: Sequence[Target]) -> None:
    """Raise InputError if AWQ's scales could be folded into no layer of `model`."""
    for index, layer in enumerate(model.model.layers):
        assert isinstance(layer, DecoderLayer)
        if folds(layer, target_layers(plan, index)):
            return
    raise InputError(
        "awq: expected layers whose inputs come from a norm or a quantized layer (all of q_proj,"
        " k_proj and v_proj; gate_proj and up_proj; up_proj and down_proj; v_proj and o_proj), got"
        f" {len(plan)} layers without"
    )


def _key(model: "CausalLM", plan: Sequence[Target], ids: Tensor, options: QuantizeOptions) -> str:
    """What a kept step depends on."""
    told = [
        VERSION, [[t.name, vars(t.scheme)] for t in plan], list(ids.shape), model.config.to_dict(),
        options.method, options.iterations, options.seed, options.awq,
    ]  # fmt: skip
    return digest(told, ids, *model.parameters(), *model.buffers())
