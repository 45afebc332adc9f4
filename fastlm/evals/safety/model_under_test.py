"""The model under test, with the sets, judges and options that all measures share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastlm.data.texts import read_texts
from fastlm.data.toxicity import PIECE_WORDS, ToxicityModel
from fastlm.errors import InputError
from fastlm.evals.judge_accuracy import JudgeAccuracy
from fastlm.evals.results import Record
from fastlm.evals.runner import run_task, truncated_count
from fastlm.evals.safety.judges import (
    SUCCESS_ON_SMALL_MODELS,
    AnswerRule,
    LabelledAnswer,
    compliance_features,
    fit_judge,
    fit_text_classifier,
    judge_accuracy,
    text_features,
)
from fastlm.evals.safety.labels import AnswerLabels, JudgeName, answer_id
from fastlm.evals.safety.negatives import constructed_negatives, mismatched_negatives
from fastlm.evals.safety.refusals import abstains, is_off_topic, is_refusal, refuses
from fastlm.evals.safety.scores import SafetyScore, share_score
from fastlm.evals.safety.sets import SafetySets, sample
from fastlm.evals.safety.texts import SENTENCES
from fastlm.evals.scorer import Pair, Scorer
from fastlm.evals.task import MultipleChoice, OpenQuestion, Question, Task
from fastlm.progress import Track, silent

if TYPE_CHECKING:
    from fastlm.evals.safety.stage import Safety

T = TypeVar("T")
ANSWERS = 400  # answers of people, for judge "answering"
CONSTRUCTED = 400  # negatives to train on, as many as labels: all 1,110 do worse on both labels
BENIGN_DOCUMENTS = 1000  # of a source, from which pieces are drawn
TOXIC = 500  # examples per label: all 993 take four times as long, for 2.5 points


class SafetyJudges:
    """The judges, each fitted and measured on first use. All models of a run share them."""

    def __init__(self, sets: SafetySets) -> None:
        self.sets = sets

    @cached_property
    def refusal(self) -> tuple[AnswerRule, JudgeAccuracy]:
        """Does an answer refuse? Judged by rules. PyRIT's labels also call off-topic answers
        refusals. Here that is another score (`is_off_topic`), so such answers are left out.
        """
        labelled = self.sets.labelled_answers("refusals")
        examples = [e for e in labelled if not is_off_topic(e.request, e.answer)]
        return is_refusal, judge_accuracy(
            [is_refusal(e.request, e.answer) for e in examples], examples,
            f"{len(examples)} of {len(labelled)} answers of larger models, labelled by people"
            " (PyRIT): those that share a word with their request", "PyRIT",
        )  # fmt: skip

    @cached_property
    def success(self) -> tuple[AnswerRule, JudgeAccuracy]:
        """Does an answer do what the request says? It must not refuse, and a classifier of its
        content must accept it.
        """
        examples = self.sets.labelled_answers("objectives")
        negatives = sample(
            [e for _, e in constructed_negatives(examples, held_out=False)], CONSTRUCTED, 0
        )
        return fit_judge(
            examples, compliance_features,
            f"{len(examples)} answers of larger models, labelled by people (PyRIT), by five-fold"
            " cross-validation",
            domain="PyRIT", other_domains=SUCCESS_ON_SMALL_MODELS,
            extra_training=[*mismatched_negatives(examples), *negatives, *self.sets.harmless()],
            constructed=constructed_negatives(examples, held_out=True),
            veto=lambda request, answer: refuses(answer),
        )  # fmt: skip

    @cached_property
    def toxicity(self) -> tuple[AnswerRule, JudgeAccuracy]:
        """Is a text toxic? Judged by a classifier of words and letters."""
        examples = self._toxicity_examples()
        toxic = sum(e.label for e in examples)
        return fit_judge(
            examples, text_features,
            f"{toxic} texts with a toxicity score of 0.5 and more, and as many pieces of"
            " encyclopedia text taken as not toxic; by five-fold cross-validation",
            domain="web text",
        )  # fmt: skip

    def toxicity_model(self, benign: Sequence[str] = (), *, track: Track = silent) -> ToxicityModel:
        """Return the judge of `toxicity` in a form that can be saved, and scores documents.

        ``benign``: sources of text (`fastlm.data.texts.read_texts`). At most `TOXIC` pieces of
        their documents are further examples that are not toxic.
        """
        examples = self._toxicity_examples()
        pieces = _texts(benign_pieces(benign, self.sets.cache), False)
        _, accuracy = fit_judge(
            examples, text_features,
            f"{len(examples)} texts by five-fold cross-validation, as `fastlm safety` measures it,"
            f" and {len(pieces)} pieces of benign sources",
            domain="web text", extra_training=pieces, track=track,
        )  # fmt: skip
        return ToxicityModel(fit_text_classifier([*examples, *pieces]), accuracy.as_dict())

    def _toxicity_examples(self) -> list[LabelledAnswer]:
        toxic, nontoxic = (sample(texts, TOXIC, 0) for texts in self.sets.toxic_texts())
        return [*_texts(toxic, True), *_texts(nontoxic, False)]

    @cached_property
    def answering(self) -> tuple[AnswerRule, JudgeAccuracy]:
        """Does an answer claim to know? Judged by rules and a classifier, measured on people's
        answers to questions and on hand-written abstentions.
        """
        answers = sample(self.sets.quac_answers(), ANSWERS, 0)
        abstaining = SENTENCES["abstaining"]
        return fit_judge(
            [*_texts(answers, True), *_texts(abstaining, False)], text_features,
            f"{len(answers)} answers of people (QuAC) and {len(abstaining)} hand-written"
            " abstentions, by five-fold cross-validation",
            domain="QuAC", extra_training=_texts(SENTENCES["abstaining_training"], False),
            veto=lambda request, answer: abstains(answer),
        )  # fmt: skip


def benign_pieces(sources: Sequence[str], cache: Path) -> list[str]:
    """Return at most `TOXIC` pieces of documents, as long as those that are scored, the same number
    of each source. InputError: a bad source, or one without text.
    """
    pieces = []
    for source in sources:
        texts = islice(read_texts(source, split="train", cache=cache), BENIGN_DOCUMENTS)
        candidates = [
            " ".join(words[start : start + PIECE_WORDS])
            for words in (text.split() for text in texts)
            for start in range(0, len(words), PIECE_WORDS)
        ]
        if not candidates:
            raise InputError(f"benign {source}: expected text, got none")
        pieces += sample(candidates, TOXIC // len(sources), 0)
    return pieces


def _texts(texts: Sequence[str], label: bool) -> list[LabelledAnswer]:
    return [LabelledAnswer("", text, label, text) for text in texts]


@dataclass(frozen=True)
class ModelUnderTest:
    """One model under test.

    Args:
        folder: of the records.
        model: a hash of the model.
        data: the corpus that it was trained on, with a held-out part.
        canaries: file of the canaries that were planted there.
        labels: labelled answers; those of this model measure the judges on it.

    ``verdicts`` collects the judges' verdicts, an object per answer. ``truncated`` counts, by task,
    the prompts that were truncated at their start to fit the context. ``withdrawn`` has the scores
    that are not given, and why.
    """

    scorer: Scorer
    folder: Path
    model: str
    sets: SafetySets
    judges: SafetyJudges
    options: "Safety"
    cache: Path
    data: Path | None = None
    canaries: Path | None = None
    labels: AnswerLabels = field(default_factory=AnswerLabels)
    track: Callable = silent
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    truncated: dict[str, int] = field(default_factory=dict)
    withdrawn: dict[str, str] = field(default_factory=dict)

    @property
    def has_chat_template(self) -> bool:
        return self.scorer.tokenizer.chat_template is not None

    def ask(
        self, name: str, questions: Sequence[Question], *, temperature: float = 0.0, **options: Any
    ) -> list[Record]:
        """Run the questions of a set and return their records; see `fastlm.evals.runner.run_task`.
        Records of another seed or model are not used.

        Args:
            options: fields of the `Task`.
        """
        task = Task(name, "safety", questions, "", "", "", **options)
        seed = self.options.seed
        records = run_task(
            task, self.scorer, self.folder / f"{self.model}-{seed}", model=self.model, seed=seed,
            temperature=temperature, track=lambda parts: self.track(parts, name, unit="parts"),
        )  # fmt: skip
        self.truncated[name] = truncated_count(records)
        return records

    def answers(
        self,
        name: str,
        prompts: Sequence[str],
        *,
        earlier_messages: Sequence[Sequence[str]] | None = None,
        max_new_tokens: int | None = None,
        chat: bool = True,
        temperature: float = 0.0,
    ) -> list[str]:
        """Return the model's answers, with ``chat`` through its chat template if it has one.

        Args:
            earlier_messages: the user's messages before each prompt; the model answers each.
        """
        new_tokens = max_new_tokens or self.options.max_new_tokens
        questions = [
            OpenQuestion(str(i), prompt, {}, max_new_tokens=new_tokens, chat=chat,
                 earlier_messages=tuple(earlier_messages[i]) if earlier_messages else ())
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        records = self.ask(name, questions, temperature=temperature)
        return [record["answers"][0] for record in records]

    def likelihoods(
        self, name: str, pairs: Sequence[Sequence[Pair]], *, greedy: bool = False
    ) -> list[Record]:
        """Return records with "logprob" and "tokens" (and "greedy") of each item's pairs."""
        questions = [
            MultipleChoice(str(i), tuple(item_pairs), 0) for i, item_pairs in enumerate(pairs)
        ]
        return self.ask(name, questions, greedy=greedy)

    def sample(self, items: Sequence[T], limit: int | None = None) -> list[T]:
        """Return at most ``limit`` items (default: the run's limit), the same for all models."""
        max_items = self.options.limit if limit is None else limit
        return sample(items, max_items, self.options.seed)

    def share(
        self, name: str, description: str, hits: Sequence[float], **options: Any
    ) -> SafetyScore:
        return share_score(
            name, description, sum(hits), len(hits), confidence=self.options.confidence, **options
        )

    def verdict_share(
        self,
        name: str,
        description: str,
        judge: JudgeName,
        requests: Sequence[str],
        answers: Sequence[str],
        **options: Any,
    ) -> SafetyScore:
        """Return the share of answers with a positive verdict of the judge."""
        rule, error = getattr(self.judges, judge)
        pairs = [*zip(requests, answers, strict=True)]
        ids = [answer_id(name, *pair) for pair in pairs]
        sample = self.labels.sample(ids)
        verdicts = [rule(*pair) for pair in pairs]
        labels = [sample.get(id) for id in ids]
        for (request, answer), verdict, label in zip(pairs, verdicts, labels):
            self.verdicts.append({
                "score": name, "judge": judge, "request": request, "answer": answer,
                "verdict": verdict, "label": label,
            })  # fmt: skip
        labelled = [(v, label) for v, label in zip(verdicts, labels) if label is not None]
        text = f"{len(labelled)} labelled answers of this score"
        accuracy = JudgeAccuracy.from_pairs(labelled, text, "this model") if labelled else None
        return self.share(
            name, description, verdicts, judge=error, labelled_accuracy=accuracy, **options
        )

    def confirmed(self, scores: Sequence[SafetyScore]) -> list[SafetyScore]:
        """Return the scores of one judge if labels of this model's answers confirm the judge, else
        none: they are withdrawn.
        """
        names = {score.name for score in scores}
        pairs = [
            (row["verdict"], row["label"])
            for row in self.verdicts
            if row["score"] in names and row["label"] is not None
        ]
        objection = JudgeAccuracy.from_pairs(pairs, "", "this model").objection
        if not objection:
            return list(scores)
        self.withdrawn.update(dict.fromkeys((score.name for score in scores), objection))
        return []
