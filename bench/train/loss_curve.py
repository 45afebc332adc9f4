"""Plot the loss over 300 steps on real text: fastlm in bf16 against plain PyTorch in fp32.

All have the same initial state, data order and learning rate. There are two further curves: plain
PyTorch under bf16 autocast, which shows the effect of 16 bits without fastlm's kernels, and fastlm
with 8-bit optimizer states. The text is the sources of Python's standard library.

    python bench/train/loss_curve.py         docs/loss-curve.png, about 14 minutes on 2 cores
"""

import argparse
import math
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import bench_path  # noqa: F401
import torch
from harness import ROOT, machine, save
from plain import PlainLlama
from torch import Tensor
from train_step import SIZES

import fastlm
from fastlm.memory import keep_freed_memory

BATCH, LENGTH, LR, WARMUP = 2, 256, 3e-4, 30


def text_tokens(vocabulary: int, count: int) -> Tensor:
    """Return the standard library's sources as ids: one for each distinct word or mark; rare ones
    share one.
    """
    words: list[str] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        words += re.findall(r"\w+|[^\w\s]|\n", path.read_text("utf-8", errors="replace"))
        if len(words) > count:
            break
    tokens = {w: i + 1 for i, (w, _) in enumerate(Counter(words).most_common(vocabulary - 1))}
    return torch.tensor([tokens.get(w, 0) for w in words[:count]])


def learning_rate(step: int, steps: int) -> float:
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    return LR * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (steps - WARMUP))))


def copy_weights(plain: PlainLlama, model: fastlm.CausalLM) -> None:
    """Copy the plain model's parameters to fastlm's module names."""
    decoder = model.model
    state = {
        "model.embed_tokens.weight": plain.embed.weight,
        "model.norm.weight": plain.norm.weight,
    }
    for i, block in enumerate(plain.blocks):
        at = f"model.layers.{i}"
        q, k, v = block.attention.qkv.weight.chunk(3)
        state |= {
            f"{at}.self_attn.q_proj.weight": q,
            f"{at}.self_attn.k_proj.weight": k,
            f"{at}.self_attn.v_proj.weight": v,
            f"{at}.self_attn.o_proj.weight": block.attention.out.weight,
            f"{at}.mlp.gate_proj.weight": block.gate.weight,
            f"{at}.mlp.up_proj.weight": block.up.weight,
            f"{at}.mlp.down_proj.weight": block.down.weight,
            f"{at}.input_layernorm.weight": block.norm1.weight,
            f"{at}.post_attention_layernorm.weight": block.norm2.weight,
        }
    assert len(state) == len(list(decoder.parameters()))
    model.load_state_dict(state, strict=False)


def train(variant: str, size: tuple, tokens: Tensor, steps: int) -> list[float]:
    torch.manual_seed(0)
    plain = PlainLlama(*size, LENGTH)
    if variant.startswith("fastlm"):
        vocab, width, layers, heads, hidden = size
        config = fastlm.ModelConfig(
            model_type="llama", vocab_size=vocab, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, intermediate_size=hidden,
            max_position_embeddings=LENGTH, tie_word_embeddings=True, rms_norm_eps=1e-6,
        )  # fmt: skip
        model = fastlm.CausalLM(config)
        copy_weights(plain, model)
        parameters = list(model.parameters())
        bits = 8 if "8-bit" in variant else 32
        optimizer = fastlm.AdamW(
            parameters, lr=LR, master_weights=True, max_grad_norm=1.0, state_bits=bits
        )
        optimizer.keep_masters()
        model.bfloat16()

        def loss_of(ids, labels):
            return model(ids, shift_labels=labels).loss
    else:
        parameters = list(plain.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

        def loss_of(ids, labels):
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in variant):
                return plain(ids, labels)

    losses, start = [], time.perf_counter()
    for step in range(steps):
        window = tokens[step * BATCH * LENGTH :][: BATCH * LENGTH + 1]
        ids, labels = window[:-1].view(BATCH, LENGTH), window[1:].view(BATCH, LENGTH)
        loss = loss_of(ids, labels)
        loss.backward()
        if not variant.startswith("fastlm"):  # fastlm's optimizer clips
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    print(f"{variant}: {losses[0]:.4f} -> {losses[-1]:.4f}, {time.perf_counter() - start:.0f} s")
    return losses


def plot(curves: dict[str, list[float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    styles = {
        "eager fp32": ("#c9d1da", 6),
        "eager autocast": ("#e08b2f", 1.5),
        "fastlm bf16, 8-bit AdamW": ("#3c9d5b", 1.2),
        "fastlm bf16": ("#2f6fde", 1.5),
    }
    for name in styles:  # the widest line is drawn below the others
        losses, (color, width) = curves[name], styles[name]
        top.plot(losses, color=color, linewidth=width, label=f"{name}: {losses[-1]:.3f} at the end")
        if name != "eager fp32":
            apart = torch.tensor(losses) - torch.tensor(curves["eager fp32"])
            bottom.plot(apart, color=color, linewidth=width, label=f"{name} - eager fp32")
    top.set_ylabel("training loss (nats a token)")
    bottom.set_ylabel("difference")
    bottom.set_xlabel(f"step, {BATCH * LENGTH} tokens each")
    for axes in (top, bottom):
        axes.legend(frameon=False)
        axes.grid(axis="y", color="#dfe4ea")
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="42m")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "loss-curve.png")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    size = SIZES[options.size]
    tokens = text_tokens(size[0], options.steps * BATCH * LENGTH + 1)
    assert len(tokens) > options.steps * BATCH * LENGTH
    keep_freed_memory()
    names = ("fastlm bf16", "fastlm bf16, 8-bit AdamW", "eager autocast", "eager fp32")
    curves = {name: train(name, size, tokens, options.steps) for name in names}
    plot(curves, options.out)
    truth = torch.tensor(curves["eager fp32"])
    apart = {}
    for name, losses in curves.items():
        difference = torch.tensor(losses) - truth
        apart[name] = {
            "mean difference": float(difference.mean()),
            "root mean square difference": float(difference.square().mean().sqrt()),
            "difference of the last 20 steps": float(difference[-20:].mean()),
            "last 20 steps": float(torch.tensor(losses[-20:]).mean()),
        }
    for name, numbers in apart.items():
        print(name, {k: round(v, 5) for k, v in numbers.items()})
    save(options.json, {"loss_curve": apart, "curves": curves, "machine": machine()})


if __name__ == "__main__":
    main()
