"""Patched models in Hugging Face's Trainer and TRL's SFTTrainer over 50 steps, also with
`fastlm.AdamW` as optimizer: the losses equal those of the plain model with torch's.
"""

import peft
import pytest
import torch
import transformers
from patch_models import pair
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import fastlm
from fastlm import InputError
from fastlm.hf import attention_interface
from fastlm.hf.patching import patched_ops
from fastlm.ops import attention, linear_cross_entropy

# warnings of transformers, peft and TRL about each other's names do not concern the model
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

STEPS, RATE = 50, 3e-3
ARGUMENTS = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": STEPS,
    "logging_steps": 1, "learning_rate": RATE, "report_to": [], "use_cpu": True, "seed": 3,
    "disable_tqdm": True, "dataloader_pin_memory": False, "lr_scheduler_type": "linear",
    "warmup_steps": 5, "weight_decay": 0.1,
}  # fmt: skip


def rows(count=96):
    """Learnable rows of unequal length: a token always has the same successor."""
    draw = torch.Generator().manual_seed(2)
    table = torch.randint(3, 99, (99,), generator=draw).tolist()
    sequences = []
    for i in range(count):
        row = torch.randint(3, 99, (1,), generator=draw).tolist()
        while len(row) < 6 + i % 9:
            row.append(table[row[-1]])
        sequences.append(row)
    return sequences


def losses(trainer, **options):
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(**options)
    return torch.tensor([log["loss"] for log in trainer.state.log_history if "loss" in log])


def assert_same_curve(a, b, end=0.7):
    assert len(a) == len(b) == STEPS and a[-5:].mean() < end * a[0]
    # rounding, amplified by training
    assert ((a - b).abs() / a).max() < 1e-3


class Padded(torch.utils.data.Dataset):
    """Rows of 16, padded on the right. The padding has no label."""

    def __init__(self):
        self.rows = [torch.tensor(row) for row in rows()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row, rest = self.rows[i], 16 - len(self.rows[i])
        return {
            "input_ids": torch.nn.functional.pad(row, (0, rest)),
            "attention_mask": torch.tensor([1] * len(row) + [0] * rest),
            "labels": torch.nn.functional.pad(row, (0, rest), value=-100),
        }


def trainer_of(model, folder, optimizer=None, **options):
    arguments = transformers.TrainingArguments(
        str(folder), **{**ARGUMENTS, "save_strategy": "no", **options}
    )
    return transformers.Trainer(
        model, arguments, train_dataset=Padded(), optimizer_cls_and_kwargs=optimizer
    )


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    torch.manual_seed(0)
    return losses(trainer_of(pair()[0], tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("mode", ["plain", "checkpointing", "adamw"])
def test_trainer(plain_losses, tmp_path, mode):
    """Micro-batches with unequal numbers of labels. With "adamw" the optimizer clips."""
    _, fast = pair()
    options = {"gradient_checkpointing": True} if mode == "checkpointing" else {}
    optimizer = None
    if mode == "adamw":
        options["max_grad_norm"] = 0  # Trainer does not clip
        optimizer = (fastlm.AdamW, {"lr": RATE, "max_grad_norm": 1.0})
    trainer = trainer_of(fast, tmp_path, optimizer, **options)
    assert_same_curve(plain_losses, losses(trainer))
    assert patched_ops(fast)
    if mode == "adamw":
        assert isinstance(trainer.optimizer.optimizer, fastlm.AdamW)
        decays = {group["weight_decay"] for group in trainer.optimizer.param_groups}
        assert decays == {0.0, 0.1}  # Trainer's groups: norms and the rest


def test_adamw_of_bfloat16_in_trainer_resumes(tmp_path):
    """A run cut off at step 25 continues from its checkpoint, with masters and 8-bit states."""
    optimizer = (fastlm.AdamW, {"lr": RATE, "master_weights": True, "state_bits": 8})
    options = {"save_strategy": "steps", "save_steps": 25, "max_grad_norm": 0}
    _, fast = pair(dtype=torch.bfloat16)
    uninterrupted = losses(trainer_of(fast, tmp_path, optimizer, **options))
    assert uninterrupted[-5:].mean() < 0.7 * uninterrupted[0]
    _, second = pair(dtype=torch.bfloat16)
    trainer = trainer_of(second, tmp_path, optimizer, **options)
    resumed = losses(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-25"))
    assert torch.equal(resumed[-25:], uninterrupted[-25:])
    for a, b in zip(fast.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


LORA = peft.LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "up_proj", "down_proj"])


def sft_trainer(model, folder, *, lora=None, trainer=None, **options):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    names = {f"t{i}": i for i in range(99)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="t3")), pad_token="t0",
        bos_token="t1", eos_token="t2",
    )  # fmt: skip
    arguments = {"bf16": False, "save_strategy": "no", "max_length": 32, **ARGUMENTS, **options}
    dataset = datasets.Dataset.from_dict({"input_ids": rows()})
    torch.manual_seed(4)  # LoRA's own weights
    return (trainer or trl.SFTTrainer)(
        model, trl.SFTConfig(str(folder), **arguments), train_dataset=dataset,
        eval_dataset=dataset.select(range(8)), processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip


def sft_losses(model, folder, *, lora=False, **options):
    trainer = sft_trainer(model, folder, lora=LORA if lora else None, **options)
    values = losses(trainer)
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert all("lora" in n for n in trained) == lora
    return values


@pytest.mark.parametrize("mode", ["plain", "lora"])
def test_sft_trainer(tmp_path, monkeypatch, mode):
    """TRL's defaults: gradient checkpointing, and its own loss, without logits."""
    plain, fast = pair()
    options = {"lora": mode == "lora"}
    a = sft_losses(plain, tmp_path, **options)
    calls = []

    def counted(*arguments, **kwargs):
        calls.append(1)
        return attention(*arguments, **kwargs)

    monkeypatch.setattr(attention_interface, "attention", counted)
    b = sft_losses(fast, tmp_path, **options)
    assert_same_curve(a, b, 0.97 if mode == "lora" else 0.7)
    # 2 layers, 2 micro-batches per step, and again for the backward
    assert len(calls) == 2 * 2 * 2 * STEPS


@pytest.mark.parametrize("mode", ["plain", "lora", "packing"])
def test_sft_trainer_with_the_loss_of_the_model(tmp_path, monkeypatch, mode):
    """`fastlm.compat.trl.SFTTrainer`: the fused op yields TRL's losses of the plain model;
    evaluation works as in TRL.
    """
    from fastlm.compat.trl import SFTTrainer
    from fastlm.hf import forwards

    plain, fast = pair()
    # packing: consecutive sequences in one row, given by position_ids and cu_seq_lens
    options = {"plain": {}, "lora": {"lora": LORA}, "packing": {"packing": True}}[mode]
    theirs = sft_trainer(plain, tmp_path, **options)
    calls = []

    def counted(*arguments, **kwargs):
        calls.append(1)
        return linear_cross_entropy(*arguments, **kwargs)

    monkeypatch.setattr(forwards, "linear_cross_entropy", counted)
    ours = sft_trainer(fast, tmp_path, trainer=SFTTrainer, **options)
    assert_same_curve(losses(theirs), losses(ours), 0.97 if mode == "lora" else 0.7)
    assert len(calls) == 2 * STEPS  # micro-batches
    a, b = (trainer.evaluate() for trainer in (theirs, ours))
    assert len(calls) == 2 * STEPS
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert abs(a[name] - b[name]) <= 1e-3 * a[name]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ops": ("attention",)}, "model: expected one patched with linear_cross_entropy"),
        ({"loss_type": "dft"}, "args.loss_type: expected nll with the model's loss, got dft"),
        ({"label_smoothing_factor": 0.1}, "args.label_smoothing_factor: expected 0.0"),
        (
            {"lora": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])},
            "model: expected a head that is nn.Linear, got ModulesToSaveWrapper",
        ),
    ],
)
def test_sft_trainer_refuses_another_loss(tmp_path, options, message):
    from fastlm.compat.trl import SFTTrainer

    options = dict(options)
    _, fast = pair(ops=options.pop("ops", None))
    with pytest.raises(InputError, match=message) as caught:
        sft_trainer(fast, tmp_path, trainer=SFTTrainer, **options)
    assert "\n" not in str(caught.value)
