"""The stage that writes a model for other programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Facts, Job, Part, Stage, Takes

FORMATS = ("gguf", "compressed-tensors")
GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class Export(Stage):
    """Write a model for llama.cpp (gguf) or vLLM (compressed-tensors)."""

    kind = "export"
    command = ("export",)
    reads = {
        "model": Takes(
            ("quantized", "model"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            flag="m",
        ),
    }  # fmt: skip
    leaves = {"exported": "."}
    result = {"format": str, "bytes": int, "formats": dict}
    notes = (
        "Nothing is quantized again: a weight that the format cannot hold is refused, with the"
        f" group size that would do. gguf writes {GGUF_FILE} into the folder."
    )

    format: Annotated[str, "gguf or compressed-tensors"] = "gguf"

    def check(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        (facts,) = inputs["model"]
        if (config := facts.get("config")) is None:
            return {}
        from fastlm.export.compressed_tensors_write import check_compressed_tensors
        from fastlm.export.gguf_write import check_gguf
        from fastlm.quant.plan import outline, stored_outline

        stored = facts.get("stored") or stored_outline(outline(config))
        if self.format == "gguf":
            check_gguf(config, stored)
        elif any(w.zeros is not None for w in check_compressed_tensors(stored).values()):
            raise InputError(
                "model: expected offsets of whole steps for compressed-tensors, got those that"
                " quantize finds: quantize symmetrically"
            )
        return {}

    def run(self, job: Job) -> dict[str, Any]:
        from fastlm.export.compressed_tensors_write import save_compressed_tensors
        from fastlm.export.gguf_write import save_gguf
        from fastlm.model.load import load_model
        from fastlm.quant.stage import check_out

        (source,) = job.inputs["model"]
        check_out(job.out, source.where)
        model, tokenizer = load_model(source.where)
        state = model.stored()
        if self.format == "gguf":
            name = Path(source.where).stem.removeprefix("model:") or "model"
            told = save_gguf(job.out / GGUF_FILE, model.config, state, tokenizer, name)
            size = (job.out / GGUF_FILE).stat().st_size
        else:
            told = save_compressed_tensors(job.out, model.config.to_dict(), state, model.dtype)
            tokenizer.save(job.out)
            size = sum(file.stat().st_size for file in job.out.glob("*.safetensors"))
            rounds = [m for m in model.modules() if getattr(m, "act_bits", 16) == 8]
            told["activations_unrounded"] = bool(rounds)
        return {"format": self.format, "bytes": size, **told}

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in result["formats"].items())
        text = f"{job.out}: {result['format']}, {result['bytes'] / 1e6:,.2f} MB, weights: {kinds}"
        if names := result.get("dequantized"):
            text += f"; as floats: {', '.join(names)}"
        if result.get("activations_unrounded"):
            text += "; activations, rounded to int8 in this model, are not rounded there"
        if count := result.get("rounded_scales"):
            text += f"; {count:,} scales rounded to float16"
        return text

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        del job
        kinds = {kind: f"{count:,} weights" for kind, count in result["formats"].items()}
        facts = {"format": result["format"], "size": f"{result['bytes'] / 1e6:,.2f} MB", **kinds}
        return Part("Written for other programs", facts=facts)
