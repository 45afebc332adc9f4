"""Tests of the likelihoods and answers of `Scorer`, against float64 one pair at a time."""

import random
import sys

import numpy as np
import pytest
import torch
from families import CASES, SMALL
from tokenizers.processors import TemplateProcessing

import fastlm
from fastlm import backend
from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.evals.prefix_sharing import prefix_batches
from fastlm.evals.scorer import EvalPrompt, Scorer
from fastlm.inference.sampling import Sampling
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer

TEXT = "the river is near the tree, the bird is near the house. what is it?\nassistant user" * 4
MODELS = ("llama", "mistral", "gemma2", "qwen3", "phi3-longrope", "w8a16")
BOS = "<|im_start|>"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 290)


def with_bos(tokenizer):
    """Return the same tokenizer, which puts BOS before a text."""
    backend = tokenizer.backend.from_str(tokenizer.backend.to_str())
    backend.post_processor = TemplateProcessing(
        single=[BOS, "$A"], special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    roles = {"bos_token": BOS, "eos_token": "<|endoftext|>"}
    return Tokenizer(backend, roles, tokenizer.chat_template)


def make_model(case="llama", **changes):
    quantized = case == "w8a16"
    case = "llama" if quantized else case
    options = {**SMALL, "vocab_size": 290, **CASES[case], **changes, "pad_token_id": None}
    if quantized:
        options |= {"hidden_size": 64, "intermediate_size": 64}
    options = {k: v for k, v in options.items() if k != "head_dim" or v is not None}
    options["model_type"] = case.split("-")[0]
    model = CausalLM(ModelConfig.from_dict(options), seed=2).eval()
    return fastlm.quantize(model, "w8a16", group_size=32) if quantized else model


def wide(model):
    """Return the same model in float64."""
    other = CausalLM(model.config).double().eval()
    state = {name: p.double() for name, p in model.state_dict().items()}
    other.load_state_dict(state, strict=True)
    return other


@torch.no_grad()
def one_by_one(model, pairs, limit=None):
    """Return (log-likelihood, greedy) of each pair, from all logits."""
    results = []
    for context, continuation in pairs:
        window = [*context, *continuation][-(limit or 10**9) - 1 :]
        logits = model(torch.tensor([window[:-1]])).logits[0, -len(continuation) :].double()
        logprobs = logits.log_softmax(-1)[range(len(continuation)), continuation]
        results.append((float(logprobs.sum()), logits.argmax(-1).tolist() == continuation))
    return results


def random_pairs(seed=0, count=24, longest=30):
    """Questions with several answers, some of them equal, one token long or without a question."""
    draw = random.Random(seed)
    few_shot = [draw.randrange(3, 290) for _ in range(9)]
    pairs = []
    while len(pairs) < count:
        begun = few_shot if draw.random() < 0.7 else []
        context = begun + [draw.randrange(3, 290) for _ in range(draw.randint(1, longest - 12))]
        pairs += [
            (context, [draw.randrange(3, 290) for _ in range(draw.choice((1, 1, 2, 3)))])
            for _ in range(draw.randint(1, 4))
        ]
    pairs.append(pairs[3])
    draw.shuffle(pairs)
    return pairs


def assert_equal(actual, truth, pairs, scale=1e-4):
    for likelihood, (logprob, greedy), (_, continuation) in zip(actual, truth, pairs, strict=True):
        assert abs(likelihood.logprob - logprob) < scale * len(continuation), (likelihood, logprob)
        assert likelihood.tokens == len(continuation)
        assert likelihood.greedy is None or likelihood.greedy == greedy


@pytest.mark.parametrize("tokens", (8, 4096))
@pytest.mark.parametrize("case", MODELS)
def test_likelihoods_are_those_of_each_pair_alone(case, tokens, tokenizer):
    model, pairs = make_model(case), random_pairs()
    # its weights are the truth of a quantized model, whose float32 sums take other orders
    truth = one_by_one(model if case == "w8a16" else wide(model), pairs)
    # the likeliest tokens after each context, so that greedy is True somewhere
    best = [(c, greedy_tokens(model, c, len(t))) for c, t in pairs[:9]]
    pairs = pairs + best
    truth += one_by_one(model if case == "w8a16" else wide(model), best)
    scorer = Scorer(model, tokenizer, tokens=tokens)
    actual = scorer.token_loglikelihoods(pairs, greedy=True)
    assert_equal(actual, truth, pairs)
    assert sum(likelihood.greedy for likelihood in actual) >= 9
    assert actual == scorer.token_loglikelihoods(pairs, greedy=True)  # the same bits
    if case == "llama":
        order = random.Random(1).sample(range(len(pairs)), len(pairs))
        reordered = scorer.token_loglikelihoods([pairs[i] for i in order], greedy=True)
        assert [reordered[order.index(i)] for i in range(len(pairs))] == actual
        assert all(likelihood.greedy is None for likelihood in scorer.token_loglikelihoods(pairs))


@torch.no_grad()
def greedy_tokens(model, context, count):
    ids = list(context)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_a_sure_model_is_greedy_where_it_is_sure(tokenizer):
    """Tokens of high probability are not compared, but flags still equal those of the logits."""
    model = make_model(initializer_range=1.5)  # logits of order 50
    pairs = [(c, greedy_tokens(model, c, 3)) for c, _ in random_pairs(1, 20)]
    pairs += [(c, [*t[:2], (t[2] + 1) % 290]) for c, t in pairs]
    truth = one_by_one(wide(model), pairs)
    actual = Scorer(model, tokenizer).token_loglikelihoods(pairs, greedy=True)
    assert [likelihood.greedy for likelihood in actual] == [greedy for _, greedy in truth]
    assert sum(likelihood.logprob > -0.5 for likelihood in actual) >= 3  # the rule is in use


def test_each_hears_of_every_pair_and_the_model_stays_as_it_was(tokenizer):
    model, pairs = make_model().train(), random_pairs()
    reported = {}
    scorer = Scorer(model, tokenizer, tokens=64)
    actual = scorer.token_loglikelihoods(pairs, on_result=reported.__setitem__)
    assert [reported[i] for i in range(len(pairs))] == actual
    assert model.training and all(p.grad is None for p in model.parameters())
    with pytest.raises(InputError, match=r"pairs\[1\]: expected a continuation"):
        scorer.token_loglikelihoods([pairs[0], ([5], [])])
    assert model.training


def test_contexts_beyond_the_limit_lose_their_beginning(tokenizer):
    model = make_model(max_position_embeddings=24)
    pairs = [(list(range(3, 3 + n)), [7, 8, 9]) for n in (10, 21, 22, 23, 60)]
    actual = Scorer(model, tokenizer).token_loglikelihoods(pairs, greedy=True)
    assert [likelihood.truncated_tokens for likelihood in actual] == [0, 0, 0, 1, 38]
    assert_equal(actual, one_by_one(wide(model), pairs, 24), pairs)
    shorter = Scorer(model, tokenizer, limit=12).token_loglikelihoods(pairs)
    assert_equal(shorter, one_by_one(wide(model), pairs, 12), pairs)
    with pytest.raises(InputError, match=r"pairs\[0\]: expected a continuation of at most"):
        Scorer(model, tokenizer, limit=2).token_loglikelihoods(pairs)
    with pytest.raises(InputError, match="limit: expected 1 to 24, got 25"):
        Scorer(model, tokenizer, limit=25)


def test_long_texts_are_read_in_windows(tokenizer):
    model = make_model(max_position_embeddings=16)
    scorer = Scorer(model, tokenizer)
    texts = ["", "the bird", "the river is near the tree, " * 5]
    actual = scorer.rolling(texts)
    for text, likelihood in zip(texts, actual, strict=True):
        ids = tokenizer.encode(text)
        assert likelihood.tokens == len(ids)
        windows = []
        for at in range(0, len(ids), 16):
            end = min(at + 16, len(ids))
            window = [tokenizer.eos_id, *ids][max(0, end - 16) : end]
            windows.append((window[: len(window) - (end - at - 1)], ids[at:end]))
        truth = sum(logprob for logprob, _ in one_by_one(wide(model), windows))
        assert abs(likelihood.logprob - truth) < 1e-4 * max(1, len(ids))


def test_tokens_of_pairs(tokenizer):
    scorer = Scorer(make_model(), tokenizer)
    a, b = tokenizer.encode("the bird"), tokenizer.encode("the bird is near")
    pairs = [("the bird", " is near"), ("the bird ", "is near"), ("", "the bird"), ("  ", "the")]
    eos = [tokenizer.eos_id]
    assert scorer.encode(pairs) == [
        (a, b[len(a) :]), (a, b[len(a) :]), (eos, a), (eos, tokenizer.encode("  the")),
    ]  # fmt: skip
    chat = scorer.encode([("what? ", "a bird")], chat=True)
    chat_ids = tokenizer.encode_chat([{"role": "user", "content": "what? "}])
    assert chat == [(chat_ids, tokenizer.encode("a bird"))]
    with pytest.raises(InputError, match=r"pairs\[0\]: expected a continuation"):
        scorer.loglikelihoods([("the", "")])


def test_bos_prefix_and_special_tokens(tokenizer):
    bos_tokenizer = with_bos(tokenizer)
    model, bos = make_model(), bos_tokenizer.bos_id
    the, bird = bos_tokenizer.encode("the"), bos_tokenizer.encode("the bird")
    rest = bird[len(the) :]
    pairs = [("the", " bird"), ("", "the bird"), ("", f"{BOS}the"), (f"{BOS}the", " bird")]
    literal = bos_tokenizer.encode(BOS)
    assert Scorer(model, bos_tokenizer).encode(pairs) == [
        ([bos, *the], rest), ([bos], bird), ([bos], bos_tokenizer.encode(f"{BOS}the")),
        ([bos, *literal, *the], rest),
    ]  # fmt: skip
    # as transformers reads them, and no second BOS
    assert Scorer(model, bos_tokenizer, parse_special=True).encode(pairs) == [
        ([bos, *the], rest), ([bos], bird), ([bos], the), ([bos, *the], rest),
    ]  # fmt: skip
    assert Scorer(model, bos_tokenizer, add_bos=False).encode(pairs)[:2] == [
        (the, rest),
        ([bos], bird),
    ]
    assert Scorer(model, bos_tokenizer, prefix=5).encode(pairs)[1] == ([5], bird)
    plain = Scorer(model, tokenizer, parse_special=True)
    assert plain.encode([("", "<|endoftext|>the")]) == [([tokenizer.eos_id], the)]
    with pytest.raises(InputError, match="prefix: expected 0 to 289, got 290"):
        Scorer(model, bos_tokenizer, prefix=290)
    with pytest.raises(InputError, match="add_bos: expected a tokenizer with BOS"):
        Scorer(model, tokenizer, add_bos=True)


def test_batches_hold_every_sequence_within_their_bounds():
    draw = random.Random(4)
    sequences = [context + continuation for context, continuation in random_pairs(5, 60)]
    draw.shuffle(sequences)
    for tokens, keys, max_members in (
        (8, 10**6, None),
        (64, 100, None),
        (4096, 10**6, 3),
        (64, 10**6, 1),
    ):
        members = []
        for batch in prefix_batches(sequences, tokens=tokens, keys=keys, max_sequences=max_members):
            members += batch.members
            ids = batch.ids[0].tolist()
            for i, rows in zip(batch.members, batch.rows, strict=True):
                assert [ids[row] for row in rows] == sequences[i]
            is_single = len(batch.members) == 1
            assert len(ids) <= tokens or is_single
            assert len(batch.members) <= (max_members or 10**6)
            if batch.keys is not None:
                assert len(batch.keys[0]) <= keys or is_single
                assert int(batch.keys[1][-1]) == len(batch.keys[0])
            assert np.array_equal(np.diff(batch.cu_seqlens) > 0, np.ones(len(batch.cu_seqlens) - 1))
        assert sorted(members) == list(range(len(sequences)))


def test_answers_depend_on_prompt_and_seed(tokenizer):
    model = make_model(initializer_range=0.05)
    scorer = Scorer(model, tokenizer)
    prompts = [EvalPrompt("the bird", 9, seed=s) for s in range(4)] + [
        EvalPrompt("what is it?", 9, seed=1)
    ]
    done = []
    drawn = scorer.generate(prompts, temperature=1.0, on_result=done.append)
    assert {answer.text for answer in done} == {answer.text for answer in drawn} and len(done) == 5
    assert len({answer.text for answer in drawn[:4]}) > 1
    assert scorer.generate(prompts[2:], temperature=1.0) == drawn[2:]
    best = scorer.generate(prompts)
    assert best[0].text == best[1].text
    ids = tokenizer.encode("the bird")
    assert not best[0].is_stopped and best[0].text == tokenizer.decode(greedy_tokens(model, ids, 9))
    seeded = [EvalPrompt("the bird", 9, sampling=Sampling(0.0)), EvalPrompt("the bird", 9, seed=3)]
    assert scorer.generate(seeded, temperature=1.0) == [best[0], drawn[3]]


def test_answers_end_at_stop_strings_and_special_tokens(tokenizer):
    model = make_model()
    scorer = Scorer(model, tokenizer)
    (full,) = scorer.generate([EvalPrompt("the bird", 12)])
    stop = full.text[3:5]
    (cut,) = scorer.generate([EvalPrompt("the bird", 12, stop=(stop,))])
    assert cut.is_stopped and cut.text == full.text[: full.text.index(stop)]
    # the special token that this model writes is not in the text of an answer
    with torch.no_grad():
        bird = tokenizer.encode("the bird")
        first = greedy_tokens(model, bird, 1)[0]
        special = tokenizer.backend.token_to_id("<|im_end|>")
        weight = model.model.embed_tokens.weight
        weight[special] = weight[first] * 1.5
    changed = Scorer(model, tokenizer)
    assert greedy_tokens(model, bird, 1) == [special]
    (ended,) = changed.generate([EvalPrompt("the bird", 12, stop=("<|im_end|>",))])
    assert ended.text == "" and ended.is_stopped and len(ended.token_ids) <= 1


def test_prompts_leave_room_and_chats_go_through_the_template(tokenizer):
    model = make_model(max_position_embeddings=32)
    scorer = Scorer(model, tokenizer)
    long = EvalPrompt("the river is near the tree " * 9, 20)
    ids = tokenizer.encode(long.text)
    (answer,) = scorer.generate([long])
    assert answer.truncated_prompt_tokens == len(ids) + 20 - 32 and len(answer.token_ids) <= 20
    (long_answer,) = scorer.generate(
        [EvalPrompt(tokenizer.decode(ids[answer.truncated_prompt_tokens :]), 20)]
    )
    assert (long_answer.text, long_answer.truncated_prompt_tokens) == (answer.text, 0)
    (half,) = scorer.generate([EvalPrompt("the " * 40, 99)])
    assert len(half.token_ids) <= 16
    chat = scorer.generate([EvalPrompt("it?", 6, chat=True), EvalPrompt("it?", 6)])
    rendered = tokenizer.render_chat([{"role": "user", "content": "it?"}])
    special = Scorer(model, tokenizer, parse_special=True)
    assert special.generate([EvalPrompt(rendered, 6)])[0] == chat[0]
    assert chat[0].text != chat[1].text


@pytest.mark.parametrize("isa", [name for name in backend.cpu_isas() if name.startswith("amx")])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_split_float32_moves_likelihoods_by_little(tokenizer, monkeypatch, case, isa):
    monkeypatch.setattr(sys.modules["fastlm.ops.linear"], "_MIN_SPLIT_ROWS", 1)
    model = make_model(case)
    pairs = [(TEXT[:60], TEXT[i : i + 9 + i % 7]) for i in range(30)]
    scorers = [Scorer(model, tokenizer, split_float32=on) for on in (True, False)]
    with backend.use_cpu_isa(isa):
        split, plain = (s.loglikelihoods(pairs, greedy=True) for s in scorers)
    moved = [abs(a.logprob - b.logprob) for a, b in zip(split, plain, strict=True)]
    assert 0 < max(moved) < 1e-3
    assert [a.greedy for a in split] == [b.greedy for b in plain]
    assert ["_split_head" in vars(s) for s in scorers] == [True, False]
    head, wide = model.head_matrix(torch.float32), vars(scorers[0])["_split_head"]
    assert torch.equal(wide[:, : head.shape[1]], head.bfloat16())
