"""TRL's SFTTrainer on the loss of a patched model::

    from fastlm.compat.trl import SFTTrainer

    SFTTrainer(fastlm.patch(model), args, train_dataset=dataset).train()

TRL (1.16) does not use the model's loss. It multiplies by the head's weight itself, in chunks, for
each token's log-probability, entropy and rank, so the loss that `fastlm.patch` gives a model never
runs. For another loss, TRL's documentation says to override ``compute_loss`` in a subclass. (Its
``compute_loss_func`` computes the logits and runs a second forward for the metrics.)
"""

from typing import Any

from torch import Tensor, nn
from trl.trainer import sft_trainer

from fastlm.errors import InputError
from fastlm.hf.patching import patched_ops


class SFTTrainer(sft_trainer.SFTTrainer):
    """`trl.SFTTrainer` whose training steps use the model's loss, as transformers' Trainer does.

    The loss and its gradient have the same values. Training logs have neither ``entropy`` nor
    ``mean_token_accuracy`` nor ``num_tokens``, which would cost the product with the head again
    (``include_num_input_tokens_seen`` counts tokens). Evaluation is TRL's, with all its metrics.

    Raises:
        InputError: the model has no ``linear_cross_entropy`` of `fastlm.patch`, or its head has
            since been replaced by another layer; an option that selects another loss.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        options: Any = self.args
        if "linear_cross_entropy" not in patched_ops(model):
            raise InputError(
                "model: expected one patched with linear_cross_entropy (fastlm.patch),"
                f" got {type(model).__name__}"
            )
        if type(head := model.get_output_embeddings()) is not nn.Linear:
            raise InputError(f"model: expected a head that is nn.Linear, got {type(head).__name__}")
        for name, value, expected in (
            ("args.loss_type", options.loss_type, "nll"),
            ("args.label_smoothing_factor", options.label_smoothing_factor, 0.0),
            ("compute_loss_func", self.compute_loss_func, None),
            ("model.config.output_router_logits", self.aux_loss_enabled, False),
        ):
            if value != expected:
                raise InputError(f"{name}: expected {expected} with the model's loss, got {value}")

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs["use_cache"] = False
        base: Any = super(sft_trainer.SFTTrainer, self)  # the class that TRL's overrides
        return base.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
