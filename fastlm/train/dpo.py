"""Direct preference optimisation (DPO, IPO, hinge) and KTO: a model comes to prefer the better
answers, measured against itself before training.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Job, MaybePositional, Part, Stage, Takes, select_options
from fastlm.torchrun import leads
from fastlm.train.best import taken
from fastlm.train.chat_options import FEEDBACK, ChatOptions
from fastlm.train.distributed import check_replicas
from fastlm.train.encoding import chat_tokenizer, reasons, weights_digest
from fastlm.train.lora_options import LoraOptions
from fastlm.train.metrics import METRICS, read_metrics
from fastlm.train.options import OPTIMIZERS
from fastlm.train.preference_loss import PreferenceLoss
from fastlm.train.preferences import Preferences, accuracy_told

MODEL = "model"


@dataclass(frozen=True)
class Dpo(LoraOptions, PreferenceLoss, ChatOptions, Stage):
    """Train a model on preferences (DPO, IPO, KTO): it comes to prefer the better answers.

    It is compared with itself before training, which keeps it close to that. The same command run
    again resumes from the last checkpoint.
    """

    kind = "dpo"
    version = 2
    command = ("dpo",)
    reads = {
        "model": Takes(("model",), "Model to train: a run, a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    leaves = {"model": MODEL}
    scratch = ("checkpoints",)
    result = {
        "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
        "metrics": dict, "parameters": int, "trained_parameters": int, "pairs": int,
        "heldout": int, "read": int, "counts": dict, "used_seconds": float, "load": str,
        "prompt": str,
    }  # fmt: skip
    notes = """Read are .jsonl and .json files of pairs (prompt, chosen, rejected), ranked lists
(prompt, answers, ranks or scores), corrections (prompt, answer, corrected) and, with loss = kto,
labels (prompt, completion, label)."""
    rows = "preferences"
    form = "preferences"

    data: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Preferences: .jsonl or .json files, folders, pypi:, sdist: or deb:NAME#GLOB"
        ),
    ] = ()
    batch_size: Annotated[int, "Pairs (kto: labels) per micro-batch, joined without padding"] = 4
    accumulate: Annotated[int, "Micro-batches per step"] = 4
    seq_len: Annotated[
        int | None, "Most tokens of prompt and answer; default: the context, at most 2048"
    ] = None
    overlong: Annotated[str, "Longer answers: skip the row, or truncate"] = "skip"
    heldout: Annotated[float, "Share of the prompts that is held out"] = 0.1
    lr: Annotated[float, "Peak learning rate"] = 1e-6
    warmup: Annotated[float, "Share of the run in which the rate rises"] = 0.1

    def check(self) -> None:
        super().check()
        self.check_lora()
        self.check_loss()
        if self.lora_dropout:
            raise InputError(
                "lora_dropout: wanted 0, as the reference is measured without dropout, got"
                f" {self.lora_dropout}"
            )
        if self.loss == "kto":
            check_replicas("loss = 'kto'", self.parallel)
        least = self.batch_size * (1 if self.batch_warmup else self.accumulate)
        if self.loss == "kto" and least < 2:
            raise InputError(
                "batch_size: wanted a step of 2 labels or more with loss = 'kto', whose reference"
                " point is a mean over the step, got 1"
                f"{' at the beginning of batch_warmup' if self.batch_warmup else ''}"
            )

    def feedback_form(self) -> str:
        """With `kto`, the thumbs of the feedback are its labels."""
        return "kto" if self.loss == "kto" else super().feedback_form()

    def run(self, job: Job) -> dict[str, Any]:
        import torch

        from fastlm.checkpoint.architectures import expected_shapes
        from fastlm.train.dpo_objective import PreferredAnswers
        from fastlm.train.loop import DTYPES, train
        from fastlm.train.state import list_checkpoints

        self = self.with_feedback(job)
        source = job.path("model")
        model = self.load_trained(source, dtype=self.dtype, seed=self.seed, warn=job.warn)
        tokenizer = chat_tokenizer(source, model.config.to_dict(), self.chat_template)
        context = model.config.max_position_embeddings
        kind = "labels" if self.loss == "kto" else "pairs"
        found = Preferences(self, tokenizer, self.longest(context), job, kind)
        prompt, asked = found.prompts.choose(self, tokenizer, context)
        if not found.training:
            raise InputError(f"data: wanted {kind} to learn from, got none in {found.told()}")
        options = self.train_options(len(found.training))
        base = weights_digest(model)
        model.config.eos_token_id = sorted(model.config.stop_ids | tokenizer.stop_ids)
        objective = PreferredAnswers(
            model, found.training, found.heldout, options, select_options(self, PreferenceLoss),
            batch_size=self.batch_size, seed=self.seed, base=base, tokenizer=tokenizer,
            prompt=prompt, device=model.device,
        )  # fmt: skip
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        torch.manual_seed(self.seed)
        load = os.getloadavg()[0]
        if not list_checkpoints(job.out):  # a checkpoint has the reference of its training
            objective.measure_reference(DTYPES[self.dtype], track=job.track)
        done = train(objective, options, job.out, track=job.track, on_event=job.on_event)
        if not leads():
            return {}
        self.save_trained(model, job.out / MODEL, source)
        tokenizer.save(job.out / MODEL)
        return {
            **done.facts(load),
            "parameters": sum(map(math.prod, expected_shapes(model.config).values())),
            "trained_parameters": trained,
            "pairs": len(found.training),
            "heldout": len(found.heldout),
            "read": found.rows.read,
            "counts": dict(found.rows.counts),
            "prompt": asked,
        }

    def told(self, result: Mapping[str, Any], job: Job) -> str:
        loss = "no loss" if result["loss"] is None else f"loss {result['loss']:.4f}"
        return (
            f"{result['pairs']:,} {self._unit()}, {result['steps']} steps, {loss}"
            f"{accuracy_told(result['metrics'])}{taken(result, self.take)}: {job.out / MODEL}"
        )

    def _unit(self) -> str:
        return "labels" if self.loss == "kto" else "pairs"

    def report(self, job: Job, result: Mapping[str, Any]) -> Part:
        from fastlm.pipeline.charts import loss_chart
        from fastlm.pipeline.text import seconds_text
        from fastlm.train.preference_charts import accuracy_chart, rewards_chart

        metrics = read_metrics(job.out / METRICS)
        steps = [m for m in metrics if "logp_chosen" in m]
        rows = f"{result['read']:,} rows: {result['pairs']:,} {self._unit()} learnt from"
        rows += f", {result['heldout']:,} held out"
        if result["counts"]:
            rows += f"; {reasons(result['counts'])}"
        facts = {
            "preferences": rows,
            "loss": f"{self.loss}, β {self.beta:g}",
            "batch": f"{self.batch_size * self.accumulate} {self._unit()} without padding",
            "schedule": f"{OPTIMIZERS[self.optimizer]}, {self.schedule}, peak {self.lr},"
            f" weight decay {self.weight_decay}, {self.dtype}",
            "time": f"{seconds_text(result['used_seconds'])}, steps and checkpoints",
            "machine load": result["load"],
        }
        if self.lora_rank:
            facts["adapters"] = self.lora_told(result)
        cards = []
        if (accuracy := result["metrics"].get("val_accuracy")) is not None:
            error = result["metrics"]["val_accuracy_error"]
            facts["held-out accuracy"] = f"{100 * accuracy:.1f} % ± {100 * error:.1f}"
            cards = [(f"{100 * accuracy:.0f} %", "of held-out answers ranked right")]
        return Part(
            "Preference training",
            "An answer's reward is β times how much likelier it has become, in nats, than by the"
            " model before training. A falling reward of the chosen answers means that the model"
            " unlearns them too.",
            facts=facts,
            charts=[
                loss_chart(metrics, f"loss per {self._unit()[:-1]}"),
                rewards_chart(metrics),
                *([accuracy_chart(metrics)] if steps else []),
            ],
            cards=cards,
            template="training.html.jinja",
            values={
                "samples": [m for m in metrics if "sample" in m],
                "how": f"Answers to “{shorten(result['prompt'], 200)}”, at temperature 0.",
            },
        )
