"""Tests of a backend from outside (tests/support/metal: a row and a host function).

They also check that host functions and declarations agree in every backend.
"""

import importlib
import importlib.util
import inspect
import sys
import types

import metal
import pytest
import torch
from metal.rms_norm import calls

import fastlm.ops
import fastlm.optim  # noqa: F401  together with fastlm.ops, this declares every op
from fastlm import InputError, backend, inventory, ops
from fastlm.backend import BACKENDS, OPS


@pytest.fixture
def added():
    backend.add(metal.ROW)
    calls.clear()
    yield
    backend.remove("metal")


def test_is_selected(added):
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8)
    with backend.use_backend("reference"):
        expected = ops.rms_norm(x, w, residual=x)
        (dx,) = torch.autograd.grad(expected[0].sum(), x)
    y, h = ops.rms_norm(x, w, residual=x)
    torch.testing.assert_close((y, h), expected)
    assert calls == [(3, 8)]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], dx)  # by the next backend's
    compiled = torch.compile(lambda x: ops.rms_norm(x, w), backend="aot_eager", fullgraph=True)
    compiled(x.detach())
    assert calls == [(3, 8)] * 2
    assert backend.backend_for("rms_norm", x) == "metal" and backend.has_kernel("rms_norm", x)


def test_unsupported_arguments(added):
    """The next backend runs. If metal is forced, the call raises."""
    wide, w = torch.randn(2, 1025), torch.ones(1025)
    expected = "got 'metal', which is forced: "
    ops.rms_norm(wide, w)
    ops.rms_norm(torch.randn(2, 8).double(), torch.ones(8).double())
    assert not calls and backend.backend_for("rms_norm", wide) != "metal"
    with backend.use_backend("metal"):
        ops.rms_norm(wide[:, :1024], w[:1024])
        assert calls == [(2, 1024)]
        with pytest.raises(InputError, match=expected + "it supports rows of up to 1024"):
            ops.rms_norm(wide, w)
        with pytest.raises(InputError, match=expected + "glu has no metal implementation"):
            ops.glu(wide, wide)
        with pytest.raises(InputError, match=expected + "metal supports float32, .*, not float64"):
            ops.rms_norm(wide.double(), w)
        assert backend.backend_for("rms_norm", wide) is None and not backend.has_kernel("glu", wide)


def test_is_in_info(added):
    info = inventory.info()
    assert info["backends"]["metal"] is None
    row = info["ops"]["rms_norm"]
    on_cpu = not torch.cuda.is_available()
    assert (row["backend"] == "metal") == on_cpu and ("metal" in row["unavailable"]) != on_cpu
    assert row["supports"] == {"metal": "rows of up to 1024"}
    assert info["ops"]["glu"]["unavailable"]["metal"] == "glu has no metal implementation"


def test_remove():
    def table():
        info = inventory.info()
        return info["backends"], info["ops"]

    before = list(BACKENDS), table()
    backend.add(metal.ROW)
    ops.rms_norm(torch.ones(1, 8), torch.ones(8))
    backend.remove("metal")
    calls.clear()
    ops.rms_norm(torch.ones(1, 8), torch.ones(8))
    assert not calls and (list(BACKENDS), table()) == before
    expected = r"use_backend: expected one of .*, got 'metal'"
    with pytest.raises(InputError, match=expected):
        backend.use_backend("metal")  # at the call, not at the with


def test_refuses_what_does_not_fit(added):
    with pytest.raises(InputError, match="name: expected a name that no backend has, got 'metal'"):
        backend.add(metal.ROW)
    row = backend.Backend("tin", "tin", ("cpu",), ops={"rms_nrom": None})
    with pytest.raises(InputError, match=r"ops: expected some of .*, got rms_nrom"):
        backend.add(row)
    assert "tin" not in BACKENDS


def _host(function):
    """A package "tin" with this rms_norm."""
    module = types.ModuleType("tin.rms_norm")
    module.rms_norm_forward = function
    return {"tin": types.ModuleType("tin"), "tin.rms_norm": module}


def test_a_host_that_differs_from_the_definition_is_refused(monkeypatch):
    row = backend.Backend("tin", "tin", ("cpu",), ops={"rms_norm": None})
    path = r"tin\.rms_norm\.rms_norm_forward"
    with pytest.raises(InputError, match=rf"package: expected a host function {path}, got: No mod"):
        backend.add(row)
    for function, got in (
        (lambda x, weight, eps, residual, offset: x, "x, weight, eps, residual, offset"),
        (lambda x, residual, weight, eps: x, "x, residual, weight, eps"),
        (lambda x, residual, weight, eps, offset, y: x, "x, residual, weight, eps, offset, y"),
    ):
        for name, module in _host(function).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(
            InputError, match=rf"^{path}: expected the definition's .*got \({got}\)"
        ):
            backend.add(row)
    for function, got in ((3, "3 is not"), (max, "no signature")):
        for name, module in _host(function).items():
            monkeypatch.setitem(sys.modules, name, module)
        with pytest.raises(InputError, match=rf"^{path}: expected a function, got: .*{got}"):
            backend.add(row)
    assert "tin" not in BACKENDS


@pytest.mark.parametrize("host", [lambda *args: args, lambda x, *more, **names: x])
def test_a_host_of_any_arguments_is_accepted(host, monkeypatch):
    for name, module in _host(host).items():
        monkeypatch.setitem(sys.modules, name, module)
    backend.add(backend.Backend("tin", "tin", ("cpu",), ops={"rms_norm": None}))
    backend.remove("tin")


@pytest.mark.parametrize("results", [lambda x: (x, None, x), lambda x: x, lambda x: None])
def test_a_host_with_other_results_is_refused(results, monkeypatch):
    for name, module in _host(lambda x, residual, weight, eps, offset: results(x)).items():
        monkeypatch.setitem(sys.modules, name, module)
    backend.add(backend.Backend("tin", "tin", ("cpu",), ops={"rms_norm": None}))
    try:
        with pytest.raises(InputError, match=r"rms_norm_forward: expected to return 3 tensors \("):
            ops.rms_norm(torch.ones(2, 8), torch.ones(8))
    finally:
        backend.remove("tin")


ROWS = {name: row for name, row in BACKENDS.items() if not row.ops_from} | {"metal": metal.ROW}


# Triton's hosts call something else "options", and "dh" what a kernel gets of `dh_above`.
NAMES = {"numbers": "options", "dh_above": "dh"}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_hosts_are_what_is_declared(row):
    """Each declared host function exists, with the definition's parameters. No other function has
    the name of one.
    """
    for entry in OPS.values():
        module = f"{row.package}.{entry.module}"
        exists = importlib.util.find_spec(module) is not None
        host = getattr(importlib.import_module(module), entry.function, None) if exists else None
        assert (host is not None) == entry.is_in(row), f"{module}.{entry.function}"
        if host is None:
            continue
        definition = entry.load(BACKENDS["reference"])
        names = [*inspect.signature(definition).parameters]
        parameters = [*inspect.signature(host).parameters.values()]
        host_names = [NAMES.get(p.name, p.name) for p in parameters]
        assert host_names[: len(names)] == names, f"{module}.{entry.function}"
        # for other host functions of the backend
        assert all(p.default is None for p in parameters[len(names) :])


def test_every_definition_is_declared():
    """No forward or backward of `fastlm.reference` stays out of the table."""
    reference = importlib.import_module("fastlm.reference")
    declared = {(entry.module, entry.function) for entry in OPS.values()}
    for name in reference.__all__:
        if name.endswith(("_forward", "_backward", "_loss", "_round", "_append")):
            module = getattr(reference, name).__module__.rsplit(".", 1)[1]
            assert (module, name) in declared
