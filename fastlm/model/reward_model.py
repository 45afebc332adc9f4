"""`RewardModel`: the layers of a causal language model with a scalar head."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.checkpoint.config import ModelConfig
from fastlm.checkpoint.folder import load_state, save_hf
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

HEAD = "score.weight"  # Hugging Face's name of the head
MEAN, STD = "score_mean", "score_std"  # of the head's output; keys of config.json
BATCH_TOKENS = 8192  # of one forward of `score`


class RewardModel(nn.Module):
    """Scores sequences: ``(h w - mean) / std``, h (E) the last layer's normed output at the last
    token, w (E) the head. `normalise` sets mean and std, which are 0 and 1 at first.

    The head is drawn from N(0, 1 / (E + 1)) (Stiennon et al. 2020, arXiv:2009.01325), by ``seed``
    alone. It has no bias: a loss of comparisons does not depend on one, and ``mean`` replaces it.
    """

    def __init__(self, config: ModelConfig, *, seed: int | None = None):
        super().__init__()
        # Tied: so there is no language model head among the parameters. The padding token must not
        # end answers: transformers would score the token before it
        pad = None if config.pad_token_id in config.stop_ids else config.pad_token_id
        self.trunk = CausalLM(
            replace(config, tie_word_embeddings=True, pad_token_id=pad), seed=seed
        )
        self.head = nn.Linear(config.hidden_size, 1, bias=False)
        self.mean = float(config.extra.get(MEAN, 0.0))
        self.std = float(config.extra.get(STD, 1.0))
        if not self.head.weight.is_meta:
            self._draw_head(seed)

    @torch.no_grad()
    def _draw_head(self, seed: int | None) -> None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        std = 1 / math.sqrt(self.config.hidden_size + 1)
        draw = torch.empty(self.head.weight.shape, device="cpu")
        self.head.weight.copy_(draw.normal_(0.0, std, generator=generator))

    @property
    def config(self) -> ModelConfig:
        return self.trunk.config

    @property
    def device(self) -> torch.device:
        return self.trunk.device

    @property
    def dtype(self) -> torch.dtype:
        return self.trunk.dtype

    @classmethod
    def from_causal_lm(cls, model: CausalLM, *, seed: int | None = None) -> "RewardModel":
        """Return a reward model with the layers of ``model`` (shared, not copied) and a new
        head."""
        with torch.device("meta"):
            reward_model = cls(model.config)
        reward_model.trunk.model = model.model
        head = nn.Linear(model.config.hidden_size, 1, bias=False, device=model.device)
        reward_model.head = head
        reward_model._draw_head(seed)
        return reward_model

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, dtype: torch.dtype | None = None
    ) -> "RewardModel":
        """Load a folder of `save_pretrained`, in eval mode. InputError: see `load_state`; a model
        without a head of one score.
        """
        config_dict, tensors = load_state(path, keep_quantized=False)
        config = ModelConfig.from_dict(config_dict)
        with torch.device("meta"):
            reward_model = cls(config)
        state: dict[str, Any] = dict(tensors)
        state = {
            "head.weight" if name == HEAD else f"trunk.{name}": tensor.to(dtype or tensor.dtype)
            for name, tensor in state.items()
        }
        expected = (1, config.hidden_size)
        shape = tuple(state["head.weight"].shape) if "head.weight" in state else "none"
        if shape != expected:
            raise InputError(
                f"{path}: expected a reward model, with {HEAD} {expected}, got {shape}"
            )
        reward_model.load_state_dict(state, strict=False, assign=True)  # `load_state` checked them
        return reward_model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a Hugging Face folder that transformers' AutoModelForSequenceClassification loads.
        Its logit is ``h w``: subtract config.json's ``score_mean`` and divide by ``score_std`` for
        the score.
        """
        state: dict[str, Any] = {
            HEAD if name == "head.weight" else name.removeprefix("trunk."): parameter
            for name, parameter in self.named_parameters()
        }
        dtype = str(self.dtype).removeprefix("torch.")
        family = self.config.family.architecture.removesuffix("ForCausalLM")
        family += "Text" if self.config.model_type == "gemma3_text" else ""
        config = {
            **self.config.to_dict(),
            "architectures": [f"{family}ForSequenceClassification"],
            "num_labels": 1,
            MEAN: self.mean,
            STD: self.std,
            "dtype": dtype,
            "torch_dtype": dtype,  # transformers 4's name
        }
        save_hf(folder, config, state)

    def normalise(self, scores: Tensor) -> None:
        """Set mean and std so that these scores of this model get mean 0 and standard deviation 1
        (over n). Where all are equal, only the mean changes.
        """
        raw = scores.double() * self.std + self.mean
        std = float(raw.std(correction=0))
        self.mean, self.std = float(raw.mean()), std if std > 0 else 1.0

    def values(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Return the score at every position, (1, total) float32, with gradients.

        Args:
            input_ids: (1, total), n sequences one after another.
            cu_seqlens: (n + 1,) int32, where they begin.
        """
        hidden = self.trunk.hidden(input_ids, cu_seqlens=cu_seqlens)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        raw = hidden.to(wide) @ self.head.weight[0].to(wide)
        return (raw - self.mean) / self.std

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Return the score at the last token of each sequence of ids, (B,) float32, without
        gradients. There is no padding: the last token is that of the list.

        InputError: an empty sequence, or one beyond the context.
        """
        limit = self.trunk.context_limit
        for i, sequence in enumerate(sequences):
            if not 0 < len(sequence) <= limit:
                raise InputError(
                    f"sequences[{i}]: expected 1 to {limit} tokens, got {len(sequence)}"
                )
        batches: list[list[Sequence[int]]] = [[]]  # of at most BATCH_TOKENS, or one sequence
        for sequence in sequences:
            if batches[-1] and sum(map(len, batches[-1])) + len(sequence) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(sequence)
        return torch.cat([self._score(batch) for batch in batches])

    def _score(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        if not sequences:
            return torch.zeros(0, device=self.device)
        ids = torch.tensor([[i for s in sequences for i in s]], device=self.device)
        lengths = torch.tensor([0, *map(len, sequences)], device=self.device)
        ends = lengths.cumsum(0)
        return self.values(ids, ends.to(torch.int32))[0, ends[1:] - 1]


def scores(
    model: RewardModel,
    tokenizer: "Tokenizer",
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    **variables: Any,
) -> Tensor:
    """Return the score of the last answer of each conversation (messages), (B,) float32."""
    return model.score([scored_tokens(tokenizer, c, **variables) for c in conversations])


def scored_tokens(
    tokenizer: "Tokenizer", messages: Sequence[Mapping[str, Any]], **variables: Any
) -> list[int]:
    """Return the tokens of a conversation that are scored: the chat template's text, up to the
    token that ends the last answer. ``variables``: see `Tokenizer.encode_conversation`.
    """
    learnt = [False] * (len(messages) - 1) + [True]
    ids, mask = tokenizer.encode_conversation(messages, learnt, **variables)[-1]
    return ids[: len(mask) - mask[::-1].index(True)]
