"""Which layers `fastlm.quantize` quantizes, and how: groups, overrides, refusals."""

import pytest
import tiny_recipe
import torch
from torch import nn

import fastlm
from fastlm import CausalLM, InputError, ModelConfig
from fastlm.quant import QuantizedEmbedding, QuantizedLinear
from fastlm.quant.options import QuantizeOptions
from fastlm.quant.stage import Quantize
from fastlm.quant.targets import (
    check_divisible_groups,
    choose_group_size,
    meta_model,
    meta_state,
    select_targets,
)
from fastlm.stages import load_recipe


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width)
        self.lm_head = nn.Linear(width, 20)


@pytest.mark.parametrize(
    "widths, size",
    [((256, 1024), 128), ((576, 1536), 64), ((576, 1504), 32), ((100, 64), 32), ((), 128)],
)
def test_the_group_size_is_chosen_by_the_widths(widths, size):
    assert choose_group_size(widths) == size
    if len(widths) == 2:
        model = fastlm.quantize(Block(*widths), "w4a16")
        assert {m.group_size for m in model.children()} == {size}


def test_overrides_by_pattern():
    model = fastlm.quantize(
        Block(64, 32), "w4a16", overrides={"*_proj": 8, "down*": "w8a8", "embed": 16}
    )
    assert isinstance(model.embed, nn.Embedding)
    layers = {n: (m.bits, m.act_bits) for n, m in model.named_children() if n != "embed"}
    assert layers == {"up_proj": (8, 16), "down_proj": (8, 8), "lm_head": (4, 16)}
    options = QuantizeOptions(overrides=("a*=w8a16", "b=16"))
    assert options.formats() == {"a*": "w8a16", "b": 16}


def test_asymmetric():
    model = fastlm.quantize(Block(64, 32), "w4a16", symmetric=False)
    assert all(m.zeros is not None for m in model.children())
    kinds = [type(m) for m in model.children()]
    assert kinds.count(QuantizedLinear) == 3 and kinds.count(QuantizedEmbedding) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overrides": {"*.dwn": 8}}, r"a pattern that matches a layer, got '\*.dwn'; .* is down"),
        (
            {"overrides": {"embed": "w5a16"}},
            r"overrides: embed: expected one of w4a16.* got 'w5a16'",
        ),
        (
            {"group_size": 128, "require_divisible_groups": True},
            r"group_size: expected groups that divide .* got 128 for embed, up_proj, lm_head"
            r" \(576 wide\); 64 and 32 would work",
        ),
    ],
)
def test_refused_before_any_work(options, message):
    model = Block(576, 1536)
    with pytest.raises(InputError, match=message):
        fastlm.quantize(model, "w4a16", **options)
    assert isinstance(model.embed, nn.Embedding) and isinstance(model.up_proj, nn.Linear)


def test_divisible_groups():
    assert (
        fastlm.quantize(Block(576, 64), "w4a16", require_divisible_groups=True).embed.group_size
        == 64
    )
    check_divisible_groups({"a": 100}, -1)
    with pytest.raises(InputError, match=r"expected .* got 32 for a \(100 wide\); only -1 would"):
        check_divisible_groups({"a": 100}, 32)
    with pytest.raises(InputError, match=r"overrides: expected PATTERN=FORMAT.*got 'lm_head'"):
        QuantizeOptions(overrides=("lm_head",)).check()


def test_a_tied_head_cannot_have_other_bits():
    model = Block(64, 64)
    model.lm_head.weight = model.embed.weight
    with pytest.raises(InputError, match=r"lm_head shares its weight with embed.* got 8 and 4"):
        fastlm.quantize(model, "w4a16", overrides={"lm_head": 8})
    assert torch.is_tensor(model.embed.weight)


def test_a_refusal_names_layers_of_every_width():
    widths = {f"wide.{i}": 96 for i in range(7)} | {"narrow": 80, "fits": 64}
    with pytest.raises(InputError) as error:
        check_divisible_groups(widths, 64)
    text = "64 for wide.0, wide.1, wide.2, wide.3 (96 wide) and narrow (80 wide) and 3 more layers;"
    assert text in str(error.value)


WIDE = {"hidden_size": 192, "intermediate_size": 160, "num_attention_heads": 2}
EXPORT = "require_divisible_groups = {}\n[[stage]]\nkind = 'export'\nformat = '{}'\n"


@pytest.mark.parametrize(
    "options, divisible, format, message",
    [
        (
            {"group_size": 64}, "true", "gguf",
            r"quantize.group_size: expected groups that divide .*got 64 for"
            r" model.layers.0.mlp.down_proj \(160 wide\); 32 would work",
        ),
        (
            {"group_size": 128}, "true", "gguf",
            r"got 128 for model.embed_tokens, .*k_proj, .* \(192 wide\) and model.layers.0.mlp."
            r"down_proj \(160 wide\) and 3 more layers; 32 would work",
        ),
        (
            {"group_size": 64}, "false", "compressed-tensors",
            r"export.model.layers.0.mlp.down_proj: expected groups of 32, 64 or 128 .* 160 columns"
            r" .* got 64: --group-size 32 would work",
        ),
        (
            {"group_size": 16}, "false", "gguf",
            r"export.model.embed_tokens.weight: expected groups of a multiple of 32 for GGUF"
            r" \(quantize with --group-size 32\), got 16; also refused: .* and 2 more layers",
        ),
        (
            {"symmetric": False, "group_size": 32}, "false", "compressed-tensors",
            "export.model: expected offsets of whole steps .* quantize symmetrically",
        ),
        ({"overrides": ["*.2.*=8"]}, "false", "gguf", "quantize.overrides: expected a pattern"),
        ({"head": 8}, "false", "gguf", "quantize.head: CausalLM has no head besides"),
    ],
)  # fmt: skip
def test_a_recipe_is_refused_before_its_first_stage(tmp_path, options, divisible, format, message):
    path = tiny_recipe.write(tmp_path, EXPORT.format(divisible, format))
    sets = [f"pretrain.model.{key}={value}" for key, value in WIDE.items()]
    assert load_recipe(path, [*sets, "quantize.group_size=32"])
    with pytest.raises(InputError, match=message):
        load_recipe(path, [*sets, *(f"quantize.{k}={str(v).lower() if v is False else repr(v)}"
                                    for k, v in options.items())])  # fmt: skip


def test_a_recipe_that_exports_floats(tmp_path):
    more = "[[stage]]\nkind = 'export'\nfrom = 'pretrain'\nformat = '{}'\n"
    assert load_recipe(tiny_recipe.write(tmp_path / "a", more.format("gguf")))
    path = tiny_recipe.write(tmp_path / "b", more.format("compressed-tensors"))
    with pytest.raises(InputError, match=r"export.model: expected quantized layers"):
        load_recipe(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_meta_state_equals_the_quantized_model(tied, symmetric):
    config = ModelConfig(
        vocab_size=64, hidden_size=48, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    options = {"group_size": 32, "overrides": {"*.o_proj": 8, "*.up_proj": 16}}
    model = meta_model(config)
    overrides = ("*.o_proj=8", "*.up_proj=16")
    targets = select_targets(
        model, QuantizeOptions(group_size=32, symmetric=symmetric, overrides=overrides)
    )
    drawn = meta_state(model, targets)
    real = fastlm.quantize(CausalLM(config), "w4a16", symmetric=symmetric, **options).weights()
    assert drawn.keys() == real.keys()
    for name, weight in real.items():
        assert type(weight) is type(drawn[name]) and weight.shape == drawn[name].shape
        assert weight.nbytes == drawn[name].nbytes, name


def test_groups_are_checked_before_calibration_text_is_read(tmp_path, monkeypatch):
    import preference_models

    preference_models.make_base(tmp_path / "base")
    (tmp_path / "text.txt").write_text("tree river stone bird " * 60)
    read = "fastlm.quant.calibration.text_windows"
    monkeypatch.setattr(read, lambda *a, **k: pytest.fail("read"))
    stage = Quantize(group_size=24, require_divisible_groups=True)
    with pytest.raises(InputError, match="expected groups that divide"):
        stage(tmp_path / "q", model=tmp_path / "base", calibration=tmp_path / "text.txt")
