"""bench/: how figures are computed, and errors of its command lines."""

import importlib
import json
import os
import re
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import ceilings
import compare
import decode
import gguf_types
import harness
import losing
import profile_step
import pytest
import random_gguf
import rope
import run as bench_run
import torch
import turns
import versions
from model_files import smollm2

from fastlm import backend, ops
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.model.causal_lm import CausalLM

CONTEXT = {"cpu": "EPYC", "threads": 2, "cpu_isa": "avx512", "torch": "2.13", "date": "2026-12-03"}
OPS = ("adamw", "attention", "boundary", "cross_entropy", "glu", "linear", "linear_cross_entropy")
OPS += (
    "layer_norm",
    "linear_distillation",
    "linear_logprobs",
    "quantized_linear",
    "rms_norm",
    "rope",
)
SMALL_SHAPES = {
    "attention": (1, 2, 5, 16),
    "cross_entropy": (3, 7),
    "glu": (3, 8),
    "layer_norm": (9, 16),
    "linear": (5, 16, 8),
    "linear_cross_entropy": (3, 8, 7),
    "linear_logprobs": (3, 8, 7),
    "linear_distillation": (3, 8, 7),
    "quantized_linear": (3, 128, 16),
    "rms_norm": (9, 16),
    "rope": (1, 2, 5, 16),
}


def run_main(monkeypatch, cases, *arguments, make_cases=None):
    monkeypatch.setattr(sys, "argv", ["op.py", *arguments])
    if harness.wait_until_quiet is ceilings.wait_until_quiet:
        monkeypatch.setattr(harness, "wait_until_quiet", lambda busy: None)
    monkeypatch.setattr(harness, "ceilings_before", lambda busy: {})
    monkeypatch.setattr(harness, "confirm_ceilings", lambda before: {})
    harness.main("op", lambda: cases, make_cases)


def one_case(name="fwd", shape="4 x 8", **more):
    return harness.Case(name, shape, {"fastlm": int, "torch": int}, **more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backwrd"], "no case has 'backwrd'; near: backward"),
        (["--rounds", "0"], "--rounds: expected a whole number from 1, got '0'"),
        (["--shape", "8,8"], "--shape: expected bxhxsx[d], whole numbers from 1, got '8,8'"),
        (["--shape", "8,8,0"], "--shape: expected bxhxsx[d]"),
    ],
)
def test_a_wrong_argument_is_an_error_of_one_line(monkeypatch, capsys, arguments, message):
    def make_cases(b: int, h: int, s: int, d: int = 0):
        return [one_case()]

    with pytest.raises(SystemExit) as ended:
        run_main(monkeypatch, [one_case("backward"), one_case()], *arguments, make_cases=make_cases)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["8,9,10", "8x9x10", "8, 9, 10", "8 x 9 -> 10"])
def test_shape_from_the_command_line(monkeypatch, capsys, text):
    def make_cases(b: int, h: int, s: int, d: int = 11):
        return [one_case(shape=f"{b} {h} {s} {d}")]

    run_main(monkeypatch, [], "--shape", text, "--list", make_cases=make_cases)
    assert capsys.readouterr().out == "fwd: 8 9 10 11: fastlm, torch\n"


def test_the_headline_rows_are_cases():
    """`bench/run.py --headline` selects each of its rows by name and shape."""
    for op, name, shape in bench_run.HEADLINE:
        cases = harness.select_cases(importlib.import_module(op).cases(), [f"{name} {shape}"], None)
        assert [(c.name, c.shape) for c in cases] == [(name, shape)]


def test_the_readme_is_of_committed_code(monkeypatch, capsys):
    monkeypatch.setattr(bench_run, "machine", lambda: {**CONTEXT, "commit": "0123abc-dirty"})
    wrong = (
        (["--headline"], "0123abc-dirty"),
        (["--busy"], "without --busy"),
        (["--headline", "--page", "x"], "no --page"),
    )
    for options, message in wrong:
        monkeypatch.setattr(sys, "argv", ["run.py", *options])
        with pytest.raises(SystemExit):
            bench_run.main()
        assert message in capsys.readouterr().err
    dirty = {"rows": [], "machine": {"commit": "0123abc-dirty"}}
    text = bench_run.section({"machine": {**CONTEXT, "commit": "a"}, "rope": dirty, "glu": {}})
    assert "Withdrawn, because the code was not committed: rope." in text and "dirty" not in text


def test_the_readme_stays_without_all_of_its_rows(monkeypatch, tmp_path):
    """A failed benchmark would take its row from the README, without a word."""
    path, readme = tmp_path / "results.json", tmp_path / "README.md"
    path.write_text(json.dumps({"machine": {**CONTEXT, "commit": "a"}}))
    readme.write_text("unchanged")
    monkeypatch.setattr(bench_run, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--headline", "--write-only", "--of", str(path)])
    with pytest.raises(SystemExit, match="expected 11 measured rows, got 0"):
        bench_run.main()
    assert readme.read_text() == "unchanged"


def test_our_own_variants_are_no_peers_in_the_readme():
    step = {"fastlm": 100, "fastlm, 8-bit AdamW": 110, "eager": 20, "torch.compile, bf16": 50}
    steps = [{"variant": name, "tokens_per_second": rate} for name, rate in step.items()]
    (row,) = bench_run.headline({"machine": CONTEXT, "train_step": {"rows": steps}})
    assert row[2:] == ("100 tokens/s", "torch.compile, bf16 50 tokens/s", 2.0, "")


def test_an_unsteady_row_says_so_in_the_readme():
    op, name, shape = "rms_norm", "fwd+bwd", "4096 x 512"
    case = {"name": name, "shape": shape, "milliseconds": {"fastlm": 1.0, "torch": 2.0}}
    rest = {"spread": {}, "of_ceiling": None, "ceiling": "", "missing": {}}
    row = {**case, **rest, "ratio": 2.0, "best_peer": "torch", "unsteady": "spread 65%"}
    text = bench_run.readme_section({"machine": {**CONTEXT, "commit": "a"}, op: {"rows": [row]}})
    assert "| 1 ms | torch 2 ms | **2.00x** (spread 65%) |" in text


def test_threads_from_the_command_line(monkeypatch, capsys):
    def make_cases(rows: int, columns: int):
        return [one_case(shape=f"{torch.get_num_threads()} threads")]

    before = torch.get_num_threads()
    try:
        shape = ("--shape", "128x1408", "--list")
        run_main(monkeypatch, [], *shape, "--threads", str(before + 1), make_cases=make_cases)
    finally:
        torch.set_num_threads(before)
    assert f"{before + 1} threads" in capsys.readouterr().out


def test_json_goes_to_the_file_alone(monkeypatch, capsys, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ("--no-gate", "--rounds", "2", "--json", str(path))
    run_main(monkeypatch, [one_case()], *arguments)
    assert json.loads(path.read_text())["rows"][0]["name"] == "fwd"
    assert not any(s.startswith('{"op"') for s in capsys.readouterr().out.splitlines())


def test_a_file_of_results_has_a_row_per_line(tmp_path):
    """Each value of a long object, and of an object that contains rows, also has its own line."""
    path, row = tmp_path / "rows.json", {"name": "fwd", "times": [{"ms": 1.5}, {"ms": None}]}
    long = {f"{i} clients": {"tokens_per_second": [1.25] * 40} for i in range(3)}
    results = {"op": "rope", "few": {}, "none": [], "gaps": [1.5, 2.0], "rows": [row, row],
               "serve": long, "stages": {"ppo": {"rows": [row], "gap": 0.5}}}  # fmt: skip
    harness.save(path, results)
    lines = [line.strip().rstrip(",") for line in path.read_text().splitlines()]
    assert json.loads(path.read_text()) == results
    assert lines.count(json.dumps(row)) == 3 and '"gaps": [1.5, 2.0]' in lines
    assert [s.partition(":")[0] for s in lines if "1.25" in s] == [json.dumps(n) for n in long]


@pytest.mark.parametrize("op", OPS)
def test_collected_without_operands(monkeypatch, op):
    module = importlib.import_module(op)
    for name in ("randn", "rand", "randint", "empty", "zeros"):
        monkeypatch.setattr(torch, name, None)
    assert module.cases()


@pytest.mark.parametrize("op", SMALL_SHAPES)
def test_variants_do_the_same_work(op):
    """On a custom small shape every variant runs and returns the same number of elements."""
    module = importlib.import_module(op)
    for case in module.shape_cases(*SMALL_SHAPES[op]):
        sizes = {}
        for name, call in case.calls().items():
            if "compile" in name:
                continue
            out = call()
            sizes[name] = [t.numel() for t in (out if isinstance(out, (tuple, list)) else [out])]
        assert len(sizes) > 1
        assert len({str(size) for size in sizes.values()}) == 1, (case.name, sizes)
    for function in vars(module).values():  # free the cached copies of weights
        getattr(function, "cache_clear", lambda: None)()


def test_scripts_in_folders_find_the_modules_above():
    """`python bench/ops/rope.py` has bench/ops on its path alone."""
    above = {path.stem for path in Path(harness.__file__).parent.glob("*.py")}
    for path in Path(harness.__file__).parent.glob("*/*.py"):
        lines = re.findall(r"^ *(?:import|from) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        if above.intersection(lines):
            assert "bench_path" in lines, path
            assert lines.index("bench_path") < min(map(lines.index, above.intersection(lines))), (
                path
            )


def test_bytes_of_a_quantized_weight():
    from quantized_linear import of_shape, quantized

    for bits, group in ((4, 128), (8, 128), (4, 32)):
        case = of_shape(bits, 16, 1, 64, 256, group)
        assert case.bytes == quantized(bits, 64, 256, group)().nbytes


def test_share_is_of_the_best_instruction_for_the_dtype():
    limits = {"fp32 FMA": 200.0, "bf16 dot": 100.0, "int8 dot": 800.0, "fp16 FMA": 400.0}
    limits["read"] = 1e9
    of = {d: ceilings.fastest_instruction(limits, d) for d in ("bf16", "fp32", "fp16", "int8")}
    assert of == {"bf16": "fp32 FMA", "fp32": "fp32 FMA", "fp16": "fp32 FMA", "int8": "int8 dot"}
    row = harness.run_case(
        one_case(flops=50.0), limits, 2, lambda calls, rounds: {n: [1.0, 1.0] for n in calls}
    )
    assert (row.of_ceiling, row.ceiling, row.unsteady) == (0.25, "fp32 FMA", "")


def rates(*calls, until):
    """The best rate of each call. Short runs take turns until `until(rates)`, at most 400 times.

    Rates are per second of one thread, because other processes seldom let two threads run at the
    same time. Other work only lowers a rate: more runs correct it and hide no wrong ceiling.
    """

    def once(call):
        start = time.thread_time()
        return call() / (time.thread_time() - start)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best = [0.0] * len(calls)
        for n in range(400):
            best = [max(of, once(call)) for of, call in zip(best, calls, strict=True)]
            if n >= 20 and until(*best):
                break
        return best
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", [i for i in backend.cpu_isas() if i != "amx_emulated"])
def test_nothing_is_above_the_ceiling(isa):
    extension = backend.cpu_extension
    of_bf16 = {"amx": "bf16 tiles", "avx512": "bf16 dot"}.get(isa, "fp32 FMA")
    with backend.use_cpu_isa(isa):
        for instruction, bf16 in (("fp32 FMA", False), (of_bf16, True)):
            ours, peak = rates(
                lambda bf16=bf16: extension.multiply_in_l1(bf16, 50),
                lambda i=instruction: extension.run_peak(i, 20_000),
                until=lambda ours, peak: ours < 1.05 * peak,
            )
            assert ours < 1.05 * peak, instruction


@pytest.mark.skipif("avx2" not in backend.cpu_isas(), reason="needs AVX2")
def test_a_ceiling_is_of_the_whole_product():
    """AVX2's int8 product is three instructions with 64 operations, FMA one with 16."""
    with backend.use_cpu_isa("avx2"):
        fma, dot = rates(
            *(
                lambda n=n: backend.cpu_extension.run_peak(n, 20_000)
                for n in ("fp32 FMA", "int8 dot")
            ),
            until=lambda fma, dot: dot < 2.5 * fma,
        )
    assert dot < 2.5 * fma  # 7.9 when the compiler had moved the product out of the loop


def test_every_instruction_has_a_ceiling():
    extension = backend.cpu_extension
    current_isa = extension.isa()
    try:
        for isa in backend.cpu_isas():
            extension.set_isa(isa)
            names = extension.peak_instructions()
            assert "fp32 FMA" in names
            assert all(extension.run_peak(n, 10) > extension.run_peak(n, 5) > 0 for n in names)
    finally:
        extension.set_isa(current_isa)
    with pytest.raises(ValueError, match="instruction: expected one of"):
        extension.run_peak("fp64 FMA", 1)


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([102.0], {"fp32 FMA": 102.0}),
        ([150.0, 152.0], {"fp32 FMA": 152.0}),  # other work ran during the first measurement
        ([50.0, 150.0, 50.0], {}),
        ([None], {}),  # other processes used the cores
    ],
)
def test_ceilings_that_differ_are_measured_again_or_omitted(monkeypatch, later, expected):
    values = iter(later)
    monkeypatch.setattr(
        ceilings, "ceilings", lambda: {"fp32 FMA": v} if (v := next(values)) else {}
    )
    assert ceilings.confirm_ceilings({"fp32 FMA": 100.0}) == expected


def test_other_processes_are_detected(monkeypatch):
    used = iter([100.0, 101.5])
    monkeypatch.setattr(ceilings, "total_cpu_seconds", lambda: next(used))
    process_seconds = {os.getpid(): iter([10.0, 10.2]), 7: iter([5.0, 5.3])}
    monkeypatch.setattr(ceilings, "cpu_seconds", lambda process: next(process_seconds[process]))
    clock = iter([0.0, 1.0])
    monkeypatch.setattr(ceilings, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(ceilings.os, "cpu_count", lambda: 2)
    share = ceilings.OtherProcesses([7]).share()
    assert share == pytest.approx((1.5 - 0.5 - 4 / ceilings.TICK) / 2)


def test_nothing_is_timed_on_a_busy_machine(monkeypatch):
    monkeypatch.setattr(ceilings, "MAX_WAIT", 0)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: None)
    monkeypatch.setattr(ceilings, "time", clock)
    monkeypatch.setattr(ceilings.OtherProcesses, "share", lambda self: 0.6)
    with pytest.raises(SystemExit, match="other processes have 60% of the cores"):
        ceilings.wait_until_quiet(busy=False)
    ceilings.wait_until_quiet(busy=True)


def test_the_processes_that_use_the_cores_are_named(monkeypatch):
    used = iter([{os.getpid(): 1.0, os.getppid(): 2.0, 0: 1.0}] * 2)
    monkeypatch.setattr(ceilings, "cpu_seconds_by_process", lambda: next(used))
    assert ceilings.busiest({os.getpid(): 0.0, os.getppid(): 1.5, 0: 1.0}, 0.5).endswith(
        f"(process {os.getppid()}) 100% of a core"
    )
    assert ceilings.busiest({}, 0.5) == ""


def test_a_wrong_argument_is_reported_before_the_wait(monkeypatch, capsys, tmp_path):
    def wait(busy):
        raise AssertionError("waited")

    monkeypatch.setattr(harness, "wait_until_quiet", wait)
    monkeypatch.setattr(profile_step, "ceilings_before", wait)
    for shape, message in (
        ("1,2,5,15", "r (default: d): expected an even width of at most 15, got 15"),
        ("1,2,5,16,2,18", "expected an even width of at most 16, got 18"),
    ):
        with pytest.raises(SystemExit):
            run_main(monkeypatch, [], "--shape", shape, "--busy", make_cases=rope.shape_cases)
        assert message in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="--model: expected FILE"):
        profile_step.main()


def test_a_variant_has_no_comma_in_its_name():
    with pytest.raises(ValueError, match="variants: expected names without a comma, got 'a, b'"):
        harness.Case("fwd", "1", {"a, b": int})


def test_an_unsteady_row_is_measured_again(monkeypatch):
    monkeypatch.setattr(harness.OtherProcesses, "share", lambda self: 0.0)
    noisy, calm = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.01, 1.02]

    def row(*attempts):
        left = list(attempts)
        return harness.run_case(
            one_case(), {}, 4, lambda calls, rounds: dict.fromkeys(calls, left.pop(0))
        )

    assert row(noisy, calm).unsteady == ""
    unsteady = row(noisy, noisy)
    assert unsteady.unsteady == "spread 60%"
    assert "unsteady: spread 60%" in harness.table([unsteady])


def results(path, **milliseconds):
    rows = [
        {"name": n, "shape": "1", "milliseconds": {"fastlm": ms, "torch": 1.0},
         "spread": {"fastlm": 0.05, "torch": 0.05}} for n, ms in milliseconds.items()
    ]  # fmt: skip
    path.write_text(json.dumps({"op": "rope", "rows": rows}))
    return str(path)


def test_compare_marks_changes_above_the_spread(monkeypatch, capsys, tmp_path):
    before = results(tmp_path / "a.json", first=1.0, second=1.0, third=1.0, gone=1.0)
    after = results(tmp_path / "b.json", first=0.8, second=1.08, third=1.3)
    picture = tmp_path / "c.png"
    monkeypatch.setattr(sys, "argv", ["compare.py", before, after, "--plot", str(picture)])
    compare.main()
    out = capsys.readouterr().out
    assert "| rope first 1 fastlm | 1 | 0.8 | 1.25x | 10% | faster |" in out
    assert "| rope second 1 fastlm | 1 | 1.08 | 0.93x | 10% |  |" in out
    assert "1 faster, 1 slower, 1 same, 0 unsteady" in out and picture.stat().st_size > 1000


def test_unsteady_rows_are_marked(monkeypatch, tmp_path):
    import matplotlib.axes

    drawn = []
    set_yticks = matplotlib.axes.Axes.set_yticks
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_yticks",
        lambda axes, ticks, labels, **more: (
            drawn.extend(zip(labels, (bar.get_hatch() for bar in axes.patches))),
            set_yticks(axes, ticks, labels, **more),
        ),
    )  # fmt: skip
    changes = [compare.Change(n, 1.0, 0.5, 0.05, n == "noisy") for n in ("noisy", "calm")]
    compare.plot(changes, tmp_path / "c.png")
    assert dict(drawn) == {"noisy (unsteady)": "///", "calm": None}
    assert [change.kind for change in changes] == ["unsteady", "faster"]


def test_two_checkouts_take_turns(monkeypatch, capsys):
    monkeypatch.setattr(versions, "ATTEMPTS", 1)
    monkeypatch.setattr(versions, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["versions.py", str(versions.ROOT), "boundary", "--row", "4)"])
    versions.main()
    out = capsys.readouterr().out
    assert "four numpy arrays, 4 x (4, 4)  (1)" in out and "4 rows: median" in out
    monkeypatch.setattr(sys, "argv", ["versions.py", ".", "ropes"])
    with pytest.raises(SystemExit):
        versions.main()
    assert "only: expected some of attention" in capsys.readouterr().err


def test_every_variant_has_a_process_of_its_own():
    first, second = (turns.Worker(n, partial, (os.getpid,), 1) for n in ("first", "second"))
    assert len({first(), second(), os.getpid()}) == 3 and first() == first.process.pid
    first.stop(), second.stop()
    with pytest.raises(SystemExit, match="third: its process ended with 3"):
        turns.Worker("third", partial, (os._exit, 3), 1)()


def test_the_type_that_a_comparison_is_of(monkeypatch, tmp_path, capsys):
    """Q4_0, which llama.cpp repacks, if its quantizer is there; the file as it is otherwise."""
    file = tmp_path / "Model.Q4_1.gguf"
    monkeypatch.setenv("FASTLM_BENCH", str(tmp_path))
    monkeypatch.setattr(gguf_types, "llama_cpp", lambda program: None)
    assert gguf_types.of_type(file, None) == gguf_types.of_type(file, "Q4_1") == file
    assert "Model as Q4_1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"Q4_0: llama-quantize is missing: sh bench/peers/lla"):
        gguf_types.of_type(file, "Q4_0")
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho $1 $(basename $2) $4 > $3\n")
    program.chmod(0o755)
    monkeypatch.setattr(gguf_types, "llama_cpp", lambda name: str(program))
    made = gguf_types.of_type(file, None)
    assert made.name == "Model.Q4_0.gguf"
    assert made.read_text() == "--allow-requantize Model.Q4_1.gguf Q4_0\n"
    program.write_text("#!/bin/sh\necho no such type >&2; exit 3\n")
    assert gguf_types.of_type(file, "Q4_0") == made  # made once
    with pytest.raises(SystemExit, match="llama-quantize: no such type"):
        gguf_types.of_type(file, "Q4_K_M")


def test_the_better_peer_counts_in_decode():
    rows = [
        {"users": 1, "engine": e, "version": "", "missing": "", "prefill": p, "decode": d}
        for e, p, d in (("fastlm", 40, 30), ("llama.cpp", 20, 9), ("own benchmark", 10, 10))
    ]
    lines = decode.table(rows).splitlines()
    assert "| **20** | 2.00x | 9 | 3.33x |" in lines[3]
    assert "| 10 | 4.00x | **10** | 3.00x |" in lines[4]


MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 1)

    def forward(self, x):
        return {"loss": self.inner(x).square().mean()}

def make():
    return Net(), torch.ones(2, 4)
"""


def test_profile_of_a_model_from_a_file(monkeypatch, tmp_path, capsys):
    file = tmp_path / "net.py"
    file.write_text(MODEL)
    limits = {"fp32 FMA": 1e9, "read": 1e9}
    monkeypatch.setattr(profile_step, "ceilings_before", lambda busy: limits)
    monkeypatch.setattr(profile_step, "confirm_ceilings", lambda before: limits)
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--model", f"{file}:make"])
    profile_step.main()
    out = capsys.readouterr().out
    assert "| aten::addmm |" in out and "all matrix products at the ceiling" in out
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--model", f"{file}:other"])
    with pytest.raises(SystemExit, match="has no 'other'"):
        profile_step.main()


def test_losing_rows_have_their_reason():
    def row(name, shape, ours, peer, theirs, spread=0.01):
        times = {"fastlm": ours, peer: theirs}
        return harness.Row(
            name, shape, times, {"fastlm": spread}, theirs / ours, peer, None, "", {}
        )

    rows = [
        row("w4a16", "8 x 64 -> 32", 0.13, "torch int4pack", 0.09),
        row("rope", "4 x 8", 9.0, "torch", 10.0),
        row("glu", "3 x 80", 0.0031, "torch", 0.0028),
        row("glu", "512 x 80", 3.0, "torch", 2.0),
        row("linear: fwd+bwd bf16", "8 x 8 -> 8", 3.1, "torch", 3.0, spread=0.2),
    ]
    lines = losing.losing_rows(rows).splitlines()
    reasons = [line for line in lines if line[0:1].isdigit()]
    assert [line.partition(".")[0] for line in reasons] == ["1", "2", "3", "4"]
    assert "spread" in reasons[0] and "No reason" in reasons[3]
    assert lines[-4:] == [
        "| linear: fwd+bwd bf16 | 8 x 8 -> 8 | 0.97x | 1 |",
        "| w4a16 | 8 x 64 -> 32 | 0.69x | 2 |",
        "| glu | 3 x 80 | 0.90x | 3 |",
        "| glu | 512 x 80 | 0.67x | 4 |",
    ]


def test_profile_finds_own_linears(monkeypatch):
    min_rows = sys.modules["fastlm.ops.linear"]._MIN_ROWS
    monkeypatch.setitem(min_rows, backend.cpu_isa(), (1, 1))  # fastlm's own product runs
    x, weight = (torch.randn(2048, 64).bfloat16().requires_grad_() for _ in range(2))
    with torch.profiler.profile() as profiled:
        ops.linear(x, weight).sum().backward()
    milliseconds: dict[str, float] = {}
    for event in profiled.key_averages():
        part = profile_step.part_of(event.key, [], 0)
        milliseconds[part] = milliseconds.get(part, 0) + event.self_cpu_time_total / 1e3
    gradients = milliseconds["linears: both gradients"]
    assert milliseconds["linears: forward"] > 0
    assert gradients > milliseconds["the rest"], milliseconds


def test_weight_bytes_per_token(tmp_path):
    """All tensors except an embedding that is only looked up; with a tied head all tensors."""
    random_gguf.write(tmp_path / "untied.gguf", random_gguf.Shape(64, 64, 2, 2, 1))
    model = CausalLM.from_pretrained(tmp_path / "untied.gguf")
    assert model.generate([[1, 2]], max_new_tokens=2, ignore_eos=True)
    sizes = {n: i.size for n, i in GGUFFile(tmp_path / "untied.gguf").tensors.items()}
    assert decode.weight_bytes(tmp_path / "untied.gguf") == sum(sizes.values()) - 49152 * 2 * 34
    rows = [{"users": 1, "engine": "fastlm", "decode": 10.0}]
    bandwidth = decode.bandwidth(rows, tmp_path / "untied.gguf", 4e9)
    assert bandwidth["share"] == pytest.approx(10 * bandwidth["weight_bytes"] / 4e9)
    tied = smollm2()
    assert decode.weight_bytes(tied) == sum(i.size for i in GGUFFile(tied).tensors.values())
