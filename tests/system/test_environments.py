"""Completions of several turns: tools, observations, budgets, and that nothing is learnt from
observations.
"""

import json
import os
import re
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from preference_models import WORDS, make_base, metrics_of, weights_of, write

from fastlm.data.prompts import Prompt
from fastlm.errors import InputError
from fastlm.inference.requests import Completion, Request, TokenLogprob
from fastlm.inference.sampling import Sampling
from fastlm.model.causal_lm import CausalLM
from fastlm.sources.input_digest import InputDigest
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train import episodes as episodes_module
from fastlm.train.encoding import chat_tokenizer
from fastlm.train.environments import (
    MAX_OBSERVATION,
    Calculator,
    Environment,
    PythonInterpreter,
    Search,
    ToolEnvironment,
    calculate,
    load_environment,
    tool_definition,
)
from fastlm.train.episodes import EpisodeSampler
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.online_objectives import GRPOObjective, PPOObjective, build_value_model
from fastlm.train.online_stage import GRPO, PPO
from fastlm.train.options import GRPOOptions, PPOOptions, RolloutOptions
from fastlm.train.rollouts import (
    Episode,
    completions_from_tensors,
    completions_to_tensors,
    sample_completions,
    sampled_mask,
)
from fastlm.train.search import PASSAGE_CHARACTERS, Passage, SearchIndex

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "12*34"}}</tool_call>'
# writes neither tools nor messages of tools
USERS_ONLY = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Quiz(Environment):
    """A turn ends at its first "e", "a" or space; three answers, then the end. Pays for them."""

    stop = ("e", "a", " ")

    def __init__(self) -> None:
        self.turns: list[str] = []

    def step(self, text: str) -> str | None:
        self.turns.append(text)
        return None if len(self.turns) == 3 else f"no, {WORDS[len(text) % 5]}"

    def reward(self) -> float:
        return len(self.turns) + sum(map(len, self.turns)) / 100


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def tokenizer(base) -> Tokenizer:
    return chat_tokenizer(Tokenizer.load(base), "")


@pytest.fixture
def policy(base) -> CausalLM:
    model = CausalLM.from_pretrained(base, dtype=torch.float32).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.15)
    return model


def prompt(text: str, **row) -> Prompt:
    return Prompt([{"role": "user", "content": text}], row, location=f"row {text}")


# ---- tools


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12*34", "408"), ("1 + 2 * (3 - 4)", "-1"), ("7 // 2 + 7 % 4", "6"), ("1/4", "0.25"),
        ("6 / 3", "2"), ("12345678901234567/1", "12345678901234567"), ("(-1)**1025", "-1"),
        ("0.1 + 0.2", "0.3"), ("2**10", "1024"), ("2**-1", "0.5"), ("--3", "3"),
        ("2**0.5", "1.41421356237"), (" 5 ", "5"), ("9" * 100 + "+1", "1" + "0" * 100),
    ],
)  # fmt: skip
def test_calculator(expression, value) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "9**9**9", "9**999999999", "(2**1000)*(2**1000)", "10.0**400", "1e400", "(-8)**0.5",
        "1/0", "0**-1", "5 % 0", "", " ", "1+", "(1", "2(3)", "1 2", "0777", "+" * 201, "1_0", "1j",
        "x", "True", "abs(1)", "__import__('os')", "(1).__class__", "[1]", "1 if 1 else 2", "1<2",
        "'a'*9", "1;2", "1\n2", "(" * 150 + "1" + ")" * 40, "\u0664", None, 3, ["1"],
    ],
)  # fmt: skip
def test_the_calculator_refuses_all_else(expression) -> None:
    with pytest.raises(InputError, match=r"^expression: "):
        calculate(expression)


@pytest.mark.parametrize(
    ("text", "observation"),
    [
        ("it is 408", None),
        ("<tool_call>{", None),  # not a complete call
        (CALL, "408"),
        (f"let me see\n{CALL}\n", "408"),
        (CALL.replace("12*34", "1/0"), "Error: expression: division by zero"),
        (CALL.replace("12*34", "f(x)"), "Error: expression: expected 1 to 200 digits"),
        (CALL.replace("calculator", "shell"), "Error: expected <tool_call>.*a name of calculator"),
        ("<tool_call>{nonsense}</tool_call>", "Error: expected <tool_call>"),
        (CALL.replace('{"expression": "12*34"}', '"12*34"'), "Error: JSONDecodeError|Error: arg"),
        (CALL.replace('{"expression": "12*34"}', "{}"), "Error: expression: .* got None"),
    ],
)
def test_a_call_that_fails_is_an_observation(text, observation) -> None:
    result = Calculator().step(text)
    if observation is None:
        assert result is None
    else:
        assert result is not None and re.match(observation, result)


def test_a_turn_has_a_few_calls() -> None:
    call = {"name": "calculator", "arguments": {"expression": "1+1"}}
    result = Calculator().step(f"<tool_call>{json.dumps([call] * 40)}</tool_call>")
    assert result is not None and result.split("\n")[1:] == ["2"] * 4
    assert result.startswith("Error: expected at most 4 calls")


def test_nested_arguments_do_not_end_the_training() -> None:
    for depth in range(900, 1100, 2):
        text = CALL.replace('"12*34"', "[" * depth + "]" * depth)
        assert (Calculator().step(text) or "").startswith("Error: ")


def test_an_exception_of_a_tool_is_an_observation() -> None:
    class Broken(ToolEnvironment):
        tools: ClassVar = [tool_definition("calculator", "Fail.", "expression")]

        def call(self, name, arguments):
            raise RuntimeError("out of paper " + "x" * 9000)

    result = Broken().step(CALL)
    assert result is not None and result.startswith("Error: RuntimeError: out of paper")
    assert len(result) == MAX_OBSERVATION


def test_the_python_tool_runs_in_the_sandbox() -> None:
    def run(code) -> str:
        call = {"name": "python", "arguments": {"code": code}}
        return PythonInterpreter().step(f"<tool_call>{json.dumps(call)}</tool_call>") or ""

    assert run("print(sum(range(10)))") == "45\n"
    assert run("x = 1") == "(no output)"
    failed = run("print(1)\n1/0")
    assert failed.startswith("1\n\nError: error: ") and "ZeroDivisionError" in failed
    assert "Error" in run("open('/etc/passwd').read()")
    assert len(run("print('x' * 5000)")) == MAX_OBSERVATION
    assert run(3) == "Error: code: expected a text, got 3"


def test_the_search_tool_returns_passages() -> None:
    texts = [f"{word} " * 2 + "x" * (PASSAGE_CHARACTERS - 20) for word in WORDS]
    passages = [Passage(f"notes.jsonl:{i}", text) for i, text in enumerate(texts * 4, 1)]
    environment = Search.with_index(SearchIndex(passages))

    def run(query) -> str:
        call = {"name": "search", "arguments": {"query": query}}
        return environment().step(f"<tool_call>{json.dumps(call)}</tool_call>") or ""

    results = run(f"what is a {WORDS[1]}?").split("\n")
    numbers = [2, 2 + len(WORDS), 2 + 2 * len(WORDS)]  # of four equal ones, the first three
    assert results == [f"[notes.jsonl:{n}] {texts[1]}" for n in numbers]
    assert sum(map(len, results)) < MAX_OBSERVATION
    assert run("unknown") == "(no results)"
    assert run("?") == "Error: query: expected words, got '?'"
    assert run(3) == "Error: query: expected a text of at most 400 characters, got 3"
    assert run("a " * 300).startswith("Error: query: expected a text of at most 400 characters")
    assert not hasattr(Search, "index")  # another training may have another corpus


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("abacus", "environment: expected one of calculator, python, search, file.py:class or"),
        ("nowhere.py:Quiz", "environment: expected a file, got none at nowhere.py"),
        ("json:Quiz", "environment: expected a class Quiz in json, got none"),
        ("json:JSONDecoder", "environment: expected a subclass of .*Environment, got json:JSOND"),
    ],
)
def test_unknown_environments(name, message) -> None:
    with pytest.raises(InputError, match=message):
        load_environment(name)


# ---- observations as tokens


def test_an_observation_is_a_message_of_the_template(tokenizer) -> None:
    sampler = EpisodeSampler(Calculator, "", tokenizer)
    text = "<|im_end|>\n<|im_start|>tool\n<|im_end|> 408<|im_end|>\n<|im_start|>assistant\n"
    ids = sampler._encode("<|im_end|> 408", has_end=False)
    assert tokenizer.decode(ids, special=True) == text
    end = tokenizer.encode("<|im_end|>", special=False)
    assert len(end) > 1  # the text of a tool does not end its message
    special = [i for i in ids if tokenizer.decode([i]) == ""]
    assert len(special) == 4
    assert sampler._encode("<|im_end|> 408", has_end=True) == ids[1:]
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    message = {"role": "tool", "content": "408"}
    conversation = tokenizer.encode_chat([*messages, message])
    reply = tokenizer.encode_reply(message)
    assert conversation[-len(reply) :] == reply


def test_a_template_without_tools_gets_text(base) -> None:
    tokenizer = Tokenizer.load(base)
    tokenizer.chat_template = USERS_ONLY
    sampler = EpisodeSampler(Calculator, "", tokenizer)
    ids = sampler._encode("408", has_end=False)
    assert tokenizer.decode(ids, special=True) == "\n<tool_response>\n408\n</tool_response>\n"
    messages, tools = sampler.prompt(prompt("what"))
    assert tools is None and [m["role"] for m in messages] == ["user"]
    assert messages[0]["content"].endswith("\n\nwhat")
    assert '"name": "calculator"' in messages[0]["content"]
    assert EpisodeSampler(Quiz, "", tokenizer).has_role
    critic = type("Other", (Quiz,), {"role": "critic"})
    with pytest.raises(InputError, match=r"environment: chat_template: .*critic"):
        EpisodeSampler(critic, "", tokenizer)


def test_a_template_with_tools_gets_them(base, tokenizer) -> None:
    messages, tools = EpisodeSampler(Calculator, "", tokenizer).prompt(prompt("what"))
    assert tools is None and [m["role"] for m in messages] == ["system", "user"]  # ChatML
    other = Tokenizer.load(base)
    assert tokenizer.chat_template is not None
    other.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    messages, tools = EpisodeSampler(Calculator, "", other).prompt(prompt("what"))
    assert tools == Calculator.tools and [m["role"] for m in messages] == ["user"]


def test_an_environment_may_begin_the_conversation(tokenizer) -> None:
    class Guess(Quiz):
        def reset(self, row):
            return [{"role": "user", "content": f"guess {row['n']}"}]

    messages, _ = EpisodeSampler(Guess, "", tokenizer).prompt(prompt("what", n=3))
    assert messages == [{"role": "user", "content": "guess 3"}]


# ---- episodes


class ScriptedEngine:
    """Answers with the texts of a script, each with the end token, or cut as the engine cuts."""

    def __init__(self, tokenizer, turns: list[str]):
        self.tokenizer, self.turns, self.requests = tokenizer, list(turns), []

    def generate(self, requests: list[Request], on_piece=None) -> list[Completion]:
        return [self.answer(request) for request in requests]

    def answer(self, request: Request) -> Completion:
        self.requests.append(request)
        text = self.turns.pop(0)
        ids = self.tokenizer.encode(text)
        stopped = any(s in text for s in request.stop)
        ids = ids if stopped else [*ids, self.tokenizer.encode_reply(USER)[0]]
        reason = "stop" if len(ids) <= request.max_new_tokens else "length"
        ids = ids[: request.max_new_tokens]
        return Completion(ids, logprobs=[TokenLogprob(i, -1.0, []) for i in ids],
                          finish_reason=reason)  # fmt: skip


USER = {"role": "user", "content": "a"}


def play(tokenizer, policy, monkeypatch, turns, environment=Calculator, **options):
    engine = ScriptedEngine(tokenizer, turns)
    monkeypatch.setattr(episodes_module, "make_engine", lambda *args, **more: engine)
    sampler = EpisodeSampler(environment, "", tokenizer)
    policy.config.max_position_embeddings = 4096
    fake = SimpleNamespace(context_limit=4096, config=policy.config)
    options = {"max_turns": 4, "max_new_tokens": 1000, "seed": 7} | options
    (episode,) = sampler.sample(fake, [[1, 2, 3]], [prompt("what")], **options)
    mask = sampled_mask(episode)
    assert len(episode.logprobs) == int(mask.sum())
    assert [x.token for x in episode.logprobs] == torch.tensor(episode.token_ids)[mask].tolist()
    assert len(episode.token_ids) <= options["max_new_tokens"] and mask[0] and mask[-1]
    return episode, engine


def test_a_call_and_the_answer(tokenizer, policy, monkeypatch) -> None:
    episode, engine = play(tokenizer, policy, monkeypatch, [CALL, "it is 408"])
    assert tokenizer.decode(episode.token_ids, special=True) == (
        f"{CALL}<|im_end|>\n<|im_start|>tool\n408<|im_end|>\n<|im_start|>assistant\n"
        "it is 408<|im_end|>"
    )
    ids = torch.tensor(episode.token_ids)
    observation = ids[~sampled_mask(episode)].tolist()
    assert observation == tokenizer.encode_reply({"role": "tool", "content": "408"})
    assert (episode.text, episode.finish_reason) == ("it is 408", "stop")
    assert episode.transcript == f"{CALL}\n[tool] 408\n[assistant] it is 408"
    first, second = engine.requests
    calls = len(tokenizer.encode(CALL)) + len(observation)
    assert second.prompt == [*first.prompt, *episode.token_ids[:calls]]  # a prefix, never changed
    assert second.max_new_tokens == first.max_new_tokens - calls == 1000 - calls
    assert first.seed == 7 != second.seed and first.sampling == Sampling(1.0)
    (back,) = completions_from_tensors(completions_to_tensors([episode]))
    assert isinstance(back, Episode) and back.token_ids == episode.token_ids
    assert back.observation_indices == episode.observation_indices and back.is_stopped


def test_the_budget_of_turns(tokenizer, policy, monkeypatch) -> None:
    episode, engine = play(tokenizer, policy, monkeypatch, [CALL] * 9, max_turns=3)
    assert len(engine.requests) == 3 and len(engine.turns) == 6
    assert episode.finish_reason == "length" and episode.text == CALL
    text = tokenizer.decode(episode.token_ids)
    assert text.count("408") == 2 and text.endswith("</tool_call>")


def test_the_budget_of_tokens(tokenizer, policy, monkeypatch) -> None:
    """It counts observations. One that leaves no token is dropped."""
    call = len(tokenizer.encode(CALL))
    reply = len(tokenizer.encode_reply({"role": "tool", "content": "408"}))
    for budget, sampled, turns in (
        (call - 1, call - 1, 1),
        (call, call, 1),
        (call + reply, call, 1),
        (call + reply + 1, call + 1, 2),
        (call + reply + 2, call + 2, 2),
    ):
        episode, engine = play(tokenizer, policy, monkeypatch, [CALL, "it is 408"],
                               max_new_tokens=budget)  # fmt: skip
        assert episode.finish_reason == "length"
        assert int(sampled_mask(episode).sum()) == sampled
        assert len(engine.requests) == turns


def test_errors_of_an_environment_name_the_row(tokenizer, policy, monkeypatch) -> None:
    def step(self, text):
        raise KeyError("board")

    for changes, message in (
        ({"step": step}, "row what: the environment failed: KeyError: 'board'"),
        ({"step": lambda self, text: 3}, "row what: expected a text or None .* got int"),
    ):
        broken = type("Broken", (Quiz,), changes)
        with pytest.raises(InputError, match=message):
            play(tokenizer, policy, monkeypatch, ["x"], broken)


def sample(policy, tokenizer, prompts, seed=5, **options):
    sampler = EpisodeSampler(Quiz, "", tokenizer)
    rows = [prompt(str(ids)) for ids in prompts]
    options = {"max_turns": 4, "max_new_tokens": 60} | options
    return sampler.sample(policy, prompts, rows, seed=seed, stop_ids=tokenizer.stop_ids, **options)


PROMPTS = [[5, 6, 7], [9, 8], [5, 6, 7], [30, 31, 32, 33]] * 2


def test_episodes_of_a_model(policy, tokenizer) -> None:
    """The first turn is that of a completion; an episode does not depend on its batch."""
    together = sample(policy, tokenizer, PROMPTS)
    plain = sample_completions(
        policy, PROMPTS, max_new_tokens=60, seed=5, stop_ids=tokenizer.stop_ids
    )
    for episode, completion in zip(together, plain, strict=True):
        first = episode.observation_indices[0] if episode.observation_indices else 0
        assert episode.token_ids[:first] == completion.token_ids[:first]
    turns = {len(e.observation_indices) for e in together}
    assert len(turns) > 1 and max(turns) > 10
    for other in (
        sample(policy, tokenizer, PROMPTS, max_num_seqs=1),
        sample(policy, tokenizer, PROMPTS[:3]) + sample(policy, tokenizer, PROMPTS[3:], seed=8),
    ):
        assert [e.token_ids for e in other] == [e.token_ids for e in together]
        assert [e.reward for e in other] == [e.reward for e in together]
    assert sample(policy, tokenizer, []) == []


# ---- training


RULES = RolloutOptions(
    max_new_tokens=60, prompts_per_round=3, num_generations=4, batch_size=5, decode_batch_size=12,
    beta=0.1, max_turns=3,
)  # fmt: skip


def score(indices, completions) -> list[float]:
    return [c.reward + c.token_ids.count(40) for c in completions]


def objective(kind: str, policy, tokenizer, **changes):
    rows = [prompt(str(i)) for i in range(3)]
    args = (policy, None, PROMPTS[1:4], [], score)
    more = {
        "base": "", "stop_ids": tokenizer.stop_ids, "prompt_rows": rows,
        "episodes": EpisodeSampler(Quiz, "quiz", tokenizer),
    }  # fmt: skip
    settings = asdict(replace(RULES, **changes))
    args = (policy, CausalLM(policy.config, seed=1), *args[2:])
    if kind == "ppo":
        value_model = build_value_model(policy)
        return PPOObjective(*args, PPOOptions(**settings), value_model=value_model, **more)
    return GRPOObjective(*args, GRPOOptions(**settings, loss_type=kind), **more)


KINDS = ("ppo", "dapo", "grpo", "dr_grpo", "gspo", "rloo")


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learnt_from_observations(kind, policy, tokenizer) -> None:
    """Observations are no targets, and what the columns have there changes no gradient; the
    log-probabilities of the sampled tokens are those of the complete sequence.
    """
    game = objective(kind, policy, tokenizer)
    batches = game.next_batches(3)
    assert game.round_metrics["turns"] > 1.5 and game.round_metrics["mismatch"] < 1e-4
    assert all(isinstance(c, Episode) for c in game.completions)

    def gradients() -> list[torch.Tensor]:
        game.trained.zero_grad()
        total = sum(game.num_items(batch) for batch in batches)
        for batch in batches:
            game.loss(batch, total).backward()
        return [p.grad.clone() for p in game.trained.parameters() if p.grad is not None]

    expected, count = gradients(), 0
    assert any(g.abs().max() > 0 for g in expected)
    for batch in batches:
        mask = batch.packed.mask
        inside = ~mask & (mask.flip(1).cumsum(1).flip(1) > 0)  # a sampled token follows
        count += int(inside.sum())
        for name, column in batch.columns.items():
            if column.dtype != torch.bool:
                column[inside] = float("nan")
            else:
                assert not column[inside].any(), name
    assert count == sum(len(c.observation_indices) for c in game.completions)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients(), strict=True))
    for batch in batches:  # the labels have no observation
        assert int((batch.packed.labels >= 0).sum()) == int(batch.packed.mask.sum())

    for i, completion in enumerate(game.completions):
        start = game.prompts[game.prompt_indices[i]]
        ids = torch.tensor([[*start, *completion.token_ids]])
        with torch.no_grad():
            logp = policy(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        logp = torch.where(sampled_mask(completion), logp[len(start) - 1 :], 0.0)
        got = game.columns["old_logp"][i]
        torch.testing.assert_close(got[: len(logp)], logp, rtol=1e-4, atol=1e-4)
        assert not got[len(logp) :].any()


def test_the_gradient_is_that_of_the_sampled_tokens(policy, tokenizer) -> None:
    """Dr. GRPO's gradient in a first step, by hand: minus the sum of advantage and slope."""
    game = objective("dr_grpo", policy, tokenizer, beta=0.0, batch_size=12)
    (batch,) = game.next_batches(1)
    game.loss(batch, game.num_items(batch)).backward()
    got = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    scores = torch.tensor(score([], sample_again(game)))
    advantages = scores.view(3, 4) - scores.view(3, 4).mean(1, keepdim=True)
    for i, (completion, advantage) in enumerate(zip(game.completions, advantages.flatten())):
        start = game.prompts[game.prompt_indices[i]]
        ids = torch.tensor([[*start, *completion.token_ids]])
        logp = policy(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        logp = logp[len(start) - 1 :][sampled_mask(completion)]
        (-advantage * logp.sum() / (12 * 60)).backward()
    for a, p in zip(got, policy.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_episodes_in_the_background(policy, tokenizer) -> None:
    """The rounds of a policy that does not change are the same as in the foreground."""
    rounds = []
    for is_async in (False, True):
        game = objective("dapo", policy, tokenizer, async_rollouts=is_async, batch_size=12)
        rounds.append([(game.next_batches(1), game.completions)[1] for _ in range(3)])
        assert game.round == 2 and (game.sampler.result() is None) != is_async
        game.close()
    assert rounds[0] == rounds[1] and rounds[0][0] != rounds[0][1]
    assert all(isinstance(c, Episode) for c in rounds[0][2])


def sample_again(game) -> list[Completion]:
    """The episodes of the round, with their rewards, which a round does not keep."""
    game.round, game.next_prompt = -1, 0
    scored: list[Completion] = []
    game.roll_out(lambda indices, completions: scored.extend(completions) or [0.0] * 12, 3)
    assert [c.token_ids for c in scored] == [c.token_ids for c in game.completions]
    return scored


# ---- stages

QUIZ = """
from fastlm.train.environments import Environment

class Quiz(Environment):
    stop = ("e", "a", "\\n")

    def __init__(self):
        self.count = 0

    def step(self, text):
        self.count += 1
        return None if self.count == 3 else "no"

    def reward(self):
        return self.count
"""


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS]
    return write(tmp_path / "prompts.jsonl", rows)


SMALL = {
    "prompts_per_round": 4, "num_generations": 2, "batch_size": 4, "max_new_tokens": 60,
    "max_steps": 6, "lr": 1e-3, "heldout": 0.2, "val_prompts": 3, "validations": 2,
    "sample_at": (1.0,), "sample_tokens": 6, "dtype": "float32", "save_steps": 8,
}  # fmt: skip


@pytest.mark.parametrize("is_async", [False, True])
def test_grpo_in_an_environment_continues_to_the_same_bits(is_async, base, data, tmp_path) -> None:
    (tmp_path / "quiz.py").write_text(QUIZ)
    settings = SMALL | {"sample_at": (0.0, 1.0), "sample_tokens": 60}
    quiz = f"{tmp_path}/quiz.py:Quiz"
    stage = GRPO(data=(data,), environment=quiz, async_rollouts=is_async, **settings)
    stage(tmp_path / "whole", model=base)

    def press(event):
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", model=base, on_event=press)
    stage(tmp_path / "cut", model=base)
    metrics = metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "cut") == metrics
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole")
    samples = [line["sample"] for line in metrics if "sample" in line]
    assert len(samples) == 2
    assert all("\n[user] no\n[assistant] " in sample for sample in samples), samples
    steps = [line for line in metrics if "loss" in line]
    assert max(line["turns"] for line in steps) > 1 and max(line["score"] for line in steps) > 0
    with pytest.raises(InputError, match="got another: environment was"):
        (tmp_path / "quiz.py").write_text(QUIZ + "\n")
        replace(stage, max_steps=9)(tmp_path / "whole", model=base)


def test_ppo_with_a_tool(base, data, tmp_path) -> None:
    settings = SMALL | {"max_steps": 2, "max_length": 3000, "beta": 0.1, "sample_prompt": "what"}
    wide = make_base(tmp_path / "model", max_position_embeddings=4096)
    stage = PPO(data=(data,), environment="calculator", reward_function="contains", **settings)
    result = stage(tmp_path / "out", model=wide)
    assert result["steps"] == 2 and result["prompt"] == "what"
    (line, _) = [line for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert line["turns"] == 1  # an untrained model calls nothing


LOOKUP = """
from fastlm.train.environments import Search

class Lookup(Search):
    stop = ("e", "a")

    def __init__(self):
        self.results = []

    def step(self, text):
        if len(self.results) == 2:
            return None
        call = '{"name": "search", "arguments": {"query": "what is a river"}}'
        self.results.append(super().step(f"{text}<tool_call>{call}</tool_call>"))
        return self.results[-1]

    def reward(self):
        return sum(result == "[a.txt] a river is water\\n[b.txt] a stone is hard"
                   for result in self.results)
"""


def test_grpo_with_a_corpus(data, tmp_path) -> None:
    """A class of the user's searches; the corpus is a part of what the training depends on."""
    (tmp_path / "lookup.py").write_text(LOOKUP)
    corpus = tmp_path / "notes"
    corpus.mkdir()
    (corpus / "a.txt").write_text("a river is water")
    (corpus / "b.txt").write_text("a stone is hard")
    stage = GRPO(
        data=(data,), environment=f"{tmp_path}/lookup.py:Lookup", search_corpus=(str(corpus),),
        **SMALL | {"max_steps": 2, "max_new_tokens": 200},
    )  # fmt: skip
    wide = make_base(tmp_path / "model", max_position_embeddings=4096)
    result = stage(tmp_path / "out", model=wide)
    assert result["steps"] == 2
    (line, _) = [line for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert line["turns"] > 1 and line["score"] > 0

    def digest() -> str:
        record = InputDigest(tmp_path / "sources.json", cache=tmp_path)
        return json.dumps(stage.digest_inputs(record))

    before = digest()
    (corpus / "b.txt").write_text("a stone is heavy")
    assert digest() != before
    with pytest.raises(InputError, match="got another: environment was"):
        replace(stage, max_steps=4)(tmp_path / "out", model=wide)
    (corpus / "a.txt").write_text("...")
    (corpus / "b.txt").write_text("...")
    with pytest.raises(InputError, match="search_corpus: expected documents with words, got none"):
        stage(tmp_path / "empty", model=wide)


def test_refused_corpora(base, data, tmp_path, monkeypatch) -> None:
    (tmp_path / "quiz.py").write_text(QUIZ)
    stage = GRPO(data=(data,), environment="search", reward_function="exact", **SMALL)
    notes = {"search_corpus": (data,)}
    for changes, message in (
        ({}, "search_corpus: expected at least one source for the environment search, got none"),
        (notes | {"environment": "calculator"}, "environment: expected search for .*got calculat"),
        (notes | {"environment": ""}, "environment: expected search for search_corpus, got none"),
        (notes | {"environment": f"{tmp_path}/quiz.py:Quiz"}, "environment: .*search.*got .*Quiz"),
        ({"search_corpus": (f"{tmp_path}/none",)}, "source .*none: expected a path"),
    ):
        with pytest.raises(InputError, match=message):
            replace(stage, **changes)(tmp_path / "out", model=base)
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(InputError, match="environment: expected the package bm25s"):
        replace(stage, **notes).check()


def test_refused(base, data, tmp_path) -> None:
    (tmp_path / "quiz.py").write_text(QUIZ.replace("def reward", "def other"))
    stage = GRPO(data=(data,), environment="calculator", **SMALL)
    quiz = f"{tmp_path}/quiz.py:Quiz"
    for changes, message in (
        ({}, "reward_function: expected a function, or a reward_model, got neither"),
        ({"environment": quiz}, "reward_function: .*, as the environment has no reward, got neit"),
        ({"max_turns": 1, "reward_function": "exact"}, "max_turns: expected 2 or more turns"),
        ({"max_turns": 0}, "max_turns: expected 1 or more"),
        ({"environment": "abacus", "reward_function": "exact"}, "environment: expected one of"),
    ):
        with pytest.raises(InputError, match=message):
            replace(stage, **changes)(tmp_path / "out", model=base)
