"""Arguments of a wrong type result in a one-line error that names them, on every op."""

import numpy as np
import pytest
import torch

from fastlm import InputError, ops

x, w = torch.randn(4, 8), torch.ones(8)
q = torch.randn(1, 2, 3, 8)
table = torch.zeros(3, 8)
packed, cu = torch.randn(5, 2, 8), torch.tensor([0, 2, 5])
cache, pages, lens = torch.zeros(2, 4, 2, 8), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1)
lens = lens.int()
token = torch.randn(1, 1, 2, 8)
weight, target = torch.randn(6, 8), torch.zeros(4, dtype=torch.int64)
layer = torch.nn.Linear(8, 6)
frozen = ops.quantize_weight(weight, 8)

WRONG = {
    "x: expected a tensor, got ndarray": lambda: ops.rms_norm(np.ones((4, 8)), w),
    "weight: expected a tensor or None, got 'ones'": lambda: ops.rms_norm(x, "ones"),
    "eps: expected a number, got None": lambda: ops.rms_norm(x, w, None),
    "eps: expected a number, got '1e-6'": lambda: ops.rms_norm(x, w, "1e-6"),
    "residual: expected a tensor or None, got list": lambda: ops.rms_norm(x, w, residual=[1.0]),
    "weight: expected a tensor, got Linear": lambda: ops.linear(x, layer),
    "x: expected a tensor, got list": lambda: ops.linear([1.0], weight),
    "window: expected an integer or None, got (3, 0)": lambda: ops.attention(
        q, q, q, window=(3, 0)
    ),
    "scale: expected a number or None, got (1,)": lambda: ops.attention(q, q, q, scale=(1,)),
    "causal: expected True or False, got 'yes'": lambda: ops.attention(q, q, q, causal="yes"),
    "k: expected a tensor, got None": lambda: ops.attention(q, None, q),
    "cu_seqlens_q: expected a tensor, got list": lambda: ops.varlen_attention(
        packed, packed, packed, [0, 2, 5]
    ),
    "seq_lens: expected a tensor, got 1": lambda: ops.paged_attention(
        token, cache, cache, pages, 1
    ),
    "block_table: expected a tensor, got list": lambda: ops.paged_append(
        token, token, cache, cache, [[0]], pages
    ),
    "target: expected a tensor, got list": lambda: ops.cross_entropy(x, [0, 1, 2, 3]),
    "softcap: expected a number or None, got '30'": lambda: ops.cross_entropy(
        x, target, softcap="30"
    ),
    "linear_weight: expected a tensor, got Linear": lambda: ops.linear_cross_entropy(
        x, layer, target
    ),
    "temperature: expected a number, got None": lambda: ops.linear_logprobs(
        x, weight, target, temperature=None
    ),
    "cos: expected a tensor, got ndarray": lambda: ops.rope(q, q, table.numpy(), table.numpy()),
    "up: expected a tensor, got None": lambda: ops.glu(x, None),
    "bias: expected a tensor or None, got 0.5": lambda: ops.quantized_linear(x, frozen, 0.5),
    "w: expected a tensor, got Linear": lambda: ops.quantize_weight(layer, 8),
}


# what people who come from torch type
FROM_TORCH = {
    "attn_mask: expected bias (floats, or bool: True where a key is visible), got attn_mask": (
        lambda: ops.attention(q, q, q, attn_mask=None)
    ),
    "is_causal: expected causal (which aligns the last query with the last key), got is_causal": (
        lambda: ops.attention(q, q, q, is_causal=True)
    ),
    "enable_gqa: expected no such argument (always on), got enable_gqa": lambda: ops.attention(
        q, q, q, enable_gqa=True
    ),
    "sink: expected one of causal, scale, window, softcap, sinks, alibi_slopes, bias, dropout_p,"
    " return_lse, got sink": lambda: ops.attention(q, q, q, sink=w),
    "weight: expected a tensor (H,) or None (there is no normalized_shape: the last dimension of x"
    " is normalised), got (8,)": lambda: ops.rms_norm(x, (8,), w),
    "offset: expected 0 without a weight, got 1.0": lambda: ops.rms_norm(x, offset=1.0),
    "w: expected values, got a tensor on the meta device": lambda: ops.quantize_weight(
        weight.to("meta"), 4
    ),
}


@pytest.mark.parametrize("line", WRONG)
def test_one_line_names_it(line):
    with pytest.raises(InputError) as error:
        WRONG[line]()
    assert str(error.value) == line and error.value.__suppress_context__


@pytest.mark.parametrize("line", FROM_TORCH)
def test_the_line_names_what_fastlm_has(line):
    with pytest.raises(InputError) as error:
        FROM_TORCH[line]()
    assert str(error.value) == line


def test_what_serves_as_a_number_still_does():
    for eps in (np.float32(1e-6), 1, torch.tensor(1e-6)):
        ops.rms_norm(x, w, eps)
    for window in (np.int64(2), torch.tensor(2)):
        ops.attention(q, q, q, window=window)


def test_other_errors_stay_as_they_are():
    """These are a wrong number of arguments, and torch's errors for unsupported tensors."""
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'up'"):
        ops.glu(x)
    sparse = torch.eye(8).to_sparse()
    with pytest.raises(Exception) as error:
        ops.rms_norm(sparse, w)
    assert not isinstance(error.value, InputError)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused(dtype):
    for name, call in {
        "x": lambda: ops.rms_norm(x.to(dtype), w),
        "gate": lambda: ops.glu(x.to(dtype), x.to(dtype)),
        "q": lambda: ops.attention(*[q.to(dtype)] * 3),
        "logits": lambda: ops.cross_entropy(x.to(dtype), target),
    }.items():
        expected = rf"{name}: expected float32, bfloat16, float16, float64, got {dtype}"
        with pytest.raises(InputError, match=expected):
            call()
