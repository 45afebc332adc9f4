"""Rounding to nearest int8 or int4, with the scale of each group chosen for the smallest squared
error.
"""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops.quantized_weight import SCALE_DTYPES, QuantizedWeight, check_group_size, pack_rows
from fastlm.ops.wrong_type import FAILURES, explained

# int4 scales to try, as fractions of the scale that puts the group's largest weight on the end of
# the range: clipping that weight costs less than a coarser step for all others. Groups of 128 gain
# 0.5 dB and stop gaining at 0.75; whole rows of heavy-tailed weights gain down to 0.55 (4 dB).
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.55)
# Weights per pass over the candidates. The temporaries stay in the L2, and torch does not split
# such small work over threads, whose barriers cost 100 times the work if a core is busy elsewhere.
_BLOCK = 1 << 15


def quantize_weight(
    w: Tensor,
    bits: int,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> QuantizedWeight:
    """``q = round((w - zeros) / scales)`` per group of `group_size` columns of each row.

    Args:
        w: (N, K), any float dtype, any strides; finite.
        bits: 4 or 8.
        group_size: a multiple of 8, or -1 for one group per row. If it does not divide K, the last
            group is short.
        symmetric: without offsets, q in [-127, 127] or [-8, 7]. Otherwise the range is that of the
            group's values.
        scale_dtype: dtype of scales and zeros. q is rounded with the stored scale, so bfloat16
            costs no accuracy.

    int8: scale = absmax / 127. int4, symmetric: the largest weight is put on -8 (the longer side,
    so scales have a sign) or on 7, in full or clipped, whichever yields the smallest squared error
    in the group.

    Raises:
        InputError: not a matrix of finite floats, bits or group_size not as above, a scale that
            scale_dtype cannot hold.
    """
    try:
        if w.dim() != 2 or not w.is_floating_point() or w.shape[1] == 0:
            raise InputError(
                f"w: wanted a float matrix (N, K), K >= 1, got {w.dtype} {tuple(w.shape)}"
            )
        if bits not in (4, 8):
            raise InputError(f"bits: wanted 4 or 8, got {bits!r}")
        if scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype: wanted float32, bfloat16 or float16, got {scale_dtype}")
        n, k = w.shape
        size = check_group_size(group_size, k)
        w = w.detach()
        if not bool(torch.isfinite(w).all()):
            raise InputError("w: wanted finite values, got NaN or infinity")
        groups = -(-k // size)
        width = min(size, k)
        qdata, scales, zeros = [], [], []
        rows = max(1, _BLOCK // k)
        for block in w.split(rows) if n else [w]:
            v = block.to(torch.float32)
            if groups * width > k:  # repeat the last column: it changes no minimum and no maximum
                v = torch.cat((v, v[:, -1:].expand(-1, groups * width - k)), 1)
            v = v.reshape(-1, groups, width)
            if not symmetric:
                q, s, z = _asymmetric(v, bits, scale_dtype)
                zeros.append(z)
            elif bits == 8:
                q, s = _int8(v, scale_dtype)
            else:
                q, s = _int4(v, scale_dtype)
            if not bool(torch.isfinite(s).all()):
                raise InputError(
                    f"scale_dtype: wanted one that holds the scales of weights up to"
                    f" {float(block.abs().max()):.2g}, got {scale_dtype}"
                )
            qdata.append(pack_rows(q.reshape(-1, groups * width)[:, :k], bits))
            scales.append(s)
        return QuantizedWeight(
            torch.cat(qdata),
            torch.cat(scales),
            torch.cat(zeros) if zeros else None,
            bits,
            size,
            (n, k),
        )
    except FAILURES as error:
        raise explained(error, quantize_weight, locals()) from None


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as it will be stored, converted back to float32; 1 where the group is all zero (or
    too small for the dtype).
    """
    s = scale.to(dtype).float()
    return torch.where(s == 0, 1.0, s)


def _int8(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    s = _storable(v.abs().amax(-1) / 127, dtype)
    return (v / s[..., None]).round_().clamp_(-127, 127), s.to(dtype)


def _int4(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    low, high = v.aminmax(dim=-1)
    peak = torch.where(-low > high, low, high)  # signed value of the largest magnitude
    best_error = torch.full_like(peak, torch.inf)
    best_scale = peak
    # the peak on -8 with its sign, then on +-7; each scale also shrunk
    for end in (-8.0, 7.0):
        for shrink in _SHRINK:
            s = _storable(peak * (shrink / end), dtype)
            wide = s[..., None]
            error = (v / wide).round_().clamp_(-8, 7).mul_(wide).sub_(v).square_().sum(-1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, s, best_scale)
    return (v / best_scale[..., None]).round_().clamp_(-8, 7), best_scale.to(dtype)


def _asymmetric(v: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    low, high = v.aminmax(dim=-1)
    down, up = float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
    z = (low + (high - low) * (down / (down + up))).to(dtype).float()
    # both ends must still be within reach of the stored offset
    s = _storable(torch.maximum((high - z) / up, (z - low) / down), dtype)
    q = ((v - z[..., None]) / s[..., None]).round_().clamp_(-down, up)
    return q, s.to(dtype), z.to(dtype)
