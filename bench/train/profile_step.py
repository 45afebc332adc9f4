"""Profile a training step.

torch.profiler measures steps of `fastlm_step` (train_step.py) or of your own model. The operators
are grouped into parts. Matrix products are compared with the machine's best ceiling for bfloat16
(bench/ceilings.py).

    python bench/train/profile_step.py                  42 M, 8 x 512
    python bench/train/profile_step.py --size 124m --batch 4
    python bench/train/profile_step.py --model runs/demo/pretrain/model  a folder with a config.json
    python bench/train/profile_step.py --model train.py:make [--patch]

`make()` returns (model, batch): batch is a dict of arguments, a tuple, or one tensor; the model
returns a loss, or an object or dict with one. `--patch` calls `fastlm.patch` first. A model from a
folder gets random weights.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import bench_path  # noqa: F401
import torch
from ceilings import ceilings_before, confirm_ceilings, fastest_instruction
from harness import common_options, describe_ceilings, machine, positive, save
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from train_step import SIZES, fastlm_step

WARM, STEPS = 3, 3
MAX_OPERATORS = 25  # printed for your own model
# part -> strings contained in the names of its operators; the first match counts
PARTS = {
    "linear_cross_entropy": ("linear_cross_entropy",),
    "rms_norm": ("rms_norm",),
    "rope": ("rope",),
    "glu": ("glu",),
    "AdamW, clipping": ("AdamW.step",),
    "embedding": ("embedding", "index_select"),
    "sums of gradients": ("aten::add", "aten::sum"),
    "copies and fills": ("copy_", "fill_", "zero_", "aten::clone", "aten::to", "aten::mul"),
}


def part_of(name: str, shapes: list, tokens: int) -> str:
    if name in ("linear", "fastlm::linear"):  # fastlm's products
        return "linears: forward"
    if name in ("linearBackward", "fastlm::linear_backward"):
        return "linears: both gradients"
    if name in ("aten::mm", "aten::addmm"):
        inner = shapes[-2][-1] if len(shapes) > 1 and shapes[-2] else 0
        return "linears: weight gradients" if inner == tokens else "linears: the other two products"
    if "attention" in name:
        return "attention"
    return next((p for p, keys in PARTS.items() if any(k in name for k in keys)), "the rest")


def built_in(options: argparse.Namespace) -> tuple[Callable[[], object], dict[str, float]]:
    """Return the step of one of SIZES, and the floating-point operations of its parts."""
    vocab, width, layers, _, hidden = SIZES[options.size]
    tokens = options.batch * options.length
    step = fastlm_step(SIZES[options.size], options.length)

    def run():
        ids = torch.randint(0, vocab, (options.batch, options.length + 1))
        return step(ids[:, :-1], ids[:, 1:].contiguous())

    matrices = layers * (4 * width * width + 3 * width * hidden)
    return run, {
        "linears: forward": 2 * tokens * matrices,
        "linears: both gradients": 4 * tokens * matrices,
        # where torch's products run instead
        "linears: weight gradients": 2 * tokens * matrices,
        "linears: the other two products": 4 * tokens * matrices,
        "linear_cross_entropy": 6 * tokens * width * vocab,
        # the forward has 2 products, the backward 5; half of the scores are masked
        "attention": 7 * tokens * options.length * width * layers,
    }


def user_model(options: argparse.Namespace) -> tuple[torch.nn.Module, object]:
    """Return (model, batch) of FILE.py:FUNCTION, or of a folder with a config.json."""
    source, _, function = options.model.rpartition(":")
    if source.endswith(".py"):
        path = Path(source).resolve()
        sys.path.insert(0, str(path.parent))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.exists():
            sys.exit(f"bench: --model: no file {source}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if not hasattr(module, function):
            sys.exit(f"bench: --model: {source} has no {function!r}")
        return getattr(module, function)()
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        sys.exit(
            "bench: --model: expected FILE.py:FUNCTION or a folder with a config.json, "
            f"got {options.model!r}"
        )
    content = json.loads((folder / "config.json").read_text("utf-8"))
    ids = torch.randint(0, content["vocab_size"], (options.batch, options.length))
    if options.patch:  # `patch` needs a transformers model
        from transformers import AutoConfig, AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    else:
        import fastlm

        model = fastlm.CausalLM(fastlm.ModelConfig.from_dict(content))
    return model.bfloat16(), {"input_ids": ids, "labels": ids}


def loss_of(out) -> torch.Tensor:
    loss = out if torch.is_tensor(out) else out["loss"] if isinstance(out, dict) else out.loss
    if loss is None or loss.numel() != 1:
        sys.exit("bench: --model: expected a model that returns a loss, or something with one")
    return loss


def own_step(options: argparse.Namespace) -> Callable[[], object]:
    model, batch = user_model(options)
    if options.patch:
        import fastlm

        fastlm.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def run():
        if isinstance(batch, dict):
            out = model(**batch)
        else:
            out = model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
        loss_of(out).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=SIZES, default="42m")
    parser.add_argument("--model", help="profile FILE.py:FUNCTION or a folder with a config.json")
    parser.add_argument("--patch", action="store_true", help="call fastlm.patch on the model first")
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--length", type=positive, default=512)
    common_options(parser)
    options = parser.parse_args()
    if options.patch and options.model is None:
        parser.error("--patch: expected with --model")
    tokens = options.batch * options.length
    if options.model is None:
        run, flops = built_in(options)
        name = f"{options.size}, {options.batch} x {options.length}"
    else:  # fails before the wait for a quiet machine
        run, flops = own_step(options), {}
        name = options.model
    before = ceilings_before(options.busy)
    for _ in range(WARM):
        run()
    plain = sorted(timed(run) for _ in range(STEPS))[STEPS // 2]
    with FlopCounterMode(display=False) as counter:
        run()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        profiled = sum(timed(run) for _ in range(STEPS)) / STEPS
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages(group_by_input_shape=True):
        part = part_of(event.key, event.input_shapes, tokens)
        if options.model is not None and part not in PARTS:
            part = event.key
        seconds[part] += event.self_cpu_time_total / 1e6 / STEPS
    limits = confirm_ceilings(before)
    ceiling = limits[fastest_instruction(limits, "bf16")] if limits else math.nan
    print(machine())
    print(describe_ceilings(limits))
    rate = "" if options.model else f"{tokens / plain:.0f} tokens/s; "
    print(f"{name}: {plain * 1e3:.0f} ms a step, {rate}{profiled * 1e3:.0f} ms under the profiler")
    print("| part | ms | share of the step | share of the bf16 ceiling |\n|---|---|---|---|")
    rows = []
    for part, s in sorted(seconds.items(), key=lambda item: -item[1])[:MAX_OPERATORS]:
        share = flops[part] / ceiling / s if part in flops else math.nan
        rows.append({"part": part, "ms": s * 1e3, "of_step": s / profiled, "of_ceiling": share})
        of = "-" if math.isnan(share) else f"{share:.0%}"
        print(f"| {part} | {s * 1e3:.1f} | {s / profiled:.1%} | {of} |")
    # for your own model, torch's count
    counted = sum(n for part, n in flops.items() if part in seconds) or counter.get_total_flops()
    total = counted / ceiling
    if not math.isnan(total):
        print(f"| all matrix products at the ceiling | {total * 1e3:.0f} "
              f"| {total / plain:.0%} | 100% |")  # fmt: skip
    save(options.json, {"profile_step": vars(options), "machine": machine(), "flops": counted,
        "rows": [{k: None if v != v else v for k, v in r.items()} for r in rows]})  # fmt: skip


if __name__ == "__main__":
    main()
