"""Write a GGUF file with TinyLlama's shape, 1.1 billion weights, all random: to measure speed.

    python bench/peers/random_gguf.py FILE.gguf [--layers 22]
    python bench/peers/decode.py --model FILE.gguf --users 1 8 --rounds 2

Matrices are Q4_1 and the head is Q8_0, as in SmolLM2's file, whose tokenizer is copied: all engines
read the same file. Codes are uniform and scales constant, which gives weights of standard deviation
0.02. Tensors are written one by one, so that memory for the largest is enough.
"""

import argparse
from pathlib import Path

import bench_path  # noqa: F401
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from harness import positive

from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.sources.packages import default_cache, fetch_model

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, CONTEXT = 2048, 5632, 22, 32, 4, 2048
BLOCK = {Kind.Q4_1: 20, Kind.Q8_0: 34}  # bytes of a block of 32 weights
STD = 0.02
SPREAD = {Kind.Q4_1: 4.61, Kind.Q8_0: 73.9}  # standard deviation of codes 0..15, and of -128..127


def blocks(draw: np.random.Generator, kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Return (rows, bytes of a row) uint8: random codes, the same scale and offset everywhere."""
    data = draw.integers(0, 256, (rows * columns // 32, BLOCK[kind]), dtype=np.uint8)
    scale = STD / SPREAD[kind]
    head = [scale, -7.5 * scale] if kind is Kind.Q4_1 else [scale]
    data[:, : 2 * len(head)] = np.array(head, np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def tensors(vocab: int, layers: int) -> dict[str, tuple[int, int, Kind] | int]:
    """Return (rows, columns, format) of each matrix, or the length of a norm, by name."""
    kv = HIDDEN // HEADS * KV_HEADS
    shapes_by_name: dict[str, tuple[int, int, Kind] | int] = {}
    shapes_by_name["token_embd.weight"] = (vocab, HIDDEN, Kind.Q4_1)
    shapes_by_name["output.weight"] = (vocab, HIDDEN, Kind.Q8_0)
    shapes_by_name["output_norm.weight"] = HIDDEN
    shapes = {
        "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    for layer in range(layers):
        for name, (rows, columns) in shapes.items():
            shapes_by_name[f"blk.{layer}.{name}.weight"] = (rows, columns, Kind.Q4_1)
        for name in ("attn_norm", "ffn_norm"):
            shapes_by_name[f"blk.{layer}.{name}.weight"] = HIDDEN
    return shapes_by_name


def write(path: Path, layers: int) -> None:
    donor = GGUFFile(fetch_model("model:smollm2", default_cache()))
    vocabulary = {k: v for k, v in donor.metadata.items() if k.startswith("tokenizer.")}
    vocab = len(vocabulary["tokenizer.ggml.tokens"])
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(HIDDEN)
    out.add_feed_forward_length(INNER)
    out.add_block_count(layers)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(HIDDEN // HEADS)
    out.add_vocab_size(vocab)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    for key, value in vocabulary.items():
        field = value.tolist() if isinstance(value, np.ndarray) else value
        kind = gguf.GGUFValueType.get_type(field)
        if kind is gguf.GGUFValueType.ARRAY:
            out.add_array(key, field)
        elif key.endswith("_id"):
            out.add_uint32(key, field)
        else:
            out.add_key_value(key, field, kind)
    expected = tensors(vocab, layers)
    for name, shape in expected.items():
        if isinstance(shape, int):
            out.add_tensor_info(name, (shape,), np.dtype(np.float32), 4 * shape)
        else:
            rows, columns, kind = shape
            row = columns // 32 * BLOCK[kind]
            out.add_tensor_info(name, (rows, row), np.dtype(np.uint8), rows * row, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    for shape in expected.values():
        if isinstance(shape, int):
            out.write_tensor_data(np.ones(shape, np.float32))
        else:
            out.write_tensor_data(blocks(draw, shape[2], shape[0], shape[1]))
    out.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, metavar="FILE.gguf")
    parser.add_argument("--layers", type=positive, default=LAYERS)
    options = parser.parse_args()
    write(options.path, options.layers)
    shapes = tensors(49152, options.layers).values()
    weights = sum(s if isinstance(s, int) else s[0] * s[1] for s in shapes)
    size = options.path.stat().st_size / 2**20
    print(f"{options.path}: {weights / 1e9:.2f} billion weights, {size:.0f} MiB")


if __name__ == "__main__":
    main()
