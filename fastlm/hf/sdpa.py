"""fastlm's attention behind ``F.scaled_dot_product_attention`` on a CPU, through torch's own hook::

    fastlm.register_sdpa()                                   # adds "fastlm" to torch's list
    torch.nn.attention.activate_flash_attention_impl("fastlm")
    torch.nn.attention.restore_flash_attention_impl()        # restores torch's own

That hook (torch >= 2.11) calls a function that registers kernels with the dispatcher; torch's own
are for CUDA. Here it replaces the operators of the flash path on CPU tensors,
``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward, so a model that calls the
function runs on fastlm's kernels unchanged. Torch computes the other calls itself: dropout, masks
that need a gradient, values of another width than the keys, other devices.

torch aligns ``is_causal`` at the top left, fastlm at the bottom right. Where lengths differ, the
keys after the last query are left out, or the queries after the last key see all keys.
"""

import warnings
from collections.abc import Iterator

import torch
import torch.nn.attention
from torch import Tensor

from fastlm.errors import InputError
from fastlm.ops.attention import _backward, _bias_4d, _forward
from fastlm.reference import AttentionOptions

NAME = "fastlm"
_OPERATOR = "_scaled_dot_product_flash_attention_for_cpu"


def register_sdpa() -> None:
    """Add "fastlm" to the list of `torch.nn.attention.list_flash_attention_impls`. Nothing changes
    before `torch.nn.attention.activate_flash_attention_impl("fastlm")`.

    Raises:
        InputError: torch has no such list.
    """
    register = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if register is None:
        raise InputError(
            "torch: expected one with torch.nn.attention.register_flash_attention_impl,"
            f" got {torch.__version__}"
        )
    register(NAME, register_fn=_SdpaOverride)


class _SdpaOverride:
    """The replaced operators. Torch keeps this object until another implementation is activated."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
            self.library.impl(_OPERATOR, _sdpa_forward, "CPU")
            self.library.impl(f"{_OPERATOR}_backward", _sdpa_backward, "CPU")

    def remove(self) -> None:
        self.library = None


def _parts(q: Tensor, k: Tensor, causal: bool) -> tuple[int, Iterator[tuple[slice, bool]]]:
    """Return the number of keys in use, and the rows of each call with whether it is causal."""
    rows, keys = q.shape[2], k.shape[2]
    if not causal or rows <= keys:
        return rows if causal else keys, iter([(slice(0, rows), causal)])
    return keys, iter([(slice(0, keys), True), (slice(keys, rows), False)])


def _bias(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else _bias_4d(q, mask, (*q.shape[:3], k.shape[2]))


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[3] ** -0.5 if scale is None else scale


def _empty_as_torch(t: Tensor) -> Tensor:
    """Return an empty tensor of t's shape, stored as (B, S, H, D): torch's own gradients and traces
    have that layout."""
    return torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype)


def _as_torch(t: Tensor) -> Tensor:
    _, heads, rows, width = t.shape
    if t.stride() == (rows * heads * width, width, heads * width, 1):
        return t
    return _empty_as_torch(t).copy_(t)


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    keys, parts = _parts(query, key, is_causal)
    bias, scale = _bias(query, key, attn_mask), _scale(query, scale)
    k, v = key[:, :, :keys], value[:, :, :keys]
    results = [
        _forward(
            query[:, :, rows],
            k,
            v,
            None,
            None,
            bias,
            None,
            AttentionOptions(causal, scale, dropout_p=dropout_p),
        )
        for rows, causal in parts
    ]
    out, lse = results[0] if len(results) == 1 else (torch.cat(t, 2) for t in zip(*results))
    # in the memory order of torch's own kernels and tracing
    out = torch.empty_like(query).copy_(out) if out.stride() != query.stride() else out
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, parts = _parts(query, key, is_causal)
    bias, scale = _bias(query, key, attn_mask), _scale(query, scale)
    lse = logsumexp.contiguous()
    if keys == key.shape[2] and (not is_causal or query.shape[2] <= keys):  # all in one part
        gradients = _backward(
            grad_out, None, query, key, value, out, lse, None, None, bias, None,
            AttentionOptions(is_causal, scale, dropout_p=dropout_p), False,
        )[:3]  # fmt: skip
        dq, dk, dv = (_as_torch(t) for t in gradients)
        return dq, dk, dv
    dq, dk, dv = (_empty_as_torch(t) for t in (query, key, value))
    for t in (dk, dv):
        t[:, :, keys:] = 0
    for i, (rows, causal) in enumerate(parts):
        grad_q, *keys_and_values = _backward(
            grad_out[:, :, rows], None, query[:, :, rows], key[:, :, :keys], value[:, :, :keys],
            out[:, :, rows], lse[:, :, rows].contiguous(), None, None, bias, None,
            AttentionOptions(causal, scale, dropout_p=dropout_p), False,
        )[:3]  # fmt: skip
        dq[:, :, rows] = grad_q
        for t, part in zip((dk, dv), keys_and_values):
            t[:, :, :keys] = part if i == 0 else t[:, :, :keys] + part
    return dq, dk, dv
