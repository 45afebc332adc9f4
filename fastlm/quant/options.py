"""The options of the stage `quantize` and of `fastlm.quantize`."""

from dataclasses import dataclass
from typing import Annotated

from fastlm.errors import InputError

FORMATS = {"w4a16": (4, 16), "w8a16": (8, 16), "w8a8": (8, 8), "w4a8": (4, 8)}
METHODS = ("rtn", "gptq", "autoround")


@dataclass(frozen=True)
class QuantizeOptions:
    """The options of rounding; `fastlm.quantize` describes each of them."""

    format: Annotated[str, "Quantize to w4a16, w8a16, w8a8 or w4a8"] = "w4a16"
    group_size: Annotated[
        int | None,
        "Share a scale among this many weights; default: the largest of 128, 64 and 32 that"
        " divides",
    ] = None
    method: Annotated[
        str,
        "Round by rtn (to nearest) or, with calibration text, by gptq or autoround (the slowest)",
    ] = "rtn"
    awq: Annotated[
        bool | None,
        "Scale features by their size before rounding (AWQ); needs calibration text; default: with"
        " the default method of 4 bits",
    ] = None
    embeddings: Annotated[
        int, "Quantize the embedding to this many bits; 16: unchanged; 0: as the format"
    ] = 0
    head: Annotated[
        int, "Quantize the output head to this many bits; 16: unchanged; 0: as the format"
    ] = 0
    overrides: Annotated[
        tuple[str, ...], "Override the format by layer name, such as *.down_proj=w8a16,lm_head=16"
    ] = ()
    symmetric: Annotated[bool, "Store scales only; otherwise every group has an offset, too"] = True
    require_divisible_groups: Annotated[
        bool, "Refuse a group size that does not divide a layer's width, as vLLM does"
    ] = False
    iterations: Annotated[int, "Run autoround for this many steps per decoder layer"] = 200
    distill_steps: Annotated[
        int,
        "Train towards the unquantized model's predictions for this many steps at the end; needs "
        "text",
    ] = 0
    seed: Annotated[int, "Choose and order text, and run autoround, with this seed"] = 0

    def check(self) -> None:
        """Raise InputError for options that no model allows."""
        from fastlm.ops.quantized_weight import ANY_K, check_group_size

        for name, value, choices in (
            ("format", self.format, FORMATS), ("method", self.method, METHODS),
        ):  # fmt: skip
            if value not in choices:
                raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
        if self.group_size is not None:
            check_group_size(self.group_size, ANY_K)
        for name, bits in (("embeddings", self.embeddings), ("head", self.head)):
            if bits not in (0, 4, 8, 16):
                raise InputError(f"{name}: expected 4, 8, 16 or 0 (as the format), got {bits!r}")
        for pattern, value in self.formats().items():
            if value not in (*FORMATS, 4, 8, 16):
                raise InputError(
                    f"overrides: {pattern}: expected one of {', '.join(FORMATS)}, 4, 8 or 16"
                    f" (unchanged), got {value!r}"
                )
        if self.iterations < 1:
            raise InputError(f"iterations: expected 1 or more, got {self.iterations}")
        if type(self.distill_steps) is not int or self.distill_steps < 0:
            raise InputError(
                f"distill_steps: expected a number of steps, 0 or more, got {self.distill_steps!r}"
            )
        if self.seed < 0:
            raise InputError(f"seed: expected 0 or more, got {self.seed}")

    def formats(self) -> dict[str, str | int]:
        """Parse the overrides: pattern of names -> format or bits."""
        formats: dict[str, str | int] = {}
        for entry in self.overrides:
            pattern, _, value = entry.partition("=")
            if not (pattern and value):
                raise InputError(
                    "overrides: expected PATTERN=FORMAT, such as *.down_proj=w8a16, got"
                    f" {entry!r:.80}"
                )
            formats[pattern] = int(value) if value.isdecimal() else value
        return formats
