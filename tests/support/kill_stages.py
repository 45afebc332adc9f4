"""Kill commands at random moments, start them again, and compare their results: ``make kill``.

Every command of `CASES` runs once undisturbed. Then it is killed (SIGKILL) and started again, until
it has been killed ``--kills`` times. Half of the kills come at a random moment of the undisturbed
run's time, half right before a random change to the disk (a file opened for writing, a rename, a
new folder, a deletion). After its third kill a run may end. Its files and its printed result are
then compared with those of the undisturbed run: the same files and the same bytes; of JSON and
metrics, all that does not depend on the clock. Then a new run begins.

A command is a separate process, forked from a server that has imported the packages. So the time of
a run is that of the stage, not of importing torch, during which nothing is written.
"""

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import preference_models
import tiny_recipe

FORKS = multiprocessing.get_context("forkserver")
PRELOAD = [
    "torch", "torch._dynamo", "fastlm.cli", "fastlm.model.causal_lm", "fastlm.train.loop",
    "fastlm.train.online", "fastlm.train.preference_stage", "fastlm.data.conversations", "jinja2",
    "fastlm.data.texts", "fastlm.data.prepare", "fastlm.model.adapter", "matplotlib.figure",
    "rich.progress",
]  # fmt: skip
# JSON keys that depend on the clock or the folder's name: nothing else may differ
CLOCK = {
    "seconds", "seconds_p50", "seconds_p99", "tokens_per_second", "used_seconds",
    "training_seconds", "machine_load", "judged_at",
    "decode_tokens_per_second", "decode_tokens_per_second_before",
    "metrics_bytes",  # of lines with seconds
    "command",  # with the name of the folder
    "provenance",  # with the time, hashes of files with times, paths
}  # fmt: skip
LIMIT = 300  # seconds of one start
RUN_KILLS = 3  # of one run, before it may end


@dataclass(frozen=True)
class Case:
    """A command. ``words`` has {out}; ``before`` are the cases whose outputs it reads."""

    name: str
    words: str
    before: tuple[str, ...] = ()
    shows: bool = True  # a result as JSON


TRAINING = "--save-steps 3 --save-total-limit 2 --lr 1e-3 --json --threads 1"
ACCUMULATE = "--gradient-accumulation-steps 1"
SAMPLES = "--sample-tokens 4"
CHAT = f"--batch-size 4 --max-steps 10 --heldout 0.2 --validations 2 {TRAINING}"
ROUNDS = (
    "prompts.jsonl --model base --prompts-per-round 4 --num-generations 2 --batch-size 4"
    f" --max-new-tokens 6 --heldout 0.2 --val-prompts 3 --max-steps 12 --validations 2 {SAMPLES}"
    f" {TRAINING}"
)
CASES = [
    Case("data", "data prepare docs --rules none --heldout-bytes 6000 --workers 1 -o {out} --json"),
    Case("tokenizer", "tokenizer train data --vocab-size 300 -o {out} --json", ("data",)),
    Case("shards", "data shards data --tokenizer tokenizer -o {out} --json", ("tokenizer",)),
    Case(
        "pretrain",
        "pretrain --shards shards --tokenizer tokenizer --config config.json -o {out} --max-steps"
        f" 16 --batch-size 4 --seq-len 32 --validations 3 --val-tokens 512 {SAMPLES} {TRAINING}",
        ("shards",),
    ),
    Case(
        "pretrain-async",
        "pretrain --shards shards --tokenizer tokenizer --config config.json -o {out} --max-steps"
        " 16 --batch-size 4 --seq-len 32 --validations 5 --val-tokens 512 --async-checkpoints"
        f" --keep best --optimizer muon {SAMPLES} {TRAINING}",
        ("shards",),
    ),
    Case("sft", f"sft chats.jsonl --model base -o {{out}} {SAMPLES} {CHAT}"),
    Case(
        "sft-lora",
        "sft chats.jsonl --model base -o {out} --lora-rank 4 --no-merge --save-best"
        f" {SAMPLES} {CHAT}",
    ),
    Case(
        "distill",
        f"distill chats.jsonl --model base --teacher sft -o {{out}} {SAMPLES} {CHAT}",
        ("sft",),
    ),
    Case(
        "distill-stored",
        "distill chats.jsonl --model base --teacher sft --teacher-top-k 8 -o {out}"
        f" {SAMPLES} {CHAT}",
        ("sft",),
    ),
    Case(
        "distill-answers",
        "distill chats.jsonl --model base --teacher sft --teacher-completions sampled"
        f" --max-new-tokens 12 -o {{out}} {SAMPLES} {CHAT}",
        ("sft",),
    ),
    Case("reward", f"reward pairs.jsonl --model base -o {{out}} {ACCUMULATE} {CHAT}"),
    Case("dpo", f"dpo pairs.jsonl --model base -o {{out}} {ACCUMULATE} {SAMPLES} {CHAT}"),
    Case("kto", f"dpo pairs.jsonl --model base -o {{out}} --loss-type kto {ACCUMULATE} {CHAT}"),
    Case(
        "ppo",
        f"ppo {ROUNDS} --reward-function contains --reward-model reward --value-model reward "
        "--num-iterations 1"
        " --kl-target 1 -o {out}",
        ("reward",),
    ),
    Case(
        "reward-2",
        f"reward pairs.jsonl --model base -o {{out}} {ACCUMULATE} --seed 2 {CHAT}",
    ),
    Case(
        "ppo-ensemble",
        f"ppo {ROUNDS} --reward-model reward --reward-model reward-2 --ensemble uwo "
        "--num-iterations 1"
        " -o {out}",
        ("reward", "reward-2"),
    ),
    Case("grpo", f"grpo {ROUNDS} --reward-function contains --beta 0.1 -o {{out}}"),
    Case(
        "sweep",
        "sweep sft --model base --seeds 0,1 --grid {{lr=[1e-4,1e-2]}} -o {out} --options"
        " {{data=['chats.jsonl'],batch_size=4,max_steps=4,save_steps=2,heldout=0.2,validations=2}}"
        " --json --threads 1",
    ),
    Case("eval", "eval --model base --data data --stride 16 -o {out} --json", ("data",)),
    Case(
        "safety",
        "safety --model base --data data --measures memorization --limit 10 -o {out} --json",
        ("data",),
    ),
    Case(
        "simulate",
        "feedback simulate chats.jsonl --model base --reward-model reward --limit 6 --users 3"
        " --reviewers 1 --max-new-tokens 6 --clients 1 -o {out} --json --threads 1",
        ("reward",),
    ),
    Case(
        "winrate",
        "winrate --model sft --old base --judge reward --data prompts.jsonl"
        " --preferences pairs.jsonl --limit 6 --max-new-tokens 6 -o {out} --json --threads 1",
        ("sft", "reward"),
    ),
    Case(
        "judge",
        "judge --judge base --model sft --old base --data turns.jsonl --rubric rubric.txt"
        " --limit 6 --max-new-tokens 6 --max-reason-tokens 4 -o {out} --json --threads 1",
        ("sft",),
    ),
    Case(
        "gate", "gate --scores winrate --gates gates.toml -o {out} --json", ("winrate",)
    ),
    Case(
        "promotion", "promotion --new sft --old base --decision gate -o {out} --json",
        ("sft", "gate"),
    ),
    Case("export", "export --model base -o {out} --json"),
    Case(
        "quantize",
        "quantize --model base --method rtn --group-size 16 --data data -o {out} --json",
        ("data",),
    ),
    Case(
        "quantize-learned",
        "quantize --model base --method autoround --iterations 8 --group-size 16 --data data"
        " --calibration data --calibration-tokens 1024 --calibration-length 32 -o {out} --json",
        ("data",),
    ),
    Case("merge", "merge --model sft-lora -o {out}", ("sft-lora",), shows=False),
    Case("rank-import", "rank import {out}.sqlite answers.jsonl", shows=False),
    Case(
        "rank-sample",
        "rank sample {out}.sqlite --model base --prompts prompts.jsonl --num-generations 2"
        " --max-new-tokens 6",
        shows=False,
    ),
    Case(
        "rank-export", "rank export rank-import.sqlite {out}.jsonl --form pairs",
        ("rank-import",), shows=False,
    ),
    Case("run", "run tiny.toml --out {out}", shows=False),
]  # fmt: skip


@dataclass
class KillCounts:
    """Counts of a case's kills. ``moments``: progress of the run at a kill -> how often."""

    kills: int = 0
    ends: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def prepare(folder: Path) -> None:
    """Write the input files of the cases."""
    tiny_recipe.write(folder)
    config = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gates.toml").write_text('[[gate]]\nscore = "winrate.rate"\nmin = 0\n')
    (folder / "rubric.txt").write_text("please")
    words = preference_models.WORDS
    chats = [
        {"prompt": f"what is {a} {b}", "completion": f"{b} please {a}"}
        for a in words[:6]
        for b in words[:8]
    ]
    preference_models.write(folder / "chats.jsonl", chats)
    preference_models.write(folder / "pairs.jsonl", preference_models.polite_pairs(48))
    preference_models.write(
        folder / "prompts.jsonl", [{"prompt": f"what is {w}", "answer": w[0]} for w in words]
    )
    turns = [{"turns": [f"what is {w}", "please"], "category": w[0]} for w in words]
    preference_models.write(folder / "turns.jsonl", turns)
    preference_models.write(
        folder / "answers.jsonl",
        [{"prompt": f"what is {w}", "answers": [w, f"a {w}", "no"], "ranks": [0, 1, 2]}
         for w in words],
    )  # fmt: skip


def make_base(folder: Path) -> None:
    """Save the base model. Runs in a child: the server and this process must not compute, or a fork
    would hang.
    """
    preference_models.make_base(folder / "base", max_position_embeddings=512)


def command(folder: Path, words: Sequence[str], log: Path, armed: int, counted: Path) -> None:
    """Run ``fastlm WORDS`` in a child. ``armed``: the number of the change to the disk before which
    it dies; 0: none. At the end the number of changes is written to ``counted``.
    """
    os.chdir(folder)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdin = open(os.devnull)
    changes = 0
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        change = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate")
        change |= event == "sqlite3.connect" or (
            event == "open" and isinstance(args[2], int) and bool(args[2] & writes)
        )
        if change:
            changes += 1
            if changes == armed:
                os.kill(os.getpid(), signal.SIGKILL)

    from fastlm.cli import main

    sys.addaudithook(watch)
    sys.argv = ["fastlm", *words]
    try:
        main()
    except SystemExit as done:
        if done.code not in (None, 0):
            sys.stdout.flush()
            os._exit(int(done.code) if isinstance(done.code, int) else 1)
    count = changes
    sys.stdout.flush()
    counted.write_text(str(count))


class CommandRunner:
    """A runner of the commands, in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log, self.counted = folder / "log", folder / "counted"

    def start(self, case: Case, out: str, armed: int = 0, delay: float | None = None) -> int:
        """Run to the end or to the kill: ``delay`` seconds after the start, or before the change
        ``armed``. Return the exit status, negative for a signal.
        """
        words = case.words.format(out=out).split()
        child = FORKS.Process(
            target=command, args=(self.folder, words, self.log, armed, self.counted)
        )
        child.start()
        child.join(LIMIT if delay is None else delay)
        if child.exitcode is None:
            child.kill()  # no matter if it has ended just now
            child.join()
            if delay is None:
                raise TimeoutError(f"{case.name}: no end after {LIMIT} s: {self.log_end()}")
        assert child.exitcode is not None
        return child.exitcode

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-600:]

    def state(self, case: Case, out: str) -> dict[str, Any]:
        """Return the files and the printed result of a run, in a form that can be compared."""
        result: dict[str, Any] = {}
        root = self.folder / out
        for path in [*root.rglob("*"), *self.folder.glob(f"{out}.*")]:
            if path.is_file() and not path.name.endswith(("-wal", "-shm", ".lock")):
                result[str(path.relative_to(self.folder)).removeprefix(out)] = content(path, out)
        for path in self.folder.glob(f".{out}.*"):
            result[f"stray {path.name}"] = b""
        if case.shows:
            text = self.log.read_text(errors="replace").replace(f'"{out}/', '"OUT/')
            match = re.search(r"^\{\n.*^\}", text, re.MULTILINE | re.DOTALL)
            result["result"] = timeless(json.loads(match[0])) if match else text
        return result

    def remove(self, out: str) -> None:
        for path in [*self.folder.glob(f"{out}*"), *self.folder.glob(f".{out}.*")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def content(path: Path, out: str) -> Any:
    if path.suffix in (".json", ".jsonl"):
        text = path.read_text().replace(f'"{out}/', '"OUT/')
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        values = [timeless(json.loads(line)) for line in lines]
        if path.name == "stages.json":  # its report covers times
            for stage in values[0]["stages"].values():
                without_timed_files(stage)
            values[0]["stages"]["report"].pop("fingerprint")
        if path.name == "record.json":
            without_timed_files(values[0]["stages"]["."])
        return values
    if path.suffix in (".sqlite", ".db"):
        with sqlite3.connect(path) as store:
            return rows_of(store)
    if path.suffix == ".log":  # of a server; its database has what it answered
        return [json.loads(line)["event"] for line in path.read_text().splitlines()]
    if path.suffix == ".html":  # its figures are in the results and metrics: only its structure
        text = path.read_text()
        return [text.count("<svg"), text.count("<section"), text.rstrip().endswith("</html>")]
    return path.read_bytes()


def without_timed_files(stage: dict[str, Any]) -> None:
    """Remove the sizes of files that have seconds in them."""
    for name in ("metrics.jsonl", "report.json", "serve.log"):
        stage.get("file_sizes", {}).pop(name, None)


def rows_of(store: sqlite3.Connection) -> list[str]:
    """Dump a database as text, without times. The random ids of responses are numbered in the order
    of their appearance. SQLAlchemy creates the indexes of a table in any order, so they are sorted.
    """
    names: dict[str, str] = {}
    lines = []
    for line in sorted(store.iterdump(), key=lambda line: line * line.startswith("CREATE INDEX")):
        if "fastlm_measurements" not in line:  # durations of answers
            line = re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "TIME", line)
            for id in re.findall("chatcmpl-[0-9a-f]+", line):
                line = line.replace(id, names.setdefault(id, f"response {len(names)}"))
            lines.append(line)
    return lines


def timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCK}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def difference(expected: dict[str, Any], actual: dict[str, Any]) -> str:
    """Return the first difference, or an empty text."""
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            return f"{name} is missing"
        if name not in expected:
            return f"{name} should not be there"
        if expected[name] != actual[name]:
            return f"{name} differs: {first_difference(expected[name], actual[name])}"
    return ""


def first_difference(expected: Any, actual: Any, path: str = "") -> str:
    if isinstance(expected, dict) and isinstance(actual, dict) and expected.keys() == actual.keys():
        for key, value in expected.items():
            if value != actual[key]:
                return first_difference(value, actual[key], f"{path}.{key}")
    if isinstance(expected, list) and isinstance(actual, list) and len(expected) == len(actual):
        for i, (item, other) in enumerate(zip(expected, actual)):
            if item != other:
                return first_difference(item, other, f"{path}[{i}]")
    return f"{path} expected {expected!r:.200}, got {actual!r:.200}"


def progress(folder: Path, out: str, case: Case) -> str:
    """Return how far the run had come at a kill, by the files on the disk."""
    root = folder / out
    if [*folder.glob(f"{out}/**/.*.part"), *folder.glob(f".{out}.*.part")]:
        return "writing"
    if [*folder.glob(f"{out}/**/.*.old"), *folder.glob(f".{out}.*.old")]:
        return "replacing"
    if (root / "model").exists():
        return "model written"
    if [*root.glob("checkpoints/step-*")]:
        return "between checkpoints"
    if (root / "metrics.jsonl").exists():
        return "first steps"
    return "some files" if root.exists() or [*folder.glob(f"{out}.*")] else "start-up"


def kill_repeatedly(
    runner: CommandRunner, case: Case, kills: int, draw: random.Random
) -> KillCounts:
    """Kill the case ``kills`` times. The undisturbed run's outputs are kept for later cases."""
    counts, out = KillCounts(), "killed"
    began = time.perf_counter()
    if status := runner.start(case, case.name):
        raise RuntimeError(f"{case.name}: exit status {status}: {runner.log_end()}")
    took = time.perf_counter() - began
    changes = int(runner.counted.read_text())
    expected = runner.state(case, case.name)
    while counts.kills < kills:
        runner.remove(out)
        of_run = 0
        while True:
            armed, delay = 0, None
            if of_run < RUN_KILLS and counts.kills < kills:
                if draw.random() < 0.5 and changes:
                    armed = draw.randint(1, changes)
                else:
                    delay = draw.uniform(0, took)
            status = runner.start(case, out, armed, delay)
            if status != -signal.SIGKILL:
                break
            of_run += 1
            counts.kills += 1
            counts.moments[progress(runner.folder, out, case)] += 1
        counts.ends += 1
        if status:
            counts.failures.append(f"exit status {status}: {runner.log_end()}")
        elif message := difference(expected, runner.state(case, out)):
            counts.failures.append(message)
    runner.remove(out)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(c.name for c in CASES)}")
    parser.add_argument("--kills", type=int, default=20, help="per case")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = [run_cases(options.cases, options.kills, options.seed, print)]
    sys.exit(any(failed))


def run_cases(
    names: Sequence[str], kills: int, seed: int, report: Callable[[str], Any]
) -> list[str]:
    """Kill the named cases, or all without names. Return the failures."""
    os.environ["OMP_NUM_THREADS"] = "1"
    FORKS.set_forkserver_preload(PRELOAD)
    selected = set(names) or {case.name for case in CASES}
    needed = set(selected)
    for case in reversed(CASES):
        needed |= set(case.before) if case.name in needed else set()
    failures = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        child = FORKS.Process(target=make_base, args=(folder,))
        child.start()
        child.join()
        runner = CommandRunner(folder)
        for case in CASES:
            if case.name not in needed:
                continue
            begun = time.perf_counter()
            draw = random.Random(f"{seed} {case.name}")
            counts = kill_repeatedly(runner, case, kills if case.name in selected else 0, draw)
            took = time.perf_counter() - begun
            hit = ", ".join(f"{n} {moment}" for moment, n in counts.moments.most_common())
            report(
                f"{case.name}: {counts.kills} kills ({hit}), {counts.ends} ends,"
                f" {len(counts.failures)} failed, {took:.0f} s"
            )
            for failure in counts.failures:
                report(f"  {failure}")
            failures += [f"{case.name}: {failure}" for failure in counts.failures]
    return failures


if __name__ == "__main__":
    main()
