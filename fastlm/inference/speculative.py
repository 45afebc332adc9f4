"""Speculative decoding: proposers of draft tokens. Prompt lookup is here, a draft model in
`fastlm.inference.draft_model`.

A draft token is computed in the step of the token before it, and accepted if it equals the token
that is then sampled. So an answer has the same bits with any proposer; only the number of steps
differs.
"""

from typing import Protocol

from fastlm.inference.sequence import Sequence

_NGRAM = 3  # length of the n-grams that are looked up


class DraftProposer(Protocol):
    """Proposes up to ``num_speculative_tokens`` draft tokens of an answer per step. ``failures``:
    the number of answers for which it failed; they run without draft tokens from then on."""

    num_speculative_tokens: int
    failures: int

    def prepare(self) -> None:
        """Follow the weights, which may have changed. Called before the first sequence runs."""
        ...

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        """Set ``draft`` of the running sequences, in all to at most ``budget`` tokens."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Free the state of a sequence that does not run any more."""
        ...


class PromptLookup:
    """Proposes the tokens that followed an earlier occurrence of the last n-gram, in the prompt or
    the answer (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, num_speculative_tokens: int):
        self.num_speculative_tokens, self.failures = num_speculative_tokens, 0
        self._indexes: dict[Sequence, _NgramIndex] = {}

    def prepare(self) -> None:
        pass

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        for sequence in sequences:
            count = min(self.num_speculative_tokens, budget, sequence.max_draft_tokens)
            sequence.draft = []
            if count > 0:
                index = self._indexes.setdefault(sequence, _NgramIndex())
                sequence.draft = index.continuation(sequence.tokens, count)
                budget -= len(sequence.draft)

    def release(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)


class _NgramIndex:
    """Maps each n-gram of the first ``length`` tokens of a text to the end of its last
    occurrence."""

    def __init__(self) -> None:
        self.ends: dict[tuple[int, ...], int] = {}
        self.length = _NGRAM

    def continuation(self, tokens: list[int], count: int) -> list[int]:
        """Add the n-grams of new tokens. Return ``count`` draft tokens, or none."""
        for end in range(self.length, len(tokens)):
            self.ends[tuple(tokens[end - _NGRAM : end])] = end
        self.length = max(self.length, len(tokens))
        start = self.ends.get(tuple(tokens[-_NGRAM:]))
        if start is None:
            return []
        period = len(tokens) - start  # beyond the last token, the draft repeats itself
        return [tokens[start + i % period] for i in range(count)]
