"""Tests of answers with a grammar: masks that are late, too slow, or allow no token."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from engine_cases import model_of

import fastlm.inference.engine
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")


class Fixed:
    """A grammar with one sentence."""

    def __init__(self, tokens):
        self.tokens, self.accepted = tokens, []

    def mask(self):
        mask = torch.zeros(97, dtype=torch.bool)
        mask[self.tokens[len(self.accepted)]] = True
        return mask

    def accept(self, token):
        self.accepted.append(token)


def test_constraints():
    model = model_of(eos_token_id=3)
    results = Engine(model).generate(
        [Request([1], 9, seed=i, constraint=lambda: Fixed([9, 8, 7, 3])) for i in range(3)]
    )
    assert [r.token_ids for r in results] == [[9, 8, 7, 3]] * 3
    (bad,) = Engine(model).generate([Request([1], 9, constraint=lambda: Fixed([9]))])
    assert bad.finish_reason == "error" and "IndexError" in bad.error


def test_others_go_on_while_a_mask_is_computed():
    ended, other_ended = [], threading.Event()

    class Slow(Fixed):
        def mask(self):
            if len(self.accepted) == 2 and not other_ended.wait(10):
                ended.append("too late")
            return super().mask()

    engine = Engine(model_of(eos_token_id=3))

    def listen(name):
        def take(piece):
            if piece.finish_reason:
                ended.append((name, piece.finish_reason))
                other_ended.set()

        return take

    engine.submit(Request([1], 9, constraint=lambda: Slow([9, 8, 7, 3])), listen("slow"))
    engine.submit(Request([2], 40, ignore_eos=True), listen("other"))
    while engine.step():
        pass
    assert ended == [("other", "length"), ("slow", "stop")]


@pytest.mark.parametrize(
    "options", [{}, {"num_speculative_tokens": 3}, {"num_blocks": 4}, {"prompt_rows": True}]
)
def test_late_masks_change_no_answer(options, monkeypatch):
    """This holds also where the answer is preempted meanwhile."""

    class Even:
        def __init__(self):
            self.count = 0

        def mask(self):
            if slow and self.count % 3 == 1:
                time.sleep(0.002)
            return torch.arange(97) % 3 != self.count % 3

        def accept(self, token):
            self.count += 1

    model, answers = model_of(), []
    sampling = Sampling(repetition_penalty=1.2)
    requests = [Request([i] * 60, 70, sampling, seed=i, constraint=Even) for i in range(3)]
    for patience in (10, 0):
        slow = not patience
        monkeypatch.setattr(fastlm.inference.engine, "MASK_PATIENCE", patience)
        engine = Engine(model, **options)
        answers.append([r.token_ids for r in engine.generate(requests)])
        assert engine.stats().preemptions or "num_blocks" not in options
        assert engine.stats().used_blocks == 0
    assert answers[0] == answers[1] and all(len(tokens) == 70 for tokens in answers[0])


@pytest.mark.parametrize("prompt_rows", [False, True])
def test_prompt_logprobs_with_late_masks(prompt_rows, monkeypatch):
    class Slow(Fixed):
        def mask(self):
            time.sleep(0.01)
            return super().mask()

    monkeypatch.setattr(fastlm.inference.engine, "MASK_PATIENCE", 0)
    model, prompt = model_of(eos_token_id=3), list(range(5, 90))
    logprobs = []
    for constraint in (None, lambda: Slow([9, 8, 3])):
        pieces = []
        request = Request(prompt, 9, prompt_logprobs=2, constraint=constraint)
        engine = Engine(model, prompt_rows=prompt_rows)
        engine.generate([request], on_piece=lambda _, piece, to=pieces: to.append(piece))
        logprobs.append([score for piece in pieces for score in piece.prompt_logprobs])
    assert logprobs[0] == logprobs[1] and [s.token for s in logprobs[1]] == prompt[1:]


def test_only_an_answer_with_slow_masks_ends(monkeypatch):
    seconds = iter(range(10**6))

    class Slow(Fixed):
        def mask(self):
            next(seconds)
            return super().mask()

    clock = SimpleNamespace(thread_time=lambda: 0.05 * next(seconds))
    monkeypatch.setattr("fastlm.inference.token_masks.time", clock)
    engine = Engine(model_of(eos_token_id=3))
    slow = Request([1], 200, constraint=lambda: Slow([9] * 199))
    result, other = engine.generate([slow, Request([2], 5, ignore_eos=True)])
    assert result.finish_reason == "refused" and 5 < len(result.token_ids) < 40
    assert result.error.startswith("grammar: expected masks of at most 0.02 s")
    assert other.finish_reason == "length" and engine.stats().finished["refused"] == 1
