"""Files from strangers with one value of the wrong kind, random but the same every time: they work,
or are refused in one short line.

Far more seeds than these were run once (docs/log.md, issue 13). These keep the result.
"""

import copy
import hashlib
import json
import math
import os
import random
import shutil
import time

import numpy as np
import pytest
import tiny_recipe
import tiny_run
import torch
from damage import LONG, change_json, outcome
from model_files import write_gguf

from fastlm import ModelConfig
from fastlm.checkpoint.folder import load_state
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.quant import quantize
from fastlm.stages import load_recipe
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer
from fastlm.train.checkpoints import list_checkpoints

# GGUF


def llama_gguf(path, changes=None, drop=()):
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "ab"]
    shapes = {
        "token_embd": (len(tokens), 8), "output_norm": (8,), "blk.0.attn_norm": (8,),
        "blk.0.ffn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8),
        "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8), "blk.0.ffn_gate": (16, 8),
        "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16),
    }  # fmt: skip
    metadata = {
        "embedding_length": 8, "block_count": 1, "attention__head_count": 2, "context_length": 64,
        "attention__head_count_kv": 1, "feed_forward_length": 16, "rope__freq_base": 5e4,
        "attention__layer_norm_rms_epsilon": 1e-5, "rope__dimension_count": 4,
        "attention__key_length": 4, "rope__scaling__type": "linear", "rope__scaling__factor": 2.0,
        "rope__scaling__original_context_length": 32, "attention__sliding_window": 8,
        "general__alignment": 32,
        "tokenizer__ggml__model": "llama", "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [-float(i) for i in range(len(tokens))],
        "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 4,
        "tokenizer__ggml__bos_token_id": 1, "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0, "tokenizer__ggml__padding_token_id": 0,
        "tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": False,
        "tokenizer__ggml__add_space_prefix": True, "tokenizer__chat_template": "x",
        "tokenizer__ggml__merges": ["a b"], "tokenizer__ggml__pre": "llama-bpe",
    } | (changes or {})  # fmt: skip
    metadata = {key: value for key, value in metadata.items() if key not in drop}
    tensors = {f"{n}.weight": rng.standard_normal(s).astype("f4") for n, s in shapes.items()}
    write_gguf(path, tensors, **metadata)
    return list(metadata)


GGUF_VALUES = [
    True, 0, 1, 7, 2**32 - 1, 0.0, 0.5, -1.0, math.nan, math.inf, "", "x", LONG, [1, 2], [0.5],
    ["a"], ["a", "b c", ""], [True], [1] * 263, ["a"] * 263, [str(i) for i in range(263)],
]  # fmt: skip


def use_gguf(path):
    config, tensors = load_state(path)
    dict(tensors)
    tokenizer = load_tokenizer(path, config)
    tokenizer.decode(tokenizer.encode("ab é"))


def gguf_cases(path, draw, share):
    """Each key with each value, of which a ``share`` is tested."""
    keys = llama_gguf(path)
    assert outcome(lambda: use_gguf(path)) == "fine"
    for key in keys:
        llama_gguf(path, drop=[key])
        yield outcome(lambda: use_gguf(path))
        for model in ("llama", "gpt2"):
            for value in GGUF_VALUES:
                if draw.random() < share:
                    llama_gguf(path, {"tokenizer__ggml__model": model, key: value})
                    yield outcome(lambda: use_gguf(path))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_gguf_metadata(tmp_path):
    cases = list(gguf_cases(tmp_path / "m.gguf", random.Random(0), 0.1))
    assert cases.count("refused") > 40 and cases.count("fine") > 10


def test_a_long_sentencepiece_token_is_refused(tmp_path):
    began = time.process_time()
    llama_gguf(tmp_path / "m.gguf", {
        "tokenizer__ggml__tokens": [*(str(i) for i in range(262)), "x" * 600_000],
    })  # fmt: skip
    with pytest.raises(InputError, match="expected at most 512 characters each, got 600000"):
        Tokenizer.load(tmp_path / "m.gguf")
    assert time.process_time() - began < 5


# model folders


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 20, 300)
    config = ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    small = quantize(CausalLM(config, seed=0), "w4a16", group_size=16)
    small.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def use_model(folder):
    network = CausalLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, network.config.to_dict())
    tokenizer.encode("the cat")
    if tokenizer.chat_template is not None:
        tokenizer.encode_chat([{"role": "user", "content": "the"}])


JSON_FILES = ("config.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")


def folder_cases(folder, draw, count):
    for name in JSON_FILES:
        file = folder / name
        original = file.read_text()
        for _ in range(count):
            file.write_text(json.dumps(change_json(json.loads(original), draw)))
            yield outcome(lambda: use_model(folder))
        file.write_text(original)


def test_model_folders(model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    cases = list(folder_cases(tmp_path, random.Random(1), 40))
    assert cases.count("refused") > 30 and cases.count("fine") > 30


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", '"\\ud800"', "1" * 5000])
def test_json_that_is_none(model, tmp_path, name, text):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(text)
    assert outcome(lambda: use_model(tmp_path)) == "refused"


@pytest.mark.parametrize("table", ["vocab", "added_tokens"])
def test_an_id_of_two_to_the_31(model, tmp_path, table):
    """The library would create a list of the unused ids: 8 GB."""
    file = tmp_path / "tokenizer.json"
    content = json.loads((model / "tokenizer.json").read_text())
    if table == "vocab":
        content["model"]["vocab"]["the"] = 2**31
    else:
        content["added_tokens"][0]["id"] = 2**31
        content["model"]["vocab"]["<|endoftext|>"] = 2**31
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="expected ids below 16,777,216, got one of 2,147,483,648"):
        Tokenizer.load(file)


def test_a_tokenizer_that_fails_when_it_encodes(model, tmp_path):
    """The library raises a bare Exception there."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "[UNK]"
    content["model"]["vocab"].pop("t")
    content["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    for call in (lambda: tokenizer.encode("tt"), lambda: tokenizer.encode_batch(["tt"])):
        with pytest.raises(InputError, match="tokenizer: expected a consistent one"):
            call()


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "chat_template.jinja"])
def test_a_pipe_in_a_model_folder(model, tmp_path, name):
    """Opening one for reading would wait forever."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert outcome(lambda: use_model(tmp_path)) == "refused"


def test_transformers_refuses_a_quantized_folder(model):
    """Unaware of the quant_method, it would otherwise open the folder with random weights."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(ValueError, match="quantization config"):
            kind.from_pretrained(model)


def test_a_quantized_folder_of_before(model, tmp_path):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] = config["quantization_config"]["fastlm"]
    file.write_text(json.dumps(config))
    ids = torch.arange(9)[None]
    before, now = (CausalLM.from_pretrained(f)(ids).logits for f in (tmp_path, model))
    assert torch.equal(before, now)


# recipes


@pytest.fixture
def recipe(tmp_path):
    return tiny_recipe.write(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 30_000 + " = 1", "[" + "a." * 30_000 + "b]", "a = " + "[" * 5000,
        "a = " + "{a=" * 5000, "a = 1" + "0" * 5000, "name = '" + "x" * 2**17 + "'", "a = 0x" +
        "f" * 9000, f"[model]\n{LONG} = 1", f"name = '{LONG}'", "data = 3", "model = []",
    ],
)  # fmt: skip
def test_recipes_that_are_none(recipe, text):
    began = time.process_time()
    recipe.write_text(text)
    assert outcome(lambda: load_recipe(recipe)) == "refused"
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "override",
    [
        "seed=" + "[" * 5000, "seed=" + "{a=" * 5000, "a" + ".a" * 50_000 + "=1", "a.b.c=1",
        "seed=1" + "0" * 5000, "seed=0x" + "f" * 9000, f"name={LONG}/", f"pretrain.{LONG}=1",
    ],
)  # fmt: skip
def test_overrides_that_are_none(recipe, override):
    assert outcome(lambda: load_recipe(recipe, [override])) == "refused"


def test_a_pipe_for_a_recipe(tmp_path):
    os.mkfifo(tmp_path / "r.toml")
    with pytest.raises(InputError, match="not a file"):
        load_recipe(tmp_path / "r.toml")


# checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    tiny_run.shards(folder)
    tiny_run.start(folder, folder / "run")
    return folder


def checkpoint_cases(trained, run, draw, count):
    """The manifest's metadata or the tensors are changed, with the right checksum."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(trained / "run", run)
    folder = list_checkpoints(run)[-1]
    manifest, data = folder / "manifest.json", folder / "tensors.safetensors"
    original, tensors = json.loads(manifest.read_text()), load_file(data)
    metrics = (run / "metrics.jsonl").read_bytes()
    for index in range(count):
        changed = copy.deepcopy(original)
        changed_tensors = dict(tensors)
        if index % 2:
            changed["metadata"] = change_json(changed["metadata"], draw)
        else:
            name = draw.choice(list(changed_tensors))
            value = changed_tensors.pop(name)
            change = draw.randrange(5)
            if change == 1:
                changed_tensors[name] = value.flatten()[:-1].clone()
            elif change == 2:
                changed_tensors[name] = value.double()
            elif change == 3:
                changed_tensors[name + draw.choice([".x", "1", ""])] = value[None].clone()
            elif change == 4:
                changed_tensors[
                    "optimizer." + draw.choice(["x", "99.step", "-1.step", ".", "0"])
                ] = value
        save_file(changed_tensors, data)
        changed["sha256"] = hashlib.sha256(data.read_bytes()).hexdigest()
        manifest.write_text(json.dumps(changed))
        yield outcome(lambda: tiny_run.start(trained, run))
        (run / "metrics.jsonl").write_bytes(metrics)
        for path in list_checkpoints(run):
            if path != folder:
                shutil.rmtree(path)


def test_checkpoints(trained, tmp_path):
    cases = list(checkpoint_cases(trained, tmp_path / "run", random.Random(2), 80))
    assert cases.count("refused") > 30


def test_a_run_without_its_metrics_says_what_to_do(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").unlink()
    with pytest.raises(InputError, match=r"got 0; delete .*/checkpoints to start again"):
        tiny_run.start(trained, tmp_path / "run")


@pytest.mark.parametrize("key", ["pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [[], [1], [[]]])
def test_a_list_for_a_token_that_is_one(key, value):
    with pytest.raises(InputError, match=f"{key}: expected a token id or None"):
        ModelConfig(
            model_type="llama", vocab_size=8, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=8, **{key: value},
        )  # fmt: skip
