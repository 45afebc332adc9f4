"""Recorded decode steps on pages: the steps alone, in the engine and in rollouts. A stand-in for
CUDA graphs repeats the operators that were recorded (tests/support/fake_graph.py)."""

import gc
import weakref

import pytest
import torch
from engine_cases import complete_by_definition, model_of, tokens_and_logprobs
from fake_graph import GraphRecorder

import fastlm
from fastlm import backend
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.model import cuda_decode
from fastlm.model.module_decode import ModuleDecodeRunner
from fastlm.train.rollouts import sample_completions

pytestmark = pytest.mark.usefixtures("one_thread")
NEAR = {"rtol": 1e-4, "atol": 1e-5}  # another number of rows sums a product in another order


@pytest.fixture
def recorder(monkeypatch):
    """Record graphs as on a GPU with kernels for every model."""
    monkeypatch.setattr(cuda_decode, "unsupported_reason", lambda model: None)
    with backend.use_backend("reference"):
        yield GraphRecorder(monkeypatch)


def pages_of(model, count):
    """Return pages of random keys and values, as if prompts had been computed."""
    pages = BlockManager(model.config, count, dtype=model.dtype)
    pages.data.normal_()
    return pages


# rows of some steps, one after the other: the pages of a row, and its number of cached tokens
STEPS = [
    [([3], 5), ([7, 1], 70), ([2], 0)],
    [([3], 6), ([7, 1], 71), ([2], 1)],
    [([2], 2), ([6, 4, 5], 150), ([3], 7)],  # other rows, more pages
    [([3], 8), ([0], 63), ([7, 1], 72), ([2], 3)],
    [([5, 6], 100)],
    [([5, 6], 101)],
    [([3], 9), ([0, 4], 64), ([6], 4)],
]


def inputs_of(rows):
    width = max(len(pages) for pages, _ in rows)
    table = torch.tensor([pages + [0] * (width - len(pages)) for pages, _ in rows])
    lengths = torch.tensor([length for _, length in rows])
    return torch.randint(97, (len(rows),)), lengths, table.int()


@pytest.mark.parametrize("expected", [None, [0]])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_a_graph_reads_the_rows_of_its_step(recorder, case, expected):
    """Other tokens, lengths and pages than those of its recording; the same bits as steps that
    are not recorded, and near those of the modules."""
    model = model_of(case)
    pages = [pages_of(model, 9) for _ in range(3)]
    for other in pages[1:]:
        other.data.copy_(pages[0].data)
    ours, plain = (cuda_decode.CudaDecodeRunner(model, p.data) for p in pages[:2])
    plain.can_record, recorder.data = False, pages[0].data
    modules = ModuleDecodeRunner(model, pages[2])
    for rows in STEPS:
        inputs = inputs_of(rows)
        indices = torch.tensor(expected or range(len(rows)))
        actual = ours.logits(*inputs, logits_indices=expected and indices)
        assert torch.equal(actual, plain.logits(*inputs, logits_indices=indices))
        torch.testing.assert_close(actual, modules.logits(*inputs, logits_indices=indices), **NEAR)
        assert torch.equal(pages[0].data, pages[1].data)
        torch.testing.assert_close(pages[0].data, pages[2].data, **NEAR)
    assert [graph.replays for graph in recorder.graphs] == [4, 1]  # of four rows, of one
    assert len(recorder.pools) == 1


def test_rows_that_pad_change_nothing(cuda):
    """Three rows are padded to four. With the kernels, too, each row has the result that it has
    alone, and pages without rows are not written."""
    model = model_of().to(cuda)
    model.model.fuse()
    pages = pages_of(model, 9)
    pages.data = pages.data.to(cuda)
    before = pages.data.clone()
    tokens, lengths, table = inputs_of(STEPS[0])
    steps = cuda_decode.CudaDecodeRunner(model, pages.data)
    together = steps.logits(tokens, lengths, table).clone()
    changed = (pages.data != before).any(-1).any(0).any(0).any(1)  # (pages, page_size)
    places = {(int(p), int(at)) for p, at in changed.nonzero()}
    assert places == {(3, 5), (1, 70 - BLOCK_SIZE), (2, 0)}
    for row in range(3):
        part = slice(row, row + 1)
        unpadded = steps.logits(tokens[part], lengths[part], table[part])
        torch.testing.assert_close(together[part], unpadded, **NEAR)


def test_logits_that_are_wanted_stay(recorder):
    """An engine's step of many rows replays a graph several times before it draws."""
    model = model_of()
    steps, rows = cuda_decode.CudaDecodeRunner(model, pages_of(model, 9).data), torch.arange(3)
    for _ in range(2):
        steps.logits(*inputs_of(STEPS[0]), logits_indices=rows)
    first = steps.logits(*inputs_of(STEPS[0]), logits_indices=rows)
    copy = first.clone()
    second = steps.logits(*inputs_of(STEPS[0]), logits_indices=rows)
    assert torch.equal(first, copy) and not torch.equal(first, second)
    assert recorder.graphs[0].replays == 3


def requests_of(count, longest=100, **options):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, longest, (count,), generator=g).tolist()
    prompts = [torch.randint(0, 97, (n,), generator=g).tolist() for n in lengths]
    options = {"max_new_tokens": 12, "logprobs": 1, "ignore_eos": True, **options}
    return [Request(prompt, seed=i, **options) for i, prompt in enumerate(prompts)]


def test_the_engine_replays(recorder, monkeypatch):
    """Requests arrive, end and are preempted: the tokens are those of steps through the modules."""
    model = model_of("qwen3")
    options = {"logprobs": 0, "ignore_eos": True}
    requests = requests_of(4, 60) + [Request([i] * 50, 90, seed=i, **options) for i in range(3)]
    actual = []
    for options in ({}, {"num_blocks": 5, "max_num_seqs": 3}):
        engine = Engine(model, **options)
        assert isinstance(engine._batch.runner, cuda_decode.CudaDecodeRunner)
        actual += [tokens_and_logprobs(r) for r in engine.generate(requests)]
    assert engine.stats().preemptions > 0
    replays = sum(graph.replays for graph in recorder.graphs)
    assert replays > 200 and len(recorder.graphs) <= 7 and len(recorder.pools) == 2
    monkeypatch.setattr(cuda_decode, "unsupported_reason", lambda model: "for this test")
    engine = Engine(model)
    assert isinstance(engine._batch.runner, ModuleDecodeRunner)
    for (tokens, logprobs), expected in zip(actual, engine.generate(requests) * 2, strict=True):
        assert tokens == expected.token_ids
        told_of = [t.logprob for t in expected.logprobs]
        assert [p for _, p, _ in logprobs] == pytest.approx(told_of, abs=1e-4)


def test_more_rows_than_a_graph_has(recorder):
    """Several graphs then run per step, before anything is drawn."""
    model = model_of(num_hidden_layers=1)
    requests = requests_of(70, 3, max_new_tokens=4)
    together = Engine(model, max_num_seqs=80, num_blocks=80).generate(requests)
    assert max(graph.replays for graph in recorder.graphs) > 1
    few = Engine(model, max_num_seqs=4, num_blocks=80).generate(requests)
    assert [r.token_ids for r in together] == [r.token_ids for r in few]


def test_weights_that_change_drop_the_graphs(recorder):
    model = model_of("qwen2")  # with biases
    model = fastlm.quantize(model, "w8a16", group_size=16)
    engine = Engine(model)
    request = Request([5, 6, 7], 8, Sampling(temperature=0), ignore_eos=True)
    before = engine.generate([request])
    (graph,) = (weakref.ref(graph) for graph in recorder.graphs)
    recorder.graphs.clear()

    def change():  # what a step reads is a copy, joined with others
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.data.normal_()

    engine.update(change)
    (after,) = engine.generate([request])
    gc.collect()
    assert graph() is None and len(recorder.graphs) == 1
    assert after.token_ids == Engine(model).generate([request])[0].token_ids != before[0].token_ids


def test_a_recording_that_fails(recorder):
    """Steps then run unrecorded. Graphs that were recorded before are still used."""
    model = model_of()
    short, long = requests_of(1, 9, max_new_tokens=20)[0], requests_of(4)
    expected = [r.token_ids for r in Engine(model).generate([short, *long])]
    recorder.graphs.clear()
    engine = Engine(model)
    engine.generate([short])
    (graph,), before = recorder.graphs, recorder.graphs[0].replays
    recorder.error = "CUDA out of memory"
    with pytest.warns(UserWarning, match="not recorded: CUDA out of memory") as warned:
        actual = [r.token_ids for r in engine.generate([short, *long])]
    assert actual == expected and len(warned) == 1 and len(recorder.graphs) == 1
    assert graph.replays > before


@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_rollouts_replay(recorder, case):
    """Rollouts have the tokens and log-probabilities of full passes."""
    model = model_of(case)
    prompts = [r.prompt for r in requests_of(6, 30)]
    answers = sample_completions(
        model, prompts, max_new_tokens=7, temperature=0.8, seed=3, max_num_seqs=4
    )
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = complete_by_definition(
            model, Request(prompt, 7, Sampling(temperature=0.8), seed=3 + i)
        )
        assert answer.token_ids == expected and not answer.is_stopped
        logits = model(torch.tensor([[*prompt, *expected]])).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / 0.8).log_softmax(-1).gather(-1, torch.tensor(expected)[:, None])[:, 0]
        actual = [token.logprob for token in answer.logprobs]
        assert actual == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert sum(graph.replays for graph in recorder.graphs) > 5
