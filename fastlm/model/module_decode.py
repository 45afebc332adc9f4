"""Decode steps through a model's modules, one token per row, with keys and values in blocks: for
any device and any model.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.backend import has_kernel
from fastlm.model.layers import ForwardContext
from fastlm.ops import paged_append, paged_attention, rope
from fastlm.ops.rope_append import rope_append

if TYPE_CHECKING:
    from fastlm.inference.block_manager import BlockManager
    from fastlm.model.causal_lm import CausalLM


class PagedDecodeAttention:
    """The attention of a decode step; see `fastlm.model.layers.DecodeAttention`.

    keys_and_values: per layer two caches (pages, page_size, Hkv, D).
    table: (B, P) int32, the pages of each row.
    positions: (B, 1) int32, where the new token of each row is written.
    lengths: (B,), positions + 1.
    rotary: per layer the tables of all positions, or None.
    """

    keys_and_values: list[list[Tensor]]
    table: Tensor
    positions: Tensor
    lengths: Tensor
    rotary: list[tuple[Tensor, Tensor] | None]

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Rotate q and k, append k and v to the cache, and return the attention of q over it."""
        keys, values = self.keys_and_values[layer]
        target = keys, values, self.table, self.positions
        tables = self.rotary[layer]
        if tables is not None and has_kernel("rope_append", q):
            q = rope_append(q, k, v, *tables, *target)
        else:
            if tables is not None:
                positions = self.positions.long()
                cos, sin = (t[positions] for t in tables)
                q, k = q.transpose(1, 2), k.transpose(1, 2)
                q, k = rope(q, k, cos, sin, rotary_dim=cos.shape[-1])
                q, k = q.transpose(1, 2), k.transpose(1, 2)
            paged_append(k, v, *target)
        out = paged_attention(q, keys, values, self.table, self.lengths, **options)
        assert isinstance(out, Tensor)  # a pair only with return_lse
        return out


class ModuleDecodeRunner(PagedDecodeAttention):
    """Runs decode steps module by module, where neither a kernel runs a whole step
    (`cpu_decode.unsupported_reason`) nor a graph (`cuda_decode.unsupported_reason`). The bits of a
    row may depend on the number of rows."""

    def __init__(self, model: "CausalLM", block_manager: "BlockManager"):
        self.model, self.block_manager = model, block_manager
        self.keys_and_values = [
            [t.transpose(1, 2) for t in layer] for layer in block_manager.layers
        ]

    @torch.inference_mode()
    def logits(
        self, tokens: Tensor, lengths: Tensor, table: Tensor, *, logits_indices: Tensor
    ) -> Tensor:
        """Return the logits (L, V) of the rows ``logits_indices`` (L,), for (B,) int64 tokens after
        ``lengths`` (B,) cached ones, with keys and values in the pages of ``table`` (B, P)
        int32."""
        model, device = self.model, self.block_manager.data.device
        max_length = max(int(lengths.max()) + 1, self.block_manager.rope_length)
        self.positions = lengths.to(device, torch.int32)[:, None]
        self.lengths, self.table = self.positions[:, 0] + 1, table.to(device)
        self.rotary = model.model.rotary(0, max_length, max_length, device)
        context = ForwardContext(None, None, None, [], fused=True, decode_attention=self)
        hidden = model.model(tokens.to(device)[:, None], context)[:, -1]
        return model.logits(hidden[logits_indices.to(device)])
