"""Tests of the tile-size tuner, with a fake clock and, without a GPU, interpreted kernels."""

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastlm import ops

pytest.importorskip("triton", reason="fastlm.kernels needs Triton")
from fastlm.kernels import attention_forward, launch, tune

KEY = (4, 64)  # float32, heads of up to 64


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLM_CACHE", str(tmp_path))
    yield tmp_path
    launch.load_tuned.cache_clear()
    attention_forward._CONFIGS.clear_cache()


@pytest.fixture
def call(triton):
    q, k, v = torch.randn(3, 1, 2, 40, 32, device=triton)
    return lambda: ops.attention(q, k, v, causal=True)


def select_config(call):
    with launch.record_launches() as launches:
        call()
    return next(m.config for m in launches if m.name == "_forward")


def prefers(**expected):
    """Return a clock on which each expected size halves the time."""

    def timer(call):
        have = select_config(call).arguments()
        return 2.0 ** -sum(have[name] == value for name, value in expected.items())

    return timer


def test_climbs_to_the_fastest_and_keeps_it(cache, call):
    before = select_config(call)
    expected = {"BLOCK_M": before.sizes["BLOCK_M"] // 2, "num_warps": 2 * before.num_warps}
    (tuned,) = tune.tune(call, timer=prefers(**expected))
    assert tuned.before == before and tuned.kernel == "attention 4 64"
    assert tuned.seconds_before / tuned.seconds_after == 4
    assert expected.items() <= tuned.after.arguments().items()
    assert select_config(call) == tuned.after

    launch.load_tuned.cache_clear()  # as seen by another process
    attention_forward._CONFIGS.clear_cache()
    assert select_config(call) == tuned.after
    (file,) = cache.iterdir()
    assert f"triton-{launch.triton.__version__}" in file.name


def test_entries_of_other_kernels_stay(cache, call):
    tune.tune(call, timer=prefers(num_stages=2))
    (file,) = cache.iterdir()
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({"another": next(iter(entries.values()))} | entries))
    launch.load_tuned.cache_clear()
    tune.tune(call, timer=prefers(num_warps=8))
    assert json.loads(file.read_text()).keys() == {"another", "attention 4 64"}


def test_without_a_gain_nothing_is_written(cache, call):
    (tuned,) = tune.tune(call, timer=lambda call: 1.0)
    assert tuned.before == tuned.after
    assert not list(cache.iterdir())


def test_a_candidate_that_changes_the_result_is_out(cache, call):
    before = select_config(call)

    def wrong_in_other_sizes():
        out = call()
        return out if select_config(call) == before else out + 1

    (tuned,) = tune.tune(wrong_in_other_sizes, timer=prefers(num_warps=8))
    assert tuned.after == before


def test_a_candidate_that_spills_is_out(cache, call, monkeypatch):
    @contextlib.contextmanager
    def spilling():
        with launch.record_launches() as launches:
            yield launches
        launches[:] = [
            m._replace(kernel=SimpleNamespace(n_spills=4 * (m.config.num_warps == 8)))
            for m in launches
        ]

    monkeypatch.setattr(tune, "record_launches", spilling)
    (tuned,) = tune.tune(call, timer=prefers(num_warps=8))
    assert tuned.after == tuned.before


@pytest.mark.parametrize("text", ["{", "[]", '{"attention 4 64": {"tile": 3}}'])
def test_a_broken_file_is_named_and_fixed_sizes_serve(cache, call, text):
    before = select_config(call)
    q = torch.empty(0, device="cpu" if launch.INTERPRETED else "cuda")
    launch.cache_file(q).write_text(text)
    launch.load_tuned.cache_clear()
    attention_forward._CONFIGS.clear_cache()
    with pytest.warns(UserWarning, match="expected tile sizes"):
        assert select_config(call) == before


def test_sizes_of_an_older_kernel_are_not_taken(cache, call):
    before = select_config(call)
    (tuned,) = tune.tune(call, timer=prefers(num_warps=8))
    (file,) = cache.iterdir()
    file.write_text(file.read_text().replace("BLOCK_M", "ROWS"))
    launch.load_tuned.cache_clear()
    attention_forward._CONFIGS.clear_cache()
    assert select_config(call) == before != tuned.after


def test_neighbours_change_one_thing():
    config = launch.Config({"BLOCK_M": 16, "BLOCK_N": 64}, num_warps=8, num_stages=1)
    for other in tune.neighbours(config):
        changed = [n for n, v in other.arguments().items() if config.arguments()[n] != v]
        assert len(changed) == 1
    assert replace(config, num_stages=2) in tune.neighbours(config)


@pytest.mark.parametrize("name", ["attention", "quantized_linear"])
def test_the_command_without_a_gpu_says_so(name):
    if torch.cuda.is_available():
        pytest.skip("a GPU is at hand")
    command = [sys.executable, "-P", "-m", "fastlm.kernels.tune"]
    result = subprocess.run([*command, name], capture_output=True, text=True)
    assert result.returncode and "expected a CUDA device" in result.stderr
    assert "Traceback" not in result.stderr
    result = subprocess.run([*command, "rope"], capture_output=True, text=True)
    assert "expected attention or quantized_linear, got 'rope'" in result.stderr
