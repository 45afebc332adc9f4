"""Reading and writing model folders, and every way in which one can be broken."""

import fcntl
import json
import os
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import write_gguf
from paths import PYTHONPATH
from safetensors.torch import save_file

from fastlm.checkpoint.folder import load_state, load_tensors, save_hf, save_tensors
from fastlm.errors import InputError
from fastlm.files import atomic_path, save_atomic
from fastlm.model.causal_lm import CausalLM
from fastlm.ops.quantized_weight import QuantizedWeight
from fastlm.tokenizer.load import load_tokenizer
from fastlm.tokenizer.tokenizer import Tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def make_state(config=CONFIG, dtype=torch.float32) -> dict[str, torch.Tensor]:
    from fastlm.checkpoint.architectures import expected_shapes, parse_config

    shapes = expected_shapes(parse_config(config, "test"))
    return {name: torch.randn(shape).to(dtype) * 0.1 for name, shape in shapes.items()}


def quantize(weight: torch.Tensor, bits: int, group: int, zeros: bool) -> QuantizedWeight:
    n, k = weight.shape
    rng = torch.Generator().manual_seed(bits)
    if bits == 4:
        qdata = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=rng)
    else:
        qdata = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=rng)
    scales, offsets = torch.randn(2, n, k // group, generator=rng)
    return QuantizedWeight(qdata, scales, offsets if zeros else None, bits, group, (n, k))


def assert_same(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for name, a in actual.items():
        b = expected[name]
        if isinstance(b, QuantizedWeight):
            assert (a.bits, a.group_size, a.shape) == (b.bits, b.group_size, b.shape), name
            assert torch.equal(a.qdata, b.qdata) and torch.equal(a.scales, b.scales), name
            assert (a.zeros is None) == (b.zeros is None), name
            assert b.zeros is None or torch.equal(a.zeros, b.zeros), name
        else:
            assert a.dtype == b.dtype and torch.equal(a, b), name


def files(folder) -> set[str]:
    return {p.name for p in folder.iterdir()}


# round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_bytes", [2**30, 40_000])
def test_round_trip_and_transformers(tmp_path, dtype, shard_bytes):
    from transformers import AutoModelForCausalLM

    state = make_state(dtype=dtype)
    save_hf(tmp_path / "m", CONFIG, state, max_shard_bytes=shard_bytes)
    shards = [f for f in files(tmp_path / "m") if f.endswith(".safetensors")]
    assert (len(shards) > 3) == (shard_bytes < 2**30)
    for shard in shards:  # a tensor larger than the limit gets its own file
        assert (tmp_path / "m" / shard).stat().st_size < max(shard_bytes, 300 * 64 * 4) + 4096
    config, tensors = load_state(tmp_path / "m")
    assert config == CONFIG
    assert_same(dict(tensors), state)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype).state_dict()
    assert_same(dict(theirs), state)


def test_transformers_writes_and_fastlm_reads(tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(**{**CONFIG, "head_dim": 32, "tie_word_embeddings": True})
    )
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    config, tensors = load_state(tmp_path)
    want = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    assert_same(dict(tensors), want)
    assert config["model_type"] == "qwen3"


@pytest.mark.parametrize("shard_bytes", [2**30, 20_000])
def test_quantized_round_trip(tmp_path, shard_bytes):
    state = make_state()
    for name in list(state):
        if "_proj" in name:
            down = "down" in name
            state[name] = quantize(state[name], 4 if "mlp" in name else 8, 32, zeros=down)
    state["model.embed_tokens.weight"] = quantize(state["lm_head.weight"], 8, 16, False)
    save_hf(tmp_path / "q", CONFIG, state, max_shard_bytes=shard_bytes)
    config, tensors = load_state(tmp_path / "q")
    assert_same(dict(tensors), state)
    description = config["quantization_config"]
    assert (description["quant_method"], description["format"]) == ("fastlm", "mixed")
    assert description["modules"]["model.layers.1.mlp.up_proj"] == {
        "kind": "linear",
        "bits": 4,
        "group_size": 32,
        "shape": [96, 64],
        "scale_dtype": "float32",
        "zeros": False,
    }
    stored = config.copy()
    del stored["quantization_config"]
    assert stored == CONFIG
    plain = dict(load_state(tmp_path / "q", keep_quantized=False)[1])
    for name, weight in state.items():
        dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
        assert torch.equal(plain[name], dense)


def test_an_explicit_quantization_config_is_kept(tmp_path):
    state = make_state()
    name = "model.layers.0.mlp.up_proj.weight"
    state[name] = quantize(state[name], 4, 32, False)
    module = {"bits": 4, "group_size": 32, "shape": [96, 64], "act_bits": 8}
    entry = {
        "quant_method": "fastlm",
        "method": "gptq",
        "modules": {"model.layers.0.mlp.up_proj": module},
    }
    save_hf(tmp_path / "q", {**CONFIG, "quantization_config": entry}, state)
    config, tensors = load_state(tmp_path / "q")
    assert config["quantization_config"] == entry
    assert_same(dict(tensors), state)
    del entry["modules"]["model.layers.0.mlp.up_proj"]["shape"]
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": entry})
    )
    refused(tmp_path / "q", "quantization_config: model.layers.0.mlp.up_proj: expected bits")
    entry["modules"] = {}
    (tmp_path / "q" / "config.json").write_text(
        json.dumps({**CONFIG, "quantization_config": entry})
    )
    refused(tmp_path / "q", "expected a tensor model.layers.0.mlp.up_proj.weight")


def test_tied_head_is_left_out(tmp_path):
    state = make_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # shared memory
    save_hf(tmp_path / "m", {**CONFIG, "tie_word_embeddings": True}, state)
    modes = {p.name: p.stat().st_mode for p in (tmp_path / "m").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]  # the same permissions for all files
    tensors = dict(load_state(tmp_path / "m")[1])
    assert "lm_head.weight" not in tensors and len(tensors) == len(state) - 1


def test_strided_and_shared_tensors(tmp_path):
    state = make_state()
    big = torch.randn(4, 64, 200)
    state["model.layers.0.self_attn.q_proj.weight"] = big[0, :, 3:67].t()
    state["model.norm.weight"] = big[0, :, 0]
    save_hf(tmp_path / "m", CONFIG, state)
    assert_same(dict(load_state(tmp_path / "m")[1]), state)
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 700_000


def test_saving_again_keeps_other_files(tmp_path):
    folder = tmp_path / "m"
    save_hf(folder, CONFIG, make_state(), max_shard_bytes=40_000)
    (folder / "tokenizer.json").write_text("mine")
    (folder / "sub").mkdir()
    (folder / "sub" / "note").write_text("also mine")
    state = make_state()
    save_hf(folder, CONFIG, state)
    assert files(folder) == {"config.json", "model.safetensors", "tokenizer.json", "sub"}
    assert (folder / "sub" / "note").read_text() == "also mine"
    assert_same(dict(load_state(folder)[1]), state)
    assert files(tmp_path) == {"m"}


def test_a_model_in_a_folder_inside_stays(tmp_path):
    save_hf(tmp_path / "run" / "model", CONFIG, make_state())
    save_hf(tmp_path / "run" / "model" / "best", CONFIG, make_state(), max_shard_bytes=40_000)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for _ in range(2):
        save_hf(tmp_path / "run", CONFIG, make_state())
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize("path", [".", ".."])
def test_a_place_without_a_name_is_refused(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a path that ends in a name"):
        save_hf(path, CONFIG, make_state())
    assert files(tmp_path) == set()


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "m" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "m" / "here")
    with pytest.raises(InputError, match="not the working directory"):
        save_hf(tmp_path / "m", CONFIG, make_state())
    assert files(tmp_path) == {"m"} and files(tmp_path / "m") == {"here"}


def test_end_tokens_are_those_of_generation_config(tmp_path, monkeypatch):
    config = {**CONFIG, "eos_token_id": 7}
    save_hf(tmp_path / "m", config, make_state())
    assert CausalLM.from_pretrained(tmp_path / "m").config.stop_ids == {7}
    for text, ends in (('{"eos_token_id": [8, 9]}', {8, 9}), ('{"top_p": 0.5}', {7})):
        (tmp_path / "m" / "generation_config.json").write_text(text)
        model = CausalLM.from_pretrained(tmp_path / "m")
        assert model.config.stop_ids == ends
        model.save_pretrained(tmp_path / "n")
        assert CausalLM.from_pretrained(tmp_path / "n").config.stop_ids == ends
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match="eos_token_id: expected a token id or None, got '</s>'"):
        load_state(tmp_path / "m")


def test_a_package_is_a_model(tmp_path, monkeypatch):
    save_hf(tmp_path, CONFIG, make_state())
    Tokenizer.train(["some text"], 262).save(tmp_path)
    monkeypatch.setattr(
        "fastlm.sources.packages.fetch_model", lambda spec, cache: tmp_path / spec[6:]
    )
    (tmp_path / "tiny").symlink_to(tmp_path)
    model = CausalLM.from_pretrained("model:tiny")
    assert model.config.vocab_size == 300
    assert Tokenizer.load("model:tiny").eos_id == 0
    assert load_tokenizer("model:tiny", model.config.to_dict()).eos_id == 0


def test_a_run_folder_is_a_model(tmp_path):
    save_hf(tmp_path / "run" / "model", CONFIG, make_state())
    Tokenizer.train(["some text"], 262).save(tmp_path / "run" / "tokenizer")
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        config, _ = load_state(path)
        assert load_tokenizer(path, config).eos_id == 0


def test_a_larger_tokenizer_is_refused(tmp_path):
    save_hf(tmp_path, {**CONFIG, "vocab_size": 260}, make_state({**CONFIG, "vocab_size": 260}))
    Tokenizer.train(["aa bb cc dd ee ff"], 262).save(tmp_path)
    with pytest.raises(InputError, match=r"at most 260 ids .*, got 26[12]"):
        load_tokenizer(tmp_path, load_state(tmp_path)[0])


# broken folders


@pytest.fixture
def folder(tmp_path):
    save_hf(tmp_path / "m", CONFIG, make_state())
    return tmp_path / "m"


@pytest.fixture
def sharded(tmp_path):
    save_hf(tmp_path / "m", CONFIG, make_state(), max_shard_bytes=40_000)
    return tmp_path / "m"


def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
        load_state(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 2000, -1])
def test_cut_short(folder, size):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(folder, "model.safetensors: expected a complete safetensors file")


def set_header(file, change) -> None:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["model.norm.weight"].update(data_offsets=[0, 2**60]),
        lambda h: h["model.norm.weight"].update(shape=[2**40]),
        lambda h: h["model.norm.weight"].update(dtype="F1"),
        lambda h: h["model.norm.weight"].pop("shape"),
    ],
)
def test_lying_header(folder, change):
    set_header(folder / "model.safetensors", change)
    refused(folder, "expected a complete safetensors file")


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 3000), st.integers(0, 255))
def test_a_changed_byte_loads_or_is_refused(folder, at, value):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    original, data[at] = data[at], value
    file.write_bytes(data)
    try:
        dict(load_state(folder)[1])
    except InputError as error:
        assert "\n" not in str(error)
    data[at] = original
    file.write_bytes(data)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9])
def test_header_longer_than_the_file(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(folder, "expected a complete safetensors file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected a folder with config.json or a .gguf file, got neither"),
        ("", "config.json: expected readable JSON"),
        ("{", "config.json: expected readable JSON"),
        ("[" * 100_000, "config.json: expected readable JSON"),
        ("[]", "config.json: expected a JSON object, got list"),
        ("{}", "model_type: expected one of llama, mistral, .* got None"),
        ('{"model_type": ["llama"]}', "model_type: expected one of llama"),
    ],
)
def test_broken_config(folder, text, message):
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type: expected one of llama, mistral, .* got 'mamba'"),
        ({"hidden_size": -1}, "hidden_size: expected a positive integer, got -1"),
        ({"hidden_size": "64"}, "hidden_size: expected a positive integer, got '64'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: expected at most 4096"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor of .* 4, got 3"),
        ({"hidden_size": 128}, r"embed_tokens.weight: expected \(300, 128\) .*, got \(300, 64\)"),
        ({"num_hidden_layers": 3}, "expected a tensor model.layers.2.* got none"),
        ({"model_type": "qwen2"}, "expected a tensor model.layers.0.self_attn.q_proj.bias"),
        ({"quantization_config": {"quant_method": "hqq"}}, "quant_method fastlm, .*got 'hqq'"),
        ({"quantization_config": 7}, "quantization_config: expected"),
    ],
)
def test_config_that_does_not_fit(folder, changes, message):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    refused(folder, message)


def test_missing_shard_and_tensor(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file_name = index["weight_map"]["model.norm.weight"]
    set_header(sharded / file_name, lambda h: h.update(other=h.pop("model.norm.weight")))
    refused(sharded, f"{file_name}: expected a tensor model.norm.weight by the index, got none")
    (sharded / file_name).unlink()
    refused(sharded, f"{file_name}: expected a safetensors file, got none")


@pytest.mark.parametrize("name", ["../m/x.safetensors", "/etc/passwd", "x.bin", 3, ""])
def test_index_must_not_leave_its_folder(sharded, name):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = name
    file.write_text(json.dumps(index))
    refused(sharded, "weight_map: expected names of files in the same folder")


@pytest.mark.parametrize("text", ["", "{}", '{"weight_map": []}', "[]"])
def test_broken_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "index.json: ")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_that_are_no_real_numbers(folder, dtype):
    state = make_state() | {"model.norm.weight": torch.ones(64).to(dtype)}
    save_file(state, folder / "model.safetensors")
    refused(folder, "model.norm.weight: expected one of F32, BF16, F16, F64, got")


def test_no_quantization_written_as_null(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    assert CausalLM.from_pretrained(folder).config.vocab_size == 300


def test_pickles_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, "expected model.safetensors, got a pickle")


@pytest.mark.parametrize(
    ("drop", "message"),
    [("scales", "expected qdata and scales, got one"), ("groups", "scales: expected")],
)
def test_broken_quantized_weight(tmp_path, drop, message):
    from safetensors.torch import load_file, save_file

    state = make_state()
    name = "model.layers.0.mlp.up_proj"
    state[f"{name}.weight"] = quantize(state[f"{name}.weight"], 8, 32, False)
    save_hf(tmp_path, CONFIG, state)
    tensors = load_file(tmp_path / "model.safetensors")
    if drop == "scales":
        del tensors[f"{name}.scales"]
    else:
        tensors[f"{name}.scales"] = tensors[f"{name}.scales"][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        dict(load_state(tmp_path)[1])


def test_paths_that_hold_no_model(tmp_path):
    refused(tmp_path / "none", "got no such path$")
    refused(
        "HuggingFaceTB/SmolLM2-135M",
        "downloads nothing from .* Hub: hf download Hugg.*M --local-dir",
    )
    refused(tmp_path, "got neither")
    (tmp_path / "x.txt").write_text("x")
    refused(tmp_path / "x.txt", "expected a model folder or a .gguf file")
    for name in "ab":
        write_gguf(tmp_path / f"{name}.gguf", {"t": np.zeros((1, 4), np.float32)})
    refused(tmp_path, "2 .gguf files")


# writing: all or nothing


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("old")

    def half(part):
        part.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="f: cannot be written: No space left on device"):
        save_atomic(path, half)

    def bug(part):
        part.write_text("ne")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        save_atomic(path, bug)
    assert path.read_text() == "old" and files(tmp_path) == {"f"}


LIMITED = """
import resource, sys, torch
from fastlm.checkpoint.folder import save_hf, save_tensors
from fastlm.errors import InputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the disk is full after 100 kB
from test_checkpoint import CONFIG, make_state
for save in (lambda: save_hf(sys.argv[1], CONFIG, make_state()),
             lambda: save_hf(sys.argv[1], CONFIG, make_state(), max_shard_bytes=50_000),
             lambda: save_tensors(sys.argv[1], {"x": torch.zeros(100_000)})):
    try:
        save()
    except InputError as error:
        print(error)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tmp_path, existing):
    folder, state = tmp_path / "m", make_state()
    if existing:
        save_hf(folder, CONFIG, state)
    run = subprocess.run(
        [sys.executable, "-P", "-c", LIMITED, str(folder)],
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    # the largest tensor is 77 kB, so shards of 50 kB fit
    assert ["cannot be written" in line for line in lines] == [True, True], run.stdout + run.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"m"}
    assert dict(load_state(folder)[1]).keys() == state.keys()


def test_read_only_place():
    # /proc refuses new files even to root
    for save in (
        lambda: save_hf("/proc/m", CONFIG, {}),
        lambda: save_tensors("/proc/m", {}),
        lambda: Tokenizer.train(["x"], 260).save("/proc/m"),
    ):
        with pytest.raises(InputError, match="/proc/m"):
            save()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "m").write_text("mine")
    with pytest.raises(InputError, match="m: cannot be written: a file of that name exists"):
        save_hf(tmp_path / "m", CONFIG, make_state())
    assert (tmp_path / "m").read_text() == "mine" and files(tmp_path) == {"m"}


KILLED = """
import os, signal, sys
from fastlm.files import save_atomic
def write(part):
    part.mkdir()
    (part / "config.json").write_text("{")
    os.kill(os.getpid(), signal.SIGKILL)
save_atomic(sys.argv[1], write)
"""


def test_killed_while_writing(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with atomic_path(folder.parent / "other") as other:  # another process writes in the same folder
        other.write_text("")
        run = subprocess.run([sys.executable, "-P", "-c", KILLED, str(folder)])
        assert run.returncode == -signal.SIGKILL
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
        (left,) = folder.parent.glob(f".{folder.name}.*.part")
        save_hf(folder, CONFIG, make_state())
        assert left.is_dir()  # the leftover may be that of the other writer
    state = make_state()
    save_hf(folder, CONFIG, state)  # alone: the leftover is removed
    assert_same(dict(load_state(folder)[1]), state)
    assert files(folder.parent) == {folder.name, "other"}


def test_killed_between_the_renames_of_a_folder(folder):
    """The next write finds the old folder in its place: if that is killed too, it is there."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    folder.rename(folder.with_name(f".{folder.name}.fastlm-0123456789abcdef.old"))
    run = subprocess.run([sys.executable, "-P", "-c", KILLED, str(folder)])
    assert run.returncode == -signal.SIGKILL
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_only_leftovers_of_the_same_path_are_removed(tmp_path):
    hex16 = "0123456789abcdef"
    (tmp_path / "mail").write_text("mine")
    mine = [
        ".thesis.20261127.part", ".mail.20240101.old", ".out.json.20261127.part",
        ".model.deadbeef.old", f".model.fastlm-{hex16}.old", f".out.json.fastlm-{hex16}.txt",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / ".notes.deadbeef.old").mkdir()
    (tmp_path / f".out.json.fastlm-{hex16}.part").write_text("of a process that was killed")
    save_atomic(tmp_path / "out.json", lambda part: part.write_text("{}"))
    assert files(tmp_path) == {*mine, "mail", ".notes.deadbeef.old", "out.json"}


def test_half_an_old_folder_is_not_put_back(folder, monkeypatch):
    """Killed while it deletes the old folder, which the user follows by removing the new one."""
    state = make_state()
    monkeypatch.setattr("fastlm.files.remove", lambda path: (path / "config.json").unlink())
    save_hf(folder, CONFIG, state)
    monkeypatch.undo()
    assert len(files(folder.parent)) == 2
    shutil.rmtree(folder)
    with pytest.raises(ZeroDivisionError):
        save_atomic(folder, lambda part: 1 / 0)
    assert files(folder.parent) == set()


def test_a_folder_that_another_program_has_locked(tmp_path, monkeypatch):
    monkeypatch.setattr("fastlm.files.PATIENCE", 0.05)
    (left := tmp_path / ".out.json.fastlm-0123456789abcdef.part").write_text("x")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    save_atomic(tmp_path / "out.json", lambda part: part.write_text("{}"))
    assert files(tmp_path) == {"out.json", left.name}
    os.close(descriptor)
    save_atomic(tmp_path / "out.json", lambda part: part.write_text("{}"))
    assert files(tmp_path) == {"out.json"}


def test_shard_size_is_checked(tmp_path):
    with pytest.raises(InputError, match="max_shard_bytes: expected a positive number, got 0"):
        save_hf(tmp_path / "m", CONFIG, {}, max_shard_bytes=0)


# tensors with a checksum


def test_tensors_round_trip(tmp_path):
    tensors = {
        "exp_avg": torch.randn(5, 7),
        "step": torch.tensor(3),
        "rng": torch.get_rng_state(),
        "empty": torch.zeros(0, 4),
        "bf16": torch.randn(3).bfloat16(),
    }
    metadata = {"step": 3, "names": ["a", "é"], "lr": 1e-3}
    for _ in range(2):  # the second time replaces the file
        save_tensors(tmp_path / "s", tensors, metadata)
    actual, loaded_metadata = load_tensors(tmp_path / "s")
    assert_same(actual, tensors)
    assert loaded_metadata == metadata
    assert files(tmp_path) == {"s"}


@pytest.mark.parametrize("at", [0, 100, -1])
def test_a_changed_byte_is_seen(tmp_path, at):
    save_tensors(tmp_path / "s", {"x": torch.randn(100)})
    file = tmp_path / "s" / "tensors.safetensors"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="corrupt: expected sha256"):
        load_tensors(tmp_path / "s")


def test_incomplete_tensors(tmp_path):
    with pytest.raises(InputError, match=r"manifest\.json"):
        load_tensors(tmp_path / "s")
    save_tensors(tmp_path / "s", {"x": torch.randn(3)})
    (tmp_path / "s" / "tensors.safetensors").unlink()
    with pytest.raises(InputError, match=r"tensors\.safetensors: cannot be read"):
        load_tensors(tmp_path / "s")
