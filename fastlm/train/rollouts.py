"""Sample completions from the current policy and pack them for training: tokens in, tokens out.

A completion stores the sampled ids and their log-probabilities; its text is never tokenized again.
Positions decide which tokens the policy has sampled (`sampled_mask`), never token ids: a model
whose pad token is its end token (SmolLM2-Instruct) learns its end token like any other.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastlm.errors import InputError
from fastlm.inference.requests import Completion, batch_requests
from fastlm.inference.sampling import Sampling
from fastlm.model.generation import make_engine
from fastlm.train.objective import IGNORE, Example, pack_groups

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


@dataclass(frozen=True, slots=True)
class Episode(Completion):
    """A completion of several turns (`fastlm.train.episodes`).

    ``token_ids`` also has the observations, which an environment wrote between the turns;
    ``logprobs`` are those of the sampled tokens only, ``text`` is that of the last turn.
    ``observation_indices``: where in ``token_ids`` observations are. ``reward``: the environment's.
    ``transcript``: all turns and observations, for people.
    """

    observation_indices: list[int] = field(default_factory=list)
    reward: float = 0.0
    transcript: str = ""


def sampled_mask(completion: Completion) -> Tensor:
    """Return which tokens the policy has sampled, (tokens,) bool: all but those of observations."""
    mask = torch.ones(len(completion.token_ids), dtype=torch.bool)
    if isinstance(completion, Episode):
        mask[completion.observation_indices] = False
    return mask


def sample_completions(
    model: "CausalLM",
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    stop_ids: frozenset[int] = frozenset(),
    max_num_seqs: int = 64,
    on_piece: Callable[..., Any] | None = None,
) -> list[Completion]:
    """Sample a completion of every prompt, at most ``max_num_seqs`` at a time. ``on_piece``: see
    `fastlm.inference.engine.Engine.generate`.

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
    check_prompt_lengths(model, prompts, max_new_tokens)
    if not prompts:
        return []
    requests = batch_requests(
        prompts, max_new_tokens, Sampling(temperature), seed=seed, stop_ids=stop_ids, logprobs=0
    )
    engine = make_engine(model, requests, max_num_seqs=max_num_seqs)
    completions = engine.generate(requests, on_piece=on_piece)
    if errors := [completion.error for completion in completions if completion.error]:
        raise RuntimeError(errors[0])
    return completions


def check_prompt_lengths(
    model: "CausalLM", prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Raise InputError if a prompt leaves less than ``max_new_tokens`` of the context."""
    longest, limit = max(map(len, prompts), default=0), model.context_limit - max_new_tokens
    if longest > limit:
        raise InputError(
            f"prompts: expected at most {limit} tokens, so that max_new_tokens {max_new_tokens} fit"
            f" into the context, got {longest}"
        )


def completions_to_tensors(completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Convert completions for a checkpoint or another process: their joined ``tokens``, the
    ``lengths``, whether each ``ended``, and where in the joined tokens ``observations`` are. Texts,
    log-probabilities and rewards are dropped.
    """
    joined = [token for completion in completions for token in completion.token_ids]
    masks = [torch.ones(0, dtype=torch.bool), *map(sampled_mask, completions)]
    return {
        "observations": (~torch.cat(masks)).nonzero().flatten(),
        "tokens": torch.tensor(joined, dtype=torch.int32),
        "lengths": torch.tensor([len(c.token_ids) for c in completions], dtype=torch.int32),
        "ended": torch.tensor([c.is_stopped for c in completions], dtype=torch.bool),
    }


def completions_from_tensors(tensors: Mapping[str, Tensor]) -> list[Completion]:
    """Convert the result of `completions_to_tensors` back."""
    is_observation = torch.zeros(len(tensors["tokens"]), dtype=torch.bool)
    is_observation[tensors["observations"]] = True
    lengths = tensors["lengths"].tolist()
    completions: list[Completion] = []
    for row, observed, ended in zip(
        tensors["tokens"].split(lengths),
        is_observation.split(lengths),
        tensors["ended"].tolist(),
        strict=True,
    ):
        ids, reason = row.tolist(), "stop" if ended else "length"
        if indices := observed.nonzero().flatten().tolist():
            completions.append(Episode(ids, finish_reason=reason, observation_indices=indices))
        else:
            completions.append(Completion(ids, finish_reason=reason))
    return completions


@dataclass(frozen=True)
class PackedRollouts:
    """Prompts and completions, packed without padding for one forward.

    ``ids`` and ``labels`` (1, total), the labels shifted and only those of sampled tokens;
    ``cu_seqlens`` (B + 1,) int32; ``keys``: see `fastlm.model.causal_lm.CausalLM.hidden`; ``mask``
    (B, S) bool, true on the sampled tokens of a completion; S is the length of the longest.
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
        """Select the values of the sampled tokens: (1, total) -> (B, S), 0 where ``mask`` is
        false.
        """
        out = torch.zeros(self.mask.shape, dtype=x.dtype, device=x.device)
        return out.masked_scatter(self.mask, x[self.labels != IGNORE])


def pack_rollouts(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    *,
    masks: Sequence[Tensor] | None = None,
    share_prompts: bool = True,
) -> PackedRollouts:
    """Pack each prompt with its completion. Neither may be empty. ``masks``: the `sampled_mask` of
    each completion, true on its first token; by default all tokens are sampled.

    The last token of a completion is predicted but not read. With ``share_prompts``, neighbours
    with the same prompt store it once: the later ones only keep its last token, which predicts the
    completion.
    """
    if masks is None:
        masks = [torch.ones(len(completion), dtype=torch.bool) for completion in completions]
    groups: list[list[Example]] = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = np.array([*prompt, *completion], np.int32)
        if not (share_prompts and i and prompt == prompts[i - 1]):
            groups.append([])
        loss_mask = np.concatenate([np.zeros(len(prompt), bool), masks[i].numpy()])
        groups[-1].append(Example(ids, loss_mask))
    (ids, labels, cu_seqlens), keys = pack_groups(groups, device)
    shares = len(keys[0]) > ids.shape[1]
    mask = pad_sequence([*masks], batch_first=True).to(device)
    return PackedRollouts(ids, labels, cu_seqlens, keys if shares else None, mask)
