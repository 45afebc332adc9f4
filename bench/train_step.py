"""Training throughput end to end: tokens/s and peak memory of whole steps, against plain PyTorch.

Every variant is a process of its own (so that its peak memory is its own) which waits for its
turn: the steps of all variants alternate, one step each, on otherwise idle cores. Forward,
backward, clipping and AdamW are in the step.

    python -P bench/train_step.py     the 42.4 M configuration of the README's table
    python -P bench/train_step.py --size 10m --length 256 --threads 1
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import machine
from plain import PlainLlama

# name -> vocabulary, hidden_size, layers, heads, FFN; 42m is the table's Llama-like model
SIZES = {
    "10m": (8192, 256, 8, 4, 704),
    "42m": (32768, 512, 8, 8, 1408),
    "124m": (50304, 768, 12, 12, 2048),
    "350m": (50304, 1024, 24, 16, 2816),
}
VARIANTS = ("fastlm", "torch.compile autocast", "eager autocast", "eager bf16", "eager fp32")


def fastlm_step(size, length):
    import fastlm

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
    model = fastlm.CausalLM(config).bfloat16()
    optimizer = fastlm.AdamW(model.parameters(), lr=1e-4, master_weights=True, max_grad_norm=1.0)

    def step(ids, labels):
        loss = model(ids, shift_labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def plain_step(variant, size, length):
    model = PlainLlama(*size, length)
    if variant == "eager bf16":
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    autocast = variant.endswith("autocast")

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


def worker(pipe, variant, size, batch, length, threads):
    """Builds the variant, then answers each "step" with (seconds, loss), and "memory" with MiB."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    make = fastlm_step if variant == "fastlm" else lambda *a: plain_step(variant, *a)
    step = make(size, length)
    while (message := pipe.recv()) != "stop":
        if message == "memory":
            pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
            continue
        ids = torch.randint(0, size[0], (batch, length + 1))
        start = time.perf_counter()
        loss = step(ids[:, :-1], ids[:, 1:].contiguous())
        pipe.send((time.perf_counter() - start, loss.item()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="42m")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after two to warm up")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    options = parser.parse_args()
    size = SIZES[options.size]
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for variant in options.variants:
        pipes[variant], theirs = spawn.Pipe()
        arguments = (theirs, variant, size, options.batch, options.length, options.threads)
        processes.append(spawn.Process(target=worker, args=arguments, daemon=True))
        processes[-1].start()
    seconds = {v: [] for v in pipes}
    for i in range(options.steps + 2):
        for variant, pipe in pipes.items():
            pipe.send("step")
            elapsed, loss = pipe.recv()
            if i >= 2:
                seconds[variant].append(elapsed)
            if not loss == loss:
                sys.exit(f"bench: {variant}: loss is NaN at step {i}")
    tokens = options.batch * options.length
    rows = []
    for variant, pipe in pipes.items():
        pipe.send("memory")
        median = statistics.median(seconds[variant])
        rows.append(
            {
                "variant": variant,
                "tokens_per_second": tokens / median,
                "spread": (max(seconds[variant]) - min(seconds[variant])) / median,
                "peak_mib": pipe.recv(),
            }
        )
        pipe.send("stop")
    mine = next((r for r in rows if r["variant"] == "fastlm"), None)
    print(machine())
    print(f"{options.size}, batch {options.batch} x {options.length}, {options.threads} threads")
    print(
        "| variant | tokens/s | fastlm is | peak MiB | fastlm uses | spread |\n"
        "|---|---|---|---|---|---|"
    )
    for r in rows:
        faster = f"{mine['tokens_per_second'] / r['tokens_per_second']:.2f}x" if mine else "-"
        memory = f"{mine['peak_mib'] / r['peak_mib']:.2f}x" if mine else "-"
        rate, mib = f"{r['tokens_per_second']:.0f}", f"{r['peak_mib']:.0f}"
        cells = (r["variant"], rate, faster, mib, memory, f"{r['spread']:.0%}")
        print("| " + " | ".join(cells) + " |")
    print(json.dumps({"train_step": vars(options), "machine": machine(), "rows": rows}))


if __name__ == "__main__":
    main()
