"""A recipe that goes through every stage in seconds, and the text for it."""

import random
from pathlib import Path

RECIPE = """\
name = "tiny"
seed = 3

[[stage]]
kind = "data"
sources = ["{docs}"]
heldout_bytes = 6000
rules = ["none"]

[[stage]]
kind = "tokenizer"
vocab_size = 300

[[stage]]
kind = "shards"

[[stage]]
kind = "pretrain"
max_steps = 12
batch_size = 4
seq_len = 32
lr = 1e-2
validations = 3
val_tokens = 512
sample_at = [0.0, 1.0]
sample_tokens = 8
save_steps = 3

[stage.model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2

[[stage]]
kind = "eval"
stride = 16

[[stage]]
kind = "quantize"
method = "rtn"
group_size = 16
"""
NOUNS = "tree river stone <b>bird</b> cloud road house & garden letter winter".split()
VERBS = "sees finds follows leaves remembers crosses paints".split()


def write(folder: Path, more: str = "") -> Path:
    """Write documents and a recipe for them, with ``more`` stages. Return the recipe's path."""
    docs = folder / "docs"
    docs.mkdir(parents=True)
    draw = random.Random(0)
    for i in range(24):
        lines = [
            f"The {draw.choice(NOUNS)} {draw.choice(VERBS)} the {draw.choice(NOUNS)} "
            f"in year {draw.randrange(9999)}."
            for _ in range(40)
        ]
        (docs / f"{i:02d}.txt").write_text("\n".join(lines))
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(docs=docs) + more)
    return path
