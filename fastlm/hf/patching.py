"""`patch` and `unpatch`: run a Hugging Face model on fastlm's kernels. Modules are recognised by
what they compute.

A module counts as a norm, a GLU, a decoder layer or a head with its loss if its children and
attributes look like one *and* it computes like one: the module's own forward runs on a few numbers,
with tiny layers as its children, and must return the result of the kernel. So an architecture needs
no entry in a table, one that is nearly like another is not mistaken for it, and weights are neither
read nor moved. Rejected: a list of transformers' classes (a new one every month, and each changes
between releases); to replace functions in transformers' modules (every model in the process would
change).

The forwards of patched modules are in `fastlm.hf.forwards`.
"""

import copy
import dis
import functools
import inspect
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.hf.forwards import ROTATE, logit_scale, set_variant, variant_of
from fastlm.ops import rope

NORMS = ("rms_norm", "layer_norm")
OPS = (*NORMS, "rope", "glu", "attention", "linear", "linear_cross_entropy")
PatchPlan = dict[nn.Module, tuple[str, dict[str, Any]]]  # per module: op, options
_log = logging.getLogger("fastlm")
_ACTIVATIONS = {
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


def patch(model: nn.Module, *, ops: Sequence[str] | None = None) -> nn.Module:
    """Run `model`, a Hugging Face model (or one built like it), on fastlm's kernels, in place.

    - ``rms_norm``: every RMSNorm, with the residual addition before it inside a decoder layer;
    - ``layer_norm``: every LayerNorm, likewise;
    - ``rope``: the rotation of queries and keys in every attention module;
    - ``glu``: SwiGLU and GeGLU between the projections of every MLP;
    - ``attention``: transformers' ``attn_implementation="fastlm"`` (padding, packed sequences,
      sliding windows, softcap, sinks, caches; no repeated key heads, no S x S masks);
    - ``linear``: every nn.Linear, whose product is fastlm's where that is faster on this machine
      (`fastlm.ops.linear`) and torch's elsewhere. Its class is then a subclass of nn.Linear: code
      that recognizers for nn.Linear itself (torch's quantize_dynamic) finds none;
    - ``linear_cross_entropy``: with ``labels`` the model returns the loss, and None for the logits,
      which are never stored (``num_items_in_batch``, ``shift_labels``, ``ignore_index`` as in
      transformers' ``ForCausalLMLoss``); without labels it returns the logits, as before. In eval
      mode without gradients it returns both, for metrics, unless the call passes
      ``skip_logits=True``.

    Args:
        model: any nn.Module. Modules that are not recognised stay as they are: LoRA and quantized
            layers run as before, and a model with such a head keeps its logits.
        ops: some of the names above. Default: all for which the model has modules.

    Parameters, their names, hooks and checkpoints do not change; `unpatch` undoes everything. A
    second call replaces the choice of the first. The model gets its own config object, so another
    model built from the same config stays as it is.

    Returns:
        model itself. The logger "fastlm" reports in one line which ops the model runs and what
        stayed as it was. The line is a warning, which shows without logging set-up, if only norms
        were recognised, or if the loss of a model with a head was not. ``print`` of
        `fastlm.patched_ops(model)` shows the same.

    Raises:
        InputError: ops has an unknown name; the model has no module for one of `ops`, or for any
            op; a module has a forward of its own (patch before accelerate wraps the model). The
            model is then unchanged.
    """
    if isinstance(ops, str):
        raise InputError(f"ops: expected several names, got the string {ops!r}")
    names = OPS if ops is None else tuple(ops)
    if not names or not set(names) <= set(OPS):
        got = next((repr(op) for op in names if op not in OPS), "none")
        raise InputError(f"ops: expected some of {', '.join(OPS)}, got {got}")
    _check_module(model)
    if _is_fastlm_module(model):
        raise InputError(
            f"model: expected a model of another library, got fastlm's {type(model).__name__},"
            " which runs the kernels already"
        )
    classes = {m: type(m) for m in model.modules()}
    configs = _restore(model)
    try:
        plan = _plan(model, names)
        counts = _count(plan)
        missing = [op for op in names if not counts[op]]
        if missing if ops is not None else counts.keys() <= {"linear"}:
            kinds = sorted({type(m).__name__ for m in model.modules()})
            raise InputError(
                f"model: expected modules for {' and '.join(missing)},"
                f" found none among {', '.join(kinds)}"
            )
        for module in plan:
            if "forward" in vars(module):
                raise InputError(
                    f"model: expected modules that run their class's forward, got a"
                    f" {type(module).__name__} with one of its own (patch before accelerate wraps)"
                )
    except BaseException:
        for module, cls in classes.items():
            module.__class__ = cls
        for config in configs.values():
            config._attn_implementation_internal = "fastlm"
        raise
    _set_attention(model, plan, configs)
    for module, (op, options) in plan.items():
        set_variant(module, op, **options)
    patched = patched_ops(model)
    text, level = f"patched {type(model).__name__}: {patched}", logging.INFO
    if ops is not None:
        text = f"patched {type(model).__name__}: {_format_counts(patched)}"
    elif rest := [op for op in OPS if op not in patched]:
        text += f"; nothing was recognised for {', '.join(rest)}"
    if ops is None and (patched.keeps_logits or patched.keys() <= {*NORMS, "linear"}):
        level = logging.WARNING
    _log.log(level, text)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model: expected a torch module, got {type(model).__name__}")


class PatchedOps(dict[str, int]):
    """The number of modules that run each op. Printed, it also shows what stayed as it was.

    Attributes:
        unpatched: class -> number of modules with parameters that run their own code, such as a
            mixture of experts, and of norms without parameters; without embeddings.
        keeps_logits: the model has a head whose loss was not recognised: in training its logits are
            in memory.
    """

    def __init__(self, ops: Mapping[str, int], unpatched: Mapping[str, int], keeps_logits: bool):
        super().__init__(ops)
        self.unpatched, self.keeps_logits = dict(unpatched), keeps_logits

    def __str__(self) -> str:
        text = _format_counts(self) or "nothing"
        if self.unpatched:
            text += f"; as before: {_format_counts(self.unpatched)}"
        if self.keeps_logits:
            text += "; the loss was not recognised: training stores the logits"
        return text


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: restore the classes, forwards and attention from before it, bit for bit. A
    model that is not patched stays as it is. Returns model."""
    _check_module(model)
    _restore(model)
    return model


def patched_ops(model: nn.Module) -> PatchedOps:
    """Return the number of modules of `model` that run each op, by its name in `patch`; {} for a
    model that is not patched. ``print(fastlm.patched_ops(model))`` also shows what stayed as it
    was."""
    plan = {m: v[1:] for m in model.modules() if (v := variant_of(m)) is not None}
    counts = _count(plan)
    heads = {_try_call(lambda m: m.get_output_embeddings(), m) for m in model.modules()} - {None}
    keeps_logits = bool(heads) and not counts["linear_cross_entropy"]
    unpatched = Counter(
        type(m).__name__
        for m in model.modules()
        if m not in plan and not _is_fastlm_module(m) and not isinstance(m, nn.Embedding)
        if any(p is not None for p in m._parameters.values()) or _is_leaf_norm(m)
        if m not in heads
    )
    return PatchedOps(counts, unpatched if counts else {}, bool(counts) and keeps_logits)


def _is_leaf_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not module._modules


def _is_fastlm_module(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "fastlm"


def _count(plan: PatchPlan) -> Counter[str]:
    counts: Counter[str] = Counter()
    for op, options in plan.values():
        if op == "attention":
            counts["rope"] += options["interleaved"] is not None
            counts["attention"] += options["implementation"] is not None
        elif op != "layer":  # a layer calls norms, which are counted already
            counts[op] += 1
    return +counts


def _restore(model: nn.Module) -> dict[int, Any]:
    """Undo `patch` for classes and attention; return the configs that named fastlm, by id."""
    configs = {}
    patched = [(m, variant) for m in model.modules() if (variant := variant_of(m)) is not None]
    for module, _ in patched:
        if "_fastlm_variant" not in vars(type(module)):  # torch's parametrize, fully_shard
            raise InputError(
                f"model: expected modules with the class that patch gave them, got"
                f" {type(module).__name__} made on top of it (unpatch before that)"
            )
    for module, (base, op, options) in patched:
        module.__class__ = base
        if op == "attention" and options["implementation"] is not None:
            config: Any = module.config
            configs[id(config)] = config
            config._attn_implementation_internal = options["implementation"]
    return configs


def _set_attention(model: nn.Module, plan: PatchPlan, configs: dict[int, Any]) -> None:
    """Set fastlm in the configs of the attention modules, in copies that only this model holds;
    those in `configs` are such copies already."""
    copies = {}
    for module, (op, options) in plan.items():
        if op == "attention" and options["implementation"] is not None:
            key, config = id(module.config), module.config
            copies.setdefault(key, config if key in configs else copy.copy(config))
    for config in copies.values():
        config._attn_implementation_internal = "fastlm"
    for module in model.modules():
        if (key := id(vars(module).get("config"))) in copies:
            module.config = copies[key]


def _plan(model: nn.Module, ops: Sequence[str]) -> PatchPlan:
    plan: PatchPlan = {}
    recognizers = {
        "rms_norm": _recognize_rms_norm, "layer_norm": _recognize_layer_norm, "glu": _recognize_glu,
        "linear_cross_entropy": _recognize_causal_lm,
    }  # fmt: skip
    recognizers = {op: recognize for op, recognize in recognizers.items() if op in ops}
    masks = {}  # module -> whether the model it belongs to leaves causality to the kernel
    for module in model.modules():
        if hasattr(module, "_supports_sdpa"):
            masks.update(dict.fromkeys(module.modules(), module._supports_sdpa))
    numbers = torch.random.fork_rng(devices=())  # a module with dropout draws some
    with numbers, torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        for module in model.modules():
            if _is_fastlm_module(module):
                continue  # runs the kernels already
            for op, recognize in recognizers.items():
                if (options := _recognize_in_both_modes(recognize, module)) is not None:
                    plan[module] = (op, options)
            options = {
                "interleaved": _try_call(_recognize_rotation, module) if "rope" in ops else None,
                "implementation": _try_call(_attention_implementation, module)
                if "attention" in ops
                else None,
            }
            if not masks.get(module, True) and not getattr(module, "is_causal", False):
                options["implementation"] = None  # its model always passes a mask
            if any(v is not None for v in options.values()):
                plan[module] = ("attention", options)
        models: list[Any] = [m for m, (op, _) in plan.items() if op == "linear_cross_entropy"]
        heads = {m.get_output_embeddings() for m in models}  # that op checks their class
        for module in model.modules() if "linear" in ops else ():
            # a module that accelerate wrapped keeps its forward
            if type(module) is nn.Linear and module not in heads and "forward" not in vars(module):
                plan[module] = ("linear", {})
        for module in model.modules() if {*NORMS} & {*ops} else ():
            if (options := _recognize_in_both_modes(_recognize_layer, module)) is not None:
                if plan.get(getattr(module, options["norm"]), (None,))[0] in NORMS:
                    plan[module] = ("layer", options)
    return plan


def _try_call(recognize: Callable, *arguments: Any) -> Any:
    """Call `recognize`. Return None where a module's forward cannot be called that way."""
    try:
        return recognize(*arguments)
    except Exception:
        return None


def _recognize_in_both_modes(recognize: Callable, module: nn.Module) -> Any:
    """Call `recognize`. Return None where training (with dropout, for example) and evaluation
    differ."""
    options = _try_call(recognize, module, True)
    is_same = options is not None and _try_call(recognize, module, False) == options
    return options if is_same else None


def _has_one_argument(module: nn.Module) -> bool:
    """Return whether the forward has one argument (a gated norm has two) and depends only on the
    module's children: a factor in a buffer that is 1 now may change later."""
    forward = inspect.signature(_code(module)).parameters
    return len(forward) == 2 and not module._buffers


def _make_stand_in(module: nn.Module, training: bool, **children: nn.Module) -> Any:
    """Return a copy of the module without hooks, with these children; tensors are not copied."""
    stand_in = object.__new__(type(module))
    vars(stand_in).update(vars(module))
    vars(stand_in)["training"] = training
    vars(stand_in).pop("forward", None)  # `patch` refuses it later
    for name in vars(module):
        if name.endswith("_hooks") and isinstance(vars(module)[name], dict):
            vars(stand_in)[name] = {}
    vars(stand_in)["_parameters"] = dict(module._parameters)
    vars(stand_in)["_modules"] = {
        name: children.get(name) or (None if child is None else _make_stand_in(child, training))
        for name, child in module._modules.items()
    }
    return stand_in


def _test_values(*shape: int, scale: float = 1.0) -> Tensor:
    """Return test values. They do not use the random generator, which belongs to the caller."""
    return (torch.arange(math.prod(shape), dtype=torch.float32).sin() * scale).reshape(shape)


def _same(a: Any, b: Tensor) -> bool:
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a, b, 1e-4, 1e-5)


class _Linear(nn.Module):
    """nn.Linear without its initialisation, which draws random numbers."""

    def __init__(self, inputs: int, outputs: int, scale: float = 1.0, *, bias: bool = False):
        super().__init__()
        self.weight = _test_values(outputs, inputs, scale=scale)
        self.bias = _test_values(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _recognize_rms_norm(module: nn.Module, training: bool) -> dict[str, Any] | None:
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if not parameters.keys() <= {"weight"} or module._modules:
        return None
    if any(p.dim() != 1 for p in parameters.values()) or not _has_one_argument(module):
        return None
    eps = next(name for name in ("variance_epsilon", "eps") if hasattr(module, name))
    stand_in = _make_stand_in(module, training)
    (width,), weight = getattr(module, "normalized_shape", (8,)), None
    if parameters:
        width = parameters["weight"].numel()
        weight = _test_values(width)
        stand_in._parameters["weight"] = nn.Parameter(weight)
    epsilon = getattr(module, eps)
    # rows whose mean squares are far above and near eps; two dimensions that are not normalized
    x = _test_values(2, 3, width) * torch.tensor([[[1.0]], [[math.sqrt(epsilon or 1e-6)]]])
    result = stand_in.forward(x)
    for offset in (0.0,) if weight is None else (0.0, 1.0):
        factor = None if weight is None else weight + offset
        if _same(result, F.rms_norm(x, (width,), factor, epsilon)):
            return {"eps": eps, "offset": offset, "has_weight": weight is not None}
    return None


def _recognize_layer_norm(module: nn.Module, training: bool) -> dict[str, Any] | None:
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    names = parameters.keys()
    if "weight" not in names or not names <= {"weight", "bias"} or module._modules:
        return None
    if any(p.dim() != 1 for p in parameters.values()) or not _has_one_argument(module):
        return None
    eps = next(name for name in ("variance_epsilon", "eps") if hasattr(module, name))
    stand_in = _make_stand_in(module, training)
    weight = _test_values(parameters["weight"].numel())
    bias = weight.flip(0) if "bias" in parameters else None
    stand_in._parameters["weight"] = nn.Parameter(weight)
    if bias is not None:
        stand_in._parameters["bias"] = nn.Parameter(bias)
    # rows whose variances are far above and near eps. A mean far above a deviation would cost the
    # digits that two correct norms must agree in
    epsilon = getattr(module, eps)
    scales = torch.tensor([[[1.0]], [[math.sqrt(epsilon)]]])
    x = (_test_values(2, 3, len(weight)) + 1.0) * scales
    same = _same(stand_in.forward(x), F.layer_norm(x, weight.shape, weight, bias, epsilon))
    return {"eps": eps, "has_bias": bias is not None} if same else None


def _recognize_glu(module: nn.Module, training: bool) -> dict[str, Any] | None:
    if not _has_one_argument(module) or module._parameters:
        return None
    # the last row exceeds every limit to which an activation is clamped
    down, x = _Linear(8, 4), _test_values(3, 4) * torch.tensor([[1.0], [1.0], [1e3]])
    if {"gate_proj", "up_proj", "down_proj"} <= module._modules.keys():
        gate, up = _Linear(4, 8, 3.0), _Linear(4, 8, -2.0)
        stand_in = _make_stand_in(module, training, gate_proj=gate, up_proj=up, down_proj=down)
        name, halves = "gate_proj", (gate(x), up(x))
    elif {"gate_up_proj", "down_proj"} <= module._modules.keys():
        both = _Linear(4, 16, 3.0)
        stand_in = _make_stand_in(module, training, gate_up_proj=both, down_proj=down)
        name, halves = "gate_up_proj", both(x).chunk(2, -1)
    else:
        return None
    result = stand_in.forward(x)
    for act, function in _ACTIVATIONS.items():
        if _same(result, down(function(halves[0]) * halves[1])):
            return {"gate": name, "act": act}
    return None


class _Affine(nn.Module):
    """A stand-in for a part of a layer: different orders or numbers of these give different
    results."""

    def __init__(self, factor: float, *extra_outputs: None):
        super().__init__()
        self.factor, self.extra_outputs = factor, extra_outputs

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        y = self.factor * hidden_states + self.factor
        return (y, *self.extra_outputs) if self.extra_outputs else y


def _recognize_layer(module: nn.Module, training: bool) -> dict[str, Any] | None:
    if module._parameters or module._buffers:
        return None
    factors = {"input_layernorm": 1.1, "mlp": 1.7, "post_attention_layernorm": 1.9}
    names: dict[str, Any] = {"after": None, "norm": "post_attention_layernorm", "last": None}
    if "pre_feedforward_layernorm" in module._modules:
        factors |= {"pre_feedforward_layernorm": 2.3, "post_feedforward_layernorm": 2.9}
        before, last = "pre_feedforward_layernorm", "post_feedforward_layernorm"
        names = {"after": "post_attention_layernorm", "norm": before, "last": last}
    parts: dict[str, nn.Module] = {name: _Affine(factor) for name, factor in factors.items()}
    parts["self_attn"] = _Affine(1.3, None)
    if not parts.keys() <= module._modules.keys():
        return None
    rest = [m for name, m in module._modules.items() if name not in parts]
    if not all(isinstance(m, nn.Dropout) and m.p == 0 for m in rest):
        return None
    x = _test_values(1, 2, 4)
    result = _make_stand_in(module, training, **parts).forward(
        x, attention_mask=None, position_ids=None, position_embeddings=None
    )
    branch, _ = parts["self_attn"](parts["input_layernorm"](x))
    stream = x + (parts[names["after"]](branch) if names["after"] else branch)
    branch = parts["mlp"](parts[names["norm"]](stream))
    expected = stream + (parts[names["last"]](branch) if names["last"] else branch)
    return names if _same(result, expected) else None


def _code(module: nn.Module) -> Any:
    """Return the innermost forward of the module's class, below its decorators."""
    return inspect.unwrap(type(module).forward)


def _recognize_rotation(module: nn.Module) -> bool | None:
    """Return whether the module's forward rotates interleaved (True) or by halves (False), or None
    where it does neither."""
    forward = _code(module)
    if ROTATE not in forward.__code__.co_names:
        return None
    rotate = forward.__globals__[ROTATE]
    q, k, angles = (
        _test_values(2, 4, 3, 8),
        _test_values(2, 2, 3, 8, scale=2.0),
        _test_values(2, 3, 4),
    )
    tables = {False: torch.cat((angles, angles), -1), True: angles.repeat_interleave(2, -1)}
    for interleaved, table in tables.items():
        pairs = zip(rotate(q, k, table.cos(), table.sin()), rope(
            q, k, table.cos(), table.sin(), interleaved=interleaved
        ))  # fmt: skip
        if all(_same(a, b) for a, b in pairs):
            return interleaved
    return None


def _attention_implementation(module: nn.Module) -> str | None:
    """Return the implementation in an attention module's config, or None where the module does not
    use transformers' registry."""
    forward, config = _code(module), vars(module).get("config")
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names or config is None:
        return None
    passed = {n for c in forward.__code__.co_consts if isinstance(c, tuple) for n in c}
    if getattr(config, "sliding_window", None) and "sliding_window" not in passed:
        return None  # the window is in a mask that fastlm does not build
    import fastlm.hf.attention_interface  # registers fastlm

    if passed & set(fastlm.hf.attention_interface.UNSUPPORTED):
        return None
    steps = list(dis.get_instructions(forward))
    for before, step in itertools.pairwise(steps):
        stored = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith("STORE_FAST") and stored[0] == "attention_mask":
            if not before.opname.startswith("LOAD_FAST"):  # not a plain copy of another mask
                return None  # computes with the mask, and assumes it has four dimensions
    return config._attn_implementation


def _recognize_causal_lm(module: nn.Module, training: bool) -> dict[str, Any] | None:
    """Run the model's own forward, with labels, on a decoder that returns a few numbers."""
    decoder = getattr(module, "base_model_prefix", None)
    if decoder not in module._modules or not hasattr(module, "loss_function"):
        return None
    head = module.get_output_embeddings()  # type: ignore[operator]
    loss = getattr(module.loss_function, "__name__", None)
    if type(head) is not nn.Linear or loss != "ForCausalLMLoss":
        return None
    from transformers import modeling_outputs

    name = next(n for n, m in module._modules.items() if m is head)
    hidden, config = _test_values(1, 5, 4, scale=6.0), module.config
    small = _Linear(4, head.out_features, 3.0, bias=head.bias is not None)
    ids = torch.arange(5)[None] % head.out_features
    labels = ids.masked_fill(ids == 1, -100)

    def run(outputs: str) -> Any:
        below = _Returns(getattr(modeling_outputs, outputs)(last_hidden_state=hidden))
        stand_in = _make_stand_in(module, training, **{decoder: below, name: small})
        return stand_in.forward(
            input_ids=ids, labels=labels, num_items_in_batch=7, return_dict=True
        )

    try:  # each class has a field that some heads read and the other class lacks
        outputs = run("BaseModelOutputWithPastAndCrossAttentions")
    except AttributeError:
        outputs = run("MoeModelOutputWithPast")
    logits = small(hidden)
    softcaps, scales = ("final_logit_softcapping",), ("logit_scale", "1/logits_scaling")
    softcaps = [None, *(n for n in softcaps if getattr(config, n, None))]
    scales = [None, *(n for n in scales if hasattr(config, n.removeprefix("1/")))]
    for softcap, scale in itertools.product(softcaps, scales):
        z = logits * logit_scale(config, scale)
        if softcap:
            z = getattr(config, softcap) * torch.tanh(z / getattr(config, softcap))
        nll = F.cross_entropy(z[0, :-1], labels[0, 1:], reduction="sum") / 7
        if _same(outputs.logits, z) and _same(outputs.loss, nll):
            options = {"decoder": decoder, "output": type(outputs)}
            return {**options, "softcap": softcap, "scale": scale}
    return None


class _Returns(nn.Module):
    """A module that returns a fixed value."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value
