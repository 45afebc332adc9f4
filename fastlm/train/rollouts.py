"""Sample completions from the current policy and pack them for training: tokens in, tokens out.

A completion stores the sampled ids and their log-probabilities; its text is never tokenized again.
Lengths decide which tokens belong to a completion, never token ids: a model whose pad token is its
end token (SmolLM2-Instruct) learns its end token like any other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.requests import Completion, batch_requests
from fastlm.inference.sampling import Sampling
from fastlm.model.generation import make_engine
from fastlm.train.objective import IGNORE, Example, pack_groups

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def sample_completions(
    model: "CausalLM",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    max_num_seqs: int = 64,
) -> list[Completion]:
    """Sample a completion of every prompt, at most ``max_num_seqs`` at a time.

    Completion i draws from ``seed + i``. It ends with the first end token of the model or of
    ``stop_ids``, which is included, or after ``max_new_tokens``. There are no top-k, top-p and
    min-p: they would sample from another policy than the trained one, and KL estimates would be
    wrong (even negative). Temperature 0 is greedy, for validation.

    If rotary frequencies depend on the length of the context, those of the longest prompt with its
    completion serve all.

    Raises:
        InputError: a prompt is too long.
        RuntimeError: the model fails.
    """
    longest, limit = max(map(len, prompts), default=0), model.context_limit - max_new_tokens
    if longest > limit:
        raise InputError(
            f"prompts: expected at most {limit} tokens, so that max_new_tokens {max_new_tokens} fit"
            f" into the context, got {longest}"
        )
    if not prompts:
        return []
    requests = batch_requests(
        prompts, max_new_tokens, Sampling(temperature), seed=seed, stop_ids=stop_ids, logprobs=0
    )
    completions = make_engine(model, requests, max_num_seqs=max_num_seqs).generate(requests)
    if errors := [completion.error for completion in completions if completion.error]:
        raise RuntimeError(errors[0])
    return completions


def completions_to_tensors(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Convert completions for a checkpoint or another process: their joined ``tokens``, the
    ``lengths``, and whether each ``ended``. Log-probabilities are dropped.
    """
    joined = [token for completion in completions for token in completion.token_ids]
    return {
        "tokens": torch.tensor(joined, dtype=torch.int32),
        "lengths": torch.tensor([len(c.token_ids) for c in completions], dtype=torch.int32),
        "ended": torch.tensor([c.is_stopped for c in completions], dtype=torch.bool),
    }


def completions_from_tensors(tensors: Mapping[str, Tensor]) -> list[Completion]:
    """Convert the result of `completions_to_tensors` back."""
    rows = tensors["tokens"].split(tensors["lengths"].tolist())
    return [
        Completion(row.tolist(), finish_reason="stop" if ended else "length")
        for row, ended in zip(rows, tensors["ended"].tolist(), strict=True)
    ]


@dataclass(frozen=True)
class PackedRollouts:
    """Prompts and completions, packed without padding for one forward.

    ``ids`` and ``labels`` (1, total), the labels shifted and only those of completions;
    ``cu_seqlens`` (B + 1,) int32; ``keys``: see `fastlm.model.causal_lm.CausalLM.hidden`; ``mask``
    (B, S) bool, true on the tokens of a completion; S is the length of the longest.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    keys: tuple[Tensor, Tensor] | None
    mask: Tensor

    def hidden(self, model: "CausalLM") -> Tensor:
        """Return the model's hidden states, (1, total, E)."""
        return model.hidden(self.ids, cu_seqlens=self.cu_seqlens, keys=self.keys)

    def rows(self, x: Tensor) -> Tensor:
        """Select the values of the completions' tokens: (1, total) -> (B, S), 0 beyond their
        ends.
        """
        out = torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device)
        return out.masked_scatter(self.mask, x[self.labels != IGNORE])


def pack_rollouts(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    *,
    share_prompts: bool = True,
) -> PackedRollouts:
    """Pack each prompt with its completion. Neither may be empty.

    The last token of a completion is predicted but not read. With ``share_prompts``, neighbours
    with the same prompt store it once: the later ones only keep its last token, which predicts the
    completion.
    """
    groups: list[list[Example]] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = np.array([*prompt, *completion], np.int32)
        if not (share_prompts and i and prompt == prompts[i - 1]):
            groups.append([])
        groups[-1].append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    (ids, labels, cu_seqlens), keys = pack_groups(groups, device)
    shares = len(keys[0]) > ids.shape[1]
    lengths = torch.tensor([len(completion) for completion in completions])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    return PackedRollouts(ids, labels, cu_seqlens, keys if shares else None, mask)
