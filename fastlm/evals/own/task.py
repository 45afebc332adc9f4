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
from typing import Any

from fastlm.errors import InputError
from fastlm.evals.own import answers
from fastlm.evals.own.data import Rows, read_rows
from fastlm.evals.own.yaml_file import Yaml, read_yaml
from fastlm.evals.task import Choices, Open, Question, Task
from fastlm.tokenizer.chat_template import render_plain
from fastlm.typed import unknown

Row = Mapping[str, Any]
TYPES = ("multiple_choice", "generate_until", "loglikelihood")
# What a task says of itself and does not change what is asked
TOLD = (
    "tag", "group", "task_alias", "metadata", "dataset_name", "should_decontaminate",
    "doc_to_decontamination_query", "training_split", "repeats",
)  # fmt: skip
KEYS = {
    "task": str, "dataset_path": str, "dataset_kwargs": dict, "validation_split": str,
    "test_split": str, "fewshot_split": str, "num_fewshot": int, "fewshot_config": dict,
    "output_type": str, "doc_to_text": str, "doc_to_target": (str, int), "doc_to_choice":
    (str, list, dict), "target_delimiter": str, "fewshot_delimiter": str, "description": str,
    "generation_kwargs": dict, "metric_list": list, "filter_list": list, "include": str,
}  # fmt: skip
CODE = ("process_docs", "process_results", "class", "custom_dataset")
METRICS = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes"),
    "generate_until": ("exact_match",),
    "loglikelihood": ("acc", "perplexity"),
}
MATCH_OPTIONS = ("ignore_case", "ignore_punctuation", "ignore_numbers", "regexes_to_ignore")
LONGEST = 4096  # tokens of an answer


def read_task(path: str | Path) -> Task:
    """Read a task's file. InputError: a key, template or row that cannot be used, by its line."""
    path = Path(path)
    config = _included(read_yaml(path))
    _check_keys(config)
    kind = config.values.get("output_type", "generate_until")
    if kind not in TYPES:
        raise config.refuse("output_type", f"wanted one of {', '.join(TYPES)}, got {kind!r:.60}")
    for key in ("task", "doc_to_text", "doc_to_target", "dataset_path"):
        if key not in config.values:
            raise config.refuse(key, "wanted this key, got none")
    return _Made(config, kind).task()


def task_files(path: str | Path) -> list[Path]:
    """The files that a task's file names, itself included, as far as they are there."""
    path = Path(path)
    config = read_yaml(path)
    found = [path]
    if isinstance(base := config.values.get("include"), str):
        found += task_files(path.parent / base)
    kwargs = config.values.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, dict) else None
    for named in files.values() if isinstance(files, dict) else [files]:
        for one in named if isinstance(named, list) else [named]:
            found += [p for p in (path.parent / str(one), Path(str(one))) if p.is_file()][:1]
    return found


def _included(config: Yaml, depth: int = 0) -> Yaml:
    """The file with the keys of the one that it includes, which its own keys replace."""
    if "include" not in config.values:
        return config
    if depth == 8 or not isinstance(config.values["include"], str):
        raise config.refuse("include", "wanted one file, at most eight deep")
    base = _included(read_yaml(config.path.parent / config.values["include"]), depth + 1)
    values = {k: v for k, v in config.values.items() if k != "include"}
    return Yaml(config.path, {**base.values, **values}, {**base.places, **config.places})


def _check_keys(config: Yaml) -> None:
    for key, value in config.values.items():
        if key in CODE and value is not None:
            raise config.refuse(key, "wanted a task without Python code, which is not run")
        if key in TOLD or key in CODE or value is None:
            continue
        if key not in KEYS:
            told = unknown(str(key), str(key), [*KEYS, *TOLD])
            raise config.refuse(str(key), told.partition(": ")[2] or told)
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise config.refuse(key, f"wanted another type, got {type(value).__name__}")
    if config.values.get("repeats") not in (None, 1):
        raise config.refuse("repeats", "wanted 1 (fastlm eval --samples), got another number")


class _Made:
    """A task that is being made of its file."""

    def __init__(self, config: Yaml, kind: str) -> None:
        self.config, self.kind = config, kind
        self.values = {k: v for k, v in config.values.items() if v is not None}
        self.delimiter = self.values.get("target_delimiter", " ")
        self.between = self.values.get("fewshot_delimiter", "\n\n")
        self.options = self._match_options()
        self.pipelines = self._pipelines()
        self.generation = self._generation()

    # keys

    def _match_options(self) -> dict[str, Any]:
        """The options of exact match; all metrics are checked."""
        found: dict[str, Any] = {}
        known = METRICS[self.kind]
        for one in self.values.get("metric_list", ()):
            name = one.get("metric") if isinstance(one, dict) else one
            if name not in known:
                raise self.config.refuse(
                    "metric_list", f"wanted {', '.join(known)} for {self.kind}, got {name!r:.60}"
                )
            if name == "exact_match" and isinstance(one, dict):
                found = {k: one[k] for k in MATCH_OPTIONS if k in one}
        return found

    def _pipelines(self) -> list[tuple[str, list[dict[str, Any]]]]:
        found = []
        for one in self.values.get("filter_list", ()):
            if not isinstance(one, dict) or not isinstance(one.get("filter"), list):
                raise self.config.refuse("filter_list", "wanted a name and a list of filters")
            for part in one["filter"]:
                function = part.get("function") if isinstance(part, dict) else None
                known = answers.FILTERS.get(str(function))
                if known is None or part.keys() - known - {"function"}:
                    raise self.config.refuse(
                        "filter_list", f"wanted {', '.join(answers.FILTERS)}, got {part!r:.80}"
                    )
            found.append((str(one.get("name", len(found))), one["filter"]))
        return found or [("none", [])]

    def _generation(self) -> dict[str, Any]:
        given = self.values.get("generation_kwargs", {})
        known = {"until", "max_gen_toks", "temperature", "do_sample"}
        if other := sorted(given.keys() - known):
            raise self.config.refuse(
                "generation_kwargs", f"wanted {', '.join(sorted(known))}, got {other[0]!r:.60}"
            )
        if given.get("do_sample") or given.get("temperature"):
            raise self.config.refuse(
                "generation_kwargs", "wanted temperature 0 (fastlm eval --temperature sets it)"
            )
        until, tokens = given.get("until", [self.between]), given.get("max_gen_toks", 256)
        until = [until] if isinstance(until, str) else until
        if not isinstance(until, list) or not all(isinstance(u, str) and u for u in until):
            raise self.config.refuse("generation_kwargs", "until: wanted texts")
        if type(tokens) is not int or not 0 < tokens <= LONGEST:
            raise self.config.refuse("generation_kwargs", f"max_gen_toks: wanted 1 to {LONGEST}")
        return {"stop": tuple(until), "max_new_tokens": tokens}

    # data

    def _splits(self) -> tuple[Rows, Rows]:
        """The rows that are asked, and the examples."""
        kind = self.values["dataset_path"]
        if kind not in ("json", "csv"):
            raise self.config.refuse(
                "dataset_path", f"wanted json or csv, with data in local files, got {kind!r:.80}"
            )
        kwargs = self.values.get("dataset_kwargs", {})
        if other := sorted(kwargs.keys() - {"data_files"}):
            raise self.config.refuse("dataset_kwargs", f"wanted data_files, got {other[0]!r:.60}")
        files = kwargs.get("data_files")
        if isinstance(files, str | list):
            files = {"train": files}
        if not isinstance(files, dict) or not files:
            raise self.config.refuse("dataset_kwargs", "data_files: wanted files by split")
        name = self.values.get("test_split") or self.values.get("validation_split")
        if name is None:
            raise self.config.refuse("test_split", "wanted test_split or validation_split")
        asked, count = self._rows(files, name, kind), self.values.get("num_fewshot", 0)
        sampler = self.values.get("fewshot_config", {}).get("sampler", "first_n")
        if sampler not in ("first_n", "default") or count < 0:
            key = "num_fewshot" if count < 0 else "fewshot_config"
            raise self.config.refuse(key, "wanted 0 or more of the first rows")
        if not count:
            return asked, []
        split = self.values.get("fewshot_split") or self.values.get("training_split")
        if split in (None, name):
            examples, asked = asked[:count], asked[count:]
        else:
            examples = self._rows(files, split, kind)[:count]
        if len(examples) < count or not asked:
            raise self.config.refuse("num_fewshot", f"wanted {count} examples and more, got fewer")
        return asked, examples

    def _rows(self, files: Mapping[str, Any], split: str, kind: str) -> Rows:
        named = files.get(split)
        if named is None:
            raise self.config.refuse(
                "dataset_kwargs", f"data_files: wanted the split {split!r:.60}"
            )
        found: Rows = []
        for one in [named] if isinstance(named, str) else named:
            places = [self.config.path.parent / str(one), Path(str(one))]
            there = [path for path in places if path.exists()]
            if not there:
                folders = dict.fromkeys(str(path.absolute().parent) for path in places)
                raise self.config.refuse(
                    "dataset_kwargs",
                    f"data_files: wanted {Path(str(one)).name} in {' or '.join(folders)}, got no"
                    " such file",
                )
            found += read_rows(there[0], kind)
        return found

    # templates

    def _field(self, key: str, where: str, row: Row) -> Any:
        """What a key makes of a row: a field, or what its template renders."""
        template = self.values[key]
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
                f"wanted a list of two or more answers, got {found!r:.80} ({where})",
            )
        return [str(one) for one in found]

    def _target(self, where: str, row: Row) -> Any:
        """The right answer: a number or text; a list of texts."""
        found = self._field("doc_to_target", where, row)
        if isinstance(found, str):
            if "doc_to_choice" in self.values and found.isdigit():
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
        wanted = f"one of {named:.200}, or its number from 0" if choices else "a right answer"
        return self.config.refuse("doc_to_target", f"wanted {wanted}, got {target!r:.80} ({where})")

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
            raise self.config.refuse("doc_to_choice", "wanted the answers, got none")
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
        gold = f"{self.delimiter}{golds[0]}"
        if self.kind == "loglikelihood":
            # a token has a byte or more
            tokens = min(LONGEST, len(gold.encode()))
            return Open(id, prompt, {"label": [gold]}, gold, max_new_tokens=tokens)
        filters = [filters for _, filters in self.pipelines]
        told = {"label": golds, "options": self.options, "filters": filters}
        return Open(id, prompt, told, gold, **self.generation)


def _literal(text: str) -> Any:
    """The Python value that a template has written; None if it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
