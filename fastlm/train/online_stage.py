"""The stages `ppo` and `grpo`: trainings on the policy's own completions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

from fastlm.data.verifiers import CHECKS, check_reward, constant_answer_score, load_reward
from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    MaybePositional,
    Repeated,
    ReportSection,
    StageContext,
    not_negative,
    one_of,
    select_options,
)
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.reasoning_gym import SCHEME, check_scorable, is_reasoning_gym
from fastlm.torchrun import is_main_process, rank_and_world_size
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
    GRPOOptions,
    PPOOptions,
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
    from fastlm.train.environments import Environment
    from fastlm.train.episodes import EpisodeSampler
    from fastlm.train.objective import DivergedError
    from fastlm.train.online import OnlineObjective

LAST_GOOD = "last-good"
CONSTANT_ANSWER_SCORE = "constant_answer_score"  # in a result


@dataclass(frozen=True)
class OnlineStage(LoraOptions, RolloutOptions, ChatStage):
    """A stage that trains on rollouts. A subclass builds its
    `fastlm.train.online.OnlineObjective`.
    """

    version = 6
    truncations: ClassVar[tuple[str, ...]] = ("skip",)
    sources_in: ClassVar[tuple[str, ...]] = ("data", "search_corpus")
    row_name: ClassVar[str] = "prompts"
    row_use: ClassVar[str] = "answer"
    feedback_format: ClassVar[str] = "prompts"
    validation_metrics = {"val_score": True}
    unused = ("val_tokens",)  # `val_prompts` sets the length of a validation
    inputs = {
        "model": InputSpec(("model",), "Policy to train: a run or a Hugging Face folder"),
        "reward_model": InputSpec(
            ("reward",),
            "Reward model that scores completions; several form an ensemble",
            several=True,
            optional=True,
        ),
        "feedback": FEEDBACK,
    }
    result = {**ChatStage.result, "prompts": int, CONSTANT_ANSWER_SCORE: float | None}
    notes = """Data are .jsonl and .json files of rows with a prompt or question (a text or
messages), or of conversations, whose last answer is cut off."""

    data: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Read prompts from .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB, or"
            " reasoning-gym:NAME?KEY=VALUE&..."
        ),
    ] = ()
    reward_function: Annotated[
        str,
        "Score completions by this function: exact, contains, number, reasoning-gym or"
        " file.py:function",
    ] = ""
    environment: Annotated[
        str,
        "Let completions call tools and continue: calculator, python, search or file.py:Class, a"
        " fastlm.train.environments.Environment",
    ] = ""
    search_corpus: Annotated[
        tuple[str, ...],
        Repeated(
            "Search these documents in the environment search: a file or folder, pypi:, sdist: or"
            " deb:NAME#GLOB; may be repeated"
        ),
    ] = ()
    ensemble: Annotated[
        str,
        "Combine the scores of several reward models by mean, min or uwo (mean - uwo_coefficient"
        " * variance)",
    ] = "mean"
    uwo_coefficient: Annotated[
        float, "Multiply the variance over the reward models by this coefficient in uwo"
    ] = 0.1
    max_length: Annotated[
        int | None, "Limit prompt and completion to this many tokens; default: the context"
    ] = None
    truncation: Annotated[str, "Handle prompts that are too long this way: skip"] = "skip"
    spike_factor: Annotated[
        float | None,
        "Count a loss this many standard deviations above the mean of spike_window as a spike",
    ] = None  # a surrogate loss says little
    lr: Annotated[float, "Warm up to this peak learning rate"] = 1e-6
    eps: Annotated[float, "Add this epsilon to AdamW's denominator"] = 1e-5
    save_steps: Annotated[int, "Save checkpoints this many steps apart"] = 50

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
        if self.environment:
            expected = "2 or more turns in an environment"
            expect(self.max_turns >= 2, "max_turns", expected, self.max_turns)
        self.check_search()
        dropout = self.lora_dropout
        expected = "0, as the update needs the probabilities that the completions were sampled with"
        expect(not dropout, "lora_dropout", expected, dropout)
        size = rank_and_world_size()[1]
        expected = f"False with {size} processes"
        expect(size == 1 or not self.async_rollouts, "async_rollouts", expected, True)
        steps = self.steps_of_round()
        expected = f"at least the {steps} steps of a round, to keep a checkpoint from before it"
        expect(self.save_steps >= steps, "save_steps", expected, self.save_steps)
        expected = "0, as a round has a fixed number of steps"
        expect(not self.batch_warmup, "batch_warmup", expected, self.batch_warmup)
        expect(
            self.save_total_limit >= 2,
            "save_total_limit",
            "2 or more, as the last one may be from after the divergence",
            self.save_total_limit,
        )

    def check_search(self, environment: "type[Environment] | None" = None) -> None:
        """Raise InputError if `search_corpus` does not fit ``environment``, the class that the
        option of this name loads. None: check what needs no loading.
        """
        from fastlm.train.environments import ENVIRONMENTS, Search

        environment = environment or ENVIRONMENTS.get(self.environment)
        if environment is None and self.environment:
            return
        searches = environment is not None and issubclass(environment, Search)
        expected = f"at least one source for the environment {self.environment}"
        expect(self.search_corpus or not searches, "search_corpus", expected, "none")
        got = self.environment or "none"
        expect(searches or not self.search_corpus, "environment", "search for search_corpus", got)
        if searches:
            from fastlm.train.search import check_search_package

            check_search_package()

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_models([facts["name"] for facts in inputs["reward_model"]])
        return super().plan(inputs)

    def check_models(self, names: Sequence[str]) -> None:
        """Raise InputError if the options do not fit reward models of these names."""
        from fastlm.train.environments import ENVIRONMENTS

        expect(
            self.reward_function or names or self.environment not in ("", *ENVIRONMENTS),
            "reward_function",
            "a function, or a reward_model",
            "neither",
        )
        expected = f"two or more reward_models for {self.ensemble}"
        expect(len(names) > 1 or self.ensemble == "mean", "ensemble", expected, len(names))
        unique = len(set(names)) == len(names)
        expect(unique, "reward_model", "each once", ", ".join(names))

    def steps_of_round(self) -> int:
        """Return the optimizer steps of a round."""
        completions = self.prompts_per_round * self.num_generations
        return self.num_iterations * math.ceil(completions / self.step_size())

    def steps_of_epochs(self, epochs: float, examples: int) -> int:
        return math.ceil(epochs * examples / self.prompts_per_round) * self.steps_of_round()

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        files = [
            input_digest.hash_tree(path) if path.endswith(".py") else None
            for path in (
                name.rpartition(":")[0] for name in (self.reward_function, self.environment)
            )
        ]
        corpus = [input_digest.hash_sources(self.search_corpus)] if self.search_corpus else []
        return [super().digest_inputs(input_digest), *files, *corpus]

    def build_objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        """Build the objective on ``policy``; the other arguments are those of `OnlineObjective`."""
        raise NotImplementedError

    def read_data(self, tokenizer: "Tokenizer", context: int, ctx: StageContext) -> "PromptDataset":
        from fastlm.train.environments import ENVIRONMENTS

        self.check_models([model.name for model in ctx.inputs.get("reward_model", ())])
        self.example_length(context)  # raises InputError for a max_length beyond it
        scorer = RewardScorer(self, tokenizer, ctx)
        episodes = self.episode_sampler(tokenizer, scorer, ctx) if self.environment else None
        context = self.max_length or context
        if scorer.models is not None:
            context = min(context, scorer.models.context_limit)
        max_length = context - self.max_new_tokens
        data = PromptDataset(scorer, episodes, self, tokenizer, max_length, context, ctx)
        if self.environment in ("", *ENVIRONMENTS):
            # greedy completions of equal prompts are equal: they would make the error of the
            # held-out score too small. The user's environment may go on differently in other rows
            first = {tuple(ids): (ids, prompt) for ids, prompt in reversed(data.heldout)}
            data.heldout = [*reversed(first.values())]
        return data

    def episode_sampler(
        self, tokenizer: "Tokenizer", scorer: "RewardScorer", ctx: StageContext
    ) -> "EpisodeSampler":
        """Return the sampler of completions of several turns, in `environment`."""
        from fastlm.train.environments import Search, has_reward, load_environment
        from fastlm.train.episodes import EpisodeSampler

        environment, identity = load_environment(self.environment), identify_code(self.environment)
        self.check_search(environment)
        has_score = scorer.function or scorer.models or has_reward(environment)
        expected = "a function, or a reward_model, as the environment has no reward"
        expect(has_score, "reward_function", expected, "neither")
        if issubclass(environment, Search):
            from fastlm.train.search import SearchIndex, read_passages

            passages = read_passages(self.search_corpus, cache=ctx.cache_dir, on_skip=ctx.skipped)
            index = SearchIndex(ctx.track(passages, "indexing passages", unit="passages"))
            environment = environment.with_index(index)
            identity = f"{identity} {index.identity}"
        return EpisodeSampler(environment, identity, tokenizer, self.date)

    def data_facts(self, data: Any) -> dict[str, Any]:
        return {
            "prompts": len(data.training), "heldout": len(data.heldout),
            CONSTANT_ANSWER_SCORE: self.constant_answer_score(data),
        }  # fmt: skip

    def constant_answer_score(self, data: "PromptDataset") -> float | None:
        """Return what a constant answer would score on the training prompts, on the scale of the
        held-out score. None: not known, or a score has other parts than the function's.
        """
        from fastlm.train.environments import has_reward

        episodes = data.episodes
        adds = episodes is not None and has_reward(episodes.environment)
        if adds or data.scorer.models is not None or self.overlong_tokens:
            return None
        return constant_answer_score(self.reward_function, (p.row for _, p in data.training))

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "OnlineObjective":
        scorer, tokenizer = data.scorer, common["tokenizer"]
        return self.build_objective(
            model, scorer.models.models[0] if scorer.models else None, self.build_reference(model),
            [ids for ids, _ in data.training], [ids for ids, _ in data.heldout],
            scorer.score_function(data.training), base=common["base"],
            scorer_identity=scorer.identity(), score_heldout=scorer.score_function(data.heldout),
            stop_ids=tokenizer.stop_ids,
            prompt_locations=[prompt.location for _, prompt in data.training],
            sample_prompt=common["prompt"], sample_row=data.sample_row,
            decode=partial(decode_text, tokenizer), sample_tokens=options.sample_tokens,
            score_metrics=scorer.metrics,
            episodes=data.episodes, prompt_rows=[prompt for _, prompt in data.training],
            heldout_rows=[prompt for _, prompt in data.heldout],
            warn=ctx.warning if is_main_process() else lambda message: None,
        )  # fmt: skip

    def prepare(self, ctx: StageContext) -> TrainingSetup:
        training = super().prepare(ctx)

        def save_last_good(error: "DivergedError") -> None:
            if error.checkpoint is not None:
                cast("OnlineObjective", training.objective).load_policy(error.checkpoint)
                self.save(training, ctx.out / LAST_GOOD)
                ctx.warning(f"the policy of that checkpoint is saved in {ctx.out / LAST_GOOD}")

        training.on_diverged = save_last_good
        return training

    def build_reference(self, model: "CausalLM") -> "CausalLM | None":
        """Copy the policy in the training's dtype; with adapters None
        (`OnlineObjective`).
        """
        import copy

        import torch

        if self.lora_rank:
            return None
        return copy.deepcopy(model).to(getattr(torch, self.dtype))

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        metrics = [m for m in read_metrics(ctx.out / METRICS) if "val_score" in m]
        figures = [f"{result['tokens_per_second']:,.0f} completion tokens/s"]
        if metrics:
            first, last = metrics[0]["val_score"], metrics[-1]["val_score"]
            figures = [f"held-out score {first:.3f} to {last:.3f}", *figures]
            if (constant := result.get(CONSTANT_ANSWER_SCORE)) is not None:
                figures[0] += f" (a constant answer: {constant:.3f})"
        return f"{result['prompts']:,} prompts", figures

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.text import count_text
        from fastlm.train.charts import frontier_chart

        validations = [m for m in metrics if "val_score" in m]
        models = ctx.inputs.get("reward_model", ())
        cards = []
        if validations:
            first, last = validations[0], validations[-1]
            text = (
                f"held-out score ± {last['val_score_error']:.3f}; {first['val_score']:.3f} before"
            )
            if (constant := result.get(CONSTANT_ANSWER_SCORE)) is not None:
                text += f", {constant:.3f} for a constant answer"
            cards = [(f"{last['val_score']:.3f}", text)]
        return ReportSection(
            self.title(),
            "The policy completes prompts and learns from the scores of its completions.",
            facts={
                "prompts": rows_summary(result),
                **self.lora_facts(result),
                "score": " + ".join(
                    [*([f"function {self.reward_function}"] if self.reward_function else []),
                     *(["reward model"] if len(models) == 1 else []),
                     *([f"{self.ensemble} of {len(models)} reward models"] if models[1:] else [])]
                ),
                "round": f"{self.prompts_per_round} prompts, {self.num_generations} completions"
                f" each, {self.num_iterations}"
                f" {'iteration' if self.num_iterations == 1 else 'iterations'} in steps of"
                f" {self.step_size()}, β {self.beta}"
                + (", sampled during the update before" if self.async_rollouts else ""),
                "completions": f"{count_text(result['tokens'])} tokens, at temperature"
                f" {self.temperature}, at most {self.max_new_tokens} each",
                **({"environment": f"{self.environment}, at most {self.max_turns} turns"}
                   if self.environment else {}),
                **({"search corpus": ", ".join(self.search_corpus)}
                   if self.search_corpus else {}),
            },
            charts=[frontier_chart(metrics)],
            cards=cards,
        )  # fmt: skip

    def title(self) -> str:
        raise NotImplementedError


def identify_code(name: str) -> str:
    """Return the name of an option's function or class, with the hash of its file."""
    path = name.rpartition(":")[0]
    if not path.endswith(".py"):
        return name
    return f"{name} {sha256(Path(path).read_bytes()).hexdigest()[:16]}"


class PromptDataset(EncodedDataset):
    """The prompts of a stage, as pairs of token ids and prompt. ``scorer`` scores completions.
    ``episodes`` samples them where they have several turns.
    """

    def __init__(self, scorer: "RewardScorer", episodes: "EpisodeSampler | None", *args: Any):
        self.scorer, self.episodes = scorer, episodes
        super().__init__(*args)

    def read(self) -> "Iterator[Prompt]":
        from fastlm.data.prompts import read_prompts

        return read_prompts(self.stage.data, **self.reader_options())

    def prompt_of(self, row: "Prompt") -> Any:
        if self.episodes is None:
            return row, row.messages, row.tools
        return row, *self.episodes.prompt(row)

    def prompt_of_message(self, text: str) -> Any:
        from fastlm.data.prompts import parse_prompt

        return self.prompt_of(parse_prompt({"prompt": text}, "sample_prompt"))

    def encode(self, row: "Prompt") -> "list[tuple[list[int], Prompt]]":
        _, messages, tools = self.prompt_of(row)
        variables = template_variables(tools)
        try:
            # raises if the template would drop something
            conversation = [*messages, {"role": "assistant", "content": "."}]
            self.tokenizer.check_template_is_complete(conversation, variables, self.stage.date)
            ids = self.tokenizer.encode_chat(messages, date=self.stage.date, **variables)
        except InputError as error:
            self.refuse(error, row.location)
            return []
        if len(ids) > self.max_length:
            self.rows.by_reason["too long"] += 1
            return []
        if check := CHECKS.get(self.scorer.function_name):
            try:
                check(row.row)
            except InputError as error:
                if not self.stage.skip_bad:
                    raise InputError(f"{row.location}: {error}") from None
                self.rows.by_reason["without a right answer"] += 1
                return []
        return [(ids, row)]


def load_reward_model(path: Path, tokenizer: "Tokenizer", dtype: str) -> "RewardModel":
    """Load the reward model at ``path``. InputError: its vocabulary is not the policy's."""
    import torch

    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.load import load_tokenizer

    model = RewardModel.from_pretrained(path, dtype=getattr(torch, dtype))
    reward_tokenizer = load_tokenizer(path, model.config.to_dict())
    check_vocabulary("reward_model", reward_tokenizer, tokenizer)
    return model


class RewardEnsemble:
    """Combines the scores of several reward models, against overoptimisation of a single one (Coste
    et al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743).
    ``models``: at least one. ``method``: see `combine_scores`.
    """

    def __init__(self, models: "Sequence[RewardModel]", method: str, coefficient: float):
        self.models, self.method, self.coefficient = models, method, coefficient

    @property
    def context_limit(self) -> int:
        """The smallest context of the models."""
        return min(model.trunk.context_limit for model in self.models)

    def identity(self) -> list[str]:
        """Return what identifies the models and, for several, their combination."""
        parts = []
        for model in self.models:
            parts += [weights_digest(model), f"{model.mean!r} {model.std!r}"]
        if len(self.models) > 1:
            parts += [self.method]
            parts += [repr(self.coefficient)] if self.method == "uwo" else []
        return parts

    def score(self, sequences: Sequence[Sequence[int]]) -> "tuple[np.ndarray, np.ndarray]":
        """Return the score of each sequence, and the standard deviation over the models."""
        import numpy as np

        scores = np.array([model.score(sequences).tolist() for model in self.models], np.float64)
        return combine_scores(scores, self.method, self.coefficient), scores.std(axis=0)


def combine_scores(scores: "np.ndarray", method: str, coefficient: float = 0.0) -> "np.ndarray":
    """Combine scores (models, B) -> (B,). The methods are "mean", "min" (the paper's worst-case
    optimisation) and "uwo" (its uncertainty-weighted optimisation), ``mean - coefficient *
    variance`` (over n).
    """
    if method == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - coefficient * scores.var(axis=0) if method == "uwo" else mean


class RewardScorer:
    """Scores completions: the reward function's score of the text (of several turns: of the last)
    plus the reward models' score of the tokens plus the environment's reward.
    """

    def __init__(self, stage: OnlineStage, tokenizer: "Tokenizer", ctx: StageContext):
        self.tokenizer, self.function_name = tokenizer, stage.reward_function
        self.function = load_reward(stage.reward_function) if stage.reward_function else None
        self.models: RewardEnsemble | None = None
        self.std = 0.0  # over the reward models, mean of the completions scored last
        inputs = ctx.inputs.get("reward_model", ())
        if inputs:
            models = [load_reward_model(item.path, tokenizer, stage.dtype) for item in inputs]
            if len(models) > 1:  # one may be a copy under another name
                digests = [weights_digest(model) for model in models]
                stage.check_models([inputs[digests.index(digest)].name for digest in digests])
            self.models = RewardEnsemble(models, stage.ensemble, stage.uwo_coefficient)

    def identity(self) -> str:
        """Identify the scorer: the function's name and file, the reward models' weights."""
        parts = [identify_code(self.function_name)]
        if self.models is not None:
            parts += self.models.identity()
        return " ".join(parts)

    def metrics(self) -> dict[str, float]:
        """Return further metrics of the scores of a round."""
        several = self.models is not None and len(self.models.models) > 1
        return {"ensemble_std": self.std} if several else {}

    def score_function(self, prompts: "Sequence[tuple[list[int], Prompt]]") -> Any:
        """Return a `fastlm.train.online.ScoreFunction` of completions of these prompts."""

        from fastlm.train.rollouts import Episode

        def score(indices: Sequence[int], completions: "Sequence[Completion]") -> list[float]:
            scores = [
                check_reward(completion.reward, prompts[index][1].location)
                if isinstance(completion, Episode) else 0.0
                for index, completion in zip(indices, completions, strict=True)
            ]  # fmt: skip
            if self.function is not None:
                for i, (index, completion) in enumerate(zip(indices, completions, strict=True)):
                    scores[i] += self.call_function(prompts[index][1], completion)
            if self.models is not None:
                sequences = [
                    [*prompts[index][0], *completion.token_ids]
                    for index, completion in zip(indices, completions)
                ]
                model_scores, std = self.models.score(sequences)
                for i, model_score in enumerate(model_scores.tolist()):
                    scores[i] += check_reward(model_score, prompts[indices[i]][1].location)
                self.std = float(std.mean())
            return scores

        return score

    def call_function(self, prompt: "Prompt", completion: "Completion") -> float:
        """Return the reward function's score."""
        from fastlm.train.rollouts import Episode

        assert self.function is not None
        if isinstance(completion, Episode):
            text = completion.text
        else:
            end = -1 if completion.is_stopped else None
            text = decode_text(self.tokenizer, completion.token_ids[:end])
        try:
            value = self.function(text, prompt.row)
        except InputError as error:
            raise InputError(f"{prompt.location}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{prompt.location}: the reward function failed: {reason}") from None
        return check_reward(value, prompt.location)


@dataclass(frozen=True)
class PPO(PPOOptions, OnlineStage):
    """Train a policy on scores of its own completions by PPO, with a value model.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint. docs/ppo.md lists every convention.
    """

    kind = "ppo"
    command = ("ppo",)

    def check(self) -> None:
        super().check()
        steps, max_steps = self.critic_warmup * self.steps_of_round(), self.max_steps
        expected = (
            f"rounds of fewer than the {max_steps} steps of the run, or the policy learns nothing"
        )
        got = f"{self.critic_warmup} of {steps} steps"
        expect(max_steps is None or max_steps > steps, "critic_warmup", expected, got)

    def check_models(self, names: Sequence[str]) -> None:
        super().check_models(names)
        fits = self.value_model != "reward" or names
        expect(fits, "value_model", "a reward_model to begin with", "none")

    def build_objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        from fastlm.train.online_objectives import PPOObjective, build_value_model

        value_model = build_value_model(
            policy, shared=self.value_model == "shared",
            reward=reward_model if self.value_model == "reward" else None,
        )  # fmt: skip
        settings = select_options(self, PPOOptions)
        return PPOObjective(policy, *args, settings, value_model=value_model, **more)

    def title(self) -> str:
        return "PPO"


@dataclass(frozen=True)
class GRPO(GRPOOptions, OnlineStage):
    """Train a policy on scores of its completions, relative to its others of the same prompt.

    Scores come from a function, from a reward model, or from both. The same command run again
    resumes from the last checkpoint.
    """

    kind = "grpo"
    command = ("grpo",)

    def build_objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **more: Any
    ) -> "OnlineObjective":
        from fastlm.train.online_objectives import GRPOObjective

        return GRPOObjective(policy, *args, select_options(self, GRPOOptions), **more)

    def title(self) -> str:
        return "Preference training (RLOO)" if self.loss_type == "rloo" else "GRPO"
