"""Check class indices."""

from torch import Tensor

from fastlm.errors import InputError
from fastlm.transforms import is_eager


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the classes on the CPU. Elsewhere the check would wait for the device.

    Under a transform there may be no values to read, and `gather` raises instead.
    """
    if target.device.type != "cpu" or not is_eager(target):
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise bad_target(target, int(bad.nonzero()[0]), classes, ignore_index)


def bad_target(target: Tensor, row: int, classes: int, ignore_index: int) -> InputError:
    return InputError(
        f"target: expected 0 <= class < {classes} or ignore_index {ignore_index},"
        f" got {int(target[row])} in row {row}"
    )
