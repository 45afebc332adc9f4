"""`fastlm data prepare --mix`: documents are repeated, sampled and dropped by their weights."""

import json
import math
import random
import shutil
from collections import Counter, defaultdict
from hashlib import sha256
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.corpus import list_parts, read_documents, read_units
from fastlm.data.mix import BUCKETS, complete
from fastlm.data.prepare import DataOptions, prepare
from fastlm.data.quality import DEFAULT_WEIGHTS, train_quality
from fastlm.data.unit_files import read_lines
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.recipe import load_recipe
from fastlm.sources.packages import default_cache
from fastlm.stages import KINDS

WORDS = "the of and river stone bird cloud house light paper sand glass wind bread tree".split()
GERMAN = "der die und das nicht Wasser Straße schöne Häuser Vögel über durch Wälder gehen".split()


def text(seed: str, words: list[str]) -> str:
    draw = random.Random(seed)
    return " ".join([*draw.choices(words, k=60), seed]) + "."


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """300 short and 200 long English documents, 100 German ones."""
    folder = tmp_path_factory.mktemp("mix")
    for name, count, words in (("short", 300, WORDS), ("long", 200, WORDS), ("de", 100, GERMAN)):
        (folder / name).mkdir()
        lines = [
            json.dumps({"text": text(f"{name}{i}", words), "id": f"{name}{i}"})
            for i in range(count)
        ]
        (folder / name / "rows.jsonl").write_text("\n".join(lines))
    return folder


def build(folder: Path, out: Path, mix, names=("short", "long", "de"), **options) -> Funnel:
    values = {
        "rules": (), "near_duplicates": 0.0, "heldout_bytes": 4000, "unit_bytes": 60_000,
        "mix": mix, **options,
    }  # fmt: skip
    sources = [str(folder / name) for name in names]
    return prepare(sources, out, options=DataOptions(**values), cache=default_cache())


def name(document) -> str:
    return f"{Path(document.source).name} {document.id}"


def train_counts(out: Path) -> Counter[str]:
    return Counter(map(name, read_documents(out, "train")))


def heldout_names(out: Path) -> list[str]:
    return [*map(name, read_documents(out, "heldout"))]


def removals(out: Path) -> list[dict]:
    return [r for part in list_parts(out / "removed") for r in read_lines(part)]


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    mix = {
        "sources": {str(folder / "short"): 0.5, str(folder / "long"): 2.25},
        "languages": {"de": 0}, "max_epochs": 4,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("built") / "out"
    return mix, out, build(folder, out, mix)


def test_shares_are_the_weights(folder, built):
    _, out, funnel = built
    train, heldout = train_counts(out), heldout_names(out)
    assert len(heldout) == len({*heldout}) and not {*heldout} & {*train}
    by_source = defaultdict(list)
    for id, count in train.items():
        by_source[id.split()[0]].append(count)
    assert set(by_source) == {"short", "long"}
    assert {*by_source["short"]} == {1} and {*by_source["long"]} == {2, 3}
    # standard errors: 8.7 of 150, 6.1 of 450
    short, long = (
        sum(by_source[name]) + sum(id.startswith(name) for id in heldout)
        for name in ("short", "long")
    )
    assert abs(short - 150) < 35
    long_heldout = sum(id.startswith("long") for id in heldout)
    assert abs(long + 1.25 * long_heldout - 450) < 25
    counts = funnel.mix["sources"][str(folder / "long")]
    assert counts["weight"] == 2.25 and counts["documents"] == 200
    assert counts["train_documents"] == sum(by_source["long"])
    assert counts["epochs"] == counts["train_documents"] / 200 and counts["epochs"] > 2
    assert sum(c["train_share"] for c in funnel.mix["sources"].values()) == pytest.approx(1)
    assert sum(c["share"] for c in funnel.mix["languages"].values()) == pytest.approx(1)
    shown = CliRunner().invoke(app, ["data", "show", str(out)]).stdout
    assert "Mix of sources" in shown and "copies" in shown
    german = funnel.mix["languages"]["de"]
    assert (german["weight"], german["documents"], german["train_documents"]) == (0, 100, 0)
    assert "buckets" not in funnel.mix


def test_the_funnel_and_the_records_name_what_was_dropped(folder, built):
    _, out, funnel = built
    steps = {s["step"]: s for s in funnel.steps}
    train = train_counts(out)
    assert steps["repeated paragraphs"]["documents"] == 600
    assert steps["train"]["documents"] == train.total()
    assert steps["mix"]["documents"] == train.total() + len(heldout_names(out))
    assert steps["mix"]["bytes"] == steps["train"]["bytes"] + steps["heldout"]["bytes"]
    assert steps["mix"]["repeated"] == {"copy": train.total() - len(train)}
    removed = steps["mix"]["removed"]
    assert removed["language de has weight 0"] == 100
    assert removed.keys() == {"language de has weight 0", "not drawn by its weight"}
    assert sum(removed.values()) == 600 - len(train) - len(heldout_names(out))
    records = removals(out)
    assert Counter(r["reason"] for r in records) == removed
    assert {r["step"] for r in records} == {"mix"}
    assert {r["detail"] for r in records} == {"weight 0.000", "weight 0.500"}
    assert sum(r["documents"] for r in read_units(out) if r["part"][0] == "t") == train.total()
    plan = json.loads((out / "plan.json").read_text())
    assert plan["options"]["mix"]["max_epochs"] == 4


def test_the_same_plan_gives_the_same_bytes_on_two_workers(folder, built, tmp_path):
    mix, out, _ = built
    build(folder, tmp_path / "out", mix, workers=2, memory="64MiB")
    files = [p.relative_to(out) for p in sorted(out.rglob("*")) if p.is_file()]
    assert any("train" in str(file) for file in files)
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (out / file).read_bytes(), file


def test_copies_are_apart(built):
    _, out, _ = built
    for part in list_parts(out / "train"):
        ids = [*map(name, read_documents(part))]
        first, counts = [*dict.fromkeys(ids)], Counter(ids)
        passes = [[id for id in first if counts[id] > number] for number in range(3)]
        assert ids == [id for ids_of_pass in passes for id in ids_of_pass]


def test_more_weight_only_adds_copies(folder, built, tmp_path):
    mix, out, _ = built
    sources = {**mix["sources"], str(folder / "short"): 0.7}
    build(folder, tmp_path / "out", {**mix, "sources": sources})
    before, after = train_counts(out), train_counts(tmp_path / "out")
    more = {*after, *heldout_names(tmp_path / "out")}
    assert {*before, *heldout_names(out)} < more


def test_the_cap_holds(folder, tmp_path):
    mix = {"sources": {"*": 50}, "max_epochs": 2}
    build(folder, tmp_path / "out", mix, names=("de",))
    assert {*train_counts(tmp_path / "out").values()} == {2}


def test_nothing_left_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"nothing is left .*source .* has weight 0"):
        build(folder, tmp_path / "out", {"sources": {"*": 0}}, names=("de",))
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"mix.sources: expected .*de or \*, got 'english'"):
        build(folder, tmp_path / "out", {"sources": {"english": 2}}, names=("de",))


def test_no_mix_changes_nothing(folder, tmp_path):
    funnel = build(folder, tmp_path / "a", None, names=("de",))
    same = build(folder, tmp_path / "b", {"sources": {"*": 1}}, names=("de",))
    assert funnel.mix == {} and "mix" not in {s["step"] for s in funnel.steps}
    assert train_counts(tmp_path / "a") == train_counts(tmp_path / "b")
    assert same.mix["languages"]["de"]["documents"] == 100


def test_a_cluster_stays_on_one_side(tmp_path):
    """Documents that are nearly alike, but not enough to be removed."""
    lines = []
    for cluster in range(40):
        words = text(f"c{cluster}", WORDS).split()
        for version in range(3):
            changed = [*words]
            changed[version * 7] = f"version{version}"
            lines.append(json.dumps({"text": " ".join(changed), "id": f"{cluster}-{version}"}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "rows.jsonl").write_text("\n".join(lines))
    mix = {"sources": {"*": 1.5}}
    options = {"near_duplicates": 0.9, "heldout_fraction": 0.3}
    build(tmp_path, tmp_path / "out", mix, names=("in",), **options)
    train, heldout = train_counts(tmp_path / "out"), heldout_names(tmp_path / "out")
    clusters = {d.meta["cluster"] for d in read_documents(tmp_path / "out", "train")}
    others = {d.meta["cluster"] for d in read_documents(tmp_path / "out", "heldout")}
    assert heldout and train.total() > len(train) and not clusters & others
    assert len(heldout) == len({*heldout})


def test_buckets_have_the_weights_of_the_model(folder, tmp_path):
    model = train_quality([str(folder / "short")], [str(folder / "de")])
    model.save(tmp_path / "model")
    quality, options = str(tmp_path / "model"), {"heldout_bytes": 0, "unit_bytes": 1 << 20}
    assert complete({"buckets": "equal"}, quality)["buckets"] == [1] * BUCKETS
    build(folder, tmp_path / "a", {"max_epochs": 3}, quality=quality, **options)
    plan = json.loads((tmp_path / "a" / "plan.json").read_text())
    assert plan["options"]["mix"]["buckets"] == list(DEFAULT_WEIGHTS)
    train = train_counts(tmp_path / "a")
    for document in read_documents(tmp_path / "a", "train"):
        weight = DEFAULT_WEIGHTS[document.meta["quality_bucket"]]
        assert train[name(document)] in (math.floor(weight), math.ceil(weight))
    buckets = Funnel.load(tmp_path / "a").mix["buckets"]
    assert list(map(int, buckets)) == sorted(map(int, buckets))
    assert all(c["weight"] == DEFAULT_WEIGHTS[int(b)] for b, c in buckets.items())
    for document in removals(tmp_path / "a"):
        assert document["reason"] == "not drawn by its weight"


def test_shards_have_the_copies_and_forget_removes_all(built, tmp_path):
    _, out, _ = built
    shutil.copytree(out, tmp_path / "corpus")
    train = train_counts(out)
    repeated = next(d for d in read_documents(out, "train") if train[name(d)] == 3)
    key = sha256(repeated.text.encode()).hexdigest()
    runner = CliRunner()
    tokenizer = tmp_path / "tokenizer"
    for command in (
        ["tokenizer", "train", tmp_path / "corpus", "-o", tokenizer, "--vocab-size", "300"],
        ["data", "shards", tmp_path / "corpus", "-o", tmp_path / "shards", "--tokenizer",
         tokenizer],
    ):  # fmt: skip
        result = runner.invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.output
    index = json.loads((tmp_path / "shards" / "train" / "index.json").read_text())
    assert train.total() in index.values() or str(train.total()) in json.dumps(index)
    result = runner.invoke(app, ["data", "forget", "-t", key, str(tmp_path / "corpus")])
    assert result.exit_code == 5 and "token shards beside the text" in result.output, result.output
    assert name(repeated) not in train_counts(tmp_path / "corpus")
    steps = {s["step"]: s for s in Funnel.load(tmp_path / "corpus").steps}
    assert steps["train"]["documents"] == train.total() - 3


def test_a_recipe_and_the_command_line_take_the_table(folder, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "mixed"
[[stage]]
kind = "data"
sources = ["{folder / "de"}"]
rules = []
[stage.mix]
max_epochs = 2
sources = {{"*" = 3}}
[stage.mix.languages]
de = 0.5
""")
    stage = load_recipe(recipe, ["data.mix.max_epochs=1.5"], kinds=KINDS).steps[0].stage
    assert stage.mix == {"max_epochs": 1.5, "sources": {"*": 3}, "languages": {"de": 0.5}}
    for bad, message in (
        ("data.mix.sources.docs=2", r"mix.sources: expected .*de or \*, got 'docs'"),
        ("data.mix.max_epoch=2", "max_epoch: expected no such field"),
        ("data.mix.max_epochs=-1", "max_epochs"),
        ("data.mix.languages.de=nan", "languages.de"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            load_recipe(recipe, [bad], kinds=KINDS)
    arguments = [
        "data", "prepare", str(folder / "de"), "-o", str(tmp_path / "out"), "--rules", "none",
        "--heldout-bytes", "0", "--mix",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [*arguments, "{sources = {'*' = 2}}"])
    assert result.exit_code == 0, result.output
    assert {*train_counts(tmp_path / "out").values()} == {2}
    for bad in ("{sources = 2}", "many", "{sources = {'*' = -2}}"):
        assert CliRunner().invoke(app, [*arguments, bad]).exit_code == 2
