"""The chain of stages through the command line: complete at the end, skipped, redone, resumed,
refused.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_recipe
import torch
from paths import ROOT

from fastlm.checkpoint.folder import load_tensors, save_tensors
from fastlm.errors import InputError
from fastlm.stages import load_recipe, run_recipe

TIMES = ("seconds", "tokens_per_second", "progress")


def fastlm(*arguments, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "fastlm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "pretrain/metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(recipe, run folder) of a run through the command line."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = tiny_recipe.write(folder)
    done = fastlm("run", recipe, "--out", folder / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.html")
    return recipe, folder / "run"


def run_again(recipe, out, **kwargs) -> dict[str, str]:
    """Run again and return stage -> skipped or done."""
    states: dict[str, str] = {}
    run_recipe(
        recipe,
        out,
        on_event=lambda e: "stage" in e and states.update({e["stage"]: e["state"]}),
        **kwargs,
    )
    states.pop("report")
    return states


def test_everything_is_there(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlm.model.causal_lm import CausalLM

    _, run = finished
    summary = json.loads((run / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == ["data", "tokenizer", "shards", "pretrain", "eval", "quantize"]
    scores = stages["eval"]["models"]["pretrain"]
    assert scores["bits_per_byte"] > 0 < stages["eval"]["bits_per_byte_xz"]
    assert json.loads((run / "eval/scores.json").read_text())["models"]["pretrain"] == scores
    small = stages["quantize"]
    assert small["bits_per_byte_before"] == pytest.approx(scores["bits_per_byte"], rel=1e-6)
    for key in ("bits_per_byte", "decode_tokens_per_second", "decode_tokens_per_second_before"):
        assert small[key] > 0, key
    assert 0 < small["bytes"] < small["bytes_before"]
    assert stages["pretrain"]["tokens"] == 12 * 4 * 32
    assert summary["seconds"] == pytest.approx(sum(s["seconds"] for s in stages.values()))
    machine = summary["machine"]
    assert machine["threads"] >= 1 and "at the start" in stages["pretrain"]["machine_load"]
    root = ROOT
    if (root / ".git").exists():
        command = ["git", "-C", root, "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True).stdout
        assert head.startswith(machine["commit"].removesuffix("-dirty"))
    for name in (
        "data/train/00000.jsonl.zst", "tokenizer/tokenizer.json", "shards/train/index.json",
        "report.html", "pretrain/model/config.json", "quantize/model.safetensors", "stages.json",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    left = [p for p in run.rglob("*") if p.name.endswith((".part", ".old"))]
    assert not left
    # transformers computes the same from the saved model
    ids = torch.tensor([[5, 6, 7, 8]])
    theirs = AutoModelForCausalLM.from_pretrained(run / "pretrain/model", dtype=torch.float32)
    ours = CausalLM.from_pretrained(run / "pretrain/model", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run / "pretrain/model").decode([5]) is not None


def test_heldout_text_is_not_trained_on(finished):
    from fastlm.data.corpus import read_documents

    _, run = finished
    train = {d.text for d in read_documents(run / "data", "train")}
    heldout = [d.text for d in read_documents(run / "data", "heldout")]
    assert heldout and not train.intersection(heldout)


def test_again_is_skipped_and_a_change_redoes_what_depends_on_it(finished):
    recipe, run = finished
    before = (run / "pretrain/metrics.jsonl").read_bytes()
    assert set(run_again(recipe, run).values()) == {"skipped"}
    states = run_again(recipe, run, overrides=["eval.stride=8"])
    assert [n for n, s in states.items() if s == "done"] == ["eval"]
    (run / "quantize/model.safetensors").unlink()
    states = run_again(recipe, run, overrides=["eval.stride=8"])
    assert [n for n, s in states.items() if s == "done"] == ["quantize"]
    # a lost model is restored from the last checkpoint; after that checkpoints are not needed
    shutil.rmtree(run / "pretrain/model")
    states = run_again(recipe, run, overrides=["eval.stride=8"])
    assert [n for n, s in states.items() if s == "done"] == ["pretrain"]
    shutil.rmtree(run / "pretrain/checkpoints")
    assert set(run_again(recipe, run, overrides=["eval.stride=8"]).values()) == {"skipped"}
    assert (run / "pretrain/metrics.jsonl").read_bytes() == before
    (run / ".pretrain.fastlm-0123456789abcdef.part").mkdir()  # left by a killed process
    states = run_again(recipe, run, overrides=["pretrain.lr=2e-2"])
    assert not list(run.glob(".*.part"))
    assert [n for n, s in states.items() if s == "skipped"] == ["data", "tokenizer", "shards"]
    steps = [m["step"] for m in metrics(run) if "loss" in m]
    assert steps == list(range(1, 13)) and (run / "pretrain/metrics.jsonl").read_bytes() != before


def test_changed_local_text_is_seen(tmp_path):
    recipe = tiny_recipe.write(tmp_path)
    assert run_again(recipe, tmp_path / "run", until="data") == {"data": "done"}
    assert run_again(recipe, tmp_path / "run", until="data") == {"data": "skipped"}
    with open(tmp_path / "docs/00.txt", "a") as f:
        f.write("\nOne more line.\n")
    assert run_again(recipe, tmp_path / "run", until="data") == {"data": "done"}


def test_the_report_of_a_part_says_so_at_the_top(finished, tmp_path):
    run, recipe = tmp_path / "run", tiny_recipe.write(tmp_path)
    run_recipe(recipe, run, until="tokenizer")
    top = " ".join((run / "report.html").read_text().partition("<section>")[0].split())
    names = [step.name for step in load_recipe(recipe).steps]
    assert names[:2] == ["data", "tokenizer"]
    assert f"2 of the recipe's {len(names)} stages have run." in top
    assert "ended after tokenizer, as asked (<code>--until tokenizer</code>)" in top
    assert f"Without it the same command also runs {', '.join(names[2:])}." in top
    assert "<h1>run</h1>" in top and 'class="part"' not in top  # a planned end is no warning
    run_recipe(recipe, run, until="data")  # nothing runs, but the run stopped elsewhere
    assert "ended after data, as asked" in (run / "report.html").read_text()
    full_report = (finished[1] / "report.html").read_text()
    assert "Not run:" not in full_report and "stages have run" not in full_report


def test_a_file_whose_name_is_no_utf8(tmp_path):
    recipe = tiny_recipe.write(tmp_path)
    (tmp_path / "docs" / os.fsdecode(b"caf\xe9.txt")).write_text("One line.")
    assert run_again(recipe, tmp_path / "run", until="data") == {"data": "done"}
    assert run_again(recipe, tmp_path / "run", until="data") == {"data": "skipped"}


def test_a_changed_file_with_a_number_sign_in_its_name_is_seen(tmp_path):
    recipe, run = tiny_recipe.write(tmp_path), tmp_path / "run"
    path = tmp_path / "c#.txt"
    (tmp_path / "docs/00.txt").rename(path)
    sources = [f"data.sources=[{str(path)!r}, {str(tmp_path / 'docs')!r}]"]
    assert run_again(recipe, run, until="data", overrides=sources) == {"data": "done"}
    with open(path, "a") as f:
        f.write("\nOne more line.\n")
    assert run_again(recipe, run, until="data", overrides=sources) == {"data": "done"}


def press_at(step):
    """An ``on_event`` that presses Ctrl-C after this step."""

    def press(event):
        if event.get("step") == step and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    return press


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


WATCHING = ["pretrain.save_total_limit=3", "pretrain.save_steps=4", "pretrain.validations=1",
            "pretrain.val_tokens=256", "pretrain.sample_at=[0.5]", "pretrain.sample_prompt='The'",
            "pretrain.sample_tokens=2", "data.workers=2"]  # fmt: skip


def test_what_does_not_change_the_model_goes_on_with_the_training(tmp_path):
    """Other times for validation and checkpoints, and a source with only a new time stamp."""
    recipe, uninterrupted, run = tiny_recipe.write(tmp_path), tmp_path / "whole", tmp_path / "run"
    run_recipe(recipe, uninterrupted, until="pretrain")
    with pytest.raises(KeyboardInterrupt, match="step-00000006"):
        run_recipe(recipe, run, until="pretrain", on_event=press_at(6))
    for file in (tmp_path / "docs").iterdir():
        os.utime(file, (1, 1))
    steps = []
    run_recipe(
        recipe, run, until="pretrain", overrides=WATCHING,
        on_event=lambda e: steps.append(e["step"]) if "loss" in e else None,
    )  # fmt: skip
    assert steps == list(range(7, 13))
    assert not (run / "previous").exists()
    weights = files_of(run / "pretrain/model")
    assert (
        weights["model.safetensors"]
        == (uninterrupted / "pretrain/model/model.safetensors").read_bytes()
    )
    states = run_again(recipe, run, until="pretrain")
    assert set(states.values()) == {"skipped"} and files_of(run / "pretrain/model") == weights


def test_an_unchanged_source_is_not_read_again(tmp_path, monkeypatch):
    from fastlm.sources import input_digest as content

    recipe, run, read, digest = tiny_recipe.write(tmp_path), tmp_path / "run", [], content._digest
    monkeypatch.setattr(content, "_digest", lambda p: read.append(p.name) or digest(p))
    assert run_again(recipe, run, until="data") == {"data": "done"} and len(read) == 24
    read.clear()
    assert run_again(recipe, run, until="data") == {"data": "skipped"} and not read
    os.utime(tmp_path / "docs/03.txt")
    assert run_again(recipe, run, until="data") == {"data": "skipped"} and read == ["03.txt"]
    # another text with the same size and time
    file = tmp_path / "docs/05.txt"
    before = file.stat()
    file.write_text(file.read_text().swapcase())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run_again(recipe, run, until="data") == {"data": "done"}
    for damaged in ('{"cut off', "[" * 100_000, '{"a": [1, 2, 3, 4]}', "[1]", '{"a": "four"}'):
        (run / "sources.json").write_text(damaged)
        assert run_again(recipe, run, until="data") == {"data": "skipped"}


def test_a_training_that_gives_way_is_set_aside_and_can_go_on(tmp_path):
    recipe, run = tiny_recipe.write(tmp_path), tmp_path / "run"
    first = fastlm("run", recipe, "--out", run)
    assert first.returncode == 0, first.stderr
    model, steps = files_of(run / "pretrain/model"), files_of(run / "pretrain/checkpoints")
    report, log = (run / "report.html").read_bytes(), (run / "pretrain/metrics.jsonl").read_bytes()
    rerun = fastlm("run", recipe, "--out", run, "--until", "pretrain", "--set", "pretrain.lr=2e-2")
    assert rerun.returncode == 0, rerun.stderr
    (line,) = [line for line in rerun.stderr.splitlines() if "archived" in line]
    assert line.startswith("pretrain: ") and line.endswith(str(run / "previous"))
    previous = run / "previous"
    assert (
        files_of(previous / "pretrain/model") == model
        and files_of(previous / "pretrain/checkpoints") == steps
    )
    assert (previous / "report.html").read_bytes() == report
    assert (previous / "pretrain/metrics.jsonl").read_bytes() == log
    archived = json.loads((previous / "recipe.json").read_text())["stage"]
    assert next(s for s in archived if s["kind"] == "pretrain")["lr"] == 1e-2
    assert files_of(run / "pretrain/model") != model
    assert (run / "report.html").read_bytes() != report and not (run / "quantize").exists()
    # the archive is a run folder itself: nothing is trained again there
    states = run_again(recipe, previous, until="pretrain")
    assert states == {"data": "done", "tokenizer": "done", "shards": "done", "pretrain": "skipped"}

    # another text: the training is archived before the data is prepared again
    second = files_of(run / "pretrain/model")
    (tmp_path / "docs/00.txt").write_text("A tree sees the river.\n" * 50)
    states = run_again(recipe, run, overrides=["pretrain.lr=2e-2"], until="data")
    assert states == {"pretrain": "archived", "data": "done"}
    assert files_of(previous / "pretrain/model") == model  # what was archived before is kept
    previous = run / "previous-2"
    assert files_of(previous / "pretrain/model") == second and (previous / "shards").is_dir()
    assert not (run / "pretrain/model").exists() and not list(run.glob(".previous*"))
    # nothing was trained since: the archive is kept
    states = run_again(recipe, run, overrides=["data.heldout_bytes=5000"], until="data")
    assert states == {"data": "done"} and files_of(previous / "pretrain/model") == second


def test_a_training_continues_with_options_that_its_command_takes(tmp_path):
    """`keep`, and before the end `on_spike`: nothing is archived, no step is trained again."""
    recipe, run, plans = tiny_recipe.write(tmp_path), tmp_path / "run", []

    def rerun(*overrides: str) -> tuple[str, str]:
        sets = [f"pretrain.{word}" for word in overrides]
        run_recipe(recipe, run, overrides=sets, until="pretrain", on_plan=plans.append)
        planned = next(p for p in plans[-1] if p.step.name == "pretrain")
        return planned.action, planned.reason

    def cut_off() -> None:
        record = json.loads((run / "stages.json").read_text())
        del record["stages"]["pretrain"]["file_sizes"], record["stages"]["pretrain"]["result"]
        (run / "stages.json").write_text(json.dumps(record))

    assert rerun("save_best=true", "spike_factor=3.0") == ("run", "new")
    log = (run / "pretrain/metrics.jsonl").read_bytes()
    last = (run / "pretrain/model/model.safetensors").read_bytes()
    lowest = next((run / "pretrain/checkpoints").glob("best-*"))
    # make the best weights differ from the last ones
    tensors, metadata = load_tensors(lowest)
    save_tensors(lowest, {name: t + 1 for name, t in tensors.items()}, metadata)
    reason = "keep was 'last', now 'best'"
    assert rerun("spike_factor=3.0", 'keep="best"') == ("continue", reason)
    assert (run / "pretrain/model/model.safetensors").read_bytes() != last
    assert rerun("spike_factor=3.0") == ("continue", "keep was 'best', now 'last'")
    assert (run / "pretrain/model/model.safetensors").read_bytes() == last
    assert rerun("spike_factor=3.0", 'on_spike="stop"') == ("skip", "done")
    cut_off()
    skips = ("spike_factor=3.0", 'on_spike="skip"')
    assert rerun(*skips) == ("continue", "on_spike is now 'skip'")  # from "stop" or "warn"
    cut_off()
    spikes = "on_spike was 'skip', now 'stop'"
    assert rerun("spike_factor=3.0", 'on_spike="stop"') == ("continue", spikes)
    assert (run / "pretrain/metrics.jsonl").read_bytes() == log
    assert not list(run.glob("previous*"))
    # finished, it may have thrown away other gradients
    assert rerun(*skips) == ("run", "on_spike is now 'skip'")
    factor = "spike_factor was 3.0, now 100.0"
    assert rerun("spike_factor=100.0", 'on_spike="skip"') == ("run", factor)
    assert rerun() == ("run", "on_spike was 'skip', now 'warn'")
    assert len([*run.glob("previous*")]) == 3
    # what a checkpoint cannot continue with starts again
    assert rerun('keep="best"', "max_steps=2", "lr=1e-3")[0] == "run"
    assert len([*run.glob("previous*")]) == 4


def test_a_file_beside_the_model_does_not_train_it_again(finished):
    recipe, run = finished
    run_recipe(recipe, run)
    shutil.rmtree(run / "pretrain/checkpoints")
    (run / "pretrain/model/README.md").write_text("mine")
    assert set(run_again(recipe, run).values()) == {"skipped"}
    # a damaged model is trained again, and kept where it can be inspected
    weights = (run / "pretrain/model/model.safetensors").read_bytes()
    (run / "pretrain/model/model.safetensors").write_bytes(weights[:-1])
    states = run_again(recipe, run, until="pretrain")
    assert states["pretrain"] == "done"
    archived = [p.read_bytes() for p in run.glob("previous*/pretrain/model/model.safetensors")]
    assert weights[:-1] in archived
    assert (run / "pretrain/model/model.safetensors").read_bytes() == weights


def test_ctrl_c_in_the_last_step_ends_the_chain(tmp_path):
    recipe, run, events = tiny_recipe.write(tmp_path), tmp_path / "run", []
    press = press_at(12)
    with pytest.raises(KeyboardInterrupt, match=r"after step 12; saved in .*step-00000012$"):
        run_recipe(recipe, run, on_event=lambda e: (events.append(e.get("stage")), press(e)))
    assert "eval" not in events and not (run / "pretrain/model").exists()
    assert run_again(recipe, run, until="pretrain")["pretrain"] == "done"
    assert [m["step"] for m in metrics(run) if "loss" in m] == list(range(1, 13))


def test_killed_in_training_and_started_again(finished, tmp_path):
    """SIGKILL from outside at any instruction: the same command continues to the same losses."""
    recipe, _ = finished
    undisturbed, run = tmp_path / "whole", tmp_path / "run"
    sets = ["--set", "pretrain.max_steps=60", "--set", "quantize.group_size=32"]
    assert fastlm("run", recipe, "--out", undisturbed, "--until", "pretrain", *sets).returncode == 0
    command = [
        sys.executable,
        "-P",
        "-m",
        "fastlm",
        "run",
        recipe,
        "--out",
        run,
        "--until",
        "pretrain",
        *sets,
    ]
    with open(tmp_path / "log", "wb") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < deadline:
            if (run / "pretrain/metrics.jsonl").exists() and (
                run / "pretrain/metrics.jsonl"
            ).stat().st_size > 3000:
                break
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    rerun = fastlm("run", recipe, "--out", run, "--until", "pretrain", *sets)
    assert rerun.returncode == 0, rerun.stderr
    assert "data: skipped" in rerun.stderr and "pretrain: started" in rerun.stderr
    assert metrics(run) == metrics(undisturbed)
    weights = "pretrain/model/model.safetensors"
    assert (run / weights).read_bytes() == (undisturbed / weights).read_bytes()


def one_line(done, text):
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("fastlm: ")]
    assert text in line and "Traceback" not in done.stderr


def test_a_disk_that_takes_no_more(finished, tmp_path):
    """Writing any file beyond a size fails, as on a full disk: one line, status 2, nothing
    half-written.
    """
    recipe, _ = finished
    run = tmp_path / "run"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = fastlm("run", recipe, "--out", run, preexec_fn=limit)
    one_line(done, "File too large")
    assert not [p for p in run.rglob("*") if p.name.endswith((".part", ".old", ".tmp"))]
    assert fastlm("run", recipe, "--out", run, "--until", "shards").returncode == 0


def test_a_read_only_run_folder(tmp_path):
    """This holds even for root, who drops the capability to write where the mode forbids it."""
    import ctypes

    drop_from_bounding_set, dac_override = 24, 1  # prctl(2), capabilities(7)
    libc = ctypes.CDLL(None)
    recipe = tiny_recipe.write(tmp_path)
    run = tmp_path / "run"
    run.mkdir(mode=0o555)
    done = fastlm(
        *("run", recipe, "--out", run),
        preexec_fn=lambda: libc.prctl(drop_from_bounding_set, dac_override, 0, 0, 0),
    )
    one_line(done, "Permission denied")
    assert list(run.iterdir()) == []


def test_a_place_where_no_folder_can_be(finished, tmp_path):
    recipe, _ = finished
    (tmp_path / "file").write_text("")
    one_line(fastlm("run", recipe, "--out", tmp_path / "file" / "run"), "cannot create the folder")


@pytest.mark.parametrize("name", ["data", "pretrain", "quantize"])
def test_a_folder_with_somebody_elses_files_is_left_alone(tmp_path, name):
    recipe = tiny_recipe.write(tmp_path)
    mine = tmp_path / "project" / name / "mine"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(InputError, match=f"expected a folder in which '{name}' is free"):
        run_recipe(recipe, tmp_path / "project")
    assert mine.read_text() == "precious"


def test_only_strays_of_runs_are_swept(finished):
    recipe, run = finished
    mine = [run / ".vimrc.old", run / ".part", run / ".data.old", run / ".pretrain.20261127.part"]
    strays = [
        run / ".pretrain.fastlm-0123456789abcdef.part",
        run / ".stages.json.fastlm-0123456789abcdef.part",
        run / ".data.fastlm-0123456789abcdef.old",
    ]
    for file in mine + strays:
        file.write_text("x")
    run_again(recipe, run)
    assert all(file.exists() for file in mine) and not any(file.exists() for file in strays)
    for file in mine:
        file.unlink()


def test_one_run_at_a_time(finished):
    import fcntl

    recipe, run = finished
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another fastlm run is at work in this folder"):
            run_recipe(recipe, run)


def test_an_unknown_last_stage(finished):
    recipe, run = finished
    with pytest.raises(InputError, match="until: expected one of data, tokenizer"):
        run_recipe(recipe, run, until="sft")
