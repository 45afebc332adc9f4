"""CausalLM against transformers: random small models of every family, and SmolLM2's weights."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from families import CASES, LONG, SMALL
from tolerance import ULP
from transformers import LlamaConfig

from fastlm.backend import use_backend
from fastlm.checkpoint.architectures import expected_shapes
from fastlm.checkpoint.config import FAMILIES, ModelConfig
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM

transformers = pytest.importorskip("transformers")


def hf_config(case, **changes):
    options = {**SMALL, **CASES[case], **changes}
    options = {k: v for k, v in options.items() if k != "head_dim" or v is not None}
    model_type = case.split("-")[0]
    if FAMILIES[model_type].norms == "sandwich" and "hidden_act" in options:
        options["hidden_activation"] = options.pop("hidden_act")
    return transformers.AutoConfig.for_model(model_type, attn_implementation="eager", **options)


def pair(case, dtype=torch.float32, **changes):
    """The same random model in transformers and in fastlm, in eval mode."""
    torch.manual_seed(1)
    config = hf_config(case, **changes)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a mix-up
                p.add_(torch.randn_like(p) * 0.3)
    ours = CausalLM(ModelConfig.from_dict(config.to_dict())).to(dtype).eval()
    state = {k: v for k, v in theirs.state_dict().items()}
    if ours.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    ours.load_state_dict(state, strict=True)
    return theirs, ours


def ids_of(rows=2, length=20, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL["vocab_size"], (rows, length), generator=g)


def assert_same(ours, theirs, dtype, message):
    """Both sides round each of a few hundred operations, in different orders: 2^7 units in the last
    place of the largest value (1.5e-5 in float32). A wrong constant or a mixed-up weight exceeds
    1e-3.
    """
    scale = theirs.abs().max().item()
    worst = (ours - theirs).abs().max().item()
    assert worst <= 2**7 * ULP[dtype] * max(scale, 1e-30), f"{message}: {worst:.2e} of {scale:.2e}"


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients(case):
    theirs, ours = pair(case)
    ids = ids_of()
    ids[0, 7:9] = 45  # the padding token of some families
    with torch.no_grad():
        assert_same(ours(ids).logits, theirs(ids).logits, torch.float32, "logits")
    labels = ids.clone()
    labels[0, :5] = -100
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    out = ours(ids, labels=labels)
    assert out.logits is None and out.loss.dtype == torch.float32
    out.loss.backward()
    assert_same(out.loss, expected, torch.float32, "loss")
    expected = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert_same(p.grad, expected[name].grad, torch.float32, f"gradient of {name}")


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation(case):
    """The cache against transformers computing every step from the start, on as many tokens as the
    whole context has, whose rotary frequencies serve all steps. 13 + 8 tokens exceed longrope's
    switch at 16 and every window.
    """
    theirs, ours = pair(case)
    ids = ids_of(2, 13)
    full = F.pad(ids, (0, 8))
    with torch.no_grad():
        for n in range(13, 21):
            full[:, n] = theirs(full).logits[:, n - 1].argmax(-1)
    assert torch.equal(ours.generate(ids, max_new_tokens=8, temperature=0.0, ignore_eos=True), full)


@pytest.mark.parametrize("case", CASES)
def test_saved_models_load_on_both_sides(case, tmp_path):
    theirs, ours = pair(case)
    ids = ids_of()
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = CausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager"
    )
    assert type(reloaded) is type(theirs)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, ours(ids).logits)
        assert torch.equal(reloaded(ids).logits, theirs(ids).logits)
        assert torch.equal(
            CausalLM.from_pretrained(tmp_path / "ours")(ids).logits, ours(ids).logits
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_loses_no_more_than_transformers(dtype):
    theirs, ours = pair("llama")
    ids = ids_of()
    with torch.no_grad():
        truth = theirs.double()(ids).logits
        naive = theirs.to(dtype)(ids).logits.double()
        mine = ours.to(dtype)(ids).logits
    assert mine.dtype == dtype
    # The mean over 3880 logits, not the maximum: one unlucky rounding at the start shifts a whole
    # row
    lost, theirs_lost = (mine.double() - truth).abs().mean(), (naive - truth).abs().mean()
    assert lost <= 1.25 * theirs_lost, f"{lost:.3e} > 1.25 * {theirs_lost:.3e}"


def test_shift_labels_and_num_items():
    _, model = pair("gemma2")
    ids = ids_of()
    labels = ids.clone()
    labels[1, 7:] = -100
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(ids, labels=labels).loss
    assert torch.equal(model(ids, shift_labels=shifted).loss, loss)
    count = int((shifted != -100).sum())
    torch.testing.assert_close(model(ids, labels=labels, num_items=2 * count).loss, loss / 2)
    logits = model(ids).logits
    torch.testing.assert_close(F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), loss)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, logits[:, -3:])


def test_logprobs():
    """Gemma 2's head has a softcap, which comes before the temperature."""
    _, model = pair("gemma2")
    ids, model = ids_of(), model.double()
    with use_backend("reference"):
        logits = model(ids).logits
        for temperature in (1.0, 0.7):
            expected = (logits / temperature).log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
            labels = F.pad(ids[:, 1:], (0, 1), value=-100)
            got = model.logprobs(ids, labels, temperature=temperature)
            torch.testing.assert_close(got[:, :-1], expected[..., 0])
            assert (got[:, -1] == 0).all()
            repeated, entropy = model.logprobs(
                ids, labels, temperature=temperature, return_entropy=True
            )
            assert torch.equal(repeated, got) and (entropy[:, -1] == 0).all()
            expected = torch.distributions.Categorical(logits=logits / temperature).entropy()
            torch.testing.assert_close(entropy[:, :-1], expected[:, :-1])
        packed, cu_seqlens = ids.view(1, -1), torch.tensor([0, 20, 40], dtype=torch.int32)
        together = model.logprobs(
            packed, labels.view(1, -1), cu_seqlens=cu_seqlens, temperature=0.7
        )
        torch.testing.assert_close(together.view_as(got), got)
    with pytest.raises(InputError, match=r"shift_labels: expected integers \(2, 20\) as input_ids"):
        model.logprobs(ids, labels[:, 1:])


@pytest.mark.parametrize("case", ["llama", "gemma2", "olmo2", "phi3-longrope", "smollm3"])
def test_packed_documents_are_separate(case):
    _, model = pair(case)
    lengths = [5, 1, 9, 3]
    documents = [ids_of(1, n, seed=n) for n in lengths]
    packed = torch.cat(documents, 1)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    logits = torch.cat([model(d).logits for d in documents], 1)
    assert_same(model(packed, cu_seqlens=ends).logits, logits, torch.float32, "packed logits")
    losses = [
        F.cross_entropy(model(d).logits[0, :-1], d[0, 1:], reduction="sum")
        for d in documents
        if d.shape[1] > 1
    ]
    loss = model(packed, labels=packed, cu_seqlens=ends).loss
    torch.testing.assert_close(loss, sum(losses) / (sum(lengths) - len(lengths)))
    # the same four documents as two rows of nine
    folded = model(packed.view(2, 9), labels=packed.view(2, 9), cu_seqlens=ends).loss
    torch.testing.assert_close(folded, loss)


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case):
    theirs = hf_config(case)
    ours = ModelConfig.from_dict(json.loads(theirs.to_json_string(use_diff=False)))
    written = json.loads(json.dumps(ours.to_dict()))
    assert ModelConfig.from_dict(written).to_dict() == ours.to_dict()
    reloaded = type(theirs).from_dict(written)
    skip = {"id2label", "architectures", "dtype", "transformers_version", "_sliding_window_pattern"}
    for name, value in theirs.to_dict().items():
        if name not in skip:
            assert getattr(reloaded, name) == value, name


@pytest.mark.parametrize("case", CASES)
def test_config_of_older_transformers(case):
    """rope_theta and rope_scaling are at the top level, as written by transformers 4."""
    new = hf_config(case).to_dict()
    expected = ModelConfig.from_dict(new)
    old = {k: v for k, v in expected.to_dict().items() if k != "rope_parameters"}
    if old["rope_scaling"]:
        old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    old.pop("layer_types", None)
    old.pop("no_rope_layers", None)
    old["sliding_window_pattern"] = 6
    ours = ModelConfig.from_dict(old)
    for layer in range(ours.num_hidden_layers):
        assert ours.rope(layer) == expected.rope(layer)
        assert ours.window(layer) == expected.window(layer)


def test_defaults_are_those_of_transformers():
    """A config.json that leaves entries out means the same as to transformers."""
    for model_type in FAMILIES:
        theirs = transformers.AutoConfig.for_model(model_type)
        needed = {k: getattr(theirs, k) for k in list(SMALL)[:5]}
        ours = ModelConfig.from_dict({"model_type": model_type, **needed})
        for name in (
            *("head_dim", "hidden_act", "hidden_activation", "sliding_window"),
            *("rms_norm_eps", "tie_word_embeddings", "layer_types", "no_rope_layers"),
            *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
            *("rope_parameters", "attention_bias", "mlp_bias"),
        ):
            if hasattr(theirs, name) and getattr(theirs, name) is not None:
                mine = ours.to_dict()[name]
                if name == "rope_parameters" and "partial_rotary_factor" in getattr(theirs, name):
                    mine = {"partial_rotary_factor": 1.0, **mine}
                assert mine == getattr(theirs, name), (model_type, name)


def small(**changes):
    return ModelConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gpt2"}, "model_type: expected one of llama, mistral"),
        ({"hidden_size": 62, "head_dim": None}, "hidden_size: expected a multiple of num_"),
        ({"num_key_value_heads": 4}, "num_key_value_heads: expected a divisor"),
        ({"hidden_size": -60}, "hidden_size: expected a positive integer, got -60"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a positive integer"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers: expected at most 4096"),
        ({"hidden_act": ["silu"]}, "hidden_act: expected one of silu"),
        ({"rope_parameters": {"rope_type": [1], "rope_theta": 1e4}}, "rope_type: expected one of"),
        ({"vocab_size": 97.5}, "vocab_size: expected a positive integer"),
        ({"intermediate_size": 2**40}, "intermediate_size"),
        ({"head_dim": 23}, "even number of rotated features"),
        ({"hidden_act": "relu6"}, "hidden_act: expected one of silu"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps: expected a positive number"),
        ({"sliding_window": 8}, "sliding_window: llama has none"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window: expected a positive"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias: mistral has none"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "rope_type: expected one of",
        ),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor: expected for"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": -1}},
            "factor: expected a positive number",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta"),
        (
            {"rope_parameters": {**LONG, "rope_theta": 1e4, "original_max_position_embeddings": 8}},
            "long_factor",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types: expected a list of num_hidden_layers"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)  # fmt: skip
def test_impossible_configs(changes, message):
    with pytest.raises(InputError, match=message):
        small(**changes)


def test_impossible_config_files():
    good = hf_config("llama").to_dict()
    for changes, message in (
        ({"model_type": "bert"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type: expected one of"),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 2, "num_hidden_layers": "x"},
            "num_hidden_layers: expected a positive integer, got 'x'",
        ),
        ({"vocab_size": None}, "vocab_size: expected in the config, got none"),
        ({"rope_parameters": [1]}, "rope_parameters: expected a dict"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: llama has none"),
    ):
        with pytest.raises(InputError, match=message):
            ModelConfig.from_dict({**good, **changes})


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_a_checkpoint_must_hold_are_the_models(case):
    """This holds also if config.json leaves out what transformers assumes (Qwen3's head_dim,
    Gemma's tied embeddings).
    """
    full = hf_config(case).to_dict()
    sizes = (*("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),)
    bare = {"model_type": full["model_type"], "num_attention_heads": 2, "num_key_value_heads": 1}
    for shapes in (full, bare | {name: full[name] for name in sizes}):
        config = ModelConfig.from_dict(shapes)
        with torch.device("meta"):
            model = CausalLM(config)
        have = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert expected_shapes(config) == have


def test_impossible_calls():
    _, model = pair("llama")
    ids = ids_of()
    for call, message in (
        (lambda: CausalLM(LlamaConfig()), "config: expected a fastlm.ModelConfig, got LlamaConfig"),
        (lambda: model(ids.tolist()), r"input_ids: expected a tensor \(B, S\), got list"),
        (lambda: model(ids[0]), r"input_ids: expected integers \(B, S\)"),
        (lambda: model(ids.float()), "input_ids: expected integers"),
        (lambda: model(ids + 90), r"input_ids: expected ids in \[0, 97\)"),
        (lambda: model(ids - 97), r"input_ids: expected ids in \[0, 97\)"),
        (lambda: model(ids, labels=ids[:, 1:]), r"labels: expected integers \(2, 20\)"),
        (lambda: model(ids, labels=ids.float()), "labels: expected integers"),
        (lambda: model(ids, labels=ids, shift_labels=ids), "got both"),
        (lambda: model(ids, labels=ids + 90), "target"),
        (lambda: model(ids_of(1, 65)), "at most max_position_embeddings 64 tokens, got 65"),
        (lambda: model(ids, attention_mask=ids[:, :3]), "attention_mask: expected"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_initialisation():
    config = small(num_hidden_layers=2, hidden_size=240, head_dim=40, initializer_range=0.02)
    model = CausalLM(config, seed=5)
    state = model.state_dict()
    repeated = CausalLM(config, seed=5).state_dict()
    assert all(torch.equal(v, repeated[k]) for k, v in state.items())
    assert not torch.equal(CausalLM(config, seed=6).head_weight, model.head_weight)
    std = {k: v.std().item() for k, v in state.items() if v.dim() == 2}
    for name, value in std.items():
        expected = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
        assert abs(value / expected - 1) < 0.05, name  # at least 5000 draws each: 1 % is one sigma
    config.pad_token_id = 3
    padded = CausalLM(config, seed=5).model.embed_tokens.weight
    expected = state["model.embed_tokens.weight"].index_fill(0, torch.tensor([3]), 0.0)
    assert torch.equal(padded, expected)
    unscaled = CausalLM(config, seed=5, scaled_residual=False).state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(unscaled[name], 2 * state[name])
    assert torch.equal(state["model.norm.weight"], torch.ones(240))
    gemma = CausalLM(ModelConfig(**{**SMALL, "model_type": "gemma2"}))
    assert torch.equal(gemma.model.norm.weight, torch.zeros(60))


def test_attention_dropout_only_in_training():
    model = CausalLM(small(attention_dropout=0.5), seed=0)
    ids = ids_of()
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_training_step_compiles_without_a_break():
    model = CausalLM(small(), seed=0)
    step = torch.compile(
        lambda ids: model(ids, labels=ids).loss, fullgraph=True, backend="aot_eager"
    )
    ids = ids_of()
    loss = step(ids)
    loss.backward()
    got = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    expected = model(ids, labels=ids).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi3"])
@pytest.mark.parametrize("format", ["w4a16", "w8a8"])
def test_quantized_models_are_saved_and_loaded(kind, format, tmp_path):
    import fastlm

    _, model = pair(kind, hidden_size=72, head_dim=12, tie_word_embeddings=kind == "llama")
    plain = copy.deepcopy(model)
    fastlm.quantize(model, format, group_size=16)
    # the same weights in float32: what remains is the rounding of activations
    with torch.no_grad():
        for module in plain.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                weight = fastlm.ops.quantize_weight(module.weight, int(format[1]), group_size=16)
                module.weight.copy_(weight.dequantize())
    exact = plain(ids_of()).logits
    ids = ids_of()
    with torch.no_grad():
        logits, loss = model(ids).logits, model(ids, labels=ids).loss
        error = (logits - exact).square().mean() / exact.square().mean()
        assert error < (2e-2 if format == "w8a8" else 1e-10)
        # the loss uses the dequantized head, the logits come from quantized_linear
        rounded = 8 in (m.act_bits for m in model.modules() if hasattr(m, "act_bits"))
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        torch.testing.assert_close(loss, expected, rtol=3e-2 if rounded else 1e-5, atol=0)
        model.save_pretrained(tmp_path / "q")
        loaded = CausalLM.from_pretrained(tmp_path / "q")
        assert torch.equal(loaded(ids).logits, logits)
        assert loaded.dtype == torch.float32
        plain = CausalLM.from_pretrained(tmp_path / "q", keep_quantized=False)
        assert not any("qdata" in name for name in plain.state_dict())
        if format == "w4a16":
            assert_same(plain(ids).logits, logits, torch.float32, "dequantized")
        half = CausalLM.from_pretrained(tmp_path / "q", dtype=torch.bfloat16)
        assert half(ids).logits.dtype == torch.bfloat16
        loaded.save_pretrained(tmp_path / "again")
    saved = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("q", "again")]
    assert saved[0] == saved[1]


def test_foreign_checkpoints_are_refused(tmp_path):
    theirs, _ = pair("llama-biases")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_bias": False}))
    with pytest.raises(InputError, match=r"expected tensors of the model only, got .*bias"):
        CausalLM.from_pretrained(tmp_path)
