"""Tests of the engine: against one request alone, against `generate`, and with too few blocks."""

import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from engine_cases import complete_by_definition, model_of, tokens_and_logprobs
from serve_app import tiny_model

import fastlm
from fastlm.errors import InputError
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager, default_num_blocks, hash_blocks
from fastlm.inference.engine import Engine
from fastlm.inference.requests import QueueFull, Request
from fastlm.inference.sampling import Sampling
from fastlm.model.causal_lm import CausalLM
from fastlm.model.lora import add_lora

pytestmark = pytest.mark.usefixtures("one_thread")


def requests_of(count, *, longest=200, seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(1, longest, (), generator=g))
        prompt = torch.randint(0, 97, (length,), generator=g).tolist()
        settings = {"max_new_tokens": 12, "seed": 100 + i, "logprobs": 2, **options}
        out.append(Request(prompt, **settings))
    return out


@pytest.mark.parametrize("prompt_rows", [False, True])
@pytest.mark.parametrize("format", [None, "w4a16", "w8a8"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "qwen3"])
def test_answers_are_batch_invariant(case, format, prompt_rows):
    """Tokens and log-probabilities have the same bits alone, next to other requests, with few
    tokens per step, and when blocks run short and requests are recomputed."""
    model = model_of(case)
    if format:
        model = fastlm.quantize(model, format, group_size=16)
    shared = torch.arange(140).remainder(97).tolist()
    requests = requests_of(6)
    requests += [Request(shared + r.prompt[:9], 30, seed=7, logprobs=1) for r in requests[:3]]
    requests += [Request([i] * 50, 90, seed=i, logprobs=0) for i in range(3)]  # grow by two blocks
    plain = {"enable_prefix_caching": False, "prompt_rows": prompt_rows}
    expected = [tokens_and_logprobs(Engine(model, **plain).generate([r])[0]) for r in requests]
    assert all(len(tokens) > 3 for tokens, _ in expected)
    for options in (
        {},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 1000, "max_num_seqs": 2},
        {"num_blocks": 7},
        {"enable_prefix_caching": False, "num_blocks": 9},
    ):
        engine = Engine(model, prompt_rows=prompt_rows, **options)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
        order = [*order, 9, 10, 11]
        together = engine.generate([requests[i] for i in order])
        assert [tokens_and_logprobs(r) for r in together] == [expected[i] for i in order]
        stats = engine.stats()
        assert stats.used_blocks == stats.running == stats.waiting == 0
        if options.get("num_blocks") == 7:
            assert stats.preemptions > 0
        repeated = engine.generate(requests)  # now with all prompts cached
        assert [tokens_and_logprobs(r) for r in repeated] == expected


@pytest.mark.parametrize("prompt_rows", [False, True])
def test_int8_keys(prompt_rows):
    """int8 keys are batch-invariant and close to float32 keys (28 bytes instead of 96); blocks with
    their scales are copied and shared."""
    model = model_of("gemma2")
    requests = requests_of(5, longest=150)
    requests += [Request([i] * 70, 70, seed=7, logprobs=1) for i in (3, 3, 3, 4)]
    plain = {"prompt_rows": prompt_rows, "kv_cache_dtype": torch.int8}
    engine = Engine(model, enable_prefix_caching=False, **plain)
    expected = [tokens_and_logprobs(engine.generate([r])[0]) for r in requests]
    assert engine.stats().block_bytes == 64 * 3 * 2 * 3 * (24 + 4)
    num_int8, wide = (
        default_num_blocks(model.config, 10**9, dtype=dtype, device=model.device)
        for dtype in (torch.int8, torch.float32)
    )
    assert num_int8 == pytest.approx(wide * 96 / 28, rel=0.01)
    for options in ({"max_num_batched_tokens": 20}, {"num_blocks": 7}):
        engine = Engine(model, **plain, **options)
        for _ in range(2):  # then with all prompts cached
            assert [tokens_and_logprobs(r) for r in engine.generate(requests)] == expected
    wide = Engine(model, prompt_rows=prompt_rows).generate(requests)
    first = [(ours[1][0][1], r.logprobs[0].logprob) for ours, r in zip(expected, wide, strict=True)]
    assert 0 < max(abs(ours - theirs) for ours, theirs in first) < 0.05
    model.model.layers[2].self_attn.v_proj.weight.data[1, 1] = torch.inf
    (result,) = Engine(model, **plain).generate([Request([1, 2], 5)])
    assert result.error == "logits are not finite"


def test_prompts_of_rows_and_of_modules_have_the_same_int8_keys():
    """Compare the first layer only: later ones differ by the rounding of products."""
    model, pages = model_of(), []
    for rows in (False, True):
        engine = Engine(model, prompt_rows=rows, kv_cache_dtype=torch.int8)
        engine.generate([Request(list(range(90)), 1)])
        page = engine.block_manager.find_cached(hash_blocks(list(range(64)))[0])
        pages.append(
            (engine.block_manager.data[0, :, page], engine.block_manager.scales[0, :, page])
        )
    (codes, scales), (theirs, their_scales) = pages
    assert (codes.int() - theirs.int()).abs().max() <= 1
    assert (codes != theirs).double().mean() < 0.01
    torch.testing.assert_close(scales, their_scales, rtol=1e-5, atol=0)


def test_it_draws_from_what_full_passes_compute():
    model = model_of("mistral")
    prompts = [r.prompt for r in requests_of(8, longest=40)]
    for sampling in (Sampling(temperature=0.0), Sampling(), Sampling(top_p=0.8)):
        requests = [Request(prompt, 12, sampling, seed=5 + i) for i, prompt in enumerate(prompts)]
        for request, actual in zip(requests, Engine(model).generate(requests), strict=True):
            assert actual.token_ids == complete_by_definition(model, request)


def test_prompts_that_are_equal_are_computed_once():
    model = model_of()
    prompt = torch.arange(150).remainder(97).tolist()
    engine = Engine(model, max_num_batched_tokens=512)
    results = engine.generate([Request(prompt, 5, seed=i) for i in range(8)])
    assert len({tuple(r.token_ids) for r in results}) > 1
    assert engine.stats().prompt_tokens == 150
    assert [r.cached_tokens for r in results] == [0] + 7 * [128]
    # answers that end at once, to a prompt that ends within a block
    short = Engine(model).generate([Request(prompt[:70], 1, seed=i) for i in range(8)])
    (single,) = Engine(model).generate([Request(prompt[:70], 1, seed=7)])
    assert short[7].token_ids == single.token_ids and len({r.token_ids[0] for r in short}) > 1
    # the last token of a fully cached prompt is recomputed, because its logits are needed
    second_engine = Engine(model)
    first = second_engine.generate([Request(prompt[:128], 5, seed=1)])
    (second,) = second_engine.generate([Request(prompt[:128], 5, seed=1)])
    assert second.token_ids == first[0].token_ids and second.cached_tokens == 64


@pytest.mark.parametrize("prompt_rows", [False, True])
def test_requests_of_two_salts_share_no_blocks(prompt_rows):
    """Otherwise `cached_tokens` would reveal the requests of other clients."""
    engine = Engine(model_of(), prompt_rows=prompt_rows)
    prompt = list(range(64)) * 2 + [1]

    def cached(*salts, tokens=3):
        requests = [Request(prompt, tokens, seed=1, cache_salt=salt) for salt in salts]
        results = engine.generate(requests)
        assert len({tuple(r.token_ids) for r in results}) == 1
        return [r.cached_tokens for r in results]

    assert cached(b"a", b"b", b"a") == [0, 0, 128]  # at the same time
    assert cached(b"c") == [0] and cached(b"c") == [128]
    assert cached(b"a", tokens=70) == [128]  # blocks of the answer, too
    (answer,) = engine.generate([Request(prompt, 70, seed=1, cache_salt=b"a")])
    longer = [*prompt, *answer.token_ids]
    for salt, min_cached in ((b"b", 128), (b"", 0)):
        (result,) = engine.generate([Request(longer, 3, seed=1, cache_salt=salt)])
        assert result.cached_tokens == min_cached


@pytest.mark.parametrize("adjusted", [False, True])
def test_ids_beyond_the_tokenizer_are_not_drawn(adjusted):
    model, tokenizer = tiny_model()
    vocab = tokenizer.vocab_size
    config = replace(model.config, vocab_size=vocab + 7)
    padded = CausalLM(config, seed=1).eval()
    with torch.no_grad():
        padded.lm_head.weight[vocab:] *= 50
    sampling = Sampling(temperature=0, repetition_penalty=1.5 if adjusted else 1.0)
    request = Request(
        [5, 6, vocab + 1], 6, sampling, logprobs=30, prompt_logprobs=30, ignore_eos=True
    )
    (beyond,) = Engine(padded).generate([request])
    assert max(beyond.token_ids) >= vocab
    pieces = []
    engine = Engine(padded, tokenizer)
    (result,) = engine.generate([request], on_piece=lambda _, piece: pieces.append(piece))
    in_vocab, unknown = pieces[0].prompt_logprobs
    assert in_vocab.logprob > -torch.inf and unknown.logprob == -torch.inf
    assert all(token < vocab for t in (in_vocab, unknown) for token, _ in t.top)
    assert result.finish_reason == "length" and max(result.token_ids) < vocab
    assert all(token < vocab for t in result.logprobs for token, _ in t.top)


def test_weights_that_change_are_noticed():
    model = model_of()
    prompt = torch.arange(150).remainder(97).tolist()
    engine = Engine(model)
    before = engine.generate([Request(prompt, 8, Sampling(temperature=0))])
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1)
    (after,) = engine.generate([Request(prompt, 8, Sampling(temperature=0))])
    assert after.cached_tokens == 0 and after.token_ids != before[0].token_ids
    assert (
        after.token_ids
        == Engine(model).generate([Request(prompt, 8, Sampling(temperature=0))])[0].token_ids
    )


def test_models_that_run_module_by_module():
    model = model_of()
    expected = [r.token_ids for r in Engine(model).generate(requests_of(5))]
    with fastlm.use_backend("reference"):
        actual = [r.token_ids for r in Engine(model).generate(requests_of(5))]
    assert actual == expected
    add_lora(model, 4)
    assert [r.token_ids for r in Engine(model).generate(requests_of(5))] == expected


def test_ends_and_lengths():
    prompt = [5, 6, 7]
    (free,) = Engine(model_of()).generate([Request(prompt, 400, seed=2, ignore_eos=True)])
    assert len(free.token_ids) == 400 and free.finish_reason == "length"
    end = free.token_ids[30]
    position = free.token_ids.index(end)
    model = model_of(eos_token_id=end)
    (ended,) = Engine(model).generate([Request(prompt, 400, Sampling(), seed=2)])
    assert ended.token_ids == free.token_ids[: position + 1] and ended.finish_reason == "stop"
    stop = frozenset({free.token_ids[4]})
    (stopped,) = Engine(model).generate(
        [Request(prompt, 400, Sampling(), seed=2, stop_ids=stop, ignore_eos=True)]
    )
    assert len(stopped.token_ids) <= 5 and stopped.finish_reason == "stop"
    (full,) = Engine(model).generate([Request(prompt, 10**6, seed=2, ignore_eos=True)])
    assert len(full.token_ids) == 512 - 3 and full.finish_reason == "length"


def test_penalties_and_biases():
    model = model_of()
    prompt, plain = [5, 6, 7], Sampling(temperature=0.0)
    (free,) = Engine(model).generate([Request(prompt, 20, plain)])
    banned = Sampling(temperature=0.0, logit_bias=((free.token_ids[0], -100.0),))
    (other,) = Engine(model).generate([Request(prompt, 20, banned)])
    assert free.token_ids[0] not in other.token_ids
    forced = Sampling(temperature=0.0, logit_bias=((11, 1000.0),))
    assert Engine(model).generate([Request(prompt, 4, forced)])[0].token_ids == [11] * 4
    never_twice = Sampling(temperature=0.0, presence_penalty=1e4)
    (each,) = Engine(model).generate([Request(prompt, 60, never_twice, ignore_eos=True)])
    assert len(set(each.token_ids)) == 60
    counted = Sampling(temperature=0.0, frequency_penalty=1e4)
    (even,) = Engine(model).generate([Request(prompt, 194, counted, ignore_eos=True)])
    assert sorted(even.token_ids) == sorted([*range(97)] * 2)
    both = Sampling(temperature=0.7, repetition_penalty=1.4, frequency_penalty=0.3)
    request = Request(prompt, 20, both, seed=3)
    assert Engine(model).generate([request])[0].token_ids == complete_by_definition(model, request)


def test_logprobs():
    model = model_of()
    for sampling in (Sampling(temperature=0.0), Sampling(temperature=0.6, top_k=5)):
        (result,) = Engine(model).generate([Request([5, 6], 6, sampling, seed=1, logprobs=3)])
        with torch.inference_mode():
            logits = model(torch.tensor([[5, 6, *result.token_ids[:-1]]])).logits[0, 1:]
        logp = (logits / (sampling.temperature or 1)).log_softmax(-1)
        for row, token_logprob in zip(logp, result.logprobs, strict=True):
            assert token_logprob.logprob == pytest.approx(row[token_logprob.token].item(), abs=1e-4)
            values, ids = row.topk(3)
            assert [i for i, _ in token_logprob.top] == ids.tolist()
            assert [p for _, p in token_logprob.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_the_cache_is_as_large_as_typical_answers(monkeypatch):
    """It does not grow with the machine: the memory of a block stays allocated once it was used."""
    config = model_of(max_position_embeddings=8192).config
    size = (
        BLOCK_SIZE * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    )

    def count(rows, gib=1000, **options):
        monkeypatch.setattr(fastlm.inference.block_manager, "total_memory", lambda: gib * 2**30)
        device = torch.device("cpu")
        return default_num_blocks(config, rows, dtype=torch.float32, device=device, **options)

    assert count(64) == count(64, gib=2000) == 64 * 9  # 512 tokens each, and a block to grow
    assert count(1) == 129 and count(8, max_model_len=65536) == 1025  # one full context
    assert count(64, max_model_len=128) == 64 * 3
    assert count(64, expected_tokens=8192) == 64 * 129
    assert count(10**6, gib=1) == 2**28 // size


def test_fair_turns():
    """A client with many requests or calls does not keep another one waiting."""
    engine, order = Engine(model_of(), max_num_seqs=1), []
    for i, client in enumerate("aaaab"):
        engine.submit(
            Request([1, 2], 3, client=client), lambda p, i=i: p.finish_reason and order.append(i)
        )
    while engine.step():
        pass
    assert order == [0, 4, 1, 2, 3]
    for i, client in enumerate("aaaabb"):
        engine.call(lambda i=i: order.append(i), client)
    while engine.step():
        pass
    assert order[5:] == [0, 4, 1, 5, 2, 3]


def test_cancel_deadline_and_failures():
    engine, ended = Engine(model_of(), max_num_seqs=2, max_queue_size=3), {}

    def listen(name):
        def take(piece):
            if name == "angry":
                raise RuntimeError("client has gone")
            if piece.finish_reason:
                ended[name] = piece.finish_reason

        return take

    long = {"max_new_tokens": 400, "ignore_eos": True}
    ids = {n: engine.submit(Request([1, 2], **long), listen(n)) for n in ("a", "b")}
    engine.submit(Request([1, 2], **long, deadline=0.0), listen("late"))
    with pytest.raises(QueueFull, match="queue: expected fewer") as full:
        engine.submit(Request([1], 2), listen("full"))
    assert full.value.retry_after >= 1
    engine.step()
    assert ended == {"late": "deadline"} and engine.stats().running == 2
    engine.cancel(ids["a"])
    engine.cancel(12345)
    engine.submit(Request([1], **long), listen("angry"))
    for _ in range(3):
        engine.step()
    assert ended == {"late": "deadline", "a": "cancelled"}
    stats = engine.stats()
    assert stats.running == 1
    assert stats.finished == {"deadline": 1, "cancelled": 1, "error": 1}
    engine.close()
    assert ended["b"] == "cancelled" and engine.stats().used_blocks == 0
    with pytest.raises(InputError, match="engine: expected an open engine"):
        engine.submit(Request([1], 2), listen("closed"))


def test_a_step_that_fails_ends_its_requests_not_the_engine(monkeypatch):
    engine = Engine(model_of())
    ours, model = CausalLM.chunk_hidden, engine.model

    def broken(self, ids, *rest, **options):
        if ids[0] == 13:
            raise RuntimeError("out of memory")
        return ours(self, ids, *rest, **options)

    monkeypatch.setattr(CausalLM, "chunk_hidden", broken)
    results = engine.generate([Request([1], 5), Request([13], 5), Request([2], 5)])
    assert [r.finish_reason for r in results] == ["length", "error", "length"]
    assert results[1].error == "RuntimeError: out of memory"
    assert engine.stats().used_blocks == 0 and engine.model is model


def test_a_request_with_the_prompt_of_one_that_fails_is_computed_itself(monkeypatch):
    """This holds also when the first of them was computed before, and preempted."""
    model = model_of()
    engine = Engine(model, max_num_batched_tokens=1000)
    prompt = [13, *range(96), *range(31)]
    (expected,) = engine.generate([Request(prompt, 5, seed=2)])
    ours, calls = CausalLM.chunk_hidden, []

    def once(self, ids, *rest):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return ours(self, ids, *rest)

    monkeypatch.setattr(CausalLM, "chunk_hidden", once)
    engine = Engine(model, max_num_batched_tokens=1000)
    actual = [[], []]
    engine.submit(Request(prompt, 5, seed=1), actual[0].append)
    engine.step()
    engine.scheduler.requeue(engine.scheduler.running[0])
    engine.submit(Request(prompt, 5, seed=2), actual[1].append)
    while engine.step():
        pass
    assert actual[0][-1].finish_reason == "error"
    assert [t for piece in actual[1] for t in piece.tokens] == expected.token_ids


def test_a_request_that_nothing_can_be_drawn_for_ends_alone():
    model = model_of(tie_word_embeddings=False)
    nothing = type("Nothing", (), {"mask": lambda self: torch.zeros(97, dtype=torch.bool)})
    good = Request([5, 6, 7], 8, seed=1)
    (expected,) = Engine(model).generate([good])
    bad = Request([5, 6, 8], 8, constraint=nothing)
    first, failed, last = Engine(model).generate([good, bad, good])
    assert first.token_ids == last.token_ids == expected.token_ids
    assert failed.finish_reason == "refused"
    assert failed.error == "grammar: expected a token that may come next, got none"
    bad = next(i for i in range(97) if i not in (*good.prompt, *expected.token_ids))
    with torch.no_grad():
        model.model.embed_tokens.weight[bad] = torch.nan
    first, failed, last = Engine(model).generate([good, Request([bad], 8), good])
    assert first.token_ids == last.token_ids == expected.token_ids
    assert (failed.finish_reason, failed.error) == ("error", "logits are not finite")


def test_updates_wait_until_nothing_runs():
    model = model_of()
    engine, prompt = Engine(model, max_num_seqs=2), torch.arange(150).remainder(97).tolist()
    plain = Sampling(temperature=0.0)
    before, after = [], []
    engine.submit(Request(prompt, 9, plain), before.append)
    engine.step()

    def change():
        assert engine.stats().running == 0
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(-1)  # leaves no trace
        return "changed"

    changed = engine.update(change)
    engine.submit(Request(prompt, 9, plain), after.append)
    while engine.step():
        pass
    assert changed.result() == "changed"
    (fresh,) = Engine(model).generate([Request(prompt, 9, plain)])
    assert after[-1].cached_tokens == 0
    assert [t for p in after for t in p.tokens] == fresh.token_ids
    assert [t for p in before for t in p.tokens] != fresh.token_ids
    model.model.norm.weight.data.mul_(2.0)  # norms are compared by value
    (same,) = engine.generate([Request(prompt, 9, Sampling(temperature=0.5), seed=1)])
    (other,) = Engine(model).generate([Request(prompt, 9, Sampling(temperature=0.5), seed=1)])
    assert same.token_ids == other.token_ids


def test_a_quantized_model_keeps_its_cache():
    engine = Engine(fastlm.quantize(model_of(), "w8a8", group_size=16))
    prompt = torch.arange(150).remainder(97).tolist()
    cached = [engine.generate([Request(prompt, 2)])[0].cached_tokens for _ in range(3)]
    assert cached == [0, 128, 128]


def test_blocks_found_after_preemption_do_not_count_as_cached():
    engine = Engine(model_of(), num_blocks=5)
    results = engine.generate([Request([i] * 64, 100, ignore_eos=True) for i in range(3)])
    assert engine.stats().preemptions > 0 and engine.stats().cached_tokens == 0
    assert [r.cached_tokens for r in results] == [0, 0, 0]


def test_text():
    """Pieces join to the text of the tokens. A stop string ends it, even across tokens."""
    tokenizer = fastlm.Tokenizer.train(["the river sees the tree " * 20], 300)
    model = model_of(vocab_size=tokenizer.vocab_size)
    engine = Engine(model, tokenizer)
    pieces = []
    engine.submit(Request([40, 41], 40, seed=3, ignore_eos=True), pieces.append)
    while engine.step():
        pass
    tokens = [t for p in pieces for t in p.tokens]
    text = "".join(p.text for p in pieces)
    assert len(tokens) == 40 and text == tokenizer.decode(tokens)
    stop = text[7:10]
    (stopped,) = engine.generate([Request([40, 41], 40, seed=3, stop=(stop,), ignore_eos=True)])
    assert stopped.text == text[: text.index(stop)] and stopped.finish_reason == "stop"
    (same,) = engine.generate([Request([40, 41], 40, seed=3, stop=stop, ignore_eos=True)])
    assert same.text == stopped.text  # a string is one stop string, not its letters


def test_listeners_and_callbacks_that_raise():
    engine, reasons = Engine(model_of()), []

    def angry(piece):
        reasons.append(piece.finish_reason)
        if piece.finish_reason:
            raise ValueError("no")

    engine.submit(Request([1], 3), angry)
    while engine.step():
        pass
    assert reasons == [None, None, "length"] and engine.stats().used_blocks == 0

    def result(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate([Request([1], 3), Request([2], 30)], on_piece=result)
    stats = engine.stats()  # no step is needed to release the blocks
    assert stats.used_blocks == stats.running == stats.waiting == 0

    for threaded in (False, True):
        if threaded:
            engine.start()
        with pytest.raises(ZeroDivisionError):
            engine.generate([Request([1], 3), Request([2], 3)], on_completion=result)
        assert engine.generate([Request([1], 3)])[0].finish_reason == "length"
    engine.close()


def test_a_thread_that_fails_continues(monkeypatch):
    engine = Engine(model_of())
    engine.start()
    with monkeypatch.context() as patch:
        patch.setattr(engine.scheduler, "schedule_decodes", lambda: 1 / 0)
        (failed,) = engine.generate([Request([1], 3)])
    assert failed.finish_reason == "error" and "ZeroDivisionError" in failed.error
    assert engine.generate([Request([1], 3)])[0].finish_reason == "length"
    engine.close()
    for refused in (engine.call, engine.update):
        with pytest.raises(InputError, match="engine: expected an open engine"):
            refused(lambda: None)


@pytest.mark.parametrize("name", ["call", "update"])
def test_a_call_during_a_step_is_not_lost(name):
    """It waits for the lock while a step takes the calls before it."""
    engine, futures = Engine(model_of()), []
    thread = threading.Thread(target=lambda: futures.append(getattr(engine, name)(lambda: 7)))
    engine.call(lambda: None), engine.update(lambda: None)
    with engine._changed:
        thread.start()
        time.sleep(0.05)
        engine.step()
    thread.join()
    while engine.step():
        pass
    assert futures[0].result(timeout=5) == 7


def test_an_interrupt_leaves_an_engine_that_works(monkeypatch):
    model = model_of()
    engine, pieces = Engine(model), []
    (expected,) = Engine(model).generate([Request([1, 2], 5, seed=1)])
    engine.submit(Request([1, 2], 5, seed=1), pieces.append)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "chunk_hidden", interrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([Request([3], 5)])
    while engine.step():
        pass
    assert [t for p in pieces for t in p.tokens] == expected.token_ids


def test_threads():
    """Many threads submit and some cancel; every answer belongs to its prompt."""
    engine = Engine(model_of(), max_num_seqs=8, num_blocks=40)
    requests = requests_of(24, longest=90, logprobs=None)
    expected = [r.token_ids for r in Engine(engine.model).generate(requests)]
    engine.start()
    actual = [None] * len(requests)

    def ask(i):
        if i % 6 == 5:
            id = engine.submit(requests[i], lambda piece: None)
            engine.cancel(id)
        actual[i] = engine.generate([requests[i]])[0].token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(requests))]
    for thread in threads:
        thread.start()
    assert engine.call(lambda: threading.current_thread().name).result() == "fastlm-engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result()
    for thread in threads:
        thread.join()
    assert actual == expected
    engine.close()
    assert not any(t.name == "fastlm-engine" for t in threading.enumerate())


def test_refusals():
    engine = Engine(model_of(), num_blocks=4)
    for request, message in (
        (Request([], 5), "prompt: expected at least one token, got none"),
        (Request([1, 97], 5), r"prompt: expected ids in \[0, 97\), got 97"),
        (Request([-1], 5), r"prompt: expected ids in \[0, 97\), got -1"),
        (Request([1], 0), "max_new_tokens: expected at least 1, got 0"),
        (Request([1] * 512, 5), "prompt: expected fewer than the 512 tokens"),
        (Request([1] * 250, 100), "expected at most the cache's 256 tokens in all, got 250 . 100"),
        (Request([1], 5, logprobs=-1), r"logprobs: expected 0 to 97 or None, got -1"),
        (Request([1], 5, seed=2**70), "seed: expected an integer"),
        (Request([1], 5, seed=-1), "seed: expected an integer"),
        (Request([1], 5, stop=("x",)), "stop: expected an engine with a tokenizer"),
        (Request([1], 5, Sampling(logit_bias=((97, 1.0),))), "logit_bias: expected ids in"),
    ):
        with pytest.raises(InputError, match=message):
            engine.submit(request, lambda piece: None)
    assert engine.generate([Request([1], 5)])[0].finish_reason == "length"
    with pytest.raises(InputError, match="max_model_len: expected 2 to the model's 512, got 0"):
        Engine(model_of(), max_model_len=0)
    with pytest.raises(InputError, match="kv_cache_dtype: expected float32"):
        Engine(model_of(), kv_cache_dtype=torch.int16)
    for dtype in (torch.float16, torch.int8):
        with (
            fastlm.use_backend("reference"),
            pytest.raises(
                InputError, match=r"kv_cache_dtype: expected None or torch\.float32 for a model"
            ),
        ):
            Engine(model_of(), kv_cache_dtype=dtype)
    with (
        fastlm.use_backend("reference"),
        pytest.raises(InputError, match="prompt_rows: expected None or False"),
    ):
        Engine(model_of(), prompt_rows=True)
    with pytest.raises(InputError, match="max_num_seqs: expected at least 1, got 0"):
        Engine(model_of(), max_num_seqs=0)


def test_blocks():
    manager = BlockManager(model_of().config, 4, dtype=torch.float32)
    hashes = hash_blocks([*range(97), *range(97)])
    assert len(hashes) == 194 // BLOCK_SIZE and len({*hashes}) == len(hashes)
    assert hash_blocks([*range(97), *range(96), 5])[:2] == hashes[:2]
    assert hash_blocks([1, *range(1, 97), *range(97)])[1:] != hashes[1:]  # all tokens before count
    blocks = manager.allocate(3)
    assert manager.allocate(2) is None
    for hash, block in zip(hashes, blocks):
        manager.cache(hash, block)
    manager.release(blocks)
    assert manager.num_free == 4 and manager.num_cached == 3
    assert manager.find_cached(hashes[0]) == blocks[0] and manager.find_cached(b"other") is None
    (fresh,) = manager.allocate(1)
    assert fresh not in blocks
    (last,) = manager.allocate(1)  # the end of a prompt is evicted before its beginning
    assert last == blocks[2] and manager.find_cached(hashes[2]) is None
    assert manager.find_cached(hashes[1]) == blocks[1] and manager.num_free == 0
    manager.release([blocks[0], blocks[1], fresh, last])
    manager.clear_cache()
    assert manager.find_cached(hashes[0]) is None and manager.num_free == 4
    assert all(a != b for a, b in pairwise(sorted(manager.allocate(4))))
