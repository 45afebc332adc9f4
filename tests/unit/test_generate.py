"""Generation: batches, filters, seeds, stops, text streams."""

from contextlib import nullcontext

import pytest
import torch

from fastlm import backend
from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.inference import sampling as sampling_module
from fastlm.inference.answer_text import split_at_stop
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling, apply_repetition_penalty, make_generators
from fastlm.model import generation as generation
from fastlm.model.causal_lm import CausalLM
from fastlm.model.generation import generate_text
from fastlm.quant.model import quantize

GREEDY = Sampling(temperature=0.0)
SIZES = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 48,
    "initializer_range": 0.3,  # so that the likeliest token is clear
    "pad_token_id": None,
    "eos_token_id": None,  # no early end
}
KINDS = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 4},
    "olmo2": {},
    "smollm3": {},
}
BY_LENGTH = {
    "dynamic": ("llama", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.2, 1.5, 2.0],
            "long_factor": [1.5, 2.0, 3.0, 4.0], "original_max_position_embeddings": 24,
        },
    ),
}  # fmt: skip


def model_of(kind="llama", **changes):
    kind, rope = BY_LENGTH.get(kind, (kind, None))
    changes = {**({"rope_parameters": rope} if rope else {}), **changes}
    config = ModelConfig(model_type=kind, **{**SIZES, **KINDS.get(kind, {}), **changes})
    return CausalLM(config, seed=4, scaled_residual=False).eval()


def ids_of(rows, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 101, (rows, length), generator=g)


def by_full_passes(model, ids, new):
    """Return (B, S + new) for (B, S): the definition of greedy generation."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat((ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


@pytest.mark.parametrize("kind", [*KINDS, *BY_LENGTH])
@pytest.mark.parametrize("how", ["steps", "modules", "w4a16"])
def test_greedy_tokens_are_those_of_full_passes(kind, how):
    """Also of rows of other lengths side by side. Where frequencies depend on the length of the
    context, here all lengths have the same.
    """
    model = model_of(kind)
    if how == "w4a16":
        model = quantize(model, how, group_size=8)
    rows = [ids_of(1, n, seed=n) for n in (1, 7, 12, 4)]
    prompts = [ids[0].tolist() for ids in rows]
    with backend.use_backend("reference") if how == "modules" else nullcontext():
        actual = model.generate(prompts, max_new_tokens=9, temperature=0.0)
    assert actual == [by_full_passes(model, ids, 9)[0].tolist() for ids in rows]


def test_frequencies_are_those_of_the_longest_context():
    """The results are those of a plain model with that base, also beyond the model's context."""
    model = model_of("dynamic")
    longest, width = 58, model.config.head_dim
    base = 1e4 * (2.0 * longest / 48 - 1.0) ** (width / (width - 2))
    plain = model_of(
        rope_parameters={"rope_type": "default", "rope_theta": base}, max_position_embeddings=100
    )
    prompts = [[3, 1, 4], ids_of(1, 40)[0].tolist()]
    actual = model.generate(prompts, max_new_tokens=18, temperature=0.0)
    assert actual == plain.generate(prompts, max_new_tokens=18, temperature=0.0)
    assert len(model.generate([[1] * 99], max_new_tokens=5)[0]) == 104  # 48 * factor is 96


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batch_equals_each_row_alone(kind):
    model = model_of(kind)
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (1, 7, 12, 4)]
    for options in (
        {"temperature": 0.0},
        {"temperature": 0.0, "repetition_penalty": 1.7},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    ):
        together = model.generate(prompts, max_new_tokens=9, seed=11, **options)
        expected = [
            model.generate([p], max_new_tokens=9, seed=11 + r, **options)[0]
            for r, p in enumerate(prompts)
        ]
        assert together == expected
        assert [t[: len(p)] for t, p in zip(together, prompts)] == prompts
        assert [len(t) - len(p) for t, p in zip(together, prompts)] == [9] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_several_rows_is_computed_once(kind, monkeypatch):
    """Each row continues as it does alone."""
    model = model_of(kind)
    long, short = ids_of(1, 9)[0].tolist(), ids_of(1, 4, seed=1)[0].tolist()
    prompts = [long, short, long, [0, *short], long, short]
    computed = []
    hidden = model.chunk_hidden
    monkeypatch.setattr(
        model, "chunk_hidden", lambda ids, *rest: computed.append(len(ids)) or hidden(ids, *rest)
    )
    for penalty in (1.0, 1.4):
        options = {
            "max_new_tokens": 8, "temperature": 1.0, "repetition_penalty": penalty,
            "stop_ids": range(0, 101, 9), "return_logprobs": True,
        }  # fmt: skip
        computed.clear()
        together, logprobs = model.generate(prompts, seed=3, **options)
        assert computed == [9 + 4 + 5]
        for i, prompt in enumerate(prompts):
            (expected,), (logp,) = model.generate([prompt], seed=3 + i, **options)
            assert together[i] == expected and logprobs[i] == pytest.approx(logp, abs=1e-4)


@pytest.mark.parametrize("format", ["w4a16", "w8a8"])
def test_a_padded_prompt_of_several_rows_of_a_quantized_model(format):
    """With w8a8 the cache has 16 bits."""
    model = quantize(model_of(), format, group_size=16)
    ids = ids_of(2, 7).repeat_interleave(3, 0)
    mask = torch.ones_like(ids)
    mask[3:, :2] = 0
    options = {"max_new_tokens": 5, "temperature": 0.0}
    together = model.generate(ids, attention_mask=mask, **options)
    expected = [model.generate(ids[i, 2 * (i > 2) :][None], **options)[0] for i in range(6)]
    assert [row[7:].tolist() for row in together] == [row[-5:].tolist() for row in expected]


def test_attention_mask_hides_padding():
    model = model_of()
    prompt = ids_of(1, 6)
    padded = torch.cat((torch.full((1, 3), 50), prompt), 1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    expected = model.generate(prompt, max_new_tokens=5, temperature=0.0)
    masked = model.generate(padded, attention_mask=mask, max_new_tokens=5, temperature=0.0)
    assert torch.equal(masked[:, 3:], expected)
    logits = model(padded, attention_mask=mask).logits[:, 3:]
    torch.testing.assert_close(logits, model(prompt).logits, rtol=1e-4, atol=1e-4)


def test_shapes_and_stops():
    model = model_of(pad_token_id=7)
    ids = ids_of(3, 5)
    free = model.generate(ids, max_new_tokens=8, temperature=0.0)
    assert free.shape == (3, 13) and free.dtype == torch.int64
    assert torch.equal(free[:, :5], ids)
    stop = int(free[1, 7])  # row 1 ends at its third new token or earlier
    first = [(row[5:] == stop).nonzero() for row in free]
    ends = [int(f[0]) + 1 if len(f) else 8 for f in first]
    stopped = model.generate(ids, max_new_tokens=8, temperature=0.0, stop_ids=[stop])
    assert stopped.shape == (3, 5 + max(ends))
    for row, plain, end in zip(stopped, free, ends):
        assert torch.equal(row[: 5 + end], plain[: 5 + end])
        assert (row[5 + end :] == 7).all()
    lists = model.generate(ids.tolist(), max_new_tokens=8, temperature=0.0, stop_ids={stop})
    assert [len(x) for x in lists] == [5 + e for e in ends]

    for pad in (7, None):
        assert torch.equal(model_of(pad_token_id=pad).generate(ids, max_new_tokens=0), ids)

    tokens = []
    model.generate(ids, max_new_tokens=4, temperature=0.0, on_token=lambda *a: tokens.append(a))
    assert tokens == [(r, int(free[r, 5 + i])) for i in range(4) for r in range(3)]
    cut = model.generate(
        ids.tolist(), max_new_tokens=4, temperature=0.0, on_token=lambda row, _: row == 1
    )
    assert [len(x) for x in cut] == [9, 6, 9]

    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)
    assert model.generate(ids[:0], max_new_tokens=3).shape == (0, 5)


def test_generation_ends_at_the_models_end_tokens():
    """Without options, by decode step and modules, streaming and in a batch. stop_ids adds more."""
    ids = ids_of(3, 5)
    free = model_of().generate(ids, max_new_tokens=8, temperature=0.0)
    end, other = int(free[1, 7]), int(free[1, 6])

    def cut(row, *ends):
        new = free[row, 5:].tolist()
        index = [new.index(e) for e in ends if e in new]
        return ids[row].tolist() + new[: min(index, default=7) + 1]

    for eos in (end, [100, end]):
        model = model_of(eos_token_id=eos)
        options = {"max_new_tokens": 8, "temperature": 0.0}
        assert model.generate(ids.tolist(), **options) == [cut(r, end) for r in range(3)]
        with backend.use_backend("reference"):  # it has no decode step of its own
            assert model.generate(ids.tolist(), **options) == [cut(r, end) for r in range(3)]
        more = model.generate(ids.tolist(), stop_ids=[other], **options)
        assert more == [cut(r, end, other) for r in range(3)]
        assert torch.equal(model.generate(ids, ignore_eos=True, **options), free)
        letters = Letters("abcdefghijklmnop")
        letters.start()
        greedy = {"max_new_tokens": 8, "sampling": GREEDY}
        text = "".join(generate_text(model, letters, ids[1].tolist(), **greedy))
        new = cut(1, end)[5:-1]
        assert text == "abcdefghijklmnop"[: 2 * len(new)]
        letters.start()
        (completion,) = Engine(model, letters).generate([ids[1].tolist()], GREEDY, max_new_tokens=8)
        assert (completion.text, completion.token_ids, completion.finish_reason) == (
            text,
            [*new, end],
            "stop",
        )


def test_prompts_are_texts_ids_or_requests():
    model, letters = model_of(), Letters("abcdefgh")
    letters.encode = lambda text: [1, 2, 3]
    engine, prompts, pieces = Engine(model, letters), [[1, 2], "text"], []
    letters.start()
    completions = engine.generate(
        prompts, max_new_tokens=6, seed=4, on_piece=lambda i, piece: pieces.append((i, piece))
    )
    requests = [Request(ids, 6, seed=4 + i) for i, ids in enumerate(([1, 2], [1, 2, 3]))]
    repeated = engine.generate(requests)
    assert [completion.token_ids for completion in completions] == [
        completion.token_ids for completion in repeated
    ]
    for row, completion in enumerate(completions):
        built_requests = [piece for i, piece in pieces if i == row]
        assert completion.token_ids == [token for piece in built_requests for token in piece.tokens]
        assert completion.text == "".join(piece.text for piece in built_requests) != ""
        assert (
            completion.finish_reason == built_requests[-1].finish_reason == "length"
            and not completion.is_stopped
        )
    with pytest.raises(InputError, match="prompts: expected requests alone or none, got both"):
        engine.generate([requests[0], [1, 2]])
    with pytest.raises(InputError, match="prompts: expected ids, as the engine has no tokenizer"):
        Engine(model).generate(["text"])


@pytest.mark.parametrize("threaded", [False, True])
def test_a_piece_that_is_enough_ends_an_answer(threaded):
    engine = Engine(model_of())
    if threaded:
        engine.start()
    first, second = engine.generate(
        [[1, 2], [3]], max_new_tokens=6, on_piece=lambda row, _: row == 1
    )
    engine.close()
    assert (len(first.token_ids), first.finish_reason) == (6, "length")
    assert (len(second.token_ids), second.finish_reason) == (1, "cancelled")


def test_one_default_of_sampling():
    """Every entry point draws at temperature 1 by default."""
    model, letters = model_of(), Letters("ab")
    drawn = model.generate([[1, 2]], max_new_tokens=8, seed=3)
    assert drawn == model.generate([[1, 2]], max_new_tokens=8, seed=3, temperature=1.0)
    assert drawn == generation.generate(model, [[1, 2]], max_new_tokens=8, seed=3)
    assert drawn != model.generate([[1, 2]], max_new_tokens=8, temperature=0.0)
    letters.start()
    (text,) = Engine(model, letters).generate([[1, 2]], max_new_tokens=8, seed=3)
    assert text.token_ids == drawn[0][2:]


def test_generation_ends_with_the_context():
    model = model_of()
    assert model.generate(ids_of(1, 40), max_new_tokens=30).shape == (1, 48)
    assert model.generate(ids_of(1, 47), max_new_tokens=30).shape == (1, 48)
    with pytest.raises(InputError, match="shorter than max_position_embeddings 48, got 48"):
        model.generate(ids_of(1, 48), max_new_tokens=1)


def test_seeds():
    model = model_of()
    ids = ids_of(1, 4).expand(3, 4)
    first = model.generate(ids, max_new_tokens=12, temperature=1.5, seed=3)
    assert torch.equal(first, model.generate(ids, max_new_tokens=12, temperature=1.5, seed=3))
    assert not torch.equal(first, model.generate(ids, max_new_tokens=12, temperature=1.5, seed=4))
    assert len({tuple(r.tolist()) for r in first}) == 3  # rows draw differently
    torch.manual_seed(8)
    unseeded = model.generate(ids, max_new_tokens=12)
    torch.manual_seed(8)
    assert torch.equal(unseeded, model.generate(ids, max_new_tokens=12))


FILTERS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 40, "temperature": 1.7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 4.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.1, "temperature": 0.8},
]


@pytest.mark.parametrize("spread", [0.02, 1.0, 6.0])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_are_those_of_transformers(options, spread):
    from transformers import generation as hf

    logits = torch.randn(5, 3001, generator=torch.Generator().manual_seed(2)) * spread
    sampling = Sampling(**options)
    p, ids = sampling.candidates(logits)
    ours = torch.zeros(5, 3001, dtype=torch.float64).scatter_(1, ids, p)
    ours /= ours.sum(-1, keepdim=True)

    scores = logits
    processors = [
        hf.TemperatureLogitsWarper(sampling.temperature),
        *([hf.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([hf.TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []),
        *([hf.MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    for process in processors:
        scores = process(torch.zeros(5, 1, dtype=torch.long), scores)
    theirs = scores.double().softmax(-1)
    assert (p.diff(dim=1) <= 0).all() or not (sampling.top_k or sampling.top_p or sampling.min_p)
    # theirs sums 3001 float32 probabilities, so one token at the border of top-p may be in or out
    differ = ((ours > 0) != (theirs > 0)).sum(-1)
    assert (differ <= (1 if sampling.top_p else 0)).all()
    assert (ours - theirs).abs().max() <= 1e-5 + (differ > 0).any() * (1 / (ours > 0).sum(-1).min())


def test_repetition_penalty_is_that_of_transformers():
    from transformers import generation as hf

    logits = torch.randn(3, 50) * 3
    ids = torch.randint(0, 50, (3, 20))
    seen = torch.zeros(3, 50, dtype=torch.bool).scatter_(1, ids, True)
    theirs = hf.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits.clone())
    torch.testing.assert_close(apply_repetition_penalty(logits, seen, 1.3), theirs)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 0.0, 1.0, -9.0, 1.5]]).expand(20000, 5)
    for options in ({}, {"top_k": 3}, {"min_p": 0.3, "temperature": 1.5}):
        sampling = Sampling(**options)
        tokens = sampling.sample(logits, make_generators(0, 20000))
        p, ids = sampling.candidates(logits[:1])
        expected = torch.zeros(5, dtype=torch.float64).scatter_(0, ids[0], p[0] / p.sum())
        counted = torch.bincount(tokens, minlength=5) / 20000
        # five standard deviations for a count of 20000
        assert ((counted - expected).abs() <= 5 * (expected * (1 - expected) / 20000).sqrt()).all()
        assert (counted[expected == 0] == 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature: expected 0 or at least 1e-6, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "hot"}, "temperature: expected 0 or at least 1e-6, got 'hot'"),
        ({"top_k": 0}, "top_k: expected >= 1 or None, got 0"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p: expected in "),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected > 0, got 0.0"),
        ({"seed": -1}, "seed: expected an integer"),
        ({"seed": 1.5}, "seed"),
        ({"max_new_tokens": -1}, "max_new_tokens: expected an integer >= 0, got -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
    ],
)  # fmt: skip
def test_impossible_options(options, message):
    model = model_of()
    with pytest.raises(InputError, match=message):
        model.generate(ids_of(1, 3), **{"max_new_tokens": 2, **options})
    if "max_new_tokens" in options:
        with pytest.raises(InputError, match=message):
            generation.generate_text(model, None, [1, 2], **options)


def test_the_last_seeds():
    """As floats they are 2^63."""
    for seed in (2**63 - 512, 2**63 - 1):
        assert make_generators(seed, 1)[0].initial_seed() == seed
    with pytest.raises(InputError, match=r"seed: expected an integer in \[0, 2\^63\)"):
        make_generators(2**63, 1)


def test_ids_beyond_the_tokenizer_are_not_drawn():
    model, letters = model_of(), Letters("abcdefgh")
    with torch.no_grad():
        model.lm_head.weight[90:] *= 50
    letters.vocab_size = 90
    greedy = {"max_new_tokens": 5, "sampling": Sampling(temperature=0, repetition_penalty=1.5)}
    drawn = model.generate([[1, 95]], max_new_tokens=5, temperature=0.0)[0][2:]
    assert max(drawn) >= 90
    for _ in range(2):
        letters.start()
        (answer,) = Engine(model, letters).generate([[1, 95]], greedy["sampling"], max_new_tokens=5)
        assert max(answer.token_ids) < 90
        letters.start()
        assert "".join(generate_text(model, letters, [1, 95], **greedy)) == answer.text


def test_impossible_prompts():
    model = model_of()
    ids = ids_of(2, 4)
    for prompt, options, message in (
        (ids + 90, {}, r"input_ids: expected ids in \[0, 101\)"),
        ([[1, 101]], {}, r"input_ids: expected ids in \[0, 101\), got 101"),
        (ids[:, :0], {}, "at least one token"),
        ([[1], []], {}, "at least one token"),
        (ids[0], {}, r"input_ids: expected integers \(B, S\), got shape \(4,\)"),
        (ids.float(), {}, r"input_ids: expected integers \(B, S\), got torch.float32"),
        ("hello", {}, r"input_ids: expected a tensor \(B, S\) .* got a str \(fastlm.Tokenizer enc"),
        (["hello"], {}, r"input_ids: expected a tensor \(B, S\) .* got a flat list"),
        (ids, {"attention_mask": ids[:, :2]}, "attention_mask: expected"),
        (ids, {"attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}, "padding on the left"),
        (ids, {"attention_mask": torch.zeros(2, 4)}, "at least one token"),
        (ids.tolist(), {"attention_mask": ids}, "attention_mask: expected with a tensor"),
        (
            [1, 2],
            {},
            r"input_ids: expected a tensor \(B, S\) or a list of B lists, got a flat list",
        ),
        ({"input_ids": ids}, {}, "input_ids: expected a tensor .* got a flat dict"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(prompt, max_new_tokens=2, **options)


class Letters:
    """A tokenizer with two bytes per token and 101 ids, for streams: "é" can straddle tokens."""

    stop_ids, vocab_size = frozenset(), 10**6

    def __init__(self, text):
        data = text.encode()
        self.parts = [data[i : i + 2] for i in range(0, len(data), 2)]

    def stream(self):
        return self

    def start(self):
        self.buffer, self.position = b"", 0

    def push(self, _):
        self.buffer += self.parts[self.position % len(self.parts)]
        self.position += 1
        for cut in range(len(self.buffer), -1, -1):
            try:
                text = self.buffer[:cut].decode()
            except UnicodeDecodeError:
                continue
            self.buffer = self.buffer[cut:]
            return text
        return ""

    def flush(self):
        return self.buffer.decode(errors="replace")


@pytest.mark.parametrize(
    "stop, expected",
    [
        ((), "abcdéfgh"),
        ("zz", "abcdéfgh"),
        ("é", "abcd"),
        ("cdéf", "ab"),
        (["gX", "éfg"], "abcd"),
        (["h!", "bq"], "abcdéfgh"),
        ("ab", ""),
    ],
)
def test_stop_strings(stop, expected):
    letters = Letters("abcdéfg" + "h")
    letters.start()
    pieces = list(
        generate_text(model_of(), letters, [1, 2], max_new_tokens=len(letters.parts), stop=stop)
    )
    assert "".join(pieces) == expected
    assert all(pieces)
    if not stop:
        assert len(pieces) > 1  # streamed, not buffered to the end


def test_stop_ids_end_the_text():
    model = model_of()
    free = model.generate([[1, 2]], max_new_tokens=6, temperature=0.0)[0][2:]
    letters = Letters("abcdefghijkl")
    letters.start()
    stop = free[3]
    pieces = generate_text(
        model, letters, [1, 2], max_new_tokens=6, stop_ids=[stop], sampling=GREEDY
    )
    text = "".join(pieces)
    assert text == "abcdefghijkl"[: 2 * free.index(stop)]
    with pytest.raises(InputError, match="stop: expected strings of at least one character"):
        generate_text(model, letters, [1], max_new_tokens=1, stop=["a", ""])


def test_split_at_stop():
    assert split_at_stop("hello <|e", ["<|end|>"]) == ("hello ", "<|e", False)
    assert split_at_stop("a stop b", ["stop", "p b"]) == ("a ", "", True)
    assert split_at_stop("aaa", ["aab"]) == ("a", "aa", False)
    assert split_at_stop("", ["x"]) == ("", "", False)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
def test_fused_projections_of_quantized_models(kind, tmp_path):
    import fastlm

    model = fastlm.quantize(model_of(kind), "w4a16", group_size=16)
    ids = ids_of(2, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def generated(model):
        return model.generate(ids, max_new_tokens=6, temperature=0.0)

    assert torch.equal(generated(model), by_full_passes(model, ids, 6))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    calls = attention.fused.weight, mlp.fused.weight
    generated(model)
    assert (attention.fused.weight, mlp.fused.weight) == calls  # not created again
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    model.save_pretrained(tmp_path)
    assert torch.equal(generated(CausalLM.from_pretrained(tmp_path)), generated(model))

    torch.manual_seed(1)  # other weights: first written in place, then assigned to a buffer
    other = fastlm.quantize(model_of(kind).apply(_redraw), "w4a16", group_size=16)
    model.load_state_dict(other.state_dict())
    assert torch.equal(generated(model), by_full_passes(other, ids, 6))
    mlp.down_proj.qdata = before["model.layers.0.mlp.down_proj.qdata"]
    if kind != "phi3":
        attention.k_proj.qdata = before["model.layers.0.self_attn.k_proj.qdata"]
    assert torch.equal(generated(model), by_full_passes(model, ids, 6))


def _redraw(module):
    if isinstance(module, torch.nn.Linear):
        torch.nn.init.normal_(module.weight, std=0.3)


def test_generation_leaves_no_trace():
    """Weights can still be trained after inference mode, and a second call starts from scratch."""
    model = model_of()
    ids = ids_of(2, 6)
    first = model.generate(ids, max_new_tokens=3, temperature=0.0)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(model.generate(ids, max_new_tokens=3, temperature=0.0), first)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_end_leave_the_others_as_they_are(kind):
    """Tokens, log-probabilities, and penalties of a ragged batch."""
    model = model_of(kind, eos_token_id=7)
    prompts = [ids_of(1, n, seed=n)[0].tolist() for n in (3, 9, 5, 1, 7, 2, 8, 4)]
    options = {
        "max_new_tokens": 24, "temperature": 2.0, "repetition_penalty": 1.2,
        "stop_ids": range(0, 101, 8),
    }  # fmt: skip
    rows, logprobs = model.generate(prompts, seed=5, return_logprobs=True, **options)
    for i, prompt in enumerate(prompts):
        (row,), (single,) = model.generate([prompt], seed=5 + i, return_logprobs=True, **options)
        assert row == rows[i] and len(logprobs[i]) == len(row) - len(prompt)
        assert logprobs[i] == pytest.approx(single, abs=1e-4)
        if kind == "llama":  # against the definition: no penalty here
            (row,), (actual,) = model.generate(
                [prompt], max_new_tokens=4, temperature=0.7, seed=i, return_logprobs=True
            )
            logits = model(torch.tensor([row])).logits[0, len(prompt) - 1 : -1]
            expected = (
                (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(row[len(prompt) :])[:, None])
            )
            assert actual == pytest.approx(expected[:, 0].tolist(), abs=1e-4)


@pytest.mark.parametrize("vocab", [1, 255, 256, 257, 1000])
def test_a_draw_without_filters_is_the_inverse_of_the_cumulative_sum(vocab):
    """At every quantile, also where probabilities are 0: before, between and after others."""
    g = torch.Generator().manual_seed(vocab)
    logits = torch.randn(1, vocab, generator=g, dtype=torch.float64) * 3
    logits[:, torch.rand(vocab, generator=g) < 0.6] = -torch.inf
    logits[:, vocab // 2] = 1.0
    logits = logits.float()
    p = logits.double().softmax(-1)[0]
    edges = torch.cat((torch.zeros(1, dtype=torch.float64), p.cumsum(0)))
    u = torch.cat((torch.tensor([0.0, 1 - 2**-53]), torch.rand(500, generator=g).double()))
    actual = sampling_module._sample_unfiltered(logits.expand(len(u), -1), u[:, None].double())
    assert (p[actual] > 0).all()
    assert (edges[actual] <= u + 1e-6).all() and (u <= edges[actual + 1] + 1e-6).all()


@pytest.mark.parametrize("options", [{"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"top_k": 1024}])
@pytest.mark.parametrize("rows", [2, 5, 64])
def test_rows_that_may_be_drawn_together_have_their_own_bits(options, rows):
    sampling = Sampling(temperature=0.7, **options)
    assert sampling.is_row_invariant
    logits = torch.randn(rows, 5000).mul(3).round(decimals=1)  # with ties
    p, ids = sampling.candidates(logits)
    single = [sampling.candidates(logits[row][None]) for row in range(rows)]
    assert torch.equal(p, torch.cat([row_values for row_values, _ in single]))
    assert torch.equal(ids, torch.cat([row_values for _, row_values in single]))
    together = sampling.sample(logits, make_generators(3, rows)).tolist()
    for row in range(rows):
        assert [together[row]] == sampling.sample(
            logits[row][None], make_generators(3 + row, 1)
        ).tolist()
