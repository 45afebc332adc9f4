"""Corpora on object storage, against moto's server: the bytes of a local build, store faults."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from object_store import object_store
from test_data_prepare import prose
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.corpus import corpus_parts, read_documents
from fastlm.data.options import DataOptions
from fastlm.data.prepare import prepare
from fastlm.errors import InputError
from fastlm.pipeline import node_cache
from fastlm.pipeline.funnel import Funnel
from fastlm.sources import remote
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.remote import StoreError

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def store():
    with object_store() as server:
        yield server


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files: of the copies that a node keeps."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(prose(number))
    (folder / "twin.txt").write_text(prose(3).upper())
    (folder / "near.txt").write_text(prose(4) + " the end")
    return folder


def build(source: Path, out: str | Path, tmp_path: Path, **options) -> Funnel:
    options = DataOptions(**{"unit_bytes": 4000, "heldout_bytes": 2000, **options})
    return prepare([str(source)], Path(out), options=options, cache=tmp_path / "cache")


def digests(folder: str | Path) -> dict[str, str]:
    path = Path(folder)
    if remote.is_remote(path):
        files = {name: remote.read_object(path / name) for name in remote.list_sizes(path)}
    else:
        files = {
            str(file.relative_to(path)): file.read_bytes()
            for file in path.rglob("*")
            if file.is_file()
        }
    return {name: hashlib.sha256(data or b"").hexdigest() for name, data in files.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bytes_are_those_of_a_local_build(store, source, temporary, tmp_path, workers):
    local = build(source, tmp_path / "local", tmp_path)
    out = f"s3://bucket/same{workers}"
    assert build(source, out, tmp_path, workers=workers) == local
    assert digests(out) == digests(tmp_path / "local")
    assert not list(temporary.rglob("*.npy")), "copies remain on the node"
    # done already: nothing is written
    before = remote._filesystem().info(f"bucket/same{workers}/plan.json")["LastModified"]
    assert build(source, out, tmp_path) == local
    after = remote._filesystem().info(f"bucket/same{workers}/plan.json")["LastModified"]
    assert after == before


def test_readers(store, source, temporary, tmp_path):
    build(source, tmp_path / "local", tmp_path)
    out = "s3://bucket/readers"
    build(source, out, tmp_path)
    for split in ("train", "heldout"):
        expected = list(read_documents(tmp_path / "local", split))
        assert list(read_documents(out, split)) == expected and expected
        assert list(read_documents(f"{out}/{split}")) == expected
    (part, *_) = corpus_parts(out, "train")
    assert list(read_documents(part)) == list(read_documents(tmp_path / "local/train" / part.name))
    remote.delete_objects([part])
    with pytest.raises(InputError, match=r"units.json has it, the folder does not"):
        corpus_parts(out, "train")
    with pytest.raises(InputError, match=r"expected a corpus of fastlm data prepare"):
        corpus_parts("s3://bucket/nothing", "train")


def test_commands(store, source, temporary, tmp_path):
    out = "s3://bucket/commands"
    run = CliRunner().invoke
    result = run(app, ["data", "prepare", str(source), "--out", out, "--heldout-bytes", "2000"])
    assert result.exit_code == 0, result.output
    result = run(app, ["data", "show", out])
    assert result.exit_code == 0 and "exact duplicates" in result.output, result.output
    result = run(
        app, ["tokenizer", "train", out, "--vocab-size", "300", "--out",
              str(tmp_path / "tokenizer")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = run(
        app, ["data", "shards", out, "--tokenizer", str(tmp_path / "tokenizer"),
              "--out", str(tmp_path / "shards")],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "shards/train/index.json").read_text())
    assert index["documents"] == len(list(read_documents(out, "train")))
    record = json.loads((tmp_path / "shards/record.json").read_text())["stages"]["."]
    assert record["provenance"]["inputs"]["corpus"][0]["id"]
    digest = InputDigest(tmp_path / "record.json", cache=tmp_path)
    assert {name for name, *_ in digest.hash_tree(out)} == digests(out).keys()
    (tmp_path / "recipe.toml").write_text(
        f'name = "r"\n[[stage]]\nkind = "data"\nsources = ["{source}"]\n'
    )
    for words in (["run", str(tmp_path / "recipe.toml")], ["data", "forget", "-t", "x", out]):
        result = run(app, [*words, *(["--out", "s3://bucket/run"] if words[0] == "run" else [])])
        assert result.exit_code == 2 and "expected a folder" in result.output, result.output
    result = run(app, ["data", "shards", out, "--tokenizer", str(tmp_path / "tokenizer"),
                       "--out", "s3://bucket/shards"])  # fmt: skip
    assert result.exit_code == 2 and "out: expected a folder of this machine" in result.output
    assert not Path("s3:").exists()


def test_a_smaller_corpus_replaces_a_larger_one(store, source, temporary, tmp_path):
    out = "s3://bucket/replaced"
    build(source, out, tmp_path)
    for number in range(6, 12):
        (source / f"{number:02d}.txt").unlink()
    build(source, out, tmp_path)
    build(source, tmp_path / "local", tmp_path)
    assert digests(out) == digests(tmp_path / "local")


def test_an_upload_that_fails_stops_the_build_and_a_restart_finishes(
    store, source, temporary, tmp_path, monkeypatch
):
    out = "s3://bucket/fails"
    build(source, tmp_path / "local", tmp_path)
    files = remote._filesystem()
    put, failing = files._put_file, [True]

    async def fail(local, key, *args, **options):
        if failing and "/apply/00002" in key:
            raise OSError(503, "Slow Down")
        return await put(local, key, *args, **options)

    monkeypatch.setattr(files, "_put_file", fail)
    with pytest.raises(StoreError, match=r"expected an answer of the store:.*Slow Down"):
        build(source, out, tmp_path)
    assert not list(temporary.rglob("*.npy"))
    names = remote.list_sizes(Path(out))
    assert "work/apply/00001.json" in names and "work/apply/00002.json" not in names
    failing.clear()
    uploaded = []

    async def count(local, key, *args, **options):
        uploaded.append(key)
        return await put(local, key, *args, **options)

    monkeypatch.setattr(files, "_put_file", count)
    build(source, out, tmp_path)
    assert not any("/read/" in key for key in uploaded)
    assert digests(out) == digests(tmp_path / "local")


def test_a_store_that_stops_answering(source, temporary, tmp_path, monkeypatch):
    """The wait is limited, the message one line, and what is done remains."""
    build(source, tmp_path / "local", tmp_path)
    with object_store() as own:
        files = remote._filesystem()
        put = files._put_file

        async def stop(local, key, *args, **options):
            if "/apply/00002" in key:
                own.stop()
            return await put(local, key, *args, **options)

        monkeypatch.setattr(files, "_put_file", stop)
        with pytest.raises(StoreError, match=r"expected an answer of the store") as caught:
            build(source, "s3://bucket/stops", tmp_path)
        assert "\n" not in str(caught.value)


SILENT = """
import socket, sys, time
from pathlib import Path
from fastlm.sources import remote
remote.MAX_WAIT = 1
start = time.monotonic()
for call in (
    lambda: remote.write_object(Path("s3:/bucket/x"), b"x"),
    lambda: remote.upload([(Path(sys.argv[1]), Path("s3:/bucket/x"))]),
):
    try:
        call()
    except remote.StoreError as error:
        print(error)
print(time.monotonic() - start)
"""


def test_a_store_that_accepts_connections_and_never_answers(tmp_path):
    """aiobotocore would wait for its "100 Continue" without a limit. In a process of its own: the
    client still runs in a thread."""
    (tmp_path / "file").write_bytes(b"x")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-c", SILENT, tmp_path / "file"], capture_output=True, text=True,
            timeout=100, env={**os.environ, "AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "x",
                              "AWS_SECRET_ACCESS_KEY": "x"},
        )  # fmt: skip
    *messages, seconds = result.stdout.splitlines()
    assert len(messages) == 2 and all("expected an answer of the store" in m for m in messages)
    assert float(seconds) < 20


def test_a_damaged_or_lost_object_is_made_again(store, source, temporary, tmp_path, monkeypatch):
    out = Path("s3://bucket/damaged")
    build(source, tmp_path / "local", tmp_path)
    from fastlm.data import prepare as module

    def refuse(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish", refuse)
        with pytest.raises(KeyboardInterrupt):
            build(source, out, tmp_path)
    remote.delete_objects([out / "work/read/00001.rows.jsonl.zst", out / "work/exact/00000.json"])
    remote.write_object(out / "work/write/00000.json", b"{")
    build(source, out, tmp_path)
    assert digests(out) == digests(tmp_path / "local")


def test_copies_on_a_node_are_bounded_and_those_of_killed_builds_deleted(
    store, temporary, tmp_path, monkeypatch
):
    old = node_cache.cache_folder("old")
    os.utime(old, (0, 0))
    root = node_cache.cache_folder("new")
    assert not old.exists() and root.parent.stat().st_mode & 0o777 == 0o700
    for name in "abc":
        remote.write_object(Path(f"s3:/bucket/copies/{name}"), b"x" * 100)
    unfinished = root / ".00001.5.part" / "rows.npy"
    unfinished.parent.mkdir()
    unfinished.write_bytes(b"x" * 1000)
    os.utime(unfinished, (0, 0))
    usage = type("Usage", (), {"free": 250})
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: usage)
    ages = {"a": 1000, "b": 2000}
    monkeypatch.setattr(node_cache, "MAX_SHARE", 0.6)
    for name in "abc":
        node_cache.fetch(Path(f"s3:/bucket/copies/{name}"), root / name, root)
        if name in ages:
            os.utime(root / name, (time.time() - ages[name],) * 2)
    # 0.6 of 250 bytes and of those of the copies: two fit
    assert {path.name for path in root.glob("?")} == {"a", "c"}
    assert unfinished.exists()


def test_removed_documents_and_the_card_of_a_remote_corpus(store, source, tmp_path):
    """A remote corpus has the facts of a local one; its card goes to a local folder."""
    from fastlm.data.corpus_facts import corpus_facts
    from fastlm.data.removals import RemovalQuery, find_document, find_removed

    remote_out, local_out = Path("s3://bucket/card/out"), tmp_path / "out"
    for out in (remote_out, local_out):
        build(source, out, tmp_path)
    queries = [RemovalQuery(rule) for rule in ("exact", "near dup")] + [RemovalQuery(id="twin.txt")]
    for query in queries:
        (record,) = find_removed(remote_out, query)
        assert [record] == [*find_removed(local_out, query)]
    remaining = RemovalQuery(id="05.txt")
    assert find_document(remote_out, remaining) == find_document(local_out, remaining)
    facts = corpus_facts(remote_out)
    assert facts == corpus_facts(local_out) and facts["plan"]
    run = CliRunner().invoke(app, ["data", "card", "s3://bucket/card/out"])
    assert run.exit_code == 2 and "out: expected a local folder" in run.stderr
    run = CliRunner().invoke(app, ["data", "card", "s3://bucket/card/out", "-o", f"{tmp_path}/c"])
    assert run.exit_code == 0 and (tmp_path / "c/card.html").is_file()
