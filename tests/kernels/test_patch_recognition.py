"""Tests of the modules that `fastlm.patch` recognizes, and of those that it does not."""

import copy

import pytest
import torch
from patch_models import (
    FAMILIES,
)
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm

import fastlm
from fastlm import InputError
from fastlm.hf.forwards import variant_of
from fastlm.hf.patching import patched_ops

# warnings of transformers and peft about each other's names do not concern the model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def test_nothing_is_taken_for_what_it_is_not():
    class Almost(nn.Module):
        """The parts of a GLU and of an RMSNorm with different arithmetic."""

        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.norm = Scale()

        def forward(self, x):
            return self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(self.norm(x)))

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps)

    with pytest.raises(InputError, match="found none among Almost, Linear, Scale"):
        fastlm.patch(Almost())


class Linears(nn.Module):
    """The projections of a GLU."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Clamped(Linears):
    def forward(self, x):
        gate, up = self.gate_proj(x).clamp(max=50.0), self.up_proj(x)
        return self.down_proj(nn.functional.silu(gate) * up)


class DropsInTraining(Linears):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class Scaled(Linears):
    """The same as its base class until another factor is loaded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.ones(()))

    def forward(self, x):
        return super().forward(x) * self.factor


class Norm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class OfRootMean(nn.LayerNorm):
    """An RMSNorm with a bias."""

    def forward(self, input):
        return nn.functional.rms_norm(input, (8,), self.weight, self.eps) + self.bias


class Gated(Norm):
    """Like Mamba's norm: without a gate it is an RMSNorm."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


class PixelNorm(nn.Module):
    """Normalizes its second dimension, which is the last of a matrix only."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)


class WeightlessNorm(nn.Module):
    """HRM-text's and Llama 4's norm."""

    def __init__(self):
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):
        return (
            x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        ).type_as(x)


class OutsideTheRoot(Norm):
    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(8, 8), Linears()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()

    def forward(self, hidden_states, **kwargs):
        x = hidden_states + self.self_attn(self.input_layernorm(hidden_states))[0]
        return x + self.mlp(self.post_attention_layernorm(x))


class DropsLayer(Layer):
    def forward(self, hidden_states, **kwargs):
        x = self.self_attn(self.input_layernorm(hidden_states))[0]
        x = hidden_states + nn.functional.dropout(x, 0.1, self.training)
        return x + self.mlp(self.post_attention_layernorm(x))


class ScaledLayer(Layer):
    def __init__(self):
        super().__init__()
        self.register_buffer("layer_scalar", torch.ones(()))

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states) * self.layer_scalar


@pytest.mark.parametrize(
    "module, expected_ops",
    [
        (Linears(), {"glu": 1}),
        (Clamped(), {}),
        (DropsInTraining().eval(), {}),
        (Scaled(), {}),
        (Norm(), {"rms_norm": 1}),
        (Norm(1e-12), {"rms_norm": 1}),
        (WeightlessNorm(), {"rms_norm": 1}),
        (nn.RMSNorm(8, elementwise_affine=False), {"rms_norm": 1}),
        (PixelNorm(), {}),
        (nn.LayerNorm(8), {"layer_norm": 1}),
        (nn.LayerNorm(8, bias=False), {"layer_norm": 1}),
        (OfRootMean(8), {}),
        (Gated(), {}),
        (OutsideTheRoot(1e-12), {}),
        (Layer().eval(), {"rms_norm": 2, "glu": 1, "layer": 1}),
        (DropsLayer().eval(), {"rms_norm": 2, "glu": 1}),
        (ScaledLayer().eval(), {"rms_norm": 2, "glu": 1}),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "",
)
def test_what_computes_another_thing_elsewhere(module, expected_ops):
    """Modules differ in training, with another argument, for large numbers, or other buffers."""
    module, state = copy.deepcopy(module), torch.get_rng_state()
    if expected_ops:
        fastlm.patch(module)
    else:
        with pytest.raises(InputError, match="found none among"):
            fastlm.patch(module)
    layers = sum((variant_of(m) or "  ")[1] == "layer" for m in module.modules())
    ran = patched_ops(module)
    ran.pop("linear", None)
    assert ran == {k: v for k, v in expected_ops.items() if k != "layer"}
    assert layers == expected_ops.get("layer", 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_layer_norms_of_any_width():
    """In test values with a large mean, Cohere's norm lost the digits that are compared."""
    for width in range(96, 320, 8):
        model = fastlm.patch(CohereLayerNorm(width), ops=["layer_norm"])
        assert patched_ops(model) == {"layer_norm": 1}


def test_a_weightless_norm_of_another_width():
    model, x = nn.Sequential(nn.RMSNorm(24, elementwise_affine=False)), torch.randn(3, 24)
    expected = model(x)
    assert patched_ops(fastlm.patch(model)) == {"rms_norm": 1}
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.LayerNorm(8)], ids=lambda m: type(m).__name__)
def test_a_norm_whose_weight_is_computed_later(norm):
    """torch's parametrizations, pruning and buffers take the weight out of the parameters."""
    for values in norm.parameters():
        nn.init.uniform_(values)
    model, x = nn.Sequential(norm), torch.randn(3, 8)
    expected = model(x)
    fastlm.patch(model)
    for name in [name for name, _ in norm.named_parameters()]:
        values = getattr(norm, name).detach()
        delattr(norm, name)
        norm.register_buffer(name, values)
    torch.testing.assert_close(model(x), expected)


def test_all_unpatched_norms_are_listed():
    class L2Norm(nn.Module):
        def forward(self, x):
            return nn.functional.normalize(x, dim=-1)

    model = nn.Sequential(WeightlessNorm(), L2Norm())
    x = torch.randn(3, 8)
    expected = model(x)
    ops = patched_ops(fastlm.patch(model))
    assert ops == {"rms_norm": 1} and ops.unpatched == {"L2Norm": 1}
    torch.testing.assert_close(model(x), expected)


def test_a_model_of_ones_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act_fn = nn.RMSNorm(8), nn.GELU()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            x = self.norm(x) if x.dim() == 3 else x
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    block, x = Block(), torch.randn(2, 3, 8)
    expected = block.norm(x)
    fastlm.patch(block, ops=("rms_norm",))
    assert patched_ops(block) == {"rms_norm": 1}
    torch.testing.assert_close(block.norm(x), expected)


def test_looking_disturbs_nothing():
    """torch's generator, hooks, weights, and other models with the same config are unchanged."""
    config = copy.deepcopy(FAMILIES["llama"][0])
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    other.config = model.config  # like calling LlamaForCausalLM(config) twice
    called = []
    for m in model.modules():
        m.register_forward_hook(lambda *_: called.append(1))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    fastlm.patch(model)
    assert torch.equal(torch.get_rng_state(), state) and not called
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert other.config._attn_implementation == "sdpa"


def test_a_rotation_with_more_arguments():
    """An apply_rotary_pos_emb that gets unsqueeze_dim as a positional argument."""
    from fastlm.hf.forwards import _attention

    arguments = []

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        arguments.append(unsqueeze_dim)
        return q, k

    names = {"apply_rotary_pos_emb": apply_rotary_pos_emb}
    exec("def forward(self, q, k): return apply_rotary_pos_emb(q, k, q, k, 2)", names)
    base = type("Base", (), {"forward": names["forward"]})
    q = torch.randn(1, 2, 3, 8)
    forward = _attention(base, interleaved=False, implementation=None)
    assert forward(None, q, q) == (q, q) and arguments == [2]
