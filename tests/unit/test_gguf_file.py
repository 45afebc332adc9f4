"""GGUF: block formats against the gguf package, full models against transformers, broken files."""

import struct

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import write_gguf

import fastlm
from fastlm import backend
from fastlm.checkpoint.folder import load_state, save_hf
from fastlm.checkpoint.gguf_blocks import UNPACK, unpack
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.checkpoint.gguf_models import gguf_config
from fastlm.errors import InputError
from fastlm.export.gguf_write import save_gguf
from fastlm.model.load import load_for_inference, load_model
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant import quantize

HALVES = {  # byte offsets of the float16 fields in a block
    Kind.Q4_0: [0],
    Kind.Q5_0: [0],
    Kind.Q8_0: [0],
    Kind.Q6_K: [208],
    Kind.Q2_K: [80, 82],
    Kind.Q3_K: [108],
    Kind.IQ4_NL: [0],
    Kind.IQ4_XS: [0],
    Kind.MXFP4: [],  # scales of any bits
    Kind.NVFP4: [],
    **{kind: [0, 2] for kind in (Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K)},
}
kinds = pytest.mark.parametrize("kind", UNPACK, ids=lambda k: k.name)


def random_rows(kind: Kind, rows: int, blocks: int, spread: float = 1.0) -> np.ndarray:
    """Rows of random bits with float16 scales of N(0, 1) * 2**U(-spread, spread)."""
    rng = np.random.default_rng(0)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = rng.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        scale = rng.standard_normal(len(raw)) * 2.0 ** rng.uniform(-spread, spread, len(raw))
        raw[:, at : at + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
    if kind is Kind.MXFP4:  # no scales below 2^-126, which are zero to a kernel
        raw[:, 0] = np.clip(raw[:, 0], 8, 240)
    return raw.reshape(rows, blocks * size)


@kinds
def test_random_blocks_equal_the_gguf_package(kind):
    raw = random_rows(kind, 7, 3)
    weight = unpack(raw, kind)
    block = gguf.GGML_QUANT_SIZES[kind][0]
    assert weight.shape == (7, 3 * block)
    assert (weight.bits, weight.group_size) == UNPACK[kind][1:]
    expected, actual = gguf.quants.dequantize(raw, kind), weight.dequantize().numpy()
    if kind not in (Kind.Q4_K, Kind.Q4_1):
        np.testing.assert_array_equal(actual, expected)
        return
    # The offset (m + 8 d, 8 d - m) is rounded to float32 if 8 d and m differ much in size, which
    # costs half an ulp of the offset, and the final sum half an ulp of its own.
    offset = np.repeat(weight.zeros.numpy(), weight.group_size, axis=1)
    ulp = np.spacing(np.maximum(abs(offset), abs(expected)))
    assert (abs(actual - expected) <= ulp).all()
    assert (actual == expected).mean() > 0.99


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_K], ids=lambda k: k.name)
def test_offset_rounding_is_at_most_an_ulp(kind):
    """Scale and offset differ by factors up to 2**20."""
    raw = random_rows(kind, 50, 4, spread=10)
    weight = unpack(raw, kind)
    expected, actual = gguf.quants.dequantize(raw, kind), weight.dequantize().numpy()
    offset = np.repeat(weight.zeros.numpy(), weight.group_size, axis=1)
    assert (abs(actual - expected) <= np.spacing(np.maximum(abs(offset), abs(expected)))).all()


QUANTIZABLE = [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]


@pytest.mark.parametrize("kind", QUANTIZABLE, ids=lambda k: k.name)
def test_quantized_normal_weights_are_exact(kind):
    w = np.random.default_rng(1).standard_normal((33, 96)).astype(np.float32) * 0.02
    raw = gguf.quants.quantize(w, kind)
    actual = unpack(raw, kind).dequantize().numpy()
    np.testing.assert_array_equal(actual, gguf.quants.dequantize(raw, kind))
    assert abs(actual - w).max() < 0.02  # and it is the original weight, within one step of 4 bits


def test_four_bit_layout():
    """Column 2i is in the low nibble, 2i+1 in the high one."""
    raw = np.zeros((1, 18), np.uint8)
    raw[0, :2] = np.array([1.0], np.float16).view(np.uint8)
    raw[0, 2:] = np.arange(16) | (15 - np.arange(16)) << 4  # columns 0..15 and 16..31
    weight = unpack(raw, Kind.Q4_0)
    values = [*range(-8, 8), *range(7, -9, -1)]
    assert weight.dequantize()[0].tolist() == values
    nibbles = [v + 8 for v in values]
    assert weight.qdata[0].tolist() == [a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2])]


@kinds
def test_empty_rows(kind):
    assert unpack(random_rows(kind, 0, 2), kind).dequantize().shape[0] == 0


def test_plain_types(tmp_path):
    w = np.random.default_rng(2).standard_normal((5, 3)).astype(np.float32)
    bf16 = torch.from_numpy(w).bfloat16()
    path = write_gguf(
        tmp_path / "m.gguf",
        {
            "f32": w,
            "f16": w.astype(np.float16),
            "bf16": (bf16.view(torch.uint8).numpy(), Kind.BF16),
            "cube": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        },
    )
    file = GGUFFile(path)
    tensors = {name: file.load(name) for name in file.tensors}
    assert torch.equal(tensors["f32"], torch.from_numpy(w))
    assert torch.equal(tensors["f16"], torch.from_numpy(w).half())
    assert torch.equal(tensors["bf16"], bf16) and tensors["bf16"].dtype == torch.bfloat16
    assert torch.equal(tensors["cube"], torch.arange(24.0).reshape(2, 3, 4))
    tensors["f32"].add_(1)  # it owns its memory, which is not the file's


def test_metadata_equals_the_gguf_reader(tmp_path):
    values = {
        "a": 1,
        "b": -0.5,
        "c": True,
        "d": "漢",
        "e": [1, 2, 3],
        "f": [0.5, -1.0],
        "g": ["x", "é"],
    }
    path = write_gguf(tmp_path / "m.gguf", {"t": np.zeros((2, 32), np.float32)}, **values)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    expected = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    actual = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()}
    assert actual == expected
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset


# full models

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LONG = {
    "rope_type": "longrope",
    "long_factor": [1.0 + i for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)],
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
MODELS = {  # case -> (GGUF architecture, transformers config class, differences from SMALL)
    "llama": ("llama", "LlamaConfig", {"rope_theta": 5e4}),
    "llama-bias": ("llama", "LlamaConfig", {"attention_bias": True}),
    "llama-head": ("llama", "LlamaConfig", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama3": ("llama", "LlamaConfig", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "llama-linear": (
        "llama",
        "LlamaConfig",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "mistral": ("llama", "MistralConfig", {"sliding_window": 5}),
    "qwen2": ("qwen2", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", "Qwen2Config", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", "Qwen3Config", {"head_dim": 32}),
    "gemma2": ("gemma2", "Gemma2Config", GEMMA | {"attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3", "Gemma3TextConfig", GEMMA | {"num_hidden_layers": 7}),
    "olmo2": ("olmo2", "Olmo2Config", {}),
    "phi3": ("phi3", "Phi3Config", {"sliding_window": 6}),
    "phi3-long": (
        "phi3",
        "Phi3Config",
        {"rope_scaling": LONG, "original_max_position_embeddings": 64},
    ),
    "smollm3": ("smollm3", "SmolLM3Config", {"num_hidden_layers": 5, "use_sliding_window": False}),
}


def make_model(case: str):
    import transformers

    architecture, class_name, changes = MODELS[case]
    config = getattr(transformers, class_name)(**{**SMALL, **changes})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter += 0.1 * torch.randn_like(parameter)  # initially ones and zeros
    return architecture, model


def convert(architecture: str, model, path, kind: Kind | None = None):
    """Write ``model`` as llama.cpp's converter does, its layers' matrices in format ``kind``."""
    config = model.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    layers = config.num_hidden_layers
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w = tensor.float().numpy()
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            h = heads if "q_proj" in name else kv
            w = w.reshape(h, 2, w.shape[0] // h // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            w = w + 1
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind and "layers" in name and w.ndim == 2:
            tensors[target] = (gguf.quants.quantize(w, kind), kind)
        else:
            tensors[target] = w
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = dict(config.rope_parameters)
    if architecture == "gemma3":
        rope = rope["full_attention"]
    metadata = {
        "block_count": layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention__head_count": heads,
        "attention__head_count_kv": kv,
        "attention__layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention__key_length": head_dim,
        "rope__dimension_count": head_dim,
        "rope__freq_base": float(rope["rope_theta"]),
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__padding_token_id": 0,
    }
    if getattr(config, "sliding_window", None):
        metadata["attention__sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        metadata["attn_logit_softcapping"] = config.attn_logit_softcapping
        metadata["final_logit_softcapping"] = config.final_logit_softcapping
    if rope["rope_type"] in ("linear", "yarn"):
        metadata |= {
            "rope__scaling__type": rope["rope_type"],
            "rope__scaling__factor": rope["factor"],
        }
        if original := rope.get("original_max_position_embeddings"):
            metadata["rope__scaling__original_context_length"] = original
    if rope["rope_type"] == "llama3":
        frequency = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
        wave, old = 2 * np.pi / frequency, rope["original_max_position_embeddings"]
        smooth = (old / wave - 1) / (4 - 1)
        mid = 1 / ((1 - smooth) / rope["factor"] + smooth)
        table = np.where(wave < old / 4, 1, np.where(wave > old / 1, rope["factor"], mid))
        tensors["rope_freqs.weight"] = table.astype(np.float32)
    if rope["rope_type"] == "longrope":
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
        metadata["rope__scaling__original_context_length"] = config.original_max_position_embeddings
    return write_gguf(path, tensors, architecture, **metadata)


@pytest.mark.parametrize("case", MODELS)
def test_model_survives_the_conversion(case, tmp_path):
    """transformers -> GGUF as written by llama.cpp -> fastlm -> HF folder -> the same logits."""
    from transformers import AutoModelForCausalLM

    architecture, model = make_model(case)
    config, tensors = load_state(convert(architecture, model, tmp_path / "m.gguf"))
    state = dict(tensors)
    theirs = model.state_dict()
    if config["tie_word_embeddings"]:
        del theirs["lm_head.weight"]
    assert state.keys() == theirs.keys()
    for name, tensor in state.items():
        if architecture.startswith("gemma") and "norm" in name:  # (w + 1) - 1 in float32
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=2**-23)
        else:
            assert torch.equal(tensor, theirs[name]), name
    save_hf(tmp_path / "hf", config, state)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(40)[None] % 96
    with torch.no_grad():
        expected, actual = model(ids).logits, reference(ids).logits
    if architecture.startswith("gemma"):  # the norm weights differ in their last bit
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0], ids=lambda k: k.name)
def test_row_order_of_packed_q_and_k(kind, tmp_path):
    """Reordering packed rows reorders the weight: compare with reordering in float."""
    architecture, model = make_model("llama")
    path = convert(architecture, model, tmp_path / "m.gguf", kind)
    config, tensors = load_state(path)
    for name, weight in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert isinstance(weight, QuantizedWeight)
            part = "attn_q" if "q_proj" in name else "attn_k"
            file = GGUFFile(path)
            raw = file.raw(f"blk.{name.split('.')[2]}.{part}.weight")
            stored = gguf.quants.dequantize(raw, kind)
            h = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            want = stored.reshape(h, -1, 2, 64).swapaxes(1, 2).reshape(stored.shape)
            np.testing.assert_array_equal(weight.dequantize().numpy(), want)
    _, plain = load_state(path, keep_quantized=False)
    assert all(isinstance(w, torch.Tensor) and w.dtype == torch.float32 for _, w in plain)


def test_activations_are_rounded_by_default(tmp_path):
    path = convert(*make_model("llama"), tmp_path / "m.gguf", Kind.Q4_1)

    def bits(path, **options):
        model = fastlm.CausalLM.from_pretrained(path, **options)
        act_bits = {m.act_bits for m in model.modules() if hasattr(m, "qdata")}
        assert len(act_bits) == 1
        return act_bits.pop(), model

    assert bits(path, act_bits=16)[0] == 16
    rounded, model = bits(path)
    assert rounded == 8
    model.save_pretrained(tmp_path / "folder")
    assert bits(tmp_path / "folder")[0] == 8
    assert bits(tmp_path / "folder", act_bits=16)[0] == 16
    refused = pytest.raises(fastlm.InputError, match="act_bits: expected 8 or 16, got 4")
    with refused:
        bits(path, act_bits=4)


def test_generation_multiplies_what_the_cpu_multiplies(tmp_path, monkeypatch):
    monkeypatch.setattr(fastlm.model.load, "load_tokenizer", lambda *_: None)
    config = fastlm.ModelConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = quantize(fastlm.CausalLM(config), "w4a16", group_size=32)
    folder, floats = tmp_path / "q", tmp_path / "f.gguf"
    folder.mkdir()
    quantized = folder / "q.gguf"
    save_gguf(quantized, config, model.weights(), None, "m")
    save_gguf(floats, config, fastlm.CausalLM(config).weights(), None, "m")
    dtypes = {}
    for isa in backend.cpu_isas():
        with backend.use_cpu_isa(isa):
            dtypes[isa] = load_for_inference(quantized)[0].dtype
            assert load_for_inference(folder)[0].dtype == dtypes[isa]
            assert load_for_inference(quantized, 16)[0].dtype == torch.float32
            assert load_for_inference(floats)[0].dtype == load_model(floats)[0].dtype
            assert load_model(quantized)[0].dtype == torch.float32
    assert dtypes["scalar"] == torch.float32
    for isa, dtype in dtypes.items():
        multiplies = isa in ("avx512", "amx", "amx_emulated")
        assert dtype == (torch.bfloat16 if multiplies else torch.float32), isa


# files with false claims


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    architecture, model = make_model("llama")
    return convert(architecture, model, tmp_path_factory.mktemp("g") / "m.gguf", Kind.Q8_0)


def test_every_truncation_is_refused(good, tmp_path):
    data = good.read_bytes()
    path = tmp_path / "cut.gguf"
    # cuts anywhere in the header and in parts of the data (the last tensor is padded to 32 bytes)
    for size in [*range(0, 2000, 7), *range(2000, len(data) - 32, 9973), len(data) - 33]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError) as error:
            load_state(path)
        assert "\n" not in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4000), st.integers(0, 255))
def test_a_changed_byte_loads_or_is_refused(good, at, value):
    data = bytearray(good.read_bytes())
    data[at] = value
    path = good.with_name("changed.gguf")
    path.write_bytes(data)
    try:
        for _ in load_state(path)[1]:
            pass
    except InputError as error:
        assert "\n" not in str(error)


def header(tensors: int, metadata: int, body: bytes = b"", version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, metadata) + body


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


LYING = {
    "not gguf": (b"PK\x03\x04" * 20, "expected a GGUF file"),
    "version": (header(0, 0, version=1), "version 2 or 3, got 1"),
    "big endian": (header(0, 0, version=3 << 24), "version 2 or 3"),
    "tensors": (header(2**60, 0, bytes(64)), "tensor count: expected a count that fits"),
    "metadata": (header(0, 2**60, bytes(64)), "metadata count: expected a count that fits"),
    "key": (header(0, 1, struct.pack("<Q", 2**62) + bytes(64)), "cut short: expected 4611"),
    "name": (header(0, 1, text(b"a\nb") + bytes(64)), "expected a printable name"),
    "long name": (header(0, 1, text(b"a" * 300) + bytes(64)), "expected a printable name"),
    "type": (
        header(0, 1, text(b"k") + struct.pack("<I", 99) + bytes(9)),
        "value type from 0 to 12",
    ),
    "array": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 4, 2**61) + bytes(64)),
        "k: expected a count that fits in the file",
    ),
    "nested": (
        header(0, 1, text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
        "expected an array of scalars or strings",
    ),
    "dims": (header(1, 0, text(b"t") + struct.pack("<I", 2**31) + bytes(64)), "1 to 4 dimensions"),
    "size": (
        header(1, 0, text(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0) + bytes(64)),
        "t: expected bytes",
    ),
    "offset": (
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 2**40) + bytes(64)),
        "t: expected bytes",
    ),
    "unaligned": (
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 0, 1) + bytes(64)),
        "aligned offset",
    ),
    "kind": (header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 4, 999, 0)), "known tensor type"),
    "block": (
        header(1, 0, text(b"t") + struct.pack("<IQIQ", 1, 33, 2, 0) + bytes(64)),
        "multiple of 32 values for Q4_0",
    ),
    "alignment": (
        header(0, 1, text(b"general.alignment") + struct.pack("<II", 4, 0)),
        "general.alignment: expected a power of two",
    ),
}


@pytest.mark.parametrize("case", LYING)
def test_lying_headers(case, tmp_path):
    data, message = LYING[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        GGUFFile(path)


def rewrite(case: str, path, drop=(), add=None, **metadata):
    """Write the model of ``case`` with changed metadata or tensors."""
    architecture, model = make_model(case)
    good = gguf.GGUFReader(convert(architecture, model, path.with_name("good.gguf")))
    values = {
        k: f.contents()
        for k, f in good.fields.items()
        if not k.startswith("GGUF.") and k != "general.architecture"
    }
    values |= {f"{architecture}.{k.replace('__', '.')}": v for k, v in metadata.items()}
    values = {k.removeprefix(f"{architecture}."): v for k, v in values.items() if v is not None}
    tensors = {t.name: t.data for t in good.tensors if t.name not in drop}
    return write_gguf(path, tensors | (add or {}), architecture, **values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_count": None}, "llama.block_count: expected one int, got None"),
        ({"block_count": 2**31 - 1}, "block_count: expected 1 to 4096, got 2147483647"),
        ({"block_count": 3}, "expected a tensor model.layers.2"),
        ({"attention__head_count": [4, 4]}, "head_count: expected one int"),
        ({"attention__head_count": 0}, "num_attention_heads: expected a positive integer, got 0"),
        ({"attention__key_length": 15}, "head size: expected a positive even integer"),
        ({"feed_forward_length": 128}, r"gate_proj.weight: expected \(128, 64\) by .* \(96, 64\)"),
        ({"rope__scaling__type": "su"}, "rope.scaling.type: expected none"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "expected a tensor model.layers.1.mlp.up_proj.weight"),
        ({"drop": ["token_embd.weight"]}, "expected a tensor token_embd.weight"),
        (
            {"add": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 2), np.float32)}},
            "got one it lacks",
        ),
        ({"add": {"rope_freqs.weight": np.full(8, 3, np.float32)}}, "expected Llama 3's scaling"),
    ],
)
def test_models_that_do_not_fit(changes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_state(rewrite("llama", tmp_path / "m.gguf", **changes))


@pytest.mark.parametrize(
    "ids, ends", [({"eos": 5, "eot": 7, "eom": 5}, [5, 7]), ({"eos": 5, "eot": 5}, 5), ({}, None)]
)
def test_end_tokens_of_turns_and_messages(ids, ends, tmp_path):
    path = rewrite("llama", tmp_path / "m.gguf")
    file = GGUFFile(path)
    file.metadata = {k: v for k, v in file.metadata.items() if "eos" not in k}
    file.metadata |= {f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items()}
    assert gguf_config(file)["eos_token_id"] == ends


def test_unknown_architecture(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", {}, "mamba")
    with pytest.raises(InputError, match=r"expected one of llama, mistral, qwen2.*got 'mamba'"):
        load_state(path)


def test_unsupported_block_format(tmp_path):
    raw = np.zeros((64, 66), np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"t": (raw, Kind.TQ2_0)})
    with pytest.raises(InputError, match=r"expected one of the types F32.*got TQ2_0"):
        GGUFFile(path).load("t")
