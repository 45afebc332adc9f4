"""Compare fastlm with the compressed-tensors package, in both directions. Run by hand:

    pip install --no-deps --target LIBRARY compressed-tensors loguru
    PYTHONPATH=LIBRARY .venv/bin/python tests/support/compressed_tensors_check.py [EXPORTED ...]

It packs random weights with the package in every format that fastlm reads, and compares the weights
that the package unpacks with those that fastlm reads. For folders that `fastlm export` wrote it
compares every weight, and the logits of transformers' model with fastlm's.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from fastlm.checkpoint.compressed_tensors import read
from fastlm.checkpoint.folder import load_state
from fastlm.checkpoint.tensor_folder import TensorFolder
from fastlm.model.causal_lm import CausalLM
from fastlm.ops.quantized_weight import QuantizedWeight

CASES = {  # case -> format, arguments of the weights
    "int4": ("pack-quantized", {"num_bits": 4, "group_size": 32, "strategy": "group"}),
    "int4-asym": (
        "pack-quantized",
        {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": False},
    ),
    "int8": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8-plain": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"},
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "group_size": 32, "strategy": "group"},
    ),
}


def packed(name: str, options: dict) -> tuple[dict[str, torch.Tensor], QuantizationScheme]:
    """Pack a random weight (48, 128) with the package."""
    arguments = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    torch.manual_seed(0)
    w = torch.randn(48, 128) * 0.1
    groups = w.unflatten(1, (-1, options.get("group_size", 128)))
    top = 6.0 if options.get("type") == "float" else 2 ** (options["num_bits"] - 1) - 1
    scale = groups.abs().amax(-1) / top
    state = {"weight": w}
    if name == "nvfp4":
        factor = torch.tensor([2688.0 / w.abs().max()])
        state["weight_global_scale"] = factor
        scale = (scale * factor).to(torch.float8_e4m3fn).float()
    if name == "mxfp4":
        scale = torch.exp2(torch.log2(scale).ceil())
    state["weight_scale"] = scale
    zeros = torch.zeros_like(scale, dtype=torch.int8)
    if not arguments.symmetric:
        zeros = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    state["weight_zero_point"] = zeros
    return BaseCompressor.get_value_from_registry(CASES[name][0]).compress(state, scheme), scheme


def compare_packing(name: str) -> bool:
    file_format, options = CASES[name]
    tensors, scheme = packed(name, options)
    compressor = BaseCompressor.get_value_from_registry(file_format)
    expected = compressor.decompress(dict(tensors), scheme)["weight"].float()
    with tempfile.TemporaryDirectory() as folder:
        state = {f"layer.{part}": t.contiguous() for part, t in tensors.items()}
        save_file(state, Path(folder) / "model.safetensors")
        tensor_folder = TensorFolder(Path(folder))
        weights = read({"format": file_format}, tensor_folder, Path(folder) / "config.json")
        loaded = tensor_folder.load("layer.weight", weights.weights["layer.weight"])
    assert isinstance(loaded, QuantizedWeight)
    off = (loaded.dequantize() - expected).abs().max().item()
    print(f"{name}: largest difference {off:.3g} of weights up to {expected.abs().max():.3g}"
          f" ({expected.dtype}; {weights.description})")  # fmt: skip
    return off <= 2**-7 * expected.abs().max().item()  # the package unpacks in the dtype of scales


def compare_folder(folder: Path) -> bool:
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = load_file(folder / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    groups = [QuantizationScheme(**g) for g in config["config_groups"].values()]
    same, ours = True, dict(load_state(folder)[1])
    for name, weight in ours.items():
        module = name.removesuffix(".weight")
        if not isinstance(weight, QuantizedWeight):
            continue
        scheme = next(g for g in groups if g.targets == ["Linear"] or module in g.targets)
        parts = {n.rpartition(".")[2]: t for n, t in stored.items() if n.startswith(f"{module}.")}
        parts["weight_scale"] = parts["weight_scale"].float()
        expected = compressor.decompress(parts, scheme)["weight"]
        same &= torch.equal(weight.dequantize(), expected)
    print(f"{folder.name}: weights {'equal' if same else 'differ'}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = model(ids).logits
        mine = CausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    off = ((theirs - mine).norm() / mine.norm()).item()
    equal = bool((theirs.argmax(-1) == mine.argmax(-1)).all())
    print(f"{folder.name}: logits differ by {off:.2g}, greedy tokens {'equal' if equal else '!='}")
    return same and equal


if __name__ == "__main__":
    good = [compare_packing(name) for name in CASES]
    good += [compare_folder(Path(folder)) for folder in sys.argv[1:]]
    sys.exit(not all(good))
