"""The stage that writes a model for other programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext

FORMATS = ("gguf", "compressed-tensors")
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Export(Stage):
    """Write a model for llama.cpp (gguf) or vLLM (compressed-tensors)."""

    kind = "export"
    command = ("export",)
    inputs = {
        "model": InputSpec(
            ("quantized", "model"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            flag="m",
        ),
    }  # fmt: skip
    outputs = {"exported": "."}
    result = {"format": str, "bytes": int, "formats": dict}
    notes = (
        "Nothing is quantized again: a weight that the format cannot store is refused, with the"
        f" group size that would work. gguf writes {GGUF_FILE} into the folder."
    )

    format: Annotated[str, "Export to gguf or compressed-tensors"] = "gguf"

    def check(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        (facts,) = inputs["model"]
        if (config := facts.get("config")) is None:
            return {}
        from fastlm.export.compressed_tensors_write import check_compressed_tensors
        from fastlm.export.gguf_write import check_gguf
        from fastlm.quant.targets import meta_model, meta_state

        weights = facts.get("weights") or meta_state(meta_model(config))
        if self.format == "gguf":
            check_gguf(config, weights)
        elif any(w.zeros is not None for w in check_compressed_tensors(weights).values()):
            raise InputError(
                "model: expected offsets of whole steps for compressed-tensors, got those that"
                " quantize finds: quantize symmetrically"
            )
        return {}

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.export.compressed_tensors_write import save_compressed_tensors
        from fastlm.export.gguf_write import save_gguf
        from fastlm.model.load import load_model
        from fastlm.quant.stage import check_output_folder

        (source,) = ctx.inputs["model"]
        check_output_folder(ctx.out, source.source)
        model, tokenizer = load_model(source.source)
        state = model.weights()
        if self.format == "gguf":
            name = Path(source.source).stem.removeprefix("model:") or "model"
            export_info = save_gguf(ctx.out / GGUF_FILE, model.config, state, tokenizer, name)
            size = (ctx.out / GGUF_FILE).stat().st_size
        else:
            export_info = save_compressed_tensors(
                ctx.out, model.config.to_dict(), state, model.dtype
            )
            tokenizer.save(ctx.out)
            size = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
            rounding_modules = [m for m in model.modules() if getattr(m, "act_bits", 16) == 8]
            export_info["activations_unrounded"] = bool(rounding_modules)
        return {"format": self.format, "bytes": size, **export_info}

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        weights = ", ".join(f"{count} {format}" for format, count in result["formats"].items())
        text = f"{ctx.out}: {result['format']}, {result['bytes'] / 1e6:,.2f} MB, weights: {weights}"
        if names := result.get("dequantized"):
            text += f"; as floats: {', '.join(names)}"
        if result.get("activations_unrounded"):
            text += "; activations, rounded to int8 in this model, are not rounded there"
        if count := result.get("rounded_scales"):
            text += f"; {count:,} scales rounded to float16"
        return text

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        del ctx
        kinds = {kind: f"{count:,} weights" for kind, count in result["formats"].items()}
        facts = {"format": result["format"], "size": f"{result['bytes'] / 1e6:,.2f} MB", **kinds}
        return ReportSection("Written for other programs", facts=facts)
