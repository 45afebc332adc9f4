"""The stage `WinRate`: a judge compares the answers of a new and an old model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.feedback.gate_metrics import percent
from fastlm.files import write_json, write_text
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext, at_least_one
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt

SCORES, ANSWERS = "scores.json", "answers.jsonl"


@dataclass(frozen=True)
class WinRate(Stage):
    """Measure how often the answers of a new model beat those of the old one to the same prompts,
    by a reward model that has not trained the new one.

    A reward model reads one answer at a time, so that the order of two answers has no effect. With
    several judges of different seeds, the mean of their scores decides: it is more accurate than
    one of them.
    """

    kind = "winrate"
    command = ("winrate",)
    version = 5
    inputs = {
        "model": InputSpec(("model", "quantized"), "New model, as for eval", flag="m"),
        "old": InputSpec(("model", "quantized"), "Model that serves now", default=False),
        "judge": InputSpec(("reward",), "Reward models that trained neither model", several=True),
        "feedback": InputSpec(
            ("feedback",),
            "Output of `fastlm feedback build`, for the prompts of test/",
            optional=True,
        ),
    }
    outputs = {"scores": SCORES}
    result = {"prompts": int, "scores": dict[str, dict[str, Any]], "outcomes": dict[str, Any]}

    data: Annotated[
        tuple[str, ...], "Use these prompts, as for ppo, instead of the feedback's"
    ] = ()
    preferences: Annotated[
        tuple[str, ...],
        "Measure the judge's accuracy on these held-out preferences, instead of those of the"
        " feedback's test/",
    ] = ()
    limit: Annotated[
        int, "Use at most this many prompts, in an order that depends only on them"
    ] = 200
    num_generations: Annotated[int, "Sample this many answers per model and prompt"] = 1
    max_new_tokens: Annotated[int, "Limit the tokens per answer"] = 256
    temperature: Annotated[float, "Set the sampling temperature; 0 is greedy"] = 0.7
    seed: Annotated[int, "Set the seed of the answers"] = 0
    confidence: Annotated[float, "Set the confidence level of the intervals"] = 0.95

    def check(self) -> None:
        at_least_one(self, "limit", "num_generations", "max_new_tokens")
        if self.temperature < 0:
            raise InputError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.num_generations > 1 and not self.temperature:
            raise InputError("temperature: expected above 0 for several answers, got 0")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence: expected between 0 and 1, got {self.confidence}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        if not self.data and not inputs.get("feedback"):
            raise InputError("data: expected prompts, or feedback, got neither")
        return {}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        return input_digest.hash_sources((*self.data, *self.preferences), FORMATS)

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.model_answers import generate_answers
        from fastlm.evals.suite import model_ids
        from fastlm.feedback.pairwise import (
            compare_models,
            judge_accuracy,
            judge_answers,
        )

        self.plan(ctx.inputs)
        prompts = self._prompts(ctx)
        ids = model_ids([*ctx.inputs["old"], *ctx.inputs["model"]])
        judges = model_ids(ctx.inputs["judge"])
        if len({judge["id"] for judge in judges}) < len(judges):
            names = ", ".join(judge["name"] for judge in judges)
            raise InputError(
                f"judge: expected different reward models, got {names}, two of them equal"
            )
        old, new = (
            generate_answers(
                ctx.path(key), prompts, num_generations=self.num_generations,
                max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed,
                track=ctx.track,
            )
            for key in ("old", "model")
        )  # fmt: skip
        paths = [judge.path for judge in ctx.inputs["judge"]]
        texts = [[completion.text for completion in answers] for answers in (old, new)]
        scores = judge_answers(paths, prompts, texts, ctx.warning)
        result: dict[str, Any] = compare_models(
            old, new, scores, self.num_generations, self.confidence
        )
        result |= {"ids": ids, "judges": judges}
        if preferences := self._preferences(ctx):
            accuracy = judge_accuracy(
                paths, preferences, cache=ctx.cache_dir, confidence=self.confidence,
                warn=ctx.warning,
            )  # fmt: skip
            if accuracy is not None:
                result["scores"]["judge"] = accuracy
        write_text(ctx.out / ANSWERS, _answer_lines(prompts, texts, scores))
        write_json(ctx.out / SCORES, result)
        return result

    def _preferences(self, ctx: StageContext) -> list[str]:
        """Return the files of preferences that were never trained on."""
        if self.preferences or not ctx.inputs.get("feedback"):
            return list(self.preferences)
        path = ctx.path("feedback") / "test" / "preferences.jsonl"
        return [str(path)] if path.is_file() and path.stat().st_size else []

    def _prompts(self, ctx: StageContext) -> "list[Prompt]":
        from fastlm.data.prompts import read_prompts
        from fastlm.train.encoding import hash_fraction

        sources = list(self.data)
        if not sources:
            path = ctx.path("feedback") / "test" / "prompts.jsonl"
            if not path.is_file() or not path.stat().st_size:
                raise InputError(
                    f"feedback: expected prompts in {path}, got none: gather more feedback, or"
                    " build it with a larger test"
                )
            sources = [str(path)]
        prompts = {p.key(): p for p in read_prompts(sources, cache=ctx.cache_dir)}
        if not prompts:
            raise InputError(f"data: expected prompts, got none in {', '.join(sources)}")
        return sorted(prompts.values(), key=hash_fraction)[: self.limit]

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        del ctx
        rate = result["scores"]["rate"]
        return (
            f"the new model wins {percent(rate)} of {result['prompts']:,} prompts (ties count"
            f" half); its answers are {result['scores']['length']['value']:.2f} times as long;"
            f" {_judge_name(result)} agrees with {_judge(result['scores'])}"
        )

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        scores, outcomes = result["scores"], result["outcomes"]
        facts = {
            f"{_judge_name(result)} agrees with": _judge(scores),
            "wins, ties, losses": "{wins:,}, {ties:,}, {losses:,}".format(**outcomes),
            "mean score": f"{outcomes['old_score']:+.3f} before, {outcomes['new_score']:+.3f} now"
            f" (p {outcomes['p']:.4f})",
            "length": f"{scores['length']['value']:.2f} times that of before"
            f" ({_interval(scores['length'])})",
            "ended by themselves": percent(scores["ended"]),
            "different answers": f"{scores['distinct']['value']:.2f} times as many as before",
        }
        return ReportSection(
            "The new model against the old one",
            "Both models answered the same prompts, which the training on feedback did not use."
            f" They are judged by {_judge_name(result)}, a reward model that trained neither: read"
            f" its accuracy before the win rate. {ctx.out / ANSWERS} has the answers.",
            facts=facts,
            cards=[(percent(scores["rate"]), "of prompts are won by the new model")],
        )


def _judge_name(result: Mapping[str, Any]) -> str:
    count = len(result.get("judges", ()))
    return f"the mean of {count} judges" if count > 1 else "the judge"


def _judge(scores: Mapping[str, Mapping[str, Any]]) -> str:
    accuracy = scores.get("judge")
    if accuracy is None:
        return "an unknown share of preferences (there are none to measure it on)"
    return f"{percent(accuracy)} of {accuracy['n']:,} held-out preferences"


def _interval(score: Mapping[str, Any]) -> str:
    if score["low"] is None or score["high"] is None:
        return "no interval for a single prompt"
    return f"{score['low']:.2f} to {score['high']:.2f}"


def _answer_lines(
    prompts: "Sequence[Prompt]", texts: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> str:
    num_generations = len(texts[0]) // len(prompts)
    rows = [
        {
            "prompt": prompts[i // num_generations].messages, "old": old, "new": new,
            "score_old": round(before, 4), "score_new": round(now, 4),
        }
        for i, (old, new, before, now) in enumerate(zip(*texts, *scores, strict=True))
    ]  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
