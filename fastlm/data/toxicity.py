"""Score the toxicity of documents, by the judge that ``fastlm safety`` fits and measures.

``fastlm data toxicity -o MODEL`` fits the judge and writes it to a file; no model ships. The judge
was fitted to texts of some 11 words. A document is therefore cut into pieces of `PIECE_WORDS`
words, and its score is the mean probability of the most toxic tenth of them. Which score is too
high is the user's configuration. At 0.8, 0.03 to 0.11 of harmless pages are false alarms, and 0.00
to 0.02 if the judge was also fitted to pieces of such pages (``--benign``); pages with toxic
sentences in half of their words are found, those with a tenth at 0.37 to 0.78
(bench/corpus/quality.py).

Rejected: the probability of the whole text (99 harmless sentences outweigh one), the mean of the
pieces (at 0.5 it finds 0.03 to 0.19 of the pages that are half toxic), the highest piece (at 0.8,
0.15 to 0.31 of harmless pages are false alarms, with the tenth 0.01 to 0.13).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.language import sample
from fastlm.data.text_classifier import TextClassifier

KIND = "toxicity"
PIECE_WORDS = 20
WORST = 0.1  # share of the pieces that count
PIECES, PIECE = 16, 1024  # a longer text is scored by so many pieces of so many characters
DIGITS = 4  # of a score: exp() may differ in the last bit between processors


@dataclass(frozen=True)
class ToxicityModel:
    """Scores documents. ``accuracy``: how the judge was measured, as
    `fastlm.evals.judge_accuracy.JudgeAccuracy.as_dict` says it.
    """

    classifier: TextClassifier
    accuracy: dict[str, Any] = field(default_factory=dict)

    def score(self, texts: Iterable[str]) -> np.ndarray:
        """Return the toxicity of each text, 0 to 1, float64 (texts,). Any text is accepted; one
        without a word has the score 0.
        """
        return np.array([self._score(sample(text, PIECES, PIECE)) for text in texts], np.float64)

    def _score(self, text: str) -> float:
        logits = self.classifier.piece_logits(text, PIECE_WORDS)
        if not logits.size:
            return 0.0
        worst = np.sort(logits)[-math.ceil(WORST * logits.size) :]
        return round(float(np.mean(1 / (1 + np.exp(-np.clip(worst, -50, 50))))), DIGITS)

    def save(self, path: Path) -> None:
        """Write the model to one file. InputError: not writable."""
        self.classifier.save(path, KIND, {"accuracy": self.accuracy})

    @classmethod
    def load(cls, path: str | Path) -> "ToxicityModel":
        """Read a file of `save`. InputError: missing, damaged, of another kind."""
        classifier, info = TextClassifier.load(path, KIND)
        return cls(classifier, info.get("accuracy", {}))
