"""What the training loop asks of a stage: an ``Objective`` says what is trained, and on what.
`fastlm.train.pretrain.NextToken` predicts the next token. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastlm.train.distributed import SingleProcess

if TYPE_CHECKING:
    from torch import Tensor, nn


class DivergedError(ArithmeticError):
    """A training that must not go on. The message names the step and the last good checkpoint in
    one line. ``steps``: how many steps ago all was well; raised by `train`, ``good`` is the newest
    checkpoint that old.
    """

    def __init__(self, message: str, *, steps: int = 0):
        super().__init__(message)
        self.steps = steps
        self.good: Path | None = None


class Objective(Protocol):
    """What a stage trains, and on what. The loop owns the budget, the optimizer, clipping,
    checkpoints, resuming and logging.
    """

    trained: "nn.Module"
    """The module with all trained parameters. Several models (a policy and its value model) are an
    nn.ModuleDict. Frozen models (a reference) belong to the objective and are not checkpointed."""

    world: SingleProcess
    """The processes of the training, for an objective that divides more than micro-batches among
    them (rollouts). `train` sets it; before and after it is ``SingleProcess()``. All processes call
    the methods together, but for `loss`, `state_dict` and `sample`.
    """

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Return the optimizer's groups; a group's "lr" scales the scheduled rate (default 1)."""
        return decay_matrices(self.trained, weight_decay)

    def identity(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint to fit: data, sizes, frozen models."""
        raise NotImplementedError

    def next_batches(self, count: int) -> list[Any]:
        """Return the ``count`` micro-batches of the next step. They may come from data or be
        generated with the current models (rollouts).
        """
        raise NotImplementedError

    def num_items(self, batch: Any) -> int:
        """Return how many items of the batch the loss is a mean of: tokens, pairs."""
        raise NotImplementedError

    def tokens(self, batch: Any) -> int:
        """Return the number of tokens of the batch that the loss counts, for budget and speed."""
        return self.num_items(batch)

    def loss(self, batch: Any, num_items: int) -> "Tensor":
        """Return the sum over the batch / ``num_items`` (of all micro-batches of the step)."""
        raise NotImplementedError

    def measurements(self) -> Any:
        """Return what `scalars` needs of the micro-batches that had their `loss` in this process
        since `next_batches`, perhaps none: what pickle can carry, no tensors of a GPU.
        """
        return None

    def scalars(self, measured: Sequence[Any]) -> dict[str, float]:
        """Return what else the last step measured, for its line in metrics.jsonl, from the
        `measurements` of all processes. All call it.
        """
        del measured
        return {}

    def pending_steps(self) -> int:
        """Return how many of the last steps a later check may condemn (`DivergedError`): the newest
        checkpoint from before them is kept.
        """
        return 0

    def check_pending(self) -> None:
        """Raise DivergedError where the `pending_steps` steps before the end went too far."""
        return None

    def position(self) -> str:
        """Return where in the data the next batch begins, for an error message."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue to the same losses: JSON values, and
        tensors (a buffer of rollouts) as values of the outermost level.
        """
        raise NotImplementedError

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def validate(self) -> dict[str, float]:
        raise NotImplementedError

    def sample(self) -> str | None:
        raise NotImplementedError


def decay_matrices(model: "nn.Module", weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices decay, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
