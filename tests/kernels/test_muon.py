"""Tests of Muon against a plain definition in float64 and torch's; states, clipping, errors."""

import copy
import math
import os
import pickle
import signal
from dataclasses import replace

import pytest
import tiny_run
import torch
from torch import nn

import fastlm
from fastlm.data.shards import BatchSampler, TokenDataset
from fastlm.errors import InputError
from fastlm.muon import COEFFICIENTS, Muon, muon_groups, orthogonalize
from fastlm.train.loop import TrainingInterrupted, train
from fastlm.train.objective import decay_matrices
from fastlm.train.pretrain import PretrainObjective

SHAPES = ((24, 40), (40, 24), (16, 16))
CONFIG = fastlm.ModelConfig(
    model_type="llama", vocab_size=tiny_run.VOCAB, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
    tie_word_embeddings=False,
)  # fmt: skip


def matrices(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in SHAPES]


def parameters(dtype=torch.float32):
    return [nn.Parameter(m) for m in matrices(0, dtype)]


def definition(weights, steps, *, lr, decay, momentum=0.95, nesterov=True, clip=math.inf):
    """Run Muon as published, in float64, on plain lists. ``steps`` has a list of gradients each."""
    weights = [w.double() for w in weights]
    averages = [torch.zeros_like(w) for w in weights]
    for grads in steps:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        for i, g in enumerate(grads):
            g = g.double() * min(1.0, clip / (norm + 1e-6))
            averages[i] = momentum * averages[i] + (1 - momentum) * g
            update = momentum * averages[i] + (1 - momentum) * g if nesterov else averages[i]
            u, s, vt = torch.linalg.svd(update / update.norm(), full_matrices=False)
            a, b, c = COEFFICIENTS
            for _ in range(5):  # the iteration acts on the singular values alone
                s = a * s + b * s**3 + c * s**5
            n, m = update.shape
            weights[i] = weights[i] * (1 - lr * decay) - lr * 0.2 * max(n, m) ** 0.5 * (u * s) @ vt
    return weights


def run(optimizer, params, steps):
    for grads in steps:
        for p, g in zip(params, grads):
            p.grad = g.to(p.dtype)
        optimizer.step()


def test_orthogonalize_brings_singular_values_near_one():
    for matrix in (*matrices(), 1e-3 * matrices()[0], 1e3 * matrices()[1]):
        out = orthogonalize(matrix)
        assert out.shape == matrix.shape and out.dtype == torch.float32
        values = torch.linalg.svdvals(out)
        minimum = (
            0.65 if matrix.shape[0] != matrix.shape[1] else 0.1
        )  # a square one has some near 0
        assert minimum < float(values.min()) and float(values.max()) < 1.2
        u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
        rows, columns = u.T @ out.double() @ vt.T, torch.eye(min(matrix.shape))
        assert float((rows * (1 - columns)).abs().max()) < 0.02  # its singular vectors
    assert float(orthogonalize(torch.zeros(4, 6)).abs().max()) == 0.0


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_the_update_is_the_definition(nesterov, clip):
    steps = [matrices(seed) for seed in range(1, 6)]
    params = parameters(torch.float64)
    expected = definition(
        [p.detach() for p in params], steps, lr=0.01, decay=0.1, nesterov=nesterov,
        clip=clip or math.inf,
    )  # fmt: skip
    options = dict(lr=0.01, weight_decay=0.1, nesterov=nesterov, max_grad_norm=clip)
    run(Muon(params, **options), params, steps)
    for p, w in zip(params, expected):
        torch.testing.assert_close(p.detach(), w, rtol=1e-6, atol=1e-7)  # the norm is float32
    single = parameters()
    run(Muon(single, **options), single, steps)
    for p, w in zip(single, expected):  # bfloat16 products where the CPU has them
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=2e-3)


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_it_agrees_with_torchs(adjust):
    steps = [matrices(seed) for seed in range(1, 6)]
    ours, theirs = parameters(), parameters()
    options = dict(lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)
    run(Muon(ours, **options), ours, steps)
    run(torch.optim.Muon(theirs, **options), theirs, steps)
    before = parameters()
    for a, b, c in zip(ours, theirs, before):  # theirs multiplies in bfloat16
        moved = (b - c).detach().norm()
        assert float((a - b).detach().norm()) < 0.02 * float(moved)


def test_masters_keep_what_bfloat16_cannot():
    """bfloat16 with masters follows float32 to the rounding of its weights."""
    steps = [[g.bfloat16().float() for g in matrices(seed)] for seed in range(1, 30)]
    wide, narrow = parameters(), parameters()
    run(Muon(wide, lr=1e-4), wide, steps)
    optimizer = Muon(narrow, lr=1e-4, master_weights=True)
    optimizer.keep_masters()
    for p in narrow:
        p.data = p.data.bfloat16()
    run(optimizer, narrow, steps)
    state = optimizer.state_dict()["state"]
    for i, p in enumerate(wide):
        torch.testing.assert_close(state[i]["master"], p.detach(), rtol=1e-6, atol=1e-6)
        assert torch.equal(state[i]["master"].bfloat16(), narrow[i].detach())


def mixed(dtype=torch.float32):
    model = fastlm.CausalLM(CONFIG, seed=0)
    optimizer = Muon(
        muon_groups(decay_matrices(model, 0.1), model), lr=1e-2, max_grad_norm=1.0,
        master_weights=dtype != torch.float32,
    )  # fmt: skip
    optimizer.keep_masters()
    return model.to(dtype), optimizer


def learn(model, optimizer, first, last):
    for i in range(first, last):
        g = torch.Generator().manual_seed(i)
        ids = torch.randint(0, tiny_run.VOCAB, (2, 16), generator=g)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_groups_are_the_layers_matrices_and_the_rest():
    model, optimizer = mixed()
    names = {id(p): name for name, p in model.named_parameters()}
    of = {
        names[id(p)]: (group["use_muon"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert len(of) == len(names)
    assert of["model.layers.1.mlp.down_proj.weight"] == (True, 0.1)
    assert of["model.embed_tokens.weight"] == of["lm_head.weight"] == (False, 0.1)
    assert of["model.layers.0.input_layernorm.weight"] == (False, 0.0)
    assert sum(use for use, _ in of.values()) == 2 * 7


def test_the_rest_is_adamws_and_one_norm_clips_both():
    model, optimizer = mixed()
    other, plain = mixed()
    adamw = fastlm.AdamW(
        [{**g, "use_muon": None} for g in plain.param_groups if not g["use_muon"]], lr=1e-2,
        betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    ids = torch.arange(32).view(2, 16)
    for net in (model, other):
        (100 * net(ids, labels=ids).loss).backward()
    norm = nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    optimizer.step()
    adamw.step()
    assert float(optimizer.grad_norm) == pytest.approx(float(norm), rel=1e-5) and float(norm) > 2
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        torch.testing.assert_close(model.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_go_round(dtype):
    model, optimizer = mixed(dtype)
    learn(model, optimizer, 0, 3)
    reloaded, loaded = mixed(dtype)
    reloaded.load_state_dict(model.state_dict())
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    revived = pickle.loads(pickle.dumps(optimizer))
    assert revived._muon_defaults == optimizer._muon_defaults and revived.max_grad_norm == 1.0
    for net, opt in ((model, optimizer), (reloaded, loaded)):
        learn(net, opt, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reloaded.parameters()))
    state, two = optimizer.state_dict()["state"], loaded.state_dict()["state"]
    assert {k for s in state.values() for k in s} >= {"momentum_buffer", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(state[i][k], two[i][k]) for i in state for k in state[i])
    with pytest.raises(InputError, match=r"momentum_buffer: expected shape .*, got NoneType"):
        plain = fastlm.AdamW(model.parameters()).state_dict()
        for i, p in enumerate(model.parameters()):
            plain["state"][i] = {"step": 1, "exp_avg": p.detach(), "exp_avg_sq": p.detach()}
        plain["param_groups"] = optimizer.state_dict()["param_groups"]
        loaded.load_state_dict(plain)


def test_a_training_resumes_to_the_same_bits(tmp_path):
    tiny_run.shards(tmp_path)
    options = replace(
        tiny_run.OPTIONS, optimizer="muon", max_steps=8, save_steps=3, validations=0,
        sample_at=(),
    )  # fmt: skip

    def start(name, on_event=None):
        model = fastlm.CausalLM(CONFIG, seed=0)
        sampler = BatchSampler(TokenDataset(tmp_path / "train"), 2, 16, seed=7)
        objective = PretrainObjective(model, sampler, None, options)
        result = train(objective, options, tmp_path / name, on_event=on_event)
        return model, result

    def press(event):
        if event.get("step") == 5:
            os.kill(os.getpid(), signal.SIGINT)

    uninterrupted, result = start("whole")
    assert result.loss is not None and result.loss < 3.4
    with pytest.raises(TrainingInterrupted):
        start("cut", press)
    cut, _ = start("cut")
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted.parameters(), cut.parameters()))
    with pytest.raises(InputError, match="optimizer was 'muon', now 'adamw'"):
        options = replace(options, optimizer="adamw")
        start("cut")


@pytest.mark.parametrize(
    "change, text",
    [
        ({"params": [nn.Parameter(torch.ones(3))]}, r"expected matrices \(n, m\).*got \(3,\)"),
        ({"params": [nn.Parameter(torch.ones(2, 3, 4))]}, r"expected matrices .*got \(2, 3, 4\)"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"ns_steps": 0}, "ns_steps: expected 1 or more, got 0"),
        ({"adjust_lr_fn": "none"}, "adjust_lr_fn: expected one of match_rms_adamw, original"),
        ({"lr": -1.0}, "lr: expected a number >= 0, got -1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm: expected a number > 0 or None, got 0.0"),
    ],
)
def test_what_is_refused(change, text):
    with pytest.raises(InputError, match=text):
        Muon(**{"params": parameters(), **change})


def test_refused_are_8_bit_states_and_models_without_layers():
    with pytest.raises(InputError, match="state_bits: expected 32 with use_muon, got 8"):
        Muon([{"params": parameters(), "state_bits": 8}])
    model = nn.Linear(4, 4)
    with pytest.raises(InputError, match=r"optimizer: expected a model with .* got none in Linear"):
        muon_groups(decay_matrices(model, 0.1), model)
