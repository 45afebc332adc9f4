"""How an op becomes a torch operator, and what its public function calls.

`register` defines ``torch.ops.fastlm.<name>``. The function that it returns bypasses torch's
dispatcher where nothing traces or transforms the call. Public functions first convert dtypes with
`autocast` and `promoted`.

Ops are registered with ``torch.library.Library`` (1.8 us per call here) and not with
``torch.library.custom_op`` (7.6 us).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad, profiler

from fastlm import flops as flop_formulas
from fastlm import transforms
from fastlm.backend import add_op, pick
from fastlm.transforms import PLAIN

_library = torch.library.Library("fastlm", "DEF")


def register(
    schema: str,
    *,
    fake: Callable,
    implementations: dict[str, Any],
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    picked_by: int = 0,
    flops: Callable | None = None,
    flops_by_values: Callable | None = None,
) -> Callable:
    """Define ``torch.ops.fastlm.<name>``: schema, shapes (`fake`), implementations and autograd.

    `picked_by` is the position of the tensor whose device and dtype decide the implementation.
    `flops` counts FLOPs from the arguments, tensors as shapes (`fastlm.flops`); `flops_by_values`
    counts them from the tensors themselves.

    Returns the function that the public function calls. It runs the operator or, on plain tensors
    with nothing tracing or transforming, the implementation itself: the dispatcher costs 4 us here,
    as much as a decode-size kernel. Where a gradient is needed, the implementation runs inside a
    `torch.autograd.Function` (10 us in all, where the operator's derivative costs 35).
    """
    name = schema.split("(", 1)[0]
    definition = _without_autocast(implementations["reference"])
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        return pick(name, args[picked_by])(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlm::{name}", fake, lib=_library)

    def refuse(*_: Any) -> Any:  # without it torch warns and continues with zeros
        raise NotImplementedError(f"fastlm::{name} has no derivative")

    packet = getattr(torch.ops.fastlm, name)
    operator = packet.default
    add_op(
        name, implementations | {"reference": definition},
        picked_by=operator._schema.arguments[picked_by].name, fake=fake,
    )  # fmt: skip
    if formula := flops or flops_by_values:
        flop_formulas.add(packet, formula, raw=flops is None)
    if not operator._schema.is_mutable:  # torch differentiates no op that writes its arguments
        transforms.register_derivative(_library, operator, setup_context, backward or refuse)
    differentiable = operator
    if backward:
        differentiable = _differentiable(name, picked_by, setup_context, backward)
    transformed = transforms.transformed(operator, definition, setup_context, backward or refuse)
    tensors = [i for i, a in enumerate(operator._schema.arguments) if "Tensor" in str(a.type)]
    is_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
    modes, transform = torch._C._len_torch_dispatch_stack, transforms.innermost
    plain, is_tracing = PLAIN.issuperset, torch._C._is_tracing

    def recorded(*args: Any) -> Any:  # the dispatcher takes four times as long
        with _RecordFunctionFast(f"fastlm::{name}", args):
            if is_grad_enabled() and any(
                args[i] is not None and args[i].requires_grad for i in tensors
            ):
                return differentiable(*args)
            return pick(name, args[picked_by])(*args)

    def call(*args: Any) -> Any:
        if is_compiling():
            return operator(*args)
        if (
            plain(map(type, args))
            and not modes()
            and transform() is None
            and not is_tracing()
            and forward_ad._current_level < 0
        ):
            if profiler._is_profiler_enabled:
                return recorded(*args)
            if is_grad_enabled():
                for i in tensors:
                    if (tensor := args[i]) is not None and tensor.requires_grad:
                        return differentiable(*args)
            try:
                return pick(name, args[picked_by])(*args)
            except RuntimeError:  # tensors of a batched backward look plain but have no memory
                if not transforms.in_batched_backward():
                    raise
            return operator(*args)
        return transformed(*args)

    return call


def _differentiable(name: str, picked_by: int, setup: Callable | None, backward: Callable):
    """The implementation with its derivative, for plain tensors: the counterpart of what
    `register_autograd` adds to the operator.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = pick(name, args[picked_by])(*args)
        if setup is not None:
            setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    function._backward_cls.apply = backward  # torch's own checks for other kinds of derivative
    # Function.apply checks for transforms, 0.9 us per call; `call` has already done that
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def _without_autocast(function: Callable) -> Callable:
    """The reference, which computes in float32 or wider even where autocast would use 16 bits."""

    @functools.wraps(function)
    def wide(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return wide


def autocasts(t: torch.Tensor) -> bool:
    """Whether ``torch.autocast`` is on for t's device; never for a tensor without memory."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast the tensors as ``F.linear`` does: to the dtype of ``torch.autocast`` where it is on.

    Ops check `autocast_somewhere` first: 0.06 us per call, where a check of a device takes 0.25.
    """
    if not autocasts(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def promoted(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast both to the wider of their dtypes, as torch's own addition does."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


autocast_somewhere: Callable[[], bool] = torch._C._is_any_autocast_enabled
