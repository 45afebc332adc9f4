"""Experience for PPO and its relatives: answers that the current policy samples, tokens in, tokens
out.

An answer keeps the ids that were sampled and their log-probabilities; its text is never tokenised
again. Which tokens are an answer's follows from lengths, never from token ids: a model whose pad
token is its end token (SmolLM2-Instruct) learns its end token like any other.
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
from fastlm.model.generation import engine_for
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
    rows: int = 64,
) -> list[Completion]:
    """Sample an answer to every prompt, at most ``rows`` at a time.

    Answer i draws from ``seed + i``. It ends with the first end token of the model or of
    ``stop_ids``, which is kept, or after ``max_new_tokens``. There are no top-k, top-p and min-p:
    they would sample from another policy than the one that is trained, whose KL estimates would
    be wrong (even negative). Temperature 0 is greedy, for validation.

    Where rotary frequencies depend on the length of the context, those of the longest prompt with
    its answer serve all.

    Raises InputError: a prompt that leaves no room. RuntimeError: the model fails.
    """
    longest, limit = max(map(len, prompts), default=0), model.context_limit - max_new_tokens
    if longest > limit:
        raise InputError(
            f"prompts: expected at most {limit} tokens, which leave room for max_new_tokens"
            f" {max_new_tokens}, got {longest}"
        )
    if not prompts:
        return []
    requests = batch_requests(
        prompts, max_new_tokens, Sampling(temperature), seed=seed, stop_ids=stop_ids, logprobs=0
    )
    completions = engine_for(model, requests, max_num_seqs=rows).generate(requests)
    if failed := [one.error for one in completions if one.error]:
        raise RuntimeError(failed[0])
    return completions


def completions_to_tensors(answers: Sequence[Completion]) -> dict[str, Tensor]:
    """Answers for a checkpoint, or for another process: ``tokens``, one answer after the other, the
    ``lengths``, and which ``ended``. Log-probabilities are left out.
    """
    joined = [token for answer in answers for token in answer.token_ids]
    return {
        "tokens": torch.tensor(joined, dtype=torch.int32),
        "lengths": torch.tensor([len(answer.token_ids) for answer in answers], dtype=torch.int32),
        "ended": torch.tensor([answer.ended for answer in answers], dtype=torch.bool),
    }


def completions_from_tensors(tensors: Mapping[str, Tensor]) -> list[Completion]:
    """Undo `completions_to_tensors`."""
    rows = tensors["tokens"].split(tensors["lengths"].tolist())
    return [
        Completion(row.tolist(), finish_reason="stop" if ended else "length")
        for row, ended in zip(rows, tensors["ended"].tolist(), strict=True)
    ]


@dataclass(frozen=True)
class PackedRollouts:
    """Prompts and answers joined without padding, for one forward.

    ``ids`` and ``labels`` (1, total), the labels shifted and only those of answers; ``cu_seqlens``
    (B + 1,) int32; ``keys``: see `fastlm.model.causal_lm.CausalLM.hidden`; ``mask`` (B, S) bool,
    true on the tokens of an answer, S those of the longest.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    keys: tuple[Tensor, Tensor] | None
    mask: Tensor

    def hidden(self, model: "CausalLM") -> Tensor:
        """The model's hidden states, (1, total, E)."""
        return model.hidden(self.ids, cu_seqlens=self.cu_seqlens, keys=self.keys)

    def rows(self, x: Tensor) -> Tensor:
        """(1, total) -> (B, S): what belongs to each answer's tokens, 0 beyond its end."""
        out = torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device)
        return out.masked_scatter(self.mask, x[self.labels != IGNORE])


def pack_rollouts(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    device: torch.device,
    *,
    share_prompts: bool = True,
) -> PackedRollouts:
    """Join each prompt with its answer. Neither may be empty.

    The last token of an answer is predicted but not read. With ``share_prompts``, neighbours with
    the same prompt have it once: of the later ones, only its last token is there, which predicts
    the answer.
    """
    groups: list[list[Example]] = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = np.array([*prompt, *answer], np.int32)
        if not (share_prompts and i and prompt == prompts[i - 1]):
            groups.append([])
        groups[-1].append(Example(ids, np.arange(len(ids)) >= len(prompt)))
    (ids, labels, cu_seqlens), keys = pack_groups(groups, device)
    shares = len(keys[0]) > ids.shape[1]
    lengths = torch.tensor([len(answer) for answer in answers])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    return PackedRollouts(ids, labels, cu_seqlens, keys if shares else None, mask)
