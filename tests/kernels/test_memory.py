"""Tests of fastlm.memory: recomputing values does not change gradients, but saves memory."""

import ctypes
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import fastlm
from fastlm.errors import InputError
from fastlm.memory import keep_freed_memory, recompute
from fastlm.model import layers


def small_model(family="llama", **changes):
    config = fastlm.ModelConfig(
        model_type=family, vocab_size=97, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=64,
        **{"intermediate_size": 80, **changes},
    )  # fmt: skip
    return fastlm.CausalLM(config, seed=1)


def gradients(model, backwards=1):
    ids = torch.randint(0, 97, (2, 33), generator=torch.Generator().manual_seed(0))
    loss = model(ids[:, :-1], shift_labels=ids[:, 1:].contiguous()).loss
    for i in range(backwards):
        loss.backward(retain_graph=i + 1 < backwards)
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2"])
def test_recomputed_values_have_the_same_gradients(dtype, family, monkeypatch):
    model = small_model(family, head_dim=16).to(dtype)
    loss, grads = gradients(model)
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(layers, "_saves_for_backward", lambda x: False)
    want_loss, want = gradients(model)
    assert torch.equal(loss, want_loss)
    for actual, expected in zip(grads, want):
        assert torch.equal(actual, expected)


def test_second_backward_of_a_retained_graph():
    model = small_model()
    _, once = gradients(model)
    model.zero_grad(set_to_none=True)
    _, twice = gradients(model, backwards=2)
    for a, b in zip(once, twice):
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=1e-7)


class Blocks(ctypes.Structure):  # glibc's struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


def bytes_in_use():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Blocks
    now = mallinfo2()
    return now.hblkhd + now.uordblks


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize("cover", [True, False])
def test_the_value_is_not_stored(cover):
    x = torch.randn(1 << 18, 32, requires_grad=True)  # 32 MiB
    first, second = nn.Linear(32, 1), nn.Linear(32, 1)
    calls = 0

    def make():
        nonlocal calls
        calls += 1
        return (x * 2).detach()

    before = bytes_in_use()
    value = x * 2
    with recompute(value, make) if cover else nullcontext():
        out = first(value).sum() + second(value).sum()
    del value
    growth = bytes_in_use() - before
    assert growth < 8 << 20 if cover else growth > 32 << 20
    out.backward()
    assert calls == cover  # one call for both
    expected = torch.autograd.grad(first(x * 2).sum() + second(x * 2).sum(), x)[0]
    assert torch.equal(x.grad, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_checkpointing_still_saves_memory(monkeypatch):
    """Checkpointing cannot drop tensors that its hooks do not see."""
    model = small_model(intermediate_size=3000)
    x = torch.randn(1, 400, 48, requires_grad=True)
    layer, context = model.model.layers[0], layers.ForwardContext(None, None, None, [None, None])

    def saved_bytes():
        before = bytes_in_use()
        stream, branch = torch.utils.checkpoint.checkpoint(
            lambda x: layer(x, None, context), x, use_reentrant=False
        )
        growth = bytes_in_use() - before
        grad = torch.autograd.grad((stream + branch).sum(), x)[0]
        return growth, grad

    saved_bytes()
    mine, grad = saved_bytes()
    monkeypatch.setattr(layers, "_saves_for_backward", lambda x: False)
    plain, expected = saved_bytes()
    assert mine < 1.5 * plain and torch.equal(grad, expected)


def test_nested_in_its_own_kind_only():
    x = torch.randn(4, requires_grad=True)
    with recompute(x, lambda: x):
        assert recompute.can_enter()
        with torch.autograd.graph.save_on_cpu():
            assert not recompute.can_enter()
            with recompute(x, lambda: x):
                pass
        assert recompute.can_enter()


def test_parameters_that_need_no_gradient():
    model = small_model()
    for p in model.model.layers[0].parameters():
        p.requires_grad_(False)
    loss = model(torch.zeros(1, 8, dtype=torch.long), labels=torch.zeros(1, 8, dtype=torch.long))
    loss.loss.backward()
    assert model.model.layers[1].mlp.down_proj.weight.grad is not None


PROGRAM = """
import resource, torch
from fastlm.memory import keep_freed_memory
CALL
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
faults()  # small objects of the first call may lie before a block, which then needs a new place
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.parametrize(
    "call",
    [
        "assert keep_freed_memory()",
        "assert keep_freed_memory() and keep_freed_memory(1 << 20)",
        "",
        "assert keep_freed_memory(256 << 20)",  # which keeps smaller blocks
    ],
)
def test_freed_memory_is_reused(call):
    """32 MiB four times: 8192 pages each time with glibc's defaults, none if it is kept."""
    command = [sys.executable, "-P", "-c", PROGRAM.replace("CALL", call)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 500 if "keep_freed_memory()" in call else faults > 4000


@pytest.mark.parametrize(
    "call", ["assert keep_freed_memory(256 << 20)", "assert keep_freed_memory(20 << 20)", ""]
)
def test_freed_memory_is_kept_up_to_a_limit(call):
    """Six blocks of 8 MiB at once: glibc trims a heap with more than 16 MiB at its end."""
    program = PROGRAM.replace("CALL", call)
    program = program.replace("torch.ones(8 << 20)", "[torch.ones(2 << 20) for _ in range(6)]")
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    faults = int(done.stdout)
    assert faults < 2000 if "256" in call else faults > 4000  # of 49,152 pages


def test_a_limit_is_a_c_int():
    for limit in (-1, 1 << 31):
        with pytest.raises(InputError, match="limit: expected 0 to 2,147,483,647 bytes"):
            keep_freed_memory(limit)


def test_says_where_it_cannot(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert keep_freed_memory() is False
