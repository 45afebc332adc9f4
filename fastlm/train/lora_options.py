"""The options of stages that can train adapters (LoRA, QLoRA) instead of all weights. Nothing here
imports torch before a model is loaded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import not_negative, positive
from fastlm.train.options import expect

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


@dataclass(frozen=True)
class LoraOptions:
    """The options of LoRA. A stage with them loads its model by `load_trained` and writes it by
    `save_trained`. With ``lora_rank`` 0 all weights are trained.
    """

    lora_rank: Annotated[int, "Train LoRA adapters of this rank; 0: train all weights"] = 0
    lora_alpha: Annotated[
        float | None, "Scale adapters by alpha / rank; default: twice the rank"
    ] = None
    lora_targets: Annotated[
        tuple[str, ...], "Adapt these layers: all-linear, or names such as q_proj,v_proj"
    ] = ("all-linear",)
    lora_dropout: Annotated[
        float, "Apply dropout with this probability to the adapters' inputs"
    ] = 0.0
    use_dora: Annotated[bool, "Also train the norm of each row of the adapted weights (DoRA)"] = (
        False
    )
    base_bits: Annotated[
        int,
        "Store the frozen weights in this many bits: 4 or 8 (int4 or int8, QLoRA), or 16 (floats)",
    ] = 16
    base_group_size: Annotated[
        int, "Share a scale among this many weights, with base_bits 4 or 8"
    ] = 64
    merge: Annotated[bool, "Write a merged model; otherwise an adapter in PEFT's format"] = True

    def check_lora(self) -> None:
        """Check the values. InputError names the option."""
        not_negative(self, "lora_rank")
        expect(self.base_bits in (4, 8, 16), "base_bits", "4, 8 or 16", self.base_bits)
        if not self.lora_rank:
            for f in fields(LoraOptions):
                value = getattr(self, f.name)
                if value != f.default:
                    raise InputError(
                        f"{f.name}: needs lora_rank above 0 (0 trains all weights), got {value}"
                    )
        muon = self.lora_rank and getattr(self, "optimizer", "adamw") == "muon"
        expect(not muon, "optimizer", "adamw to train adapters", "muon")
        positive(self, "lora_alpha")
        expect(self.lora_targets, "lora_targets", "all-linear or names of layers", "none")
        dropout = self.lora_dropout
        expect(0 <= dropout < 1, "lora_dropout", "a share in [0, 1)", dropout)
        if self.base_bits < 16:
            from fastlm.ops.quantized_weight import ANY_K, check_group_size

            check_group_size(self.base_group_size, ANY_K)

    def load_trained(
        self,
        source: str | Path,
        *,
        dtype: str,
        seed: int,
        warn: Callable[[str], None] = lambda line: None,
    ) -> "CausalLM":
        """Load the model at ``source`` to train it: in float32, or with adapters and everything
        else frozen in ``dtype`` ("bfloat16", "float32"), int4 or int8. ``seed`` is for the
        adapters. ``warn`` receives a message if a part of a quantized base's format is lost.
        """
        import torch

        from fastlm.model.causal_lm import CausalLM
        from fastlm.model.lora import add_lora
        from fastlm.pipeline.run_folder import is_adapter, locate_model
        from fastlm.quant import quantize

        if not self.lora_rank:
            return CausalLM.from_pretrained(source, dtype=torch.float32, keep_quantized=False)
        if not self.merge and is_adapter(locate_model(Path(source))):
            raise InputError(f"merge: expected true on top of an adapter, {source}, got false")
        model = CausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
        bits = self._keep_quantized_base(model, warn)
        if bits and self.base_bits == 16:
            del model  # otherwise two are in memory
            model = CausalLM.from_pretrained(
                source, dtype=getattr(torch, dtype), keep_quantized=False
            )
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        add_lora(
            model, self.lora_rank, alpha, targets=self.lora_targets, dropout=self.lora_dropout,
            use_dora=self.use_dora, seed=seed,
        )  # fmt: skip
        if self.base_bits < 16 and not bits:
            # the loss needs the head as a matrix: a quantized one would be dequantized in every
            # step
            quantize(
                model, f"w{self.base_bits}a16", group_size=self.base_group_size, embeddings=16,
                head=16,
            )  # fmt: skip
        return model

    def _keep_quantized_base(self, model: "CausalLM", warn: Callable[[str], None]) -> list[int]:
        """Return the bits of the quantized layers, and stop the rounding of their activations."""
        from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear

        layers = [m for m in model.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
        bits = sorted({m.bits for m in layers})
        got = " and ".join(f"int{b}" for b in bits)
        if bits and self.base_bits == 16:
            warn(f"base_bits: 16 dequantizes the base, which is {got}; 4 or 8 keep it as it is")
            return bits
        if bits and bits != [self.base_bits]:
            warn(
                f"base_bits: expected {self.base_bits}, got a base of {got}, which keeps its format"
            )
        if rounded := sum(m.act_bits == 8 for m in layers if isinstance(m, QuantizedLinear)):
            warn(
                f"model: {rounded} layers of the base round activations to int8; the training and a"
                " merged model do not (act_bits 16)"
            )
        for module in model.modules():
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                module.act_bits = 16
        return bits

    def save_trained(self, model: "CausalLM", folder: Path, source: str | Path) -> None:
        """Write the model to ``folder``: merged, or with ``merge`` False its adapters alone, which
        name ``source`` as their base.
        """
        from fastlm.model.adapter import save_adapter
        from fastlm.model.lora import merge_lora

        if self.lora_rank and not self.merge:
            save_adapter(model, folder, base=source)
        else:
            merge_lora(model).save_pretrained(folder)

    def lora_facts(self, result: Mapping[str, Any]) -> dict[str, str]:
        """Return the report's facts about adapters, or none if all weights are trained. ``result``
        has "parameters" and "trained_parameters".
        """
        if not self.lora_rank:
            return {}
        base = "16-bit" if self.base_bits == 16 else f"int{self.base_bits}"
        method = "DoRA" if self.use_dora else "LoRA"
        share = 100 * result["trained_parameters"] / result["parameters"]
        return {
            "adapters": f"{method} of rank {self.lora_rank} on {', '.join(self.lora_targets)},"
            f" {result['trained_parameters']:,} parameters trained ({share:.2g} %), {base} base"
        }
