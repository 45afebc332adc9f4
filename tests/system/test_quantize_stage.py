"""`fastlm quantize` with calibration text: the report, the threshold, and going on after a cut."""

import json
import random
import shutil
import subprocess
import sys

import preference_models
import pytest
import torch

from fastlm import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.model.load import load_model
from fastlm.quant import calibration, layerwise
from fastlm.quant.stage import Quantize
from fastlm.stages import run_recipe
from fastlm.tokenizer.tokenizer import Tokenizer

OPTIONS = {
    "method": "rtn", "group_size": 16, "calibration_tokens": 256, "calibration_length": 32,
    "iterations": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    preference_models.make_base(folder / "base", initializer_range=0.1)
    draw = random.Random(0)
    text = " ".join(draw.choice(preference_models.WORDS) for _ in range(600))
    (folder / "text.txt").write_text(text)
    # trained, or quantization could improve it by chance
    model = CausalLM.from_pretrained(folder / "base").train()
    ids = torch.tensor(Tokenizer.load(folder / "base").encode(text))
    ids = ids[: len(ids) // 32 * 32].view(-1, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 3  # of 5.8
    model.save_pretrained(folder / "base")
    return folder


def run(base, out, on_event=None, calibrated=True, **options):
    text = {"calibration": base / "text.txt"} if calibrated else {}
    stage = Quantize(**OPTIONS | options)
    return stage(out, model=base / "base", data=base / "text.txt", on_event=on_event, **text)


def test_the_default_method(base, tmp_path, monkeypatch):
    """The one with the smallest loss out of domain: GPTQ with AWQ for 4 bits."""
    model = CausalLM.from_pretrained(base / "base")
    for options, method, awq in [
        ({}, "gptq", True), ({"format": "w4a8"}, "gptq", True), ({"awq": False}, "gptq", False),
        ({"method": "gptq"}, "gptq", False), ({"method": "rtn"}, "rtn", False),
        ({"format": "w8a16"}, "rtn", False), ({"format": "w8a8", "awq": True}, "rtn", True),
        ({"overrides": ("model.layers.*=16",)}, "gptq", False),  # AWQ has no layer to scale
    ]:  # fmt: skip
        resolved = Quantize(group_size=16, **options).with_defaults(model)
        assert (resolved.method, resolved.awq) == (method, awq), options
    Quantize(method="rtn", group_size=16)(tmp_path / "rtn", model=base / "base")
    again = Quantize(**OPTIONS | {"method": "", "dequantize": True})
    again(tmp_path / "again", model=tmp_path / "rtn", calibration=base / "text.txt")
    report = json.loads((tmp_path / "again/report.json").read_text())
    assert (report["method"], report["awq"]) == ("gptq", True)
    stages = {"default": Quantize(**OPTIONS | {"method": ""})}
    stages["named"] = Quantize(**OPTIONS | {"method": "gptq", "awq": True})
    for name, stage in stages.items():
        stage(tmp_path / name, model=base / "base", calibration=base / "text.txt")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in stages]
    assert weights[0] == weights[1]
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")  # no network
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"calibration: .* or the method rtn, which needs none"):
        Quantize()(tmp_path / "q", model=base / "base")
    shutil.copytree(base / "base", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(InputError, match=r"model: expected a tokenizer .* or the method rtn"):
        Quantize()(tmp_path / "r", model=tmp_path / "bare")


def test_the_report_has_the_loss(base, tmp_path):
    events = []
    result = run(base, tmp_path / "q", events.append, method="gptq", awq=True)
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert {k: report[k] for k in result} == json.loads(json.dumps(result))
    assert report["calibration_tokens"] == 256 and report["calibration_length"] == 32
    assert report["calibration_source"] == str(base / "text.txt")
    assert report["iterations"] is None and report["seed"] == 0  # gptq has no steps
    assert report["method"] == "gptq" and len(report["layers"]) == 15
    assert report["layers"].keys() >= {"model.embed_tokens", "model.layers.1.mlp.down_proj"}
    assert report["awq"] is True and len(report["awq_powers"]) == 2 * 4
    assert 0 < report["bpb_increase_error"] < 1
    assert 0 < report["kl"] < 0.5 and 0.2 < report["greedy_agreement"] <= 1
    assert report["bits_per_quantized_weight"] == 5  # 16 bits for the scale of 16 weights
    same, out_of_domain = [event["warning"] for event in events if "warning" in event]
    assert "data: " in same and "text.txt is also the calibration text" in same
    assert out_of_domain.startswith(
        "out_of_domain: expected text of another kind than the calibration, got none"
    )
    assert report["out_of_domain"] is None
    notes = [event["info"] for event in events if "info" in event]
    assert [note.partition(":")[0] for note in notes] == [
        "gptq on 256 tokens",  # the time it takes, before the layers
        "model.layers.0",
        "model.layers.1",
    ]
    assert not (tmp_path / "q/progress").exists()
    config = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]["fastlm"]
    assert config["method"] == "gptq" and config["format"] == "w4a16"
    # the figures are those of the model that was written
    before = CausalLM.from_pretrained(base / "base")
    after = CausalLM.from_pretrained(tmp_path / "q")
    ids = torch.tensor([Tokenizer.load(base / "base").encode("tree river stone bird")])
    with torch.no_grad():
        assert not torch.equal(before(ids).logits, after(ids).logits)


def test_the_last_step_distils(base, tmp_path):
    plain = run(base, tmp_path / "q", method="gptq")
    events = []
    result = run(base, tmp_path / "r", events.append, method="gptq", distill_steps=30)
    report = json.loads((tmp_path / "r/report.json").read_text())
    distillation = report["distillation"]
    assert distillation["steps"] == report["distill_steps"] == 30 and distillation["accepted"]
    assert 0 < distillation["kl_after"] < distillation["kl_before"] and result["kl"] < plain["kl"]
    assert result["bits_per_weight"] == plain["bits_per_weight"]
    assert json.loads((tmp_path / "q/report.json").read_text())["distillation"] is None
    # gptq saw what it saw without the step
    layers = [json.loads((tmp_path / n / "report.json").read_text())["layers"] for n in "qr"]
    assert layers[0] == layers[1]
    notes = [event["info"] for event in events if event.get("info", "").startswith("distill")]
    assert len(notes) == 11 and "held-out KL" in notes[-1]
    assert not (tmp_path / "r/progress").exists()


def test_a_loss_above_the_threshold_warns_or_refuses(base, tmp_path):
    events = []
    run(base, tmp_path / "q", events.append, calibrated=False, max_bpb_increase=0.0)
    lines = [event["warning"] for event in events if "warning" in event]
    assert len(lines) == 1 and "bits per byte to grow by at most 0 %" in lines[0]
    with pytest.raises(
        InputError, match="max_bpb_increase: expected bits per byte to grow by at most 0 %"
    ):
        run(base, tmp_path / "r", calibrated=False, max_bpb_increase=0.0, strict=True)
    assert not (tmp_path / "r/config.json").exists()
    assert not list(tmp_path.glob("r/*.safetensors"))


def test_figures_that_are_not_finite_are_refused(base, tmp_path):
    model = CausalLM.from_pretrained(base / "base")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "base")
    Tokenizer.load(base / "base").save(tmp_path / "base")
    with pytest.raises(InputError, match="expected finite bits per byte and KL, got nan -> nan"):
        Quantize(method="rtn", group_size=16)(
            tmp_path / "q", model=tmp_path / "base", data=base / "text.txt"
        )
    assert not list(tmp_path.glob("q/*"))


def test_the_report_has_the_effective_options(base, tmp_path):
    events = []
    run(base, tmp_path / "q", events.append, calibration_tokens=10**6, calibration_length=10**6)
    report = json.loads((tmp_path / "q/report.json").read_text())
    window = CausalLM.from_pretrained(base / "base").context_limit
    assert report["calibration_length"] == window and report["calibration_tokens"] % window == 0
    (line,) = [e["warning"] for e in events if e.get("warning", "").startswith("calibration")]
    assert f"expected 1,000,000 tokens, got {report['calibration_tokens']:,} in" in line
    # one group per row, and without text; the report of the earlier model is replaced
    Quantize(method="rtn", group_size=-1)(tmp_path / "q", model=base / "base")
    report = json.loads((tmp_path / "q/report.json").read_text())
    used = [report[k] for k in ("group_size", "iterations", "seed", "calibration_tokens")]
    assert used == [-1, None, None, None] and report["calibration_source"] is None


def test_a_quantized_model_wants_dequantize(base, tmp_path):
    Quantize(method="rtn", group_size=16)(tmp_path / "q", model=base / "base")
    with pytest.raises(InputError, match=r"model: expected an unquantized model.*--dequan"):
        Quantize(method="rtn", group_size=32)(tmp_path / "r", model=tmp_path / "q")
    result = Quantize(method="rtn", group_size=32, dequantize=True)(
        tmp_path / "r", model=tmp_path / "q", data=base / "text.txt"
    )
    small = sum(w.nbytes for w in CausalLM.from_pretrained(tmp_path / "q").weights().values())
    assert result["bytes_before"] == small and 0 < result["kl"] < 0.5


def test_what_is_refused(base, tmp_path):
    for options, message in [
        ({"distill_steps": -1}, "distill_steps: expected a number of steps, 0 or more, got -1"),
        ({"max_bpb_increase": -1.0}, "max_bpb_increase: expected 0 or more, got -1.0"),
        ({"calibration_tokens": 0}, "calibration_tokens: expected 1 or more, got 0"),
        ({"calibration_length": 10**6, "calibration_tokens": 1, "iterations": 0}, "iterations"),
    ]:
        with pytest.raises(InputError, match=message):
            run(base, tmp_path / "r", **options)
    with pytest.raises(InputError, match="strict: expected held-out text"):
        Quantize(strict=True, **OPTIONS)(tmp_path / "r", model=base / "base")
    assert not (tmp_path / "r").exists()


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """Files in the place of the default calibration's packages, and the texts' words."""
    words = {"web": "tree river stone bird", "docs": "cloud road house garden", "wiki": "lamp boat"}
    for kind, text in words.items():
        draw = random.Random(kind)
        lines = [draw.choice(text.split()) for _ in range(400)]
        (tmp_path / f"{kind}.txt").write_text(" ".join(lines))
    mixed = tuple(str(tmp_path / f"{kind}.txt") for kind in ("web", "docs"))
    monkeypatch.setattr(calibration, "CALIBRATION_MIX", mixed)
    monkeypatch.setattr(calibration, "OUT_OF_DOMAIN", str(tmp_path / "wiki.txt"))
    return mixed


@pytest.mark.parametrize("options", [{"method": "gptq"}, {"awq": True}, {"distill_steps": 2}])
def test_the_default_calibration_is_of_several_kinds_and_another_is_measured(
    base, tmp_path, kinds, options
):
    events = []
    run(base, tmp_path / "q", events.append, calibrated=False, **options)
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert report["calibration_source"] == ", ".join(kinds)
    assert report["out_of_domain"]["source"] == calibration.OUT_OF_DOMAIN
    assert {"bpb_increase", "bpb_increase_error", "kl", "bits_per_byte"} <= report[
        "out_of_domain"
    ].keys()
    ratio = (
        report["out_of_domain"]["bits_per_byte"] / report["out_of_domain"]["bits_per_byte_before"]
    )
    assert report["out_of_domain"]["bpb_increase"] == pytest.approx(ratio - 1)
    assert report["out_of_domain"]["bits_per_byte_before"] != report["bits_per_byte_before"]
    assert not any("out_of_domain" in event.get("warning", "") for event in events)


@pytest.mark.parametrize("wrong", ["CALIBRATION_MIX", "OUT_OF_DOMAIN"])
def test_a_default_text_that_is_not_there_costs_no_quantization(
    base, tmp_path, kinds, monkeypatch, wrong
):
    steps = []
    monkeypatch.setattr("fastlm.quant.quantize", lambda *_, **__: steps.append("quantize"))
    missing = str(tmp_path / "none.txt")
    monkeypatch.setattr(calibration, wrong, (missing,) if wrong == "CALIBRATION_MIX" else missing)
    with pytest.raises(InputError, match=r"none\.txt"):
        run(base, tmp_path / "q", calibrated=False, method="gptq")
    assert not steps


def test_rounding_that_needs_no_text_reads_none(base, tmp_path, kinds):
    run(base, tmp_path / "q", calibrated=False)
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert report["calibration_source"] is report["out_of_domain"] is None


def test_windows_of_several_texts_take_turns(base, kinds):
    model, tokenizer = load_model(base / "base")
    cut = {"length": 16, "seed": 3}
    mixed = calibration.text_windows(model, tokenizer, kinds, tokens=96, **cut)
    parts = [calibration.text_windows(model, tokenizer, k, tokens=48, **cut) for k in kinds]
    assert mixed.shape == (6, 16)
    assert torch.equal(mixed[0::2], parts[0]) and torch.equal(mixed[1::2], parts[1])
    # one that is short leaves the rest to the other
    (base / "short.txt").write_text("tree river stone bird " * 6)
    both = [str(base / "short.txt"), kinds[1]]
    assert len(calibration.text_windows(model, tokenizer, both, tokens=320, **cut)) > 10


def test_explicit_texts_are_mixed_and_the_out_of_domain_loss_is_reported(base, tmp_path, kinds):
    events = []
    stage = Quantize(**{**OPTIONS, "method": "gptq", "max_bpb_increase": 0.0})
    stage(
        tmp_path / "q", model=base / "base", data=base / "text.txt", calibration=[*kinds],
        out_of_domain=tmp_path / "wiki.txt", on_event=events.append,
    )  # fmt: skip
    report = json.loads((tmp_path / "q/report.json").read_text())
    assert report["calibration_source"] == ", ".join(kinds)
    assert report["out_of_domain"]["source"] == str(tmp_path / "wiki.txt")
    lines = [event["warning"] for event in events if "warning" in event]
    assert [line.partition(" on ")[2].partition(";")[0] for line in lines] == [
        str(base / "text.txt"), str(tmp_path / "wiki.txt"),
    ]  # fmt: skip


def test_an_interrupted_run_continues_to_the_same_bytes(base, tmp_path):
    class Cut(Exception):
        pass

    def cut(event):
        if "model.layers.0" in event.get("info", ""):
            raise Cut

    with pytest.raises(Cut):
        run(base, tmp_path / "cut", cut, method="autoround")
    assert (tmp_path / "cut/progress/layer-00000.safetensors").exists()
    assert not (tmp_path / "cut/model.safetensors").exists()
    run(base, tmp_path / "cut", method="autoround")
    run(base, tmp_path / "whole", method="autoround")
    cut_bytes, uninterrupted = (tmp_path / n / "model.safetensors" for n in ("cut", "whole"))
    assert cut_bytes.read_bytes() == uninterrupted.read_bytes()
    names = [sorted(p.name for p in (tmp_path / n).iterdir()) for n in ("cut", "whole")]
    assert names[0] == names[1]


RECIPE = """\
name = "tiny"
[[stage]]
kind = "quantize"
from = "{base}/base"
calibration = "{base}/text.txt"
group_size = 16
calibration_tokens = 256
calibration_length = 32
method = "gptq"
"""
KILLED = """
import os, signal, sys
from fastlm.stages import run_recipe
def kill(event):
    if "model.layers.0" in event.get("info", ""):
        os.kill(os.getpid(), signal.SIGKILL)
run_recipe(*sys.argv[1:], on_event=kill)
"""


def test_a_recipe_continues_a_quantization_that_was_killed(base, tmp_path, monkeypatch):
    recipe, cut = tmp_path / "tiny.toml", tmp_path / "cut"
    recipe.write_text(RECIPE.format(base=base))
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, str(recipe), str(cut)])
    assert done.returncode == -9
    files = sorted(file.name for file in (cut / "quantize/progress").iterdir())
    assert files == ["embeddings.safetensors", "layer-00000.safetensors"]
    changed = tmp_path / "again"  # with another option
    shutil.copytree(cut, changed)

    plans = []

    def plan(**options):
        run_recipe(recipe, cut, on_plan=plans.append, **options)
        return plans[-1][0].action, plans[-1][0].reason

    names, work = [], layerwise.gptq
    monkeypatch.setattr(
        layerwise, "gptq", lambda *a, name, **k: names.append(name) or work(*a, name=name, **k)
    )
    assert plan() == ("continue", "was interrupted")
    assert names and all(name.startswith("model.layers.1.") for name in names)
    assert not (cut / "quantize/progress").exists() and plan() == ("skip", "done")
    run_recipe(recipe, tmp_path / "whole")
    for name in ("model.safetensors", "config.json"):
        got, expected = (folder / "quantize" / name for folder in (cut, tmp_path / "whole"))
        assert got.read_bytes() == expected.read_bytes()

    (changed / "quantize/stray").write_text("")
    run_recipe(recipe, changed, overrides=["quantize.method=rtn"], on_plan=plans.append)
    assert plans[-1][0].action == "run" and not list(changed.glob("previous*"))  # no training
    assert not any((changed / "quantize" / name).exists() for name in ("progress", "stray"))


def test_a_warning_without_heldout_text(base, tmp_path):
    events = []
    stage = Quantize(method="rtn", group_size=16)
    stage(tmp_path / "q", model=base / "base", on_event=events.append)
    lines = [event["warning"] for event in events if "warning" in event]
    assert len(lines) == 1 and lines[0].startswith("data: expected held-out text to measure")
    assert json.loads((tmp_path / "q/report.json").read_text())["warnings"] == lines
