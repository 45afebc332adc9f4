"""linear_logprobs in chunks of rows: the products and kernels of linear_cross_entropy."""

from torch import Tensor

from fastlm.kernels.cross_entropy import row_outputs
from fastlm.kernels.linear_cross_entropy import TritonLogitChunks


def _options(
    ignore_index: int, softcap: float | None, temperature: float
) -> tuple[int, float | None, float]:
    """Return the options of the kernels, which scale before they cap."""
    return ignore_index, None if softcap is None else softcap / temperature, 1 / temperature


def linear_logprobs_forward(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    with_entropy: bool,
    ignore_index: int,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = _options(ignore_index, softcap, temperature)
    chunks = TritonLogitChunks(input, linear_weight, linear_bias, target, None, *options)
    outputs = row_outputs(target, False)
    shift, log_sum, nll, _ = outputs
    entropy = nll.new_empty(target.shape if with_entropy else 0)
    for part, logits in chunks:
        chunks.statistics(part, logits, False, outputs, entropy if with_entropy else None)
    return nll.neg_(), entropy, shift, log_sum


def linear_logprobs_backward(
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
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(ignore_index, softcap, temperature)
    chunks = TritonLogitChunks(input, linear_weight, linear_bias, target, None, *options)
    chunks.outputs(linear_bias, need_input, need_weight)
    on_p = -d_logprob
    for part, logits in chunks:
        of_entropy = (None, None) if d_entropy is None else (d_entropy[part], entropy)
        chunks.gradients(part, logits, on_p[part], on_p[part], None, (shift, log_sum), *of_entropy)
    bias_dtype = input.dtype if linear_bias is None else linear_bias.dtype
    return chunks.d_input, chunks.d_weight.to(input.dtype), chunks.d_bias.to(bias_dtype)
