"""bench/gpu.py has to work the first time it runs on a GPU: its small cases, interpreted here, and
how it handles failures.
"""

import json
import os
import subprocess

import gpu
import harness
import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="bench/gpu.sh runs it all")
@pytest.mark.parametrize("op", sorted(set(gpu.OPS) - {"decode", "engine"}))
def test_every_case_runs(triton, monkeypatch, op):
    monkeypatch.setattr(gpu, "DEVICE", triton)
    every_variant_runs(list(gpu.OPS[op](True)))


def test_decode_steps_run(cuda, monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", cuda)
    cases = list(gpu.decode(True))
    assert len(cases) == 8 and not any(case.missing for case in cases)
    every_variant_runs(cases)


def test_the_engine_runs(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    every_variant_runs(list(gpu.engine(True)))


def every_variant_runs(cases):
    assert cases
    for case in cases:
        assert "fastlm" in case.variants and len(case.variants) > 1, case.name
        for name, call in case.variants.items():
            if name != "torch.compile":
                result = call()
                assert not isinstance(result, torch.Tensor) or result.isfinite().all(), name


def fail():
    raise RuntimeError("no such kernel\nand a second line")


@pytest.fixture
def no_card(monkeypatch):
    """Answer every query to the card without a card."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(gpu, "ceilings", lambda small: {"bf16": 1e12, "read": 1e9})
    monkeypatch.setattr(gpu, "time_on_gpu", lambda v, rounds: {n: [1.0] * rounds for n in v})
    monkeypatch.setattr(gpu, "peak_bytes", lambda call: 0)
    monkeypatch.setattr(gpu, "host_microseconds", lambda call: 0.0)
    monkeypatch.setattr(gpu, "machine", lambda: {"cpu": "some"})

    def cases(small):
        good = {"fastlm": int, "torch": int, "torch.compile": fail}
        yield gpu.Case("first", "1", dict(good), bytes=1)
        yield gpu.Case("ours fails", "1", {"fastlm": fail, "torch": int}, bytes=1)
        yield gpu.Case("last", "1", dict(good), bytes=1)

    monkeypatch.setattr(gpu, "OPS", {"op": cases, "other": cases})


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    lines = capsys.readouterr().out.splitlines()
    return ended.value.code, [json.loads(line) for line in lines if line.startswith("{")], lines


def test_one_fault_costs_one_case(no_card, monkeypatch, capsys):
    code, records, lines = run_main(monkeypatch, capsys)
    rows = [line["row"] for line in records if "row" in line]
    assert [row["name"] for row in rows] == ["first", "last"] * 2
    assert rows[0]["missing"] == {"torch.compile": "RuntimeError: no such kernel"}
    assert [line["failed"] for line in records if "failed" in line] == ["ours fails 1"] * 2
    assert code and any("| last |" in line for line in lines)


def test_a_lost_context_starts_a_new_process(no_card, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "context_is_lost", lambda: True)
    started = []
    monkeypatch.setattr(os, "execv", lambda *a: started.append(a[1]) or exit(1))
    code, records, _ = run_main(monkeypatch, capsys, "--seconds", "100", "--smoke")
    assert code == 1 and started[0][-1] == "other" and "--failed" in started[0]
    assert [line["failed"] for line in records if "failed" in line]


def test_ends_in_time(no_card, monkeypatch, capsys):
    code, records, _ = run_main(monkeypatch, capsys, "--seconds", "0")
    assert not code and records[-1] == {"out of time": ["op", "other"]}


def test_a_machine_without_git(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert harness.machine()["commit"] == ""
