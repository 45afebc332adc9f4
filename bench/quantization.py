"""What 4-bit weights cost: bits per byte, KL and greedy agreement of a model quantized by each
method, against the model itself.

    python bench/quantization.py --model FOLDER --data SHARDS [--json FILE]

`--data` with parts (prepared text, shards) calibrates on the training part and is compared on the
held-out one. Other text would serve for both, which is refused.

The base is computed in float32, whatever it is stored in. `--model model:smollm2` is a base of
4-bit weights itself (Q4_1: groups of 32 with a scale and an offset; its embedding is Q8_0), which
are dequantized, as `fastlm quantize --dequantize` does. Groups of 32 with offsets would find that
grid again and lose nothing, so only other grids are measured there: symmetric ones, and groups of
64. `--oracle FOLDER` names a Hugging Face folder in which another program, such as auto-round, left
the same model with dequantized weights. `plain` is rounding to nearest with the scale of the
largest weight.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from harness import machine, positive, save

import fastlm
from fastlm.checkpoint.folder import load_tokenizer
from fastlm.evals.texts import check_window, has_parts, token_dataset
from fastlm.model.causal_lm import CausalLM
from fastlm.ops.quantized_weight import QuantizedWeight, pack_rows
from fastlm.quant.calibration import text_windows
from fastlm.quant.model import put_quantized
from fastlm.quant.modules import QuantizedLinear
from fastlm.quant.plan import plan_of
from fastlm.quant.report import compare, true_bits

GRIDS = {"g64": (64, True), "g32": (32, True), "g64 offsets": (64, False)}
METHODS = ("plain", "rtn", "rtn, calibrated", "gptq", "autoround")


def plain(model: CausalLM, group_size: int, symmetric: bool) -> CausalLM:
    """Round to nearest: the largest weight of a group on 7, or the group's range on 15 steps."""
    plan = plan_of(
        model, "w4a16", group_size=group_size, symmetric=symmetric, scale_dtype=torch.bfloat16,
        embeddings=0, head=0, overrides=None,
    )  # fmt: skip
    for target in plan:
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
        put_quantized(model, target.name, weight)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True, help="prepared text, or shards")
    parser.add_argument("--tokens", type=positive, default=32768, help="of calibration text")
    parser.add_argument("--heldout", type=positive, default=65536, help="tokens to compare on")
    parser.add_argument("--length", type=positive, default=512, help="of a window")
    parser.add_argument("--iterations", type=positive, default=200, help="of autoround, per layer")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--oracle", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there too")
    options = parser.parse_args()
    if not has_parts(options.data):
        parser.error(f"--data: wanted text with a held-out part, got {options.data}")

    def load() -> CausalLM:
        return CausalLM.from_pretrained(options.model, dtype=torch.float32, keep_quantized=False)

    before = load()
    tokenizer = load_tokenizer(options.model, before.config.to_dict())
    seq_len, _ = check_window(before.context_limit, options.length, None)
    windows = text_windows(
        before, tokenizer, options.data, tokens=options.tokens, length=seq_len, seed=0
    )
    rows = []
    vocab = before.config.vocab_size
    with token_dataset(options.data, tokenizer, vocab) as dataset:

        def measure(name: str, after: CausalLM, bits: float, seconds: float) -> None:
            found = compare(
                before, after, dataset, seq_len=seq_len, stride=seq_len, max_tokens=options.heldout
            )
            rows.append({"name": name, "bits_per_weight": bits, "seconds": seconds,
                         "loss_percent": 100 * found.loss, **found.figures()})  # fmt: skip
            print(
                f"| {name} | {bits:.2f} | {found.bits_per_byte:.4f} | {100 * found.loss:+.2f} % |"
                f" {found.kl:.4f} | {100 * found.greedy_agreement:.1f} % | {seconds:.0f} |",
                flush=True,
            )

        print("| | bits per weight | bits per byte | change | KL | agreement | processor s |")
        print("|---|---|---|---|---|---|---|")
        measure("unquantized", before, 8.0 * before.dtype.itemsize, 0.0)
        for grid in options.grids:
            group_size, symmetric = GRIDS[grid]
            for method in options.methods:
                model, began = load(), time.process_time()
                if method == "plain":
                    plain(model, group_size, symmetric)
                else:
                    fastlm.quantize(
                        model, "w4a16", group_size=group_size, symmetric=symmetric,
                        method=method.partition(",")[0], iterations=options.iterations,
                        calibration=None if method == "rtn" else windows,
                    )  # fmt: skip
                seconds = time.process_time() - began
                assert any(isinstance(m, QuantizedLinear) for m in model.modules())
                measure(f"{method}, {grid}", model, true_bits(model)["bits_per_weight"], seconds)
        for entry in options.oracle:
            name, _, folder = entry.partition("=")
            told = json.loads((Path(folder) / "oracle.json").read_text())
            other = CausalLM.from_pretrained(folder, dtype=torch.float32)
            measure(name, other, told["bits_per_weight"], told["seconds"])
    save(options.json, {
        "quantization": rows, "model": Path(options.model).name, "tokens": options.tokens,
        "iterations": options.iterations, "length": seq_len,
        "threads": torch.get_num_threads(), "machine": machine(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
