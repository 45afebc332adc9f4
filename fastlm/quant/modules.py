"""Counterparts of nn.Linear and nn.Embedding that hold a `QuantizedWeight` in buffers."""

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.errors import InputError
from fastlm.ops.quantized_weight import QuantizedWeight


def check_act_bits(act_bits: int) -> int:
    if act_bits not in (8, 16):
        raise InputError(f"act_bits: wanted 8 or 16, got {act_bits!r}")
    return act_bits


class _Quantized(nn.Module):
    """Buffers `qdata`, `scales`, `zeros`; ``state_dict`` names are ``<name>.qdata`` and so on.

    ``.to(dtype)`` and ``.half()`` do not change the buffers' dtypes: scales are part of the format,
    not activations.
    """

    qdata: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.register_buffer("qdata", weight.qdata)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.bits, self.group_size, self.shape = weight.bits, weight.group_size, weight.shape

    @property
    def weight(self) -> QuantizedWeight:
        """The buffers as one weight; no copy."""
        return QuantizedWeight(
            self.qdata, self.scales, self.zeros, self.bits, self.group_size, self.shape
        )

    def _apply(self, fn, recurse=True):
        dtypes = {n: b.dtype for n, b in self.named_buffers(recurse=False)}
        kept = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != dtypes[name]:
                setattr(self, name, kept[name].to(buffer.device))
        return self


class QuantizedLinear(_Quantized):
    """``F.linear(x, weight.dequantize(x.dtype), bias)`` through `fastlm.ops.quantized_linear`.

    x (..., in_features) -> (..., out_features). `act_bits` 8 rounds x to int8 as well.

    The weight is frozen; `bias` stays a parameter and gradients reach x, so adapters around it can
    be trained.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, *, act_bits: int = 16
    ) -> None:
        super().__init__(weight)
        self.out_features, self.in_features = weight.shape
        self.act_bits = check_act_bits(act_bits)
        self.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantized_linear(x, self.weight, self.bias, act_bits=self.act_bits)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" bias={self.bias is not None}, w{self.bits}a{self.act_bits},"
            f" group_size={self.group_size}"
        )


class QuantizedEmbedding(_Quantized):
    """``F.embedding(ids, weight.dequantize(dtype))``: only the rows looked up are dequantized, into
    `dtype`.

    `padding_idx` changes no value: it only stops a gradient, and the weight has none. A head tied
    to the embedding is a `QuantizedLinear` on the same `QuantizedWeight`: the buffers are shared.
    `act_bits` is for a head that has no module of its own.
    """

    def __init__(
        self,
        weight: QuantizedWeight,
        *,
        dtype: torch.dtype = torch.float32,
        act_bits: int = 16,
    ) -> None:
        super().__init__(weight)
        self.act_bits = check_act_bits(act_bits)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        def rows(t: Tensor) -> Tensor:
            return t[ids.reshape(-1)]

        out = torch.ops.fastlm.dequantize(
            rows(self.qdata),
            rows(self.scales),
            None if self.zeros is None else rows(self.zeros),
            self.bits,
            self.group_size,
            self.embedding_dim,
            self.dtype,
        )
        return out.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn, recurse=True):
        # .bfloat16() and the like set the dtype of the rows looked up, as they do for nn.Embedding
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, int{self.bits},"
            f" group_size={self.group_size}"
        )
