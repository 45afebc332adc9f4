"""`CausalLM`: `fastlm.model.layers` with a head, a loss that never stores logits, loading and
saving, and generation.

Parameter names are Hugging Face's, so checkpoints load by name and saved models load in
transformers.

Shapes: B batch, S tokens of this call, E hidden_size, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.checkpoint.architectures import expected_shapes
from fastlm.checkpoint.config import ModelConfig
from fastlm.checkpoint.folder import find_base_model, load_state, save_hf
from fastlm.errors import InputError
from fastlm.machine import total_memory
from fastlm.model.adapter import load_adapter
from fastlm.model.layers import Decoder, ForwardContext, RMSNorm
from fastlm.model.lora import LoraConfig, check_no_adapters, merge_lora
from fastlm.model.quantized_modules import (
    QuantizedEmbedding,
    QuantizedLinear,
    check_act_bits,
    quantization_config,
    set_quantized_weight,
)
from fastlm.ops import linear_cross_entropy, linear_logprobs, quantized_linear
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.pipeline.run_folder import is_adapter, locate_model
from fastlm.transforms import is_eager

if TYPE_CHECKING:
    from fastlm.inference.block_manager import PrefillKVCache
    from fastlm.model.model_runner import ModelRunner

IGNORE = -100  # label of a token without loss


@dataclass
class CausalLMOutput:
    """The result of `CausalLM.forward`. With labels, loss: float32 scalar. Without, logits: (B, S,
    V) in the model's dtype."""

    loss: Tensor | None = None
    logits: Tensor | None = None


class CausalLM(nn.Module):
    """A causal language model: ``model(input_ids).logits``, ``model(input_ids, labels=...).loss``,
    `generate`.

    Parameters are float32 (``.to(dtype)`` as with any module). Weights are initialised from
    normal(0, initializer_range), biases and the padding row to zero, norms to one. Draws come from
    `seed` alone (from torch's generator where it is None), on the CPU, so they are the same for
    every dtype and device. With `scaled_residual`, o_proj and down_proj are divided by sqrt(2 *
    layers) (GPT-2), which keeps the variance of the residual stream independent of the depth.
    Without it, initialisation is that of transformers.
    """

    lora: LoraConfig | None = None  # of its adapters (`fastlm.model.lora`)

    def __init__(
        self, config: ModelConfig, *, seed: int | None = None, scaled_residual: bool = True
    ):
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise InputError(
                f"config: expected a fastlm.ModelConfig, got {type(config).__name__}"
                " (of transformers: fastlm.ModelConfig.from_dict(config.to_dict()))"
            )
        self.config = config
        if torch.empty(0).device.type == "cpu":
            _check_memory(config)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.model.embed_tokens.weight.is_meta:
            self.initialize(seed, scaled_residual=scaled_residual)

    @torch.no_grad()
    def initialize(self, seed: int | None = None, *, scaled_residual: bool = True) -> None:
        """Initialise every parameter; see the class."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        shrink = 1 / math.sqrt(2 * self.config.num_hidden_layers) if scaled_residual else 1.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("o_proj", "down_proj"))
                std = self.config.initializer_range * (shrink if residual else 1.0)
                draw = torch.empty(module.weight.shape, device="cpu")
                module.weight.copy_(draw.normal_(0.0, std, generator=generator))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0 - module.offset)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self.model.norm.weight.dtype

    @property
    def head_weight(self) -> Any:
        """(V, E), Tensor or QuantizedWeight: lm_head's, or the embedding's where they are tied."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def head_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return `head_weight` as a matrix; a quantized one is dequantized."""
        head = self.head_weight
        return head.dequantize(dtype) if isinstance(head, QuantizedWeight) else head

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        keep_quantized: bool = True,
        act_bits: int | None = None,
    ) -> "CausalLM":
        """Load a model in eval mode from a Hugging Face folder, a fastlm run folder, a .gguf file,
        or the package of ``model:smollm2``. A LoRA adapter (of fastlm or PEFT) is loaded with the
        base model that it names, and merged: quantized weights of the base become floats.

        `dtype` is that of activations and unquantized weights. The default is that of the file's
        float matrices; where all of them are quantized, the one in config.json, else float32 (a
        .gguf file has none). 4- and 8-bit weights stay quantized unless `keep_quantized` is False.
        `act_bits` 8 rounds the activations that they multiply to int8, 16 does not (see
        `fastlm.ops.quantized_linear`). The default is that of the folder's quantization_config, and
        8 for .gguf files, as in llama.cpp (SmolLM2's perplexity: +0.2 %).

        Raises InputError: see `fastlm.checkpoint.folder.load_state`; an unsupported config, or a
        tensor that the model does not have.
        """
        if act_bits is not None:
            check_act_bits(act_bits)
        path = locate_model(Path(path))
        if is_adapter(path):
            base = cls.from_pretrained(
                find_base_model(path), dtype=dtype, keep_quantized=keep_quantized, act_bits=act_bits
            )
            return merge_lora(load_adapter(base, path)).eval()
        config_dict, tensors = load_state(path)
        if not keep_quantized:
            config_dict.pop("quantization_config", None)
        config = ModelConfig.from_dict(config_dict)
        with torch.device("meta"):
            model = cls(config)
        state = dict(tensors)
        if dtype is None:
            dtype = _float_dtype(config, state)
        quantization = config.extra.get("quantization_config")
        modules = (quantization or {}).get("modules") or {}
        quantized, plain = {}, {}
        for name in list(state):
            value = state.pop(name)  # one at a time: never the whole model in two dtypes
            if isinstance(value, QuantizedWeight) and keep_quantized:
                quantized[name] = value
            elif isinstance(value, QuantizedWeight):
                plain[name] = value.dequantize(dtype)
            elif not name.endswith("rotary_emb.inv_freq"):  # in old files
                plain[name] = value.to(dtype)
        missing, unknown = model.load_state_dict(plain, strict=False, assign=True)
        if unknown:
            raise InputError(f"{path}: expected tensors of the model only, got {unknown[0]}")
        if missing := [name for name in missing if name not in quantized]:
            raise InputError(f"{path}: expected a tensor {missing[0]}, got none of that name")
        for name, weight in quantized.items():
            name = name.removesuffix(".weight")
            stored = modules.get(name, {}).get("act_bits", 16 if quantization else 8)
            set_quantized_weight(model, name, weight, act_bits=act_bits or stored, dtype=dtype)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that `from_pretrained` and (unless quantized) transformers
        load; see `save_hf`. A model with adapters is refused: `merge_lora` it, or `save_adapter`.
        """
        check_no_adapters(self)
        config = self.config.to_dict()
        for key in ("dtype", "torch_dtype"):  # the new name and transformers 4's, always last
            config.pop(key, None)
            config[key] = str(self.dtype).removeprefix("torch.")
        quantization = config.pop("quantization_config", None) or {}
        first = next((m for m in self.modules() if isinstance(m, QuantizedLinear)), None)
        if first is not None:
            format, method = f"w{first.bits}a{first.act_bits}", quantization.get("method", "rtn")
            config["quantization_config"] = quantization_config(
                self, format, group_size=first.group_size, method=method
            )
        save_hf(folder, config, self.weights())

    def weights(self) -> dict[str, Tensor | QuantizedWeight]:
        """Return all weights under Hugging Face's names, without a tied head."""
        state: dict[str, Tensor | QuantizedWeight] = {}
        for name, module in self.named_modules():
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                state[f"{name}.weight"] = module.weight
        state.update(self.named_parameters())
        return state

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        num_items: int | Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Return ``loss = F.cross_entropy(logits[:, :-1], labels[:, 1:])`` without storing logits;
        without labels, return the logits.

        Args:
            input_ids: (B, S) int64 or int32, in [0, vocab_size) (checked on the CPU).
            labels: (B, S), shifted here, as in transformers; -100 has no loss.
            shift_labels: (B, S), already shifted: the token after each position. Pass at most one
                of the two.
            num_items: the divisor of the summed loss, by default the number of labels (for gradient
                accumulation, or several ranks).
            cu_seqlens: (n + 1,) int32: the B * S tokens are n documents, one after another.
                Positions restart in each document, attention stays inside it, and with `labels` its
                last token gets no label from the next one.
            position_ids: (B, S) or (S,); by default from the mask or cu_seqlens.
            attention_mask: (B, S): 0 marks padding, on the left of each row.
            logits_to_keep: return the logits of this many last positions only; 0: of all.

        Raises InputError: shapes or ids that do not fit, or a context beyond
        max_position_embeddings.
        """
        options: dict[str, Any] = {"position_ids": position_ids, "attention_mask": attention_mask}
        hidden = self.hidden(input_ids, cu_seqlens=cu_seqlens, **options)
        if labels is None and shift_labels is None:
            return CausalLMOutput(logits=self.logits(hidden[:, -logits_to_keep:]))
        if labels is not None and shift_labels is not None:
            raise InputError("labels: expected labels or shift_labels, got both")
        if labels is None:
            _check_labels("shift_labels", shift_labels, input_ids.shape)
            target = shift_labels
        else:
            _check_labels("labels", labels, input_ids.shape)
            rows = labels if cu_seqlens is None else labels.view(1, -1)
            target = F.pad(rows[:, 1:], (0, 1), value=IGNORE)
            if cu_seqlens is not None:
                # an empty first document gives -1: the last position, which has no label anyway
                ends = cu_seqlens[1:].long() - 1
                target = target.index_fill(1, ends % target.shape[1], IGNORE)
        assert target is not None
        loss: Any = linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head_matrix(hidden.dtype),
            target.flatten(),
            softcap=self.config.final_logit_softcapping,
            ignore_index=IGNORE,
            num_items=num_items,
        )
        return CausalLMOutput(loss=loss)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the input of the head, (B, S, E): the last layer's output after the norm.
        Arguments and errors are those of `forward`, and:

        Args:
            keys: (rows, cu_seqlens_k), with cu_seqlens: the keys of document i are those of
                ``rows[cu_seqlens_k[i] : cu_seqlens_k[i + 1]]``, (total_k,) int64 among the B * S.
                The keys of its own tokens come last; those before them are a prefix that it shares
                with another document. Positions count from the first key. InputError: without
                cu_seqlens; other rows (checked on a CPU only).
        """
        self.check_ids(input_ids)
        if keys is not None:
            _check_keys(keys, cu_seqlens)
        batch, length = input_ids.shape
        visible, max_length = None, length  # max_length: the length that the rotary tables cover
        if position_ids is not None and not torch.compiler.is_compiling() and position_ids.numel():
            max_length = int(position_ids.max()) + 1
        if cu_seqlens is not None:
            if attention_mask is not None:
                raise InputError("cu_seqlens: expected without attention_mask, got both")
            if position_ids is None:
                max_length = batch * length
                key_offsets = cu_seqlens if keys is None else keys[1]  # with shared prefixes
                positions = packed_positions(cu_seqlens, max_length, key_offsets)
                position_ids = positions.view(batch, length)
                if self.model.depends_on_length:  # waits for the device; longrope and dynamic only
                    max_length = int(key_offsets.diff().max())
        elif attention_mask is not None:
            if attention_mask.shape != (batch, length):
                raise InputError(
                    f"attention_mask: expected ({batch}, {length}), got "
                    f"{tuple(attention_mask.shape)}"
                )
            visible = attention_mask.bool()[:, None, None]
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        # for packed documents, the length of each counts instead
        if cu_seqlens is None and length > self.context_limit:
            raise InputError(
                f"input_ids: expected at most max_position_embeddings {self.context_limit} tokens,"
                f" got {length}"
            )
        rotary = self.model.rotary(
            0 if position_ids is None else position_ids, length, max_length, input_ids.device
        )
        return self.model(input_ids, ForwardContext(cu_seqlens, None, visible, rotary, keys=keys))

    def logprobs(
        self,
        input_ids: Tensor,
        shift_labels: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        attention_mask: Tensor | None = None,
        keys: tuple[Tensor, Tensor] | None = None,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> Any:
        """Return log p(shift_labels[b, s] | input_ids[b, : s + 1]), (B, S) float32, without storing
        logits; 0 where the label is -100.

        Args:
            shift_labels: (B, S), already shifted: the token after each position.
            temperature: divides the logits, as in sampling.
            return_entropy: return the pair of that and the entropy of each distribution in nats,
                (B, S) float32.
            others: as in `hidden`.
        """
        hidden = self.hidden(
            input_ids, cu_seqlens=cu_seqlens, attention_mask=attention_mask, keys=keys
        )
        return self.logprobs_from_hidden(
            hidden, shift_labels, temperature=temperature, return_entropy=return_entropy
        )

    def logprobs_from_hidden(
        self,
        hidden: Tensor,
        shift_labels: Tensor,
        *,
        temperature: float = 1.0,
        return_entropy: bool = False,
    ) -> Any:
        """Return `logprobs` from the result (B, S, E) of `hidden`."""
        _check_labels("shift_labels", shift_labels, hidden.shape[:-1])
        return linear_logprobs(
            hidden,
            self.head_matrix(hidden.dtype),
            shift_labels,
            temperature=temperature,
            softcap=self.config.final_logit_softcapping,
            ignore_index=IGNORE,
            return_entropy=return_entropy,
        )

    def chunk_hidden(
        self, input_ids: Tensor, cache: "PrefillKVCache", all_positions: bool = False
    ) -> Tensor:
        """Run chunks of prompts: checked ids (total,), packed as in `cache`. Return the input of
        the head at the last token of each chunk, (B, E); ``all_positions``: at each token."""
        rotary = self.model.rotary(
            cache.positions[None], len(input_ids), cache.max_length, input_ids.device
        )
        context = ForwardContext(cache.cu_seqlens, cache, None, rotary, fused=True)
        hidden = self.model(input_ids[None], context)[0]
        return hidden if all_positions else hidden[cache.cu_seqlens[1:].long() - 1]

    def check_ids(self, input_ids: Tensor) -> None:
        """Raise InputError unless these are (B, S) integers and in the vocabulary. Values are
        checked where they can be read cheaply.
        """
        if not isinstance(input_ids, Tensor):  # such as the tokenizer's output, a list
            raise InputError(f"input_ids: expected a tensor (B, S), got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            shape = f"shape {tuple(input_ids.shape)}"
            got = input_ids.dtype if input_ids.dim() == 2 else shape
            raise InputError(f"input_ids: expected integers (B, S), got {got}")
        if not is_eager(input_ids) or input_ids.device.type != "cpu" or not input_ids.numel():
            return  # reading the values would break the graph, or wait for the device
        low, high = torch.aminmax(input_ids)
        if low < 0 or high >= self.config.vocab_size:
            token = int(low if low < 0 else high)
            raise InputError(
                f"input_ids: expected ids in [0, {self.config.vocab_size}), got {token}"
            )

    @property
    def context_limit(self) -> int:
        """The longest allowed context. Positions beyond max_position_embeddings were never trained
        and are refused, except with dynamic scaling, which is designed for them."""
        dynamic = self.config.rope_parameters.get("rope_type") == "dynamic"
        return 2**31 if dynamic else self.config.max_position_embeddings

    @property
    def designed_limit(self) -> int:
        """The longest context for which the model's rotary positions were scaled. With dynamic
        scaling it is below `context_limit`, which is unbounded."""
        stretch = 1.0 if self.context_limit < 2**31 else self.config.rope_parameters["factor"]
        return int(self.config.max_position_embeddings * stretch)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of (..., E), softcapped in families that have a softcap."""
        if not self.config.tie_word_embeddings:
            out = self.lm_head(hidden)
        elif isinstance(weight := self.head_weight, QuantizedWeight):
            act_bits = self.model.embed_tokens.act_bits
            assert isinstance(act_bits, int)
            out = quantized_linear(hidden, weight, act_bits=act_bits)
        else:
            out = F.linear(hidden, weight)
        cap = self.config.final_logit_softcapping
        return out if cap is None else cap * torch.tanh(out / cap)

    def runner(self) -> "ModelRunner":
        """Return the runner of this model's steps, for `fastlm.inference.engine.Engine`."""
        from fastlm.model.model_runner import ModelRunner

        return ModelRunner(self)

    def generate(
        self,
        input_ids: Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Sequence[int] | frozenset[int] = (),
        ignore_eos: bool = False,
        attention_mask: Tensor | None = None,
        on_token: Callable[[int, int], Any] | None = None,
        return_logprobs: bool = False,
    ) -> Any:
        """Continue each row by up to `max_new_tokens` tokens, or to the model's end token; see
        `fastlm.model.generation.generate`.

        Takes (B, S) integers, or B lists of ids. Returns (B, S + new) int64, or B lists.
        """
        from fastlm.inference.sampling import Sampling
        from fastlm.model.generation import generate

        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        return generate(
            self,
            input_ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=seed,
            stop_ids=stop_ids,
            ignore_eos=ignore_eos,
            attention_mask=attention_mask,
            on_token=on_token,
            return_logprobs=return_logprobs,
        )


_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16)}


def _float_dtype(config: ModelConfig, state: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the float matrices; where all are quantized, the one in the config."""
    for value in state.values():
        if isinstance(value, Tensor) and value.dim() == 2:
            return value.dtype
    names = (config.extra.get(key) for key in ("dtype", "torch_dtype"))
    return next((_DTYPES[str(name)] for name in names if str(name) in _DTYPES), torch.float32)


def _check_labels(name: str, labels: Any, shape: torch.Size) -> None:
    if labels.shape != shape or labels.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name}: expected integers {tuple(shape)} as input_ids,"
            f" got {labels.dtype} {tuple(labels.shape)}"
        )


def _check_memory(config: ModelConfig) -> None:
    """Raise InputError for a model that does not fit into this machine's memory. Linux would kill
    the process half-way instead of refusing the allocation.
    """
    parameters = sum(map(math.prod, expected_shapes(config).values()))
    memory = total_memory()
    if 4 * parameters > memory:  # float32
        raise InputError(
            f"config: expected a model that fits into {memory:,} bytes of memory,"
            f" got {parameters:,} parameters"
        )


def _check_keys(keys: tuple[Tensor, Tensor], cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        raise InputError("keys: expected with cu_seqlens, got none")
    rows, ends = keys
    if not is_eager(rows) or rows.device.type != "cpu":
        return  # reading the values would break the graph, or wait for the device
    starts, lengths = cu_seqlens.long()[:-1], cu_seqlens.long().diff()
    if ends.shape != cu_seqlens.shape or (ends.long().diff() < lengths).any():
        raise InputError("keys: expected at least as many keys as tokens for each document")
    tokens = torch.arange(int(lengths.sum()))
    indices = tokens + (ends.long()[1:] - lengths - starts).repeat_interleave(lengths)
    if ends[-1] != len(rows) or not torch.equal(rows[indices].long(), tokens):
        raise InputError("keys: expected rows in which the keys of a document end with its tokens")


def packed_positions(cu_seqlens: Tensor, total: int, key_offsets: Tensor) -> Tensor:
    """Return the position of each of `total` packed tokens inside its document, (total,) int64.
    ``key_offsets``: the offsets of the documents' keys, which include shared prefixes.
    """
    index = torch.arange(total, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), index, right=True) - 1
    prefix = key_offsets.long().diff() - cu_seqlens.long().diff()
    return index - cu_seqlens.long()[document] + prefix[document]
