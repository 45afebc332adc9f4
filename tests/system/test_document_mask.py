"""Packed windows whose documents do not see each other: losses, leaks, validation, resuming."""

import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny_run
import torch
from tiny_run import Letters

import fastlm
from fastlm.data.shards import BatchSampler, TokenDataset, document_offsets, write_shards
from fastlm.errors import InputError
from fastlm.model.bits_per_byte import evaluate
from fastlm.train.checkpoints import list_checkpoints
from fastlm.train.loop import TrainingInterrupted, train
from fastlm.train.pretrain import PretrainObjective

CONFIG = fastlm.ModelConfig(
    model_type="llama", vocab_size=tiny_run.VOCAB, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
)  # fmt: skip
SEQ, EOS = 24, Letters.eos_id
OPTIONS = replace(
    tiny_run.OPTIONS, max_steps=6, dtype="float32", validations=2, save_steps=2, sample_at=()
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    letters = "thequickbrownfoxjumpsoverthelazydog"
    for name, count in (("train", 60), ("heldout", 12)):
        texts = [letters[i % 20 : i % 20 + 1 + (7 * i) % 15] for i in range(count)]
        write_shards(texts, Letters(), folder / name)
    return folder


def model(seed=0):
    return fastlm.CausalLM(CONFIG, seed=seed)


def objective(net, data, mask=True):
    sampler = BatchSampler(TokenDataset(data / "train"), 3, SEQ, seed=1)
    return PretrainObjective(net, sampler, None, OPTIONS, document_mask=mask)


def documents(ids, labels):
    """The documents of a window, each with the end-of-text token before it."""
    cuts = [0, *(i for i in range(1, len(ids)) if ids[i] == EOS), len(ids)]
    return [(ids[a:b], labels[a:b]) for a, b in pairwise(cuts)]


def test_the_loss_is_that_of_each_document_alone(data):
    net = model()
    masked = objective(net, data)
    (batch,) = masked.next_batches(1)
    ids, labels, offsets = masked.read(batch)
    parts = [part for row in zip(ids, labels) for part in documents(*row)]
    assert offsets is not None and len(parts) == len(offsets) - 1 > 9
    loss = masked.loss(batch, masked.num_items(batch))
    loss.backward()
    assert masked.num_items(batch) == labels.numel()
    actual = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    single = sum(
        net(i[None], shift_labels=t[None], num_items=labels.numel()).loss for i, t in parts
    )
    single.backward()
    assert float(loss.detach()) == pytest.approx(float(single.detach()), rel=1e-6)
    for name, p in net.named_parameters():
        torch.testing.assert_close(actual[name], p.grad, rtol=1e-4, atol=1e-6)
    unmasked = objective(net, data, mask=False)
    plain = unmasked.read(*unmasked.next_batches(1))
    leaking = net(plain[0], shift_labels=plain[1]).loss
    assert float(leaking.detach()) != pytest.approx(float(loss.detach()), rel=1e-5)


def test_nothing_of_a_document_reaches_the_next():
    ids = torch.randint(1, tiny_run.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(0))
    ids[0, 9] = ids[1, 17] = EOS
    offsets = document_offsets(ids, EOS)
    assert offsets is not None and offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 9, SEQ, SEQ + 17, 2 * SEQ]
    changed = ids.clone()
    changed[0, 3] = changed[0, 3] % (tiny_run.VOCAB - 1) + 1
    net = model().eval()
    with torch.no_grad():
        first, second = (net(x, cu_seqlens=offsets).logits for x in (ids, changed))
        leaking = net(changed).logits[0, 9:]
    assert torch.equal(first[0, 9:], second[0, 9:]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0, 3:9], second[0, 3:9])
    assert not torch.allclose(leaking, first[0, 9:], atol=1e-5)


def test_windows_without_a_boundary_take_the_plain_path(tmp_path):
    """The same bits as without the mask: the same kernels, at the same cost."""
    write_shards(["abcdefghijklmnopqrstuvwxyz" * 40], Letters(), tmp_path / "train")
    data = TokenDataset(tmp_path / "train")
    assert document_offsets(torch.full((2, 5), 1), EOS) is None
    assert document_offsets(torch.tensor([[EOS, 1, 2]]), EOS) is None  # its own beginning
    weights = []
    for mask in (False, True):
        net = model()
        sampler = BatchSampler(data, 3, SEQ, seed=1)
        objective = PretrainObjective(net, sampler, None, OPTIONS, document_mask=mask)
        train(objective, OPTIONS, tmp_path / f"{mask}")
        weights.append(net.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_validation_ends_the_context_with_the_document(data):
    net, heldout = model(), TokenDataset(data / "heldout")
    unmasked = heldout.read(0, heldout.tokens).tolist()
    labels = torch.tensor(unmasked)
    ids = torch.tensor([EOS, *unmasked[:-1]])
    with torch.no_grad():
        nats = sum(
            float(net(i[None], shift_labels=t[None], num_items=1).loss)
            for i, t in documents(ids, labels)
        )
    result = evaluate(net, heldout, 64, 2, stride=32, document_mask=True)
    assert result.tokens == heldout.tokens  # each once, the first of a document as well
    assert result.loss == pytest.approx(nats / heldout.tokens, rel=1e-5)
    assert evaluate(net, heldout, 64, 2, stride=32).loss != pytest.approx(result.loss, rel=1e-5)


def test_a_run_goes_on_to_the_same_bits_and_refuses_another_mask(data, tmp_path):
    def run(folder, mask=True, **options):
        net = model()
        sampler = BatchSampler(TokenDataset(data / "train"), 3, SEQ, seed=1)
        heldout = TokenDataset(data / "heldout")
        objective = PretrainObjective(net, sampler, heldout, OPTIONS, document_mask=mask)
        train(objective, OPTIONS, folder, **options)
        return net.state_dict()

    def press(event):
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    uninterrupted = run(tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        run(tmp_path / "cut", on_event=press)
    cut = run(tmp_path / "cut")
    assert all(torch.equal(uninterrupted[name], cut[name]) for name in uninterrupted)
    assert list_checkpoints(tmp_path / "cut")
    with pytest.raises(InputError, match="document_mask was True, now False"):
        run(tmp_path / "cut", mask=False)
