"""Measure end-to-end training throughput: tokens/s and peak memory of full steps, against PyTorch.

Every variant is a separate process, so that its peak memory is separate, and waits for its turn:
the steps of all variants alternate, one step each, on otherwise idle cores. A step consists of
forward, backward, clipping and AdamW. fastlm's process keeps its freed memory, as `fastlm.train`
does. One peer does too, to separate the kernels' share from the allocator's.

    python bench/train/train_step.py     the 42.4 M configuration of the README's table
    python bench/train/train_step.py --size 10m --length 256 --threads 1
    python bench/train/train_step.py --scaling     other sizes, lengths and thread counts
"""

import argparse

import bench_path  # noqa: F401
import torch
import turns
from ceilings import wait_until_quiet
from harness import machine, save
from plain import PlainLlama

# name -> vocabulary, hidden_size, layers, heads, FFN; 42m is the table's Llama-like model
SIZES = {
    "10m": (8192, 256, 8, 4, 704),
    "17m": (16384, 384, 6, 6, 1024),
    "42m": (32768, 512, 8, 8, 1408),
    "124m": (50304, 768, 12, 12, 2048),
    "350m": (50304, 1024, 24, 16, 2816),
}
VARIANTS = (
    "fastlm",
    "fastlm, 8-bit AdamW",
    "fastlm fp32",
    "torch.compile autocast",
    "torch.compile autocast, memory kept",
    "torch.compile fp32",
    "torch.compile fp32, memory kept",
    "torch.compile bf16",
    "eager autocast",
    "eager bf16",
    "eager fp32",
)
# size, batch, length, threads; against the strongest peers, with 2 warm-up steps and 3 timed ones
SCALING = [
    *(("10m", 8, 512, t) for t in (1, 2)),
    ("10m", 1, 8192, 2),
    ("17m", 16, 256, 2),
    ("42m", 8, 512, 1),
    *(("42m", batch, length, 2) for batch, length in ((16, 256), (2, 2048), (1, 8192))),
    *(("124m", 4, 512, t) for t in (1, 2)),
    ("124m", 8, 256, 2),
    *(("350m", 2, 512, t) for t in (1, 2)),
    ("350m", 1, 2048, 2),
]
# The faster of torch's two depends on the machine: on Intel CPUs it may be float32.
STRONGEST = ("fastlm", "torch.compile autocast", "torch.compile fp32")


def fastlm_step(size, length, state_bits=32, dtype=torch.bfloat16):
    import fastlm
    from fastlm.memory import keep_freed_memory

    keep_freed_memory()
    vocab, width, layers, heads, hidden = size
    config = fastlm.ModelConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=length,
        tie_word_embeddings=True,
    )
    model = fastlm.CausalLM(config)
    low = dtype != torch.float32
    optimizer = fastlm.AdamW(
        model.parameters(), lr=1e-4, master_weights=low, max_grad_norm=1.0, state_bits=state_bits
    )
    if low:
        optimizer.keep_masters()
        model.to(dtype)

    def step(ids, labels):
        loss = model(ids, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_step(variant, size, length):
    if variant.endswith("memory kept"):
        from fastlm.memory import keep_freed_memory

        keep_freed_memory()
    model = PlainLlama(*size, length)
    if variant.split(",")[0].endswith("bf16"):
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = "autocast" in variant

    def loss_of(ids, labels):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(ids, labels)

    if variant.startswith("torch.compile"):
        loss_of = torch.compile(loss_of)

    def step(ids, labels):
        loss = loss_of(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def make_step(variant, size, batch, length):
    if variant.startswith("fastlm"):
        dtype = torch.float32 if variant.endswith("fp32") else torch.bfloat16
        step = fastlm_step(size, length, 8 if "8-bit" in variant else 32, dtype)
    else:
        step = plain_step(variant, size, length)

    def on_random_ids():
        ids = torch.randint(0, size[0], (batch, length + 1))
        return step(ids[:, :-1], ids[:, 1:].contiguous())

    return on_random_ids


def measure(name, batch, length, threads, variants, steps) -> list[dict]:
    arguments = (SIZES[name], batch, length)
    return turns.measure(
        variants, make_step, arguments, steps=steps, tokens=batch * length, threads=threads
    )


def scaling() -> list[dict]:
    """Print one line per configuration and return every row."""
    print(
        "| model, batch x length, threads | fastlm tokens/s | torch.compile, the faster "
        "| fastlm is | peak MiB | torch.compile | fastlm uses |\n|---|---|---|---|---|---|---|"
    )
    rows = []
    for name, batch, length, threads in SCALING:
        if threads > torch.get_num_threads():
            continue
        label = f"{name}, {batch} x {length}, {threads}"
        mine, *peers = results = measure(name, batch, length, threads, STRONGEST, steps=3)
        rows += [{"configuration": label, **r} for r in results]
        peer = max(peers, key=lambda r: r["tokens_per_second"])
        dtype = peer["variant"].split()[-1]
        rate, peer_rate = (r["tokens_per_second"] for r in (mine, peer))
        peak, peer_peak = (r["peak_mib"] for r in (mine, peer))
        cells = (
            *(label, f"{rate:.0f}", f"{peer_rate:.0f} ({dtype})", f"{rate / peer_rate:.2f}x"),
            *(f"{peak:.0f}", f"{peer_peak:.0f}", f"{peak / peer_peak:.2f}x"),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    turns.add_step_options(parser, SIZES, VARIANTS)
    parser.add_argument("--scaling", action="store_true", help="measure every line of SCALING")
    options = parser.parse_args()
    wait_until_quiet(options.busy)
    print(machine())
    if options.scaling:
        rows = scaling()
    else:
        print(f"{options.size}, {options.batch} x {options.length}, {options.threads} threads")
        rows = measure(
            options.size, options.batch, options.length, options.threads, options.variants,
            options.steps,
        )  # fmt: skip
        print(turns.table(rows, "fastlm"))
    save(options.json, {"train_step": vars(options), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
