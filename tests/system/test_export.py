"""`fastlm export`: GGUF files and compressed-tensors folders, read back to the last bit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_cli import call, refused

from fastlm.checkpoint.config import ModelConfig
from fastlm.checkpoint.folder import load_state
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.errors import InputError
from fastlm.export.gguf_encode import encode_tensor
from fastlm.export.gguf_vocab_write import pre_tokenizer
from fastlm.export.gguf_write import save_gguf
from fastlm.model.causal_lm import CausalLM
from fastlm.ops import quantize_weight
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.quant import quantize
from fastlm.tokenizer import gguf_vocab
from fastlm.tokenizer.tokenizer import Tokenizer

SMALL = dict(
    vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5,
    bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "long_factor": [1.0 + i for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)], "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 4}
MODELS = {
    "llama": {}, "llama-tied": {"tie_word_embeddings": True}, "llama3": {"rope_parameters": LLAMA3},
    "llama-bias": {"attention_bias": True}, "mistral": {"sliding_window": 5},
    "qwen2": {}, "qwen3": {"head_dim": 32}, "olmo2": {}, "phi3": {"sliding_window": None},
    "phi3-long": {
        "rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": None
    },
    "gemma2": GEMMA, "gemma3_text": GEMMA | {"num_hidden_layers": 7},
    "smollm3": {"num_hidden_layers": 5},
}  # fmt: skip


def model_of(case: str = "llama", **changes) -> CausalLM:
    kind = case.partition("-")[0].replace("llama3", "llama")
    model = CausalLM(ModelConfig(model_type=kind, **SMALL | MODELS[case] | changes), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    words = "the cat's 12 trees, it's 2024; we'll see  the river again\n" * 40
    return Tokenizer.train([words, "Größe 漢字 def f(x):\n\treturn x"], 300)


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, weight in actual.items():
        both = [
            w.dequantize() if isinstance(w, QuantizedWeight) else w
            for w in (weight, expected[name])
        ]
        assert torch.equal(both[0].float(), both[1].detach().float()), name


@pytest.mark.parametrize("case", MODELS)
def test_every_architecture_is_read_back(case, tmp_path):
    model = model_of(case)
    info = save_gguf(tmp_path / "m.gguf", model.config, model.weights(), None, "m")
    assert set(info["formats"]) == {"F32"} and not info["rounded_scales"]
    tensors = dict(load_state(tmp_path / "m.gguf")[1])
    if "gemma" in case:  # one is added to and taken from the norms
        for name, weight in model.weights().items():
            torch.testing.assert_close(tensors[name], weight.detach(), rtol=0, atol=2**-22)
    else:
        same(tensors, model.weights())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_keep_their_dtype_and_vectors_are_float32(dtype, tmp_path):
    model = model_of("llama-tied").to(dtype)
    info = save_gguf(tmp_path / "m.gguf", model.config, model.weights(), None, "m")
    assert set(info["formats"]) == {{torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    same(dict(load_state(tmp_path / "m.gguf")[1]), model.weights())
    file = GGUFFile(tmp_path / "m.gguf")
    assert file.tensors["output_norm.weight"].ggml_type.name == "F32"


@pytest.mark.parametrize("group", [32, 64, 40, -1])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_block_formats(bits, symmetric, group):
    """The gguf package reads what was encoded, exactly; or it is refused with what would do."""
    import gguf

    weight = quantize_weight(
        torch.randn(6, 96), bits, group_size=group, symmetric=symmetric, scale_dtype=torch.float16
    )
    if group == 40 or (bits == 8 and not symmetric):
        with pytest.raises(InputError, match=r"--group-size 32|without offsets"):
            encode_tensor("w", weight)
        return
    data, rounded = encode_tensor("w", weight)
    kind = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}[bits, symmetric]
    actual = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    want = weight.dequantize(torch.float64).numpy()
    if symmetric:
        assert not rounded
        np.testing.assert_array_equal(actual, want.astype(np.float32))
    else:  # m = offset - 8 d is rounded to float16
        assert 0 < rounded <= weight.scales.numel()
        assert np.abs(actual - want).max() <= 2**-11 * np.abs(want).max() * 8


def test_scales_that_float16_lacks_are_counted_or_refused():
    weight = quantize_weight(torch.randn(4, 64), 4, group_size=32, scale_dtype=torch.float32)
    assert encode_tensor("w", weight)[1] == 8
    weight.scales[0] *= 1e-9  # a dead row
    assert encode_tensor("w", weight)[1] == 8
    with pytest.raises(InputError, match=r"w: expected scales that float16 holds within 0.39 %"):
        encode_tensor("w", quantize_weight(2e-6 * torch.randn(4, 64), 4, group_size=32))
    weight.scales *= 1e6
    with pytest.raises(InputError, match="w: expected scales up to 65504"):
        encode_tensor("w", weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_bias": True}, "mlp_bias: expected a model that GGUF can describe"),
        ({"hidden_act": "gelu"}, "hidden_act: expected a model that GGUF can describe"),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 2.0}}, "expected Llama 3's"),
    ],
)
def test_models_that_gguf_cannot_say(changes, message, tmp_path):
    model = model_of("llama", **changes)
    with pytest.raises(InputError, match=message):
        save_gguf(tmp_path / "m.gguf", model.config, model.weights(), None, "m")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_gguf_with_the_tokenizer(tokenizer, tmp_path):
    quantize(model_of("llama-tied"), "w4a16", group_size=32).save_pretrained(tmp_path / "q")
    tokenizer.save(tmp_path / "q")
    output = call("export", "-m", tmp_path / "q", "-o", tmp_path / "g", "--format", "gguf").stdout
    assert "15 Q4_0" in output and "rounded" not in output
    loaded = Tokenizer.load(tmp_path / "g" / "model.gguf")
    for text in ("It's the cat's 12345 trees,  Größe\n\n漢字", "<|im_end|>", " def f(x):\t"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, special=True) == tokenizer.encode(text, special=True)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (0, 0, tokenizer.stop_ids)
    assert loaded.vocab_size > tokenizer.vocab_size  # one for each row of the embedding
    ids = [t.vocabulary_id(tokenizer.vocab_size) for t in (loaded, tokenizer)]
    assert ids[0] == ids[1] != loaded.vocabulary_id(tokenizer.vocab_size - 1)
    file = GGUFFile(tmp_path / "g" / "model.gguf")
    kinds = file.metadata["tokenizer.ggml.token_type"]
    assert kinds[:3].tolist() == [3, 3, 3] and kinds[-1] == 5 and len(kinds) == 320
    assert file.metadata["tokenizer.ggml.tokens"][-1] == "[PAD319]"
    quantized, exported = (CausalLM.from_pretrained(tmp_path / p, act_bits=16) for p in ("q", "g"))
    ids = torch.arange(20)[None]
    assert torch.equal(quantized(ids).logits, exported(ids).logits)
    refused(
        "export", "-m", tmp_path / "q", "-o", tmp_path / "x", "--format", "onnx",
        text="format: expected one of gguf, compressed-tensors, got 'onnx'",
    )  # fmt: skip


@pytest.mark.parametrize("group", [32, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_read_back(bits, group, tokenizer, tmp_path):
    model = quantize(model_of("llama"), f"w{bits}a16", group_size=group)
    model.save_pretrained(tmp_path / "q")
    tokenizer.save(tmp_path / "q")
    options = ["--format", "compressed-tensors"]
    output = call("export", "-m", tmp_path / "q", "-o", tmp_path / "c", *options).stdout
    assert "as floats: model.embed_tokens.weight, lm_head.weight" in output
    entry = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    (scheme,) = entry["config_groups"].values()
    arguments = scheme["weights"]
    assert (arguments["num_bits"], arguments["group_size"]) == (bits, group if group > 0 else None)
    config, tensors = load_state(tmp_path / "c")
    assert f"pack-quantized {bits} bits" in config["quantization_config"]["description"]
    actual, expected = dict(tensors), model.weights()
    assert isinstance(actual["model.layers.0.mlp.up_proj.weight"], QuantizedWeight)
    same(actual, expected)


def test_compressed_tensors_with_zero_points(tmp_path):
    """What was read from another program's asymmetric file is written again, tensor by tensor."""
    import packed_models

    entry = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    packed_models.write(tmp_path / "a", entry, packed_models.pack_quantized, symmetric=False)
    model = CausalLM.from_pretrained(tmp_path / "a")
    from fastlm.export.compressed_tensors_write import save_compressed_tensors

    config = model.config.to_dict()
    save_compressed_tensors(tmp_path / "b", config, model.weights(), torch.float16)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in "ab")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("hidden", "group", "would"),
    [(192, 128, "--group-size 64"), (96, 64, "--group-size 32"), (64, 16, "--group-size 64")],
)
def test_a_group_that_does_not_divide_is_refused_with_one_that_does(
    hidden, group, would, tokenizer, tmp_path
):
    model = model_of("llama", hidden_size=hidden, intermediate_size=192)
    quantize(model, "w4a16", group_size=group).save_pretrained(tmp_path / "q")
    tokenizer.save(tmp_path / "q")
    refused(
        "export", "-m", tmp_path / "q", "-o", tmp_path / "c", "--format", "compressed-tensors",
        text=would,
    )  # fmt: skip
    assert not (tmp_path / "c").exists()
    if group == 16:
        out = tmp_path / "c"
        refused("export", "-m", tmp_path / "q", "-o", out, text="quantize with --group-size 32")


def test_an_unquantized_model_is_refused_for_compressed_tensors(tokenizer, tmp_path):
    model_of().save_pretrained(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    refused(
        "export", "-m", tmp_path / "m", "-o", tmp_path / "c", "--format", "compressed-tensors",
        text="expected quantized layers for compressed-tensors, got none",
    )  # fmt: skip


def exported(model: CausalLM, folder) -> dict:
    from fastlm.export.compressed_tensors_write import save_compressed_tensors

    config = model.config.to_dict() | {"quantization_config": None}
    save_compressed_tensors(folder, config, model.weights(), model.dtype)
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def test_float_layers_are_listed_for_compressed_tensors(tmp_path):
    model = quantize(
        model_of("llama"), "w4a16", group_size=32, overrides={"*.o_proj": 16, "*.down_proj": 8}
    )
    entry = exported(model, tmp_path / "c")
    layers = [f"model.layers.{i}.self_attn.o_proj" for i in range(2)]
    assert entry["ignore"] == ["lm_head", *layers]
    assert len(entry["config_groups"]) == 2
    tensors = dict(load_state(tmp_path / "c")[1])
    same(tensors, model.weights())


@pytest.mark.parametrize(
    ("overrides", "got"),
    [
        ({"*.k_proj": 8}, "q_proj w4 group 32, k_proj w8 group 32, v_proj w4 group 32"),
        ({"*.1.*.up_proj": 16}, "model.layers.1.mlp: .* gate_proj w4 group 32, up_proj float"),
    ],
)
def test_different_formats_in_layers_that_vllm_fuses(overrides, got, tmp_path):
    model = quantize(model_of("llama"), "w4a16", group_size=32, overrides=overrides)
    with pytest.raises(InputError, match=got):
        exported(model, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_fused_layers_have_zero_points_together(tmp_path):
    model = quantize(model_of("llama"), "w4a16", group_size=32)
    keys = model.model.layers[0].self_attn.k_proj
    keys.zeros = 2 * keys.scales
    exported(model, tmp_path / "c")
    names = load_file(tmp_path / "c/model.safetensors")
    layers = sorted(n.split(".")[-2] for n in names if n.endswith("zero_point"))
    assert layers == ["k_proj", "q_proj", "v_proj"]
    same(dict(load_state(tmp_path / "c")[1]), model.weights())


def test_dropped_rounding_of_activations_is_reported(tokenizer, tmp_path):
    quantize(model_of("llama"), "w4a8", group_size=32).save_pretrained(tmp_path / "q")
    tokenizer.save(tmp_path / "q")
    options = ["--format", "compressed-tensors"]
    output = call("export", "-m", tmp_path / "q", "-o", tmp_path / "c", *options).stdout
    assert "activations, rounded to int8 in this model, are not rounded there" in output


BYTES = {"type": "ByteLevel", "add_prefix_space": False}
PLAIN = BYTES | {"use_regex": False}


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([BYTES], False, "gpt-2"),
        ([{"type": "Digits", "individual_digits": True}, BYTES], False, "smollm"),
        ([split(gguf_vocab.QWEN2), PLAIN], False, "qwen2"),
        ([split(gguf_vocab.LLAMA3), PLAIN], True, "llama-bpe"),
        ([split(gguf_vocab.LLAMA3), PLAIN], False, "dbrx"),
        ([split(r"\w+"), PLAIN], False, None),
        ([{"type": "Whitespace"}], False, None),
        ([BYTES | {"add_prefix_space": True}], False, None),
    ],
)
def test_split_patterns_have_llama_cpps_names(steps, ignore_merges, name):
    sequence = {"type": "Sequence", "pretokenizers": steps}
    state = {"pre_tokenizer": sequence, "model": {"ignore_merges": ignore_merges}}
    if name is None:
        with pytest.raises(
            InputError, match=r"tokenizer: expected a (split pattern|pre-tokenizer)"
        ):
            pre_tokenizer(state)
    else:
        assert pre_tokenizer(state) == name
