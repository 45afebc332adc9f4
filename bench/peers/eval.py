"""Compare lm-evaluation-harness with `hf`, the harness with `fastlm`, and `fastlm eval`.

All three ask the same questions with the same weights: SmolLM2-135M-Instruct, dequantized into a
Hugging Face folder, in float32 and in bfloat16. The harness reads the questions offline, from JSON
files and tasks in its format, written into a temporary folder. Each side is a process, idle while
another runs; they take turns per set. Compared are every score, every request's log-likelihood and
greedy flag, and the time of the likelihoods, including tokenizing (the rest of the harness is the
same on both sides and not counted).

`hf` runs each set at its best batch size: those of --batch are tried first.

    pip install -e ".[harness]" transformers accelerate
    python bench/peers/eval.py [--tasks arc_easy ...] [--shots 0 5] [--limit 100] [--json FILE]
"""

import argparse
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import torch
from ceilings import OtherProcesses, wait_until_quiet
from harness import common_options, machine, positive, save
from turns import Worker, warn_if_busy

from fastlm.evals.task import MultipleChoice, Task

CHOICES = (
    "arc_easy", "arc_challenge", "hellaswag", "piqa", "sciq", "openbookqa", "boolq", "winogrande"
)  # fmt: skip
OPEN = ("lambada",)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCHES = ("1", "8", "16", "32", "auto")
# The harness' sampler draws other examples for each question: prompts share no prefix
RANDOM_SHOTS = "drawn"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
Answer = dict[str, Any]


# the questions of both sides


def read_task(name: str, shots: int, limit: int) -> Task:
    from fastlm.evals.registry import load_task
    from fastlm.sources.packages import default_cache

    format = "" if name in OPEN else f":rc_{shots}shot"
    task = load_task(name + format, default_cache())
    return replace(task, questions=list(task.questions[:limit]))


def harness_rows(task: Task) -> list[dict[str, Any]]:
    """Return the questions as rows for the harness' tasks. It puts the space before an answer."""
    rows = []
    for q in task.questions:
        if not isinstance(q, MultipleChoice):
            rows.append({"context": q.prompt, "answer": q.gold})
            continue
        contexts, answers = zip(*q.requests)
        assert all(answer.startswith(" ") for answer in answers)
        rows.append(
            {
                "context": contexts[0],
                "contexts": list(contexts),
                "choices": [answer[1:] for answer in answers],
                "answer": answers[0][1:],
                "gold": q.gold,
            }
        )
    return rows


def write_task(
    folder: Path, name: str, task: Task, example_rows: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the questions and the harness' task for them as files.

    example_rows: rows from which the harness takes five examples for each question.
    """
    rows = harness_rows(task)
    files = {"test": rows} | ({"train": list(example_rows)} if example_rows else {})
    for split, data in files.items():
        text = "".join(json.dumps(row) + "\n" for row in data)
        (folder / f"{name}-{split}.jsonl").write_text(text, encoding="utf-8")
    task_config: dict[str, Any] = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{name}-{split}.jsonl") for split in files}
        },
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "num_fewshot": 5 if example_rows else 0,
        "metadata": {"version": 1},
    }
    if example_rows:
        task_config |= {"fewshot_split": "train", "training_split": "train"}
    if "choices" not in rows[0]:
        task_config |= {
            "output_type": "loglikelihood", "doc_to_target": "{{answer}}", "target_delimiter": "",
            "metric_list": [_mean("acc")],
        }  # fmt: skip
    else:
        metrics = [_mean("acc")]
        if len(set(rows[0]["contexts"])) == 1:
            task_config |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
            metrics.append(_mean("acc_norm"))
        else:  # partial evaluation: the same continuation after each answer
            task_config |= {
                "doc_to_text": "gold", "doc_to_choice": "contexts", "doc_to_target": "answer"
            }  # fmt: skip
        task_config |= {"output_type": "multiple_choice", "metric_list": metrics}
    # JSON is YAML. No metric is bootstrapped: a worker cannot start processes
    (folder / f"{name}.yaml").write_text(json.dumps(task_config, indent=1), encoding="utf-8")


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def write_model(folder: Path, dtype: torch.dtype) -> Path:
    """Write SmolLM2 with its 4-bit weights as floats, as transformers reads it."""
    from fastlm.model.load import load_model

    model, tokenizer = load_model("model:smollm2", keep_quantized=False, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


# the sides


def harness_side(
    kind: str, model: str, dtype: str, tasks: str, split: bool = False
) -> Callable[..., Answer]:
    """Return a function for the worker: (task, batch size) -> scores, log-likelihoods, seconds."""
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

    import fastlm.evals.harness  # noqa: F401 registers itself

    extra = {"split_float32": True} if split else {}
    lm = get_model(kind)(pretrained=model, dtype=dtype, device="cpu", **extra)
    loglikelihood = lm.loglikelihood
    elapsed = [0.0, 0.0]

    def timed(requests, **options):
        began = time.perf_counter(), time.process_time()
        results = loglikelihood(requests, disable_tqdm=True)
        elapsed[:] = time.perf_counter() - began[0], time.process_time() - began[1]
        return results

    lm.loglikelihood = timed
    manager = TaskManager(include_path=tasks, include_defaults=False)

    def run(task: str, batch: str) -> Answer:
        if kind == "hf":
            lm.batch_size_per_gpu = batch if batch == "auto" else int(batch)
        result = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=manager, log_samples=True, bootstrap_iters=100
        )
        assert result is not None
        responses = [pair for s in result["samples"][task] for (pair,) in s["resps"]]
        return {
            "scores": {k: v for k, v in result["results"][task].items() if "," in k},
            "logprobs": [float(pair[0]) for pair in responses],
            "greedy": [bool(pair[1]) for pair in responses],
            "seconds": elapsed[0],
            "processor": elapsed[1],
        }

    return run


def fastlm_eval_side(model: str, dtype: str, limit: int, split: bool) -> Callable[..., Answer]:
    """Return `fastlm eval` without reading model and questions: (set, examples) -> the same."""
    from fastlm.evals.results import RecordFile
    from fastlm.evals.runner import run_questions
    from fastlm.evals.scorer import Scorer
    from fastlm.evals.task_metrics import question_metrics, summarize_metrics
    from fastlm.model.load import load_model

    scorer = Scorer(*load_model(model, dtype=DTYPES[dtype]), split_float32=split)

    def run(name: str, shots: int) -> Answer:
        task = read_task(name, shots, limit)
        bare = [
            replace(q, unconditional=()) for q in task.questions
        ]  # the harness does not ask these
        task = replace(task, questions=bare, normalisation="none")
        with tempfile.TemporaryDirectory() as folder, RecordFile(f"{folder}/x", {}) as results:
            began = time.perf_counter(), time.process_time()
            records = run_questions(task, scorer, results)
            elapsed = time.perf_counter() - began[0], time.process_time() - began[1]
        metrics = summarize_metrics(task, question_metrics(task, records))
        return {
            "scores": {k: [m["value"], m["error"]] for k, m in metrics.items()},
            "logprobs": [p for r in records for p in r["logprob"]],
            "seconds": elapsed[0],
            "processor": elapsed[1],
        }

    return run


# the comparison


def compare_answers(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    pairs = list(zip(left["logprobs"], right["logprobs"], strict=True))
    differences: dict[str, Any] = {"largest_difference": max(abs(a - b) for a, b in pairs)}
    if "greedy" in left and "greedy" in right:
        differences["greedy_differs"] = sum(a != b for a, b in zip(left["greedy"], right["greedy"]))
    return differences


def best_batch(
    worker: Worker, task: str, batches: Sequence[str]
) -> tuple[str, dict[str, list[float]]]:
    """Return the batch size of the least processor time, and all seconds, processor seconds."""
    times: dict[str, list[float]] = {}
    if len(batches) == 1:
        return batches[0], times
    for batch in batches:
        answer = worker(task, batch)
        times[batch] = [answer["seconds"], answer["processor"]]
        times_text = " and ".join(f"{seconds:.1f} s" for seconds in times[batch])
        print(f"  hf, {task}, batch size {batch}: {times_text} of the processor", flush=True)
    return min(times, key=lambda b: times[b][1]), times


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| set | examples | dtype | n | score | hf | fastlm | largest difference"
        " | hf s | fastlm s | faster | processor | fastlm eval |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        hf, harness, fastlm_eval = row["hf"], row["fastlm"], row.get("fastlm eval")
        score = "acc_norm,none" if "acc_norm,none" in hf["scores"] else "acc,none"
        values = [f"{side['scores'][score]:.4f}" for side in (hf, harness)]
        cells = [
            row["task"], row["examples"], row["dtype"], row["questions"], score.split(",")[0],
            *values, f"{row['harness']['largest_difference']:.1e}",
            f"{hf['seconds']:.1f}", f"{harness['seconds']:.1f}",
            f"{hf['seconds'] / harness['seconds']:.1f}x",
            f"{hf['processor'] / harness['processor']:.1f}x",
            f"{hf['seconds'] / fastlm_eval['seconds']:.1f}x" if fastlm_eval else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    names = (*CHOICES, *OPEN)
    parser.add_argument("--tasks", nargs="+", choices=names, default=list(names))
    parser.add_argument(
        "--shots", nargs="+", choices=("0", "5", RANDOM_SHOTS), default=["0", "5", RANDOM_SHOTS],
        help="Examples: none, the same five, or five drawn for each question by the harness.",
    )  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--limit", type=positive, default=100, help="Ask at most this number of questions of a set."
    )
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--split", action="store_true", help="Use split_float32 in fastlm (AMX).")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    common_options(parser)
    options = parser.parse_args()
    wait_until_quiet(options.busy)
    os.environ |= dict.fromkeys(OFFLINE, "1")
    packages = ("lm_eval", "transformers", "torch", "datasets")
    context = {
        "machine": machine(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "threads": options.threads,
        "command": " ".join(["python", "bench/peers/eval.py", *sys.argv[1:]]),
    }

    def keep(rows: Sequence[Any], batches: Mapping[str, Any]) -> None:
        save(options.json, {"eval": rows, "batch_seconds": batches, **context})

    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        rows = run(options, Path(folder), keep)
    print(machine())
    print(table(rows))


def run(options: argparse.Namespace, folder: Path, keep: Callable) -> list[dict[str, Any]]:
    """Measure all rows. ``keep`` gets the finished ones after each row."""
    tasks, counts = [], {}  # (set, examples, the harness' name)
    for shots in options.shots:
        for name in options.tasks:
            if (name in OPEN and shots != "0") or (name == "winogrande" and shots == RANDOM_SHOTS):
                continue
            task = read_task(name, 5 if shots == "5" else 0, options.limit)
            example_rows: list[dict[str, Any]] = []
            if shots == RANDOM_SHOTS:  # the examples are other questions
                rest = read_task(name, 0, options.limit + 200).questions[options.limit :]
                example_rows = harness_rows(replace(task, questions=rest))
            tasks.append((name, shots, f"{name}_{shots}"))
            counts[tasks[-1][2]] = len(task.questions)
            write_task(folder, tasks[-1][2], task, example_rows)
    rows, batch_times = [], {}
    for dtype in options.dtypes:
        model = str(write_model(folder / dtype, DTYPES[dtype]))
        sides = {
            "hf": Worker("hf", harness_side, ("hf", model, dtype, str(folder)), options.threads),
            "fastlm": Worker(
                "fastlm",
                harness_side,
                ("fastlm", model, dtype, str(folder), options.split),
                options.threads,
            ),
            "fastlm eval": Worker(
                "fastlm eval",
                fastlm_eval_side,
                (model, dtype, options.limit, options.split),
                options.threads,
            ),
        }
        for side, worker in sides.items():  # warm up
            worker(*(("arc_easy", 0) if side == "fastlm eval" else (tasks[0][2], "1")))
        others = OtherProcesses([w.process.pid for w in sides.values()])
        for name, shots, task in tasks:
            batch, batch_times[f"{dtype}, {task}"] = best_batch(sides["hf"], task, options.batch)
            answers = {"hf": sides["hf"](task, batch), "fastlm": sides["fastlm"](task, "1")}
            row: dict[str, Any] = {"task": name, "examples": shots, "dtype": dtype}
            row |= {"batch": batch, "harness": compare_answers(answers["hf"], answers["fastlm"])}
            if shots != RANDOM_SHOTS and name not in OPEN:
                answers["fastlm eval"] = sides["fastlm eval"](name, int(shots))
                row["fastlm_eval_difference"] = compare_answers(
                    answers["fastlm"], answers["fastlm eval"]
                )
            row |= {"questions": counts[task], "requests": len(answers["hf"]["logprobs"])}
            for side, answer in answers.items():
                row[side] = {k: v for k, v in answer.items() if k not in ("logprobs", "greedy")}
            rows.append(row)
            keep(rows, batch_times)
            print(table([row]).splitlines()[-1], flush=True)
        warn_if_busy(others)
        for worker in sides.values():
            worker.stop()
    return rows


if __name__ == "__main__":
    main()
