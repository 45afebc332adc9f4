"""Compare fastlm's recipe with a plain trainer of the same size: three minutes of Shakespeare on a
CPU.

nanoGPT's README trains a character model with 4 layers, 4 heads and 128 features, in batches of 12
x 64, for about three minutes on a laptop. `CharGPT` has that size, in plain PyTorch under
torch.compile. Both train on the same text and are evaluated on the same held-out plays, in bits per
byte (each token predicted once, with half a window of context). The peer's clock stops during
compilation and evaluation; fastlm's does not.

    python bench/train/shakespeare.py --out runs/shakespeare-bench            both, 180 s each
    python bench/train/shakespeare.py --out runs/shakespeare-bench --seconds 20
"""

import argparse
import json
import math
import time
from pathlib import Path

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import ROOT, machine, save
from torch import Tensor, nn

from fastlm.data.corpus import SPLITS, read_documents
from fastlm.progress import bars
from fastlm.sources.packages import default_cache
from fastlm.stages import run_recipe
from fastlm.train.options import TrainOptions

# nanoGPT's README, "I only have a macbook"
LAYERS, HEADS, WIDTH, BLOCK, BATCH, LR = 4, 4, 128, 64, 12, 1e-3
EVALUATIONS = 12
# A point of the curve evaluates every eighth window of the held-out text, the last point all.
CURVE_SHARE = 8


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, w = x.shape
        heads = self.qkv(self.norm1(x)).view(b, s, 3, HEADS, w // HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, s, w))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """A character model that returns the sum of -log p over the labels that are not -100."""

    def __init__(self, vocab: int):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * LAYERS) if residual else 1))

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids) + self.position.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def evaluate(
    model: nn.Module, data: Tensor, bytes_per_character: float, interval: int = 1
) -> float:
    """Return the bits per byte of `data`, or of every `interval`-th of its windows."""
    stride, nats, scored = BLOCK // 2, 0.0, 0
    begins = list(range(0, len(data) - 1, stride))[::interval]
    with torch.no_grad():
        for start in range(0, len(begins), 256):
            rows = torch.full((len(begins[start : start + 256]), 2, BLOCK), -100)
            rows[:, 0] = 0
            for row, begin in zip(rows, begins[start : start + 256]):
                window = data[begin : begin + BLOCK + 1]
                row[0, : len(window) - 1], row[1, : len(window) - 1] = window[:-1], window[1:]
                if begin:
                    row[1, : BLOCK - stride] = -100  # scored in the previous window
            ids, labels = rows.unbind(1)
            nats += float(model(ids, labels))
            scored += int((labels != -100).sum())
    return nats / math.log(2) / (scored * bytes_per_character)


def train_plain(data: Path, seconds: float) -> list[tuple[float, float]]:
    """Train the plain model. Return [(seconds of training, held-out bits per byte)]; the last entry
    is for the full held-out text.
    """
    train, heldout = ("".join(d.text for d in read_documents(data, split)) for split in SPLITS)
    code = {c: i for i, c in enumerate(sorted(set(train + heldout)))}
    train_ids, held_ids = (torch.tensor([code[c] for c in text]) for text in (train, heldout))
    bytes_per_character = len(heldout.encode()) / len(heldout)
    torch.manual_seed(1337)
    plain = CharGPT(len(code))
    model = torch.compile(plain)
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )

    def step(lr: float) -> None:
        begin = torch.randint(len(train_ids) - BLOCK - 1, (BATCH,))
        window = train_ids[begin[:, None] + torch.arange(BLOCK + 1)]
        loss = model(window[:, :-1], window[:, 1:]) / (BATCH * BLOCK)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step(0.0)  # compiles, not timed
    curve = [(0.0, evaluate(plain, held_ids, bytes_per_character, CURVE_SHARE))]
    schedule = TrainOptions(lr=LR, warmup_ratio=0.05, final_lr=0.1)
    used, steps = 0.0, 0
    for target in bars(range(1, EVALUATIONS + 1), "plain torch.compile"):
        while used < seconds * target / EVALUATIONS:
            start = time.perf_counter()
            step(schedule.learning_rate(used / seconds))
            used, steps = used + time.perf_counter() - start, steps + 1
        if target < EVALUATIONS:
            curve.append((used, evaluate(plain, held_ids, bytes_per_character, CURVE_SHARE)))
    curve.append((used, evaluate(plain, held_ids, bytes_per_character)))
    print(f"plain: {steps} steps, {steps * BATCH * BLOCK / used:,.0f} characters/s")
    return curve


def train_fastlm(out: Path, seconds: float) -> list[tuple[float, float]]:
    recipe = ROOT / "recipes" / "shakespeare.toml"
    overrides = [f"pretrain.max_seconds={seconds}"]
    summary = run_recipe(recipe, out, overrides=overrides, cache=default_cache(), track=bars)
    lines = [
        json.loads(s) for s in (out / "pretrain/metrics.jsonl").read_text("utf-8").splitlines()
    ]
    scores = summary["stages"]["eval"]["models"]["pretrain"]
    seconds_at = {0: 0.0} | {m["step"]: m["seconds"] for m in lines if "loss" in m}
    curve = [(seconds_at[m["step"]], m["bits_per_byte"]) for m in lines if "bits_per_byte" in m]
    curve[-1] = (curve[-1][0], scores["bits_per_byte"])
    result = summary["stages"]["pretrain"]
    print(f"fastlm: {result['steps']} steps, {result['tokens_per_second']:,.0f} tokens/s")
    return curve


def plot(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for (name, curve), color in zip(curves.items(), ("#2f6fde", "#8a97a6")):
        axes.plot(*zip(*curve), "o-", color=color, markersize=4, linewidth=2)
        axes.annotate(
            f"{name}: {curve[-1][1]:.3f}", curve[-1], (8, -4), textcoords="offset points",
            color=color, weight="bold",
        )  # fmt: skip
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("held-out bits per byte")
    # an untrained model is at 5 or more: cut the axis to where the curves differ
    axes.set_ylim(top=min(5.0, 2.0 * min(c[-1][1] for c in curves.values())))
    axes.set_xlim(right=1.35 * max(c[-1][0] for c in curves.values()))  # room for the names
    axes.grid(axis="y", color="#dfe4ea")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("runs/shakespeare-bench"))
    parser.add_argument(
        "--seconds", type=float, default=180.0, help="seconds of training, for each"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    curves = {"fastlm": train_fastlm(options.out / "run", options.seconds)}
    curves["plain torch.compile"] = train_plain(options.out / "run" / "data", options.seconds)
    plot(curves, options.out / "shakespeare.png")
    final = {name: curve[-1][1] for name, curve in curves.items()}
    print(options.out / "shakespeare.png")
    results = {"shakespeare": final, "seconds": options.seconds, "curves": curves}
    save(options.json, results | {"machine": machine()})


if __name__ == "__main__":
    main()
