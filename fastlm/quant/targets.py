"""Select the layers to quantize, with their bits and groups. Impossible options are refused here,
before any work.
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
from fastlm.model.quantized_modules import REPLACEABLE
from fastlm.ops.quantized_weight import QuantizedWeight, check_group_size
from fastlm.quant.options import FORMATS, QuantizeOptions

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

# Default group sizes: the largest that divides every width is used. 128 is the usual size. Groups
# of 32 cost half a bit per weight for their scales, so smaller ones are never the default.
GROUP_SIZES = (128, 64, 32)
MAX_NAMED_LAYERS = 5  # in an error
T = TypeVar("T")


@dataclass(frozen=True)
class Scheme:
    """The storage of a weight; see `fastlm.ops.quantize_weight`."""

    bits: int
    group_size: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Target:
    """A layer to quantize. `name`: its name in the model."""

    name: str
    module: nn.Linear | nn.Embedding
    scheme: Scheme
    act_bits: int


def select_targets(
    model: nn.Module, options: QuantizeOptions, scale_dtype: torch.dtype = torch.bfloat16
) -> list[Target]:
    """Return the layers to quantize, in the order of the model. A layer with several names occurs
    under each. Errors are those of `fastlm.quantize`.
    """
    options.check()
    bits, act_bits = FORMATS[options.format]
    overrides, head = options.formats(), find_head(model)
    if head is None and options.head not in (0, options.embeddings):
        raise InputError(
            f"head: {type(model).__name__} has no head besides its embeddings: expected 0, got"
            f" {options.head}"
        )
    selected: list[tuple[str, nn.Linear | nn.Embedding, int, int]] = []
    shared: dict[int, tuple[str, int]] = {}
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in REPLACEABLE:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        names.append(name)
        choice: str | int = 0
        if isinstance(module, nn.Embedding):
            choice = options.embeddings
        elif module is head:
            choice = options.head
        for pattern, value in overrides.items():
            if fnmatchcase(name, pattern):
                choice = value
        layer_bits, act = FORMATS[choice] if isinstance(choice, str) else (choice or bits, act_bits)
        other, other_bits = shared.setdefault(id(module.weight), (name, layer_bits))
        if other_bits != layer_bits:
            raise InputError(
                f"{'head' if module is head else 'embeddings'}: {name} shares its weight"
                f" with {other}: expected the same bits for both, got {layer_bits} and {other_bits}"
            )
        if layer_bits < 16:
            selected.append((name, module, layer_bits, act))
    for pattern in overrides:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern[:80], names, n=1, cutoff=0.0)[0]
            raise InputError(
                f"overrides: expected a pattern that matches a layer, got {pattern!r}; the nearest"
                f" layer is {nearest}"
            )
    widths = {name: module.weight.shape[1] for name, module, *_ in selected}
    size = options.group_size or choose_group_size(widths.values())
    if options.require_divisible_groups:
        check_divisible_groups(widths, size)
    return [
        Target(name, module, Scheme(layer_bits, size, options.symmetric, scale_dtype), act)
        for name, module, layer_bits, act in selected
    ]


def choose_group_size(widths: Iterable[int]) -> int:
    """Return the largest of `GROUP_SIZES` that divides every width; the smallest if none does."""
    widths = set(widths)
    divisors = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return next(divisors, GROUP_SIZES[-1])


def check_divisible_groups(widths: Mapping[str, int], group_size: int) -> None:
    """Raise InputError unless `group_size` divides the width (input features) of every layer."""
    if group_size == -1:
        return
    refused = {name: width for name, width in widths.items() if width % group_size}
    if not refused:
        return
    fits = [str(s) for s in GROUP_SIZES if all(w % s == 0 for w in widths.values())]
    raise InputError(
        "group_size: expected groups that divide the width of every layer"
        " (require_divisible_groups), got"
        f" {group_size} for {describe_layers(refused)}; {' and '.join(fits) or 'only -1'} would "
        "work"
    )


def check_layers(widths: Mapping[str, int], check: Callable[[str], T]) -> dict[str, T]:
    """Return ``check(name)`` of every layer. InputError: the error of the first refused layer, with
    the names of the others.
    """
    results: dict[str, T] = {}
    refused: dict[str, str] = {}
    for name in widths:
        try:
            results[name] = check(name)
        except InputError as error:
            refused[name] = str(error)
    if refused:
        _, *others = refused
        text = next(iter(refused.values()))
        if others:
            text += f"; also refused: {describe_layers({name: widths[name] for name in others})}"
        raise InputError(text)
    return results


def describe_layers(widths: Mapping[str, int]) -> str:
    """Name up to `MAX_NAMED_LAYERS` layers by width, some of each width, and count the others."""
    by_width: dict[int, list[str]] = {}
    for name, width in widths.items():
        by_width.setdefault(width, []).append(name)
    ranked = [(index, name) for names in by_width.values() for index, name in enumerate(names)]
    names_in_text = {
        name for _, name in sorted(ranked, key=lambda pair: pair[0])[:MAX_NAMED_LAYERS]
    }
    parts = []
    for width, names in by_width.items():
        if some := [name for name in names if name in names_in_text]:
            parts.append(f"{', '.join(some)} ({width} wide)")
    more = len(widths) - len(names_in_text)
    return " and ".join(parts) + (f" and {more} more layer{'s' * (more > 1)}" if more else "")


def find_head(model: nn.Module) -> nn.Module | None:
    """Return the output layer, by Hugging Face's conventions."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else getattr(model, "lm_head", None)


def meta_model(config: ModelConfig) -> "CausalLM":
    """Build the model on the meta device, without weights. With it a recipe's plan finds layers
    that cannot be quantized or exported before the model is trained.
    """
    from fastlm.model.causal_lm import CausalLM

    with torch.device("meta"):
        return CausalLM(config)


def meta_state(
    model: "CausalLM", targets: Sequence[Target] = ()
) -> dict[str, Tensor | QuantizedWeight]:
    """Return the state of `CausalLM.stored` with `targets` quantized, on the meta device."""
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
