"""A KV cache of sequences of equal length, each in a page of its own. `fastlm.model.cpu_decode` and
`fastlm.model.cuda_decode` read pages of any size.
"""

import torch


class RowCache:
    """A cache for `CausalLM.chunk_hidden`, with ``new`` tokens of each row. ``data`` is (layers, 2,
    rows, Hkv, capacity, D), and `length` of its columns are filled.
    """

    def __init__(self, model, rows, capacity, dtype=None):
        config = model.config
        shape = (2, rows, config.num_key_value_heads, capacity, config.head_dim)
        self.data = torch.empty(
            config.num_hidden_layers, *shape, dtype=dtype or model.dtype, device=model.device
        )
        self.length = 0

    def prepare(self, new):
        rows, device = self.data.shape[2], self.data.device
        self.max_length = self.length + new
        self.positions = torch.arange(self.length, self.max_length, device=device).repeat(rows)
        ends = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.cu_seqlens, self.cu_seqlens_k = ends * new, ends * self.max_length

    def append(self, layer, k, v):
        rows = self.data.shape[2]
        for part, new in zip(self.data[layer], (k, v), strict=True):
            keys_or_values = new[0].unflatten(1, (rows, -1)).transpose(0, 1)  # (rows, Hkv, new, D)
            part[..., self.length : self.max_length, :] = keys_or_values
        return self.keys_and_values(layer, k.dtype)

    def keys_and_values(self, layer, dtype):
        filled = self.data[layer, ..., : self.max_length, :].transpose(2, 3)
        return tuple(part.flatten(0, 1).to(dtype) for part in filled)


@torch.inference_mode()
def next_logits(model, ids, cache):
    """Run new tokens (B, S) through the modules, after the tokens in the cache -> (B, V)."""
    cache.prepare(ids.shape[1])
    hidden = model.chunk_hidden(ids.flatten(), cache)
    cache.length = cache.max_length
    return model.logits(hidden)


class RowDecodeSteps:
    """Decode steps of rows with a page each. The first ``length`` columns of a page are filled."""

    def __init__(self, steps, length):
        self.steps, self.length = steps, length

    def logits(self, tokens):
        rows = len(tokens)
        table = torch.arange(rows, dtype=torch.int32)[:, None]
        out = self.steps.logits(tokens.cpu(), torch.full((rows,), self.length), table)
        self.length += 1
        return out
