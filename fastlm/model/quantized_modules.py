"""Modules like nn.Linear and nn.Embedding that hold a `QuantizedWeight` in buffers, and functions
that put them into a model: one by one, or from a saved configuration.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastlm import ops
from fastlm.checkpoint.fastlm_format import PARTS, describe_layer
from fastlm.errors import InputError
from fastlm.ops.linear import Linear
from fastlm.ops.quantized_weight import QuantizedWeight

REPLACEABLE = (nn.Linear, Linear, nn.Embedding)


def check_act_bits(act_bits: int) -> int:
    """Return ``act_bits``. InputError: neither 8 nor 16."""
    if act_bits not in (8, 16):
        raise InputError(f"act_bits: expected 8 or 16, got {act_bits!r}")
    return act_bits


class _Quantized(nn.Module):
    """A module with buffers `qdata`, `scales`, `zeros`; ``state_dict`` has ``<name>.qdata`` etc.

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
        """The buffers as one weight, without a copy."""
        return QuantizedWeight(
            self.qdata, self.scales, self.zeros, self.bits, self.group_size, self.shape
        )

    def _apply(self, fn, recurse=True):
        previous = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.dtype != previous[name].dtype:
                setattr(self, name, previous[name].to(buffer.device))
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
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        format = f"w{self.bits}a{self.act_bits}, group_size={self.group_size}"
        return f"{sizes}, bias={self.bias is not None}, {format}"


class QuantizedEmbedding(_Quantized):
    """``F.embedding(ids, weight.dequantize(dtype))``: it dequantizes only the rows that are looked
    up, to `dtype`.

    `padding_idx` changes no value: it only stops a gradient, and the weight has none. A head tied
    to the embedding is a `QuantizedLinear` on the same `QuantizedWeight`: they share the buffers.
    `act_bits` is for a head without a module of its own.
    """

    def __init__(
        self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32, act_bits: int = 16
    ) -> None:
        super().__init__(weight)
        self.act_bits = check_act_bits(act_bits)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        parts = (self.qdata, self.scales, self.zeros)
        rows = (None if t is None else t[ids.reshape(-1)] for t in parts)
        layout = self.bits, self.group_size, self.embedding_dim, self.dtype
        out = torch.ops.fastlm.dequantize(*rows, *layout)
        return out.view(*ids.shape, self.embedding_dim)

    def _apply(self, fn, recurse=True):
        # .bfloat16() and the like set the dtype of the returned rows, as for nn.Embedding
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        sizes = f"{self.num_embeddings}, {self.embedding_dim}"
        return f"{sizes}, int{self.bits}, group_size={self.group_size}"


def set_quantized_weight(
    model: nn.Module,
    name: str,
    weight: QuantizedWeight,
    *,
    act_bits: int = 16,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Replace the nn.Linear or nn.Embedding `name` by a module with `weight` and the same bias.
    Return the model.

    `dtype`: the dtype of the rows that an embedding returns; default: that of its weight.
    InputError: no such module, another shape.
    """
    old = _module(model, name)
    if old.weight.shape != weight.shape:
        raise InputError(
            f"{name}: expected shape {list(old.weight.shape)} as the model, got "
            f"{list(weight.shape)}"
        )
    if isinstance(old, nn.Linear):
        new: nn.Module = QuantizedLinear(weight, old.bias, act_bits=act_bits)
    elif old.max_norm is None:
        new = QuantizedEmbedding(weight, dtype=dtype or old.weight.dtype, act_bits=act_bits)
    else:
        raise InputError(
            "model: expected embeddings without max_norm, got one, which rescales its rows"
        )
    new.train(old.training)
    if not name:
        return new
    replace_module(model, name, new)
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module ``name`` of a model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _module(model: nn.Module, name: str) -> nn.Linear | nn.Embedding:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"{name}: expected a module of the model, got none") from None
    if type(module) not in REPLACEABLE:
        raise InputError(f"{name}: expected nn.Linear or nn.Embedding, got {type(module).__name__}")
    assert isinstance(module, nn.Linear | nn.Embedding)
    return module


def quantization_config(
    model: nn.Module, format: str, *, group_size: int | None, method: str = "rtn"
) -> dict[str, Any]:
    """Return the entry of config.json about a quantized model. It is enough to read the weights and
    rebuild the modules.
    """
    kinds = {QuantizedLinear: "linear", QuantizedEmbedding: "embedding"}
    modules = {
        name: {**describe_layer(kinds[type(m)], m.weight), "act_bits": m.act_bits}
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, QuantizedLinear | QuantizedEmbedding)
    }
    return {
        "quant_method": "fastlm",
        "format": format,
        "group_size": group_size,
        "method": method,
        "modules": modules,
    }


def load_quantized(
    model: nn.Module, state: Mapping[str, Tensor], config: Mapping[str, Any]
) -> nn.Module:
    """Replace modules by quantized ones as in ``quantization_config``, and load all weights from
    `state`, strictly.

    `state` has ``<name>.qdata``, ``<name>.scales`` and, if asymmetric, ``<name>.zeros`` for
    quantized modules. A tied head may be missing; it then shares the embedding's weight.
    """
    if config.get("quant_method") != "fastlm":
        raise InputError(
            "quantization_config: expected quant_method 'fastlm', got "
            f"{config.get('quant_method')!r}"
        )
    weights = {}
    for name, entry in config["modules"].items():
        if f"{name}.qdata" not in state:
            continue
        for part in ("scales", "zeros") if entry["zeros"] else ("scales",):
            if f"{name}.{part}" not in state:
                raise InputError(f"state: expected {name}.{part}, got none")
        qdata, scales, zeros = (state.get(f"{name}.{part}") for part in PARTS)
        assert qdata is not None and scales is not None
        layout = entry["bits"], entry["group_size"], tuple(entry["shape"])
        weights[name] = QuantizedWeight(qdata, scales, zeros, *layout)
    # tied modules share one parameter
    keys = {name: id(_module(model, name).weight) for name in config["modules"]}
    shared = {keys[name]: weight for name, weight in weights.items()}
    for name, entry in config["modules"].items():
        weight = weights.get(name) or shared.get(keys[name])
        if weight is None:
            raise InputError(f"state: expected {name}.qdata, got none")
        model = set_quantized_weight(model, name, weight, act_bits=entry.get("act_bits", 16))
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    # names whose storage another name of the state has already filled
    filled = {t.data_ptr() for n, t in model.state_dict().items() if n in state}
    missing = [n for n in missing if model.state_dict()[n].data_ptr() not in filled]
    if missing or unexpected:
        raise InputError(
            f"state: expected the model's tensors, got {', '.join(unexpected) or 'nothing'} in"
            f" addition; missing: {', '.join(missing) or 'nothing'}"
        )
    return model
