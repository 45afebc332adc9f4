"""Fill a feedback database with measures of answers, as a server that has run for a while does."""

import time

import numpy as np

from fastlm.serve.feedback import Feedback
from fastlm.serve.monitor import features
from fastlm.serve.monitor.answer_judges import JUDGES
from fastlm.serve.tables import MEASUREMENTS

COOKING = "how do I bake a soft loaf of bread with butter and milk in the oven today"
CODE = "def f(x): return x[0] + 1  # why does this raise IndexError: {}?"
MODELS = ("tiny", "tiny <b>new</b>")


def prompt(rng, words):
    """Return some of the words, in any order."""
    names = words.split()
    return " ".join(names[i] for i in rng.integers(0, len(names), rng.integers(4, 16)))


def fill_measurements(
    store, count, *, days=1.0, models=MODELS[:1], now=None, words=(COOKING, COOKING), seed=0
):
    """Add ``count`` measures over the last ``days``. The first half of the prompts has the first of
    ``words``, the other the second. Some of the first answers have thumbs. Return their ids.
    """
    rng = np.random.default_rng(seed)
    now = time.time() if now is None else now
    ids = [f"r{seed}-{i}" for i in range(count)]
    kinds = [
        [features.features(prompt(rng, some), 20, 1) for _ in range(min(count, 2000))]
        for some in words
    ]
    rows = []
    for i, id in enumerate(ids):
        model = i % len(models)
        first = float(rng.lognormal(-1.2 + 0.3 * model, 0.5))
        status = int(rng.choice((200, 500, 499, 429), p=(0.95, 0.02, 0.02, 0.01)))
        row = {
            "response_id": id, "choice": 0, "model": models[model], "status": status,
            "at": now - days * 86400 * (1 - (i + 0.5) / count), "prompt_tokens": 20,
            "conversation_id": None, "finish_reason": None, "queue_seconds": None,
            "first_token_seconds": None, "seconds": None, "new_tokens": None, "refusal": None,
            "refusal_judge": None, "toxicity": None, "toxicity_judge": None, "features": None,
        }  # fmt: skip
        if status == 200:
            row |= {
                "finish_reason": str(rng.choice(("stop", "length"), p=(0.9, 0.1))),
                "queue_seconds": first / 3, "first_token_seconds": first, "seconds": 4 * first,
                "prompt_tokens": int(rng.lognormal(4, 1)), "new_tokens": int(rng.lognormal(4.5, 1)),
                "refusal": float(rng.random() < 0.08), "refusal_judge": JUDGES[0].id,
                "toxicity": float(rng.random() < 0.01), "toxicity_judge": JUDGES[1].id,
                "features": kinds[2 * i >= count][i % 2000],
            }  # fmt: skip
        rows.append(row)
    with store.write() as connection:
        for begin in range(0, count, 5000):
            connection.execute(MEASUREMENTS.insert(), rows[begin : begin + 5000])
    for id in ids[:500:10]:
        store.add(Feedback(id, thumb=str(rng.choice(("up", "down"), p=(0.7, 0.3)))))
    return ids
