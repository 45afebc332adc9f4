"""Prompts of trainings on a policy's own answers, and what scores the answers: a function, reward
models, or both.
"""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.verify import CHECKS, checked, load_reward
from fastlm.errors import InputError
from fastlm.train.encoding import TrainingData, check_vocabulary, template_variables
from fastlm.train.objective import weights_digest

if TYPE_CHECKING:
    import numpy as np

    from fastlm.data.prompts import Prompt
    from fastlm.inference.requests import Completion
    from fastlm.model.reward_model import RewardModel
    from fastlm.pipeline.stage import Job
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.online_stage import OnlineStage


class Questions(TrainingData):
    """The prompts of a stage as (ids, prompt). ``scorer``: of their answers."""

    def __init__(self, scorer: "Scorer", *args: Any):
        self.scorer = scorer
        super().__init__(*args)

    def read(self) -> "Iterator[Prompt]":
        from fastlm.data.prompts import read_prompts

        return read_prompts(self.stage.data, **self.reading())

    def prompt_of(self, row: "Prompt") -> Any:
        return row, row.messages, row.tools

    def encode(self, row: "Prompt") -> "list[tuple[list[int], Prompt]]":
        variables = template_variables(row.tools)
        try:
            # nothing may be lost on the way into the template
            answered = [*row.messages, {"role": "assistant", "content": "."}]
            self.tokenizer.check_written(answered, variables, self.stage.date)
            ids = self.tokenizer.encode_chat(row.messages, date=self.stage.date, **variables)
        except InputError as error:
            self.refuse(error, row.place)
            return []
        if len(ids) > self.seq_len:
            self.rows.counts["too long"] += 1
            return []
        if check := CHECKS.get(self.scorer.name):
            try:
                check(row.row)
            except InputError as error:
                if not self.stage.skip_bad:
                    raise InputError(f"{row.place}: {error}") from None
                self.rows.counts["without a right answer"] += 1
                return []
        return [(ids, row)]


def text_of(tokenizer: "Tokenizer", tokens: Sequence[int]) -> str:
    """The text of an answer. Ids that the model has and the tokenizer has not (a padded vocabulary)
    are the replacement character.
    """
    parts = [
        tokenizer.decode(run) if known else "\N{REPLACEMENT CHARACTER}"
        for known, run in groupby(tokens, key=lambda token: token < tokenizer.vocab_size)
    ]
    return "".join(parts)


def load_reward_model(where: Path, tokenizer: "Tokenizer", dtype: str) -> "RewardModel":
    """The reward model at ``where``. InputError unless it reads the policy's tokens."""
    import torch

    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.load import load_tokenizer

    model = RewardModel.from_pretrained(where, dtype=getattr(torch, dtype))
    own = load_tokenizer(where, model.config.to_dict())
    check_vocabulary("reward_model", own, tokenizer)
    return model


class RewardEnsemble:
    """One score from several reward models, against the overoptimisation of one (Coste et al. 2023,
    "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743). ``models``: at least
    one. ``how``: see `combined`.
    """

    def __init__(self, models: "Sequence[RewardModel]", how: str, coefficient: float):
        self.models, self.how, self.coefficient = models, how, coefficient

    @property
    def context_limit(self) -> int:
        return min(model.trunk.context_limit for model in self.models)

    def identity(self) -> list[str]:
        """Identify the models, and of several how they count."""
        parts = []
        for model in self.models:
            parts += [weights_digest(model), f"{model.mean!r} {model.std!r}"]
        if len(self.models) > 1:
            parts += [self.how, repr(self.coefficient)] if self.how == "uwo" else [self.how]
        return parts

    def score(self, sequences: Sequence[Sequence[int]]) -> "tuple[np.ndarray, np.ndarray]":
        """Return the score of each sequence, and the standard deviation over the models."""
        import numpy as np

        scores = np.array([model.score(sequences).tolist() for model in self.models], np.float64)
        return combined(scores, self.how, self.coefficient), scores.std(axis=0)


def combined(scores: "np.ndarray", how: str, coefficient: float = 0.0) -> "np.ndarray":
    """(models, B) -> (B,): "mean"; "min", the paper's worst-case optimisation; "uwo", its
    uncertainty-weighted optimisation, ``mean - coefficient * variance`` (over n).
    """
    if how == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - coefficient * scores.var(axis=0) if how == "uwo" else mean


class Scorer:
    """The score of an answer: what the function says of its text, plus what the reward models say
    of its tokens.
    """

    def __init__(self, stage: "OnlineStage", tokenizer: "Tokenizer", job: "Job"):
        self.tokenizer, self.name = tokenizer, stage.reward
        self.function = load_reward(stage.reward) if stage.reward else None
        self.models: RewardEnsemble | None = None
        self.spread = 0.0  # of the reward models, over the answers scored last
        given = job.inputs.get("reward_model", ())
        if given:
            models = [load_reward_model(one.path, tokenizer, stage.dtype) for one in given]
            if len(models) > 1:  # of other names, one may be a copy
                digests = [weights_digest(model) for model in models]
                stage.check_models([given[digests.index(digest)].name for digest in digests])
            self.models = RewardEnsemble(models, stage.ensemble, stage.uwo_coefficient)

    def identity(self) -> str:
        """Identify what scores: the function's name and file, the reward model's weights."""
        where = self.name.rpartition(":")[0]
        parts = [self.name]
        if where.endswith(".py"):
            parts.append(sha256(Path(where).read_bytes()).hexdigest()[:16])
        if self.models is not None:
            parts += self.models.identity()
        return " ".join(parts)

    def metrics(self) -> dict[str, float]:
        """What else a round has to say of its scores."""
        several = self.models is not None and len(self.models.models) > 1
        return {"score_spread": self.spread} if several else {}

    def of(self, questions: "Sequence[tuple[list[int], Prompt]]") -> Any:
        """A `fastlm.train.online.Score` of answers to these questions."""

        def score(places: Sequence[int], answers: "Sequence[Completion]") -> list[float]:
            scores = [0.0] * len(answers)
            if self.function is not None:
                for i, (place, answer) in enumerate(zip(places, answers, strict=True)):
                    scores[i] += self.verified(questions[place][1], answer)
            if self.models is not None:
                whole = [[*questions[p][0], *a.token_ids] for p, a in zip(places, answers)]
                found, spread = self.models.score(whole)
                for i, more in enumerate(found.tolist()):
                    scores[i] += checked(more, questions[places[i]][1].place)
                self.spread = float(spread.mean())
            return scores

        return score

    def verified(self, prompt: "Prompt", answer: "Completion") -> float:
        assert self.function is not None
        tokens = answer.token_ids[:-1] if answer.ended else answer.token_ids
        try:
            value = self.function(text_of(self.tokenizer, tokens), prompt.row)
        except InputError as error:
            raise InputError(f"{prompt.place}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{prompt.place}: the reward function failed: {reason}") from None
        return checked(value, prompt.place)
