"""Tests of the engine with rotary frequencies that depend on the length of the context."""

import contextlib

import pytest
from engine_cases import complete_by_definition, model_of

import fastlm
from fastlm.errors import InputError
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.model import rotary
from fastlm.model.rotary import frequencies

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(params=["modules", "steps", "rows"])
def engine_of(request):
    """Its prompts and answers through the modules, through modules and steps, or as rows."""
    how = request.param
    forced = fastlm.use_backend("reference") if how == "modules" else contextlib.nullcontext()
    with forced:
        yield lambda model, **options: Engine(model, prompt_rows=how == "rows", **options)


def requests_of(lengths, new):
    prompts = [[(7 * n + i) % 97 for i in range(n)] for n in lengths]
    return [Request(prompt, new, GREEDY, ignore_eos=True) for prompt in prompts]


def answers(engine, lengths, new):
    return [r.token_ids for r in engine.generate(requests_of(lengths, new))]


def by_definition(model, lengths, new):
    return [complete_by_definition(model, request) for request in requests_of(lengths, new)]


def test_longrope_turns_by_the_longest_context(engine_of):
    model = model_of("phi3-longrope", original_max_position_embeddings=80)
    long = by_definition(model, (81, 150), 20)  # in the long regime from the first token on
    assert answers(engine_of(model), (81, 150), 20) == long
    short = by_definition(model, (5, 60), 20)
    engine = engine_of(model, max_model_len=80)
    assert answers(engine, (5, 60), 20) == short
    assert answers(engine_of(model), (5, 60), 20) != short
    with pytest.raises(InputError, match="prompt: expected fewer than the 80 tokens"):
        engine.submit(Request([1] * 80, 1), lambda piece: None)


def test_dynamic_turns_by_the_longest_context(engine_of, monkeypatch):
    """The results are those of a plain model with the base of the longest context."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = model_of(rope_parameters=dynamic, max_position_embeddings=40)
    assert answers(engine_of(model, max_model_len=40), (5, 20), 15) == by_definition(
        model, (5, 20), 15
    )
    longest, width = model.designed_limit, model.config.head_dim
    assert longest == 80
    stretch = 2.0 * longest / 40 - 1.0
    base = 1e4 * stretch ** (width / (width - 2))
    plain = model_of(
        rope_parameters={"rope_type": "default", "rope_theta": base}, max_position_embeddings=80
    )
    engine = engine_of(model)
    assert answers(engine, (5, 50), 15) == by_definition(plain, (5, 50), 15)
    calls = []
    monkeypatch.setattr(rotary, "frequencies", lambda *a: calls.append(a) or frequencies(*a))
    assert answers(engine, (7, 49), 15) == by_definition(plain, (7, 49), 15)
    assert not [a for a in calls if a[0]["rope_type"] == "dynamic"]  # tables are kept
    with pytest.raises(InputError, match="max_model_len: expected 2 to the model's 80, got 81"):
        engine_of(plain, max_model_len=81)
