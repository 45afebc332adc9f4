"""PPO's pieces against the values of TRL 1.12 (tests/support/trl_ppo_values.json, written by
tests/support/trl_ppo_values.py): equal, or different as docs/ppo.md says.
"""

import json
from typing import Any

import pytest
import torch
from paths import SUPPORT
from preference_models import config
from torch import Tensor

from fastlm.inference.requests import Completion
from fastlm.model.causal_lm import CausalLM
from fastlm.train import losses
from fastlm.train.online_objectives import PPOObjective, build_value_model
from fastlm.train.options import PPOOptions

FOUND = json.loads((SUPPORT / "trl_ppo_values.json").read_text())
OPTIONS, ROUNDS = FOUND["options"], FOUND["rounds"]

pytestmark = [
    pytest.mark.parametrize("name", ROUNDS),
    pytest.mark.usefixtures("one_thread"),
]


class Round:
    """TRL's tensors (B, S). ``mask``: the tokens of the answers. ``later``: TRL's mask of values
    and rewards, with one position more where the answer leaves room for it.
    """

    def __init__(self, name: str):
        self.values: dict[str, Any] = ROUNDS[name]
        self.last = self["sequence_lengths"].long()
        places = torch.arange(self["logprobs"].shape[1])
        self.mask = places <= self.last[:, None]
        self.later = places <= self.last[:, None] + 1
        self.end = torch.where(self.last + 1 < len(places), self.last + 1, self.last)
        self.full = self.end == self.last
        assert self.full.any() and not self.full.all()

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.values[name], dtype=torch.float64)


def close(actual: Tensor, expected: Tensor) -> None:
    """TRL computes in float32, of numbers around 1 that were summed a few times."""
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-6)


def at(x: Tensor, positions: Tensor) -> Tensor:
    return x.gather(1, positions[:, None])[:, 0]


def shrunk(mask: Tensor, actual: Tensor) -> Tensor:
    """Return ``actual``, whitened with the biased variance, as with the unbiased one of TRL."""
    count = int(mask.sum())
    mean = actual[mask].mean()
    return torch.where(mask, mean + (actual - mean) * ((count - 1) / count) ** 0.5, 0.0)


def test_rewards(name) -> None:
    """The same KL per token. TRL adds the score one position later, where there is one."""
    r = Round(name)
    kl = losses.kl_penalty(r["logprobs"], r["ref_logprobs"], r.values["kl_estimator"], mask=r.mask)
    rewards = -OPTIONS["kl_coef"] * kl
    rewards[torch.arange(len(r.end)), r.end] += r["scores"]
    theirs = r["rewards_before" if r.values["whiten_rewards"] else "rewards"]
    close(rewards, theirs)


def test_whitening(name) -> None:
    """The same but for the variance. Whitened rewards keep their mean (conventions 2 and 3)."""
    r = Round(name)
    close(shrunk(r.mask, losses.whiten(r["advantages"], r.mask)), r["whitened_advantages"])
    if r.values["whiten_rewards"]:
        actual = losses.whiten(r["rewards_before"], r.later, shift_mean=False)
        close(shrunk(r.later, actual), r["rewards"])
        close(r["rewards"][r.later].mean(), r["rewards_before"][r.later].mean())


def test_advantages_and_returns(name) -> None:
    r = Round(name)
    advantages, returns = losses.gae(
        r["rewards"], r["values"], r.later, gamma=OPTIONS["gamma"], lam=OPTIONS["lam"]
    )
    close(advantages, r["advantages"])
    close(returns, r["returns"])


def test_the_estimate_of_a_round_differs_by_one_position(name) -> None:
    """Convention 11: TRL's answer has a value and the score after its last token. The last token
    then has gamma V' + gamma lam (score - V') in place of the score, where there is room.
    """
    r = Round(name)
    if r.values["whiten_rewards"]:
        return  # over other positions, thus with another mean and variance
    gamma, lam = OPTIONS["gamma"], OPTIONS["lam"]
    policy = CausalLM(config(16), seed=0)
    trained = PPOObjective(
        policy, None, [[1]], [], lambda places, answers: [],
        PPOOptions(beta=OPTIONS["kl_coef"], gamma=gamma, lam=lam, whiten_advantages=False),
        base="", value_model=build_value_model(policy, shared=True),
    )  # fmt: skip
    trained.offset = 0.0  # TRL's values are those of its head
    trained.round_metrics = {"mismatch": 0.0}  # no importance weights
    tokens = {"logp": r["logprobs"], "ref_logp": r["ref_logprobs"], "values": r["values"],
            "difference": torch.zeros_like(r["logprobs"])}  # fmt: skip
    ours = trained.estimate(r["scores"], r.mask, tokens)["advantages"]
    close(ours[r.full], r["advantages"][r.full])
    after = at(r["values"], r.end)
    apart = gamma * after + gamma * lam * (r["scores"] - after) - r["scores"]
    actual = at(r["advantages"], r.last) - at(ours, r.last)
    close(actual[~r.full], apart[~r.full])
    assert apart[~r.full].abs().min() > 1e-3


def test_an_answer_without_an_end(name) -> None:
    """Convention 6: TRL subtracts a number from its score, `missing_eos_penalty` replaces it."""
    r = Round(name)
    ended = torch.tensor(r.values["ended"])
    assert ended.any() and not ended.all()
    used = torch.where(ended, 0.0, OPTIONS["missing_eos_penalty"])
    close(r["scores_of_model"] - used, r["scores"])
    policy = CausalLM(config(16), seed=0)
    trained = PPOObjective(
        policy, None, [[1]], [], lambda places, answers: r["scores_of_model"].tolist(),
        PPOOptions(missing_eos_penalty=-0.5), base="",
        value_model=build_value_model(policy, shared=True),
    )  # fmt: skip
    answers = [
        Completion([1], finish_reason="stop" if end else "length") for end in r.values["ended"]
    ]
    ours = torch.tensor(trained._score(trained.score, range(len(answers)), answers))
    close(ours, torch.where(ended, r["scores_of_model"], -0.5))


def test_losses_and_gradients_of_the_updates(name) -> None:
    """TRL's loss of a micro-batch is a mean over its tokens; accelerate divides it by their number.
    Policy losses are over the answers' tokens, value losses over one position more.
    """
    r = Round(name)
    updates = r.values["updates"]
    assert len(updates) == 4
    for update in updates:
        rows = update["rows"]
        logp, values = (
            torch.tensor(update[n], dtype=torch.float64, requires_grad=True)
            for n in ("logprobs", "values")
        )
        policy_loss, of_policy = losses.ppo_policy_loss(
            logp, r["logprobs"][rows], r["whitened_advantages"][rows], r.mask[rows],
            clip_range=OPTIONS["cliprange"],
        )  # fmt: skip
        value_loss, of_value = losses.ppo_value_loss(
            values, r["values"][rows], r["returns"][rows], r.later[rows],
            clip_range=OPTIONS["cliprange_value"],
        )  # fmt: skip
        ((policy_loss + OPTIONS["vf_coef"] * value_loss) / 2).backward()
        for actual, expected in (
            (policy_loss, "policy_loss"), (value_loss, "value_loss"),
            (of_policy["clip_fraction"], "policy_clip_fraction"),
            (of_value["clip_fraction"], "value_clip_fraction"),
            (logp.grad, "new_logprobs_gradient"), (values.grad, "vpred_gradient"),
        ):  # fmt: skip
            assert actual is not None
            close(actual.detach(), torch.tensor(update[expected], dtype=torch.float64))
    clips = [u[n] for u in updates for n in ("policy_clip_fraction", "value_clip_fraction")]
    assert sum(0 < clip < 1 for clip in clips) >= 3  # the clips are at work


def test_a_step_is_a_mean_over_its_tokens(name) -> None:
    """TRL's is the mean of its micro-batches' means, which weights tokens by their micro-batch."""
    r = Round(name)
    parts = r.values["updates"][:2]  # one step of TRL
    counts = [int(r.mask[part["rows"]].sum()) for part in parts]
    actual = sum(
        losses.ppo_policy_loss(
            torch.tensor(part["logprobs"]), r["logprobs"][part["rows"]],
            r["whitened_advantages"][part["rows"]], r.mask[part["rows"]],
            clip_range=OPTIONS["cliprange"], num_items=sum(counts),
        )[0]
        for part in parts
    )  # fmt: skip
    means = [part["policy_loss"] for part in parts]
    expected = (counts[0] * means[0] + counts[1] * means[1]) / sum(counts)
    close(torch.as_tensor(actual), torch.tensor(expected))
    assert counts[0] != counts[1] and abs(expected - sum(means) / 2) > 1e-3
