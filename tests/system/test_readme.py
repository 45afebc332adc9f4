"""Runs the Python code of the README and of the pages in docs/ unchanged."""

import inspect
import math
import re

import pytest
import torch
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import fastlm
from fastlm import ops, quant

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}


def python_blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.M)


def run(block: str) -> dict:
    names: dict = {}
    exec(compile(block, "a page", "exec"), names)
    return names


def test_no_two_commands_of_a_page_write_into_one_folder():
    """A reader runs the blocks of a page from top to bottom."""
    text = (ROOT / "docs/training.md").read_text("utf-8")
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.M))
    folders = re.findall(r" -o (\S+)", commands)
    assert len(folders) > 15 and len({*folders}) == len(folders)


def test_the_readme(tmp_path):
    LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SIZES)).save_pretrained(tmp_path)
    patch, op = python_blocks("README.md")
    names = run(patch.replace("path/to/a/llama", str(tmp_path)))
    assert fastlm.patched_ops(names["model"])
    names["model"](
        torch.arange(24).view(2, 12), labels=torch.arange(24).view(2, 12)
    ).loss.backward()
    names["optimizer"].step()
    torch.manual_seed(0)
    names = run(op)
    rows, sample = len(names["x"]), slice(0, None, 16)  # the computation with all rows takes 2 GB
    x, target = names["x"][sample].detach().requires_grad_(), names["target"][sample]
    loss = torch.nn.functional.cross_entropy(x @ names["head"].T, target, reduction="sum") / rows
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(names["x"].grad[sample], gradient, rtol=1e-3, atol=1e-6)


def test_training_on_the_cpu(tmp_path):
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    block = python_blocks("docs/compat.md")[0].replace("path/to/a/llama", str(tmp_path))
    names = run(block)
    model, optimizer = names["model"], names["optimizer"]
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(20):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] and losses[0].item() == pytest.approx(math.log(64), rel=0.1)
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_text_from_python(tmp_path, capsys):
    tokenizer = fastlm.Tokenizer.train(["Once upon a time three rivers"], 300)
    config = fastlm.ModelConfig(
        **SIZES | {"vocab_size": tokenizer.vocab_size}, num_attention_heads=2, eos_token_id=None
    )
    fastlm.CausalLM(config, seed=0).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    block = python_blocks("docs/models.md")[0].replace("model:smollm2", str(tmp_path))
    names = run(block)
    assert "Once upon a time" in capsys.readouterr().out
    first, second = names["rows"]
    assert len(first) == len(tokenizer.encode("Once upon a time")) + 64
    assert second[: len(names["prompt"])] == names["prompt"]


def test_the_page_of_ops_has_every_signature():
    page = (ROOT / "docs/ops.md").read_text("utf-8")
    documented = dict(re.findall(r"^### (\w+)\n```\n\w+\((.*)\)\n```\n", page, re.M))
    classes = (quant.QuantizedWeight, quant.QuantizedLinear, quant.QuantizedEmbedding)
    public = {name: getattr(ops, name) for name in ops.__all__} | {c.__name__: c for c in classes}
    assert documented.keys() == public.keys()
    for name, function in public.items():
        signature = inspect.signature(function)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        text = str(signature.replace(parameters=bare, return_annotation=signature.empty))
        assert documented[name] == text[1:-1], name
    run(python_blocks("docs/ops.md")[1])


def test_ten_lines_of_python():
    block = python_blocks("docs/ops.md")[0]
    torch.manual_seed(0)
    names = run(block)

    torch.manual_seed(0)  # the block begins with the same draws
    x = torch.randn(4096, 512, dtype=torch.bfloat16)
    head = torch.randn(32768, 512, dtype=torch.bfloat16) / 512**0.5
    target = torch.randint(0, 32768, (4096,))
    total = 0.0
    for rows, expected in zip(x.float().split(512), target.split(512)):
        logits = rows @ head.float().T
        lse = logits.logsumexp(1)
        picked = logits.gather(1, expected[:, None])[:, 0]
        total += (lse - picked + 1e-4 * lse**2).sum().item()
    # Products of bfloat16 are exact in float32: the results are equal up to the order of the sums.
    assert names["loss"].item() == pytest.approx(total / 4096, rel=1e-4)
    # Adam's first step is lr for every element with a gradient: in the head, the rows of the
    # targets. bfloat16 represents a step of 1e-3 for elements below 0.1.
    rows = target.unique()
    for before, after in ((x, names["x"]), (head[rows], names["head"][rows])):
        assert torch.isfinite(after).all()
        small = before.abs() < 0.1
        assert (after != before)[small].float().mean() > 0.9


def test_the_table_of_backends_matches_the_registered_ops():
    from fastlm import inventory  # registers every op
    from fastlm.backend import BACKENDS, OPS

    assert inventory.info()["ops"].keys() == OPS.keys()

    def backends_of(op: str) -> set[str]:
        """The backends of a forward or a backward."""
        entry = OPS.get("rope" if op == "rope_backward" else op)  # rope is its own backward
        return set() if entry is None else {b for b, row in BACKENDS.items() if entry.is_in(row)}

    text = (ROOT / "README.md").read_text("utf-8")
    table = text.split("| op | reference | cpu | triton | cuda |\n", 1)[1].split("\n\n", 1)[0]
    ops_of_page = set()
    for line in table.splitlines()[1:]:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for op in re.findall(r"`(\w+)`", names):
            ops_of_page.add(op)
            forward, backward = backends_of(op.lower()), backends_of(f"{op.lower()}_backward")
            for backend, cell in zip(("reference", "cpu", "triton", "cuda"), cells, strict=True):
                assert (backend in forward) == cell.startswith(("forward", "step")), (op, backend)
                assert (backend in backward) == cell.endswith("backward"), (op, backend)
    # the method of a weight; several ops in one launch, which a decode step on a GPU calls
    internal = {"dequantize", "glu_round", "rms_norm_round", "rope_append", "rounded_linear"}
    rows = {op.removesuffix("_backward").removesuffix("_loss") for op in OPS} - internal
    assert rows == {op.lower() for op in ops_of_page}
    assert ops_of_page == {*fastlm.ops.__all__} - {"quantize_weight"} | {"AdamW"}
