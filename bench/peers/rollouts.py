"""Compare sampling of answers, as in PPO and GRPO, with transformers' `generate`.

    python bench/peers/rollouts.py
    python bench/peers/rollouts.py --prompt 24 --new 24 --answers 1     all prompts differ

SmolLM2-135M, prompts of random tokens, several answers to each, all of the same length, drawn at
temperature 1 without filters. fastlm (`fastlm.train.rollouts`, which trainings use) also returns
log-probabilities. The sides take turns.
"""

import argparse
import statistics
import tempfile
import time

import bench_path  # noqa: F401
import torch
import transformers
from harness import positive

from fastlm.model.causal_lm import CausalLM
from fastlm.train.rollouts import sample_completions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows", type=positive, default=32, help="Sample this number of answers at once."
    )
    parser.add_argument("--answers", type=positive, default=4, help="Answers to a prompt.")
    parser.add_argument("--prompt", type=positive, default=64, help="Tokens of a prompt.")
    parser.add_argument("--new", type=positive, default=64, help="Tokens of an answer.")
    parser.add_argument("--turns", type=positive, default=3)
    a = parser.parse_args()
    ours = {
        name: CausalLM.from_pretrained("model:smollm2", dtype=dtype, keep_quantized=False)
        for name, dtype in DTYPES.items()
    }
    for model in ours.values():
        model.config.eos_token_id = None  # all answers have all tokens
    with tempfile.TemporaryDirectory() as folder:
        ours["fp32"].save_pretrained(folder)
        load = transformers.AutoModelForCausalLM.from_pretrained
        theirs = {name: load(folder, dtype=dtype).eval() for name, dtype in DTYPES.items()}
    seeded = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (-(-a.rows // a.answers), a.prompt), generator=seeded)
    ids = prompts.repeat_interleave(a.answers, 0)[: a.rows]

    def fastlm_side(model) -> None:
        answers = sample_completions(model, ids.tolist(), max_new_tokens=a.new)
        assert all(len(answer.token_ids) == a.new for answer in answers)

    def transformers_side(model) -> None:
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=a.new,
                min_new_tokens=a.new, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=0,
            )  # fmt: skip

    seconds: dict[str, list[float]] = {}
    for _ in range(a.turns):
        for name in DTYPES:
            for side, run, models in (
                ("fastlm", fastlm_side, ours), ("transformers", transformers_side, theirs),
            ):  # fmt: skip
                began = time.perf_counter()
                run(models[name])
                seconds.setdefault(f"{side} {name}", []).append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name:20} {statistics.median(times):6.2f} s")


if __name__ == "__main__":
    main()
