"""What a user may do wrong on the command line: one line that names the error, exit status 2, and
nothing half-written. The modules' own tests have the details. A row here is a promise like the
README's, for everything that a command can be given.

Not here, because no command accepts tensors: mismatched dtypes and devices and targets outside the
vocabulary (tests of the ops). For a full disk and a read-only run folder see test_run.py.
"""

import gzip
import json
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import tiny_recipe
import zstandard
from damage import change_json, outcome
from model_files import write_gguf
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.stages import run_recipe

PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>A page.</p>"
WARC = (
    b"WARC/1.0\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:1>\r\n"
    b"Content-Type: application/http; msgtype=response\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n"
) % (len(PAGE), PAGE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    recipe = tiny_recipe.write(folder)
    run_recipe(recipe, folder / "run")
    return folder


def refused(*arguments, text: str) -> None:
    result = CliRunner().invoke(app, [str(a) for a in arguments], input="")
    assert result.exit_code == 2, (result.output, result.exception)
    (line,) = [s for s in result.stderr.splitlines() if "fastlm: " in s]
    assert line.startswith("fastlm: ") and text in line


SOURCES = {  # file name -> its bytes (None: no such file) and the refusal
    "nowhere": (None, "not found"),
    "empty.txt": (b"", "the file is empty"),
    "program.txt": (b"\x7fELF\2\1\1" + bytes(500), "it holds binary data"),
    "cut.txt.gz": (gzip.compress(b"text " * 1000)[:-9], "it is cut short"),
    "cut.txt.zst": (zstandard.compress(b"text " * 1000)[:-3], "it is cut short"),
    "cut.warc": (WARC[:-20], "its last record is cut short"),
    "cut.warc.gz": (gzip.compress(WARC)[:-40], "its last record is cut short"),
    "no.parquet": (b"PAR1" + bytes(99), "expected a Parquet file"),
    "no.warc": (b"<html>", "expected a WARC archive"),
    "latin1.txt": ("Stra\xdfe\n".encode("latin-1") * 9, "line 1: expected UTF-8, got byte 0xdf"),
    "long.txt.zst": (
        zstandard.compress(b"x" * 200_000_000),
        "expected lines of at most 16,777,216",
    ),
    "long.jsonl.zst": (zstandard.compress(b"x" * 200_000_000), "this one is longer"),
    "broken.jsonl": (b'{"text": \n', "line 1: expected one JSON object"),
    "other.jsonl": (b'{"body": "a"}\n', "expected an object with a text in 'text'"),
    "book.pdf": (b"%PDF", "expected a file of a type that is read"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_sources(name, tmp_path):
    data, text = SOURCES[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    refused("data", "prepare", tmp_path / name, "-o", tmp_path / "out", text=text)
    assert not list((tmp_path / "out").glob("*"))


def test_source_names(tmp_path):
    (tmp_path / "folder").mkdir()
    for source, text in (
        (tmp_path / "folder", "found none"),
        ("pypi:a/../b", "expected pypi:NAME"),
        ("deb:BAD NAME", "expected deb:NAME"),
        ("", "got an empty text"),
    ):
        refused("data", "prepare", source, "-o", tmp_path / "out", text=text)
    refused("data", "get", "model:gpt9", text="expected one of model:smollm2")
    refused("data", "get", "gpt9", text="expected model:NAME or pypi:NAME")
    refused("data", "show", tmp_path, text="expected the funnel")


def test_a_corrupt_shard(finished, tmp_path):
    run = finished / "run"
    shutil.copytree(run / "shards", tmp_path / "shards")
    for part in ("train", "heldout"):
        file = tmp_path / "shards" / part / "00000.bin"
        data = bytearray(file.read_bytes())
        data[7] ^= 1
        file.write_bytes(data)
    refused("eval", "-m", run, "--data", tmp_path / "shards/heldout", text="expected sha256")
    refused(
        "pretrain", "--shards", tmp_path / "shards", "--config", run / "pretrain/model/config.json",
        "-o", tmp_path / "out", "--max-steps", 1, text="expected sha256",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.fixture
def model(finished, tmp_path):
    shutil.copytree(finished / "run/pretrain/model", tmp_path / "model")
    return tmp_path / "model"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def lie(file: Path) -> None:
    """Let the header claim that the first tensor extends past the end of the file."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 10**9
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize("damage", [cut, lie])
def test_safetensors(model, damage):
    damage(model / "model.safetensors")
    refused("generate", "-m", model, "-p", "x", text="expected a complete safetensors file")


def test_gguf(tmp_path):
    import numpy as np

    path = write_gguf(tmp_path / "m.gguf", {"token_embd.weight": np.ones((9, 8), "f4")}, "llama")
    content = path.read_bytes()
    for data, text in (
        (content[:-10], "cut short"),
        (content[:30], "expected a count that fits in the file"),
        (b"", "cannot be read"),
        (
            content[:8] + struct.pack("<Q", 2**60) + content[16:],
            "tensor count: expected a count that fits",
        ),
        (b"GGML" + content[4:], "expected a GGUF file"),
    ):
        path.write_bytes(data)
        refused("generate", "-m", path, "-p", "x", text=text)
        refused("tokenizer", "encode", "-t", path, "x", text=text)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"hidden_size": 31}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"hidden_size": 64}, "embed_tokens.weight: expected"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected a positive integer"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 4096"),
        ({"vocab_size": -1}, "vocab_size: expected a positive integer"),
        ({"model_type": "mamba"}, "model_type: expected one of llama"),
        ({"vocab_size": "x" * 500}, "vocab_size: expected a positive integer"),
    ],
)
def test_configs(finished, model, tmp_path, change, text):
    file = model / "config.json"
    config = {"head_dim": None, **json.loads(file.read_text()), **change}
    if "hidden_size" in change:
        config["head_dim"] = None
    file.write_text(json.dumps(config))
    refused("generate", "-m", model, "-p", "x", text=text)
    if "embed_tokens" not in text:
        refused(
            "pretrain", "--shards", finished / "run/shards", "--config", file,
            "-o", tmp_path / "out", "--max-steps", 1, text=text,
        )  # fmt: skip
        assert not (tmp_path / "out").exists()


def test_a_model_larger_than_the_memory(finished, tmp_path):
    config = json.loads((finished / "run/pretrain/model/config.json").read_text())
    config |= {"hidden_size": 2**24, "head_dim": 2**23}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(
        "pretrain", "--shards", finished / "run/shards", "--config", tmp_path / "config.json",
        "-o", tmp_path / "out", "--max-steps", 1, text="expected a model that fits into",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected"), ("[1]", "expected"), ("\xff", "expected a readable text"),
        ("[" * 100_000, "expected"),
    ],
)  # fmt: skip
def test_a_config_that_is_none(finished, tmp_path, text, message):
    (tmp_path / "c.json").write_text(text, "latin-1")
    refused(
        "pretrain", "--shards", finished / "run/shards", "--config", tmp_path / "c.json",
        "-o", tmp_path / "out", "--max-steps", 1, text=f"c.json: {message}",
    )  # fmt: skip


def test_a_tokenizer_that_does_not_fit(finished, model, tmp_path):
    docs = finished / "docs"
    CliRunner().invoke(
        app, ["tokenizer", "train", str(docs), "-o", str(tmp_path / "t"), "--vocab-size", "400"]
    )
    for file in (tmp_path / "t").iterdir():
        shutil.copy(file, model)
    refused("generate", "-m", model, "-p", "x", text="expected a tokenizer of at most")
    shards = tmp_path / "shards"
    shutil.copytree(finished / "run/shards", shards)
    rest = (
        "--config", model / "config.json", "--tokenizer", tmp_path / "t", "-o", tmp_path / "out",
        "--max-steps", 1,
    )  # fmt: skip
    refused("pretrain", "--shards", shards, *rest, text="shards: expected tokens of the tokenizer")
    (model / "tokenizer.json").unlink()
    refused(
        "generate", "-m", model, "-p", "x",
        text="tokenizer.json: expected a readable text file, got: No such file or directory",
    )  # fmt: skip


def test_token_ids_out_of_range(finished, tmp_path):
    """Shards with correct checksums and with tokens that no embedding has."""
    import hashlib

    shutil.copytree(finished / "run/shards/heldout", tmp_path / "shards")
    file, index = tmp_path / "shards/00000.bin", tmp_path / "shards/index.json"
    data = b"\xff\xff" + file.read_bytes()[2:]
    file.write_bytes(data)
    info = json.loads(index.read_text())
    info["shards"][0]["sha256"] = hashlib.sha256(data).hexdigest()
    index.write_text(json.dumps(info))
    refused(
        "eval", "-m", finished / "run", "--data", tmp_path / "shards",
        text="expected ids in [0, ",
    )  # fmt: skip
    index.write_text(json.dumps(info | {"vocab_size": 65536}))
    refused(
        "eval", "-m", finished / "run", "--data", tmp_path / "shards",
        text="expected tokens of a vocabulary of at most",
    )  # fmt: skip


@pytest.mark.parametrize(
    "options, text",
    [
        (
            ["--group-size", -3],
            "group_size: expected -1 (one group a row), a multiple of 8, got -3",
        ),
        (["--group-size", 0], "group_size: expected"),
        (["--format", "w3a16"], "format: expected one of w4a16"),
        (["--method", "magic"], "method: expected one of rtn"),
        (["--embeddings", 5], "embeddings: expected 4, 8, 16 or 0"),
        (["--head", 8], "head: CausalLM has no head besides its embeddings"),
    ],
)
def test_quantize(finished, tmp_path, options, text):
    refused("quantize", "-m", finished / "run", "-o", tmp_path / "q", *options, text=text)
    assert not (tmp_path / "q").exists()


def test_quantize_onto_the_model_itself(finished):
    before = (finished / "run/pretrain/model/model.safetensors").read_bytes()
    for out in (finished / "run", finished / "run/pretrain/model"):
        refused(
            "quantize", "-m", finished / "run", "-o", out, "--group-size", 16,
            text="out: expected another folder than the model's",
        )  # fmt: skip
    assert (finished / "run/pretrain/model/model.safetensors").read_bytes() == before
    refused(
        "quantize", "-m", finished / "run", "-o", finished / "tiny.toml", "--group-size", 16,
        text="out: expected a folder, got the file",
    )  # fmt: skip
    refused(
        "quantize", "-m", finished / "run", "-o", finished / "q.gguf", "--group-size", 16,
        text="out: expected the name of a folder, no .gguf file",
    )  # fmt: skip
    assert not (finished / "q.gguf").exists()


@pytest.mark.parametrize(
    "options, text",
    [
        (["--temperature", "inf"], "temperature: expected 0 or at least 1e-6"),
        (["--top-k", 0], "top_k: expected >= 1"),
        (["--top-p", 1.5], "top_p: expected in (0, 1]"),
        (["--seed", -1], "seed: expected an integer"),
        (["--prompt", "a\udcff"], "lone surrogate"),
    ],
)
def test_generate(finished, options, text):
    refused("generate", "-m", finished / "run", "-p", "The", *options, text=text)


def test_recipes(finished, tmp_path):
    recipe = finished / "tiny.toml"
    for override, text in (
        ("pretrain.bach_size=4", "unknown key; the nearest valid one is 'batch_size'"),
        ("quantize.group_size=-3", "quantize.group_size: expected"),
        ("data.sources=['nowhere']", "source nowhere"),
    ):
        refused("run", recipe, "-o", tmp_path / "run", "--set", override, text=text)
    refused("run", tmp_path / "none.toml", text="cannot be read: No such file")
    refused("run", recipe, "-o", tmp_path / "run", "--until", "sft", text="until: expected one of")
    (tmp_path / "run/stages.json").write_text("{")
    refused("run", recipe, "-o", tmp_path / "run", text="to start again")


def test_records_of_another_kind(finished, tmp_path):
    """stages.json with a value of the wrong kind: a line that states what to do, or no work."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    file = run / "stages.json"
    content = file.read_text()
    draw = random.Random(0)
    records = []
    for _ in range(60):
        record = json.loads(content)
        stages = record["stages"]
        name = draw.choice([n for n in stages if n != "report"])
        entry = {key: stages[name][key] for key in ("seconds", "result")}
        stages[name] |= change_json(entry, draw)
        file.write_text(json.dumps(record))
        records.append(outcome(lambda: run_recipe(finished / "tiny.toml", run)))
    assert records.count("refused") > 10
    bad = ('{"layout": 2, "stages": {"data": 3}}', '{"layout": 2, "stages": {"data": {"kind": 3}}}')
    for text in ("[" * 100_000, "[]", '{"data": 3}', *bad):
        file.write_text(text)
        refused("run", finished / "tiny.toml", "-o", run, text="to start again")
    for name in ("stages.json", ".lock"):
        (run / name).unlink()
        os.mkfifo(run / name)
        refused("run", finished / "tiny.toml", "-o", run, text="expected a")
        (run / name).unlink()
        file.write_text(content)
    (run / "report.html").unlink()
    lines = (run / "pretrain/metrics.jsonl").read_text().splitlines()
    for line in (
        "{",
        "3",
        '{"step": "x"}',
        '{"step": 1, "loss": []}',
        '{"step": 99, "sample": ""}',
    ):
        (run / "pretrain/metrics.jsonl").write_text("\n".join([*lines, line]))
        record = json.loads(content)
        record["stages"]["pretrain"]["file_sizes"]["metrics.jsonl"] = (
            (run / "pretrain/metrics.jsonl").stat().st_size
        )
        file.write_text(json.dumps(record))
        refused("run", finished / "tiny.toml", "-o", run, text=f"metrics.jsonl:{len(lines) + 1}")


def test_moves_out_of_a_run_folder(finished, tmp_path):
    """A run folder from a stranger, with a half-done move of files outside the folder."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "mine").write_text("x")
    (tmp_path / "run/previous").mkdir()
    (tmp_path / "run/previous/.moves.json").write_text('{"copies": [], "names": ["../mine"]}')
    text = "names[0]: expected a path below its folder, got '../mine'"
    refused("run", finished / "tiny.toml", "-o", tmp_path / "run", text=text)
    assert (tmp_path / "mine").exists()


def test_a_folder_without_funnel_fields(tmp_path):
    for text in ('{"steps": 3}', '{"steps": [{"a": 1}]}', "[]", '{"sources": {"x": 1}}'):
        (tmp_path / "funnel.json").write_text(text)
        refused("data", "show", tmp_path, text="expected the funnel of a prepared data folder")


def test_shards_into_a_corpus(finished):
    """They would replace the record of how the text was made."""
    data, tokenizer = finished / "run/data", finished / "run/tokenizer"
    text = "out: expected a folder without prepared text"
    refused("data", "shards", data, "-t", tokenizer, "-o", data, text=text)
    assert not list(data.glob("train/*.bin"))
