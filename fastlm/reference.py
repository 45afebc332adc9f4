"""The definition of every op in plain PyTorch: what all others are tested against, never optimised.

The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.

Forward-mode AD goes through them, under ``vmap`` too: what depends on an input is never written
into a tensor that does not.
"""

import math

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.transforms import is_eager

# Scores or logits that exist at a time: 32 MB of each temporary in float64, so that the truth of
# 2048 x 2048 scores or of 32768 classes fits beside what is tested.
_SCORES = 1 << 22


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- rms_norm ------------------------------------------------------------------------------------
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), y = h * rstd * (offset + weight).

    x (..., H) -> y (..., H), h (..., H; empty without residual), rstd (...).
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[..., None] * (offset + _wide(weight))).to(x.dtype)
    return y, (x.new_empty(0) if residual is None else h), rstd


def rms_norm_backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of the weight; `dh_above` reaches h from the residual stream."""
    g, wide, r = _wide(dy), _wide(h), rstd[..., None]
    gw = g * (offset + _wide(weight))
    dh = r * (gw - wide * r.square() * (gw * wide).mean(-1, keepdim=True))
    if dh_above is not None:
        dh = dh + _wide(dh_above)
    return dh.to(h.dtype), (g * wide * r).reshape(-1, h.shape[-1]).sum(0)


# ---- linear --------------------------------------------------------------------------------------
def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x weight^T + bias: (..., K), (N, K), (N,) -> (..., N)."""
    y = _wide(x) @ _wide(weight).mT
    return (y if bias is None else y + _wide(bias)).to(x.dtype)


def linear_backward(
    dy: Tensor, x: Tensor | None, weight: Tensor | None, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx = dy weight where weight is given, dweight = dy^T x where x is, dbias = sum of dy; empty
    where not wanted."""
    n, g = dy.shape[-1], _wide(dy)
    rows = g.reshape(math.prod(dy.shape[:-1]), n)
    dx, dweight, dbias = (g.new_empty(0) for _ in range(3))
    if weight is not None:
        dx = g @ _wide(weight)
    if x is not None:
        dweight = rows.mT @ _wide(x).reshape(len(rows), x.shape[-1])
    if want_bias:
        dbias = rows.sum(0)
    return dx.to(dy.dtype), dweight.to(dy.dtype), dbias.to(dy.dtype)


# ---- rope ----------------------------------------------------------------------------------------
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """y = x * cos + rotate(x) * sin on the first R = cos.shape[-1] of D elements, for q and k;
    `inverse` is the transposed map x * cos + rotate^T(x * sin) with rotate^T = -rotate.

    q (B, H, S, D), k (B, Hkv, S, D), cos and sin (S, R), (1, S, R) or (B, S, R).
    """

    def rotate(x: Tensor) -> Tensor:
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), -1)

    def apply(x: Tensor) -> Tensor:
        wide, y = _wide(x), torch.empty_like(x)
        c, s = (t.to(wide.dtype).unsqueeze(-3) for t in (cos, sin))
        part, rest = wide.tensor_split((cos.shape[-1],), -1)
        turned = part * c - rotate(part * s) if inverse else part * c + rotate(part) * s
        return y.copy_(torch.cat((turned, rest), -1))

    return apply(q), apply(k)


# ---- glu -----------------------------------------------------------------------------------------
def _activation(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def glu_forward(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """y = act(gate) * up, elementwise."""
    return (_activation(_wide(gate), act) * _wide(up)).to(gate.dtype).contiguous()


def glu_backward(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """dgate = dy * up * act'(gate), dup = dy * act(gate)."""
    g, x, u = _wide(dy), _wide(gate), _wide(up)
    if act == "silu":
        s = torch.sigmoid(x)
        value, slope = x * s, s * (1 + x * (1 - s))
    elif act == "gelu":
        cdf = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        value = x * cdf
        slope = cdf + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    else:
        c = math.sqrt(2 / math.pi)
        t = torch.tanh(c * (x + 0.044715 * x**3))
        value = 0.5 * x * (1 + t)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t.square()) * c * (1 + 3 * 0.044715 * x.square())
    return (g * u * slope).to(gate.dtype).contiguous(), (g * value).to(gate.dtype).contiguous()


# ---- adamw ---------------------------------------------------------------------------------------
STATE_BLOCK = 256  # elements that share one scale of an 8-bit state
_CHUNK = 32768  # elements that share one key of random numbers, as in csrc/cpu/adamw_table.h


def pack_state(x: Tensor, *, root: bool) -> tuple[Tensor, Tensor]:
    """Float32 x to (uint8 codes of x's shape, float32 scales of its blocks of 256 in memory order).

    A scale is the block's largest magnitude. A code is the top bits of the float x / scale:

    - a moment (``root=False``): sign bit, then 7 bits of which 3 mantissa, the nearest code;
    - a root (``root=True``, x >= 0): 8 bits of which 4 mantissa; never zero unless x is.
    """
    flat = _flat(x)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % STATE_BLOCK)).view(-1, STATE_BLOCK)
    scales = blocks.abs().amax(1)
    # a block that holds one bad value is NaN as a whole, so that it is seen
    scales = torch.where(blocks.isfinite().all(1), scales, torch.nan)
    inverse = torch.where(scales > 1e-37, 1 / scales, torch.zeros_like(scales))
    y = blocks * inverse[:, None]
    mantissa, top = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - top
    magnitude = y.abs()
    codes = ((magnitude.view(torch.int32) + (1 << (shift - 1))) >> shift) - offset
    if root:
        codes = torch.maximum(codes, (magnitude > 0).int())
    else:
        codes = torch.where(codes > 0, codes, (magnitude >= 1.25 * 2**-17).int())
        codes = codes | (torch.signbit(y).int() << 7)
    codes = codes.clamp(0, 255).to(torch.uint8).view(-1)[: flat.numel()]
    return torch.empty_like(x, dtype=torch.uint8).copy_(_unflat(codes, x)), scales


def unpack_state(codes: Tensor, scales: Tensor, *, root: bool) -> Tensor:
    """The float32 values that `pack_state` stands for."""
    flat = _flat(codes).int()
    mantissa, top = (4, 255) if root else (3, 127)
    shift = 23 - mantissa
    offset = (0x3F800000 >> shift) - top
    magnitude = flat if root else flat & 127
    x = ((magnitude + offset) << shift).view(torch.float32)
    x = torch.where(magnitude > 0, x, torch.zeros_like(x))
    if not root:
        x = torch.where(flat >= 128, -x, x)
    x = x * scales.repeat_interleave(STATE_BLOCK)[: x.numel()]
    return torch.empty_like(codes, dtype=torch.float32).copy_(_unflat(x, codes))


def _flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in memory order."""
    return x.as_strided((x.numel(),), (1,))


def _unflat(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride())


def mix32(x):
    """A bijection of 32-bit integers that looks random (two rounds of xor-shift and multiply)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def round_stochastic(x: Tensor, key: int) -> Tensor:
    """Dense float32 to bfloat16, up or down with probability by nearness: element i in memory order
    of a tensor always takes the same random number under the same key."""
    flat = _flat(x)
    i = torch.arange(flat.numel(), device=x.device)
    chunk = mix32((key + (i // _CHUNK) * 0x9E3779B9) & 0xFFFFFFFF)
    h = mix32(((i % _CHUNK) * 0x9E3779B9 + chunk) & 0xFFFFFFFF)
    up = flat.view(torch.int32) + (h >> 16).int()
    rounded = torch.where(flat.isfinite(), (up & -65536).view(torch.float32), flat)
    return _unflat(rounded, x).bfloat16()


def step_key(seed: int, ordinal: int, step: int) -> int:
    """The key of a tensor's random numbers in the step after `step` others; `ordinal` is its place
    in the optimizer."""
    key = mix32((seed ^ 0x9E3779B9) & 0xFFFFFFFF)
    return mix32(mix32(key ^ step) ^ ordinal)


def join_master(param: Tensor, low: Tensor) -> Tensor:
    """The float32 master of a bfloat16 parameter and the 16 bits (int16) that it lacks; zero lacks
    none (those of the last step stay behind where somebody sets a parameter to zero)."""
    high = param.view(torch.int16).int() << 16
    return (high + low.int().masked_fill(param == 0, 0)).view(torch.float32)


def split_master(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 nearest to each float32 (ties away from zero) and the lower 16 bits: read as a
    signed number, what has to be added to the former's bits to give the latter's."""
    master = torch.where(master.isnan(), torch.nan, master)  # one NaN, which cannot round up
    bits = master.view(torch.int32)
    high = ((bits + 0x8000) >> 16).short().view(torch.bfloat16)
    return high, bits.short()


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    steps: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_scales: list[Tensor | None],
    exp_avg_sq_scales: list[Tensor | None],
    masters: list[Tensor | None],
    options: list[tuple[float | Tensor, float, float, float, float, bool, bool]],
    keys: list[tuple[int, int]],
    max_grad_norm: float,
    grad_norm: Tensor | None,
    have_norm: bool,
) -> None:
    """One AdamW step (Loshchilov and Hutter 2019, arXiv:1711.05101) of every tensor, in place.

    `options` per tensor: lr, beta1, beta2, eps, weight_decay, maximize, stochastic rounding.
    `keys`: seed and ordinal of `step_key`.
    `masters`: float32 of a float16 parameter, the lower half of `split_master` of a bfloat16 one.
    With `grad_norm` (a scalar, written unless `have_norm`), gradients are scaled as
    `clip_grad_norm_` would do.
    """
    clip = None
    if grad_norm is not None:
        if not have_norm:
            squares = [_wide(g).double().square().sum().to(grad_norm.device) for g in grads]
            grad_norm.copy_(torch.stack(squares).sum().sqrt() if squares else torch.zeros(()))
        clip = (max_grad_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    for i, param in enumerate(params):
        lr, beta1, beta2, eps, weight_decay, maximize, stochastic = options[i]
        lr = float(lr)
        m, v, master = exp_avgs[i], exp_avg_sqs[i], masters[i]
        m_scale, v_scale = exp_avg_scales[i], exp_avg_sq_scales[i]
        if m_scale is not None and v_scale is not None:
            m = unpack_state(m, m_scale, root=False)
            v = unpack_state(v, v_scale, root=True).square()
        g = grads[i].to(m.dtype)
        if clip is not None:
            g = g * clip.to(g.device, g.dtype)
        if maximize:
            g = -g
        steps[i] += 1
        step = steps[i].item()
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        split = master is not None and master.dtype == torch.int16
        w = param if master is None else join_master(param, master) if split else master
        w = w.to(m.dtype)
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        w = w - (lr * weight_decay * w + lr / (1 - beta1**step) * (m / denominator))
        if split and master is not None:
            param_bits, master_bits = split_master(w)
            param.copy_(param_bits)
            master.copy_(master_bits)
        else:
            if master is not None:
                master.copy_(w)
            if stochastic:
                w = round_stochastic(w, step_key(*keys[i], int(step) - 1))
            param.copy_(w)
        if m_scale is not None and v_scale is not None:
            states = ((m, exp_avgs[i], m_scale, False), (v.sqrt(), exp_avg_sqs[i], v_scale, True))
            for x, codes, scales, root in states:
                for old, new in zip((codes, scales), pack_state(x, root=root)):
                    old.copy_(new)


# ---- cross_entropy -------------------------------------------------------------------------------
def _row_blocks(rows: int, classes: int) -> list[slice]:
    step = max(1, _SCORES // max(1, classes))
    return [slice(i, i + step) for i in range(0, max(1, rows), step)]


def cross_entropy_forward(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What any cross-entropy of a row is made of, with z = softcap(logit_scale * logits) (N, V).

    shift (N) = max z;  log_sum (N) = log sum exp(z - shift), so lse = shift + log_sum;
    nll (N) = lse - z[target], 0 where the target is ignored;
    smoothed (N; empty unless `smooth`) = sum over v of class_weight[v] * (lse - z[v]).
    """
    if logits.shape[1] == 0:
        raise InputError(f"logits: wanted at least one class, got shape {tuple(logits.shape)}")
    check_target(target, logits.shape[1], ignore_index)
    options = (class_weight, smooth, ignore_index, softcap, logit_scale)
    blocks = _row_blocks(*logits.shape)
    parts = [_cross_entropy_rows(logits[b], target[b], *options) for b in blocks]
    shift, log_sum, nll, smoothed = (torch.cat(part) for part in zip(*parts))
    return shift, log_sum, nll, smoothed


def _cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z = _capped(logits, softcap, logit_scale)
    shift = z.amax(1).detach()  # any constant will do: the backward has no gradient for it either
    z = z - shift[:, None]
    log_sum = z.exp().sum(1).log()
    ignored = target == ignore_index
    at_target = z.gather(1, target.masked_fill(ignored, 0)[:, None])[:, 0]
    nll = (log_sum - at_target).masked_fill(ignored, 0)
    if not smooth:
        return shift, log_sum, nll, z.new_empty(0)
    logp = log_sum[:, None] - z
    return (
        shift,
        log_sum,
        nll,
        (logp if class_weight is None else logp * _wide(class_weight)).sum(1),
    )


def cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """dz[v] = on_p * p[v] - on_target * (v == target) - on_all * class_weight[v], then to
    logits.
    """
    parts = [
        _cross_entropy_rows_backward(
            on_p[b],
            on_target[b],
            None if on_all is None else on_all[b],
            logits[b],
            target[b],
            class_weight,
            shift[b],
            log_sum[b],
            ignore_index,
            softcap,
            logit_scale,
        )
        for b in _row_blocks(*logits.shape)
    ]
    return torch.cat(parts)


def _cross_entropy_rows_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    logits: Tensor,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    z = _capped(logits, softcap, logit_scale)
    dz = on_p[:, None] * (z - shift[:, None] - log_sum[:, None]).exp()
    ignored = target == ignore_index
    dz = dz.scatter_add(
        1,
        target.masked_fill(ignored, 0)[:, None],
        on_target.masked_fill(ignored, 0).neg()[:, None],
    )
    if on_all is not None:
        dz = dz - on_all[:, None] * (1.0 if class_weight is None else _wide(class_weight))
    if softcap is not None:
        dz = dz * (1 - (z / softcap).square())
    return (dz * logit_scale).to(logits.dtype)


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Sum of `cross_entropy_forward`'s nll, or its mean over the rows not ignored; with `keep` also
    its (shift, log_sum, nll) as one (3, N), else an empty tensor.
    """
    shift, log_sum, nll, _ = cross_entropy_forward(
        logits, target, None, False, ignore_index, softcap, logit_scale
    )
    loss = nll.sum()
    if mean:
        loss = loss / (target != ignore_index).sum()
    return loss, torch.stack((shift, log_sum, nll)) if keep else nll.new_empty(0)


def cross_entropy_loss_backward(
    d_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    ignore_index: int,
    mean: bool,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """The gradient of `cross_entropy_loss`: zero in ignored rows, also where the mean is NaN."""
    valid = target != ignore_index
    on_row = d_loss / valid.sum() if mean else d_loss
    on_p = torch.where(valid, on_row, 0.0).to(stats.dtype)
    shift, log_sum, _ = stats
    return cross_entropy_backward(
        on_p, on_p, None, logits, target, None, shift, log_sum, ignore_index, softcap, logit_scale
    )


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU; elsewhere the check would wait for the device. Under a transform there may be no
    values to look at, and `gather` refuses.
    """
    if target.device.type != "cpu" or not is_eager(target):
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise bad_target(target, int(bad.nonzero()[0]), classes, ignore_index)


def bad_target(target: Tensor, row: int, classes: int, ignore_index: int) -> InputError:
    return InputError(
        f"target: wanted 0 <= class < {classes} or ignore_index {ignore_index},"
        f" got {int(target[row])} in row {row}"
    )


def _capped(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
    z = _wide(logits) * logit_scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


# ---- linear_cross_entropy ------------------------------------------------------------------------
def linear_cross_entropy_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    smooth: bool,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cross_entropy_forward of input (N, D) @ linear_weight (V, D)^T + linear_bias (V)."""
    check_target(target, len(linear_weight), ignore_index)
    options = (class_weight, smooth, ignore_index, softcap, logit_scale)
    parts = [
        _cross_entropy_rows(_logits(input[b], linear_weight, linear_bias), target[b], *options)
        for b in _row_blocks(len(input), len(linear_weight))
    ]
    shift, log_sum, nll, smoothed = (torch.cat(part) for part in zip(*parts))
    return shift, log_sum, nll, smoothed


def linear_cross_entropy_backward(
    on_p: Tensor,
    on_target: Tensor,
    on_all: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, linear_weight and linear_bias; empty where not needed."""
    x, w, none = _wide(input), _wide(linear_weight), input.new_empty(0)
    d_inputs, d_weight, d_bias = [], torch.zeros_like(w), w.new_zeros(len(w))
    for b in _row_blocks(len(input), len(linear_weight)):
        d_logits = _cross_entropy_rows_backward(
            on_p[b],
            on_target[b],
            None if on_all is None else on_all[b],
            _logits(x[b], w, linear_bias),
            target[b],
            class_weight,
            shift[b],
            log_sum[b],
            ignore_index,
            softcap,
            logit_scale,
        )
        d_inputs.append(d_logits @ w)
        d_weight = d_weight + d_logits.t() @ x[b]
        d_bias = d_bias + d_logits.sum(0)
    return (
        torch.cat(d_inputs).to(input.dtype) if need_input else none,
        d_weight.to(linear_weight.dtype) if need_weight else none,
        none if linear_bias is None else d_bias.to(linear_bias.dtype),
    )


def linear_cross_entropy_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    on_nll: Tensor,
    on_smoothed: Tensor | None,
    on_square: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss = sum of on_nll * nll + on_smoothed * smoothed + on_square * lse^2; its gradients."""
    smooth, valid = on_smoothed is not None, target != ignore_index
    shift, log_sum, nll, smoothed = linear_cross_entropy_forward(
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        smooth,
        ignore_index,
        softcap,
        logit_scale,
    )
    lse = torch.where(valid, shift + log_sum, 0.0)
    loss, on_p = on_nll * nll, on_nll
    if on_smoothed is not None:
        loss = loss + on_smoothed * torch.where(valid, smoothed, 0.0)
        classes = linear_weight.shape[0]
        on_p = on_p + on_smoothed * (classes if class_weight is None else _wide(class_weight).sum())
    if on_square is not None:
        loss = loss + on_square * lse.square()
        on_p = on_p + 2 * on_square * lse
    on_p = torch.where(valid, on_p, 0.0)
    gradients = linear_cross_entropy_backward(
        on_p,
        on_nll,
        None if on_smoothed is None else torch.where(valid, on_smoothed, 0.0),
        input,
        linear_weight,
        linear_bias,
        target,
        class_weight,
        shift,
        log_sum,
        ignore_index,
        softcap,
        logit_scale,
        need_input,
        need_weight,
    )
    return loss.sum(), gradients[0], _wide(gradients[1]), _wide(gradients[2])


def linear_cross_entropy_loss_backward(
    d_loss: Tensor,
    d_input: Tensor,
    d_weight: Tensor,
    d_bias: Tensor,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of linear_cross_entropy_loss times that of its loss, in their tensors'
    dtypes.
    """
    return (
        (d_input * d_loss).to(d_input.dtype),
        (d_weight * d_loss).to(weight_dtype),
        (d_bias * d_loss).to(bias_dtype),
    )


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    bias = None if linear_bias is None else _wide(linear_bias)
    return torch.nn.functional.linear(_wide(input), _wide(linear_weight), bias)


# ---- attention -----------------------------------------------------------------------------------
def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words per counter, in int64 tensors."""
    c, k0, k1 = list(counter), seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        high_a, high_b = (a >> 32) & 0xFFFFFFFF, (b >> 32) & 0xFFFFFFFF
        c = [high_b ^ c[1] ^ k0, b & 0xFFFFFFFF, high_a ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def dropout_factor(
    seed: Tensor, p: float, batch: Tensor, heads: int, rows: Tensor, keys: int
) -> Tensor:
    """0 or 1 / (1 - p) for each score: a function of batch, head, row, key and seed, and of nothing
    else, so that every backend and block size draws the same.

    Key j takes word (j // 16) % 4 of counter ((j // 64) * 16 + j % 16, row, head, batch): 16 lanes
    of a vector are 16 neighbouring keys. It is dropped when the word is below p * 2^32.
    """
    groups = (keys + 63) // 64
    device = seed.device
    x = torch.arange(groups * 16, device=device)
    head = torch.arange(heads, device=device)[:, None, None]
    counter = torch.broadcast_tensors(x, rows[:, None], head, batch[:, None, None, None])
    words = torch.stack([w.unflatten(-1, (groups, 16)) for w in philox(counter, seed)], -2)
    kept = words.flatten(-3)[..., :keys] >= int(p * 2**32)
    return kept * (1 / (1 - p) if p < 1 else 0.0)


def _scores(
    q: Tensor,
    k: Tensor,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    rows: Tensor,
    query_length: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor | None]:
    """q (B, Hkv, G, R, D), k (B, Hkv, T, D) wide -> scores (B, H, R, T) of these rows, and under a
    softcap their derivative by scale q k.
    """
    s = scale * (q @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)
    slope = None
    if softcap > 0:
        t = torch.tanh(s / softcap)
        s, slope = softcap * t, 1 - t.square()
    keys = k.shape[2]
    i = rows[:, None] + (keys - query_length)
    j = torch.arange(keys, device=q.device)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    if bias is not None:
        s = s + (bias if bias.shape[2] == 1 else bias[:, :, rows]).to(s.dtype)
    if causal or window > 0:
        hidden = j > i
        if window > 0:
            hidden = hidden | (j <= i - window)
        s = s.masked_fill(hidden, -torch.inf)
    return s, slope


def _query_blocks(q: Tensor, keys: int):
    step = max(1, _SCORES // max(1, q.shape[0] * q.shape[1] * keys))
    for start in range(0, q.shape[2], step):
        yield torch.arange(start, min(start + step, q.shape[2]), device=q.device)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor]:
    """q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv) -> out (B, H, S, Dv), lse (B, H, S), a
    block of queries at a time. window 0 and softcap 0 mean none; bias is 4-D; first_batch numbers
    the sequences for dropout.
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = _wide(k), _wide(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    # a block of no rows, where there are none at all
    outs, lses = [q.new_zeros(*q.shape[:2], 0, v.shape[3])], [wide_k.new_zeros(*q.shape[:2], 0)]
    for rows in _query_blocks(q, k.shape[2]):
        block = _wide(q[:, :, rows]).unflatten(1, groups)
        s, _ = _scores(
            block, wide_k, alibi_slopes, bias, rows, q.shape[2], causal, scale, window, softcap
        )
        terms = s
        if sinks is not None:
            extra = sinks.to(s.dtype)[:, None, None].expand(*s.shape[:3], 1)
            terms = torch.cat([s, extra], -1)
        blind = (terms == -torch.inf).all(-1)  # logsumexp's derivative there is NaN
        total = torch.logsumexp(terms.masked_fill(blind[..., None], 0), -1)
        p = torch.exp(s - total.masked_fill(blind, 0)[..., None])
        if seed is not None:
            p = p * dropout_factor(seed, dropout_p, batch, q.shape[1], rows, k.shape[2]).to(p.dtype)
        outs.append((p.unflatten(1, groups) @ wide_v[:, :, None]).flatten(1, 2).to(q.dtype))
        lses.append(total.masked_fill(blind, -torch.inf))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
    first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv like q, k, v; dsinks (H) and dbias (as bias) wide, or empty.

    P = exp(s - lse), dP = dout v^T (through dropout), delta = sum(dout out) - dlse,
    ds = P (dP - delta).
    """
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    wide_k, wide_v = _wide(k), _wide(v)
    batch = torch.arange(first_batch, first_batch + q.shape[0], device=q.device)
    dqs = [q.new_zeros(*q.shape[:2], 0, q.shape[3])]
    dk, dv = torch.zeros_like(wide_k), torch.zeros_like(wide_v)
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and bias_grad else 0)
    dbiases = []
    for rows in _query_blocks(q, k.shape[2]):
        block = _wide(q[:, :, rows]).unflatten(1, groups)
        s, slope = _scores(
            block, wide_k, alibi_slopes, bias, rows, q.shape[2], causal, scale, window, softcap
        )
        total = lse[:, :, rows]
        offset = total.masked_fill(total == -torch.inf, 0)
        p = torch.exp(s - offset[..., None])
        g = _wide(dout[:, :, rows])
        delta = (g * _wide(out[:, :, rows])).sum(-1)
        if dlse is not None:
            delta = delta - dlse[:, :, rows]
        grouped = g.unflatten(1, groups)
        dp = (grouped @ wide_v[:, :, None].transpose(-1, -2)).flatten(1, 2)
        dropped = p
        if seed is not None:
            keep = dropout_factor(seed, dropout_p, batch, q.shape[1], rows, k.shape[2]).to(p.dtype)
            dropped, dp = p * keep, dp * keep
        dv = dv + (dropped.unflatten(1, groups).transpose(-1, -2) @ grouped).sum(2)
        ds = p * (dp - delta[..., None])
        if bias is not None and bias_grad:
            part = ds.sum_to_size(*[d if d == 1 else n for d, n in zip(bias.shape, ds.shape)])
            if bias.shape[2] == 1:
                dbias = dbias + part
            else:
                dbiases.append(part)
        if sinks is not None:
            weight = torch.exp(sinks.to(s.dtype)[:, None] - offset)
            dsinks = dsinks - torch.where(total == -torch.inf, 0, weight * delta).sum((0, 2))
        ds = (ds if slope is None else ds * slope).unflatten(1, groups) * scale
        dqs.append((ds @ wide_k[:, :, None]).flatten(1, 2).to(q.dtype))
        dk = dk + (ds.transpose(-1, -2) @ block).sum(2)
    if dbiases:
        dbias = torch.cat(dbiases, 2)
    return torch.cat(dqs, 2), dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias


# ---- varlen_attention ----------------------------------------------------------------------------
def _offsets(cu_seqlens: Tensor, total: int, name: str) -> list[int]:
    offsets = cu_seqlens.tolist()
    rising = offsets == sorted(offsets)
    if not offsets or offsets[0] != 0 or offsets[-1] != total or not rising:
        raise InputError(f"{name}: wanted offsets that rise from 0 to {total}, got {offsets[:8]}")
    return offsets


def _bias_of(bias: Tensor | None, b: int, rows: int, keys: int) -> Tensor | None:
    """The part of a bias over (B, H, longest S, longest T) that belongs to sequence b."""
    if bias is None:
        return None
    bias = bias[b : b + 1] if bias.shape[0] > 1 else bias
    bias = bias[:, :, :rows] if bias.shape[2] > 1 else bias
    return bias[..., :keys] if bias.shape[3] > 1 else bias


def varlen_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of each sequence: q (total_q, H, D) -> out (total_q, H, Dv),
    lse (H, total_q).
    """
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], [_wide(q[:0, :, 0]).mT]
    ends_q = _offsets(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
    ends_k = _offsets(cu_seqlens_k, k.shape[0], "cu_seqlens_k")
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        o, one_lse = attention_forward(
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q1 - q0, k1 - k0),
            seed,
            causal,
            scale,
            window,
            softcap,
            dropout_p,
            first_batch=b,
        )
        outs.append(o[0].transpose(0, 1))
        lses.append(one_lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
    dropout_p: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`attention_backward` of each sequence."""
    grads = [[t.new_zeros(0, *t.shape[1:])] for t in (q, k, v)]
    dsinks = lse.new_zeros(0 if sinks is None else sinks.shape[0])
    dbias = lse.new_zeros(bias.shape if bias is not None and bias_grad else 0)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        *each, one_dsinks, one_dbias = attention_backward(
            dout[q0:q1].transpose(0, 1)[None],
            None if dlse is None else dlse[None, :, q0:q1],
            q[q0:q1].transpose(0, 1)[None],
            k[k0:k1].transpose(0, 1)[None],
            v[k0:k1].transpose(0, 1)[None],
            out[q0:q1].transpose(0, 1)[None],
            lse[None, :, q0:q1],
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q1 - q0, k1 - k0),
            seed,
            causal,
            scale,
            window,
            softcap,
            dropout_p,
            bias_grad,
            first_batch=b,
        )
        for parts, one in zip(grads, each):
            parts.append(one[0].transpose(0, 1))
        dsinks = dsinks + one_dsinks
        if bias is not None and bias_grad:
            before = b if bias.shape[0] > 1 else 0
            behind = [n - m for n, m in zip(bias.shape, one_dbias.shape)]
            padding = (0, behind[3], 0, behind[2], 0, 0, before, behind[0] - before)
            dbias = dbias + torch.nn.functional.pad(one_dbias, padding)
    dq, dk, dv = (torch.cat(parts) for parts in grads)
    return dq, dk, dv, dsinks, dbias


# ---- paged_append --------------------------------------------------------------------------------
def paged_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    positions: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """``cache[block_table[b, p // page_size], p % page_size] = x[b, s]``, p = positions[b, s]; int8
    caches: ``round(x / scale)`` within -127 to 127. A place that is not there is left out.
    """
    pages, page_size = k_cache.shape[:2]
    entry = positions.long() // page_size
    there = (entry >= 0) & (entry < block_table.shape[1])
    b, s = there.nonzero(as_tuple=True)
    page = block_table.long()[b, entry[b, s]]
    there = (page >= 0) & (page < pages)
    b, s, page = b[there], s[there], page[there]
    slot = positions.long()[b, s] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        rows = x[b, s]
        if scale is not None:
            rows = (_wide(rows) / scale[:, None]).round().clamp(-127, 127)
        cache[page, slot] = rows.to(cache.dtype)


# ---- paged_attention -----------------------------------------------------------------------------
def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`attention_forward` of each sequence on its pages: q (B, S, H, D) -> out (B, S, H, Dv),
    lse (B, H, S).
    """
    pages, page_size = k_cache.shape[:2]
    outs = [q.new_zeros(0, *q.shape[1:3], v_cache.shape[3])]
    lses = [_wide(q[:0, :, :, 0]).mT]

    def gather(cache: Tensor, table: Tensor, keys: int, scales: Tensor | None) -> Tensor:
        rows = cache[table].flatten(0, 1)[:keys].transpose(0, 1)[None].to(_wide(q[:0]).dtype)
        return rows if scales is None else rows * scales.to(rows.dtype)[:, None, None]

    for b, keys in enumerate(seq_lens.tolist()):
        if not 0 <= keys <= block_table.shape[1] * page_size:
            raise InputError(
                f"seq_lens: wanted 0 to {block_table.shape[1] * page_size}"
                f" (pages a sequence x page size), got {keys} for sequence {b}"
            )
        table = block_table[b, : (keys + page_size - 1) // page_size].long()
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < pages:
            raise InputError(
                f"block_table: wanted pages 0 to {pages - 1},"
                f" got {int(table.min())} to {int(table.max())} for sequence {b}"
            )
        o, one_lse = attention_forward(
            _wide(q[b : b + 1].transpose(1, 2)),
            gather(k_cache, table, keys, k_scale),
            gather(v_cache, table, keys, v_scale),
            sinks,
            alibi_slopes,
            _bias_of(bias, b, q.shape[1], keys),
            None,
            causal,
            scale,
            window,
            softcap,
            0.0,
        )
        outs.append(o.transpose(1, 2).to(q.dtype))
        lses.append(one_lse)
    return torch.cat(outs), torch.cat(lses)


# ---- quantized_linear ----------------------------------------------------------------------------
def unpack_rows(qdata: Tensor, bits: int, k: int) -> Tensor:
    """q as int8 (N, K)."""
    if bits == 8:
        return qdata
    nibbles = torch.stack((qdata & 15, qdata >> 4), -1).flatten(-2)
    return nibbles[..., :k].to(torch.int8) - 8


def dequantize_rows(
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(..., K) of the rows given; works on any selection of rows, as an embedding look-up makes."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q = unpack_rows(qdata, bits, k).to(wide)

    def expand(t: Tensor) -> Tensor:
        return (
            t.to(wide).repeat_interleave(group_size, -1)[..., :k] if t.shape[-1] > 1 else t.to(wide)
        )

    w = q * expand(scales)
    return (w if zeros is None else w + expand(zeros)).to(dtype)


RUN_MAX = 512  # columns that int8 activations share a scale over, at most


def round_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """int8 activations: q = round(x * (127 / absmax)) and scale = absmax / 127 per run of a row,
    (N, K) -> q, scale, both (N, K). A run is a group of the weight's columns, cut at 512.
    """
    wide = _wide(x)
    q, scale = torch.empty_like(wide), torch.empty_like(wide)
    for begin in range(0, x.shape[-1], group_size):
        group = slice(begin, begin + group_size)
        parts = zip(*(t[..., group].split(RUN_MAX, -1) for t in (wide, q, scale)))
        for values, rounded, scales in parts:
            # an all-zero run divides by 1e-30, which keeps 127 / absmax finite
            absmax = values.abs().amax(-1, keepdim=True).clamp_min(1e-30)
            # not 127.0 / absmax: torch makes that a reciprocal and a product, which rounds twice
            inverse = torch.full_like(absmax, 127.0) / absmax
            rounded.copy_((values * inverse).round())
            scales.copy_(absmax / 127.0)
    return q, scale


def quantized_linear_forward(
    x: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    act_bits: int,
) -> Tensor:
    """y = x . W^T + bias; with act_bits 8 x is rounded to int8 before (`round_rows`)."""
    wide = _wide(x)
    if act_bits == 8:  # its derivative is that of x: wide - wide.detach() is 0
        q, scale = round_rows(x.detach(), group_size)
        wide = q * scale + (wide - wide.detach())
    w = dequantize_rows(qdata, scales, zeros, bits, group_size, x.shape[-1], wide.dtype)
    y = wide @ w.t()
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def quantized_linear_backward(
    dy: Tensor,
    qdata: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    k: int,
) -> Tensor:
    """dx = dy . W."""
    wide = _wide(dy)
    w = dequantize_rows(qdata, scales, zeros, bits, group_size, k, wide.dtype)
    return (wide @ w).to(dy.dtype)
