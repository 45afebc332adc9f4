"""The stages `ppo` and `grpo`: prompts, rewards, resuming, adapters, reports, what is refused."""

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from preference_models import WORDS, config, make_base, metrics_of, weights_of, write
from typer.testing import CliRunner

from fastlm.checkpoint.folder import load_tensors
from fastlm.cli import app
from fastlm.data.prompts import read_prompts
from fastlm.data.verifiers import (
    check_reward,
    constant_answer_score,
    contains,
    exact,
    last_number,
    load_reward,
    number,
)
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.model.lora import add_lora
from fastlm.model.quantized_modules import QuantizedLinear
from fastlm.model.reward_model import RewardModel
from fastlm.quant import quantize
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.charts import _series
from fastlm.train.encoding import hash_fraction
from fastlm.train.loop import TrainingInterrupted
from fastlm.train.objective import DivergedError
from fastlm.train.online_objectives import build_value_model
from fastlm.train.online_stage import GRPO, PPO, decode_text
from fastlm.train.rollouts import pack_rollouts

SMALL = {
    "data": ("x.jsonl",), "prompts_per_round": 4, "num_generations": 2, "batch_size": 4,
    "max_new_tokens": 6, "max_steps": 6, "lr": 1e-3, "heldout": 0.2, "val_prompts": 3,
    "validations": 2, "sample_at": (1.0,), "sample_tokens": 6, "dtype": "float32", "save_steps": 8,
}  # fmt: skip
_GRPO = GRPO(**SMALL, reward_function="contains")  # type: ignore[arg-type]
_PPO = PPO(**SMALL, num_iterations=2, beta=0.1)  # type: ignore[arg-type]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def reward_model(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    model = RewardModel.from_causal_lm(CausalLM.from_pretrained(base, dtype=torch.float32), seed=2)
    model.mean, model.std = 0.3, 2.0
    model.save_pretrained(folder)
    Tokenizer.load(base).save(folder)
    return folder


@pytest.fixture
def data(tmp_path) -> str:
    rows = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS]
    return write(tmp_path / "prompts.jsonl", rows)


# ---- stages


def test_grpo_continues_to_the_same_bits_and_reports(base, data, tmp_path) -> None:
    stage = replace(_GRPO, data=(data,))
    result = stage(tmp_path / "whole", model=base)
    assert (result["prompts"], result["heldout"], result["steps"]) == (len(WORDS) - 2, 2, 6)
    steps = [line for line in metrics_of(tmp_path / "whole") if "loss" in line]
    assert (
        steps[0]["kl"] == 0 and {"score", "length", "eos_fraction", "mismatch"} <= steps[0].keys()
    )
    assert [s["round"] for s in steps] == [0, 0, 1, 1, 2, 2]

    def press(event):
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", model=base, on_event=press)
    stage(tmp_path / "cut", model=base)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert weights_of(tmp_path / "cut") == weights_of(tmp_path / "whole") != weights_of(base.parent)
    answer = CausalLM.from_pretrained(tmp_path / "whole").generate([[1, 2]], max_new_tokens=2)
    assert len(answer[0]) in (3, 4)


def test_dapo_in_a_recipe(base, data, tmp_path) -> None:
    """Its options reach the objective; metrics of rounds and of steps are drawn."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "dapo"

[[stage]]
kind = "grpo"
from = "{base}"
data = ["{data}"]
reward_function = "contains"
clip_range = 1e-4
clip_range_high = 1e-3
dynamic_sampling = 2
overlong_tokens = 2
prompts_per_round = 4
num_generations = 2
num_iterations = 2
batch_size = 4
max_new_tokens = 6
max_steps = 8
lr = 1e-2
heldout = 0.2
sample_tokens = 0
validations = 1
dtype = "float32"
""")
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    metrics = metrics_of(tmp_path / "run" / "grpo")
    steps = [line for line in metrics if "loss" in line]
    assert all(4 <= line["prompts_drawn"] <= 12 for line in steps)
    assert max(line["prompts_drawn"] for line in steps) > 4
    for line in steps:
        total = line["clip_fraction_low"] + line["clip_fraction_high"]
        assert line["clip_fraction"] == pytest.approx(total, abs=1e-6)
    assert max(line["clip_fraction"] for line in steps) > 0
    assert _series(metrics, "informative_groups")[0] == [1, 5]  # two rounds of four steps
    assert _series(metrics, "clip_fraction_low")[0] == [*range(1, 9)]
    page = (tmp_path / "run" / "report.html").read_text()
    labels = ("share of groups whose scores differ", "prompts drawn per round")
    for label in (*labels, "entropy, nats per token", "share of tokens clipped from below"):
        assert label in page


def test_ppo_on_a_reward_model_in_a_recipe(base, reward_model, data, tmp_path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"""
name = "aligned"

[[stage]]
kind = "ppo"
from = "{base}"
reward_model = "{reward_model}"
data = ["{data}"]
value_model = "reward"
prompts_per_round = 4
batch_size = 4
max_new_tokens = 6
max_steps = 8
lr = 1e-3
missing_eos_penalty = -1.0
heldout = 0.2
sample_tokens = 4
dtype = "float32"
""")
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "PPO" in page and page.count('class="chart"') == 8
    assert "explained variance of the returns" in page
    assert "reward model" in page and "held-out score" in page
    assert "constant answer" not in page  # a reward model knows no right answer
    steps = [line for line in metrics_of(tmp_path / "run" / "ppo") if "loss" in line]
    assert {"value", "value_error", "explained_variance", "entropy"} <= steps[0].keys()


@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_are_trained_against_the_base(base, data, tmp_path, bits) -> None:
    stage = replace(_GRPO, data=(data,), lora_rank=4, base_bits=bits, base_group_size=16, beta=0.1)
    result = stage(tmp_path, model=base)
    assert result["trained_parameters"] < result["parameters"] / 2
    steps = [line for line in metrics_of(tmp_path) if "loss" in line]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)  # adapters begin as 0
    assert abs(steps[-1]["kl"]) > 0


def test_the_last_good_policy_is_kept(base, data, tmp_path) -> None:
    """The KL explodes in the second round: the model of the checkpoint before it is written."""
    stage = replace(_GRPO, data=(data,), max_kl=0.02, lr=1e-2, max_steps=60, save_steps=2)
    stage = replace(stage, warmup_ratio=1.0, validations=0, sample_at=())
    with pytest.raises(DivergedError, match=r"expected at most max_kl 0\.02; last good") as raised:
        stage(tmp_path, model=base)
    assert not (tmp_path / "model").exists()
    good, _ = load_tensors(raised.value.checkpoint)
    saved = CausalLM.from_pretrained(tmp_path / "last-good")
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, good[f"model.{name}"])


def test_the_policy_of_the_last_step_is_measured(base, data, tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(answer, row):\n    return len(answer)\n")
    stage = replace(
        _GRPO, data=(data,), reward_function=f"{file}:length", max_kl=0.02, lr=3e-2, max_steps=2
    )
    stage = replace(stage, warmup_ratio=0.0, validations=0, sample_at=())
    with pytest.raises(DivergedError, match=r"step 2: round 1: the KL .* max_kl 0\.02; last"):
        stage(tmp_path, model=base)
    assert not (tmp_path / "model").exists()


def test_another_reward_is_another_training(base, data, tmp_path) -> None:
    stage = replace(_GRPO, data=(data,), max_steps=2, sample_at=())
    stage(tmp_path / "out", model=base)
    more = replace(stage, max_steps=4)
    rows = [{"prompt": f"now {word}", "answer": word[0]} for word in WORDS]
    other = write(tmp_path / "other.jsonl", rows)
    for changed, differs in (
        (replace(more, reward_function="exact"), "scorer_identity was"),
        (replace(more, data=(other,)), "the rows of the data are not the same"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"with these options, got another: {differs}"):
            changed(tmp_path / "out", model=base)
    assert replace(more, max_kl=50.0, val_prompts=2)(tmp_path / "out", model=base)["steps"] == 4


def test_a_score_belongs_to_its_prompt(base, data, tmp_path) -> None:
    """The function sees the answer's own row: scores are the lengths of the rows' words."""
    file = tmp_path / "mine.py"
    file.write_text("def own(answer, row):\n    return len(row['prompt'])\n")
    stage = replace(_GRPO, data=(data,), reward_function=f"{file}:own", max_steps=1, heldout=0.0)
    stage = replace(stage, prompts_per_round=len(WORDS), validations=0, sample_at=(), save_steps=9)
    stage(tmp_path / "out", model=base)
    (line,) = [line for line in metrics_of(tmp_path / "out") if "loss" in line]
    expected = sum(len(f"what is {word}") for word in WORDS) / len(WORDS)
    assert line["score"] == pytest.approx(expected) and line["informative_groups"] == 0


def test_what_cannot_be_scored_is_named_by_its_row(base, reward_model, data, tmp_path) -> None:
    rows = [{"prompt": "what is tree", "answer": ""}, {"prompt": "what is bird", "answer": "b"}]
    file = write(tmp_path / "gold.jsonl", rows)
    stage = replace(_GRPO, data=(file,), heldout=0.0, validations=0, sample_at=(), max_steps=1)
    with pytest.raises(
        InputError, match=r"gold.jsonl, line 1: answer: expected the right answer, got"
    ):
        stage(tmp_path / "out", model=base)
    result = replace(stage, skip_bad=True)(tmp_path / "out", model=base)
    assert (result["prompts"], result["counts"]) == (1, {"without a right answer": 1})
    model = RewardModel.from_pretrained(reward_model)
    with torch.no_grad():
        model.head.weight.fill_(math.nan)
    model.save_pretrained(tmp_path / "nan")
    Tokenizer.load(base).save(tmp_path / "nan")
    with pytest.raises(
        InputError, match=r"prompts.jsonl, line \d+: expected a finite reward, got nan"
    ):
        replace(_PPO, data=(data,), validations=0, sample_at=())(
            tmp_path / "ppo", model=base, reward_model=tmp_path / "nan"
        )


def test_ids_beyond_the_tokenizer_have_no_text(base) -> None:
    tokenizer = Tokenizer.load(base)
    ids = tokenizer.encode("tree")
    assert decode_text(tokenizer, [*ids, 10_000, *ids]) == "tree\N{REPLACEMENT CHARACTER}tree"


def test_a_template_that_drops_tools_is_refused(base, tmp_path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    file = write(tmp_path / "tools.jsonl", [{"prompt": "what", "answer": "a", "tools": [tool]}])
    with pytest.raises(InputError, match=r"tools.jsonl, line 1: chat_template: .* tools"):
        replace(_GRPO, data=(file,), heldout=0.0)(tmp_path / "out", model=base)


def test_a_value_model_begins_as_the_reward_model(base, reward_model) -> None:
    policy = CausalLM.from_pretrained(base, dtype=torch.float32)
    scorer = RewardModel.from_pretrained(reward_model)
    packed = pack_rollouts([[5, 6], [7]], [[8, 9, 10], [11]], torch.device("cpu"))
    value = build_value_model(policy, reward=scorer)
    got = value.values(packed)
    # before its last token an answer is scored as a prompt with the tokens so far
    for row, column, sequence in ((0, 0, [5, 6]), (0, 2, [5, 6, 8, 9]), (1, 0, [7])):
        torch.testing.assert_close(got[row, column], scorer.score([sequence])[0])


# ---- prompts and rewards


@pytest.mark.parametrize("tied", [True, False])
def test_a_value_model_shares_what_is_frozen_and_has_no_head(tied) -> None:
    policy = CausalLM(config(64, 0, tie_word_embeddings=tied), seed=1)
    trunk_copy = build_value_model(policy).trunk
    assert trunk_copy is not None and not hasattr(trunk_copy, "lm_head")
    mine = {name: p for name, p in policy.named_parameters() if not name.startswith("lm_head")}
    theirs = dict(trunk_copy.named_parameters())
    assert mine.keys() == theirs.keys()
    assert not {p.data_ptr() for p in mine.values()} & {p.data_ptr() for p in theirs.values()}
    assert hasattr(policy, "lm_head") is not tied  # the policy keeps its own

    quantize(add_lora(policy, 2), "w4a16", group_size=16, embeddings=16, head=16)
    trunk = build_value_model(policy).trunk
    assert trunk is not None
    tensors = {name: t.data_ptr() for name, t in named_tensors(trunk)}
    for name, tensor in named_tensors(policy):
        if not name.startswith("lm_head"):
            trained = name.endswith((".lora_A", ".lora_B"))
            assert (tensors.pop(name) != tensor.data_ptr()) == trained, name
    assert not tensors
    ids = torch.tensor([[5, 9, 2, 33]])
    assert torch.equal(trunk.hidden(ids), policy.hidden(ids))


def named_tensors(model: CausalLM) -> list[tuple[str, torch.Tensor]]:
    weights = list(model.named_parameters())
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            weights += [(f"{name}.{key}", t) for key, t in module.named_buffers(recurse=False)]
    return weights


def test_ppo_with_adapters_continues_to_the_same_bits(base, data, tmp_path) -> None:
    """Policy and value model train adapters of their own on one frozen base."""
    stage = replace(_PPO, data=(data,), reward_function="contains", lora_rank=4, merge=False)
    result = stage(tmp_path / "whole", model=base)
    policy = sum(p.numel() for p in add_lora(CausalLM.from_pretrained(base), 4).parameters())
    assert result["trained_parameters"] < policy

    def press(event) -> None:
        if event.get("step") == 3 and "loss" in event:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(TrainingInterrupted):
        stage(tmp_path / "cut", model=base, on_event=press)
    saved = load_tensors(next((tmp_path / "cut" / "checkpoints").glob("step-*")))[0]
    names = {name for name in saved if name.startswith("model.")}
    assert all(".lora_" in name or ".head." in name for name in names) and len(names) > 4
    assert {name.split(".")[1] for name in names} == {"policy", "value"}
    stage(tmp_path / "cut", model=base)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    file = "model/adapter_model.safetensors"
    assert (tmp_path / "cut" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_prompts(tmp_path) -> None:
    prompts = {"role": "user", "content": "why?"}
    rows = [
        {"prompt": "why?"}, {"question": "why?", "answer": "so"}, {"prompt": [prompts]},
        {"messages": [prompts, {"role": "assistant", "content": "so"}]}, {"messages": [prompts]},
        {"instruction": "why?", "output": "so"}, {"prompt": "why?", "chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    file = write(tmp_path / "rows.jsonl", rows)
    actual = list(read_prompts((file,), cache=tmp_path))
    assert [prompt.messages for prompt in actual] == [[prompts]] * len(rows)
    assert [prompt.row for prompt in actual] == rows
    for row, message in (
        ({"prompt": "  "}, "line 1: prompt: expected text from the user, got an empty message"),
        ({"prompt": [prompts, prompts]}, "expected assistant after user, got user"),
        ({"text": "x"}, "expected an object with a prompt or messages, got 'text'"),
    ):
        with pytest.raises(InputError, match=message):
            list(read_prompts((write(tmp_path / "bad.jsonl", [row]),), cache=tmp_path))


def test_the_score_of_a_constant_answer() -> None:
    rows = [{"answer": answer} for answer in ("1", "3", " x", "so it is 1", "1.0", "X", "x\n")]
    numbers = [row for row in rows if last_number(row["answer"]) is not None]
    assert constant_answer_score("number", numbers) == 3 / 4
    assert constant_answer_score("exact", rows) == 3 / 7
    # an answer may contain several right ones; other functions compare with none
    assert constant_answer_score("contains", rows) is None
    assert constant_answer_score("", rows) is constant_answer_score("exact", []) is None


def test_the_error_of_the_held_out_score_counts_a_prompt_once(base, tmp_path) -> None:
    rows = [{"prompt": f"what is {word}", "answer": word[0]} for word in WORDS]
    data = write(tmp_path / "prompts.jsonl", [*rows, *rows, *rows])
    stage = replace(_GRPO, data=(data,), reward_function="exact", max_steps=2, sample_at=())
    result = stage(tmp_path / "out", model=base)
    assert (result["prompts"], result["heldout"]) == (3 * (len(WORDS) - 2), 2)
    prompts = read_prompts((data,), cache=tmp_path)
    letters = [p.row["answer"] for p in prompts if hash_fraction(p) >= stage.heldout]
    expected = max(map(letters.count, letters)) / len(letters)
    assert result["constant_answer_score"] == expected > 1 / len(WORDS)
    ctx: Any = SimpleNamespace(out=tmp_path / "out", inputs={})
    ((_, card),) = stage.section(ctx, result, metrics_of(ctx.out)).cards
    assert f"{expected:.3f} for a constant answer" in card
    _, figures = stage.summary_parts(result, ctx)
    assert f"(a constant answer: {expected:.3f})" in figures[0]


def test_verifiers() -> None:
    assert last_number("It is 1,234.50, I think: \N{MINUS SIGN}7.") == -7
    assert last_number("none") is None
    assert number("so 6 + 6 = 12", {"answer": "#### 12.0"}) == 1
    assert number("13", {"answer": 12}) == 0 and number("", {"solution": "1"}) == 0
    assert exact(" Paris\n", {"answer": "paris"}) == 1 and exact("Paris.", {"answer": "Paris"}) == 0
    assert contains("It is Paris.", {"target": "paris"}) == 1
    with pytest.raises(InputError, match="expected a right answer under one of answer"):
        exact("x", {"prompt": "y"})
    with pytest.raises(InputError, match="expected a number in the right answer, got 'x'"):
        number("1", {"answer": "x"})
    for value in (math.nan, math.inf, None, "x"):
        with pytest.raises(InputError, match="row 3: expected a finite reward"):
            check_reward(value, "row 3")
    assert check_reward(True, "") == 1.0


def test_a_reward_of_ones_own(base, data, tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def length(answer, row):\n    return len(answer) / len(row['prompt'])\n"
                    "def bad(answer, row):\n    return row['nothing']\nx = 1\n")  # fmt: skip
    assert load_reward(f"{file}:length")("ab", {"prompt": "abcd"}) == 0.5
    assert load_reward("math:dist")([0], [1]) == 1  # type: ignore[arg-type]
    for name, message in (
        ("nice", "expected one of exact, contains, number, reasoning-gym, file.py:function or"),
        (f"{file}:x", "expected a function x in"),
        (f"{tmp_path}/none.py:f", "expected a file, got none at"),
        ("no.such.module:f", "expected a module that can be imported, got ModuleNotFoundError"),
    ):
        with pytest.raises(InputError, match=f"reward_function: {message}"):
            load_reward(name)
    stage = replace(_GRPO, data=(data,), reward_function=f"{file}:bad", heldout=0.0, sample_at=())
    with pytest.raises(InputError, match=r"prompts.jsonl, line \d+: the reward function failed: K"):
        stage(tmp_path / "out", model=base)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (replace(_GRPO, num_generations=1), "num_generations: expected 2 or more to compare"),
        (
            replace(_GRPO, loss_type="bnpo"),
            "loss_type: expected one of dapo, grpo, dr_grpo, gspo, rloo",
        ),
        (replace(_GRPO, clip_range_high=0.0), "clip_range_high: expected a positive number, got 0"),
        (replace(_PPO, clip_range_high=-1.0), "clip_range_high: expected a positive number, got -"),
        (replace(_GRPO, dynamic_sampling=-1), "dynamic_sampling: expected 0 or more, got -1"),
        (replace(_GRPO, overlong_tokens=-1), "overlong_tokens: expected 0 or more, got -1"),
        (replace(_GRPO, overlong_tokens=7), "overlong_tokens: expected at most max_new_tokens 6"),
        (replace(_GRPO, temperature=0.0), "temperature: expected a positive number, got 0.0"),
        (replace(_GRPO, num_iterations=9), "save_steps: expected at least the 18 steps of a round"),
        (replace(_GRPO, save_total_limit=1), "save_total_limit: expected 2 or more"),
        (replace(_GRPO, kl_target=1.0), "kl_target: expected a beta above 0 to adapt, got 0"),
        (replace(_PPO, kl_target=1.0, kl_horizon=2.0), "kl_horizon: expected at least the 8"),
        (replace(_GRPO, batch_warmup=0.5), "batch_warmup: expected 0, as a round has a fixed"),
        (replace(_GRPO, lora_rank=2, optimizer="muon"), "optimizer: expected adamw to train"),
        (replace(_GRPO, lora_alpha=8.0), "lora_alpha: needs lora_rank above 0"),
        (replace(_GRPO, beta=-1.0), "beta: expected 0 or more, got -1.0"),
        (replace(_GRPO, lora_rank=2, lora_dropout=0.1), "lora_dropout: expected 0, as the update"),
        (replace(_GRPO, val_tokens=99), "val_tokens: grpo has no use for it, got 99"),
        (replace(_GRPO, missing_eos_penalty=math.inf), "missing_eos_penalty: expected a finite"),
        (replace(_GRPO, truncation="truncate"), "truncation: expected one of skip, got 'truncate'"),
        (replace(_GRPO, data=()), "data: expected at least one source of prompts, got none"),
        (replace(_PPO, value_model="none"), "value_model: expected one of copy, shared"),
        (replace(_PPO, kl_estimator="k4"), "kl_estimator: expected one of k1, k2, k3, got 'k4'"),
        (replace(_PPO, critic_warmup=-1), "critic_warmup: expected 0 or more, got -1"),
        (replace(_PPO, critic_warmup=2), "critic_warmup: expected rounds of fewer than the 6"),
        (replace(_PPO, lam=1.5), "lam: expected 0 to 1, got 1.5"),
        (replace(_PPO, dual_clip=1.0), "dual_clip: expected a number above 1, got 1.0"),
        (_PPO, "reward_function: expected a function, or a reward_model, got neither"),
        (
            replace(_PPO, reward_function="exact", value_model="reward"),
            "value_model: expected a reward_model to begin",
        ),
        (replace(_GRPO, max_length=8), "data: expected prompts to answer, got none in 14 rows"),
    ],
)  # fmt: skip
def test_refused(base, data, tmp_path, stage, message) -> None:
    if stage.data:
        stage = replace(stage, data=(data,))
    with pytest.raises(InputError, match=message):
        stage(tmp_path / "out", model=base)


def test_a_reward_model_of_other_tokens_is_refused(base, data, tmp_path) -> None:
    folder = tmp_path / "other"
    tokenizer = Tokenizer.train(
        ["quite another text about other things, again and again " * 9], 300
    )
    model = RewardModel(config(tokenizer.vocab_size, 0), seed=1)
    model.save_pretrained(folder)
    tokenizer.save(folder)
    with pytest.raises(
        InputError,
        match=r"expected the vocabulary of the trained model, in which token \d+ is b",
    ):
        replace(_PPO, data=(data,))(tmp_path / "out", model=base, reward_model=folder)
