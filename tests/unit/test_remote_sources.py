"""Sources on object storage, against moto's server: listed, scanned and read by ranges."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from warc_records import record

from fastlm.errors import InputError
from fastlm.sources import remote
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.remote import StoreError
from fastlm.sources.scan import scan_file
from fastlm.sources.source_files import SourceFile, list_files, read_files

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")


def contents(folder: Path) -> dict[str, bytes]:
    rows = [json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(300)]
    records = [gzip.compress(record(i, b"<p>page %d" % i)) for i in range(50)]
    table = pa.table({"text": [f"row {i}" for i in range(100)]})
    parquet.write_table(table, folder / "table.parquet", row_group_size=20)
    return {
        "in/a.jsonl": b"".join(rows), "in/b/pages.warc.gz": b"".join(records),
        "in/c.txt": b"a text", "in/d.parquet": (folder / "table.parquet").read_bytes(),
        "in/e.png": b"\x89PNG", "in/f//g.txt": b"no path", "other.txt": b"another text",
    }  # fmt: skip


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        store.start()
        _, port = store.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        remote._filesystem.cache_clear()
        files = remote._filesystem()
        files.mkdir("bucket")
        for key, data in contents(tmp_path_factory.mktemp("s3")).items():
            files.pipe_file(f"bucket/{key}", data)
        yield "s3://bucket"
        store.stop()
        remote._filesystem.cache_clear()


def names(spec: str) -> list[str]:
    files, _ = list_files(spec, cache=Path("unused"))
    return [file.name for file in files]


def test_prefixes_patterns_and_objects(bucket):
    unsupported: Counter[str] = Counter()
    files, skipped = list_files(f"{bucket}/in", cache=Path("unused"), unsupported=unsupported)
    assert [f.name for f in files] == ["a.jsonl", "b/pages.warc.gz", "c.txt", "d.parquet"]
    assert skipped == {"unsupported type": 1} and unsupported == {".png": 1}
    assert names(f"{bucket}/in/*.txt") == ["c.txt"] and names(f"{bucket}#*.txt") == [
        "in/c.txt", "other.txt",
    ]  # fmt: skip
    (one,), _ = list_files(f"{bucket}/other.txt", cache=Path("unused"))
    assert one == SourceFile(
        Path("s3:/bucket/other.txt"), "other.txt", f"{bucket}/other.txt", "text", explicit=True
    )
    # as it is read from a plan
    assert remote.is_remote(Path(str(one.path))) and not remote.is_remote(Path("a/s3:/b"))
    for spec in (f"{bucket}/none", f"{bucket}/in/e.png"):
        with pytest.raises(InputError, match="expected objects of a type that is read"):
            names(spec)


def test_the_ranges_of_remote_files_are_the_whole_files(bucket):
    files, _ = list_files(f"{bucket}/in", cache=Path("unused"))
    for file, count in zip(files, (300, 50, 1, 100)):
        whole = list(read_files([file]))
        assert len(whole) == count
        ranges = scan_file(file, unit_bytes=700).ranges
        assert list(read_files([file] * len(ranges), ranges=ranges)) == whole
        assert len(ranges) > 1 or count == 1
    digest = InputDigest(Path("unused/record.json"), cache=Path("unused"))
    ((_, entries),) = digest.hash_sources([f"{bucket}/in"])
    assert [entry[:2] for entry in entries[2:3]] == [["c.txt", 6]] and entries[2][2]


def test_a_store_that_fails_ends_the_work(bucket, monkeypatch):
    """Its files are not counted as unreadable: a restart reads them."""
    files, _ = list_files(f"{bucket}/in", cache=Path("unused"))

    class Failing:
        def seek(self, *_):
            return 1000

        tell = seek

        def read(self, _):
            raise TimeoutError("no answer")

        def close(self):
            pass

    monkeypatch.setattr(remote._filesystem(), "open", lambda *_: Failing())
    skipped: Counter[str] = Counter()
    for file in files:
        message = f"{file.path}: expected an answer of the store: no answer"
        with pytest.raises(StoreError, match=message):
            list(read_files([file], skipped=skipped))
        with pytest.raises(StoreError, match=message):
            scan_file(file, unit_bytes=1)
    assert not skipped


def test_without_s3fs_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(InputError, match=r"expected the package s3fs.*fastlm\[s3\]"):
        names("s3://bucket/in")
