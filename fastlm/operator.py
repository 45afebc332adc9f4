"""Declare an op once, in its file of `fastlm.ops`, from its definition.

`declare` takes the plain PyTorch functions of `fastlm.reference` and derives the rest:

- the schema of ``torch.ops.fastlm.<name>``, from the definition's signature;
- shapes for tensors without memory (the fake), by running the definition on such tensors;
- the derivative, from the names of the backward's parameters (`fastlm.derivative`);
- the host functions of the kernels, from the definition's module and name (`fastlm.backend`).

It returns a function that the public function calls. This function bypasses torch's dispatcher
where nothing traces or transforms the call. Public functions first convert dtypes with `autocast`
and `promote`.

Ops are registered with ``torch.library.Library`` (1.8 us per call here) and not with
``torch.library.custom_op`` (7.6 us).
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import forward_ad, profiler

from fastlm import flops as flop_formulas
from fastlm import transforms
from fastlm.backend import Support, add_op, select
from fastlm.derivative import Derivative
from fastlm.reference.blocks import shapes_only
from fastlm.transforms import PLAIN

_library = torch.library.Library("fastlm", "DEF")


def declare(
    definition: Callable,
    backends: str,
    *,
    dispatch_arg: str = "",
    supports: Mapping[str, Support] | None = None,
    fake: Callable | None = None,
    mutates_args: Sequence[str] = (),
    outputs: str = "",
    backward: Callable | None = None,
    gradients: Sequence[str | tuple[str, ...]] = (),
    saves: Mapping[str, Callable] | None = None,
    zeros_like: Mapping[str, str] | None = None,
    non_differentiable: Sequence[str] = (),
    flops: Callable | None = None,
    flops_by_values: Callable | None = None,
) -> Callable:
    """Define ``torch.ops.fastlm.<name>``. Its definition is called ``<name>`` or
    ``<name>_forward``.

    Args:
        definition: a function of `fastlm.reference`. Its annotated signature is the operator's. A
            parameter of a NamedTuple type is one argument of every implementation, and its fields
            are arguments of the operator.
        backends: the names of the backends with an implementation, without the reference.
        dispatch_arg: the tensor by whose device and dtype `select` chooses; by default the first.
        supports: backend -> the arguments that it supports; without an entry, all.
        fake: returns results of the right shapes. Pass it where the definition reads values, where
            a result is not contiguous, or where a model has the op in every layer: tracing a
            definition of ten torch ops takes 15 ms per call, a fake 1 ms.
        mutates_args: the arguments that the op writes. Such an op has no derivative.
        outputs, backward, gradients, saves, zeros_like, non_differentiable: the derivative; see
            `fastlm.derivative`.
        flops: counts FLOPs from the operator's arguments, tensors as shapes (`fastlm.flops`).
        flops_by_values: counts them from the tensors themselves.
    """
    name = definition.__name__.removesuffix("_forward")
    signature = _Signature(definition, mutates_args)
    inputs = signature.names
    dispatch_index = inputs.index(dispatch_arg) if dispatch_arg else signature.tensors[0]
    plain_definition = _without_autocast(definition)
    fake = fake or _shapes_of(definition, bool(mutates_args))
    entry = add_op(
        definition, backends, dispatch_arg=inputs[dispatch_index], supports=supports, fake=fake
    )
    entry.implementations["reference"] = plain_definition
    derivative = None
    if backward is not None:
        derivative = Derivative(
            signature.names, signature.optional, outputs, backward, gradients, saves or {},
            zeros_like or {}, non_differentiable,
        )  # fmt: skip

    def refuse(*_: Any) -> Any:  # without it torch warns and continues with zeros
        is_second = name.endswith("_backward")
        reason = ": a backward through a backward (create_graph=True) is refused" * is_second
        raise NotImplementedError(f"fastlm::{name} has no derivative{reason}")

    setup, backward_of_operator = None, refuse
    if derivative:
        setup, backward_of_operator = derivative.functions(
            signature.sizes, None if signature.is_flat else signature.pack
        )
    operator = _operator(name, signature, dispatch_index, fake)
    if formula := flops or flops_by_values:
        flop_formulas.register(getattr(torch.ops.fastlm, name), formula, raw=flops is None)
    if not mutates_args:  # torch differentiates no op that writes its arguments
        transforms.register_derivative(_library, operator, setup, backward_of_operator)
    flat = signature.flat
    packed = operator if signature.is_flat else lambda *args: operator(*flat(args))
    differentiable = packed
    if derivative:
        differentiable = _function(name, dispatch_index, *derivative.functions())
    transformed = transforms.transformed(
        operator, plain_definition, setup, backward_of_operator, flat
    )
    call = _call(name, signature, dispatch_index, packed, differentiable, transformed)
    return functools.update_wrapper(call, definition)


def _operator(name: str, signature: "_Signature", dispatch_index: int, fake: Callable) -> Any:
    """Define the operator, with its implementation for every device and its fake."""
    pack = signature.pack
    _library.define(f"{name}{signature.schema}", tags=(torch.Tag.pt2_compliant_tag,))

    def run(*args: Any) -> Any:
        args = pack(args)
        return select(name, args[dispatch_index])(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    flat_fake = fake if signature.is_flat else lambda *args: fake(*pack(args))
    torch.library.register_fake(f"fastlm::{name}", flat_fake, lib=_library)
    return getattr(torch.ops.fastlm, name).default


def _call(
    name: str,
    signature: "_Signature",
    dispatch_index: int,
    operator: Any,
    differentiable: Callable,
    transformed: Callable,
) -> Callable:
    """Make the function that the public function calls.

    On plain tensors, with nothing tracing or transforming, it runs the implementation itself: the
    dispatcher costs 4 us here, as much as a decode-size kernel. Otherwise it runs `operator`, which
    takes the implementations' arguments. Where a gradient is needed, the implementation runs inside
    a `torch.autograd.Function` (10 us in all, where the operator's derivative costs 35).
    """
    tensors, flat = signature.tensors, signature.flat
    is_compiling, is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
    modes, transform = torch._C._len_torch_dispatch_stack, transforms.innermost
    plain, is_tracing = (PLAIN | signature.options).issuperset, torch._C._is_tracing

    def call_with_profiler(*args: Any) -> Any:  # the dispatcher takes four times as long
        with _RecordFunctionFast(f"fastlm::{name}", flat(args)):
            if is_grad_enabled() and any(
                args[i] is not None and args[i].requires_grad for i in tensors
            ):
                return differentiable(*args)
            return select(name, args[dispatch_index])(*args)

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
                return call_with_profiler(*args)
            if is_grad_enabled():
                for i in tensors:
                    if (tensor := args[i]) is not None and tensor.requires_grad:
                        return differentiable(*args)
            try:
                return select(name, args[dispatch_index])(*args)
            except RuntimeError:  # tensors of a batched backward look plain but have no memory
                if not transforms.in_batched_backward():
                    raise
            return operator(*args)
        return transformed(*args)

    return call


class _Signature:
    """A definition's parameters, for the implementations and for the operator.

    The operator takes the fields of a NamedTuple as separate arguments.

    Attributes:
        schema: the operator's schema, without its name.
        names: the names of the parameters.
        tensors: the positions of the tensors.
        optional: the names of the parameters that may be None.
        sizes: for each parameter, the number of the operator's arguments.
        options: the types of the NamedTuples.
        is_flat: True without a NamedTuple.
    """

    def __init__(self, definition: Callable, mutates_args: Sequence[str]):
        parameters = [*inspect.signature(definition).parameters.values()]
        self.names = [p.name for p in parameters]
        flat, self.options = [], frozenset()
        self._types = []  # of each parameter: its NamedTuple, or None
        for parameter in parameters:
            annotation = parameter.annotation
            fields = getattr(annotation, "_fields", None)
            if fields is None:
                flat.append(parameter)
                self._types.append(None)
                continue
            self.options |= {annotation}
            if any("Tensor" in str(p.annotation) for p in parameters[len(self._types) :]):
                raise TypeError(
                    f"{definition.__name__}: expected {parameter.name} after all tensors"
                )
            self._types.append(annotation)
            flat += [
                parameter.replace(name=f, annotation=annotation.__annotations__[f]) for f in fields
            ]
        self.is_flat = not self.options
        self.sizes = [1 if t is None else len(t._fields) for t in self._types]

        def flattened(*_: Any) -> None: ...

        parameters = [p.replace(default=inspect.Parameter.empty) for p in flat]
        returns = inspect.signature(definition).return_annotation
        flattened.__signature__ = inspect.Signature(  # pyright: ignore[reportFunctionMemberAccess]
            parameters, return_annotation=returns
        )
        self.schema = torch.library.infer_schema(flattened, mutates_args=tuple(mutates_args))
        annotations = {
            p.name: str(p.annotation) for p in inspect.signature(definition).parameters.values()
        }
        self.tensors = [i for i, n in enumerate(self.names) if "Tensor" in annotations[n]]
        self.optional = {n for n in self.names if "None" in annotations[n]}

    def flat(self, args: Sequence[Any]) -> tuple:
        """Return the operator's arguments from the implementations'."""
        if self.is_flat:
            return tuple(args)
        parts = ((a,) if t is None else a for a, t in zip(args, self._types))
        return tuple(value for part in parts for value in part)

    def pack(self, args: tuple) -> tuple:
        """Return the implementations' arguments from the operator's."""
        if self.is_flat:
            return args
        values, at = [], 0
        for options_type, size in zip(self._types, self.sizes):
            values.append(args[at] if options_type is None else options_type(*args[at : at + size]))
            at += size
        return tuple(values)


def _shapes_of(definition: Callable, mutates_args: bool) -> Callable:
    """Make the fake of an op with contiguous results, where shapes do not depend on values."""
    if mutates_args:
        return lambda *_: None

    def fake(*args: Any) -> Any:
        with shapes_only():
            results = definition(*args)
        if isinstance(results, Tensor):
            return results.new_empty(results.shape)
        return tuple(r.new_empty(r.shape) for r in results)

    return fake


def _function(name: str, dispatch_index: int, setup: Callable, backward: Callable):
    """Return the implementation with its derivative, for plain tensors.

    `register_autograd` adds the same to the operator.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        output = select(name, args[dispatch_index])(*args)
        setup(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function: Any = type(name, (torch.autograd.Function,), methods)
    function._backward_cls.apply = backward  # torch's apply checks for other kinds of derivative
    # Function.apply checks for transforms, 0.9 us per call; `call` has already done that
    return super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]


def _without_autocast(function: Callable) -> Callable:
    """Wrap the reference so that it computes in float32 or wider even under 16-bit autocast."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def is_autocast_on(t: torch.Tensor) -> bool:
    """Return whether ``torch.autocast`` is on for t's device: never for a tensor without memory."""
    return t.device.type != "meta" and torch.is_autocast_enabled(t.device.type)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast the tensors as ``F.linear`` does: to the dtype of ``torch.autocast`` where it is on.

    Ops check `is_any_autocast_on` first: 0.06 us per call, where a check of a device takes 0.25.
    """
    if not is_autocast_on(tensors[0]):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors
    )


def promote(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast both to the wider of their dtypes, as torch's own addition does."""
    wide = torch.promote_types(a.dtype, b.dtype)
    return a.to(wide), b.to(wide)


is_any_autocast_on: Callable[[], bool] = torch._C._is_any_autocast_enabled
