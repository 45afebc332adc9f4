"""The types of which a table of cases consists, and the functions that run a case.

A case is a dict of JSON values: shapes, flags, options. `build` makes tensors and functions of it.
A row of a table is a case with a name. A line of the fuzz corpus is a case that was drawn at
random.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from tolerance import assert_accurate
from torch import Tensor

Case = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALL = ("cpu", "triton", "cuda")
SLOW = ("scalar", "amx_emulated")  # instruction sets 10 to 50 times slower: smaller cases


class Terms(NamedTuple):
    """Sizes of the terms of a result's elements, as tolerance.py expects them."""

    scale: Tensor | None = None
    float32: Tensor | None = None
    rounded: Tensor | None = None


class OpCall(NamedTuple):
    """A case made into tensors: a call of an op, and what its results are compared with."""

    function: Callable  # maps the leaves to one tensor or a tuple
    leaves: list[Tensor]  # every tensor of the call
    plain: Callable | None = None  # the same in plain torch, in the dtype of its arguments
    # (leaves and upstream gradients in float64) -> the scales of tolerance.py by the name of the
    # result ("y", "dx"), where a scale is larger than the result itself
    terms: Callable[..., dict[str, Tensor | Terms]] | None = None
    outputs: tuple[str, ...] = ("y",)
    names: tuple[str, ...] = ()  # of the leaves; if empty: the function's parameters
    check: Callable[[], None] | None = None  # instead of `plain`
    # instead of `plain`: (leaves before the call, results) -> raises where one is wrong
    verify: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None
    differentiable: bool = True
    constant: tuple[int, ...] = ()  # leaves of floats that get no gradient
    library: bool = False  # products are torch's: threads and strides may change their last bits
    # All strides yield the same bits: no sum depends on whether vectors fit.
    any_strides: bool = True
    dense: tuple[int, ...] = ()  # leaves whose last dimension has to be contiguous


class Row(NamedTuple):
    """A case of a table, and the tests that run it in addition to the comparison with float64."""

    case: Case
    on: tuple[str, ...] = ALL  # kernels that have an edge there
    bits: bool = False  # strides, repetition
    split: bool = False  # enough work for several threads: tests of threads, denormals, allocation
    shipped: bool = False  # large: on the constants that ship, not on an op's `settings`


class Op(NamedTuple):
    """An op's table of cases."""

    build: Callable[[Case, torch.dtype], OpCall]
    draw: Callable[[Random, str], Case]  # (random numbers, instruction set) -> a random case
    kernels: tuple[str, ...] = ALL
    rows: dict[str, Row] = {}
    small: dict[str, Case] = {}  # for opcheck, and gradcheck of the reference
    batches: dict[str, list[Case]] = {}  # for torch.compile: one graph serves each list
    forward_only: tuple[str, ...] = ()  # kernels without a backward
    any_strides: tuple[str, ...] = ALL  # kernels for which all strides yield the same bits
    # kernels -> name -> a function that makes the host divide the work of small cases
    settings: dict[str, dict[str, Callable[[Any], None]]] = {}
    # other ops have the same code on avx512f as on avx512_fma (csrc/cpu/base/each_isa.h)
    multiplies_int8: bool = False
    # instruction sets that are never chosen, and the code of others for other ops
    forced_isas: tuple[str, ...] = ()

    def build_for(
        self, case: Case, dtype: torch.dtype, kernels: str, device: str = "cpu"
    ) -> OpCall:
        """Build a case for a kind of kernels: cpu, triton or cuda."""
        call = self.build(case, dtype)
        return call._replace(
            leaves=[t.to(device) for t in call.leaves],
            differentiable=call.differentiable and kernels not in self.forward_only,
            any_strides=call.any_strides and kernels in self.any_strides,
        )


# ---- random cases


def size(r: Random, maximum: int, minimum: int = 0) -> int:
    """Draw a size: small more often than large, mostly near a multiple of a kernel's tile."""
    if r.random() < 0.1:
        return minimum
    n = math.exp(r.uniform(0, math.log(maximum)))
    if r.random() < 0.6:
        step = r.choice([8, 16, 32, 64, 128, 256])
        n = round(n / step) * step + r.choice([-1, 0, 0, 0, 1])
    return min(maximum, max(minimum, int(n)))


def choice_or_none(r: Random, *choices: Any) -> Any:
    """Return None half of the time, else one of the choices."""
    return r.choice(choices) if r.random() < 0.5 else None


def drop_unset(**options: Any) -> Case:
    return {name: value for name, value in options.items() if value not in (None, False)}


def leading_shape(r: Random, rows: int) -> list[int]:
    """Return a shape with this number of rows."""
    for n in (2, 3, 5):
        if rows % n == 0 and rows and r.random() < 0.3:
            return [n, rows // n]
    return [rows]


def random_shape(r: Random, isa: str, max_width: int, min_width: int = 0) -> list[int]:
    """Draw a shape of some rows that are at most `max_width` wide."""
    while True:
        rows, width = size(r, 300), size(r, max_width, min_width)
        if isa != "simt" or rows * width <= 20000:
            return [*leading_shape(r, rows), width]


def name_parameters(function: Callable, names: Sequence[str]) -> Callable:
    """Give the function's parameters these names, by which gradients are called "dx" and so on."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind) for name in names]
    function.__dict__["__signature__"] = inspect.Signature(parameters)
    return function


# ---- running them


def run(
    function: Callable,
    leaves: Sequence[Tensor],
    upstream: Sequence[Tensor] | None = None,
    *,
    differentiable: bool = True,
    constant: Sequence[int] = (),
    scatter: Random | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs and gradients, and the upstream gradients: random ones, or those passed.
    `scatter` also scatters these.
    """
    leaves = [t.detach() for t in leaves]
    if differentiable:
        for i, t in enumerate(leaves):
            t.requires_grad_(needs_gradient(t, i, constant))
    torch.manual_seed(5)  # for dropout
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    reached = [t for t in outputs if t.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [
            torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in reached
        ]
    used = [u.to(t.dtype) for u, t in zip(upstream, reached, strict=bool(reached))]
    if scatter:
        used = [scattered_copy(t, scatter) for t in used]
    grads = ()
    if reached:
        expected = [t for t in leaves if t.requires_grad]
        grads = torch.autograd.grad(reached, expected, used, allow_unused=True)
    results = [t.detach() for t in outputs] + [t for t in grads if t is not None]
    return results, list(upstream)


def needs_gradient(leaf: Tensor, i: int, constant: Sequence[int]) -> bool:
    return leaf.is_floating_point() and i not in constant


def results(call: OpCall, leaves: Sequence[Tensor], scatter: Random | None = None) -> list[Tensor]:
    """Return outputs and gradients. `scatter` scatters the upstream gradients."""
    how = {"differentiable": call.differentiable, "constant": call.constant}
    return run(call.function, leaves, **how, scatter=scatter)[0]


def clone_leaves(call: OpCall) -> list[Tensor]:
    """Clone the leaves, because the op may write to them."""
    return [t.clone() for t in call.leaves]


def check(call: OpCall) -> None:
    """Compare outputs and gradients with those of plain torch in float64."""
    if call.check:
        call.check()
        return
    if call.verify:
        call.verify(call.leaves, results(call, clone_leaves(call)))
        return
    assert call.plain
    leaves64 = [t.double() if t.is_floating_point() else t for t in call.leaves]
    how = {"differentiable": call.differentiable, "constant": call.constant}
    actual, upstream = run(call.function, call.leaves, **how)
    naive, _ = run(call.plain, call.leaves, upstream, **how)
    truth, _ = run(call.plain, leaves64, upstream, **how)
    names = list(call.outputs)
    if len(actual) > len(names):
        of_leaves = call.names or inspect.signature(call.function).parameters
        inputs = enumerate(zip(of_leaves, call.leaves))
        names += [f"d{x}" for i, (x, t) in inputs if needs_gradient(t, i, call.constant)]
    with torch.no_grad():
        terms = call.terms(*leaves64, *(u.double() for u in upstream)) if call.terms else {}
    for name, a, p, t in zip(names, actual, naive, truth, strict=True):
        assert a.dtype == p.dtype, f"{name}: {a.dtype}, and {p.dtype} by plain torch"
        size = terms.get(name)
        sizes = size if isinstance(size, Terms) else Terms(size)
        factor = 3 if name.startswith("d") else 2  # backward, forward
        assert_accurate(a, p, t, **sizes._asdict(), factor=factor, label=name)


def scattered_copy(t: Tensor, r: Random, unit: int = 0) -> Tensor:
    """Copy a tensor into a random memory order, with gaps of NaN in and around every dimension.
    `unit`: elements of the last dimension are contiguous, and each row begins at a multiple of
    `unit` elements.
    """
    order = list(range(t.dim()))
    if r.random() < 0.3:
        r.shuffle(order)
    steps = [r.choice([1, 1, 1, 2]) for _ in order]
    before, after = ([r.choice([0, 0, 1, 3]) for _ in order] for _ in range(2))
    offset = r.choice([0, 1, 5])
    if unit and order:
        order.sort(key=lambda i: i == t.dim() - 1)
        steps[-1], offset = 1, offset * unit
        before[-1], after[-1] = before[-1] * unit, after[-1] * unit + -t.shape[-1] % unit
    shape = [t.shape[i] * steps[i] + before[i] + after[i] for i in order]
    base = torch.empty(offset + math.prod(shape), dtype=t.dtype, device=t.device)[offset:]
    view = base.view(shape).permute([order.index(i) for i in range(t.dim())])
    for i in range(t.dim()):
        view = view.narrow(i, before[i], t.shape[i] * steps[i])
        view = view.unflatten(i, (t.shape[i], steps[i])).select(i + 1, 0)
    return view.copy_(t)


def misaligned_copy(t: Tensor, dim: int) -> Tensor:
    """Copy a tensor so that one stride is no multiple of 16 bytes, where all others are. The last
    dimension stays contiguous. If it is `dim`, it does not begin at a multiple of 16 bytes.
    """
    strides, reach = [1], t.shape[-1]
    for i in reversed(range(t.dim() - 1)):
        strides.insert(0, -(-reach // 16) * 16 + (i == dim))
        reach = strides[0] * t.shape[i]
    start = int(dim == t.dim() - 1)
    base = torch.empty(start + reach, dtype=t.dtype, device=t.device)
    return base.as_strided(t.shape, strides, base.storage_offset() + start).copy_(t)


def assert_same(expected: Sequence[Tensor], actual: Sequence[Tensor], label: str) -> None:
    """Assert equality to the last bit; any NaN equals any other."""
    for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{label}: result {i}: expected {a.dtype} {tuple(a.shape)},"
            f" got {b.dtype} {tuple(b.shape)}"
        )
        same = ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
        assert same.all(), (
            f"{label}: result {i} differs in {int((~same).sum())} of {same.numel()} elements, "
            f"by {(a.double() - b.double()).nan_to_num(0.0).abs().max():.3e}"
        )


def assert_like(expected: Sequence[Tensor], actual: Sequence[Tensor], label: str) -> None:
    """Assert equality up to two roundings, or up to what reordered sums of logits of 20 change in
    e^z.
    """
    for a, b in zip(expected, actual, strict=True):
        tolerance = max(2 * torch.finfo(a.dtype).eps, 1e-4)
        scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
        torch.testing.assert_close(
            b,
            a,
            rtol=tolerance,
            atol=tolerance * scale,
            equal_nan=True,
            msg=lambda m: f"{label}: {m}",
        )
