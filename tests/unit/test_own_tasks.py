"""Tasks in lm-evaluation-harness' format, with local data: what they ask, what is refused."""

import json
import os

import pytest
import question_files as files
from question_files import always_first, measured, oracle

from fastlm.errors import InputError
from fastlm.evals.catalog import load_task
from fastlm.evals.own.task import task_files

GIVEN = """\
task: animals
dataset_path: json
dataset_kwargs:
  data_files:
    test: animals.jsonl
    train: shots.jsonl
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: multiple_choice
description: "Name the animal.\\n\\n"
doc_to_text: "Sound: {{sound | trim}}\\nAnimal:"
doc_to_choice: "{{names}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
metadata:
  version: 1.0
"""
WRITTEN = """\
task: sums
dataset_path: csv
dataset_kwargs: {data_files: {validation: sums.csv}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: sum
generation_kwargs:
  until: ["\\n", "+"]
  max_gen_toks: 12
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    ignore_case: true
    ignore_punctuation: true
filter_list:
  - name: strict
    filter:
      - function: regex
        regex_pattern: "#### (\\\\-?[0-9]+)"
      - function: take_first
  - name: flexible
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "(-?[0-9]+)|(none)"
"""


def write_given(folder, text=GIVEN, rows=None):
    rows = rows or [
        {"sound": f" woof {i} ", "names": ["cat", "dog"], "label": i % 2} for i in range(4)
    ]
    (folder / "animals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    shots = [{"sound": "meow", "names": ["cat", "dog"], "label": 0}] * 3
    (folder / "shots.jsonl").write_text(json.dumps(shots))
    (folder / "animals.yaml").write_text(text)
    return str(folder / "animals.yaml")


def write_sums(folder, text=WRITTEN):
    (folder / "sums.csv").write_text("a,b,sum\n1,2,3\n10,-4,6\n")
    (folder / "sums.yaml").write_text(text)
    return str(folder / "sums.yaml")


def test_a_task_with_given_answers(tmp_path):
    task = load_task(write_given(tmp_path), tmp_path)
    shot = "Sound: meow\nAnimal: cat\n\n"
    asked = f"Name the animal.\n\n{shot}{shot}Sound: woof 1\nAnimal:"
    assert task.questions[1].requests == ((asked, " cat"), (asked, " dog"))
    assert [q.gold for q in task.questions] == [0, 1, 0, 1] and task.name == "animals"
    assert measured(task, oracle(task), tmp_path)["acc"] == 1
    assert measured(task, always_first(task), tmp_path)["acc"] == 0.5
    named = {path.name for path in task_files(tmp_path / "animals.yaml")}
    assert named == {"animals.yaml", "animals.jsonl", "shots.jsonl"}


def test_targets_are_numbers_words_or_templates(tmp_path):
    for target in ('"{{label}}"', '"{{names[label]}}"', "label"):
        text = GIVEN.replace("doc_to_target: label", f"doc_to_target: {target}")
        task = load_task(write_given(tmp_path, text), tmp_path)
        assert [q.gold for q in task.questions] == [0, 1, 0, 1]
    text = GIVEN.replace('"{{names}}"', "[cat, dog]").replace("fewshot_split: train\n", "")
    questions = load_task(write_given(tmp_path, text), tmp_path).questions
    assert len(questions) == 2 and "woof 0\nAnimal: cat" in questions[0].requests[0][0]


def test_a_task_that_is_answered_freely(tmp_path):
    task = load_task(write_sums(tmp_path), tmp_path)
    q = task.questions[1]
    assert (q.prompt, q.gold, q.stop, q.max_new_tokens) == ("10 + -4 =", " 6", ("\n", "+"), 12)
    said = {"1 + 2 =": " so #### 3", "10 + -4 =": " 10 - 4 is 6."}
    found = measured(task, files.Known(says=said.get), tmp_path)
    assert found["exact_match"] == 0.5 and found["exact_match,flexible"] == 1


def test_a_task_of_likelihoods_is_right_where_greedy(tmp_path):
    text = WRITTEN[: WRITTEN.index("generation_kwargs")].replace("generate_until", "loglikelihood")
    task = load_task(write_sums(tmp_path, text), tmp_path)
    assert measured(task, oracle(task), tmp_path)["acc"] == 1
    assert measured(task, files.Known(says=lambda prompt: "3 and more"), tmp_path)["acc"] == 0.5


def test_a_file_may_include_another(tmp_path):
    write_sums(tmp_path)
    (tmp_path / "more.yaml").write_text("include: sums.yaml\ntask: more\nnum_fewshot: 1\n")
    task = load_task(str(tmp_path / "more.yaml"), tmp_path)
    assert task.name == "more" and task.questions[0].prompt == "1 + 2 = 3\n\n10 + -4 ="


REFUSED = [
    ("num_fewshot: 2", "num_fewshots: 2", r"yaml:9: num_fewshots: .*num_fewshot\b"),
    ("num_fewshot: 2", "repeats: 5", "yaml:9: repeats: expected 1"),
    ("num_fewshot: 2", "num_fewshot: two", "yaml:9: num_fewshot: expected a whole number"),
    ("num_fewshot: 2", "num_fewshot: -1", "yaml:9: num_fewshot: expected greater than or equal"),
    ("num_fewshot: 2", "num_fewshot: 9", "yaml:9: num_fewshot: expected 9 examples"),
    ("num_fewshot: 2", "process_docs: !function utils.f", "yaml:9: .*!function utils.f'?: Python"),
    ("num_fewshot: 2", "process_docs: utils.f", "yaml:9: process_docs: expected a task without Py"),
    ("num_fewshot: 2", "test_split: test", "yaml:9: 'test_split': expected once"),
    ("num_fewshot: 2", "num_fewshot: [2", "yaml:1[01]: expected YAML, got"),
    ("num_fewshot: 2", "a: &a [1]\nb: *a", r"yaml:10: expected no alias, got \*a"),
    ("num_fewshot: 2", "? [a, b]\n: c", "yaml:9: expected a key of text, got "),
    ("num_fewshot: 2", '"a\\nb": c', r"yaml:9: expected a key of text, got 'a\\nb'"),
    ("num_fewshot: 2", "metadata: " + "[" * 20_000, "yaml:9: expected YAML, got: more than 50 lev"),
    ("num_fewshot: 2", "metadata: " + "{a: " * 20_000, "yaml:9: expected YAML, got: more than 50"),
    ("num_fewshot: 2", "metadata:\n  " + "- " * 20_000, "yaml:10: .*: more than 50"),
    ("num_fewshot: 2", "tag: {[a]: b}", "yaml:9: expected YAML, got: found unhashable key"),
    ("num_fewshot: 2", "num_fewshot: !!int x", "yaml: expected YAML, got"),
    ("metric: acc_norm", "metric: f1", "yaml:15: metric_list: expected acc, acc_norm, acc_bytes"),
    ("- metric: acc_norm", "- acc_norm", r"yaml:15: metric_list\[1\]: expected an obj"),
    ("dataset_path: json", "dataset_path: super_glue", "yaml:2: dataset_path: expected 'json'"),
    ("test: animals", "test: nothing",
     r"yaml:3: dataset_kwargs: data_files: expected nothing.jsonl in /.+ or /.+, got"),
    ("test: animals.jsonl", "test: 5",
     "yaml:3: dataset_kwargs.data_files.test: expected a string or an array, got 5"),
    ("test: animals.jsonl", "test: /dev/zero", "/dev/zero: expected a readable file"),
    ("test: animals.jsonl", "test: pipe", "pipe: expected a readable file, got: a folder"),
    ("test: animals.jsonl", f"test: {'a' * 300}", r"data_files.test: expected at most 255"),
    ("task: animals", "include: pipe", "pipe: wanted a readable text file, got: a folder"),
    ("task: animals", 'include: "a\\0"', "wanted a readable text file, got: no name of a file"),
    ("task: animals", "include: animals.yaml", "include: expected one file, at most eight deep"),
    ("test_split: test", "test_split: dev", "yaml:3: dataset_kwargs: data_files: expected 'dev'"),
    ("multiple_choice", "loglikelihood_rolling", "yaml:10: output_type: expected 'multiple_"),
    ("doc_to_target: label", "doc_to_target: moo",
     "doc_to_target: expected one of 'cat', 'dog', or its number from 0, got 'moo'"),
    ("doc_to_target: label", 'doc_to_target: "²"', "doc_to_target: expected one of 'cat', 'dog'"),
    ("{{sound | trim}}", "{{noise}}", r"doc_to_text: .*'noise' is undefined \(.*row 1\)"),
    ("{{sound | trim}}", "{{sound.x()}}", "yaml:12: doc_to_text: cannot be rendered"),
    ("{{sound | trim}}", "{{''.__class__.mro()}}", "yaml:12: doc_to_text: .*unsafe"),
    ("{{sound | trim}}", "{{sound", "yaml:12: doc_to_text: cannot be rendered"),
    ('"{{names}}"', '"{{sound}}"', "yaml:13: doc_to_choice: expected a list of two or more"),
    ('"{{names}}"', '"{ {}: 1 }"', "yaml:13: doc_to_choice: expected a list of two or more"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "told"), REFUSED)
def test_faults_are_told_by_line_and_key(old, new, told, tmp_path):
    assert old in GIVEN
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=told) as error:
        load_task(write_given(tmp_path, GIVEN.replace(old, new)), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("function: take_first", "function: map", r"yaml:17: filter_list\[0\].filter\[1\].func"),
        ("temperature: 0", "temperature: 1", "yaml:8: generation_kwargs.temperature: expected 0"),
        ("temperature: 0", "top_k: 1", "yaml:8: generation_kwargs.top_k: expected no such field"),
        ("toks: 12", "toks: 0", "yaml:8: generation_kwargs.max_gen_toks: expected greater than"),
        ('[0-9]+)"', '[0-9]+"', "yaml:17: filter_list: expected a pattern of Python's re, .*miss"),
        ("(-?[0-9]+)|(none)", "(a+)+$", "yaml:17: filter_list: .*it does not end within 0.3 s"),
        ("(-?[0-9]+)|(none)", r"(\\s+)*:", "yaml:17: filter_list: .*it does not end within 0.3"),
        (
            "ignore_case: true",
            "regexes_to_ignore: [x, '(a']",
            "yaml:13: metric_list: expected a pat",
        ),
    ],
)
def test_faults_of_answers_are_told(old, new, told, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.tokenizer.chat_template.SECONDS", 0.3)
    assert old in WRITTEN
    with pytest.raises(InputError, match=told):
        load_task(write_sums(tmp_path, WRITTEN.replace(old, new)), tmp_path)


def test_damaged_data_is_told_by_line(tmp_path):
    path, good = write_given(tmp_path), '{"sound": "a", "names": ["b", "c"], "label": 0}\n'
    cases = {
        f'{good}{{"sound"\n': "animals.jsonl:2: expected JSON, got: EOF",
        f"{good}\n[1]\n": "animals.jsonl:3: expected an object, got",
        f"{good}{good.replace('0', '7')}": r"yaml:1[34]: doc_to_target: .*got 7 \(.*jsonl:2\)",
        "": "animals.jsonl: expected rows, got none",
        "[1, 2": "animals.jsonl:1: expected JSON",
    }
    for text, told in cases.items():
        (tmp_path / "animals.jsonl").write_text(text)
        with pytest.raises(InputError, match=told):
            load_task(path, tmp_path)
    (tmp_path / "animals.jsonl").write_bytes(good.encode() + b"\xff\n")
    with pytest.raises(InputError, match=r"animals.jsonl:2: expected UTF-8"):
        load_task(path, tmp_path)
    path = write_sums(tmp_path)
    for text, told in (
        ("a,b,sum\n1,2\n", "csv:2: expected 3 fields"),
        ('a,b\n"1,2', "expected CSV"),
    ):
        (tmp_path / "sums.csv").write_text(text)
        with pytest.raises(InputError, match=told):
            load_task(path, tmp_path)


def test_a_template_that_does_not_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.tokenizer.chat_template.SECONDS", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    path = write_given(tmp_path, GIVEN.replace("{{sound | trim}}", loop))
    with pytest.raises(InputError, match=r"doc_to_text: .*wanted a template that ends within"):
        load_task(path, tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(InputError, match=r"pyyaml.*pip install 'fastlm\[eval\]'"):
        load_task(write_given(tmp_path), tmp_path)
