"""Write trl_ppo_values.json: the values of TRL's PPOTrainer in a round on a tiny model.

    pip install --no-deps --target build/trl-ppo trl==1.12.0
    TRL_EXPERIMENTAL_SILENCE=1 PYTHONPATH=build/trl-ppo .venv/bin/python \
        tests/support/trl_ppo_values.py

1.12.0 is the last version with PPO. It needs its own folder; the other tests use a newer version.
test_trl_ppo.py compares `fastlm.train.losses` with the file. A round is 8 answers of at most 7
tokens, some without an end, in two passes of two micro-batches each. The policy differs from the
reference from the start, and a large learning rate moves ratios and values out of the clip ranges.

`PPOTrainer.train` is one function. The values are read from its frame where it calls
`masked_whiten` and `masked_mean`, and the gradients with hooks on its log-probabilities and values.
"""

import json
import sys
import tempfile
from pathlib import Path

import datasets
import torch
import transformers
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

READ = ("masked_mean", "masked_whiten", "get_reward")  # functions of TRL that are read
END, PAD, WORDS, LONGEST = 0, 11, 12, 7
OPTIONS = {
    "kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "cliprange": 0.2, "cliprange_value": 0.2,
    "vf_coef": 0.1, "missing_eos_penalty": 0.75,
}  # fmt: skip
ROUNDS = {
    "k1": {"kl_estimator": "k1", "whiten_rewards": False, "seed": 5},
    "k3, whitened rewards": {"kl_estimator": "k3", "whiten_rewards": True, "seed": 8},
}


def policy_of(seed: int) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(_config())

    def forbid_padding(module, inputs, logits):
        del module, inputs
        return logits.index_fill(-1, torch.tensor([PAD]), -1e4)

    model.lm_head.register_forward_hook(forbid_padding)
    return model


def scorer_of(seed: int) -> transformers.LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return transformers.LlamaForSequenceClassification(_config(num_labels=1))


def _config(**changes) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, eos_token_id=END, bos_token_id=None,
        pad_token_id=PAD, initializer_range=0.3, tie_word_embeddings=False, **changes,
    )  # fmt: skip


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(WORDS)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "w1")), eos_token=f"w{END}",
        pad_token=f"w{PAD}", padding_side="left",
    )  # fmt: skip


def numbers(value: torch.Tensor) -> list:
    """Return the value with the digits of float32."""
    short = [float(f"{x:.9g}") for x in value.flatten().tolist()]
    return torch.tensor(short, dtype=torch.float64).view(value.shape).tolist()


def round_of(options: dict) -> dict:
    values_of_round: dict = {"updates": []}
    mean, whiten, reward = (getattr(ppo_trainer, name) for name in READ)

    def whitened(values, mask, shift_mean=True):
        out = whiten(values, mask, shift_mean)
        frame = sys._getframe(1).f_locals
        if shift_mean:
            names = ("logprobs", "ref_logprobs", "values", "sequence_lengths", "returns")
            values_of_round.update({name: numbers(frame[name]) for name in names})
            values_of_round["ended"] = frame["contain_eos_token"].tolist()
            values_of_round["scores"] = numbers(frame["scores"])
            values_of_round["advantages"] = numbers(values)
            values_of_round["whitened_advantages"] = numbers(out.masked_fill(~mask, 0))
            values_of_round["rewards"] = numbers(frame["rewards"])
        else:
            values_of_round["rewards_before"] = numbers(values)
        return out

    def averaged(values, mask, axis=None):
        out = mean(values, mask, axis)
        frame = sys._getframe(1).f_locals
        if frame.get("pg_loss_max") is values:
            update = {
                "rows": frame["micro_batch_inds"].tolist(),
                "logprobs": numbers(frame["new_logprobs"].detach()),
                "values": numbers(frame["vpred"].detach()),
                "policy_loss": float(out.detach()),
                "value_loss": float(frame["vf_loss"].detach()),
                "value_clip_fraction": float(frame["vf_clipfrac"]),
            }
            values_of_round["updates"].append(update)
            for name in ("new_logprobs", "vpred"):
                frame[name].register_hook(
                    lambda g, n=name: update.update({f"{n}_gradient": numbers(g)})
                )
        elif values_of_round["updates"]:  # the first call after that of the loss
            values_of_round["updates"][-1].setdefault("policy_clip_fraction", float(out.detach()))
        return out

    def rewarded(*arguments):
        out = reward(*arguments)
        values_of_round["scores_of_model"] = numbers(
            out[1]
        )  # the second call, after the value model's
        return out

    for name, read in zip(READ, (averaged, whitened, rewarded)):
        setattr(ppo_trainer, name, read)
    policy, reference = policy_of(1), policy_of(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prompts = [{"input_ids": [1 + i % 5, 2 + i % 7, 3 + i % 3]} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            folder, total_episodes=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            num_mini_batches=1, num_ppo_epochs=2, response_length=LONGEST, stop_token="eos",
            learning_rate=0.05, temperature=1.0, num_sample_generations=0, report_to=[],
            use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True,
            gradient_checkpointing=False, local_rollout_forward_batch_size=8, **OPTIONS, **options,
        )  # fmt: skip
        PPOTrainer(
            arguments, tokenizer(), policy, reference, scorer_of(2),
            datasets.Dataset.from_list(prompts), scorer_of(3),
        ).train()  # fmt: skip
    for name, plain in zip(READ, (mean, whiten, reward)):
        setattr(ppo_trainer, name, plain)
    return {**options, **values_of_round}


def main() -> None:
    if trl.__version__ != "1.12.0":
        sys.exit(f"trl: expected 1.12.0, got {trl.__version__}")
    document = {"trl": trl.__version__, "options": OPTIONS}
    document["rounds"] = {name: round_of(options) for name, options in ROUNDS.items()}
    Path(__file__).with_suffix(".json").write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
