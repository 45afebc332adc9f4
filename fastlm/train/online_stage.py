"""PPO, GRPO and its relatives: trainings that learn from their own answers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from fastlm.data.verify import CHECKS, checked, load_reward
from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    MaybePositional,
    ReportSection,
    StageContext,
    not_negative,
    one_of,
    select_options,
)
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.reasoning_gym import SCHEME, check_scorable, is_reasoning_gym
from fastlm.torchrun import is_main_process
from fastlm.train.encoding import (
    EncodedDataset,
    check_vocabulary,
    decode_text,
    rows_summary,
    template_variables,
)
from fastlm.train.lora_options import LoraOptions
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.objective import weights_digest
from fastlm.train.options import (
    GrpoOptions,
    PpoOptions,
    RolloutOptions,
    TrainOptions,
    check_unsharded,
    expect,
)
from fastlm.train.training_stage import FEEDBACK, ChatStage, TrainingSetup

if TYPE_CHECKING:
    import numpy as np

    from fastlm.data.prompts import Prompt
    from fastlm.inference.requests import Completion
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import DivergedError
    from fastlm.train.online import OnlineObjective

LAST_GOOD = "last-good"


@dataclass(frozen=True)
class OnlineStage(LoraOptions, RolloutOptions, ChatStage):
    """A stage whose objective is a `fastlm.train.online.OnlineObjective`; a subclass makes it."""

    version = 2
    truncations: ClassVar[tuple[str, ...]] = ("skip",)
    row_name: ClassVar[str] = "prompts"
    row_use: ClassVar[str] = "answer"
    feedback_format: ClassVar[str] = "prompts"
    unused = ("val_tokens",)  # `val_prompts` says how long a validation is
    inputs = {
        "model": InputSpec(("model",), "Policy to train: a run, a Hugging Face folder"),
        "reward_model": InputSpec(
            ("reward",),
            "Reward model that scores answers; several are an ensemble",
            several=True,
            optional=True,
        ),
        "feedback": FEEDBACK,
    }
    result = {**ChatStage.result, "prompts": int}
    notes = """Read are .jsonl and .json files of rows with a prompt or question (a text or
messages), or conversations, of which what precedes the last answer is the prompt."""

    data: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Prompts: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB, or"
            " reasoning-gym:NAME?KEY=VALUE&..."
        ),
    ] = ()
    reward_function: Annotated[
        str,
        "Function that scores answers: exact, contains, number, reasoning-gym, or file.py:function",
    ] = ""
    ensemble: Annotated[
        str, "Score of several reward models: mean, min, or uwo (mean - uwo_coefficient * variance)"
    ] = "mean"
    uwo_coefficient: Annotated[float, "What a disagreement of the reward models costs"] = 0.1
    max_length: Annotated[int | None, "Most tokens of prompt and answer; default: the context"] = (
        None
    )
    truncation: Annotated[str, "Prompts that leave no room for an answer: skip"] = "skip"
    spike_factor: Annotated[
        float | None, "A loss so many standard deviations above the mean of spike_window is a spike"
    ] = None  # a surrogate's loss says little
    lr: Annotated[float, "Peak learning rate"] = 1e-6
    eps: Annotated[float, "AdamW's epsilon"] = 1e-5
    save_steps: Annotated[int, "Steps between checkpoints"] = 50

    def check(self) -> None:
        check_unsharded(self.kind, self.parallel)
        super().check()
        self.check_lora()
        self.check_rollouts()
        not_negative(self, "uwo_coefficient")
        one_of(self, ensemble=("mean", "min", "uwo"))
        if self.reward_function == SCHEME:
            for spec in filter(is_reasoning_gym, self.data):
                check_scorable(spec)
        dropout = self.lora_dropout
        why = "0, as the update needs the probabilities that the answers were drawn with"
        expect(not dropout, "lora_dropout", why, dropout)
        steps, every = self.steps_of_round(), self.save_steps
        least = (
            f"at least the {steps} steps of a round, so that a checkpoint from before it is kept"
        )
        expect(every >= steps, "save_steps", least, every)
        why = "0, as a round has a fixed number of steps"
        expect(not self.batch_warmup, "batch_warmup", why, self.batch_warmup)
        expect(
            self.save_total_limit >= 2,
            "save_total_limit",
            "2 or more, as the last may be too far",
            self.save_total_limit,
        )

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_models([facts["name"] for facts in inputs["reward_model"]])
        return super().plan(inputs)

    def check_models(self, names: Sequence[str]) -> None:
        """Refuse what does not fit reward models of these names."""
        expect(
            self.reward_function or names,
            "reward_function",
            "a function, or a reward_model",
            "neither",
        )
        several = f"two or more reward_models for {self.ensemble}"
        expect(len(names) > 1 or self.ensemble == "mean", "ensemble", several, len(names))
        once = len(set(names)) == len(names)
        expect(once, "reward_model", "each once", ", ".join(names))

    def steps_of_round(self) -> int:
        size = self.batch_size * self.gradient_accumulation_steps
        return self.num_iterations * math.ceil(self.prompts_per_round * self.num_generations / size)

    def steps_of_epochs(self, epochs: float, examples: int) -> int:
        return math.ceil(epochs * examples / self.prompts_per_round) * self.steps_of_round()

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        where = self.reward_function.rpartition(":")[0]
        function = input_digest.hash_tree(where) if where.endswith(".py") else None
        return [super().digest_inputs(input_digest), function]

    def online(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        """Return the objective on ``policy``; the rest is for `OnlineObjective`."""
        raise NotImplementedError

    def read_data(self, tokenizer: "Tokenizer", context: int, ctx: StageContext) -> "PromptDataset":
        self.check_models([one.name for one in ctx.inputs.get("reward_model", ())])
        self.example_length(context)  # refuses a max_length beyond it
        scorer = RewardScorer(self, tokenizer, ctx)
        context = self.max_length or context
        if scorer.models is not None:
            context = min(context, scorer.models.context_limit)
        return PromptDataset(scorer, self, tokenizer, context - self.max_new_tokens, context, ctx)

    def data_facts(self, data: Any) -> dict[str, Any]:
        return {"prompts": len(data.training), "heldout": len(data.heldout)}

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "OnlineObjective":
        scorer, tokenizer = data.scorer, common["tokenizer"]
        return self.online(
            model, scorer.models.models[0] if scorer.models else None, self.reference(model),
            [ids for ids, _ in data.training], [ids for ids, _ in data.heldout],
            scorer.of(data.training),
            base=common["base"], scorer_identity=scorer.identity(),
            score_heldout=scorer.of(data.heldout), stop_ids=tokenizer.stop_ids,
            places=[prompt.place for _, prompt in data.training], sample_prompt=common["prompt"],
            answer_text=partial(decode_text, tokenizer), sample_tokens=options.sample_tokens,
            score_metrics=scorer.metrics,
            warn=ctx.warning if is_main_process() else lambda message: None,
        )  # fmt: skip

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        training = super().prepare(ctx)

        def keep_last_good(error: "DivergedError") -> None:
            if error.checkpoint is not None:
                cast("OnlineObjective", training.objective).load_policy(error.checkpoint)
                self.save(training, ctx.out / LAST_GOOD)
                ctx.warning(f"the policy of that checkpoint is {ctx.out / LAST_GOOD}")

        training.on_diverged = keep_last_good
        return training

    def reference(self, model: "CausalLM") -> "CausalLM | None":
        """A frozen copy of the policy in the training's dtype; with adapters None
        (`OnlineObjective`).
        """
        import copy

        import torch

        if self.lora_rank:
            return None
        return copy.deepcopy(model).to(getattr(torch, self.dtype))

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        metrics = [m for m in read_metrics(ctx.out / METRICS) if "val_score" in m]
        figures = [f"{result['tokens_per_second']:,.0f} answer tokens/s"]
        if metrics:
            first, last = metrics[0]["val_score"], metrics[-1]["val_score"]
            figures = [f"held-out score {first:.3f} to {last:.3f}", *figures]
        return f"{result['prompts']:,} prompts", figures

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.text import count_text
        from fastlm.train.charts import frontier_chart

        held = [m for m in metrics if "val_score" in m]
        models = ctx.inputs.get("reward_model", ())
        cards = []
        if held:
            first, last = held[0], held[-1]
            cards = [(
                f"{last['val_score']:.3f}",
                f"held-out score ± {last['val_score_error']:.3f}; {first['val_score']:.3f} before",
            )]  # fmt: skip
        return ReportSection(
            self.title(),
            "The policy answers prompts, and learns from the scores of its own answers.",
            facts={
                "prompts": rows_summary(result),
                **self.lora_facts(result),
                "score": " + ".join(
                    [*([f"function {self.reward_function}"] if self.reward_function else []),
                     *(["reward model"] if len(models) == 1 else []),
                     *([f"{self.ensemble} of {len(models)} reward models"] if models[1:] else [])]
                ),
                "round": f"{self.prompts_per_round} prompts, {self.num_generations} answers each,"
                f" {self.num_iterations} {'pass' if self.num_iterations == 1 else 'passes'} in"
                f" steps of {self.batch_size * self.gradient_accumulation_steps}, β {self.beta}",
                "answers": f"{count_text(result['tokens'])} tokens learnt from, at temperature"
                f" {self.temperature}, at most {self.max_new_tokens} each",
            },
            charts=[frontier_chart(metrics)],
            cards=cards,
        )  # fmt: skip

    def title(self) -> str:
        raise NotImplementedError


class PromptDataset(EncodedDataset):
    """The prompts of a stage as (ids, prompt). ``scorer``: of their answers."""

    def __init__(self, scorer: "RewardScorer", *args: Any):
        self.scorer = scorer
        super().__init__(*args)

    def read(self) -> "Iterator[Prompt]":
        from fastlm.data.prompts import read_prompts

        return read_prompts(self.stage.data, **self.reader_options())

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
        if len(ids) > self.max_length:
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
    one. ``how``: see `combine_scores`.
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
        return combine_scores(scores, self.how, self.coefficient), scores.std(axis=0)


def combine_scores(scores: "np.ndarray", how: str, coefficient: float = 0.0) -> "np.ndarray":
    """(models, B) -> (B,): "mean"; "min", the paper's worst-case optimisation; "uwo", its
    uncertainty-weighted optimisation, ``mean - coefficient * variance`` (over n).
    """
    if how == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - coefficient * scores.var(axis=0) if how == "uwo" else mean


class RewardScorer:
    """The score of an answer: what the function says of its text, plus what the reward models say
    of its tokens.
    """

    def __init__(self, stage: OnlineStage, tokenizer: "Tokenizer", ctx: StageContext):
        self.tokenizer, self.name = tokenizer, stage.reward_function
        self.function = load_reward(stage.reward_function) if stage.reward_function else None
        self.models: RewardEnsemble | None = None
        self.spread = 0.0  # of the reward models, over the answers scored last
        given = ctx.inputs.get("reward_model", ())
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
        return {"ensemble_std": self.spread} if several else {}

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
            value = self.function(decode_text(self.tokenizer, tokens), prompt.row)
        except InputError as error:
            raise InputError(f"{prompt.place}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{prompt.place}: the reward function failed: {reason}") from None
        return checked(value, prompt.place)


@dataclass(frozen=True)
class Ppo(PpoOptions, OnlineStage):
    """Train a policy on scores of its own answers by PPO, with a value model.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint. docs/ppo.md lists every convention.
    """

    kind = "ppo"
    command = ("ppo",)

    def check(self) -> None:
        super().check()
        steps, most = self.critic_warmup * self.steps_of_round(), self.max_steps
        why = f"rounds of fewer than the {most} steps of the run, or the policy learns nothing"
        got = f"{self.critic_warmup} of {steps} steps"
        expect(most is None or most > steps, "critic_warmup", why, got)

    def check_models(self, names: Sequence[str]) -> None:
        super().check_models(names)
        some = self.value_model != "reward" or names
        expect(some, "value_model", "a reward_model to begin with", "none")

    def online(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        from fastlm.train.online_objectives import PpoObjective, build_value_model

        value_model = build_value_model(
            policy, shared=self.value_model == "shared",
            reward=reward_model if self.value_model == "reward" else None,
        )  # fmt: skip
        settings = select_options(self, PpoOptions)
        return PpoObjective(policy, *args, settings, value_model=value_model, **more)

    def title(self) -> str:
        return "PPO"


@dataclass(frozen=True)
class Grpo(GrpoOptions, OnlineStage):
    """Train a policy on scores of its own answers, relative to its other answers to the prompt.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint.
    """

    kind = "grpo"
    command = ("grpo",)

    def online(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        from fastlm.train.online_objectives import GrpoObjective

        return GrpoObjective(policy, *args, select_options(self, GrpoOptions), **more)

    def title(self) -> str:
        return "Preference training (RLOO)" if self.loss_type == "rloo" else "GRPO"
