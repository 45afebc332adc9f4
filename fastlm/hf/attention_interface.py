"""fastlm's attention in transformers' registry, under the name ``fastlm``, with its mask function.

Importing this module registers both; ``attn_implementation="fastlm"`` then works for every model
that calls its attention through the registry, patched or not.

A mask has the smallest form that can express it:

- None: causal, or causal within the window that the layer passes;
- (n + 1,) int32: the same inside packed sequences; these are their offsets in the concatenated rows
  of the batch (position_ids that restart);
- (B, T) bool: the same over the keys that are not padding;
- (B, 1, S, T): the full mask, nothing is implied. It expresses what the others cannot: a static
  cache, blocks, chunks, the caller's own mask. Under torch.compile, in a CUDA graph's capture and
  on tensors without values (meta, fake) it also expresses packing and padding, which cannot be
  inspected there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastlm.errors import InputError
from fastlm.ops import attention, varlen_attention

NAME = "fastlm"
# arguments that select keys, or add to the scores, in ways that no kernel here supports
UNSUPPORTED = ("position_bias", "sinks", "indices", "block_indices")


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention, as the registry's function: query (B, H, S, D), key and value
    (B, Hkv, T, D) -> (B, S, H, D).

    Raises InputError: output_attentions, or one of `UNSUPPORTED`.
    """
    if kwargs.get("output_attentions"):
        raise InputError(
            "output_attentions: expected False: fastlm does not store attention weights"
        )
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise InputError(f"{name}: expected None with attn_implementation='fastlm'")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options: dict[str, Any] = {
        "scale": scaling, "softcap": softcap, "sinks": s_aux, "dropout_p": dropout,
    }  # fmt: skip
    if attention_mask is not None and attention_mask.dim() == 4:
        options["bias"] = attention_mask[..., : key.shape[2]]
        out: Any = attention(query, key, value, **options)
        return out.transpose(1, 2), None
    # some models set is_causal = False because they have a mask; our masks are causal
    causal = is_causal or attention_mask is not None
    options |= {"causal": causal, "window": sliding_window if causal else None}
    offsets = attention_mask
    if offsets is None and query.shape[0] == 1 and query.shape[2] == key.shape[2]:
        offsets = cu_seq_lens_q  # from transformers' collator for packed batches
    if offsets is not None and offsets.dim() == 1:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        out = varlen_attention(q, k, v, offsets, **options)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    if attention_mask is not None:
        options["bias"] = attention_mask[:, None, None]
    out = attention(query, key, value, **options)
    return out.transpose(1, 2), None


def attention_mask(
    batch_size: int,
    kv_length: int,
    q_length: int = 0,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool | None = None,
    config: Any = None,
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask of one forward for all layers of a kind. Arguments are the registry's,
    including those of transformers 4 (`cache_position` in place of `q_length` and `q_offset`)."""
    device = kwargs.get("device") if attention_mask is None else attention_mask.device
    recording = (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or (device is not None and torch.device(device).type == "meta")
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )
    if cache_position is None:
        position = {"q_length": q_length, "q_offset": q_offset}
    else:
        position = {"cache_position": cache_position}
        q_length = len(cache_position)
        q_offset = None if recording else int(cache_position[0])
    window = getattr(config, "sliding_window", None)
    aligned = (  # the last query at the last key, as the kernels align them
        not use_vmap and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    )
    implied = mask_function is causal_mask_function or (
        # chunks set local_size too
        local_size is not None and local_size == window
        and getattr(config, "attention_chunk_size", None) is None
    )  # fmt: skip
    if aligned and implied and allow_is_causal_skip:
        if attention_mask is None:
            return None
        end = kv_offset + kv_length
        missing = max(end - attention_mask.shape[1], 0)
        visible = F.pad(attention_mask, (0, missing))[:, kv_offset:end]
        return visible if recording or not visible.all() else None
    if (
        # use_vmap is False: the function contains only windows, packing and blocks
        aligned and use_vmap is False and q_length == kv_length > 1 and attention_mask is None
        and (local_size is None or (local_size == window and local_size > 1)) and not recording
    ):  # fmt: skip
        offsets = _packed(mask_function, batch_size, q_length, kwargs.get("device"))
        if offsets is not None:
            return offsets
    kwargs["allow_is_bidirectional_skip"] = False  # None would be read as causal
    if use_vmap is not None:
        kwargs["use_vmap"] = use_vmap
    return sdpa_mask(
        batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, local_size=local_size,
        mask_function=mask_function, attention_mask=attention_mask, allow_is_causal_skip=False,
        **position, **kwargs,
    )  # fmt: skip


def _packed(mask_function: Callable, batch: int, length: int, device: Any) -> Tensor | None:
    """Return the offsets of the sequences packed into the rows, or None for another kind of mask.

    The mask function tells whether neighbours see each other. A token that does not see the one
    before it begins a sequence; a token that sees the next one is in a non-causal block.
    """
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros_like(row)
    token = torch.arange(length, device=device)[None]
    sees_previous = mask_function(row, head, token[:, 1:], token[:, :-1])
    sees_next = mask_function(row, head, token[:, :-1], token[:, 1:])
    if sees_previous.all() or sees_next.any():
        return None
    begins = torch.ones(batch, length, dtype=torch.bool, device=device)
    begins[:, 1:] = ~sees_previous
    starts = begins.flatten().nonzero()[:, 0]
    return torch.cat((starts, starts.new_tensor([batch * length]))).int()


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)
