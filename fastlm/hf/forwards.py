"""The forwards of the modules of a patched Hugging Face model: one function per op.

A patched module keeps its parameters, its children and its place in the model. Only its class
changes: `make_variant` makes a subclass with one of `FORWARDS` as its `forward`. So
``isinstance``, hooks, ``state_dict``, LoRA layers among the children and gradient checkpointing
stay as they were, and removing the patch means restoring the class. Rejected: a ``forward`` in the
instance's ``__dict__`` (a deep copy or a pickle would call the old module's), and other modules in
place of the old ones (hooks and references are lost).

`fastlm.hf.patching` selects the op of each module.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.operator import autocast, is_any_autocast_on
from fastlm.ops import glu, layer_norm, linear, linear_cross_entropy, rms_norm, rope


def variant_of(module: nn.Module) -> tuple[type, str, dict[str, Any]] | None:
    """Return (original class, op, options) of a patched module, None for any other."""
    variant = getattr(type(module), "_fastlm_variant", None)
    return None if variant is None else (variant[0], variant[1], dict(variant[2]))


def set_variant(module: nn.Module, op: str, **options: Any) -> None:
    """Give `module` the forward of `op`."""
    module.__class__ = make_variant(type(module), op, tuple(sorted(options.items())))


@functools.cache
def make_variant(base: type, op: str, options: tuple[tuple[str, Any], ...]) -> type:
    """Return the subclass of `base` with the forward of `op`, under the same name (transformers
    looks classes up by name). All layers share it, so torch.compile treats them as one class."""
    members = {
        "forward": FORWARDS[op](base, **dict(options)),
        "_fastlm_variant": (base, op, options),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    return type(base)(base.__name__, (base,), members)


def _reduce(self: nn.Module, protocol: Any) -> tuple:
    """Pickle how to rebuild the class, since its name refers to another class."""
    return _rebuild, type(self)._fastlm_variant, self.__getstate__()  # type: ignore[attr-defined]


def _rebuild(base: type, op: str, options: tuple) -> nn.Module:
    if op == "attention":
        import fastlm.hf.attention_interface  # noqa: F401  registers what the config names
    return object.__new__(make_variant(base, op, options))


def _rms_norm(base: type, *, eps: str, offset: float, has_weight: bool) -> Callable:
    @functools.wraps(base.forward)
    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        epsilon = getattr(self, eps)
        if epsilon is None:  # torch's own RMSNorm
            epsilon = torch.finfo(hidden_states.dtype).eps
        weight = self.weight if has_weight else None
        return rms_norm(hidden_states, weight, epsilon, residual=residual, offset=offset)

    return forward


def _layer_norm(base: type, *, eps: str, has_bias: bool) -> Callable:
    @functools.wraps(base.forward)
    def forward(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Any:
        bias = self.bias if has_bias else None
        return layer_norm(hidden_states, self.weight, bias, getattr(self, eps), residual=residual)

    return forward


def _glu(base: type, *, gate: str, act: str) -> Callable:
    projections = {gate, "up_proj", "down_proj"}

    @functools.wraps(base.forward)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if any(_has_hooks(m) for name, m in self._modules.items() if name not in projections and m):
            return base.forward(self, hidden_states)  # a hook looks at the activation
        if gate == "gate_up_proj":
            halves = self.gate_up_proj(hidden_states).chunk(2, -1)
        else:
            halves = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return self.down_proj(glu(*halves, act=act))

    return forward


def _linear(base: type) -> Callable:
    @functools.wraps(base.forward)
    def forward(self: Any, input: Tensor) -> Tensor:
        # fastlm's products are bfloat16 on a CPU; a further check costs 2 us per layer
        if not input.is_cpu or (input.dtype is not torch.bfloat16 and not is_any_autocast_on()):
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)

    return forward


def _attention(base: type, *, interleaved: bool | None, implementation: str | None) -> Callable:
    """Return the forward of an attention module. `interleaved`: how heads are rotated; None: the
    rotation stays. `implementation`: the earlier value of config._attn_implementation; None: it
    stays."""
    if interleaved is None:
        return base.forward
    original = inspect.unwrap(base.forward)
    original_rotate = original.__globals__[ROTATE]

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *extra: Any, unsqueeze_dim: int = 1
    ) -> Any:
        if extra:  # position_ids, or a positional unsqueeze_dim
            return original_rotate(q, k, cos, sin, *extra)
        if unsqueeze_dim == 1:
            return rope(q, k, cos, sin, interleaved=interleaved, rotary_dim=cos.shape[-1])
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    # The model's own code with one global name replaced. Without __name__, since torch.compile
    # would use it to look names up in the module instead.
    names = {k: v for k, v in original.__globals__.items() if k != "__name__"}
    names[ROTATE] = rotate
    forward = types.FunctionType(
        original.__code__, names, "forward", original.__defaults__, original.__closure__
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    return functools.wraps(base.forward)(forward)


def _layer(base: type, *, after: str | None, norm: str, last: str | None) -> Callable:
    """Return the forward of a decoder layer that fuses addition and norm. `after`, `norm` and
    `last` are the names of the norms after attention, before the MLP and after it.

    Where the layer passes a float32 stream to projections that autocast runs in 16 bits, the norm's
    output is cast here once, not by every projection (if the module is known to project).
    """
    parameters = list(inspect.signature(inspect.unwrap(base.forward)).parameters)[2:]

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(parameters, args))
        x = _cast_for(self.self_attn, self.input_layernorm(hidden_states))
        branch, _ = self.self_attn(hidden_states=x, **kwargs)
        if after:
            branch = getattr(self, after)(branch)
        middle = getattr(self, norm)
        if branch.dtype == hidden_states.dtype and not _has_hooks(middle):
            x, stream = middle(branch, residual=hidden_states)
        else:
            stream = hidden_states + branch
            x = middle(stream)
        branch = self.mlp(_cast_for(self.mlp, x))
        return stream + (getattr(self, last)(branch) if last else branch)

    return functools.wraps(base.forward)(forward)


def _cast_for(module: nn.Module, x: Tensor) -> Tensor:
    return x if variant_of(module) is None else autocast(x)[0]


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks read the module's inputs or outputs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _linear_cross_entropy(
    base: type, *, decoder: str, output: type, softcap: str | None, scale: str | None
) -> Callable:
    """Return a forward that computes the loss without logits. Without labels it runs the model's
    own forward.

    An evaluation (eval mode without gradients) returns logits, too, since Trainer's compute_metrics
    needs them. The call's `skip_logits`, named as in Liger-Kernel, forces either behaviour.

    `decoder`: name of the child below the head. `output`: what the forward returns. `softcap`: name
    in the config. `scale`: "attribute" or "1/attribute" of the config, by which logits are
    multiplied.
    """
    parameters = list(inspect.signature(inspect.unwrap(base.forward)).parameters)[1:]
    fields = {f.name for f in dataclasses.fields(output)} - {"loss", "logits"}

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        skip = kwargs.pop("skip_logits", None)
        if skip is None:
            skip = self.training or torch.is_grad_enabled()
        arguments = dict(zip(parameters, args)) | kwargs
        labels, logits_to_keep = arguments.pop("labels", None), arguments.pop("logits_to_keep", 0)
        head = self.get_output_embeddings()
        if (
            labels is None
            or not skip
            or not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
            or type(head) is not nn.Linear  # LoRA, quantized: their own product runs
            or _has_hooks(head)
            or getattr(self.loss_function, "__name__", None) != "ForCausalLMLoss"
            or _has_router_loss(self.config, arguments)
            or variant_of(self) is None  # a forward that accelerate wrapped outlives `unpatch`
        ):
            return base.forward(self, *args, **kwargs)
        return_dict = arguments.pop("return_dict", None)
        outputs = getattr(self, decoder)(**arguments)
        ignore = arguments.get("ignore_index", -100)
        target = arguments.get("shift_labels")
        if target is None:
            target = F.pad(labels, (0, 1), value=ignore)[..., 1:]
        hidden = outputs.last_hidden_state
        loss = linear_cross_entropy(
            hidden,
            head.weight,
            target.to(hidden.device),
            linear_bias=head.bias,
            ignore_index=ignore,
            softcap=getattr(self.config, softcap) if softcap else None,
            logit_scale=logit_scale(self.config, scale),
            num_items=arguments.get("num_items_in_batch"),
        )
        out = output(loss=loss, **{k: v for k, v in outputs.items() if k in fields})
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return out if as_dict else out.to_tuple()

    return forward


def _has_router_loss(config: Any, arguments: dict[str, Any]) -> bool:
    """Return whether a mixture of experts adds the routers' loss to the model's."""
    value = arguments.get("output_router_logits")
    return getattr(config, "output_router_logits", False) if value is None else value


def logit_scale(config: Any, name: str | None) -> float:
    """Return the factor on logits: the attribute ``name`` of the config, or its inverse."""
    if name is None:
        return 1.0
    value = getattr(config, name.removeprefix("1/"))
    return 1 / value if name.startswith("1/") else value


ROTATE = "apply_rotary_pos_emb"  # the rotation's name in every model of transformers
FORWARDS: dict[str, Callable[..., Callable]] = {
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "glu": _glu,
    "attention": _attention,
    "layer": _layer,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
}
