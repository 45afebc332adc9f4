"""AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) in one pass over memory for all tensors.

A drop-in for ``torch.optim.AdamW`` that adds clipping by the global norm inside the step, a float32
master copy or stochastic rounding for 16-bit parameters, and 8-bit states.

8-bit states are block-wise, as in Dettmers et al. 2022 (arXiv:2110.02861): 256 values share one
float32 scale, so an outlier costs precision only in its own block, and a tensor of fewer than 4096
elements stays in float32. Two things differ from that paper. A code is the top bits of the scaled
float (a small float, see `reference.pack_state`) rather than an index into a table, so encoding is
a shift where a table needs a search. The second moment is stored as its square root, which halves
the range to be covered and puts the rounding error where the update feels it; it never rounds to
zero.

`state_dict()` always uses torch's names and float32. The checkpoint of an 8-bit optimizer loads
into torch's, into a 32-bit one and back, and packing it again yields the same codes. Rejected:
saving the codes, a quarter of the size but in a format that only this class reads.
"""

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.ops.adamw import adamw
from fastlm.reference import AdamWOptions, AdamWTensor

MIN_8BIT_SIZE = 4096  # smaller tensors (norms, biases) gain nothing from 8 bits; the paper's limit

_CODES = {
    "exp_avg": False,
    "exp_avg_sq": True,
}  # state -> whether its square root is stored

_PLAIN, _PACKED = ("exp_avg", "exp_avg_sq"), ("exp_avg_code", "exp_avg_sq_code")


class AdamW(torch.optim.Optimizer):
    """``torch.optim.AdamW`` with the same update; see the module docstring for what differs.

    Args:
        params: parameters or groups; float32, bfloat16, float16 (float64 on the reference).
            A gradient may have another of these dtypes than its parameter.
        lr: float or one-element tensor.
        betas, eps, weight_decay, maximize: as in torch.
        state_bits: 32 or 8 per element of each moment.
        master_weights: the step updates a float32 master of each 16-bit parameter, and rounds the
            parameter from it. For bfloat16 only the 16 bits that the parameter lacks are kept, so a
            master costs 2 bytes, not 4. For float16 it is a float32 copy, taken at the first step:
            weights loaded into the model later are not seen. See also `keep_masters`.
        stochastic_rounding: bfloat16 parameters without a master copy are rounded up or down at
            random, unbiased, so that small updates are not lost. The random numbers are a function
            of `seed`, step and element. float32 parameters are not rounded at all.
        max_grad_norm: gradients are scaled inside the step as `torch.nn.utils.clip_grad_norm_` over
            all parameters would scale them (`p.grad` itself is unchanged); `inf` only measures.
        seed: seed of stochastic rounding.

    Attributes:
        grad_norm: with max_grad_norm, the norm in the last step, a float32 scalar tensor.

    States are float32 whatever the parameter's dtype. A step reads 16 and writes 12 bytes per
    float32 parameter; clipping reads the gradients again. The result does not depend on the number
    of threads. Non-finite gradients propagate as in torch; with 8-bit states, to their whole block.

    state_bits, master_weights, stochastic_rounding may be given per group.

    Parameters sharded by FSDP2 (DTensor) are updated shard by shard; the norm is that of all ranks'
    gradients. States go through ``torch.distributed.checkpoint.state_dict`` as DTensors. Each shard
    begins a new block of 8-bit states.

    On a GPU a step may be part of a CUDA graph. This needs `lr` as a tensor on the device, one step
    before the capture, and gradients that keep their memory (``zero_grad(set_to_none=False)``
    inside the graph).

    Hugging Face's Trainer accepts it as ``optimizer_cls_and_kwargs=(AdamW, {"lr": 3e-4,
    "max_grad_norm": 1.0})``, with ``max_grad_norm=0`` in the Trainer's own arguments. (Its
    ``optim`` only accepts transformers' names, and it clips in a separate pass.)

    Raises:
        InputError: an option that is out of range or not a number, complex or integer parameters, a
            parameter whose elements share memory, sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        seed: int = 0,
    ) -> None:
        if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm > 0):
            raise InputError(f"max_grad_norm: expected a number > 0 or None, got {max_grad_norm!r}")
        self.max_grad_norm = max_grad_norm
        self.seed = seed
        self.grad_norm: Tensor | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "state_bits": state_bits,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
            # torch.optim.AdamW looks for these in the groups of a state dict
            "amsgrad": False,
            "foreach": None,
            "capturable": False,
            "differentiable": False,
            "fused": None,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: getattr(self, name) for name in ("max_grad_norm", "seed", "grad_norm")}
        return super().__getstate__() | attributes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a group that torch.optim.AdamW saved lacks some options
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            _check_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self.param_groups)
        return loss

    def _update(self, groups: list[dict[str, Any]], norm: Tensor | None = None) -> None:
        """Step these groups. ``norm``: that of all gradients, if it is already computed."""
        tensors: list[AdamWTensor] = []
        copies: list[tuple[Tensor, Tensor]] = []
        grads: list[Tensor] = []
        ordinal = -1
        for group in groups:
            exact = _options(group)
            of_bfloat16 = exact._replace(stochastic=group["stochastic_rounding"])
            for param in group["params"]:
                ordinal += 1
                grad = param.grad
                if grad is None:
                    continue
                grads.append(grad)
                options = of_bfloat16 if param.dtype == torch.bfloat16 else exact
                local_param, tensor = self._tensor(param, grad, group, options, ordinal)
                tensors.append(tensor)
                if tensor.param is not local_param:
                    copies.append((local_param, tensor.param))
        if not tensors:
            return
        have_norm = norm is not None
        if self.max_grad_norm is not None:
            if norm is None:
                norm = torch.empty((), dtype=torch.float32, device=tensors[0].param.device)
                if have_norm := any(map(_is_sharded, grads)):
                    norm = _norm_of_shards(grads, norm)
            self.grad_norm = norm
        adamw(tensors, self.max_grad_norm or 0.0, norm, have_norm)
        for local_param, target in copies:
            local_param.copy_(target)
        # The kernel's writes must count as new versions: autograd checks them for saved tensors,
        # and the decoder for its packed copies.
        torch.autograd.graph.increment_version([t.param for t in tensors])

    def _tensor(
        self,
        param: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        options: AdamWOptions,
        ordinal: int,
    ) -> tuple[Tensor, AdamWTensor]:
        """Return this rank's part of the parameter, and what the op updates: itself or a dense
        copy.
        """
        if grad.layout != torch.strided:
            raise InputError(f"grad: expected a dense gradient, got layout {grad.layout}")
        state = self.state[param]
        if not state:
            self._start(param, group, state)
        if group["master_weights"]:
            _keep_master(param, state)
        sharded = _is_sharded(param)
        local_param, grad = (_local(param), _local(grad)) if sharded else (param, grad)
        target, grad = _dense(local_param, grad)
        moments = _PACKED if "exp_avg_scale" in state else _PLAIN
        moment = state[moments[0]]
        if (_local(moment) if sharded else moment).stride() != target.stride():
            # the parameter changed its memory order, for example by .to(memory_format=...)
            portable = _portable(state, param)
            state = self.state[param] = _laid_out(param, group, portable, _PLAIN)
        master = state.get("master_low" if param.dtype == torch.bfloat16 else "master")
        states = state[moments[0]], state[moments[1]], master
        exp_avg, exp_avg_sq, master = map(_local, states) if sharded else states
        return local_param, AdamWTensor(
            target, grad, state["step"], exp_avg, exp_avg_sq, state.get("exp_avg_scale"),
            state.get("exp_avg_sq_scale"), master, options, self.seed & 0xFFFFFFFF, ordinal,
        )  # fmt: skip

    @torch.no_grad()
    def keep_masters(self) -> None:
        """Take the masters of the groups with master_weights now, from the float32 parameters that
        the model is about to lose::

            optimizer = AdamW(model.parameters(), master_weights=True)
            optimizer.keep_masters()
            model.bfloat16()

        A master taken at the first step is on the grid of bfloat16. The first updates are less than
        half a step of that grid and move no weight. A master between two points of the grid crosses
        a rounding boundary as often as the size of its updates warrants. Over the first 40 steps of
        a 10 M model, the loss was above float32's by 0.007 with masters on the grid and by 0.0003
        with masters between its points.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if group["master_weights"] and param.dtype == torch.float32 and param.requires_grad:
                    state = self.state[param]
                    if not state:
                        self._start(param, group, state)
                    state["master_low"] = _low_half(param)

    def _start(self, param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in self._moments(group):
            state[name] = torch.zeros_like(param, dtype=wide)
        if group["master_weights"]:
            _keep_master(param, state)
        _pack(param, group, state)

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Return the names of the states that have the shape of the parameters."""
        del group
        return _PLAIN

    def state_dict(self) -> dict[str, Any]:
        """Return torch's `step`, `exp_avg`, `exp_avg_sq` (float32 also for 8 bits), and a float32
        `master` where there is one.
        """
        out = super().state_dict()
        # torch numbers the parameters in the order of the groups
        params = [param for group in self.param_groups for param in group["params"]]
        out["state"] = {key: _portable(state, params[key]) for key, state in out["state"].items()}
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of ``torch.optim.AdamW``.

        A bfloat16 parameter is rounded from its `master`, as it was when the state was saved.
        """
        # This checks the groups. The states, which it casts to their parameter's dtype, are
        # replaced below.
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        groups = [(param, group) for group in self.param_groups for param in group["params"]]
        for key, (param, group) in zip(saved, groups):
            saved_state = state_dict["state"].get(key)
            if not saved_state:
                continue
            self.state[param] = _laid_out(param, group, saved_state, self._moments(group))


def _check_group(group: dict[str, Any]) -> None:
    def refuse(name: str, expected: str) -> None:
        raise InputError(f"{name}: expected {expected}, got {group[name]!r}")

    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise InputError(f"lr: expected a number or a one-element tensor, got {tuple(lr.shape)}")
    for name in ("lr", "eps", "weight_decay"):
        if not _is_number(group[name]) or not float(group[name]) >= 0:
            refuse(name, "a number >= 0")
    betas = group["betas"]
    pair = isinstance(betas, Sequence) and len(betas) == 2 and all(_is_number(b) for b in betas)
    if not pair or not all(0 <= float(b) < 1 for b in betas):
        refuse("betas", "two numbers in [0, 1)")
    if group["state_bits"] not in (8, 32):
        refuse("state_bits", "8 or 32")
    if group["amsgrad"]:
        refuse("amsgrad", "False (not offered)")
    if group["master_weights"] and group["stochastic_rounding"]:
        raise InputError("stochastic_rounding: expected False with master_weights=True, got True")
    group["betas"] = (float(betas[0]), float(betas[1]))
    for param in group["params"]:
        if not param.is_floating_point():
            raise InputError(
                f"params: expected real floats, got {param.dtype} {tuple(param.shape)}"
            )
        if _may_overlap(param):
            raise InputError(
                f"params: expected elements that share no memory, got strides {param.stride()} for"
                f" {tuple(param.shape)}"
            )
        if group["stochastic_rounding"] and param.dtype == torch.float16:
            raise InputError(
                f"stochastic_rounding: expected bfloat16 or float32 parameters, got {param.dtype}"
            )


def _options(group: dict[str, Any]) -> AdamWOptions:
    lr, (beta1, beta2) = group["lr"], group["betas"]
    if not isinstance(lr, Tensor) or lr.is_cpu:  # reading it from a GPU would synchronize
        lr = float(lr)
    return AdamWOptions(
        lr, beta1, beta2, group["eps"], group["weight_decay"], group["maximize"], stochastic=False
    )


def _is_number(value: Any) -> bool:
    """Return whether the value is a number. YAML reads 1e-3 as a string."""
    return isinstance(value, Real | Tensor)


def _may_overlap(t: Tensor) -> bool:
    """Return whether two indices may address the same element.

    Conservative: also True for some tensors whose strides interleave without overlap.
    """
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * max(size - 1, 0)
    return False


def _is_sharded(tensor: Any) -> bool:
    """Return whether this is a DTensor (FSDP2), without its import, which takes 0.5 s."""
    return hasattr(tensor, "to_local")


def _local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, and anything else unchanged."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def _sharded_as(param: Tensor, shard: Tensor) -> Tensor:
    """Invert `_local`, for a shard whose elements correspond to those of `param`."""
    if not _is_sharded(param):
        return shard
    from torch.distributed.tensor import DTensor

    sharded: Any = param
    return DTensor.from_local(
        shard, sharded.device_mesh, sharded.placements, shape=param.shape, stride=param.stride()
    )


def _norm_of_shards(grads: list[Tensor], norm: Tensor) -> Tensor:
    """Return the norm of all ranks' gradients, as a tensor like `norm`. Squares are summed over the
    mesh dimensions along which a gradient is sharded. This does not synchronize with the device.
    """
    parts: dict[tuple, list[Tensor]] = {}
    for grad in grads:
        along: tuple = ()
        if _is_sharded(grad):
            dtensor: Any = grad
            placements = dtensor.placements
            if any(p.is_partial() for p in placements):
                raise InputError(f"grad: expected shards or replicas, got {placements}")
            along = tuple(
                (dtensor.device_mesh, i) for i, p in enumerate(placements) if not p.is_replicate()
            )
        parts.setdefault(along, []).append(_local(grad))
    total = torch.zeros_like(norm, dtype=torch.float64)
    for along, shards in parts.items():
        double = any(shard.dtype == torch.float64 for shard in shards)
        norms = torch._foreach_norm(  # pyright: ignore[reportPrivateImportUsage]
            shards, 2, dtype=torch.float64 if double else torch.float32
        )
        squares = torch.stack(norms).double().square().sum()
        for mesh, dimension in along:
            torch.distributed.all_reduce(squares, group=mesh.get_group(dimension))
        total += squares
    return total.sqrt().to(norm.dtype)


def _dense(param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return both without gaps and in the memory order of the states, copied if necessary."""
    if param.is_contiguous() and grad.is_contiguous():
        return param, grad
    like = torch.empty_like(param)
    target = param if like.stride() == param.stride() else like.copy_(param)
    if grad.stride() != target.stride():
        grad = torch.empty_like(target, dtype=grad.dtype).copy_(grad)
    return target, grad


def _laid_out(
    param: Tensor, group: dict[str, Any], saved: dict[str, Any], moments: tuple[str, ...]
) -> dict[str, Any]:
    """Copy a portable state to the memory order of its parameter."""
    for name in (*moments, *(["master"] if "master" in saved else [])):
        tensor = saved.get(name)
        if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"state_dict: {name}: expected shape {tuple(param.shape)}, got {got}")
    value = saved.get("step")
    valid = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
    if not valid:
        raise InputError(f"state_dict: step: expected one number, got {type(value).__name__}")
    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
    step = torch.as_tensor(saved["step"], dtype=torch.float32, device=param.device)
    state = {"step": step.reshape(()).clone()}
    for name in (*moments, "master"):
        if name in saved:
            state[name] = torch.empty_like(param, dtype=wide).copy_(saved[name])
    if "master" in state and param.dtype == torch.bfloat16:
        high, low = reference.split_master(_local(state.pop("master")))
        state["master_low"] = _sharded_as(param, low)
        with torch.no_grad():
            _local(param).copy_(high)
    _pack(param, group, state)
    return state


def _keep_master(param: Tensor, state: dict[str, Any]) -> None:
    """Add a master if the parameter's dtype needs one and it has none, even if the model was cast
    after its first steps. Drop a master of `keep_masters` if the parameter is still float32.
    """
    if param.dtype == torch.bfloat16:
        if "master_low" not in state:
            state["master_low"] = torch.zeros_like(param, dtype=torch.int16)
    else:
        state.pop("master_low", None)
        if param.dtype == torch.float16 and "master" not in state:
            state["master"] = param.detach().float()


def _low_half(param: Tensor) -> Tensor:
    """Return the bits that a float32 parameter loses in ``.bfloat16()``, as int16
    (`reference.split_master`).

    ``.bfloat16()`` rounds ties to even. Where it rounds a tie down, the lost half is one too large
    for an int16, and the master becomes the neighbouring value.
    """
    local_param = _local(param.detach())
    _, low = reference.split_master(local_param)
    even = (local_param.view(torch.int32) >> 16) & 1 == 0
    return _sharded_as(param, torch.where((low == -0x8000) & even, 0x7FFF, low))


def _pack(param: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    if group["state_bits"] == 8 and param.numel() >= MIN_8BIT_SIZE and param.dtype != torch.float64:
        for name, root in _CODES.items():
            x = _local(state.pop(name))
            codes = reference.pack_state(x.sqrt() if root else x, root=root)
            state[f"{name}_code"], state[f"{name}_scale"] = codes


def _portable(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    state = dict(state)
    state["step"] = state["step"].cpu()  # torch keeps it on the CPU, and reads its value
    low = state.pop("master_low", None)
    if low is not None and param.dtype == torch.bfloat16:
        master = reference.join_master(_local(param.detach()), _local(low))
        state["master"] = _sharded_as(param, master)
    for name, root in _CODES.items():
        if f"{name}_code" in state:
            codes, scales = state.pop(f"{name}_code"), state.pop(f"{name}_scale")
            x = reference.unpack_state(codes, scales, root=root)
            state[name] = _sharded_as(param, x.square() if root else x)
    return state
