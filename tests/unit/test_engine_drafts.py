"""Tests of the engine with a draft model: draft tokens change no bit of an answer."""

import copy
import math
import random

import pytest
import torch
from engine_cases import model_of, tokens_and_logprobs

import fastlm
from fastlm.errors import InputError
from fastlm.inference import sequence as sequences
from fastlm.inference.decode_batch import MAX_ROWS
from fastlm.inference.draft_model import DraftModelProposer, _DraftJob, _DraftState
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampler import Sampler
from fastlm.inference.sampling import Sampling
from fastlm.inference.sequence import CompletionCollector
from fastlm.model import cpu_decode
from fastlm.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLINGS = [
    Sampling(temperature=0.0), Sampling(temperature=0.5), Sampling(), Sampling(top_p=0.9),
    Sampling(temperature=0.0, presence_penalty=0.5), Sampling(logit_bias=((5, 2.0),)),
    Sampling(temperature=0.8, top_k=7),
]  # fmt: skip


def near(model, noise=0.03):
    """A draft model that often agrees with the model."""
    draft, g = copy.deepcopy(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in draft.parameters():
            p += noise * torch.randn(p.shape, generator=g) * p.std()
    return draft


def requests_of(lengths, new=70):
    g = torch.Generator().manual_seed(0)
    return [
        Request(
            torch.randint(0, 97, (length,), generator=g).tolist(), new,
            SAMPLINGS[i % len(SAMPLINGS)], seed=i, logprobs=i % 3, ignore_eos=i % 2 == 0,
        )
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def run_alone(model, requests, **options):
    options = {"prompt_rows": True, "enable_prefix_caching": False, **options}
    return [tokens_and_logprobs(Engine(model, **options).generate([r])[0]) for r in requests]


def nothing_is_kept(engine):
    drafter = engine._proposer
    assert (
        not drafter._states and drafter.block_manager.num_free == drafter.block_manager.num_blocks
    )
    assert engine.stats().used_blocks == 0


@pytest.mark.parametrize("format", [None, "w4a8"])
@pytest.mark.parametrize("prompt_rows", [True, False])
def test_a_draft_model_changes_no_bit(format, prompt_rows):
    """Greedy, sampled, filtered, penalized and biased answers run together, with few blocks and few
    tokens per step. Tokens and log-probabilities are those of each request alone."""
    model = model_of()
    draft = near(model)
    if format:
        model, draft = (fastlm.quantize(m, format, group_size=24) for m in (model, draft))
    requests = requests_of((3, 60, 61, 90, 140, 20))
    expected = run_alone(model, requests, prompt_rows=prompt_rows)
    for options in (
        {},
        {"num_blocks": 5},
        {"max_num_batched_tokens": 9, "num_speculative_tokens": 30},
    ):
        engine = Engine(model, draft_model=draft, prompt_rows=prompt_rows, **options)
        assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == expected
        stats = engine.stats()
        assert 0 < stats.accepted_tokens < stats.drafted_tokens  # the number depends on the machine
        assert stats.new_tokens == sum(len(tokens) for tokens, _ in expected)
        assert ("num_blocks" in options) == (stats.preemptions > 0)
        assert stats.draft_failures == 0
        nothing_is_kept(engine)


def test_requests_that_arrive_and_end():
    """Requests arrive, are cancelled and are preempted at random moments."""
    model = model_of()
    draw = random.Random(1)
    requests = requests_of([draw.randrange(1, 150) for _ in range(12)], new=40)
    expected = run_alone(model, requests)
    engine = Engine(
        model, draft_model=model, prompt_rows=True, num_blocks=15, num_speculative_tokens=3
    )
    answers, ids, left = [CompletionCollector() for _ in requests], {}, list(range(12))
    cancelled = {2, 5, 7}
    while left or any(answer.completion is None for answer in answers):
        if left and draw.random() < 0.2:
            ids[left[0]] = engine.submit(requests[left[0]], answers[left[0]])
            left.pop(0)
        for i in cancelled & ids.keys():
            if len(answers[i].pieces) > 10:
                engine.cancel(ids[i])
        if engine.scheduler.running and draw.random() < 0.05:
            engine.scheduler.requeue(draw.choice(engine.scheduler.running))
        engine.step()
    for i, (answer, (tokens, logprobs)) in enumerate(zip(answers, expected, strict=True)):
        ours = tokens_and_logprobs(answer.completion)
        if i in cancelled:
            assert answer.completion.finish_reason == "cancelled"
            assert ours == (tokens[: len(ours[0])], logprobs[: len(ours[0])])
        else:
            assert ours == (tokens, logprobs)
    stats = engine.stats()
    # the model drafts for itself: only a penalty or a filter makes a draft token wrong
    assert stats.accepted_tokens > 0.5 * stats.drafted_tokens > 50
    nothing_is_kept(engine)


def test_a_model_drafts_its_own_tokens():
    """All draft tokens are accepted, sampled ones, too, so a step gives five tokens; also after an
    update of the weights."""
    model = model_of()
    engine = Engine(model, draft_model=model, prompt_rows=True, max_num_batched_tokens=32)
    for weights in ("old", "new"):
        before = engine.stats()
        requests = [
            Request([*range(i, i + 9)], 50, s, seed=i, ignore_eos=True)
            for i, s in enumerate((*SAMPLINGS[:4], SAMPLINGS[5]))
        ]
        engine.generate(requests)
        stats = engine.stats()
        drafted = stats.drafted_tokens - before.drafted_tokens
        assert drafted == stats.accepted_tokens - before.accepted_tokens > 150, weights
        assert stats.steps - before.steps < 20
        engine.update(lambda: [p.data.mul_(-1) for p in model.model.layers[0].parameters()])


def test_a_draft_model_that_knows_nothing():
    """The draft model finds tokens unlikely that the model finds likely."""
    model, draft = model_of(), model_of()
    draft.model.norm.weight.data.mul_(-1)
    requests = requests_of((9, 70), new=30)
    engine = Engine(model, draft_model=draft, prompt_rows=True)
    assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == run_alone(model, requests)
    stats = engine.stats()
    assert stats.drafted_tokens > 100 and stats.accepted_tokens < 0.05 * stats.drafted_tokens


def test_draft_tokens_are_those_of_a_draft_model_that_recomputes_everything():
    """So rejected draft tokens and pauses leave no trace."""
    model = model_of()
    draft = near(model)
    engine, num_checked = (
        Engine(model, draft_model=draft, prompt_rows=True, max_num_batched_tokens=12),
        0,
    )
    ours = engine._proposer.propose

    def propose(sequences, budget):
        nonlocal num_checked
        ours(sequences, budget)
        for s in sequences:
            if s.draft and len(s.tokens) <= MAX_ROWS:
                draft_tokens, new_proposer = s.draft, DraftModelProposer(draft, 4, 4)
                new_proposer.propose([s], len(draft_tokens))
                assert s.draft == draft_tokens
                num_checked += 1

    engine._proposer.propose = propose
    engine.generate(requests_of((3, 20, 11, 5), new=30))
    stats = engine.stats()
    assert (
        num_checked > 30
        and 0.2 * stats.drafted_tokens < stats.accepted_tokens < stats.drafted_tokens
    )


def test_each_token_is_computed_once_and_together():
    """The draft model computes prompts in chunks, and the draft tokens of all answers in one
    step."""
    model, rows = model_of(), []
    engine = Engine(model, draft_model=model, prompt_rows=True, num_speculative_tokens=3)
    steps = engine._proposer._batch.runner.logits
    engine._proposer._batch.runner.logits = lambda tokens, *rest, **options: (
        rows.append(len(tokens)) or steps(tokens, *rest, **options)
    )
    requests = [Request([i] * n, 40, seed=i, ignore_eos=True) for i, n in enumerate((150, 9, 8, 7))]
    engine.generate(requests)
    prompts = 150 + 9 + 8 + 7
    assert prompts < sum(rows) <= prompts + 4 * 40
    assert max(rows) <= MAX_ROWS and len(rows) < 3 * engine.stats().steps


def test_it_drafts_up_to_its_context_and_its_blocks():
    model = model_of()
    short = model_of(max_position_embeddings=40)
    short.load_state_dict(model.state_dict())
    (request,) = requests_of((20,), new=60)
    engine = Engine(model, draft_model=short, prompt_rows=True)
    assert [tokens_and_logprobs(r) for r in engine.generate([request])] == run_alone(
        model, [request]
    )
    stats = engine.stats()  # four of five of the 20 tokens that fit
    assert 12 < stats.accepted_tokens == stats.drafted_tokens <= 20
    # prompts that share blocks of the model have blocks of their own in the draft model's cache
    engine = Engine(model, draft_model=model, prompt_rows=True, num_blocks=9)
    requests = [Request([7] * 150, 30, seed=i, logprobs=0, ignore_eos=True) for i in range(4)]
    assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == run_alone(model, requests)
    stats = engine.stats()
    # nine blocks hold the 180 tokens of three answers, with 23 draft tokens each (29 are 5 * 5 +
    # 4); the fourth answer has draft tokens only after another has ended
    assert 3 * 23 <= stats.accepted_tokens == stats.drafted_tokens < 4 * 23
    nothing_is_kept(engine)


def test_a_draft_model_that_fails_ends_no_request():
    """The answer for which drafting fails continues without draft tokens; the others keep
    theirs."""
    model = model_of()
    requests = requests_of((9, 9, 9), new=60)
    engine, answers = (
        Engine(model, draft_model=model, prompt_rows=True),
        [CompletionCollector() for _ in "abc"],
    )
    for request, answer in zip(requests, answers, strict=True):
        engine.submit(request, answer)
    for _ in range(3):
        engine.step()
    drafter, running = engine._proposer, engine.scheduler.running
    bad, steps = drafter._states[running[1]].block_table[0], drafter._batch.runner.logits

    def broken(tokens, lengths, table, **options):
        if bad in table[:, 0].tolist():
            raise RuntimeError("out of memory")
        return steps(tokens, lengths, table, **options)

    drafter._batch.runner.logits = broken
    failed = running[1]
    engine.step()
    assert failed not in drafter._states and not failed.draft and running[0].draft
    bad = None
    while engine.step():
        assert not failed.draft
    assert [tokens_and_logprobs(answer.completion) for answer in answers] == run_alone(
        model, requests
    )
    stats = engine.stats()
    assert stats.draft_failures == 1 and stats.finished == {"length": 3}
    nothing_is_kept(engine)


def test_a_draft_model_with_weights_that_fail(monkeypatch):
    model, draft = model_of(), model_of()
    engine = Engine(model, draft_model=draft, prompt_rows=True)
    requests = requests_of((9,), new=20)
    decode_plan = cpu_decode.decode_plan

    def broken(model):
        if model is draft:
            raise RuntimeError("out of memory")
        return decode_plan(model)

    with torch.no_grad():
        next(draft.parameters()).mul_(1)  # a write, after which the engine rebuilds its plan
    with monkeypatch.context() as patch:
        patch.setattr(cpu_decode, "decode_plan", broken)
        assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == run_alone(
            model, requests
        )
    stats = engine.stats()
    assert stats.draft_failures == 1 and stats.drafted_tokens == 0
    engine.generate(requests)
    repeated = engine.stats()
    # it drafts again, four of the five tokens of each step: 20 are one, three times five, and four
    assert repeated.drafted_tokens == repeated.accepted_tokens == 3 * 4 + 3
    assert (stats.steps, repeated.steps - stats.steps) == (20, 5)
    nothing_is_kept(engine)


def test_stop_strings_and_grammars():
    tokenizer = Tokenizer.train(["The tree sees the river. What is 1 + 1? It is 2."], 300)
    model = model_of(vocab_size=tokenizer.vocab_size)

    class Even:
        def mask(self):
            return torch.arange(tokenizer.vocab_size) % 2 == 0

        def accept(self, token):
            assert token % 2 == 0

    plain = Engine(model, tokenizer, prompt_rows=True)
    (text,) = plain.generate([Request([40, 41], 40, seed=3, ignore_eos=True)])
    requests = [
        Request([40, 41], 40, seed=3, stop=(text.text[8:10],), logprobs=1, ignore_eos=True),
        Request([50, 51], 40, seed=4, constraint=Even, logprobs=1, ignore_eos=True),
    ]
    engine = Engine(model, tokenizer, draft_model=model, prompt_rows=True)
    expected, ours = plain.generate(requests), engine.generate(requests)
    assert [(tokens_and_logprobs(r), r.text) for r in ours] == [
        (tokens_and_logprobs(r), r.text) for r in expected
    ]
    assert [r.finish_reason for r in ours] == ["stop", "length"]
    stopped, even = (
        Engine(model, tokenizer, draft_model=model, prompt_rows=True) for _ in requests
    )
    stopped.generate(requests[:1])
    even.generate(requests[1:])
    stats, count = stopped.stats(), len(expected[0].token_ids)
    # the model drafts for itself: only draft tokens after the stop are wrong, of the last step's
    # four
    assert stats.steps == 1 + math.ceil((count - 1) / 5)
    assert count > 6 and stats.drafted_tokens - stats.accepted_tokens < 4
    # drafting ignores the grammar: some draft tokens are accepted, and each saves a step, but not
    # the one that is the 40th token: no sampled token follows it
    stats = even.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens / 4
    assert stats.steps in {40 - stats.accepted_tokens, 41 - stats.accepted_tokens}


def test_refusals():
    model = model_of()

    def refused(text, model=model, **options):
        with pytest.raises(InputError, match=text) as error:
            Engine(model, **options)
        assert "\n" not in str(error.value)

    other = model_of(vocab_size=98)
    refused("draft_model: expected the model's vocabulary of 97 tokens, got 98", draft_model=other)
    refused(
        "num_speculative_tokens: expected at least 1 with a draft",
        draft_model=model,
        num_speculative_tokens=0,
    )
    refused("num_speculative_tokens: expected at least 0, got -1", num_speculative_tokens=-1)
    by_length = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused("draft_model: .* length of the context", draft_model=model_of(rope_scaling=by_length))
    hooked = model_of()
    hooked.model.norm.register_forward_hook(lambda *rest: None)
    refused(
        "draft_model: expected a model that runs on the decode kernel, got: .*has hooks",
        draft_model=hooked,
    )
    refused("draft_model: expected None .*has hooks.*, got llama", model=hooked, draft_model=model)


def test_a_padded_model_drafts_ids_of_the_tokenizer():
    """Penalties have the tokenizer's size: drafting failed for a request with penalties."""
    penalised = Request([1, 2], 4, Sampling(temperature=0.0, repetition_penalty=1.1))
    sequence = sequences.Sequence(
        0, penalised, print, tokenizer=None, stop_ids=frozenset(), max_new_tokens=4, vocab=90,
        device=torch.device("cpu"), threads=None,
    )  # fmt: skip
    job = _DraftJob(sequence, _DraftState(), 1, 1)
    job.begin()
    (guess,) = Sampler().sample(torch.arange(97.0)[None], [job.sampler_input(0)])
    assert guess.token == 89
