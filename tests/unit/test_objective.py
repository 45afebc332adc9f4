"""An objective that creates its own batches: a policy and a value model on a bandit, in the style
of PPO. Rollouts come from the current policy, serve for two steps, and are restored bit for bit
after an interruption.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastlm.train.checkpoints import list_checkpoints
from fastlm.train.loop import TrainingInterrupted, train
from fastlm.train.objective import decay_matrices
from fastlm.train.options import TrainOptions

ARMS, BEST, ROWS, EPOCHS = 8, 5, 32, 2
OPTIONS = TrainOptions(
    max_steps=60, lr=0.2, dtype="float32", gradient_accumulation_steps=2, validations=2,
    sample_at=(), save_steps=3, weight_decay=0.0, warmup_ratio=0.0,
)  # fmt: skip


class Bandit:
    """The policy draws arms. Arm BEST pays 1, the others nothing."""

    def __init__(self):
        torch.manual_seed(3)
        policy, value = nn.Linear(1, ARMS, bias=False), nn.Linear(1, 1)
        self.trained = nn.ModuleDict({"policy": policy, "value": value})
        self.reference = nn.Linear(1, ARMS, bias=False).requires_grad_(False)
        self.arms = torch.zeros(0, dtype=torch.long)
        self.old_logp = torch.zeros(0)
        self.used = EPOCHS  # all epochs of the buffer
        self.measured: dict[str, float] = {}

    def logp(self, model: nn.Module) -> torch.Tensor:
        return model(torch.ones(1, 1)).log_softmax(-1)[0]

    def parameter_groups(self, weight_decay):
        value = decay_matrices(self.trained["value"], weight_decay)
        return [
            *decay_matrices(self.trained["policy"], weight_decay),
            *({**group, "lr": 0.5} for group in value),
        ]

    def identity(self):
        return {"arms": ARMS, "reference": float(self.reference.weight.sum())}

    def next_batches(self, count):
        if self.used == EPOCHS:
            with torch.no_grad():
                logp = self.logp(self.trained["policy"])
            self.arms = torch.multinomial(logp.exp(), ROWS, replacement=True)
            self.old_logp, self.used = logp[self.arms], 0
        self.used += 1
        return list(zip(self.arms.chunk(count), self.old_logp.chunk(count)))

    def num_items(self, batch):
        return len(batch[0])

    def tokens(self, batch):
        return self.num_items(batch)

    def loss(self, batch, num_items):
        arms, old = batch
        reward = (arms == BEST).float()
        value = self.trained["value"](torch.ones(1, 1))[0, 0]
        logp = self.logp(self.trained["policy"])[arms]
        ratio = (logp - old).exp()
        advantage = reward - value.detach()
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
        kl = logp.detach() - self.logp(self.reference)[arms]
        self.measured = {"reward": float(reward.mean()), "kl": float(kl.mean())}
        return ((value - reward) ** 2 - gain).sum() / num_items

    def measurements(self):
        return self.measured

    def scalars(self, measured):
        (measurement,) = measured
        return measurement

    def pending_steps(self):
        return 0

    def check_pending(self):
        pass

    def close(self):
        pass

    def position(self):
        return f"epoch {self.used} of the rollouts"

    def state_dict(self):
        return {"used": self.used, "arms": self.arms, "old_logp": self.old_logp}

    def load_state_dict(self, state):
        self.used, self.arms, self.old_logp = state["used"], state["arms"], state["old_logp"]

    def validate(self):
        return {"best": float(self.logp(self.trained["policy"])[BEST].detach().exp())}

    def sample(self):
        return None


pytestmark = pytest.mark.usefixtures("one_thread")


def lines(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_second", "progress")
    return [{k: v for k, v in line.items() if k not in clock} for line in records]


def test_a_policy_learns_from_its_own_rollouts(tmp_path):
    bandit = Bandit()
    before = bandit.validate()["best"]
    result = train(bandit, OPTIONS, tmp_path)
    assert before < 0.3 and result.metrics["best"] > 0.9
    steps = [line for line in lines(tmp_path) if "loss" in line]
    assert len(steps) == 60 and all({"reward", "kl", "lr"} <= line.keys() for line in steps)
    assert steps[-1]["reward"] > 0.8 > steps[0]["reward"]


@pytest.mark.parametrize("step", [6, 7, 9])  # after a checkpoint; within the rollouts; both
def test_cut_off_within_its_rollouts_it_continues_to_the_same_bits(tmp_path, step):
    import os
    import signal

    def press(event):
        if event.get("step") == step and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    train(Bandit(), OPTIONS, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted, match=f"step-{step:08d}"):
        train(Bandit(), OPTIONS, tmp_path / "cut", on_event=press)
    train(Bandit(), OPTIONS, tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    last = [list_checkpoints(tmp_path / name)[-1] for name in ("whole", "cut")]
    uninterrupted, cut = ((path / "tensors.safetensors").read_bytes() for path in last)
    assert uninterrupted == cut and b"objective.arms" in uninterrupted


def test_a_group_has_its_own_rate(tmp_path):
    """One step of AdamW moves a parameter by the rate, whatever its gradient."""
    bandit = Bandit()
    before = {k: v.clone() for k, v in bandit.trained.state_dict().items()}
    options = replace(OPTIONS, max_steps=2, schedule="wsd", decay_ratio=0.0, max_grad_norm=None)
    train(bandit, replace(options, save_steps=1), tmp_path / "run")
    first = [line for line in lines(tmp_path / "run") if line.get("step") == 1 and "loss" in line]
    assert first[0]["lr"] == OPTIONS.lr
    moved = {k: (v - before[k]).abs().max() for k, v in bandit.trained.state_dict().items()}
    assert moved["value.weight"] <= 2 * 0.5 * OPTIONS.lr * 1.01 < moved["policy.weight"]
