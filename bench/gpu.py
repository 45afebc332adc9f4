"""Time every kernel on this GPU against torch's, decode steps of whole models, and the engine.

Each case is printed as a line of JSON as soon as it is measured, and a table at the end.

    sh bench/gpu.sh                              builds, tests, then this
    python bench/gpu.py [attention ...]       these ops only
    python bench/gpu.py --smoke               every case once, small, only to see that it runs
    python bench/gpu.py --seconds 180         stops before the first case past that time

Time on a card is scarce. A peer that fails is left out. A case of fastlm's that fails is reported,
and the next one is measured, in a new process if the fault destroyed the CUDA context (as an
illegal address does).

Times are CUDA events around calls that take turns, with the L2 flushed before each (median of
rounds). Ceilings are measured first: a bf16 matrix product of 8192^3 on random data, and a copy of
2 GiB, bytes read and written. The CPU time of a call is the time until it returns while the stream
is busy.
"""

import argparse
import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Case, Row, machine, run_case, table
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlm
from fastlm import backend, ops
from fastlm.inference.block_manager import BLOCK_SIZE, BlockManager
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Request
from fastlm.inference.sampling import Sampling
from fastlm.model import cuda_decode
from fastlm.model.module_decode import ModuleDecodeRunner
from fastlm.model.quantized_modules import set_quantized_weight
from fastlm.ops.quantized_weight import QuantizedWeight

BF16 = torch.bfloat16
DEVICE = "cuda"  # test_gpu_bench.py runs the small cases on the CPU, with interpreted kernels
SDPA = {
    "torch cuDNN": SDPBackend.CUDNN_ATTENTION,
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def time_on_gpu(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds per call, per variant and round. Variants take turns in each round."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)  # larger than any L2
    for call in variants.values():
        for _ in range(3):
            call()  # compile, fill the allocator
    torch.cuda.synchronize()
    events = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {n: [a.elapsed_time(b) / 1e3 for a, b in pairs] for n, pairs in events.items()}


def ceilings(small: bool) -> dict[str, float]:
    """Return the FLOP/s of a bf16 product and the bytes/s of a copy, the best of several."""
    side, size = (1024, 1 << 20) if small else (8192, 1 << 30)
    a, b = torch.randn(2, side, side, dtype=BF16, device=DEVICE)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    work = {"bf16": lambda: a @ b, "read": lambda: target.copy_(source)}
    amount = {"bf16": 2 * side**3, "read": 2 * size}
    best = {n: min(t) for n, t in time_on_gpu(work, 10).items()}
    return {n: amount[n] / best[n] for n in work}


def grads(function: Callable, *inputs: torch.Tensor) -> Callable[[], object]:
    """Return a call that computes output and gradients. It creates the upstream gradient first."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    with torch.no_grad():
        upstream = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def causal(q, k, v):
    return ops.attention(q, k, v, causal=True)


def causal_sdpa(kind: SDPBackend, q, k, v):
    with sdpa_kernel(kind):
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shared)


def attention(small: bool) -> Iterator[Case]:
    shapes = [(1, 4, 4, 64, 64)] if small else [(4, 16, 16, 4096, 128), (4, 32, 8, 4096, 128)]
    shapes += [] if small else [(16, 16, 16, 1024, 64)]
    for b, h, kv, s, d in shapes:
        q = torch.randn(b, h, s, d, dtype=BF16, device=DEVICE)
        k, v = torch.randn(2, b, kv, s, d, dtype=BF16, device=DEVICE).unbind(0)
        functions, missing = {"fastlm": causal}, {}
        for name, kind in SDPA.items():
            try:
                causal_sdpa(kind, q, k, v)
                functions[name] = partial(causal_sdpa, kind)
            except RuntimeError as error:
                missing[name] = str(error).splitlines()[0][:60]
        shape, flops = f"({b}, {h}/{kv}, {s}, {d})", 2 * b * h * s * s * d
        calls = {n: partial(f, q, k, v) for n, f in functions.items()}
        yield Case("attention fwd", shape, calls, flops=flops, missing=missing)
        calls = {n: grads(f, q, k, v) for n, f in functions.items()}
        yield Case("attention fwd+bwd", shape, calls, flops=3.5 * flops, missing=missing)


def paged_attention(small: bool) -> Iterator[Case]:
    page, h, kv, d = 16, 32, 8, 128
    for users, keys in [(2, 64)] if small else [(1, 32768), (8, 4096), (64, 1024), (64, 8192)]:
        pages = users * keys // page
        q = torch.randn(users, 1, h, d, dtype=BF16, device=DEVICE)
        cache = torch.randn(2, pages, page, kv, d, dtype=BF16, device=DEVICE)
        scale = cache.abs().amax((1, 2, 4)).float() / 127  # one per key head
        codes = (cache / scale[:, None, None, :, None]).round().to(torch.int8)
        block = torch.randperm(pages, device=DEVICE).view(users, -1).int()
        lens = torch.full((users,), keys, dtype=torch.int32, device=DEVICE)
        dense = torch.randn(2, users, kv, keys, d, dtype=BF16, device=DEVICE)

        def sdpa(q=q, dense=dense):
            return F.scaled_dot_product_attention(q.transpose(1, 2), *dense, enable_gqa=True)

        variants = {
            "fastlm": lambda q=q, c=cache, b=block, n=lens: ops.paged_attention(q, *c, b, n),
            "fastlm int8": lambda q=q, c=codes, s=scale, b=block, n=lens: ops.paged_attention(
                q, *c, b, n, k_scale=s[0], v_scale=s[1]
            ),
            "torch SDPA without pages": sdpa,
        }
        size = cache.numel() * 2
        yield Case("paged_attention", f"{users} x {keys}, {h}/{kv}, {d}", variants, bytes=size)


def eager_loss(x, w, target):
    return F.cross_entropy(F.linear(x, w).float(), target)


def linear_cross_entropy(small: bool) -> Iterator[Case]:
    shapes = [(64, 128, 1000)] if small else [(4096, 4096, 128256), (8192, 2048, 32768)]
    for n, d, v in shapes:
        x = torch.randn(n, d, dtype=BF16, device=DEVICE)
        w = torch.randn(v, d, dtype=BF16, device=DEVICE) / d**0.5
        target = torch.randint(0, v, (n,), device=DEVICE)
        losses = {
            "fastlm": ops.linear_cross_entropy,
            "torch": eager_loss,
            "torch.compile": torch.compile(eager_loss),
        }
        if hasattr(F, "linear_cross_entropy"):
            losses["F.linear_cross_entropy"] = F.linear_cross_entropy
        calls = {
            name: grads(lambda x, w, f=f, t=target: f(x, w, t), x, w) for name, f in losses.items()
        }
        yield Case("linear_cross_entropy fwd+bwd", f"{n} x {d} -> {v}", calls, flops=6 * n * d * v)


def cross_entropy(small: bool) -> Iterator[Case]:
    n, v = (64, 1000) if small else (8192, 128256)
    logits = torch.randn(n, v, dtype=BF16, device=DEVICE)
    target = torch.randint(0, v, (n,), device=DEVICE)

    def plain(z):
        return F.cross_entropy(z.float(), target)

    compiled = torch.compile(plain)
    functions = {
        "fastlm": lambda z: ops.cross_entropy(z, target),
        "torch": plain,
        "torch.compile": compiled,
    }
    calls = {name: grads(f, logits) for name, f in functions.items()}
    # logits are read twice, the gradient is written
    yield Case("cross_entropy fwd+bwd", f"{n} x {v}", calls, bytes=3 * 2 * n * v)


def rows(small: bool) -> Iterator[Case]:
    n, width = (64, 256) if small else (16384, 4096)
    x, y = torch.randn(2, n, width, dtype=BF16, device=DEVICE)
    weight = torch.randn(width, dtype=BF16, device=DEVICE)
    compiled_norm = torch.compile(lambda x, w: F.rms_norm(x, (width,), w, 1e-6))
    norms = {
        "fastlm": lambda x, w: ops.rms_norm(x, w),
        "torch": lambda x, w: F.rms_norm(x, (width,), w, 1e-6),
        "torch.compile": compiled_norm,
    }
    size = 2 * n * width
    calls = {name: lambda f=f: f(x, weight) for name, f in norms.items()}
    yield Case("rms_norm fwd", f"{n} x {width}", calls, bytes=2 * size)
    calls = {name: grads(f, x, weight) for name, f in norms.items()}
    yield Case("rms_norm fwd+bwd", f"{n} x {width}", calls, bytes=5 * size)
    compiled_glu = torch.compile(lambda g, u: F.silu(g) * u)
    gates = {
        "fastlm": lambda g, u: ops.glu(g, u),
        "torch": lambda g, u: F.silu(g) * u,
        "torch.compile": compiled_glu,
    }
    calls = {name: lambda f=f: f(x, y) for name, f in gates.items()}
    yield Case("glu fwd", f"{n} x {width}", calls, bytes=3 * size)
    calls = {name: grads(f, x, y) for name, f in gates.items()}
    yield Case("glu fwd+bwd", f"{n} x {width}", calls, bytes=8 * size)


def rope(small: bool) -> Iterator[Case]:
    b, h, kv, s, d = (1, 4, 2, 64, 64) if small else (4, 32, 8, 4096, 128)
    q = torch.randn(b, s, h, d, dtype=BF16, device=DEVICE).transpose(1, 2)
    k = torch.randn(b, s, kv, d, dtype=BF16, device=DEVICE).transpose(1, 2)
    angles = torch.outer(torch.arange(s), 10000 ** (-torch.arange(0, d, 2) / d)).repeat(1, 2)
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)

    def plain(q, k):
        def turn(x):
            a, b = x.chunk(2, -1)
            return (x * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)

        return turn(q), turn(k)

    compiled = torch.compile(plain)
    variants = {
        "fastlm": lambda: ops.rope(q, k, cos, sin),
        "torch": lambda: plain(q, k),
        "torch.compile": lambda: compiled(q, k),
    }
    shape = f"B {b} H {h}/{kv} S {s} D {d}"
    yield Case("rope fwd", shape, variants, bytes=4 * (q.numel() + k.numel()))


def adamw(small: bool) -> Iterator[Case]:
    sizes = [(64, 64)] * 4 if small else [(4096, 4096)] * 24 + [(4096,)] * 200

    def stepper(make: Callable) -> Callable[[], object]:
        weights = [torch.randn(s, device=DEVICE).requires_grad_() for s in sizes]
        for w in weights:
            w.grad = torch.randn_like(w)
        return make(weights).step

    variants = {
        "fastlm": stepper(lambda w: fastlm.AdamW(w)),
        "fastlm 8-bit": stepper(lambda w: fastlm.AdamW(w, state_bits=8)),
        "torch fused": stepper(lambda w: torch.optim.AdamW(w, fused=True)),
    }
    count = sum(torch.Size(s).numel() for s in sizes)
    # weight, two states and gradient are read, the first three written
    yield Case("adamw step", f"{count / 1e6:.0f} M fp32", variants, bytes=28 * count)


def quantized_linear(small: bool) -> Iterator[Case]:
    n, k = (256, 256) if small else (14336, 4096)
    w = torch.randn(n, k, dtype=BF16, device=DEVICE) / k**0.5
    codes = {bits: ops.quantize_weight(w, bits) for bits in (4, 8)}
    for m in (1, 16) if small else (1, 4, 16, 64, 512, 4096):
        x = torch.randn(m, k, dtype=BF16, device=DEVICE)
        for bits, weight in codes.items():
            variants = {
                "fastlm": lambda x=x, q=weight: ops.quantized_linear(x, q),
                "torch bf16 linear": lambda x=x: F.linear(x, w),
            }
            yield Case(
                f"quantized_linear w{bits}a16", f"{m} x {k} -> {n}", variants,
                flops=2 * m * n * k, bytes=n * k * bits // 8,
            )  # fmt: skip


SHAPES = {  # the values of the weights do not affect the speed
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-3.1-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "num_hidden_layers": 2, "hidden_size": 192, "vocab_size": 100, "num_attention_heads": 3,
    "num_key_value_heads": 3, "intermediate_size": 128,
}  # fmt: skip


def random_model(sizes: dict, format: str | None, *, filled: bool = True) -> fastlm.CausalLM:
    """A bfloat16 model whose projections (and untied head) are random codes in groups of 128.
    Without `filled` the weights are uninitialized memory.
    """
    config = fastlm.ModelConfig.from_dict(
        {"model_type": "llama", "max_position_embeddings": 8192, **sizes}
    )
    with torch.device("meta"):
        model = fastlm.CausalLM(config)
    for name, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear) or format is None:
            continue
        (n, k), bits = module.weight.shape, int(format[1])
        low, width, kind = (0, -(-k // 2), torch.uint8) if bits == 4 else (-127, k, torch.int8)
        codes = torch.empty(n, width, dtype=kind, device=DEVICE)
        if filled:
            codes.random_(low, low + 255)
        scales = torch.full((n, -(-k // 128)), 0.02 / 2**bits, dtype=BF16, device=DEVICE)
        weight = QuantizedWeight(codes, scales, None, bits, 128, (n, k))
        set_quantized_weight(model, name, weight, act_bits=int(format[3:]))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(parameter.shape, dtype=BF16, device=DEVICE)
            if filled:
                value = value.normal_(0, 0.02) if value.dim() == 2 else value.fill_(1)
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    return model.eval()


def step_call(model: fastlm.CausalLM, users: int, keys: int, graph: bool) -> Callable[[], object]:
    """Return a decode step with `keys` keys per user in the cache, the same step at each call."""
    width = keys // BLOCK_SIZE + 1
    pages = BlockManager(model.config, users * width, dtype=BF16, device=DEVICE)
    pages.data.normal_()
    with torch.inference_mode():
        model.model.fuse()
    steps = cuda_decode.CudaDecodeRunner(model, pages.data)
    steps.can_record &= graph
    tokens = torch.randint(0, model.config.vocab_size, (users,))
    lengths = torch.full((users,), keys)
    table = torch.arange(users * width, dtype=torch.int32).view(users, width)
    return lambda: steps.logits(tokens, lengths, table)


def step_bytes(model: fastlm.CausalLM, users: int, keys: int) -> int:
    """Return the bytes that a step reads: the weights once, every key and value."""
    head = [model.model.embed_tokens.weight] if model.config.tie_word_embeddings else []
    layers = model.config.num_hidden_layers
    cache = 2 * layers * users * keys * model.model.layers[0].self_attn.kv_width * BF16.itemsize
    return cache + sum(t.nbytes for t in [*model.buffers(), *head])


def transformers_model(sizes: dict) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(BF16)  # an 8B model created in float32 would not fit next to the others
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(max_position_embeddings=8192, **sizes)).eval()
    finally:
        torch.set_default_dtype(before)


def transformers_call(model: Any, users: int, keys: int) -> Callable[[], object]:
    """Return transformers' decode step: bfloat16, SDPA, a static cache, one call per step."""
    from transformers import StaticCache

    config = model.config
    prompt = torch.randint(0, config.vocab_size, (users, keys), device=DEVICE)
    cache_position, token = torch.tensor([keys], device=DEVICE), prompt[:, :1]
    cache = StaticCache(config=config, max_cache_len=keys + 64)  # it counts calls
    takes = inspect.signature(model.forward).parameters  # the names changed between versions
    cache_argument = {"cache" if "cache" in takes else "past_key_values": cache}
    at = {"position_ids": cache_position.expand(users, 1)}
    if "cache_position" in takes:
        at["cache_position"] = cache_position
    with torch.inference_mode():
        model(prompt, **cache_argument, logits_to_keep=1)

    @torch.inference_mode()
    def call() -> torch.Tensor:
        return model(token, **cache_argument, **at).logits

    return call


def decode(small: bool) -> Iterator[Case]:
    for name, sizes in SHAPES.items():
        if small:
            sizes = sizes | TINY
        keys, plain = 8 if small else 1024, random_model(sizes, None)
        peer = None
        for users in (1, 2) if small else (1, 16, 64):
            theirs, missing = {}, {}
            try:
                peer = transformers_model(sizes) if peer is None else peer
                theirs = {"transformers bf16": transformers_call(peer, users, keys)}
            except Exception as error:  # a version with other names only means a missing peer
                missing = {"transformers bf16": first_line(error)}
            for format in ("w4a16", "w8a8"):
                model = random_model(sizes, format)
                variants = {
                    "fastlm": step_call(model, users, keys, True),
                    "fastlm without a graph": step_call(model, users, keys, False),
                    "fastlm bf16": step_call(plain, users, keys, True),
                }
                size = step_bytes(model, users, keys)
                shape = f"{users} users, {keys} keys"
                yield Case(f"decode step {name} {format}", shape, variants | theirs, bytes=size,
                           missing=dict(missing))  # fmt: skip


def engine_call(model: fastlm.CausalLM, users: int, tokens: int, graph: bool) -> Callable:
    """Return a call that generates `tokens` tokens for each of `users` short prompts, including the
    prefill."""
    prompts = torch.randint(0, model.config.vocab_size, (users, 32)).tolist()
    requests = [Request(prompt, tokens, Sampling(temperature=0), ignore_eos=True)
                for prompt in prompts]  # fmt: skip
    engine = Engine(
        model, num_blocks=users * -(-(32 + tokens) // BLOCK_SIZE), enable_prefix_caching=False
    )
    if not graph:
        engine._batch.runner = ModuleDecodeRunner(model, engine.block_manager)
    return lambda: engine.generate(requests)


def engine(small: bool) -> Iterator[Case]:
    """Measure the engine. Tokens per second are the tokens in the shape over the time."""
    tokens = 3 if small else 17  # the first comes with the prompt
    model = random_model(SHAPES["SmolLM2-135M"] | (TINY if small else {}), "w4a16")
    for users in (1, 2) if small else (1, 8, 64):
        variants = {
            "fastlm": engine_call(model, users, tokens, True),
            "fastlm without graphs": engine_call(model, users, tokens, False),
        }
        yield Case("engine SmolLM2-135M w4a16", f"{users} x {tokens} tokens", variants)


OPS = {
    f.__name__: f
    for f in (
        attention, paged_attention, linear_cross_entropy, cross_entropy, rows, rope, adamw,
        quantized_linear, decode, engine,
    )
}  # fmt: skip


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the memory that a call takes in addition to what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_microseconds(call: Callable[[], object]) -> float:
    """Return the time until a call returns while the GPU is still busy."""
    times = []
    for _ in range(10):
        torch.cuda._sleep(20_000_000)  # cycles: 10 ms
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


def without_broken_peers(case: Case) -> Case:
    """Call every variant once. Move a peer that fails to `missing`, with the reason."""
    for name, call in list(case.variants.items()):
        try:
            call()
            torch.cuda.synchronize()
        except Exception as error:
            if name.startswith("fastlm") or context_is_lost():
                raise
            del case.variants[name]
            case.missing[name] = first_line(error)
    return case


def first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def context_is_lost() -> bool:
    try:
        torch.cuda.synchronize()
        torch.empty(1, device=DEVICE).fill_(0.0)
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def measure_op(name: str, limits: dict[str, float], options: argparse.Namespace) -> list[Row]:
    """Print and return the rows of one op. A failing case is printed, and raised if the rest of
    this process would fail as well."""
    rounds, rows = 2 if options.smoke else options.rounds, []
    for case in OPS[name](options.smoke):
        if time.monotonic() > options.end:
            print(json.dumps({"out of time": name, "before": f"{case.name} {case.shape}"}))
            break
        try:
            row = run_case(without_broken_peers(case), limits, rounds, time_on_gpu)
            calls = {
                variant: {"peak_mib": peak_bytes(call) / 2**20, "host_us": host_microseconds(call)}
                for variant, call in case.variants.items()
            }
        except Exception as error:
            print(json.dumps({"failed": f"{case.name} {case.shape}", "why": first_line(error)}))
            options.failed = True
            if context_is_lost():
                raise
            continue
        rows.append(row)
        print(json.dumps({"row": vars(row), "calls": calls}), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(OPS)}; default: all")
    parser.add_argument("--smoke", action="store_true", help="small shapes, two rounds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--failed", action="store_true", help=argparse.SUPPRESS
    )  # before the restart
    options = parser.parse_args()
    options.end = time.monotonic() + options.seconds
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"ops: expected some of {', '.join(OPS)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        sys.exit(f"bench: expected a GPU, got none: {backend.unavailable_reason('triton')}")
    torch.manual_seed(0)
    summary = machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    limits = ceilings(options.smoke)
    print(json.dumps({"machine": summary, "ceilings": limits}), flush=True)
    rows, remaining = [], list(options.ops or OPS)
    while remaining and time.monotonic() < options.end:
        name = remaining.pop(0)
        try:
            rows += measure_op(name, limits, options)
        except Exception as error:
            print(json.dumps({"failed": name, "why": first_line(error)}), flush=True)
            options.failed = True
            if context_is_lost() and remaining:
                print(table(rows), flush=True)
                arguments = [
                    "--rounds",
                    str(options.rounds),
                    "--failed",
                    *["--smoke"] * options.smoke,
                ]
                arguments += ["--seconds", str(options.end - time.monotonic()), *remaining]
                os.execv(sys.executable, [sys.executable, __file__, *arguments])
        torch.cuda.empty_cache()
    if remaining:
        print(json.dumps({"out of time": remaining}))
    print(
        f"ceilings: {limits['bf16'] / 1e12:.0f} TFLOP/s bf16, copy {limits['read'] / 1e9:.0f} GB/s"
    )
    print(table(rows))
    sys.exit(options.failed)


if __name__ == "__main__":
    main()
