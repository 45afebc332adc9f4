"""The definition of every op in plain PyTorch: what all others are tested against, never optimised.

The functions have the signatures of the operators (`fastlm.ops`), backward included, so that
`use_backend("reference")` runs a whole model on them. They compute in float32, or in float64 when
given float64, and return the input's dtype.
"""

import math

import torch
from torch import Tensor

from fastlm.errors import InputError


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- rms_norm ------------------------------------------------------------------------------------
def rms_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """h = x + residual, rstd = 1 / sqrt(mean(h^2) + eps), y = h * rstd * (offset + weight).

    x (N, H) -> y (N, H), h (N, H; empty without residual), rstd (N).
    """
    h = x if residual is None else x + residual
    wide = _wide(h)
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = (wide * rstd[:, None] * (offset + _wide(weight))).to(x.dtype)
    return y, (x.new_empty(0) if residual is None else h), rstd


def rms_norm_backward(
    dy: Tensor, dh_above: Tensor | None, h: Tensor, weight: Tensor, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients of h and of the weight; `dh_above` reaches h from the residual stream."""
    g, wide, r = _wide(dy), _wide(h), rstd[:, None]
    gw = g * (offset + _wide(weight))
    dh = r * (gw - wide * r.square() * (gw * wide).mean(-1, keepdim=True))
    if dh_above is not None:
        dh = dh + _wide(dh_above)
    return dh.to(h.dtype), (g * wide * r).sum(0)


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


# ---- cross_entropy -------------------------------------------------------------------------------
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
    check_target(target, logits.shape[1], ignore_index)
    z = _scores(logits, softcap, logit_scale)
    if z.shape[1] == 0:
        raise InputError(f"logits: wanted at least one class, got shape {tuple(logits.shape)}")
    shift = z.amax(1)
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
    """dz[v] = on_p * p[v] - on_target * (v == target) - on_all * class_weight[v], then to logits."""
    z = _scores(logits, softcap, logit_scale)
    dz = on_p[:, None] * (z - shift[:, None] - log_sum[:, None]).exp()
    ignored = target == ignore_index
    dz.scatter_add_(
        1,
        target.masked_fill(ignored, 0)[:, None],
        on_target.masked_fill(ignored, 0).neg()[:, None],
    )
    if on_all is not None:
        dz -= on_all[:, None] * (1.0 if class_weight is None else _wide(class_weight))
    if softcap is not None:
        dz *= 1 - (z / softcap).square()
    return (dz * logit_scale).to(logits.dtype)


def check_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """On the CPU; elsewhere the check would wait for the device."""
    if target.device.type != "cpu":
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise bad_target(target, int(bad.nonzero()[0]), classes, ignore_index)


def bad_target(target: Tensor, row: int, classes: int, ignore_index: int) -> InputError:
    return InputError(
        f"target: wanted 0 <= class < {classes} or ignore_index {ignore_index},"
        f" got {int(target[row])} in row {row}"
    )


def _scores(logits: Tensor, softcap: float | None, logit_scale: float) -> Tensor:
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
    logits = _logits(input, linear_weight, linear_bias)
    return cross_entropy_forward(
        logits, target, class_weight, smooth, ignore_index, softcap, logit_scale
    )


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
    d_logits = cross_entropy_backward(
        on_p,
        on_target,
        on_all,
        _logits(input, linear_weight, linear_bias),
        target,
        class_weight,
        shift,
        log_sum,
        ignore_index,
        softcap,
        logit_scale,
    )
    none = input.new_empty(0)
    return (
        (d_logits @ _wide(linear_weight)).to(input.dtype) if need_input else none,
        (d_logits.t() @ _wide(input)).to(linear_weight.dtype) if need_weight else none,
        none if linear_bias is None else d_logits.sum(0).to(linear_bias.dtype),
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
    """The gradients of linear_cross_entropy_loss times that of its loss, in their tensors' dtypes."""
    return (
        (d_input * d_loss).to(d_input.dtype),
        (d_weight * d_loss).to(weight_dtype),
        (d_bias * d_loss).to(bias_dtype),
    )


def _logits(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    bias = None if linear_bias is None else _wide(linear_bias)
    return torch.nn.functional.linear(_wide(input), _wide(linear_weight), bias)
