"""Tests that need a GPU: bfloat16 at real sizes, graphs, no waiting for the device.

`bench/gpu.sh` runs these and test_triton_*.py on a machine with a GPU. Not run on a GPU yet.
"""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_near

import fastlm
from fastlm import ops
from fastlm.inference.block_manager import BlockManager
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.model import cuda_decode
from fastlm.model.module_decode import ModuleDecodeRunner

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def random(*shape, dtype=BF16, scale=1.0):
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def attention_inputs():
    return [random(2, h, 1000, 128) for h in (16, 4, 4)]


def loss_inputs():
    return [random(1000, 512), random(32000, 512, scale=0.05)]


TARGET = 77  # for every row: any class will do
# name -> inputs, the op, plain torch in the inputs' dtype
OPS = {
    "attention": (
        attention_inputs,
        lambda q, k, v: ops.attention(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ),
    "rms_norm": (
        lambda: [random(4096, 4096), random(4096)],
        lambda x, w: ops.rms_norm(x, w),
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
    ),
    "layer_norm": (
        lambda: [random(4096, 4096), random(4096), random(4096)],
        lambda x, w, b: ops.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
    ),
    "glu": (
        lambda: [random(4096, 2816), random(4096, 2816)],
        lambda g, u: ops.glu(g, u),
        lambda g, u: F.silu(g) * u,
    ),
    "cross_entropy": (
        lambda: [random(1000, 128256)],
        lambda z: ops.cross_entropy(z, torch.full((1000,), TARGET, device="cuda")),
        lambda z: F.cross_entropy(z.float(), torch.full((1000,), TARGET, device="cuda")),
    ),
    "linear_cross_entropy": (
        loss_inputs,
        lambda x, w: ops.linear_cross_entropy(x, w, torch.full((1000,), TARGET, device="cuda")),
        lambda x, w: F.cross_entropy(
            F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)),
            torch.full((1000,), TARGET, device="cuda"),
        ),
    ),
    "linear_logprobs": (
        loss_inputs,
        lambda x, w: torch.stack(
            ops.linear_logprobs(
                x, w, torch.full((1000,), TARGET, device="cuda"), return_entropy=True
            )
        ),
        lambda x, w: logprob_and_entropy(
            F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32))
        ),
    ),
}


def logprob_and_entropy(logits):
    logp = logits.log_softmax(-1)
    return torch.stack((logp[:, TARGET], -(logp.exp() * logp).sum(-1)))


def both(function, inputs, upstream):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


@pytest.mark.parametrize("name", OPS)
def test_bfloat16_against_float64(name):
    make, op, plain = OPS[name]
    inputs = make()
    with torch.no_grad():
        upstream = torch.randn_like(op(*inputs))
    mine, theirs = both(op, inputs, upstream), both(plain, inputs, upstream)
    truth = both(plain, [t.double() for t in inputs], upstream)
    for i, (a, p, t) in enumerate(zip(mine, theirs, truth)):
        assert_near(a, p.to(a.dtype), t, factor=3 if i else 2, label=f"{name} {i}")


@pytest.mark.parametrize("name", OPS)
def test_repeats_to_the_last_bit(name):
    make, op, _ = OPS[name]
    inputs = make()
    with torch.no_grad():
        upstream = torch.randn_like(op(*inputs))
    first = both(op, inputs, upstream)
    for _ in range(5):
        for a, b in zip(first, both(op, inputs, upstream)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", OPS)
def test_nothing_waits_for_the_device(name):
    make, op, _ = OPS[name]
    inputs = make()
    with torch.no_grad():
        upstream = torch.randn_like(op(*inputs))
    both(op, inputs, upstream)  # first call, which compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(op, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPS)
def test_cuda_graph(name):
    make, op, _ = OPS[name]
    inputs = make()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            op(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op(*inputs)
    for t in inputs:
        t.copy_(random(*t.shape, scale=0.5))
    graph.replay()
    assert torch.equal(out, op(*inputs))


def test_past_two_to_the_31_elements():
    rows, width = 2**19 + 3, 4096
    gate = torch.zeros(rows, width, dtype=BF16, device="cuda")
    gate[-1] = 3.0
    y = ops.glu(gate, gate)
    expected = F.silu(torch.tensor(3.0)) * 3
    assert y.numel() > 2**31 and (y[-1].float() - expected).abs().max() < 0.05
    assert not y[:-1].any()


def adamw_and_twin(**options):
    weights = [torch.randn(n, device="cuda").requires_grad_() for n in (5, 4096, 100_003)]
    twins = [w.detach().clone().requires_grad_() for w in weights]
    for w in weights:
        w.grad = torch.zeros_like(w)
    mine, theirs = fastlm.AdamW(weights, **options), torch.optim.AdamW(twins, lr=1e-2)

    def give():
        for w, t in zip(weights, twins):
            w.grad.copy_(torch.randn_like(w))
            t.grad = w.grad.clone()
        torch.nn.utils.clip_grad_norm_(twins, 1.0)

    return weights, twins, mine, theirs, give


def test_adamw_step_in_a_graph():
    lr = torch.tensor(1e-2, device="cuda")
    weights, twins, mine, theirs, give = adamw_and_twin(lr=lr, max_grad_norm=1.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, creates tables
        give()
        mine.step()
        theirs.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    for i in range(4):
        give()
        lr.fill_(1e-2 / (i + 1))
        theirs.param_groups[0]["lr"] = 1e-2 / (i + 1)
        graph.replay()
        theirs.step()
    for w, t in zip(weights, twins):
        torch.testing.assert_close(w, t, rtol=1e-5, atol=1e-6)
    assert all(mine.state[w]["step"] == 5 for w in weights)


def test_adamw_does_not_wait():
    _, _, mine, _, give = adamw_and_twin(lr=1e-2, max_grad_norm=1.0)
    give()
    mine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lr in (1e-2, 1e-3):  # the second rate as set by a schedule
            mine.param_groups[0]["lr"] = lr
            mine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_model(format, family="llama"):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    config = fastlm.ModelConfig.from_dict({"model_type": family, **sizes, "initializer_range": 0.2})
    model = fastlm.CausalLM(config, seed=0).eval()
    return fastlm.quantize(model, format) if format else model


def records(monkeypatch):
    """Return a list to which every recorded graph is appended, or None for one that failed."""
    graphs = []
    ours = cuda_decode.CudaDecodeRunner._record

    def record(self, step):
        ours(self, step)
        graphs.append(step.graph)

    monkeypatch.setattr(cuda_decode.CudaDecodeRunner, "_record", record)
    return graphs


@pytest.mark.parametrize("format", [None, "w4a16", "w8a8"])
def test_generation_by_a_graph(monkeypatch, format):
    """The same tokens as from unrecorded steps, and as from the modules step by step."""
    model = small_model(format).cuda()
    prompts = [list(range(1, 30)), [5, 6, 7], list(range(100, 300))]

    def generated():
        return model.generate(prompts, max_new_tokens=40, temperature=0)

    graphs = records(monkeypatch)
    actual = generated()
    assert len(graphs) == 1 and graphs[0] is not None
    monkeypatch.setattr(cuda_decode.CudaDecodeRunner, "_record", lambda self, step: None)
    assert actual == generated()
    monkeypatch.setattr(cuda_decode, "unsupported_reason", lambda model: "for this test")
    if format != "w8a8":  # int8 next to a tie may round the other way, and then the text differs
        assert actual == generated()


def test_generation_within_a_generation(monkeypatch):
    """The second one concatenates again the biases that the first one's graph reads."""
    model = small_model("w4a16", "qwen2").cuda()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    graphs = records(monkeypatch)

    def generated(on_token=None):
        options = {"max_new_tokens": 20, "temperature": 0, "on_token": on_token}
        return model.generate([[5, 6, 7]], **options)

    def other(row, token):
        model.generate([[8, 9]], max_new_tokens=4, temperature=0)
        for n in (1 << 10, 1 << 20):  # overwrite freed memory
            torch.full((64, n), torch.nan, device="cuda")

    expected = generated()
    assert generated(other) == expected
    assert len(graphs) == 22 and None not in graphs


@pytest.mark.parametrize("format", [None, "w4a16", "w8a8"])
def test_the_engine_by_graphs(monkeypatch, format):
    """The same tokens as from unrecorded steps, and as through the modules; rows come and go, and
    are preempted.
    """
    model = small_model(format).cuda()
    prompts = [list(range(1, 30)), [5, 6, 7], list(range(100, 300)), [8], [9] * 60]
    requests = [
        Request(prompt, 20 + 30 * i, Sampling(temperature=0), ignore_eos=True)
        for i, prompt in enumerate(prompts)
    ]

    def generated():
        engine = Engine(model, num_blocks=8)
        answers = [result.token_ids for result in engine.generate(requests)]
        return type(engine._batch.runner), answers

    graphs = records(monkeypatch)
    kind, got = generated()
    assert kind is cuda_decode.CudaDecodeRunner and len(graphs) >= 3 and None not in graphs
    monkeypatch.setattr(cuda_decode.CudaDecodeRunner, "_record", lambda self, step: None)
    assert generated() == (kind, got)
    monkeypatch.setattr(cuda_decode, "unsupported_reason", lambda model: "for this test")
    kind, actual = generated()
    assert kind is ModuleDecodeRunner
    if format != "w8a8":  # as in `test_generation_by_a_graph`
        assert actual == got


def test_a_step_on_pages_does_not_wait():
    """Its inputs come from pinned memory, which is written again while the copy may be running."""
    model = small_model("w4a16").cuda()
    model.model.fuse()
    data = BlockManager(model.config, 40, dtype=model.dtype, device="cuda").data.normal_()
    steps, plain = (cuda_decode.CudaDecodeRunner(model, d) for d in (data, data.clone()))
    plain.can_record = False
    inputs = [
        (torch.randint(1000, (3,)), torch.tensor([5, 70, 0]) + i, torch.randperm(40)[:6].view(3, 2))
        for i in range(30)
    ]
    rows = torch.arange(3)
    for each in inputs[:2]:
        steps.logits(*each, logits_indices=rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = [steps.logits(*each, logits_indices=rows) for each in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for each in inputs[:2]:
        plain.logits(*each, logits_indices=rows)
    for each, logits in zip(inputs, actual, strict=True):
        assert torch.equal(plain.logits(*each, logits_indices=rows), logits)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_generation_on_each_gpu(monkeypatch):
    graphs, texts = records(monkeypatch), []
    for i in range(2):
        model = small_model("w4a16").to(f"cuda:{i}")
        texts.append(model.generate([[5, 6, 7]], max_new_tokens=20, temperature=0))
    assert texts[0] == texts[1]
    assert len(graphs) == 2 and None not in graphs


@pytest.mark.parametrize("name", OPS)
def test_compiles_without_a_break(name):
    make, op, _ = OPS[name]
    inputs = make()
    compiled = torch.compile(op, fullgraph=True)
    # inductor generates the arithmetic around a kernel, and sums in another order
    torch.testing.assert_close(compiled(*inputs), op(*inputs))
