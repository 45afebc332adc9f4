"""Check that GRPO teaches a model to call a tool where it cannot compute: products of two numbers
of three digits, the calculator. The model has 0.2 million weights, or is one that exists, trained
with LoRA.

    python bench/train/tool_use.py -o runs/tool-use
    python bench/train/tool_use.py --model model:smollm2 -o runs/tool-use-smollm2

The model first learns both ways to answer from conversations (sft): most give the product at once,
some call the calculator. It learns to copy numbers into calls, but not to multiply. Then GRPO
rewards right answers. Printed, on the same new questions, greedily and at temperature 1: the share
of right answers, of completions with a call, and of right answers among those without one. An
interrupted command resumes.
"""

import argparse
import json
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import torch
from harness import machine, save

from fastlm.checkpoint.config import ModelConfig
from fastlm.data.prompts import parse_prompt
from fastlm.data.verifiers import number
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.environments import Calculator
from fastlm.train.episodes import EpisodeSampler
from fastlm.train.online_stage import GRPO
from fastlm.train.sft import SFT

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CALL = '<tool_call>{{"name": "calculator", "arguments": {{"expression": "{}"}}}}</tool_call>'
CALLS = 0.2  # the share of conversations with a call
SIZES: dict[str, dict[str, Any]] = {  # options of sft and grpo
    "small": {
        "sft": {"max_steps": 700, "batch_size": 64, "lr": 3e-3, "dtype": "float32"},
        "grpo": {
            "max_steps": 25, "lr": 3e-4, "dtype": "float32", "batch_size": 64,
            "gradient_accumulation_steps": 2, "max_new_tokens": 64,
        },
    },
    "lora": {
        "sft": {
            "max_steps": 80, "batch_size": 8, "gradient_accumulation_steps": 2, "lr": 5e-4,
            "lora_rank": 16,
        },
        "grpo": {
            "max_steps": 10, "lr": 2e-4, "batch_size": 16, "gradient_accumulation_steps": 8,
            "max_new_tokens": 96, "lora_rank": 16, "temperature": 0.7,
        },
    },
}  # fmt: skip


def make_base(folder: Path) -> None:
    """Save an untrained model whose tokens are single digits, and pieces of calls."""
    text = f"<|im_start|>\nuser\nassistant\ntool\ncalculator\n{CALL.format('*')}\n*="
    tokenizer = Tokenizer.train([text * 9], 400)
    tokenizer.chat_template = TEMPLATE
    config = {
        "model_type": "llama", "vocab_size": tokenizer.vocab_size, "hidden_size": 96,
        "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.eos_id,
    }  # fmt: skip
    CausalLM(ModelConfig.from_dict(config), seed=1).save_pretrained(folder)
    tokenizer.save(folder)


def questions(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    pairs = [(rng.randint(100, 999), rng.randint(100, 999)) for _ in range(count)]
    return [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in pairs]


def conversation(row: dict[str, str], has_call: bool, sampler: EpisodeSampler) -> dict[str, Any]:
    """Return a conversation that answers a question."""
    messages, tools = sampler.prompt(parse_prompt(row))
    answer = {"role": "assistant", "content": row["answer"]}
    turns: list[Any] = [answer]
    if has_call:
        call = CALL.format(row["prompt"].rstrip("="))
        turns = [
            {"role": "assistant", "content": call},
            {"role": "tool", "content": row["answer"]}, answer,
        ]  # fmt: skip
    return {"messages": [*messages, *turns], **({"tools": tools} if tools else {})}


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def train_sft_model(
    out: Path, calls: float, options: dict[str, Any], model: str | None = None
) -> None:
    """Train `out`/sft/model on conversations, of which the share ``calls`` has a call."""
    out.mkdir(parents=True, exist_ok=True)
    base = model or out / "base"
    if not model and not (base / "config.json").exists():
        make_base(base)
    sampler = EpisodeSampler(Calculator, "", Tokenizer.load(base))
    rng = random.Random(0)
    rows = questions(6000, seed=0)
    conversations = [conversation(r, rng.random() < calls, sampler) for r in rows]
    sft_data = write(out / "sft.jsonl", conversations)
    sft = SFT(
        data=(sft_data,), weight_decay=0.0, heldout=0.01, validations=4, sample_at=(),
        save_steps=200, **options,
    )  # fmt: skip
    sft(out / "sft", model=base)


def write_questions(out: Path) -> str:
    """Write the questions of GRPO. Return the path."""
    return write(out / "questions.jsonl", questions(2000, seed=5))


def measure(
    folder: Path, count: int, temperature: float, options: dict[str, Any]
) -> dict[str, float]:
    """Return the share of right answers and of calls on held-out questions."""
    dtype = getattr(torch, options.get("dtype", "bfloat16"))
    model = CausalLM.from_pretrained(folder, dtype=dtype).eval()
    tokenizer = load_tokenizer(folder, model.config.to_dict())
    sampler = EpisodeSampler(Calculator, "", tokenizer)
    rows = questions(count, seed=99)
    prompts = [parse_prompt(row) for row in rows]
    ids = []
    for prompt in prompts:
        messages, tools = sampler.prompt(prompt)
        ids.append(tokenizer.encode_chat(messages, tools=tools))
    episodes = sampler.sample(
        model, ids, prompts, max_turns=3, max_new_tokens=options["max_new_tokens"],
        temperature=temperature, stop_ids=tokenizer.stop_ids,
    )  # fmt: skip
    right = [number(episode.text, row) for episode, row in zip(episodes, rows)]
    calls = [bool(episode.observation_indices) for episode in episodes]
    direct = [score for score, call in zip(right, calls) if not call]
    return {
        "right": statistics.mean(right), "calls": statistics.mean(calls),
        "right_without_call": statistics.mean(direct) if direct else float("nan"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/tool-use"))
    parser.add_argument("--model", help="train this one with LoRA, such as model:smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    sizes = SIZES["lora" if a.model else "small"]
    train_sft_model(a.out, CALLS, sizes["sft"], a.model)
    data = write_questions(a.out)
    results: list[dict[str, Any]] = []
    for temperature in (0.0, sizes["grpo"].get("temperature", 1.0)):
        before = measure(a.out / "sft/model", a.questions, temperature, sizes["grpo"])
        results.append({"model": "sft", "temperature": temperature, **before})
        print(results[-1], flush=True)
    for seed in a.seeds:
        grpo = GRPO(
            data=(data,), environment="calculator", max_turns=3, reward_function="number",
            seed=seed, prompts_per_round=16, num_generations=8, heldout=0.02, val_prompts=32,
            validations=4, sample_at=(), save_steps=20, **sizes["grpo"],
        )  # fmt: skip
        folder = a.out / f"grpo/seed={seed}"
        grpo(folder, model=a.out / "sft/model")
        for temperature in (0.0, sizes["grpo"].get("temperature", 1.0)):
            after = measure(folder / "model", a.questions, temperature, sizes["grpo"])
            results.append({"model": "grpo", "seed": seed, "temperature": temperature, **after})
            print(results[-1], flush=True)
    save(a.json, {"machine": machine(), "results": results})


if __name__ == "__main__":
    main()
