"""A request's use of one of the two models of a canary's experiment."""

import time
from typing import TYPE_CHECKING

from fastlm.serve.models import ModelLease, Models, Served

if TYPE_CHECKING:
    from fastlm.serve.answers import Answer
    from fastlm.serve.canary.canary import CanaryExperiment


class CanaryLease(ModelLease):
    """``assigned``: the experiment chose the model of conversation ``unit``, not the client."""

    def __init__(
        self,
        models: Models,
        served: Served,
        experiment: "CanaryExperiment",
        unit: str,
        assigned: bool,
    ):
        super().__init__(models, served)
        self.experiment: CanaryExperiment | None = experiment
        self.unit, self.assigned = unit, assigned
        self.arm = "new" if served is experiment.canary else "old"
        self.began = time.perf_counter()

    def fall_back(self) -> bool:
        if self.arm != "new" or not self.assigned:
            return False
        self.served.release()
        self.served, self.arm = self.models.current, "old"
        self.served.acquire()
        return True

    async def refused(self, id: str) -> None:
        """Count a refusal against the canary."""
        experiment, self.experiment = self.experiment, None  # what follows belongs to no arm
        if experiment is not None:
            await experiment.answered(  # the id itself is that of the current model's answer
                f"refused-{id}", self.unit, None, "new", experiment.name, assigned=True, error=True
            )

    async def record(self, id: str, answer: "Answer | None") -> None:
        """Count an answer. The experiment knows its id before the client has all of it."""
        if self.experiment is None:
            return
        arm, name, assigned = self.arm, self.served.name, self.assigned
        if answer is None:
            await self.experiment.answered(
                id, self.unit, None, arm, name, assigned=assigned, error=True
            )
            return
        tokens = sum(choice.tokens for choice in answer.choices)
        seconds = time.perf_counter() - self.began
        await self.experiment.answered(
            id, self.unit, getattr(answer.request, "conversation_id", None), arm, name,
            assigned=assigned, seconds=seconds / max(1, tokens),
            stopped=all(choice.finish_reason != "length" for choice in answer.choices),
        )  # fmt: skip
