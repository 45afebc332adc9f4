"""The stage that quantizes a model."""

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from fastlm.errors import InputError
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext, at_least_one
from fastlm.quant.options import FORMATS, QuantizeOptions

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.model.causal_lm import CausalLM
    from fastlm.quant.model_comparison import ModelComparison
    from fastlm.quant.targets import Target
    from fastlm.tokenizer.tokenizer import Tokenizer

REPORT, PROGRESS = "report.json", "progress"
# with this many tokens the error of the increase in bits per byte is below half a percent
OUT_OF_DOMAIN_TOKENS = 32_768
# long enough to hide the first step, short enough for an untrained model on two cores
DECODE_TOKENS = 64
DECODE_ROUNDS = 3  # the models take turns; medians are reported


@dataclass(frozen=True)
class Quantize(QuantizeOptions, Stage):
    """Quantize a model: store its weights in 4 or 8 bits."""

    kind = "quantize"
    command = ("quantize",)
    version = 8
    inputs = {
        "model": InputSpec(
            ("model",), "Hugging Face folder, .gguf, fastlm run or model:smollm2", flag="m"
        ),
        "data": InputSpec(
            ("corpus", "shards"),
            "Measure bits per byte and speed before and after on this held-out text", optional=True,
        ),
        "calibration": InputSpec(
            ("corpus", "shards"),
            "Weigh errors by this text, like the model's future inputs; several count equally;"
            " default if the method needs it: web pages, documentation and code from packages",
            several=True,
            optional=True, default=False,
        ),
        "out_of_domain": InputSpec(
            ("corpus", "shards"),
            "Measure the loss on this text of another kind than the calibration, too; default"
            " with the default calibration: encyclopedia", optional=True, default=False,
        ),
    }  # fmt: skip
    outputs = {"quantized": "."}
    notes = """Without --method, weights of 4 bits are rounded by gptq with awq: minutes, where rtn
takes seconds. Its calibration text comes from packages, which are fetched once, unless
--calibration names a text."""
    resumable = (PROGRESS,)
    result = {"format": str, "group_size": int, "bytes": int, "bytes_before": int}

    method: Annotated[
        str,
        "Round by rtn (to nearest), gptq or autoround (the slowest); default: gptq with awq for"
        " weights of 4 bits, rtn for 8",
    ] = ""
    calibration_tokens: Annotated[int, "Calibrate on this many tokens of text"] = 32768
    calibration_length: Annotated[int, "Cut calibration text into windows of this many tokens"] = (
        512
    )
    max_bpb_increase: Annotated[
        float, "Warn if held-out bits per byte grow by more than this share"
    ] = 0.03
    strict: Annotated[bool, "Refuse instead of warning: exit status 2, and no model"] = False
    dequantize: Annotated[
        bool,
        "Accept a model of 4- or 8-bit weights, such as a .gguf or model:smollm2; they are rounded"
        " a second time",
    ] = False

    def check(self) -> None:
        QuantizeOptions.check(self.with_method())
        at_least_one(self, "calibration_tokens", "calibration_length")
        if not self.max_bpb_increase >= 0:
            raise InputError(f"max_bpb_increase: expected 0 or more, got {self.max_bpb_increase}")

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        if self.strict and not inputs.get("data"):
            raise InputError("strict: expected held-out text (data) to measure, got none")

    def with_method(self) -> Self:
        """Return the stage with the default method for its bits, if it names none: the one with the
        smallest loss on text of another kind than the calibration (docs/quantization.md).
        """
        bits, _ = FORMATS.get(self.format, (4, 16))
        return replace(self, method=self.method or ("gptq" if bits == 4 else "rtn"))

    def with_defaults(self, model: "CausalLM") -> Self:
        """Return the stage with the default method, and with AWQ if that is GPTQ and the scales can
        be folded into layers of ``model``.
        """
        from fastlm.quant.layerwise import has_folds
        from fastlm.quant.targets import select_targets

        stage = self.with_method()
        if self.awq is not None:
            return stage
        awq = not self.method and stage.method == "gptq"
        return replace(stage, awq=awq and has_folds(model, select_targets(model, stage)))

    def calibration_sources(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the sources of calibration text: the user's, or the default if one is needed."""
        from fastlm.quant.calibration import CALIBRATION_MIX

        if sources := inputs.get("calibration"):
            return tuple(source.source for source in sources)
        needs_text = self.with_method().method != "rtn" or self.awq or self.distill_steps
        return CALIBRATION_MIX if needs_text else ()

    def out_of_domain_source(self, inputs: Mapping[str, Any]) -> str | None:
        """Return the out-of-domain source: the user's, or the default with `CALIBRATION_MIX`."""
        from fastlm.quant.calibration import CALIBRATION_MIX, OUT_OF_DOMAIN

        if sources := inputs.get("out_of_domain"):
            return sources[0].source
        return OUT_OF_DOMAIN if self.calibration_sources(inputs) == CALIBRATION_MIX else None

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_inputs(inputs)
        (facts,) = inputs["model"]
        if (config := facts.get("config")) is None:
            return facts
        from fastlm.quant.targets import meta_model, meta_state

        model = meta_model(config)
        return {**facts, "weights": meta_state(model, self.targets(model))}

    def targets(self, model: "CausalLM") -> "list[Target]":
        """Return the layers to quantize. InputError: options that cannot work for these shapes."""
        from fastlm.quant.layerwise import check_folds
        from fastlm.quant.targets import select_targets

        targets = select_targets(model, self)
        if self.awq:
            check_folds(model, targets)
        return targets

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.data.texts import token_dataset
        from fastlm.model.causal_lm import CausalLM
        from fastlm.model.load import load_model
        from fastlm.quant.calibration import fetch_calibration_mix
        from fastlm.quant.model import check_unquantized
        from fastlm.tokenizer.load import has_tokenizer

        source = ctx.inputs["model"][0].source
        check_output_folder(ctx.out, source)
        self.check_inputs(ctx.inputs)
        texts = {
            "data": ctx.inputs["data"][0].source if ctx.inputs.get("data") else None,
            "out_of_domain": self.out_of_domain_source(ctx.inputs),
        }
        sources = self.calibration_sources(ctx.inputs)
        if sources and not has_tokenizer(source):
            raise InputError(
                f"model: expected a tokenizer for the calibration text, or the method rtn without"
                f" text, got none in {source}"
            )
        if sources and not ctx.inputs.get("calibration"):
            fetch_calibration_mix(ctx.cache_dir)
        if sources or any(texts.values()) or has_tokenizer(source):
            model, tokenizer = load_model(source)
        else:
            model, tokenizer = CausalLM.from_pretrained(source), None
        with contextlib.ExitStack() as stack:
            heldout: dict[str, TokenDataset] = {}
            for name, text_source in texts.items():  # read first: a bad text costs no quantization
                if text_source is not None:
                    assert tokenizer is not None
                    text = token_dataset(
                        text_source,
                        tokenizer,
                        model.config.vocab_size,
                        cache=ctx.cache_dir,
                        on_skip=ctx.skipped,
                    )
                    heldout[name] = stack.enter_context(text)
            size = sum(weight.nbytes for weight in model.weights().values())
            if self.dequantize:
                model = CausalLM.from_pretrained(source, keep_quantized=False)
            check_unquantized(model)
            return self.with_defaults(model)._quantize(ctx, model, tokenizer, heldout, size)

    def _quantize(
        self,
        ctx: StageContext,
        model: "CausalLM",
        tokenizer: "Tokenizer | None",
        heldout: "Mapping[str, TokenDataset]",
        size: int,
    ) -> dict[str, Any]:
        """Quantize, and measure on ``heldout["data"]`` and ``heldout["out_of_domain"]``. ``size``:
        the bytes of the weights as they are stored before.
        """
        from fastlm.files import remove, write_json
        from fastlm.model.causal_lm import CausalLM
        from fastlm.quant import QuantizedLinear, quantize
        from fastlm.quant.model_comparison import effective_bits
        from fastlm.quant.step_result import StepResult

        source = ctx.inputs["model"][0].source
        self.targets(model)  # refuse before calibration text is read
        sources = self.calibration_sources(ctx.inputs)
        ids, distill_ids = (None, None)
        if tokenizer is not None and sources:
            ids, distill_ids = self._windows(ctx, model, tokenizer, sources)
            if self.method != "rtn":
                ctx.info(
                    f"{self.method} on {ids.numel():,} tokens: minutes for 135 M weights, in"
                    " proportion for more; the bar shows the time left after the first layer"
                    " (--calibration-tokens N takes less, --method rtn seconds)"
                )
        total, progress = StepResult(), ctx.out / PROGRESS
        quantized = quantize(
            model, self.format, group_size=self.group_size, method=self.method,
            calibration=ids, awq=bool(self.awq), embeddings=self.embeddings, head=self.head,
            overrides=self.formats(), symmetric=self.symmetric,
            require_divisible_groups=self.require_divisible_groups,
            iterations=self.iterations, distill_steps=self.distill_steps,
            distill_data=distill_ids, seed=self.seed,
            checkpoint_dir=progress, track=ctx.track, on_step=total.add, log=ctx.info,
        )  # fmt: skip
        assert isinstance(quantized, CausalLM)  # only modules inside it are replaced
        out_of_domain = self.out_of_domain_source(ctx.inputs)
        if "data" not in heldout:
            total.warnings.append(
                "data: expected held-out text to measure the loss, got none: bits per byte and"
                " KL to the original are not in the report"
            )
        elif sources and out_of_domain is None:
            total.warnings.append(
                "out_of_domain: expected text of another kind than the calibration, got none:"
                " the loss out of domain may be larger, and is not in the report"
            )
        for message in total.warnings:
            ctx.warning(message)
        for name, error in total.errors.items():
            if not math.isfinite(error):
                raise InputError(
                    f"model: expected finite outputs of {name}, got an error of {error}"
                )
        names = [source.name for source in ctx.inputs.get("calibration") or ()]
        sizes = {m.group_size for m in quantized.modules() if isinstance(m, QuantizedLinear)}
        per_row = self.group_size == -1  # rows differ in width
        result: dict[str, Any] = {
            # the effective options; those without an effect are None
            **asdict(self),
            "overrides": list(self.overrides),
            "calibration_source": ", ".join(names or sources) or None,
            "calibration_tokens": None if ids is None else ids.numel(),
            "calibration_length": None if ids is None else ids.shape[1],
            "iterations": self.iterations if self.method == "autoround" else None,
            "seed": None if ids is None else self.seed,
            "group_size": -1 if per_row else max(sizes, default=self.group_size),
            "bytes_before": size,
            **effective_bits(quantized),
            "out_of_domain": None,
        }
        if heldout:
            before = CausalLM.from_pretrained(source, keep_quantized=not self.dequantize)
            if "data" in heldout:
                text = ctx.inputs["data"][0].source
                result |= self._compare(ctx, before, quantized, heldout["data"], text).metrics()
                start = 0 if tokenizer is None else tokenizer.eos_id or 0
                speed = measure_decode_speeds({"before": before, "after": quantized}, start)
                result["decode_tokens_per_second_before"] = speed["before"]
                result["decode_tokens_per_second"] = speed["after"]
            if out_of_domain is not None:
                strict = bool(ctx.inputs.get("out_of_domain"))  # the default source only warns
                compared = self._compare(
                    ctx,
                    before,
                    quantized,
                    heldout["out_of_domain"],
                    out_of_domain,
                    OUT_OF_DOMAIN_TOKENS,
                    strict=strict,
                )
                result["out_of_domain"] = {
                    "source": out_of_domain,
                    "bpb_increase": compared.bpb_increase,
                    **compared.metrics(),
                }
        quantized.config.extra["quantization_config"] = {"method": self.method}
        remove(ctx.out / REPORT)  # of an earlier model
        quantized.save_pretrained(ctx.out)
        if tokenizer is not None:
            tokenizer.save(ctx.out)
        result["bytes"] = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
        report = {
            **result, "layers": total.errors, "awq_powers": total.powers,
            "distillation": total.distillation or None, "warnings": total.warnings,
        }  # fmt: skip
        write_json(ctx.out / REPORT, report)
        remove(progress)
        return result

    def _windows(
        self, ctx: StageContext, model: "CausalLM", tokenizer: "Tokenizer", sources: Sequence[str]
    ) -> tuple[Any, Any]:
        """Return the windows for calibration, and those for distillation: the same and more."""
        from fastlm.quant.calibration import text_windows
        from fastlm.quant.distill import tokens_needed

        for name in ("data", "out_of_domain"):
            inputs = ctx.inputs.get(name)
            if inputs and any(is_same_text(source, inputs[0].source) for source in sources):
                ctx.warning(
                    f"{name}: {inputs[0].name} is also the calibration text: the loss on other"
                    " text is larger (prepared text and shards have a held-out part)"
                )
        distill_ids = text_windows(
            model, tokenizer, sources[0] if len(sources) == 1 else sources, cache=ctx.cache_dir,
            on_skip=ctx.skipped,
            tokens=max(self.calibration_tokens, tokens_needed(self.distill_steps)),
            length=self.calibration_length, seed=self.seed,
        )  # fmt: skip
        ids = distill_ids[: max(1, self.calibration_tokens // distill_ids.shape[1])]
        if 2 * ids.numel() < self.calibration_tokens:
            ctx.warning(
                f"calibration: expected {self.calibration_tokens:,} tokens, got {ids.numel():,} in"
                f" windows of {ids.shape[1]} from {', '.join(sources)}"
            )
        return ids, distill_ids

    def _compare(
        self,
        ctx: StageContext,
        before: "CausalLM",
        quantized: "CausalLM",
        dataset: "TokenDataset",
        source: str,
        max_tokens: int | None = None,
        strict: bool = True,
    ) -> "ModelComparison":
        """Compare with the original on the text of `source`. InputError: metrics that are not
        finite; with `strict` here and in the options, an increase above `max_bpb_increase`.
        """
        from fastlm.data.texts import check_window
        from fastlm.quant.model_comparison import compare_models

        seq_len, stride = check_window(before.context_limit, None, None)
        comparison = compare_models(
            before, quantized, dataset, seq_len=seq_len, stride=stride, max_tokens=max_tokens,
            track=ctx.track,
        )  # fmt: skip
        values = comparison.bits_per_byte_before, comparison.bits_per_byte, comparison.kl
        if not all(map(math.isfinite, values)):
            raise InputError(
                "model: expected finite bits per byte and KL, got {} -> {} and {}".format(*values)
            )
        if comparison.bpb_increase > self.max_bpb_increase:
            message = (
                "max_bpb_increase: expected bits per byte to grow by at most"
                f" {100 * self.max_bpb_increase:g} %, got {100 * comparison.bpb_increase:+.2f} %"
                f" ({comparison.bits_per_byte_before:.4f} -> {comparison.bits_per_byte:.4f}) on"
                f" {source}; more bits, smaller groups or another method help"
            )
            if self.strict and strict:
                raise InputError(message)
            ctx.warning(message)
        return comparison

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        size, original = result["bytes"], result["bytes_before"]
        text = (
            f"{ctx.out}: {size / 1e6:,.2f} MB of weights, {size / original:.2f} of the"
            f" {original / 1e6:,.2f} MB before; {result['bits_per_weight']:.2f} bits per weight"
        )
        if "bits_per_byte" in result:
            before, after = result["bits_per_byte_before"], result["bits_per_byte"]
            text += (
                f"; held-out bits per byte: {before:.4f} -> {after:.4f}"
                f" ({100 * (after / before - 1):+.2f} %), KL {result['kl']:.4f},"
                f" {100 * result['greedy_agreement']:.1f} % of the likeliest tokens are the same"
            )
        if out_of_domain := result.get("out_of_domain"):
            text += f"; on {out_of_domain['source']}: {100 * out_of_domain['bpb_increase']:+.2f} %"
        return text

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.pipeline.text import size_text

        del ctx
        share = result["bytes"] / result["bytes_before"]
        text = f"as {result['format']}, {share:.2f} of before"
        if "bits_per_byte" in result:
            change = 100 * (result["bits_per_byte"] / result["bits_per_byte_before"] - 1)
            text += f", {change:+.1f} % bits"
        group = result["group_size"]
        return ReportSection(
            "Before and after quantization",
            f"{result['format']}, one scale for {'a row' if group == -1 else f'{group} weights'}."
            " Speed: one sequence, token by token.",
            cards=[(size_text(result["bytes"]), text)],
            template="quantize.html.jinja",
            values={"r": result},
        )


def is_same_text(a: str, b: str) -> bool:
    """Return True if both name the same text, which has no separate splits."""
    from fastlm.data.texts import has_splits

    return Path(a).resolve() == Path(b).resolve() and not has_splits(a)


def check_output_folder(out: Path, model: str) -> None:
    """Refuse an impossible output folder before the work, not after it."""
    from fastlm.pipeline.run_folder import locate_model

    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder, got the file {out}")
    if out.suffix == ".gguf":
        raise InputError(f"out: expected the name of a folder, no .gguf file, got {out}")
    sources = (Path(model), locate_model(Path(model)))
    if out.exists() and any(p.exists() and out.samefile(p) for p in sources):
        raise InputError(f"out: expected another folder than the model's, got {out}")


def measure_decode_speeds(models: "Mapping[str, CausalLM]", start: int) -> dict[str, float]:
    """Measure tokens per second at batch 1, with the models taking turns; return medians."""
    import torch

    rates: dict[str, list[float]] = {name: [] for name in models}
    prompt = torch.tensor([[start]])
    length = min(DECODE_TOKENS, min(m.config.max_position_embeddings for m in models.values()) - 1)
    for _ in range(DECODE_ROUNDS):
        for name, model in models.items():
            start_time = time.perf_counter()
            model.generate(prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
            rates[name].append(length / (time.perf_counter() - start_time))
    return {name: statistics.median(values) for name, values in rates.items()}
