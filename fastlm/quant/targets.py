"""Which layers are quantized, to how many bits and in which groups. All of it is decided, and what
cannot work refused, before any work.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.model.quantized_modules import REPLACED
from fastlm.ops.quantized_weight import QuantizedWeight, check_group_size
from fastlm.quant.options import FORMATS, QuantizeOptions

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

# Group sizes to choose from: the largest that divides every width. 128 is the field's. Groups of 32
# cost half a bit per weight for their scales, so smaller ones are left to the user.
GROUP_SIZES = (128, 64, 32)
NAMED = 5  # layers that an error names
T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """How a weight is stored: see `fastlm.ops.quantize_weight`."""

    bits: int
    group_size: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Target:
    """A layer to be quantized. `name` is that in its model."""

    name: str
    module: nn.Linear | nn.Embedding
    scheme: Scheme
    act_bits: int


def select_targets(
    model: nn.Module, options: QuantizeOptions, scale_dtype: torch.dtype = torch.bfloat16
) -> list[Target]:
    """The layers to quantize, in the order of the model. A layer that occurs under several names is
    there under each. Errors are those of `fastlm.quantize`.
    """
    options.check()
    bits, act_bits = FORMATS[options.format]
    overrides, head = options.formats(), find_head(model)
    if head is None and options.head not in (0, options.embeddings):
        raise InputError(
            f"head: {type(model).__name__} has none beside its embeddings: expected 0, got"
            f" {options.head}"
        )
    chosen: list[tuple[str, nn.Linear | nn.Embedding, int, int]] = []
    shared: dict[int, tuple[str, int]] = {}
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in REPLACED:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        names.append(name)
        wish: str | int = 0
        if isinstance(module, nn.Embedding):
            wish = options.embeddings
        elif module is head:
            wish = options.head
        for pattern, value in overrides.items():
            if fnmatchcase(name, pattern):
                wish = value
        own, act = FORMATS[wish] if isinstance(wish, str) else (wish or bits, act_bits)
        other, before = shared.setdefault(id(module.weight), (name, own))
        if before != own:
            raise InputError(
                f"{'head' if module is head else 'embeddings'}: {name} shares its weight"
                f" with {other}: expected the same bits for both, got {own} and {before}"
            )
        if own < 16:
            chosen.append((name, module, own, act))
    for pattern in overrides:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern[:80], names, n=1, cutoff=0.0)[0]
            raise InputError(
                f"overrides: expected a pattern that matches a layer, got {pattern!r}; the nearest"
                f" layer is {near}"
            )
    widths = {name: module.weight.shape[1] for name, module, *_ in chosen}
    size = options.group_size or choose_group_size(widths.values())
    if options.require_divisible_groups:
        check_divisible_groups(widths, size)
    return [
        Target(name, module, Scheme(own, size, options.symmetric, scale_dtype), act)
        for name, module, own, act in chosen
    ]


def choose_group_size(widths: Iterable[int]) -> int:
    """The largest of `GROUP_SIZES` that divides every width; the smallest if none does."""
    widths = set(widths)
    whole = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return next(whole, GROUP_SIZES[-1])


def check_divisible_groups(widths: Mapping[str, int], group_size: int) -> None:
    """Raise InputError unless `group_size` divides the width (input features) of every layer."""
    if group_size == -1:
        return
    bad = {name: width for name, width in widths.items() if width % group_size}
    if not bad:
        return
    fits = [str(s) for s in GROUP_SIZES if all(w % s == 0 for w in widths.values())]
    raise InputError(
        "group_size: expected groups that divide the width of every layer"
        " (require_divisible_groups), got"
        f" {group_size} for {describe_layers(bad)}; {' and '.join(fits) or 'only -1'} would do"
    )


def check_layers(widths: Mapping[str, int], check: Callable[[str], T]) -> dict[str, T]:
    """Return ``check(name)`` of every layer. InputError: that of the first layer it refuses, with
    the names of the others.
    """
    found: dict[str, T] = {}
    refused: dict[str, str] = {}
    for name in widths:
        try:
            found[name] = check(name)
        except InputError as error:
            refused[name] = str(error)
    if refused:
        _, *others = refused
        text = next(iter(refused.values()))
        if others:
            text += f"; refused too: {describe_layers({name: widths[name] for name in others})}"
        raise InputError(text)
    return found


def describe_layers(widths: Mapping[str, int]) -> str:
    """Name up to `NAMED` layers by width, some of each width, and count the others."""
    alike: dict[int, list[str]] = {}
    for name, width in widths.items():
        alike.setdefault(width, []).append(name)
    ranked = [(place, name) for names in alike.values() for place, name in enumerate(names)]
    shown = {name for _, name in sorted(ranked, key=lambda pair: pair[0])[:NAMED]}
    parts = []
    for width, names in alike.items():
        if some := [name for name in names if name in shown]:
            parts.append(f"{', '.join(some)} ({width} wide)")
    more = len(widths) - len(shown)
    return " and ".join(parts) + (f" and {more} more layer{'s' * (more > 1)}" if more else "")


def find_head(model: nn.Module) -> nn.Module | None:
    """Return the output layer, by Hugging Face's conventions."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else getattr(model, "lm_head", None)


def meta_model(config: ModelConfig) -> "CausalLM":
    """The model without its weights, on the meta device: a recipe's plan finds what cannot be
    quantized or exported before the model is trained.
    """
    from fastlm.model.causal_lm import CausalLM

    with torch.device("meta"):
        return CausalLM(config)


def meta_state(
    model: "CausalLM", targets: Sequence[Target] = ()
) -> dict[str, Tensor | QuantizedWeight]:
    """What `CausalLM.stored` returns once `targets` are quantized, on the meta device."""
    state = model.weights()
    for target in targets:
        (n, k), scheme = target.module.weight.shape, target.scheme
        groups = -(-k // check_group_size(scheme.group_size, k))
        width, dtype = (k, torch.int8) if scheme.bits == 8 else (-(-k // 2), torch.uint8)
        scales = torch.empty(n, groups, dtype=scheme.scale_dtype, device="meta")
        state[f"{target.name}.weight"] = QuantizedWeight(
            torch.empty(n, width, dtype=dtype, device="meta"), scales,
            None if scheme.symmetric else torch.empty_like(scales),
            scheme.bits, scheme.group_size, (n, k),
        )  # fmt: skip
    return state
