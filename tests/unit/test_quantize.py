"""quantize_weight, QuantizedWeight, the modules and `fastlm.quantize`."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastlm
from fastlm import InputError, ops, quant
from fastlm.quant import QuantizedEmbedding, QuantizedLinear, QuantizedWeight


def snr(w, q):
    noise = q.dequantize(torch.float64) - w.double()
    return 10 * torch.log10(w.double().square().sum() / noise.square().sum()).item()


# ---- quantize_weight


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, 32, 40, 128, -1, 4096])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 7, 123, 256, 507])
def test_error_is_within_half_a_step(bits, group_size, symmetric, k):
    w = torch.randn(19, k)
    q = ops.quantize_weight(w, bits, group_size=group_size, symmetric=symmetric)
    size = k if group_size == -1 else group_size
    assert q.shape == (19, k) and q.scales.shape == (19, -(-k // size))
    assert (q.zeros is None) == symmetric
    step = q.scales.float().abs().repeat_interleave(size, 1)[:, :k]
    error = (q.dequantize() - w).abs()
    if bits == 8:
        # a stored bfloat16 scale may be short by 2^-9: 2^-9 * 127 is under half a step at the end
        assert (error <= step * 0.501 + 1e-6).all()
    elif symmetric:  # deliberately clipped, at most to about 0.55 of the largest weight
        assert (error <= torch.maximum(step * 0.501, 0.5 * w.abs())).all()
    else:  # the ends may be clipped: of all weights at most these two and their neighbours
        assert ((error <= step * 0.501 + 1e-6).float().mean() > 0.8) or size < 16


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 5),
    k=st.integers(1, 70),
    group_size=st.sampled_from([8, 16, 64, -1]),
    symmetric=st.booleans(),
    weighted=st.booleans(),
)
def test_the_search_is_no_worse_than_plain_rounding(n, k, group_size, symmetric, weighted):
    """Compare with the scale of the full range, by the squared error. Each of two steps to a scale
    that does not shrink the group raises the best error, a share p of the weights' square, to
    p / (1 - p) at most.
    """
    w = torch.randn(n, k) + torch.randn(n, 1)
    importance = torch.rand(k) ** 4 if weighted else None
    q = ops.quantize_weight(
        w, 4, group_size=group_size, symmetric=symmetric, importance=importance,
        scale_dtype=torch.float32,
    )  # fmt: skip
    size = k if group_size == -1 else group_size
    for begin in range(0, k, size):
        columns = slice(begin, begin + size)
        group = w[:, columns]
        if importance is None:
            u = 1 + group.square() / group.square().mean(1, keepdim=True)
        else:
            u = importance[columns].expand_as(group)
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        if symmetric:
            scale = torch.maximum(-low, high) / 7
            rounded = (group / scale).round() * scale
        else:
            scale = ((high - low) / 15).clamp(min=1e-30)
            rounded = ((group - low) / scale).round() * scale + low
        error, plain = ((x - group).square() * u for x in (q.dequantize()[:, columns], rounded))
        error, plain = error.sum(1), plain.sum(1)
        mean = 0.0 if symmetric else ((group * u).sum(1) / u.sum(1))[:, None]
        share = plain / ((group - mean).square() * u).sum(1)
        limit = torch.where(share < 0.5, plain / (1 - 2 * share), torch.inf)
        assert (error <= limit * 1.001 + 1e-7).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_int4_does_not_shrink_weights(symmetric, weighted):
    """The quantized weights regress on the original ones with slope 1. The slope of a least-squares
    fit is 1 less its share of squared error, here 0.005.
    """
    w = torch.randn(128, 512) + (0.0 if symmetric else 1.0)
    u = torch.rand(512) ** 2 if weighted else torch.ones(512)
    q = ops.quantize_weight(
        w, 4, group_size=32, symmetric=symmetric, importance=u, scale_dtype=torch.float32
    )
    groups, u = w.view(128, -1, 32), u.view(-1, 32)
    centered = groups
    if not symmetric:
        centered = groups - ((groups * u).sum(-1) / u.sum(-1))[..., None]
    d = q.dequantize().view_as(groups)
    slopes = (d * centered * u).sum(-1) / (groups * centered * u).sum(-1)
    share = ((d - groups).square() * u).sum() / (centered.square() * u).sum()
    assert share > 0.003
    assert abs(slopes.mean() - 1) < 0.1 * share


def test_importance_moves_the_error_to_what_matters_less():
    w = torch.randn(64, 256)
    importance = torch.rand(256) ** 4
    for symmetric in (True, False):
        options = {"group_size": 64, "symmetric": symmetric}
        plain = ops.quantize_weight(w, 4, **options).dequantize() - w
        q = ops.quantize_weight(w, 4, importance=importance, **options).dequantize() - w
        # measured on more columns: 0.82 and 0.78
        assert (q.square() * importance).sum() < 0.9 * (plain.square() * importance).sum()
    first, second = (
        ops.quantize_weight(w, 4, group_size=64, importance=torch.full((256,), value))
        for value in (1.0, 3.0)
    )
    assert torch.equal(first.qdata, second.qdata)
    for wrong, message in [
        (importance[:255], r"importance: expected shape \(256,\) .* got \(255,\)"),
        (-importance, "importance: expected finite values of at least 0"),
    ]:
        with pytest.raises(InputError, match=message):
            ops.quantize_weight(w, 4, importance=wrong)


def test_int4_search_beats_absmax():
    w = torch.randn(256, 1024)
    groups = w.view(256, 8, 128)
    s = groups.abs().amax(-1, keepdim=True) / 7
    plain = (groups / s).round().clamp(-8, 7) * s - groups
    plain_snr = 10 * torch.log10(w.square().sum() / plain.square().sum()).item()
    # measured: 1.1 dB on Gaussian weights
    assert snr(w, ops.quantize_weight(w, 4)) > plain_snr + 0.8


def test_signal_to_noise_of_gaussian_weights():
    w = torch.randn(256, 1024)
    # 16 levels over 128 Gaussian values, about +-2.7 sigma: step 0.34, 12 / 0.34^2 = 20 dB
    assert snr(w, ops.quantize_weight(w, 4, importance=torch.ones(1024))) > 20
    assert snr(w, ops.quantize_weight(w, 4)) > 19.7  # large weights count more
    assert snr(w, ops.quantize_weight(w, 8)) > 43
    shifted = w + 5
    asymmetric = ops.quantize_weight(shifted, 4, symmetric=False)
    noise = (asymmetric.dequantize() - shifted).square().mean().sqrt()
    assert noise < 0.12  # the offset is absorbed: the same noise as without it


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_dtype_costs_nothing(scale_dtype):
    w = torch.randn(64, 512)
    q = ops.quantize_weight(w, 4, scale_dtype=scale_dtype)
    assert q.scales.dtype == scale_dtype
    assert abs(snr(w, q) - snr(w, ops.quantize_weight(w, 4, scale_dtype=torch.float32))) < 0.05


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_zero_and_tiny_groups(bits, symmetric):
    w = torch.zeros(4, 64)
    w[1] = 3.0
    w[2] = 1e-38
    w[3, 5] = -2.0
    q = ops.quantize_weight(w, bits, group_size=32, symmetric=symmetric)
    d = q.dequantize()
    assert d.isfinite().all() and torch.equal(d[0], torch.zeros(64))
    # asymmetric: the offset of a group of -2 and zeros is stored in bfloat16, within 2^-9 of 2
    torch.testing.assert_close(d[1:], w[1:], rtol=0.01, atol=1e-6 if symmetric else 2**-8)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 9),
    k=st.integers(1, 70),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([8, 16, 64, -1]),
)
def test_codes_survive_a_second_rounding(n, k, bits, group_size):
    q = ops.quantize_weight(torch.randn(n, k), bits, group_size=group_size)
    rounded_twice = ops.quantize_weight(q.dequantize(), bits, group_size=group_size)
    # the search may prefer another scale, never a worse one
    error = (rounded_twice.dequantize() - q.dequantize()).abs()
    assert error.numel() == 0 or error.max() <= 0.3 * q.dequantize().abs().max()
    assert rounded_twice.nbytes == q.nbytes


def test_strided_and_low_precision_input():
    w = torch.randn(40, 64)
    for view in (w.t(), w[::2], w[:, 8:40]):
        a, b = ops.quantize_weight(view, 4), ops.quantize_weight(view.contiguous(), 4)
        assert torch.equal(a.qdata, b.qdata) and torch.equal(a.scales, b.scales)
    assert snr(w.bfloat16(), ops.quantize_weight(w.bfloat16(), 8)) > 40


def test_packing_is_what_the_interface_says():
    codes = torch.arange(-8, 8).repeat(2, 1)
    q = QuantizedWeight(
        torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]] * 2, dtype=torch.uint8),
        torch.tensor([[1.0, 2.0], [-1.0, 0.5]]),
        torch.tensor([[0.0, 0.0], [1.0, 0.0]]),
        4,
        8,
        (2, 16),
    )
    scale = torch.tensor([[1.0] * 8 + [2.0] * 8, [-1.0] * 8 + [0.5] * 8])
    zero = torch.tensor([[0.0] * 16, [1.0] * 8 + [0.0] * 8])
    assert torch.equal(q.dequantize(), codes * scale + zero)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert q.nbytes == 16 + 16 + 16 and q.to("cpu").shape == (2, 16)


def test_weight_refusals():
    w = torch.randn(4, 32)
    for call, message in [
        (
            lambda: ops.quantize_weight(torch.randn(4), 4),
            r"w: expected a float matrix .* got .*\(4,\)",
        ),
        (lambda: ops.quantize_weight(w.int(), 4), r"w: expected a float matrix .* torch.int32"),
        (lambda: ops.quantize_weight(w[:, :0], 4), r"w: expected .* K >= 1"),
        (lambda: ops.quantize_weight(w, 3), "bits: expected 4 or 8, got 3"),
        (lambda: ops.quantize_weight(w, 4, group_size=-2), "group_size: .* got -2"),
        (lambda: ops.quantize_weight(w, 4, group_size=0), "group_size: .* got 0"),
        (lambda: ops.quantize_weight(w, 4, group_size=12), "group_size: .* multiple of 8.* got 12"),
        (lambda: ops.quantize_weight(w, 4, group_size=1.5), "group_size: expected an int, got 1.5"),
        (lambda: ops.quantize_weight(w * float("nan"), 4), "w: expected finite values"),
        (lambda: ops.quantize_weight(w, 4, scale_dtype=torch.int8), "scale_dtype: expected"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    for symmetric in (True, False):  # int4: 1e7 / 8 exceeds 65504
        with pytest.raises(InputError, match=r"scale_dtype: expected .* weights up to 1e\+07"):
            ops.quantize_weight(w.fill_(1e7), 4, symmetric=symmetric, scale_dtype=torch.float16)
    with pytest.raises(
        InputError, match=r"scale_dtype: expected .* up to 1e\+300, got torch.bfloat"
    ):
        ops.quantize_weight(torch.full((2, 8), 1e300, dtype=torch.float64), 8)
    with pytest.raises(InputError, match=r"shape: expected \(N, K\), K >= 1, got \(4, 0\)"):
        QuantizedWeight(torch.empty(4, 0, dtype=torch.int8), torch.empty(4, 0), None, 8, -1, (4, 0))
    q = ops.quantize_weight(torch.randn(4, 32), 8, group_size=16)
    for changed, message in [
        ({"qdata": q.qdata[:, :31]}, r"qdata: expected torch.int8 \(4, 32\)"),
        ({"qdata": q.qdata.int()}, "qdata: expected torch.int8"),
        ({"scales": q.scales[:, :1]}, r"scales: expected .* \(4, 2\) for groups of 16"),
        ({"scales": q.scales.double()}, "scales: expected float32, bfloat16 or float16"),
        ({"zeros": q.scales[:3]}, "zeros: expected"),
        ({"zeros": q.scales.double()}, "zeros: expected float32, bfloat16 or float16"),
        ({"bits": 5}, "bits: expected 4 or 8, got 5"),
        ({"group_size": -3}, "group_size: expected"),
    ]:
        fields = {f: getattr(q, f) for f in q.__dataclass_fields__} | changed
        with pytest.raises(InputError, match=message):
            QuantizedWeight(**fields)


# ---- modules and models


class Small(nn.Module):
    """An embedding, two layers and a head, which may be tied to the embedding."""

    def __init__(self, tied=True, width=64):
        super().__init__()
        self.embed = nn.Embedding(100, width)
        self.layers = nn.Sequential(
            nn.Linear(width, 96), nn.SiLU(), nn.Linear(96, width, bias=False)
        )
        self.lm_head = nn.Linear(width, 100, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.layers(self.embed(ids)))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["w4a16", "w8a16", "w8a8", "w4a8"])
def test_quantize_replaces_every_layer(format, tied):
    model, ids = Small(tied), torch.arange(100)
    before = model(ids)
    assert fastlm.quantize(model, format, group_size=32) is model
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(QuantizedLinear) == 3 and kinds.count(QuantizedEmbedding) == 1
    assert nn.Linear not in kinds and nn.Embedding not in kinds
    assert model.layers[0].act_bits == int(format[3:]) and model.layers[0].bits == int(format[1])
    assert (model.lm_head.qdata.data_ptr() == model.embed.qdata.data_ptr()) == tied
    after = model(ids)
    # the rounding of three weights with SNR r adds up to r - 10 log10(3); int8: 43 dB, int4: 21 dB
    error = 10 * torch.log10(before.square().sum() / (after - before).square().sum())
    assert error > (34 if format == "w8a16" else 30 if format == "w8a8" else 14)
    names = set(model.state_dict())
    assert {"embed.qdata", "embed.scales", "lm_head.qdata", "layers.0.bias"} <= names
    # an embedding row is the dequantized row
    assert torch.equal(model.embed(ids), model.embed.weight.dequantize())


def test_embeddings_and_head_as_the_user_chooses():
    model = fastlm.quantize(Small(tied=False), "w4a16", embeddings=8, head=None)
    assert model.embed.bits == 8 and isinstance(model.lm_head, nn.Linear)
    model = fastlm.quantize(Small(tied=False), "w4a16", embeddings=None, head=8)
    assert isinstance(model.embed, nn.Embedding) and model.lm_head.bits == 8
    model = fastlm.quantize(Small(), "w4a16", embeddings=8, head=8)
    assert model.lm_head.qdata is model.embed.qdata and model.layers[0].bits == 4
    model = fastlm.quantize(Small(), "w4a16", embeddings=None, head=None)
    assert model.lm_head.weight is model.embed.weight
    with pytest.raises(
        InputError, match="lm_head shares its weight with embed: expected the same bits"
    ):
        fastlm.quantize(Small(), "w4a16", embeddings=8)


def test_a_bare_linear_and_shared_modules():
    linear = nn.Linear(16, 8)
    q = fastlm.quantize(linear, "w8a16", group_size=-1)
    x = torch.randn(3, 16)
    torch.testing.assert_close(q(x), linear(x), rtol=0.05, atol=0.05)
    shared = nn.Linear(16, 16)
    model = fastlm.quantize(nn.Sequential(shared, nn.ReLU(), shared), "w8a16")
    assert model[0].qdata is model[2].qdata


def test_gradients_pass_through_and_the_weight_is_frozen():
    model = fastlm.quantize(Small(), "w4a16")
    assert [n for n, p in model.named_parameters()] == ["layers.0.bias"]
    x = torch.randn(5, 64, requires_grad=True)
    model.layers(x).sum().backward()
    assert x.grad is not None and model.layers[0].bias.grad is not None


def test_dtype_moves_keep_the_format():
    model = fastlm.quantize(Small(), "w4a16").bfloat16()
    assert model.layers[0].scales.dtype == torch.bfloat16
    assert model.layers[0].qdata.dtype == torch.uint8
    assert model(torch.arange(5)).dtype == torch.bfloat16
    model = fastlm.quantize(Small(), "w4a16", scale_dtype=torch.float32).half()
    assert model.embed.scales.dtype == torch.float32
    assert model.embed(torch.arange(5)).dtype == torch.float16


@pytest.mark.parametrize("tied", [True, False])
def test_configuration_and_state_rebuild_the_model(tied):
    ids = torch.arange(30)
    model = fastlm.quantize(Small(tied), "w8a8", group_size=16)
    expected = model(ids)
    config = json.loads(json.dumps(quant.quantization_config(model, "w8a8", group_size=16)))
    assert config["quant_method"] == "fastlm" and config["format"] == "w8a8"
    state = model.state_dict()
    assert torch.equal(quant.load_quantized(Small(tied), state, config)(ids), expected)
    if tied:  # a tied head is not stored twice
        state = {n: t for n, t in state.items() if not n.startswith("lm_head")}
        rebuilt = quant.load_quantized(Small(), state, config)
        assert torch.equal(rebuilt(ids), expected) and rebuilt.lm_head.qdata is rebuilt.embed.qdata


def test_state_refusals():
    model = fastlm.quantize(Small(tied=False), "w4a16")
    config = quant.quantization_config(model, "w4a16", group_size=128)
    state = model.state_dict()

    def without(name):
        return {n: t for n, t in state.items() if n != name}

    with pytest.raises(InputError, match=r"state: expected embed.scales, got none"):
        quant.load_quantized(Small(False), without("embed.scales"), config)
    with pytest.raises(InputError, match=r"missing: layers.0.bias"):
        quant.load_quantized(Small(False), without("layers.0.bias"), config)
    with pytest.raises(InputError, match=r"got extra in addition"):
        quant.load_quantized(Small(False), state | {"extra": torch.ones(1)}, config)
    with pytest.raises(InputError, match=r"state: expected lm_head.qdata, got none"):
        no_head = {n: t for n, t in state.items() if not n.startswith("lm_head")}
        quant.load_quantized(Small(False), no_head, config)
    with pytest.raises(InputError, match=r"expected shape .* as the model"):
        quant.load_quantized(Small(False, width=32), state, config)
    with pytest.raises(InputError, match="quant_method 'fastlm', got 'gptq'"):
        quant.load_quantized(Small(False), state, config | {"quant_method": "gptq"})
    with pytest.raises(InputError, match="nowhere: expected a module of the model"):
        modules = {"nowhere": config["modules"]["embed"]}
        quant.load_quantized(Small(False), state, config | {"modules": modules})


def test_quantize_refusals():
    for options, message in [
        ({"format": "w3a16"}, "format: expected one of w4a16, w8a16, w8a8, w4a8, got 'w3a16'"),
        ({"method": "awq"}, "method: expected one of rtn, gptq, autoround, got 'awq'"),
        ({"method": "gptq"}, "calibration: expected token ids .* for gptq"),
        ({"calibration": [1]}, r"calibration: expected a fastlm\.CausalLM as the model, got Small"),
        ({"group_size": -5}, "group_size: expected -1"),
        ({"embeddings": 3}, "embeddings: expected 4, 8, 16 or 0"),
    ]:
        model = Small()
        with pytest.raises(InputError, match=message):
            fastlm.quantize(model, options.pop("format", "w4a16"), **options)
        assert isinstance(model.embed, nn.Embedding)  # refused before anything was replaced
    with pytest.raises(InputError, match=r"model: ReLU has no nn\.Linear or nn\.Embedding"):
        fastlm.quantize(nn.ReLU(), "w4a16")
    for options in ({}, {"embeddings": 16, "head": 16}):  # wholly, and in part
        twice = fastlm.quantize(Small(), "w8a16", track=None, **options)
        with pytest.raises(
            InputError, match=r"an unquantized model, got \d .*keep_quantized=False"
        ):
            fastlm.quantize(twice, "w4a16")
    with pytest.raises(InputError, match="max_norm"):
        fastlm.quantize(nn.Embedding(4, 8, max_norm=1.0), "w4a16")


def test_int4_costs_little_on_a_trained_model_and_the_file_is_small():
    """A small model learns a Markov chain; int4, embedding included, keeps its bits per symbol."""
    torch.manual_seed(0)
    symbols, width = 256, 128
    chain = torch.softmax(torch.randn(symbols, symbols) * 2.5, -1)
    model = nn.Sequential(
        nn.Embedding(symbols, width),
        nn.Linear(width, 256),
        nn.SiLU(),
        nn.Linear(256, width),
        nn.Linear(width, symbols, bias=False),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for step in range(300):
        now = torch.randint(symbols, (512,))
        after = torch.multinomial(chain[now], 1).squeeze(1)
        loss = F.cross_entropy(model(now), after)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / 300)

    def loss_of(m):
        with torch.no_grad():
            log_q = torch.log_softmax(m(torch.arange(symbols)), -1)
        return -(chain * log_q).sum(-1).mean().item()

    before = loss_of(model)
    assert before < 0.9 * torch.log(torch.tensor(float(symbols)))  # it learned something
    bf16_bytes = sum(p.numel() * 2 for p in model.parameters())
    fastlm.quantize(model, "w4a16")
    assert loss_of(model) <= 1.02 * before
    int4_bytes = sum(t.nbytes for t in model.state_dict().values())
    assert int4_bytes <= 0.35 * bf16_bytes
