"""What guesses the next tokens of answers: prompt lookup here, a draft model in
`fastlm.inference.draft_model`.

A guess is computed in the step of the token before it, and kept if it equals the token that is then
drawn. So an answer has the same bits with any guesser, and only its number of steps differs.
"""

from typing import Protocol

from fastlm.inference.sequence import Sequence

_NGRAM = 3  # tokens that are looked up


class DraftProposer(Protocol):
    """``most``: tokens of an answer in a step. ``failures``: answers for which it failed, which
    then run without guesses."""

    most: int
    failures: int

    def prepare(self) -> None:
        """Before the first sequence runs: follow weights, which may have changed."""
        ...

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        """Set ``draft`` of the running sequences, in all to at most ``budget`` tokens."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Free what is kept of a sequence, which does not run any more."""
        ...


class PromptLookup:
    """Guesses up to ``most`` tokens: those that followed when the last ones came before, in the
    prompt or the answer (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
    """

    def __init__(self, most: int):
        self.most, self.failures = most, 0
        self._texts: dict[Sequence, _Text] = {}

    def prepare(self) -> None:
        pass

    def propose(self, sequences: list[Sequence], budget: int) -> None:
        for sequence in sequences:
            count = min(self.most, budget, sequence.most_guesses)
            sequence.draft = []
            if count > 0:
                text = self._texts.setdefault(sequence, _Text())
                sequence.draft = text.after(sequence.tokens, count)
                budget -= len(sequence.draft)

    def forget(self, sequence: Sequence) -> None:
        self._texts.pop(sequence, None)


class _Text:
    """Where each n-gram of a text went on; of the text's first ``looked`` tokens."""

    def __init__(self) -> None:
        self.followed: dict[tuple[int, ...], int] = {}
        self.looked = _NGRAM

    def after(self, tokens: list[int], count: int) -> list[int]:
        """Look at the tokens that are new. Return ``count`` guesses of the next ones, or none."""
        for end in range(self.looked, len(tokens)):
            self.followed[tuple(tokens[end - _NGRAM : end])] = end
        self.looked = max(self.looked, len(tokens))
        at = self.followed.get(tuple(tokens[-_NGRAM:]))
        if at is None:
            return []
        period = len(tokens) - at  # beyond the last token the guess repeats itself
        return [tokens[at + i % period] for i in range(count)]
