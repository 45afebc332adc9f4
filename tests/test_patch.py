"""`fastlm.patch`: the same results, on fastlm's kernels, and back again."""

import copy
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import fastlm
from fastlm import InputError, backend
from fastlm.patched import variant_of
from fastlm.patching import OPS, patched_ops

transformers.logging.set_verbosity_error()
# what transformers and peft say of each other's names is not about the model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

WINDOW = 8  # shorter than the sequences: it must be seen
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, **IDS,
}  # fmt: skip
_NEOX = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
_GPT2 = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "resid_pdrop": 0,
    "attn_pdrop": 0,
    "embd_pdrop": 0,
}
_ALL = {"rope": 2, "attention": 2, "glu": 2, "linear_cross_entropy": 1}
# family -> (config, what `patch` finds in it, decoder layers that add and norm at once)
FAMILIES = {
    "llama": (LlamaConfig(**SMALL), {**_ALL, "rms_norm": 5}, 2),
    "mistral": (MistralConfig(**SMALL, sliding_window=WINDOW), {**_ALL, "rms_norm": 5}, 2),
    "qwen2": (
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        {**_ALL, "rms_norm": 5},
        2,
    ),
    "qwen3": (Qwen3Config(**SMALL), {**_ALL, "rms_norm": 9}, 2),
    "smollm3": (SmolLM3Config(**SMALL, no_rope_layers=[1, 0]), {**_ALL, "rms_norm": 5}, 2),
    "gemma": (GemmaConfig(**SMALL), {**_ALL, "rms_norm": 5}, 2),
    "gemma2": (
        Gemma2Config(
            **SMALL, sliding_window=WINDOW, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        ),
        {**_ALL, "rms_norm": 9},
        2,
    ),
    "gemma3": (
        Gemma3TextConfig(
            **SMALL, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
        ),
        {**_ALL, "rms_norm": 13},
        2,
    ),
    "phi3": (
        Phi3Config(**SMALL, partial_rotary_factor=0.5, sliding_window=WINDOW),
        {**_ALL, "rms_norm": 5},
        2,
    ),
    "olmo2": (Olmo2Config(**SMALL), {**_ALL, "rms_norm": 9}, 0),
    "granite": (
        GraniteConfig(**SMALL, logits_scaling=3.0, residual_multiplier=0.5),
        {**_ALL, "rms_norm": 5},
        0,
    ),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), _ALL, 0),
    "gpt2": (
        GPT2Config(vocab_size=99, **_GPT2, **IDS), {"attention": 2, "linear_cross_entropy": 1}, 0
    ),
    "neox": (
        GPTNeoXConfig(**_NEOX, rotary_pct=0.25),
        {"rope": 2, "attention": 2, "linear_cross_entropy": 1},
        0,
    ),
    "mixtral": (
        MixtralConfig(**SMALL, num_local_experts=2),
        {"rope": 2, "attention": 2, "rms_norm": 5, "linear_cross_entropy": 1},
        2,
    ),
}  # fmt: skip
each_family = pytest.mark.parametrize("family", FAMILIES)
# sliding windows, softcaps, offsets and sandwich norms, LayerNorm: every path of the mask
few_families = pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt2"])


def model_of(family="llama", dtype=torch.float32, **changes):
    config = copy.deepcopy(FAMILIES[family][0])
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1 or "embed" in name or "wte" in name:
                p.add_(0.3 * torch.randn_like(p))  # no norm is 1, no bias 0, logits differ
    return model.to(dtype)


def pair(family="llama", *, ops=None, **options):
    """The same model twice, the second one patched."""
    plain = model_of(family, **options)
    return plain, fastlm.patch(copy.deepcopy(plain), ops=ops)


def tokens(batch=2, length=20):
    return torch.randint(3, 99, (batch, length))


def gradients(model, **inputs):
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(a, b, tolerance=1e-4):
    assert a.keys() == b.keys()
    for name in a:
        scale = a[name].abs().max().clamp_min(1e-6)
        error = (a[name] - b[name]).abs().max() / scale
        assert error < tolerance, f"{name}: {error:.1e}"


@each_family
def test_computes_the_same(family):
    plain, fast = pair(family)
    _, found, layers = FAMILIES[family]
    assert patched_ops(fast) == found
    assert sum((variant_of(m) or "  ")[1] == "layer" for m in fast.modules()) == layers
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    a, ga = gradients(plain, input_ids=ids, labels=labels)
    b, gb = gradients(fast, input_ids=ids, labels=labels)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert b.logits is None
    assert_equal_gradients(ga, gb)
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@each_family
def test_unpatch_gives_back_the_model(family):
    model = model_of(family).eval()
    ids = tokens()
    before = {n: type(m) for n, m in model.named_modules()}
    states = {n: vars(m).keys() for n, m in model.named_modules()}
    keys, implementation = list(model.state_dict()), model.config._attn_implementation
    expected = model(ids, labels=ids)
    fastlm.patch(model)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "fastlm"
    assert fastlm.unpatch(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert {n: vars(m).keys() for n, m in model.named_modules()} == states
    assert model.config._attn_implementation == implementation and patched_ops(model) == {}
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
    fastlm.unpatch(model)  # of a model that is not patched: nothing


@pytest.mark.parametrize("op", OPS)
def test_ops_choose(op):
    plain, fast = pair(ops=(op,))
    assert patched_ops(fast).keys() == {op}
    ids = tokens()
    (a, ga), (b, gb) = (gradients(m, input_ids=ids, labels=ids) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert (b.logits is None) == (op == "linear_cross_entropy")
    assert_equal_gradients(ga, gb)


def test_a_second_call_replaces_the_first():
    model = model_of()
    assert fastlm.patch(model) is model
    everything, classes = patched_ops(model), [type(m) for m in model.modules()]
    config = model.config
    fastlm.patch(model)
    assert [type(m) for m in model.modules()] == classes and model.config is config
    fastlm.patch(model, ops=("glu",))
    assert patched_ops(model) == {"glu": 2} and model.config._attn_implementation == "sdpa"
    fastlm.patch(model)
    assert patched_ops(model) == everything
    fastlm.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_kernels_run_and_no_logits_exist(monkeypatch):
    """Every op on the path of a training step, and no tensor as large as the logits."""
    _, model = pair(vocab_size=5000)
    ids, seen, largest = tokens(), set(), 0
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if function.namespace == "fastlm":
                seen.add(function.__name__.partition(".")[0])
            for t in out if isinstance(out, tuple | list) else (out,):
                if torch.is_tensor(t) and t.dim() and t.shape[0] in (2, 40, 38):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        model(ids, labels=ids).loss.backward()
    forward = {"rms_norm", "rope", "glu", "attention", "linear_cross_entropy"}
    assert seen >= forward | {"rms_norm_backward", "glu_backward", "attention_backward"}
    assert largest < 38 * 5000


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: fastlm.patch(m, ops=("rms_norm", "rmsnorm")), "ops: wanted some of rms_norm, "),
        (lambda m: fastlm.patch(m, ops="rms_norm"), "ops: wanted several names"),
        (lambda m: fastlm.patch(nn.Linear(2, 2)), "found none among Linear"),
        (lambda m: fastlm.patch("gpt2"), "model: wanted a torch module, got str"),
        (lambda m: fastlm.unpatch(None), "model: wanted a torch module, got NoneType"),
        (
            lambda m: fastlm.patch(model_of("gpt2"), ops=("attention", "glu", "rope")),
            "wanted modules for glu and rope, found none among .*GPT2MLP",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(model_of())
    assert "\n" not in str(caught.value)


def test_refuses_a_model_of_fastlm():
    config = fastlm.ModelConfig(
        model_type="llama", **{k: v for k, v in SMALL.items() if k not in IDS}
    )
    with pytest.raises(InputError, match=r"found none among .*CausalLM"):
        fastlm.patch(fastlm.CausalLM(config))


def test_a_refused_model_is_as_it_was():
    model = fastlm.patch(model_of(), ops=("rms_norm", "attention"))
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward  # as accelerate does
    before = patched_ops(model)
    with pytest.raises(InputError, match="LlamaMLP with one of its own"):
        fastlm.patch(model)
    assert patched_ops(model) == before and model.config._attn_implementation == "fastlm"


def test_nothing_is_taken_for_what_it_is_not():
    class Almost(nn.Module):
        """The parts of a GLU and of an RMSNorm, other arithmetic."""

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
    """As before until somebody loads another number."""

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


class Gated(Norm):
    """As Mamba's: without a gate it is an RMSNorm."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


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
    "module, found",
    [
        (Linears(), {"glu": 1}),
        (Clamped(), {}),
        (DropsInTraining().eval(), {}),
        (Scaled(), {}),
        (Norm(), {"rms_norm": 1}),
        (Norm(1e-12), {"rms_norm": 1}),
        (Gated(), {}),
        (OutsideTheRoot(1e-12), {}),
        (Layer().eval(), {"rms_norm": 2, "glu": 1, "layer": 1}),
        (DropsLayer().eval(), {"rms_norm": 2, "glu": 1}),
        (ScaledLayer().eval(), {"rms_norm": 2, "glu": 1}),
    ],
    ids=lambda m: type(m).__name__ if isinstance(m, nn.Module) else "",
)
def test_what_computes_another_thing_elsewhere(module, found):
    """In training, with another argument, for large numbers, with other values in its buffers."""
    module, state = copy.deepcopy(module), torch.get_rng_state()
    if found:
        fastlm.patch(module)
    else:
        with pytest.raises(InputError, match="found none among"):
            fastlm.patch(module)
    layers = sum((variant_of(m) or "  ")[1] == "layer" for m in module.modules())
    assert patched_ops(module) == {k: v for k, v in found.items() if k != "layer"}
    assert layers == found.get("layer", 0)
    assert torch.equal(torch.get_rng_state(), state)


TINY = {"vocab_size": 99, "d_model": 32, "pad_token_id": 0}
BIGBIRD = {
    **TINY, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def test_attention_whose_causality_is_in_the_mask():
    """Of a model that always makes one, and so does not say that it is causal."""
    config = transformers.BigBirdPegasusConfig(**BIGBIRD)
    plain = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="found none among"):
        fastlm.patch(copy.deepcopy(plain), ops=("attention",))


def test_attention_with_options_that_no_kernel_has():
    """T5 adds a bias of positions to the scores."""
    from transformers.models.t5.modeling_t5 import T5Attention

    from fastlm.attention_interface import UNSERVED, attention_forward
    from fastlm.patching import _implementation

    config = transformers.T5Config(d_model=32, d_kv=8, num_heads=4)
    assert _implementation(T5Attention(config)) is None
    assert "position_bias" in UNSERVED
    q = torch.randn(1, 2, 3, 8)
    for name in UNSERVED:
        with pytest.raises(InputError, match=f"{name}: wanted None"):
            attention_forward(nn.Module(), q, q, q, None, **{name: torch.zeros(1)})


def test_attention_that_computes_with_its_mask():
    """It takes the mask for one of four dimensions: fastlm's are smaller."""
    from fastlm.patching import _implementation

    model = model_of()
    attention = model.model.layers[0].self_attn

    class Appends(type(attention)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            if attention_mask is not None:
                attention_mask = attention_mask[:, :, :, :5]
            interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
            return interface["sdpa"](self, hidden_states, attention_mask, **kwargs)

    assert _implementation(attention) == "sdpa"
    attention.__class__ = Appends
    assert _implementation(attention) is None


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
    """Neither torch's generator, nor hooks, nor weights, nor another model of the same config."""
    config = copy.deepcopy(FAMILIES["llama"][0])
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    other.config = model.config  # as LlamaForCausalLM(config) twice
    called = []
    for m in model.modules():
        m.register_forward_hook(lambda *_: called.append(1))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    fastlm.patch(model)
    assert torch.equal(torch.get_rng_state(), state) and not called
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert other.config._attn_implementation == "sdpa"


@few_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    plain, fast = pair(family)
    ids, mask = tokens(3), torch.ones(3, 20, dtype=torch.long)
    for row, padding in enumerate((0, 3, 13)):
        mask[row, slice(0, padding) if side == "left" else slice(20 - padding, 20)] = 0
    # a row's first token has no label: what stands before it in its row is arbitrary
    labels = ids.masked_fill(mask.cumsum(1) * mask <= 1, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    (a, ga), (b, gb) = (gradients(m, **inputs) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert_equal_gradients(ga, gb)
    del inputs["labels"]
    x, y = (m(**inputs).logits[mask.bool()] for m in (plain, fast))
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


@few_families
def test_packed_sequences(family):
    """position_ids that start again: attention stays inside, in every row."""
    plain, fast = pair(family)
    ids = tokens(2, 24)
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((11, 1, 12), (24,))]
    )
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    (a, ga), (b, gb) = (gradients(m, **inputs) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert_equal_gradients(ga, gb)
    alone = plain(ids[:1, 12:]).logits
    packed = fast(ids, position_ids=positions, use_cache=False).logits[:1, 12:]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def test_packed_sequences_by_offsets():
    """cu_seq_lens of transformers' DataCollatorWithFlattening."""
    plain, fast = pair()
    ids, offsets = tokens(1, 24), torch.tensor([0, 11, 24], dtype=torch.int32)
    out = fast(
        ids, position_ids=torch.arange(24)[None], cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        max_length_q=13, max_length_k=13,
    ).logits  # fmt: skip
    expected = torch.cat((plain(ids[:, :11]).logits, plain(ids[:, 11:]).logits), 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_masks_stay_small():
    from fastlm.attention_interface import attention_mask as mask

    config = FAMILIES["mistral"][0]
    sliding = transformers.masking_utils.sliding_window_causal_mask_function(WINDOW)
    sizes = {"batch_size": 2, "q_length": 20, "kv_length": 20, "config": config}
    assert mask(**sizes) is None
    assert mask(**sizes, mask_function=sliding, local_size=WINDOW) is None
    full = torch.ones(2, 20, dtype=torch.bool)
    assert mask(**sizes, attention_mask=full) is None
    full[0, :3] = False
    assert mask(**sizes, attention_mask=full).shape == (2, 20)
    # a static cache's empty places, and other patterns, need every element
    assert mask(**{**sizes, "kv_length": 32}).shape == (2, 1, 20, 32)
    chunked = transformers.masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long())
    assert mask(**sizes, mask_function=chunked, local_size=4).shape == (2, 1, 20, 20)
    both = transformers.masking_utils.bidirectional_mask_function
    assert mask(**sizes, mask_function=both, allow_is_bidirectional_skip=True).all()


def test_a_mask_of_the_callers_own():
    plain, fast = pair()
    ids = tokens()
    allowed = torch.rand(2, 1, 20, 20) < 0.5
    allowed |= torch.eye(20, dtype=torch.bool)
    for mask in (allowed, torch.zeros(2, 1, 20, 20).masked_fill(~allowed, -1e30)):
        torch.testing.assert_close(
            fast(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


@few_families
@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(family, cache):
    """Greedy tokens, past the window, of rows padded on the left."""
    plain, fast = (m.eval() for m in pair(family))
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {
        "max_new_tokens": 10, "do_sample": False, "attention_mask": mask, "eos_token_id": None,
    }  # fmt: skip
    if cache:
        options["cache_implementation"] = cache
        options["disable_compile"] = True
    assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))


def test_loss_options():
    plain, fast = pair()
    ids, other = tokens(), tokens()
    for options in (
        {"labels": ids, "num_items_in_batch": 50},
        {"labels": ids, "num_items_in_batch": torch.tensor(50)},
        {"labels": ids, "shift_labels": other},
        {"labels": ids, "return_dict": False},
        {"labels": ids, "use_cache": True},
        {"labels": ids, "output_hidden_states": True},
    ):
        a, b = (m(input_ids=ids, **options) for m in (plain, fast))
        torch.testing.assert_close(b[0], a[0], rtol=1e-6, atol=1e-6)
        assert isinstance(b, tuple) == isinstance(a, tuple)
        if "output_hidden_states" in options:
            for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
        if "use_cache" in options:
            assert {k for k in a if k != "logits"} == set(b)


def test_what_needs_logits_has_them():
    """Losses and heads that the kernel does not know run as before."""
    plain, fast = pair()
    ids = tokens()
    a, b = (m(input_ids=ids, labels=ids[:, -5:], logits_to_keep=5) for m in (plain, fast))
    assert b.logits.shape == (2, 5, 99) and torch.allclose(a.loss, b.loss)
    fast.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    out = fast(ids, labels=ids)
    assert torch.equal(out.loss, out.logits.sum())
    del fast._loss_function
    hooked = []
    handle = fast.lm_head.register_forward_hook(lambda *_: hooked.append(1))
    assert fast(ids, labels=ids).logits is not None and hooked
    handle.remove()
    assert fast(ids, labels=ids).logits is None
    plain, fast = pair("mixtral")
    a, b = (m(ids, labels=ids, output_router_logits=True) for m in (plain, fast))
    assert b.logits is not None and b.aux_loss > 0 and torch.allclose(a.loss, b.loss)


def test_hooks_see_what_they_saw():
    plain, fast = pair()
    ids, seen = tokens(), {}
    for model in (plain, fast):
        for name, module in model.named_modules():
            if name.endswith(("layernorm", "mlp", "self_attn", "layers.1")):
                module.register_forward_hook(
                    lambda m, i, o, k=(model, name): seen.__setitem__(
                        k, o[0] if "attn" in k[1] else o
                    )
                )
        model(ids)
    for (model, name), out in list(seen.items()):
        if model is plain:
            torch.testing.assert_close(seen[fast, name], out, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_activation():
    """Of those who look at neurons: a GLU whose activation is watched runs the model's own code."""
    plain, fast = pair()
    ids, seen = tokens(), []
    for model in (plain, fast):
        act = model.model.layers[0].mlp.act_fn
        act.register_forward_hook(lambda m, i, o: seen.append(o) or o * 2)
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_unpatch_refuses_what_lies_on_top():
    """parametrize (and fully_shard) make a class of their own from the patched one."""
    model = fastlm.patch(model_of())
    norm, ids = model.model.norm, tokens()
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    expected, found = model(ids).logits, patched_ops(model)
    for function in (fastlm.unpatch, fastlm.patch):
        with pytest.raises(InputError, match="ParametrizedLlamaRMSNorm made on top of it"):
            function(model)
    assert patched_ops(model) == found and torch.equal(model(ids).logits, expected)
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert patched_ops(fastlm.unpatch(model)) == {}


def test_a_rotation_told_more():
    """An apply_rotary_pos_emb that is given unsqueeze_dim by its place."""
    from fastlm.patched import _attention

    seen = []

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        seen.append(unsqueeze_dim)
        return q, k

    names = {"apply_rotary_pos_emb": apply_rotary_pos_emb}
    exec("def forward(self, q, k): return apply_rotary_pos_emb(q, k, q, k, 2)", names)
    base = type("Base", (), {"forward": names["forward"]})
    q = torch.randn(1, 2, 3, 8)
    forward = _attention(base, interleaved=False, implementation=None)
    assert forward(None, q, q) == (q, q) and seen == [2]


def test_refuses_attention_weights():
    _, fast = pair()
    with pytest.raises(InputError, match="output_attentions: wanted False"):
        fast(tokens(), output_attentions=True)


def test_registry_without_patch():
    """``attn_implementation="fastlm"`` alone, once the registry has it."""
    import fastlm.attention_interface  # noqa: F401

    plain, other = model_of("gemma2"), model_of("gemma2")
    other.set_attn_implementation("fastlm")
    ids = tokens()
    torch.testing.assert_close(other(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@few_families
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    plain, fast = pair(family)
    ids = tokens()
    _, expected = gradients(fast.train(), input_ids=ids, labels=ids)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    _, found = gradients(fast, input_ids=ids, labels=ids)
    assert all(torch.equal(found[n], g) for n, g in expected.items())
    _, plainly = gradients(plain.train(), input_ids=ids, labels=ids)
    assert_equal_gradients(plainly, found)


@each_family
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision(family, mode):
    """No further from float32 than the model itself in the same precision."""
    exact = model_of(family)
    ids = tokens()
    truth, true_gradients = gradients(exact, input_ids=ids, labels=ids)
    plain, fast = pair(family, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    losses, errors = [], []
    for model in (plain, fast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append((loss.float() - truth.loss).abs().item())
        total = 0.0
        for n, p in model.named_parameters():
            assert p.grad is None or p.grad.dtype == p.dtype
            if n in true_gradients:
                total += (p.grad.float() - true_gradients[n]).norm().item() ** 2
        errors.append(total**0.5)
    scale = sum(g.norm().item() ** 2 for g in true_gradients.values()) ** 0.5
    # noise of one draw: within twice the plain model's, or 1 % (a few of bfloat16's 2^-8)
    assert losses[1] <= 2 * losses[0] + 1e-2
    assert errors[1] <= 1.5 * errors[0] + 1e-2 * scale


def test_every_backend():
    plain, fast = pair()
    ids = tokens()
    with backend.use_backend("reference"):
        torch.testing.assert_close(fast(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_copies_and_pickles(tmp_path):
    plain, fast = pair("gemma2")
    ids = tokens()
    expected = fast(ids, labels=ids).loss
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert patched_ops(again) == patched_ops(fast)
        assert torch.equal(again(ids, labels=ids).loss, expected)
        fastlm.unpatch(again)
        assert torch.equal(again(ids).logits, plain(ids).logits)
    assert patched_ops(fast)
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert patched_ops(loaded) == {} and type(loaded) is type(plain)
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_compiles_in_one_graph(family):
    plain, fast = pair(family)
    names = set()

    def watch(graph, inputs):
        names.update(str(n.target) for n in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(fast, fullgraph=True, backend=watch)
    ids = tokens()
    _, expected = gradients(plain, input_ids=ids, labels=ids)
    fast.zero_grad()
    compiled(input_ids=ids, labels=ids).loss.backward()
    found = {n: p.grad for n, p in fast.named_parameters() if p.grad is not None}
    assert_equal_gradients(expected, found)
    ops = {n.split(".")[1] for n in names if n.startswith("fastlm.")}
    assert ops == {"rms_norm", "rope", "glu", "attention", "linear_cross_entropy"}


def train(model, steps, dtype=torch.float32):
    torch.manual_seed(1)
    table = torch.randint(3, 99, (99,))  # each token is followed by the same one: to be learnt
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        rows = [torch.randint(3, 99, (8, 1))]
        for _ in range(15):
            rows.append(table[rows[-1]])
        ids = torch.cat(rows, 1)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_of_training(dtype):
    plain, fast = pair(dtype=dtype)
    a, b = train(plain.train(), 50), train(fast.train(), 50)
    assert a[-1] < 0.5 * a[0]
    # float32: rounding, which training lets grow; bfloat16: a few of its roundings a step
    assert ((a - b).abs() / a).max() < (1e-3 if dtype == torch.float32 else 5e-2)


class Rows(torch.utils.data.Dataset):
    """Documents of unequal length: micro-batches of unequal numbers of labels."""

    def __init__(self, count=32):
        generator = torch.Generator().manual_seed(2)
        self.rows = []
        for i in range(count):
            ids = torch.randint(3, 99, (16,), generator=generator)
            labels = ids.clone()
            labels[: i % 12] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer_losses(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4,
        max_steps=4, logging_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True, seed=3,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        eval_strategy="steps", eval_steps=4, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert trainer.model_accepts_loss_kwargs  # num_items_in_batch reaches the loss
    return [log.get("loss", log.get("eval_loss")) for log in trainer.state.log_history[:-1]]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "checkpointing"])
def test_trainer(tmp_path, mode):
    plain, fast = pair()
    options = {"bf16": mode == "bf16", "gradient_checkpointing": mode == "checkpointing"}
    a = trainer_losses(plain, tmp_path / "a", **options)
    b = trainer_losses(fast, tmp_path / "b", **options)
    assert len(a) == 5 and a[0] != a[1]
    torch.testing.assert_close(b, a, rtol=1e-2 if mode == "bf16" else 1e-4, atol=0)
    ids = tokens()
    fastlm.unpatch(fast)  # also where accelerate wrapped the forward
    fast.eval()
    assert fast(ids, labels=ids).logits is not None
    assert patched_ops(fast) == {}


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora(first):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False
    )
    plain, fast = peft.get_peft_model(model_of(), config), model_of()
    if first == "patch":
        fast = peft.get_peft_model(fastlm.patch(fast), config)
    else:
        fast = fastlm.patch(peft.get_peft_model(fast, config))
    fast.load_state_dict(plain.state_dict())
    assert patched_ops(fast) == FAMILIES["llama"][1]
    ids = tokens()
    (a, ga), (b, gb) = (gradients(m, input_ids=ids, labels=ids) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert b.logits is None
    assert len(gb) == 12 and all("lora" in n for n in gb)
    assert_equal_gradients(ga, gb)


def test_lora_on_the_head_keeps_its_logits():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(fastlm.patch(model_of()), config)
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits is not None
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_dropout_of_attention():
    """Drawn by the kernel: repeats with the seed, differs between seeds, and not in eval."""
    _, fast = pair(attention_dropout=0.5)
    ids = tokens()

    def loss(seed):
        torch.manual_seed(seed)
        return fast(ids, labels=ids).loss

    fast.train()
    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    fast.eval()
    assert torch.equal(loss(1), loss(2))
