"""Compare GRPO with TRL: seconds per round, and what is learnt from the same number of tokens.

    python bench/peers/grpo.py --rounds 12 --seeds 1 2 3
    python bench/peers/grpo.py --rounds 3 --seeds 1 --dtypes bfloat16 float32      time only

Both sides train adapters of SmolLM2-135M-Instruct on sums of reasoning-gym (chain_sum, numbers of
one or two digits), with the same questions, reward (1 if the last number is right), loss (DAPO's,
without a KL), temperature, rate, AdamW and batch: 16 questions of 8 completions, one optimizer
step. fastlm is the stage `grpo`; TRL is GRPOTrainer with transformers' generation, since vLLM has
no part in it on this CPU. A round is sampling, scoring and the update. The held-out score is the
share of right greedy answers to 128 other questions, sampled by the same code from both sides'
merged weights.

Each training is a process; the sides take turns. The first round is not timed.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401

SIDES = ("fastlm", "TRL")
TASK = "reasoning-gym:chain_sum?size=2000&min_terms=2&max_terms=2&min_digits=1&max_digits=2"
PROMPTS, GROUP, NEW_TOKENS, HELDOUT = 16, 8, 16, 128
RATE, RANK, TEMPERATURE = 3e-4, 16, 0.7
MICRO = 32  # completions of a micro-batch


def fastlm_side(job: dict[str, Any], out: Path) -> dict[str, Any]:
    from fastlm.train.metrics import METRICS, read_metrics
    from fastlm.train.online_stage import GRPO

    stage = GRPO(
        data=(job["data"],), reward_function="number", seed=job["seed"], max_steps=job["rounds"],
        prompts_per_round=PROMPTS, num_generations=GROUP, batch_size=MICRO,
        gradient_accumulation_steps=PROMPTS * GROUP // MICRO, max_new_tokens=NEW_TOKENS,
        temperature=TEMPERATURE, lora_rank=RANK, lr=RATE, final_lr=1.0, warmup_ratio=0.0,
        weight_decay=0.0, betas=(0.9, 0.999), eps=1e-8, dtype=job["dtype"], heldout=0.0,
        validations=0, sample_at=(), save_steps=10**6,
    )  # fmt: skip
    stage(out, model=job["folder"])
    rows = [row for row in read_metrics(out / METRICS) if "score" in row]
    ends = [row["seconds"] for row in rows]
    return {
        "seconds": [end - begin for begin, end in zip([0.0, *ends], ends)],
        "scores": [row["score"] for row in rows], "lengths": [row["length"] for row in rows],
    }  # fmt: skip


def trl_side(job: dict[str, Any], out: Path) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    from fastlm.data.verifiers import number

    transformers.utils.logging.disable_progress_bar()
    words = transformers.AutoTokenizer.from_pretrained(job["folder"])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=getattr(torch, job["dtype"])
    )
    lines = Path(job["data"]).read_text().splitlines()
    rows = [{**row, "answer": str(row["answer"])} for row in map(json.loads, lines)]
    measured: dict[str, list[float]] = {"seconds": [], "scores": [], "lengths": []}

    def reward(completions: Any, answer: Any, **rest: Any) -> list[float]:
        return [number(c[0]["content"], {"answer": a}) for c, a in zip(completions, answer)]

    class MetricsCallback(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **rest):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **rest):
            measured["seconds"].append(time.perf_counter() - self.began)

        def on_log(self, args, state, control, logs=None, **rest):
            if "reward" in (logs or {}):
                measured["scores"].append(logs["reward"])
                measured["lengths"].append(logs["completions/mean_length"])

    arguments = trl.GRPOConfig(
        str(out / "trl"), per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=PROMPTS * GROUP // MICRO, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, temperature=TEMPERATURE, top_k=0, top_p=1.0, beta=0.0,
        loss_type="dapo", max_steps=job["rounds"], learning_rate=RATE, adam_epsilon=1e-8,
        adam_beta2=0.999, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0,
        optim="adamw_torch_fused", use_cpu=True, bf16=job["dtype"] == "bfloat16", report_to=[],
        disable_tqdm=True, save_strategy="no", logging_steps=1, seed=job["seed"],
        gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, reward, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words, callbacks=[MetricsCallback()],
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(out / "model")
    words.save_pretrained(out / "model")
    return measured


def heldout_score(model_folder: Path, data: Path) -> float:
    """Return the share of right greedy answers of a model."""
    import torch

    from fastlm.data.verifiers import number
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.load import load_tokenizer
    from fastlm.train.encoding import decode_text
    from fastlm.train.rollouts import sample_completions

    model = CausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer(model_folder, model.config.to_dict())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    completions = sample_completions(
        model, [tokenizer.encode_chat(row["prompt"]) for row in rows], max_new_tokens=NEW_TOKENS,
        temperature=0.0, stop_ids=tokenizer.stop_ids,
    )  # fmt: skip
    texts = [
        decode_text(tokenizer, c.token_ids[:-1] if c.is_stopped else c.token_ids)
        for c in completions
    ]
    return statistics.mean(number(text, row) for text, row in zip(texts, rows))


def run_training(job: dict[str, Any]) -> None:
    """Run one training in this process and write what it measured."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        out = Path(folder)
        side = fastlm_side if job["side"] == "fastlm" else trl_side
        measured = side(job, out)
        measured["heldout"] = heldout_score(out / "model", Path(job["heldout"]))
    print(json.dumps(measured))


def run_in_process(job: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"bench: {job['side']}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(before: float, rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table: a line per training, and TRL's time over that of fastlm."""
    lines = [
        "| seed | dtype | | s per round | fastlm is | sampled score, first and last round |"
        f" held-out (before: {before:.3f}) | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if (r["seed"], r["dtype"]) == (row["seed"], row["dtype"])]
        mine = next((r["median_seconds"] for r in same if r["side"] == "fastlm"), None)
        faster = f"{row['median_seconds'] / mine:.2f}x" if mine else "-"
        first, last = row["scores"][0], row["scores"][-1]
        cells = (
            f"{row['seed']}", row["dtype"], row["side"], f"{row['median_seconds']:.1f}", faster,
            f"{first:.3f}, {last:.3f}", f"{row['heldout']:.3f}", f"{row['tokens']:.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        run_training(json.loads(sys.argv[2]))
        return
    import torch
    from ceilings import wait_until_quiet
    from harness import common_options, machine, positive, save

    from fastlm.model.causal_lm import CausalLM
    from fastlm.sources.reasoning_gym import reasoning_gym_rows
    from fastlm.tokenizer.tokenizer import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"]
    )
    parser.add_argument("--rounds", type=positive, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    common_options(parser)
    a = parser.parse_args()
    wait_until_quiet(a.busy)
    host = machine()
    print(host)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = CausalLM.from_pretrained("model:smollm2", dtype=torch.float32, keep_quantized=False)
        model.save_pretrained(folder)
        Tokenizer.load("model:smollm2").save(folder)
        del model
        rows = [
            {"prompt": [{"role": "user", "content": row["question"]}], "answer": row["answer"]}
            for row in reasoning_gym_rows(TASK)
        ]
        training, heldout = Path(scratch) / "training.jsonl", Path(scratch) / "heldout.jsonl"
        heldout_questions = {row["prompt"][0]["content"] for row in rows[:HELDOUT]}
        rest = [row for row in rows if row["prompt"][0]["content"] not in heldout_questions]
        for path, part in ((training, rest), (heldout, rows[:HELDOUT])):
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
        before = heldout_score(folder, heldout)
        for seed in a.seeds:
            for dtype in a.dtypes:
                for side in a.sides:
                    job = {
                        "side": side, "dtype": dtype, "seed": seed, "rounds": a.rounds,
                        "folder": str(folder), "data": str(training), "heldout": str(heldout),
                    }  # fmt: skip
                    measured = run_in_process(job)
                    timed = measured["seconds"][1:] or measured["seconds"]
                    row = {
                        "side": side, "dtype": dtype, "seed": seed, **measured,
                        "median_seconds": statistics.median(timed),
                        "tokens": PROMPTS * GROUP * sum(measured["lengths"]),
                        "load": os.getloadavg()[0],
                    }  # fmt: skip
                    results.append(row)
                    print(table(before, results).splitlines()[-1], flush=True)
                    save(a.json, {"machine": host, "heldout_before": before, "rows": results})
    print(table(before, results))


if __name__ == "__main__":
    main()
