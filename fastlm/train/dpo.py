"""Direct preference optimisation (DPO, IPO, hinge), KTO, SimPO and ORPO: train a model to prefer
the better answers, all but the last two relative to the model before training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.pipeline.stage import InputSpec, ReportSection, StageContext, select_options
from fastlm.train.encoding import rows_summary
from fastlm.train.lora_options import LoraOptions
from fastlm.train.options import TrainOptions, check_unsharded, expect
from fastlm.train.preference_stage import DPOOptions, PreferenceDataset, PreferenceStage
from fastlm.train.training_stage import FEEDBACK

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import Objective


@dataclass(frozen=True)
class DPO(LoraOptions, DPOOptions, PreferenceStage):
    """Train a model on preferences (DPO, IPO, KTO, SimPO, ORPO), so that it prefers the better
    answers.

    The loss compares the model with itself before training, which keeps it close; simpo and orpo do
    not. The same command run again resumes from the last checkpoint.
    """

    kind = "dpo"
    version = 2
    command = ("dpo",)
    inputs = {
        "model": InputSpec(("model",), "Model to train: a run or a Hugging Face folder"),
        "feedback": FEEDBACK,
    }
    result = {**PreferenceStage.result, "pairs": int}
    notes = """Data are .jsonl and .json files of pairs (prompt, chosen, rejected), ranked lists
(prompt, answers, ranks or scores), corrections (prompt, answer, corrected) and, with loss_type =
kto, labels (prompt, completion, label)."""

    batch_size: Annotated[
        int, "Pack this many pairs (kto: labels) into a micro-batch, without padding"
    ] = 4
    lr: Annotated[float, "Warm up to this peak learning rate"] = 1e-6
    warmup_ratio: Annotated[float, "Warm up the learning rate over this share of the run"] = 0.1

    def check(self) -> None:
        super().check()
        self.check_lora()
        self.check_loss()
        dropout, kto = self.lora_dropout, self.loss_type == "kto"
        expected = "0, as log-probabilities are compared without dropout"
        expect(not dropout, "lora_dropout", expected, dropout)
        if kto:
            check_unsharded("loss_type = 'kto'", self.parallel)
        micro_batches = 1 if self.batch_warmup else self.gradient_accumulation_steps
        expected = (
            "2 labels or more per step with loss_type = 'kto', whose reference point is a mean"
        )
        got = f"1{' at the beginning of batch_warmup' if self.batch_warmup else ''}"
        expect(not kto or self.batch_size * micro_batches >= 2, "batch_size", expected, got)

    def feedback_file(self) -> str:
        """Return the file of the feedback; with `kto`, that of thumbs, which are its labels."""
        return "train/kto.jsonl" if self.loss_type == "kto" else super().feedback_file()

    def unit(self) -> str:
        return "labels" if self.loss_type == "kto" else "pairs"

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> PreferenceDataset:
        length = self.example_length(context)
        form = "labels" if self.loss_type == "kto" else "pairs"
        return PreferenceDataset(self, tokenizer, length, context, ctx, form=form)

    def data_facts(self, data: Any) -> dict[str, Any]:
        return {"pairs": len(data.training), "heldout": len(data.heldout)}

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: TrainOptions, **common: Any
    ) -> "Objective":
        import torch

        from fastlm.train.checkpoints import list_checkpoints
        from fastlm.train.dpo_objective import DPOObjective

        dpo_options = select_options(self, DPOOptions)
        objective = DPOObjective(model, data.training, data.heldout, options, dpo_options, **common)
        if not list_checkpoints(ctx.out):  # a checkpoint stores the reference
            objective.measure_reference(getattr(torch, self.dtype), track=ctx.track)
        return objective

    def summary_parts(self, result: Mapping[str, Any], ctx: StageContext) -> tuple[str, list[str]]:
        return f"{result['pairs']:,} {self.unit()}", self.figures(result)

    def section(
        self, ctx: StageContext, result: Mapping[str, Any], metrics: list[dict[str, Any]]
    ) -> ReportSection:
        from fastlm.pipeline.charts import loss_chart

        facts = {
            "preferences": rows_summary(result, f"{result['pairs']:,} {self.unit()}"),
            "loss": f"{self.loss_type}, β {self.beta:g}"
            + (f", gamma {self.simpo_gamma:g}" if self.loss_type == "simpo" else ""),
            "batch": f"{self.step_size()} {self.unit()} without padding",
            **self.lora_facts(result),
        }
        reward = (
            "the gain of its log-probability over the model before training"
            if self.uses_reference
            else "its mean log-probability per token"
        )
        return ReportSection(
            "Preference training",
            f"The reward of an answer is β times {reward}, in nats. A falling reward of the chosen"
            " answers means that the model unlearns them too.",
            facts=facts,
            charts=[loss_chart(metrics, f"loss per {self.unit()[:-1]}")],
            cards=self.cards(result),
        )
