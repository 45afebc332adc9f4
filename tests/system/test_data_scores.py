"""The commands that train the models of ``fastlm data``: quality and toxicity."""

import json
import random
from pathlib import Path

import pytest
import safety_sets
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.quality import QualityModel
from fastlm.data.toxicity import ToxicityModel
from fastlm.evals.safety.model_under_test import SafetyJudges
from fastlm.evals.safety.sets import SafetySets

NOUNS = "ladder kettle pencil bridge window basket candle mirror hammer violin".split()
VERBS = "walks talks sings leaps rests waits sleeps reads writes counts".split()


def call(*arguments, status: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == status, (result.output, result.exception)
    return result


def write_source(path: Path, words: list[str], seed: int) -> Path:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices([*words, "the", "and", "of"], k=60)) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_quality_prints_the_auc_of_each_source_and_writes_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # paths in one line
    manuals = write_source(tmp_path / "manuals.jsonl", NOUNS, 0)
    books = write_source(tmp_path / "books.jsonl", NOUNS[:5], 1)
    forum = write_source(tmp_path / "forum.jsonl", VERBS, 2)
    # what `data prepare` wrote is a source, too
    corpus = tmp_path / "corpus"
    call("data", "prepare", books, "--out", corpus, "--rules", "none")
    weights = ",".join(["0"] * 10 + ["2"] * 10)
    arguments = "data", "quality", "--good", manuals, "--good", corpus, "--other", forum
    result = call(*arguments, "-o", tmp_path / "model", "--weights", weights)
    assert str(tmp_path / "model") in result.stdout
    for text in ("manuals.jsonl", "corpus", "forum.jsonl", "only source", "1.000", "60"):
        assert text in result.stdout
    model = QualityModel.load(tmp_path / "model")
    assert model.weights == (0.0,) * 10 + (2.0,) * 10
    good, other = model.score(
        ["the kettle and the ladder " * 9, "the sailor sleeps and reads " * 9]
    )
    assert good > 0 > other
    refusal = call(*arguments, "-o", tmp_path / "model", "--weights", "1,a", status=2)
    assert "weights: expected numbers separated by commas, got '1,a'" in refusal.stderr
    call("data", "quality", "--good", manuals, "-o", tmp_path / "model", status=2)


@pytest.mark.parametrize("benign", [False, True])
def test_toxicity_writes_the_judge_of_the_safety_stage(tmp_path, benign):
    cache = safety_sets.write(tmp_path / "cache")
    source = write_source(tmp_path / "pages.jsonl", [*NOUNS, "you", "rotten"], 3)
    options = ["--benign", source] if benign else []
    result = call("data", "toxicity", "-o", tmp_path / "model", "--cache", cache, *options)
    model = ToxicityModel.load(tmp_path / "model")
    finds, total = model.accuracy["sensitivity"]
    assert f"finds {finds} of {total}, passes" in result.stdout
    rude, polite = "you rotten candle, you filthy candle", "a baker sold the candle in May"
    assert model.score([rude])[0] > 0.5 > model.score([polite])[0]
    page = json.loads(source.read_text().splitlines()[0])["text"]
    judge, accuracy = SafetyJudges(SafetySets(cache)).toxicity
    if benign:
        assert model.score([page])[0] < 0.5
        return
    assert (finds, total) == accuracy.sensitivity
    logits = model.classifier.logits([rude, polite, page, ""])
    assert [logit > 0 for logit in logits] == [judge("", t) for t in (rude, polite, page, "")]


def test_a_benign_source_without_text_is_refused(tmp_path):
    cache = safety_sets.write(tmp_path / "cache")
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "one.txt").write_text(" \n")
    arguments = "data", "toxicity", "-o", tmp_path / "model", "--cache", cache
    refusal = call(*arguments, "--benign", tmp_path / "pages", status=2)
    assert "benign" in refusal.stderr and "expected text, got none" in refusal.stderr
    assert not (tmp_path / "model").exists()
