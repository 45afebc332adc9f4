"""Make the next round of rollouts in a thread, while the update of this round runs.

The completions of a round then come from the policy of one update ago (one-step off-policy:
Noukhovitch et al. 2024, arXiv:2410.18252). Their log-probabilities in the update's ratio are those
of that policy, so the ratio corrects for the lag, and the clip range bounds it.

The thread works on a copy of the objective whose models have tensors of their own, except frozen
ones: sampling merges adapters and switches modules to evaluation, which the update must not see.
Nothing depends on timing: a round's seeds, prompts and weights are known when it begins.

Rejected: a second process. It would need the scorer and the environments in pickled form, and a
copy of the frozen weights. torch and fastlm's kernels release Python's lock.
"""

import copy
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear

if TYPE_CHECKING:
    from fastlm.train.online import OnlineObjective


def frozen_tensors(model: nn.Module) -> list[Tensor]:
    """Return the tensors that training does not change."""
    tensors: list[Tensor] = [p for p in model.parameters() if not p.requires_grad]
    for module in model.modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            tensors.extend(module.buffers(recurse=False))
    return tensors


class RoundSampler:
    """Makes one round at a time in a thread. `result` is the state of an objective at its start."""

    def __init__(self) -> None:
        self.models: dict[str, nn.Module] = {}  # copies of the objective's models, by attribute
        self.future: Future[dict[str, Any]] | None = None
        self.is_closed = threading.Event()

    def start(self, objective: "OnlineObjective") -> None:
        """Begin to make the round after the objective's, with its weights of now."""
        if not self.models:
            self.models = _copy_models(objective)
        self._copy_weights(objective)
        sampler = copy.copy(objective)
        vars(sampler).update(self.models, sampler=RoundSampler(), on_piece=self._stop_if_closed)

        def make_round() -> dict[str, Any]:
            sampler.sample_round()
            return sampler.state_dict()

        pool = ThreadPoolExecutor(1, "fastlm-rollouts")
        self.future = pool.submit(make_round)
        pool.shutdown(wait=False)  # the thread ends after the round

    @torch.no_grad()
    def _copy_weights(self, objective: "OnlineObjective") -> None:
        copies = self.models["trained"].parameters()
        for parameter, target in zip(objective.trained.parameters(), copies, strict=True):
            if parameter.requires_grad:
                target.copy_(parameter)

    def _stop_if_closed(self, *_: object) -> None:
        if self.is_closed.is_set():
            raise CancelledError

    def wait(self) -> None:
        """Wait until no round is being made."""
        if self.future is not None:
            wait([self.future])

    def result(self) -> dict[str, Any] | None:
        """Wait for the round and return its state, None if there is none. Raises its error."""
        return None if self.future is None else self.future.result()

    def state(self) -> dict[str, Any]:
        """Wait for the round and return its state; empty if there is none, or if it failed. Then
        `result` raises the error in the next round, and a checkpoint of this one is still saved.
        """
        if self.future is None or self.future.exception() is not None:  # which waits
            return {}
        return self.future.result()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the `result` of a round that was made before; an empty state: there is none."""
        self.future = None
        if state:
            self.future = Future()
            self.future.set_result(dict(state))

    def close(self) -> None:
        """Drop the round. Sampling stops with the next step; scores and log-probabilities of the
        round are finished first.
        """
        self.is_closed.set()
        self.wait()
        self.is_closed.clear()
        self.future = None


def _copy_models(objective: "OnlineObjective") -> dict[str, nn.Module]:
    """Copy the objective's models, by attribute. Copies share frozen tensors, and the reference."""
    shared = [objective.reference, *frozen_tensors(objective.trained)]
    memo: dict[int, Any] = {id(value): value for value in shared}
    return {
        name: copy.deepcopy(value, memo)
        for name, value in vars(objective).items()
        if isinstance(value, nn.Module)
    }
