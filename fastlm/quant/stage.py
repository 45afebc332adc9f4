"""The stage that quantizes a model."""

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext, at_least_one
from fastlm.quant.options import QuantizeOptions

if TYPE_CHECKING:
    from fastlm.data.shards import TokenDataset
    from fastlm.model.causal_lm import CausalLM
    from fastlm.quant.report import ModelComparison
    from fastlm.quant.targets import Target
    from fastlm.tokenizer.tokenizer import Tokenizer

REPORT, PROGRESS = "report.json", "progress"
# Long enough to hide the first step, short enough for an untrained model on two cores
OUT_OF_DOMAIN_TOKENS = (
    32_768  # of the text of another kind: an error of the loss below half a percent
)
DECODE_TOKENS = 64
DECODE_ROUNDS = 3  # the models take turns; medians are reported


@dataclass(frozen=True)
class Quantize(QuantizeOptions, Stage):
    """Quantize a model: store its weights in 4 or 8 bits."""

    kind = "quantize"
    command = ("quantize",)
    version = 7
    inputs = {
        "model": InputSpec(
            ("model",), "Hugging Face folder, .gguf, fastlm run or model:smollm2", flag="m"
        ),
        "data": InputSpec(
            ("corpus", "shards"),
            "Held-out text: measures bits per byte and speed before and after", optional=True,
        ),
        "calibration": InputSpec(
            ("corpus", "shards"),
            "Text like that which the model will see, to weigh errors by, in equal parts; default"
            " where it is needed: web pages, documentation and code from packages", several=True,
            optional=True, default=False,
        ),
        "out_of_domain": InputSpec(
            ("corpus", "shards"),
            "Text of another kind than the calibration: measures the loss there, too; default"
            " beside the default calibration: encyclopedia", optional=True, default=False,
        ),
    }  # fmt: skip
    outputs = {"quantized": "."}
    resumable = (PROGRESS,)
    result = {"format": str, "group_size": int, "bytes": int, "bytes_before": int}

    calibration_tokens: Annotated[int, "Tokens of calibration text"] = 32768
    calibration_length: Annotated[int, "Tokens per window of it"] = 512
    max_bpb_increase: Annotated[
        float, "Warn where held-out bits per byte grow by more than this share"
    ] = 0.03
    strict: Annotated[bool, "Refuse there instead: exit status 2, and no model"] = False
    dequantize: Annotated[
        bool,
        "Accept a model of 4- or 8-bit weights, such as a .gguf or model:smollm2: they were rounded"
        " once already, and are rounded again",
    ] = False

    def check(self) -> None:
        super().check()
        at_least_one(self, "calibration_tokens", "calibration_length")
        if not self.max_bpb_increase >= 0:
            raise InputError(f"max_bpb_increase: expected 0 or more, got {self.max_bpb_increase}")

    def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        if self.strict and not inputs.get("data"):
            raise InputError("strict: expected held-out text (data) to measure, got none")

    def calibration_sources(self, inputs: Mapping[str, Any]) -> tuple[str, ...]:
        """The sources of calibration text: those named, or the default where it is needed."""
        from fastlm.quant.calibration import CALIBRATION_MIX

        if named := inputs.get("calibration"):
            return tuple(source.source for source in named)
        return CALIBRATION_MIX if self.method != "rtn" or self.awq or self.distill_steps else ()

    def out_of_domain_source(self, inputs: Mapping[str, Any]) -> str | None:
        """The source of text of another kind: the one named, or the default beside
        `CALIBRATION_MIX`.
        """
        from fastlm.quant.calibration import CALIBRATION_MIX, OUT_OF_DOMAIN

        if named := inputs.get("out_of_domain"):
            return named[0].source
        return OUT_OF_DOMAIN if self.calibration_sources(inputs) == CALIBRATION_MIX else None

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_inputs(inputs)
        (facts,) = inputs["model"]
        if (config := facts.get("config")) is None:
            return facts
        from fastlm.quant.targets import meta_model, meta_state

        model = meta_model(config)
        return {**facts, "stored": meta_state(model, self.targets(model))}

    def targets(self, model: "CausalLM") -> "list[Target]":
        """The layers to quantize. InputError: what cannot work for a model of these shapes."""
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
        from fastlm.tokenizer.load import has_tokenizer

        source = ctx.inputs["model"][0].source
        check_output_folder(ctx.out, source)
        self.check_inputs(ctx.inputs)
        texts = {
            "data": ctx.inputs["data"][0].source if ctx.inputs.get("data") else None,
            "out_of_domain": self.out_of_domain_source(ctx.inputs),
        }
        if self.calibration_sources(ctx.inputs) or any(texts.values()) or has_tokenizer(source):
            model, tokenizer = load_model(source)
        else:
            model, tokenizer = CausalLM.from_pretrained(source), None
        with contextlib.ExitStack() as stack:
            held: dict[str, TokenDataset] = {}
            for name, where in texts.items():  # read now: a bad text costs no quantization
                if where is not None:
                    assert tokenizer is not None
                    text = token_dataset(
                        where,
                        tokenizer,
                        model.config.vocab_size,
                        cache=ctx.cache_dir,
                        on_skip=ctx.skipped,
                    )
                    held[name] = stack.enter_context(text)
            return self._quantize(ctx, model, tokenizer, held)

    def _quantize(
        self,
        ctx: StageContext,
        model: "CausalLM",
        tokenizer: "Tokenizer | None",
        held: "Mapping[str, TokenDataset]",
    ) -> dict[str, Any]:
        """Quantize, and measure on ``held["data"]`` and ``held["out_of_domain"]``."""
        from fastlm.files import remove, write_json
        from fastlm.model.causal_lm import CausalLM
        from fastlm.quant import QuantizedLinear, quantize
        from fastlm.quant.model import check_unquantized
        from fastlm.quant.report import effective_bits
        from fastlm.quant.step_result import StepResult

        source = ctx.inputs["model"][0].source
        size = sum(weight.nbytes for weight in model.weights().values())
        if self.dequantize:
            model = CausalLM.from_pretrained(source, keep_quantized=False)
        check_unquantized(model)
        self.targets(model)  # refuses before calibration text is read
        sources = self.calibration_sources(ctx.inputs)
        ids, learnt = (None, None)
        if tokenizer is not None and sources:
            ids, learnt = self._windows(ctx, model, tokenizer, sources)
        found, progress = StepResult(), ctx.out / PROGRESS
        small = quantize(
            model, self.format, group_size=self.group_size, method=self.method,
            calibration=ids, awq=self.awq, embeddings=self.embeddings, head=self.head,
            overrides=self.formats(), symmetric=self.symmetric,
            require_divisible_groups=self.require_divisible_groups,
            iterations=self.iterations, distill_steps=self.distill_steps,
            distill_data=learnt, seed=self.seed,
            checkpoint_dir=progress, track=ctx.track, on_step=found.add, log=ctx.info,
        )  # fmt: skip
        assert isinstance(small, CausalLM)  # only modules inside it are replaced
        out_of_domain = self.out_of_domain_source(ctx.inputs)
        if "data" not in held:
            found.warnings.append(
                "data: expected held-out text to measure what was lost, got none: bits per byte and"
                " KL to the original are not in the report"
            )
        elif sources and out_of_domain is None:
            found.warnings.append(
                "out_of_domain: expected text of another kind than the calibration, got none: "
                "the loss"
                " elsewhere may be larger, and is not in the report"
            )
        for line in found.warnings:
            ctx.warning(line)
        for name, error in found.errors.items():
            if not math.isfinite(error):
                raise InputError(
                    f"model: expected finite outputs of {name}, got an error of {error}"
                )
        named = [one.name for one in ctx.inputs.get("calibration") or ()]
        sizes = {m.group_size for m in small.modules() if isinstance(m, QuantizedLinear)}
        whole_rows = self.group_size == -1  # they differ in width
        result: dict[str, Any] = {
            # the options that had an effect as they were used, the others as None
            **asdict(self),
            "overrides": list(self.overrides),
            "calibration_source": ", ".join(named or sources) or None,
            "calibration_tokens": None if ids is None else ids.numel(),
            "calibration_length": None if ids is None else ids.shape[1],
            "iterations": self.iterations if self.method == "autoround" else None,
            "seed": None if ids is None else self.seed,
            "group_size": -1 if whole_rows else max(sizes, default=self.group_size),
            "bytes_before": size,
            **effective_bits(small),
            "out_of_domain": None,
        }
        if held:
            before = CausalLM.from_pretrained(source, keep_quantized=not self.dequantize)
            if "data" in held:
                where = ctx.inputs["data"][0].source
                result |= self._compared(ctx, before, small, held["data"], where).metrics()
                start = 0 if tokenizer is None else tokenizer.eos_id or 0
                speed = measure_decode_speeds({"before": before, "after": small}, start)
                result["decode_tokens_per_second_before"] = speed["before"]
                result["decode_tokens_per_second"] = speed["after"]
            if out_of_domain is not None:
                strict = bool(ctx.inputs.get("out_of_domain"))  # the default is a warning, at most
                compared = self._compared(
                    ctx,
                    before,
                    small,
                    held["out_of_domain"],
                    out_of_domain,
                    OUT_OF_DOMAIN_TOKENS,
                    strict=strict,
                )
                result["out_of_domain"] = {
                    "source": out_of_domain,
                    "bpb_increase": compared.bpb_increase,
                    **compared.metrics(),
                }
        small.config.extra["quantization_config"] = {"method": self.method}
        remove(ctx.out / REPORT)  # of an earlier model
        small.save_pretrained(ctx.out)
        if tokenizer is not None:
            tokenizer.save(ctx.out)
        result["bytes"] = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
        report = {
            **result, "layers": found.errors, "awq_powers": found.powers,
            "distillation": found.distillation or None, "warnings": found.warnings,
        }  # fmt: skip
        write_json(ctx.out / REPORT, report)
        remove(progress)
        return result

    def _windows(
        self, ctx: StageContext, model: "CausalLM", tokenizer: "Tokenizer", sources: Sequence[str]
    ) -> tuple[Any, Any]:
        """The windows that calibrate, and those that distillation learns: the same and more."""
        from fastlm.quant.calibration import text_windows
        from fastlm.quant.distill import tokens_needed

        for name in ("data", "out_of_domain"):
            measured = ctx.inputs.get(name)
            if measured and any(is_same_text(where, measured[0].source) for where in sources):
                ctx.warning(
                    f"{name}: {measured[0].name} is the calibration text, too: the loss on other"
                    " text is larger (prepared text and shards have a held-out part)"
                )
        learnt = text_windows(
            model, tokenizer, sources[0] if len(sources) == 1 else sources, cache=ctx.cache_dir,
            on_skip=ctx.skipped,
            tokens=max(self.calibration_tokens, tokens_needed(self.distill_steps)),
            length=self.calibration_length, seed=self.seed,
        )  # fmt: skip
        ids = learnt[: max(1, self.calibration_tokens // learnt.shape[1])]
        if 2 * ids.numel() < self.calibration_tokens:
            ctx.warning(
                f"calibration: {', '.join(sources)} has {ids.numel():,} tokens in windows of"
                f" {ids.shape[1]}, of {self.calibration_tokens:,} asked for"
            )
        return ids, learnt

    def _compared(
        self,
        ctx: StageContext,
        before: "CausalLM",
        small: "CausalLM",
        dataset: "TokenDataset",
        source: str,
        max_tokens: int | None = None,
        strict: bool = True,
    ) -> "ModelComparison":
        """Compare with the original on the text of `source`. InputError: figures that are not
        finite; with `strict` here and in the options, a loss above `max_bpb_increase`.
        """
        from fastlm.data.texts import check_window
        from fastlm.quant.report import compare_models

        seq_len, stride = check_window(before.context_limit, None, None)
        found = compare_models(
            before, small, dataset, seq_len=seq_len, stride=stride, max_tokens=max_tokens,
            track=ctx.track,
        )  # fmt: skip
        figures = found.bits_per_byte_before, found.bits_per_byte, found.kl
        if not all(map(math.isfinite, figures)):
            raise InputError(
                "model: expected finite bits per byte and KL, got {} -> {} and {}".format(*figures)
            )
        if found.bpb_increase > self.max_bpb_increase:
            line = (
                "max_bpb_increase: expected bits per byte to grow by at most "
                f"{100 * self.max_bpb_increase:g} %,"
                f" got {100 * found.bpb_increase:+.2f} % ({found.bits_per_byte_before:.4f} ->"
                f" {found.bits_per_byte:.4f}) on {source}; more bits, smaller groups or another"
                " method help"
            )
            if self.strict and strict:
                raise InputError(line)
            ctx.warning(line)
        return found

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        small, size = result["bytes"], result["bytes_before"]
        text = (
            f"{ctx.out}: {small / 1e6:,.2f} MB of weights, {small / size:.2f} of the"
            f" {size / 1e6:,.2f} MB before; {result['bits_per_weight']:.2f} bits per weight"
        )
        if "bits_per_byte" in result:
            before, after = result["bits_per_byte_before"], result["bits_per_byte"]
            text += (
                f"; held-out bits per byte: {before:.4f} -> {after:.4f}"
                f" ({100 * (after / before - 1):+.2f} %), KL {result['kl']:.4f},"
                f" {100 * result['greedy_agreement']:.1f} % of the likeliest tokens the same"
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
    """Whether the two name the same text, without a part for each use."""
    from fastlm.data.texts import has_splits

    return Path(a).resolve() == Path(b).resolve() and not has_splits(a)


def check_output_folder(out: Path, model: str) -> None:
    """Refuse an output folder that cannot work, before the work rather than after it."""
    from fastlm.pipeline.run_folder import locate_model

    if out.exists() and not out.is_dir():
        raise InputError(f"out: expected a folder, got the file {out}")
    if out.suffix == ".gguf":
        raise InputError(f"out: expected the name of a folder, no .gguf file, got {out}")
    given, found = Path(model), locate_model(Path(model))
    if out.exists() and any(p.exists() and out.samefile(p) for p in (given, found)):
        raise InputError(f"out: expected another folder than the model's, got {out}")


def measure_decode_speeds(models: "Mapping[str, CausalLM]", start: int) -> dict[str, float]:
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
