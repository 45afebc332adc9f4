"""Softmax attention that never holds the (S, T) scores (Dao et al. 2022, arXiv:2205.14135).

Every option works with every other. The three ops `attention`, `varlen_attention` and
`paged_attention` differ in where queries and keys lie; they share `check_options` here and one body
each in C++ and in Triton.

Dropout draws from Philox4x32-10 (Salmon et al. 2011) on (seed, batch, head, row, key): the backward
redraws the forward's mask instead of storing it, and every backend draws the same. The seed is a
one-element tensor from ``torch.randint``: under torch.compile one more node of the graph, and on a
GPU nothing waits for it. Rejected: ints (``.item()`` breaks the graph) and torch's generator state
(differs between devices).
"""

import math

import torch
from torch import Tensor

from fastlm import reference
from fastlm.backend import Kernel
from fastlm.backend import cpu_extension as _cpu
from fastlm.errors import InputError
from fastlm.operator import autocast, autocast_somewhere, register
from fastlm.ops.wrong_type import FAILURES, explained

# sinks, alibi_slopes, bias, causal, scale, window, softcap as operators take them: 0 means none.
# A plain tuple: a named one costs 0.4 us, a twentieth of a decode call.
Options = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float, int, float]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``F.scaled_dot_product_attention(q, k, v, enable_gqa=True)`` with these options, in order::

        s = scale * (q @ k.mT)                           scale: 1 / sqrt(D) by default
        s = softcap * tanh(s / softcap)
        s = s - alibi_slopes[:, None, None] * |i - j|    aligned: the last query at the last key
        s = s + bias
        s = s where j <= i (causal), 0 <= i - j < window, else -inf
        lse = logsumexp(s and the head's sink)
        out = dropout(exp(s - lse)) @ v

    Args:
        q: (B, H, S, D), k: (B, Hkv, T, D), v: (B, Hkv, T, Dv), one dtype: float32, bfloat16 or
            float16 (float64 on the reference). H is a multiple of Hkv: query head h reads key head
            h // (H / Hkv). Any strides.
        sinks: (H,), one more logit per head in the denominator (differentiable).
        alibi_slopes: (H,); constants, no gradient.
        bias: float, broadcast to (B, H, S, T) (differentiable); or bool, True where a key is seen.
        dropout_p: chance to drop a probability; the seed comes from torch's generator.
        return_lse: also return lse (B, H, S), float32 (differentiable).

    Under ``torch.autocast`` q, k and v are cast to its dtype, as torch's are.

    A row that sees nothing is zero, its lse -inf and its gradients zero. Memory beyond the outputs:
    keys and values once more (packed), never S x T. The backward keeps out and lse and recomputes
    the rest.

    Raises:
        InputError: shapes, dtypes or devices do not fit together, or an option is out of range.
    """
    try:
        if autocast_somewhere():
            q, k, v = autocast(q, k, v)
        q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
        if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
            name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.dim() != 4)
            raise InputError(
                f"{name}: wanted 4 dimensions (B, heads, length, D), got {tuple(t.shape)}"
            )
        batch, heads, queries, _ = q_shape
        kv_batch, kv_heads, keys, _ = k_shape
        v_batch, v_heads, v_keys, _ = v_shape
        if not (kv_batch == v_batch == batch and v_heads == kv_heads and v_keys == keys):
            raise InputError(
                f"k, v: wanted (B, Hkv, T, D), (B, Hkv, T, Dv) with B = {batch} as q,"
                f" got {tuple(k.shape)}, {tuple(v.shape)}"
            )
        if sinks is alibi_slopes is bias is window is softcap is None and dropout_p == 0:
            check_tensors(q, k, v, heads, kv_heads)
            scale = 1 / math.sqrt(q_shape[3]) if scale is None else float(scale)
            out, lse = _forward(q, k, v, None, None, None, None, causal, scale, 0, 0.0, 0.0)
        else:
            sinks, alibi_slopes, bias, *numbers = check_options(
                q, k, v, heads, kv_heads, causal, scale, window, softcap, sinks, alibi_slopes, bias,
                (batch, heads, queries, keys),
            )  # fmt: skip
            seed = dropout_seed(dropout_p, q)
            out, lse = _forward(
                q, k, v, sinks, alibi_slopes, bias, seed, *numbers, float(dropout_p)
            )
        return (out, lse) if return_lse else out
    except FAILURES as error:
        raise explained(error, attention, locals()) from None


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    kv_dtypes: tuple[torch.dtype, ...] = (),
) -> None:
    """`kv_dtypes`: what k and v may be besides q's dtype."""
    if not q.is_floating_point():
        raise InputError(f"q: wanted a float dtype, got {q.dtype}")
    dtype, device = q.dtype, q.device
    if not (
        k.dtype == v.dtype == dtype
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or k.device == v.device == device)
    ):
        for name, t in (("k", k), ("v", v)):
            if t.dtype != dtype and t.dtype not in kv_dtypes:
                raise InputError(f"{name}: wanted {dtype} as q, got {t.dtype}")
            if t.device != device:
                raise InputError(f"{name}: wanted device {device} as q, got {t.device}")
    width = q.shape[-1]
    if width == 0 or k.shape[-1] != width:
        raise InputError(f"k: wanted head width D = {width} >= 1 as q, got k {tuple(k.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise InputError(f"q: wanted heads a multiple of k's {kv_heads}, got {heads}")


def check_options(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    kv_heads: int,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    bias_shape: tuple[int, ...],
    *,
    kv_dtypes: tuple[torch.dtype, ...] = (),
) -> Options:
    """Checks what the three ops share, tensors included."""
    check_tensors(q, k, v, heads, kv_heads, kv_dtypes)
    device, width = q.device, q.shape[-1]
    given = (
        () if sinks is alibi_slopes is None else (("sinks", sinks), ("alibi_slopes", alibi_slopes))
    )
    for name, t in given:
        if t is None:
            continue
        if t.shape != (heads,) or not t.is_floating_point() or t.device != device:
            raise InputError(
                f"{name}: wanted ({heads},) floats on {device}, one a head,"
                f" got {t.dtype} {tuple(t.shape)} on {t.device}"
            )
    if alibi_slopes is not None and alibi_slopes.requires_grad:
        raise InputError(
            "alibi_slopes: wanted constants (detach them), got a tensor that requires grad"
        )
    if bias is not None:
        bias = _bias_4d(q, bias, bias_shape)
    if window is not None and window < 1:
        raise InputError(f"window: wanted at least 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise InputError(f"softcap: wanted above 0 or None, got {softcap}")
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    return sinks, alibi_slopes, bias, causal, scale, window or 0, softcap or 0.0


def _bias_4d(q: Tensor, bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bias with four dimensions, each 1 or full."""
    fits = bias.dim() <= 4 and all(
        n == 1 or n == full for n, full in zip(bias.shape[::-1], shape[::-1])
    )
    if not fits or bias.device != q.device:
        raise InputError(
            f"bias: wanted to broadcast to {tuple(shape)} on {q.device},"
            f" got {tuple(bias.shape)} on {bias.device}"
        )
    if bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
    if not bias.is_floating_point():
        raise InputError(f"bias: wanted float or bool, got {bias.dtype}")
    return bias[(None,) * (4 - bias.dim())]


def dropout_seed(dropout_p: float, q: Tensor) -> Tensor | None:
    """(1,) int64 from torch's generator, or None without dropout."""
    if not 0 <= dropout_p <= 1:
        raise InputError(f"dropout_p: wanted 0 to 1, got {dropout_p}")
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)


def as_int32(t: Tensor) -> Tensor:
    """Offsets, lengths, pages, positions as the kernels take them. What int32 has no room for
    becomes its nearest end, which no tensor has: it is refused or left out, not wrapped.
    """
    return t if t.dtype == torch.int32 else t.clamp(-(2**31), 2**31 - 1).int()


def wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward_fake(q, k, v, sinks, alibi_slopes, bias, seed, *_):
    (q,) = elements_last(q)
    return empty_out(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=wide_dtype(q))


def backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    """Shapes of the gradients; `rest` is sinks, alibi_slopes, bias, seed and the numbers."""
    sinks, bias, bias_grad = rest[0], rest[2], rest[-1]
    return (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        lse.new_empty(0 if sinks is None else sinks.shape[0]),
        lse.new_empty(bias.shape if bias is not None and bias_grad else (0,)),
    )


def _backward_fake(dout, dlse, q, k, v, *rest):
    """Gradients in the memory order of q, k and v, for the same reason as `empty_out`."""
    _, _, _, dsinks, dbias = backward_fake(dout, dlse, q, k, v, *rest)
    return *(torch.empty_like(t) for t in elements_last(q, k, v)), dsinks, dbias


def empty_out(q: Tensor, width: int) -> Tensor:
    """q's shape with `width` elements a row, in q's memory order: where q is a projection's
    (B, S, H, D) transposed, the result is one too, and goes into the next projection uncopied.
    """
    if width == q.shape[-1] and q.is_contiguous():
        return torch.empty_like(q)
    if q.dim() == 4 and q.stride(1) < q.stride(2):
        batch, heads, rows, _ = q.shape
        return q.new_empty(batch, rows, heads, width).transpose(1, 2)
    return q.new_empty(*q.shape[:-1], width)


def elements_last(*tensors: Tensor) -> list[Tensor]:
    """Rows and heads may lie anywhere, the elements of a row one after the other."""
    return [t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous() for t in tensors]


def _all_contiguous(*tensors: Tensor) -> bool:
    for t in tensors:
        if not t.is_contiguous():
            return False
    return True


def _float(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _padded(n: int, step: int) -> int:
    return (n + step - 1) // step * step


_APART = 256  # floats: so that a thread's arrays begin at cache lines, with gaps under a sanitizer
_DENSE = (None,) * 6  # the layout of the dense op
_NOTHING = torch.empty(0, dtype=torch.float32, device="cpu")  # a gradient that is not wanted


def cpu_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: tuple[Tensor | None, ...],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: tuple,
    lse_shape: tuple[int, ...],
    sequences: int,
    key_rows: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor]:
    """The C++ forward of all three ops.

    `layout` is (cu_seqlens_q, cu_seqlens_k, block_table, seq_lens, k_scale, v_scale), `key_rows` an
    upper bound of the keys of all sequences together, `longest_keys` of those of one.
    """
    if not _all_contiguous(q, k, v):
        q, k, v = elements_last(q, k, v)
    v_width = v.shape[-1]
    dense = layout[0] is None and layout[2] is None
    out = empty_out(q, v_width) if dense else q.new_empty(*q.shape[:-1], v_width)
    lse = _NOTHING.new_empty(*lse_shape)  # one by one: 0.6 us less than a torch.Size
    q_shape, k_shape = q.shape, k.shape
    rows_at, heads_at = (2, 1) if layout[2] is None else (1, 2)
    queries, kv_heads = q_shape[rows_at], k_shape[heads_at]
    group = q_shape[heads_at] // kv_heads
    # 48 floats of pointers and sizes a sequence, from 16 sequences on
    floats, wide = 48 * sequences if sequences > 16 else 0, max(q_shape[-1], v_width)
    if layout[0] is None and seed is None and (queries == 1 or queries * group <= 8):
        if longest_keys > 512:
            # partial results of 512 keys each, 2 + Dv floats a row, rows in eights
            # (attention_decode.h)
            rows = sequences * kv_heads * _padded(queries * group, 8)
            floats += rows * ((longest_keys + 511) // 512) * (2 + _padded(v_width, 16))
        if wide > 256:  # a thread's eight rows of q, of 512 scores and twice of out
            floats += torch.get_num_threads() * (8 * (3 * _padded(wide, 32) + 514) + _APART)
    else:
        # keys and values once more, padded to 32 rows a sequence and 32 columns; a thread's 96 rows
        # of q and out, twice 96 x 256 scores, 256 keys (attention_forward.h)
        widths = _padded(q_shape[-1], 32) + _padded(v_width, 32)
        floats += kv_heads * (key_rows + 32 * sequences) * widths
        each = 96 * (widths + 2 * 256) + 256 * (wide + 1)
        floats += torch.get_num_threads() * (each + _APART)
    workspace = lse.new_empty(floats + 64) if floats else lse
    if sinks is not None:
        sinks = _float(sinks)
    if alibi_slopes is not None:
        alibi_slopes = _float(alibi_slopes)
    try:
        _cpu.attention_forward(
            q, k, v, *layout, sinks, alibi_slopes, bias, seed, *numbers, out, lse, workspace
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    return out, lse


def _empty_contiguous(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def cpu_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    sinks: Tensor | None,
    alibi_slopes: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    numbers: tuple,
    bias_grad: bool,
    sequences: int,
    longest_queries: int,
    longest_keys: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The C++ backward of the dense and the packed op."""
    if not _all_contiguous(dout, q, k, v, out):
        dout, q, k, v, out = elements_last(dout, q, k, v, out)
    # the dense op's gradients have the memory order of q, k and v (`_backward_fake`)
    empty = torch.empty_like if cu_seqlens[0] is None else _empty_contiguous
    dq, dk, dv = empty(q), empty(k), empty(v)
    heads, kv_heads = q.shape[1], k.shape[1]
    dsinks = None if sinks is None else lse.new_empty(sequences, heads)
    dbias = lse.new_zeros(bias.shape) if bias is not None and bias_grad else None
    rows = q.numel() // (heads * q.shape[-1]) if heads else 0
    floats = _cpu.attention_backward_workspace(
        q, sequences, heads, kv_heads, v.shape[-1], longest_queries, longest_keys, rows,
        dbias is not None,
    )  # fmt: skip
    workspace = lse.new_empty(floats) if floats else lse
    _cpu.attention_backward(
        dout, dlse, q, k, v, out, lse, *cu_seqlens, _float(sinks), _float(alibi_slopes), bias, seed,
        *numbers, dq, dk, dv, dsinks, dbias, workspace,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        _NOTHING if dsinks is None else dsinks.sum(0),
        _NOTHING if dbias is None else dbias,
    )


# Up to these sizes the C++ body needs no workspace, and finding that out need not cost 1 us of a
# lone token's 7: sequences, D and Dv; rows of a key head and keys of the forward
# (attention_decode.h); queries and keys of the backward (attention_backward.h).
_FEW_SEQUENCES, _FEW_WIDE, _FEW_ROWS, _FEW_KEYS, _FEW = 16, 256, 8, 512, 8
_FEW_WORK = 1 << 17  # products of the backward where D = Dv


def _cpu_forward(q, k, v, sinks, alibi_slopes, bias, seed, *numbers):
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, _ = k.shape
    if (
        seed is sinks is alibi_slopes is None
        and keys <= _FEW_KEYS
        and queries * heads <= _FEW_ROWS * kv_heads
        and batch <= _FEW_SEQUENCES
        and width <= _FEW_WIDE
        and v.shape == k.shape
        and _all_contiguous(q, k, v)
    ):
        out, lse = torch.empty_like(q), _NOTHING.new_empty(batch, heads, queries)
        try:
            _cpu.attention_forward(
                q, k, v, *_DENSE, None, None, bias, None, *numbers, out, lse, lse
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        return out, lse
    return cpu_forward(
        q, k, v, _DENSE, sinks, alibi_slopes, bias, seed, numbers, (batch, heads, queries), batch,
        batch * keys, keys,
    )  # fmt: skip


def _cpu_backward(
    dout, dlse, q, k, v, out, lse, sinks, alibi_slopes, bias, seed, *numbers_and_bias_grad
):
    batch, _, queries, width = q.shape
    keys = k.shape[2]
    if (
        keys <= _FEW
        and queries <= _FEW
        and batch <= _FEW_SEQUENCES
        and width <= _FEW_WIDE
        and q.numel() * keys <= _FEW_WORK
        and sinks is alibi_slopes is bias is None
        and v.shape == k.shape
        and _all_contiguous(dout, q, k, v, out)
    ):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _cpu.attention_backward(
            dout, dlse, q, k, v, out, lse, None, None, None, None, None, seed,
            *numbers_and_bias_grad[:-1], dq, dk, dv, None, None, lse,
        )  # fmt: skip
        return dq, dk, dv, _NOTHING, _NOTHING
    return cpu_backward(
        dout, dlse, q, k, v, out, lse, (None, None), sinks, alibi_slopes, bias, seed,
        numbers_and_bias_grad[:-1], numbers_and_bias_grad[-1], batch, queries, keys,
    )  # fmt: skip


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, *rest):
    out, lse = reference.attention_forward(q, k, v, *rest)
    (q,) = elements_last(q)
    return empty_out(q, v.shape[3]).copy_(out), lse


def _reference_backward(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest):
    *grads, dsinks, dbias = reference.attention_backward(dout, dlse, q, k, v, *rest)
    inputs = elements_last(q, k, v)
    return *(torch.empty_like(t).copy_(g) for t, g in zip(inputs, grads)), dsinks, dbias


def _setup_context(ctx, inputs, output):
    q, k, v, sinks, alibi_slopes, bias, seed, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, sinks, alibi_slopes, bias, seed)
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dout, dlse):
    saved = ctx.saved_tensors
    _, _, _, out, _, sinks, _, bias, _ = saved
    if dout is None:
        dout = torch.zeros_like(out)
    bias_grad = bias is not None and ctx.needs_input_grad[5]
    dq, dk, dv, dsinks, dbias = _backward(dout, dlse, *saved, *ctx.numbers, bias_grad)
    return (
        dq,
        dk,
        dv,
        None if sinks is None else dsinks.to(sinks.dtype),
        None,
        None if bias is None or not bias_grad else dbias.to(bias.dtype),
        *(None,) * 6,  # seed, the numbers
    )


def _flops(q, k, v, *_, **__):
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (width + v[3])


def _backward_flops(dout, dlse, q, k, v, *_, **__):
    """Scores again, dq, dk; probabilities' gradients, dv."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[2] * (3 * width + 2 * v[3])


NUMBERS = "bool causal, float scale, SymInt window, float softcap"
_forward = register(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias,"
    f" Tensor? seed, {NUMBERS}, float dropout_p) -> (Tensor, Tensor)",
    fake=_forward_fake,
    implementations={
        "reference": _reference_forward,
        "cpu": _cpu_forward,
        "triton": Kernel("attention", "attention_forward"),
    },
    setup_context=_setup_context,
    backward=_autograd_backward,
    flops=_flops,
)
_backward = register(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out,"
    " Tensor lse, Tensor? sinks, Tensor? alibi_slopes, Tensor? bias, Tensor? seed,"
    f" {NUMBERS}, float dropout_p, bool bias_grad) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    implementations={
        "reference": _reference_backward,
        "cpu": _cpu_backward,
        "triton": Kernel("attention_backward", "attention_backward"),
    },
    picked_by=2,
    flops=_backward_flops,
)
