"""The options of a quantization: those of the stage and of `fastlm.quantize`."""

from dataclasses import dataclass
from typing import Annotated

from fastlm.errors import InputError

FORMATS = {"w4a16": (4, 16), "w8a16": (8, 16), "w8a8": (8, 8), "w4a8": (4, 8)}
METHODS = ("rtn", "gptq", "autoround")


@dataclass(frozen=True)
class QuantizeOptions:
    """How the weights are rounded; `fastlm.quantize` describes each option."""

    format: Annotated[str, "w4a16, w8a16, w8a8 or w4a8"] = "w4a16"
    group_size: Annotated[
        int | None, "Weights that share a scale; default: 128, or 64 or 32 where it does not divide"
    ] = None
    method: Annotated[
        str, "rtn: round to nearest; with calibration text also gptq, or autoround, the slowest"
    ] = "rtn"
    awq: Annotated[
        bool, "Scale features by their size before rounding (AWQ); wants calibration text"
    ] = False
    embeddings: Annotated[int, "Bits of the embedding; 16: unchanged; 0: as the format"] = 0
    head: Annotated[int, "Bits of the output head; 16: unchanged; 0: as the format"] = 0
    overrides: Annotated[
        tuple[str, ...], "Other formats by name of layer, such as *.down_proj=w8a16,lm_head=16"
    ] = ()
    symmetric: Annotated[bool, "Scales alone; otherwise every group has an offset too"] = True
    require_divisible_groups: Annotated[
        bool, "Refuse a group size that does not divide a layer's width, as vLLM does"
    ] = False
    iterations: Annotated[int, "Steps of autoround per decoder layer"] = 200
    distill_steps: Annotated[
        int, "Last, steps of training towards the unquantized model's predictions; wants text"
    ] = 0
    seed: Annotated[int, "Of the choice and order of text and the draws of autoround"] = 0

    def check(self) -> None:
        """Raise InputError for options that are refused for every model."""
        from fastlm.ops.quantized_weight import ANY_K, check_group_size

        for name, value, known in (
            ("format", self.format, FORMATS), ("method", self.method, METHODS),
        ):  # fmt: skip
            if value not in known:
                raise InputError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        if self.group_size is not None:
            check_group_size(self.group_size, ANY_K)
        for name, bits in (("embeddings", self.embeddings), ("head", self.head)):
            if bits not in (0, 4, 8, 16):
                raise InputError(f"{name}: expected 4, 8, 16 or 0 (as the format), got {bits!r}")
        for pattern, wish in self.formats().items():
            if wish not in (*FORMATS, 4, 8, 16):
                raise InputError(
                    f"overrides: {pattern}: expected one of {', '.join(FORMATS)}, 4, 8 or 16"
                    f" (unchanged), got {wish!r}"
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
        """The overrides: pattern of names -> format or bits."""
        found: dict[str, str | int] = {}
        for entry in self.overrides:
            pattern, _, wish = entry.partition("=")
            if not (pattern and wish):
                raise InputError(
                    "overrides: expected PATTERN=FORMAT, such as *.down_proj=w8a16, got"
                    f" {entry!r:.80}"
                )
            found[pattern] = int(wish) if wish.isdecimal() else wish
        return found
