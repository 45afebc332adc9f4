"""Time quantized_linear against torch's bf16 linear, its int4 and int8 kernels and `_int_mm`.

Every case cycles through several copies of its weight, more than the L3 holds, as the layers of a
model do: a single copy would be read from the cache. FASTLM_BENCH_DRAM=1 uses 1.5 GB of copies, for
machines whose L3 has hundreds of MB.

bitsandbytes (nf4, blocks of the group's size) and auto-round-lib (ARK, float32 activations: it
accepts no other on a CPU) are peers where they are installed.
"""

import itertools
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import bench_path  # noqa: F401
import torch
import torch.nn.functional as F
from harness import Case, main

from fastlm import ops
from fastlm.quant import QuantizedWeight

COPIES_BYTES = 1500 << 20 if os.environ.get("FASTLM_BENCH_DRAM") else 80 << 20
GROUP = 128
# bits, activation bits, rows of x, N, K, and the group size if it is not GROUP
SHAPES = [
    *((bits, act, m, 4096, 4096) for bits, act in ((4, 16), (8, 16)) for m in (1, 16, 64, 512)),
    *((4, 8, m, 4096, 4096) for m in (1, 16, 64, 512)),
    (8, 8, 1, 4096, 4096),
    (8, 8, 2048, 2048, 2048),
    *((4, 16, m, 1536, 576) for m in (1, 2, 4, 8, 33, 64)),
    *((8, act, m, 1536, 576) for act in (8, 16) for m in (2, 4, 8, 33)),
    *((4, act, 123, 507, 252) for act in (8, 16)),
    *((bits, act, 3, 1009, 577) for bits in (4, 8) for act in (8, 16)),
    (8, 8, 2048, 2048, 2048, -1),
    *((4, act, m, 3072, 576, 32) for act in (8, 16) for m in (8, 512)),
    *((4, act, m, 576, 1536, 32) for act in (8, 16) for m in (8, 512)),
    # odd: primes, and a vocabulary
    *(
        (bits, act, m, n, k)
        for bits, act in ((4, 16), (8, 16), (4, 8), (8, 8))
        for m, n, k in [(1, 1009, 509), (7, 1009, 509), (131, 1009, 509), (1, 50257, 576)]
    ),
]
LINEAR = [(4096, 1536, 512), (4096, 2816, 512), (4096, 32768, 512)]  # rows, N, K; torch runs these


def cycle(items):
    """Return the next of `items` at each call, in a cycle."""
    return itertools.cycle(items).__next__


def copies_of(bytes_each: int) -> int:
    return max(2, COPIES_BYTES // bytes_each)


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def quantized(bits: int, n: int, k: int, group: int) -> Callable[[], QuantizedWeight]:
    """Quantized weights. Groups of 32 have float16 scales, float32 offsets, like a GGUF's Q4_1."""
    gguf = group == 32
    repeat = -(-n // 8)  # quickly yields codes and scales with a real distribution
    few = ops.quantize_weight(
        torch.randn(8, k),
        bits,
        group_size=group,
        symmetric=not gguf,
        scale_dtype=torch.float32 if gguf else torch.bfloat16,
    )

    def rows(t: torch.Tensor) -> torch.Tensor:
        return t.repeat(repeat, 1)[:n].clone()

    return cycle(
        [
            QuantizedWeight(
                rows(few.qdata),
                rows(few.scales.half() if gguf else few.scales),
                None if few.zeros is None else rows(few.zeros),
                *(bits, group, (n, k)),
            )
            for _ in range(copies_of(n * k * bits // 8))
        ]
    )


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def bf16(n: int, k: int) -> Callable[[], torch.Tensor]:
    return cycle([torch.randn(n, k).bfloat16() for _ in range(copies_of(2 * n * k))])


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def fp32(n: int, k: int) -> Callable[[], torch.Tensor]:
    return cycle([torch.randn(n, k) for _ in range(copies_of(4 * n * k))])


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def int8(n: int, k: int) -> Callable[[], torch.Tensor]:
    return cycle(
        [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in range(copies_of(n * k))]
    )


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def int4pack(n: int, k: int) -> Callable[[], torch.Tensor]:
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    return cycle([packed.clone() for _ in range(copies_of(n * k // 2))])


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def nf4(n: int, k: int, group: int) -> Callable[[], torch.nn.Module]:
    from bitsandbytes.nn import Linear4bit, Params4bit

    def layer():
        linear = Linear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        weight = torch.randn(n, k).bfloat16()
        linear.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", blocksize=group)
        return linear.to("cpu").eval()

    return cycle([layer() for _ in range(copies_of(n * k // 2))])


@lru_cache(maxsize=2)  # cases of one weight are consecutive
def ark(bits: int, n: int, k: int, group: int) -> Callable[[], torch.Tensor]:
    import auto_round_kernel

    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (k, n), dtype=torch.int8)
    scales, zeros = torch.rand(k // group, n), torch.zeros(k // group, n, dtype=torch.int8)
    kind = ("fp32", f"int{bits}", "fp32", False)
    packed = auto_round_kernel.repack_quantized_weight(codes, scales, zeros, group, *kind)
    return cycle([packed.clone() for _ in range(copies_of(n * k * bits // 8))])


def peers(bits: int, act: int, m: int, n: int, k: int, group: int) -> tuple[dict, dict]:
    """Return torch's calls for the same product, and the reasons for missing ones."""

    def in_bf16(x):
        weight = bf16(n, k)
        return lambda: F.linear(x, weight())

    def in_fp32(x):
        weight, wide = fp32(n, k), x.float()
        return lambda: F.linear(wide, weight())

    def int_mm(x):
        rounded, weight = torch.randint(-127, 128, x.shape, dtype=torch.int8), int8(n, k)
        return lambda: torch._int_mm(rounded, weight().t())

    def whole_int_mm(x):  # the same work: round the rows of x first, scale afterwards
        scales, weight = torch.ones(n), int8(n, k)

        def call():
            step = x.float().abs().amax(-1, keepdim=True) / 127
            q = (x / step).round().to(torch.int8)
            return (torch._int_mm(q, weight().t()) * (step * scales)).bfloat16()

        return call

    def int8pack(x):
        scales, weight = torch.ones(n).bfloat16(), int8(n, k)
        return lambda: torch._weight_int8pack_mm(x, weight(), scales)

    def in_int4pack(x):
        weight, both = int4pack(n, k), torch.ones(k // group, n, 2).bfloat16()
        return lambda: torch._weight_int4pack_mm_for_cpu(x, weight(), group, both)

    def in_nf4(x):
        layer = nf4(n, k, group)

        def call():
            with torch.inference_mode():
                return layer()(x)

        return call

    def in_ark(x):
        import auto_round_kernel

        packed, kind = ark(bits, n, k, group), ("fp32", f"int{bits}", "fp32", False)
        return lambda: auto_round_kernel.woqgemm_linear(x, packed(), None, n, k, group, *kind)

    calls: dict[str, Callable] = {"torch bf16 linear": in_bf16, "torch fp32 linear": in_fp32}
    missing = {}
    if act == 8:
        if bits == 8 and m > 16:  # torch's own condition on the rows
            calls["torch._int_mm"] = int_mm
            calls["torch rounding + _int_mm + scales"] = whole_int_mm
        else:
            missing["torch._int_mm"] = "int8 weights and more than 16 rows only"
    elif bits == 8 and k % 32:
        missing["torch int8pack"] = "K must be a multiple of 32: it ends the process at 577"
    elif bits == 8:
        calls["torch int8pack"] = int8pack
    elif n % 64 == 0 and k % group == 0:
        calls["torch int4pack"] = in_int4pack
    else:
        missing["torch int4pack"] = "N and K must be multiples of 64 and the group"
    if act == 16 and k % group == 0:
        others = {"ARK": ("auto_round_kernel", in_ark)}
        if bits == 4 and group >= 64:  # bitsandbytes's smallest block
            others["bitsandbytes nf4"] = ("bitsandbytes", in_nf4)
        for name, (package, call) in others.items():
            if find_spec(package):
                calls[name] = call
            else:
                missing[name] = "not installed"
    return calls, missing


def linear(m: int, n: int, k: int) -> Case:
    """Projections in bf16 are left to torch (oneDNN): the row shows their speed on this machine."""
    return Case(
        "bf16 linear, left to torch",
        f"{m} x {k} -> {n}",
        {"torch": lambda x, weight: lambda: F.linear(x, weight)},
        flops=2.0 * m * n * k,
        data=lambda: (torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()),
    )


def of_shape(bits: int, act: int, m: int, n: int, k: int, group: int = GROUP) -> Case:
    def ours(x):
        weight = quantized(bits, n, k, group)
        return lambda: ops.quantized_linear(x, weight(), act_bits=act)

    width = k if group == -1 else group
    calls, missing = peers(bits, act, m, n, k, width)
    # codes, plus a 2-byte scale per group (GGUF's groups of 32: a 4-byte offset beside it)
    size = n * (k * bits / 8 + -(-k // width) * (6 if group == 32 else 2))
    return Case(
        f"w{bits}a{act}" + (f", groups of {width}" if width != GROUP else ""),
        f"{m} x {k} -> {n}",
        {"fastlm": ours, **calls},
        flops=2.0 * m * n * k,
        bytes=size if m <= 8 else None,
        dtype="int8" if act == 8 else "bf16",
        missing=missing,
        data=lambda: (torch.randn(m, k).bfloat16(),),
    )


def shape_cases(m: int, k: int, n: int) -> list[Case]:
    return [of_shape(bits, act, m, n, k) for bits in (4, 8) for act in (16, 8)]


def cases() -> list[Case]:
    return [*(linear(*shape) for shape in LINEAR), *(of_shape(*shape) for shape in SHAPES)]


if __name__ == "__main__":
    main("quantized_linear", cases, shape_cases)
