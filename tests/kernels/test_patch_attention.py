"""Tests of transformers' attention on fastlm's kernels: masks, packing, caches, errors."""

import copy

import pytest
import torch
import transformers
from patch_models import (
    FAMILIES,
    WINDOW,
    assert_equal_gradients,
    few_families,
    gradients,
    model_of,
    pair,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM

import fastlm
from fastlm import InputError

# warnings of transformers and peft about each other's names do not concern the model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


TINY = {"vocab_size": 99, "d_model": 32, "pad_token_id": 0}
BIGBIRD = {
    **TINY, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip


def test_attention_whose_causality_is_in_the_mask():
    """A model that always creates a mask, and so does not declare that it is causal."""
    config = transformers.BigBirdPegasusConfig(**BIGBIRD)
    plain = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="found none among"):
        fastlm.patch(copy.deepcopy(plain), ops=("attention",))


def test_attention_with_options_that_no_kernel_has():
    """T5 adds a position bias to the scores."""
    from transformers.models.t5.modeling_t5 import T5Attention

    from fastlm.hf.attention_interface import UNSUPPORTED, attention_forward
    from fastlm.hf.patching import _attention_implementation

    config = transformers.T5Config(d_model=32, d_kv=8, num_heads=4)
    assert _attention_implementation(T5Attention(config)) is None
    assert "position_bias" in UNSUPPORTED
    q = torch.randn(1, 2, 3, 8)
    for name in UNSUPPORTED:
        with pytest.raises(InputError, match=f"{name}: expected None"):
            attention_forward(nn.Module(), q, q, q, None, **{name: torch.zeros(1)})


def test_attention_that_computes_with_its_mask():
    """The model expects a mask with four dimensions, but fastlm's have fewer."""
    from fastlm.hf.patching import _attention_implementation

    model = model_of()
    attention = model.model.layers[0].self_attn

    class Appends(type(attention)):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            if attention_mask is not None:
                attention_mask = attention_mask[:, :, :, :5]
            interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
            return interface["sdpa"](self, hidden_states, attention_mask, **kwargs)

    assert _attention_implementation(attention) == "sdpa"
    attention.__class__ = Appends
    assert _attention_implementation(attention) is None


@few_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(family, side):
    plain, fast = pair(family)
    ids, mask = tokens(3), torch.ones(3, 20, dtype=torch.long)
    for row, padding in enumerate((0, 3, 13)):
        mask[row, slice(0, padding) if side == "left" else slice(20 - padding, 20)] = 0
    # a row's first token has no label: what precedes it in its row is arbitrary
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
    """Attention stays inside each sequence where position_ids restart, in every row."""
    plain, fast = pair(family)
    ids = tokens(2, 24)
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((11, 1, 12), (24,))]
    )
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids}
    (a, ga), (b, gb) = (gradients(m, **inputs) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert_equal_gradients(ga, gb)
    expected = plain(ids[:1, 12:]).logits
    packed = fast(ids, position_ids=positions, use_cache=False).logits[:1, 12:]
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_packed_sequences_by_offsets():
    """cu_seq_lens from transformers' DataCollatorWithFlattening."""
    plain, fast = pair()
    ids, offsets = tokens(1, 24), torch.tensor([0, 11, 24], dtype=torch.int32)
    out = fast(
        ids, position_ids=torch.arange(24)[None], cu_seq_lens_q=offsets, cu_seq_lens_k=offsets,
        max_length_q=13, max_length_k=13,
    ).logits  # fmt: skip
    expected = torch.cat((plain(ids[:, :11]).logits, plain(ids[:, 11:]).logits), 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_masks_stay_small():
    from fastlm.hf.attention_interface import attention_mask as mask

    config = FAMILIES["mistral"][0]
    sliding = transformers.masking_utils.sliding_window_causal_mask_function(WINDOW)
    sizes = {"batch_size": 2, "q_length": 20, "kv_length": 20, "config": config}
    assert mask(**sizes) is None
    assert mask(**sizes, mask_function=sliding, local_size=WINDOW) is None
    full = torch.ones(2, 20, dtype=torch.bool)
    assert mask(**sizes, attention_mask=full) is None
    full[0, :3] = False
    assert mask(**sizes, attention_mask=full).shape == (2, 20)
    # empty slots of a static cache, and other patterns, need every element
    assert mask(**{**sizes, "kv_length": 32}).shape == (2, 1, 20, 32)
    chunked = transformers.masking_utils.chunked_causal_mask_function(4, torch.zeros(2).long())
    assert mask(**sizes, mask_function=chunked, local_size=4).shape == (2, 1, 20, 20)
    both = transformers.masking_utils.bidirectional_mask_function
    assert mask(**sizes, mask_function=both, allow_is_bidirectional_skip=True).all()


def test_nothing_is_looked_at_in_a_capture(monkeypatch):
    """Capturing a CUDA graph forbids waiting for values, and would fix the branch taken."""
    from fastlm.hf.attention_interface import attention_mask as mask

    sizes = {"batch_size": 2, "q_length": 20, "kv_length": 20, "config": FAMILIES["llama"][0]}
    packed = transformers.masking_utils.packed_sequence_mask_function(
        (torch.arange(20) // 8).expand(2, -1)
    )
    packed = transformers.masking_utils.and_masks(
        transformers.masking_utils.causal_mask_function, packed
    )
    sequences = {**sizes, "mask_function": packed, "use_vmap": False}
    full = torch.ones(2, 20, dtype=torch.bool)
    assert mask(**sizes, attention_mask=full) is None
    assert mask(**sequences).dim() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert mask(**sizes, attention_mask=full).shape == (2, 20)
    assert mask(**sequences).shape == (2, 1, 20, 20)


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
    """Greedy tokens past the window, for rows padded on the left."""
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


def test_refuses_attention_weights():
    _, fast = pair()
    with pytest.raises(InputError, match="output_attentions: expected False"):
        fast(tokens(), output_attentions=True)


def test_registry_without_patch():
    """``attn_implementation="fastlm"`` works alone, once it is in the registry."""
    import fastlm.hf.attention_interface  # noqa: F401

    plain, other = model_of("gemma2"), model_of("gemma2")
    other.set_attn_implementation("fastlm")
    ids = tokens()
    torch.testing.assert_close(other(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


def test_dropout_of_attention():
    """The kernel draws it: equal for a seed, different between seeds, and absent in eval."""
    _, fast = pair(attention_dropout=0.5)
    ids = tokens()

    def loss(seed):
        torch.manual_seed(seed)
        return fast(ids, labels=ids).loss

    fast.train()
    assert torch.equal(loss(1), loss(1)) and not torch.equal(loss(1), loss(2))
    fast.eval()
    assert torch.equal(loss(1), loss(2))
