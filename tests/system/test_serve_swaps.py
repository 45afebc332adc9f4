"""Promotions and rollbacks under load: no request is lost, each answer is that of the model it
names, and a replaced model's memory returns.
"""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from canary_app import canary_server, model_folders, wait_until_freed
from paths import SUPPORT
from serve_app import HTTP, TEXT, ask

from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.model.causal_lm import CausalLM
from fastlm.model.load import load_model
from fastlm.serve import loading
from fastlm.serve.admin_api import PATHS
from fastlm.serve.model_manager import AllowedModels
from fastlm.serve.state import read_state
from fastlm.tokenizer.tokenizer import Tokenizer

PROMPTS = ["The tree", "What is 1 + 1?", "river", "name"]
SEEDS = range(3)
TOKENS = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return model_folders(tmp_path_factory.mktemp("models"), "abc")


@pytest.fixture(scope="module")
def direct_texts(models):
    """{(digest's beginning, prompt, seed): the text of that model without a server}."""
    texts = {}
    for folder in models.values():
        model, tokenizer = load_model(folder)
        engine = Engine(model, tokenizer, num_blocks=64)
        start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        keys = [(prompt, seed) for prompt in PROMPTS for seed in SEEDS]
        requests = [
            Request(
                [*start, *tokenizer.encode(p)],
                TOKENS,
                Sampling(temperature=1.0),
                s,
                ignore_eos=True,
            )
            for p, s in keys
        ]
        name = loading.model_digest(folder)[:8]
        for key, result in zip(keys, engine.generate(requests)):
            texts[name, *key] = result.text
    return texts


def promote(url, path, **headers):
    body = {} if path is None else {"model": str(path)}
    return ask(url, body, "/v1/admin/promote", **headers)


def stream_completion(url, prompt, seed):
    """Return (status, model, text, is_complete)."""
    body = {
        "model": "tiny", "prompt": prompt, "seed": seed, "max_tokens": TOKENS, "ignore_eos": True,
        "stream": True,
    }  # fmt: skip
    response = ask(url, body, "/v1/completions")
    if response.status_code != 200:
        return response.status_code, "", response.text, False
    events = [line[6:] for line in response.text.split("\n\n") if line]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    if any("error" in chunk for chunk in parsed):
        return 500, "", response.text, False
    (model,) = {chunk["model"] for chunk in parsed}
    text = "".join(chunk["choices"][0]["text"] for chunk in parsed)
    is_complete = events[-1] == "[DONE]" and parsed[-1]["choices"][0]["finish_reason"] == "length"
    return 200, model, text, is_complete


def test_swaps_under_load_lose_no_request(models, direct_texts, tmp_path):
    ends = threading.Event()
    results = []

    def client(number):
        for i in range(10_000):
            if ends.is_set():
                return
            prompt, seed = PROMPTS[(number + i) % len(PROMPTS)], i % len(SEEDS)
            results.append((prompt, seed, *stream_completion(url, prompt, seed)))

    references = []
    folder = next(iter(models.values())).parent
    with canary_server(models["a"], tmp_path / "state.json", models_dir=folder) as (url, server):
        with ThreadPoolExecutor(12) as clients:
            running = [clients.submit(client, number) for number in range(12)]
            try:
                for target in ("b", "back", "c", "a", "back", "b"):
                    references.append(weakref.ref(server.served_model.model))
                    before = len(results)
                    done = (
                        ask(url, {}, "/v1/admin/rollback")
                        if target == "back"
                        else promote(url, target)
                    )
                    assert done.status_code == 200, done.text
                    until = time.monotonic() + 120
                    while len(results) < before + 24:  # each model answers for a while
                        assert time.monotonic() < until
                        time.sleep(0.01)
            finally:
                ends.set()
            for future in running:
                future.result()
        wait_until_freed(server)
        assert [ref() for ref in references] == [None] * 6  # while the server continues
        counters = HTTP.get(url + "/metrics").text
        assert [d["action"] for d in read_state(tmp_path / "state.json").decisions] == [
            "promote", "roll back", "promote", "promote", "roll back", "promote",
        ]  # fmt: skip
        assert server.served_model.path == str(models["b"])
    assert all(status == 200 and is_complete for _, _, status, _, _, is_complete in results), (
        results
    )
    answered = {model for _, _, _, model, _, _ in results}
    assert len(answered) == 3 and all(model.startswith("tiny@") for model in answered)
    for prompt, seed, _, model, text, _ in results:
        assert text == direct_texts[model.removeprefix("tiny@"), prompt, seed]
    # counters of freed models stay; each of the six loaded models was tested with one answer
    assert f'fastlm_answers_total{{reason="length"}} {float(len(results) + 6)}' in counters
    counts = re.findall(
        r'^fastlm_model_answers_total{model=".*",outcome="complete"} (.*)$', counters, re.M
    )
    assert len(counts) == 3 and sum(map(float, counts)) == len(results)
    assert 'fastlm_model_decisions_total{action="promote"} 4.0' in counters


def test_the_memory_of_a_replaced_model_returns(tmp_path):
    """Each model has 50 MiB."""
    tokenizer = Tokenizer.train(TEXT, 320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=512, intermediate_size=2048,
        num_hidden_layers=3, num_attention_heads=8, max_position_embeddings=128,
        eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    for seed in (1, 2):
        CausalLM(config, seed=seed).save_pretrained(tmp_path / str(seed))
        tokenizer.save(tmp_path / str(seed))
    script = SUPPORT / "swap_memory.py"
    run = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    before, *after = map(float, run.stdout.split())
    assert len(after) == 4
    assert max(after) < before + 25, run.stdout  # a model that stays takes 50


def test_a_refused_promotion_leaves_the_old_model(models, tmp_path, monkeypatch):
    models_folder = tmp_path / "models"
    models_folder.mkdir()
    good = models_folder / "good"
    good.symlink_to(models["b"])  # points outside the folder
    (models_folder / "empty").mkdir()
    bad = model_folders(models_folder, ["short"], context=128)["short"]
    broken = model_folders(models_folder, ["broken"])["broken"]
    model, _ = load_model(broken)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.save_pretrained(broken)
    ready = model_folders(models_folder, ["xx", "ready"])["ready"]
    other = model_folders(models_folder, ["xx", "yy", "other"])["other"]
    Tokenizer.train(["Some words of a very different text"] * 9, 320).save(other)
    state = tmp_path / "state.json"
    keys = {"keys": ["k" * 16], "admin_keys": ["a" * 16]}
    admin = {"authorization": "Bearer " + "a" * 16}
    with canary_server(models["a"], state, models_dir=models_folder, **keys) as (url, server):

        def refused(path, text, status=400, headers=admin):
            response = promote(url, path, **headers)
            assert response.status_code == status, response.text
            assert text in response.json()["error"]["message"], response.text
            assert server.served_model.path == str(models["a"])

        refused(ready, "expected 'Bearer KEY'", 401, {})
        refused(ready, "expected an admin key", 403, {"authorization": "Bearer " + "k" * 16})
        for outside in (models["b"], "../../etc", "/etc/passwd", good, "good", models_folder):
            refused(outside, "expected", 400)
        for name in ("", "a\0b"):
            refused(name, "model: expected", 400)
        refused("model:smollm2", "model: expected one of the command line, or one below")
        refused("nothing", "no such path")
        refused("empty", "expected a folder with config.json")
        refused(bad, "expected a context of at least the current model's 512 tokens, got 128")
        refused(other, "model: expected the current model's tokenizer")
        refused(broken, "expected an answer of two tokens, got: logits are not finite")
        refused(
            models["a"],
            f"model: expected one that can be served, got: {models['a']}, which is served",
        )
        refused(None, "expected a path, got none, and no canary runs")
        monkeypatch.setattr(loading, "available_memory", lambda: 1000)
        refused(ready, "MiB of free memory for the model, got 0")
        monkeypatch.undo()
        response = ask(url, {}, "/v1/admin/rollback", **admin)
        assert "expected a promotion to undo, got none" in response.text
        state.chmod(0o400)
        monkeypatch.setattr("fastlm.serve.state.save_atomic", _full)
        refused(ready, "No space left")
        monkeypatch.undo()
        with ThreadPoolExecutor(4) as pool:  # one at a time
            both = list(pool.map(lambda _: promote(url, ready, **admin).status_code, range(2)))
        assert sorted(both) in ([200, 409], [200, 400])  # 400: the second came after the first
        assert server.served_model.path == str(ready)
        canary_status = HTTP.get(url + "/v1/canary", headers=admin).json()
        assert canary_status["status"] == "none" and canary_status["path"] == str(ready)
        assert HTTP.get(url + "/v1/canary").status_code == 401
        described = HTTP.get(url + "/openapi.json", headers=admin).json()["paths"]
        assert {*PATHS} <= described.keys()
        sent = {"model": str(other), "allow_other_tokenizer": True}
        assert ask(url, sent, "/v1/admin/promote", **admin).status_code == 200
        assert ask(url, {}, "/v1/admin/rollback", **admin).status_code == 200
        # the files of the previous model must be unchanged
        assert promote(url, models["a"], **admin).status_code == 200
        assert promote(url, ready, **admin).status_code == 200
        assert read_state(state).previous.path == str(models["a"])
    with canary_server(models["a"], state, models_dir=models_folder) as (url, server):
        assert server.served_model.path == str(ready)  # the last decision
        names = [m["id"] for m in HTTP.get(url + "/v1/models").json()["data"]]
        assert names == ["tiny", server.served_model.name]
    (ready / "config.json").write_text((ready / "config.json").read_text() + " ")
    with pytest.raises(InputError, match="its files have changed"):
        with canary_server(models["a"], state, models_dir=models_folder):
            pass
    shutil.rmtree(ready)
    with pytest.raises(InputError, match=rf"state\.json: expected .* {ready}, got: .*, or delete"):
        with canary_server(models["a"], state, models_dir=models_folder):
            pass
    with canary_server(models["b"], state, models_dir=models_folder) as (
        _,
        server,
    ):  # another --model
        assert server.served_model.path == str(models["b"])


def _full(path, writer):
    raise InputError(f"{path}: cannot be written: No space left on device")


def test_paths(tmp_path):
    inside = AllowedModels([], tmp_path)
    assert inside.resolve("x/y") == str(tmp_path / "x/y") == inside.resolve(str(tmp_path / "x/y"))
    for outside in ("..", ".", "x/../..", "/", str(tmp_path)):
        with pytest.raises(InputError, match="below --models-dir"):
            inside.resolve(outside)
    exact = AllowedModels([str(tmp_path / "a"), "model:smollm2"], None)
    assert exact.resolve("model:smollm2") == "model:smollm2"
    assert exact.resolve(str(tmp_path / "b/../a")) == str(tmp_path / "b/../a")
    with pytest.raises(InputError, match="expected one of the command line, got"):
        exact.resolve(str(tmp_path / "a/b"))
