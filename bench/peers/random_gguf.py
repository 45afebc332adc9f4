"""Write a GGUF file with random weights in the shape of a known model: to measure speed.

    python bench/peers/random_gguf.py FILE.gguf [--shape llama-2-7b] [--layers 22] [--type Q4_K_M]
    python bench/peers/decode.py --model FILE.gguf --users 1 8 --rounds 2

Shapes are TinyLlama's (1.1 billion weights, 0.6 GB as Q4_0) and Llama 2's (7 billion, 3.8 GB).

Matrices are written as Q8_0, and llama.cpp's llama-quantize makes `--type` of them, with its own
choice for the head and, in Q4_K_M, for some layers. SmolLM2's tokenizer is copied: all engines
read the same file. Codes are uniform and scales constant, which gives weights of standard deviation
0.02. Tensors are written one by one, so that memory for the largest is enough.
"""

import argparse
import tempfile
from pathlib import Path
from typing import NamedTuple

import bench_path  # noqa: F401
import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf_types import KINDS, quantize
from harness import positive

from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.sources.packages import default_cache, fetch_model

CONTEXT = 2048


class Shape(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "tinyllama": Shape(2048, 5632, 22, 32, 4),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
}
BLOCK = 34  # bytes of 32 weights of Q8_0
SCALE = 0.02 / 73.9  # deviation of the weights / that of codes -128..127


def blocks(draw: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Return (rows, bytes of a row) uint8: random codes, the same scale everywhere."""
    data = draw.integers(0, 256, (rows * columns // 32, BLOCK), dtype=np.uint8)
    data[:, :2] = np.array([SCALE], np.float16).view(np.uint8)
    return data.reshape(rows, -1)


def tensors(vocab: int, shape: Shape) -> dict[str, tuple[int, int] | int]:
    """Return (rows, columns) of each matrix, or the length of a norm, by name."""
    hidden, inner = shape.hidden, shape.inner
    kv = hidden // shape.heads * shape.kv_heads
    sizes: dict[str, tuple[int, int] | int] = {}
    sizes["token_embd.weight"] = (vocab, hidden)
    sizes["output.weight"] = (vocab, hidden)
    sizes["output_norm.weight"] = hidden
    matrices = {
        "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }  # fmt: skip
    for layer in range(shape.layers):
        for name, (rows, columns) in matrices.items():
            sizes[f"blk.{layer}.{name}.weight"] = (rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            sizes[f"blk.{layer}.{name}.weight"] = hidden
    return sizes


def write(path: Path, shape: Shape) -> None:
    donor = GGUFFile(fetch_model("model:smollm2", default_cache()))
    vocabulary = {k: v for k, v in donor.metadata.items() if k.startswith("tokenizer.")}
    vocab = len(vocabulary["tokenizer.ggml.tokens"])
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(shape.hidden)
    out.add_feed_forward_length(shape.inner)
    out.add_block_count(shape.layers)
    out.add_head_count(shape.heads)
    out.add_head_count_kv(shape.kv_heads)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_rope_dimension_count(shape.hidden // shape.heads)
    out.add_vocab_size(vocab)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    for key, value in vocabulary.items():
        field = value.tolist() if isinstance(value, np.ndarray) else value
        kind = gguf.GGUFValueType.get_type(field)
        if kind is gguf.GGUFValueType.ARRAY:
            out.add_array(key, field)
        elif key.endswith("_id"):
            out.add_uint32(key, field)
        else:
            out.add_key_value(key, field, kind)
    expected = tensors(vocab, shape)
    for name, size in expected.items():
        if isinstance(size, int):
            out.add_tensor_info(name, (size,), np.dtype(np.float32), 4 * size)
        else:
            rows, columns = size
            row = columns // 32 * BLOCK
            kind = {"raw_dtype": Kind.Q8_0}
            out.add_tensor_info(name, (rows, row), np.dtype(np.uint8), rows * row, **kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    for size in expected.values():
        if isinstance(size, int):
            out.write_tensor_data(np.ones(size, np.float32))
        else:
            out.write_tensor_data(blocks(draw, *size))
    out.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, metavar="FILE.gguf")
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--type", choices=KINDS, default="Q4_0")
    parser.add_argument("--layers", type=positive, help="default: the shape's")
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.layers:
        shape = shape._replace(layers=options.layers)
    if options.type == "Q8_0":
        write(options.path, shape)
    else:
        with tempfile.TemporaryDirectory(dir=options.path.absolute().parent) as folder:
            write(Path(folder) / "q8_0.gguf", shape)
            quantize(Path(folder) / "q8_0.gguf", options.path, options.type)
    sizes = tensors(49152, shape).values()
    weights = sum(s if isinstance(s, int) else s[0] * s[1] for s in sizes)
    size = options.path.stat().st_size / 2**20
    print(f"{options.path}: {weights / 1e9:.2f} billion weights, {size:.0f} MiB")


if __name__ == "__main__":
    main()
