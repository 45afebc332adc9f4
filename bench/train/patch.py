"""Training throughput of a Hugging Face model: `fastlm.patch` against the same model in plain
PyTorch, eager and under torch.compile.

The weights are random, so nothing is downloaded. A step consists of forward, backward, clipping and
AdamW. "bf16" is a model with bfloat16 parameters, "autocast" one with float32 parameters under
torch.autocast, "fp32" one with float32 parameters. All variants use torch's fused AdamW, unless
the row names another. "memory kept" means that `fastlm.memory.keep_freed_memory` is called
first, which any training script may do. Rows under torch.compile have it too, to separate the
kernels' share from the allocator's.

    python bench/train/patch.py                 a Llama of 42.4 M parameters, batch 8 x 512
    python bench/train/patch.py --size 135m --batch 4
"""

import argparse
import os

import bench_path  # noqa: F401
import torch
import turns
from ceilings import wait_until_quiet
from harness import machine, save

# vocabulary, hidden_size, layers, heads, key heads, FFN; 42m is train_step.py's model, 135m the
# shape of SmolLM2-135M
SIZES = {
    "42m": (32768, 512, 8, 8, 8, 1408),
    "135m": (49152, 576, 30, 9, 3, 1536),
}
MINE = "patched bf16, memory kept"
KEPT, FASTLM_ADAMW = "memory kept", "fastlm.AdamW"
VARIANTS = (
    MINE,
    "patched bf16",
    "patched autocast, memory kept",
    "patched autocast",
    "patched fp32",
    "torch.compile bf16",
    "torch.compile autocast, memory kept",
    "torch.compile autocast",
    "torch.compile fp32, memory kept",
    "torch.compile fp32",
    "eager bf16",
    "eager autocast",
    "eager fp32",
    "patched bf16, memory kept, fastlm.AdamW",
    "patched autocast, memory kept, fastlm.AdamW",
)


def make(variant: str, size: tuple[int, ...], batch: int, length: int):
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastlm
    from fastlm.memory import keep_freed_memory

    vocab, width, layers, heads, kv_heads, hidden = size
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=hidden,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    base, *extras = variant.split(", ")
    code, dtype = base.split(" ")
    if KEPT in extras:
        keep_freed_memory()
    model = LlamaForCausalLM(config).train()
    if dtype == "bf16":
        model = model.bfloat16()
    if code == "patched":
        fastlm.patch(model)
    if FASTLM_ADAMW in extras:
        optimizer = fastlm.AdamW(model.parameters(), lr=1e-4, max_grad_norm=1.0)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if code == "torch.compile" else model

    def step():
        ids = torch.randint(0, vocab, (batch, length))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        if FASTLM_ADAMW not in extras:  # fastlm's AdamW clips as part of its step
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    turns.add_step_options(parser, SIZES, VARIANTS)
    options = parser.parse_args()
    wait_until_quiet(options.busy)
    rows = turns.measure(
        options.variants,
        make,
        (SIZES[options.size], options.batch, options.length),
        steps=options.steps,
        tokens=options.batch * options.length,
        threads=options.threads,
    )
    print(machine())
    print(f"{options.size}, batch {options.batch} x {options.length}, {options.threads} threads")
    print(turns.table(rows, MINE))
    save(options.json, {"patch": vars(options), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
