"""What every op owes its caller whatever surrounds the call: default dtype and device, autocast,
tensor subclasses, second derivatives, threads.
"""

import contextlib
import threading
import warnings

import pytest
import torch

from fastlm import AdamW, InputError, _cpu, backend, ops

_rows, _weight, _head = torch.randn(4, 32), torch.randn(32), torch.randn(50, 32)
_target = torch.tensor([1, 2, -100, 4])
_q, _k, _v = (torch.randn(2, h, 8, 16) for h in (4, 2, 2))
_cos, _sin = torch.randn(2, 8, 16).unbind(0)
_offsets, _pages, _lengths = torch.tensor([0, 3, 8]), torch.tensor([[0], [1]]), torch.tensor([8, 5])
_quantized = ops.quantize_weight(torch.randn(24, 32), 4, symmetric=False)
_caches = [t.transpose(1, 2) for t in (_k, _v)]

# name -> (function of its float tensors, those tensors)
CALLS = {
    "rms_norm": (lambda x, w: ops.rms_norm(x, w, residual=x)[0], (_rows, _weight)),
    "rope": (lambda q, k: ops.rope(q, k, _cos, _sin)[0], (_q, _k)),
    "glu": (lambda g, u: ops.glu(g, u), (_rows, _rows.flip(0))),
    "cross_entropy": (
        lambda x: ops.cross_entropy(x, _target, label_smoothing=0.1, z_loss=0.1),
        (_rows,),
    ),
    "linear_cross_entropy": (lambda x, w: ops.linear_cross_entropy(x, w, _target), (_rows, _head)),
    "linear_cross_entropy, rows": (
        lambda x, w: ops.linear_cross_entropy(x, w, _target, reduction="none", label_smoothing=0.1),
        (_rows, _head),
    ),
    "attention": (
        lambda q, k, v, sinks: ops.attention(q, k, v, causal=True, sinks=sinks),
        (_q, _k, _v, torch.randn(4)),
    ),
    "attention, decode": (lambda q, k, v: ops.attention(q[:, :, :1], k, v), (_q, _k, _v)),
    "varlen_attention": (
        lambda q, k, v: ops.varlen_attention(q, k, v, _offsets),
        tuple(t[0].transpose(0, 1) for t in (_q, _k, _v)),
    ),
    "paged_attention": (
        lambda q: ops.paged_attention(q, *_caches, _pages, _lengths),
        (_q.transpose(1, 2),),
    ),
    "paged_attention, int8": (
        lambda q: ops.paged_attention(
            q, *(t.to(torch.int8) for t in _caches), _pages, _lengths, k_scale=0.1, v_scale=0.2
        ),
        (_q.transpose(1, 2),),
    ),
    "quantized_linear": (lambda x: ops.quantized_linear(x, _quantized), (_rows,)),
    "dequantize": (lambda: _quantized.dequantize(torch.bfloat16), ()),
}
each_op = pytest.mark.parametrize("function, tensors", CALLS.values(), ids=CALLS)
DIFFERENTIABLE = {n: c for n, c in CALLS.items() if "paged" not in n and n != "dequantize"}
differentiable = pytest.mark.parametrize(
    "function, tensors", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE
)


def gradients(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves).sum(), leaves)


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
    """Products take autocast's dtype, as F.linear and torch's attention do; nothing else changes:
    the reference's own products would be bfloat16."""
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
    """A tensor without memory of its own, as DTensor and quantized tensors are."""

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
    """Read as a plain tensor it is a null pointer."""
    with torch.no_grad():
        expected = function(*tensors)
        for i in range(len(tensors)):
            given = [Wrapped(t) if i == j else t for j, t in enumerate(tensors)]
            assert torch.equal(function(*given), expected)


@differentiable
def test_no_second_derivative_rather_than_zeros(function, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss = function(*leaves).square().sum()
    with warnings.catch_warnings():  # that create_graph may leak memory
        warnings.simplefilter("ignore")
        (first, *_) = torch.autograd.grad(loss, leaves, create_graph=True)
    if function is CALLS["rope"][0]:  # its gradient is itself
        torch.autograd.grad(first.square().sum(), leaves, allow_unused=True)
        return
    with pytest.raises(NotImplementedError, match="_backward has no derivative"):
        torch.autograd.grad(first.square().sum(), leaves)


@pytest.mark.slow
@each_op
def test_inductor(function, tensors):
    """The default backend of torch.compile, which asserts the strides that fakes promise."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: function(*t) * 2, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors), function(*tensors) * 2)
    if function in [f for f, _ in DIFFERENTIABLE.values()]:
        for a, b in zip(gradients(compiled, tensors), gradients(function, tensors)):
            torch.testing.assert_close(a, b * 2)


def test_other_threads_follow_torch():
    """OpenMP keeps the number of threads per thread; torch sets it where it is asked."""
    before, seen = torch.get_num_threads(), []

    def work():
        with torch.no_grad():
            ops.glu(_rows, _rows)
        seen.append(_cpu.thread_count())

    try:
        torch.set_num_threads(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


def test_worker_processes():
    """In a worker of a DataLoader, forked from a process whose OpenMP threads run."""
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
            lambda t: ops.rms_norm(_rows, t(_weight)),
            "weight: wanted floats on cpu as x, got torch.float32 on meta",
        ),
        (
            lambda t: ops.rms_norm(_rows, _weight, residual=t(_rows)),
            r"residual: wanted torch.float32 of shape \(4, 32\) as x on cpu, got .* on meta",
        ),
        (lambda t: ops.rope(_q, t(_k), _cos, _sin), "k, cos, sin: wanted device cpu as q"),
        (lambda t: ops.glu(_rows, t(_rows)), "up: wanted .* on cpu as gate, got .* on meta"),
        (lambda t: ops.cross_entropy(_rows, t(_target)), "target: wanted device cpu as logits"),
        (
            lambda t: ops.cross_entropy(_rows, _target, weight=t(_weight)),
            r"weight: wanted floats of shape \(32,\) on cpu, got .* on meta",
        ),
        (
            lambda t: ops.linear_cross_entropy(_rows, t(_head), _target),
            "linear_weight: wanted torch.float32 on cpu as input, got torch.float32 on meta",
        ),
        (
            lambda t: ops.linear_cross_entropy(
                _rows, _head, _target, linear_bias=t(torch.ones(50))
            ),
            r"linear_bias: wanted floats of shape \(50,\) on cpu, got .* on meta",
        ),
        (lambda t: ops.attention(_q, t(_k), _v), "k: wanted device cpu as q, got meta"),
        (lambda t: ops.attention(_q, _k, _v, sinks=t(torch.ones(4))), "sinks: wanted .* on meta"),
        (lambda t: ops.attention(_q, _k, _v, bias=t(torch.ones(8, 8))), "bias: wanted .* on meta"),
        (
            lambda t: ops.varlen_attention(_q[0], _k[0], _v[0], t(_offsets)),
            r"cu_seqlens_q: wanted \(B \+ 1,\) int32 on cpu, got .* on meta",
        ),
        (
            lambda t: ops.paged_attention(_q, _k, _v, t(_pages), _lengths),
            "block_table: wanted .* on cpu, got .* on meta",
        ),
        (
            lambda t: ops.quantized_linear(_rows, _quantized, t(torch.ones(24))),
            r"bias: wanted a float tensor \(24,\) on cpu, got .* on meta",
        ),
        (lambda t: ops.quantized_linear(t(_rows), _quantized), "x: wanted device cpu as qweight"),
    ],
)
def test_refuses_tensors_on_two_devices(call, message):
    """One tensor on meta makes torch run the fake: what came back was memory never written."""
    with pytest.raises(InputError, match=message):
        call(lambda t: t.to("meta"))


def test_cuda_functions_run_on_their_tensors_device(monkeypatch):
    """Kernels start on the current device: another one is made current around the call."""
    entered = []

    class Elsewhere:
        is_cuda = True
        device = torch.device("cuda", 1)

    @contextlib.contextmanager
    def made_current(device):
        entered.append(device)
        yield

    monkeypatch.setattr(backend.Kernel, "load", lambda self: lambda *args: args)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", made_current)
    run = backend.CudaKernel("module", "function").load()
    here, there = torch.zeros(1), Elsewhere()
    assert run(here, 3) == (here, 3) and entered == []
    assert run(there, 3) == (there, 3) and run([there], 3) == ([there], 3)
    assert entered == [there.device] * 2
