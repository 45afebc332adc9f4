"""Supervised fine-tuning: what a batch counts, that packing leaks nothing, that a model learns to
answer and to stop, resuming, options, and the stage in a recipe.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fastlm
from fastlm.checkpoint.config import ModelConfig
from fastlm.cli import app
from fastlm.data.conversations import parse_conversation
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.encoding import hash_fraction
from fastlm.train.objective import IGNORE, Example, Mixture, pack, truncate, weights_digest
from fastlm.train.options import TrainOptions
from fastlm.train.sft import SFT, SFTObjective

QUESTIONS = {
    "capital of France?": "Paris.",
    "two plus two?": "Four, I think.",
    "colour of snow?": "White as paper, and cold.",
    "who are you?": "A model.",
}
TINY = SFT(
    data=("x.jsonl",), epochs=40, batch_size=2, lr=4e-3, heldout=0.0, validations=0,
    sample_at=(), dtype="float32", save_steps=10,
)  # fmt: skip


def options(**changes) -> SFT:
    from dataclasses import replace

    return replace(TINY, **changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


def make_base(folder: Path) -> Path:
    """A model that has seen nothing, with a tokenizer that has ChatML's tokens and no template."""
    text = " ".join([*QUESTIONS, *QUESTIONS.values(), "system user assistant\n"])
    tokenizer = Tokenizer.train([text * 5], 320)
    tokenizer.chat_template = None
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=1).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def config(vocab_size: int, eos_id: int | None) -> ModelConfig:
    return ModelConfig.from_dict({
        "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "eos_token_id": eos_id,
        "tie_word_embeddings": True,
    })  # fmt: skip


@pytest.fixture
def data(tmp_path) -> str:
    return write_data(tmp_path)


def write_data(folder: Path) -> str:
    rows = [{"prompt": q, "completion": a} for q, a in QUESTIONS.items()]
    file = folder / "chat.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def example(ids: list[int], learn_from: int) -> Example:
    return Example(np.array(ids, np.int32), np.arange(len(ids)) >= learn_from)


EXAMPLES = [
    example([5, 6, 7, 8, 9], 3),
    example([10, 11, 12], 1),
    example([20, 21, 22, 23, 24, 25, 26, 27], 6),
    example([30, 31], 1),
]


# ---- batches


def test_pack() -> None:
    ids, labels, cu_seqlens = pack(EXAMPLES[:2])
    assert ids.tolist() == [[5, 6, 7, 8, 10, 11]]
    assert labels.tolist() == [[IGNORE, IGNORE, 8, 9, 11, 12]]
    assert cu_seqlens.tolist() == [0, 4, 6] and cu_seqlens.dtype == torch.int32


def test_fit() -> None:
    long = example(list(range(10)), 5)
    assert truncate(long, 10, "skip") == [long]
    assert truncate(long, 9, "skip") == []
    (cut,) = truncate(long, 7, "truncate")
    assert cut.ids.tolist() == list(range(7)) and cut.num_loss_tokens == 2
    assert truncate(long, 5, "truncate") == []  # nothing to learn is left
    pieces = truncate(long, 4, "split")
    assert [p.ids.tolist() for p in pieces] == [[4, 5, 6, 7], [8, 9]]
    assert [p.num_loss_tokens for p in pieces] == [3, 1]


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config(64, 0), seed=3)


def loss_of(model, parts: list[list[Example]], count: int) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    objective = SFTObjective(
        model, EXAMPLES, [], TrainOptions(max_steps=1), batch_size=1, seed=0, base="",
        tokenizer=None, prompt=(),
    )  # fmt: skip
    total = 0.0
    for part in parts:
        loss = objective.loss(pack(part), count)
        loss.backward()
        total += float(loss.detach())
    return total, [p.grad.clone() for p in model.parameters()]


def test_loss_and_gradient_do_not_depend_on_the_packing(model) -> None:
    count = sum(e.num_loss_tokens for e in EXAMPLES)
    single = loss_of(model, [[e] for e in EXAMPLES], count)
    for parts in ([EXAMPLES], [EXAMPLES[:1], EXAMPLES[1:]], [EXAMPLES[::-1]]):
        packed = loss_of(model, parts, count)
        assert packed[0] == pytest.approx(single[0], rel=1e-5)
        for a, b in zip(packed[1], single[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_loss_tokens(model) -> None:
    nll, count = 0.0, 0
    for e in EXAMPLES:
        logp = model(torch.tensor([e.ids.tolist()])).logits[0].detach().float().log_softmax(-1)
        for i in e.loss_mask.nonzero()[0]:
            if i:
                nll -= float(logp[i - 1, int(e.ids[i])])
                count += 1
    assert count == sum(e.num_loss_tokens for e in EXAMPLES) == 2 + 2 + 2 + 1
    assert loss_of(model, [EXAMPLES], count)[0] == pytest.approx(nll / count, rel=1e-5)


# ---- NEFTune


def first_layer_inputs(model, documents: list[list[int]], alpha: float) -> torch.Tensor:
    """What the first layer reads of these packed documents in a training, (total, E)."""
    inputs: list[torch.Tensor] = []
    layer = model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    objective = SFTObjective(
        model, EXAMPLES, [], TrainOptions(max_steps=1), batch_size=1, seed=0, base="",
        tokenizer=None, prompt=(), neftune_noise_alpha=alpha,
    )  # fmt: skip
    objective.loss(pack([example([*ids, 0], 1) for ids in documents]), 1)
    handle.remove()
    return inputs[0][0]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_noise_is_within_the_bound_of_its_own_document(family) -> None:
    changes = {"model_type": family, "head_dim": 32, "query_pre_attn_scalar": 32}
    options = {**config(64, 0).to_dict(), **(changes if family == "gemma2" else {})}
    model = CausalLM(ModelConfig.from_dict(options), seed=3)
    documents = [[5, 6, 7, 8, 9], [11] * 60, [12, 13, 14] * 40]
    model.eval()
    plain = first_layer_inputs(model, documents, 0.0)
    assert torch.equal(first_layer_inputs(model, documents, 5.0), plain)  # a validation
    model.train()
    assert torch.equal(first_layer_inputs(model, documents, 0.0), plain)
    noise = first_layer_inputs(model, documents, 5.0) - plain
    for part, ids in zip(noise.split([len(ids) for ids in documents]), documents, strict=True):
        bound = 5.0 / (len(ids) * 64) ** 0.5
        assert 0.98 * bound < float(part.abs().max()) < bound * (1 + 1e-4)
        error = bound / (3 * part.numel()) ** 0.5  # the standard error of a uniform mean
        assert abs(float(part.mean())) < 4 * error
        assert float(part.square().mean()) == pytest.approx(bound**2 / 3, rel=0.2)
    assert not model.model.embed_tokens._forward_hooks  # nothing stays


def test_noise_is_that_of_transformers(model) -> None:
    """In a batch of one document, where L is the same."""
    from transformers.integrations.neftune import neftune_post_forward_hook

    model.train()
    ids = [5, 9, 30, 31, 8, 7]
    torch.manual_seed(5)
    actual = first_layer_inputs(model, [ids], 7.0)
    embedding = model.model.embed_tokens
    embedding.neftune_noise_alpha = 7.0
    torch.manual_seed(5)
    expected = neftune_post_forward_hook(embedding, None, embedding(torch.tensor([ids])))
    torch.testing.assert_close(actual, expected[0].detach(), rtol=1e-5, atol=1e-6)


def test_noise_is_another_training(base, data, tmp_path) -> None:
    weights = []
    for name, alpha in (("default", None), ("none", 0.0), ("noise", 5.0)):
        changes = {} if alpha is None else {"neftune_noise_alpha": alpha}
        options(data=(data,), epochs=2, **changes)(tmp_path / name, model=base)
        weights.append((tmp_path / name / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(InputError, match="with these options, got another: neftune_noise_alpha"):
        options(data=(data,), epochs=2)(tmp_path / "noise", model=base)


# ---- epochs


def test_an_epoch_takes_every_example_once(model) -> None:
    objective = SFTObjective(
        model, EXAMPLES, [], TrainOptions(max_steps=1), batch_size=3, seed=5, base="",
        tokenizer=None, prompt=(),
    )  # fmt: skip
    firsts = sorted(int(e.ids[0]) for e in EXAMPLES)
    epochs, sizes = [], []
    for _ in range(6):  # of two micro-batches, 3 and 1 examples, in one step of two
        step = objective.next_batches(2)
        sizes.append([len(batch[2]) - 1 for batch in step])
        epochs.append([i for ids, _, ends in step for i in ids[0, ends[:-1].long()].tolist()])
        assert objective.scalars([objective.measurements()])["epoch"] == len(epochs)
    assert sizes == [[3, 1]] * 6
    assert all(sorted(epoch) == firsts for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1  # in another order
    objective.next_batches(1)
    state = objective.state_dict()
    ahead = [*objective.next_batches(2), *objective.next_batches(2)]
    assert len(ahead) == 3  # the rest of the epoch, then the next one
    objective.load_state_dict(state)
    resumed = [*objective.next_batches(2), *objective.next_batches(2)]
    for a, b in zip(ahead, resumed, strict=True):
        assert all(map(torch.equal, a, b))


def test_an_epoch_takes_sources_by_their_weights(model) -> None:
    mixture = Mixture((3, 1, 10), (2.0, 1.0, 0.3))
    assert mixture.epoch_counts() == [6, 1, 3]
    objective = SFTObjective(
        model, [example([i, 9, 9], 1) for i in range(14)], [], TrainOptions(max_steps=1),
        batch_size=4, seed=5, base="", tokenizer=None, prompt=(),
        mixture=mixture,
    )  # fmt: skip
    subsets = set()
    for epoch in range(8):
        batches = objective.next_batches(99)
        firsts = sorted(i for ids, _, ends in batches for i in ids[0, ends[:-1].long()].tolist())
        assert firsts[:7] == [0, 0, 1, 1, 2, 2, 3]
        assert len(set(firsts[7:])) == 3 and min(firsts[7:]) > 3
        subsets.add(tuple(firsts[7:]))
        assert objective.scalars([objective.measurements()])["epoch"] == epoch + 1
    assert len(subsets) > 3  # each epoch takes another subset of a source
    objective.next_batches(1)
    state, ahead = objective.state_dict(), objective.next_batches(2)
    objective.load_state_dict(state)
    for a, b in zip(ahead, objective.next_batches(2), strict=True):
        assert all(map(torch.equal, a, b))
    assert objective.identity()["mixture"] == [[3, 1, 10], [2.0, 1.0, 0.3]]


def test_weights_of_one_change_nothing() -> None:
    """Checkpoints of trainings without weights stay valid."""
    rng = [np.random.Generator(np.random.PCG64(3)) for _ in range(2)]
    mixture = Mixture((3, 4), (1.0, 1.0))
    assert mixture.order(rng[0]).tolist() == rng[1].permutation(7).tolist()
    assert mixture.epoch_counts() == [3, 4]
    assert Mixture((1000, 0), (0.0001, 2.0)).epoch_counts() == [
        1,
        0,
    ]  # at least one where there are any


@pytest.mark.parametrize(
    "changes, steps",
    [({}, 13), ({"epochs": 2.0}, 26), ({"epochs": 0.5}, 7), ({"max_steps": 100}, 100),
     ({"max_steps": 100, "epochs": 1.0}, 13), ({"max_steps": 5, "epochs": 1.0}, 5),
     ({"max_tokens": 999}, None)],
)  # fmt: skip
def test_epochs_are_steps(changes, steps) -> None:
    stage = SFT(data=("x.jsonl",), batch_size=4, gradient_accumulation_steps=2, **changes)
    assert stage.train_options(101).max_steps == steps  # 26 micro-batches an epoch


# ---- training


def answers(folder: Path) -> list[str]:
    model, tokenizer = CausalLM.from_pretrained(folder), Tokenizer.load(folder)
    texts = []
    for question in QUESTIONS:
        ids = tokenizer.encode_chat([{"role": "user", "content": question}])
        out = model.generate(torch.tensor([ids]), max_new_tokens=40, temperature=0)[0].tolist()
        texts.append(tokenizer.decode(out[len(ids) :], special=True))
    return texts


def test_a_model_learns_to_answer_and_to_stop(base, data, tmp_path) -> None:
    result = options(data=(data,))(tmp_path / "sft", model=base)
    folder = tmp_path / "sft" / "model"
    assert answers(folder) == [f"{answer}<|im_end|>" for answer in QUESTIONS.values()]
    assert result["conversations"] == 4 and result["steps"] == 80
    assert result["tokens"] == 40 * result["loss_tokens"]
    # the template and the end token are part of the model's folder
    assert "<|im_start|>" in (Tokenizer.load(folder).chat_template or "")
    end = Tokenizer.load(folder).encode_chat([{"role": "user", "content": ""}])
    assert CausalLM.from_pretrained(folder).config.stop_ids & set(end)


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_the_same_command_continues_to_the_same_bits(base, data, tmp_path, alpha) -> None:
    """Stopped twice by Ctrl-C."""
    from fastlm.train.loop import TrainingInterrupted

    stage = options(data=(data,), epochs=10, neftune_noise_alpha=alpha)
    uninterrupted = stage(tmp_path / "whole", model=base)
    steps = 0

    def interrupt(event) -> None:
        nonlocal steps
        steps += "loss" in event
        if "loss" in event and steps in (3, 9):
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):
        with pytest.raises(TrainingInterrupted):
            stage(tmp_path / "cut", model=base, on_event=interrupt)
    cut = stage(tmp_path / "cut", model=base)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert cut["loss"] == uninterrupted["loss"] and cut["steps"] == 20


def test_a_mixture_is_counted_by_source(base, data, tmp_path) -> None:
    other = tmp_path / "other.jsonl"
    rows = [{"prompt": f"say {i}", "completion": f"{i}"} for i in range(6)]
    other.write_text("\n".join(map(json.dumps, rows)))
    stage = options(data=(data, str(other)), data_weights=(3.0, 0.5), epochs=2)
    result = stage(tmp_path / "out", model=base)
    assert result["sources"] == [
        {"source": data, "weight": 3.0, "conversations": 4, "examples_per_epoch": 12},
        {"source": str(other), "weight": 0.5, "conversations": 6, "examples_per_epoch": 3},
    ]
    assert result["steps"] == 2 * 8  # of two conversations
    ctx = stage.context(tmp_path / "out", model=base)
    facts = stage.report(ctx, result).facts
    assert facts["mixture"] == f"3 x {data} (4), 0.5 x {other} (6)"
    with pytest.raises(InputError, match="with these options, got another: mixture was"):
        options(data=(data, str(other)), data_weights=(3.0, 1.0), epochs=2)(
            tmp_path / "out", model=base
        )


def test_the_digest_of_weights_sees_every_element(model) -> None:
    before = weights_digest(model)
    assert weights_digest(model) == before
    with torch.no_grad():
        model.model.embed_tokens.weight[40, 3] += 1
        model.model.embed_tokens.weight[41, 3] -= 1
    assert weights_digest(model) != before


def test_a_position_names_the_row_of_the_next_batch(model) -> None:
    examples = [Example(e.ids, e.loss_mask, f"file, line {i}") for i, e in enumerate(EXAMPLES)]
    objective = SFTObjective(
        model, examples, [], TrainOptions(max_steps=1), batch_size=2, seed=1, base="",
        tokenizer=None, prompt=(),
    )  # fmt: skip
    for step in range(6):
        position = objective.position()
        ((ids, _, _),) = objective.next_batches(1)
        (row,) = [i for i, e in enumerate(EXAMPLES) if e.ids[0] == ids[0, 0]]
        assert position == f"epoch {step // 2}, from example {step % 2 * 2}, file, line {row}"


def test_another_model_is_another_training(base, data, tmp_path) -> None:
    """A folder that holds a training of one model does not pass it off as one of another."""
    other = tmp_path / "other"
    tokenizer = Tokenizer.load(base)
    CausalLM(config(tokenizer.vocab_size, tokenizer.eos_id), seed=2).save_pretrained(other)
    tokenizer.save(other)
    stage = options(data=(data,), epochs=1)
    stage(tmp_path / "sft", model=base)
    with pytest.raises(
        InputError, match="with these options, got another: the model is not the same"
    ):
        stage(tmp_path / "sft", model=other)


def test_held_out_conversations_are_not_trained_on(base, tmp_path) -> None:
    rows = [
        {"prompt": f"count to {i}", "completion": f"{how} to {i}", "id": f"{how} {i}"}
        for how in ("one", "two")
        for i in range(60)
    ]
    file = tmp_path / "many.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    events: list[dict] = []
    stage = options(
        data=(str(file),), epochs=1, heldout=0.3, validations=2, sample_at=(1.0,),
        sample_tokens=5,
    )  # fmt: skip
    result = stage(tmp_path / "sft", model=base, on_event=events.append)
    training = [row for row in rows if hash_fraction(parse_conversation(row)) >= 0.3]
    assert result["conversations"] == len(training) == 120 - result["heldout"]
    assert 10 < result["heldout"] < 70
    assert len(training) == 2 * len({row["prompt"] for row in training})  # a prompt is on one side
    tokenizer = Tokenizer.load(base)
    tokens = sum(len(tokenizer.encode(row["completion"])) + 1 for row in training)
    assert result["tokens"] == result["loss_tokens"] == tokens
    assert result["steps"] == -(-len(training) // 2)
    losses = [e["val_loss"] for e in events if "val_loss" in e]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert len([e for e in events if "sample" in e]) == 1
    assert result["prompt"].startswith("count to")


def test_the_part_of_a_row_depends_on_its_prompt_alone() -> None:
    rows = [parse_conversation({"prompt": str(i), "completion": "a"}) for i in range(200)]
    places = [hash_fraction(row) for row in rows]
    assert 20 < sum(fraction < 0.2 for fraction in places) < 60
    copy = parse_conversation({"id": 7, "messages": [
        {"role": "user", "content": "5"}, {"role": "assistant", "content": "b"},
    ]})  # fmt: skip
    assert hash_fraction(copy) == places[5]


def long_rows(tmp_path) -> str:
    file = tmp_path / "long.jsonl"
    rows = [
        {"prompt": "x " * 150, "completion": "no"},
        {"prompt": "short", "completion": "yes"},
        {"prompt": "z", "completion": "y " * 150},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


LONG = {
    "skip": ({"too long": 2}, 1),
    "truncate": ({"nothing left to learn": 1, "truncated": 1}, 2),
    "split": ({"split": 2}, 3),
}


@pytest.mark.parametrize("how", LONG)
def test_long_rows_are_counted(base, tmp_path, how) -> None:
    counts, conversations = LONG[how]
    stage = options(
        data=(long_rows(tmp_path),), epochs=1, truncation=how, sample_at=(1.0,), sample_tokens=9
    )
    result = stage(tmp_path / "out", model=base)
    assert result["counts"] == counts and result["conversations"] == conversations
    assert result["rows_read"] == 3 and result["prompt"] in ("short", "z")  # one that leaves room
    tokenizer = Tokenizer.load(base)
    tokens = len(tokenizer.encode("yes")) + 1
    assert result["loss_tokens"] >= tokens and (how != "skip" or result["loss_tokens"] == tokens)


def test_nothing_to_learn(base, tmp_path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"prompt": "x " * 150, "completion": "no"}))
    with pytest.raises(InputError, match=r"got none in 1 rows \(1 too long\)"):
        options(data=(str(file),))(tmp_path / "none", model=base)
    file.write_text(json.dumps({"prompt": "x", "completion": "no"}))
    with pytest.raises(InputError, match=r"got none in 1 rows \(1 held out\)"):
        options(data=(str(file),), heldout=0.999999)(tmp_path / "none", model=base)
    with pytest.raises(
        InputError, match="max_length: expected at most the model's context 128, got 129"
    ):
        options(data=(str(file),), max_length=129)(tmp_path / "none", model=base)
    with pytest.raises(InputError, match="sample_prompt: expected at most 48 tokens"):
        options(data=(str(file),), sample_prompt="x " * 60)(tmp_path / "none", model=base)


def test_rows_that_the_template_refuses(base, tmp_path) -> None:
    file, template = tmp_path / "chat.jsonl", tmp_path / "chat.jinja"
    good = {"prompt": "a", "completion": "b"}
    file.write_text("\n".join(map(json.dumps, [good, {**good, "system": "s"}, good])))
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    stage = options(data=(str(file),), chat_template=str(template), epochs=1)
    with pytest.raises(InputError, match=r"chat\.jsonl, line 2: chat_template: .*no system"):
        stage(tmp_path / "out", model=base)
    messages: list[dict] = []
    result = options(data=stage.data, chat_template=str(template), epochs=1, skip_bad=True)(
        tmp_path / "out", model=base, on_event=messages.append
    )
    assert result["counts"] == {"refused by the chat template": 1}
    assert result["conversations"] == 2
    assert any("line 2" in event.get("warning", "") for event in messages)


# ---- options and commands

REFUSED = {
    "batch_warmup: expected 0 where epochs end the training (max_tokens or max_steps do without),"
    " got 0.1": {"batch_warmup": 0.1},
    "epochs: expected a positive number, got 0": {"epochs": 0},
    "heldout: expected a share in [0, 1), got 1": {"heldout": 1},
    "truncation: expected one of skip, truncate, split, got 'cut'": {"truncation": "cut"},
    "max_length: expected 2 or more, got 1": {"max_length": 1},
    "batch_size: expected 1 or more, got 0": {"batch_size": 0},
    "max_steps: expected a positive number, got 0": {"max_steps": 0},
    "lr: expected a positive number, got -1": {"lr": -1},
    "date: expected YYYY-MM-DD, got 'today'": {"date": "today"},
    "date: expected YYYY-MM-DD, got '20240726'": {"date": "20240726"},
    "seed: expected 0 or more, got -1": {"seed": -1},
    "neftune_noise_alpha: expected 0 or more, got -5": {"neftune_noise_alpha": -5},
    "data_weights: expected one for each of 1 sources, got 2": {"data_weights": (1.0, 2.0)},
    "data_weights: expected positive numbers, got 0.0": {"data_weights": (0.0,)},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_options(message) -> None:
    with pytest.raises(InputError) as refusal:
        options(**REFUSED[message]).check()
    assert str(refusal.value) == message


def test_a_bad_row_ends_the_command_with_its_line(base, tmp_path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    arguments = ["sft", str(file), "--model", str(base), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert (
        f"{file}, line 1: messages[0]: expected system or user first, got assistant" in done.output
    )


def test_a_model_without_a_way_to_chat(base, data, tmp_path) -> None:
    folder = tmp_path / "plain"
    tokenizer = Tokenizer.train(["some text" * 9], 300, special_tokens=["<|endoftext|>"])
    CausalLM(config(tokenizer.vocab_size, 0)).save_pretrained(folder)
    tokenizer.save(folder)
    with pytest.raises(
        InputError, match="chat_template: expected one, since the model has neither"
    ):
        options(data=(data,))(tmp_path / "out", model=folder)
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\nA: {% else %}"
        "{{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
    )
    stage = options(data=(data,), chat_template=str(template), epochs=1)
    assert stage(tmp_path / "out", model=folder)["steps"] == 2
    # the name of the template's file is no option that changes the result
    assert stage.identity() == options(data=(data,), epochs=1).identity()
    assert Tokenizer.load(tmp_path / "out" / "model").chat_template == template.read_text()


def test_a_recipe_fine_tunes_what_it_pretrained(tmp_path) -> None:
    import tiny_recipe

    data = str(tmp_path / "chat.jsonl")  # of at most 32 tokens, the context of the tiny model
    rows = [{"prompt": q, "completion": a} for q, a in zip("abcdefgh", "bcdefghi")]
    Path(data).write_text("\n".join(map(json.dumps, rows)))
    recipe = tiny_recipe.write(tmp_path)
    text = recipe.read_text()
    chat = 'kind = "sft"\nepochs = 2\nheldout = 0.4\nsample_tokens = 4\n'
    recipe.write_text(f"{text}\n[[stage]]\n{chat}data = [{json.dumps(data)}]\n")
    run = tmp_path / "run"
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(run)])
    assert done.exit_code == 0, done.output
    assert fastlm.CausalLM.from_pretrained(run / "sft").config.stop_ids
    page = (run / "report.html").read_text()
    assert "Fine-tuning" in page and "training conversations" in page
    rerun = CliRunner().invoke(app, ["run", str(recipe), "--out", str(run)])
    assert rerun.exit_code == 0 and "sft" in rerun.output
    other = Path(data)
    other.write_text(other.read_text() + '\n{"prompt": "new", "completion": "row"}')
    plan = CliRunner().invoke(app, ["run", str(recipe), "--out", str(run), "--dry-run"])
    assert plan.exit_code == 0, plan.output
    lines = {line.split()[0]: line for line in plan.output.splitlines() if line.split()}
    assert "done" in lines["pretrain"] and "done" not in lines["sft"]
