"""Quantization-aware distillation: codes, scales, offsets and norms of a quantized model are
trained together, so that it predicts what the unquantized one does (LLM-QAT, Liu et al. 2023,
arXiv:2305.17888, on the user's text).

A weight is ``s round(u) (+ z)``. u, in units of the code, begins at the rounded weight's codes;
``s = a s0``, a near 1 per group, is rounded as it is stored; z moves in units of s0. The gradient
passes both roundings unchanged, and u stays where a step can bring it back from the ends of the
codes' range. The loss is ``KL(unquantized || quantized)`` of the next token, head included.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastlm.errors import InputError
from fastlm.files import make_folder, remove, save_atomic
from fastlm.ops import linear_distillation
from fastlm.ops.quantize_weight import code_range
from fastlm.ops.quantized_weight import QuantizedWeight, pack_rows
from fastlm.optim import AdamW
from fastlm.progress import silent
from fastlm.quant.plan import Target
from fastlm.quant.step import Step, digest, keep_step, read_step
from fastlm.reference import unpack_rows

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

STATE, DONE = "distilling.safetensors", "distilled.safetensors"
VERSION = 1  # raised when the same model, text and options give other weights
TOKENS = 1024  # of a step
HELDOUT = 4096  # tokens that are not learnt but judged, at most an eighth of the text
SAVE_SECONDS = 300.0  # between two states in the progress folder
# Learning rates of the codes, in codes; of scales and offsets, in shares of the scale; of norms
RATES = {"codes": 0.01, "scales": 1e-3, "floats": 1e-4}
WARM_UP = 0.1  # share of the steps in which the rates rise; they fall to 0 after it
_MARGIN = 0.49  # how far beyond the last code u may be


class _Scaled(torch.autograd.Function):
    """``round(u) s``, groups of `size` columns of u (N, K); s (N, groups). K is a multiple of size
    or the only group's width."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, s: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(u, s)
        ctx.size = size
        return _in_groups(u.round(), size).mul_(s[..., None]).flatten(1)[:, : u.shape[1]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        u, s = ctx.saved_tensors
        g, q = (_in_groups(x, ctx.size) for x in (gradients[0], u.round()))
        of_s = q.mul_(g).sum(-1)
        return (g * s[..., None]).flatten(1)[:, : u.shape[1]], of_s, None


def _in_groups(x: Tensor, size: int) -> Tensor:
    """(N, K) -> (N, groups, size), zeros after a short last group."""
    short = -x.shape[1] % size
    return (nn.functional.pad(x, (0, short)) if short else x).view(len(x), -1, size)


class _Rounded(nn.Module):
    """The parametrization of a weight: u -> the weight as it is stored."""

    def __init__(self, start: QuantizedWeight):
        super().__init__()
        self.start, self.size = start, min(start.group_size, start.shape[1])
        self.s0 = start.scales.float()
        self.a = nn.Parameter(torch.ones_like(self.s0))
        self.b = None if start.zeros is None else nn.Parameter(torch.zeros_like(self.s0))

    def forward(self, u: Tensor) -> Tensor:
        w = _Scaled.apply(u, self._stored(self.a * self.s0), self.size)
        assert isinstance(w, Tensor)
        if (z := self.zeros()) is not None:
            w = w + z.repeat_interleave(self.size, 1)[:, : w.shape[1]]
        return w

    def _stored(self, x: Tensor) -> Tensor:
        return x + (x.detach().to(self.start.scales.dtype).float() - x.detach())

    def zeros(self) -> Tensor | None:
        if self.start.zeros is None or self.b is None:
            return None
        return self._stored(self.start.zeros.float() + self.b * self.s0)

    @torch.no_grad()
    def packed(self, u: Tensor) -> QuantizedWeight:
        start, dtype, z = self.start, self.start.scales.dtype, self.zeros()
        return QuantizedWeight(
            pack_rows(u.round(), start.bits), (self.a * self.s0).to(dtype),
            None if z is None else z.to(dtype), start.bits, start.group_size, start.shape,
        )  # fmt: skip


class Distillation:
    """One distillation of `model`, unquantized, into its quantized form.

    Args:
        model: the teacher; not changed.
        plan: the layers that are quantized.
        weights: name of a layer -> its quantized weight, to begin with.
        floats: parameters that changed with them, as AWQ's norms: name -> value.
        ids: (windows, S), the text. The last eighth, at most `HELDOUT` tokens, is held out.
        steps: of about `TOKENS` tokens; the text is read again where it is shorter.
        seed: of the order of windows.
        folder: keeps the state, so that the same call goes on from there, to the same bits.

    The student computes in float32. In memory are 20 bytes for each of its weights (u, its value,
    gradient and moments) beside the model and what one step keeps for its backward.
    """

    def __init__(
        self,
        model: "CausalLM",
        plan: Sequence[Target],
        weights: Mapping[str, QuantizedWeight],
        floats: Mapping[str, Tensor],
        ids: Tensor,
        *,
        steps: int,
        seed: int = 0,
        folder: Path | None = None,
        track: Callable = silent,
        tell: Callable[[str], None] = lambda line: None,
    ):
        self.teacher, self.plan, self.weights, self.floats = model, plan, weights, floats
        kept = heldout_windows(len(ids), ids.shape[1])
        self.ids, self.heldout = ids[:-kept], ids[-kept:]
        self.steps, self.seed, self.folder = steps, seed, folder
        self.track, self.tell = track, tell
        self.batch = max(1, min(TOKENS // ids.shape[1], len(self.ids)))

    def run(self) -> Step:
        """The trained weights and floats, or the given ones where those predict the held-out text
        no worse. InputError: a loss that is not finite."""
        key = self._key() if self.folder is not None else ""
        if self.folder is not None:
            if (kept := read_step(self.folder / DONE, key)) is not None:
                return kept
        step = self._trained(key)
        if self.folder is not None:
            keep_step(self.folder / DONE, key, step)
            remove(self.folder / STATE)
        return step

    def _trained(self, key: str) -> Step:
        student, rounded = self._student()
        groups = {"codes": [], "scales": [], "floats": []}
        for name, r in rounded.items():
            groups["codes"].append(_codes(student, name))
            groups["scales"] += [r.a] if r.b is None else [r.a, r.b]
        learnt = {n: p for n, p in student.named_parameters() if p.dim() == 1}
        groups["floats"] = list(learnt.values())
        student.requires_grad_(False)
        for parameters in groups.values():
            for p in parameters:
                p.requires_grad_(True)
        optimizer = AdamW(
            [{"params": p, "lr": 0.0} for p in groups.values()], betas=(0.9, 0.99),
            weight_decay=0.0, max_grad_norm=None,
        )  # fmt: skip
        before = self._heldout_kl(student)
        begin = self._resume(key, student, optimizer)
        saved, told, total = time.monotonic(), max(1, self.steps // 10), 0.0
        steps = range(begin, self.steps)
        for step in self.track(steps, "distill", total=len(steps), unit="steps"):
            rate = self._rate(step)
            for group, name in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = rate * RATES[name]
            loss = self._loss(student, self._windows(step))
            total += (value := float(loss.detach()))
            if not math.isfinite(value):
                raise InputError(f"distill: wanted a finite loss, got {value} in step {step + 1}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for name, u in zip(rounded, groups["codes"], strict=True):
                    q = self.weights[name]
                    low, high = code_range(q.bits, q.zeros is None)
                    u.clamp_(low - _MARGIN, high + _MARGIN)
            if (step + 1) % told == 0:
                self.tell(f"distill: step {step + 1} of {self.steps}, KL {total / told:.4f}")
                total = 0.0
            if self.folder is not None and time.monotonic() - saved >= SAVE_SECONDS:
                self._save(key, step + 1, student, optimizer)
                saved = time.monotonic()
        after = self._heldout_kl(student)
        figures = {"steps": self.steps, "kl_before": before, "kl_after": after,
                   "kept": after < before}  # fmt: skip
        if not after < before:
            line = f"distill: the start is kept: held-out KL {before:.4f} before, {after:.4f} after"
            return Step(warnings=[line], distilled=figures)
        self.tell(f"distill: held-out KL {before:.4f} -> {after:.4f}")
        own = dict(self.teacher.named_parameters())
        return Step(
            {name: r.packed(_codes(student, name)) for name, r in rounded.items()},
            floats={name: p.detach().to(own[name].dtype) for name, p in learnt.items()},
            distilled=figures,
        )

    def _student(self) -> tuple["CausalLM", dict[str, _Rounded]]:
        """A float32 copy of the model whose quantized weights are `_Rounded`."""
        student = copy.deepcopy(self.teacher).float().eval()
        with torch.no_grad():
            for name, value in self.floats.items():
                student.get_parameter(name).copy_(value)
            rounded = {}
            for target in self.plan:
                start = self.weights[target.name]
                module = student.get_submodule(target.name)
                u = unpack_rows(start.qdata, start.bits, start.shape[1])
                module.get_parameter("weight").copy_(u)
                rounded[target.name] = _Rounded(start)
                parametrize.register_parametrization(module, "weight", rounded[target.name])
        return student, rounded

    def _windows(self, step: int) -> Tensor:
        """The windows of a step: a new order for every pass over the text."""
        places = []
        for n in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(n, len(self.ids))
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            places.append(int(torch.randperm(len(self.ids), generator=generator)[place]))
        return self.ids[places]

    def _rate(self, step: int) -> float:
        rising = max(1.0, WARM_UP * self.steps)
        return min((step + 1) / rising, (self.steps - step) / (self.steps - rising + 1))

    def _loss(self, student: "CausalLM", ids: Tensor) -> Tensor:
        """The mean KL of the tokens after those of `ids`, (B, S)."""
        ids = ids.to(self.teacher.device)
        with torch.no_grad():
            wanted = self.teacher.hidden(ids)
        cap = self.teacher.config.final_logit_softcapping
        with parametrize.cached():  # a tied head is the embedding's value
            hidden = student.hidden(ids)
            head = student.head_matrix(hidden.dtype)
        return linear_distillation(
            hidden, head, wanted, self.teacher.head_matrix(wanted.dtype),
            student_softcap=cap, teacher_softcap=cap,
        )  # fmt: skip

    @torch.no_grad()
    def _heldout_kl(self, student: "CausalLM") -> float:
        parts = self.heldout.split(self.batch)
        with parametrize.cached():
            total = sum(float(self._loss(student, ids)) * len(ids) for ids in parts)
        return total / len(self.heldout)

    def _key(self) -> str:
        """What a kept state depends on."""
        told = [VERSION, self.steps, self.seed, self.batch, len(self.heldout), RATES,
                [[t.name, t.scheme.bits, t.scheme.group_size] for t in self.plan],
                self.teacher.config.to_dict()]  # fmt: skip
        parts = [p for t in self.plan for q in [self.weights[t.name]]
                 for p in (q.qdata, q.scales, q.zeros) if p is not None]  # fmt: skip
        return digest(
            told, self.ids, self.heldout, *self.teacher.parameters(), *parts, *self.floats.values()
        )

    def _save(self, key: str, step: int, student: "CausalLM", optimizer: AdamW) -> None:
        assert self.folder is not None
        tensors = {f"student.{n}": p.detach() for n, p in _learnt(student)}
        for place, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{place}.{n}": t for n, t in state.items()}
        make_folder(self.folder)
        metadata = {"key": key, "step": str(step)}
        save_atomic(self.folder / STATE, lambda part: save_file(tensors, part, metadata=metadata))

    def _resume(self, key: str, student: "CausalLM", optimizer: AdamW) -> int:
        """Read the kept state, and return its step: 0 where there is none, or one of other weights
        or options."""
        if self.folder is None:
            return 0
        try:
            with safe_open(self.folder / STATE, framework="pt") as kept:
                metadata = kept.metadata() or {}
                if metadata.get("key") != key:
                    return 0
                names = list(kept.keys())
                state = optimizer.state_dict()
                for name in names:
                    kind, _, rest = name.partition(".")
                    if kind == "optimizer":
                        place, _, part = rest.partition(".")
                        state["state"].setdefault(int(place), {})[part] = kept.get_tensor(name)
                optimizer.load_state_dict(state)
                with torch.no_grad():
                    for name, parameter in _learnt(student):
                        parameter.copy_(kept.get_tensor(f"student.{name}"))
        except (OSError, SafetensorError):
            return 0
        return int(metadata["step"])


def _codes(student: nn.Module, name: str) -> nn.Parameter:
    """u of a layer."""
    u = student.get_parameter(f"{name}.parametrizations.weight.original")
    assert isinstance(u, nn.Parameter)
    return u


def _learnt(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in student.named_parameters() if p.requires_grad]


def heldout_windows(windows: int, length: int) -> int:
    """How many of so many windows are held out."""
    return max(1, min(windows // 8, HELDOUT // length))


def tokens_of(steps: int) -> int:
    """The tokens of text that so many steps read, the held-out ones included."""
    return steps * TOKENS + HELDOUT if steps else 0
