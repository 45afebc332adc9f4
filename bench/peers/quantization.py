"""Measure the cost of 4-bit weights, for each method: bits per byte, KL and greedy agreement.

The quantized models are compared with the model itself.

    python bench/peers/quantization.py --model FOLDER --data SHARDS [--json FILE]

`--data` needs parts (prepared text, shards): models are calibrated on the training part and
compared on the held-out part. Other text is refused. Each change has its standard error over the
windows; so has the difference to `plain`, which is rounding to nearest with the scale of the
largest weight: both models read the same windows. `--json` adds to the rows of that file.

The base is computed in float32, whatever its stored dtype. `--model model:smollm2` has 4-bit
weights (Q4_1: groups of 32 with a scale and an offset; its embedding is Q8_0), which are
dequantized, as `fastlm quantize --dequantize` does. Groups of 32 with offsets would reproduce that
grid without a loss, so only other grids are measured there: symmetric ones, and groups of 64.

`--leave FOLDER` writes the base and the calibration windows for another program and ends.
`--oracle NAME=PATH` then names that program's result: a .gguf file (llama.cpp's
`llama-quantize --pure`), or a Hugging Face folder with dequantized layers
(`bench/peers/oracle_auto_round.py`). The embedding of the latter is quantized here, as by `gptq`
and `autoround`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import bench_path  # noqa: F401
import gguf
import torch
from harness import machine, positive, save
from safetensors.torch import save_file

import fastlm
from fastlm.data.texts import check_window, has_splits, token_dataset
from fastlm.model.causal_lm import CausalLM
from fastlm.model.quantized_modules import QuantizedLinear, set_quantized_weight
from fastlm.ops.quantized_weight import QuantizedWeight, pack_rows
from fastlm.quant.calibration import text_windows
from fastlm.quant.distill import tokens_needed
from fastlm.quant.model_comparison import compare_models, effective_bits
from fastlm.quant.options import QuantizeOptions
from fastlm.quant.targets import select_targets
from fastlm.stats.intervals import ratio_error
from fastlm.tokenizer.load import load_tokenizer

GRIDS = {"g64": (64, True), "g32": (32, True), "g64 offsets": (64, False)}
# ", awq": with AWQ's scales; ", distilled": with --distill-steps at the end
METHODS = (
    "plain", "rtn", "rtn, calibrated", "rtn, awq", "gptq", "gptq, awq", "autoround",
    "autoround, awq", "rtn, distilled", "gptq, distilled",
)  # fmt: skip


def round_to_nearest(model: CausalLM, group_size: int, symmetric: bool) -> CausalLM:
    """Round to nearest: put the largest weight of a group on 7, or its range on 15 steps."""
    targets = select_targets(model, QuantizeOptions(group_size=group_size, symmetric=symmetric))
    for target in targets:
        w = target.module.weight.detach().float()
        n, k = w.shape
        v = w.view(n, -1, group_size)  # GRIDS divide the widths
        low, high = v.aminmax(dim=-1, keepdim=True)
        if symmetric:
            z, s = torch.zeros_like(low), torch.maximum(high, -low) / 7
        else:
            s = (high - low) / 15
            z = low + 8 * s
        s = s.bfloat16().float().clamp(min=1e-30)
        z = z.bfloat16().float()
        q = ((v - z) / s).round().clamp(-8, 7).view(n, k)
        zeros = None if symmetric else z[..., 0].bfloat16()
        weight = QuantizedWeight(
            pack_rows(q, 4), s[..., 0].bfloat16(), zeros, 4, group_size, (n, k)
        )
        set_quantized_weight(model, target.name, weight)
    return model


def cache_hidden(model: CausalLM) -> CausalLM:
    """Cache the base's hidden states: it reads the same batches for every row."""
    compute, cache = model.hidden, {}

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        key = ids.numpy().tobytes()
        if key not in cache:
            cache[key] = compute(ids)
        return cache[key]

    model.hidden = hidden
    return model


def oracle(path: Path, windows: torch.Tensor) -> tuple[CausalLM, float, float, str]:
    """Return another program's model, its bits per weight, its seconds and its grid."""
    if path.suffix == ".gguf":
        tensors = gguf.GGUFReader(path).tensors
        bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
        return (
            CausalLM.from_pretrained(path, dtype=torch.float32, keep_quantized=False),
            bits,
            0,
            "",
        )
    summary = json.loads((path / "oracle.json").read_text())
    model = CausalLM.from_pretrained(path, dtype=torch.float32)
    group_size, symmetric = GRIDS[summary["grid"]]
    options = {"group_size": group_size, "symmetric": symmetric}
    same = CausalLM(model.config)
    bits = effective_bits(fastlm.quantize(same, "w4a16", **options))["bits_per_weight"]
    fastlm.quantize(
        model,
        "w4a16",
        method="gptq",
        calibration=windows,
        overrides={"model.layers.*": 16},
        **options,
    )
    return model, bits, summary["seconds"], summary["grid"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="Prepared text, or shards.")
    parser.add_argument(
        "--tokens", type=positive, default=32768, help="Tokens of calibration text."
    )
    parser.add_argument("--heldout", type=positive, default=65536, help="Tokens to compare on.")
    parser.add_argument("--length", type=positive, default=512, help="Tokens of a window.")
    parser.add_argument(
        "--iterations", type=positive, default=200, help="Iterations of autoround per layer."
    )
    parser.add_argument(
        "--distill-steps", type=positive, default=100, help="Steps of ', distilled'."
    )
    parser.add_argument(
        "--progress",
        type=Path,
        help="Store finished layers in this folder, and continue from them.",
    )
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--oracle", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument(
        "--leave", metavar="FOLDER", type=Path, help="Write the base to this folder and exit."
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="Add the rows to this file.")
    options = parser.parse_args()
    if not has_splits(options.data):
        parser.error(f"--data: expected text with a held-out part, got {options.data}")

    def load() -> CausalLM:
        return CausalLM.from_pretrained(options.model, dtype=torch.float32, keep_quantized=False)

    before = cache_hidden(load())
    tokenizer = load_tokenizer(options.model, before.config.to_dict())
    seq_len, _ = check_window(before.context_limit, options.length, None)
    distils = any(method.endswith("distilled") for method in options.methods)
    learnt = text_windows(
        before, tokenizer, options.data, length=seq_len, seed=0,
        tokens=max(options.tokens, tokens_needed(options.distill_steps) if distils else 0),
    )  # fmt: skip
    windows = learnt[: max(1, options.tokens // seq_len)]
    if options.leave:
        before.save_pretrained(options.leave)
        tokenizer.save(options.leave)
        save_file({"input_ids": windows}, options.leave / "calibration.safetensors")
        return
    settings = {
        "model": Path(options.model).name, "data": options.data.name, "calibration": options.tokens,
        "length": seq_len, "heldout": options.heldout, "machine": machine(),
    }  # fmt: skip
    rows = []
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text())["quantization"]
    vocab = before.config.vocab_size
    with token_dataset(options.data, tokenizer, vocab) as dataset:

        def measure(name: str, grid: str, after: CausalLM, bits: float, seconds: float) -> None:
            comparison = compare_models(
                before, after, dataset, seq_len=seq_len, stride=seq_len, max_tokens=options.heldout
            )
            metrics = comparison.metrics()
            spread = 100 * (metrics["bpb_increase_error"] or 0.0)
            row = {
                "name": name, "grid": grid, "bits_per_weight": bits, "seconds": seconds,
                "loss_percent": 100 * comparison.bpb_increase, **metrics, **settings,
                "windows": [round(after, 6) for _, after in comparison.windows],
            }  # fmt: skip
            texts = ("model", "data", "length", "heldout")
            plain = next((r for r in rows if r["name"] == "plain" and r["grid"] == grid
                          and all(r[key] == settings[key] for key in texts)), None)  # fmt: skip
            gain = ""
            if plain is not None:
                pairs = list(zip(plain["windows"], row["windows"]))
                row["against_plain_percent"] = 100 * (
                    comparison.bits_per_byte / plain["bits_per_byte"] - 1
                )
                row["against_plain_error"] = 100 * (ratio_error(pairs) or 0.0)
                gain = "{:+.2f} ± {:.2f} %".format(
                    row["against_plain_percent"], row["against_plain_error"]
                )
            rows.append(row)
            label = f"{name}, {grid}" if grid else name
            print(
                f"| {label} | {bits:.2f} | {comparison.bits_per_byte:.4f} |"
                f" {100 * comparison.bpb_increase:+.2f} ± {spread:.2f} % | {gain} |"
                f" {comparison.kl:.4f} | {100 * comparison.greedy_agreement:.1f} % |"
                f" {seconds:.0f} |",
                flush=True,
            )
            save(options.json, {"quantization": rows})

        print("| | bits per weight | bits per byte | change | against plain | KL | agreement |"
              " processor s |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|")
        for grid in options.grids:
            group_size, symmetric = GRIDS[grid]
            for method in options.methods:
                model, began = load(), time.process_time()
                if method == "plain":
                    round_to_nearest(model, group_size, symmetric)
                else:
                    last, name = method.endswith("distilled"), method.partition(",")[0]
                    checkpoint_dir = options.progress and options.progress / f"{grid}-{name}"
                    fastlm.quantize(
                        model, "w4a16", group_size=group_size, symmetric=symmetric,
                        method=name, iterations=options.iterations,
                        calibration=None if method == "rtn" else windows,
                        awq=method.endswith("awq"),
                        distill_steps=options.distill_steps if last else 0,
                        distill_data=learnt if last else None,
                        checkpoint_dir=checkpoint_dir,
                        log=lambda line: print(line, file=sys.stderr, flush=True),
                    )  # fmt: skip
                seconds = time.process_time() - began
                assert any(isinstance(m, QuantizedLinear) for m in model.modules())
                steps = f"autoround ({options.iterations} steps)"
                name = method.replace("autoround", steps)
                name = name.replace("distilled", f"distilled ({options.distill_steps} steps)")
                measure(name, grid, model, effective_bits(model)["bits_per_weight"], seconds)
        for entry in options.oracle:
            name, _, path = entry.partition("=")
            other, bits, seconds, grid = oracle(Path(path), windows)
            measure(name, grid, other, bits, seconds)


if __name__ == "__main__":
    main()
