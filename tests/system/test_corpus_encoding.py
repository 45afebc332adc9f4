"""Token shards of a corpus in units of work: the same for any number of workers and after kills."""

import json
import os

import numpy as np
import pytest
from corpus_layouts import LAYOUTS, pack, set_layout, split_path
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.corpus import SPLITS, UNFINISHED_SHARDS, read_documents
from fastlm.data.shards import INDEX, BatchSampler, TokenDataset, write_shards
from fastlm.errors import InputError
from fastlm.feedback.forget import forget
from fastlm.pipeline.units import Work
from fastlm.tokenizer import corpus_encoding
from fastlm.tokenizer.corpus_encoding import encode, encode_corpus
from fastlm.tokenizer.stage import LOCK_FOLDER
from fastlm.tokenizer.tokenizer import Tokenizer

DOCUMENTS = {"train": 60, "heldout": 4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    Tokenizer.train([text(i) for i in range(20)], 290).save(folder)
    return folder


def text(number):
    return " ".join(f"word{(number * 31 + i) % 97}" for i in range(5 + number % 40))


@pytest.fixture(params=LAYOUTS)
def corpus(request, tmp_path, monkeypatch):
    """A corpus of which each unit encodes a few documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    steps = []
    for split, count in DOCUMENTS.items():
        texts = [text(i) if split == "train" else f"Held out: {text(i)}" for i in range(count)]
        rows = [{"text": t, "id": str(i), "source": "s", "meta": {}} for i, t in enumerate(texts)]
        lines = [json.dumps(row).encode() + b"\n" for row in rows]
        (folder / f"{split}.jsonl.zst").write_bytes(pack(lines))
        size = sum(map(len, texts))
        steps.append({"step": split, "documents": count, "bytes": size, "removed": {}})
    (folder / "funnel.json").write_text(json.dumps({"steps": steps}))
    monkeypatch.setattr(corpus_encoding, "UNIT_BYTES", 300)
    monkeypatch.setattr(corpus_encoding, "SLICE_BYTES", 1000)
    return set_layout(folder, request.param, num_parts=12)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def tokens(folder):
    data = TokenDataset(folder)
    return data.read(0, data.tokens), data.document_starts()


def test_any_number_of_workers_writes_the_same_shards(corpus, tokenizer, tmp_path):
    one = encode_corpus(corpus, "train", tokenizer, tmp_path / "one", shard_tokens=300)
    two = encode_corpus(corpus, "train", tokenizer, tmp_path / "two", shard_tokens=300, workers=2)
    assert one == two and contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(one.shards) > 6 and one.documents == 60
    texts = [d.text for d in read_documents(corpus, "train")]
    write_shards(texts, Tokenizer.load(tokenizer), tmp_path / "plain", shard_tokens=300)
    for actual, expected in zip(tokens(tmp_path / "one"), tokens(tmp_path / "plain"), strict=True):
        assert np.array_equal(actual, expected)
    state = BatchSampler(TokenDataset(tmp_path / "one"), 2, 16, seed=1).state_dict()
    BatchSampler(TokenDataset(tmp_path / "two"), 2, 16, seed=1).load_state_dict(state)


def test_a_small_corpus_has_the_shards_of_write_shards(corpus, tokenizer, tmp_path, monkeypatch):
    """So that a training on them resumes, whatever wrote them."""
    monkeypatch.undo()
    encode_corpus(corpus, "train", tokenizer, tmp_path / "units")
    texts = [d.text for d in read_documents(corpus, "train")]
    write_shards(texts, Tokenizer.load(tokenizer), tmp_path / "plain")
    assert contents(tmp_path / "units") == contents(tmp_path / "plain")


class Killed(BaseException):
    pass


def count_units(monkeypatch, kill_at=None):
    """Count the units that are encoded here, and kill the call at one of them."""
    real, calls = corpus_encoding.write_shard_files, []

    def write(*arguments):
        if len(calls) == kill_at:
            raise Killed
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(corpus_encoding, "write_shard_files", write)
    return calls


def test_a_killed_call_is_continued(corpus, tokenizer, tmp_path, monkeypatch):
    encode_corpus(corpus, "train", tokenizer, tmp_path / "whole")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        count_units(patch, kill_at=3)
        with pytest.raises(Killed):
            encode_corpus(corpus, "train", tokenizer, out)
    assert not (out / INDEX).exists() and not list(out.glob("*.bin"))
    units = len(Work(out / UNFINISHED_SHARDS).plan["units"])
    assert units > 4
    finished = sorted((out / UNFINISHED_SHARDS / "encode").glob("*.bin"))
    assert len(finished) == 3
    finished[1].write_bytes(finished[1].read_bytes()[::-1])  # damaged since
    with monkeypatch.context() as patch:
        calls = count_units(patch)
        patch.setattr(corpus_encoding, "write_index", lambda *a: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            encode_corpus(corpus, "train", tokenizer, out)
        assert len(calls) == units - 2
    with monkeypatch.context() as patch:
        calls = count_units(patch)
        encode_corpus(corpus, "train", tokenizer, out)
        assert calls == []  # only the index was missing
    assert contents(out) == contents(tmp_path / "whole")


def test_two_commands_do_not_write_to_one_folder(corpus, tokenizer, tmp_path):
    out = tmp_path / "out"
    command = ["data", "shards", str(corpus), "-t", str(tokenizer), "-o", str(out)]
    with Work(out / LOCK_FOLDER).locked():
        refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "another process works in this folder" in refused.stderr
    assert not list(out.rglob(INDEX))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert (out / "train" / INDEX).is_file() and not (out / LOCK_FOLDER).exists()


def test_unfinished_work_of_other_text_is_not_used(corpus, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        count_units(patch, kill_at=3)
        with pytest.raises(Killed):
            encode_corpus(corpus, "train", tokenizer, out)
    forget([corpus], ["3"])
    encode_corpus(corpus, "train", tokenizer, out)
    encode_corpus(corpus, "train", tokenizer, tmp_path / "new")
    assert contents(out) == contents(tmp_path / "new")
    assert TokenDataset(out).documents == 59


def test_forgetting_deletes_unfinished_work(corpus, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "shards/train"
    with monkeypatch.context() as patch:
        count_units(patch, kill_at=3)
        with pytest.raises(Killed):
            encode_corpus(corpus, "train", tokenizer, out)
    report = forget([tmp_path], ["3"])
    assert [r["kind"] for r in report.removed] == ["document", "set of token shards"]
    assert list(out.iterdir()) == []


def test_the_old_set_is_valid_until_the_new_one_is_complete(
    corpus, tokenizer, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    encode_corpus(corpus, "heldout", tokenizer, out)
    before = contents(out)
    with monkeypatch.context() as patch:
        count_units(patch, kill_at=2)
        with pytest.raises(Killed):
            encode_corpus(corpus, "train", tokenizer, out)
    assert {**contents_of_files(out)} == before and TokenDataset(out).documents == 4
    encode_corpus(corpus, "train", tokenizer, out)
    assert TokenDataset(out).documents == 60


def contents_of_files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_worker_shares_the_cores(corpus, tokenizer, tmp_path, monkeypatch):
    """The threads of the tokenizers library are limited in workers, not in this process."""
    for name in ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "as exported")
    out = tmp_path / "out"
    monkeypatch.setattr(corpus_encoding, "remove", lambda path: None)
    encode_corpus(corpus, "heldout", tokenizer, out)
    assert os.environ["RAYON_NUM_THREADS"] == "as exported"
    settings = out / UNFINISHED_SHARDS / corpus_encoding.SETTINGS
    for threads, parallelism in ((1, "false"), (3, "true")):
        values = {**json.loads(settings.read_text()), "pid": -1, "threads": threads}
        settings.write_text(json.dumps(values))
        (tmp_path / f"unit{threads}").mkdir()
        encode(Work(out / UNFINISHED_SHARDS), 0, tmp_path / f"unit{threads}")
        assert os.environ["TOKENIZERS_PARALLELISM"] == parallelism
        assert os.environ["RAYON_NUM_THREADS"] == str(threads)


def test_refusals(corpus, tokenizer, tmp_path, monkeypatch):
    def run(*arguments):
        command = ["data", "shards", corpus, "-t", tokenizer, "-o", tmp_path / "o", *arguments]
        result = CliRunner().invoke(app, list(map(str, command)))
        assert result.exit_code == 2, (result.output, result.exception)
        return result.stderr

    assert "workers: expected 1 or more, got 0" in run("--workers", 0)
    assert "executor: expected one of pool, ray, got 'dask'" in run("--executor", "dask")
    funnel = corpus / "funnel.json"
    steps = funnel.read_text()
    funnel.write_text(steps.replace('"documents": 60', '"documents": 61'))
    assert "expected the 61 documents of train that its funnel has, got 60" in run()
    assert not (tmp_path / "o/train" / INDEX).exists()
    funnel.write_text(steps)
    if split_path(corpus, "train").is_dir():
        part = corpus / "train/00000.jsonl.zst"
        part.write_bytes((corpus / "train/00003.jsonl.zst").read_bytes())
        assert "00000.jsonl.zst: expected the SHA-256" in run()
        part.unlink()
        assert "expected the parts of units.json" in run()
    else:
        split_path(corpus, "train").write_bytes(b"{}\n")
        assert "expected a prepared document" in run()
    with pytest.raises(InputError, match="at least one document"):
        (tmp_path / "none").mkdir()
        (tmp_path / "none/funnel.json").write_text("{}")
        for split in SPLITS:
            (tmp_path / f"none/{split}.jsonl.zst").write_bytes(pack([]))
        encode_corpus(tmp_path / "none", "train", tokenizer, tmp_path / "o")
