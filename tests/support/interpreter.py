"""Repair bfloat16 in Triton's interpreter.

The interpreter represents a bfloat16 by its bits as a uint16 and then computes on those integers.
Its conversion from float32 to bfloat16 truncates. Here operands are widened to float32 first, and
results are rounded to nearest even. `tl.sum` and other reductions of bfloat16 stay wrong: kernels
widen before them, as they should on a GPU.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_FLOATS = (tl.float16, tl.float32, tl.float64)


def _is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    if not _is_bfloat16(handle):
        return handle
    bits = np.asarray(handle.data).astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def _rounded(values: np.ndarray) -> TensorHandle:
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    data = np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)
    return TensorHandle(data.reshape(values.shape), tl.bfloat16)


@functools.cache
def repair_bfloat16() -> None:
    """Repair the interpreter of this process, once."""
    builder = InterpreterBuilder
    binary, unary = builder.binary_op, builder.unary_op
    cast, dot, between = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp

    def binary_op(self, left, right, op):
        if not (_is_bfloat16(left) or _is_bfloat16(right)):
            return binary(self, left, right, op)
        out = binary(self, _widened(left), _widened(right), op)
        return out if out.data.dtype == np.bool_ else _rounded(out.data)

    def unary_op(self, argument, op):
        if not _is_bfloat16(argument):
            return unary(self, argument, op)
        return _rounded(unary(self, _widened(argument), op).data)

    def cast_impl(self, source, to):
        if _is_bfloat16(source) and to.scalar == tl.bfloat16:
            return source
        if to.scalar == tl.bfloat16:
            return _rounded(source.data)
        source = _widened(source)
        return source if source.dtype.scalar == to.scalar else cast(self, source, to)

    def create_fp_to_fp(self, source, to, rounding):
        floats = to.scalar == tl.bfloat16 and source.dtype.scalar in _FLOATS
        if _is_bfloat16(source) or floats:
            return cast_impl(self, source, to)
        return between(self, source, to, rounding)

    def create_dot(self, a, b, c, *rest):
        return dot(self, _widened(a), _widened(b), c, *rest)

    builder.binary_op, builder.unary_op = binary_op, unary_op
    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_fp_ext = builder.create_fp_trunc = cast_impl
    for kind in ("si", "ui"):
        setattr(builder, f"create_{kind}_to_fp", cast_impl)
        setattr(builder, f"create_fp_to_{kind}", cast_impl)
    builder.get_bf16 = lambda self, value: _rounded(np.array([value], dtype=np.float32))
