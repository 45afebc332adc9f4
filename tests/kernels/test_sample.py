"""The C++ sampler against torch's (`sample_with_torch`, the definition) and float64, on every
instruction set: all options, ties, -inf, NaN, vocabularies that are no multiple of a vector.
"""

import math

import pytest
import torch
from poison import guarded_memory

from fastlm import backend
from fastlm.inference.sampler import Sampler, SamplerInput, SamplerOptions, sample_with_torch
from fastlm.inference.sampling import LogitsProcessor, Sampling

OPTIONS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=5),
    Sampling(top_p=0.9),
    Sampling(top_p=1.0),
    Sampling(min_p=0.1),
    Sampling(min_p=0.0),
    Sampling(temperature=1.3, top_k=300, top_p=0.8, min_p=0.02),
    Sampling(top_k=10_000),
    Sampling(temperature=0, repetition_penalty=1.3, logit_bias=((3, 2.5), (5, -1e9))),
    Sampling(repetition_penalty=0.7, presence_penalty=0.3, frequency_penalty=0.11, top_k=20),
]
VOCABS = [1, 7, 16, 255, 257, 1000, 5003]


def rows_of(sampling, count, vocab, *, logprobs=3, masks=(None,), may_end=True):
    """Return rows of equal options and different seeds; penalties depend on earlier tokens."""
    rows = []
    for i in range(count):
        draw = torch.Generator().manual_seed(100 + i)
        processor = None
        if sampling.has_adjustments and vocab > 5:
            prompt = torch.randint(vocab, (1, 6), generator=draw)
            processor = LogitsProcessor(sampling, prompt, None, vocab)
            for token in torch.randint(vocab, (4,), generator=draw).repeat(2):
                processor.add(token[None])
        options = SamplerOptions(sampling, processor, frozenset({0, vocab - 1, vocab + 3}), vocab)
        mask = masks[i % len(masks)]
        rows.append(SamplerInput(i, options, draw, mask, may_end, logprobs))
    return rows


def assert_same(logits, make):
    """Both sample the same, and report the same log-probabilities up to float32's rounding."""
    with guarded_memory() as memory:  # NaN where the workspace was not written
        ours = Sampler().sample(logits, make())
        memory.check()
    theirs = sample_with_torch(logits, make())
    assert [c.token for c in ours] == [c.token for c in theirs]
    for a, b in zip(ours, theirs, strict=True):
        if a.token < 0 or b.logprob is None:
            continue
        assert [token for token, _ in a.logprob.top] == [token for token, _ in b.logprob.top]
        pairs = zip(a.logprob.top, b.logprob.top, strict=True)
        values = [(a.logprob.logprob, b.logprob.logprob), *((x[1], y[1]) for x, y in pairs)]
        assert all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-5) for x, y in values)
    return ours


@pytest.mark.parametrize("sampling", OPTIONS, ids=lambda s: repr(s)[9:50])
def test_it_chooses_what_torch_chooses(isa, sampling):
    for vocab in VOCABS:
        # wider than the vocabulary, as a padded model's
        logits = 3 * torch.randn(4, vocab + 5)
        if sampling.has_adjustments and vocab <= 5:
            continue
        mask = torch.rand(max(1, vocab - 2)) < 0.5  # shorter than the vocabulary
        mask[0] = True
        for masks in ((None,), (mask, None)):
            assert_same(logits, lambda v=vocab, m=masks: rows_of(sampling, 4, v, masks=m))
        if vocab > 7:
            tokens = assert_same(logits, lambda v=vocab: rows_of(sampling, 4, v, may_end=False))
            assert not {0, vocab - 1} & {choice.token for choice in tokens}


def test_long_rows_on_several_threads(isa):
    """With many logits, threads share the rows. A row alone has the same bits."""
    logits = 2 * torch.randn(8, 40_003)
    for sampling in (OPTIONS[0], OPTIONS[1], OPTIONS[4], OPTIONS[8]):
        together = assert_same(logits, lambda s=sampling: rows_of(s, 8, 40_003))
        for i, row in enumerate(rows_of(sampling, 8, 40_003)):
            assert Sampler().sample(logits, [row]) == [together[i]]


def test_ties_go_to_the_first_token(isa):
    """Torch promises an order of equal logits only for argmax and a stable sort."""
    logits = torch.randint(3, (4, 1000)).float()
    assert_same(logits, lambda: rows_of(Sampling(temperature=0), 4, 1000, logprobs=None))
    assert_same(logits, lambda: rows_of(Sampling(min_p=0.0), 4, 1000, logprobs=0))
    (choice,) = Sampler().sample(torch.zeros(1, 40), rows_of(Sampling(top_k=1), 1, 40))
    assert choice.token == 0 and [token for token, _ in choice.logprob.top] == [0, 1, 2]


@pytest.mark.parametrize("sampling", [OPTIONS[i] for i in (0, 1, 4, 8)])
@pytest.mark.parametrize("position", [0, 13, 998])  # 998: behind the last whole vector
def test_rows_that_are_not_finite(isa, sampling, position):
    logits = torch.randn(5, 999)
    logits[0, position] = math.nan
    logits[1, position] = math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, position] = 1.0
    tokens = assert_same(logits, lambda: rows_of(sampling, 5, 999))
    assert [choice.token for choice in tokens[:4]] == [-1, -1, -1, position]
    assert tokens[4].token >= 0 and tokens[3].logprob.top == [(position, 0.0)]


def test_draws_follow_the_probabilities(isa):
    """Each token is drawn from its interval in the sum of float64 probabilities."""
    logits = 3 * torch.randn(1, 3001)
    reached = logits[0].double().softmax(-1).cumsum(-1)
    for seed in range(200):
        (row,) = rows_of(Sampling(), 1, 3001, logprobs=None)
        row = row._replace(generator=torch.Generator().manual_seed(seed))
        u = torch.rand(1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).item()
        token = Sampler().sample(logits, [row])[0].token
        low = 0.0 if token == 0 else reached[token - 1].item()
        assert low - 1e-6 <= u <= reached[token].item() + 1e-6


def test_refusals():
    extension = backend.cpu_extension
    (row,) = rows_of(Sampling(), 1, 8)
    inputs = [(0, row.options.cpp, 0.5, None, True, -1)]
    workspace = torch.empty(extension.sample_workspace(8), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"vocab: expected at most 7, got 8"):
        extension.sample(torch.zeros(1, 7), inputs, workspace)
    with pytest.raises(ValueError, match=r"rows: expected rows in \[0, 0\), got 0"):
        extension.sample(torch.zeros(0, 8), inputs, workspace)
    with pytest.raises(ValueError, match=r"workspace: expected \d+ bytes, got 64"):
        extension.sample(torch.zeros(1, 8), inputs, workspace[:64])
    with pytest.raises(ValueError, match=r"mask: expected dtype bool, got uint8"):
        extension.sample(
            torch.zeros(1, 8), [(*inputs[0][:3], workspace, *inputs[0][4:])], workspace
        )
