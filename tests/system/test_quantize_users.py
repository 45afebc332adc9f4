"""Quantization as users meet it: the dtype stays, calibration by conversations, transformers'
models and folders.
"""

import json
import shutil

import preference_models
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import fastlm
from fastlm import InputError, ops, quant
from fastlm.export.compressed_tensors_write import save_compressed_tensors
from fastlm.export.gguf_write import save_gguf
from fastlm.model.causal_lm import CausalLM
from fastlm.quant.calibration import conversation_tokens
from fastlm.quant.stage import Quantize
from fastlm.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    preference_models.make_base(folder / "base")
    CausalLM.from_pretrained(folder / "base").bfloat16().save_pretrained(folder / "base")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {word}"},
                {"role": "assistant", "content": " ".join(preference_models.WORDS[i:])},
            ]
        }
        for i, word in enumerate(preference_models.WORDS)
    ]
    preference_models.write(folder / "chat.jsonl", rows)
    (folder / "text.txt").write_text("tree river stone bird " * 60)
    return folder


def size_of(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("format", "key"),
    [("w4a16", "dtype"), ("w8a16", "torch_dtype"), ("w8a8", "torch_dtype"), ("w4a8", "dtype")],
)
def test_the_config_has_the_dtype_if_all_matrices_are_quantized(base, tmp_path, format, key):
    model = quant.quantize(CausalLM.from_pretrained(base / "base"), format, group_size=32)
    model.save_pretrained(tmp_path / "q")
    file = tmp_path / "q/config.json"
    config = json.loads(file.read_text())
    for name in {"dtype", "torch_dtype"} - {key}:
        del config[name]
    file.write_text(json.dumps(config))
    small = CausalLM.from_pretrained(tmp_path / "q")
    assert {p.dtype for p in small.parameters()} == {small.dtype} == {torch.bfloat16}
    assert small(torch.arange(4)[None]).logits.dtype == torch.bfloat16
    floats = CausalLM.from_pretrained(tmp_path / "q", keep_quantized=False)
    assert {p.dtype for p in floats.parameters()} == {torch.bfloat16}
    save_compressed_tensors(tmp_path / "c", small.config.to_dict(), small.weights(), small.dtype)
    save_gguf(tmp_path / "m.gguf", small.config, small.weights(), None, "m")
    original = size_of(base / "base")
    assert size_of(tmp_path / "c") < original
    assert (tmp_path / "m.gguf").stat().st_size < original
    del config[key]
    file.write_text(json.dumps(config))
    assert CausalLM.from_pretrained(tmp_path / "q").dtype == torch.float32


def test_a_matrix_that_is_no_integers_decides(base, tmp_path):
    model = quant.quantize(CausalLM.from_pretrained(base / "base"), "w4a16", embeddings=16, head=16)
    model.half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    assert CausalLM.from_pretrained(tmp_path).dtype == torch.float16


def test_conversations_calibrate_through_the_template(base, tmp_path):
    tokenizer = Tokenizer.load(base / "base")
    stage = Quantize(group_size=16, calibration_tokens=128, calibration_length=32)
    stage(tmp_path / "q", model=base / "base", calibration=base / "chat.jsonl")
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert report["calibration_tokens"] == 128
    tokens = conversation_tokens(tokenizer, base / "chat.jsonl", cache=tmp_path)
    first = json.loads((base / "chat.jsonl").read_text().splitlines()[0])["messages"]
    ids = tokenizer.encode_chat(first, add_generation_prompt=False)
    assert tokens[: len(ids)].tolist() == ids
    as_text = tokenizer.encode(tokenizer.render_chat(first, add_generation_prompt=False))
    assert ids != as_text  # special tokens are no text
    bad = preference_models.write(tmp_path / "bad.jsonl", [{"messages": []}])
    with pytest.raises(InputError, match=r"bad\.jsonl, line 1: expected an answer at the end"):
        stage(tmp_path / "r", model=base / "base", calibration=bad)


def test_heldout_text_is_read_before_quantization(base, tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("quantized before the text was read")

    monkeypatch.setattr(quant, "quantize", never)
    with pytest.raises(InputError, match=r"chat\.jsonl, line 1: .*'text'"):
        Quantize()(tmp_path / "q", model=base / "base", data=base / "chat.jsonl")


def test_rtn_needs_no_tokenizer(base, tmp_path):
    shutil.copytree(base / "base", tmp_path / "bare" / "m")
    for file in (tmp_path / "bare/m").glob("*token*"):
        file.unlink()
    Quantize(method="rtn", group_size=16)(tmp_path / "out" / "q", model=tmp_path / "bare/m")
    assert CausalLM.from_pretrained(tmp_path / "out/q").dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        Quantize(method="rtn")(
            tmp_path / "out/r", model=tmp_path / "bare/m", data=base / "text.txt"
        )


def test_a_transformers_config_describes_the_storage(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=64,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model, other = (LlamaForCausalLM(config).eval() for _ in range(2))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = fastlm.quantize(model, "w4a16", group_size=16)(ids).logits
        model.save_pretrained(tmp_path)
        mine = CausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="quant"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(other.config, "quantization_config")  # built from the same config


def test_a_quantized_weight_prints_in_a_line():
    weight = ops.quantize_weight(torch.randn(300, 200), 4, group_size=32, symmetric=False)
    line = "QuantizedWeight(300, 200, int4, group_size=32, scales=torch.bfloat16, zeros"
    assert repr(weight) == f"{line}, device='cpu')"


def test_a_custom_module_keeps_a_quantized_linear():
    """A bare QuantizedWeight is in no state_dict: the class says so, and names this one."""

    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = quant.QuantizedLinear(ops.quantize_weight(torch.randn(8, 16), 8))

    assert set(Own().state_dict()) == {"layer.qdata", "layer.scales"}
    assert "QuantizedLinear" in (quant.QuantizedWeight.__doc__ or "")
