"""Compare fine-tuning and preference training with transformers, PEFT and TRL.

Measured are seconds per step and peak memory of SFT and DPO, of all weights and of adapters (LoRA).

Both sides train SmolLM2-135M-Instruct on the same token ids, in the same micro-batches, with AdamW
at the same constant rate; in float32 their losses are equal step by step (adapters: in the first
step, as they begin with other random numbers). fastlm is a stage's objective and the loop, TRL is
SFTTrainer and DPOTrainer at their best here: no activation checkpointing (their default is slower,
`--variants` has it), fused AdamW, reference log-probabilities computed before training. Answers are
the first 20 to 108 words of the standard library's docstrings.

Each training is a process. The sides take turns; the first step of a training is left out. While
other processes run, compare processor seconds with `--threads 1`: several threads wait for each
other, and their waiting counts. "MiB" is the largest resident memory of the process, "of imports"
that of the imports alone.

    python bench/peers/finetune.py                       all tasks in float32, three turns
    python bench/peers/finetune.py --tasks sft dpo-lora --dtypes bfloat16 --turns 1
    python bench/peers/finetune.py --busy --threads 1    on a machine that others use
"""

import argparse
import contextlib
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401

# More imports here would count as memory of both sides

TASKS = ("sft", "sft-lora", "dpo", "dpo-lora")
DTYPES = ("float32", "bfloat16")
SIDES = ("fastlm", "TRL")
VARIANTS = (*SIDES, "fastlm checkpointed", "TRL checkpointed")
WARM_UP = 1
BATCH = {"sft": 4, "dpo": 2}  # conversations; pairs
RATE, RANK, BETA = 1e-5, 16, 0.1
WORDS = range(20, 109, 11)  # of an answer
MODULES = "argparse ast collections difflib functools inspect json logging random re statistics"


def peak() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return int(line.split()[1]) / 1024


def preference_rows(folder: Path, count: int) -> list[dict[str, list[int]]]:
    """Return preference pairs as token ids: a question, its docstring, and another docstring."""
    import importlib

    from fastlm.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder)
    questions: list[tuple[str, str]] = []
    for name in MODULES.split():
        module = importlib.import_module(name)
        for key in sorted(vars(module)):
            text = inspect.getdoc(getattr(module, key))
            if text and getattr(getattr(module, key), "__module__", "") == name:
                words = text.split()
                if len(words) >= WORDS[0]:
                    length = WORDS[5 * len(questions) % len(WORDS)]
                    questions.append((f"What is {name}.{key}?", " ".join(words[:length])))
    assert len(questions) >= count, len(questions)
    rows = []
    for i, (question, answer) in enumerate(questions[:count]):
        row = {}
        for side, text in (
            ("chosen", answer),
            ("rejected", questions[(i + 7) % len(questions)][1]),
        ):
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": text},
            ]
            ((ids, mask),) = tokenizer.encode_conversation(messages)
            start, end = mask.index(True), len(mask) - mask[::-1].index(True)
            row |= {"prompt": ids[:start], side: ids[start:end]}
        rows.append(row)
    return rows


# ---- the sides


class TrainingMetrics:
    """The measurements of a training: wall and processor seconds and the loss of each step."""

    def __init__(self, imports: float, reference: float = 0.0):
        self.imports, self.reference, self.peak = imports, reference, 0.0
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.losses: list[float] = []

    def begin(self) -> None:
        self.began = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self.began[0])
        self.processor.append(time.process_time() - self.began[1])
        self.peak = peak()


def fastlm_side(job: dict[str, Any], folder: Path, rows: list[dict]) -> dict[str, Any]:
    import numpy as np
    import torch

    from fastlm.train.dpo_objective import DPOObjective
    from fastlm.train.loop import train
    from fastlm.train.lora_options import LoraOptions
    from fastlm.train.objective import Example
    from fastlm.train.options import TrainOptions
    from fastlm.train.preference_stage import DPOOptions, PreferenceExample
    from fastlm.train.sft import SFTObjective

    imports = peak()
    method, _, lora = job["task"].partition("-")
    model = LoraOptions(lora_rank=RANK if lora else 0).load_trained(
        folder, dtype=job["dtype"], seed=0
    )
    options = TrainOptions(
        max_steps=job["steps"], lr=RATE, final_lr=1.0, warmup_ratio=0.0, weight_decay=0.0,
        betas=(0.9, 0.999), dtype=job["dtype"], validations=0, sample_at=(),
        checkpoint_activations=len(model.model.layers) if job["checkpointed"] else 0,
        save_steps=10**6, spike_factor=None,
    )  # fmt: skip

    def example(row: dict, side: str) -> Example:
        ids = np.array(row["prompt"] + row[side], np.int32)
        return Example(ids, np.arange(len(ids)) >= len(row["prompt"]))

    common: dict[str, Any] = {
        "batch_size": BATCH[method], "seed": 0, "base": "", "tokenizer": None, "prompt": (),
    }  # fmt: skip
    began = time.process_time()
    if method == "sft":
        objective = SFTObjective(model, [example(r, "chosen") for r in rows], [], options, **common)
    else:
        preferences = [
            PreferenceExample((example(r, "chosen"), example(r, "rejected"))) for r in rows
        ]
        objective = DPOObjective(model, preferences, [], options, DPOOptions(beta=BETA), **common)
        objective.measure_reference(getattr(torch, job["dtype"]))
    reference = time.process_time() - began
    metrics = TrainingMetrics(imports, reference)
    metrics.begin()

    def on_event(line: dict) -> None:
        if "loss" in line:
            metrics.end()
            metrics.losses.append(line["loss"])
            metrics.begin()

    with tempfile.TemporaryDirectory() as out:
        train(objective, options, Path(out), on_event=on_event)
    return vars(metrics)


def trl_side(job: dict[str, Any], folder: Path, rows: list[dict]) -> dict[str, Any]:
    import datasets
    import numpy as np
    import peft
    import torch
    import transformers
    import trl

    transformers.utils.logging.disable_progress_bar()
    method, _, lora = job["task"].partition("-")
    kind, configuration = {
        "sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)
    }[method]  # fmt: skip
    metrics = TrainingMetrics(peak())
    low = job["dtype"] == "bfloat16"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if low and lora else torch.float32
    )
    rng = np.random.Generator(np.random.PCG64([0, 0]))  # the order of fastlm's first epoch
    rows = [rows[i] for i in rng.permutation(len(rows))]
    if method == "sft":
        rows = [
            {"input_ids": r["prompt"] + r["chosen"],
             "labels": [-100] * len(r["prompt"]) + r["chosen"]}
            for r in rows
        ]  # fmt: skip
    else:
        rows = [{f"{name}_ids": ids for name, ids in r.items()} for r in rows]
    method_options = {"sft": {}, "dpo": {"beta": BETA, "precompute_ref_log_probs": True}}[method]

    class MetricsCallback(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            metrics.begin()

        def on_step_end(self, args, state, control, **rest):
            metrics.end()

        def on_log(self, args, state, control, logs=None, **rest):
            if "loss" in (logs or {}):
                metrics.losses.append(logs["loss"])

    class PretokenizedTrainer(kind):
        """A trainer on token ids, which `DPOTrainer` would make from text."""

        def _prepare_dataset(self, dataset, *rest):
            return dataset if method == "dpo" else super()._prepare_dataset(dataset, *rest)

        def _precompute_ref_logps(self, *rest):
            began = time.process_time()
            result = super()._precompute_ref_logps(*rest)
            metrics.reference += time.process_time() - began
            return result

    with tempfile.TemporaryDirectory() as out:
        arguments = configuration(
            out, per_device_train_batch_size=BATCH[method], max_steps=job["steps"],
            learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
            optim="adamw_torch_fused", use_cpu=True, bf16=low, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_steps=1, max_length=None, seed=0,
            train_sampling_strategy="sequential", gradient_checkpointing=job["checkpointed"],
            dataloader_pin_memory=False, **method_options,
        )  # fmt: skip
        trainer = PretokenizedTrainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=words, callbacks=[MetricsCallback()],
            peft_config=peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
            ) if lora else None,
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return vars(metrics)


def run_training(job: dict[str, Any]) -> None:
    """Run one training in this process and write what it measured."""
    rows = json.loads(Path(job["rows"]).read_text())
    side = fastlm_side if job["variant"].startswith("fastlm") else trl_side
    job["checkpointed"] = job["variant"].endswith("checkpointed")
    with contextlib.redirect_stdout(sys.stderr):
        metrics = side(job, Path(job["folder"]), rows)
    print(json.dumps(metrics))


def run_in_process(job: dict[str, Any], caches: str) -> dict[str, Any]:
    """Run one training in a new process."""
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    cold = tempfile.mkdtemp(dir=caches)  # TRL would reuse the reference of the previous turn
    threads = str(job["threads"])
    environment = {**os.environ, "HF_HOME": cold, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"bench: {job['variant']}, {job['task']}: {done.stderr[-3000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "load": os.getloadavg()[0]}


def table(rows: list[dict]) -> str:
    lines = [
        "| task | dtype | | s per step | fastlm is | processor s | fastlm is | reference s | MiB |"
        " fastlm uses | of imports | loss, first and last step |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        mine = next(
            (x for x in rows if x["variant"] == "fastlm" and x["task"] == r["task"]
             and x["dtype"] == r["dtype"]), None,
        )  # fmt: skip
        faster, cheaper = (
            f"{r[key] / mine[key]:.2f}x" if mine else "-" for key in ("seconds", "processor")
        )
        less = f"{mine['peak'] / r['peak']:.2f}x" if mine else "-"
        cells = (
            r["task"], r["dtype"], r["variant"], f"{r['seconds']:.2f}", faster,
            f"{r['processor']:.2f}", cheaper, f"{r['reference']:.1f}", f"{r['peak']:.0f}", less,
            f"{r['imports']:.0f}", f"{r['losses'][0]:.5f}, {r['losses'][-1]:.5f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        run_training(json.loads(sys.argv[2]))
        return
    import torch
    import transformers
    import trl
    from ceilings import wait_until_quiet
    from harness import common_options, machine, positive, save

    from fastlm.model.causal_lm import CausalLM
    from fastlm.pipeline.run_folder import locate_model
    from fastlm.tokenizer.load import load_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES[:1])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=SIDES)
    parser.add_argument("--turns", type=positive, default=3)
    parser.add_argument(
        "--steps", type=positive, default=3, help=f"Time this number of steps, after {WARM_UP}."
    )
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    common_options(parser)
    options = parser.parse_args()
    wait_until_quiet(options.busy)
    # the threads of the trainings, which are processes
    host = {**machine(), "threads": options.threads}
    host |= {"transformers": transformers.__version__, "trl": trl.__version__}
    print(host)
    steps = WARM_UP + options.steps
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = CausalLM.from_pretrained("model:smollm2", dtype=torch.float32, keep_quantized=False)
        model.save_pretrained(folder)
        load_tokenizer(locate_model(Path("model:smollm2")), model.config.to_dict()).save(folder)
        del model
        rows = Path(scratch) / "rows.json"
        data = preference_rows(folder, steps * max(BATCH.values()))
        rows.write_text(json.dumps(data))
        results = []
        for dtype in options.dtypes:
            for task in options.tasks:
                job = {"task": task, "dtype": dtype, "steps": steps, "folder": str(folder),
                         "threads": options.threads}  # fmt: skip
                runs: dict[str, list[dict]] = {variant: [] for variant in options.variants}
                count = steps * BATCH[task.partition("-")[0]]
                rows.write_text(json.dumps(data[:count]))
                for _ in range(options.turns):
                    for variant in options.variants:
                        variant_job = {**job, "variant": variant, "rows": str(rows)}
                        runs[variant].append(run_in_process(variant_job, scratch))
                for variant, turns in runs.items():
                    timed = {
                        key: [[*t[key][WARM_UP:]] for t in turns]
                        for key in ("seconds", "processor")
                    }
                    results.append({
                        "task": task, "dtype": dtype, "variant": variant, "timed": timed,
                        **{key: statistics.median(chain(*v)) for key, v in timed.items()},
                        "reference": statistics.median(t["reference"] for t in turns),
                        "peak": max(t["peak"] for t in turns),
                        "imports": max(t["imports"] for t in turns),
                        "losses": turns[0]["losses"], "load": [t["load"] for t in turns],
                    })  # fmt: skip
                print(table(results[-len(runs) :]), flush=True)
                save(options.json, {"finetune": vars(options), "machine": host, "rows": results})
    print(table(results))


if __name__ == "__main__":
    main()
