"""LoRA and QLoRA: gradients, merging, PEFT's format both ways, adapters of another base, resuming,
and the stage that trains them.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from test_sft import QUESTIONS, answers, config, make_base, options, write_data
from torch import Tensor
from typer.testing import CliRunner

import fastlm
from fastlm.checkpoint.config import ModelConfig
from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.model import cpu_decode
from fastlm.model.adapter import load_adapter, save_adapter
from fastlm.model.causal_lm import CausalLM
from fastlm.model.lora import (
    add_lora,
    lora_layers,
    merge_lora,
    without_adapter,
)
from fastlm.model.lora_merge import merged_lora
from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear
from fastlm.train.lora_options import LoraOptions

IDS = torch.tensor([[5, 9, 2, 33, 17, 60, 4], [1, 2, 3, 4, 5, 6, 7]])


def model_of(seed: int = 3, **changes) -> CausalLM:
    options = {**config(64, 0).to_dict(), **changes}
    return CausalLM(ModelConfig.from_dict(options), seed=seed)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path)


@pytest.fixture
def model() -> CausalLM:
    return model_of()


def trained(model: CausalLM, seed: int = 1) -> CausalLM:
    """The model with an update that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in lora_layers(model).values():
            module.lora_B.normal_(0, 0.05, generator=generator)
            if module.lora_magnitude_offset is not None:
                module.lora_magnitude_offset.normal_(0, 0.1, generator=generator)
    return model


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ---- what is computed


def test_it_begins_as_the_base_and_learns_only_the_adapters(model) -> None:
    before = logits(model)
    add_lora(model, 4, 8, seed=0)
    assert torch.equal(logits(model), before)
    a = model.model.layers[0].mlp.down_proj.lora_A  # kaiming_uniform(a=sqrt(5)): 1 / sqrt(in)
    assert 0.9 / 128**0.5 < float(a.detach().abs().max()) <= 1 / 128**0.5
    trained(model)
    model(IDS, labels=IDS).loss.backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == trainable == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(names) == 2 * 7 * 2 and all(
        bool(p.grad.any()) for p in model.parameters() if p.requires_grad
    )


def test_the_formula_and_its_gradients(model) -> None:
    """Against the merged weight in float64: W + alpha / r B A."""
    add_lora(model, 4, 12, targets=["o_proj"], seed=0)
    layer = trained(model).model.layers[0].self_attn.o_proj
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    wide = x.detach().double().requires_grad_()
    weight = layer.base_layer.weight.detach().double() + 3 * b @ a
    (wide @ weight.T).square().sum().backward()
    for got, expected in ((x, wide), (layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_begins_as_the_base(family, dtype) -> None:
    """To the last bit, also of int4, with biases, quantized before or after; its rows of zeros
    stay.
    """
    for first in ("", "quantized", "adapters"):
        model = model_of(model_type=family).to(dtype)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3] = 0.0
            for name, parameter in model.named_parameters():
                parameter.add_(0.1 if name.endswith("bias") else 0.0)
        small = {"group_size": 32, "embeddings": 16, "head": 16}
        if first == "adapters":
            add_lora(model, 4, 8, use_dora=True, seed=0)
        if first:
            fastlm.quantize(model, "w4a16", **small)
        with without_adapter(model):
            before = logits(model)
        if first != "adapters":
            add_lora(model, 4, 8, use_dora=True, seed=0)
        model.to(dtype)
        assert torch.equal(logits(model), before) and before.isfinite().all()
        for module in lora_layers(model).values():
            weight = module.base_layer.weight
            weight = weight.dequantize() if first else weight.float()
            assert torch.equal(module.magnitude(), weight.norm(dim=1))
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        names = {name for name, p in model.named_parameters() if p.grad is not None}
        assert len([n for n in names if n.endswith("lora_magnitude_offset")]) == 2 * 7
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("bias", [False, True])
def test_doras_formula_and_its_gradients(bias) -> None:
    """Against the merged weight in float64, m (W + alpha / r B A) / norm, in which the norm of each
    row is a constant.
    """
    model = model_of(model_type="qwen2" if bias else "llama")
    add_lora(model, 4, 12, targets=["q_proj"], use_dora=True, seed=0)
    layer = trained(model).model.layers[0].self_attn.q_proj
    if bias:
        layer.base_layer.bias.data.normal_()
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_A, layer.lora_B))
    m = layer.magnitude().detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    weight = layer.base_layer.weight.detach().double() + 3 * b @ a
    norm = weight.detach().square().sum(1).sqrt()
    shift = layer.base_layer.bias.detach().double() if bias else 0.0
    expected = wide @ (m / norm * weight.T).mT.T + shift
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    pairs = (x, wide), (layer.lora_A, a), (layer.lora_B, b), (layer.lora_magnitude_offset, m)
    for got, leaf in pairs:
        torch.testing.assert_close(got.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_rank_stabilised_scaling(model) -> None:
    add_lora(model, 16, 8, use_rslora=True)
    assert {m.scaling for m in lora_layers(model).values()} == {8 / 4}


def test_dropout_is_only_of_training_and_of_the_adapter(model) -> None:
    before = logits(model)
    add_lora(model, 4, 8, dropout=0.5, seed=0)
    model.train()
    assert torch.equal(logits(model), before)  # B is zero
    trained(model)
    torch.manual_seed(0)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_computes_the_same(model, dtype, dora) -> None:
    options = {"use_dora": dora, "seed": 0}
    exact = logits(merge_lora(trained(add_lora(model_of().double(), 4, 8, **options))).double())
    model = trained(add_lora(model.to(dtype), 4, 8, **options)).eval()
    apart = logits(model)
    with merged_lora(model):
        together = logits(model)
        assert not lora_layers(model)
    assert lora_layers(model) and torch.equal(logits(model), apart)
    assert merge_lora(model) is model and torch.equal(logits(model), together)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())
    # as far from float64 as the unmerged model is, which rounds its products one by one
    error = [float((t.double() - exact).abs().max()) for t in (apart, together)]
    assert error[1] <= 3 * error[0] + 1e-6


def test_without_adapter_is_the_base(model) -> None:
    before = logits(model)
    trained(add_lora(model, 4, 8, seed=0))
    after = logits(model)
    assert not torch.equal(after, before)
    with without_adapter(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after)


FAMILIES = {
    "llama": {},
    "phi3": {"model_type": "phi3", "pad_token_id": 0},  # qkv_proj, gate_up_proj
    "qwen2": {"model_type": "qwen2"},  # biases
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits, dora", [(16, False), (4, False), (4, True)])
def test_generation_equals_that_of_the_merged_model(family, bits, dora) -> None:
    """Decode steps join projections and run without modules where there are no adapters."""
    model = model_of(**FAMILIES[family])
    if bits == 4:
        fastlm.quantize(model, "w4a16", group_size=32)
    model.generate(IDS, max_new_tokens=2, temperature=0.0)  # leaves a plan and joined projections
    with torch.no_grad():
        before = logits(model)
    trained(add_lora(model, 4, 32, use_dora=dora, seed=0)).eval()
    assert cpu_decode.decode_plan(model) is None and not torch.allclose(logits(model), before)
    apart = model.generate(IDS, max_new_tokens=12, temperature=0.0)
    with merged_lora(model):
        assert torch.equal(model.generate(IDS, max_new_tokens=12, temperature=0.0), apart)
        assert model in cpu_decode._plans
    assert model not in cpu_decode._plans  # nor the merged weights in memory
    assert torch.equal(model.generate(IDS, max_new_tokens=12, temperature=0.0), apart)
    merge_lora(model)
    assert not any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules())
    assert torch.equal(model.generate(IDS, max_new_tokens=12, temperature=0.0), apart)


class Straight(torch.nn.Linear):
    """With activations rounded to int8 per group of 32 columns, and a gradient as if they were
    not.
    """

    def forward(self, x: Tensor) -> Tensor:
        groups = x.detach().unflatten(-1, (-1, 32))
        steps = groups.abs().amax(-1, keepdim=True) / 127
        rounded = (steps * (groups / steps).round()).flatten(-2)
        return super().forward(x + (rounded - x.detach()))


def gradients(model: CausalLM) -> dict[str, Tensor]:
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {"loss": loss}


@pytest.mark.parametrize("first", ["adapters", "quantized"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("format", ["w4a16", "w8a16", "w4a8", "w8a8"])
def test_gradients_through_a_quantized_base(format, symmetric, first) -> None:
    """QLoRA: the same as with dequantized weights in float32."""
    model = model_of()
    small = {"group_size": 32, "embeddings": 16, "head": 16, "symmetric": symmetric}
    if first == "adapters":
        fastlm.quantize(add_lora(model, 4, 8, seed=0), format, **small)
    else:
        add_lora(fastlm.quantize(model, format, **small), 4, 8, seed=0)
    trained(model)
    plain = model_of()
    for name, module in lora_layers(model).items():
        base = module.base_layer
        assert isinstance(base, QuantizedLinear) and f"w{base.bits}a{base.act_bits}" == format
        layer = plain.get_submodule(name)
        layer.weight.data.copy_(base.weight.dequantize())
    trained(add_lora(plain, 4, 8, seed=0))
    floats = {} if format.endswith("a16") else gradients(plain)
    if floats:
        plain.zero_grad()
        for module in lora_layers(plain).values():
            module.base_layer.__class__ = Straight
    got, expected = gradients(model), gradients(plain)
    assert got.keys() == expected.keys() and len(got) == 2 * len(lora_layers(model)) + 1
    for name, grad in got.items():
        if not floats:
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6)
            continue
        off, rounding = (torch.norm(grad - other[name]) for other in (expected, floats))
        assert off < 0.1 * rounding, name  # off is 1e-7 of the gradient, rounding 6e-3


# ---- PEFT

# transformers 5 of what PEFT 0.21 asks it
warned = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def transformers_model(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def saved(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


ADAPTERS = {
    "all linear": {"rank": 4, "alpha": 8},
    "rank stabilised": {"rank": 4, "alpha": 3, "use_rslora": True},
    "two targets": {"rank": 2, "alpha": 7, "targets": ["q_proj", "down_proj"]},
    "dora": {"rank": 4, "alpha": 8, "use_dora": True},
    "one module": {"rank": 2, "alpha": 2, "targets": ["model.layers.1.mlp.up_proj"]},
}


@warned
@pytest.mark.parametrize("kind", ADAPTERS)
def test_peft_loads_our_adapter(model, saved, tmp_path, kind) -> None:
    from peft import PeftModel

    trained(add_lora(model, seed=0, **ADAPTERS[kind])).eval()
    save_adapter(model, tmp_path / "adapter", base=saved)
    peft = PeftModel.from_pretrained(transformers_model(saved), tmp_path / "adapter").eval()
    assert len([1 for n, _ in peft.named_parameters() if "lora_A" in n]) == len(lora_layers(model))
    with torch.no_grad():
        theirs = peft(IDS).logits
    torch.testing.assert_close(theirs, logits(model), rtol=1e-4, atol=1e-5)
    reloaded = load_adapter(CausalLM.from_pretrained(saved), tmp_path / "adapter")
    assert (
        torch.equal(logits(reloaded), logits(model))
        and lora_layers(reloaded).keys() == lora_layers(model).keys()
    )
    merged_model = CausalLM.from_pretrained(tmp_path / "adapter")  # finds its base
    assert not lora_layers(merged_model) and torch.equal(
        logits(merged_model), logits(merge_lora(model))
    )


THEIRS = {
    "default": {"target_modules": ["q_proj", "v_proj"]},
    "rank stabilised": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "one layer": {"target_modules": ["k_proj", "o_proj"], "layers_to_transform": [1]},
}


def peft_adapter(saved: Path, folder: Path, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **options)
    peft = get_peft_model(transformers_model(saved), lora).eval()
    with torch.no_grad():
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05)
            if "lora_magnitude_vector" in name:
                p.mul_(1 + 0.1 * torch.randn(p.shape))
    peft.save_pretrained(folder)
    with torch.no_grad():
        return peft(IDS).logits


@warned
@pytest.mark.parametrize("kind", THEIRS)
def test_we_load_pefts_adapter(saved, tmp_path, kind) -> None:
    theirs = peft_adapter(saved, tmp_path / "theirs", **THEIRS[kind])
    model = load_adapter(CausalLM.from_pretrained(saved), tmp_path / "theirs")
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-5)
    save_adapter(model, tmp_path / "ours", base=saved)
    reloaded = CausalLM.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(reloaded), theirs, rtol=1e-4, atol=1e-5)


@warned
def test_doras_gradients_are_those_of_peft(model, saved, tmp_path) -> None:
    from peft import PeftModel

    trained(add_lora(model, 4, 8, use_dora=True, seed=0))
    save_adapter(model, tmp_path / "adapter", base=saved)
    peft = PeftModel.from_pretrained(
        transformers_model(saved), tmp_path / "adapter", is_trainable=True
    )
    expected = peft(IDS, labels=IDS).loss
    expected.backward()
    theirs = {
        re.sub(r"base_model\.model\.|\.default|\.weight$", "", name): p.grad
        for name, p in peft.named_parameters() if p.grad is not None
    }  # fmt: skip
    ours = gradients(model)
    torch.testing.assert_close(ours.pop("loss"), expected, rtol=1e-5, atol=1e-5)
    assert len(ours) == len(theirs) == 3 * len(lora_layers(model))
    for name, grad in ours.items():
        name = name.replace("lora_magnitude_offset", "lora_magnitude_vector")
        torch.testing.assert_close(grad, theirs[name], rtol=1e-3, atol=1e-6)


REFUSED_OF_PEFT = {
    "bias: expected 'none', got 'lora_only'": {"bias": "lora_only"},
    "modules_to_save: expected none, fastlm's LoRA": {"modules_to_save": ["norm"]},
    "rank_pattern: expected none, fastlm's LoRA": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern: expected none, fastlm's LoRA": {"alpha_pattern": {"q_proj": 2}},
    "init_lora_weights: expected one that leaves the base": {"init_lora_weights": "pissa"},
}


@warned
@pytest.mark.parametrize("message", REFUSED_OF_PEFT)
def test_options_of_peft_that_are_refused(saved, tmp_path, message) -> None:
    config = REFUSED_OF_PEFT[message]
    peft_adapter(saved, tmp_path / "theirs", target_modules=["q_proj", "v_proj"], **config)
    with pytest.raises(InputError, match=re.escape(message)):
        load_adapter(CausalLM.from_pretrained(saved), tmp_path / "theirs")


# ---- files


@pytest.fixture
def adapter(model, saved, tmp_path) -> Path:
    save_adapter(trained(add_lora(model, 4, 8, seed=0)), tmp_path / "adapter", base=saved)
    return tmp_path / "adapter"


OTHER_BASES = {
    "mlp.down_proj.lora_A: expected (4, 96) by its rank and this model, got (4, 128)": {
        "intermediate_size": 96
    },
    "model.layers.1.mlp.down_proj: expected a linear layer of this model": {"num_hidden_layers": 1},
    "expected an adapter of model.layers.2": {"num_hidden_layers": 3},
    "expected the base model with the digest": {"seed": 4},
}


@pytest.mark.parametrize("message", OTHER_BASES)
def test_an_adapter_of_another_base(adapter, message) -> None:
    other = model_of(**OTHER_BASES[message])
    with pytest.raises(InputError, match=re.escape(message)):
        load_adapter(other, adapter)
    assert not lora_layers(other) and all(p.requires_grad for p in other.parameters())


def test_the_base_is_recognised_in_either_dtype(adapter, saved) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        load_adapter(CausalLM.from_pretrained(saved, dtype=dtype), adapter)


CHANGES = {
    "peft_type: expected 'LORA', got 'IA3'": {"peft_type": "IA3"},
    "task_type: expected 'CAUSAL_LM', got 'SEQ_CLS'": {"task_type": "SEQ_CLS"},
    "r: expected a whole number, got 'four'": {"r": "four"},
    "lora_alpha: expected a number, got None": {"lora_alpha": None},
    "lora_alpha: expected less than or equal to": {"lora_alpha": 1e308},
    "lora_alpha: expected less than or equal to 3": {"lora_alpha": 10**400},
    "lora_dropout: expected less than 1, got 2": {"lora_dropout": 2},
    "down_proj.lora_A: expected (8, 128) by its rank": {"r": 8},
    "new_option: expected none, fastlm's LoRA does not support it, got 'x'": {"new_option": "x"},
}


@pytest.mark.parametrize("message", CHANGES)
def test_refused_configs(adapter, saved, message) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **CHANGES[message]}))
    with pytest.raises(InputError, match=re.escape(message)):
        load_adapter(CausalLM.from_pretrained(saved), adapter)


def test_a_base_that_is_not_there(adapter, saved) -> None:
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["base_model_name_or_path"] == str(saved)
    saved = saved.rename(saved.with_name("elsewhere"))  # neither there nor where it lay from here
    for name in ("HuggingFaceTB/SmolLM2-135M", None):
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(InputError, match="base_model_name_or_path: expected a model on this"):
            CausalLM.from_pretrained(adapter)
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(adapter)}))
    with pytest.raises(InputError, match="expected a full model, got an adapter"):
        CausalLM.from_pretrained(adapter)


def test_refused_tensors(adapter, saved) -> None:
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    saved_tensors = load_file(file)
    name, ones = next(n for n in saved_tensors if "lora_B" in n), torch.ones(2)
    for tensors, message in (
        (
            {k: v for k, v in saved_tensors.items() if k != name},
            "expected lora_A and lora_B, got lora_A",
        ),
        (
            {**saved_tensors, name.replace("lora_B.weight", "lora_magnitude_vector"): ones},
            "expected lora_A and lora_B, got lora_A and lora_B and lora_magnitude_vector",
        ),
        (
            {**saved_tensors, "lm_head.weight": torch.zeros(2, 2)},
            "lm_head.weight: expected lora_A.weight",
        ),
        ({name: torch.zeros(2, dtype=torch.int64)}, "expected one of F32, BF16, F16, F64, got I64"),
        ({}, "expected the matrices of an adapter, got no tensor"),
    ):
        save_file(tensors, file)
        with pytest.raises(InputError, match=re.escape(message)):
            load_adapter(CausalLM.from_pretrained(saved), adapter)
    file.write_bytes(file.read_bytes()[:8])
    with pytest.raises(InputError, match="expected a complete safetensors file"):
        load_adapter(CausalLM.from_pretrained(saved), adapter)


def test_a_folder_holds_a_model_or_an_adapter(adapter, model, tmp_path) -> None:
    (adapter / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="model: expected a model without adapters"):
        model.save_pretrained(adapter)
    merge_lora(model).save_pretrained(adapter)
    assert torch.equal(logits(CausalLM.from_pretrained(adapter)), logits(model))
    assert not list(adapter.glob("adapter*")) and (adapter / "notes.txt").read_text() == "mine"
    save_adapter(add_lora(model), adapter)
    assert not (adapter / "model.safetensors").exists() and (adapter / "notes.txt").exists()


REFUSED_CALLS = {
    "targets: expected all-linear or some of down_proj": {"targets": ["q_proj", "x_proj"]},
    "targets: expected all-linear or some of": {"targets": ["lm_head"]},
    "got none": {"targets": []},
    "rank: expected a positive number, got 0": {"rank": 0},
    "alpha: expected a positive number up to float32's, got -1": {"alpha": -1},
    "alpha: expected a positive number up to float32's, got 1e+308": {"alpha": 1e308},
    "dropout: expected a share in [0, 1), got 1": {"dropout": 1},
}


@pytest.mark.parametrize("message", REFUSED_CALLS)
def test_refused_calls(message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        add_lora(model_of(tie_word_embeddings=False), **REFUSED_CALLS[message])


def test_adapters_are_added_once(model, tmp_path) -> None:
    with pytest.raises(InputError, match="expected a model with adapters"):
        save_adapter(model, tmp_path / "none")
    add_lora(model)
    with pytest.raises(InputError, match="expected a model without adapters"):
        add_lora(model)


# ---- the stage

LORA = {"lora_rank": 8, "lr": 1e-2, "epochs": 20}


@pytest.fixture(scope="module")
def talker(base, tmp_path_factory) -> Path:
    """A model that answers every question with the answer to the next one: adapters beside random
    weights would learn nothing.
    """
    folder = tmp_path_factory.mktemp("talker")
    messages = [*QUESTIONS.values()]
    rows = [{"prompt": q, "completion": a} for q, a in zip(QUESTIONS, [*messages[1:], messages[0]])]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options(data=(str(folder / "other.jsonl"),))(folder / "sft", model=base)
    return folder / "sft" / "model"


@pytest.mark.parametrize("kind", ["merged", "adapter", "4-bit", "dora"])
def test_a_model_learns_to_answer_by_its_adapters(talker, data, tmp_path, kind) -> None:
    changes = {
        "adapter": {"merge": False},
        "4-bit": {"base_bits": 4, "base_group_size": 32},
        "dora": {"use_dora": True},
    }
    stage = options(data=(data,), **LORA, **changes.get(kind, {}))
    result = stage(tmp_path / "sft", model=talker)
    folder = tmp_path / "sft" / "model"
    assert answers(folder) == [f"{answer}<|im_end|>" for answer in QUESTIONS.values()]
    assert result["trained_parameters"] < result["parameters"]
    assert (folder / "adapter_config.json").exists() == (kind == "adapter")
    model = CausalLM.from_pretrained(folder)
    assert set(model.config.stop_ids) and not lora_layers(model)
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    if kind == "adapter":
        arguments = ["generate", "--model", str(folder), "--prompt", "two plus two?"]
        done = CliRunner().invoke(app, [*arguments, "--temperature", "0"])
        assert done.exit_code == 0 and "Four, I think." in done.output


@pytest.mark.parametrize("changes", [{}, {"lora_dropout": 0.2}, {"base_bits": 4, "merge": False},
                                     {"use_dora": True}])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_resumes_to_the_same_bits(base, data, tmp_path, changes, dtype) -> None:
    stage = options(data=(data,), epochs=4, lora_rank=4, dtype=dtype, save_steps=3, **changes)
    stage(tmp_path / "whole", model=base)

    class Cut(Exception):
        pass

    def cut(event) -> None:
        if event.get("step") == 5 and "loss" in event:
            raise Cut

    with pytest.raises(Cut):
        stage(tmp_path / "cut", model=base, on_event=cut)
    (checkpoint,) = (tmp_path / "cut" / "checkpoints").iterdir()
    saved = fastlm.checkpoint.folder.load_tensors(checkpoint)[0]
    names = {name for name in saved if name.startswith("model.")}
    assert names and all(".lora_" in name for name in names)
    stage(tmp_path / "cut", model=base)
    for file in (tmp_path / "whole" / "model").glob("*.safetensors"):
        assert (tmp_path / "cut" / "model" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "format, bits, lines",
    [
        (
            "w8a16",
            16,
            ["base_bits: 16 dequantizes the base, which is int8; 4 or 8 keep it"],
        ),
        ("w8a16", 8, []),
        ("w8a8", 8, ["model: 14 layers of the base round activations to int8; the training "]),
        ("w4a16", 8, ["base_bits: expected 8, got a base of int4, which keeps its format"]),
        (None, 8, []),
        (None, 4, []),
    ],
)
def test_a_line_reports_what_stays_quantized(base, tmp_path, format, bits, lines) -> None:
    source, warnings = base, []
    if format:
        model = CausalLM.from_pretrained(base)
        fastlm.quantize(model, format, group_size=32).save_pretrained(source := tmp_path / "q")
    options = LoraOptions(lora_rank=4, base_bits=bits, base_group_size=32)
    model = options.load_trained(source, dtype="float32", seed=0, warn=warnings.append)
    assert len(warnings) == len(lines) and all(map(str.startswith, warnings, lines))
    layers = {m.base_layer for m in lora_layers(model).values()}
    actual = {(m.bits, m.act_bits) for m in layers if isinstance(m, QuantizedLinear)}
    expected = int(format[1]) if format else bits
    assert actual == (set() if bits == 16 else {(expected, 16)})
    assert model.model.embed_tokens.act_bits == 16 if format and bits < 16 else True


def test_other_adapters_are_another_training(base, data, tmp_path) -> None:
    options(data=(data,), epochs=1, lora_rank=4)(tmp_path / "sft", model=base)
    for change in ({"lora_alpha": 3.0}, {"lora_dropout": 0.1}, {"base_bits": 4}, {"lora_rank": 2},
                   {"use_dora": True}):  # fmt: skip
        stage = options(data=(data,), epochs=1, **{"lora_rank": 4, **change})
        with pytest.raises(InputError, match="with these options, got another"):
            stage(tmp_path / "sft", model=base)


REFUSED_OPTIONS = {
    "lora_rank: expected 0 or more, got -1": {"lora_rank": -1},
    "lora_alpha: expected a positive number, got 0": {"lora_rank": 4, "lora_alpha": 0},
    "lora_targets: expected all-linear or names of layers, got none": {
        "lora_rank": 4,
        "lora_targets": (),
    },
    "lora_dropout: needs lora_rank above 0 (0 trains all weights), got 0.1": {"lora_dropout": 0.1},
    "lora_dropout: expected a share in [0, 1), got 1": {"lora_rank": 4, "lora_dropout": 1},
    "base_bits: expected 4, 8 or 16, got 3": {"base_bits": 3},
    "base_bits: needs lora_rank above 0 (0 trains all weights), got 4": {"base_bits": 4},
    "use_dora: needs lora_rank above 0 (0 trains all weights), got True": {"use_dora": True},
    "merge: needs lora_rank above 0 (0 trains all weights), got False": {"merge": False},
}


@pytest.mark.parametrize("message", REFUSED_OPTIONS)
def test_refused_options(message) -> None:
    with pytest.raises(InputError) as refusal:
        options(**REFUSED_OPTIONS[message]).check()
    assert str(refusal.value) == message


def test_a_run_can_move(base, data, tmp_path) -> None:
    """The base is found from the adapter, where its absolute path is no more."""
    run = tmp_path / "run"
    shutil.copytree(base, run / "base")
    options(data=(data,), epochs=1, lora_rank=4, merge=False)(run / "sft", model=run / "base")
    before = logits(CausalLM.from_pretrained(run / "sft"))
    run.rename(tmp_path / "moved")
    assert torch.equal(logits(CausalLM.from_pretrained(tmp_path / "moved" / "sft")), before)
    # another model at that place is refused by its digest
    shutil.rmtree(tmp_path / "moved" / "base")
    other = CausalLM(CausalLM.from_pretrained(base).config, seed=9)
    other.save_pretrained(tmp_path / "moved" / "base")
    with pytest.raises(InputError, match="expected the base model with the digest"):
        CausalLM.from_pretrained(tmp_path / "moved" / "sft")


def test_merge_is_a_command(base, data, tmp_path) -> None:
    stage = options(data=(data,), epochs=1, lora_rank=4, merge=False)
    stage(tmp_path / "sft", model=base)
    with pytest.raises(InputError, match="merge: expected true on top of an adapter"):
        stage(tmp_path / "again", model=tmp_path / "sft")
    arguments = ["merge", "--model", str(tmp_path / "sft"), "--out", str(tmp_path / "whole")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "whole" / "adapter_config.json").exists()
    files = [tmp_path / "whole", tmp_path / "sft" / "model"]
    folder, two = map(CausalLM.from_pretrained, files)
    assert (
        torch.equal(logits(folder), logits(two)) and folder.config.stop_ids == two.config.stop_ids
    )
    assert answers(tmp_path / "whole") == answers(tmp_path / "sft" / "model")
    config = tmp_path / "sft" / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), "/nowhere"))
    (config.parent / "adapter_base.json").unlink()
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 2 and "expected a model on this machine" in refused.output
    done = CliRunner().invoke(app, [*arguments, "--base", str(base)])
    assert done.exit_code == 0 and torch.equal(
        logits(CausalLM.from_pretrained(tmp_path / "whole")), logits(folder)
    )
    plain = CliRunner().invoke(app, ["merge", "-m", str(base), "-o", str(tmp_path / "no")])
    assert plain.exit_code == 2 and "model: expected a LoRA adapter" in plain.output
