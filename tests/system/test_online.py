"""Rollouts, and PPO, GRPO, Dr. GRPO and RLOO on them: tiny games whose optimum is known, exact
resume, independence of micro-batches, and what stops or warns.
"""

import copy
import json
import math
import os
import signal
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion
from fastlm.model.causal_lm import CausalLM
from fastlm.model.lora import add_lora
from fastlm.optim import AdamW
from fastlm.train import online
from fastlm.train.checkpoints import list_checkpoints
from fastlm.train.distributed import SingleProcess
from fastlm.train.loop import TrainingInterrupted, train
from fastlm.train.metrics import correlation
from fastlm.train.objective import DivergedError
from fastlm.train.online import Rollouts, repetition_rate
from fastlm.train.online_objectives import GRPOObjective, PPOObjective, build_value_model
from fastlm.train.online_stage import GRPO, PPO
from fastlm.train.options import LOSS_TYPES, GRPOOptions, PPOOptions, RolloutOptions, TrainOptions
from fastlm.train.rollouts import IGNORE, Episode, pack_rollouts, sample_completions

END, BOS, WORDS = 0, 1, 8
KINDS = ("ppo", *LOSS_TYPES)
OPTIONS = TrainOptions(
    max_steps=8, lr=0.02, dtype="float32", validations=0, sample_at=(), weight_decay=0.0,
    warmup_ratio=0.0, save_steps=3,
)  # fmt: skip
RULES = RolloutOptions(
    max_new_tokens=4,
    prompts_per_round=3,
    num_generations=4,
    num_iterations=2,
    batch_size=3,
    decode_batch_size=12,
    beta=0.1,
)


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(**changes) -> CausalLM:
    config = {
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32,
        "eos_token_id": END, "pad_token_id": END, "tie_word_embeddings": False,
        "initializer_range": 0.3, "attention_dropout": 0.5,
    }  # fmt: skip
    return CausalLM(ModelConfig.from_dict(config | changes), seed=3)


PROMPTS = [[BOS, 5, 6], [BOS], [BOS, 2, 3, 4, 7], [BOS, 3]]


def sevens(places, answers: list[Completion]) -> list[float]:
    """The share of a token among those of an answer."""
    del places
    return [sum(t == 7 for t in a.token_ids) / len(a.token_ids) for a in answers]


def starts_with_seven(places, answers: list[Completion]) -> list[float]:
    """1 for few answers: most groups of four have equal scores."""
    del places
    return [float(a.token_ids[0] == 7) for a in answers]


def objective(kind: str, rules: RolloutOptions = RULES, prompts=PROMPTS, score=sevens, **options):
    torch.manual_seed(0)
    policy = model_of(**options.pop("config", {}))
    lora = options.pop("lora", False)
    of_ppo = options.pop("ppo", {"vf_coef": 0.5})
    shared = options.pop("shared", False)
    group = options.pop("group", {}) | {"loss_type": kind}
    options = {"base": "", **options}
    reference = None if lora else copy.deepcopy(policy)
    if lora:
        add_lora(policy, 4, seed=1)
    args = (policy, reference, prompts, prompts[:2], score)
    settings = asdict(rules)
    if kind == "ppo":
        value = build_value_model(policy, shared=shared)
        return PPOObjective(*args, PPOOptions(**settings | of_ppo), value_model=value, **options)
    return GRPOObjective(*args, GRPOOptions(**settings | group), **options)


def lines(run) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "progress")
    return [{k: v for k, v in line.items() if k not in clock} for line in records]


# ---- rollouts


def test_answers_have_the_log_probabilities_that_training_computes() -> None:
    model = model_of().eval()
    answers = sample_completions(model, PROMPTS * 3, max_new_tokens=6, temperature=0.7, seed=5)
    assert {a.is_stopped for a in answers} == {True, False}  # both kinds were drawn
    for prompt, answer in zip(PROMPTS * 3, answers, strict=True):
        assert answer.is_stopped == (
            answer.token_ids[-1] == END
        )  # kept, although it is the pad token
        assert END not in answer.token_ids[:-1] and 1 <= len(answer.token_ids) <= 6
        packed = pack_rollouts([prompt], [answer.token_ids], torch.device("cpu"))
        logp = packed.rows(model.logprobs(packed.ids, packed.labels, temperature=0.7))
        sampled = torch.tensor([token.logprob for token in answer.logprobs])
        torch.testing.assert_close(logp[0], sampled, rtol=1e-4, atol=1e-5)


def test_as_many_answers_run_as_there_are_rows(monkeypatch) -> None:
    model, batch_sizes = model_of().eval(), []
    model.config.eos_token_id = None
    step = Engine.step

    def counted(engine):
        busy = step(engine)
        batch_sizes.append(len(engine.scheduler.running))
        return busy

    monkeypatch.setattr(Engine, "step", counted)
    answers = sample_completions(model, [[5, 6, 7]] * 16, max_new_tokens=8, seed=1, max_num_seqs=16)
    assert len(answers) == 16 and max(batch_sizes) == 16


def test_an_answer_does_not_depend_on_its_batch() -> None:
    model = model_of().eval()
    together = sample_completions(model, PROMPTS, max_new_tokens=5, seed=9)
    parts = sample_completions(model, PROMPTS, max_new_tokens=5, seed=9, max_num_seqs=1)
    assert [a.token_ids for a in together] == [a.token_ids for a in parts]
    with pytest.raises(InputError, match="prompts: expected at most 2 tokens, so that"):
        sample_completions(model, PROMPTS, max_new_tokens=30)


def test_packed_answers() -> None:
    packed = pack_rollouts([[1, 5], [1]], [[7, 0], [6, 5, 0]], torch.device("cpu"))
    assert packed.ids.tolist() == [[1, 5, 7, 1, 6, 5]]
    assert packed.labels.tolist() == [[IGNORE, 7, 0, 6, 5, 0]]
    assert packed.cu_seqlens.tolist() == [0, 3, 6] and packed.cu_seqlens.dtype == torch.int32
    assert packed.mask.tolist() == [[True, True, False], [True, True, True]]
    x = torch.tensor([[math.nan, 1.0, 2.0, 3.0, 4.0, 5.0]], requires_grad=True)
    rows = packed.rows(x)
    assert rows.tolist() == [[1, 2, 0], [3, 4, 5]]
    rows.sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("window", [None, 3])
def test_answers_share_their_prompt(window) -> None:
    """As if each had its own: values, and gradients of the weights."""
    model = model_of(sliding_window=window, num_hidden_layers=2, attention_dropout=0.0)
    prompts = [[1, 5, 2, 4], [1, 5, 2, 4], [6], [6], [1, 5, 2, 4], [1, 5, 2, 4], [1, 5, 2, 4]]
    answers = [[7, 0], [6, 5, 3], [4], [2, 0], [1], [3, 3], [2, 7, 1, 0]]
    results = []
    for share in (False, True):
        packed = pack_rollouts(prompts, answers, torch.device("cpu"), share_prompts=share)
        assert (packed.keys is not None) == share
        logp = packed.rows(model.logprobs_from_hidden(packed.hidden(model), packed.labels))
        model.zero_grad()
        (logp * packed.mask * torch.linspace(1, 2, 4)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((packed.ids.numel(), packed.mask, logp.detach(), grads))
    (long, mask, logp, grads), (short, *shared) = results
    assert (long, short) == (30, 21)
    torch.testing.assert_close(shared, [mask, logp, grads], rtol=1e-4, atol=1e-5)


# ---- training


def one_step_game(kind: str, tmp_path, steps: int) -> tuple[Tensor, Tensor]:
    """Answers of one token with rewards; the policy at the end, and the optimum: the reference
    times exp(reward / beta), which alone maximises the expected reward - beta KL.
    """
    rewards = torch.tensor([0.0, 1.0, 0.5, 0.0, -1.0, 0.2, 0.0, 0.8])

    def score(places, answers):
        return [float(rewards[a.token_ids[0]]) for a in answers]

    rules = replace(
        RULES, max_new_tokens=1, prompts_per_round=1, num_generations=64, batch_size=64, beta=0.5
    )
    rules = replace(rules, decode_batch_size=64, num_iterations=1)
    ppo = {"vf_coef": 1.0, "whiten_advantages": False}
    game = objective(kind, rules, [[BOS]], score, ppo=ppo)

    def policy(model) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1)

    expected = (policy(game.reference).log() + rewards / rules.beta).softmax(-1)
    options = replace(OPTIONS, max_steps=steps, lr=0.03, save_steps=1000)
    train(game, options, tmp_path)
    return policy(game.policy), expected


# GRPO and DAPO divide by each group's deviation, which is not the gradient of this objective
@pytest.mark.parametrize("kind", ["ppo", "dr_grpo", "rloo"])
def test_the_optimum_under_a_kl_constraint_is_reached(kind, tmp_path) -> None:
    got, expected = one_step_game(kind, tmp_path, 80)
    apart = float((got - expected).abs().sum() / 2)  # total variation
    assert apart < 0.03


def copied(places, answers: list[Completion]) -> list[float]:
    """A half for the second token of the prompt, a half for ending after one token."""
    expected = [COPY[i][1] for i in places]
    return [
        0.5 * (a.token_ids[0] == w) + 0.5 * (a.token_ids[1:] == [END])
        for a, w in zip(answers, expected, strict=True)
    ]


COPY = [[BOS, word] for word in range(2, WORDS)]


@pytest.mark.parametrize("kind", ["ppo", "dapo", "rloo"])
def test_a_policy_learns_to_copy_and_to_stop(kind, tmp_path) -> None:
    """The model learns its end token although it is the pad token (SmolLM2-Instruct)."""
    rules = replace(
        RULES,
        prompts_per_round=6,
        num_generations=32,
        batch_size=192,
        decode_batch_size=192,
        beta=0.0,
    )
    game = objective(
        kind, rules, COPY, copied, config={"initializer_range": 0.05, "hidden_size": 32},
        group={"entropy_coef": 0.03}, ppo={"vf_coef": 0.5, "entropy_coef": 0.03},
    )  # fmt: skip
    before = np.mean(copied(range(6), greedy(game)))
    train(game, replace(OPTIONS, max_steps=70, lr=0.005, save_steps=100), tmp_path)
    after = np.mean(copied(range(6), greedy(game)))
    assert before < 0.5 and after > 0.9


def greedy(game) -> list[Completion]:
    return sample_completions(game.policy, COPY, max_new_tokens=4, temperature=0.0)


# ---- the loop


@pytest.mark.parametrize("kind", ["ppo", "ppo shared", "dapo", "dapo dynamic", "rloo"])
def test_cut_off_anywhere_it_continues_to_the_same_bits(kind, tmp_path) -> None:
    """Also the KL controller and the stop of a round are restored."""
    rules = replace(
        RULES, kl_target=0.01, kl_horizon=100.0, max_update_kl=0.02,
        missing_eos_penalty=-0.5,
    )  # fmt: skip
    name, _, variant = kind.partition(" ")
    group = {"dynamic_sampling": 2} if variant == "dynamic" else {}

    def game():
        ppo = {"vf_coef": 0.5, "critic_warmup": 1}
        return objective(name, rules, shared=variant == "shared", ppo=ppo, group=group)

    train(game(), replace(OPTIONS, max_steps=12), tmp_path / "whole")
    for step in (1, 4, 9):  # of PPO two in the warm-up of the value model

        def press(event, step=step):
            if event.get("step") == step and "loss" in event:
                os.kill(os.getpid(), signal.SIGINT)

        run = tmp_path / f"cut-{step}"
        with pytest.raises(TrainingInterrupted):
            train(game(), replace(OPTIONS, max_steps=12), run, on_event=press)
        train(game(), replace(OPTIONS, max_steps=12), run)
        assert lines(run) == lines(tmp_path / "whole")
        last = [list_checkpoints(tmp_path / p)[-1] for p in ("whole", run.name)]
        uninterrupted, cut = ((path / "tensors.safetensors").read_bytes() for path in last)
        assert uninterrupted == cut
    steps = lines(tmp_path / "whole")
    assert len({line["beta"] for line in steps}) > 1  # the controller moved
    assert variant != "dynamic" or max(line["prompts_drawn"] for line in steps) > 3
    assert len({line["round"] for line in steps}) > 2


class SimulatedProcesses(SingleProcess):
    """Simulates several processes in one: they run one after another."""

    def __init__(self, size: int):
        self.size = size

    def gather_results(self, call):
        results = []
        for rank in range(self.size):
            self.rank = rank
            results.append(call())
        return results


@pytest.mark.parametrize("kind", ["ppo", "rloo", "dapo dynamic"])
def test_a_round_does_not_depend_on_the_number_of_processes(kind) -> None:
    """Some of 16 processes have no answer. Score metrics are means over all answers."""
    rules = replace(RULES, missing_eos_penalty=-0.5)
    lengths: list[int] = []
    name, _, variant = kind.partition(" ")
    group = {"dynamic_sampling": 3} if variant else {}

    def score(places, answers):
        lengths[:] = [len(a.token_ids) for a in answers]
        return starts_with_seven(places, answers) if variant else sevens(places, answers)

    results = {}
    for size in (1, 2, 5, 16):
        game = objective(
            name, rules, score=score, score_metrics=lambda: {"said": np.mean(lengths)}, group=group
        )
        game.world = SimulatedProcesses(size)
        game.next_batches(1)
        results[size] = game, game.validate()
    single, validated = results.pop(1)
    assert single.round_metrics["said"] == pytest.approx(single.round_metrics["length"])
    assert not variant or single.round_metrics["prompts_drawn"] > 3
    for game, validation in results.values():
        assert [a.token_ids for a in game.completions] == [a.token_ids for a in single.completions]
        assert game.round_metrics == pytest.approx(single.round_metrics, rel=1e-5, abs=1e-6)
        assert validation == pytest.approx(validated, rel=1e-12)
        assert game.columns.keys() == single.columns.keys()
        for name, column in single.columns.items():
            torch.testing.assert_close(game.columns[name], column, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_does_not_depend_on_its_micro_batches(kind) -> None:
    """Twelve answers give the same loss and gradient as 1, 2, 4 and 12 micro-batches of 1, 3, 2 and
    5 processes. The answers differ in length, and padded positions hold NaN.
    """
    results = {}
    for size, ranks in ((12, 1), (6, 3), (3, 2), (1, 5)):
        game = objective(kind, replace(RULES, batch_size=size))
        game.trained.double()
        game.reference.double()
        with torch.no_grad():  # away from the point where all ratios are 1
            batches = game.next_batches(12 // size)
            items = sum(map(game.num_items, batches))
            for parameter in game.trained.parameters():
                parameter.mul_(1.05)
        total, measured = 0.0, []
        for rank in range(ranks):
            game.step_metrics = []
            for batch in batches[rank::ranks]:
                poisoned = {
                    k: torch.where(batch.packed.mask, v, math.nan) if v.is_floating_point() else v
                    for k, v in batch.columns.items()
                }
                loss = game.loss(replace(batch, columns=poisoned), items)
                loss.backward()
                total += float(loss.detach())
            measured.append(game.measurements())
        gradients = [p.grad for p in game.trained.parameters() if p.grad is not None]
        results[size] = (total, gradients, game.scalars(measured))
    total, gradients, scalars = results.pop(12)
    assert any(float(g.abs().max()) > 1e-4 for g in gradients)
    for loss_sum, some, measured in results.values():
        assert loss_sum == pytest.approx(total, rel=1e-5, abs=1e-7)
        assert measured == pytest.approx(scalars, rel=1e-4, abs=1e-6)
        for a, b in zip(some, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_every_completion_once_per_iteration_and_every_prompt_once_per_epoch() -> None:
    game = objective("dapo")
    rounds = []
    for _ in range(4):
        advantages = []
        for _ in range(8):  # two passes of twelve answers, three at a time
            (batch,) = game.next_batches(1)
            advantages += batch.columns["advantages"][:, 0].tolist()
        assert (
            sorted(advantages[:12]) == sorted(advantages[12:])
            and advantages[:12] != advantages[12:]
        )
        rounds += game.prompt_indices[:: RULES.num_generations]
    assert [sorted(rounds[i : i + 4]) for i in range(0, 12, 4)] == [[0, 1, 2, 3]] * 3


# ---- what is estimated


def test_policy_and_value_model_are_clipped_by_one_norm(tmp_path, monkeypatch) -> None:
    norms = {}
    step = AdamW.step

    def watched(self):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms["norm"] = torch.cat([g.flatten() for g in grads if g is not None]).norm().item()
        norms["count"] = sum(g is not None for g in grads)
        step(self)

    monkeypatch.setattr(AdamW, "step", watched)
    game = objective("ppo", ppo={"vf_coef": 0.5})
    train(game, replace(OPTIONS, max_steps=1, max_grad_norm=1e-3), tmp_path)
    (line,) = [line for line in lines(tmp_path) if "loss" in line]
    assert line["grad_norm"] == pytest.approx(norms["norm"], rel=1e-5) and norms["norm"] > 1e-3
    trained = {id(p) for m in (game.policy, game.value_model) for p in m.parameters()}
    assert norms["count"] == len(trained)


@pytest.mark.parametrize("stage", [PPO, GRPO])
def test_adams_epsilon(stage, tmp_path, monkeypatch) -> None:
    epsilons = []
    init = AdamW.__init__

    def watched(self, *args, **options):
        epsilons.append(options["eps"])
        init(self, *args, **options)

    monkeypatch.setattr(AdamW, "__init__", watched)
    options = stage(data=("x.jsonl",), max_steps=100, sample_at=()).train_options(8)
    train(objective("ppo"), replace(options, max_steps=1), tmp_path)
    assert epsilons == [1e-5]


def test_ppo_estimates_by_plain_loops() -> None:
    """Rewards, advantages and returns of a round against the formulas, token by token."""
    ppo = {"gamma": 0.9, "lam": 0.8, "whiten_rewards": True}
    game = objective("ppo", replace(RULES, missing_eos_penalty=-1.0, beta=0.3), ppo=ppo)
    with torch.no_grad():
        for parameter in game.policy.parameters():
            parameter.mul_(1.2)  # a KL to speak of
        game.value_model.head.weight.fill_(0.1)
    game.next_batches(1)
    answers = game.completions
    rewards, values = [], []
    for i, answer in enumerate(answers):
        prompt = game.prompts[game.prompt_indices[i]]
        packed = pack_rollouts([prompt], [answer.token_ids], game.policy.device)
        with torch.no_grad():
            logp, _, value = game.forward(packed)
            ref = game.logprobs(game.reference, packed)[0]
        score = sevens([0], [answer])[0] if answer.is_stopped else -1.0
        row = [-0.3 * float(a - b) for a, b in zip(logp[0], ref[0])]
        row[-1] += score
        rewards.append(row)
        values.append(value[0].tolist())
    flat = [r for row in rewards for r in row]
    mean, variance = np.mean(flat), np.var(flat)
    advantages, returns = [], []
    for row, value in zip(rewards, values, strict=True):
        row = [(r - mean) / math.sqrt(variance + 1e-8) + mean for r in row]
        actual: list[float] = []
        for t in reversed(range(len(row))):
            after = value[t + 1] if t + 1 < len(row) else 0.0
            delta = row[t] + 0.9 * after - value[t]
            actual.insert(0, delta + 0.9 * 0.8 * (actual[0] if actual else 0.0))
        advantages.append(actual)
        returns.append([a + v for a, v in zip(actual, value)])
    flat = [a for row in advantages for a in row]
    mean, variance = np.mean(flat), np.var(flat)
    for i, row in enumerate(advantages):
        expected = [(a - mean) / math.sqrt(variance + 1e-8) for a in row]
        assert game.columns["advantages"][i, : len(row)].tolist() == pytest.approx(
            expected, abs=2e-5
        )
        assert game.columns["returns"][i, : len(row)].tolist() == pytest.approx(
            returns[i], abs=2e-5
        )
    assert game.round_metrics["kl"] == pytest.approx(
        np.mean([sum(r) for r in _gaps(game)]), abs=1e-5
    )


def by_prompt(places, answers: list[Completion]) -> list[float]:
    """Far from 0, and different for each prompt: what a value model can know."""
    return [2.0 + index % 2 + c for index, c in zip(places, copied(places, answers), strict=True)]


@pytest.mark.parametrize("shared", [False, True])
def test_the_value_model_learns_by_default(shared, tmp_path) -> None:
    """At a rate at which the policy hardly moves. With the rate and the zero of before it explains
    -7 of the returns' variance in each round.
    """
    rules = replace(
        RULES,
        prompts_per_round=6,
        num_generations=4,
        batch_size=6,
        num_iterations=4,
        decode_batch_size=24,
    )
    warned: list[str] = []
    game = objective("ppo", rules, COPY, by_prompt, shared=shared, ppo={}, warn=warned.append)
    steps = 6 * 16
    train(game, replace(OPTIONS, max_steps=steps, lr=1e-3, save_steps=100), tmp_path)
    explained = [
        line["explained_variance"] for line in lines(tmp_path) if "loss" in line
    ][::16]  # fmt: skip
    assert explained[0] == pytest.approx(0, abs=0.3)  # the mean of the scores
    assert explained[-1] > 0.2 and min(explained[2:]) > 0 and not warned


def test_a_value_model_that_explains_nothing_raises_an_alarm() -> None:
    rounds, warned = [], []

    def drifting(places, answers: list[Completion]) -> list[float]:
        rounds.append(len(rounds))
        return [10.0 * len(rounds) + s for s in sevens(places, answers)]

    ppo = {"value_lr_factor": 1e-9}
    game = objective(
        "ppo", replace(RULES, num_iterations=1), score=drifting, ppo=ppo, warn=warned.append
    )
    for _ in range(11):
        game.stop = True
        game.next_batches(1)
    assert [line.partition(":")[0] for line in warned] == ["round 4", "round 9"]
    assert "for 5 rounds the value model has predicted the returns worse" in warned[0]
    resumed = objective("ppo", replace(RULES, num_iterations=1), score=drifting, ppo=ppo)
    resumed.load_state_dict(game.state_dict())
    assert (resumed.bad_rounds, resumed.offset) == (game.bad_rounds, game.offset)
    assert resumed.offset == pytest.approx(10, abs=1)


def test_the_value_model_alone_learns_in_its_warmup(tmp_path) -> None:
    def moved(game, steps) -> set[str]:
        before = {k: v.detach().clone() for k, v in game.trained.named_parameters()}
        train(game, replace(OPTIONS, max_steps=steps, save_steps=100), tmp_path / str(steps))
        return {
            name.partition(".")[0]
            for name, value in game.trained.named_parameters()
            if not torch.equal(value, before[name])
        }

    for steps, expected in ((16, {"value"}), (17, {"policy", "value"})):  # 8 steps are a round
        ppo = {"critic_warmup": 2, "entropy_coef": 0.1}
        assert moved(objective("ppo", ppo=ppo), steps) == expected


def _gaps(game) -> list[list[float]]:
    """logp - ref_logp of each answer of the round."""
    gaps = []
    for i in range(len(game.completions)):
        prompt = game.prompts[game.prompt_indices[i]]
        packed = pack_rollouts([prompt], [game.completions[i].token_ids], game.policy.device)
        with torch.no_grad():
            logp = game.logprobs(game.policy, packed)[0]
            gaps.append((logp - game.logprobs(game.reference, packed)[0])[0].tolist())
    return gaps


def test_the_first_round_is_on_the_reference() -> None:
    for kind in KINDS:
        game = objective(kind, replace(RULES, temperature=0.7))
        for batch in game.next_batches(4):
            game.loss(batch, 1)
        first = game.scalars([game.measurements()])
        assert first["kl"] == 0 and first["kl3"] == 0 and first["mismatch"] < 1e-5
        assert first["ratio"] == pytest.approx(1, abs=1e-6) and first["clip_fraction"] == 0
        assert 0 < first["entropy"] < math.log(WORDS)


def test_monitors() -> None:
    assert repetition_rate(Completion([1, 2, 3])) == 0
    rate = repetition_rate(Completion([1, 2, 3, 4] * 3))
    assert rate == pytest.approx(5 / 9)  # 9 grams, 4 different
    ids = [1, 2, 3, 4, *[7] * 9, 1, 2, 3, 4, 5]
    assert repetition_rate(Episode(ids, observation_indices=[*range(4, 13)])) == pytest.approx(
        1 / 3
    )
    assert correlation([1.0, 2.0], [3.0, 3.0]) is None
    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0])) == pytest.approx(1)


# ---- dynamic sampling


def scores_of_groups(game, scores) -> Tensor:
    return torch.tensor(scores).view(-1, game.options.num_generations)


def test_dynamic_sampling_replaces_groups_of_equal_scores(monkeypatch) -> None:
    """A group that differs keeps its place; each other one is replaced by the next that differs.
    The metrics are those of the first draw, and the next round takes the next prompts.
    """
    seeds: list[int] = []

    def sample(model, prompts, *, seed, **options):
        seeds.extend(range(seed, seed + len(prompts)))
        return sample_completions(model, prompts, seed=seed, **options)

    monkeypatch.setattr(online, "sample_completions", sample)
    rules = replace(RULES, prompts_per_round=6, seed=1)
    plain = objective("dapo", rules, score=starts_with_seven)
    plain.next_batches(1)
    before = scores_of_groups(plain, starts_with_seven([], plain.completions))
    differs = before.amin(1) < before.amax(1)
    assert 0 < int(differs.sum()) < 6
    seeds.clear()
    game = objective("dapo", rules, score=starts_with_seven, group={"dynamic_sampling": 50})
    game.next_batches(1)
    after = scores_of_groups(game, starts_with_seven([], game.completions))
    assert (after.amin(1) < after.amax(1)).all()
    assert (game.columns["advantages"].view(6, 4, -1)[..., 0] != 0).any(1).all()
    for group in range(6):
        answers = [g.completions[4 * group : 4 * group + 4] for g in (plain, game)]
        assert (answers[0] == answers[1]) == bool(differs[group])
    drawn = game.round_metrics.pop("prompts_drawn")
    assert drawn == game.next_prompt > 6
    assert game.round_metrics == pytest.approx(plain.round_metrics)
    assert game.round_metrics["informative_groups"] == float(differs.float().mean())
    assert len(seeds) == len(set(seeds)) == 4 * drawn
    # prompts come in the same order as without replacement
    order = [objective("dapo", rules)._draw_prompts(drawn + 6) for _ in range(2)]
    assert order[0] == order[1]
    game.stop = True
    game._measure_round = lambda rollouts: first.append(rollouts.prompt_indices)
    first: list[list[int]] = []
    game.next_batches(1)
    assert first[0][::4] == order[0][drawn:]
    by_prompt = list(zip(game.prompt_indices[::4], game.prompt_indices[1::4], strict=True))
    assert all(a == b for a, b in by_prompt)  # groups stay together


@pytest.mark.parametrize(("bound", "drawn"), [(0, None), (1, 6), (4, 15)])
def test_dynamic_sampling_is_bounded(bound, drawn) -> None:
    """Where no scores differ, the round trains on what it has: advantages of 0."""

    def same(places, answers: list[Completion]) -> list[float]:
        del places
        return [1.0] * len(answers)

    game = objective("dapo", score=same, group={"dynamic_sampling": bound})
    plain = objective("dapo", score=same)
    for other in (game, plain):
        other.next_batches(1)
    assert game.round_metrics.get("prompts_drawn") == drawn
    assert game.round_metrics["informative_groups"] == 0
    assert game.completions == plain.completions and not game.columns["advantages"].any()


def test_dynamic_sampling_ignores_the_overlong_penalty() -> None:
    """A group whose scores differ by its lengths alone is replaced."""
    rules = replace(RULES, overlong_tokens=3)
    game = objective("dapo", rules, score=lambda _, answers: [0.1] * len(answers),
                     group={"dynamic_sampling": 1})  # fmt: skip
    game.next_batches(1)
    assert game.columns["advantages"].any()  # those of the penalty
    assert game.round_metrics["informative_groups"] == 0
    assert game.round_metrics["prompts_drawn"] == 6


def test_the_last_measurement_draws_no_further_prompts() -> None:
    game = objective("dapo", score=starts_with_seven, group={"dynamic_sampling": 9})
    game.next_batches(1)
    state, kept = game.state_dict(), dict(game.round_metrics)
    game.check_pending()
    assert game.next_prompt == state["next_prompt"] and game.round_metrics == kept


def test_overlong_completions_lose_up_to_one() -> None:
    rules = replace(RULES, num_generations=16)
    plain, game = (objective("dapo", replace(rules, overlong_tokens=n)) for n in (0, 2))
    for other in (plain, game):
        other.next_batches(1)
    lengths = [len(answer.token_ids) for answer in plain.completions]
    penalties = {1: 0.0, 2: 0.0, 3: 0.5, 4: 1.0}  # by length
    assert {3, 4} <= set(lengths)
    expected = [s - penalties[n] for s, n in zip(sevens([], plain.completions), lengths)]
    assert game.round_metrics["score"] == pytest.approx(np.mean(expected))
    assert game.completions == plain.completions


# ---- what stops or warns


def test_a_kl_that_explodes_stops_the_run_and_names_the_last_good_policy(tmp_path) -> None:
    rules = replace(RULES, max_kl=1.0, beta=0.0, num_iterations=1, batch_size=12)
    with pytest.raises(DivergedError, match=r"the KL to the reference is .* max_kl 1; last") as e:
        game = objective("dapo", rules)
        train(game, replace(OPTIONS, lr=0.005, max_steps=100, save_steps=1), tmp_path)
    last = list_checkpoints(tmp_path)[-1]
    assert (
        e.value.checkpoint is not None and e.value.checkpoint != last
    )  # the last one is too far already
    assert str(e.value).endswith(str(e.value.checkpoint))


def other_sampler(monkeypatch, off: float, temperature: float = 1.0):
    """Sampling and training disagree: by ``off`` per token, or because something sharpens."""

    def sample(model, prompts, **options):
        options["temperature"] *= temperature
        answers = sample_completions(model, prompts, **options)
        return [
            replace(a, logprobs=[replace(x, logprob=x.logprob - off) for x in a.logprobs])
            for a in answers
        ]

    monkeypatch.setattr(online, "sample_completions", sample)


@pytest.mark.parametrize("kind", ["dapo", "ppo", "rloo", "gspo"])
def test_a_mismatch_of_sampling_and_training_is_corrected(kind, monkeypatch) -> None:
    warnings: list[str] = []
    plain = objective(kind, warn=warnings.append)
    plain.next_batches(4)
    assert not warnings and plain.round_metrics["mismatch"] < 1e-5
    assert plain.round_metrics["importance_weight"] == 1
    assert plain.round_metrics["importance_truncated"] == 0
    for off in (0.2, 5.0):
        other_sampler(monkeypatch, off)
        game = objective(kind, warn=warnings.append)
        game.next_batches(4)
        assert game.round_metrics["mismatch"] == pytest.approx(off, abs=1e-5)
        weight = min(math.exp(off), online.MAX_IMPORTANCE_WEIGHT)
        lengths = torch.tensor([len(answer.token_ids) for answer in plain.completions])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        means = weight, float(off > math.log(online.MAX_IMPORTANCE_WEIGHT))
        if kind == "rloo":  # an answer is one action: the difference is that of its sum
            weights = (off * lengths.float()).exp().clamp(max=online.MAX_IMPORTANCE_WEIGHT)
            means = float(weights.mean()), float((weights == weights.max()).float().mean())
            weight = weights[:, None].expand_as(mask)[mask]
        names = ("importance_weight", "importance_truncated")
        metrics = [game.round_metrics[name] for name in names]
        assert metrics == pytest.approx(means, rel=1e-5)
        expected, got = (g.columns["advantages"][mask] for g in (plain, game))
        torch.testing.assert_close(got, weight * expected, rtol=1e-4, atol=1e-6)
    assert len(warnings) == 2 and "truncated importance weights" in warnings[0]


def test_a_sequence_has_one_importance_weight_in_gspo(monkeypatch) -> None:
    """The exponential of the mean difference of its tokens, as its ratio is one of means."""

    def sample(model, prompts, **options):
        return [
            replace(a, logprobs=[replace(x, logprob=x.logprob - 0.3 * i) for i, x in
                                 enumerate(a.logprobs)])
            for a in sample_completions(model, prompts, **options)
        ]  # fmt: skip

    rules = replace(RULES, num_generations=16)
    plain = objective("gspo", rules)
    plain.next_batches(1)
    monkeypatch.setattr(online, "sample_completions", sample)
    game = objective("gspo", rules)
    game.next_batches(1)
    lengths = [len(answer.token_ids) for answer in game.completions]
    assert len(set(lengths)) > 2
    weights = torch.tensor([math.exp(0.3 * (n - 1) / 2) for n in lengths])
    assert weights.max() < online.MAX_IMPORTANCE_WEIGHT
    expected = weights[:, None] * plain.columns["advantages"]
    torch.testing.assert_close(game.columns["advantages"], expected, rtol=1e-4, atol=1e-6)
    assert game.round_metrics["importance_weight"] == pytest.approx(float(weights.mean()), rel=1e-4)


def test_a_negative_kl_estimate_raises_an_alarm(monkeypatch) -> None:
    """A sampler that sharpens prefers what the reference likes: its k1 is negative."""
    warnings: list[str] = []
    game = objective(
        "rloo", replace(RULES, num_generations=40, mismatch_threshold=9.0), warn=warnings.append
    )
    with torch.no_grad():
        game.policy.lm_head.weight.mul_(0.5)  # flatter than the reference
    other_sampler(monkeypatch, 0.0, 0.2)
    game.next_batches(1)
    assert game.round_metrics["kl"] < 0 and "standard errors below 0" in warnings[0]


def test_a_round_ends_early_where_the_update_moves_too_far() -> None:
    game = objective("ppo", replace(RULES, max_update_kl=1e-4, num_iterations=9))
    for round_of_step in (0, 0, 1):
        batches = game.next_batches(2)
        assert game.round == round_of_step
        for batch in batches:
            game.loss(batch, 1).backward()
        game.scalars([game.measurements()])
        with torch.no_grad():
            for parameter in game.policy.parameters():
                parameter -= 0.5 * (parameter.grad if parameter.grad is not None else 0)


def test_the_kl_coefficient_follows_its_target() -> None:
    """beta (1 + clip(kl / target - 1, 0.2) n / horizon), from the next round on."""
    game = objective("rloo", replace(RULES, kl_target=0.5, kl_horizon=120.0, beta=0.4))
    for kl, factor in ((5.0, 1.2), (0.55, 1.1), (0.0, 0.8)):
        game.beta = 0.4
        logp = torch.full((12, 1), kl)
        tokens = {"logp": logp, "ref_logp": torch.zeros(12, 1), "difference": torch.zeros(12, 1)}
        game._measure_round(Rollouts([0] * 12, [Completion([1])] * 12, [1.0] * 12, tokens, {}))
        assert game.next_beta == pytest.approx(0.4 * (1 + (factor - 1) * 12 / 120), rel=1e-5)


def test_completions_without_an_end_token() -> None:
    for kind in ("ppo", "grpo"):
        game = objective(kind, replace(RULES, missing_eos_penalty=-7.0, num_generations=8))
        game.next_batches(1)
        some = [a.is_stopped for a in game.completions]
        assert True in some and False in some
        scores = [
            s if e else -7.0 for s, e in zip(sevens(game.prompt_indices, game.completions), some)
        ]
        assert game.round_metrics["score"] == pytest.approx(np.mean(scores))
    game = objective(
        "grpo", replace(RULES, num_generations=8), group={"mask_truncated_completions": True}
    )
    game.next_batches(1)
    assert game.columns["loss_mask"].any(1).tolist() == [a.is_stopped for a in game.completions]


def test_denominators() -> None:
    """Dr. GRPO's is a constant per answer, whatever the answers' lengths."""
    expected = {"dr_grpo": 12 * RULES.max_new_tokens, "grpo": 12, "gspo": 12, "rloo": 12}
    for kind in LOSS_TYPES:
        game = objective(kind)
        batches = game.next_batches(4)
        tokens = sum(len(a.token_ids) for a in game.completions)
        assert sum(map(game.num_items, batches)) == expected.get(kind, tokens)
        assert sum(map(game.tokens, batches)) == tokens < 12 * RULES.max_new_tokens


def test_answers_of_all_rounds_have_seeds_of_their_own(monkeypatch) -> None:
    seeds: list[int] = []

    def sample(model, prompts, *, seed, **options):
        seeds.extend((seed + i) % 2**32 for i in range(len(prompts)))  # what torch takes
        return sample_completions(model, prompts, seed=seed, **options)

    monkeypatch.setattr(online, "sample_completions", sample)
    game = objective("rloo", replace(RULES, seed=3))
    for _ in range(3 * 8):
        game.next_batches(1)
    assert len(set(seeds)) == len(seeds) == 36


def test_the_last_policy_is_measured_too(tmp_path) -> None:
    """Also an interrupt in the last round leaves the checkpoint from before it."""
    rules = replace(RULES, max_kl=1e6, beta=0.0, num_iterations=2, batch_size=3)
    options = replace(OPTIONS, lr=0.01, max_steps=8, save_steps=8)

    def press(event):
        if event.get("step") in (9, 11, 13) and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    train(objective("dapo", rules), options, tmp_path)
    options = replace(options, max_steps=16)
    for _ in range(3):
        with pytest.raises(TrainingInterrupted):
            train(objective("dapo", rules), options, tmp_path, on_event=press)
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names[0] == "step-00000008" and len(names) == 3  # two of the round, and that
    with pytest.raises(DivergedError, match=r"step 16: round 2: the KL .*/step-00000008$"):
        train(objective("dapo", replace(rules, max_kl=1.0)), options, tmp_path)


def test_an_interrupt_of_the_last_measurement_is_not_lost(tmp_path) -> None:
    game = objective("dapo", RULES)
    check = game.check_pending

    def press() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        check()

    game.check_pending = press
    with pytest.raises(TrainingInterrupted, match=r"after step 4; saved in .*step-00000004$"):
        train(game, replace(OPTIONS, max_steps=4), tmp_path)
    assert train(objective("dapo", RULES), replace(OPTIONS, max_steps=4), tmp_path).steps == 4


def test_no_prompts() -> None:
    with pytest.raises(InputError, match="prompts: expected at least one, got none"):
        objective("ppo", prompts=[])


# ---- rounds in the background

ASYNC = replace(RULES, async_rollouts=True)
ASYNC_KINDS = ("ppo", "ppo shared", "dapo", "dapo dynamic", "rloo", "dapo lora")


def async_objective(kind: str, rules: RolloutOptions = ASYNC, **options):
    name, _, variant = kind.partition(" ")
    if variant == "dynamic":
        options |= {"group": {"dynamic_sampling": 2}, "score": starts_with_seven}
    return objective(
        name, rules, shared=variant == "shared", lora=variant == "lora", **options,
        ppo={"vf_coef": 0.5, "critic_warmup": 1},
    )  # fmt: skip


def descend(game, optimizer) -> Tensor:
    (batch,) = game.next_batches(1)
    loss = game.loss(batch, game.num_items(batch))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@pytest.mark.parametrize("kind", ASYNC_KINDS)
def test_a_round_is_sampled_by_the_policy_of_one_update_ago(kind) -> None:
    """As in a loop without threads, to the bit: round k is sampled, scored and evaluated with the
    weights at the beginning of round k - 1.
    """
    game = async_objective(kind)
    plain = replace(ASYNC, async_rollouts=False)
    learner, actor = async_objective(kind, plain), async_objective(kind, plain)
    optimizers = [torch.optim.SGD(g.trained.parameters(), lr=0.05) for g in (game, learner)]
    weights: list[dict[str, Tensor]] = []  # at the beginning of each round
    for k in range(4):
        weights.append({n: p.clone() for n, p in learner.trained.state_dict().items()})
        actor.trained.load_state_dict(weights[max(k - 1, 0)])
        actor.sample_round()
        learner.load_state_dict(actor.state_dict())
        for _ in range(8):
            losses = [descend(g, o) for g, o in zip((game, learner), optimizers, strict=True)]
            assert torch.equal(*losses)
        assert game.round == learner.round == k
        assert game.round_metrics == learner.round_metrics
    for a, b in zip(game.trained.parameters(), learner.trained.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(weights[0][n], p) for n, p in weights[-1].items())
    if kind == "dapo lora":  # the copy has adapters of its own, and no other weights
        copies = dict(game.sampler.models["policy"].named_parameters())
        for name, parameter in game.policy.named_parameters():
            assert (copies[name] is parameter) == ("lora_" not in name)
    game.close()


def test_the_ratio_corrects_for_the_lag() -> None:
    """The loss of a first step, by hand: its ratio is that of this policy to the one before."""
    game = async_objective("dapo", replace(ASYNC, beta=0.0, batch_size=12, num_iterations=1))
    optimizer = torch.optim.SGD(game.trained.parameters(), lr=1.0)
    before = copy.deepcopy(game.policy).eval()
    descend(game, optimizer)
    loss = descend(game, torch.optim.SGD(game.trained.parameters(), lr=0.0))
    assert game.round == 1
    terms, ratios = [], []
    for i, answer in enumerate(game.completions):
        packed = pack_rollouts(
            [game.prompts[game.prompt_indices[i]]], [answer.token_ids], torch.device("cpu")
        )
        with torch.no_grad():
            new, old = (game.logprobs(model, packed)[0][0] for model in (game.policy, before))
        advantage = game.columns["advantages"][i, : len(old)]
        ratio = (new - old).exp()
        terms.append(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage))
        ratios.append(ratio)
    torch.testing.assert_close(loss, torch.cat(terms).mean(), rtol=1e-4, atol=1e-6)
    ratio = torch.cat(ratios)
    assert float((ratio - 1).abs().max()) > 0.01
    assert game.scalars([game.measurements()])["ratio"] == pytest.approx(float(ratio.mean()))
    assert game.round_metrics["kl"] == 0  # the policy that sampled is the reference
    assert game.round_metrics["mismatch"] < 1e-5  # the lag is no mismatch
    game.close()


def slow_sampling(monkeypatch, seconds: float = 0.02) -> None:
    def sample(*args, **options):
        time.sleep(seconds)
        return sample_completions(*args, **options)

    monkeypatch.setattr(online, "sample_completions", sample)


@pytest.mark.parametrize("kind", ["ppo", "dapo dynamic", "dapo lora"])
def test_an_interrupt_between_rounds_sampled_in_the_background(kind, tmp_path, monkeypatch) -> None:
    """A resumed training has the same bits, also where sampling takes longer than the update."""
    rules = replace(ASYNC, kl_target=0.01, kl_horizon=100.0, max_update_kl=0.02)
    options = replace(OPTIONS, max_steps=20, validations=2)
    train(async_objective(kind, rules), options, tmp_path / "whole")
    expected = list_checkpoints(tmp_path / "whole")[-1]
    slow_sampling(monkeypatch)
    for step in (1, 12):

        def press(event, step=step):
            if event.get("step") == step and "loss" in event:
                os.kill(os.getpid(), signal.SIGINT)

        run = tmp_path / f"cut-{step}"
        with pytest.raises(TrainingInterrupted):
            train(async_objective(kind, rules), options, run, on_event=press)
        train(async_objective(kind, rules), options, run)
        assert lines(run) == lines(tmp_path / "whole")
        last = list_checkpoints(run)[-1]
        assert (last / "tensors.safetensors").read_bytes() == (
            expected / "tensors.safetensors"
        ).read_bytes()
    assert len({line["round"] for line in lines(run) if "loss" in line}) > 3


def sampling_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("fastlm-rollouts")]


def test_an_error_in_the_background_ends_the_training(tmp_path) -> None:
    def score(places, answers: list[Completion]) -> list[float]:
        if threading.current_thread() is not threading.main_thread():
            raise InputError("prompts.jsonl:7: the reward function failed")
        return sevens(places, answers)

    game = async_objective("dapo", score=score)
    options = replace(OPTIONS, max_steps=99, save_steps=1)
    with pytest.raises(InputError, match=r"^prompts.jsonl:7: the reward function failed$"):
        train(game, options, tmp_path)
    assert not sampling_threads()
    assert list_checkpoints(tmp_path)  # the steps of the round before are not lost


def test_an_error_of_the_update_stops_the_sampling(tmp_path, monkeypatch) -> None:
    ended: list[str] = []

    def sample(*args, on_piece=None, **options):
        try:
            for _ in range(2000 if on_piece else 0):  # 20 seconds
                time.sleep(0.01)
                on_piece(0, None)
            return sample_completions(*args, on_piece=on_piece, **options)
        except CancelledError:
            ended.append("cancelled")
            raise

    def fail(event) -> None:
        if "loss" in event:
            raise RuntimeError("of the update")

    monkeypatch.setattr(online, "sample_completions", sample)
    game = async_objective("dapo")
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match="of the update"):
        train(game, replace(OPTIONS, max_steps=99), tmp_path, on_event=fail)
    assert time.perf_counter() - start < 10 and ended == ["cancelled"]
    assert not sampling_threads()


def test_the_last_round_samples_no_further_one(tmp_path, monkeypatch) -> None:
    """Where max_steps is known; else the last checkpoint has the round that it would begin with."""
    seeds: list[int] = []

    def sample(model, prompts, *, seed, **options):
        seeds.append(seed)
        return sample_completions(model, prompts, seed=seed, **options)

    monkeypatch.setattr(online, "sample_completions", sample)
    options = replace(OPTIONS, max_steps=16, save_steps=8)
    game = async_objective("dapo")
    train(game, options, tmp_path / "steps")
    assert len(set(seeds)) == 3 and len(seeds) == 3  # two rounds, and the last policy's KL
    assert not any(name.startswith("pending.") for name in game.state_dict())
    seeds.clear()
    used = int(lines(tmp_path / "steps")[-1]["tokens"])
    train(
        async_objective("dapo"), replace(options, max_steps=None, max_tokens=used), tmp_path / "t"
    )
    assert len(seeds) == 4
    seeds.clear()
    train(async_objective("dapo"), replace(options, max_steps=24), tmp_path / "t")
    assert len(seeds) == 1  # the last policy's KL


def test_a_kl_that_explodes_rejects_the_steps_of_two_rounds(tmp_path) -> None:
    """It is that of the policy at the beginning of the last round, and it has grown since."""
    rules = replace(ASYNC, max_kl=1.0, beta=0.0, num_iterations=1, batch_size=12)
    game = async_objective("dapo", rules)
    with pytest.raises(DivergedError, match=r"the KL to the reference is .* max_kl 1; last") as e:
        train(game, replace(OPTIONS, lr=0.005, max_steps=100, save_steps=1), tmp_path)
    last = [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)]
    assert e.value.steps == 2 and e.value.checkpoint is not None
    assert int(e.value.checkpoint.name.removeprefix("step-")) == last[-1] - 2
    assert f"step {last[-1] + 1}: round" in str(e.value) and not sampling_threads()


def test_a_policy_learns_from_rounds_of_one_update_ago(tmp_path) -> None:
    rules = replace(
        ASYNC, prompts_per_round=6, num_generations=32, batch_size=192, decode_batch_size=192,
        beta=0.0,
    )  # fmt: skip
    game = objective(
        "dapo", rules, COPY, copied, config={"initializer_range": 0.05, "hidden_size": 32},
        group={"entropy_coef": 0.03},
    )  # fmt: skip
    train(game, replace(OPTIONS, max_steps=70, lr=0.005, save_steps=100), tmp_path)
    assert np.mean(copied(range(6), greedy(game))) > 0.9
