"""Tasks of the user: YAML files of lm-evaluation-harness, read and scored by the harness itself
(extra ``harness``).

The harness makes the prompts, filters the answers and computes the metrics. fastlm runs the model
as for any other task, so records, errors and comparisons are the same. A task's file is a program:
its ``!function`` entries run, as in the harness.
"""

import glob
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.evals.reference_metrics import CORPUS, ROUGE, corpus_interval, register_rouge, rouge
from fastlm.evals.results import Record
from fastlm.evals.task import MultipleChoice, OpenQuestion, Question, Task
from fastlm.evals.task_metrics import HEADLINE, bits_per_byte
from fastlm.files import read_text

if TYPE_CHECKING:
    from fastlm.evals.scorer import Scorer

MAX_BYTES = 2**20  # of a task's file
LOCAL_LOADERS = (
    "json",
    "csv",
    "parquet",
    "arrow",
    "text",
)  # others are names on the hub
DATA_SUFFIXES = (
    ".json",
    ".jsonl",
    ".csv",
    ".parquet",
    ".txt",
    ".gz",
    ".zst",
)  # suffixes of data files
FEWSHOT_SEED = 1234  # the harness' default, for drawing examples
T = TypeVar("T")


class HarnessRecord(TypedDict):
    """The model's ``responses`` to each request: texts, or (log-likelihood, greedy)."""

    id: str
    responses: list[list[Any]]


def is_task_file(name: str) -> bool:
    """Return True if the name of a task is a YAML file."""
    return name.endswith((".yaml", ".yml"))


def task_files(path: str | Path) -> list[Path]:
    """Return a task's file and all files that it names: data, Python, other YAML."""
    files, stack = {}, [Path(path)]
    while stack:
        file = stack.pop()
        if (resolved := file.resolve()) not in files:
            files[resolved] = file
            names = _texts(_plain_yaml(file)) if is_task_file(file.name) else []
            stack += [Path(match) for name in names for match in _matches(file.parent, name)]
    return list(files.values())


def _plain_yaml(path: Path) -> Any:
    """Read the YAML with all values as texts, and functions as their names."""
    text = read_text(path, MAX_BYTES)
    try:
        import yaml
    except ModuleNotFoundError:
        raise _missing_harness() from None
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected YAML, got: {_error_line(error)}") from None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in values for text in _texts(item)]


def _matches(folder: Path, name: str) -> list[str]:
    if not name or len(name) > 255 or "{{" in name or not name.isprintable():
        return []
    module = name.rpartition(".")[0].replace(".", "/") + ".py"  # of a function
    paths = [folder / name, Path(name), folder / module]
    # only for data files: other texts have * and ?, too
    if name.endswith(DATA_SUFFIXES) and glob.has_magic(name):
        paths = [Path(match) for path in paths[:2] for match in sorted(glob.glob(str(path)))]
    return [str(path) for path in paths if path.is_file()]


def _stay_offline() -> None:
    """Forbid downloads from the hub unless the user allows them: set the variables that the
    packages read on import. A package that is already imported has the value as a constant.
    """
    modules = {"DATASETS": "datasets.config", "HUB": "huggingface_hub.constants", "EVALUATE": ""}
    for package, module in modules.items():
        name = f"HF_{package}_OFFLINE"
        if name not in os.environ:
            os.environ[name] = "1"
            if module in sys.modules:
                setattr(sys.modules[module], name, True)


def read_task(path: str | Path, cache: Path) -> Task:
    """Read a task's file with its data. InputError: the harness rejects it."""
    path = Path(path)
    _stay_offline()
    _plain_yaml(path)  # checks that the file is readable and small enough
    try:
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    except ModuleNotFoundError as error:
        raise _missing_harness(error.name or "lm_eval") from None
    register_rouge()
    config = _call_harness(path, lambda: load_yaml(path))
    if not isinstance(config.get("task", ""), str) or "group" in config or "class" in config:
        raise InputError(f"{path}: task: expected one task, got a group or a class")
    name = config.setdefault("task", path.stem)
    for key in ("tag", "task_list"):
        config.pop(key, None)
    if config.get("dataset_path") in LOCAL_LOADERS:
        options = config["dataset_kwargs"] = dict(config.get("dataset_kwargs") or {})
        options["data_files"] = _resolve_data_files(path.parent, options.get("data_files"))
        options.setdefault("cache_dir", str(cache / "datasets"))
    task = _call_harness(path, lambda: ConfigurableTask(config=config))
    _check_reference_metrics(path, task)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    _call_harness(path, task.build_all_requests)
    requests: dict[str, list[Any]] = {}
    for instance in task.instances:
        requests.setdefault(str(instance.doc_id), []).append(instance)
    harness_task = _HarnessTask(path, task, requests)
    return Task(
        name, "custom", [_question(task, id, instances) for id, instances in requests.items()],
        str(path), "not stated", f"lm-eval:{task.config.num_fewshot or 0}shot",
        delimiter=task.config.target_delimiter, probe=harness_task.ask, record=HarnessRecord,
        question_metrics=harness_task.question_metrics, aggregate=harness_task.aggregate,
    )  # fmt: skip


def _check_reference_metrics(path: Path, task: Any) -> None:
    """Raise InputError, before the model runs, if a metric of `fastlm.evals.reference_metrics`
    cannot be computed."""
    if task.config.process_results is not None:  # the user's function computes the metrics
        return
    for name in (name for name in task._metric_fn_list if name in (*ROUGE, *CORPUS)):
        if task.multiple_target:  # the harness turns their scores into 0 or 1
            raise InputError(f"{path}: doc_to_target: expected one text for {name}, got a list")
        if name in ROUGE:
            _call_harness(path, partial(rouge, name, "", "", **task._metric_fn_kwargs[name]))


def _resolve_data_files(folder: Path, files: Any) -> Any:
    """Return data files next to the task's file where they exist, else as they are named."""
    if isinstance(files, Mapping):
        return {split: _resolve_data_files(folder, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_resolve_data_files(folder, name) for name in files]
    return str(folder / files) if files and glob.glob(str(folder / str(files))) else files


def _question(task: Any, id: str, requests: Sequence[Any]) -> Question:
    """Return the question as those of other tasks, for its hash and for contamination."""
    arguments = [request.args for request in requests]
    row = requests[0].doc
    if task.OUTPUT_TYPE == "multiple_choice":
        answers = task.doc_to_choice(row)
        gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        gold = (gold or [-1])[0] if isinstance(gold, list) else gold
        gold = answers.index(gold) if gold in answers else gold
        if not isinstance(gold, int) or not 0 <= gold < len(answers):
            raise InputError(
                f"task {task.config.task}: doc_to_target: expected one of {answers!r:.80} or its"
                f" number, got {gold!r:.80} (row {id})"
            )
        pairs = tuple((str(context), str(answer)) for context, answer in arguments)
        return MultipleChoice(id, pairs[: len(answers)], gold, unconditional=pairs[len(answers) :])
    row_data = {"requests": arguments, "repeats": requests[0].repeats}
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return OpenQuestion(id, "", row_data, arguments[0][0])
    if task.OUTPUT_TYPE == "loglikelihood":
        return OpenQuestion(id, arguments[0][0], row_data, arguments[0][1])
    gold = task.doc_to_target(row)
    gold = (gold or [""])[0] if isinstance(gold, list) else gold
    return OpenQuestion(id, arguments[0][0], row_data, f"{task.config.target_delimiter}{gold}")


class _HarnessTask:
    """The harness' task with its requests by question."""

    def __init__(self, path: Path, task: Any, requests: Mapping[str, list[Any]]) -> None:
        self.path, self.task, self.requests = path, task, requests

    def ask(self, scorer: "Scorer", questions: Sequence[Question], seed: int) -> list[Record]:
        from fastlm.evals.harness import ScorerLM

        instances = [
            instance
            for q in questions
            for instance in self.requests[q.id]
            for _ in range(instance.repeats)
        ]
        answer = getattr(ScorerLM(scorer, seed=seed), instances[0].request_type)
        responses = iter(answer(instances, disable_tqdm=True))
        records = []
        for q in questions:
            question_responses = [
                [next(responses) for _ in range(instance.repeats)]
                for instance in self.requests[q.id]
            ]
            records.append({"id": q.id, "responses": question_responses})
        return records

    def results(self, record: Record) -> dict[str, tuple[str, Any]]:
        """Return name -> (the harness' name of the metric, value) for a question. Metrics of the
        first list of filters have the metric's name; others append the list: "exact_match,strict".
        """
        instances = self.requests[record["id"]]
        for instance, responses in zip(instances, record["responses"], strict=True):
            instance.resps = [tuple(r) if isinstance(r, list) else r for r in responses]
            instance.filtered_resps = {}
        self.task._instances = instances
        self.task.apply_filters()
        metrics = {}
        for number, filter in enumerate(instances[0].filtered_resps):
            answers = [instance.filtered_resps[filter] for instance in instances]
            for metric, value in self.task.process_results(instances[0].doc, answers).items():
                metrics[f"{metric},{filter}" if number else metric] = (metric, value)
        return metrics

    def is_mean(self, metric: str) -> bool:
        from lm_eval.api.registry import get_aggregation

        return self.task.aggregation().get(metric) in (None, get_aggregation("mean"))

    def question_metrics(self, question: Question, record: Record) -> dict[str, float]:
        metrics = {}
        if isinstance(question, MultipleChoice):
            logprob = record["responses"][question.gold][0][0]
            metrics[HEADLINE] = bits_per_byte(question, logprob, self.task.config.target_delimiter)
        results = _call_harness(self.path, lambda: self.results(record))
        return metrics | {
            name: float(value) for name, (metric, value) in results.items() if self.is_mean(metric)
        }

    def aggregate(self, records: Sequence[Record]) -> dict[str, dict[str, Any]]:
        """Return the metrics that are not means over questions, as the harness computes them."""
        items: dict[str, tuple[str, list[Any]]] = {}
        for record in records:
            results = _call_harness(self.path, partial(self.results, record))
            for name, (metric, value) in results.items():
                if not self.is_mean(metric):
                    items.setdefault(name, (metric, []))[1].append(value)
        return {
            name: _call_harness(self.path, partial(self._total, metric, values))
            | {"min_detectable_effect": None}
            for name, (metric, values) in items.items()
        }

    def _total(self, metric: str, values: Sequence[Any]) -> dict[str, Any]:
        """Return the metric's value, and its error if it is one of `CORPUS`."""
        from lm_eval.api.registry import get_aggregation

        total = self.task.aggregation()[metric]
        result = {"value": float(total(values)), "error": None}
        if metric in CORPUS and total is get_aggregation(metric):
            references, answers = zip(*values)
            result |= corpus_interval(metric, [*map(_as_list, references)], _texts([*answers]))
        return result


def _as_list(value: Any) -> Sequence[Any]:
    return [value] if isinstance(value, str) else value


def _call_harness(path: Path, call: Callable[[], T]) -> T:
    """Call the harness without its progress output. InputError, of one line: anything that it
    raises, because a task's file is user input."""
    errors = logging.Handler(logging.ERROR)
    messages: list[str] = []
    errors.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("lm_eval")
    log.addHandler(errors)
    try:
        with redirect_stderr(io.StringIO()):
            return call()
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # a task's function may end the program
        line = " ".join("; ".join([*messages, _error_line(error)]).split())
        raise InputError(f"{path}: lm-evaluation-harness: {line:.500}") from error
    finally:
        log.removeHandler(errors)


def _error_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.300}"


def _missing_harness(package: str = "lm_eval") -> InputError:
    return InputError(
        f"tasks: expected the package {package.partition('.')[0]} for a task in YAML, which is not"
        " installed (pip install 'fastlm[harness]')"
    )
