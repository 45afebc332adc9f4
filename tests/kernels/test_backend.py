"""Tests of every op in different contexts: default dtype and device, autocast, tensor subclasses,
second derivatives, threads.
"""

import contextlib
import threading
import warnings

import pytest
import torch
from op_calls import (
    CALLS,
    DIFFERENTIABLE,
    cos,
    differentiable,
    each_op,
    gradients,
    head,
    k,
    lengths,
    offsets,
    pages,
    q,
    quantized,
    rows,
    sin,
    target,
    v,
    weight,
)

from fastlm import AdamW, InputError, _cpu, backend, ops


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request):
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@each_op
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_default_dtype_does_not_matter(default_dtype, name, function, tensors):
    with backend.use_backend(name):
        expected = function(*tensors)
        torch.set_default_dtype(default_dtype)
        assert torch.equal(function(*tensors), expected)
        assert function(*tensors).dtype == expected.dtype


@differentiable
def test_default_dtype_does_not_matter_to_gradients(default_dtype, function, tensors):
    expected = gradients(function, tensors)
    torch.set_default_dtype(default_dtype)
    for a, b in zip(gradients(function, tensors), expected):
        assert torch.equal(a, b) and a.dtype == b.dtype


@pytest.mark.parametrize("bits", [32, 8])
def test_default_dtype_does_not_matter_to_adamw(default_dtype, bits):
    results = []
    for dtype in (torch.float32, default_dtype):
        torch.set_default_dtype(dtype)
        p = torch.linspace(-1, 1, 5000, dtype=torch.float32).requires_grad_()
        opt = AdamW([p], max_grad_norm=1.0, state_bits=bits)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            opt.step()
            opt.load_state_dict(opt.state_dict())
        results.append((p.detach(), opt.grad_norm))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@each_op
def test_default_device_does_not_matter(function, tensors):
    with torch.no_grad():
        expected = function(*tensors)
        with torch.device("meta"):
            assert torch.equal(function(*tensors), expected)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_autocast(name, op):
    """Products use autocast's dtype, as in F.linear and torch's attention. Nothing else changes:
    the reference's own products would be bfloat16.
    """
    function, tensors = CALLS[op]
    cast = tensors
    if op.startswith(("attention", "varlen", "linear")):
        cast = [t.bfloat16() if t.dim() > 1 else t for t in tensors]
    with backend.use_backend(name):
        expected = function(*cast)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(*tensors)
    assert torch.equal(out, expected) and out.dtype == expected.dtype


class Wrapped(torch.Tensor):
    """A tensor without memory, like DTensor and quantized tensors."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        plain = [a.inner if isinstance(a, cls) else a for a in args]
        return function(*plain, **(kwargs or {}))


@each_op
def test_subclass_in_any_place_dispatches(function, tensors):
    """Read as a plain tensor it would be a null pointer."""
    with torch.no_grad():
        expected = function(*tensors)
        for i in range(len(tensors)):
            arguments = [Wrapped(t) if i == j else t for j, t in enumerate(tensors)]
            assert torch.equal(function(*arguments), expected)


@differentiable
def test_no_second_derivative_rather_than_zeros(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves).square().sum()
    with warnings.catch_warnings():  # the warning that create_graph may leak memory
        warnings.simplefilter("ignore")
        (first, *_) = torch.autograd.grad(loss, leaves, create_graph=True)
    if function is CALLS["rope"][0]:  # its gradient is the op itself
        torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)
        return
    with pytest.raises(
        NotImplementedError,
        match=r"no derivative: .*create_graph=True\) is refused",
    ):
        torch.autograd.grad(first.square().sum(), leaves)


@differentiable
def test_results_do_not_keep_the_graph_of_another_call(function, tensors):
    """A result "not needed" was one tensor for all calls: autograd wrote its graph into it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with warnings.catch_warnings():  # the warning that create_graph may leak memory
        warnings.simplefilter("ignore")
        torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
    logits, target = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    loss, stats = torch.ops.fastlm.cross_entropy_loss(logits, target, -100, True, 0.0, 1.0, False)
    assert not loss.requires_grad and not stats.requires_grad


@each_op
def test_inductor(function, tensors):
    """The default backend of torch.compile, which asserts the strides that fakes declare."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(*t) * 2, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), function(*tensors) * 2)
    if function in [f for f, _ in DIFFERENTIABLE.values()]:
        for a, b in zip(gradients(compiled, tensors), gradients(function, tensors)):
            torch.testing.assert_close(a, b * 2)


def test_other_threads_follow_torch():
    """OpenMP keeps the number of threads per thread; torch sets it in the calling thread."""
    before, counts = torch.get_num_threads(), []

    def work():
        with torch.no_grad():
            ops.glu(rows, rows)
        counts.append(_cpu.thread_count())

    try:
        torch.set_num_threads(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [1]


def test_worker_processes():
    """Ops run in a DataLoader worker, forked from a process whose OpenMP threads are running."""
    with torch.no_grad():
        expected = ops.rms_norm(torch.ones(2048, 512), torch.ones(512)).sum()
    loader = torch.utils.data.DataLoader(range(3), num_workers=1, collate_fn=_in_worker, timeout=60)
    assert all(torch.equal(x, expected) for x in loader)


def _in_worker(_):
    return ops.rms_norm(torch.ones(2048, 512), torch.ones(512)).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t: ops.rms_norm(rows, t(weight)),
            "weight: expected floats on cpu as x, got torch.float32 on meta",
        ),
        (
            lambda t: ops.rms_norm(rows, weight, residual=t(rows)),
            r"residual: expected torch.float32 of shape \(4, 32\) as x on cpu, got .* on meta",
        ),
        (lambda t: ops.rope(q, t(k), cos, sin), "k, cos, sin: expected device cpu as q"),
        (lambda t: ops.glu(rows, t(rows)), "up: expected .* on cpu as gate, got .* on meta"),
        (lambda t: ops.cross_entropy(rows, t(target)), "target: expected device cpu as logits"),
        (
            lambda t: ops.cross_entropy(rows, target, weight=t(weight)),
            r"weight: expected floats of shape \(32,\) on cpu, got .* on meta",
        ),
        (
            lambda t: ops.linear_cross_entropy(rows, t(head), target),
            "linear_weight: expected torch.float32 on cpu as input, got torch.float32 on meta",
        ),
        (
            lambda t: ops.linear_cross_entropy(rows, head, target, linear_bias=t(torch.ones(50))),
            r"linear_bias: expected floats of shape \(50,\) on cpu, got .* on meta",
        ),
        (lambda t: ops.attention(q, t(k), v), "k: expected device cpu as q, got meta"),
        (lambda t: ops.attention(q, k, v, sinks=t(torch.ones(4))), "sinks: expected .* on meta"),
        (lambda t: ops.attention(q, k, v, bias=t(torch.ones(8, 8))), "bias: expected .* on meta"),
        (
            lambda t: ops.varlen_attention(q[0], k[0], v[0], t(offsets)),
            r"cu_seqlens_q: expected \(B \+ 1,\) int32 on cpu, got .* on meta",
        ),
        (
            lambda t: ops.paged_attention(q, k, v, t(pages), lengths),
            "block_table: expected .* on cpu, got .* on meta",
        ),
        (
            lambda t: ops.quantized_linear(rows, quantized, t(torch.ones(24))),
            r"bias: expected a float tensor \(24,\) on cpu, got .* on meta",
        ),
        (lambda t: ops.quantized_linear(t(rows), quantized), "x: expected device cpu as qweight"),
    ],
)
def test_refuses_tensors_on_two_devices(call, message):
    """With one tensor on meta torch runs the fake, and the result was memory never written."""
    with pytest.raises(InputError, match=message):
        call(lambda t: t.to("meta"))


def test_cuda_functions_run_on_their_tensors_device(monkeypatch):
    """Kernels launch on the current device, so the call makes the tensors' device current."""
    entered = []

    class Elsewhere:
        is_cuda = True
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def made_current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    run = backend.guard_device(lambda *args: args)
    cpu_tensor, cuda_tensor = torch.zeros(1), Elsewhere()
    assert run(cpu_tensor, 3) == (cpu_tensor, 3) and entered == []
    assert run(cuda_tensor, 3) == (cuda_tensor, 3) and run([cuda_tensor], 3) == ([cuda_tensor], 3)
    assert entered == [cuda_tensor.device] * 2
