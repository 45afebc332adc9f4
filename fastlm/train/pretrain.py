"""Next-token prediction on packed shards: the objective that makes a base model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.data.shards import BatchSampler, TokenDataset
from fastlm.errors import InputError
from fastlm.evals.bits_per_byte import evaluate
from fastlm.progress import silent
from fastlm.train.loop import TrainOptions, TrainResult, train

if TYPE_CHECKING:
    from fastlm.tokenizer import Tokenizer

Batch = tuple[Tensor, Tensor]


class NextToken:
    """The objective (``fastlm.train.loop.Objective``) of ``pretrain``."""

    def __init__(
        self,
        sampler: BatchSampler,
        val: TokenDataset | None,
        options: TrainOptions,
        tokenizer: "Tokenizer | None",
        device: torch.device,
    ):
        self.sampler, self.val, self.options = sampler, val, options
        self.tokenizer, self.device = tokenizer, device

    def identity(self) -> dict[str, Any]:
        state = self.sampler.state_dict()
        fixed = {f"data.{k}": v for k, v in state.items() if k not in ("epoch", "position")}
        return {**fixed, "batch_size": self.sampler.batch_size}

    def next_batch(self) -> Batch:
        input_ids, labels = self.sampler.next_batch()
        return input_ids.to(self.device), labels.to(self.device)

    def num_items(self, batch: Batch) -> int:
        return batch[1].numel()  # packed windows have no ignored labels

    def loss(self, model: nn.Module, batch: Batch, num_items: int) -> Tensor:
        return model(batch[0], shift_labels=batch[1], num_items=num_items).loss

    def position(self) -> str:
        state = self.sampler.state_dict()
        return (
            f"epoch {state['epoch']}, windows from {state['position']}"
            f" of {self.sampler.dataset.path}"
        )

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sampler.load_state_dict(state)

    def validate(self, model: nn.Module) -> dict[str, float]:
        if self.val is None:
            return {}
        seq_len = self.sampler.seq_len
        result = evaluate(
            model, self.val, seq_len, self.sampler.batch_size, max_tokens=self.options.val_tokens
        )
        return {"val_loss": result.loss, "bits_per_byte": result.bits_per_byte}

    def sample(self, model: nn.Module) -> str | None:
        o = self.options
        if self.tokenizer is None or o.sample_tokens == 0:
            return None
        ids = self.tokenizer.encode(o.sample_prompt)
        if not ids:
            ids = [self.sampler.dataset.eos_id]
        tokens = model.generate(  # type: ignore[operator]
            torch.tensor([ids], device=self.device),
            max_new_tokens=o.sample_tokens, temperature=0.8, top_k=50, seed=self.sampler.seed,
            stop_ids=(self.sampler.dataset.eos_id,),
        )  # fmt: skip
        return o.sample_prompt + self.tokenizer.decode(tokens[0, len(ids) :].tolist())


def pretrain(
    model: nn.Module,
    train_data: BatchSampler,
    val: TokenDataset | None,
    options: TrainOptions,
    run_dir: Path,
    *,
    tokenizer: "Tokenizer | None" = None,
    track=silent,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> TrainResult:
    """Trains ``model`` on ``train_data``, validating on ``val`` in bits per byte; see ``train``.

    InputError also when data, tokenizer and model disagree on the vocabulary.
    """
    vocab_size = model.get_parameter("model.embed_tokens.weight").shape[0]
    sizes = {"train": train_data.dataset.vocab_size}
    if val is not None:
        sizes["val"] = val.vocab_size
    if tokenizer is not None:
        sizes["tokenizer"] = tokenizer.vocab_size
    for name, size in sizes.items():
        if size > vocab_size:
            raise InputError(
                f"{name}: wanted a vocabulary of at most the model's {vocab_size}, got {size}"
            )
    device = next(model.parameters()).device
    objective = NextToken(train_data, val, options, tokenizer, device)
    return train(model, objective, options, run_dir, track=track, on_event=on_event)
