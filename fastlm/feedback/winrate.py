"""The stage `WinRate`: a new model and an old one answer the same prompts, and a judge chooses."""

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
    """How often the answers of a new model are better than those of the old one to the same
    prompts, by a reward model that has not trained the new one.

    A reward model reads one answer at a time, so that there is no order of two answers to favour.
    Several judges, equal but for their seeds, score by their mean: each errs less than one alone.
    """

    kind = "winrate"
    command = ("winrate",)
    version = 5
    inputs = {
        "model": InputSpec(("model", "quantized"), "The new model: as for eval", flag="m"),
        "old": InputSpec(("model", "quantized"), "The model that serves now", default=False),
        "judge": InputSpec(
            ("reward",), "Reward models that neither has been trained with", several=True
        ),
        "feedback": InputSpec(
            ("feedback",), "What `fastlm feedback build` made: prompts of test/", optional=True
        ),
    }
    outputs = {"scores": SCORES}
    result = {"prompts": int, "scores": dict[str, dict[str, Any]], "compared": dict[str, Any]}

    data: Annotated[tuple[str, ...], "Prompts, as for ppo, in place of those of the feedback"] = ()
    labelled: Annotated[
        tuple[str, ...],
        "Preferences that the judge has not been trained on, in place of those of the feedback's"
        " test/: how often is it right?",
    ] = ()
    limit: Annotated[int, "Prompts, the first ones in an order that only they decide"] = 200
    answers: Annotated[int, "Answers of each model to a prompt"] = 1
    max_new_tokens: Annotated[int, "Most tokens per answer"] = 256
    temperature: Annotated[float, "Of sampling; 0: always the likeliest token"] = 0.7
    seed: Annotated[int, "Seed of the answers"] = 0
    confidence: Annotated[float, "Of the intervals"] = 0.95

    def check(self) -> None:
        at_least_one(self, "limit", "answers", "max_new_tokens")
        if self.temperature < 0:
            raise InputError(f"temperature: expected 0 or more, got {self.temperature}")
        if self.answers > 1 and not self.temperature:
            raise InputError("temperature: expected above 0 for several answers, got 0")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence: expected between 0 and 1, got {self.confidence}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        if not self.data and not inputs.get("feedback"):
            raise InputError("data: expected prompts, or feedback, got neither")
        return {}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        return input_digest.hash_sources((*self.data, *self.labelled), FORMATS)

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.suite import ids_of
        from fastlm.feedback.pairwise import answer, compared, judge_accuracy, judged

        self.plan(ctx.inputs)
        prompts = self._prompts(ctx)
        ids = ids_of([*ctx.inputs["old"], *ctx.inputs["model"]])
        judges = ids_of(ctx.inputs["judge"])
        if len({judge["id"] for judge in judges}) < len(judges):
            names = ", ".join(judge["name"] for judge in judges)
            raise InputError(
                f"judge: expected different reward models, got {names}, two of them equal"
            )
        old, new = (
            answer(
                ctx.path(key), prompts, answers=self.answers, max_new_tokens=self.max_new_tokens,
                temperature=self.temperature, seed=self.seed, track=ctx.track,
            )
            for key in ("old", "model")
        )  # fmt: skip
        paths = [given.path for given in ctx.inputs["judge"]]
        texts = [[one.text for one in answers] for answers in (old, new)]
        points = judged(paths, prompts, texts, ctx.warning)
        result: dict[str, Any] = compared(old, new, points, self.answers, self.confidence)
        result |= {"ids": ids, "judges": judges}
        if labelled := self._labelled(ctx):
            accuracy = judge_accuracy(
                paths, labelled, cache=ctx.cache_dir, confidence=self.confidence, warn=ctx.warning,
            )  # fmt: skip
            if accuracy is not None:
                result["scores"]["judge"] = accuracy
        write_text(ctx.out / ANSWERS, _lines(prompts, texts, points))
        write_json(ctx.out / SCORES, result)
        return result

    def _labelled(self, ctx: StageContext) -> list[str]:
        """Return where comparisons are that nothing was trained on."""
        if self.labelled or not ctx.inputs.get("feedback"):
            return list(self.labelled)
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
        found = {one.key(): one for one in read_prompts(sources, cache=ctx.cache_dir)}
        if not found:
            raise InputError(f"data: expected prompts, got none in {', '.join(sources)}")
        return sorted(found.values(), key=hash_fraction)[: self.limit]

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        del ctx
        won = result["scores"]["rate"]
        return (
            f"the new model wins {percent(won)} of {result['prompts']:,} prompts (ties count half);"
            f" its answers are {result['scores']['length']['value']:.2f} times as long;"
            f" {_who(result)} is right in {_judge(result['scores'])}"
        )

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        scores, compared = result["scores"], result["compared"]
        facts = {
            f"{_who(result)} is right in": _judge(scores),
            "wins, ties, losses": "{wins:,}, {ties:,}, {losses:,}".format(**compared),
            "mean score": f"{compared['old']:+.3f} before, {compared['new']:+.3f} now"
            f" (p {compared['p']:.4f})",
            "length": f"{scores['length']['value']:.2f} times that of before"
            f" ({_interval(scores['length'])})",
            "ended by themselves": percent(scores["ended"]),
            "different answers": f"{scores['distinct']['value']:.2f} times as many as before",
        }
        return ReportSection(
            "The new model against the old one",
            "Both answered the same prompts, which the training on feedback did not use. They"
            f" are judged by {_who(result)}, reward models that have trained neither: read how"
            f" often that is right before its verdict. {ctx.out / ANSWERS} has the answers.",
            facts=facts,
            cards=[(percent(scores["rate"]), "of prompts are won by the new model")],
        )


def _who(result: Mapping[str, Any]) -> str:
    count = len(result.get("judges", ()))
    return f"the mean of {count} judges" if count > 1 else "the judge"


def _judge(scores: Mapping[str, Mapping[str, Any]]) -> str:
    found = scores.get("judge")
    if found is None:
        return "an unknown share (no preferences to measure it with)"
    return f"{percent(found)} of {found['n']:,} preferences that it has not seen"


def _interval(score: Mapping[str, Any]) -> str:
    if score["low"] is None or score["high"] is None:
        return "one prompt tells no interval"
    return f"{score['low']:.2f} to {score['high']:.2f}"


def _lines(
    prompts: "Sequence[Prompt]", texts: Sequence[Sequence[str]], points: Sequence[Sequence[float]]
) -> str:
    answers = len(texts[0]) // len(prompts)
    rows = [
        {
            "prompt": prompts[i // answers].messages, "old": old, "new": new,
            "score_old": round(before, 4), "score_new": round(now, 4),
        }
        for i, (old, new, before, now) in enumerate(zip(*texts, *points, strict=True))
    ]  # fmt: skip
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
