"""The stage `JudgeAnswers`: a language model grades answers, or compares those of two models."""

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NotRequired, cast

from typing_extensions import TypedDict

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.evals.judge.scale import Scale
from fastlm.files import write_json, write_text
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    ReportSection,
    Stage,
    StageContext,
    at_least_one,
    is_address,
    not_negative,
    one_of,
    positive,
)
from fastlm.schema import read_document
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.evals.judge.items import JudgeItem

SCORES, GRADES = "scores.json", "grades.jsonl"
RECORDS = "records"  # folder of models' answers and of the judge's replies
# Options that need prompts to answer, a server, and a model on this machine
ANSWER_OPTIONS = ("num_generations", "max_new_tokens", "temperature", "seed")
SERVER_OPTIONS = ("judge_model", "timeout", "retries")
MODEL_OPTIONS = ("max_reason_tokens",)


class StoredJudge(TypedDict):
    model: str
    address: NotRequired[str]


class StoredScores(TypedDict):
    """The field of scores.json that a later run reads."""

    judge: StoredJudge


@dataclass(frozen=True)
class JudgeAnswers(Stage):
    """Let a language model judge answers: of a file, of a model to prompts, or of two models, whose
    answers are compared in both orders.

    The judge is a model on this machine, or a server with OpenAI's API. Nothing leaves the machine
    unless --judge is an address; a key for it comes from the environment (FASTLM_JUDGE_API_KEY).
    OUT/grades.jsonl has each grade with its reason. A judge errs: label some answers with fastlm
    label, and repeat the command with --labels. Its error then stands with each score, and corrects
    it.
    """

    kind = "judge"
    version = 4
    command = ("judge",)
    inputs = {
        "model": InputSpec(
            ("model", "quantized"), "Judge the answers of this model to --data", optional=True,
            flag="m",
        ),
        "old": InputSpec(
            ("model", "quantized"), "Compare them with the answers of this model", optional=True,
            default=False,
        ),
        "judge": InputSpec(
            ("model", "quantized"),
            "Judge with this Hugging Face folder, .gguf, fastlm run or model:smollm2, or with the"
            " server at http://HOST:PORT/v1",
            default=False, addresses=True,
        ),
    }  # fmt: skip
    outputs = {"scores": SCORES}
    resumable = (RECORDS,)
    settings_in = ("rubric",)
    result = {"models": dict[str, dict[str, Any]], "rubric": dict[str, Any]}

    judge_model: Annotated[
        str | None,
        "Use this model of the server; default: that of the last run, or the first that it lists",
    ] = None
    answers: Annotated[
        tuple[str, ...],
        "Judge the answers of these files instead: rows with a prompt, answer, and to compare two"
        " answers answer_b",
    ] = ()
    data: Annotated[
        tuple[str, ...],
        "Ask the models these prompts, as for ppo, or conversations: rows with turns, or the set"
        " questions:two-turn",
    ] = ()
    limit: Annotated[
        int,
        "Use at most this many prompts, or rows of answers: a random sample, which a larger"
        " limit extends",
    ] = 200
    num_generations: Annotated[int, "Sample this many answers per model and prompt"] = 1
    max_new_tokens: Annotated[int, "Limit the tokens per answer"] = 256
    temperature: Annotated[float, "Set the sampling temperature; 0 is greedy"] = 0.7
    seed: Annotated[int, "Set the seed of the answers"] = 0
    scale: Annotated[
        str, "Grade a single answer on this scale: pass (pass or fail), 1-5 or 1-10"
    ] = "pass"
    rubric: Annotated[str | None, "Tell the judge the text of this file, what to look at"] = None
    threshold: Annotated[
        int | None, "Count this grade and higher ones as pass; default: 4 of 5, 7 of 10"
    ] = None
    max_reason_tokens: Annotated[int, "Limit the tokens of a reason (a judge on this machine)"] = (
        128
    )
    timeout: Annotated[float, "Wait this many seconds for a reply of a server"] = 60.0
    retries: Annotated[int, "Send a request to a server this many times again if it fails"] = 3
    labels: Annotated[str | None, "Measure the judge on this file of fastlm label"] = None
    min_labels: Annotated[
        int, "Correct a score by the judge's error if so many random labels measure it"
    ] = 40
    confidence: Annotated[float, "Set the confidence level of the intervals"] = 0.95

    def check(self) -> None:
        from fastlm.evals.chat_questions import question_source
        from fastlm.evals.judge.rubric import Rubric

        at_least_one(
            self, "limit", "num_generations", "max_new_tokens", "max_reason_tokens", "min_labels"
        )
        not_negative(self, "temperature", "retries")
        positive(self, "timeout")
        one_of(self, scale=("pass", "1-5", "1-10"))
        if self.num_generations > 1 and not self.temperature:
            raise InputError("temperature: expected above 0 for several answers, got 0")
        highest = 10 if self.scale == "1-10" else 5
        if self.threshold is not None and not 2 <= self.threshold <= highest:
            raise InputError(f"threshold: expected 2 to {highest}, got {self.threshold}")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence: expected between 0 and 1, got {self.confidence}")
        if self.answers:
            self._refuse(ANSWER_OPTIONS, "answers")
        for source in self.data:
            question_source(source)
        Rubric.read("pass", self.rubric, self.threshold)
        if self.labels is not None and not Path(self.labels).is_file():
            raise InputError(f"labels: expected a file of fastlm label, got {self.labels}")

    def _refuse(self, names: Sequence[str], reason: str) -> None:
        """Raise an InputError if one of the options, which have no effect, is set."""
        for name in names:
            if (value := getattr(self, name)) != getattr(JudgeAnswers, name):
                raise InputError(f"{name}: expected none with {reason}, got {value!r:.80}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        model, old, (judge,) = inputs.get("model"), inputs.get("old"), inputs["judge"]
        if is_address(judge["name"]):
            self._refuse(MODEL_OPTIONS, "a server as judge")
        else:
            self._refuse(SERVER_OPTIONS, "a model on this machine as judge")
        if bool(self.answers) == bool(model):
            got = "both" if model else "neither"
            raise InputError(f"answers: expected answers or a model that answers, got {got}")
        if old and not model:
            raise InputError("old: expected a model to compare it with, got answers")
        if model and not self.data:
            raise InputError("data: expected prompts for the model, got none")
        if self.answers and self.data:
            raise InputError("data: expected none, since the answers have their prompts")
        return {}

    def can_continue(self, changed: Collection[str], folder: Path, finished: bool) -> bool:
        """Whatever has changed: a record is stored by all that it depends on."""
        del changed, folder, finished
        return True

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        from fastlm.evals.chat_questions import question_source

        files = [path for path in (self.rubric, self.labels) if path is not None]
        sets = [path for spec in self.data if (path := question_source(spec)) != spec]
        data = [spec for spec in self.data if question_source(spec) == spec]
        sources = input_digest.hash_sources((*self.answers, *data), FORMATS)
        return [*sources, *(input_digest.hash_tree(path) for path in (*files, *sets))]

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.judge.grading import JudgeSource, grade_items
        from fastlm.evals.judge.items import read_items
        from fastlm.evals.judge.labels import merge_raters, random_order, read_label_rows
        from fastlm.evals.judge.rubric import Rubric
        from fastlm.evals.judge.scores import judge_scores
        from fastlm.evals.suite import model_ids

        self.plan({key: [{"name": i.source} for i in value] for key, value in ctx.inputs.items()})
        judge_source = ctx.inputs["judge"][0].source
        if not is_address(judge_source) and not judge_source.startswith("model:"):
            if not Path(judge_source).exists():
                raise InputError(
                    "judge: expected a model or http://HOST:PORT/v1, found nothing at"
                    f" {judge_source!r:.200}"
                )
        ids: list[dict[str, str]] = []
        if self.answers:
            name, items = ", ".join(self.answers), read_items(self.answers, cache=ctx.cache_dir)
            by_id = {item.id: item for item in items}
            items = [by_id[id] for id in random_order(by_id)[: self.limit]]
        else:
            models = [*ctx.inputs.get("old", ()), *ctx.inputs["model"]]
            name, ids = models[-1].name, model_ids(models)
            items = self._model_items(ctx, ids)
        is_pair = len(items[0].answers) == 2
        scale = cast(Scale, "pair" if is_pair else self.scale)
        rubric = Rubric.read(scale, self.rubric, self.threshold)
        labels = {}
        if self.labels is not None:
            labels = merge_raters(read_label_rows(Path(self.labels), rubric))
        judge = JudgeSource(
            judge_source, self._server_model(ctx.out, judge_source), self.max_reason_tokens,
            self.timeout, self.retries,
        )  # fmt: skip
        if judge.exposes_key:
            ctx.warning(f"the key is sent to {judge_source} without encryption: use https")
        graded = grade_items(
            items, rubric, judge, ctx.out / RECORDS, track=ctx.track, warn=ctx.warning
        )
        if without := sum(g.grade is None for g in graded):
            ctx.warning(f"without a readable grade: {without:,} of {len(graded):,} ({GRADES})")
        scores = judge_scores(
            graded, rubric, labels, min_labels=self.min_labels, confidence=self.confidence
        )
        result = {
            "confidence": self.confidence, "models": {name: {"scores": scores}}, "ids": ids,
            "judge": judge.id, "rubric": rubric.as_dict(), "items": len(graded),
            "ungraded": without,
        }  # fmt: skip
        rows = [json.dumps(g.as_row(), ensure_ascii=False) + "\n" for g in graded]
        write_text(ctx.out / GRADES, "".join(rows))
        write_json(ctx.out / SCORES, result)
        return result

    def _server_model(self, out: Path, judge_source: str) -> str | None:
        """Return the name of the server's model. Without an option it is that of the last run, so
        that stored replies need no server."""
        if self.judge_model is None and (out / SCORES).is_file():
            with suppress(InputError):
                judge = read_document(out / SCORES, StoredScores)["judge"]
                if judge.get("address") == judge_source.rstrip("/"):
                    return judge["model"]
        return self.judge_model

    def _model_items(
        self, ctx: StageContext, ids: Sequence[Mapping[str, str]]
    ) -> "list[JudgeItem]":
        """Return the answers of the model to the prompts, each with that of the old model. The
        answers to a question are together: a larger limit adds others after them."""
        from fastlm.evals.chat_questions import question_source, read_chat_questions
        from fastlm.evals.judge.items import conversation_items, hash_json, make_items
        from fastlm.evals.judge.labels import random_order
        from fastlm.evals.model_answers import read_or_generate

        sources = [question_source(spec) for spec in self.data]
        questions = {
            hash_json([q.key(), q.prompt.tools]): q
            for q in read_chat_questions(sources, cache=ctx.cache_dir)
        }
        if not questions:
            raise InputError(f"data: expected prompts, got none in {', '.join(self.data)}")
        sample = {key: questions[key] for key in random_order(questions)[: self.limit]}
        options = {
            "num_generations": self.num_generations, "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature, "seed": self.seed,
        }  # fmt: skip
        texts = []
        for key, entry in zip(("model", "old"), ids[::-1]):
            metadata = {"model": entry["id"], **options}
            path = ctx.out / RECORDS / f"answers-{hash_json(metadata)}.jsonl"
            texts.append(
                read_or_generate(path, metadata, ctx.path(key), sample, track=ctx.track, **options)
            )
        repeated = [question for question in sample.values() for _ in range(self.num_generations)]
        return make_items(
            item
            for question, *answers in zip(repeated, *texts, strict=True)
            for item in conversation_items(question, answers)
        )

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        from fastlm.evals.report import judge_summary

        del ctx
        return judge_summary(result)

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        from fastlm.evals.report import judge_blocks, render_blocks

        del ctx
        return render_blocks(judge_blocks(result))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.evals.report import judge_part

        return judge_part(result, ctx.out / GRADES)
