"""FLOPs that torch counts for the ops, compared with the same in plain torch; shapes that its
profiler shows.
"""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from fastlm import ops


def count(function, *leaves):
    """Count the FLOPs of forward and backward."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    with FlopCounterMode(display=False) as counter:
        function(*leaves).sum().backward()
    return counter.get_total_flops()


def test_linear_cross_entropy_as_the_product_written_out():
    x, w, target = torch.randn(100, 24), torch.randn(70, 24), torch.randint(70, (100,))
    plain = count(lambda x, w: F.cross_entropy(x @ w.T, target), x, w)
    assert count(lambda x, w: ops.linear_cross_entropy(x, w, target), x, w) == plain > 0
    plain = count(lambda w: F.cross_entropy(x @ w.T, target), w)
    assert count(lambda w: ops.linear_cross_entropy(x, w, target), w) == plain
    # by rows the backward recomputes the logits
    rows = count(lambda x, w: ops.linear_cross_entropy(x, w, target, reduction="none"), x, w)
    assert rows == (2 + 6) * 100 * 24 * 70
    assert count(lambda x, w: ops.linear_logprobs(x, w, target), x, w) == rows
    assert count(lambda x: ops.linear_logprobs(x, w, target), x) == (2 + 4) * 100 * 24 * 70


def test_linear_distillation_as_the_products_written_out():
    x, w, teacher = torch.randn(100, 24), torch.randn(70, 24), torch.randn(100, 12)
    teacher_weight = torch.randn(70, 12)

    def plain(x, w):
        log_t = (teacher @ teacher_weight.T).log_softmax(-1)
        return F.kl_div((x @ w.T).log_softmax(-1), log_t, log_target=True, reduction="sum")

    def loss(x, w):
        return ops.linear_distillation(x, w, teacher, teacher_weight)

    assert count(loss, x, w) == count(plain, x, w) > 0
    assert count(lambda w: loss(x, w), w) == count(lambda w: plain(x, w), w)


def test_linear_and_quantized_linear_as_the_product():
    x, w = torch.randn(3, 5, 24), torch.randn(70, 24)
    plain = count(F.linear, x, w)
    assert count(ops.linear, x, w) == plain > 0
    frozen = ops.quantize_weight(w, 4)
    plain = count(lambda x: F.linear(x, w), x)
    assert count(lambda x: ops.quantized_linear(x, frozen), x) == plain


def test_linear_s_own_products_as_torch_s(monkeypatch):
    """The counts also agree if only the backward is counted."""
    module = sys.modules["fastlm.ops.linear"]
    monkeypatch.setattr(module, "_is_faster", lambda *_: True)
    x, w = torch.randn(6, 24, requires_grad=True), torch.randn(70, 24, requires_grad=True)
    assert count(ops.linear, x, w) == 6 * 6 * 24 * 70
    y = ops.linear(x, w)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 6 * 24 * 70


@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_torch_s_kernels(causal):
    """torch counts the backward's scores and does not subtract causality."""
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 8)
    forward = sdpa_flop_count(q.shape, k.shape, v.shape)
    backward = sdpa_backward_flop_count((2, 4, 7, 8), q.shape, k.shape, v.shape)
    counted = count(lambda *x: ops.attention(*x, causal=causal), q, k, v)
    assert counted == forward + backward
    with FlopCounterMode(display=False) as counter:
        ops.attention(q, k, v)
    assert counter.get_total_flops() == forward


def test_packed_and_paged_attention_by_their_sequences():
    q, k, v = torch.randn(9, 4, 16), torch.randn(11, 2, 16), torch.randn(11, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 3, 11])
    shapes = [((1, 4, m, 16), (1, 2, n, 16), (1, 2, n, 8)) for m, n in ((4, 3), (5, 8))]
    forward = sum(sdpa_flop_count(*s) for s in shapes)
    backward = sum(sdpa_backward_flop_count((1, 4, s[0][2], 8), *s) for s in shapes)
    counted = count(lambda *x: ops.varlen_attention(*x, cu_q, cu_k), q, k, v)
    assert counted == forward + backward
    with FakeTensorMode() as fakes, FlopCounterMode(display=False) as counter:
        fake = [fakes.from_tensor(t) for t in (q, k, v, cu_q, cu_k)]
        ops.varlen_attention(*fake, max_seqlen_q=5, max_seqlen_k=8)
    assert counter.get_total_flops() == 2 * sdpa_flop_count(*shapes[1]) > forward
    cache, lengths = torch.randn(6, 4, 2, 16), torch.tensor([3, 8])
    with FlopCounterMode(display=False) as counter:
        ops.paged_attention(
            torch.randn(2, 1, 4, 16), cache, cache, torch.arange(6).view(2, 3), lengths
        )
    assert counter.get_total_flops() == 4 * 4 * 16 * (3 + 8)


def test_counts_where_the_counter_is_imported_after_fastlm():
    """Importing the counter imports Triton; importing fastlm does not."""
    code = """
import sys, torch
from fastlm import ops
assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 2, 3, 4)
with FlopCounterMode(display=False) as counter:
    ops.attention(q, q, q)
print(counter.get_total_flops())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == str(4 * 2 * 3 * 3 * 4), result.stderr


@pytest.mark.parametrize("grad", [False, True])
def test_the_profiler_shows_shapes(grad):
    q = torch.randn(1, 2, 3, 16, requires_grad=grad)
    x, w = torch.randn(4, 8, requires_grad=grad), torch.ones(8)
    with torch.profiler.profile(record_shapes=True) as profile:
        out = ops.rms_norm(x, w).sum() + ops.attention(q, q, q).sum()
        if grad:
            out.backward()
    shapes = {e.name: e.input_shapes for e in profile.events() if e.name.startswith("fastlm::")}
    assert shapes["fastlm::rms_norm"][:3] == [[4, 8], [], [8]]
    assert shapes["fastlm::attention"][:3] == [[1, 2, 3, 16]] * 3
    assert ("fastlm::rms_norm_backward" in shapes) == grad
