"""Which layers are quantized, to how many bits and in which groups. All of it is decided, and what
cannot work refused, before any work.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import nn

from fastlm.errors import InputError
from fastlm.model.quantized_modules import REPLACED
from fastlm.ops.quantized_weight import ANY_K, check_group_size

FORMATS = {"w4a16": (4, 16), "w8a16": (8, 16), "w8a8": (8, 8), "w4a8": (4, 8)}
# Other subclasses may compute something else with their weight.
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


def check_plan_options(
    format: str,
    group_size: int | None,
    embeddings: int | None,
    head: int | None,
    overrides: Mapping[str, str | int] | None,
) -> None:
    """Raise InputError for options that `plan_of` refuses for every model."""
    if format not in FORMATS:
        raise InputError(f"format: wanted one of {', '.join(FORMATS)}, got {format!r}")
    if group_size is not None:
        check_group_size(group_size, ANY_K)
    for name, wish in (("embeddings", embeddings), ("head", head)):
        if wish not in (None, 0, 4, 8, 16):
            raise InputError(f"{name}: wanted 4, 8, 16 or 0 (as the format), got {wish!r}")
    for pattern, wish in (overrides or {}).items():
        if wish not in (*FORMATS, 4, 8, 16):
            raise InputError(
                f"overrides: {pattern}: wanted one of {', '.join(FORMATS)}, 4, 8 or 16 (unchanged),"
                f" got {wish!r}"
            )


def plan_of(
    model: nn.Module,
    format: str,
    *,
    group_size: int | None,
    symmetric: bool,
    scale_dtype: torch.dtype,
    embeddings: int | None,
    head: int | None,
    overrides: Mapping[str, str | int] | None,
    whole_groups: bool = False,
) -> list[Target]:
    """The layers to quantize, in the order of the model. A layer that occurs under several names is
    there under each. Arguments and errors are those of `fastlm.quantize`.
    """
    check_plan_options(format, group_size, embeddings, head, overrides)
    bits, act_bits = FORMATS[format]
    head_module = find_head(model)
    if head_module is None and head not in (0, embeddings):
        raise InputError(
            f"head: {type(model).__name__} has none beside its embeddings: wanted 0, got {head}"
        )
    chosen: list[tuple[str, nn.Linear | nn.Embedding, int, int]] = []
    wishes: dict[int, tuple[str, int]] = {}
    names = []
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) not in REPLACED:
            continue
        assert isinstance(module, nn.Linear | nn.Embedding)
        names.append(name)
        own: str | int | None = 0
        if isinstance(module, nn.Embedding):
            own = embeddings
        elif module is head_module:
            own = head
        for pattern, value in (overrides or {}).items():
            if fnmatchcase(name, pattern):
                own = value
        wish, act = FORMATS[own] if isinstance(own, str) else (own, act_bits)
        wish = {0: bits, None: 16}.get(wish, wish)
        assert wish is not None
        other, before = wishes.setdefault(id(module.weight), (name, wish))
        if before != wish:
            raise InputError(
                f"{'head' if module is head_module else 'embeddings'}: {name} shares its weight"
                f" with {other}: wanted the same bits for both, got {wish} and {before}"
            )
        if wish < 16:
            chosen.append((name, module, wish, act))
    for pattern in overrides or {}:
        if names and not any(fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern[:80], names, n=1, cutoff=0.0)[0]
            raise InputError(
                f"overrides: wanted a pattern that matches a layer, got {pattern!r}; the nearest"
                f" layer is {near}"
            )
    widths = {name: module.weight.shape[1] for name, module, *_ in chosen}
    size = choose_group_size(widths.values()) if group_size is None else group_size
    if whole_groups:
        check_whole_groups(widths, size)
    return [
        Target(name, module, Scheme(wish, size, symmetric, scale_dtype), act)
        for name, module, wish, act in chosen
    ]


def choose_group_size(widths: Iterable[int]) -> int:
    """The largest of `GROUP_SIZES` that divides every width; the smallest if none does."""
    widths = set(widths)
    whole = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return next(whole, GROUP_SIZES[-1])


def check_whole_groups(
    widths: Mapping[str, int], group_size: int, wanted_by: str = "whole_groups"
) -> None:
    """Raise InputError unless `group_size` divides the width (input features) of every layer.
    ``wanted_by``: the option or file format that demands it.
    """
    if group_size == -1:
        return
    bad = {name: width for name, width in widths.items() if width % group_size}
    if not bad:
        return
    fits = [str(s) for s in GROUP_SIZES if all(w % s == 0 for w in widths.values())]
    raise InputError(
        f"group_size: {wanted_by} wants groups that divide the width of every layer, got"
        f" {group_size} for {layers_text(bad)}; {' and '.join(fits) or 'only -1'} would do"
    )


def check_each(widths: Mapping[str, int], check: Callable[[str], T]) -> dict[str, T]:
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
            text += f"; refused too: {layers_text({name: widths[name] for name in others})}"
        raise InputError(text)
    return found


def layers_text(widths: Mapping[str, int]) -> str:
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


def parse_overrides(entries: Iterable[str]) -> dict[str, str | int]:
    """``["*.down_proj=w8a16", "lm_head=16"]`` as `fastlm.quantize` takes it."""
    found: dict[str, str | int] = {}
    for entry in entries:
        pattern, equals, wish = entry.partition("=")
        if not (pattern and equals and wish):
            raise InputError(f"overrides: wanted PATTERN=FORMAT, such as *.down_proj=w8a16, got"
                             f" {entry!r:.80}")  # fmt: skip
        found[pattern] = int(wish) if wish.isdecimal() else wish
    return found


def find_head(model: nn.Module) -> nn.Module | None:
    """Return the output layer, by Hugging Face's conventions."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else getattr(model, "lm_head", None)
