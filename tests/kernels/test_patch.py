"""Tests of `fastlm.patch`: the same results on fastlm's kernels, and `fastlm.unpatch`."""

import copy
import functools
import logging
import pickle
import sys

import pytest
import torch
from patch_models import (
    FAMILIES,
    IDS,
    SMALL,
    assert_equal_gradients,
    each_family,
    gradients,
    linears,
    model_of,
    pair,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM

import fastlm
from fastlm import InputError, backend
from fastlm.hf.forwards import variant_of
from fastlm.hf.patching import OPS, patched_ops

# warnings of transformers and peft about each other's names do not concern the model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@each_family
def test_computes_the_same(family):
    plain, fast = pair(family)
    _, expected_ops, layers = FAMILIES[family]
    assert patched_ops(fast) == expected_ops | linears(plain)
    assert sum((variant_of(m) or "  ")[1] == "layer" for m in fast.modules()) == layers
    ids = tokens()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.2, -100)
    a, ga = gradients(plain, input_ids=ids, labels=labels)
    b, gb = gradients(fast, input_ids=ids, labels=labels)
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert b.logits is None
    assert_equal_gradients(ga, gb)
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@each_family
def test_unpatch_gives_back_the_model(family):
    model = model_of(family).eval()
    ids = tokens()
    before = {n: type(m) for n, m in model.named_modules()}
    states = {n: vars(m).keys() for n, m in model.named_modules()}
    keys, implementation = list(model.state_dict()), model.config._attn_implementation
    expected = model(ids, labels=ids)
    fastlm.patch(model)
    assert list(model.state_dict()) == keys
    assert model.config._attn_implementation == "fastlm"
    assert fastlm.unpatch(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert {n: vars(m).keys() for n, m in model.named_modules()} == states
    assert model.config._attn_implementation == implementation and patched_ops(model) == {}
    out = model(ids, labels=ids)
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
    fastlm.unpatch(model)  # unpatching an unpatched model does nothing


@pytest.mark.parametrize("op", OPS)
def test_ops_choose(op):
    plain, fast = pair("gpt2" if op == "layer_norm" else "llama", ops=(op,))
    assert patched_ops(fast).keys() == {op}
    ids = tokens()
    (a, ga), (b, gb) = (gradients(m, input_ids=ids, labels=ids) for m in (plain, fast))
    torch.testing.assert_close(b.loss, a.loss, rtol=1e-6, atol=1e-6)
    assert (b.logits is None) == (op == "linear_cross_entropy")
    assert_equal_gradients(ga, gb)


def test_says_what_it_did(caplog):
    """`patch` logs one line, which is visible without a logging setup if only norms were found."""
    caplog.set_level(logging.INFO, "fastlm")
    model = fastlm.patch(model_of())
    small = fastlm.patch(nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 8)))
    fastlm.patch(small, ops=("rms_norm",))
    everything, norms, selected = caplog.records
    assert all(r.name == "fastlm" for r in caplog.records)
    for op, n in fastlm.patched_ops(model).items():
        assert f"{op} {n}" in everything.getMessage()
    assert everything.getMessage().startswith("patched LlamaForCausalLM: ")
    assert everything.levelno == selected.levelno == logging.INFO
    assert norms.levelno == logging.WARNING
    assert norms.getMessage() == (
        "patched Sequential: rms_norm 1, linear 1; nothing was recognised for layer_norm, rope,"
        " glu, attention, linear_cross_entropy"
    )
    assert selected.getMessage() == "patched Sequential: rms_norm 1"


def test_says_what_it_left(caplog):
    """A mixture's experts and a loss that is not recognised, the latter as a warning."""
    caplog.set_level(logging.INFO, "fastlm")
    model = fastlm.patch(model_of("mixtral"))
    patched = fastlm.patched_ops(model)
    assert (
        patched.unpatched == {"MixtralTopKRouter": 2, "MixtralExperts": 2}
        and not patched.keeps_logits
    )
    assert "; as before: MixtralTopKRouter 2, MixtralExperts 2" in str(patched)
    assert fastlm.patched_ops(model_of()).unpatched == {}
    other = model_of()
    other.loss_function = lambda **_: None
    with_logits = fastlm.patched_ops(fastlm.patch(other))
    line = "the loss was not recognised: training stores the logits"
    assert with_logits.keeps_logits and line in str(with_logits) and with_logits.unpatched == {}
    assert [r.levelno for r in caplog.records] == [logging.INFO, logging.WARNING]
    for record, printed in zip(caplog.records, (patched, with_logits)):
        assert str(printed) in record.getMessage()


def test_linears_run_on_fastlms_products(monkeypatch):
    """They run where they are faster: in bfloat16, here from the first row on, also under hooks."""
    module, calls = sys.modules["fastlm.ops.linear"], []
    monkeypatch.setattr(module, "_MIN_ROWS", dict.fromkeys(backend.cpu_isas(), (1, 1)))
    extension, real = backend.cpu_extension, backend.cpu_extension.linear_forward
    monkeypatch.setattr(extension, "linear_forward", lambda *a: (calls.append(1), real(*a))[1])
    plain, fast = pair(dtype=torch.bfloat16)
    ids = tokens()
    (a, ga), (b, gb) = (gradients(m, input_ids=ids, labels=ids) for m in (plain, fast))
    assert len(calls) == linears(plain)["linear"]
    torch.testing.assert_close(b.loss, a.loss.float(), rtol=1e-2, atol=0)
    assert ga.keys() == gb.keys()
    with pytest.raises(InputError, match="found none among"):
        fastlm.patch(nn.Sequential(nn.Linear(4, 4)))  # only linear layers: not a model


def test_a_second_call_replaces_the_first():
    model = model_of()
    assert fastlm.patch(model) is model
    everything, classes = patched_ops(model), [type(m) for m in model.modules()]
    config = model.config
    fastlm.patch(model)
    assert [type(m) for m in model.modules()] == classes and model.config is config
    fastlm.patch(model, ops=("glu",))
    assert patched_ops(model) == {"glu": 2} and model.config._attn_implementation == "sdpa"
    fastlm.patch(model)
    assert patched_ops(model) == everything
    fastlm.unpatch(model)
    assert model.config._attn_implementation == "sdpa"


def test_kernels_run_and_no_logits_exist(monkeypatch):
    """A training step runs every op, and no tensor is as large as the logits."""
    _, model = pair(vocab_size=5000)
    ids, op_names, largest = tokens(), set(), 0
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if function.namespace == "fastlm":
                op_names.add(function.__name__.partition(".")[0])
            for t in out if isinstance(out, tuple | list) else (out,):
                if torch.is_tensor(t) and t.dim() and t.shape[0] in (2, 40, 38):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        model(ids, labels=ids).loss.backward()
    forward = {"rms_norm", "rope", "glu", "attention", "linear_cross_entropy"}
    assert op_names >= forward | {"rms_norm_backward", "glu_backward", "attention_backward"}
    assert largest < 38 * 5000


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: fastlm.patch(m, ops=("rms_norm", "rmsnorm")),
            "ops: expected some of rms_norm, ",
        ),
        (lambda m: fastlm.patch(m, ops="rms_norm"), "ops: expected several names"),
        (lambda m: fastlm.patch(m, ops=()), "ops: expected some of rms_norm, .*, got none"),
        (lambda m: fastlm.patch(nn.Linear(2, 2)), "found none among Linear"),
        (lambda m: fastlm.patch("gpt2"), "model: expected a torch module, got str"),
        (lambda m: fastlm.unpatch(None), "model: expected a torch module, got NoneType"),
        (
            lambda m: fastlm.patch(model_of("gpt2"), ops=("attention", "glu", "rope")),
            "expected modules for glu and rope, found none among .*GPT2MLP",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call(model_of())
    assert "\n" not in str(caught.value)


def test_refuses_a_model_of_fastlm():
    config = fastlm.ModelConfig(
        model_type="llama", **{k: v for k, v in SMALL.items() if k not in IDS}
    )
    with pytest.raises(InputError, match=r"model: .* got fastlm's CausalLM, which runs"):
        fastlm.patch(fastlm.CausalLM(config))


def test_a_refused_model_is_as_it_was():
    model = fastlm.patch(model_of(), ops=("rms_norm", "attention"))
    model.model.layers[1].mlp.forward = model.model.layers[1].mlp.forward  # as accelerate does
    before = patched_ops(model)
    with pytest.raises(InputError, match="LlamaMLP with one of its own"):
        fastlm.patch(model)
    assert patched_ops(model) == before and model.config._attn_implementation == "fastlm"


def test_loss_options():
    plain, fast = pair()
    ids, other = tokens(), tokens()
    for options in (
        {"labels": ids, "num_items_in_batch": 50},
        {"labels": ids, "num_items_in_batch": torch.tensor(50)},
        {"labels": ids, "shift_labels": other},
        {"labels": ids, "return_dict": False},
        {"labels": ids, "use_cache": True},
        {"labels": ids, "output_hidden_states": True},
    ):
        a, b = (m(input_ids=ids, **options) for m in (plain, fast))
        torch.testing.assert_close(b[0], a[0], rtol=1e-6, atol=1e-6)
        assert isinstance(b, tuple) == isinstance(a, tuple)
        if "output_hidden_states" in options:
            for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
                torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
        if "use_cache" in options:
            assert {k for k in a if k != "logits"} == set(b)


def test_an_evaluation_has_logits():
    """Eval mode without gradients: metrics need the logits. `skip_logits` overrides this."""
    plain, fast = (m.eval() for m in pair())
    ids = tokens()
    assert fast(ids, labels=ids).logits is None  # a custom loop on a freshly loaded model
    with torch.no_grad():
        expected, out = plain(ids, labels=ids), fast(ids, labels=ids)
        torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
        loss_only = fast(ids, labels=ids, skip_logits=True)
        assert loss_only.logits is None and torch.allclose(loss_only.loss, out.loss)
        assert fast.train()(ids, labels=ids).logits is None
        assert fast(ids, labels=ids, skip_logits=False).logits is not None
        assert fast(ids, skip_logits=True).logits is not None  # without labels there is no loss


def test_a_loss_function_without_a_name():
    """functools.partial has no name, so it is not recognized and gets its logits."""
    plain, fast = pair()
    ids = tokens()
    fast.loss_function = functools.partial(plain.loss_function)
    out = fast(ids, labels=ids)
    assert out.logits is not None and torch.allclose(out.loss, plain(ids, labels=ids).loss)
    assert "linear_cross_entropy" not in patched_ops(fastlm.patch(fast))


def test_what_needs_logits_has_them():
    """Losses and heads that the kernel does not support run as before."""
    plain, fast = pair()
    ids = tokens()
    a, b = (m(input_ids=ids, labels=ids[:, -5:], logits_to_keep=5) for m in (plain, fast))
    assert b.logits.shape == (2, 5, 99) and torch.allclose(a.loss, b.loss)
    fast.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    out = fast(ids, labels=ids)
    assert torch.equal(out.loss, out.logits.sum())
    del fast._loss_function
    hooked = []
    handle = fast.lm_head.register_forward_hook(lambda *_: hooked.append(1))
    assert fast(ids, labels=ids).logits is not None and hooked
    handle.remove()
    assert fast(ids, labels=ids).logits is None
    plain, fast = pair("mixtral")
    a, b = (m(ids, labels=ids, output_router_logits=True) for m in (plain, fast))
    assert b.logits is not None and b.aux_loss > 0 and torch.allclose(a.loss, b.loss)


def test_hooks_see_what_they_saw():
    plain, fast = pair()
    ids, inputs = tokens(), {}
    for model in (plain, fast):
        for name, module in model.named_modules():
            if name.endswith(("layernorm", "mlp", "self_attn", "layers.1")):
                module.register_forward_hook(
                    lambda m, i, o, k=(model, name): inputs.__setitem__(
                        k, o[0] if "attn" in k[1] else o
                    )
                )
        model(ids)
    for (model, name), out in list(inputs.items()):
        if model is plain:
            torch.testing.assert_close(inputs[fast, name], out, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_activation():
    """A GLU with hooks on its activation, as for inspecting neurons, runs the model's code."""
    plain, fast = pair()
    ids, outputs = tokens(), []
    for model in (plain, fast):
        act = model.model.layers[0].mlp.act_fn
        act.register_forward_hook(lambda m, i, o: outputs.append(o) or o * 2)
    torch.testing.assert_close(fast(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(outputs) == 2


def test_unpatch_refuses_classes_derived_from_patched_ones():
    """parametrize (and fully_shard) derive a new class from the patched one."""
    model = fastlm.patch(model_of())
    norm, ids = model.model.norm, tokens()
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    expected, patched = model(ids).logits, patched_ops(model)
    for function in (fastlm.unpatch, fastlm.patch):
        with pytest.raises(InputError, match="ParametrizedLlamaRMSNorm made on top of it"):
            function(model)
    assert patched_ops(model) == patched and torch.equal(model(ids).logits, expected)
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    assert patched_ops(fastlm.unpatch(model)) == {}


def test_every_backend():
    plain, fast = pair()
    ids = tokens()
    with backend.use_backend("reference"):
        torch.testing.assert_close(fast(ids, labels=ids).loss, plain(ids, labels=ids).loss)


def test_copies_and_pickles(tmp_path):
    plain, fast = pair("gemma2")
    ids = tokens()
    expected = fast(ids, labels=ids).loss
    for duplicate in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert patched_ops(duplicate) == patched_ops(fast)
        assert torch.equal(duplicate(ids, labels=ids).loss, expected)
        fastlm.unpatch(duplicate)
        assert torch.equal(duplicate(ids).logits, plain(ids).logits)
    assert patched_ops(fast)
    fast.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert patched_ops(loaded) == {} and type(loaded) is type(plain)
    assert torch.equal(loaded(ids).logits, plain(ids).logits)
