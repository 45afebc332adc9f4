"""Make a tiny model with a chat template, and preferences that it can learn in seconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.checkpoint.config import ModelConfig
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.objective import Example

WORDS = "tree river stone bird cloud road house garden letter winter lamp boat field song".split()


def config(vocab_size: int, eos_id: int | None = 0, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict({
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "eos_token_id": eos_id,
        "tie_word_embeddings": True, **changes,
    })  # fmt: skip


def make_base(folder: Path, **changes: Any) -> Path:
    """Save an untrained model. Its pad token is its end token, as SmolLM2-Instruct's is."""
    text = " ".join(["please now what is system user assistant\n", *WORDS])
    tokenizer = Tokenizer.train([text * 5], 320)
    changes = {"pad_token_id": tokenizer.eos_id, **changes}
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id, **changes), seed=1).save_pretrained(
        folder
    )
    tokenizer.save(folder)
    return folder


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def polite_pairs(count: int) -> list[dict[str, str]]:
    """Return pairs in which the polite answer is preferred, whatever the prompt."""
    rows = []
    for i in range(count):
        first, second = WORDS[i % len(WORDS)], WORDS[i // len(WORDS) % len(WORDS)]
        rows.append({
            "prompt": f"what is {first} {second} {i}", "chosen": f"{second} please {first}",
            "rejected": f"{second} now {first}",
        })  # fmt: skip
    return rows


def example(ids: list[int], learn_from: int, row_id: str = "") -> Example:
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= learn_from, row_id)


def make_student_and_teacher(folder: Path) -> tuple[Path, Path]:
    """Save a student, and a wider teacher with peaked distributions."""
    student = make_base(folder / "student")
    tokenizer = Tokenizer.load(student)
    wide = config(tokenizer.vocab_size, tokenizer.eos_id, hidden_size=48, initializer_range=0.2)
    CausalLM(wide, seed=9).save_pretrained(folder / "teacher")
    tokenizer.save(folder / "teacher")
    return student, folder / "teacher"


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "progress")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def weights_of(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()
