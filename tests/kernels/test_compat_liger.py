"""Tests of `fastlm.compat.liger` against plain torch, by the arguments that Liger documents."""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from patch_models import FAMILIES, SMALL, model_of, pair, tokens
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

from fastlm import InputError
from fastlm.compat import liger as door
from fastlm.compat.liger import (
    LigerCrossEntropyLoss,
    LigerFusedLinearCrossEntropyLoss,
    LigerGEGLUMLP,
    LigerRMSNorm,
    LigerSwiGLUMLP,
    liger_cross_entropy,
    liger_fused_linear_cross_entropy,
    liger_geglu,
    liger_rms_norm,
    liger_rotary_pos_emb,
    liger_swiglu,
)
from fastlm.hf.patching import patched_ops

# warnings of transformers about its own names do not concern the kernels
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

SIGNATURES = {
    "liger_cross_entropy": "input, target, weight=None, **options",
    "liger_fused_linear_cross_entropy": (
        "input, weight, target, bias=None, ce_weight=None, **options"
    ),
    "LigerCrossEntropyLoss": "weight=None, **options",
    "LigerFusedLinearCrossEntropyLoss": "ce_weight=None, **options",
    "liger_rms_norm": "X, W, eps, offset=0.0, casting_mode='llama', in_place=True",
    "LigerRMSNorm": (
        "hidden_size, eps=1e-06, offset=0.0, casting_mode='llama', init_fn='ones', in_place=True,"
        " row_mode=None, elementwise_affine=True"
    ),
    "liger_rope": "q, k, cos, sin, position_ids=None, unsqueeze_dim=1",
    "liger_swiglu": "a, b",
    "liger_geglu": "a, b",
    "LigerSwiGLUMLP": "config, intermediate_size=None",
}  # from Liger-Kernel 0.8; its losses list their options one by one


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(door, name)).parameters.values()
    assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == SIGNATURES[name]


ROWS, CLASSES, WIDTH, IGNORED = 13, 37, 8, 5


def truth(logits, target, *, weight, ignore_index, smoothing, scale, reduction, softcap):
    """Return the loss in float64. That of an ignored row is 0."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    valid = target != ignore_index
    loss = F.cross_entropy(
        z, target, weight, ignore_index=ignore_index, label_smoothing=smoothing, reduction="none"
    )
    loss = loss + scale * z.logsumexp(-1).square() * valid
    if reduction == "none":
        return loss
    total = (valid if weight is None else weight[target.clamp(min=0)] * valid).sum()
    return loss.sum() / (1 if reduction == "sum" else total)


def drawn(dtype=torch.float32, ignore_index=IGNORED):
    x = torch.randn(ROWS, WIDTH).to(dtype)
    head = torch.randn(CLASSES, WIDTH).to(dtype)
    target = torch.randint(0, CLASSES, (ROWS,))
    target[::4] = ignore_index
    return x, head, target


LOSSES = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 2.0},
    "z-loss": {"lse_square_scale": 0.01},
    "weights": {"weight": True},
    "weights, sum": {"weight": True, "reduction": "sum", "lse_square_scale": 0.01},
    "all": {"weight": True, "label_smoothing": 0.1, "softcap": 2.0, "lse_square_scale": 0.01},
    "all, none": {
        "weight": True, "label_smoothing": 0.1, "softcap": 2.0, "lse_square_scale": 0.01,
        "reduction": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("ignore_index", [-100, IGNORED])
@pytest.mark.parametrize("fused", [False, True])
def test_losses(options, ignore_index, fused):
    options = dict(options)
    x, head, target = drawn(ignore_index=ignore_index)
    bias = torch.randn(CLASSES)
    weight = torch.rand(CLASSES) + 0.1 if options.pop("weight", False) else None
    options["ignore_index"] = ignore_index
    leaves = (x, head, bias) if fused else (F.linear(x, head, bias),)
    leaves = [t.requires_grad_() for t in leaves]
    if fused:
        module = LigerFusedLinearCrossEntropyLoss(ce_weight=weight, **options)
        loss = module(head, x, target, bias)
        repeated = liger_fused_linear_cross_entropy(
            x, head, target, bias, ce_weight=weight, accum_dtype=torch.float32, chunk_mem_const=2,
            **options,
        )  # fmt: skip
    else:
        module = LigerCrossEntropyLoss(weight=weight, **options)
        loss = module(leaves[0], target)
        repeated = liger_cross_entropy(leaves[0], target, weight, **options)
    assert not module.state_dict() and not list(module.parameters())
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = truth(
        F.linear(*doubles) if fused else doubles[0], target,
        weight=None if weight is None else weight.double(),
        ignore_index=ignore_index, smoothing=options.get("label_smoothing", 0.0),
        scale=options.get("lse_square_scale", 0.0), reduction=options.get("reduction", "mean"),
        softcap=options.get("softcap"),
    )  # fmt: skip
    assert torch.equal(loss, repeated) and loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(loss.shape)  # not 1, and of either sign
    actual = torch.autograd.grad(loss, leaves, upstream)
    expected_gradients = torch.autograd.grad(expected, doubles, upstream.double())
    for a, b in zip(actual, expected_gradients):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_all_rows_ignored(weighted):
    """0, as in Liger, with a gradient of 0. torch's mean is NaN."""
    x, head, _ = drawn()
    x.requires_grad_()
    target = torch.full((ROWS,), -100)
    weight = torch.rand(CLASSES) if weighted else None
    for loss in (
        liger_cross_entropy(F.linear(x, head), target, weight, lse_square_scale=0.1),
        liger_fused_linear_cross_entropy(x, head, target, ce_weight=weight, lse_square_scale=0.1),
    ):
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


@pytest.mark.parametrize("fused", [False, True])
def test_losses_in_low_precision(dtype, fused):
    """The logits are not overwritten, and a second backward returns the same."""
    x, head, target = drawn(dtype)
    logits = F.linear(x, head)
    leaf = (x if fused else logits).requires_grad_()
    before = leaf.detach().clone()
    if fused:
        loss = liger_fused_linear_cross_entropy(x, head, target)
    else:
        loss = liger_cross_entropy(leaf, target)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, leaf)[0]) and first.dtype == dtype
    assert torch.equal(leaf, before) and loss.dtype == torch.float32
    wide = F.linear(x.double(), head.double()) if fused else logits.double()
    # existing logits are rounded to the dtype
    torch.testing.assert_close(loss.double(), F.cross_entropy(wide, target), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("offset, init", [(0.0, "ones"), (1.0, "zeros")])
def test_rms_norm(dtype, affine, offset, init):
    x = torch.randn(5, 24).to(dtype).requires_grad_()
    for mode in ("llama", "gemma", "none"):
        norm = LigerRMSNorm(24, 1e-5, offset, mode, init, False, True, affine)
        assert list(norm.state_dict()) == (["weight"] if affine else [])
        weight = torch.ones(24, dtype=torch.float64)
        if affine:
            assert torch.equal(norm.weight + offset, torch.ones(24))
            nn.init.normal_(norm.weight)
            weight = norm.weight.detach().double() + offset
        y = norm(x)
        assert y.dtype == dtype
        wide = x.detach().double().requires_grad_()
        expected = F.rms_norm(wide, (24,), weight, 1e-5)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=1e-6)
        upstream = torch.randn(y.shape).to(dtype)
        (a,) = torch.autograd.grad(y, x, upstream)
        (b,) = torch.autograd.grad(expected, wide, upstream.double())
        torch.testing.assert_close(a.double(), b, rtol=4 * tolerance, atol=10 * tolerance)
        assert torch.equal(y, liger_rms_norm(x, norm.weight, 1e-5, offset, mode))


def test_rms_norm_of_models():
    """The norms replace transformers' norms, with their weights."""
    x = torch.randn(3, 7, 32)
    for theirs, ours in (
        (LlamaRMSNorm(32), LigerRMSNorm(32)),
        (GemmaRMSNorm(32), LigerRMSNorm(32, offset=1.0, init_fn="zeros")),
    ):
        assert torch.equal(ours(x), liger_rms_norm(x, theirs.weight, 1e-6, ours.offset))
        nn.init.normal_(theirs.weight)
        ours.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary(batch):
    q, k = torch.randn(2, 4, 9, 16, requires_grad=True), torch.randn(2, 2, 9, 16)
    angles = torch.randn(batch, 9, 8)
    cos, sin = (torch.cat((t, t), -1) for t in (angles.cos(), angles.sin()))
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    upstream = torch.randn(2, 4, 9, 16)
    (expected_gradients,) = torch.autograd.grad(expected[0], q, upstream)
    places = torch.arange(9)[None]
    for actual in (
        liger_rotary_pos_emb(q, k, cos, sin, places),
        door.liger_rope(q, k, cos, sin, places),
        liger_rotary_pos_emb(q, k, cos[:, None], sin[:, None]),
        liger_rotary_pos_emb(q, k, cos[:, :, None], sin[:, :, None], places, 2),
    ):
        for a, b in zip(actual, expected):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(actual[0], q, upstream)
        torch.testing.assert_close(gradient, expected_gradients, rtol=1e-6, atol=1e-6)


def test_gated_products():
    a, b = torch.randn(2, 3, 5, 11).unbind()
    torch.testing.assert_close(liger_swiglu(a, b), F.silu(a) * b)
    torch.testing.assert_close(liger_geglu(a, b), F.gelu(a, approximate="tanh") * b)


@pytest.mark.parametrize(
    "cls, act", [(LigerSwiGLUMLP, "silu"), (LigerGEGLUMLP, "gelu_pytorch_tanh")]
)
def test_mlps(cls, act):
    """The module replaces Llama's MLP, with its weights."""
    config = LlamaConfig(**SMALL, hidden_act=act)
    theirs, ours = LlamaMLP(config), cls(config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


APPLIED = [n for n in vars(door) if n.startswith("apply_liger_kernel_to_")]


@pytest.mark.parametrize("name", APPLIED)
def test_apply_to_models(name):
    """The requested ops are patched where the model has modules for them, but not attention."""
    kind = name.removeprefix("apply_liger_kernel_to_")
    family = {"gemma3_text": "gemma3", "qwen3_moe": "qwen2_moe"}.get(kind, kind)
    apply, expected_ops = getattr(door, name), dict(FAMILIES[family][1])
    model = model_of(family)
    apply(model=model)
    del expected_ops["attention"]
    assert patched_ops(model) == expected_ops
    apply(model=model, rope=False, fused_linear_cross_entropy=False)
    assert patched_ops(model).keys() == expected_ops.keys() - {"rope", "linear_cross_entropy"}
    act = "geglu" if "gemma" in kind else "swiglu"
    none = {"rope": False, "cross_entropy": False, "rms_norm": False, act: False}
    apply(**none, fused_linear_cross_entropy=True, model=model)
    assert patched_ops(model).keys() == {"linear_cross_entropy"}
    apply(**none, fused_linear_cross_entropy=False, model=model)
    assert patched_ops(model) == {}
    with pytest.raises(InputError, match="cross_entropy: expected False"):
        apply(cross_entropy=True, fused_linear_cross_entropy=False, model=model)
    with pytest.raises(InputError, match=r"options: expected some of rope, .*, got swigl"):
        apply(swigl=False, model=model)


@pytest.fixture
def llama_classes(monkeypatch):
    """Their ``__init__`` is put back after the test."""
    for name in ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"):
        cls = getattr(modeling_llama, name)
        monkeypatch.setattr(cls, "__init__", cls.__init__)


def test_apply_without_a_model_patches_those_that_are_built(llama_classes, tmp_path):
    """Liger's first example works. Existing models and other families are unchanged."""
    before = model_of("llama").eval()
    before.save_pretrained(tmp_path)
    door.apply_liger_kernel_to_llama()
    assert patched_ops(before) == {} and patched_ops(model_of("mistral")) == {}
    expected_ops = dict(FAMILIES["llama"][1])
    del expected_ops["attention"]
    with torch.no_grad():
        for load in (
            lambda: LlamaForCausalLM.from_pretrained(tmp_path),
            lambda: AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
        ):
            model = load().eval()
            assert patched_ops(model) == expected_ops and type(model).__name__ == "LlamaForCausalLM"
            ids = tokens()
            torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)
    door.apply_liger_kernel_to_llama(rope=False, swiglu=False)  # replaces the first choice
    assert patched_ops(LlamaModel(before.config)) == {"rms_norm": 5}
    with pytest.raises(InputError, match="cross_entropy: expected False"):
        door.apply_liger_kernel_to_llama(cross_entropy=True)


def test_the_auto_class_takes_the_options_of_both(tmp_path):
    model_of("llama").save_pretrained(tmp_path)
    auto = door.AutoLigerKernelForCausalLM
    model = auto.from_pretrained(tmp_path, dtype=torch.bfloat16, rope=False)
    assert patched_ops(model).keys() == {"rms_norm", "glu", "linear_cross_entropy"}
    assert model.dtype == torch.bfloat16


def test_mlp_sizes():
    config = SimpleNamespace(hidden_size=8, intermediate_size=16, hidden_act="swish")
    assert LigerSwiGLUMLP(config, intermediate_size=24).up_proj.weight.shape == (24, 8)
    config.hidden_act = "gelu"
    with pytest.raises(InputError, match=r"config\.hidden_act: expected silu or swish, got 'gelu'"):
        LigerSwiGLUMLP(config)


def swapped(model, dtype):
    """Return a Llama with Liger's norms and MLPs and the model's weights."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        mlp = LigerSwiGLUMLP(model.config)
        mlp.load_state_dict(layer.mlp.state_dict())
        layer.mlp = mlp
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = LigerRMSNorm(64, model.config.rms_norm_eps)
            norm.load_state_dict(getattr(layer, name).state_dict())
            setattr(layer, name, norm)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convergence(dtype):
    """Liger's own test, reduced: a model of its modules and its loss trains like the plain one."""
    plain, _ = pair(dtype=dtype)
    fast = swapped(plain, dtype)
    fused = LigerFusedLinearCrossEntropyLoss()
    table = torch.randint(3, 99, (99,))
    histories = []
    for model in (plain.train(), fast.train()):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(32):
            rows = [tokens(4, 1)]
            for _ in range(11):
                rows.append(table[rows[-1]])
            ids = torch.cat(rows, 1)
            if model is fast:
                hidden = model.model(ids).last_hidden_state[:, :-1]
                loss = fused(model.lm_head.weight, hidden.reshape(-1, 64), ids[:, 1:].reshape(-1))
            else:
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        histories.append(torch.tensor(losses))
    a, b = histories
    assert a[-1] < 0.7 * a[0]
    # float32: rounding, amplified by training; bfloat16: a few of its roundings per step
    assert ((a - b).abs() / a).max() < (1e-3 if dtype == torch.float32 else 5e-2)


def test_compiles_in_one_graph():
    x, head, target = drawn()

    def function(x, head):
        x = liger_rms_norm(x, head[0], 1e-6)
        loss = liger_fused_linear_cross_entropy(x, head, target, lse_square_scale=0.1)
        return loss + liger_cross_entropy(F.linear(x, head), target)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, head), function(x, head))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, h, t: liger_cross_entropy(x, t, size_average=True), "size_average: expected"),
        (
            lambda x, h, t: liger_cross_entropy(x, t, return_z_loss=True),
            "return_z_loss: expected None",
        ),
        (lambda x, h, t: liger_cross_entropy(x, t, reduction="batchmean"), "reduction: expected"),
        (lambda x, h, t: liger_cross_entropy(x, t, softcap=-1.0), "softcap: expected > 0"),
        (lambda x, h, t: LigerCrossEntropyLoss(label_smoothing=2)(x, t), "smoothing: expected"),
        (lambda x, h, t: liger_cross_entropy(x, t + 99), "target: expected"),
        (
            lambda x, h, t: liger_cross_entropy(x, t + 99, torch.ones(WIDTH)),
            "target: expected",
        ),
        (lambda x, h, t: liger_rms_norm(x, h[0], 1e-6, 0.0, "gemm"), "casting_mode: expected one"),
        (lambda x, h, t: LigerRMSNorm(8, init_fn="randn"), "init_fn: expected ones or zeros"),
    ],
)  # fmt: skip
def test_refusals(call, message):
    x, head, target = drawn()
    target = target.remainder(WIDTH)
    with pytest.raises(InputError, match=message) as caught:
        call(x, head, target)
    assert "\n" not in str(caught.value)
