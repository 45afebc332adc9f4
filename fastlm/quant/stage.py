"""The stage that quantizes a model."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.runs.stage import Facts, Job, Part, Stage, Takes

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

# Long enough to hide the first step, short enough for an untrained model on two cores
DECODE_TOKENS = 64
DECODE_ROUNDS = 3  # the models take turns; medians are reported


@dataclass(frozen=True)
class Quantize(Stage):
    """Quantize a model: store its weights in 4 or 8 bits."""

    kind = "quantize"
    command = ("quantize",)
    version = 2
    reads = {
        "model": Takes(
            ("model",), "Hugging Face folder, .gguf, fastlm run or model:smollm2", flag="m"
        ),
        "data": Takes(
            ("corpus", "shards"),
            "Held-out text: measures bits per byte and speed before and after", optional=True,
        ),
    }  # fmt: skip
    leaves = {"quantized": "."}
    result = {"format": str, "group_size": int, "bytes": int, "bytes_before": int}

    format: Annotated[str, "w4a16, w8a16, w8a8 or w4a8"] = "w4a16"
    group_size: Annotated[int, "Weights that share a scale"] = 128
    method: Annotated[str, "rtn: round to nearest"] = "rtn"
    embeddings: Annotated[int, "Bits of the embedding; 16: unchanged; 0: as the format"] = 0
    head: Annotated[int, "Bits of the output head; 16: unchanged; 0: as the format"] = 0

    def check(self) -> None:
        from fastlm.quant.model import check_options

        check_options(**asdict(self))

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        (facts,) = inputs["model"]
        config = facts.get("config")
        if config and config.tie_word_embeddings and self.head not in (0, self.embeddings):
            raise InputError(
                f"head: shares its weight with the embeddings: wanted 0, got {self.head}"
            )
        return facts

    def run(self, job: Job) -> dict[str, Any]:
        from fastlm.evals.texts import text_bits_per_byte
        from fastlm.model.causal_lm import CausalLM
        from fastlm.quant import quantize
        from fastlm.serve.chat import load_model

        (source,) = job.inputs["model"]
        data, out = job.inputs.get("data", ()), job.out
        check_out(out, source.where)
        model, tokenizer = load_model(source.where)
        dtype = model.dtype
        size = sum(parameter.nbytes for parameter in model.parameters())

        def bits(network: "CausalLM") -> float:
            return text_bits_per_byte(
                network,
                tokenizer,
                data[0].where,
                compressors=False,
                cache=job.cache,
                track=job.track,
            )["bits_per_byte"]

        result: dict[str, Any] = {"bytes_before": size, **asdict(self)}
        if data:
            result["bits_per_byte_before"] = bits(model)
        small = quantize(model, track=job.track, **asdict(self))
        assert isinstance(small, CausalLM)  # only modules inside it are replaced
        small.save_pretrained(out)
        tokenizer.save(out)
        result["bytes"] = weight_bytes(out)
        if data:
            after = CausalLM.from_pretrained(out, dtype=dtype)
            result["bits_per_byte"] = bits(after)
            models = {"before": load_model(source.where)[0], "after": after}
            speed = decode_speeds(models, tokenizer.eos_id or 0)
            result["decode_tokens_per_second_before"] = speed["before"]
            result["decode_tokens_per_second"] = speed["after"]
        return result

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        small, size = result["bytes"], result["bytes_before"]
        text = (
            f"{job.out}: {small / 1e6:,.2f} MB of weights, {small / size:.2f} of the"
            f" {size / 1e6:,.2f} MB before"
        )
        if "bits_per_byte" in result:
            before, after = result["bits_per_byte_before"], result["bits_per_byte"]
            text += (
                f"; held-out bits per byte: {before:.4f} -> {after:.4f}"
                f" ({100 * (after / before - 1):+.2f} %)"
            )
        return text

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.runs.text import size_text

        del job
        share = result["bytes"] / result["bytes_before"]
        text = f"as {result['format']}, {share:.2f} of before"
        if "bits_per_byte" in result:
            change = 100 * (result["bits_per_byte"] / result["bits_per_byte_before"] - 1)
            text += f", {change:+.1f} % bits"
        return Part(
            "Before and after quantization",
            f"{result['format']}, one scale for {result['group_size']} weights."
            " Speed: one sequence, token by token.",
            cards=[(size_text(result["bytes"]), text)],
            template="quantize.html.jinja",
            values={"r": result},
        )


def check_out(out: Path, model: str) -> None:
    """Refuse an output folder that cannot work, before the work rather than after it."""
    from fastlm.checkpoint.folder import locate_model

    if out.exists() and not out.is_dir():
        raise InputError(f"out: wanted a folder, got the file {out}")
    if out.suffix == ".gguf":
        raise InputError(f"out: wanted the name of a folder, no .gguf file, got {out}")
    given, found = Path(model), locate_model(Path(model))
    if out.exists() and any(p.exists() and out.samefile(p) for p in (given, found)):
        raise InputError(f"out: wanted another folder than the model's, got {out}")


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def decode_speeds(models: "Mapping[str, CausalLM]", start: int) -> dict[str, float]:
    """Measure tokens per second at batch 1, with the models taking turns; return medians."""
    import torch

    rates: dict[str, list[float]] = {name: [] for name in models}
    prompt = torch.tensor([[start]])
    length = min(DECODE_TOKENS, min(m.config.max_position_embeddings for m in models.values()) - 1)
    for _ in range(DECODE_ROUNDS):
        for name, model in models.items():
            began = time.perf_counter()
            model.generate(prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
            rates[name].append(length / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}
