"""`ModelConfig` describes a model in Hugging Face's names and converts it from and to config.json.

What transformers hard-codes for each architecture (where the norms are, which projections have
biases, ...) is one row of `FAMILIES` here. ``model_type`` selects the row. config.json never
stores the row itself, so a file cannot contradict the architecture that transformers would build.
Rejected: one free field per trait, since half of the combinations would be models that no other
program loads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeGuard

from fastlm.checkpoint.rope_parameters import check_rope
from fastlm.errors import InputError

FAMILY: Any = object()  # default of a field: what transformers assumes for this model_type
ACTIVATIONS = {  # hidden_act -> fastlm.ops.glu's act
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
MAX_LAYERS = 4096  # the deepest published decoders have under 200
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Family:
    """The traits that depend on model_type alone.

    keys: entries of config.json beyond those that all families have.
    norms: "pre" (Llama), "post" (OLMo-2: after each branch, before the addition) or "sandwich"
    (Gemma: both).
    qk_norm: over each head, or over all heads at once.
    """

    architecture: str
    keys: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0
    norms: Literal["pre", "post", "sandwich"] = "pre"
    norm_offset: float = 0.0
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    fused_projections: bool = False
    scaled_embedding: bool = False


_QWEN = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_GEMMA = (
    *("attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", ("attention_bias", "mlp_bias")),
    "mistral": Family(
        "MistralForCausalLM",
        ("sliding_window",),
        {"sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", _QWEN, qkv_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", ("attention_bias", *_QWEN), {"head_dim": 128}, qk_norm="head"
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA,
        {**_GEMMA_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        norms="sandwich",
        norm_offset=1.0,
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA,
        _GEMMA_DEFAULTS,
        rope_theta=1e6,
        norms="sandwich",
        norm_offset=1.0,
        qk_norm="head",
        scaled_embedding=True,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        ("attention_bias",),
        {"rms_norm_eps": 1e-5},
        norms="post",
        qk_norm="full",
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        ("sliding_window", "original_max_position_embeddings"),
        {"rms_norm_eps": 1e-5},
        fused_projections=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        ("attention_bias", "mlp_bias", *_QWEN[:2], "layer_types", "no_rope_layers"),
        {"tie_word_embeddings": True},
        rope_theta=2e6,
    ),
}
_GEMMA3_LOCAL_THETA = 10000.0  # rope_theta of its sliding layers
_GEMMA3_PATTERN = 6  # five sliding layers, then a full one
_SMOLLM3_INTERVAL = 4  # three layers with rotary positions, then one without
_OPTIONAL = {  # fields of only some families -> the value that means "none"
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "original_max_position_embeddings": None,
    "use_sliding_window": False,
}
# Hugging Face's config entries that change the result -> the values that CausalLM supports
_SUPPORTED = {"use_bidirectional_attention": (None, False), "resid_pdrop": (0,), "embd_pdrop": (0,)}


@dataclass(kw_only=True)
class ModelConfig:
    """The shape of a `CausalLM`; every field is a config.json entry of the same name.

    A field left out has the value that transformers assumes for `model_type` (a key of `FAMILIES`),
    except that num_key_value_heads is then num_attention_heads. `rope_parameters` is as in
    transformers 5: {"rope_type", "rope_theta", ...}, for gemma3_text one such dict per layer type.
    `from_dict` also accepts the older ``rope_theta`` / ``rope_scaling`` / ``rope_local_base_freq``
    / ``partial_rotary_factor``, and `to_dict` writes both, so every version can read it.
    `layer_types` states for each layer whether it is windowed; `no_rope_layers` has a 1 for each
    layer *with* rotary positions (Hugging Face's name and meaning). The embedding of `pad_token_id`
    gets no gradient from the lookup, as in transformers. `extra` keeps the entries of a config.json
    that the model does not need.

    Raises InputError: unknown model_type, activation or rope_type, impossible shapes, an option
    that the family lacks.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = FAMILY
    head_dim: int = FAMILY
    hidden_act: str = FAMILY
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = FAMILY
    tie_word_embeddings: bool = FAMILY
    rope_parameters: dict[str, Any] = FAMILY
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = FAMILY
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] = FAMILY
    no_rope_layers: list[int] = FAMILY
    query_pre_attn_scalar: float | None = FAMILY
    attn_logit_softcapping: float | None = FAMILY
    final_logit_softcapping: float | None = FAMILY
    original_max_position_embeddings: int | None = None
    bos_token_id: int | None = FAMILY
    eos_token_id: int | list[int] | None = FAMILY
    pad_token_id: int | None = FAMILY
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def act(self) -> str:
        """Return the name of `hidden_act` in `fastlm.ops.glu`."""
        return ACTIVATIONS[self.hidden_act]

    @property
    def scale(self) -> float:
        """Return the factor of attention scores."""
        return (self.query_pre_attn_scalar or self.head_dim) ** -0.5

    @property
    def stop_ids(self) -> frozenset[int]:
        """Return `eos_token_id` as a set."""
        eos = self.eos_token_id
        return frozenset(() if eos is None else (eos,) if isinstance(eos, int) else eos)

    def window(self, layer: int) -> int | None:
        """Return how many keys a query of this layer attends to, itself included; None for all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def rope(self, layer: int) -> dict[str, Any] | None:
        """Return the rotary parameters of this layer; None if it has no positions."""
        if not self.no_rope_layers[layer]:
            return None
        return self.rope_parameters.get(self.layer_types[layer], self.rope_parameters)

    def __post_init__(self) -> None:
        if self.model_type not in FAMILIES:
            raise InputError(
                f"model_type: expected one of {', '.join(FAMILIES)}, got {self.model_type!r}"
            )
        self._fill()
        self._check()

    def _fill(self) -> None:
        """Replace each FAMILY with its value; later fields depend on earlier ones."""
        defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
        defaults |= self.family.defaults
        for f in fields(self):
            if getattr(self, f.name) is FAMILY:
                setattr(self, f.name, defaults.get(f.name))
        for name in (*_REQUIRED, "max_position_embeddings"):
            _check_size(name, getattr(self, name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = defaults.get("head_dim") or self._default_head_dim()
        if self.model_type in ("qwen2", "qwen3", "smollm3") and not self.use_sliding_window:
            self.sliding_window = None
        layers = self.num_hidden_layers
        if self.no_rope_layers is None:
            interval = _SMOLLM3_INTERVAL if self.model_type == "smollm3" else layers + 1
            self.no_rope_layers = _periodic(layers, interval)
        if self.layer_types is None:
            self.layer_types = [LAYER_TYPES[self._is_sliding(i)] for i in range(layers)]
        if self.rope_parameters is None:
            self.rope_parameters = _rope_parameters(self.model_type, {})

    def _default_head_dim(self) -> int:
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                "hidden_size: expected a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
                f" without head_dim, got {self.hidden_size}"
            )
        return self.hidden_size // self.num_attention_heads

    def _is_sliding(self, layer: int) -> bool:
        """Return True if this layer is windowed by default, without layer_types."""
        if self.sliding_window is None:
            return False
        if self.model_type == "gemma2":
            return layer % 2 == 0
        if self.model_type == "gemma3_text":
            return (layer + 1) % _GEMMA3_PATTERN != 0
        if self.model_type == "smollm3":
            return not self.no_rope_layers[layer]
        if self.model_type in ("qwen2", "qwen3"):
            return layer >= self.max_window_layers
        return True  # mistral, phi3

    def _check(self) -> None:
        for name in ("num_key_value_heads", "head_dim"):
            _check_size(name, getattr(self, name))
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_key_value_heads: expected a divisor of num_attention_heads"
                f" {self.num_attention_heads}, got {self.num_key_value_heads}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACTIVATIONS:
            raise InputError(
                f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {self.hidden_act!r}"
            )
        for name in _NUMBERS:
            value, zero = getattr(self, name), name in ("initializer_range", "attention_dropout")
            optional = name in _OPTIONAL and value is None
            if not optional and not (_is_number(value) and (value > 0 or (zero and value == 0))):
                raise InputError(f"{name}: expected a positive number, got {value!r}")
        if self.attention_dropout >= 1:
            raise InputError(
                f"attention_dropout: expected less than 1, got {self.attention_dropout}"
            )
        if self.sliding_window is not None:
            _check_size("sliding_window", self.sliding_window)
        for name, none_value in _OPTIONAL.items():
            if getattr(self, name) != none_value and name not in self.family.keys:
                raise InputError(
                    f"{name}: {self.model_type} has none: expected {none_value},"
                    f" got {getattr(self, name)!r}"
                )
        self._check_layers()
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, token)
            for token_id in value if isinstance(value, list) else [value]:
                # -1 means none in old files
                if token_id is not None and (not _is_int(token_id) or token_id < -1):
                    raise InputError(f"{token}: expected a token id or None, got {value!r}")
            if isinstance(value, list) and token != "eos_token_id":
                raise InputError(f"{token}: expected a token id or None, got {value!r:.80}")
        if set(self.rope_parameters) & set(LAYER_TYPES):
            ropes = {t: self.rope_parameters.get(t) for t in set(self.layer_types)}
        else:
            ropes = {"": self.rope_parameters}
        for layer_type, rope in ropes.items():
            location = f"rope_parameters[{layer_type!r}]" if layer_type else "rope_parameters"
            check_rope(rope, self.head_dim, location)

    def _check_layers(self) -> None:
        for name, allowed in (("layer_types", LAYER_TYPES), ("no_rope_layers", (0, 1))):
            value = getattr(self, name)
            if not isinstance(value, list) or len(value) < self.num_hidden_layers:
                raise InputError(
                    f"{name}: expected a list of num_hidden_layers {self.num_hidden_layers} "
                    "entries,"
                    f" got {value!r}"
                )
            for entry in value:
                if entry not in allowed:
                    raise InputError(f"{name}: expected entries of {allowed}, got {entry!r}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise InputError(
                "sliding_window: expected a window for sliding_attention layers, got None"
            )
        if 0 in self.no_rope_layers and self.model_type != "smollm3":
            raise InputError(
                f"no_rope_layers: {self.model_type} has none: expected 1 for each layer"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Build a config from the content of a config.json written by any transformers version."""
        if not isinstance(config, Mapping):
            raise InputError(f"config: expected a mapping, got {type(config).__name__}")
        entries = dict(config)
        model_type = entries.get("model_type", "llama")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            raise InputError(
                f"model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}"
            )
        for name, allowed in _SUPPORTED.items():
            if entries.get(name, allowed[0]) not in allowed:
                raise InputError(f"{name}: expected {allowed[0]}, got {entries[name]!r}")
        if "hidden_activation" in entries:  # Gemma; it overrides hidden_act in files that have both
            activation = entries.pop("hidden_activation")
            entries["hidden_act"] = activation or entries.get("hidden_act", "gelu_pytorch_tanh")
        pattern = entries.get("sliding_window_pattern", entries.get("_sliding_window_pattern"))
        layers = entries.get("num_hidden_layers")
        if model_type == "gemma3_text" and pattern and not entries.get("layer_types"):
            _check_size("sliding_window_pattern", pattern)
            entries["layer_types"] = [LAYER_TYPES[i] for i in _periodic(layers, pattern)]
        interval = entries.get("no_rope_layer_interval")
        if model_type == "smollm3" and interval and not entries.get("no_rope_layers"):
            _check_size("no_rope_layer_interval", interval)
            entries["no_rope_layers"] = _periodic(layers, interval)
        entries["rope_parameters"] = _rope_parameters(model_type, entries)
        names = {f.name for f in fields(cls)} - {"extra"}
        values: dict[str, Any] = {k: entries.pop(k) for k in list(entries) if k in names}
        values = {k: v for k, v in values.items() if v is not None or k in _NONE_MEANS_NONE}
        if missing := [name for name in _REQUIRED if name not in values]:
            raise InputError(f"{missing[0]}: expected in the config, got none")
        for name in _OLD_ROPE:
            entries.pop(name, None)
        unused = [k for k in values if k in _FAMILY_ONLY and k not in FAMILIES[model_type].keys]
        for name in unused:  # an entry that the architecture ignores; transformers keeps it too
            none_value = _OPTIONAL.get(name, values[name])
            if values[name] != none_value and name in _COMPUTED:
                continue  # refused by the constructor: the file describes another kind of model
            entries[name] = values.pop(name)
        return cls(**values, extra=entries)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a config.json that transformers loads."""
        out: dict[str, Any] = {
            **self.extra,
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
        }
        for f in fields(self):
            if f.name == "extra" or (f.name in _FAMILY_ONLY and f.name not in self.family.keys):
                continue
            value = getattr(self, f.name)
            out[f.name] = list(value) if isinstance(value, list) else value
        if self.family.norms == "sandwich":
            out["hidden_activation"] = out.pop("hidden_act")
        rope = self.rope_parameters
        nested = bool(set(rope) & set(LAYER_TYPES))
        out["rope_parameters"] = {k: dict(v) for k, v in rope.items()} if nested else dict(rope)
        scaling = dict(rope["full_attention"] if nested else rope)
        out["rope_theta"] = scaling.pop("rope_theta")
        partial = scaling.pop("partial_rotary_factor", 1.0)
        out["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
        if partial != 1.0:
            out["partial_rotary_factor"] = partial
        if nested:
            out["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        return out


_REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads"),
)
_FAMILY_ONLY = (*_OPTIONAL, "max_window_layers", "layer_types", "no_rope_layers")
_NUMBERS = (
    *("rms_norm_eps", "initializer_range", "attention_dropout", "query_pre_attn_scalar"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_COMPUTED = ("attn_logit_softcapping", "final_logit_softcapping")
_OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
# Fields for which null in a file is a value; elsewhere null means left out
_NONE_MEANS_NONE = (
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def _rope_parameters(model_type: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Build transformers 5's rope_parameters from old or new entries."""
    scaling = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"rope_parameters: expected a dict, got {scaling!r}")
    theta = entries.get("rope_theta") or FAMILIES[model_type].rope_theta
    partial = entries.get("partial_rotary_factor")
    original = entries.get("original_max_position_embeddings")

    def normalise(entry: Mapping[str, Any], theta: float) -> dict[str, Any]:
        entry = dict(entry)
        kind = entry.pop("type", None) or "default"
        entry.setdefault("rope_type", kind)
        if model_type == "phi3" and entry["rope_type"] in ("su", "yarn"):  # older names of longrope
            entry["rope_type"] = "longrope"
        entry.setdefault("rope_theta", theta)
        if partial is not None:
            entry.setdefault("partial_rotary_factor", partial)
        if entry.get("partial_rotary_factor") == 1:
            del entry["partial_rotary_factor"]
        if entry["rope_type"] in ("llama3", "yarn", "longrope"):
            if original is not None:
                entry["original_max_position_embeddings"] = original
            entry.setdefault(
                "original_max_position_embeddings", entries.get("max_position_embeddings")
            )
        return entry

    if set(scaling) & set(LAYER_TYPES):
        nested = {k: v for k, v in scaling.items() if v is not None}
        if not all(isinstance(v, Mapping) for v in nested.values()):
            raise InputError(f"rope_parameters: expected a dict per layer type, got {scaling!r}")
        return {k: normalise(v, theta) for k, v in nested.items()}
    if model_type == "gemma3_text":
        local = entries.get("rope_local_base_freq") or _GEMMA3_LOCAL_THETA
        return {
            "full_attention": normalise(scaling, theta),
            "sliding_attention": normalise({}, local),
        }
    return normalise(scaling, theta)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_size(name: str, value: Any) -> None:
    if not _is_int(value) or value < 1:
        raise InputError(f"{name}: expected a positive integer, got {value!r:.60}")
    max_size = MAX_LAYERS if name == "num_hidden_layers" else 2**31 - 1  # beyond: a mistake
    if value > max_size:
        raise InputError(f"{name}: expected at most {max_size}, got {value}")


def _periodic(layers: Any, period: int) -> list[int]:
    """Return 1 for each layer, 0 for the last of each period."""
    _check_size("num_hidden_layers", layers)  # before a list of that length is created
    return [int((i + 1) % period != 0) for i in range(layers)]
