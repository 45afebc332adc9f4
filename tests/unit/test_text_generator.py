"""`fastlm generate` and `fastlm chat` write the same text as `fastlm serve`."""

import pytest
import torch
from serve_app import tiny_model

import fastlm
import fastlm.serve.text_generator
from fastlm.errors import InputError
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("format", [None, "w8a8"])
def test_commands_write_the_text_of_the_engine(format, monkeypatch):
    model, tokenizer = tiny_model(256)
    if format:
        model = fastlm.quantize(model, format, group_size=16)
    monkeypatch.setattr(
        fastlm.serve.text_generator, "load_for_inference", lambda *_: (model, tokenizer)
    )
    generator = fastlm.serve.text_generator.TextGenerator("model")
    words = "The tree sees the river. What is 1 + 1?".split()
    prompts = [tokenizer.encode(" ".join(words[i:] * (i + 1))) for i in range(6)]
    engine = Engine(model, tokenizer)
    for options in ({"temperature": 0}, {"temperature": 1.0, "top_k": 40}):
        pieces = [""] * len(prompts)

        def piece(row, text, pieces=pieces):
            pieces[row] += text

        completions = generator.generate(prompts, piece, max_new_tokens=60, seed=5, **options)
        direct = engine.generate(
            [Request(p, 60, Sampling(**options), seed=5 + i) for i, p in enumerate(prompts)]
        )
        assert [c.token_ids for c in completions] == [d.token_ids for d in direct]
        assert [c.text for c in completions] == [d.text for d in direct] == pieces
        texts = [
            fastlm.generate_text(
                model, tokenizer, prompt, max_new_tokens=60, sampling=Sampling(**options),
                seed=5 + i,
            )
            for i, prompt in enumerate(prompts)
        ]  # fmt: skip
        assert ["".join(text) for text in texts] == pieces
        assert generator.timing.new_tokens == sum(len(c.token_ids) for c in completions)
    (full,) = generator.generate([[5] * 250], max_new_tokens=60, temperature=0)
    assert full.finish_reason in ("context", "stop")
    (short,) = generator.generate([[5] * 4], max_new_tokens=1, temperature=0)
    assert short.finish_reason in ("length", "stop") and len(short.token_ids) == 1
    with torch.no_grad():
        model.model.norm.weight[:] = torch.nan
    with pytest.raises(InputError, match="model: expected one that answers, got: logits are not"):
        generator.generate([[5]], max_new_tokens=1, temperature=0)


def test_rotary_frequencies_depend_on_the_length_of_a_text(monkeypatch):
    """Each length of a context has an engine of its own."""
    model, tokenizer = tiny_model(256)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config = {**model.config.to_dict(), "rope_parameters": dynamic, "max_position_embeddings": 16}
    model = fastlm.CausalLM(fastlm.ModelConfig.from_dict(config), seed=1).eval()
    model.config.eos_token_id = None
    monkeypatch.setattr(
        fastlm.serve.text_generator, "load_for_inference", lambda *_: (model, tokenizer)
    )
    generator = fastlm.serve.text_generator.TextGenerator("model")
    ids, limits = tokenizer.encode("The tree sees the river."), []
    for count in (3, 90, 90, 3):
        (text,) = generator.generate([ids], max_new_tokens=count, temperature=0)
        pieces = fastlm.generate_text(
            model, tokenizer, ids, max_new_tokens=count, sampling=Sampling(temperature=0)
        )
        assert text.text == "".join(pieces)
        limits.append(generator._engine.context_limit)
    assert limits == [len(ids) + count for count in (3, 90, 90, 3)]
