"""Tests of a GPU's decode steps, on the emulator if there is no GPU, against the modules."""

import contextlib
import sys

import pytest
import torch
from fake_graph import GraphRecorder
from families import CASES, SMALL
from row_cache import RowCache, RowDecodeSteps, next_logits
from test_decode_step import FLIPPED, NEAR, error_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastlm
from fastlm import backend
from fastlm.checkpoint.config import ModelConfig
from fastlm.cuda import extension
from fastlm.model import cuda_decode, layers
from fastlm.model.causal_lm import CausalLM

FIXED = {name: c for name, c in CASES.items() if "dynamic" not in name and "longrope" not in name}


def model_of(case="llama", device="cpu", **changes):
    if case == "phi3":  # its heads share hidden_size; the CUDA kernel wants a multiple of 8
        changes = {"hidden_size": 48, **changes}
    options = {**SMALL, "max_position_embeddings": 512, **CASES[case], **changes}
    config = ModelConfig.from_dict({"model_type": case.split("-")[0], **options})
    return CausalLM(config, seed=4, scaled_residual=False).eval().to(device)


def modules(model):
    """Select the backend of the modules. Attention of prompts has no CUDA kernel."""
    return backend.use_backend("triton" if model.device.type == "cuda" else "cpu")


def prefilled(model, rows, length, capacity):
    """Return ids (rows, capacity), and two caches with the first `length` of them."""
    ids = torch.randint(0, model.config.vocab_size, (rows, capacity), device=model.device)
    caches = []
    for _ in range(2):
        cache = RowCache(model, rows, capacity)
        with modules(model), torch.inference_mode():
            model.model.fuse()
            next_logits(model, ids[:, :length], cache)
        caches.append(cache)
    return ids, *caches


def steps_of(model, cache):
    return RowDecodeSteps(cuda_decode.CudaDecodeRunner(model, cache.data), cache.length)


def errors_of(model, rows=3, length=9, count=3):
    ids, cache, module_cache = prefilled(model, rows, length, length + count)
    steps = steps_of(model, module_cache)
    errors = []
    with torch.inference_mode():
        for i in range(length, length + count):
            with modules(model):
                expected = next_logits(model, ids[:, i : i + 1], cache)
            errors.append(error_of(steps.logits(ids[:, i].contiguous()), expected))
    return errors


@pytest.mark.parametrize("case", FIXED)
def test_families(cuda, case):
    assert max(errors_of(model_of(case, cuda))) <= NEAR


@pytest.mark.parametrize("format", ["w4a16", "w8a16"])
def test_quantized(cuda, format):
    model = fastlm.quantize(model_of("qwen2"), format, group_size=16).to(cuda)
    assert max(errors_of(model)) <= NEAR


@pytest.mark.parametrize("format", ["w8a8", "w4a8"])
@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2"])  # pre, sandwich, post norms
def test_int8_activations(cuda, format, case):
    model = fastlm.quantize(model_of(case), format, group_size=16).to(cuda)
    assert max(errors_of(model)) <= FLIPPED


def test_bfloat16(cuda):
    model = model_of("qwen3", cuda).bfloat16()
    assert max(errors_of(model)) <= 0.05  # against bfloat16 modules: some ulp of 2^-8 per layer


@pytest.mark.parametrize("case", ["llama", "phi3"])  # phi3: one projection of q, k and v
def test_norm_and_gate_round_at_once(cuda, monkeypatch, case):
    """Equal, bit for bit, to norm, gate and rounding one after the other."""
    model = model_of(case, tie_word_embeddings=False)
    model = fastlm.quantize(model, "w8a8", group_size=16).to(cuda)
    ids, *caches = prefilled(model, 2, 5, 8)
    calls = []
    for name in ("rms_norm_round", "glu_round"):
        ours = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, f=ours, n=name: (calls.append(n), f(*a))[1])
    logits = []
    with torch.inference_mode():
        for cache in caches:
            steps = steps_of(model, cache)
            logits.append(steps.logits(ids[:, 5].contiguous()).clone())
            monkeypatch.setattr(layers.FusedProjection, "can_round_input", lambda *_: False)
    assert calls == ["rms_norm_round", "rms_norm_round", "glu_round"] * 3
    assert torch.equal(*logits)


def shapes(arguments):
    """Return the arguments as the host sees them, without values of tensors and addresses."""

    def shape(a):
        if isinstance(a, torch.Tensor):
            return tuple(a.shape)
        return len(a) if isinstance(a, torch.UntypedStorage) else a  # from the tests' guards

    return str(tree_map(shape, arguments))


class Operators(TorchDispatchMode):
    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls.append((str(function), shapes(args)))
        return function(*args, **(kwargs or {}))


class Launches:
    """The extension, recording its calls."""

    def __init__(self, extension, calls):
        self.extension, self.calls = extension, calls

    def __getattr__(self, name):
        function = getattr(self.extension, name)

        def call(*args):
            self.calls.append((name, shapes(args)))
            return function(*args)

        return call if callable(function) else function


@pytest.mark.parametrize("format", [None, "w4a16", "w8a8"])
def test_every_step_is_the_same_to_the_host(cuda, monkeypatch, format):
    """A CUDA graph requires that no number changes, no launch changes its size, and no value is
    read.
    """
    model = model_of("qwen2")
    if format:
        model = fastlm.quantize(model, format, group_size=16)
    model = model.to(cuda)
    ids, cache, _ = prefilled(model, 2, 5, 200)
    steps = steps_of(model, cache)
    calls, looks = [], []
    with torch.inference_mode():
        steps.logits(ids[:, 5].contiguous())
        (step,) = steps.steps.steps.values()
        name = extension().__name__
        monkeypatch.setitem(sys.modules, name, Launches(sys.modules[name], calls))
        for look in ("item", "tolist", "__bool__", "__int__", "__float__", "nonzero"):
            ours = getattr(torch.Tensor, look)
            monkeypatch.setattr(
                torch.Tensor, look, lambda *a, f=ours, n=look: (looks.append(n), f(*a))[1]
            )
        plain, operators = [], []
        for position in (6, 63, 150):  # one tile of keys, and several
            for of_step, watch in (
                (plain, contextlib.nullcontext()),
                (operators, Operators(calls)),
            ):
                step.positions.fill_(position)
                with watch:
                    step.run()
                of_step.append(list(calls))
                calls.clear()
    assert len(plain[0]) > 15 and plain[0] == plain[1] == plain[2]
    assert len(operators[0]) > 60 and operators[0] == operators[1] == operators[2]
    assert not looks


@pytest.mark.parametrize("error", [None, "operation not permitted when stream is capturing"])
def test_recorded_steps_are_the_same(monkeypatch, error):
    model = model_of()
    with backend.use_backend("cpu"), torch.inference_mode():
        model.model.fuse()
        ids, *caches = prefilled(model, 2, 5, 10)
    with backend.use_backend("reference"), torch.inference_mode():
        plain = steps_of(model, caches[0])
        recorder = GraphRecorder(monkeypatch)
        steps = steps_of(model, caches[1])
        recorder.error = error
        for i in range(5, 10):
            warns = pytest.warns(UserWarning, match="decode steps are not recorded: operation not")
            with warns if error and i == 6 else contextlib.nullcontext():
                actual = steps.logits(ids[:, i].contiguous())
            assert torch.equal(actual, plain.logits(ids[:, i].contiguous()))
    assert [graph.replays for graph in recorder.graphs] == ([] if error else [4])
    assert recorder.recorded_on == "a recording's" and recorder.current == "the user's"
    assert len(cuda_decode._failed) == bool(error)


def test_tensors_of_a_graph_stay_alive(monkeypatch):
    """It stays if the model changes its dtype, or another generation joins its biases again."""
    model = fastlm.quantize(model_of("qwen2"), "w8a16", group_size=16)
    ids, cache, _ = prefilled(model, 2, 5, 10)
    GraphRecorder(monkeypatch)
    steps = steps_of(model, cache)
    with backend.use_backend("reference"), torch.inference_mode():
        for i in (5, 6):
            steps.logits(ids[:, i].contiguous())
    bias = model.model.layers[0].self_attn.fused.bias
    read = [t.data_ptr() for t in (*model.parameters(), *model.buffers(), bias)]
    model.bfloat16().model.fuse()
    assert model.model.layers[0].self_attn.fused.bias is not bias
    (step,) = steps.steps.steps.values()
    assert set(read) <= {t.data_ptr() for t in step.references}


@pytest.mark.parametrize("tied", [False, True])
def test_generate(monkeypatch, tied):
    model = model_of("qwen2", tie_word_embeddings=tied)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    with backend.use_backend("reference"):
        expected = model.generate(prompts, max_new_tokens=6, temperature=0)
        monkeypatch.setattr(cuda_decode, "unsupported_reason", lambda _: None)
        used = []
        ours = cuda_decode._RecordedStep.run
        monkeypatch.setattr(
            cuda_decode._RecordedStep, "run", lambda self: (used.append(1), ours(self))[1]
        )
        assert model.generate(prompts, max_new_tokens=6, temperature=0) == expected
    assert len(used) == 5


def test_unsupported_reason(monkeypatch):
    model = model_of()
    assert cuda_decode.unsupported_reason(model) == "graphs need a GPU"
    # as if it were on a GPU that has the kernels
    monkeypatch.setattr(CausalLM, "device", torch.device("cuda"))
    assert "CUDA kernels" in cuda_decode.unsupported_reason(model)
    monkeypatch.setattr(backend, "backend_for", lambda *_: "cuda")
    monkeypatch.setattr(backend, "unavailable_reason", lambda _: None)
    assert cuda_decode.unsupported_reason(model) is None
    for name in ("triton", "reference"):
        with backend.use_backend(name):
            assert cuda_decode.unsupported_reason(model) == "another backend is forced"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        assert "autocast" in cuda_decode.unsupported_reason(model)
    model.bfloat16().model.norm.float()
    assert "dtype of its activations" in cuda_decode.unsupported_reason(model)
    assert "length" in cuda_decode.unsupported_reason(model_of("llama-dynamic"))
