"""Quantized folders of other programs: bitwise equal weights, and their description."""

import json
import warnings

import numpy as np
import packed_models as make
import pytest
import torch

from fastlm.checkpoint import gptq
from fastlm.checkpoint.folder import load_state
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.ops.quantized_weight import QuantizedWeight

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
V1, V2 = GPTQ | {"checkpoint_format": "gptq"}, GPTQ | {"checkpoint_format": "gptq_v2"}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}


def compressed(name: str, group: int | None = 32, **inputs) -> dict:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **inputs}}
    return {"quant_method": "compressed-tensors", "format": name, "config_groups": groups}


INT8 = {"input_activations": {"num_bits": 8, "type": "int", "strategy": "token"}}
PACK = compressed("pack-quantized")
# case -> (quantization_config, packer, its options, description)
CASES = {
    "gptq-v1": (V1, make.gptq, {}, "GPTQ v1 zero points, 4 bits, groups of 32"),
    "gptq-v2": (V2, make.gptq, {"version": 2}, "GPTQ v2 zero points, 4 bits, groups of 32"),
    "gptq-v1-asym": (V1, make.gptq, {"symmetric": False}, "GPTQ v1 zero points, 4 bits"),
    "gptq-v2-asym": (V2, make.gptq, {"symmetric": False, "version": 2}, "GPTQ v2 zero points, 4"),
    "gptq-unnamed": (GPTQ, make.gptq, {"version": 2}, "GPTQ v2 zero points, 4 bits"),
    "gptq-2": (V1, make.gptq, {"bits": 2, "symmetric": False}, "GPTQ v1 zero points, 2 bits"),
    "gptq-8": (V1, make.gptq, {"bits": 8, "symmetric": False}, "GPTQ v1 zero points, 8 bits"),
    "auto-round": (
        ROUND | {"packing_format": "auto_round:gptqmodel"}, make.gptq, {"version": 2}, "GPTQ v2"
    ),
    "auto-round-awq": (ROUND | {"packing_format": "auto_round:auto_awq"}, make.awq, {}, "AWQ gemm"),
    "awq": (AWQ, make.awq, {}, "AWQ gemm, 4 bits, groups of 32"),
    "pack-4": (PACK, make.pack_quantized, {}, "compressed-tensors pack-quantized 4 b"),
    "pack-4-asym": (PACK, make.pack_quantized, {"symmetric": False}, "pack-quantized 4 bits"),
    "pack-8-asym": (
        PACK, make.pack_quantized, {"bits": 8, "symmetric": False}, "pack-quantized 8 bits"
    ),
    "pack-channel": (
        compressed("pack-quantized", None), make.pack_quantized, {"group": 4096},
        "groups of 128",
    ),
    "int8": (compressed("int-quantized", None, **INT8), make.int_quantized, {}, "int-quantized 8"),
    "mxfp4": (
        compressed("mxfp4-pack-quantized"), make.floats, {"kind": "mxfp4"},
        "compressed-tensors MXFP4, stored in int8",
    ),
    "nvfp4": (
        compressed("nvfp4-pack-quantized", 16), make.floats, {"kind": "nvfp4"},
        "compressed-tensors NVFP4, stored in int8",
    ),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, make.floats, {"kind": "modelopt"},
        "ModelOpt NVFP4, stored in int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exact(case, tmp_path):
    entry, pack, options, description = CASES[case]
    want = make.write(tmp_path, entry, pack, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing here is mislabelled
        config, tensors = load_state(tmp_path)
    actual = dict(tensors)
    assert description in config["quantization_config"]["description"]
    assert actual.keys() == want.keys()
    for name, weight in actual.items():
        packed = "layers" in name and weight.dim() == 2 if torch.is_tensor(weight) else True
        assert isinstance(weight, QuantizedWeight) == packed
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize()
        np.testing.assert_array_equal(weight.double().numpy(), want[name], err_msg=name)


def write_modelopt(folder, quantization) -> dict[str, np.ndarray]:
    """ModelOpt's folder with an entry in hf_quant_config.json alone."""
    entry, pack, options, _ = CASES["modelopt"]
    want = make.write(folder, entry, pack, **options)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    export_config = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": quantization,
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(export_config))
    return want


NVFP4 = {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16}


def test_the_config_file_of_modelopt(tmp_path):
    want = write_modelopt(tmp_path / "m", {**NVFP4, "exclude_modules": ["lm_head"]})
    config, tensors = load_state(tmp_path / "m")
    assert config["quantization_config"]["description"] == "ModelOpt NVFP4, stored in int8"
    for name, weight in tensors:
        assert isinstance(weight, QuantizedWeight) == ("layers" in name and "norm" not in name)
        if isinstance(weight, QuantizedWeight):
            weight = weight.dequantize()
        np.testing.assert_array_equal(weight.double().numpy(), want[name], err_msg=name)
    CausalLM.from_pretrained(tmp_path / "m", keep_quantized=False).save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m/hf_quant_config.json").exists()  # no longer true
    load_state(tmp_path / "m")
    for export_config, text in [
        ({**NVFP4, "quant_algo": "FP8"}, "quant_algo: expected NVFP4 for modelopt, got 'FP8'"),
        (None, "hf_quant_config.json: quantization: expected an object, got None"),
    ]:
        write_modelopt(tmp_path / "bad", export_config)
        with pytest.raises(InputError, match=text):
            load_state(tmp_path / "bad")


def test_symmetric_weights_keep_their_dtype(tmp_path):
    for pack in (make.gptq, make.pack_quantized):
        make.write(tmp_path, V1 if pack is make.gptq else PACK, pack)
        weights = [w for _, w in load_state(tmp_path)[1] if isinstance(w, QuantizedWeight)]
        assert {(w.bits, w.scales.dtype, w.zeros) for w in weights} == {(4, torch.float16, None)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_mislabelled_version_is_reported(tmp_path, version, symmetric, bits):
    entry = {1: V2, 2: V1}[version]
    want = make.write(tmp_path, entry, make.gptq, version=version, symmetric=symmetric, bits=bits)
    text = rf"GPTQ v{version} zero points \(file says v{3 - version}\), {bits} bits"
    with pytest.warns(UserWarning, match=text):
        _, tensors = load_state(tmp_path)
    for name, weight in tensors:
        if isinstance(weight, QuantizedWeight):
            np.testing.assert_array_equal(weight.dequantize().double().numpy(), want[name])


def test_weights_that_do_not_tell_the_version(tmp_path):
    """With weights of a mean of half a step the file's version is used, and the description says
    so.
    """

    def shifted(w, **options):
        parts, value = make.gptq(w + 0.0137, symmetric=False, **options)
        return parts, value

    want = make.write(tmp_path, V2, shifted, version=2)
    config, tensors = load_state(tmp_path)
    assert "v2 zero points, 4 bits" in config["quantization_config"]["description"]
    for name, weight in tensors:
        if isinstance(weight, QuantizedWeight):
            np.testing.assert_array_equal(weight.dequantize().double().numpy(), want[name])
    assert "not determined by the weights" in config["quantization_config"]["description"]


@pytest.mark.parametrize("pack", [make.gptq, make.pack_quantized])
def test_act_order_is_dequantized_in_the_dtype_of_the_scales(pack, tmp_path):
    want = make.write(tmp_path, V1 if pack is make.gptq else PACK, pack, act_order=True)
    config, tensors = load_state(tmp_path)
    for name, weight in tensors:
        assert weight.dtype == torch.float16
        rounded = torch.from_numpy(want[name]).half()
        assert torch.equal(weight, rounded), name
    if pack is make.gptq:
        assert "14 weights with desc_act dequant" in config["quantization_config"]["description"]


def test_zero_points_that_tell_the_version_are_all_that_is_read(tmp_path, monkeypatch):
    from fastlm.checkpoint.tensor_folder import TensorFolder

    read, get = [], TensorFolder.get
    monkeypatch.setattr(TensorFolder, "get", lambda self, n: read.append(n) or get(self, n))
    make.write(tmp_path / "a", V1, make.gptq)
    load_state(tmp_path / "a")
    assert not [name for name in read if name.endswith("qweight")]
    make.write(tmp_path / "b", V1, make.gptq, symmetric=False)
    load_state(tmp_path / "b")
    assert len([name for name in read if name.endswith("qweight")]) == 14


def test_zero_points_of_zero_borrow_from_their_neighbours():
    zeros = np.array([[0, 3, 0, 0, 15, 8, 7, 0]])
    words = make.words(zeros, 4).view(np.uint32) - np.uint32(0x11111111)
    actual = gptq.zero_points(torch.from_numpy(words.view(np.int32)), 4, 1)
    assert actual.tolist() == zeros.tolist()


@pytest.mark.parametrize("case", ["gptq-v1-asym", "awq", "pack-4", "int8", "nvfp4"])
def test_the_model_computes_with_them(case, tmp_path):
    """Equal to a dense model of the same weights; saved and loaded again, it is the same model."""
    entry, pack, options, description = CASES[case]
    want = make.write(tmp_path / "m", entry, pack, **options)
    model = CausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert description in model.config.extra["quantization_config"]["description"]
    rounds = {m.act_bits for m in model.modules() if hasattr(m, "qdata")}
    assert rounds == ({8} if case == "int8" else {16})
    dense = CausalLM(model.config, seed=0)
    dense.load_state_dict({name: torch.from_numpy(w).float() for name, w in want.items()})
    ids = torch.arange(24)[None] % 96
    with torch.no_grad():
        actual, expected = model(ids).logits, dense(ids).logits
    tolerance = 0.03 if case == "int8" else 1e-5  # int8: activations are rounded
    assert (actual - expected).norm() <= tolerance * expected.norm()
    model.save_pretrained(tmp_path / "again")
    reloaded = CausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(reloaded(ids).logits, actual)


def broken(tmp_path, entry, pack, change, **options):
    """The model with tensors changed by ``change(name, tensor)`` -> tensor or None."""
    from safetensors.torch import load_file, save_file

    make.write(tmp_path, entry, pack, **options)
    path = tmp_path / "model.safetensors"
    tensors = {n: change(n, t) for n, t in load_file(path).items()}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)
    return tmp_path


@pytest.mark.parametrize(
    ("case", "part", "change", "message"),
    [
        ("gptq-v1", "qzeros", lambda t: None, "expected a tensor .*qzeros, got none"),
        ("gptq-v1", "qzeros", lambda t: t[:, :-1], "expected zero points of 2, 4 or 8 bits"),
        ("gptq-v1", "scales", lambda t: t.int(), "scales: expected F16 or BF16 or F32"),
        ("gptq-v1", "g_idx", lambda t: t + 7, "g_idx: expected groups from 0 to"),
        ("gptq-v1", "qweight", lambda t: t[:-1], r"g_idx: expected I32 \(120\)"),
        ("gptq-v1", "bias", lambda t: t + 1, "bias"),
        ("awq", "qweight", lambda t: t[:, :-1], r"scales: expected .* \(any, \d+\)"),
        ("pack-4", "weight_shape", lambda t: t * 2, "weight_shape: expected"),
        ("pack-4", "weight_shape", lambda t: t - 2**40, "weight_shape: expected"),
        ("nvfp4", "weight_scale", lambda t: t[:, :-1], "weight_scale: expected scales of groups"),
        ("mxfp4", "weight_scale", lambda t: t | 255, "exponents below 255, got 255"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(case, part, change, message, tmp_path):
    entry, pack, options, _ = CASES[case]

    def changed(name, tensor):
        return change(tensor) if name.endswith(f".{part}") else tensor

    path = broken(tmp_path, entry, pack, changed, **options)
    with pytest.raises(InputError, match=message):
        CausalLM.from_pretrained(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (AWQ | {"version": "gemv"}, "version: expected gemm for AWQ, got 'gemv'"),
        (PACK | {"format": "float-quantized"}, "format: expected one of pack-quantized"),
        (PACK | {"config_groups": 3}, None),
        (PACK | {"transform_config": {}}, None),
        (
            PACK | {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}},
            "transform_config: expected none .weights without rotations., got some",
        ),
        (GPTQ | {"quant_method": "bitsandbytes"}, "expected quant_method fastlm, gptq.*'bitsandb"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo: expected NVFP4"),
        ("awq", "expected quant_method fastlm, gptq.* got 'awq'"),
        (AWQ, "expected tensors of awq"),
        (V1, "expected tensors of gptq"),
    ],
)
def test_entries_that_do_not_fit(entry, message, tmp_path):
    make.write(tmp_path, entry, make.pack_quantized)
    if message is None:
        load_state(tmp_path)
        return
    with pytest.raises(InputError, match=message):
        load_state(tmp_path)


def test_activations_of_some_int8_weights(tmp_path):
    def eight(**inputs):
        return {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int"}, **inputs}

    entry = compressed("int-quantized")
    groups = {"a": eight(**INT8), "b": eight(input_activations=None)}
    make.write(tmp_path, entry | {"config_groups": groups}, make.int_quantized)
    with pytest.raises(InputError, match="input_activations of 8 bits for all 8-bit weights"):
        load_state(tmp_path)


def test_the_entry_is_not_needed_to_find_the_group(tmp_path):
    """What config.json says of bits and groups gives way to the shapes."""
    want = make.write(tmp_path, GPTQ | {"bits": 3, "group_size": "many"}, make.gptq)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 3
    name = "model.layers.0.mlp.down_proj.weight"
    weight = dict(load_state(tmp_path)[1])[name]
    np.testing.assert_array_equal(weight.dequantize().double().numpy(), want[name])


def test_info_describes_the_quantization(tmp_path):
    from test_cli import call

    make.write(tmp_path, V2, make.gptq)
    with pytest.warns(UserWarning, match="file says v2"):
        output = call("info", "--model", tmp_path).stdout
    assert "quantization: GPTQ v1 zero points (file says v2), 4 bits, groups of 32" in output
    assert "model_type: llama" in output and "42 I32" in output
