"""Tests of the extension's boundary: what a TensorView accepts and refuses, threads shared with
torch, and the selection of the instruction set.
"""

import json
import os
import platform
import subprocess
import sys
import time
import weakref

import numpy as np
import pytest
import torch

from fastlm import InputError, _cpu, backend, inventory, operator, ops
from fastlm.reference import AdamWOptions


def test_takes_torch_parameters_grad_strided_and_numpy():
    parameter = torch.nn.Parameter(torch.randn(3, 3))
    with_grad = (parameter * 2).t()  # a view of a tensor in a graph
    assert _cpu.count_elements(parameter, with_grad, np.ones((2, 2)), torch.empty(0)) == 9 + 9 + 4


def test_values_through_both_ways_in():
    a, b = torch.randn(5, 7), torch.randn(6, 7)
    for x, y in ((a, b), (a.numpy(), b.numpy()), (a, b.numpy())):
        c = torch.empty(5, 6)
        _cpu.matmul(x, y, c)
        torch.testing.assert_close(c, a @ b.T)


def test_refuses_what_is_not_a_tensor_and_wrong_dtypes():
    t = torch.ones(2, 2)
    with pytest.raises(TypeError):
        _cpu.count_elements(t, t, t, [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match="a: expected float32, bfloat16 or float16, got float64"):
        _cpu.matmul(t.double(), t.double(), t)
    with pytest.raises(ValueError, match="b: expected columns, as a: 2, got 3"):
        _cpu.matmul(t, torch.ones(2, 3), t)
    with pytest.raises(ValueError, match="c: expected a contiguous tensor"):
        _cpu.matmul(t, t, torch.ones(2, 4)[:, ::2])


def test_structs_from_tuples():
    q, ones = torch.randn(1, 1, 2, 8), np.ones(1, np.float32)
    numbers = True, 8**-0.5, 0, 0.0, 0.0
    out, lse = torch.empty_like(q), torch.empty(1, 1, 2)

    def run(extras, options):
        return _cpu.attention_forward(q, q, q, None, extras, options, out, lse, None)

    assert run((None, ones, None, None), numbers) == 0  # this size needs no workspace
    assert torch.equal(out, ops.attention(q, q, q, causal=True, alibi_slopes=torch.ones(1)))
    assert run(None, numbers) == 0
    assert torch.equal(out, ops.attention(q, q, q, causal=True))
    for options in (numbers[:-1], (*numbers, 0.0), (True, 1.0, 0.5, 0.0, 0.0), None, [*numbers]):
        with pytest.raises(TypeError):
            run(None, options)
    with pytest.raises(TypeError):
        run((None, 1.0, None, None), numbers)


def test_a_type_that_dies_does_not_leave_its_entry_behind():
    for _ in range(50):
        kind = type("Sub", (torch.Tensor,), {})
        assert (
            _cpu.count_elements(
                torch.ones(2).as_subclass(kind), torch.ones(1), torch.ones(1), np.ones(1)
            )
            == 5
        )


class Producer:
    """A DLPack producer of its own type that allocates new memory for every capsule."""

    def __init__(self, name, array, log):
        self.name, self.array, self.log = name, array, log

    def __dlpack__(self, **options):
        self.log.append(f"take {self.name}")
        copy = self.array.copy()
        weakref.finalize(copy, self.log.append, f"free {self.name}")
        return copy.__dlpack__(**options)


def test_capsules_live_until_the_call_ends():
    """Capsules of optional arguments and of list elements do too."""
    x, residual, w = np.ones((4, 8), "f"), np.full((4, 8), 2, "f"), np.ones(8, "f")
    y, h, rstd = np.zeros((4, 8), "f"), np.zeros((4, 8), "f"), np.zeros(4, "f")
    log = []
    producers = [Producer(n, a, log) for n, a in (("x", x), ("residual", residual), ("w", w))]
    _cpu.rms_norm_forward(*producers, 0.0, 0.0, y, h, rstd)
    assert log[:3] == ["take x", "take residual", "take w"]
    assert sorted(log[3:]) == ["free residual", "free w", "free x"]
    assert (h == 3).all() and (y == 1).all()
    log.clear()
    options = AdamWOptions(0.5, 0.9, 0.9, 0.0, 0.0, maximize=False, stochastic=False)
    params = [np.ones(8, "f") for _ in range(2)]
    tensors: list = [
        (
            param, Producer(name, np.ones(8, "f"), log), np.zeros((), "f"), np.zeros(8, "f"),
            np.zeros(8, "f"), None, None, None, options, 0, 0,
        )
        for name, param in zip("ab", params)
    ]  # fmt: skip
    _cpu.adamw(tensors, 0.0, None, False, np.zeros(_cpu.adamw_workspace([8, 8]), "i8"))
    assert log[:2] == ["take a", "take b"] and all((p == 0.5).all() for p in params)


@pytest.mark.parametrize("fields", [(), (1.0,) * 6, [0.5, 0.9, 0.9, 0.0, 0.0, False, False]])
def test_a_struct_wants_a_tuple_of_its_fields(fields):
    x = np.ones(8, "f")
    tensor = (x, x, x[0], x, x, None, None, None, fields, 0, 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.adamw([tensor], 0.0, None, False, np.zeros(_cpu.adamw_workspace([8]), "i8"))


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert _cpu.thread_count() == n
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (37, 53, 45), (6, 64, 512), (33, 129, 700), (200, 17, 31), (65, 100, 1030)],
)
def test_matrix_core(isa, kind, m, n, k):
    a, b = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)
    c = torch.empty(m, n)
    _cpu.matmul(a, b, c)
    truth = a.double() @ b.double().T
    # fp32 accumulation of k products: relative to the sum of magnitudes, at worst k * 2^-24
    bound = (a.double().abs() @ b.double().abs().T) * (k + 2) * 2**-24
    assert ((c.double() - truth).abs() <= bound).all()


def _run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_environment_forces_the_instruction_set():
    for name in backend.cpu_isas():
        done = _run("from fastlm import _cpu; print(_cpu.isa())", FASTLM_CPU_ISA=name)
        assert done.stdout.strip() == name, done.stderr
    done = _run("from fastlm import _cpu; _cpu.isa()", FASTLM_CPU_ISA="sse9")
    assert (
        "FASTLM_CPU_ISA: expected one of amx, avx512, avx512_fp16, avx512_fma, avx512f, avx2,"
        " scalar, amx_emulated, avx512_fp16_emulated, got 'sse9'" in done.stderr
    )


def test_environment_is_checked_against_the_machine():
    names = ("amx", "avx512", "avx512_fp16", "avx512_fma", "avx512f", "avx2")
    missing = [n for n in names if _cpu.unavailable_reason(n)]
    for name in missing:
        done = _run("from fastlm import _cpu; _cpu.isa()", FASTLM_CPU_ISA=name)
        assert f"'{name}' cannot run here" in done.stderr
    assert _cpu.isa() not in missing
    with pytest.raises(InputError, match="expected one of"), backend.use_cpu_isa("mmx"):
        pass


NO_TILES = "this CPU has no AMX tiles"
REFUSED_TILES = "the kernel refused the permission to use AMX tiles"


@pytest.mark.parametrize(
    ("features", "expected", "why_not_amx"),
    [  # avx2, avx512, avx512_vnni, avx512_bf16, amx_cpu, amx_permission, widen
        ((True, True, True, True, True, True, True), "amx", ""),
        ((True, True, True, True, True, False, False), "avx512", REFUSED_TILES),
        ((True, True, True, True, True, False, True), "avx512_fma", REFUSED_TILES),
        ((True, True, True, True, False, False, False), "avx512", NO_TILES),
        ((True, True, True, True, False, False, True), "avx512_fma", NO_TILES),
        ((True, True, True, False, False, False, False), "avx512_fma", NO_TILES),
        ((True, True, False, False, False, False, False), "avx512f", NO_TILES),
        ((True, False, False, False, False, False, False), "avx2", NO_TILES),
        ((False, False, False, False, False, False, False), "scalar", NO_TILES),
    ],
)
def test_best_of_what_there_is(features, expected, why_not_amx):
    isa, reason = _cpu.isa_choice(*features)
    assert isa == expected and reason.startswith(why_not_amx) and bool(reason) == bool(why_not_amx)


@pytest.mark.parametrize(
    ("cpu", "rates", "widen", "because"),
    [
        (("AuthenticAMD", 26, 2), (1, 9), False, "known of AuthenticAMD family 26 model 2"),
        (("GenuineIntel", 6, 207), (9, 1), True, "known of GenuineIntel family 6 model 207"),
        (("GenuineIntel", 6, 173), (168, 335), True, "measured: FMA is clearly faster"),
        (("GenuineIntel", 6, 173), (300, 335), False, "measured: FMA is not clearly faster"),
        (("GenuineIntel", 6, 85), (670, 335), False, "measured: FMA is not clearly faster"),
    ],
)
def test_products_of_bf16_are_chosen_by_rate(cpu, rates, widen, because):
    assert _cpu.choose_product(*cpu, *rates) == (widen, because)


def test_rates_are_measured_in_microseconds():
    start = time.process_time()
    by, because, dot, fma = _cpu.products_of_bf16()
    assert time.process_time() - start < 0.1
    assert by and because
    assert fma > 1 or _cpu.unavailable_reason("avx512_fma")
    assert dot > 1 or _cpu.unavailable_reason("avx512")


# Refuses arch_prctl(ARCH_REQ_XCOMP_PERM), as a kernel before 5.16 or a container's filter does.
REFUSED = """
import ctypes, json, struct
ARCH_PRCTL, REQUEST, EPERM = 158, 0x1023, 1
def instruction(code, value, yes=0, no=0):
    return struct.pack("HBBI", code, yes, no, value)
program = b"".join([
    instruction(0x20, 0),                   # load the system call's number
    instruction(0x15, ARCH_PRCTL, no=3),
    instruction(0x20, 16),                  # load its first argument
    instruction(0x15, REQUEST, no=1),
    instruction(0x06, 0x50000 | EPERM),     # fails
    instruction(0x06, 0x7FFF0000),          # goes on
])
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]
libc = ctypes.CDLL(None, use_errno=True)
expected = Filter(len(program) // 8, program)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(expected), 0, 0) == 0
assert libc.syscall(ARCH_PRCTL, REQUEST, 18) == -1 and ctypes.get_errno() == EPERM
import fastlm
print(json.dumps(fastlm.info()))
"""


@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="arch_prctl")
def test_refused_permission_is_said_and_the_next_runs():
    done = _run(REFUSED, FASTLM_CPU_ISA="")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["cpu_isa"] != "amx"
    with open("/proc/cpuinfo") as f:
        has_tiles = "amx_tile" in f.read()
    expected = "the kernel refused the permission" if has_tiles else "this CPU has no AMX tiles"
    assert info["cpu_isa_unavailable"]["amx"].startswith(expected)


def test_backend_from_the_environment():
    code = "import fastlm, json; print(json.dumps(fastlm.info()['forced_backend']))"
    assert json.loads(_run(code, FASTLM_BACKEND="reference").stdout) == "reference"
    assert (
        "FASTLM_BACKEND: expected one of cuda, simt, triton, cpu, reference, got 'gpu'"
        in _run(code, FASTLM_BACKEND="gpu").stderr
    )


def test_info_says_what_runs_and_why_not():
    info = inventory.info()
    json.dumps(info)
    assert info["cpu_isa"] == _cpu.isa()
    assert info["ops"]["rms_norm"]["backend"] == ("cuda" if torch.cuda.is_available() else "cpu")
    for op in info["ops"].values():
        assert set(op["unavailable"]) | {op["backend"]} <= set(backend.BACKENDS)
        assert all(op["unavailable"].values())


def test_info_follows_a_forced_backend(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with backend.use_backend("reference"):
        row = inventory.info()["ops"]["glu"]
    assert row["backend"] == "reference" and row["unavailable"]["cpu"] == "reference is forced"
    with backend.use_backend("cuda"):
        rows = inventory.info()["ops"]
    assert rows["glu"]["backend"] is None
    assert "attention has no cuda" in rows["attention"]["unavailable"]["cuda"]
    if not torch.cuda.is_available():
        with backend.use_backend("triton"):
            row = inventory.info()["ops"]["glu"]
        assert (
            row["backend"] is None and "triton does not run on cpu" in row["unavailable"]["triton"]
        )
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with backend.use_backend("triton"):
            assert inventory.info()["ops"]["glu"]["backend"] == "triton"


def test_wrong_instruction_set_is_one_line_of_the_command():
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fastlm", "info"],
        env={**os.environ, "FASTLM_CPU_ISA": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "FASTLM_CPU_ISA: expected one of amx" in done.stderr


def test_forcing_a_backend_that_is_not_here_raises(monkeypatch):
    from fastlm import ops

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        backend.use_backend("triton"),
        pytest.raises(InputError, match="got 'triton', which is forced"),
    ):
        ops.rms_norm(torch.randn(2, 4), torch.randn(4))
    with (
        pytest.raises(InputError, match="use_backend: expected one of"),
        backend.use_backend("tpu"),
    ):
        pass


def test_operator_is_skipped_only_where_nothing_watches(monkeypatch):
    """Without gradients the kernel is called directly. Autograd and modes see the op."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fastlm import ops

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.append(func)
            return func(*args, **(kwargs or {}))

    operators: list = []
    gate, up = torch.randn(2, 3, 40)
    glu = torch.ops.fastlm.glu.default
    with Watch():
        expected = ops.glu(gate, up)
    assert glu in operators
    callers = []
    select = backend.select
    monkeypatch.setattr(
        operator, "select", lambda *a: callers.append(sys._getframe(1).f_code.co_name) or select(*a)
    )
    assert torch.is_grad_enabled() and torch.equal(ops.glu(gate, up), expected)
    assert callers.pop() == "call"  # not "run", which the operator calls
    assert ops.glu(gate, up.clone().requires_grad_()).grad_fn is not None
    assert callers.pop() == "forward"  # of the autograd.Function
