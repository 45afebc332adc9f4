"""Round weights to the nearest int8 or int4.

The scale (and offset) of each group is searched for the smallest squared error.
"""

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops.quantized_weight import SCALE_DTYPES, QuantizedWeight, check_group_size, pack_rows
from fastlm.ops.wrong_type import TYPE_FAILURES, explain

# int4 scales to try, as fractions of the scale that puts the group's largest weight on the end of
# the range: clipping that weight costs less than a coarser step for all others. Groups of 128 gain
# 0.5 dB and stop gaining at 0.75; whole rows of heavy-tailed weights gain down to 0.55 (4 dB).
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.65, 0.55)
# Least-squares steps from the best of these. On Gaussian weights, groups of 64: 0.05 dB (symmetric)
# and 0.19 dB (asymmetric); a third step gains 0.002 and 0.02 dB.
_STEPS = 2
# Then steps to the scale without shrinkage, whatever the error (see `unshrink`)
_UNSHRINK = 2
# Weights per pass over the candidates. The temporaries stay in the L2, and torch does not split
# such small work over threads, whose barriers cost 100 times the work if a core is busy elsewhere.
_BLOCK = 1 << 15
_MIN_NORMAL = torch.finfo(torch.float32).tiny  # kernels treat smaller numbers as zero


def quantize_weight(
    w: Tensor,
    bits: int,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    importance: Tensor | None = None,
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
        importance: (K,), at least 0: factors of the columns' squared errors. With the mean squares
            of the features of x, the error is that of ``x @ W^T`` where features are uncorrelated.

    int8: scale = absmax / 127, or the group's range / 255. int4 minimises the group's squared
    error; without `importance` that of a weight counts 1 + its square / the group's mean square, so
    large weights are clipped less. Symmetric: the largest weight is put on -8 (the longer side, so
    scales have a sign) or on 7, in full or clipped; asymmetric: the range is that of the values, or
    a shorter one. Two steps of least squares follow: the best scale (and offset) for the codes, new
    codes for it. Such weights are shrunk, as every least-squares fit is, and so are the outputs of
    the layer. The last scale is the one that gives the group's weights a regression slope of 1 on
    the original ones.

    Raises:
        InputError: not a matrix of finite floats (a meta tensor has no values), bits or group_size
            not as above, a scale that scale_dtype cannot hold.
    """
    try:
        if w.dim() != 2 or not w.is_floating_point() or w.shape[1] == 0:
            raise InputError(
                f"w: expected a float matrix (N, K), K >= 1, got {w.dtype} {tuple(w.shape)}"
            )
        if w.is_meta:
            raise InputError("w: expected values, got a tensor on the meta device")
        if bits not in (4, 8):
            raise InputError(f"bits: expected 4 or 8, got {bits!r}")
        if scale_dtype not in SCALE_DTYPES:
            raise InputError(
                f"scale_dtype: expected float32, bfloat16 or float16, got {scale_dtype}"
            )
        n, k = w.shape
        size = check_group_size(group_size, k)
        w = w.detach()
        if not bool(torch.isfinite(w).all()):
            raise InputError("w: expected finite values, got NaN or infinity")
        if importance is not None:
            importance = _check_importance(importance, k, w.device)
        groups = -(-k // size)
        width = min(size, k)
        qdata, scales, zeros = [], [], []
        rows = max(1, _BLOCK // k)
        u = _group_factors(importance, k, groups * width, width, w.device)
        for block in w.split(rows) if n else [w]:
            v = block.to(torch.float32)
            if groups * width > k:  # repeat the last column: it changes no minimum and no maximum
                v = torch.cat((v, v[:, -1:].expand(-1, groups * width - k)), 1)
            v = v.reshape(-1, groups, width)
            factors = _default_importance(v, u) if importance is None and bits == 4 else u
            q, s, z = round_groups(v, factors, bits, symmetric, scale_dtype)
            if z is not None:
                zeros.append(z.to(scale_dtype))
            if not bool(torch.isfinite(s).all()):
                raise InputError(
                    f"scale_dtype: expected one that holds the scales of weights up to"
                    f" {float(block.abs().max()):.2g}, got {scale_dtype}"
                )
            peak = v.abs().amax(-1)
            is_lost = (peak >= _MIN_NORMAL) & (q == 0).all(-1)
            if z is not None:
                is_lost &= z == 0
            if bool(is_lost.any()):
                raise InputError(
                    f"scale_dtype: expected one that holds the scales of weights of"
                    f" {float(peak[is_lost].min()):.2g}, got {scale_dtype}"
                )
            qdata.append(pack_rows(q.reshape(-1, groups * width)[:, :k], bits))
            scales.append(s.to(scale_dtype))
        return QuantizedWeight(
            torch.cat(qdata),
            torch.cat(scales),
            torch.cat(zeros) if zeros else None,
            bits,
            size,
            (n, k),
        )
    except TYPE_FAILURES as error:
        raise explain(error, quantize_weight, locals()) from None


def _check_importance(importance: Tensor, k: int, device: torch.device) -> Tensor:
    if tuple(importance.shape) != (k,) or importance.device != device:
        raise InputError(
            f"importance: expected shape ({k},) on {device} as w's columns,"
            f" got {tuple(importance.shape)} on {importance.device}"
        )
    factors = importance.detach().float()
    if not bool((torch.isfinite(factors) & (factors >= 0)).all()):
        raise InputError("importance: expected finite values of at least 0, got others")
    return factors


def _group_factors(
    importance: Tensor | None, k: int, padded: int, width: int, device: torch.device
) -> Tensor | None:
    """Return the factors as (groups, width), 0 for padding, or None where all are 1."""
    if importance is None and padded == k:
        return None
    factors = torch.zeros(padded, device=device)
    factors[:k] = 1.0 if importance is None else importance
    return factors.view(-1, width)


def _default_importance(v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the factors of weights' squared errors where the features are unknown.

    Without these factors, clipping helps the many small weights at the cost of the few large ones.
    On the 5.1 M model of docs/quantization.md they take KL from 0.0164 to 0.0150, and 0.12 % off
    the bits per byte. `mask`: 1, and 0 for padding.
    """
    mask = torch.ones_like(v) if mask is None else mask
    squares = v.square() * mask
    mean = squares.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
    return mask + squares / mean.clamp(min=1e-30)


def round_groups(
    v: Tensor, u: Tensor | None, bits: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes (..., width), scales (...) and offsets (...) or None of groups v (..., width).

    v is float32 or float64. Scales and offsets have the values that `dtype` stores, in v's dtype.
    `u` is broadcast to v: factors of the squared errors, None for 1.
    """
    if symmetric:
        s, z = (_absmax_scale if bits == 8 else _search_scale)(v, u, dtype), None
    else:
        s, z = _search_range(v, u, bits, dtype)
    return codes(v, s, z, bits, symmetric), s, z


def codes(v: Tensor, s: Tensor, z: Tensor | None, bits: int, symmetric: bool) -> Tensor:
    """Round v (..., width) to the nearest codes of scales and offsets (...)."""
    low, high = code_range(bits, symmetric)
    q = v if z is None else v - z[..., None]
    return (q / s[..., None]).round_().clamp_(low, high)


def code_range(bits: int, symmetric: bool) -> tuple[float, float]:
    """Return the smallest and the largest code. Symmetric int8 leaves out -128."""
    half = float(2 ** (bits - 1))
    return (-127.0 if bits == 8 and symmetric else -half), half - 1


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale as it will be stored, in its original dtype: 1 where the group is all zero
    (or too small for `dtype`)."""
    s = scale.to(dtype).to(scale.dtype)
    return torch.where(s == 0, 1.0, s)


def _absmax_scale(v: Tensor, u: Tensor | None, dtype: torch.dtype) -> Tensor:
    return _storable(v.abs().amax(-1) / 127, dtype)


class _ScaleSearch:
    """The best scales (and offsets) so far of every group, by the weighted squared error."""

    def __init__(self, v: Tensor, u: Tensor | None, symmetric: bool, dtype: torch.dtype):
        self.v, self.u, self.symmetric, self.dtype = v, u, symmetric, dtype
        self.s = torch.ones_like(v[..., 0])
        self.z = None if symmetric else torch.zeros_like(self.s)
        self.error = torch.full_like(self.s, torch.inf)

    def sum(self, x: Tensor) -> Tensor:
        return x.sum(-1) if self.u is None else (x * self.u).sum(-1)

    def try_scale(self, s: Tensor, z: Tensor | None) -> None:
        """Take these values, as stored, where they are better. NaN and infinity never are."""
        s = _storable(s, self.dtype)
        z = None if z is None else z.to(self.dtype).to(z.dtype)
        q = codes(self.v, s, z, 4, self.symmetric).mul_(s[..., None])
        error = self.sum((q if z is None else q.add_(z[..., None])).sub_(self.v).square_())
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.s = torch.where(better, s, self.s)
        if z is not None:
            assert self.z is not None
            self.z = torch.where(better, z, self.z)

    def finish(self) -> Tensor:
        """Improve the best scale by steps and return it.

        It is infinite, and then refused, where no scale could be stored.
        """
        for _ in range(_STEPS):
            self.step()
        for _ in range(_UNSHRINK):
            self.unshrink()
        return torch.where(self.error.isinf(), torch.inf, self.s)

    def step(self) -> None:
        """Try the scale (and offset) of least squares for the codes of the best."""
        qq, qv, _, q1, v1 = self.products()
        s = qv / qq
        self.try_scale(s, None if self.z is None else v1 - s * q1)

    def unshrink(self) -> None:
        """Take the scale (and offset) for which the quantized weights regress on the original ones
        with slope 1.

        The scale of least squares has the slope 1 - error / variance: 0.5 % less for int4 in groups
        of 32, in every layer. On the 5.1 M model of docs/quantization.md this step takes KL from
        0.0171 to 0.0162 and 0.1 % off the bits per byte, for 0.3 % more squared error.
        """
        _, qv, vv, q1, v1 = self.products()
        s = _storable(vv / qv, self.dtype)
        # a group that rounds to zeros alone, or to something unrelated, keeps its scale
        is_close = (s / self.s - 1).abs() < 0.5
        self.s = torch.where(is_close, s, self.s)
        if self.z is not None:
            z = (v1 - self.s * q1).to(self.dtype).to(self.z.dtype)
            self.z = torch.where(is_close, z, self.z)

    def products(self) -> tuple[Tensor, ...]:
        """Return the sums of q q, q v and v v, with codes q of the best, and q1, v1.

        With an offset, the three sums are about the means, and these are q1 and v1.
        """
        v, q = self.v, codes(self.v, self.s, self.z, 4, self.symmetric)
        qq, qv, vv = self.sum(q * q), self.sum(q * v), self.sum(v * v)
        if self.z is None:
            return qq, qv, vv, qq, vv
        weight_sum = self.sum(torch.ones_like(v))
        q1, v1 = self.sum(q) / weight_sum, self.sum(v) / weight_sum
        return (
            qq - weight_sum * q1 * q1,
            qv - weight_sum * q1 * v1,
            vv - weight_sum * v1 * v1,
            q1,
            v1,
        )


def _search_scale(v: Tensor, u: Tensor | None, dtype: torch.dtype) -> Tensor:
    low, high = v.aminmax(dim=-1)
    peak = torch.where(-low > high, low, high)  # signed value of the largest magnitude
    best = _ScaleSearch(v, u, True, dtype)
    # the peak on -8 with its sign, then on +-7; each scale also shrunk
    for end in (-8.0, 7.0):
        for shrink in _SHRINK:
            best.try_scale(peak * (shrink / end), None)
    return best.finish()


def _search_range(
    v: Tensor, u: Tensor | None, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    low, high = v.aminmax(dim=-1)
    down, up = float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)

    def scale_and_offset(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        z = (low + (high - low) * (down / (down + up))).to(dtype).to(v.dtype)
        # both ends must still be within reach of the stored offset
        return _storable(torch.maximum((high - z) / up, (z - low) / down), dtype), z

    if bits == 8:
        return scale_and_offset(low, high)
    best = _ScaleSearch(v, u, False, dtype)
    for shrink in _SHRINK:
        cut = (high - low) * ((1 - shrink) / 2)
        best.try_scale(*scale_and_offset(low + cut, high - cut))
        if shrink < 1:  # one end clipped: a tail is often on one side
            best.try_scale(*scale_and_offset(low + 2 * cut, high))
            best.try_scale(*scale_and_offset(low, high - 2 * cut))
    s = best.finish()
    assert best.z is not None
    return s, best.z
