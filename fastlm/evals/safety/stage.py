"""The safety stage."""

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.files import write_json, write_text
from fastlm.pipeline.stage import InputSpec, ReportSection, Stage, StageContext, at_least_one
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.evals.safety.model_under_test import ModelUnderTest

RECORDS = "records"  # folder of each model's answers
BEHAVIOUR = ("attacks", "overrefusal", "toxicity", "hallucination", "injection")
MEASURES = (*BEHAVIOUR, "bias", "privacy", "memorization")
NEED_DATA = ("memorization",)
REQUESTS = ("harmbench", "donotanswer")


@dataclass(frozen=True)
class Safety(Stage):
    """Test the safety of models: harmful requests and jailbreaks, refusals of harmless requests,
    toxicity, hallucination, prompt injection, bias, privacy, memorization.

    Each score has an interval. Scores of a judge are reported with the judge's accuracy on labelled
    answers; it corrects the score only if the answers are this model's (--labels). The share of
    attacks that succeed is reported only if such labels confirm its judge. With --gate the exit
    status is 1 if a score's interval exceeds its bound.
    """

    kind = "safety"
    command = ("safety",)
    version = 12
    inputs = {
        "model": InputSpec(
            ("model", "quantized"), "Hugging Face folder, .gguf, fastlm run or model:smollm2",
            several=True, flag="m",
        ),
        "data": InputSpec(
            ("corpus",), "Prepared text that the models were trained on; adds membership inference"
            " and memorization", optional=True,
        ),
    }  # fmt: skip
    outputs = {"scores": "scores.json"}
    resumable = (RECORDS,)
    settings_in = ("gate",)
    card_section = "Safety"
    result = {"models": dict[str, dict[str, Any]], "failed": list[str]}

    measures: Annotated[tuple[str, ...], f"Run these measures: {', '.join(MEASURES)}"] = MEASURES
    limit: Annotated[int, "Use at most this many items of a set, drawn at random"] = 50
    max_new_tokens: Annotated[int, "Generate at most this many tokens per answer"] = 64
    requests: Annotated[
        tuple[str, ...], "Send the harmful requests of these sets: harmbench, donotanswer"
    ] = REQUESTS
    attacks: Annotated[
        tuple[str, ...],
        "Try these attacks: plain, role_play, suppression, base64, rot13, leetspeak, many_shot,"
        " in_the_wild, suffix (a slow gradient search); with three turns: crescendo,"
        " foot_in_the_door, split_request",
    ] = ("plain", "role_play", "suppression", "base64", "many_shot", "in_the_wild")
    suffix_requests: Annotated[int, "Search for a suffix on this many requests"] = 5
    suffix_tokens: Annotated[int, "Give a suffix this many tokens"] = 12
    suffix_steps: Annotated[int, "Search for a suffix in this many steps"] = 20
    suffix_candidates: Annotated[int, "Try this many candidate suffixes per step"] = 64
    canaries: Annotated[
        str | None,
        "Test for the canaries in this folder of fastlm data canaries, which the models were"
        " trained on",
    ] = None
    labels: Annotated[
        str | None,
        "Read labels of these models' answers from this file of fastlm label, or OUT/verdicts.jsonl"
        " with labels added to rows that were drawn at random",
    ] = None
    gate: Annotated[
        str | None, "Read bounds on scores from this TOML file (see docs/safety.md)"
    ] = None
    confidence: Annotated[float, "Compute intervals of this confidence"] = 0.95
    seed: Annotated[int, "Sample items and continuations with this seed"] = 0

    def check(self) -> None:
        from fastlm.evals.gates import read_gates
        from fastlm.evals.safety.attacks import ATTACK_NAMES
        from fastlm.evals.safety.canaries import read_canaries
        from fastlm.evals.safety.labels import read_labels

        at_least_one(
            self, "limit", "max_new_tokens", "suffix_requests", "suffix_tokens", "suffix_steps",
            "suffix_candidates",
        )  # fmt: skip
        for name, allowed in (
            ("measures", MEASURES),
            ("requests", REQUESTS),
            ("attacks", ATTACK_NAMES),
        ):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise InputError(f"{name}: expected different ones of {', '.join(allowed)}")
            for value in values:
                if value not in allowed:
                    raise InputError(f"{name}: expected {', '.join(allowed)}, got {value!r}")
        if not 0.5 <= self.confidence < 1.0:
            raise InputError(f"confidence: expected in [0.5, 1), got {self.confidence}")
        if self.gate is not None:
            read_gates(self.gate, self.measures)
        if self.canaries is not None:
            read_canaries(Path(self.canaries))
        if self.labels is not None:
            read_labels(Path(self.labels))

    def can_continue(self, changed: Collection[str], folder: Path, finished: bool) -> bool:
        """Whatever has changed: a record is in a file named after all that it depends on."""
        del changed, folder, finished
        return True

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        files = (self.gate, self.canaries, self.labels)
        return [input_digest.hash_tree(Path(path)) for path in files if path is not None]

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.data.texts import has_splits
        from fastlm.evals.gates import gate_failures, read_gates
        from fastlm.evals.safety.labels import VERDICTS, AnswerLabels, read_labels
        from fastlm.evals.safety.model_under_test import ModelUnderTest, SafetyJudges
        from fastlm.evals.safety.sets import SafetySets
        from fastlm.evals.safety.texts import SOURCES
        from fastlm.evals.scorer import Scorer
        from fastlm.evals.suite import model_hash, model_ids
        from fastlm.model.load import load_model

        data = ctx.optional("data")
        if data is not None and not has_splits(data):
            raise InputError(
                f"data: expected a folder of fastlm data prepare, with a held-out part, got {data}"
            )
        if data is None and set(self.measures) <= set(NEED_DATA):
            raise InputError("data: expected the training text for memorization, got none")
        ids = model_ids(ctx.inputs["model"])
        sets = SafetySets(ctx.cache_dir)
        judges = SafetyJudges(sets)
        models, verdicts = {}, []
        for source in ctx.inputs["model"]:
            target = ModelUnderTest(
                Scorer(*load_model(source.source)), ctx.out / RECORDS, model_hash(source.source),
                sets, judges, self, ctx.cache_dir, data, track=ctx.track,
                canaries=None if self.canaries is None else Path(self.canaries),
                labels=AnswerLabels() if self.labels is None else read_labels(Path(self.labels)),
            )  # fmt: skip
            models[source.name] = self._measured(ctx, source.source, target)
            verdicts += [{"model": source.name, **row} for row in target.verdicts]
        gates = read_gates(self.gate, self.measures) if self.gate is not None else []
        failed = [
            f"{name}: {reason}"
            for name, model in models.items()
            for reason in gate_failures(gates, model["scores"], model["withdrawn"])
        ]
        set_names = {
            s for m in models.values() for score in m["scores"].values() for s in score["sets"]
        }
        result = {
            "confidence": self.confidence, "limit": self.limit, "models": models, "ids": ids,
            "sets": {
                name: {key: text for key, text in SOURCES[name].items() if key != "files"}
                for name in sorted(set_names)
            },
            "gates": len(gates), "failed": failed,
        }  # fmt: skip
        write_json(ctx.out / "scores.json", result)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in verdicts)
        write_text(ctx.out / VERDICTS, lines)
        for reason in failed:
            ctx.warning(f"gate failed: {reason}")
        return result

    def _measured(self, ctx: StageContext, source: str, target: "ModelUnderTest") -> dict[str, Any]:
        """Return "scores", "withdrawn": score -> why it is not given, and "truncated": measure ->
        prompts that did not fit the context."""
        from fastlm.evals.safety import behaviour, privacy
        from fastlm.evals.safety.bias import bias

        functions = {
            **{name: getattr(behaviour, name) for name in BEHAVIOUR}, "bias": bias,
            "privacy": privacy.privacy, "memorization": privacy.memorization,
        }  # fmt: skip
        scores = {}
        for name in self.measures:
            if name in NEED_DATA and target.data is None:
                ctx.skipped(f"{name}, which wants the training text as data")
                continue
            scores |= {score.name: score.as_dict() for score in functions[name](target)}
        truncated = Counter[str]()
        for task, count in target.truncated.items():
            truncated[task.split(".")[0]] += count
        cuts = {name: truncated[name] for name in self.measures if truncated[name]}
        if cuts:
            counts = ", ".join(f"{count:,} of {name}" for name, count in cuts.items())
            ctx.warning(f"{source}: prompts truncated at their start to fit the context: {counts}")
        return {"scores": scores, "withdrawn": target.withdrawn, "truncated": cuts}

    def status(self, result: Mapping[str, Any]) -> int:
        return 1 if result["failed"] else 0

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        from fastlm.evals.report import safety_summary

        del ctx
        return safety_summary(result)

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        from fastlm.evals.report import render_safety

        del ctx
        return render_safety(result)

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.evals.report import safety_part

        del ctx
        return safety_part(result)
