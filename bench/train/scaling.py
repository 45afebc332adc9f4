"""Compute the figures of docs/scaling.md: memory, bytes and overlap on 8 to 1,024 GPUs.

    python bench/train/scaling.py                       prints the tables, by the formulas of the
    page unshare -rn sh -c 'ip link set lo up && python bench/train/scaling.py --measure'

``--measure`` trains a small model in 2 and 4 gloo processes and compares the bytes that cross the
loopback device with the formulas. A separate network namespace excludes other programs.
"""

import argparse
import math
import multiprocessing
import os
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

GIGA = 1e9
# H100 SXM, 8 to a node. Per direction: NVLink, and 8 network cards of 400 Gb/s that the rings of a
# node share, at 75 %. 40 % of the dense bfloat16 peak; microseconds per hop of a ring
FLOPS, NVLINK, NODE_NETWORK, SHARE = 0.4 * 989e12, 450e9, 8 * 50e9, 0.75
HOP = 3e-6
GPUS, NODE, TOKENS = (8, 64, 256, 1024), 8, 8192  # tokens of a micro-batch


@dataclass(frozen=True)
class Model:
    """The sizes of a model. ``rest``: the parameters of embedding, head and norms."""

    name: str
    layers: int
    width: int
    inner: int
    kv_width: int
    vocabulary: int = 32_000

    @property
    def layer(self) -> int:
        return self.width * (2 * self.width + 2 * self.kv_width + 3 * self.inner + 2)

    @property
    def rest(self) -> int:
        return self.width * (2 * self.vocabulary + 1)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.rest

    def activations(self, recompute: bool) -> float:
        """Return the bytes that the backward of a micro-batch needs: those of every layer, or with
        ``checkpoint_activations`` the input of each layer and one full layer.
        """
        inputs = 2 * TOKENS * 2 * self.width
        inside = 2 * TOKENS * (4 * self.width + 2 * self.kv_width + 2 * self.inner)
        return self.layers * inputs + inside if recompute else self.layers * inside


MODELS = (
    Model("1.1 B", 22, 2048, 5632, 256),
    Model("7 B", 32, 4096, 11008, 4096),
)


def memory(model: Model, way: str, gpus: int) -> float:
    """Return the bytes of parameters, gradients and states per GPU."""
    if way == "ddp":
        return 14.0 * model.parameters + 2 * 2 * 25 * 2**20  # two buckets of bfloat16, in float32
    within = gpus if way == "fsdp" else NODE
    # temporary: full embedding, head and two layers; one gradient, in bfloat16 and float32
    temporary = (2 + 4) * max(model.rest, model.layer) + 2 * (model.rest + 2 * model.layer)
    return 14.0 * model.parameters / within + temporary


def sent(model: Model, way: str, gpus: int) -> float:
    """Return the bytes that a GPU sends in a step of one micro-batch."""
    if way == "ddp":
        return 2 * (gpus - 1) / gpus * 4 * model.parameters
    within = gpus if way == "fsdp" else NODE
    layers = model.layers * model.layer
    inside = (within - 1) / within * (2 * (2 * layers + model.rest) + 4 * model.parameters)
    groups = gpus // within
    return inside + 2 * (groups - 1) / groups * 4 * model.parameters / within


def bandwidth(gpus: int) -> float:
    return SHARE * (NVLINK if gpus <= NODE else min(NVLINK, NODE_NETWORK))


def ring(size: float, gpus: int) -> float:
    """Return the seconds of a gather or a reduce-scatter of ``size`` bytes over the GPUs."""
    return (gpus - 1) / gpus * size / bandwidth(gpus) + (gpus - 1) * HOP


def tree(size: float, gpus: int) -> float:
    """Return the seconds of an all-reduce of ``size`` bytes."""
    return 2 * (gpus - 1) / gpus * size / bandwidth(gpus) + 2 * math.log2(gpus) * HOP


def min_tokens(model: Model, way: str, gpus: int) -> float:
    """Return the tokens of a GPU's micro-batch (ddp: of its last one) at which computation takes as
    long as the overlapping communication. With fewer, the GPUs wait.
    """
    if way == "ddp":  # overlaps with the backward, in buckets of 25 MiB
        bucket = 25 * 2**20
        buckets = 2 * model.parameters / bucket
        return buckets * tree(2 * bucket, gpus) * FLOPS / (4 * model.parameters)
    within = gpus if way == "fsdp" else NODE
    gather, scatter = ring(2 * model.layer, within), ring(4 * model.layer, within)
    communication = gather + scatter
    if gpus > within:  # each GPU's shard crosses its own network card
        groups, slow = gpus // within, SHARE * NODE_NETWORK / NODE
        communication += 2 * (groups - 1) / groups * 4 * model.layer / within / slow
        communication += 2 * math.log2(groups) * HOP
    forward, backward = (part * model.layer / FLOPS for part in (2, 4))  # of a token
    return max(gather / forward, communication / backward)


def tables() -> None:
    for model in MODELS:
        checkpointed = model.activations(True) / GIGA
        print(
            f"\n{model.name}: {model.parameters / GIGA:.2f} B parameters, {model.layer / 1e6:.0f} M"
            f" a layer; activations of {TOKENS:,} tokens {model.activations(False) / GIGA:.0f} GB,"
            f" checkpointed {checkpointed:.0f} GB\n"
        )
        print("| GPUs | " + " | ".join(f"{w}: GB memory, GB sent, tokens" for w in WAYS) + " |")
        print("|---|" + "---|" * len(WAYS))
        for gpus in GPUS:
            cells = [
                f"{memory(model, way, gpus) / GIGA:.1f}, {sent(model, way, gpus) / GIGA:.1f},"
                f" {100 * math.ceil(min_tokens(model, way, gpus) / 100):,}"
                for way in WAYS
            ]
            print(f"| {gpus:,} | " + " | ".join(cells) + " |")


WAYS = ("ddp", "fsdp", "hsdp")


# measured


class Numbers:
    """A tokenizer of 31 words, for `write_shards`."""

    vocab_size, eos_id = 32, 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def vocabulary_id(self, size: int) -> str:
        return f"numbers {size}"


def loopback() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise SystemExit("no loopback device")


def set_torchrun_environment(rank: int, size: int, port: int) -> None:
    """Set the variables that torchrun would set."""
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2",
    }  # fmt: skip


def work(
    rank: int, size: int, port: int, folder: Path, way: str, dtype: str, micro: int, log
) -> None:
    set_torchrun_environment(rank, size, port)
    import torch

    import fastlm
    from fastlm.data.shards import BatchSampler, TokenDataset
    from fastlm.train.loop import train
    from fastlm.train.options import TrainOptions
    from fastlm.train.pretrain import PretrainObjective

    torch.set_num_threads(1)
    config = fastlm.ModelConfig(
        model_type="llama", vocab_size=32, hidden_size=128, intermediate_size=512,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = fastlm.CausalLM(config, seed=0)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    total = sum(p.numel() for p in model.parameters())
    options = TrainOptions(
        max_steps=8, gradient_accumulation_steps=micro * size, dtype=dtype, validations=0,
        sample_at=(), parallel=way, save_steps=1000,
    )  # fmt: skip
    marks: list[int] = []
    sampler = BatchSampler(TokenDataset(folder / "shards"), 1, 16, seed=0)
    run = folder / f"{way}-{dtype}-{size}-{micro}"
    objective = PretrainObjective(model, sampler, None, options)
    train(objective, options, run, on_event=lambda event: marks.append(loopback()))
    if rank == 0:
        log.put((layers, total, (marks[-2] - marks[1]) / (len(marks) - 3) / size))


def roll_out(rank: int, size: int, port: int, kind: str, log) -> None:
    """Measure a round of 64 completions of 64 tokens."""
    set_torchrun_environment(rank, size, port)
    import torch

    import fastlm
    from fastlm.train.online_objectives import GRPOObjective, PPOObjective, build_value_model
    from fastlm.train.options import GRPOOptions, PPOOptions
    from fastlm.train.parallel import process_group

    torch.set_num_threads(1)
    config = fastlm.ModelConfig(
        model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=32,
        num_hidden_layers=1, num_attention_heads=1, max_position_embeddings=128,
    )  # fmt: skip
    model = fastlm.CausalLM(config, seed=0)
    settings = {
        "prompts_per_round": 16,
        "num_generations": 4,
        "num_iterations": 1,
        "beta": 0.0,
        "max_new_tokens": 64,
    }
    args = (model, model, [[1, 2]] * 16, [], lambda indices, completions: [1.0] * len(completions))
    objective = (
        PPOObjective(
            *args,
            PPOOptions(**settings),
            base="",
            value_model=build_value_model(model, shared=True),
        )
        if kind == "ppo"
        else GRPOObjective(*args, GRPOOptions(**settings), base="")
    )
    with process_group(torch.device("cpu")) as objective.world:
        marks = []
        for _ in range(2):  # the first one also opens connections
            objective.world.any(False)
            marks.append(loopback())
            objective.next_batches(64 // objective.options.batch_size)  # a complete round
            objective.world.any(False)
            marks.append(loopback())
            objective.world.any(False)
    if rank == 0:
        tokens = sum(len(c.token_ids) for c in objective.completions)
        log.put((tokens, len(objective.completions), (marks[3] - marks[2]) / size))


def run_processes(run, size: int, port: int, *options):
    """Run the processes of a measurement. Return the result of the first one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastlm.train.loop"])  # torch is loaded once
    log = context.Queue()
    processes = [
        context.Process(target=run, args=(rank, size, port, *options, log)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = log.get(timeout=300)
    for process in processes:
        process.join()
    return results


def measure() -> None:
    from fastlm.data.shards import write_shards

    rng = np.random.default_rng(0)
    cases = [
        ("ddp", "float32", 2, 1), ("ddp", "float32", 4, 1), ("ddp", "bfloat16", 4, 2),
        ("fsdp", "float32", 2, 1), ("fsdp", "float32", 4, 1), ("fsdp", "bfloat16", 4, 1),
        ("fsdp", "bfloat16", 2, 2), ("hsdp", "float32", 4, 1),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        docs = [" ".join(map(str, rng.integers(1, 32, 500))) for _ in range(4)]
        write_shards(docs, Numbers(), folder / "shards")
        print("| | bytes sent per process and step | formula | ratio |\n|---|---|---|---|")
        for port, (way, dtype, size, micro) in enumerate(cases, 29600):
            layers, total, sent = run_processes(work, size, port, folder, way, dtype, micro)
            wide = 4 if dtype == "float32" else 2
            within = 2 if way == "hsdp" else size
            share = (within - 1) / within
            if way == "ddp":
                expected = 2 * share * 4 * total
            else:  # gloo scatters by a full all-reduce: twice the bytes
                gathered = wide * (2 * layers + (total - layers))
                expected = micro * share * (gathered + 2 * 4 * total)
                if way == "hsdp":
                    expected += micro * 4 * total / within
            print(
                f"| {way}, {dtype}, {size} processes, {micro} micro-batch each | {sent:,.0f} |"
                f" {expected:,.0f} | {sent / expected:.3f} |"
            )  # fmt: skip
        for port, (kind, size) in enumerate(product(("grpo", "ppo"), (2, 4)), 29700):
            tokens, completions, sent = run_processes(roll_out, size, port, kind)
            per_token = 20 if kind == "ppo" else 16
            expected = (size - 1) * ((per_token * tokens + 13 * completions) / size + 2000)
            print(
                f"| a round of {kind}, {size} processes, {tokens:,} tokens | {sent:,.0f} |"
                f" {expected:,.0f} | {sent / expected:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="count bytes on the loopback device")
    if parser.parse_args().measure:
        measure()
    else:
        tables()


if __name__ == "__main__":
    main()
