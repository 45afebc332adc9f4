"""Bits per byte: every token once, the value of a known model, and compressors measured on the same
bytes.
"""

import lzma
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_run
import torch
from torch import nn

from fastlm.data.shards import TokenDataset
from fastlm.errors import InputError
from fastlm.model.bits_per_byte import compressed_bits_per_byte, evaluate, windows


class Recorder(nn.Module):
    """A model that predicts P(token) = (token + 1) / Z without looking at the input, and records
    the inputs and labels of each call.
    """

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.arange(1.0, tiny_run.VOCAB + 1).log())
        self.calls: list[tuple[np.ndarray, np.ndarray]] = []

    def forward(self, input_ids, *, shift_labels, num_items):
        assert not torch.is_grad_enabled() and not self.training and num_items == 1
        self.calls += zip(input_ids.numpy(), shift_labels.numpy())
        counted = shift_labels[shift_labels != -100]
        return SimpleNamespace(loss=-self.logits.log_softmax(0)[counted].sum())


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return TokenDataset(folder / "heldout")


@pytest.mark.parametrize("seq_len, stride", [(16, 16), (16, 4), (17, 5), (7, 1), (10_000, 10_000)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_token_is_predicted_once(heldout, seq_len, stride, batch_size):
    model = Recorder().train()
    result = evaluate(model, heldout, seq_len, batch_size, stride=stride)
    tokens = heldout.read(0, heldout.tokens)
    predicted = [labels[labels != -100] for _, labels in model.calls]
    assert np.array_equal(np.concatenate(predicted), tokens)
    nats = sum(math.log(sum(range(1, tiny_run.VOCAB + 1)) / (t + 1)) for t in tokens)
    assert result.bits_per_byte == pytest.approx(
        nats / math.log(2) / heldout.bytes_of_text, rel=1e-5
    )
    assert result.tokens == heldout.tokens and result.bytes == heldout.bytes_of_text
    assert model.training
    # inputs are the preceding tokens; the first token of all follows end-of-text
    row = model.calls[0][0]
    assert row[0] == heldout.eos_id and np.array_equal(row[1:], tokens[: len(row) - 1])
    # all but the first windows have at least seq_len - stride tokens of context
    for _, labels in model.calls[1:]:
        assert (labels == -100).sum() >= len(labels) - stride


def test_windows_of_any_size_cover_all_once():
    for tokens in (1, 5, 16, 17, 100):
        for seq_len in (1, 3, 16):
            for stride in range(1, seq_len + 1):
                scored = []
                for begin, first in windows(tokens, seq_len, stride):
                    end = min(begin + seq_len, tokens)
                    assert begin <= first < end
                    scored += range(first, end)
                assert scored == list(range(tokens))


def test_a_sample_is_spread_and_close(heldout):
    model = Recorder()
    full = evaluate(model, heldout, 8, 4)
    model.calls.clear()
    part = evaluate(model, heldout, 8, 4, max_tokens=heldout.tokens // 3)
    assert part.tokens <= heldout.tokens // 3 + 8
    assert part.bits_per_byte == pytest.approx(full.bits_per_byte, rel=0.1)


def test_compressors_are_measured_on_the_texts_put_together():
    texts = ["the same words again and again. " * 50, "and other words; " * 50]
    packed = compressed_bits_per_byte(texts)
    data = "".join(texts).encode()
    xz = lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)
    assert packed["xz"] == 8 * len(xz) / len(data)
    assert 0 < packed["zstd"] < 1
    with pytest.raises(InputError, match="texts: expected at least one byte"):
        compressed_bits_per_byte([])


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(seq_len=0, batch_size=1), "seq_len: expected 1 or more, got 0"),
        (dict(seq_len=4, batch_size=0), "batch_size: expected 1 or more, got 0"),
        (dict(seq_len=4, batch_size=1, stride=5), "stride: expected 1 to seq_len = 4, got 5"),
    ],
)
def test_refusals(heldout, options, text):
    with pytest.raises(InputError, match=text):
        evaluate(Recorder(), heldout, **options)
