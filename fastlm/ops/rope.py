"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of queries and keys in one call.

One operator is used in both directions: the gradient of a rotation is the inverse rotation, so
`_rope` with ``inverse=True`` is the backward. Rejected: two calls, one for q and one for k, which
would read the tables twice and pay for the call twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.memory_order import dense
from fastlm.operator import declare, is_autocast_on, promote
from fastlm.ops.wrong_type import TYPE_FAILURES, explain
from fastlm.transforms import is_eager


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate(x) * sin`` for the first R elements of every head of q and k; the rest
    passes through. ``rotate`` is

    - half-split (Hugging Face, GPT-NeoX): ``cat(-x[..., R/2:], x[..., :R/2])``;
    - interleaved (GPT-J, Cohere): ``stack(-x[..., 1::2], x[..., 0::2], -1).flatten(-2)``.

    Args:
        q: (B, H, S, D), any strides, float32, bfloat16 or float16 (float64 on the reference).
        k: (B, Hkv, S, D), any strides, dtype of q. Under ``torch.autocast`` q and k are cast to the
            wider dtype.
        cos, sin: (S, R), (1, S, R) or (B, S, R), any float dtype, R even and at most D. R < D is a
            partial rotation. Hugging Face's rotary embeddings return such tables: they have every
            angle twice, as ``cat(f, f)`` for half-split and ``repeat_interleave(f, 2)`` for
            interleaved. They get no gradient.
        rotary_dim: R; pass it if it is less than D. Without it, tables of R = D / 2 could be those
            of a full rotation with every angle once, as in Llama's own code: they are refused
            unless they have every angle twice. This check reads the tables. Where values cannot be
            read (a GPU, torch.compile), the result is NaN instead of an error.
        mrope_section: for positions with several axes (mRoPE, Wang et al. 2024, arXiv:2409.12191):
            the number of angles that each axis rotates, in order; their sum is R / 2. cos and sin
            are then (A, B, S, R), one table per axis (time, height, width in Qwen2-VL).

    Products and sums are float32, rounded once. Each element is read once and written once; the
    results have the memory order of q and k.

    Raises:
        InputError: shapes or dtypes differ, R is odd, wider than D or not rotary_dim, the tables
            require grad or have every angle once.
    """
    try:
        if q.dim() != 4 or not q.is_floating_point():
            raise InputError(f"q: expected floats (B, H, S, D), got {q.dtype} {tuple(q.shape)}")
        batch, _, length, width = q.shape
        if k.dim() != 4 or k.shape[0] != batch or k.shape[2:] != q.shape[2:] or k.dtype != q.dtype:
            if k.dtype != q.dtype and is_autocast_on(q):
                q, k = promote(q, k)
                return rope(
                    q, k, cos, sin, interleaved=interleaved, rotary_dim=rotary_dim,
                    mrope_section=mrope_section,
                )  # fmt: skip
            raise InputError(
                f"k: expected {q.dtype} (B, Hkv, S, D) with B, S, D of q {tuple(q.shape)},"
                f" got {k.dtype} {tuple(k.shape)}"
            )
        if mrope_section is not None:
            cos, sin = (
                _mrope_table(name, t, mrope_section, interleaved)
                for name, t in (("cos", cos), ("sin", sin))
            )
        if (
            cos.dim() not in (2, 3)
            or cos.shape[-2] != length
            or (cos.dim() == 3 and cos.shape[0] != 1 and cos.shape[0] != batch)
        ):
            raise InputError(
                f"cos: expected (S, R), (1, S, R) or (B, S, R) with B, S of q {tuple(q.shape)},"
                f" got {tuple(cos.shape)}"
            )
        rotated = cos.shape[-1]
        if rotated % 2 or rotated > width:
            raise InputError(f"cos: expected an even width R <= D = {width}, got {rotated}")
        if rotary_dim is not None and rotated != rotary_dim:
            raise InputError(f"cos: expected width rotary_dim = {rotary_dim}, got {rotated}")
        if sin.shape != cos.shape or sin.dtype != cos.dtype:
            raise InputError(
                f"sin: expected {cos.dtype} {tuple(cos.shape)} as cos,"
                f" got {sin.dtype} {tuple(sin.shape)}"
            )
        if not cos.is_floating_point():
            raise InputError(f"cos: expected a float dtype, got {cos.dtype}")
        if cos.requires_grad or sin.requires_grad:
            raise InputError(
                "cos, sin: expected tables without gradient (detach them), got requires_grad"
            )
        if k.device != q.device or cos.device != q.device or sin.device != q.device:
            raise InputError(
                f"k, cos, sin: expected device {q.device} as q,"
                f" got {k.device}, {cos.device}, {sin.device}"
            )
        if rotary_dim is None and 2 * rotated == width:
            cos = _check_angles_twice(cos, interleaved)
        # the results have the memory order of the arguments, which the operator's fake must see
        return _rope(dense(q), dense(k), cos, sin, interleaved, False)
    except TYPE_FAILURES as error:
        raise explain(error, rope, locals()) from None


def _mrope_table(name: str, table: Tensor, sections: Sequence[int], interleaved: bool) -> Tensor:
    """Return the (B, S, R) table in which every angle is that of its section's axis.

    The table is read once per head, so that building it costs a fraction of the rotation.
    """
    if table.dim() != 4 or len(sections) != table.shape[0] or 2 * sum(sections) != table.shape[3]:
        raise InputError(
            f"{name}: expected (A, B, S, R) with A = {len(sections)} axes and R = 2 *"
            f" {sum(sections)} as mrope_section {tuple(sections)}, got {tuple(table.shape)}"
        )
    # every angle is there twice: side by side, or in both halves
    sizes = [2 * n for n in sections] if interleaved else [*sections, *sections]
    parts = table.split(sizes, -1)
    return torch.cat([part[i % len(sections)] for i, part in enumerate(parts)], -1)


def _check_angles_twice(cos: Tensor, interleaved: bool) -> Tensor:
    """Return cos if it has every angle twice. If not, raise or, where values cannot be read, return
    NaN."""
    half = cos.shape[-1] // 2
    first, second = (
        (cos[..., ::2], cos[..., 1::2]) if interleaved else (cos[..., :half], cos[..., half:])
    )
    if not cos.is_cpu or not is_eager(cos):
        return cos.where((first == second).all(), torch.nan)
    if not torch.equal(first, second):
        twice = "cos.repeat_interleave(2, -1)" if interleaved else "torch.cat((cos, cos), -1)"
        raise InputError(
            f"cos: expected every angle twice ({twice}), or rotary_dim={2 * half},"
            f" got {tuple(cos.shape)} with every angle once for D = {4 * half}"
        )
    return cos


def _rotate_back(
    dq_out: Tensor, dk_out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _rope(dense(dq_out), dense(dk_out), cos, sin, interleaved, not inverse)


_rope = declare(
    reference.rope,
    "cpu triton cuda",
    fake=lambda q, k, *_: (torch.empty_like(q), torch.empty_like(k)),
    outputs="q_out k_out",
    backward=_rotate_back,
    gradients=("q", "k"),
)
