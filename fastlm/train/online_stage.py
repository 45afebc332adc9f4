"""The stages that learn from their own answers: options and run of `ppo` and `grpo`."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from fastlm.data.verify import CHECKS, checked, load_reward
from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    Job,
    MaybePositional,
    Part,
    Stage,
    Takes,
    not_negative,
    one_of,
)
from fastlm.sources.generated import SCHEME, check_scored, is_generated
from fastlm.sources.input_digest import Contents
from fastlm.torchrun import leads
from fastlm.train.chat_options import FEEDBACK, ChatOptions
from fastlm.train.distributed import check_replicas
from fastlm.train.encoding import (
    Encoder,
    Prompts,
    chat_tokenizer,
    check_vocabulary,
    place_in_order,
    told_rows,
    weights_digest,
)
from fastlm.train.ensemble import ENSEMBLES, RewardEnsemble
from fastlm.train.lora_options import LoraOptions
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.options import OPTIMIZERS, TrainOptions
from fastlm.train.rollout_options import RolloutOptions

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.inference.requests import Completion
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.reward_model import RewardModel
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.online import Online

MODEL, LAST_GOOD = "model", "last-good"


@dataclass(frozen=True)
class OnlineStage(LoraOptions, RolloutOptions, ChatOptions, Stage):
    """A stage whose objective is a `fastlm.train.online.Online`; a subclass makes it."""

    version = 2
    overlongs: ClassVar[tuple[str, ...]] = ("skip",)
    rows: ClassVar[str] = "prompts"
    form: ClassVar[str] = "prompts"
    unused = ("val_tokens",)  # `val_prompts` says how long a validation is
    reads = {
        "model": Takes(("model",), "Policy to train: a run, a Hugging Face folder"),
        "reward_model": Takes(
            ("reward",),
            "Reward model that scores answers; several are an ensemble",
            several=True,
            optional=True,
        ),
        "feedback": FEEDBACK,
    }
    leaves = {"model": MODEL}
    scratch = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "parameters": int, "trained_parameters": int, "prompts": int, "heldout": int, "read": int,
        "counts": dict, "used_seconds": float, "load": str, "prompt": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of rows with a prompt or question (a text or
messages), or conversations, of which what precedes the last answer is the prompt."""

    data: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Prompts: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB, or"
            " reasoning-gym:NAME?KEY=VALUE&..."
        ),
    ] = ()
    reward: Annotated[
        str,
        "Function that scores answers: exact, contains, number, reasoning-gym, or file.py:function",
    ] = ""
    ensemble: Annotated[
        str, "Score of several reward models: mean, min, or uwo (mean - uwo_coefficient * variance)"
    ] = "mean"
    uwo_coefficient: Annotated[float, "What a disagreement of the reward models costs"] = 0.1
    seq_len: Annotated[int | None, "Most tokens of prompt and answer; default: the context"] = None
    overlong: Annotated[str, "Prompts that leave no room for an answer: skip"] = "skip"
    heldout: Annotated[float, "Share of the prompts that is held out"] = 0.05
    keep_best: Annotated[bool, "Also keep the weights of the highest val_score"] = False
    take: Annotated[str, "The weights to leave: last, or best (of the highest val_score)"] = "last"
    spike_factor: Annotated[
        float | None, "A loss so many standard deviations above the mean of spike_window is a spike"
    ] = None  # a surrogate's loss says little
    lr: Annotated[float, "Peak learning rate"] = 1e-6
    eps: Annotated[float, "AdamW's epsilon"] = 1e-5
    checkpoint_every: Annotated[int, "Steps between checkpoints"] = 50
    sample_prompt: Annotated[str, "Message that a sample answers; default: a held-out prompt"] = ""

    def check(self) -> None:
        check_replicas(self.kind, self.parallel)
        super().check()
        self.check_lora()
        self.check_rollouts()
        not_negative(self, "uwo_coefficient")
        one_of(self, ensemble=ENSEMBLES)
        if self.reward == SCHEME:
            for spec in filter(is_generated, self.data):
                check_scored(spec)
        if self.lora_dropout:
            raise InputError(
                f"lora_dropout: wanted 0, as the update needs the probabilities that the answers"
                f" were drawn with, got {self.lora_dropout}"
            )
        if self.checkpoint_every < (steps := self.steps_of_round()):
            raise InputError(
                f"checkpoint_every: wanted at least the {steps} steps of a round, so that a"
                f" checkpoint from before it is kept, got {self.checkpoint_every}"
            )
        if self.batch_warmup:
            raise InputError(
                f"batch_warmup: wanted 0, as a round has a fixed number of steps, got"
                f" {self.batch_warmup}"
            )
        if self.keep < 2:
            raise InputError(f"keep: wanted 2 or more, as the last may be too far, got {self.keep}")

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_models([facts["name"] for facts in inputs["reward_model"]])
        return super().plan(inputs)

    def check_models(self, names: Sequence[str]) -> None:
        """Refuse what does not fit reward models of these names."""
        if not self.reward and not names:
            raise InputError("reward: wanted a function, or a reward_model, got neither")
        if len(names) < 2 and self.ensemble != "mean":
            raise InputError(
                f"ensemble: wanted two or more reward_models for {self.ensemble}, got {len(names)}"
            )
        if len(set(names)) < len(names):
            raise InputError(f"reward_model: wanted each once, got {', '.join(names)}")

    def steps_of_round(self) -> int:
        size = self.batch_size * self.accumulate
        return self.passes * math.ceil(self.prompts * self.answers / size)

    def train_options(self, examples: int) -> TrainOptions:
        """The options of the loop, with `epochs` as a number of steps."""
        options = self.loop_options()
        epochs = self.epochs
        if epochs is None and not (self.max_steps is self.max_seconds is self.max_tokens is None):
            return options
        rounds = math.ceil((epochs or 1.0) * examples / self.prompts)
        steps = rounds * self.steps_of_round()
        most = steps if self.max_steps is None else self.max_steps
        return replace(options, max_steps=min(steps, most))

    def contents(self, contents: Contents) -> Any:
        where = self.reward.rpartition(":")[0]
        function = contents.tree(where) if where.endswith(".py") else None
        return [super().contents(contents), function]

    def objective(
        self, policy: "CausalLM", reward_model: "RewardModel | None", *args: Any, **options: Any
    ) -> "Online":
        """The objective on ``policy``; the rest is for `Online`."""
        raise NotImplementedError

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.checkpoint.architectures import expected_shapes
        from fastlm.train.loop import train
        from fastlm.train.objective import DivergedError

        self = self.with_feedback(job)
        self.check_models([one.name for one in job.inputs.get("reward_model", ())])
        source = job.path("model")
        model = self.load_trained(source, dtype=self.dtype, seed=self.seed, warn=job.warn)
        tokenizer = chat_tokenizer(source, model.config.to_dict(), self.chat_template)
        context = self.seq_len or model.config.max_position_embeddings
        self.longest(model.config.max_position_embeddings)  # refuses a seq_len beyond it
        scorer = Scorer(self, tokenizer, job)
        if scorer.models is not None:
            context = min(context, scorer.models.context_limit)
        questions = Questions(self, tokenizer, context - self.max_new_tokens, job)
        if not questions.training:
            found = told_rows(questions.rows, len(questions.heldout))
            raise InputError(f"data: wanted prompts to answer, got none in {found}")
        sample, asked = questions.samples.choose(self, tokenizer, context)
        options = self.train_options(len(questions.training))
        base = weights_digest(model)
        model.config.eos_token_id = sorted(model.config.stop_ids | tokenizer.stop_ids)
        torch.manual_seed(self.seed)
        objective = self.objective(
            model, scorer.models.models[0] if scorer.models else None, self.reference(model),
            [ids for ids, _ in questions.training], [ids for ids, _ in questions.heldout],
            scorer.of(questions.training),
            base=base, scored_by=scorer.identity(), score_heldout=scorer.of(questions.heldout),
            stop_ids=tokenizer.stop_ids,
            places=[prompt.place for _, prompt in questions.training], sample_prompt=sample,
            answer_text=partial(text_of, tokenizer), sample_tokens=self.sample_tokens,
            score_metrics=scorer.metrics, warn=job.warn if leads() else lambda message: None,
        )  # fmt: skip
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        load = os.getloadavg()[0]

        def keep_last_good(error: DivergedError) -> None:
            if error.good is not None:
                objective.load_policy(error.good)
                self.save_trained(model, job.out / LAST_GOOD, source)
                tokenizer.save(job.out / LAST_GOOD)
                job.warn(f"the policy of that checkpoint is {job.out / LAST_GOOD}")

        done = train(
            objective, options, job.out, track=job.track, on_event=job.on_event,
            on_diverged=keep_last_good,
        )  # fmt: skip
        if not leads():
            return {}
        self.save_trained(model, job.out / MODEL, source)
        tokenizer.save(job.out / MODEL)
        return {
            **done.facts(load),
            "parameters": sum(map(math.prod, expected_shapes(model.config).values())),
            "trained_parameters": trained,
            "prompts": len(questions.training),
            "heldout": len(questions.heldout),
            "read": questions.rows.read,
            "counts": dict(questions.rows.counts),
            "prompt": asked,
        }

    def reference(self, model: "CausalLM") -> "CausalLM | None":
        """A frozen copy of the policy in the training's dtype; with adapters None (`Online`)."""
        import copy

        import torch

        if self.lora_rank:
            return None
        return copy.deepcopy(model).to(getattr(torch, self.dtype))

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        metrics = [m for m in read_metrics(job.out / METRICS) if "val_score" in m]
        held = ""
        if metrics:
            first, last = metrics[0]["val_score"], metrics[-1]["val_score"]
            held = f", held-out score {first:.3f} to {last:.3f}"
        kept = f", weights of step {result['best_step']}" if self.take == "best" else ""
        return (
            f"{result['prompts']:,} prompts, {result['steps']} steps{held},"
            f" {result['tokens_per_second']:,.0f} answer tokens/s{kept}: {job.out / MODEL}"
        )

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.pipeline.text import count_text, seconds_text
        from fastlm.train.online_charts import (
            frontier_chart,
            kl_chart,
            length_chart,
            score_chart,
        )

        metrics = read_metrics(job.out / METRICS)
        more = {"adapters": self.lora_told(result)} if self.lora_rank else {}
        held = [m for m in metrics if "val_score" in m]
        models = job.inputs.get("reward_model", ())
        cards = []
        if held:
            first, last = held[0], held[-1]
            cards = [(
                f"{last['val_score']:.3f}",
                f"held-out score ± {last['val_score_error']:.3f}; {first['val_score']:.3f} before",
            )]  # fmt: skip
        return Part(
            self.title(),
            "The policy answers prompts, and learns from the scores of its own answers.",
            facts={
                "prompts": f"{told_prompts(result)}",
                **more,
                "score": " + ".join(
                    [*([f"function {self.reward}"] if self.reward else []),
                     *([told_models(len(models), self.ensemble)] if models else [])]
                ),
                "round": f"{self.prompts} prompts, {self.answers} answers each,"
                f" {self.passes} {'pass' if self.passes == 1 else 'passes'} in steps of"
                f" {self.batch_size * self.accumulate}",
                "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
                f" β {self.beta}, {self.dtype}",
                "answers": f"{count_text(result['tokens'])} tokens learnt from, at temperature"
                f" {self.temperature}, at most {self.max_new_tokens} each",
                "time": f"{seconds_text(result['used_seconds'])}, rollouts, steps and checkpoints",
                "machine load": result["load"],
            },
            charts=[
                score_chart(metrics), frontier_chart(metrics), kl_chart(metrics),
                length_chart(metrics), *self.charts(metrics),
            ],
            cards=cards,
            template="training.html.jinja",
            values={
                "samples": [m for m in metrics if "sample" in m],
                "how": f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0.",
            },
        )  # fmt: skip

    def charts(self, metrics: list[dict[str, Any]]) -> list[str]:
        """Further charts of the report."""
        del metrics
        return []

    def title(self) -> str:
        raise NotImplementedError


def told_models(count: int, ensemble: str) -> str:
    return "reward model" if count == 1 else f"{ensemble} of {count} reward models"


def told_prompts(result: Mapping[str, Any]) -> str:
    from fastlm.train.encoding import reasons

    rows = f"{result['read']:,} rows, {result['heldout']:,} held out"
    return f"{rows}; {reasons(result['counts'])}" if result["counts"] else rows


class Questions:
    """The prompts of a stage as (ids, prompt): ``training``, and ``heldout`` in the order of
    `place_in_order`.
    """

    def __init__(self, stage: OnlineStage, tokenizer: "Tokenizer", most: int, job: Job):
        from fastlm.data.conversations import Rows
        from fastlm.data.prompts import read_prompts

        self.rows, self.samples = Rows(), Prompts()
        encoder = Encoder(stage, tokenizer, job, self.rows.counts)
        self.training: list[tuple[list[int], Prompt]] = []
        heldout: list[tuple[float, tuple[list[int], Prompt]]] = []
        read = read_prompts(
            stage.data, cache=job.cache, skip_bad=stage.skip_bad, rows=self.rows, tell=job.skipped
        )
        for prompt in job.track(read, "reading prompts", unit="prompts"):
            variables: dict[str, Any] = {} if prompt.tools is None else {"tools": prompt.tools}
            try:
                # nothing may be lost on the way into the template
                answered = [*prompt.messages, {"role": "assistant", "content": "."}]
                tokenizer.check_written(answered, variables, stage.date)
                ids = tokenizer.encode_chat(prompt.messages, date=stage.date, **variables)
            except InputError as error:
                encoder.refuse(error, prompt.place)
                continue
            if len(ids) > most:
                self.rows.counts["too long"] += 1
                continue
            if check := CHECKS.get(stage.reward):
                try:
                    check(prompt.row)
                except InputError as error:
                    if not stage.skip_bad:
                        raise InputError(f"{prompt.place}: {error}") from None
                    self.rows.counts["without a right answer"] += 1
                    continue
            place = place_in_order(prompt)
            if place < stage.heldout:
                heldout.append((place, (ids, prompt)))
            else:
                self.training.append((ids, prompt))
            self.samples.add(place, prompt.messages, prompt.tools)
        encoder.finish()
        self.heldout = [question for _, question in sorted(heldout, key=lambda pair: pair[0])]


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


class Scorer:
    """The score of an answer: what the function says of its text, plus what the reward models say
    of its tokens.
    """

    def __init__(self, stage: OnlineStage, tokenizer: "Tokenizer", job: Job):
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
