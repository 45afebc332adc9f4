"""Compare SFT, KTO, SimPO, ORPO, GRPO and RLOO with TRL's trainers on the same tokens, scores and
weights: loss and gradient are TRL's, in other micro-batches. DPO: test_dpo.py, PPO:
test_trl_ppo.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preference_models import example, make_base, polite_pairs

from fastlm.inference.requests import Completion, TokenLogprob
from fastlm.model.causal_lm import CausalLM
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train import online_objectives
from fastlm.train.dpo_objective import DPOObjective
from fastlm.train.losses import grpo_loss, overlong_penalty
from fastlm.train.objective import Example
from fastlm.train.online import MAX_IMPORTANCE_WEIGHT
from fastlm.train.online_objectives import GRPOObjective
from fastlm.train.options import GRPOOptions, TrainOptions
from fastlm.train.preference_stage import DPOOptions, PreferenceExample
from fastlm.train.sft import SFTObjective

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

ARGUMENTS = {
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no",
    "per_device_train_batch_size": 6,
}  # fmt: skip
ONCE = TrainOptions(max_steps=1)
COMMON: dict[str, Any] = {
    "seed": 0, "base": "", "tokenizer": None, "prompt": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base") / "model")


def loaded(base: Path):
    """Model and tokenizer of transformers."""
    import transformers

    words = transformers.AutoTokenizer.from_pretrained(base)
    words.pad_token = words.pad_token or words.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), words


def move(model, scale: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))


def copied(model: CausalLM, theirs) -> None:
    model.load_state_dict(theirs.state_dict(), strict=False)


def step(trained) -> float:
    """The loss of a step, whose gradient is left in the parameters."""
    batches = trained.next_batches(9)
    assert len(batches) > 1  # TRL has one
    count = sum(map(trained.num_items, batches))
    total = 0.0
    for batch in batches:
        loss = trained.loss(batch, count)
        loss.backward()
        total += float(loss.detach())
    return total


def apart(model: CausalLM, theirs) -> float:
    """The largest difference of gradients, relative to the largest gradient of the parameter."""
    reference = dict(theirs.named_parameters())
    actual = 0.0
    for name, parameter in model.named_parameters():
        expected = reference[name].grad
        assert parameter.grad is not None and expected.abs().max() > 1e-6
        difference = (parameter.grad - expected).abs().max() / expected.abs().max()
        actual = max(actual, float(difference))
    return actual


TURNS = [
    {"role": "system", "content": "please"},
    {"role": "user", "content": "what is tree"},
    {"role": "assistant", "content": "bird road"},
    {"role": "user", "content": "now stone"},
    {"role": "assistant", "content": "lamp lamp boat"},
]
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_sft_on_the_assistants_tokens(base, tmp_path) -> None:
    """The same tokens have a loss, and the loss and the gradient are the same."""
    import datasets
    import trl

    conversations = [TURNS, TURNS[1:3], [TURNS[1], TURNS[4]], TURNS[:3]]
    theirs, words = loaded(base)
    words.chat_template = MARKED
    arguments = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, max_length=None, **ARGUMENTS)
    trainer = trl.SFTTrainer(
        theirs, arguments, processing_class=words,
        train_dataset=datasets.Dataset.from_list([{"messages": c} for c in conversations]),
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    tokenizer = Tokenizer.load(base)
    examples = []
    for conversation, ids, labels in zip(conversations, batch["input_ids"], batch["labels"]):
        ((tokens, mask),) = tokenizer.encode_conversation(conversation)
        assert tokens == ids[: len(tokens)].tolist()
        assert (
            mask == (labels[: len(tokens)] != -100).tolist()
            and (labels[len(tokens) :] == -100).all()
        )
        examples.append(Example(np.array(tokens, np.int32), np.array(mask)))
    model = CausalLM.from_pretrained(base, dtype=torch.float32)
    actual = step(SFTObjective(model, examples, [], ONCE, batch_size=3, **COMMON))
    assert actual == pytest.approx(float(loss.detach()), rel=1e-5)
    assert apart(model, theirs) < 1e-4


def test_kto(base, tmp_path) -> None:
    import datasets
    import trl

    terms = DPOOptions(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"] + " now" * i,
         "label": i % 3 > 0}
        for i, row in enumerate(polite_pairs(6))
    ]  # fmt: skip
    theirs, words = loaded(base)
    arguments = trl.KTOConfig(
        str(tmp_path), beta=terms.beta, desirable_weight=terms.desirable_weight,
        undesirable_weight=terms.undesirable_weight, disable_dropout=True, **ARGUMENTS,
    )  # fmt: skip
    trainer = trl.KTOTrainer(
        theirs, loaded(base)[0], arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
    )  # fmt: skip
    move(theirs, 0.05, 7)
    features = list(trainer.train_dataset)
    loss = trainer.compute_loss(theirs, trainer.data_collator(features))
    loss.backward()
    examples = [
        PreferenceExample(
            tuple(
                example(row["prompt_ids"] + row[side], len(row["prompt_ids"]))
                for side in ("completion_ids", "KL_completion_ids")
            ),
            desirable=row["label"],
        )
        for row in features
    ]
    model = CausalLM.from_pretrained(base, dtype=torch.float32)
    trained = DPOObjective(model, examples, [], ONCE, terms, batch_size=4, **COMMON)
    trained.measure_reference(torch.float32)
    copied(model, theirs)
    actual = step(trained)
    assert actual == pytest.approx(float(loss.detach()), rel=1e-5)
    assert trained.scalars([trained.measurements()])["kl"] > 0.01  # the reference point takes part
    assert apart(model, theirs) < 1e-4


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference(base, tmp_path, monkeypatch, name) -> None:
    """TRL's CPOTrainer with loss_type simpo, and its ORPOTrainer, on its own padded batch."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import datasets
    from trl.experimental import cpo, orpo

    rows = [{**row, "rejected": row["rejected"] + " now" * i} for i, row in
            enumerate(polite_pairs(6))]  # fmt: skip
    theirs, words = loaded(base)
    terms = DPOOptions(loss_type="orpo", beta=0.4)
    configuration, trainer_class = orpo.ORPOConfig, orpo.ORPOTrainer
    options: dict[str, Any] = {"beta": terms.beta, "disable_dropout": True}
    if name == "simpo":
        terms = DPOOptions(loss_type="simpo", beta=2.0, simpo_gamma=0.8, label_smoothing=0.1)
        configuration, trainer_class = cpo.CPOConfig, cpo.CPOTrainer
        options = {
            "loss_type": "simpo", "cpo_alpha": 0.0, "beta": terms.beta,
            "simpo_gamma": terms.simpo_gamma, "label_smoothing": terms.label_smoothing,
            "disable_dropout": True,
        }  # fmt: skip
    trainer = trainer_class(
        theirs, configuration(str(tmp_path), **options, **ARGUMENTS), processing_class=words,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    move(theirs, 0.05, 7)
    batch = trainer.data_collator(list(trainer.train_dataset))
    if name == "simpo":
        loss = trainer.compute_loss(theirs, batch)
    else:  # the paper's loss is of the answer; TRL's nll also counts the prompt
        chosen, rejected = trainer.concatenated_forward(theirs, batch)[:2]
        loss = -chosen.mean() - trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    loss.backward()
    examples = [
        PreferenceExample(tuple(
            Example(batch[f"{side}_input_ids"][i][there].numpy().astype(np.int32),
                    (batch[f"{side}_labels"][i][there] != -100).numpy())
            for side in ("chosen", "rejected")
            for there in [batch[f"{side}_attention_mask"][i].bool()]
        ))
        for i in range(6)
    ]  # fmt: skip
    model = CausalLM.from_pretrained(base, dtype=torch.float32)
    trained = DPOObjective(model, examples, [], ONCE, terms, batch_size=4, **COMMON)
    trained.measure_reference(torch.float32)
    copied(model, theirs)
    assert step(trained) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert apart(model, theirs) < 1e-4


# ---- GRPO and RLOO

LONGEST, GROUP = 6, 3
PROMPTS = ["what is tree", "now stone"]
SCORES = [1.0, 0.0, 0.5, -1.0, 2.0, 0.25]


def completions(end: int) -> list[list[int]]:
    """Three to each prompt, of other lengths, one without an end."""
    draw = torch.Generator().manual_seed(3)
    rows = [
        [*torch.randint(5, 250, (n,), generator=draw).tolist(), end] for n in (2, 4, 1, 5, 3, 2)
    ]
    rows[1] = [*rows[1][:-1], 17, 18]
    return rows


def rollouts_of_trl(kind, configuration, base, tmp_path, epsilon=0.2, **options):
    """TRL's trainer with a policy that has left the reference, and its batch of the completions."""
    import datasets

    theirs, words = loaded(base)
    end = words.eos_token_id
    answers = completions(end)
    scored = {tuple(answer): score for answer, score in zip(answers, SCORES)}

    def reward(completion_ids, **rest):
        del rest
        return [scored[tuple(ids)] for ids in completion_ids]

    arguments = configuration(
        str(tmp_path), num_generations=GROUP, max_completion_length=LONGEST, num_iterations=2,
        epsilon=epsilon, disable_dropout=True, **ARGUMENTS, **options,
    )  # fmt: skip
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    trainer = kind(
        theirs, reward, args=arguments, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=words,
    )  # fmt: skip
    move(theirs, 0.02, 5)
    single_result = "RLOO" in kind.__name__
    trainer._generate_single_turn = lambda *args: answers if single_result else (answers, None)
    trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
    theirs.train()
    batch = trainer._generate_and_score_completions([row for row in rows for _ in range(GROUP)])
    prompts = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"])
    ]
    return trainer, theirs, batch, prompts[::GROUP]


def rollouts_of_fastlm(base, theirs, prompts_of_trl, end: int, **group) -> GRPOObjective:
    """The objective on the same completions and scores, its round measured with TRL's weights."""
    completions_by_prompt = completions(end)
    beta, sampled = group.pop("beta"), group.pop("sampled", 0.0)
    scored = {tuple(answer): score for answer, score in zip(completions_by_prompt, SCORES)}

    def score(places: Sequence[int], answers: Sequence[Completion]) -> list[float]:
        del places
        return [scored[tuple(answer.token_ids)] for answer in answers]

    class Given(GRPOObjective):
        """Takes the known completions for its samples."""

        def _sample(self, prompts, temperature, longest, seed=0, rows=()) -> list[Completion]:
            assert (temperature, longest) == (1.0, LONGEST)
            places = [
                prompts_of_trl.index(prompt) * GROUP + i % GROUP for i, prompt in enumerate(prompts)
            ]
            used = [completions_by_prompt[index] for index in places]
            return [
                Completion(
                    tokens, logprobs=[TokenLogprob(token, sampled, []) for token in tokens],
                    finish_reason="stop" if tokens[-1] == end else "length",
                )
                for tokens in used
            ]  # fmt: skip

    policy = CausalLM.from_pretrained(base, dtype=torch.float32)
    reference = CausalLM.from_pretrained(base, dtype=torch.float32)
    options = GRPOOptions(
        max_new_tokens=LONGEST, prompts_per_round=2, num_generations=GROUP, batch_size=4, beta=beta,
        # the log-probabilities of sampling are made up
        mismatch_threshold=0.0 if sampled else float("inf"), **group,
    )  # fmt: skip
    copied(policy, theirs)
    trained = Given(policy, reference, prompts_of_trl, [], score, options, base="")
    trained.sample_round()
    return trained


def same_advantages(trained: GRPOObjective, batch, prompts) -> None:
    order = [prompts.index(trained.prompts[i]) for i in trained.prompt_indices[::GROUP]]
    expected = batch["advantages"].view(2, GROUP)[order].flatten()
    torch.testing.assert_close(trained.columns["advantages"][:, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.2])
@pytest.mark.parametrize(
    "theirs_type, ours_type, scale",
    [("grpo", "grpo", "group"), ("dapo", "dapo", "group"), ("bnpo", "dapo", "group"),
     ("dr_grpo", "dr_grpo", "none"), ("grpo", "gspo", "group")],
)  # fmt: skip
@pytest.mark.parametrize("high", [None, 0.28])
def test_grpo(base, tmp_path, monkeypatch, theirs_type, ours_type, scale, beta, high) -> None:
    """Advantages, loss and gradient, with k3 as it is published. GSPO is TRL's GRPO with
    sequence-level ratios.
    """
    import trl

    low = 0.02 if ours_type == "gspo" else 0.2  # a mean over tokens changes less
    high = high and high * low / 0.2
    trainer, theirs, batch, prompts = rollouts_of_trl(
        trl.GRPOTrainer, trl.GRPOConfig, base, tmp_path, beta=beta, loss_type=theirs_type,
        scale_rewards=scale, use_bias_correction_kl=False, epsilon=low, epsilon_high=high,
        importance_sampling_level="sequence" if ours_type == "gspo" else "token",
    )  # fmt: skip
    end = trainer.processing_class.eos_token_id
    trained = rollouts_of_fastlm(
        base, theirs, prompts, end, loss_type=ours_type, beta=beta, clip_range=low,
        clip_range_high=high,
    )  # fmt: skip
    same_advantages(trained, batch, prompts)
    move(theirs, 0.02, 6)
    copied(trained.policy, theirs)
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    monkeypatch.setattr(online_objectives, "grpo_loss", partial(grpo_loss, kl_gradient="k3"))
    assert step(trained) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    metrics = trained.scalars([trained.measurements()])
    assert 0 < metrics["clip_fraction"] < 1
    if ours_type != "gspo":  # TRL counts sequences there, not tokens
        for side in ("low", "high"):
            (share,) = trainer._metrics["train"][f"clip_ratio/{side}_mean"]
            assert metrics[f"clip_fraction_{side}"] == pytest.approx(share, abs=1e-6)
    assert apart(trained.policy, theirs) < 1e-4


@pytest.mark.parametrize("kind", ["dapo", "gspo"])
def test_importance_weights_of_sampling(base, tmp_path, monkeypatch, kind) -> None:
    """They multiply the policy's loss and not the KL: in TRL those of vLLM's log-probabilities."""
    import trl

    level, loss_type = ("token", "dapo") if kind == "dapo" else ("sequence", "grpo")
    trainer, theirs, batch, prompts = rollouts_of_trl(
        trl.GRPOTrainer, trl.GRPOConfig, base, tmp_path, beta=0.2, loss_type=loss_type,
        use_bias_correction_kl=False, importance_sampling_level=level,
    )  # fmt: skip
    old, mask = batch["old_per_token_logps"], batch["completion_mask"]
    sampled = float((old * mask).sum() / mask.sum()) - 0.7  # weights near 2
    difference = (old - sampled) * mask
    if kind == "gspo":
        difference = difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    weights = difference.exp().clamp(max=MAX_IMPORTANCE_WEIGHT)
    batch["importance_sampling_ratio"] = weights
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    end = trainer.processing_class.eos_token_id
    trained = rollouts_of_fastlm(
        base, theirs, prompts, end, loss_type=kind, beta=0.2, sampled=sampled
    )
    used = weights[mask.bool()] if kind == "dapo" else weights
    is_truncated = used == MAX_IMPORTANCE_WEIGHT
    assert 0 < is_truncated.sum() < used.numel()
    expected = {"importance_weight": used, "importance_truncated": is_truncated.float()}
    for name, values in expected.items():
        assert trained.round_metrics[name] == pytest.approx(float(values.mean()), rel=1e-4)
    move(theirs, 0.02, 6)
    copied(trained.policy, theirs)
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    monkeypatch.setattr(online_objectives, "grpo_loss", partial(grpo_loss, kl_gradient="k3"))
    assert step(trained) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert apart(trained.policy, theirs) < 1e-4


def test_overlong_penalty_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(1, 13))
    expected = get_soft_overlong_punishment(12, 5)(completion_ids=[[0] * n for n in lengths])
    actual = overlong_penalty(torch.tensor(lengths), 12, 5)
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_the_kl_of_grpo_has_the_gradient_of_trls_default(base, tmp_path, monkeypatch) -> None:
    """Convention 15. On tokens of the policy itself k2's gradient is that of ratio times k3, TRL's
    default since 1.16, and k3's is another one.
    """
    import trl

    trainer, theirs, batch, prompts = rollouts_of_trl(
        trl.GRPOTrainer, trl.GRPOConfig, base, tmp_path, beta=0.2, loss_type="dapo"
    )
    assert trainer.args.use_bias_correction_kl
    end = trainer.processing_class.eos_token_id
    trained = rollouts_of_fastlm(base, theirs, prompts, end, loss_type="dapo", beta=0.2)
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    # advantages cancel: what is left is near the float32 rounding of terms near 1
    assert step(trained) == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert apart(trained.policy, theirs) < 1e-4
    monkeypatch.setattr(online_objectives, "grpo_loss", partial(grpo_loss, kl_gradient="k3"))
    trained.policy.zero_grad()
    trained.next_index = 0
    step(trained)
    assert apart(trained.policy, theirs) > 3e-4


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo(base, tmp_path, beta) -> None:
    """Advantages with the KL in the score, loss and gradient."""
    import trl

    trainer, theirs, batch, prompts = rollouts_of_trl(
        trl.RLOOTrainer, trl.RLOOConfig, base, tmp_path, beta=beta
    )
    end = trainer.processing_class.eos_token_id
    trained = rollouts_of_fastlm(base, theirs, prompts, end, loss_type="rloo", beta=beta)
    same_advantages(trained, batch, prompts)
    move(theirs, 0.004, 6)
    copied(trained.policy, theirs)
    loss = trainer.compute_loss(theirs, batch)
    loss.backward()
    # sums of terms near 1 that cancel, of log-probabilities near -30 in float32
    assert step(trained) == pytest.approx(float(loss.detach()), abs=1e-5)
    assert apart(trained.policy, theirs) < 1e-3
