"""A task of lm-evaluation-harness' format, with data in local files, as a `Task`.

Keys and templates mean what they mean there, with these differences. Examples are the first rows of
``fewshot_split`` (the harness draws them at random unless its sampler is first_n); where that is
the split that is asked, those rows are not asked. All measures of a kind of question are told,
whichever ``metric_list`` names. What is not supported is refused: nothing is ignored silently but
the keys of `TOLD`.
"""

import ast
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Interval, MaxLen, MinLen
from typing_extensions import TypedDict

from fastlm.errors import InputError, show, unknown_key
from fastlm.evals.own import answers
from fastlm.evals.own.data import Rows, read_rows
from fastlm.evals.own.yaml_file import Yaml, read_yaml
from fastlm.evals.task import Choices, Open, Question, Task
from fastlm.schema import Field, Name, validate
from fastlm.tokenizer.chat_template import render_plain

Row = Mapping[str, Any]
# What a task says of itself and does not change what is asked
TOLD = (
    "tag", "group", "task_alias", "metadata", "dataset_name", "should_decontaminate",
    "doc_to_decontamination_query",
)  # fmt: skip
CODE = ("process_docs", "process_results", "class", "custom_dataset")
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match",),
    "loglikelihood": ("acc", "perplexity"),
}
MATCH_OPTIONS = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore")
LONGEST = 4096  # tokens of an answer
Scalar = str | int | float | bool
Text = Annotated[str, MinLen(1)]
File = Annotated[Name, MaxLen(255)]
Files = File | list[File]


class DataFiles(TypedDict):
    data_files: Files | dict[str, Files]


class Examples(TypedDict):
    sampler: NotRequired[Literal["first_n", "default"]]


class Generation(TypedDict, total=False):
    """Temperature 0 (``fastlm eval --temperature`` sets it)."""

    until: Text | list[Text]
    max_gen_toks: Annotated[int, Interval(ge=1, le=LONGEST)]
    temperature: Literal[0]
    do_sample: Literal[False]


class Metric(TypedDict):
    metric: str
    aggregation: NotRequired[str]
    higher_is_better: NotRequired[bool]
    ignore_case: NotRequired[bool]
    ignore_punctuation: NotRequired[bool]
    ignore_numbers: NotRequired[bool]
    regexes_to_ignore: NotRequired[list[str] | None]


class Pipeline(TypedDict):
    name: NotRequired[str]
    filter: list[answers.Filter]


class TaskFile(TypedDict):
    """The keys that decide what is asked, as in lm-evaluation-harness."""

    task: Name
    dataset_path: Literal["json", "csv"]
    dataset_kwargs: DataFiles
    validation_split: NotRequired[str]
    test_split: NotRequired[str]
    training_split: NotRequired[str]
    fewshot_split: NotRequired[str]
    num_fewshot: NotRequired[Annotated[int, Ge(0)]]
    fewshot_config: NotRequired[Examples]
    output_type: NotRequired[Literal["multiple_choice", "generate_until", "loglikelihood"]]
    doc_to_text: str
    doc_to_target: str | int
    doc_to_choice: NotRequired[str | list[Scalar] | dict[str, Scalar]]
    target_delimiter: NotRequired[str]
    fewshot_delimiter: NotRequired[str]
    description: NotRequired[str]
    generation_kwargs: NotRequired[Generation]
    metric_list: NotRequired[list[Metric]]
    filter_list: NotRequired[list[Pipeline]]
    repeats: NotRequired[Literal[1]]


def read_task(path: str | Path) -> Task:
    """Read a task's file. InputError: a key, template or row that cannot be used, by its line."""
    config = _included(read_yaml(Path(path)))
    return _Made(config, _checked(config)).task()


def task_files(path: str | Path) -> list[Path]:
    """The files that a task's file names, itself included, as far as they are there."""
    path = Path(path)
    config = _included(read_yaml(path))
    found = [*config.files]
    for names in _files(_checked(config)).values():
        for name in names:
            found += [p for p in (path.parent / name, Path(name)) if p.is_file()][:1]
    return found


def _included(config: Yaml, depth: int = 0) -> Yaml:
    """The file with the keys of the one that it includes, which its own keys replace."""
    name = config.values.get("include")
    if name is None:
        return config
    if depth == 8 or not isinstance(name, str):
        raise config.refuse("include", "expected one file, at most eight deep")
    base = _included(read_yaml(config.path.parent / name), depth + 1)
    values = {k: v for k, v in config.values.items() if k != "include"}
    return Yaml(
        config.path, {**base.values, **values}, {**base.places, **config.places},
        (*config.files, *base.files),
    )  # fmt: skip


def _checked(config: Yaml) -> TaskFile:
    """The keys that decide what is asked. InputError: an unknown one, code, a value that does not
    fit, a pattern that does not end."""
    values = {k: v for k, v in config.values.items() if v is not None and k not in TOLD}
    for key in values:
        if key in CODE:
            raise config.refuse(key, "expected a task without Python code, which is not run")
        if key not in TaskFile.__annotations__:
            known = [*TaskFile.__annotations__, *TOLD]
            raise config.refuse(key, unknown_key(key, key, known).removeprefix(f"{key}: "))

    def where(field: Field) -> str:
        return config.place(str(field[0])) if field else str(config.path)

    checked = validate(values, TaskFile, where, extra="forbid")
    kind = checked.get("output_type", "generate_until")
    for metric in checked.get("metric_list", ()):
        if metric["metric"] not in METRICS[kind]:
            names = ", ".join(METRICS[kind])
            raise config.refuse(
                "metric_list", f"expected {names} for {kind}, got {metric['metric']!r:.60}"
            )
    patterns = [("metric_list", p) for m in checked.get("metric_list", ())
                for p in m.get("regexes_to_ignore") or ()]  # fmt: skip
    patterns += [
        ("filter_list", part.get("regex_pattern", answers.NUMBER))
        for pipeline in checked.get("filter_list", ())
        for part in pipeline["filter"]
        if part["function"] == "regex"
    ]
    for key, pattern in patterns:
        try:
            answers.check_pattern(pattern)
        except InputError as error:
            raise config.refuse(key, str(error)) from None
    return checked


def _files(values: TaskFile) -> dict[str, list[str]]:
    """The data files of each split."""
    files = values["dataset_kwargs"]["data_files"]
    by_split = files if isinstance(files, dict) else {"train": files}
    return {key: [one] if isinstance(one, str) else one for key, one in by_split.items()}


class _Made:
    """A task that is being made of its file."""

    def __init__(self, config: Yaml, values: TaskFile) -> None:
        self.config, self.values = config, values
        self.kind = values.get("output_type", "generate_until")
        self.delimiter = values.get("target_delimiter", " ")
        self.between = values.get("fewshot_delimiter", "\n\n")
        self.options: dict[str, Any] = {}
        for metric in values.get("metric_list", ()):
            if metric["metric"] == "exact_match":
                self.options = {k: v for k, v in metric.items() if k in MATCH_OPTIONS}
        pipelines = values.get("filter_list") or [Pipeline(name="none", filter=[])]
        self.pipelines = [(p.get("name", str(i)), p["filter"]) for i, p in enumerate(pipelines)]

    # data

    def _splits(self) -> tuple[Rows, Rows]:
        """The rows that are asked, and the examples."""
        name = self.values.get("test_split") or self.values.get("validation_split")
        if name is None:
            raise self.config.refuse("test_split", "expected test_split or validation_split")
        asked, count = self._rows(name), self.values.get("num_fewshot", 0)
        if not count:
            return asked, []
        split = self.values.get("fewshot_split") or self.config.values.get("training_split")
        if split in (None, name):
            examples, asked = asked[:count], asked[count:]
        else:
            examples = self._rows(str(split))[:count]
        if len(examples) < count or not asked:
            message = f"expected {count} examples and more, got fewer"
            raise self.config.refuse("num_fewshot", message)
        return asked, examples

    def _rows(self, split: str) -> Rows:
        names = _files(self.values).get(split)
        if names is None:
            raise self.config.refuse("dataset_kwargs", f"data_files: expected {split!r:.60}")
        found: Rows = []
        for name in names:
            places = [self.config.path.parent / name, Path(name)]
            there = [path for path in places if path.exists()]
            if not there:
                folders = dict.fromkeys(str(path.absolute().parent) for path in places)
                raise self.config.refuse(
                    "dataset_kwargs",
                    f"data_files: expected {Path(name).name} in {' or '.join(folders)}, got no"
                    " such file",
                )
            found += read_rows(there[0], self.values["dataset_path"])
        return found

    # templates

    def _field(self, key: str, where: str, row: Row) -> Any:
        """What a key makes of a row: a field, or what its template renders."""
        template = self.values[key]  # type: ignore[literal-required]
        if not isinstance(template, str):
            return template
        return row[template] if template in row else self._rendered(key, template, where, row)

    def _rendered(self, key: str, template: str, where: str, row: Row) -> str:
        if "{" not in template:
            return template
        try:
            return render_plain(template, row)
        except InputError as error:
            told = str(error).removeprefix("template: ")
            raise self.config.refuse(key, f"{told} ({where})") from None

    def _choices(self, where: str, row: Row) -> list[str]:
        found = self._field("doc_to_choice", where, row)
        if isinstance(found, dict):
            found = list(found.values())
        if isinstance(found, str):
            found = _literal(found)
        if not isinstance(found, list) or len(found) < 2 or "" in map(str, found):
            raise self.config.refuse(
                "doc_to_choice",
                f"expected a list of two or more answers, got {show(found):.80} ({where})",
            )
        return [str(one) for one in found]

    def _target(self, where: str, row: Row) -> Any:
        """The right answer: a number or text; a list of texts."""
        found = self._field("doc_to_target", where, row)
        if isinstance(found, str):
            if "doc_to_choice" in self.values and found.isdecimal() and len(found) < 10:
                return int(found)
            if found[:1] == "[" and isinstance(listed := _literal(found), list):
                return listed
        return found

    def _shown(self, where: str, row: Row) -> tuple[str, str]:
        """The text of an example and its right answer."""
        text, target = str(self._field("doc_to_text", where, row)), self._target(where, row)
        if "doc_to_choice" in self.values and isinstance(target, int):
            choices = self._choices(where, row)
            if not 0 <= target < len(choices):
                raise self._no_answer(where, target, choices)
            target = choices[target]
        if isinstance(target, list):
            target = target[0] if target else ""
        return text, str(target)

    def _no_answer(self, where: str, target: Any, choices: Sequence[str] = ()) -> InputError:
        named = ", ".join(map(repr, choices))
        expected = f"one of {named:.200}, or its number from 0" if choices else "a right answer"
        message = f"expected {expected}, got {show(target):.80} ({where})"
        return self.config.refuse("doc_to_target", message)

    # questions

    def task(self) -> Task:
        asked, examples = self._splits()
        begin = ""
        for where, row in examples:
            text, target = self._shown(where, row)
            begin += f"{text}{self.delimiter}{target}{self.between}"
        make = self._given if self.kind == "multiple_choice" else self._written
        questions: list[Question] = []
        for number, (where, row) in enumerate(asked):
            description = self._rendered(
                "description", self.values.get("description", ""), where, row
            )
            prompt = f"{description}{begin}{self._field('doc_to_text', where, row)}"
            questions.append(make(str(number), prompt, where, row))
        name, shots = str(self.values["task"]), len(examples)
        options: dict[str, Any] = {"delimiter": self.delimiter}
        if self.kind == "generate_until":
            options |= {"judge": answers.first_filter, "also": self._others()}
        elif self.kind == "loglikelihood":
            options |= {"judge": answers.greedy, "metric": "acc"}
        return Task(
            name, "own", questions, str(self.config.path), "not stated", f"lm-eval:{shots}shot",
            **options,
        )  # fmt: skip

    def _others(self) -> dict[str, Any]:
        """Exact match after each further list of filters, by name."""

        def judge(filters: Sequence[Row]) -> Callable[[Any], list[float]]:
            return lambda asked: [answers.exact(answer, row, filters) for answer, row in asked]

        return {f"exact_match,{name}": judge(filters) for name, filters in self.pipelines[1:]}

    def _given(self, id: str, prompt: str, where: str, row: Row) -> Choices:
        if "doc_to_choice" not in self.values:
            raise self.config.refuse("doc_to_choice", "expected the answers, got none")
        choices, target = self._choices(where, row), self._target(where, row)
        if isinstance(target, str) and target in choices:
            target = choices.index(target)
        if (
            isinstance(target, bool)
            or not isinstance(target, int)
            or not 0 <= target < len(choices)
        ):
            raise self._no_answer(where, target, choices)
        return Choices(id, tuple((prompt, f"{self.delimiter}{c}") for c in choices), target)

    def _written(self, id: str, prompt: str, where: str, row: Row) -> Open:
        target = self._target(where, row)
        golds = [str(one) for one in (target if isinstance(target, list) else [target])]
        if not golds or not golds[0]:
            raise self._no_answer(where, target)
        if self.kind == "loglikelihood":  # without the delimiter, as in the harness
            gold = golds[0]
            # a token has a byte or more
            tokens = min(LONGEST, len(gold.encode()))
            return Open(id, prompt, {"label": [gold]}, gold, max_new_tokens=tokens)
        filters = [filters for _, filters in self.pipelines]
        told = {"label": golds, "options": self.options, "filters": filters}
        generation = self.values.get("generation_kwargs", {})
        until = generation.get("until", [self.between])
        return Open(
            id, prompt, told, f"{self.delimiter}{golds[0]}",
            stop=(until,) if isinstance(until, str) else tuple(until),
            max_new_tokens=generation.get("max_gen_toks", 256),
        )  # fmt: skip


def _literal(text: str) -> Any:
    """The Python value that a template has written; None if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
