"""One AdamW step of many tensors: the op of `fastlm.AdamW` and of the AdamW part of `fastlm.Muon`.

It is in the table of ops (`fastlm info`, `use_backend`) without a ``torch.ops.fastlm.adamw``:
torch's dispatcher took 0.27 ms to pass 300 tensors with their states, and a step of 300 small
tensors takes 0.9 ms. A step has no derivative, and the profiler shows ``fastlm::adamw`` anyway.
"""

from torch import Tensor
from torch._C._profiler import _RecordFunctionFast

from fastlm import reference
from fastlm.backend import BACKENDS, add_op, select
from fastlm.reference import AdamWTensor


def adamw(
    tensors: list[AdamWTensor], max_grad_norm: float, grad_norm: Tensor | None, have_norm: bool
) -> None:
    """Run `reference.adamw`, in place, on at least one tensor of any dtypes. All tensors are on one
    device unless the reference runs."""
    with _RecordFunctionFast("fastlm::adamw"):
        select("adamw", _dispatch_arg(tensors))(tensors, max_grad_norm, grad_norm, have_norm)


def _dispatch_arg(tensors: list[AdamWTensor]) -> Tensor:
    """Return the parameter to dispatch by: one of a dtype that no kernel supports, else one on a
    GPU."""
    kernel_dtypes = BACKENDS["cpu"].dtypes
    params = [t.param for t in tensors]
    special = [p for p in params if not p.is_cpu or p.dtype not in kernel_dtypes]
    return next((p for p in special if p.dtype not in kernel_dtypes), (special or params)[0])


add_op(reference.adamw, "cpu triton cuda", dispatch_arg="param", fake=lambda *_: None)
