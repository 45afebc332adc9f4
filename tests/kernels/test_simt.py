"""The emulator itself: it detects kernels with one planted bug each, and passes the same kernels
repaired; addresses, counts; and the same under the sanitizers.
"""

import importlib.util
import os
import re
import subprocess
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kernel_build
import pytest
import torch

from fastlm import backend, ops

SOURCE = kernel_build.ROOT / "tests/support/simt/planted.cu"
SEEDS = 20

# what the report of each planted bug must contain at least
SAYS = {
    "reads_before_the_barrier": ("race", "nobody has written"),
    "writes_before_all_have_read": ("race",),
    "no_syncwarp": ("race", "nobody has written"),
    "shuffle_for_a_barrier": ("race",),
    "two_write_one_word": ("race",),
    "sum_without_atomics": ("race",),
    "reads_what_nobody_wrote": ("nobody has written",),
    "named_barrier_of_too_few": ("race", "nobody has written"),
    "syncwarp_of_others": ("race", "nobody has written"),
    "writes_half_words": ("race",),
    "many_have_read": ("race",),
    "many_have_added": ("race",),
    "no_wait": ("cp.async",),
    "waits_for_too_few": ("cp.async",),
    "copies_into_what_is_read": ("cp.async", "race"),
    "returns_before_copies": ("not waited for",),
    "divergent_barrier": ("divergent __syncthreads",),
    "mask_of_lanes_that_returned": ("have returned", "deadlock"),
    "shuffle_from_outside_the_mask": ("not in its mask",),
    "half_a_warp_multiplies": ("of its mask is in", "deadlock"),
    "barrier_that_one_warp_skips": ("deadlock",),
    "barrier_of_half_warps": ("barrier of a part of a warp",),
    "barrier_of_no_whole_warps": ("48 threads: expected whole warps",),
    "barrier_that_is_not_there": ("no barrier 16", "expected 1 to 15"),
    "reads_behind_the_end": ("256 bytes into 'x', which has 256",),
    "writes_before_the_start": ("4 bytes before 'y'",),
    "writes_an_input": ("'x', which is an input",),
    "reads_an_output_once": ("load_once: of 'y', which is an output",),
    "misaligned_vector": ("misaligned: read of 16 bytes",),
    "shared_out_of_bounds": ("byte 256 of 256 dynamic",),
    "ldmatrix_of_registers": ("not an address of shared memory",),
    "runs_into_the_next_array": ("out of bounds: 4 bytes",),
    "vector_of_a_shared_array": ("misaligned: read of 16 bytes",),
    "copies_from_shared": ("cp.async from: an address of shared memory",),
    "stores_global_to_shared": ("store_global: an address of shared memory",),
    "too_much_shared": ("49152 bytes of static shared memory with 256",),
    "two_warps_write_one_word": ("race: thread",),
    "two_blocks_write_one_word": ("race: thread",),
    "sums_of_blocks": ("race: thread",),
    "sums_without_a_fence": ("race: thread",),
    "sums_without_a_fence_behind": ("race: thread",),
    "sums_without_a_barrier": ("race: thread",),
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return kernel_build.by_gcc(SOURCE, tmp_path_factory.mktemp("planted"))


def run(program: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "2"} | environment
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def faults(output: str) -> dict[tuple[str, bool], list[str]]:
    runs = defaultdict(list)
    for line in output.splitlines():
        name, bug, _, fault = line.split("\t")
        runs[name, bug == "1"].append(fault)
    return runs


def test_every_planted_bug_is_found_whatever_the_order(planted):
    runs = faults(run(planted, "both", SEEDS).stdout)
    assert {name for name, _ in runs} == SAYS.keys()
    for (name, bug), reports in runs.items():
        assert len(reports) == SEEDS
        if not bug:
            assert set(reports) == {""}, name
            continue
        for fault in reports:
            assert any(words in fault for words in SAYS[name]), (name, fault)
            assert f"kernel {name}, block " in fault and ", thread " in fault
            assert "at planted.cu:" in fault


def test_a_seed_gives_the_same_run_again(planted):
    first, second = (run(planted, "both", 5).stdout for _ in range(2))
    first, second = (re.sub(r"0x[0-9a-f]+", "", output) for output in (first, second))
    assert first == second


def test_a_wild_pointer_ends_the_process_with_kernel_and_thread(planted):
    result = run(planted, "wild")
    assert result.returncode < 0
    assert "simt: access to 0x" in result.stderr
    assert "[kernel touches_nothing_at_all, block 0,0,0, thread " in result.stderr


def test_counts_bank_conflicts_and_sectors(planted):
    lines = [line.split("\t") for line in run(planted, "count").stdout.splitlines()]
    counts = {
        (int(s), location.split(":")[1][4:]): tuple(map(int, rest)) for s, location, *rest in lines
    }
    # 32 lanes, 4 bytes each: instructions, passes or sectors, their minimum
    assert counts[1, "write shared"] == counts[33, "write shared"] == (1, 1, 1)
    assert counts[32, "write shared"] == counts[32, "read shared"] == (1, 32, 1)
    assert counts[1, "read global"] == counts[1, "write global"] == (1, 4, 4)
    assert counts[32, "read global"] == (1, 2, 1)  # two words 128 bytes apart


@pytest.mark.slow
def test_clean_under_address_and_undefined_sanitizers(tmp_path):
    options = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = kernel_build.by_gcc(SOURCE, tmp_path, *options)
    # a thread abandoned in mid-execution never frees its strings
    options = "detect_leaks=0:detect_stack_use_after_return=0"
    result = run(program, "both", 2, ASAN_OPTIONS=options)
    assert result.returncode == 0, result.stderr
    assert len(faults(result.stdout)) == 2 * len(SAYS)


@pytest.mark.slow
def test_clean_under_thread_sanitizer(tmp_path):
    program = kernel_build.by_gcc(SOURCE, tmp_path, "-fsanitize=thread", core=("-DSIMT_TSAN",))
    result = run(program, "mended", 2, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert len(faults(result.stdout)) == len(SAYS)
    racing = run(program, "global", OMP_NUM_THREADS="1")
    assert racing.returncode != 0 and "ThreadSanitizer: data race" in racing.stderr


def test_the_extension_is_built():
    assert importlib.util.find_spec("fastlm._simt"), "make setup builds it (FASTLM_SIMT=1)"


def test_two_threads_of_python_launch_at_once():
    """They run one after the other: the emulator keeps only one set of tensors."""
    x, weight = torch.randn(64, 256), torch.randn(256)

    def launch(rows: int) -> None:
        for _ in range(50):
            assert torch.equal(ops.rms_norm(x[:rows], weight), expected[:rows])

    with backend.use_backend("simt"):
        expected = ops.rms_norm(x, weight)
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(launch, rows) for rows in (64, 32)]:
                done.result()
