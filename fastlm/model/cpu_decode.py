"""Decode steps on the CPU in one call into `fastlm._cpu`: one token per row, or several rows of one
sequence, run through the whole model in one parallel region (csrc/cpu/decode/decode_step.h).

The modules compute the same up to rounding, op by op. Their roughly 300 calls per step, each a
parallel region, take longer than the weights of a small model. Here activations stay float32
between the weights, so 16-bit models are slightly more accurate than through their modules. The
result of a row depends neither on the other rows nor on the number of threads.

`unsupported_reason` decides which models use the modules instead. Rejected: to record the op calls
as a CUDA graph does, which keeps the parallel regions.
"""

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm import backend
from fastlm.machine import available_memory, total_memory
from fastlm.model.lora import LoraLinear
from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear
from fastlm.ops.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

_TILE = 16  # rows of a weight; the kernel reads their scales together

_plans: "weakref.WeakKeyDictionary[CausalLM, CpuDecodePlan]" = weakref.WeakKeyDictionary()


def unsupported_reason(model: "CausalLM") -> str | None:
    """Return why the kernel does not run this model's steps, or None if it does."""
    if model.device.type != "cpu" or torch.compiler.is_compiling():
        return "the kernel runs on the CPU, outside torch.compile"
    if backend.unavailable_reason("cpu"):
        return backend.unavailable_reason("cpu")
    if backend.backend_for("rms_norm", model.model.norm.weight) != "cpu":
        return "another backend is forced, or the kernel does not support the model's dtype"
    layers: Any = model.model.layers
    if [layer.self_attn.layer for layer in layers] != list(range(model.config.num_hidden_layers)):
        return "its layers differ from those of its config"
    return custom_module_reason(model)


def custom_module_reason(model: "CausalLM") -> str | None:
    """Return what the kernel would ignore in this model, such as hooks or modules of another class,
    or None."""
    torch_module = torch.nn.modules.module
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "all modules have hooks"
    for module in _modules(model):
        if type(module) not in _SUPPORTED_MODULES and not type(module).__module__.startswith(
            "fastlm."
        ):
            reason = f"is {type(module).__name__}, which the kernel does not support"
        elif isinstance(module, LoraLinear):
            reason = "has an adapter that is not merged"
        elif module._forward_hooks or module._forward_pre_hooks:
            reason = "has hooks"
        elif "forward" in vars(module):
            reason = "has a forward of its own"
        else:
            continue
        name = next(name for name, other in model.named_modules() if other is module)
        return f"{name} {reason}"
    return None


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model. This takes 0.1 ms for SmolLM2, `Module.modules` 2 ms."""
    modules = [model]
    for module in modules:  # the list grows
        modules += [m for m in module._modules.values() if m is not None]
    return modules


_SUPPORTED_MODULES = (nn.Linear, nn.Embedding, nn.ModuleList)


class CpuDecodePlan:
    """A model in the form that the kernel reads. Weights are read in place; `tensors` keeps alive
    those that the kernel points to, and those whose address is in `fingerprint`."""

    def __init__(self, model: "CausalLM"):
        self.tensors = [t.detach() for t in _tensors(_modules(model))]
        self.copies: list[tuple[Tensor, Tensor, float]] = []  # copy == source.float() + offset
        self.fingerprint = model_fingerprint(model)
        self.packs_weights = can_pack_weights(model)
        config, decoder = model.config, model.model
        embedding = self._linear(decoder.embed_tokens, None, 16, packs=False)
        if config.tie_word_embeddings:
            act_bits = getattr(decoder.embed_tokens, "act_bits", 16)
            head = self._linear(decoder.embed_tokens, None, act_bits)
        else:
            head = self._module(model.lm_head)
        self.cpp = backend.cpu_extension.DecodePlan(
            embedding=embedding,
            head=head,
            norm=self._norm(decoder.norm),
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            act=config.act,
            eps=config.rms_norm_eps,
            scale=config.scale,
            softcap=config.attn_logit_softcapping or 0.0,
            embedding_scale=decoder.embedding_scale(model.dtype),
            logit_softcap=config.final_logit_softcapping or 0.0,
        )
        # In a model that rounds its activations to 8 bits, float16 keys and values do not change
        # the quality, and the cache is half of the memory that a step for 16 users reads
        rounded = [isinstance(m, QuantizedLinear) and m.act_bits == 8 for m in _linears(model)]
        self.cache_dtype = torch.float16 if any(rounded) else model.dtype
        self.multiplies_int8 = all(rounded)
        self.rotary = list({id(t): t for t in decoder._rotary if t is not None}.values())
        indices = {id(t): i for i, t in enumerate(self.rotary)}
        for layer, tables in zip(decoder.layers, decoder._rotary):
            self._add_layer(layer, -1 if tables is None else indices[id(tables)])

    def _add_layer(self, layer: Any, rotary: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        if "qkv_proj" in attention._modules:
            qkv = [self._module(attention.qkv_proj)]
        else:
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            qkv = [self._module(m) for m in projections]
        if "gate_up_proj" in mlp._modules:
            gate, up = (self._module(mlp.gate_up_proj, half) for half in (0, 1))
        else:
            gate, up = self._module(mlp.gate_proj), self._module(mlp.up_proj)
        self.cpp.add_layer(
            norms=[n and self._norm(layer._modules[n]) for n in layer.norms],
            qkv=qkv,
            out=self._module(attention.o_proj),
            gate=gate,
            up=up,
            down=self._module(mlp.down_proj),
            q_norm=self._norm(attention.q_norm) if attention.qk_norm else None,
            k_norm=self._norm(attention.k_norm) if attention.qk_norm else None,
            window=attention.window or 0,
            rotary=rotary,
        )

    def _keep(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is not None:
            self.tensors.append(tensor)
        return tensor

    def _copy(self, source: Tensor, offset: float = 0.0) -> Tensor:
        source = source.detach()
        copy = (source.float() + offset).contiguous()
        self.copies.append((copy, source, offset))
        return copy

    def matches(self, model: "CausalLM") -> bool:
        """Return whether the plan still matches the model. Norms and biases are compared by value,
        since a write to ``p.data`` (of averaged weights, for example) leaves no trace."""
        return self.fingerprint == model_fingerprint(model) and all(
            torch.equal(copy, source.float() + offset) for copy, source, offset in self.copies
        )

    def _norm(self, norm: Any) -> Tensor:
        return self._copy(norm.weight, norm.offset)

    def _module(self, module: Any, half: int | None = None) -> Any:
        act_bits = module.act_bits if isinstance(module, QuantizedLinear) else 16
        bias = None if module.bias is None else self._copy(module.bias)
        return self._linear(module, bias, act_bits, half)

    def _linear(
        self,
        module: Any,
        bias: Tensor | None,
        act_bits: int,
        half: int | None = None,
        packs: bool = True,
    ) -> Any:
        """Return the C++ view of a weight, or of one half of its rows."""
        weight = module.weight
        n, k = weight.shape
        rows = slice(0, n) if half is None else slice(half * n // 2, (half + 1) * n // 2)
        if isinstance(weight, QuantizedWeight):
            data, bits, group_size = weight.qdata, weight.bits, weight.group_size
            zeros = None if weight.zeros is None else weight.zeros[rows]
            table = self._keep(scale_table(weight.scales[rows], zeros, bits))
        else:
            data, table, bits, group_size = weight.detach(), None, 16, 0
        linear = backend.cpu_extension.DecodeLinear(
            weight=self._keep(data[rows].contiguous()),
            table=table,
            bias=None if bias is None else self._keep(bias[rows].contiguous()),
            bits=bits,
            k=k,
            group_size=group_size,
            act_bits=act_bits,
        )
        if bits != 16 and packs and self.packs_weights:
            tiles = torch.empty(linear.tile_bytes, dtype=torch.uint8)
            linear.pack(self._keep(tiles))
        return linear


def _linears(model: "CausalLM") -> list[nn.Module]:
    """Return the linear layers of a model's decoder layers."""
    decoder: Any = model.model.layers
    return [m for m in decoder.modules() if isinstance(m, nn.Linear | QuantizedLinear)]


def prefers_prompt_rows(plan: CpuDecodePlan) -> bool:
    """Return whether prompts should be rows of decode steps instead of calls of the modules: where
    that was measured to be as fast (for SmolLM2, rows take 0.95 of the modules' time at 512 tokens,
    1.07 at 1024, 1.15 at 2048)."""
    return plan.multiplies_int8 and backend.cpu_extension.isa() == "avx2"


def can_pack_weights(model: "CausalLM") -> bool:
    """Return whether quantized weights are copied into the order in which the kernel multiplies.

    A step of one row is then 1.25 times as fast for SmolLM2 and 1.8 times for a model of 7 billion
    weights. They are if the copy takes at most a sixth of the memory and half of what is available,
    so that every model that fits still fits."""
    weights = [m.qdata for m in model.modules() if isinstance(m, QuantizedLinear)]
    embedding = model.model.embed_tokens
    if model.config.tie_word_embeddings and isinstance(embedding, QuantizedEmbedding):
        weights.append(embedding.qdata)
    size = sum(w.numel() for w in weights)  # bytes
    available = available_memory()
    return 6 * size <= total_memory() and (available is None or 2 * size <= available)


def scale_table(scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """Return the scales (N, groups), and offsets for unsigned nibbles (4 bits) or for q (8 bits),
    in the kernel's layout (ceil(N / 16), groups, 1 or 2, 16). The table has 16 bits where it loses
    nothing: the scales of a file usually had 16 bits."""
    n, groups = scales.shape
    scales = scales.detach().float().contiguous()
    zeros = None if zeros is None else zeros.detach().float().contiguous()
    shape = (-(-n // _TILE), groups, 1 if zeros is None else 2, _TILE)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        table = torch.empty(shape, dtype=dtype)
        if backend.cpu_extension.scale_table(scales, zeros, bits, table):
            break
    return table


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    tensors = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
    return [t for t in tensors if t is not None]


def model_fingerprint(model: "CausalLM") -> tuple:
    """Return a value that is equal as long as the model is the same: the config, the rounding of
    activations, the address of each tensor and how often it was written to."""
    modules = _modules(model)
    versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in _tensors(modules)]
    act_bits = [vars(m).get("act_bits") for m in modules]
    return dict(vars(model.config)), act_bits, versions


def decode_plan(model: "CausalLM") -> CpuDecodePlan | None:
    """Return the model's plan. It is built once, and again when the model has changed (a write to
    codes and scales of quantized weights through ``.data`` is not noticed). Return None where
    `unsupported_reason` has a reason. The model is fused afterwards."""
    if unsupported_reason(model) is not None:
        _plans.pop(model, None)  # it would keep the old parameters alive
        model.model.fuse()
        return None
    plan = _plans.get(model)
    if plan is None or not plan.matches(model):
        model.model.fuse()
        plan = _plans[model] = CpuDecodePlan(model)
    return plan


class CpuDecodeRunner:
    """Runs decode steps of rows with keys and values in pages: ``data`` (layers, 2, pages, Hkv,
    page_size, D). int8 data has ``scales`` (layers, 2, pages, Hkv, page_size), float32."""

    def __init__(
        self,
        model: "CausalLM",
        plan: CpuDecodePlan,
        data: Tensor,
        scales: Tensor | None = None,
        rope_length: int = 0,
    ):
        self.plan, self.data, self.scales, self.rope_length = plan, data, scales, rope_length
        self.vocab = model.config.vocab_size
        self.workspace = torch.empty(0, dtype=torch.uint8)

    def logits(
        self,
        tokens: Tensor,
        lengths: Tensor,
        table: Tensor,
        *,
        logits_indices: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, V) float32 of (B,) int64 tokens after ``lengths`` (B,) int64 cached
        ones; or (L, V), of the rows ``logits_indices`` (L,) int64, in order.

        ``table`` (B, P) int32: the pages of each row, in order; entries after its last page are not
        read. The key and value of each row are written after its cached ones. Several tokens of one
        sequence are consecutive rows with the same pages.
        """
        torch.get_num_threads()  # passes torch's number of threads to OpenMP
        plan, max_length = self.plan, int(lengths.max()) + 1
        rows = tokens.shape[0]
        size = plan.cpp.workspace_bytes(rows, max_length) + 64
        if self.workspace.numel() < size:  # the first step, more keys, or more threads
            capacity = self.data.shape[-2] * table.shape[1]
            size = plan.cpp.workspace_bytes(rows, min(max(2 * max_length, 256), capacity)) + 64
            self.workspace = torch.empty(size, dtype=torch.uint8)
        context = max(max_length, self.rope_length)
        rotary = [t for r in plan.rotary for t in r.tables(context, tokens.device)]
        logits_indices = torch.arange(rows) if logits_indices is None else logits_indices
        out = torch.empty(logits_indices.shape[0], self.vocab)
        backend.cpu_extension.decode_step(
            plan.cpp, tokens, lengths, table, self.data, self.scales, rotary, self.workspace,
            logits_indices, out,
        )  # fmt: skip
        return out
