"""Tests of the work before a first token: the results of the slow ways, and nothing done twice."""

import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from model_files import smollm2

from fastlm import backend
from fastlm.checkpoint import gguf_blocks
from fastlm.checkpoint.gguf_file import open_gguf
from fastlm.model.cpu_decode import scale_table
from fastlm.startup import fast_imports
from fastlm.tokenizer.tokenizer import Tokenizer


@pytest.mark.parametrize("kind", gguf_blocks.COMPILED, ids=lambda k: k.name)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 3), (0, 2)])
def test_compiled_blocks_equal_numpy_s(kind, rows, blocks):
    """Every float16 is a scale: subnormal numbers, infinities and NaN, too."""
    size = GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    raw.flags.writeable = False  # as the file's pages are
    actual = gguf_blocks._unpack_by_extension(raw, kind)
    with np.errstate(invalid="ignore"):
        want = gguf_blocks.unpack_by_numpy(raw, kind)
    assert (actual.bits, actual.group_size, actual.shape) == (
        want.bits,
        want.group_size,
        want.shape,
    )
    for name in ("qdata", "scales", "zeros"):
        a, b = getattr(actual, name), getattr(want, name)
        assert (a is None) == (b is None)
        assert a is None or np.array_equal(a.numpy(), b.numpy(), equal_nan=a.is_floating_point())


def test_every_float16_becomes_the_same_float32():
    halves = np.arange(2**16, dtype=np.uint16)
    raw = np.zeros((2**16, GGML_QUANT_SIZES[Kind.Q8_0][1]), np.uint8)
    raw[:, :2] = halves[:, None].view(np.uint8).reshape(-1, 2)
    actual = gguf_blocks._unpack_by_extension(raw, Kind.Q8_0).scales[:, 0].numpy()
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(actual, halves.view(np.float16).astype(np.float32))


def test_blocks_are_refused_where_they_do_not_fit():
    raw, q, scales = torch.zeros(2, 18).byte(), torch.zeros(2, 16).byte(), torch.zeros(2, 1)
    unpack = backend.cpu_extension.unpack_blocks
    with pytest.raises(ValueError, match="kind: expected Q4_0, Q4_1 or Q8_0, got Q6_K"):
        unpack(raw, "Q6_K", q, scales, None)
    with pytest.raises(ValueError, match="zeros: expected a tensor for Q4_1 alone, got Q4_0"):
        unpack(raw, "Q4_0", q, scales, scales)
    with pytest.raises(ValueError, match="bytes a row: 18, got 20"):
        unpack(torch.zeros(2, 20).byte(), "Q4_0", q, scales, None)
    with pytest.raises(ValueError, match="rows: 2, got 1"):
        unpack(raw, "Q4_0", q[:1], scales, None)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_table_is_transposed_and_as_narrow_as_is_exact(bits, offset, dtype):
    draw = torch.Generator().manual_seed(0)
    scales = torch.randn(37, 5, generator=draw).to(dtype).float()
    if dtype is torch.float16:
        scales[0, :2] = torch.tensor([2.0**-24, -(2.0**-15)])  # subnormal
        if not offset:
            scales[0, 3:] = torch.tensor([65504.0, -torch.inf])
    elif dtype is torch.bfloat16:
        scales *= 2.0**40  # too large for float16
    # 16 scales, less 8 of them, have as many bits as one
    zeros = 16 * scales if offset else None
    table = scale_table(scales, zeros, bits)
    parts = [scales] if zeros is None else [scales, zeros - 8 * scales if bits == 4 else zeros]
    padded = torch.zeros(48, 5, len(parts))
    padded[:37] = torch.stack(parts, -1)
    assert table.dtype == dtype
    assert torch.equal(table.float(), padded.view(3, 16, 5, len(parts)).permute(0, 2, 3, 1))


def test_an_open_file_is_parsed_once(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(smollm2().read_bytes())
    gguf_file = open_gguf(path)
    assert open_gguf(path) is gguf_file
    new = tmp_path / "new.gguf"
    new.write_bytes(path.read_bytes())
    new.replace(path)
    assert open_gguf(path) is not gguf_file


def test_the_twin_for_spelt_out_tokens_is_made_when_it_is_needed():
    tokenizer = Tokenizer.load(smollm2())
    plain = tokenizer.encode("Why is the sky blue?")
    assert "_text_backend" not in vars(tokenizer)
    assert tokenizer.encode("<|im_end|>") != [tokenizer.eos_id]
    assert "_text_backend" in vars(tokenizer)
    assert tokenizer.encode("Why is the sky blue?") == plain


def test_imports_leave_the_collector_on():
    assert gc.isenabled()
    with fast_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.unfreeze()


def test_the_server_imports_no_database_without_feedback():
    code = "import sys, fastlm.serve.process; assert 'sqlalchemy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
