"""Log-probabilities of target tokens under a linear head, and the entropy of its distribution.

The (N, V) logits are never in memory. Training on samples (DPO, PPO, GRPO) needs these values for
each token. The kernels are those of `linear_cross_entropy`: a log-probability is the nll with the
other sign. For the entropy they also sum e^z (z - base), where base is the row's maximum. The
backward recomputes the logits. That is 4 matrix products with gradients of input and weight. The 3
products of a mean cross-entropy need each row's factor in the forward. Here the factor arrives in
the backward, and storing logits or exponentials until then would take (N, V).
"""

import math

import torch
from torch import Tensor

from fastlm import reference
from fastlm.errors import InputError
from fastlm.operator import autocast, declare, is_any_autocast_on
from fastlm.ops.cross_entropy import check, check_options
from fastlm.ops.linear_cross_entropy import check_linear
from fastlm.ops.wrong_type import TYPE_FAILURES, explain


def linear_logprobs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``z = F.linear(input, linear_weight, linear_bias).float()``,
    ``z = softcap * tanh(z / softcap) / temperature``, then ``logp = z.log_softmax(-1)`` and
    ``logp.gather(-1, target[..., None])[..., 0]``, with `return_entropy` also
    ``-(logp.exp() * logp).sum(-1)``.

    Args:
        input: (..., K), float32, bfloat16 or float16 (float64 on the reference).
        linear_weight: (V, K), input's dtype.
        target: (...), int64 or int32.
        linear_bias: (V,), any float dtype. -inf masks a class.
        temperature: > 0, finite; divides the logits, as in sampling.
        softcap: > 0, or None. The logits are capped before they are divided.
        ignore_index: rows with this target are 0 and have no gradient, even where they hold NaN.
        return_entropy: also return the entropy of softmax(z) in nats.

    Returns:
        float32 (...); with `return_entropy` the pair (logprob, entropy).
        Both are differentiable.

    Under ``torch.autocast`` input and linear_weight are cast to its dtype, as by F.linear. Sums are
    float32; the gradient of the logits is rounded to input's dtype for the matrix products that
    follow it. Stored for the backward: the arguments and two or three float32 values per row.
    Memory in addition to the results is that of `linear_cross_entropy`.

    Raises:
        InputError: shapes, dtypes or options that do not fit; on the CPU also a target out of
        range.
    """
    try:
        if is_any_autocast_on():
            input, linear_weight = autocast(input, linear_weight)
        classes = check_linear(input, linear_weight, linear_bias)
        check(input, "input", classes, target, None, 0.0)
        check_options(softcap, "none", None)
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature: expected a finite number > 0, got {temperature}")
        logprob, entropy, _, _ = _forward(
            input.reshape(-1, input.shape[-1]),
            linear_weight,
            linear_bias,
            target.reshape(-1).long(),
            return_entropy,
            ignore_index,
            softcap,
            temperature,
        )
        logprob = logprob.view(target.shape)
        return (logprob, entropy.view(target.shape)) if return_entropy else logprob
    except TYPE_FAILURES as error:
        raise explain(error, linear_logprobs, locals()) from None


def _derivative(
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    entropy: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
    need_input: bool,
    need_linear_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    ignored = target == ignore_index
    return _backward(
        torch.where(ignored, 0.0, d_logprob),
        None if d_entropy is None else torch.where(ignored, 0.0, d_entropy),
        input, linear_weight, linear_bias, target, entropy, shift, log_sum, ignore_index, softcap,
        temperature, need_input, need_linear_weight,
    )  # fmt: skip


def _forward_flops(input, linear_weight, *_, **__):
    return 2 * math.prod(input) * linear_weight[0]


def _backward_flops(d_logprob, d_entropy, input, linear_weight, *options, **_):
    need_input, need_weight = options[-2:]  # and the logits, recomputed
    return (1 + need_input + need_weight) * _forward_flops(input, linear_weight)


_backward = declare(
    reference.linear_logprobs_backward, "cpu triton", dispatch_arg="input", flops=_backward_flops
)
_forward = declare(
    reference.linear_logprobs_forward,
    "cpu triton",
    outputs="logprob entropy? shift log_sum",
    backward=_derivative,
    gradients=("input", "linear_weight", "linear_bias"),
    zeros_like={"d_logprob": "shift"},
    non_differentiable=("shift", "log_sum"),
    flops=_forward_flops,
)
