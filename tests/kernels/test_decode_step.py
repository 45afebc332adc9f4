"""Tests of the decode step in one call against the modules."""

import copy

import pytest
import torch
from families import CASES, SMALL
from row_cache import RowCache, RowDecodeSteps, next_logits
from tolerance import ULP

import fastlm
from fastlm import backend
from fastlm.checkpoint.config import ModelConfig
from fastlm.model import cpu_decode, layers
from fastlm.model.causal_lm import CausalLM
from fastlm.model.quantized_modules import set_quantized_weight
from fastlm.ops import quantize_weight
from fastlm.reference.quantized_linear import round_rows

# The modules' products have other shapes and round differently: 2^7 units in the last place, as in
# test_model.py. Where x is rounded to int8, a value next to a tie may then be rounded the other
# way. It changes by 1/127 of its run's maximum, which three layers of random weights amplify to up
# to 4 % of a logit's.
NEAR, FLIPPED = 2**7 * ULP[torch.float32], 0.08


def model_of(case="llama", **changes):
    options = {**SMALL, "max_position_embeddings": 512, **CASES[case], **changes}
    config = ModelConfig.from_dict({"model_type": case.split("-")[0], **options})
    return CausalLM(config, seed=4, scaled_residual=False).eval()


def prefilled(model, rows, length, capacity, dtype=torch.float32, seed=0):
    """Return ids (rows, capacity), and a cache with the first `length` of them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (rows, capacity), generator=g)
    cache = RowCache(model, rows, capacity, dtype=dtype)
    next_logits(model, ids[:, :length], cache)
    return ids, cache


def copy_of(model, cache):
    data = cache.data.clone()
    return RowDecodeSteps(
        cpu_decode.CpuDecodeRunner(model, cpu_decode.CpuDecodePlan(model), data), cache.length
    )


def int8_of(x):
    """Return codes and scales of keys or values (.., D); those of NaN are poison."""
    codes, scales = round_rows(x, x.shape[-1])
    return codes.to(torch.int8), scales[..., 0].clone()


def pages_of(data, dtype):
    """Return the arguments of `CpuDecodeRunner` for float32 pages in `dtype`."""
    return int8_of(data) if dtype == torch.int8 else (data.to(dtype), None)


def assert_steps_equal_modules(model, rows=3, length=9, count=4, act_bits=16):
    ids, cache = prefilled(model, rows, length, length + count)
    assert cpu_decode.unsupported_reason(model) is None
    steps = copy_of(model, cache)
    errors = []
    with torch.inference_mode():
        for i in range(length, length + count):
            expected = next_logits(model, ids[:, i : i + 1], cache)
            actual = steps.logits(ids[:, i].contiguous())
            errors.append(error_of(actual, expected))
            errors.append(error_of(steps.steps.data[..., i, :], cache.data[..., i, :]))
            steps.steps.data.copy_(cache.data)
    if act_bits == 16:
        assert max(errors) <= NEAR
    else:
        assert max(errors) <= FLIPPED


def error_of(actual, expected):
    assert actual.isfinite().all()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_families(case):
    assert_steps_equal_modules(model_of(case))
    assert_steps_equal_modules(fastlm.quantize(model_of(case), "w4a16", group_size=16))


def test_a_prompt_with_a_16_bit_cache_is_attended_in_bfloat16(monkeypatch):
    model, dtypes = model_of("gemma2"), []
    ours = layers.varlen_attention

    def spy(q, k, v, *rest, **options):
        dtypes.append({q.dtype, k.dtype, v.dtype})
        return ours(q, k, v, *rest, **options)

    monkeypatch.setattr(layers, "varlen_attention", spy)
    ids = torch.randint(0, 97, (2, layers._MIN_BF16_TOKENS + 5))
    logits = {}
    for dtype in (torch.float32, torch.float16):
        cache = RowCache(model, 2, 80, dtype=dtype)
        with torch.inference_mode():
            logits[dtype] = [
                next_logits(model, part, cache)
                for part in ids.tensor_split(
                    [layers._MIN_BF16_TOKENS, layers._MIN_BF16_TOKENS + 1], 1
                )
            ]
    count = model.config.num_hidden_layers
    wide = {torch.float32}
    narrow = {torch.bfloat16} if backend.multiplies_bf16() else wide  # AVX2 widens bfloat16
    assert dtypes == 3 * count * [wide] + count * [narrow] + 2 * count * [wide]
    pairs = zip(logits[torch.float16], logits[torch.float32], strict=True)
    errors = [error_of(actual, expected) for actual, expected in pairs]
    assert 0 < max(errors) < 2 * ULP[torch.bfloat16]


@pytest.mark.parametrize("format", ["w4a16", "w8a16", "w8a8", "w4a8"])
@pytest.mark.parametrize("group_size", [8, 32, 40, -1])
def test_formats(format, group_size, isa):
    model = fastlm.quantize(model_of(), format, group_size=group_size, scale_dtype=torch.float32)
    assert_steps_equal_modules(model, rows=5, act_bits=8 if format.endswith("a8") else 16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("act_bits", [8, 16])
def test_offsets(bits, act_bits, isa):
    """Weights are asymmetric, a row has several panels and runs, projections differ in format."""
    model = model_of(intermediate_size=2600, num_hidden_layers=2)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            other_bits = 12 - bits if name.endswith("v_proj") else bits
            group = -1 if name.endswith("down_proj") else 24
            weight = quantize_weight(module.weight, other_bits, group_size=group, symmetric=False)
            set_quantized_weight(model, name, weight, act_bits=act_bits)
    assert_steps_equal_modules(model, rows=2, act_bits=act_bits)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 15])
def test_rows(rows, isa):
    assert_steps_equal_modules(model_of(), rows=rows, count=2)


@pytest.mark.parametrize("changes", [{}, {"head_dim": 64}, {"head_dim": 80}], ids=str)
@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_long_contexts(case, changes):
    window = {"sliding_window": 150} if case == "mistral" else {}
    assert_steps_equal_modules(model_of(case, **changes, **window), length=254, count=5)


@pytest.mark.parametrize("length", [9, 254])
def test_all_scores_far_below_zero(length, isa):
    """Scores as keys with large biases cause them: from -89 on e^-score exceeds float32."""
    model = model_of("llama-biases")
    for layer in model.model.layers:
        for projection, bias in ((layer.self_attn.q_proj, 30.0), (layer.self_attn.k_proj, -30.0)):
            heads = projection.bias.data.view(-1, SMALL["head_dim"])
            heads[:, [11, 23]] = bias  # the pair with the slowest rotation
    ids, cache = prefilled(model, 2, length, length + 1)
    steps = copy_of(model, cache)
    with torch.inference_mode():
        expected = next_logits(model, ids[:, length:], cache)
    # scores near -370 have 370 times the rounding error of scores near 1
    assert error_of(steps.logits(ids[:, length].contiguous()), expected) <= 370 * NEAR


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_are_nearer_to_the_truth(dtype):
    model = model_of("qwen3").to(dtype)
    truth = copy.deepcopy(model).double()
    ids, cache = prefilled(model, 4, 9, 10, dtype=dtype)
    steps = copy_of(model, cache)
    with torch.inference_mode():
        expected = truth(ids).logits[:, -1]
        theirs = next_logits(model, ids[:, 9:], cache).double()
        mine = steps.logits(ids[:, 9].contiguous()).double()
    assert (mine - expected).abs().max() <= 2 * (theirs - expected).abs().max()


@pytest.mark.parametrize("format", [None, "w4a8", "w8a16"])
def test_same_bits(format, isa):
    """Results are the same on repetition, with any number of threads, and for any batch."""
    model = model_of(hidden_size=96, intermediate_size=224)
    if format:
        model = fastlm.quantize(model, format, group_size=32)
    ids, cache = prefilled(model, 11, 140, 142)
    tokens = ids[:, 140].contiguous()
    caches = {}
    for row in (0, 10):
        caches[row] = RowCache(model, 1, 142, dtype=torch.float32)
        caches[row].data.copy_(cache.data[:, :, row : row + 1])
        caches[row].length = 140
    threads = torch.get_num_threads()
    first = None
    try:
        for n in (1, 2, 3, 4, 2):  # also more threads than cores, some without work in a phase
            torch.set_num_threads(n)
            logits = copy_of(model, cache).logits(tokens)
            first = logits if first is None else first
            assert torch.equal(first, logits)
            for row in caches:
                expected = copy_of(model, caches[row]).logits(tokens[row : row + 1])
                assert torch.equal(expected[0], first[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["llama", "mistral"])
@pytest.mark.parametrize("page_size", [16, 48, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_pages(case, page_size, dtype, isa):
    """Rows of different lengths, in pages in any order, some shared, have the bits of each row
    alone in one page, and nothing beyond a row's end is read.
    """
    model = model_of(case, **({"sliding_window": 150} if case == "mistral" else {}))
    lengths, pages = [140, 3, 15, 271, 128], -(-272 // page_size)
    ids, cache = prefilled(model, 1, 271, 272)
    order = torch.randperm(5 * pages, generator=torch.Generator().manual_seed(1))
    table = order.view(5, pages).int()
    if page_size <= 128:  # the whole pages of the prompt that all begin with
        table[3, : 128 // page_size] = table[0, : 128 // page_size]
    shape = list(cache.data.shape)
    shape[2], shape[4] = 5 * pages, page_size
    data = torch.full(shape, torch.nan)
    expected, tokens, plan = [], ids[0, :5].contiguous(), cpu_decode.decode_plan(model)
    for row, length in enumerate(lengths):
        for j in range(length):
            data[:, :, table[row, j // page_size], :, j % page_size] = cache.data[:, :, 0, :, j]
        unread = torch.full_like(cache.data[..., : length + 1, :], torch.nan)
        unread[..., :length, :] = cache.data[..., :length, :]
        steps = cpu_decode.CpuDecodeRunner(model, plan, *pages_of(unread, dtype))
        single = tokens[row : row + 1], torch.tensor([length]), torch.zeros(1, 1, dtype=torch.int32)
        expected.append(steps.logits(*single))
    table[:, -1] = torch.where(torch.tensor(lengths) < page_size * (pages - 1), -7, table[:, -1])
    steps = cpu_decode.CpuDecodeRunner(model, plan, *pages_of(data, dtype))
    actual = steps.logits(tokens, torch.tensor(lengths), table)
    assert actual.isfinite().all() and torch.equal(actual, torch.cat(expected))


WIDE, INT8 = torch.float32, torch.int8


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(None, WIDE), ("w4a16", WIDE), ("w4a8", WIDE), ("w8a8", WIDE), (None, INT8), ("w8a8", INT8)],
)
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen3"])
def test_several_tokens_of_a_sequence(case, format, dtype, isa):
    """Rows that follow each other in a sequence have the bits that they have one by one, however
    they are cut into steps and beside whatever they are; logits are those of the rows expected.
    """
    model = model_of(case, **({"sliding_window": 40} if case == "mistral" else {}))
    if format:
        model = fastlm.quantize(model, format, group_size=24)
    g = torch.Generator().manual_seed(0)
    texts = torch.randint(0, 97, (2, 150), generator=g)
    config, plan = model.config, cpu_decode.decode_plan(model)
    shape = (config.num_hidden_layers, 2, 20, config.num_key_value_heads, 16, config.head_dim)
    tables = torch.randperm(20, generator=g).view(2, 10).int()

    def run(cuts):
        """`cuts`: of each step, (text, from, to) of its rows. The last row's logits, the keys."""
        pages = pages_of(torch.full(shape, torch.nan), dtype)
        steps, out = cpu_decode.CpuDecodeRunner(model, plan, *pages), {}
        for cut in cuts:
            of = torch.tensor([i for i, a, b in cut for _ in range(a, b)])
            at = torch.tensor([j for _, a, b in cut for j in range(a, b)])
            ends = [sum(b - a for _, a, b in cut[: i + 1]) - 1 for i in range(len(cut))]
            logits = steps.logits(texts[of, at], at, tables[of], logits_indices=torch.tensor(ends))
            assert logits.shape == (len(cut), 97)
            out |= {(i, b): row for (i, _, b), row in zip(cut, logits, strict=True)}
        return out, pages

    one_by_one, keys = run([[(i, j, j + 1)] for i in range(2) for j in range(150)])
    for cuts in (
        [[(0, 0, 150), (1, 0, 150)]],
        [[(1, 0, 2), (0, 0, 1)], [(0, 1, 3)], [(1, 2, 150), (0, 3, 150)]],
        [[(0, 0, 64)], [(0, 64, 150)], [(1, 0, 149)], [(1, 149, 150)]],
    ):
        out, actual = run(cuts)
        assert all(torch.equal(row, one_by_one[position]) for position, row in out.items())
        for mine, theirs in zip(actual, keys, strict=True):
            if theirs is not None:
                assert torch.equal(mine.nan_to_num(7.0), theirs.nan_to_num(7.0))
    steps = cpu_decode.CpuDecodeRunner(model, plan, *keys)
    step = texts[0, :2], torch.tensor([0, 1]), tables[:1].expand(2, -1).contiguous()
    assert steps.logits(*step, logits_indices=torch.tensor([], dtype=torch.int64)).shape == (0, 97)
    for expected, message in (([1, 0], "rows in order"), ([0, 0], "each once"), ([2], r"\[0, 2\)")):
        with pytest.raises(ValueError, match=message):
            steps.logits(*step, logits_indices=torch.tensor(expected))


class Filled(RowCache):
    """A cache that holds the next keys already; ``given``: the keys of the modules."""

    def __init__(self, model, data, length):
        super().__init__(model, data.shape[2], data.shape[4])
        self.data.copy_(data)
        self.written, self.length = torch.empty_like(data[..., 0, :]), length

    def append(self, layer, k, v):
        self.written[layer] = torch.stack((k, v))[:, 0].transpose(1, 2)
        return self.keys_and_values(layer, k.dtype)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("case", ["llama", "mistral", "gemma2", "qwen3"])
def test_int8_keys(case, head_dim, isa, monkeypatch):
    """A step computes what float64 modules compute with the keys that its int8 mean and queries
    that are rounded like them. It rounds its own key and value to the nearest int8: codes and
    scales have the bits of `round_rows`.
    """

    def rounded(q, k, v, *rest, **options):
        codes, scales = int8_of(q)
        return attention(codes.to(q.dtype) * scales[..., None], k, v, *rest, **options)

    attention, errors = layers.varlen_attention, []
    window = {"sliding_window": 150} if case == "mistral" else {}
    model = model_of(case, head_dim=head_dim, **window)
    truth, plan = copy.deepcopy(model).double(), cpu_decode.decode_plan(model)
    ids, cache = prefilled(model, 3, 254, 258)
    table = torch.arange(3, dtype=torch.int32)[:, None]
    wide = cache.data.clone()
    codes, scales = int8_of(wide)
    for i in range(254, 258):
        step = ids[:, i].contiguous(), torch.full((3,), i), table
        actual = cpu_decode.CpuDecodeRunner(model, plan, codes, scales).logits(*step)
        filled = Filled(truth, codes.double() * scales.double()[..., None], i)
        with torch.inference_mode(), monkeypatch.context() as patch:
            patch.setattr(layers, "varlen_attention", rounded)
            expected = next_logits(truth, ids[:, i : i + 1], filled)
        errors.append(error_of(actual, expected))
        error = (filled.written - filled.data[..., i, :]).abs() / scales[..., i, None]
        assert 0.3 < error.max()
        assert errors[-1] > NEAR or error.max() <= 0.5 + 1e-3
        cpu_decode.CpuDecodeRunner(model, plan, wide).logits(*step)
        for mine, theirs in zip((codes, scales), int8_of(wide[0, ..., i, :]), strict=True):
            assert torch.equal(mine[0, :, :, :, i], theirs)  # before attention, so the same keys
    assert max(errors) <= FLIPPED and min(errors) <= NEAR


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
def test_int8_keys_that_are_not_finite_are_seen(name, value, isa):
    model = model_of()
    g = torch.Generator().manual_seed(0)
    shape = (3, 2, 1, 3, 16, 24)
    codes, scales = int8_of(torch.randn(shape, generator=g))
    step = torch.tensor([5]), torch.tensor([9]), torch.zeros(1, 1, dtype=torch.int32)
    steps = cpu_decode.CpuDecodeRunner(model, cpu_decode.decode_plan(model), codes, scales)
    assert steps.logits(*step).isfinite().all()
    getattr(model.model.layers[1].self_attn, name).weight.data[30, 7] = value
    assert steps.logits(*step).isnan().all()
    part = 0 if name == "k_proj" else 1
    assert not scales[1, part, 0, 1, 9].isfinite()
    assert scales[1, part, 0, 0, 9].isfinite() and scales[0, ..., 9].isfinite().all()


@pytest.mark.parametrize("name", ["w4a8", "w8a16"])
def test_weights_are_packed_where_memory_allows(monkeypatch, name):
    model = fastlm.quantize(model_of(), name, group_size=24)
    assert model.config.tie_word_embeddings  # else the embedding is only looked up
    size = sum(m.qdata.nbytes for m in model.modules() if hasattr(m, "qdata"))
    ids, cache = prefilled(model, 2, 9, 10)
    logits = []
    for total, available, packs in (
        (6 * size, 2 * size, True),
        (6 * size, 2 * size - 1, False),
        (6 * size - 1, 6 * size - 1, False),
        (6 * size, None, True),
    ):
        monkeypatch.setattr(cpu_decode, "total_memory", lambda total=total: total)
        monkeypatch.setattr(cpu_decode, "available_memory", lambda free=available: free)
        assert cpu_decode.CpuDecodePlan(model).packs_weights == packs
        logits.append(copy_of(model, cache).logits(ids[:, 9].contiguous()))
    assert all(torch.equal(other, logits[0]) for other in logits[1:])


def test_prompts_as_rows_of_steps(monkeypatch):
    """`generate` then returns for each row its result alone, and nearly that of the modules."""
    model = fastlm.quantize(model_of(), "w8a8", group_size=24)
    assert cpu_decode.prefers_prompt_rows(cpu_decode.decode_plan(model)) == (
        backend.cpu_extension.isa() == "avx2"
    )
    assert not cpu_decode.prefers_prompt_rows(cpu_decode.decode_plan(model_of()))
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 97, (n,), generator=g).tolist() for n in (3, 70, 1, 200)]
    prompts += [prompts[1], [5] * 70, prompts[0]]
    options = {"max_new_tokens": 5, "temperature": 0.0, "return_logprobs": True}
    monkeypatch.setattr(cpu_decode, "prefers_prompt_rows", lambda plan: True)
    monkeypatch.setattr(CausalLM, "chunk_hidden", None)
    ids, logprobs = model.generate(prompts, **options)
    for row, prompt in enumerate(prompts):
        own_ids, own_logprobs = model.generate([prompt], **options)
        assert own_ids == [ids[row]] and own_logprobs == [logprobs[row]]
    monkeypatch.undo()
    monkeypatch.setattr(cpu_decode, "prefers_prompt_rows", lambda plan: False)
    _, theirs = model.generate(prompts, **options)
    first = torch.tensor([[a[0], b[0]] for a, b in zip(logprobs, theirs, strict=True)])
    assert (first[:, 0] - first[:, 1]).abs().max() < 0.1


def test_generate_takes_it_and_gives_what_modules_give(monkeypatch):
    model = model_of("mistral")
    prompts = [[5], [7, 8, 9, 10, 11, 12], [3, 4]]
    calls = []
    run = cpu_decode.CpuDecodeRunner.logits
    monkeypatch.setattr(
        cpu_decode.CpuDecodeRunner, "logits", lambda *a, **o: calls.append(1) or run(*a, **o)
    )
    fast = model.generate(prompts, max_new_tokens=12, temperature=0.0)
    assert len(calls) == 11  # all tokens but the first, which comes from the prompt
    monkeypatch.setattr(cpu_decode, "unsupported_reason", lambda model: "tested without")
    assert model.generate(prompts, max_new_tokens=12, temperature=0.0) == fast
    assert len(calls) == 11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_are_scaled_as_the_family_scales_them(dtype):
    """sqrt(60) rounded to 16 bits, as in transformers. Attention is off: its cache also rounds."""
    model = model_of("gemma2").to(dtype)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    truth = copy.deepcopy(model).double()
    truth.model.embedding_scale = lambda _: torch.tensor(60**0.5, dtype=dtype).item()
    ids, cache = prefilled(model, 2, 9, 10, dtype=dtype)
    with torch.inference_mode():
        expected = truth(ids).logits[:, -1]
    assert error_of(copy_of(model, cache).logits(ids[:, 9].contiguous()), expected) <= NEAR


@pytest.mark.parametrize("quantized", [False, True])
def test_plan_follows_what_leaves_no_trace(quantized):
    """Writes to `.data`, a parameter at the address of a freed one, other options."""
    model = model_of("llama-biases")
    if quantized:
        model = fastlm.quantize(model, "w8a16", group_size=16)
    plans = [cpu_decode.decode_plan(model)]
    assert cpu_decode.decode_plan(model) is plans[0]

    def changed():
        plans.append(cpu_decode.decode_plan(model))
        assert cpu_decode.decode_plan(model) is plans[-1]
        return plans[-1] is not plans[-2]

    model.model.layers[1].post_attention_layernorm.weight.data.mul_(-1)
    assert changed()
    model.model.layers[2].self_attn.k_proj.bias.data.add_(1)
    assert changed()
    model.config.final_logit_softcapping = 3.0
    assert changed()
    if quantized:
        model.model.layers[0].mlp.up_proj.act_bits = 8
        assert changed()
    assert not changed()
    # held by the plan, so no new tensor can have such an address
    pointers = {t.data_ptr() for t in plans[-1].tensors}
    assert {t.data_ptr() for t in (*model.parameters(), *model.buffers())} <= pointers


def test_plan_follows_the_weights():
    model = fastlm.quantize(model_of(), "w4a16", group_size=16)
    first = cpu_decode.decode_plan(model)
    assert cpu_decode.decode_plan(model) is first
    before = model.generate([[1, 2]], max_new_tokens=4, temperature=0.0)
    with torch.no_grad():
        model.model.norm.weight.mul_(-1)
    after = model.generate([[1, 2]], max_new_tokens=4, temperature=0.0)
    assert after != before
    full = torch.tensor([[1, 2]])
    with torch.no_grad():
        for _ in range(4):
            full = torch.cat((full, model(full).logits[:, -1].argmax(-1, keepdim=True)), 1)
    assert after == full.tolist()


def test_8_bit_activations_keep_a_float16_cache():
    model = fastlm.quantize(model_of(), "w4a8", group_size=32)
    assert cpu_decode.decode_plan(model).cache_dtype == torch.float16
    assert cpu_decode.decode_plan(model_of()).cache_dtype == torch.float32
    ids, cache = prefilled(model, 2, 20, 22, dtype=torch.float16)
    _, wide = prefilled(model, 2, 20, 22)
    actual, expected = (copy_of(model, c).logits(ids[:, 20].contiguous()) for c in (cache, wide))
    assert error_of(actual, expected) <= FLIPPED
    with torch.inference_mode():  # the modules can read such a cache too
        modules = next_logits(model, ids[:, 20:21], cache)
    assert error_of(modules, expected) <= FLIPPED


def test_unsupported_reason():
    class Adapter(torch.nn.Linear):
        pass

    model = model_of()
    assert cpu_decode.unsupported_reason(model) is None
    with backend.use_backend("reference"):
        assert "another backend is forced" in str(cpu_decode.unsupported_reason(model))
    assert "dtype" in str(cpu_decode.unsupported_reason(model_of().double()))
    hooked = model_of()
    hooked.model.layers[1].mlp.register_forward_hook(lambda *a: None)
    assert cpu_decode.unsupported_reason(hooked) == "model.layers.1.mlp has hooks"
    model.model.layers[0].mlp.up_proj = Adapter(60, 52, bias=False)
    assert "model.layers.0.mlp.up_proj is Adapter" in str(cpu_decode.unsupported_reason(model))
    assert len(model.generate([[1]], max_new_tokens=3)[0]) == 4  # uses the modules
    changed = model_of()
    changed.model.layers[2].mlp.forward = torch.zeros_like
    assert cpu_decode.unsupported_reason(changed) == "model.layers.2.mlp has a forward of its own"
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *a: None)
    try:
        assert cpu_decode.unsupported_reason(model_of()) == "all modules have hooks"
    finally:
        hook.remove()
    pruned = model_of("smollm3")  # the config lists by layer number which layers have positions
    del pruned.model.layers[2]
    assert "layers differ from those of its config" in str(cpu_decode.unsupported_reason(pruned))
    assert len(pruned.generate([[1]], max_new_tokens=3)[0]) == 4


def test_refusals():
    model = model_of()
    ids, cache = prefilled(model, 2, 4, 5)
    steps = copy_of(model, cache)
    step = backend.cpu_extension.decode_step
    rotary = list(steps.steps.plan.rotary[0].tables(8, torch.device("cpu")))
    out, work = torch.empty(2, 97), torch.empty(1 << 20, dtype=torch.uint8)
    table = torch.tensor([[0], [1]], dtype=torch.int32)
    good = {
        "plan": steps.steps.plan.cpp,
        "tokens": ids[:, 4].contiguous(),
        "lengths": torch.tensor([4, 4]),
        "table": table,
        "cache": cache.data,
        "scales": None,
        "rotary": rotary,
        "workspace": work,
        "logits_indices": torch.tensor([0, 1]),
        "logits": out,
    }
    step(**good)
    assert out.isfinite().all()
    codes, scales = int8_of(cache.data)
    step(**good | {"cache": codes, "scales": scales})
    for change, message in (
        ({"cache": codes}, "scales: expected those of a cache of int8, got none"),
        ({"scales": scales}, "scales: expected none of a cache of float32, got some"),
        ({"cache": codes, "scales": scales[:2].clone()}, "scales: expected elements: 180, got 120"),
        ({"cache": codes, "scales": scales.half()}, "scales: expected dtype float32, got float16"),
        ({"cache": codes.short()}, "cache: expected"),
        ({"lengths": torch.tensor([4, 5])}, r"lengths: expected values in \[0, 5\), got 5"),
        ({"lengths": torch.tensor([4])}, "lengths: expected elements: 2, got 1"),
        ({"table": table + 1}, r"table: expected values in \[0, 2\), got 2"),
        ({"table": table - 1}, r"table: expected values in \[0, 2\), got -1"),
        ({"table": table[:1]}, "table: expected rows: 2, got 1"),
        ({"table": table.expand(2, 2).contiguous()}, "cache: expected pages of a multiple of 16"),
        ({"workspace": work[:100].clone()}, "workspace: expected"),
        ({"cache": cache.data[:2].contiguous()}, "cache: expected layers: 3, got 2"),
        (
            {"cache": cache.data[:, :, :1].contiguous()},
            r"table: expected values in \[0, 1\), got 1",
        ),
        ({"tokens": ids[:, 4].int()}, "tokens: expected dtype int64, got int32"),
        ({"logits": out[:1].clone()}, "logits: expected elements: 194, got 97"),
        ({"rotary": [t[:4].clone() for t in rotary]}, "rotary: expected tables of at least 5"),
        ({"tokens": torch.tensor([0, 97])}, r"tokens: expected values in \[0, 97\), got 97"),
        ({"tokens": torch.tensor([-1, 0])}, r"tokens: expected values in \[0, 97\), got -1"),
        ({"rotary": []}, "rotary: expected tables for every layer, got 0 pairs"),
        ({"rotary": [t.repeat(1, 2) for t in rotary]}, "rotary: expected columns: 24, got 48"),
    ):
        with pytest.raises(ValueError, match=message):
            step(**good | change)
