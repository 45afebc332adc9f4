"""Tests of patched models in training: precision, checkpointing, compile, Trainer, LoRA."""

import peft
import pytest
import torch
import transformers
from patch_models import (
    FAMILIES,
    assert_equal_gradients,
    each_family,
    few_families,
    gradients,
    linears,
    model_of,
    pair,
    tokens,
)
from torch._dynamo.testing import CompileCounterWithBackend

import fastlm
from fastlm.hf.patching import patched_ops

# warnings of transformers and peft about each other's names do not concern the model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@few_families
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    plain, fast = pair(family)
    ids = tokens()
    _, expected = gradients(fast.train(), input_ids=ids, labels=ids)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    fast.enable_input_require_grads()
    _, actual = gradients(fast, input_ids=ids, labels=ids)
    assert all(torch.equal(actual[n], g) for n, g in expected.items())
    _, plainly = gradients(plain.train(), input_ids=ids, labels=ids)
    assert_equal_gradients(plainly, actual)


@each_family
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
def test_low_precision(family, mode):
    """Results are as near to float32 as the original model's in the same precision."""
    exact = model_of(family)
    ids = tokens()
    truth, true_gradients = gradients(exact, input_ids=ids, labels=ids)
    plain, fast = pair(family, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    losses, errors = [], []
    for model in (plain, fast):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append((loss.float() - truth.loss).abs().item())
        total = 0.0
        for n, p in model.named_parameters():
            assert p.grad is None or p.grad.dtype == p.dtype
            if n in true_gradients:
                total += (p.grad.float() - true_gradients[n]).norm().item() ** 2
        errors.append(total**0.5)
    scale = sum(g.norm().item() ** 2 for g in true_gradients.values()) ** 0.5
    # noise of one draw: within twice the plain model's, or 1 % (a few times bfloat16's 2^-8)
    assert losses[1] <= 2 * losses[0] + 1e-2
    assert errors[1] <= 1.5 * errors[0] + 1e-2 * scale


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compiles_in_one_graph(family):
    plain, fast = pair(family)
    names = set()

    def watch(graph, inputs):
        names.update(str(n.target) for n in graph.graph.nodes)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(fast, fullgraph=True, backend=watch)
    ids = tokens()
    _, expected = gradients(plain, input_ids=ids, labels=ids)
    fast.zero_grad()
    compiled(input_ids=ids, labels=ids).loss.backward()
    actual = {n: p.grad for n, p in fast.named_parameters() if p.grad is not None}
    assert_equal_gradients(expected, actual)
    ops = {n.split(".")[1] for n in names if n.startswith("fastlm.")}
    assert ops == {"rms_norm", "rope", "glu", "attention", "linear_cross_entropy"}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("labels", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_new_shapes_are_not_compiled_again(family, labels):
    """From the second shape on one graph serves any number and length of rows."""
    _, fast = pair(family)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    counts = []
    for shape in ((2, 20), (3, 24), (4, 17), (7, 33), (2, 20)):
        ids = tokens(*shape)
        inputs = {"input_ids": ids, "use_cache": False} | ({"labels": ids} if labels else {})
        out = compiled(**inputs)
        counts.append(counter.frame_count)
        if labels:
            fast.zero_grad()
            out.loss.backward()
            actual = {n: p.grad for n, p in fast.named_parameters() if p.grad is not None}
            _, expected = gradients(fast, **inputs)
            assert_equal_gradients(expected, actual)
        else:
            torch.testing.assert_close(out.logits, fast(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert counts[1:] == [counts[1]] * 4 and counts[1] <= 2 * counts[0]


def train(model, steps, dtype=torch.float32):
    torch.manual_seed(1)
    table = torch.randint(3, 99, (99,))  # learnable: a token always has the same successor
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        rows = [torch.randint(3, 99, (8, 1))]
        for _ in range(15):
            rows.append(table[rows[-1]])
        ids = torch.cat(rows, 1)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_of_training(dtype):
    plain, fast = pair(dtype=dtype)
    a, b = train(plain.train(), 50), train(fast.train(), 50)
    assert a[-1] < 0.5 * a[0]
    # float32: rounding, amplified by training; bfloat16: a few of its roundings per step
    assert ((a - b).abs() / a).max() < (1e-3 if dtype == torch.float32 else 5e-2)


class Rows(torch.utils.data.Dataset):
    """Documents of unequal length, so that micro-batches have unequal numbers of labels."""

    def __init__(self, count=32):
        generator = torch.Generator().manual_seed(2)
        self.rows = []
        for i in range(count):
            ids = torch.randint(3, 99, (16,), generator=generator)
            labels = ids.clone()
            labels[: i % 12] = -100
            self.rows.append({"input_ids": ids, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer_losses(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4,
        max_steps=4, logging_steps=1, learning_rate=1e-3, report_to=[], use_cpu=True, seed=3,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        eval_strategy="steps", eval_steps=4, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(4))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert trainer.model_accepts_loss_kwargs  # num_items_in_batch reaches the loss
    return [log.get("loss", log.get("eval_loss")) for log in trainer.state.log_history[:-1]]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "checkpointing"])
def test_trainer(tmp_path, mode):
    plain, fast = pair()
    options = {"bf16": mode == "bf16", "gradient_checkpointing": mode == "checkpointing"}
    a = trainer_losses(plain, tmp_path / "a", **options)
    b = trainer_losses(fast, tmp_path / "b", **options)
    assert len(a) == 5 and a[0] != a[1]
    torch.testing.assert_close(b, a, rtol=1e-2 if mode == "bf16" else 1e-4, atol=0)
    ids = tokens()
    fastlm.unpatch(fast)  # works even where accelerate wrapped the forward
    fast.eval()
    assert fast(ids, labels=ids).logits is not None
    assert patched_ops(fast) == {}


def test_trainer_computes_metrics(tmp_path):
    """An evaluation whose compute_metrics reads the logits."""

    def accuracy(predictions):
        return {"accuracy": (predictions.predictions.argmax(-1) == predictions.label_ids).mean()}

    metrics = []
    for model in pair():
        arguments = transformers.TrainingArguments(
            str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, eval_dataset=Rows(4), compute_metrics=accuracy
        )
        trainer.remove_callback(transformers.PrinterCallback)
        scores = trainer.evaluate()
        metrics.append([scores["eval_accuracy"], scores["eval_loss"]])
    torch.testing.assert_close(*metrics, rtol=1e-4, atol=0)


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora(first):
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "gate_proj", "down_proj"], init_lora_weights=False
    )
    plain, fast = peft.get_peft_model(model_of(), config), model_of()
    if first == "patch":
        fast = peft.get_peft_model(fastlm.patch(fast), config)
    else:
        fast = fastlm.patch(peft.get_peft_model(fast, config))
    fast.load_state_dict(plain.state_dict())
    patched = patched_ops(fast)
    assert (
        patched.pop("linear") >= linears(model_of())["linear"] and patched == FAMILIES["llama"][1]
    )
    ids = tokens()
    (a, ga), (b, gb) = (gradients(m, input_ids=ids, labels=ids) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert b.logits is None
    assert len(gb) == 12 and all("lora" in n for n in gb)
    assert_equal_gradients(ga, gb)


def test_lora_on_the_head_keeps_its_logits():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(fastlm.patch(model_of()), config)
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    assert out.logits is not None
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)
