"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of hidden layers,
AdamW for everything else, as one optimizer.

For a matrix W (n, m) with gradient G, momentum b and weight decay d:

    M = b M + (1 - b) G
    U = orthogonalize((1 - b) G + b M)          # Nesterov's momentum; without it, of M
    W = W - lr (d W + 0.2 sqrt(max(n, m)) U)

The factor gives an update the root mean square of AdamW's, about 0.2, so that AdamW's learning rate
and weight decay carry over (Moonlight, arXiv:2502.16982).

`orthogonalize` runs in float32 on a CPU without bfloat16 multiplication: on AVX2, torch's float32
product took 0.5 to 0.8 of the time of `fastlm.ops.linear` in bfloat16, and torch's bfloat16 product
40 to 60 times as long. On other devices it runs in bfloat16, as published. Rejected: one batched
product for all matrices of the same shape, which took 0.8 to 1.4 times as long on that CPU.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import reference
from fastlm.backend import multiplies_bf16
from fastlm.errors import InputError
from fastlm.optim import AdamW, _is_number, _is_sharded, _keep_master, _norm_of_shards

# The quintic with the steepest slope at 0 whose iterates stay near 1 (Jordan et al.)
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUST = ("match_rms_adamw", "original")


class Muon(AdamW):
    """``torch.optim.Muon`` and ``AdamW`` in one; `fastlm.muon.muon_groups` splits the groups::

        optimizer = fastlm.Muon(muon_groups(decay_matrices(model, 0.1), model), lr=1e-3)

    Args:
        params: parameters or groups. AdamW updates a group with ``use_muon=False``; all others
            contain matrices (n, m).
        lr, weight_decay: for both parts, or per group.
        momentum, nesterov, ns_steps: Muon's momentum and the steps of `orthogonalize`.
        adjust_lr_fn: the factor on an update. "match_rms_adamw": 0.2 sqrt(max(n, m)); "original":
            sqrt(max(1, n / m)).
        betas, eps: for AdamW.
        master_weights, max_grad_norm: as in `AdamW`, for both parts; the norm is that of all
            gradients together.

    A matrix has one state of its size, ``momentum_buffer`` (float32), and its master. A step costs
    2 ns_steps (2 s^2 l + s^3) multiply-adds per matrix, s its smaller side and l its larger.

    Raises InputError: as `AdamW`; parameters that are no matrices, or that are sharded (DTensor).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        master_weights: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        self._muon_defaults = {
            "use_muon": True,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(
            params, lr, betas, eps, weight_decay,
            master_weights=master_weights, max_grad_norm=max_grad_norm,
        )  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group({**self._muon_defaults, **param_group})
        try:
            _check(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_muon_defaults": self._muon_defaults}

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["use_muon"] else super()._moments(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        for grad in grads:
            if grad.layout != torch.strided:
                raise InputError(f"grad: expected a dense gradient, got layout {grad.layout}")
        norm, clip = None, 1.0
        if self.max_grad_norm is not None and grads:
            norm = _norm_of_shards(grads, grads[0].new_empty((), dtype=torch.float32))
            self.grad_norm = norm
            if self.max_grad_norm < math.inf:  # as torch.nn.utils.clip_grad_norm_
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for group in self.param_groups:
            for param in group["params"] if group["use_muon"] else ():
                if param.grad is not None:
                    self._step_matrix(param, group, clip)
        self._update([group for group in self.param_groups if not group["use_muon"]], norm)
        return loss

    def _step_matrix(self, param: Tensor, group: dict[str, Any], clip: Tensor | float) -> None:
        """Update one matrix."""
        state = self.state[param]
        if not state:
            self._start(param, group, state)
        if group["master_weights"]:
            _keep_master(param, state)
        average = state["momentum_buffer"]
        assert param.grad is not None
        grad = param.grad.to(average.dtype) * (-clip if group["maximize"] else clip)
        average.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp_(average, group["momentum"]) if group["nesterov"] else average
        update = orthogonalize(update, group["ns_steps"])
        state["step"] += 1
        lr, low = float(group["lr"]), state.get("master_low")
        if low is not None and param.dtype == torch.bfloat16:
            weight = reference.join_master(param, low)
        else:
            weight = state["master"] if "master" in state else param.to(average.dtype)
        weight.mul_(1 - lr * group["weight_decay"])
        rows, columns = param.shape
        weight.add_(update, alpha=-lr * _factor(rows, columns, group["adjust_lr_fn"]))
        if low is not None and param.dtype == torch.bfloat16:
            weight, rest = reference.split_master(weight)
            low.copy_(rest)
        param.copy_(weight)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V^T of the matrix U S V^T, (n, m). Returns float32 (float64 for float64).

    Newton-Schulz iterations ``X = a X + b (X X^T) X + c (X X^T)^2 X`` from X = matrix / its
    Frobenius norm. After five, singular values that were not near zero are in [0.68, 1.14]; the
    coefficients give up the exact 1 for fewer steps.
    """
    wide = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    narrow = wide == torch.float32 and (not matrix.is_cpu or multiplies_bf16())
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x.to(wide)
    x = (x / x.norm().clamp(min=1e-7)).to(torch.bfloat16 if narrow else wide)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(wide)


def muon_groups(groups: Iterable[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Split parameter groups of ``model`` into Muon's and AdamW's. Muon's are the weights of
    ``nn.Linear`` inside a ``nn.ModuleList``: those of the layers, but not embeddings, heads and
    norms.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    hidden = {id(m.weight) for m in linears}
    split = []
    for group in groups:
        for use_muon in (True, False):
            params = [p for p in group["params"] if (id(p) in hidden) == use_muon]
            split += [{**group, "params": params, "use_muon": use_muon}] if params else []
    if not any(group["use_muon"] for group in split):
        raise InputError(
            "optimizer: expected a model with trained nn.Linear weights inside a nn.ModuleList for"
            f" muon, got none in {type(model).__name__}"
        )
    return split


def _factor(rows: int, columns: int, name: str) -> float:
    if name == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def _check(group: dict[str, Any]) -> None:
    if not group["use_muon"]:
        return
    if not _is_number(group["momentum"]) or not 0 <= group["momentum"] < 1:
        raise InputError(f"momentum: expected a number in [0, 1), got {group['momentum']!r}")
    if not isinstance(group["ns_steps"], int) or group["ns_steps"] < 1:
        raise InputError(f"ns_steps: expected 1 or more, got {group['ns_steps']!r}")
    if group["adjust_lr_fn"] not in ADJUST:
        raise InputError(
            f"adjust_lr_fn: expected one of {', '.join(ADJUST)}, got {group['adjust_lr_fn']!r}"
        )
    for name, required in (("state_bits", 32), ("stochastic_rounding", False)):
        if group[name] != required:
            raise InputError(f"{name}: expected {required} with use_muon, got {group[name]!r}")
    for param in group["params"]:
        if param.ndim != 2:
            raise InputError(
                "params: expected matrices (n, m) in a group with use_muon, got "
                f"{tuple(param.shape)}"
            )
        if _is_sharded(param):
            raise InputError("params: expected unsharded matrices with use_muon, got a DTensor")
