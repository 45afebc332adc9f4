"""Support ``torch.func`` transforms and forward-mode AD of the ops.

- Forward-mode AD (``torch.func.jvp``, ``jacfwd``, ``linearize``, ``forward_ad``) runs the op's
  definition: torch differentiates plain PyTorch in every direction, so ``hessian`` works too.
- ``grad``, ``vjp``, ``jacrev`` and ``vmap`` run the kernels and the op's own derivative, inside
  and outside ``torch.compile``; ``vmap`` calls them once per sample.

Rejected: a forward-mode formula for each op, because it would be a third version of the same
function.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._compile import _disable_dynamo
from torch._functorch.utils import unwrap_dead_wrappers
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

# Argument types with which an operator may be called without the dispatcher. FakeTensor, DTensor
# and other subclasses, in any position, go through it.
PLAIN = frozenset(
    (torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype)
)

# The innermost transform of torch.func, or None.
innermost: Callable[[], Any] = _functorch.peek_interpreter_stack


def carries_tangent(args: tuple) -> bool:
    """Return whether one of these arguments carries a tangent of forward-mode AD."""
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )


def wants_gradient(t: Tensor) -> bool:
    """Return whether a backward through an op on `t` may follow.

    Under a transform that is always so, because its wrappers record only one level.
    """
    return (t.requires_grad and torch.is_grad_enabled()) or innermost() is not None


def is_traced() -> bool:
    """Return whether ``torch.jit.trace`` is recording."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Make values computed inside the ``with`` constants to ``torch.jit.trace``."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def transformed(
    operator: Any,
    definition: Callable,
    setup_context: Callable | None,
    backward: Callable,
    flat: Callable[[tuple], tuple],
) -> Callable:
    """Return the function for calls with tensors that are not plain, or under a transform or a
    trace. `flat` converts the definition's arguments to the operator's."""
    name = operator._schema.name
    function = _function(operator, setup_context, backward)

    def call(*args: Any) -> Any:
        transform = innermost()
        if transform is None and not carries_tangent(args):
            return operator(*flat(args))
        if operator._schema.is_mutable:
            raise NotImplementedError(f"{name} writes its arguments: no transform supports it")
        if forward_ad._current_level >= 0:
            return definition(*args)
        return function.apply(*flat(args))

    return call


def register_derivative(
    library: torch.library.Library, operator: Any, setup: Callable | None, backward: Callable
) -> None:
    """Register as ``torch.library.register_autograd`` and ``register_vmap`` do, with two changes.

    Under ``torch.func.grad``, where ``register_autograd`` would return zeros, `_function` runs.
    Forward-mode AD is refused.
    """
    name = operator._schema.name
    derivative = make_autograd_impl(operator, Info(backward, setup))
    function = _function(operator, setup, backward)

    @_disable_dynamo  # Dynamo would evaluate the conditions below while it traces
    def autograd(keyset: Any, *args: Any) -> Any:
        transform = innermost()
        if forward_ad._current_level >= 0 and (transform is not None or carries_tangent(args)):
            raise NotImplementedError(
                f"{name}: under forward-mode AD call fastlm.ops, and not inside torch.compile"
            )
        if transform is not None and transform.key() == _functorch.TransformType.Grad:
            with _outside_interpreter():
                return function.apply(*args)
        return derivative(keyset, *args)

    library.impl(operator._opname, autograd, "Autograd", with_keyset=True)
    torch.library.register_vmap(name, _sample_by_sample(operator), lib=library)


# The keys that torch.func's interpreter of one transform excludes from dispatch inside it
_EXCLUDED = tuple(
    torch._C._dispatch_key_parse(name)
    for name in (
        *("Functionalize", "Conjugate", "Negative", "ZeroTensor", "Tracer"),
        *("FuncTorchBatched", "BatchedNestedTensor", "Batched", "VmapMode", "FuncTorchGradWrapper"),
        *("DeferredInit", "PythonTLSSnapshot", "FuncTorchDynamicLayerFrontMode"),
    )
)


@contextlib.contextmanager
def _outside_interpreter() -> Iterator[None]:
    """Dispatch inside the ``with`` as at the op's call, so that every transform sees `_function`.

    torch.compile traces ``torch.func.grad`` with the op in the graph, and the transform's
    interpreter calls the op's derivative from inside.
    """
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _EXCLUDED:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude):
        yield


def _function(operator: Any, setup_context: Callable | None, backward: Callable) -> Any:
    """Return the operator as a `torch.autograd.Function` that torch.func can transform."""

    def context(ctx: Any, inputs: Any, output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, inputs, output)

    def alive(ctx: Any, *grads: Any) -> Any:
        return backward(_Alive(ctx), *grads)

    methods = {
        "forward": operator,  # no function: Dynamo would compile one for all ops, and give up
        "setup_context": context,
        "backward": alive,
        "vmap": _sample_by_sample(lambda *args: function.apply(*args)),
    }
    function: Any = type(
        operator._opname,
        (torch.autograd.Function,),
        {k: staticmethod(v) for k, v in methods.items()},
    )
    return function


class _Alive:
    """A ctx with saved tensors taken out of the wrappers of transforms that have ended."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.saved_tensors = unwrap_dead_wrappers(ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _sample_by_sample(function: Callable) -> Callable:
    """Return a vmap rule that calls the function once per sample."""

    def rule(info: Any, in_dims: tuple, *args: Any) -> tuple:
        if info.batch_size == 0:
            raise NotImplementedError("vmap of fastlm's ops: expected at least one sample, got 0")
        samples = [
            function(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(outputs) for outputs in zip(*samples)), (0,) * len(samples[0])

    return rule


_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")


def in_batched_backward() -> bool:
    """Return whether a backward of ``torch.autograd.grad(..., is_grads_batched=True)`` is running.

    The dispatcher splits its tensors into samples.
    """
    return torch._C._dispatch_tls_is_dispatch_key_included(_VMAP_MODE)


def is_eager(*tensors: torch.Tensor) -> bool:
    """Return whether values may be read: plain tensors, and nothing traces or transforms."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
        and innermost() is None
        and forward_ad._current_level < 0
        and PLAIN.issuperset(map(type, tensors))
    )
