"""Run a training of half a second, and kill it. test_train.py starts such runs in separate
processes.

The model has dropout, so that a run which loses its random state does not reproduce the losses.
"""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastlm.data.shards import BatchSampler, TokenDataset, write_shards
from fastlm.train.loop import train
from fastlm.train.options import TrainOptions
from fastlm.train.pretrain import PretrainObjective

VOCAB, SEQ = 32, 16
OPTIONS = TrainOptions(
    max_steps=24, lr=3e-3, gradient_accumulation_steps=2, validations=4, val_tokens=128,
    sample_at=(0.0, 0.5, 1.0), sample_tokens=4, save_steps=5, save_total_limit=2,
)  # fmt: skip


class Letters:
    """A tokenizer with one token per letter. The tokens are learnable: each letter tends to follow
    its predecessor.
    """

    vocab_size, eos_id = VOCAB, 0

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 96 for c in text]

    def encode_batch(self, texts):
        return [self.encode(t) for t in texts]

    def vocabulary_id(self, size: int) -> str:
        return f"letters {size}"

    def decode(self, ids) -> str:
        return "".join(chr(i + 96) for i in ids)


class TinyLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, 24)
        self.mix = nn.Linear(24, 24)

    def forward(self, input_ids, *, shift_labels=None, num_items=None):
        x = F.dropout(self.model.embed_tokens(input_ids), 0.1, self.training)
        logits = torch.tanh(self.mix(x)) @ self.model.embed_tokens.weight.T
        if shift_labels is None:
            return SimpleNamespace(logits=logits)
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), shift_labels.flatten(), reduction="sum"
        )
        return SimpleNamespace(loss=loss / num_items)

    def generate(self, input_ids, *, max_new_tokens, seed, **_):
        g = torch.Generator().manual_seed(seed)
        for _ in range(max_new_tokens):
            p = self(input_ids).logits[:, -1].float().softmax(-1)
            input_ids = torch.cat([input_ids, torch.multinomial(p, 1, generator=g)], 1)
        return input_ids


def shards(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 40), ("heldout", 8)):
        docs = []
        for _ in range(count):
            steps = rng.choice([1, 1, 1, 2, 5], size=40).cumsum()
            docs.append("".join(chr(97 + s % 26) for s in steps))
        write_shards(docs, Letters(), folder / name)


def start(data: Path, run: Path, options: TrainOptions = OPTIONS, **kwargs):
    torch.manual_seed(1)
    model = TinyLM()
    sampler = BatchSampler(TokenDataset(data / "train"), 4, SEQ, seed=7)
    heldout = TokenDataset(data / "heldout")
    return train(
        PretrainObjective(model, sampler, heldout, options, Letters()), options, run, **kwargs
    )


def start_and_die(
    data: Path, run: Path, point: str, count: int, options: TrainOptions = OPTIONS
) -> None:
    """Start a run that kills itself. ``point``: "step" dies in the ``count``-th backward, "write"
    in the middle of the ``count``-th checkpoint's tensors, "rename" right after the rename of its
    folder, "metrics" in the middle of a line.
    """
    torch.set_num_threads(1)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += 1
        return calls == count

    if point == "step":
        backward = torch.Tensor.backward

        def dying_backward(self, *args, **kwargs):
            backward(self, *args, **kwargs)
            if due():
                die()

        torch.Tensor.backward = dying_backward
    elif point == "write":
        from fastlm.checkpoint import folder

        save_file = folder.save_file

        def dying_save(tensors, path, *args, **kwargs):
            save_file(tensors, path, *args, **kwargs)
            if due():
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        folder.save_file = dying_save
    elif point == "rename":
        rename = os.rename

        def dying_rename(source, target):
            rename(source, target)
            if due():
                die()

        os.rename = dying_rename
    elif point == "metrics":

        def on_event(event):
            if due():
                with open(run / "metrics.jsonl", "ab") as f:
                    f.write(b'{"step": 99, "lo')
                die()

        start(data, run, options, on_event=on_event)
    start(data, run, options)
