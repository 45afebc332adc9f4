"""Time attention against torch's SDPA.

A bfloat16 case also runs in float32 on the same values, which is faster on some machines.

FLOPs follow the usual convention: 4 B H S T D, half of it under a causal mask, 2.5 times as much
for the backward. Decoding is measured in bytes of keys and values read once.
"""

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, forward, gradients, in_float32, inference, main, short

from fastlm import ops

BF16, FP32 = torch.bfloat16, torch.float32
TRAINING = [  # (B, H, Hkv, S, D), dtype; the first two are the rows of the targets
    ((8, 8, 8, 512, 64), BF16),
    ((1, 16, 16, 2048, 128), BF16),
    ((8, 8, 8, 512, 64), FP32),
    ((1, 16, 16, 2048, 128), FP32),
    ((4, 9, 3, 507, 64), BF16),  # SmolLM2's heads, ragged
    ((2, 4, 4, 252, 80), BF16),
    # odd: three heads of 80, primes, one key head for many query heads, a single token
    *(
        (shape, dtype)
        for shape in [
            (1, 3, 3, 127, 80),
            (3, 5, 1, 509, 96),
            (2, 3, 3, 1021, 128),
            (1, 3, 1, 1, 80),
        ]
        for dtype in (BF16, FP32)
    ),
]
DECODING = [(1, 9, 3, t, 64) for t in (64, 512, 1024, 4096)] + [(4, 32, 8, 1024, 128)]
# odd: a single key, three heads of 80, groups of 7 and of 71 query heads
ODD_DECODING = [(1, 3, 3, 1, 80), (1, 3, 3, 127, 80), (3, 14, 2, 509, 64), (1, 71, 1, 257, 64)]


def causal(q, k, v):
    return ops.attention(q, k, v, causal=True)


def causal_sdpa(q, k, v):
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    )


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def variants(run, mine, peer, dtype: torch.dtype) -> dict:
    calls = {"fastlm": run(mine), "torch": run(peer)}
    return calls | {"torch fp32": in_float32(run(peer))} if dtype == BF16 else calls


def cases() -> list[Case]:
    return [
        *(c for shape, dtype in TRAINING for c in training(*shape, dtype)),
        *(decoding(*s, dtype) for s in DECODING + ODD_DECODING for dtype in (BF16, FP32)),
        *(paged(*shape) for shape in [*DECODING, (3, 3, 3, 509, 80)]),
        *(full(2, 3, 3, 509, 80, dtype) for dtype in (BF16, FP32)),
        varlen([37, 512, 1024, 200, 3, 800, 1024, 496], 8, 64),
        varlen([1, 127, 251, 509], 3, 80),
    ]


def shape_cases(b: int, h: int, s: int, d: int, hkv: int | None = None) -> list[Case]:
    shape = (b, h, hkv or h, s, d)
    return [
        *(c for dtype in (BF16, FP32) for c in training(*shape, dtype)),
        *(decoding(*shape, dtype) for dtype in (BF16, FP32)),
        paged(*shape),
    ]


def operands(b: int, h: int, hkv: int, s: int, d: int, dtype: torch.dtype, *, grad=False) -> list:
    return [torch.randn(b, n, s, d, dtype=dtype, requires_grad=grad) for n in (h, hkv, hkv)]


def training(b: int, h: int, hkv: int, s: int, d: int, dtype: torch.dtype) -> list[Case]:
    def with_gradient():
        return *operands(b, h, hkv, s, d, dtype, grad=True), torch.randn(b, h, s, d, dtype=dtype)

    flops = 4 * b * h * s * s * d / 2
    name, dims = f"causal {short(dtype)}", f"({b}, {h}/{hkv}, {s}, {d})"
    return [
        Case(
            f"{name} forward",
            dims,
            variants(forward, causal, causal_sdpa, dtype),
            flops,
            dtype=short(dtype),
            data=lambda: operands(b, h, hkv, s, d, dtype),
        ),
        Case(
            f"{name} forward+backward",
            dims,
            variants(gradients, causal, causal_sdpa, dtype),
            3.5 * flops,
            dtype=short(dtype),
            data=with_gradient,
        ),
    ]


def full(b: int, h: int, hkv: int, s: int, d: int, dtype: torch.dtype) -> Case:
    """Attention without a mask, as in an encoder."""
    return Case(
        f"full {short(dtype)} forward",
        f"({b}, {h}/{hkv}, {s}, {d})",
        variants(inference, ops.attention, sdpa, dtype),
        4 * b * h * s * s * d,
        dtype=short(dtype),
        data=lambda: operands(b, h, hkv, s, d, dtype),
    )


def decoding(b: int, h: int, hkv: int, t: int, d: int, dtype: torch.dtype) -> Case:
    def data():
        _, k, v = operands(b, h, hkv, t, d, dtype)
        return torch.randn(b, h, 1, d, dtype=dtype), k, v

    return Case(
        f"decode {short(dtype)}",
        f"({b}, {h}/{hkv}, 1 x {t}, {d})",
        variants(inference, causal, sdpa, dtype),
        bytes=2 * b * hkv * t * d * dtype.itemsize,
        data=data,
    )


def paged(b: int, h: int, hkv: int, t: int, d: int) -> Case:
    """Attention on a cache in pages of 16, bf16 and int8. torch gathers the pages on a CPU."""
    pages = b * -(-t // 16)

    def data():
        q = torch.randn(b, 1, h, d, dtype=BF16)
        k, v = (torch.randn(pages, 16, hkv, d, dtype=BF16) for _ in range(2))
        table = torch.randperm(pages).int().view(b, -1)
        return q, k, v, table, torch.full((b,), t, dtype=torch.int32)

    def as_int8(q, k, v, table, lens):
        k8, v8 = (t.mul(30).clamp(-127, 127).to(torch.int8) for t in (k, v))

        def attend(q, k8, v8, table, lens):
            scales = {"k_scale": 1 / 30, "v_scale": 1 / 30}
            return ops.paged_attention(q, k8, v8, table, lens, causal=True, **scales)

        return inference(attend)(q, k8, v8, table, lens)

    def attend(q, k, v, table, lens):
        return ops.paged_attention(q, k, v, table, lens, causal=True)

    def gather(q, k, v, table, lens):
        keys, values = (x[table].flatten(1, 2)[:, :t].transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True)

    return Case(
        "paged decode bf16",
        f"({b}, {h}/{hkv}, 1 x {t}, {d})",
        {
            "fastlm": inference(attend),
            "fastlm int8": as_int8,
            "torch gather": inference(gather),
            "torch gather fp32": in_float32(inference(gather)),
        },
        bytes=4 * pages * 16 * hkv * d,
        data=data,
    )


def varlen(lengths: list[int], h: int, d: int) -> Case:
    """Attention on packed documents. torch pads them to the longest."""

    def data():
        packed = [torch.randn(sum(lengths), h, d, dtype=BF16, requires_grad=True) for _ in range(3)]
        return *packed, torch.tensor([0, *lengths]).cumsum(0).int(), torch.randn_like(packed[0])

    def mine(q, k, v, offsets):
        return ops.varlen_attention(q, k, v, offsets, causal=True)

    def padded(q, k, v, offsets, dout):
        q, k, v, dout = (
            torch.nn.utils.rnn.pad_sequence(t.detach().split(lengths), batch_first=True)
            .transpose(1, 2)
            .requires_grad_()
            for t in (q, k, v, dout)
        )
        return gradients(causal_sdpa)(q, k, v, dout)

    return Case(
        "varlen causal bf16 forward+backward",
        f"{len(lengths)} in {sum(lengths)}, {h} heads of {d}",
        {
            "fastlm": gradients(mine),
            "torch padded": padded,
            "torch padded fp32": in_float32(padded),
        },
        flops=3.5 * sum(4 * h * n * n * d / 2 for n in lengths),
        data=data,
    )


if __name__ == "__main__":
    main("attention", cases, shape_cases)
