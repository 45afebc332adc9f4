"""What is watched in each round of rollouts: score, KL, length, and signs of reward hacking."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastlm.train.losses import kl_penalty

if TYPE_CHECKING:
    from fastlm.inference.requests import Completion

GRAM = 4  # tokens


def of_round(
    scores: np.ndarray,
    answers: "Sequence[Completion]",
    logp: Tensor,
    ref_logp: Tensor,
    difference: Tensor,
    mask: Tensor,
) -> dict[str, float]:
    """Return means over the answers of a round, for metrics.jsonl.

    - "score", "score_deviation": as the reward gave them, after the rule of missing end tokens;
    - "kl", "kl_error": KL(policy || reference) in nats per answer by k1, and its standard error;
      "kl3": by k3, which is never negative;
    - "length" in tokens; "ended": share that drew an end token;
    - "score_length": correlation of the two. A policy that is paid for length has it near 1;
    - "repetition": share of 4-grams that the same answer had before;
    - "mismatch": mean absolute difference per token of log-probabilities in training and sampling.
    """
    lengths = mask.sum(1).cpu().numpy()
    k1, k3 = (
        torch.where(mask, kl_penalty(logp, ref_logp, kind), 0.0).sum(1).double().cpu().numpy()
        for kind in ("k1", "k3")
    )
    return {
        "score": float(scores.mean()),
        "score_deviation": float(scores.std()),
        "kl": float(k1.mean()),
        "kl_error": float(k1.std()) / math.sqrt(len(k1)),
        "kl3": float(k3.mean()),
        "length": float(lengths.mean()),
        "ended": float(np.mean([answer.ended for answer in answers])),
        "score_length": correlation(scores, lengths),
        "repetition": float(np.mean([repetition(answer.token_ids) for answer in answers])),
        "mismatch": float(difference[mask].abs().mean()),
    }


def repetition(tokens: Sequence[int], size: int = GRAM) -> float:
    """The share of n-grams that occurred before among these tokens."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])
