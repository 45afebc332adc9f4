"""Quantization-aware distillation trains scales, offsets, norms and biases of a quantized model
together, so that it predicts what the unquantized model does. The trained parameters are those of
EfficientQAT's last phase (Chen et al. 2024, arXiv:2407.11062).

A weight is ``s q (+ z)``. The codes q are fixed. ``s = a s0``, with a near 1 per group, is rounded
to its stored dtype, and the gradient passes straight through the rounding. z moves in units of s0.
The loss is ``KL(unquantized || quantized)`` of the next token, head included.

Rejected: training the codes, too, straight through ``round(u)``. In few steps too many codes cross
an edge. KL of held-out text after 24 steps of 512 tokens on the 5.1 M model of
docs/quantization.md, rounded by GPTQ, 0.0082 at the start: 0.0076 without; with u by the mean
gradient over its matrix's root mean square 0.17 from the codes on, 0.010 and 0.037 from the
unquantized weight on. With Adam for u 0.0090 and 0.026 (40 steps).
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlm.errors import InputError
from fastlm.files import remove
from fastlm.ops import linear_distillation
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.optim import AdamW
from fastlm.progress import silent
from fastlm.quant.step_result import (
    StepResult,
    cache_key,
    load_step_result,
    load_tensors,
    save_step_result,
    save_tensors,
)
from fastlm.quant.targets import Target
from fastlm.reference import unpack_rows

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

STATE, DONE = "distilling.safetensors", "distilled.safetensors"
VERSION = 1  # raised when the same model, text and options give other weights
TOKENS = 1024  # of a step
HELDOUT = 4096  # tokens that are evaluated, not trained on; at most an eighth of the text
SAVE_SECONDS = 300.0  # between two states in the progress folder
# The maximum change of a parameter over all steps: scales and offsets in shares of the scale; norms
# and biases in shares of their root mean square. The learning rates are these divided by the number
# of steps.
MAX_CHANGE = {"scales": 0.02, "floats": 0.01}
WARM_UP = 0.1  # share of the steps in which the rates rise; they fall to 0 after it


class _ScaleCodes(torch.autograd.Function):
    """``q s``: codes q (N, K), s (N, groups), groups of `size` columns, the last may be short. q
    gets no gradient; only q is saved for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, s: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(q)
        ctx.size = size
        return (_in_groups(q, size) * s[..., None]).flatten(1)[:, : q.shape[1]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (q,) = ctx.saved_tensors
        return None, (_in_groups(q, ctx.size) * _in_groups(gradients[0], ctx.size)).sum(-1), None


def _in_groups(x: Tensor, size: int) -> Tensor:
    """Split (N, K) into (N, groups, size), with zeros after a short last group."""
    short = -x.shape[1] % size
    return (nn.functional.pad(x, (0, short)) if short else x).view(len(x), -1, size)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x rounded to a dtype, with the gradient of x."""
    return x + (x.detach().to(dtype).float() - x.detach())


class _TrainableScales(nn.Module):
    """The parametrization of a weight: codes q -> the stored weight."""

    def __init__(self, start: QuantizedWeight):
        super().__init__()
        self.start, self.size = start, min(start.group_size, start.shape[1])
        self.s0 = start.scales.float()
        self.a = nn.Parameter(torch.ones_like(self.s0))
        self.b = None if start.zeros is None else nn.Parameter(torch.zeros_like(self.s0))

    def forward(self, q: Tensor) -> Tensor:
        s = _rounded(self.a * self.s0, self.start.scales.dtype)
        w = _ScaleCodes.apply(q, s, self.size)
        assert isinstance(w, Tensor)
        if (z := self.zeros()) is not None:
            w = w + z.repeat_interleave(self.size, 1)[:, : w.shape[1]]
        return w

    def zeros(self) -> Tensor | None:
        if self.start.zeros is None or self.b is None:
            return None
        return _rounded(self.start.zeros.float() + self.b * self.s0, self.start.zeros.dtype)

    @torch.no_grad()
    def to_quantized(self) -> QuantizedWeight:
        start, z = self.start, self.zeros()
        if z is not None and start.zeros is not None:
            z = z.to(start.zeros.dtype)
        scales = (self.a * self.s0).to(start.scales.dtype)
        return QuantizedWeight(start.qdata, scales, z, start.bits, start.group_size, start.shape)


class _Student:
    """A float32 copy of `model` and its optimizer; its quantized weights are `_TrainableScales`."""

    def __init__(
        self, model: "CausalLM", targets: Sequence[Target], weights: Mapping[str, QuantizedWeight],
        floats: Mapping[str, Tensor],
    ):  # fmt: skip
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        for name, value in floats.items():
            self.model.get_parameter(name).copy_(value)
        self.parametrizations: dict[str, _TrainableScales] = {}
        for target in targets:
            module = self.model.get_submodule(target.name)
            trainable = _TrainableScales(weights[target.name])
            q = weights[target.name]
            module.get_parameter("weight").copy_(unpack_rows(q.qdata, q.bits, q.shape[1]))
            parametrize.register_parametrization(module, "weight", trainable)
            self.parametrizations[target.name] = trainable
        scales = [p for r in self.parametrizations.values() for p in r.parameters()]
        # scales are matrices
        self.floats = {n: p for n, p in self.model.named_parameters() if p.dim() == 1}
        groups = [{"params": scales, "max_change": MAX_CHANGE["scales"]}]
        for p in self.floats.values():
            size = float(p.square().mean().sqrt())
            groups.append({"params": [p], "max_change": MAX_CHANGE["floats"] * size})
        for p in (*scales, *self.floats.values()):
            p.requires_grad_(True)
        self.adam = AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the gradients and clear them."""
        for group in self.adam.param_groups:
            group["lr"] = rate * group["max_change"]
        self.adam.step()
        self.adam.zero_grad()

    def to_quantized(self) -> dict[str, QuantizedWeight]:
        return {name: r.to_quantized() for name, r in self.parametrizations.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the state that a later step depends on, not copied."""
        tensors = {f"model.{n}": p for n, p in self.model.named_parameters() if p.requires_grad}
        for index, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{n}": t for n, t in state.items()}
        return {n: t.detach().contiguous() for n, t in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        adam = self.adam.state_dict()
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "adam":
                index, _, part = rest.partition(".")
                adam["state"].setdefault(int(index), {})[part] = tensor
            else:
                self.model.get_parameter(rest).copy_(tensor)
        self.adam.load_state_dict(adam)


class Distillation:
    """Distill `model`, unquantized, into its quantized form.

    Args:
        model: the teacher; not changed.
        targets: the layers that are quantized.
        weights: name of a layer -> its initial quantized weight.
        floats: name -> value of the parameters that changed with them, such as AWQ's norms.
        ids: (windows, S), 2 or more. The last eighth, at most `HELDOUT` tokens, is held out.
        steps: number of steps of about `TOKENS` tokens; a shorter text is read again.
        seed: of the order of windows.
        folder: stores the state. The same call continues from it, to the same bits.

    The student computes in float32. It needs 12 bytes for each of its weights (code, value and
    gradient), besides the model and what one step saves for its backward.
    """

    def __init__(
        self,
        model: "CausalLM",
        targets: Sequence[Target],
        weights: Mapping[str, QuantizedWeight],
        floats: Mapping[str, Tensor],
        ids: Tensor,
        *,
        steps: int,
        seed: int = 0,
        folder: Path | None = None,
        track: Callable = silent,
        log: Callable[[str], None] = lambda line: None,
    ):
        self.teacher, self.targets, self.weights, self.floats = model, targets, weights, floats
        heldout = num_heldout_windows(len(ids), ids.shape[1])
        self.ids, self.heldout = ids[:-heldout], ids[-heldout:]
        self.steps, self.seed, self.folder = steps, seed, folder
        self.track, self.log = track, log
        self.batch = max(1, min(TOKENS // ids.shape[1], len(self.ids)))

    def run(self) -> StepResult:
        """Return the trained weights and floats, or none if the initial ones predict the held-out
        text at least as well. InputError: a loss that is not finite.
        """
        if self.folder is None:
            return self._train("")
        key = self._key()
        if (result := load_step_result(self.folder / DONE, key)) is not None:
            return result
        result = self._train(key)
        save_step_result(self.folder / DONE, key, result)
        remove(self.folder / STATE)
        return result

    def _train(self, key: str) -> StepResult:
        with torch.no_grad():
            student = _Student(self.teacher, self.targets, self.weights, self.floats)
        before, begin = self._heldout_kl(student), 0
        if self.folder is not None and (saved := load_tensors(self.folder / STATE, key)):
            student.load(saved[0])
            begin = saved[1]["step"]
        losses: list[float] = []
        last_save, log_steps = time.monotonic(), max(1, self.steps // 10)
        steps = range(begin, self.steps)
        for step in self.track(steps, "distill", total=len(steps), unit="steps"):
            loss = self._loss(student, self._windows(step))
            losses.append(_finite(float(loss.detach()), f"in step {step + 1}"))
            loss.backward()
            student.step(self._rate(step))
            if (step + 1) % log_steps == 0:
                mean = sum(losses) / len(losses)
                self.log(f"distill: step {step + 1} of {self.steps}, KL {mean:.4f}")
                losses.clear()
            if self.folder is not None and time.monotonic() - last_save >= SAVE_SECONDS:
                save_tensors(self.folder / STATE, key, student.state(), step=step + 1)
                last_save = time.monotonic()
        after = _finite(self._heldout_kl(student), f"after step {self.steps}")
        metrics = {
            "steps": self.steps, "tokens": min(self.steps * self.batch * self.ids.shape[1],
                                               self.ids.numel()),
            "heldout_tokens": self.heldout.numel(), "kl_before": before, "kl_after": after,
            "accepted": after < before,
        }  # fmt: skip
        if not after < before:
            line = (
                "distill: the initial weights stay: held-out KL"
                f" {before:.4f} before, {after:.4f} after"
            )
            return StepResult(warnings=[line], distillation=metrics)
        self.log(f"distill: held-out KL {before:.4f} -> {after:.4f}")
        parameters = dict(self.teacher.named_parameters())
        floats = {n: p.detach().to(parameters[n].dtype) for n, p in student.floats.items()}
        return StepResult(student.to_quantized(), floats=floats, distillation=metrics)

    def _windows(self, step: int) -> Tensor:
        """Return the windows of a step, in a new order for every pass over the text."""
        indices = []
        for n in range(step * self.batch, (step + 1) * self.batch):
            epoch, position = divmod(n, len(self.ids))
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            indices.append(int(torch.randperm(len(self.ids), generator=generator)[position]))
        return self.ids[indices]

    def _rate(self, step: int) -> float:
        """Return the share of `MAX_CHANGE` in a step; the shares of all steps sum to about 1."""
        rising = max(1.0, WARM_UP * self.steps)
        falling = (self.steps - step) / (self.steps - rising + 1)
        return 2 / self.steps * min((step + 1) / rising, falling)

    def _loss(self, student: _Student, ids: Tensor) -> Tensor:
        """Return the mean KL of the tokens after those of `ids`, (B, S)."""
        ids = ids.to(self.teacher.device)
        with torch.no_grad():
            teacher_hidden = self.teacher.hidden(ids)
        cap = self.teacher.config.final_logit_softcapping
        with parametrize.cached():  # a tied head is computed once
            hidden = student.model.hidden(ids)
            head = student.model.head_matrix(hidden.dtype)
        return linear_distillation(
            hidden, head, teacher_hidden, self.teacher.head_matrix(teacher_hidden.dtype),
            student_softcap=cap, teacher_softcap=cap,
        )  # fmt: skip

    @torch.no_grad()
    def _heldout_kl(self, student: _Student) -> float:
        with parametrize.cached():
            parts = self.heldout.split(self.batch)
            total = sum(float(self._loss(student, ids)) * len(ids) for ids in parts)
        return total / len(self.heldout)

    def _key(self) -> str:
        """Return a hash of what a saved state depends on."""
        values = [VERSION, self.steps, self.seed, self.batch, len(self.heldout), MAX_CHANGE,
                [[t.name, t.scheme.bits, t.scheme.group_size] for t in self.targets],
                self.teacher.config.to_dict()]  # fmt: skip
        parts = [p for t in self.targets for q in [self.weights[t.name]]
                 for p in (q.qdata, q.scales, q.zeros) if p is not None]  # fmt: skip
        return cache_key(
            values,
            self.ids,
            self.heldout,
            *self.teacher.parameters(),
            *parts,
            *self.floats.values(),
        )


def _finite(loss: float, when: str) -> float:
    if not math.isfinite(loss):
        raise InputError(f"distill: expected a finite loss, got {loss} {when}")
    return loss


def num_heldout_windows(windows: int, length: int) -> int:
    """Return the number of held-out windows."""
    return max(1, min(windows // 8, HELDOUT // length))


def tokens_needed(steps: int) -> int:
    """Return the number of tokens that ``steps`` steps need, held-out ones included."""
    return steps * TOKENS + HELDOUT if steps else 0
