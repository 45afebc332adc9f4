"""fastlm's models in lm-evaluation-harness, compared with its ``hf`` on the same weights."""

import ast
import json
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from preference_models import WORDS, make_base
from question_files import write_arrow

from fastlm.errors import InputError
from fastlm.evals.registry import load_task
from fastlm.evals.runner import run_tasks
from fastlm.evals.sets import mmlu
from fastlm.evals.suite import compare_models

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="needs the harness: pip install fastlm[harness]")
pytestmark = pytest.mark.filterwarnings("ignore")  # of a hundred packages that are not ours

CONTEXT = "what is tree river stone?"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"), initializer_range=0.2)


@pytest.fixture(scope="module")
def sides(base):
    """Return both models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.api.registry import get_model

        import fastlm.evals.harness  # noqa: F401 registers itself

        options = {"pretrained": str(base), "dtype": "float32", "device": "cpu"}
        return get_model("fastlm")(**options), get_model("hf")(**options, batch_size=4)


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, item, i) for i, item in enumerate(arguments)]


def test_likelihoods_are_those_of_hf(sides):
    _, theirs = sides
    pairs = [
        (CONTEXT, f" {word}") for word in ("lamp", "boat song", "please", "the<|im_end|>", "a")
    ] + [
        ("", "tree lamp"), ("what is it? ", "lamp"), ("what\n\n", " lamp"),
        ("", "<|endoftext|>boat"), (CONTEXT * 30, " lamp boat"), (CONTEXT, " lamp"),
    ]  # fmt: skip
    plain = {"until": [], "max_gen_toks": 1}
    contexts = [f"{CONTEXT} {word}" for word in WORDS]
    answers = theirs.generate_until(
        requests("generate_until", *((c, plain) for c in contexts)), disable_tqdm=True
    )
    pairs += list(zip(contexts, answers, strict=True))
    actual, truth = (
        side.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for side in sides
    )
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in truth]
    assert any(greedy for _, greedy in actual)
    assert [p for p, _ in actual] == pytest.approx([p for p, _ in truth], abs=1e-4)


def test_whole_texts_are_those_of_hf(sides):
    texts = ["tree", "what is a lamp? " * 60, CONTEXT]
    actual, truth = (
        side.loglikelihood_rolling(
            requests("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True
        )
        for side in sides
    )
    assert actual == pytest.approx(truth, abs=1e-3)


def test_answers_are_those_of_hf(sides):
    _, theirs = sides
    plain = {"until": ["\n\n"], "max_gen_toks": 12}
    full_answers = theirs.generate_until(
        requests("generate_until", (CONTEXT, plain)), disable_tqdm=True
    )
    instances = [
        (CONTEXT, plain), ("user", {**plain, "do_sample": False, "temperature": 0.7}),
        (CONTEXT, {"until": full_answers[0][5:7], "max_gen_toks": 12}), (CONTEXT * 30, plain),
    ]  # fmt: skip
    actual, truth = (
        side.generate_until(requests("generate_until", *instances), disable_tqdm=True)
        for side in sides
    )
    assert actual == truth
    assert len(actual[2]) < len(actual[0])


def test_drawn_answers_have_seeds(sides, base):
    from fastlm.evals.harness import FastLM

    ours, _ = sides
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}
    instances = requests("generate_until", *[(CONTEXT, options)] * 3, ("user", options))
    first = ours.generate_until(instances, disable_tqdm=True)
    assert len(set(first)) > 2  # each repeat is drawn anew
    assert ours.generate_until(instances, disable_tqdm=True) == first
    assert ours.generate_until(instances[3:], disable_tqdm=True) == first[3:]
    other = FastLM(str(base), seed=1)
    assert other.generate_until(instances, disable_tqdm=True) != first


def test_chats_are_those_of_hf(sides):
    ours, theirs = sides
    history = [
        {"role": "system", "content": "be brief"}, {"role": "user", "content": CONTEXT},
        {"role": "assistant", "content": "a lamp "},
    ]  # fmt: skip
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) is None
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.apply_chat_template(history[:2]) == theirs.apply_chat_template(history[:2])
    for messages in (history, history[1:]):
        text = ours.apply_chat_template(messages, add_generation_prompt=False)
        assert text.endswith("a lamp ") and not text.startswith("a")
        assert text.rstrip() == theirs.apply_chat_template(messages, False).rstrip()
    # the text of a chat begins with a special token, which both read as such
    pairs = [(ours.apply_chat_template(history[:2]), "lamp")]
    actual, truth = (
        side.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for side in sides
    )
    assert actual[0][0] == pytest.approx(truth[0][0], abs=1e-4)


def test_what_is_done_is_cached(base, tmp_path, monkeypatch):
    from lm_eval.api.model import CachingLM

    from fastlm.evals.harness import FastLM

    model = FastLM(str(base), tokens=16)  # a forward for each question
    instances = requests("loglikelihood", *((f"{CONTEXT} {i}", " lamp") for i in range(6)))
    full_answers = model.loglikelihood(instances, disable_tqdm=True)
    cached = CachingLM(model, str(tmp_path / "cache.db"))
    score, calls = model.scorer._score, []

    def counting(batch, *rest):
        calls.append(len(batch.members))
        return score(batch, *rest)

    def failing(batch, *rest):
        if sum(calls) > 2:
            raise KeyboardInterrupt
        return counting(batch, *rest)

    monkeypatch.setattr(model.scorer, "_score", failing)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(instances)
    done = sum(calls)
    assert 0 < done < 6
    calls.clear()
    monkeypatch.setattr(model.scorer, "_score", counting)
    second_answers = cached.loglikelihood(instances)
    assert [p for p, _ in second_answers] == pytest.approx([p for p, _ in full_answers], abs=1e-4)
    assert sum(calls) == 6 - done
    assert cached.loglikelihood(instances) == second_answers
    assert sum(calls) == 6 - done  # all of it was known
    cached.dbdict.close()


def test_the_command_line_of_the_harness(base, tmp_path, monkeypatch, capsys):
    from fastlm.evals.harness import main

    rows = [{"q": CONTEXT, "a": ["lamp", "boat"], "gold": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lamps.yaml").write_text(json.dumps({
        "task": "lamps", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice", "doc_to_text": "q", "doc_to_choice": "a",
        "doc_to_target": "gold", "num_fewshot": 0, "metric_list": [{"metric": "acc"}],
    }))  # fmt: skip
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    words = ["--model", "fastlm", "--tasks", str(tmp_path / "lamps.yaml")]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["lm_eval", *words, *more])
        main()

    out = tmp_path / "out.json"
    run("--model_args", f"pretrained={base},dtype=float32", "--output_path", str(out))
    (written,) = tmp_path.glob("out*.json")
    result = json.loads(written.read_text())
    assert result["results"]["lamps"]["acc,none"] == 0.5  # the same answer to each question
    assert result["config"]["model_dtype"] == "torch.float32"
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run("--model_args", f"pretrained={base},dtyp=float32")
    assert ended.value.code == 2
    message = "fastlm: model_args: dtyp: unknown key; the nearest valid one is 'dtype'"
    assert message in capsys.readouterr().err


TASKS = {
    "lambada": {"output_type": "loglikelihood",
                "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
                "doc_to_target": "{{' '+text.split(' ')[-1]}}"},
    "names": {"output_type": "multiple_choice", "doc_to_text": "Q: {{text}}\n",
              "doc_to_choice": "names", "doc_to_target": "label", "target_delimiter": "",
              "description": "Choose.\n\n",
              "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]},
    "words": {"output_type": "generate_until", "doc_to_text": "{{text}}\n\n",
              "doc_to_target": "word", "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5}},
    "texts": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"},
}  # fmt: skip


def test_a_users_own_task_has_the_scores_of_the_harness(sides, tmp_path, monkeypatch):
    import lm_eval

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    rows = [
        {"text": f"the {word} {i} sat on a mat lamp", "names": ["a tree", "lamp"], "label": i % 2,
         "word": word} for i, word in enumerate(WORDS[:6])
    ]  # fmt: skip
    for part in ("test", "train"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = {part: str(tmp_path / f"{part}.jsonl") for part in ("test", "train")}
    configs = [
        {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files},
            "test_split": "test", "fewshot_split": "train", "num_fewshot": 2 * (name != "texts"),
            **keys,
        }
        for name, keys in TASKS.items()
    ]  # fmt: skip
    tasks = []
    for config in configs:
        (tmp_path / f"{config['task']}.yaml").write_text(json.dumps(config))
        tasks.append(load_task(str(tmp_path / f"{config['task']}.yaml"), tmp_path / "cache"))
    ours, _ = sides
    instances = {"m": run_tasks(tasks, ours.scorer, tmp_path / "items", model="m")}
    actual = {
        row["name"]: row["models"]["m"]["metrics"] for row in compare_models(tasks, instances)
    }
    theirs = lm_eval.simple_evaluate(ours, tasks=configs, bootstrap_iters=0)
    for name, scores in theirs["results"].items():
        values = {
            key.partition(",")[0]: value
            for key, value in scores.items()
            if key.endswith(",none") and "_stderr" not in key
        }
        assert values
        for metric, value in values.items():
            assert actual[name][metric]["value"] == pytest.approx(value, rel=1e-5), (name, metric)


ROW = {
    "idx": 0, "question": " Where is it", "sentence": "it's  a good film .", "sentence1": "A man.",
    "sentence2": "He runs.", "premise": "The man ran. ", "hypothesis": "he slept", "label": 1,
    "choices": ["a b", "B", "c", "d"], "choice1": "It rained.", "choice2": "He fell.",
}  # fmt: skip
TRIVIA = ROW | {"answer": {"value": "Boulevard", "aliases": ["Blvd", "Boulevard"]}}
SETS = {  # the harness' file -> rows, what fastlm makes of them with the first as its example
    "glue/rte/default.yaml": (ROW, "rte"),
    "glue/sst2/default.yaml": (ROW, "sst2"),
    "glue/mrpc/default.yaml": (ROW, "mrpc"),
    "super_glue/cb/default.yaml": (ROW, "cb"),
    "super_glue/copa/default.yaml": (ROW | {"question": "cause"}, "copa"),
    "mmlu/default/mmlu_anatomy.yaml": (ROW | {"answer": 1}, True),
    "mmlu/continuation/mmlu_anatomy.yaml": (ROW | {"answer": 1}, False),
    "triviaqa/default.yaml": (TRIVIA, "triviaqa"),
    "nq_open/nq_open.yaml": (ROW | {"answer": ["here", "there"]}, "nq_open"),
}  # fmt: skip


@pytest.mark.parametrize("file", SETS)
def test_sets_are_asked_in_the_templates_of_the_harness(file, tmp_path):
    """Prompts equal those that the harness renders from its own files, with one example."""
    row, expected_prompts = SETS[file]
    config = harness_config(file)
    text, target = (_harness(config[f"doc_to_{key}"], row) for key in ("text", "target"))
    if "doc_to_choice" in config:
        choices = _harness(config["doc_to_choice"], row)
        choices = ast.literal_eval(choices) if isinstance(choices, str) else choices
        target = choices[int(target)] if str(target).isdigit() else target
    else:
        target = ast.literal_eval(target)[0]
    delimiter = config.get("target_delimiter", " ")
    between = config.get("fewshot_delimiter", "\n\n")
    prompt = f"{config.get('description', '')}{text}{delimiter}{target}{between}{text}"
    if file.partition("/")[0] in ("glue", "super_glue"):
        folder = file.partition("/default")[0]
        write_arrow(tmp_path, folder, "validation", [row])
        (question,) = load_task(expected_prompts, tmp_path).questions
        assert question.requests == tuple((text, delimiter + choice) for choice in choices)
    elif isinstance(expected_prompts, bool):
        (question,) = mmlu.subject_questions("anatomy", [row], [row], letters=expected_prompts)
        assert question.requests == tuple((prompt, delimiter + choice) for choice in choices)
    else:
        folder = {"triviaqa": "trivia_qa/rc.wikipedia.nocontext", "nq_open": "nq_open/none"}[
            expected_prompts
        ]
        write_arrow(tmp_path, folder, "validation", [{"question": row["question"],
                                                      "answer": row["answer"]}] * 6)  # fmt: skip
        (question,) = load_task(f"{expected_prompts}:5shot", tmp_path).questions
        example = f"{text}{delimiter}{target}{between}"
        assert question.prompt == f"{config.get('description', '')}{example * 5}{text}"


def harness_config(file):
    """Read a task's file of the harness with its includes; functions are resolved."""
    import lm_eval.tasks

    path = Path(lm_eval.tasks.__file__).parent / file

    class Loader(yaml.SafeLoader):
        pass

    def function(loader, node):
        module, _, name = loader.construct_scalar(node).rpartition(".")
        if module != "utils":
            return None
        return runpy.run_path(str(path.parent / "utils.py"))[name]

    Loader.add_constructor("!function", function)
    config = yaml.load(path.read_text(), Loader)
    if base := config.get("include"):
        config = yaml.load((path.parent / base).read_text(), Loader) | config
    return config


def _harness(template, row):
    """Render a key as `lm_eval.api.task.ConfigurableTask` does."""
    from lm_eval.utils import apply_template

    if callable(template):
        return template(row)
    if not isinstance(template, str):
        return template
    return row[template] if template in row else apply_template(template, row)


def test_a_missing_harness_is_one_line():
    program = """
import runpy, sys
sys.modules["lm_eval"] = None  # as if it were not installed
runpy.run_module("fastlm.evals.harness", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "lm_eval, which is not installed (pip install 'fastlm[harness]')" in done.stderr


def test_arguments(base):
    from fastlm.evals.harness import FastLM

    model = FastLM(
        str(base), dtype="bfloat16", max_length=32, prefix_token_id=5, tokens=64,
        tokenizer=str(base), batch_size="auto", max_batch_size=8, enable_thinking=False,
    )  # fmt: skip
    scorer = model.scorer
    assert scorer.model.dtype == torch.bfloat16 and scorer.tokens == 64
    assert (scorer.context_limit, scorer.prefix) == (32, 5)
    assert model.variables == {"enable_thinking": False}
    for wrong, message in (
        ({"dtype": "int8"}, "dtype: expected one of auto"),
        ({"max_length": 4096}, "limit: expected 1 to 128, got 4096"),
        ({"add_bos_token": True}, "add_bos: expected a tokenizer with BOS"),
        ({"tokens": 0}, "tokens: expected 1 or more, got 0"),
        ({"max_gen_toks": 0}, "max_gen_toks: expected 1 or more, got 0"),
    ):
        with pytest.raises(InputError, match=message):
            FastLM(str(base), **wrong)
    instances = SimpleNamespace(args=("what", {"until": [], "beams": 4}))
    with pytest.raises(InputError, match="gen_kwargs: beams: unknown key"):
        model.generate_until([instances], disable_tqdm=True)
    instances = SimpleNamespace(args=("what", {"until": [], "max_gen_toks": 32}))
    with pytest.raises(InputError, match="max_gen_toks: expected less than the context's 32"):
        model.generate_until([instances], disable_tqdm=True)
