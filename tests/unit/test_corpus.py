"""A corpus: parts in folders, or one file per split as older versions wrote."""

import json
import shutil

import pytest
from corpus_layouts import LAYOUTS, pack, set_layout, split_path

from fastlm.data.corpus import (
    PLAN,
    SPLITS,
    UNITS,
    corpus_parts,
    has_split,
    is_corpus,
    is_part_name,
    is_split,
    part_name,
    part_record,
    read_documents,
    read_units,
    update_units,
)
from fastlm.errors import InputError
from fastlm.pipeline.funnel import FUNNEL

TEXTS = {"train": [f"Text {i}" for i in range(7)], "heldout": ["Held 0", "Held 1"]}


def write(folder, layout, texts=TEXTS):
    folder.mkdir()
    steps = []
    for split in SPLITS:
        rows = [{"text": t, "id": t, "source": "s", "meta": {}} for t in texts[split]]
        (folder / f"{split}.jsonl.zst").write_bytes(
            pack([json.dumps(row).encode() + b"\n" for row in rows])
        )
        steps.append({"step": split, "documents": len(rows), "bytes": 6 * len(rows), "removed": {}})
    (folder / FUNNEL).write_text(json.dumps({"steps": steps}))
    return set_layout(folder, layout)


def names(path, split=None):
    return [document.id for document in read_documents(path, split)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_corpus_a_split_and_a_file_are_read(tmp_path, layout, monkeypatch):
    out = write(tmp_path / "out", layout)
    assert is_corpus(out) and not is_split(out)
    for split in SPLITS:
        assert has_split(out, split) and names(out, split) == TEXTS[split]
        assert is_split(split_path(out, split)) and names(split_path(out, split)) == TEXTS[split]
        parts = corpus_parts(out, split)
        assert [name for part in parts for name in names(part)] == TEXTS[split]
        assert len(parts) == {("parts", "train"): 3, ("parts", "heldout"): 2}.get(
            (layout, split), 1
        )
    with pytest.raises(InputError, match=r"split: expected train or heldout of .*, got None"):
        names(out)
    monkeypatch.chdir(out)
    assert names(".", "train") == TEXTS["train"]
    if layout == "parts":
        assert is_split("train") and names("train") == TEXTS["train"]
        with pytest.raises(InputError, match="got a corpus of parts: train"):
            names("train.jsonl.zst")


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / FUNNEL).write_text("{}")
    for number in (3, 99999, 100000, 0):
        row = {"text": "x", "id": str(number), "source": "s", "meta": {}}
        (tmp_path / "train" / part_name(number)).write_bytes(pack([json.dumps(row).encode()]))
    for other in (".00001.jsonl.zst.fastlm-0.part", "00000.bin", "notes.jsonl.zst", "0.jsonl.zst"):
        (tmp_path / "train" / other).write_text("?")
        assert not is_part_name(other)
    assert names(tmp_path, "train") == ["0", "3", "99999", "100000"]
    assert names(tmp_path, "heldout") == [] and not has_split(tmp_path, "heldout")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_split_without_documents(tmp_path, layout):
    out = write(tmp_path / "out", layout, {"train": ["a"], "heldout": []})
    assert names(out, "heldout") == [] == names(split_path(out, "heldout"))
    assert is_split(split_path(out, "heldout"))
    if layout == "parts":
        (out / "heldout").rmdir()
        assert names(out, "heldout") == []


def test_folders_that_are_no_finished_corpus(tmp_path):
    out = write(tmp_path / "out", "parts")
    with pytest.raises(InputError, match=r"empty: expected a corpus .*, a split .*empty/train"):
        (tmp_path / "empty").mkdir()
        names(tmp_path / "empty")
    with pytest.raises(InputError, match=r"rows: expected a corpus, got no train/ and no train\.j"):
        (tmp_path / "rows").mkdir()
        (tmp_path / "rows" / FUNNEL).write_text("{}")
        names(tmp_path / "rows", "train")
    shutil.copytree(out, tmp_path / "both")
    (tmp_path / "both/heldout.jsonl.zst").write_bytes(pack([]))
    with pytest.raises(
        InputError, match=r"both: expected one corpus, got parts and heldout\.jsonl"
    ):
        names(tmp_path / "both", "train")
    shutil.copytree(out / "train", tmp_path / "moved")  # without its corpus
    assert names(tmp_path / "moved") == TEXTS["train"] and not is_split(tmp_path / "moved")
    (out / PLAN).write_text("{}")
    assert names(out / "train") == TEXTS["train"]
    (out / FUNNEL).unlink()
    for path in (out, out / "train"):
        with pytest.raises(
            InputError, match=r"expected a finished corpus, funnel\.json is missing"
        ):
            names(path, "train")
    assert is_split(out / "train")  # so that nothing takes it for a folder of other text


def test_parts_that_differ_from_units_json(tmp_path):
    out = write(tmp_path / "out", "parts")
    shutil.copy(out / "train/00003.jsonl.zst", out / "train/00004.jsonl.zst")
    for path in (out, out / "train"):
        with pytest.raises(InputError, match=r"00004\.jsonl\.zst: .*not in units\.json"):
            names(path, "train")
    (out / "train/00004.jsonl.zst").unlink()
    (out / "train/00003.jsonl.zst").unlink()
    for path in (out, out / "train"):
        with pytest.raises(InputError, match=r"00003\.jsonl\.zst: .*the folder does not"):
            names(path, "train")
    assert names(out, "heldout") == TEXTS["heldout"]


def test_units_json_follows_its_parts(tmp_path):
    out = write(tmp_path / "out", "parts")
    before = read_units(out)
    assert [(r["part"], r["documents"], r["bytes"]) for r in before] == [
        ("train/00000.jsonl.zst", 3, 18), ("train/00003.jsonl.zst", 3, 18),
        ("train/00006.jsonl.zst", 1, 6), ("heldout/00000.jsonl.zst", 1, 6),
        ("heldout/00003.jsonl.zst", 1, 6),
    ]  # fmt: skip
    stamp = (out / UNITS).stat()
    update_units(out, {"train/00000.jsonl.zst": (3, 18)})
    assert (out / UNITS).stat().st_ino == stamp.st_ino  # nothing differs: not written
    (out / "train/00000.jsonl.zst").write_bytes(pack([]))
    (out / "train/00006.jsonl.zst").unlink()
    update_units(out, {"train/00000.jsonl.zst": (2, 12), "train/00006.jsonl.zst": (0, 0)})
    assert read_units(out) == [
        part_record(out, "train/00000.jsonl.zst", 2, 12), before[1], *before[3:]
    ]  # fmt: skip
    update_units(tmp_path, {"x": (1, 1)})  # an older corpus
    assert not (tmp_path / UNITS).exists() and read_units(tmp_path) == []
    (out / UNITS).write_text('[{"part": "../x", "documents": 1, "bytes": 1, "sha256": ""}]')
    with pytest.raises(InputError, match="part: expected"):
        read_units(out)
