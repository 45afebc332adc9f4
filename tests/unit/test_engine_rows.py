"""Tests of the engine where prompts, answers and draft tokens are rows of one decode step."""

import pytest
import torch
from engine_cases import model_of, tokens_and_logprobs

import fastlm
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.inference.sequence import CompletionCollector
from fastlm.model import cpu_decode
from fastlm.model.quantized_modules import QuantizedLinear

pytestmark = pytest.mark.usefixtures("one_thread")


def test_blocks_of_answers_are_cached_where_prompts_are_rows():
    """The next prompt of a conversation contains the last answer."""
    model = model_of()
    for rows, cached in ((True, 128), (False, 64)):
        engine = Engine(model, prompt_rows=rows)
        (first,) = engine.generate([Request([5] * 70, 80, seed=1, ignore_eos=True)])
        prompt = [*[5] * 70, *first.token_ids, 7]
        (second,) = engine.generate([Request(prompt, 9, seed=2, logprobs=1)])
        assert second.cached_tokens == cached
        (expected,) = Engine(model, prompt_rows=rows).generate(
            [Request(prompt, 9, seed=2, logprobs=1)]
        )
        assert tokens_and_logprobs(second) == tokens_and_logprobs(expected)


@pytest.mark.parametrize("format", [None, "w4a8"])
def test_draft_tokens_change_no_bit(format):
    """Prompt lookup with greedy, sampled, filtered, penalized and ended answers, alone and
    together, with few blocks: tokens and log-probabilities are the same, in fewer steps."""
    model = model_of()
    if format:
        model = fastlm.quantize(model, format, group_size=24)
    g = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 97, (60,), generator=g).tolist() * 2 for _ in range(6)]
    samplings = [
        Sampling(temperature=0.0), Sampling(temperature=0.3), Sampling(top_p=0.9, temperature=0.5),
        Sampling(temperature=0.0, presence_penalty=0.5),
        Sampling(temperature=0.0, logit_bias=((5, 2.0),)), Sampling(top_k=2),
    ]  # fmt: skip
    requests = [
        Request(text[: 80 + i], 70, sampling, seed=i, logprobs=i % 3, ignore_eos=i % 2 == 0)
        for i, (text, sampling) in enumerate(zip(texts, samplings, strict=True))
    ]
    plain = {"enable_prefix_caching": False, "prompt_rows": True}
    expected = [tokens_and_logprobs(Engine(model, **plain).generate([r])[0]) for r in requests]
    for options in (
        {},
        {"num_blocks": 9},
        {"max_num_batched_tokens": 9, "num_speculative_tokens": 30},
    ):
        engine = Engine(model, **{"num_speculative_tokens": 4, "prompt_rows": True, **options})
        assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == expected
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens
        assert stats.new_tokens == sum(len(tokens) for tokens, _ in expected)
        assert stats.used_blocks == 0
        repeated = engine.generate(requests[:2])
        assert [tokens_and_logprobs(r) for r in repeated] == expected[:2]
    # an answer that repeats itself takes few steps
    engine, plain = Engine(model, num_speculative_tokens=8), Engine(model)
    sampling = Sampling(temperature=0.0, logit_bias=((5, 90.0),))
    request = Request([5], 200, sampling, logprobs=1, ignore_eos=True)
    assert tokens_and_logprobs(engine.generate([request])[0]) == tokens_and_logprobs(
        plain.generate([request])[0]
    )
    assert engine.stats().steps < plain.stats().steps / 2


ELEVENS = Sampling(temperature=0.0, logit_bias=((11, 1000.0),))


def test_draft_tokens_of_a_preempted_request_are_dropped():
    """Otherwise an accepted draft token would count as computed, in a block that others find."""
    model = model_of()
    options = {"prompt_rows": True, "num_speculative_tokens": 2}
    request = Request([1, 2, 3], 80, ELEVENS, seed=1, logprobs=0, ignore_eos=True)
    later = Request([1, 2, 3] + [11] * 70, 2, logprobs=0, seed=1)
    undisturbed, expected = (
        tokens_and_logprobs(Engine(model, **options).generate([r])[0]) for r in (request, later)
    )
    for at in (20, 62, 63, 64):
        engine, collected = Engine(model, **options), CompletionCollector()
        engine.submit(request, collected)
        engine.step()
        sequence = engine.scheduler.running[0]
        while len(sequence.tokens) < at:
            engine.step()
        engine.scheduler.requeue(sequence)
        while engine.step():
            pass
        assert tokens_and_logprobs(collected.completion) == undisturbed
        assert tokens_and_logprobs(engine.generate([later])[0]) == expected


def test_a_fully_cached_prompt_is_no_source_of_another():
    """A preempted answer finds its own blocks in the cache, and none of its rows has logits."""
    engine, collected = Engine(model_of(), prompt_rows=True), CompletionCollector()
    prompt = [i % 97 for i in range(100)]
    engine.submit(Request(prompt, 200, seed=1, ignore_eos=True), collected)
    for _ in range(60):
        engine.step()
    engine.scheduler.requeue(engine.scheduler.running[0])
    engine.step()
    (second,) = engine.generate([Request(prompt, 5, seed=2, ignore_eos=True)])
    while engine.step():
        pass
    assert second.finish_reason == collected.completion.finish_reason == "length"


@pytest.mark.parametrize("prompt_rows", [True, False])
def test_rows_that_fail_end_their_own_request(prompt_rows):
    """Other rows of the step do not matter, and no listener is called after the end."""
    engine = Engine(model_of(), prompt_rows=prompt_rows, max_num_seqs=80, num_blocks=200)
    pieces = [[] for _ in range(70)]
    for i, request_pieces in enumerate(pieces):
        engine.submit(Request([1, i], 20, ELEVENS, seed=i, ignore_eos=True), request_pieces.append)
    while not all(pieces):
        engine.step()
    ours, bad = engine._batch.runner.logits, engine.scheduler.running[68].block_table[0]

    def broken(tokens, lengths, table, **options):
        if bad in table[:, 0].tolist():
            raise RuntimeError("out of memory")
        return ours(tokens, lengths, table, **options)

    engine._batch.runner.logits = broken
    while engine.step():
        pass
    ends = [
        [p.finish_reason for p in request_pieces if p.finish_reason] for request_pieces in pieces
    ]
    assert ends.count(["length"]) == 69 and ends.count(["error"]) == 1
    assert all(request_pieces[-1].finish_reason for request_pieces in pieces)
    assert engine.stats().finished == {"length": 69, "error": 1}


def test_an_update_after_which_modules_compute_prompts(monkeypatch):
    """A preempted answer that waits continues afterwards."""
    model = fastlm.quantize(model_of(), "w8a8", group_size=32)
    monkeypatch.setattr(cpu_decode, "prefers_prompt_rows", lambda plan: plan.multiplies_int8)
    engine, collected = (
        Engine(model, num_speculative_tokens=3),
        [CompletionCollector(), CompletionCollector()],
    )
    engine.submit(Request([1, 2, 3], 90, seed=1, ignore_eos=True), collected[0])
    engine.submit(Request([4, 5], 20, seed=1, ignore_eos=True), collected[1])
    for _ in range(70):
        engine.step()

    def change():
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.act_bits = 16

    engine.scheduler.requeue(engine.scheduler.running[0])
    engine.update(change)
    while engine.step():
        pass
    assert engine.scheduler.aligns_chunks
    assert [len(c.completion.token_ids) for c in collected] == [90, 20]


@pytest.mark.parametrize("draft", [False, True])
def test_draft_tokens_stay_within_the_budget_of_a_step(draft):
    model, rows = model_of(), []
    engine = Engine(
        model, prompt_rows=True, max_num_batched_tokens=16, num_speculative_tokens=7,
        draft_model=model_of() if draft else None,
    )  # fmt: skip
    ours = engine._batch.runner.logits
    engine._batch.runner.logits = lambda tokens, *rest, **options: (
        rows.append(len(tokens)) or ours(tokens, *rest, **options)
    )
    engine.generate([Request([1, i], 40, ELEVENS, ignore_eos=True) for i in range(3)])
    assert max(rows) <= 16 and engine.stats().accepted_tokens > 0


def test_prompts_continue_with_many_answers():
    """Prompts get half as many tokens of a step as answers."""
    engine = Engine(model_of(), prompt_rows=True, max_num_batched_tokens=8)
    for i in range(8):
        engine.submit(Request([i], 400, seed=i, ignore_eos=True), lambda piece: None)
    for _ in range(5):
        engine.step()
    collected = []
    engine.submit(Request([9] * 20, 3, seed=1), collected.append)
    for _ in range(4):
        engine.step()
    assert not collected
    for _ in range(2):
        engine.step()
    assert collected and len(engine.scheduler.running) == 9
