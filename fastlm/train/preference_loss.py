"""The options of DPO's and KTO's loss."""

from dataclasses import dataclass
from typing import Annotated

from fastlm.errors import InputError
from fastlm.pipeline.stage import not_negative, one_of, positive

LOSSES = ("sigmoid", "ipo", "hinge", "kto")


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss, see `fastlm.train.losses.dpo_loss` and `kto_loss`."""

    loss: Annotated[str, "sigmoid (DPO), ipo, hinge or kto"] = "sigmoid"
    beta: Annotated[float, "Scale of the log-ratios; larger stays closer to the base"] = 0.1
    label_smoothing: Annotated[float, "Share of pairs taken to be wrong (cDPO), below 0.5"] = 0.0
    length_normalise: Annotated[bool, "Divide the log-ratio of an answer by its length"] = False
    sft_weight: Annotated[float, "Weight of the chosen answers' loss per token, beside"] = 0.0
    weight_desirable: Annotated[float, "Weight of desirable answers (kto)"] = 1.0
    weight_undesirable: Annotated[float, "Weight of undesirable answers (kto)"] = 1.0

    def check_loss(self) -> None:
        one_of(self, loss=LOSSES)
        positive(self, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            raise InputError(
                f"label_smoothing: wanted a number in [0, 0.5), got {self.label_smoothing}"
            )
        not_negative(self, "sft_weight", "weight_desirable", "weight_undesirable")
        serve = {
            "label_smoothing": ("sigmoid",),
            "length_normalise": ("sigmoid", "ipo", "hinge"),
            "sft_weight": ("sigmoid", "ipo", "hinge"),
            "weight_desirable": ("kto",),
            "weight_undesirable": ("kto",),
        }
        for name, losses in serve.items():
            value = getattr(self, name)
            if self.loss not in losses and value != getattr(PreferenceLoss, name):
                raise InputError(
                    f"{name}: wanted none with loss = {self.loss!r}, got {value}"
                    f" (it serves {', '.join(losses)})"
                )
