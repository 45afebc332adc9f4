"""AdamW for all tensors of an optimizer: one launch per variant of tensor.

The kernels read the tables of fastlm/cuda/adamw_tables.py.

    1. _squares   when clipping: the sum of squares of each chunk of gradients
    2. _norm      one program: their sum, the norm and the factor for the gradients
    3. _begin     one lane per tensor: step += 1, the step's scalars (float64), its random key
    4. _update    one program per chunk: reads g, p, m, v once, writes p, m, v once

Nothing is copied back to the host: step, norm and factor stay on the device.

A step can be captured in a CUDA graph if its tables exist by then, because a copy from the host
cannot be part of the graph. Take one step before, keep lr in a tensor on the device (it is read at
every replay), and keep the gradients in place: `zero_grad(set_to_none=False)` inside the graph. A
step that does not meet these conditions is refused before anything is written. A captured step
keeps its tables for good.

A variant (`KernelVariant`) is what is compiled in: the dtypes of parameter and gradient, the
master, 8-bit states, stochastic rounding, and whether all pointers allow 128-bit accesses. Formulas
and random numbers are those of csrc/cpu/adamw.h, which also explains the 8-bit codes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlm import reference
from fastlm.cuda import adamw_tables
from fastlm.cuda.adamw_tables import CHUNK, AdamWTables, KernelVariant, build_tables
from fastlm.kernels.launch import Config, launch
from fastlm.reference import AdamWTensor

_STATE_BLOCK = tl.constexpr(reference.STATE_BLOCK)
_RANDOM_CHUNK = tl.constexpr(reference.RANDOM_CHUNK)
# 8 elements per thread: two 128-bit accesses per float32 operand, one per 16-bit operand
_UPDATE = Config({"BLOCK": 1024}, num_warps=4)
# float32 masters add two operands: with 8 elements per thread they spilled (sm_80, Triton 3.9)
_UPDATE_MASTERS = Config({"BLOCK": 1024}, num_warps=8)
_SQUARES = Config({"BLOCK": 1024}, num_warps=4)
_NORM = Config({"BLOCK": 1024}, num_warps=8)
_BEGIN = Config({"BLOCK": 128}, num_warps=4)

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# columns of the table of tensors
PARAM, GRAD, MOMENT, ROOT, MOMENT_SCALE, ROOT_SCALE, MASTER, SIZE, STEP, SETTING, SEED, ORDINAL = (
    tl.constexpr(i) for i in range(12)
)
COLUMNS = tl.constexpr(adamw_tables.COLUMNS)
SCALARS = tl.constexpr(16)  # float32 values per tensor in a step, of which 9 are used


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _pointer(row, COLUMN: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(KIND))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


# ---- the norm ------------------------------------------------------------------------------------


@triton.jit
def _squares(
    tensors,  # (T, COLUMNS)
    chunks,  # (programs, 2)
    sums,  # (programs,) float64
    G: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program).to(tl.int64) * COLUMNS
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    grad, size = _pointer(row, GRAD, G, ALIGNED), tl.load(row + SIZE)
    # at most CHUNK / BLOCK additions in float32, the rest in float64
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(start, tl.minimum(start + CHUNK, size), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        if begin + BLOCK <= size:
            g = tl.load(grad + at).to(tl.float32)
        else:
            g = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
        total += g * g
    tl.store(sums + program, tl.sum(total.to(tl.float64), 0))


@triton.jit
def _norm(
    sums,  # (count,) float64
    grad_norm,  # () float32
    clip,  # (1,) float32
    count,
    max_grad_norm,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(sums + at, mask=at < count, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    tl.store(grad_norm, norm)
    factor = max_grad_norm / (norm + 1e-6)  # as clip_grad_norm_
    tl.store(clip, tl.where(factor > 1.0, 1.0, factor))  # NaN stays


# ---- the step's scalars --------------------------------------------------------------------------


@triton.jit
def _power(base, exponent):
    """Return base^exponent in float64, exponent up to 2^24 (where a float32 counter stops)."""
    result = base * 0.0 + 1.0
    for _ in tl.static_range(25):
        result = tl.where(exponent & 1 != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _begin(
    tensors,  # (T, COLUMNS)
    settings,  # (S, 8)
    scalars,  # (T, SCALARS)
    keys,  # (T,) int32
    count,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    row = tensors + i * COLUMNS
    step_at = tl.load(row + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    before = tl.load(step_at, mask=inside, other=0.0)
    tl.store(step_at, before + 1.0, mask=inside)
    setting = settings + tl.load(row + SETTING, mask=inside, other=0) * 8
    lr = tl.load(setting)
    beta1, beta2 = tl.load(setting + 1), tl.load(setting + 2)
    eps, weight_decay, sign = tl.load(setting + 3), tl.load(setting + 4), tl.load(setting + 5)
    step = (before + 1.0).to(tl.int32)
    step_size = lr / (1.0 - _power(beta1, step))
    root_scale = 1.0 / tl.sqrt(1.0 - _power(beta2, step))
    row_scalars = scalars + i * SCALARS
    tl.store(row_scalars, step_size.to(tl.float32), mask=inside)
    tl.store(row_scalars + 1, (lr * weight_decay).to(tl.float32), mask=inside)
    tl.store(row_scalars + 2, beta1.to(tl.float32), mask=inside)
    tl.store(row_scalars + 3, (1.0 - beta1).to(tl.float32), mask=inside)
    tl.store(row_scalars + 4, beta2.to(tl.float32), mask=inside)
    tl.store(row_scalars + 5, (1.0 - beta2).to(tl.float32), mask=inside)
    tl.store(row_scalars + 6, eps.to(tl.float32), mask=inside)
    tl.store(row_scalars + 7, root_scale.to(tl.float32), mask=inside)
    tl.store(row_scalars + 8, sign.to(tl.float32), mask=inside)
    seed = tl.load(row + SEED, mask=inside, other=0).to(tl.uint32)
    ordinal = tl.load(row + ORDINAL, mask=inside, other=0).to(tl.uint32)
    key = _mix(_mix(seed ^ before.to(tl.uint32)) ^ ordinal)
    tl.store(keys + i, key.to(tl.int32, bitcast=True), mask=inside)


# ---- the update ----------------------------------------------------------------------------------


@triton.jit
def _some(pointer, at, size, FULL: tl.constexpr):
    if FULL:
        return tl.load(pointer + at)
    else:
        return tl.load(pointer + at, mask=at < size, other=0)


@triton.jit
def _put(pointer, at, value, size, FULL: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=at < size)


@triton.jit
def _decode(code, SHIFT: tl.constexpr, MAX_CODE: tl.constexpr):
    offset: tl.constexpr = (0x3F800000 >> SHIFT) - MAX_CODE
    value = ((code + offset) << SHIFT).to(tl.float32, bitcast=True)
    return tl.where(code > 0, value, 0.0)


@triton.jit
def _encode(x, SHIFT: tl.constexpr, MAX_CODE: tl.constexpr):
    """Return the nearest code of x in [0, 1], ties up; below 1 where x is too small."""
    offset: tl.constexpr = (0x3F800000 >> SHIFT) - MAX_CODE
    return ((x.to(tl.int32, bitcast=True) + (1 << (SHIFT - 1))) >> SHIFT) - offset


@triton.jit
def _decode_moment(code):
    value = _decode(code & 127, 20, 127)
    return tl.where(code > 127, -value, value)


@triton.jit
def _encode_moment(x):
    magnitude = tl.abs(x)
    code = _encode(magnitude, 20, 127)
    low = tl.where(magnitude >= 9.5367431640625e-06, 1, 0)  # 1.25 * 2^-17: half of code 1
    return tl.where(code > 0, code, low) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)


@triton.jit
def _encode_root(x):
    return tl.maximum(_encode(x, 19, 255), tl.where(x > 0.0, 1, 0))


@triton.jit
def _block(
    tensor,  # the tensor's row of the table
    scalars,  # the tensor's scalars
    key,  # key of this chunk's random numbers
    clip,
    begin,
    P: tl.constexpr,
    G: tl.constexpr,
    MASTERS: tl.constexpr,  # 0 none, 1 float32, 2 the lower halves of float32
    PACKED: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,  # no element of the block is past the end
    BLOCK: tl.constexpr,
):
    size = tl.load(tensor + SIZE)
    if PACKED:  # one block of states per row
        rows: tl.constexpr = BLOCK // _STATE_BLOCK
        at = tl.arange(0, rows)[:, None] * _STATE_BLOCK + tl.arange(0, _STATE_BLOCK)[None, :]
        at += begin
    else:
        at = begin + tl.arange(0, BLOCK)
    step_size, decay = tl.load(scalars), tl.load(scalars + 1)
    beta1, rest1 = tl.load(scalars + 2), tl.load(scalars + 3)
    beta2, rest2 = tl.load(scalars + 4), tl.load(scalars + 5)
    eps, root_scale, sign = tl.load(scalars + 6), tl.load(scalars + 7), tl.load(scalars + 8)
    g = _some(_pointer(tensor, GRAD, G, ALIGNED), at, size, FULL).to(tl.float32) * (clip * sign)
    if PACKED:
        codes_m = _pointer(tensor, MOMENT, tl.uint8, ALIGNED)
        codes_r = _pointer(tensor, ROOT, tl.uint8, ALIGNED)
        block = begin // _STATE_BLOCK + tl.arange(0, rows)
        inside = block * _STATE_BLOCK < size
        scales_m = _pointer(tensor, MOMENT_SCALE, tl.float32, False) + block
        scales_r = _pointer(tensor, ROOT_SCALE, tl.float32, False) + block
        scale_m = tl.load(scales_m, mask=inside, other=0.0)
        scale_r = tl.load(scales_r, mask=inside, other=0.0)
        m = _decode_moment(_some(codes_m, at, size, FULL).to(tl.int32))
        m = m * (scale_m * beta1)[:, None] + g * rest1
        root = _decode(_some(codes_r, at, size, FULL).to(tl.int32), 19, 255) * scale_r[:, None]
        root = tl.sqrt_rn(root * root * beta2 + g * g * rest2)
        # one bad value turns its whole block into NaN; a maximum might drop it unnoticed
        poison = tl.sum((m + root) * 0.0, 1)
        scale_m, scale_r = tl.max(tl.abs(m), 1) + poison, tl.max(root, 1) + poison
        tl.store(scales_m, scale_m, mask=inside)
        tl.store(scales_r, scale_r, mask=inside)
        inverse_m = tl.where(scale_m > 1e-37, tl.math.div_rn(1.0, scale_m), 0.0)
        inverse_r = tl.where(scale_r > 1e-37, tl.math.div_rn(1.0, scale_r), 0.0)
        _put(codes_m, at, _encode_moment(m * inverse_m[:, None]), size, FULL)
        _put(codes_r, at, _encode_root(root * inverse_r[:, None]), size, FULL)
    else:
        moments = _pointer(tensor, MOMENT, tl.float32, ALIGNED)
        squares = _pointer(tensor, ROOT, tl.float32, ALIGNED)
        m = _some(moments, at, size, FULL) * beta1 + g * rest1
        v = _some(squares, at, size, FULL) * beta2 + g * g * rest2
        _put(moments, at, m, size, FULL)
        _put(squares, at, v, size, FULL)
        root = tl.sqrt_rn(v)
    # the lower half of a master is the signed number to add to the parameter's bits
    if MASTERS == 2:
        param = _pointer(tensor, PARAM, tl.int16, ALIGNED)
        master = _pointer(tensor, MASTER, tl.int16, ALIGNED)
        high = _some(param, at, size, FULL).to(tl.int32) << 16
        low = _some(master, at, size, FULL).to(tl.int32)
        # zero has no lower half: a parameter zeroed after its last step still has that step's
        bits = tl.where((high << 1) != 0, high + low, high)
        w = bits.to(tl.float32, bitcast=True)
    else:
        param = _pointer(tensor, PARAM, P, ALIGNED)
        master = _pointer(tensor, MASTER, tl.float32, ALIGNED)
        w = _some(master if MASTERS == 1 else param, at, size, FULL).to(tl.float32)
    w = w - (w * decay + tl.math.div_rn(m, root * root_scale + eps) * step_size)
    if MASTERS == 2:
        bits = tl.where(w == w, w, float("nan")).to(tl.int32, bitcast=True)
        bits = tl.where(w == w, bits, 0x7FC00000)  # a single NaN pattern, which cannot round up
        _put(param, at, (bits.to(tl.uint32, bitcast=True) + 0x8000) >> 16, size, FULL)
        _put(master, at, bits, size, FULL)
    else:
        if MASTERS == 1:
            _put(master, at, w, size, FULL)
        if ROUND:
            random = _mix((at % _RANDOM_CHUNK).to(tl.uint32) * 0x9E3779B9 + key)
            up = w.to(tl.uint32, bitcast=True) + (random >> 16)
            rounded = (up & 0xFFFF0000).to(tl.float32, bitcast=True)
            w = tl.where(tl.abs(w) <= 3.4028234663852886e38, rounded, w)
        _put(param, at, w, size, FULL)


@triton.jit
def _update(
    tensors,  # (T, COLUMNS)
    scalars,  # (T, SCALARS)
    keys,  # (T,)
    chunks,  # (programs, 2)
    clip,  # (1,) or None
    P: tl.constexpr,
    G: tl.constexpr,
    MASTERS: tl.constexpr,
    PACKED: tl.constexpr,
    ROUND: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    i = tl.load(chunks + 2 * program).to(tl.int64)
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    row, row_scalars = tensors + i * COLUMNS, scalars + i * SCALARS
    key = tl.load(keys + i).to(tl.uint32, bitcast=True)
    key = _mix(key + (start // _RANDOM_CHUNK).to(tl.uint32) * 0x9E3779B9)
    factor = 1.0
    if clip is not None:
        factor = tl.load(clip)
    size = tl.load(row + SIZE)
    for begin in range(start, tl.minimum(start + CHUNK, size), BLOCK):
        if begin + BLOCK <= size:
            _block(
                row, row_scalars, key, factor, begin, P, G, MASTERS, PACKED, ROUND, ALIGNED, True,
                BLOCK,
            )  # fmt: skip
        else:
            _block(
                row, row_scalars, key, factor, begin, P, G, MASTERS, PACKED, ROUND, ALIGNED, False,
                BLOCK,
            )  # fmt: skip


# ---- host ----------------------------------------------------------------------------------------


def _constants(kind: KernelVariant) -> dict[str, Any]:
    return {
        "P": _TYPES[kind.param],
        "G": _TYPES[kind.grad],
        "MASTERS": kind.masters,
        "PACKED": kind.packed,
        "ROUND": kind.rounds,
        "ALIGNED": kind.aligned,
    }


def adamw(
    tensors: list[AdamWTensor], max_grad_norm: float, grad_norm: Tensor | None, have_norm: bool
) -> None:
    """Run `reference.adamw`, in place. Everything is checked before anything is written."""
    device = tensors[0].param.device
    tables = build_tables(tensors, by_variant=True)
    clip = None
    if grad_norm is not None:
        clip = torch.empty(1, dtype=torch.float32, device=device)
        sums = _sums(tables) if not have_norm else grad_norm.double().square().reshape(1)
        launch(
            _norm, (1,), sums, grad_norm, clip, len(sums), float(max_grad_norm), config=_NORM
        )  # fmt: skip
    count = len(tensors)
    scalars = torch.empty((count, SCALARS.value), dtype=torch.float32, device=device)
    random_keys = torch.empty(count, dtype=torch.int32, device=device)
    grid = (triton.cdiv(count, _BEGIN.sizes["BLOCK"]),)
    launch(
        _begin, grid, tables.tensors, tables.settings, scalars, random_keys, count, config=_BEGIN
    )  # fmt: skip
    for kind, chunks in tables.chunks:
        config = _UPDATE_MASTERS if kind.masters == 1 else _UPDATE
        launch(
            _update, (len(chunks),), tables.tensors, scalars, random_keys, chunks, clip,
            config=config, CHUNK=CHUNK, **_constants(kind),
        )  # fmt: skip


def _sums(tables: AdamWTables) -> Tensor:
    """Sum the squares of each chunk of gradients, in float64."""
    device = tables.tensors.device
    count = sum(len(chunks) for _, chunks in tables.chunks)
    sums = torch.empty(count, dtype=torch.float64, device=device)
    first = 0
    for kind, chunks in tables.chunks:
        launch(
            _squares, (len(chunks),), tables.tensors, chunks, sums[first : first + len(chunks)],
            config=_SQUARES, G=_TYPES[kind.grad], ALIGNED=kind.aligned, CHUNK=CHUNK,
        )  # fmt: skip
        first += len(chunks)
    return sums
