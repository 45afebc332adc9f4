"""The layers of a decoder on `fastlm.ops`. Each class serves every family in
`fastlm.checkpoint.config.FAMILIES`; module names are Hugging Face's.

Rejected: a class per architecture (nine near copies), and names of our own with a table of renames.

Shapes: B batch, S tokens of this call, T keys (cached ones included), E hidden_size, H / Hkv heads,
D head_dim, R rotated features.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm.backend import has_kernel, multiplies_bf16
from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.memory import recompute
from fastlm.model.quantized_modules import QuantizedLinear
from fastlm.model.rotary import RotaryTables
from fastlm.operator import autocast, is_any_autocast_on
from fastlm.ops import attention, glu, quantized_linear, rms_norm, rope, varlen_attention
from fastlm.ops.glu import glu_round
from fastlm.ops.linear import Linear
from fastlm.ops.quantized_linear import Int8Rows, rounded_linear
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.ops.rms_norm import rms_norm_round
from fastlm.transforms import is_eager, is_traced

# module names of the norms (before attention, after it, before the MLP, after it)
_NORMS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}

# From this many tokens per call on, attention with a 16-bit cache runs in bfloat16: it takes 0.6 of
# float32's time at 512 tokens, without the casts. The length below which the casts cost more was
# not measured.
_MIN_BF16_TOKENS = 64


class PackedKVCache(Protocol):
    """Keys and values of packed sequences whose first tokens are cached
    (`fastlm.inference.block_manager.PrefillKVCache`)."""

    data: Tensor
    cu_seqlens_k: Tensor  # (B + 1,) int32: offsets of the keys of each sequence

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, Hkv, S, D). Return all keys and values, (cu_seqlens_k[-1], Hkv, D)."""
        ...


class DecodeAttention(Protocol):
    """Attention of a decode step: one token per row, at positions that only the device holds
    (`fastlm.model.module_decode.PagedDecodeAttention`)."""

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Rotate q (B, 1, H, D) and k (B, 1, Hkv, D), append k and v to the layer's cache, and
        return the attention of q over it.
        """
        ...


@dataclass
class ForwardContext:
    """The inputs of one forward call that all layers share."""

    cu_seqlens: Tensor | None
    cache: PackedKVCache | None  # with cu_seqlens
    visible: Tensor | None  # (B, 1, 1, T) bool: the columns that hold a token
    # per layer: cos, sin, (S, R) or (B, S, R), or None for a layer without positions
    rotary: list[tuple[Tensor, Tensor] | None]
    fused: bool = False  # layers may use the projections that `Decoder.fuse` joined
    decode_attention: DecodeAttention | None = None  # instead of a cache
    keys: tuple[Tensor, Tensor] | None = None  # with cu_seqlens, see `CausalLM.hidden`

    def uses_bf16_attention(self, x: Tensor) -> bool:
        """Return whether keys and values of x go into a cache of 16 bits or fewer (the model rounds
        its activations to 8 bits, see `fastlm.model.cpu_decode`) and this machine computes
        attention faster in bfloat16."""
        narrow = (torch.float16, torch.bfloat16, torch.int8)
        return (
            self.cache is not None
            and self.cache.data.dtype in narrow
            and x.dtype == torch.float32
            and x.is_cpu
            and multiplies_bf16()
        )


@dataclass
class FusedProjection:
    """Quantized projections of the same input as one product: a decode step makes fewer calls (7 %
    of SmolLM2's CPU time, measured). Their buffers are rows of `weight`, so nothing is stored
    twice. A single projection gains, too: its weight is assembled and checked once, not in every
    step.

    Unquantized projections stay separate. Joining them saved 9 % (measured), but it would move the
    memory of a Parameter whose address an optimizer may have stored.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    act_bits: int

    def __call__(self, x: Tensor | Int8Rows) -> Tensor:
        if isinstance(x, Tensor):
            return quantized_linear(x, self.weight, self.bias, act_bits=self.act_bits)
        w, k = self.weight, x.shape[-1]
        y = rounded_linear(
            *x[:3], w.qdata, w.scales, w.zeros, self.bias, w.bits, w.group_size, k, x.dtype
        )
        return y.view(*x.shape[:-1], -1)

    def can_round_input(self, op: str, x: Tensor) -> bool:
        """Return whether `op`, which computes the input of this product from x, can round that
        input to int8."""
        return self.act_bits == 8 and x.numel() > 0 and has_kernel(op, x)


def fuse(
    modules: Sequence[nn.Module | None], previous: FusedProjection | None
) -> FusedProjection | None:
    """Fuse the modules. The weight of `previous` is reused while it holds their buffers. Return
    None unless all are quantized in the same way."""
    linears = [m for m in modules if isinstance(m, QuantizedLinear)]
    formats = {
        (
            *(m.bits, m.group_size, m.act_bits, m.scales.dtype),
            *(None if m.zeros is None else m.zeros.dtype, m.bias is None),
        )
        for m in linears
    }
    if len(linears) < len(modules) or len(formats) != 1:
        return None
    biases = [m.bias.detach() for m in linears if m.bias is not None]
    bias = torch.cat(biases) if biases else None
    if previous is not None and all(_storage(m) == _storage(previous.weight) for m in linears):
        return FusedProjection(previous.weight, bias, previous.act_bits)
    first = linears[0]
    if len(linears) == 1:
        return FusedProjection(first.weight, bias, first.act_bits)
    joined: dict[str, Any] = {}
    rows = [m.out_features for m in linears]
    for name in ("qdata", "scales", "zeros"):
        if getattr(first, name) is not None:
            joined[name] = tensor = torch.cat([getattr(m, name) for m in linears])
            for m, part in zip(linears, tensor.split(rows)):
                setattr(m, name, part)
    weight = replace(first.weight, **joined, shape=(sum(rows), first.in_features))
    return FusedProjection(weight, bias, first.act_bits)


def _storage(weight: QuantizedLinear | QuantizedWeight) -> list[int]:
    """Return the start addresses of the buffers' memory: rows of one matrix have the same ones."""
    parts = (weight.qdata, weight.scales, weight.zeros)
    return [t.untyped_storage().data_ptr() for t in parts if t is not None]


class RMSNorm(nn.Module):
    """`fastlm.ops.rms_norm` with its weight; Gemma's is stored minus one (`offset`)."""

    def __init__(self, width: int, config: ModelConfig):
        super().__init__()
        self.eps, self.offset = config.rms_norm_eps, config.family.norm_offset
        self.weight = nn.Parameter(torch.full((width,), 1.0 - self.offset))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return rms_norm(x, self.weight, self.eps, residual=residual, offset=self.offset)

    def recompute(self, x: Tensor, summed: Tensor) -> AbstractContextManager:
        """Return a context in which the backward recomputes `x`, the norm of `summed` in x's dtype,
        instead of keeping it.
        """
        if not _saves_for_backward(x):
            return nullcontext()
        summed, weight, dtype = summed.detach(), self.weight.detach(), x.dtype

        def normalize() -> Tensor:  # does not refer to x, which it would keep alive
            y: Any = rms_norm(summed, weight, self.eps, offset=self.offset)
            return y.to(dtype)

        return recompute(x, normalize)


def _saves_for_backward(x: Tensor) -> bool:
    """Return whether operations on x would now save it for a backward, and Python may decide
    how."""
    return x.requires_grad and torch.is_grad_enabled() and is_eager(x)


class Attention(nn.Module):
    """Projects queries, keys and values, rotates them, attends, and projects the result."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family, heads = config.family, config.num_attention_heads
        self.layer, self.head_dim = layer, config.head_dim
        self.scale, self.window = config.scale, config.window(layer)
        self.softcap, self.dropout = config.attn_logit_softcapping, config.attention_dropout
        self.q_width = heads * self.head_dim
        self.kv_width = config.num_key_value_heads * self.head_dim
        width, bias = config.hidden_size, config.attention_bias
        if family.fused_projections:
            self.qkv_proj = Linear(width, self.q_width + 2 * self.kv_width, bias=bias)
        else:
            self.q_proj = Linear(width, self.q_width, bias=bias or family.qkv_bias)
            self.k_proj = Linear(width, self.kv_width, bias=bias or family.qkv_bias)
            self.v_proj = Linear(width, self.kv_width, bias=bias or family.qkv_bias)
        self.o_proj = Linear(self.q_width, width, bias=bias)
        self.fused: FusedProjection | None = None
        self.fused_output: FusedProjection | None = None
        self.qk_norm = family.qk_norm
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(self.head_dim if per_head else self.q_width, config)
            self.k_norm = RMSNorm(self.head_dim if per_head else self.kv_width, config)

    def fuse(self) -> None:
        names = ("qkv_proj",) if "qkv_proj" in self._modules else ("q_proj", "k_proj", "v_proj")
        self.fused = fuse([self._modules[n] for n in names], self.fused)
        self.fused_output = fuse([self.o_proj], self.fused_output)

    def project(self, x: Any, fused: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Project (B, S, E) to q (B, S, H * D), k and v (B, S, Hkv * D)."""
        joined = self.fused if fused else None
        if joined is not None or "qkv_proj" in self._modules:
            qkv = self.qkv_proj(x) if joined is None else joined(x)
            q, k, v = qkv.split_with_sizes((self.q_width, self.kv_width, self.kv_width), -1)
            return q, k, v
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x: Any, context: ForwardContext) -> Tensor:
        """Return (B, S, E). x: (B, S, E), or in a decode step its `Int8Rows`."""
        batch, length, _ = x.shape
        q, k, v = self.project(x, context.fused)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        heads = (batch, length, -1, self.head_dim)
        q, k, v = q.view(heads), k.view(heads), v.view(heads)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        options: dict[str, Any] = {"causal": True, "scale": self.scale}
        options |= {"window": self.window, "softcap": self.softcap}
        project = (context.fused and self.fused_output) or self.o_proj
        if context.decode_attention is not None:
            out = context.decode_attention.attention(self.layer, q, k, v, **options)
            return project(out.reshape(batch, length, self.q_width))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, S, D)
        if (tables := context.rotary[self.layer]) is not None:
            q, k = rope(q, k, *tables, rotary_dim=tables[0].shape[-1])
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
        elif self.training:
            options["dropout_p"] = self.dropout
        if uses_bf16 := length >= _MIN_BF16_TOKENS and context.uses_bf16_attention(x):
            q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
        if context.cu_seqlens is not None:
            q = q.transpose(1, 2).flatten(0, 1)  # (B * S, heads, D)
            cu_seqlens_k = None if context.cache is None else context.cache.cu_seqlens_k
            if context.cache is None:
                k, v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
            if context.keys is not None:
                rows, cu_seqlens_k = context.keys
                k, v = k.index_select(0, rows), v.index_select(0, rows)
            out: Any = varlen_attention(q, k, v, context.cu_seqlens, cu_seqlens_k, **options)
        else:
            out = attention(q, k, v, bias=context.visible, **options)
            out = out.transpose(1, 2)
        if uses_bf16:
            out = out.to(x.dtype)
        return project(out.reshape(batch, length, self.q_width))


class MLP(nn.Module):
    """A gated MLP: ``down_proj(act(gate_proj(x)) * up_proj(x))``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        if config.family.fused_projections:
            self.gate_up_proj = Linear(width, 2 * inner, bias=bias)
        else:
            self.gate_proj = Linear(width, inner, bias=bias)
            self.up_proj = Linear(width, inner, bias=bias)
        self.down_proj = Linear(inner, width, bias=bias)
        self.fused: FusedProjection | None = None
        self.fused_down: FusedProjection | None = None
        self.act = config.act

    def fuse(self) -> None:
        names = ("gate_up_proj",) if "gate_up_proj" in self._modules else ("gate_proj", "up_proj")
        self.fused = fuse([self._modules[n] for n in names], self.fused)
        self.fused_down = fuse([self.down_proj], self.fused_down)

    def project(self, x: Any, fused: bool) -> tuple[Tensor, Tensor]:
        joined = self.fused if fused else None
        if joined is not None or "gate_up_proj" in self._modules:
            gate, up = (self.gate_up_proj(x) if joined is None else joined(x)).chunk(2, -1)
            return gate, up
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: Any, context: ForwardContext) -> Tensor:
        gate, up = self.project(x, context.fused)
        project = (context.fused and self.fused_down) or self.down_proj
        down = self.fused_down
        if (
            context.decode_attention is not None
            and down is not None
            and down.can_round_input("glu_round", gate)
        ):
            w = down.weight
            q, scale, sums = glu_round(gate, up, w.qdata, w.scales, self.act, w.bits, w.group_size)
            return down(Int8Rows(q, scale, sums, gate.shape, gate.dtype))
        product = glu(gate, up, act=self.act)
        if not _saves_for_backward(product):
            return project(product)
        gate, up = gate.detach(), up.detach()
        with recompute(product, lambda: glu(gate, up, act=self.act)):
            return project(product)


class DecoderLayer(nn.Module):
    """Attention and MLP, each with its norms and a residual connection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.norms = _NORMS[config.family.norms]
        for name in self.norms:
            if name:
                self.add_module(name, RMSNorm(config.hidden_size, config))

    def _norm(self, position: int) -> nn.Module | None:
        name = self.norms[position]
        return self._modules[name] if name else None

    def forward(
        self, stream: Tensor, branch: Tensor | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """Run the layer. The residual stream enters and leaves as two summands, because the norm
        that follows adds them.
        """
        attention, mlp = self.self_attn, self.mlp
        projection = None if context.decode_attention is None else attention.fused
        x, stream, recomputation = _add_norm(self._norm(0), stream, branch, projection)
        with recomputation:
            branch = attention(x, context)
        if after := self._norm(1):
            branch = after(branch)
        projection = None if context.decode_attention is None else mlp.fused
        x, stream, recomputation = _add_norm(self._norm(2), stream, branch, projection)
        with recomputation:
            branch = mlp(x, context)
        if after := self._norm(3):
            branch = after(branch)
        assert branch is not None  # the MLP's output
        return stream, branch


def _add_norm(
    norm: nn.Module | None,
    stream: Tensor,
    branch: Tensor | None,
    projection: FusedProjection | None = None,
) -> tuple[Any, Tensor, AbstractContextManager]:
    """Return norm(stream + branch), stream + branch, and the context in which to use the norm's
    output. That output is `Int8Rows` where `projection`, which multiplies it, takes rounded input.
    Under autocast it is cast here once, not by every product that uses it."""
    if norm is None:
        stream = stream if branch is None else stream + branch
        return stream, stream, nullcontext()
    assert isinstance(norm, RMSNorm)
    if projection is not None and projection.can_round_input("rms_norm_round", stream):
        x, residual = (stream, None) if branch is None else (branch, stream)
        w = projection.weight
        q, scale, sums, summed = rms_norm_round(
            x, residual, norm.weight, w.qdata, w.scales, norm.eps, norm.offset, w.bits, w.group_size
        )
        rounded = Int8Rows(q, scale, sums, x.shape, x.dtype)
        return rounded, x if residual is None else summed, nullcontext()
    if branch is None:
        x = norm(stream)
    else:
        x, stream = norm(branch, residual=stream)
    if is_any_autocast_on():
        (x,) = autocast(x)
    return x, stream, norm.recompute(x, stream)


class Decoder(nn.Module):
    """Everything below the head: embedding, layers and last norm. Its parameters begin with
    ``model.``.

    ``checkpoint_activations``: the number of layers, from the first (True: all), that keep only
    their input in training; the backward recomputes the rest. That takes less memory and gives the
    same bits. 16 layers of width 256 on 2048 tokens: 145 instead of 268 MiB above the model, 1.3
    times the time.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.checkpoint_activations: bool | int = False
        # as in transformers: the padding row starts at zero and gets no gradient from the lookup
        padding = config.pad_token_id
        if padding is not None and not 0 <= padding < config.vocab_size:
            padding = None
        vocab, width = config.vocab_size, config.hidden_size
        # torch does not initialise a weight that it gets; on meta, initialising one would import
        # torch._dynamo, which takes seconds
        weight = torch.empty(vocab, width) if torch.empty(0).is_meta else None
        self.embed_tokens = nn.Embedding(vocab, width, padding, _weight=weight)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config)
        ropes = [config.rope(layer) for layer in range(config.num_hidden_layers)]
        tables = {  # one per set of rotary parameters; layers share them
            repr(rope): RotaryTables(rope, config.head_dim, config.max_position_embeddings)
            for rope in ropes
            if rope is not None
        }
        self._rotary = [tables.get(repr(rope)) for rope in ropes]

    @torch.inference_mode(False)
    @torch.no_grad()
    def fuse(self) -> None:
        """Join quantized projections of the same input, for decode steps."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.self_attn.fuse()
            layer.mlp.fuse()

    @property
    def depends_on_length(self) -> bool:
        """Whether rotary frequencies depend on the length of the context."""
        return any(r is not None and r.depends_on_length for r in self._rotary)

    def rotary(
        self, positions: Tensor | int, count: int, max_length: int, device: torch.device
    ) -> list[tuple[Tensor, Tensor] | None]:
        """Return cos and sin of each layer, for contexts of up to ``max_length`` tokens: (S, R) for
        `count` positions from an int on, or (..., R) for a tensor of positions.
        """
        rows: Any = positions
        if isinstance(positions, int):
            rows = slice(positions, positions + count)
            if is_traced():  # beyond the table's end, a slice is cut and an index is refused
                rows = torch.arange(positions, positions + count, device=device)
        values: dict[int, tuple[Tensor, Tensor]] = {}
        for tables in self._rotary:
            if tables is not None and id(tables) not in values:
                cos, sin = tables.tables(max_length, device)
                values[id(tables)] = cos[rows], sin[rows]
        return [values.get(id(tables)) for tables in self._rotary]

    def embedding_scale(self, dtype: torch.dtype) -> float:
        """Return the factor on embeddings, rounded to the model's dtype, as in Gemma's training."""
        if not self.config.family.scaled_embedding:
            return 1.0
        return torch.tensor(self.config.hidden_size**0.5, dtype=dtype, device="cpu").item()

    def forward(self, input_ids: Tensor, context: ForwardContext) -> Tensor:
        stream = self.embed_tokens(input_ids)
        if self.config.family.scaled_embedding:
            stream = stream * self.embedding_scale(stream.dtype)
        branch, num_checkpointed = None, 0
        if self.training and torch.is_grad_enabled():
            option, num_layers = self.checkpoint_activations, len(self.layers)
            num_checkpointed = num_layers if option is True else min(option, num_layers)
        for i, layer in enumerate(self.layers):
            if i < num_checkpointed:
                stream, branch = checkpoint(layer, stream, branch, context, use_reentrant=False)
            else:
                stream, branch = layer(stream, branch, context)
        return _add_norm(self.norm, stream, branch)[0]


def checkpoint_activations(model: nn.Module, layers: bool | int) -> None:
    """Set `Decoder.checkpoint_activations` of every decoder in ``model``. InputError: the model has
    no decoder, or ``layers`` is below 0.
    """
    decoders = [module for module in model.modules() if isinstance(module, Decoder)]
    if not decoders or layers < 0:
        raise InputError(
            "checkpoint_activations: expected a number of layers of a fastlm model,"
            f" got {layers} for {type(model).__name__}"
        )
    for decoder in decoders:
        decoder.checkpoint_activations = layers
