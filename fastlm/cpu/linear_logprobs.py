"""linear_logprobs by the kernels of linear_cross_entropy.

Ignored rows are left out in both directions: in training on samples they are the prompts and the
padding.
"""

from fastlm.cpu import linear_cross_entropy
from fastlm.cpu.cross_entropy import check_target
from fastlm.cpu.linear_cross_entropy import CpuLogitChunks


def _options(ignore_index, softcap, temperature):
    """Return the options of linear_cross_entropy, which scales before it caps."""
    return ignore_index, None if softcap is None else softcap / temperature, 1 / temperature


def linear_logprobs_forward(
    input,
    linear_weight,
    linear_bias,
    target,
    with_entropy,
    ignore_index,
    softcap,
    temperature,
):
    valid = target != ignore_index
    if not valid.all():
        check_target(target, len(linear_weight), ignore_index)  # here the error can name the row
        rows = valid.nonzero()[:, 0]
        logprob, entropy, *stats = linear_logprobs_forward(
            input[rows],
            linear_weight,
            linear_bias,
            target[rows],
            with_entropy,
            ignore_index,
            softcap,
            temperature,
        )

        def scatter(t):
            return t.new_zeros(len(target)).index_copy_(0, rows, t)

        entropy = scatter(entropy) if with_entropy else entropy
        return scatter(logprob), entropy, *(scatter(t) for t in stats)
    options = _options(ignore_index, softcap, temperature)
    chunks = CpuLogitChunks(input, linear_weight, linear_bias, target, None, False, *options)
    entropy = chunks.nll.new_empty(len(input) if with_entropy else 0)
    chunks.entropy = entropy if with_entropy else None
    chunks.statistics()
    return chunks.nll.neg_(), entropy, chunks.shift, chunks.log_sum


def linear_logprobs_backward(
    d_logprob,
    d_entropy,
    input,
    linear_weight,
    linear_bias,
    target,
    entropy,
    shift,
    log_sum,
    ignore_index,
    softcap,
    temperature,
    need_input,
    need_weight,
):
    on_p = -d_logprob
    return linear_cross_entropy.linear_cross_entropy_backward(
        on_p,
        on_p,
        None,
        input,
        linear_weight,
        linear_bias,
        target,
        None,
        shift,
        log_sum,
        *_options(ignore_index, softcap, temperature),
        need_input,
        need_weight,
        d_entropy,
        None if d_entropy is None else entropy,
    )
