"""Tasks in lm-evaluation-harness' YAML with local data."""

import json
import os
import sys

import numpy as np
import pytest
from question_files import FakeScorer

from fastlm.errors import InputError
from fastlm.evals import reference_metrics
from fastlm.evals.harness_tasks import task_files
from fastlm.evals.registry import load_task
from fastlm.evals.runner import run_tasks
from fastlm.evals.scorer import Likelihood
from fastlm.evals.suite import compare_models
from fastlm.evals.tables import score_rows

pytest.importorskip("lm_eval", reason="needs the harness: pip install fastlm[harness]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of a hundred packages that are not ours

GIVEN = """\
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: animals.jsonl, train: shots.jsonl}}
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
  - metric: acc_norm
  - metric: f1
"""
WRITTEN = """\
task: sums
dataset_path: csv
dataset_kwargs: {data_files: {validation: sums.csv}}
validation_split: validation
output_type: generate_until
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: "{{sum}}"
generation_kwargs: {until: ["\\n", "+"], max_gen_toks: 12}
metric_list:
  - metric: exact_match
    ignore_case: true
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
        regex_pattern: "(-?[0-9]+)"
      - function: take_first
"""
LIKELY = WRITTEN[: WRITTEN.index("generation_kwargs")].replace("generate_until", "loglikelihood")


class Model(FakeScorer):
    """A scorer without a model that counts its requests."""

    asked = 0
    context_limit = 2048

    def loglikelihoods(self, pairs, *, chat=False, greedy=False, on_result=None):
        Model.asked += len(pairs)
        likelihoods = [
            Likelihood(self.logprob(*pair), 1, self.logprob(*pair) > -0.5) for pair in pairs
        ]
        for i, likelihood in enumerate(likelihoods):
            on_result(i, likelihood)
        return likelihoods

    def generate(self, prompts, *, temperature=0.0, on_result=None):
        Model.asked += len(prompts)
        return super().generate(prompts)


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Set offline mode in packages that an earlier test imported."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("datasets.config.HF_DATASETS_OFFLINE", "datasets.config.HF_HUB_OFFLINE",
                     "evaluate.config.HF_EVALUATE_OFFLINE",
                     "huggingface_hub.constants.HF_HUB_OFFLINE"):  # fmt: skip
            patch.setattr(name, True)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write(tmp_path, cache):
    def write(text, name="task.yaml"):
        rows = [{"sound": f" woof {i} ", "names": ["cat", "dog"], "label": i % 2} for i in range(4)]
        (tmp_path / "animals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        shot = json.dumps({"sound": "meow", "names": ["cat", "dog"], "label": 0})
        (tmp_path / "shots.jsonl").write_text(f"{shot}\n" * 3)
        (tmp_path / "sums.csv").write_text("a,b,sum\n1,2,3\n10,-4,6\n")
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def scores(task, folder, **models):
    """Return each model's metrics by name, and the comparisons with the first."""
    results_of = {
        name: run_tasks([task], model, folder / name, model=name) for name, model in models.items()
    }
    (row,) = compare_models([task], results_of)
    json.dumps(row, allow_nan=False)
    assert list(score_rows([row]))
    values = {
        name: {key: m["value"] for key, m in model["metrics"].items()}
        for name, model in row["models"].items()
    }
    return values, row


def test_given_answers_are_measured_and_compared(write, tmp_path, cache):
    task = load_task(write(GIVEN), cache)
    shot = "Sound: meow\nAnimal: cat\n\n"
    prompt = f"Name the animal.\n\n{shot}{shot}Sound: woof 1\nAnimal:"
    assert task.questions[1].requests == ((prompt, " cat"), (prompt, " dog"))
    assert [q.gold for q in task.questions] == [0, 1, 0, 1] and task.name == "animals"
    golds = {q.requests[q.gold] for q in task.questions}
    right = Model(logprob=lambda *pair: -0.1 if pair in golds else -9.0)
    cat = Model(logprob=lambda context, answer: -0.1 if answer == " cat" else -9.0)
    values, row = scores(task, tmp_path, cat=cat, right=right)
    assert values["right"] == pytest.approx(
        {"acc": 1, "acc_norm": 1, "f1": 1, "bits_per_byte": 0.1 / 3 / 0.6931}, rel=1e-3
    )
    assert values["cat"]["acc"] == 0.5 and values["cat"]["f1"] == 0.0
    compared = {comparison["metric"]: comparison["difference"] for comparison in row["comparisons"]}
    assert compared["acc"] == 0.5 and "f1" not in compared  # no mean over questions
    measures = row["models"]["cat"]["metrics"]
    assert measures["acc"]["error"] == pytest.approx(0.2887, abs=1e-4)
    assert measures["f1"] == {
        "value": 0.0,
        "error": None,
        "min_detectable_effect": None,
        "unit": "",
    }
    before = Model.asked
    assert scores(task, tmp_path, cat=cat, right=right)[0] == values and Model.asked == before
    assert len(task.sample(2, 0).questions) == 2
    assert scores(task.sample(2, 0), tmp_path / "few", right=right)[0]["right"]["acc"] == 1


def test_written_answers_are_filtered_by_the_harness(write, tmp_path, cache):
    task = load_task(write(WRITTEN), cache)
    q = task.questions[1]
    assert (q.prompt, q.gold) == ("10 + -4 =", " 6")
    message = {"1 + 2 =": " so #### 3", "10 + -4 =": " 10 - 4 is 6."}
    values, _ = scores(task, tmp_path, m=Model(answer=message.get))
    assert values["m"] == {"exact_match": 0.5, "exact_match,flexible": 1}


TEXTS = {
    "1 + 2 =": ("The cat sat on the mat.\nIt slept there.", "It slept.\nA cat sat on a mat."),
    "10 + -4 =": ("Rain fell over the hills all day.", "All day rain was falling on hills."),
    "0 + 0 =": ("He sold the old house.", "The house is old."),
    "5 + 5 =": ("Trains stop here at night.", "A train stops here at night."),
}


@pytest.fixture
def summaries(write, tmp_path, cache):
    """Return a task whose references and answers are `TEXTS`."""

    def load(metrics):
        (tmp_path / "texts.jsonl").write_text("".join(
            json.dumps({"text": prompt, "summary": reference}) + "\n"
            for prompt, (reference, _) in TEXTS.items()
        ))  # fmt: skip
        return load_task(write(
            "task: summaries\ndataset_path: json\ntest_split: test\n"
            "dataset_kwargs: {data_files: {test: texts.jsonl}}\n"
            'output_type: generate_until\ndoc_to_text: "{{text}}"\n'
            'doc_to_target: "{{summary}}"\ngeneration_kwargs: {until: ["##"]}\n'
            f"metric_list: [{', '.join(metrics)}]\n"
        ), cache)  # fmt: skip

    return load


def test_rouge_is_that_of_rouge_score(summaries, tmp_path):
    from lm_eval.tasks.truthfulqa.utils import rouge as harness_rouge
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    task = summaries([f"{{metric: {name}}}" for name in names])
    pairs = list(TEXTS.values())
    values, row = scores(task, tmp_path, m=Model(answer=lambda prompt: TEXTS[prompt][1]))
    scorer = RougeScorer(names)
    expected = {
        name: np.mean([scorer.score(*pair)[name].fmeasure for pair in pairs]) for name in names
    }
    assert values["m"] == pytest.approx(expected) and len({*expected.values()}) == 4
    (line,) = score_rows([row])
    assert line["accuracy"].startswith(f"{100 * expected['rouge1']:.1f}±")  # a mean has an error
    # the harness has no such metric, but its task of open answers computes them, in percent
    for name in ("rouge1", "rouge2", "rougeLsum"):
        harness = [harness_rouge([reference], [answer])[name] for reference, answer in pairs]
        assert 100 * values["m"][name] == pytest.approx(np.mean(harness))
    stems = summaries(["{metric: rouge1, use_stemmer: true}"])
    stemmed, _ = scores(stems, tmp_path / "stems", m=Model(answer=lambda prompt: TEXTS[prompt][1]))
    assert stemmed["m"]["rouge1"] > values["m"]["rouge1"]  # "train stops"


def test_one_question_has_no_interval():
    one = reference_metrics.corpus_interval("bleu", [["the cat sat here"]], ["the cat sat there"])
    assert one == {"error": None, "low": None, "high": None}


def test_figures_of_the_corpus_are_sacrebleus_with_an_interval(summaries, tmp_path):
    import sacrebleu

    names = ["bleu", "chrf", "chrf++", "ter"]
    task = summaries([f"{{metric: {name}}}" for name in names])
    references, answers = zip(*TEXTS.values())
    values, row = scores(task, tmp_path, m=Model(answer=lambda prompt: TEXTS[prompt][1]))
    metrics = row["models"]["m"]["metrics"]
    for name, scorer in zip(names, (
        sacrebleu.BLEU(), sacrebleu.CHRF(), sacrebleu.CHRF(word_order=2), sacrebleu.TER()
    )):  # fmt: skip
        own = scorer.corpus_score(answers, [references], n_bootstrap=4000)
        assert values["m"][name] == pytest.approx(own.score)
        low, high = metrics[name]["low"], metrics[name]["high"]
        assert low < own.score < high and metrics[name]["error"] > 0
        # sacrebleu's interval has the same ends, about its own mean
        assert (high - low) / 2 == pytest.approx(own._ci, rel=0.12)
        assert metrics[name]["unit"] == ""
    (line,) = score_rows([row])
    assert line["accuracy"] == f"{values['m']['bleu']:.3f}±{metrics['bleu']['error']:.3f}"


@pytest.mark.parametrize(
    ("metric", "refusal"),
    [
        ("{metric: rouge1, use_stemer: true}", "harness: TypeError: .*use_stemer"),
        ("{metric: rouge3}", "harness: .*rouge3 not found"),
    ],
)
def test_a_metric_that_cannot_be_computed_is_refused_first(metric, refusal, summaries):
    with pytest.raises(InputError, match=refusal):
        summaries([metric])


@pytest.mark.parametrize("metric", ["rougeL", "chrf"])
def test_several_references_are_refused(metric, write, cache):
    text = WRITTEN[: WRITTEN.index("metric_list")].replace('"{{sum}}"', "'{{[sum, 3]}}'")
    with pytest.raises(InputError, match=f"doc_to_target: expected one text for {metric}, got a"):
        load_task(write(f"{text}metric_list: [{{metric: {metric}}}]\n"), cache)


def test_a_missing_rouge_score_is_named(summaries, monkeypatch):
    reference_metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"rouge2: expected the package rouge_score.*fastlm\[eval"):
        summaries(["{metric: rouge2}"])


def test_likelihoods_are_right_where_greedy(write, tmp_path, cache):
    metrics = "metric_list: [{metric: acc}, {metric: perplexity}]\n"
    task = load_task(write(LIKELY + metrics), cache)
    values, row = scores(task, tmp_path, m=Model(logprob=lambda c, t: -0.1 if t == "3" else -2.0))
    assert values["m"]["acc"] == 0.5
    assert values["m"]["perplexity"] == pytest.approx(2.857, abs=1e-3)  # exp(1.05)
    assert row["models"]["m"]["metrics"]["perplexity"]["unit"] == ""


def test_code_of_a_task_runs_and_its_figures_are_no_percent(write, tmp_path, cache):
    (tmp_path / "utils.py").write_text(
        "def words(doc, results):\n    return {'words': len(results[0].split())}\n"
    )
    base = write(WRITTEN[: WRITTEN.index("metric_list")], "sums.yaml")
    text = "include: sums.yaml\ntask: more\nprocess_results: !function utils.words\n"
    task = load_task(write(f"{text}metric_list: [{{metric: words, aggregation: mean}}]\n"), cache)
    values, row = scores(task, tmp_path, m=Model(answer=lambda prompt: "one two three"))
    assert task.name == "more" and values["m"] == {"words": 3}
    (line,) = score_rows([row])
    assert line["accuracy"] == "3.000±0.000" and line["MDE"] == ""
    names = {path.name for path in task_files(tmp_path / "task.yaml")}
    assert names == {"task.yaml", "sums.yaml", "sums.csv", "utils.py"}
    assert {p.name for p in task_files(base)} == {"sums.yaml", "sums.csv"}


@pytest.mark.parametrize(
    ("old", "new", "refusal"),
    [
        ("num_fewshot: 2", "num_fewshots: 2", "lm-evaluation-harness: .*num_fewshots"),
        ("num_fewshot: 2", "num_fewshot: [2", "task.yaml: expected YAML, got: ParserError"),
        ("dataset_path: json", "dataset_path: no/such", "lm-evaluation-harness: .*no/such"),
        ("test: animals.jsonl", "test: nothing.jsonl", "lm-evaluation-harness: .*nothing.jsonl"),
        ("task: animals", "task: [a, b]", "task: expected one task, got a group"),
        (
            "metric: f1",
            "metric: no_such_metric",
            "lm-evaluation-harness: .*no_such_metric not found",
        ),
        ("{{sound | trim}}", "{{noise.x}}", "lm-evaluation-harness: .*noise"),
        ("{{sound | trim}}", "{{sound", "lm-evaluation-harness: TemplateSyntaxError"),
        ("doc_to_target: label", "doc_to_target: moo", r"doc_to_target: .*got 'moo' \(row 0\)"),
        ("description:", "process_docs: !function utils.none\ndescription:", "harness: .*utils"),
    ],
)
def test_what_the_harness_refuses_is_one_line(old, new, refusal, write, cache):
    assert old in GIVEN
    with pytest.raises(InputError, match=refusal) as error:
        load_task(write(GIVEN.replace(old, new)), cache)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_refused(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe.yaml")
    for name in ("pipe.yaml", "none.yaml"):
        for read in (task_files, lambda path: load_task(str(path), cache)):
            with pytest.raises(InputError, match=name):
                read(tmp_path / name)


def test_a_missing_harness_is_named(write, cache, monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "lm_eval.api.task", None)
    monkeypatch.setitem(modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"expected the package lm_eval.*'fastlm\[harness\]'"):
        load_task(write(GIVEN), cache)
