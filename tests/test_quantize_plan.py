"""Which layers `fastlm.quantize` quantizes, and how: groups, overrides, refusals."""

import pytest
import torch
from torch import nn

import fastlm
from fastlm import InputError
from fastlm.quant import QuantizedEmbedding, QuantizedLinear
from fastlm.quant.plan import check_whole_groups, choose_group_size, parse_overrides


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
    assert parse_overrides(["a*=w8a16", "b=16"]) == {"a*": "w8a16", "b": 16}


def test_asymmetric():
    model = fastlm.quantize(Block(64, 32), "w4a16", symmetric=False)
    assert all(m.zeros is not None for m in model.children())
    kinds = [type(m) for m in model.children()]
    assert kinds.count(QuantizedLinear) == 3 and kinds.count(QuantizedEmbedding) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"overrides": {"*.dwn": 8}}, r"a pattern that matches a layer, got '\*.dwn'; .* is down"),
        ({"overrides": {"embed": "w5a16"}}, r"overrides: embed: wanted one of w4a16.* got 'w5a16'"),
        (
            {"group_size": 128, "whole_groups": True},
            r"group_size: whole_groups wants .* got 128 for embed of width 576 and 2 more layers;"
            " 64 and 32 would do",
        ),
    ],
)
def test_refused_before_any_work(options, message):
    model = Block(576, 1536)
    with pytest.raises(InputError, match=message):
        fastlm.quantize(model, "w4a16", **options)
    assert isinstance(model.embed, nn.Embedding) and isinstance(model.up_proj, nn.Linear)


def test_whole_groups():
    assert fastlm.quantize(Block(576, 64), "w4a16", whole_groups=True).embed.group_size == 64
    check_whole_groups({"a": 100}, -1)
    with pytest.raises(InputError, match=r"AWQ wants .* got 32 for a of width 100; only -1 would"):
        check_whole_groups({"a": 100}, 32, "AWQ")
    with pytest.raises(InputError, match=r"overrides: wanted PATTERN=FORMAT.*got 'lm_head'"):
        parse_overrides(["lm_head"])


def test_a_tied_head_cannot_have_bits_of_its_own():
    model = Block(64, 64)
    model.lm_head.weight = model.embed.weight
    with pytest.raises(InputError, match=r"lm_head shares its weight with embed.* got 8 and 4"):
        fastlm.quantize(model, "w4a16", overrides={"lm_head": 8})
    assert torch.is_tensor(model.embed.weight)
