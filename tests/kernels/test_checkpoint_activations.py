"""Tests of activation checkpointing: the same bits in less memory."""

from dataclasses import replace

import pytest
import tiny_run
import torch
from torch.autograd.graph import saved_tensors_hooks

import fastlm
from fastlm.data.shards import BatchSampler, TokenDataset
from fastlm.errors import InputError
from fastlm.model.layers import checkpoint_activations
from fastlm.train.loop import train
from fastlm.train.pretrain import PretrainObjective

LAYERS = 4


def model(dtype=torch.bfloat16, **options):
    config = fastlm.ModelConfig(
        **{
            "model_type": "llama", "vocab_size": tiny_run.VOCAB, "hidden_size": 32,
            "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
            "max_position_embeddings": 64, **options,
        }
    )  # fmt: skip
    return fastlm.CausalLM(config, seed=0).to(dtype).train()


def step(net, recomputed, **call):
    """The loss and gradients of one step, and the bytes that the forward saved for the backward."""
    net.model.checkpoint_activations = recomputed
    torch.manual_seed(5)
    ids = torch.randint(0, tiny_run.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    stored: dict[int, int] = {}

    def pack(t):
        stored[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = net(ids, labels=ids, **call).loss
    loss.backward()
    draws = torch.rand(3)
    grads = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    return (loss.detach(), *grads, draws), sum(stored.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recomputed", [1, 3, True, 99])
@pytest.mark.parametrize(
    "options, call",
    [
        ({}, {}),
        ({"attention_dropout": 0.2}, {}),
        ({"model_type": "gemma2", "head_dim": 16}, {}),
        ({}, {"cu_seqlens": torch.tensor([0, 9, 30, 48], dtype=torch.int32)}),
    ],
    ids=["llama", "dropout", "gemma2", "documents"],
)
def test_the_same_bits(dtype, recomputed, options, call):
    net = model(dtype, **options)
    (plain, max_bytes), (actual, min_bytes) = (
        step(net, value, **call) for value in (False, recomputed)
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, actual))
    assert min_bytes < max_bytes


def test_each_layer_saves_memory():
    net = model()
    sizes = [step(net, recomputed)[1] for recomputed in (0, 1, 2, 3, True)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.5 * sizes[0]


def test_evaluation_computes_nothing_twice():
    net = model()
    net.model.checkpoint_activations = True
    calls = []
    for layer in net.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.zeros(1, 8, dtype=torch.long)
    with torch.no_grad():
        net(ids, labels=ids)
    assert len(calls) == LAYERS
    net.eval()
    net(ids, labels=ids).loss.backward()
    assert len(calls) == 2 * LAYERS
    net.train()
    net(ids, labels=ids).loss.backward()
    assert len(calls) == 4 * LAYERS


def test_a_training_with_it_has_the_same_weights(tmp_path):
    tiny_run.shards(tmp_path)
    weights = []
    for recomputed in (0, 2):
        net = model(torch.float32)
        sampler = BatchSampler(TokenDataset(tmp_path / "train"), 2, 16, seed=7)
        options = replace(
            tiny_run.OPTIONS, max_steps=3, validations=0, sample_at=(),
            checkpoint_activations=recomputed,
        )  # fmt: skip
        train(PretrainObjective(net, sampler, None, options), options, tmp_path / f"{recomputed}")
        assert net.model.checkpoint_activations == recomputed
        weights.append(net.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint_activations: expected .* got 2 for TinyLM"):
        checkpoint_activations(tiny_run.TinyLM(), 2)
    with pytest.raises(
        InputError, match=r"checkpoint_activations: expected .* got -1 for CausalLM"
    ):
        checkpoint_activations(model(), -1)
