"""Token shards: written files, refusals, and exact resume of the sampler."""

import hashlib
import json
import random

import numpy as np
import preference_models
import pytest
import torch
from disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.shards import BatchSampler, TokenDataset, write_shards
from fastlm.errors import InputError
from fastlm.evals.stage import Eval
from fastlm.model.load import load_model
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.pretrain import Pretrain


class Bytes:
    """A tokenizer of bytes; 256 is the end of text. ``shift`` moves ids out of the vocabulary."""

    def __init__(self, vocab_size=257, eos_id: int | None = 256, shift=0):
        self.vocab_size, self.eos_id, self.shift = vocab_size, eos_id, shift

    def encode_batch(self, texts):
        return [[b + self.shift for b in t.encode()] for t in texts]

    def vocabulary_id(self, size):
        return f"bytes {size}"


def texts(n=30):
    rng = random.Random(0)
    return ["".join(rng.choice("abc dé\n") for _ in range(rng.randrange(60))) for _ in range(n)]


def row(docs) -> np.ndarray:
    return np.concatenate([[*t.encode(), 256] for t in docs]).astype(np.int64)


@pytest.fixture
def shards(tmp_path):
    write_shards(texts(), Bytes(), tmp_path / "s", shard_tokens=100)
    return tmp_path / "s"


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(257, "uint16"), (1 << 16, "uint16"), (65_537, "uint32")]
)
def test_round_trip(tmp_path, vocab_size, dtype):
    docs = ["", *texts()]
    info = write_shards(iter(docs), Bytes(vocab_size), tmp_path / "s", shard_tokens=100)
    data, want = TokenDataset(tmp_path / "s", vocab_size=vocab_size), row(docs)
    assert info.dtype == dtype
    assert len(info.shards) > 3
    assert (data.tokens, data.documents) == (len(want), len(docs))
    assert data.bytes_of_text == sum(len(t.encode()) for t in docs)
    got = data.read(0, data.tokens)
    assert got.dtype == np.int64
    assert np.array_equal(got, want)
    starts = data.document_starts()
    assert np.array_equal(starts, np.cumsum([0, *(len(t.encode()) + 1 for t in docs)])[:-1])
    on_disk = b"".join((tmp_path / "s" / s["file"]).read_bytes() for s in info.shards)
    assert on_disk == want.astype("<u2" if dtype == "uint16" else "<u4").tobytes()
    assert all(s["tokens"] >= 100 for s in info.shards[:-1])
    assert json.loads((tmp_path / "s" / "index.json").read_text())["tokens"] == len(want)


@given(st.integers(0, 900), st.integers(0, 900))
@settings(deadline=None, max_examples=60)
def test_reads_cross_shard_borders(tmp_path_factory, start, n):
    folder = tmp_path_factory.getbasetemp() / "shards"
    if not folder.exists():
        write_shards(texts(), Bytes(), folder, shard_tokens=50)
    data, want = TokenDataset(folder), row(texts())
    if start + n <= len(want):
        assert np.array_equal(data.read(start, n), want[start : start + n])
    else:
        with pytest.raises(InputError, match="read: expected a range"):
            data.read(start, n)


def test_rewriting_leaves_no_stale_shards(shards):
    write_shards(["short"], Bytes(), shards)
    assert sorted(p.name for p in shards.iterdir()) == ["00000.bin", "00000.starts", "index.json"]
    assert TokenDataset(shards).tokens == 6


def test_bad_tokenizers_and_no_documents(tmp_path):
    out = tmp_path / "s"
    for tokenizer, message in (
        (Bytes(eos_id=None), "end-of-text"), (Bytes(eos_id=257), "end-of-text"),
        (Bytes(shift=200), "ids from 0 to 256, got 297"), (Bytes(shift=-100), "got -3"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            write_shards(["abc"], tokenizer, out)
    with pytest.raises(InputError, match="at least one document"):
        write_shards([], Bytes(), out)
    with pytest.raises(InputError, match="shard_tokens"):
        write_shards(["a"], Bytes(), out, shard_tokens=0)
    assert not list(out.glob("*"))


@pytest.mark.parametrize("name", ["00000.bin", "00001.starts", "index.json"])
def test_full_disk_leaves_no_data_set(tmp_path, name, monkeypatch):
    out = tmp_path / "s"
    out.mkdir()
    full_disk(monkeypatch, out / name)
    with pytest.raises(InputError, match=f"{name}: cannot be written: No space left on device"):
        write_shards(texts(), Bytes(), out, shard_tokens=100)
    with pytest.raises(InputError, match="expected a folder of token shards"):
        TokenDataset(out)


def test_corrupt_shard_names_both_sums(shards):
    p = shards / "00001.bin"
    data = bytearray(p.read_bytes())
    expected = hashlib.sha256(data).hexdigest()
    data[7] ^= 1
    p.write_bytes(data)
    with pytest.raises(InputError) as e:
        TokenDataset(shards)
    assert (
        str(e.value) == f"{p}: expected sha256 {expected}, got {hashlib.sha256(data).hexdigest()}"
    )
    TokenDataset(shards, verify=False)


def test_truncated_missing_or_foreign_files(shards):
    p = shards / "00001.bin"
    data = p.read_bytes()
    p.write_bytes(data[:-2])
    with pytest.raises(InputError, match=f"expected {len(data)} bytes, got {len(data) - 2}"):
        TokenDataset(shards, verify=False)
    p.unlink()
    with pytest.raises(InputError, match=r"00001\.bin: cannot be read"):
        TokenDataset(shards)
    with pytest.raises(InputError, match="expected a folder of token shards"):
        TokenDataset(shards / "none")
    index = json.loads((shards / "index.json").read_text())
    first, *others = index["shards"]
    files = ("../x.bin", "\0", "00000\0.bin", "", "a" * 300)
    for change in (
        {"format": "x"},
        {"dtype": "int8"},
        {"tokens": 1},
        {"tokens": "1"},
        {"dtype": ["uint16"]},
        {"vocab_size": 1.5},
        {"eos_id": None},
        {"shards": []},
        *({"shards": [{**first, "file": file}, *others]} for file in files),
        {"shards": 3},
        {"shards": [1, 2]},
        {"shards": [{**index["shards"][0], "tokens": "many"}]},
        {"shards": [{**index["shards"][0], "sha256": 1}]},
        {"shards": [{"file": "00000.bin"}]},
    ):
        (shards / "index.json").write_text(json.dumps({**index, **change}))
        with pytest.raises(InputError, match="expected the index of token shards"):
            TokenDataset(shards)


@pytest.mark.parametrize("index", ["[" * 100_000, "3", "null", "[]", "{}", "\xff", '{"format'])
def test_an_index_that_is_another_json(shards, index):
    (shards / "index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(InputError, match="expected the index of token shards") as e:
        TokenDataset(shards)
    assert len(str(e.value)) < 400


def test_another_folder_is_refused_with_a_hint_to_make_shards(shards, tmp_path):
    with pytest.raises(InputError, match="token shards \\('fastlm data shards' makes them\\)"):
        TokenDataset(tmp_path)
    (tmp_path / "both").mkdir()
    shards.rename(tmp_path / "both" / "train")
    with pytest.raises(InputError, match=f"token shards \\({tmp_path}/both/train is one\\)"):
        TokenDataset(tmp_path / "both")


def test_damaged_document_starts(shards):
    (shards / "00000.starts").write_bytes(b"\0" * (shards / "00000.starts").stat().st_size)
    with pytest.raises(InputError, match="sha256"):
        TokenDataset(shards).document_starts()


def test_another_vocabulary_is_refused(shards):
    with pytest.raises(InputError, match="vocabulary of 300, got 257"):
        TokenDataset(shards, vocab_size=300)


def windows(sampler, batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [sampler.next_batch() for _ in range(batches)]


def equal(a, b) -> bool:
    return all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_deals_every_window_once_and_labels_follow(shards, shuffle):
    data, want = TokenDataset(shards), row(texts())
    sampler = BatchSampler(data, 1, 16, seed=3, shuffle=shuffle)
    windows = []
    while sampler.epoch == 0:
        ids, labels = sampler.next_batch()
        assert ids.shape == labels.shape == (1, 16)
        assert ids.dtype == labels.dtype == torch.int64
        assert torch.equal(ids[0, 1:], labels[0, :-1])
        windows.append([*ids[0].tolist(), int(labels[0, -1])])
    windows.pop()  # it belongs to the next epoch
    fits = [
        [s.tolist() for s in np.lib.stride_tricks.sliding_window_view(want[o:], 17)[::16]]
        for o in range(16)
    ]
    matching = [o for o in range(16) if sorted(fits[o]) == sorted(windows)]
    assert len(matching) == 1
    assert shuffle or (matching == [0] and windows == fits[0])
    assert not shuffle or windows != fits[matching[0]]


def test_same_seed_same_batches_other_seed_others(shards):
    data = TokenDataset(shards)
    first = windows(BatchSampler(data, 4, 8, seed=1), 40)
    assert equal(first, windows(BatchSampler(data, 4, 8, seed=1), 40))
    assert not equal(first, windows(BatchSampler(data, 4, 8, seed=2), 40))
    per_epoch = (data.tokens - 1) // 8 // 4
    assert not equal(first[:5], first[per_epoch : per_epoch + 5])


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("stop", [0, 1, 7, 25, 60])
def test_resume_is_exact_across_epochs(shards, shuffle, stop):
    sampler = BatchSampler(TokenDataset(shards), 3, 8, seed=5, shuffle=shuffle)
    windows(sampler, stop)
    state = json.loads(json.dumps(sampler.state_dict()))
    rest = windows(sampler, 50)
    fresh = BatchSampler(TokenDataset(shards), 3, 8, seed=5, shuffle=shuffle)
    fresh.load_state_dict(state)
    assert equal(rest, windows(fresh, 50))
    assert fresh.state_dict() == sampler.state_dict()
    wide = BatchSampler(TokenDataset(shards), 6, 8, seed=5, shuffle=shuffle)
    wide.load_state_dict(state)
    assert torch.equal(wide.next_batch()[0], torch.cat([rest[0][0], rest[1][0]]))


def test_foreign_states_are_refused(shards, tmp_path):
    sampler = BatchSampler(TokenDataset(shards), 3, 8, seed=5)
    state = sampler.state_dict()
    write_shards(["other text " * 30], Bytes(), tmp_path / "other")
    other = BatchSampler(TokenDataset(tmp_path / "other"), 3, 8, seed=5)
    with pytest.raises(InputError, match="sampler state: expected data"):
        other.load_state_dict(state)
    bad = (
        {"seed": 6},
        {"seq_len": 9},
        {"shuffle": False},
        {"position": 10**6},
        {"position": -1},
        {"epoch": "1"},
        {"epoch": None},
        {"position": "0"},
        {"position": [0]},
        {"seed": "5"},
    )
    for change in bad:
        with pytest.raises(InputError, match="sampler state: "):
            sampler.load_state_dict({**state, **change})
    for wrong in ({}, [], None, "state"):
        with pytest.raises(InputError, match="sampler state: "):
            sampler.load_state_dict(wrong)


def test_bad_sampler_arguments(shards):
    data = TokenDataset(shards)
    for arguments, message in (
        ((0, 8, 1), "batch_size"), ((1, 0, 1), "seq_len"), ((1, 8, -1), "seed"),
        ((1, data.tokens, 1), "seq_len \\+ 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            BatchSampler(data, arguments[0], arguments[1], seed=arguments[2])
    sampler = BatchSampler(data, 1, data.tokens - 1, seed=0)
    for _ in range(3):  # a single window fills every epoch
        assert sampler.next_batch()[0].shape == (1, data.tokens - 1)


def test_training_batches_hold_no_heldout_token(tmp_path):
    """Two sets side by side: a sampler only sees its own."""
    write_shards(["a" * 50] * 20, Bytes(), tmp_path / "train", shard_tokens=64)
    write_shards(["z" * 50] * 20, Bytes(), tmp_path / "heldout", shard_tokens=64)
    for ids, labels in windows(BatchSampler(TokenDataset(tmp_path / "train"), 4, 33, seed=0), 40):
        assert set(ids.unique().tolist()) | set(labels.unique().tolist()) <= {ord("a"), 256}


def test_with_the_real_tokenizer(tmp_path):
    docs = ["the cat and the dog sat on the mat"] * 20 + ["Grüße, <|endoftext|> as text"]
    tokenizer = Tokenizer.train(docs, 300)
    write_shards(docs, tokenizer, tmp_path / "s", shard_tokens=64)
    data = TokenDataset(tmp_path / "s", vocab_size=tokenizer.vocab_size)
    starts = [*data.document_starts().tolist(), data.tokens]
    for text, start, end in zip(docs, starts, starts[1:], strict=False):
        *ids, eos = data.read(start, end - start).tolist()
        assert (tokenizer.decode(ids), eos) == (text, tokenizer.eos_id)
        assert tokenizer.eos_id not in ids


def test_shards_know_their_tokenizer(tmp_path):
    """Two tokenizers of the same size, and the one that made the shards in other clothes."""
    docs = ["the cat and the dog sat on the mat"] * 20
    mine, other = (Tokenizer.train(texts, 268) for texts in (docs, ["zebras hum jazz"] * 20))
    assert mine.vocab_size == other.vocab_size == 268
    write_shards(docs, mine, tmp_path / "s")
    data = TokenDataset(tmp_path / "s")
    mine.chat_template = "{{ messages }}"
    mine.save(tmp_path / "mine")
    data.check_tokenizer(copy := Tokenizer.load(tmp_path / "mine"), "shards")
    copy.backend.add_special_tokens(["<|tool|>"])  # behind those that the shards may have
    data.check_tokenizer(Tokenizer(copy.backend, {"eos_token": "<|endoftext|>"}), "shards")
    message = (
        r"^shards: expected tokens of the tokenizer [0-9a-f]{12}, got .*s of [0-9a-f]{12}: make"
    )
    with pytest.raises(InputError, match=message):
        data.check_tokenizer(other, "shards")


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    base = preference_models.make_base(tmp_path / "base")
    model, mine = load_model(base)
    docs = ["please what is now the river and the stone"] * 40
    other = Tokenizer.train(["zebras hum jazz quietly before noon"] * 20, mine.vocab_size)
    # an unused id, to the same size
    other.backend.add_tokens([f"x{i}" for i in range(mine.vocab_size - other.vocab_size)])
    other = Tokenizer(other.backend, {"eos_token": "<|endoftext|>"})
    assert other.vocab_size == mine.vocab_size
    for tokenizer, name in ((mine, "mine"), (other, "other")):
        tokenizer.save(tmp_path / f"tokenizer-{name}")
        for part in ("train", "heldout"):
            write_shards(docs, tokenizer, tmp_path / name / part)
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    stage = Pretrain(config=str(tmp_path / "config.json"), max_steps=1, batch_size=1, seq_len=8)
    inputs = {"shards": tmp_path / "mine"}
    assert stage(tmp_path / "out", tokenizer=tmp_path / "tokenizer-mine", **inputs)["steps"] == 1
    # either part
    (tmp_path / "mixed").mkdir()
    for train, heldout in (("other", "mine"), ("mine", "other")):
        for part, name in (("train", train), ("heldout", heldout)):
            (tmp_path / "mixed" / part).unlink(missing_ok=True)
            (tmp_path / "mixed" / part).symlink_to(tmp_path / name / part)
        with pytest.raises(InputError, match=r"^shards: expected tokens of the tokenizer"):
            stage(
                tmp_path / "new", tokenizer=tmp_path / "tokenizer-mine", shards=tmp_path / "mixed"
            )
    scores = Eval(stride=8)(tmp_path / "eval", model=[base], data=tmp_path / "mine")
    assert scores["models"][str(base)]["tokens"] > 0
    with pytest.raises(InputError, match=r"^data: expected tokens of the tokenizer"):
        Eval(stride=8)(tmp_path / "eval", model=[base], data=tmp_path / "other")
