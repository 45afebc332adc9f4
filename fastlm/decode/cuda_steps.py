"""Decode steps on a GPU, recorded once and replayed: one token per row runs through the whole model
as one CUDA graph.

Each of some ten kernels per layer takes a GPU a few microseconds; Python takes ten times as long to
launch it. In a graph nothing may depend on host state, so the step reads the position of each row's
next key from the device (`positions`) and advances it itself. `fastlm.ops.paged_append` writes keys
and values to the cache, where each row is a page; attention is `fastlm.ops.paged_attention`.

In a small model, launches are most of a step, so the CUDA kernels combine some: rotation with
append (`fastlm.cuda.rope_append`), and a norm or a gate with rounding its result for a projection
in int8 (`rms_norm_round`, `glu_round`).

`why_not` decides which models run module by module instead. Not measured on a GPU.
"""

import contextlib
import functools
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.backend import serves_by
from fastlm.decode import cpu_steps
from fastlm.decode.paged_call import PagedCall
from fastlm.model.layers import Call, Fused, KVCache
from fastlm.quant.modules import QuantizedEmbedding

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def why_not(model: "CausalLM") -> str | None:
    """Why this model's steps are not recorded, or None if they are."""
    if model.device.type != "cuda":
        return "graphs are a GPU's"
    if model.model.by_length:
        return "its rotary frequencies depend on the length of the context"
    if backend.forced() not in (None, "cuda"):
        return "another backend is forced"
    if not serves_by("cuda", "paged_append", model.model.norm.weight):
        return "the CUDA kernels are not built, or do not serve its dtype"
    if backend.why_not("triton"):  # attention that the CUDA kernel does not support
        return backend.why_not("triton")
    if torch.is_autocast_enabled("cuda"):
        return "the cache has not the dtype of autocast, whose casts a graph would outlive"
    embedding: Any = model.model.embed_tokens
    quantized = isinstance(embedding, QuantizedEmbedding)
    if (embedding.dtype if quantized else embedding.weight.dtype) != model.dtype:
        return "its activations have not the dtype of its norms, which is the cache's"
    return cpu_steps.unusual(model)


_recording = threading.Lock()  # torch allows one recording at a time per process
_failed: list[Any] = []  # graphs that torch's allocator still checks for an ongoing recording


@functools.cache
def _stream(replays_on: torch.cuda.Stream) -> torch.cuda.Stream:
    """The stream to record on. Torch's own belongs to the device that was recorded on first, and
    work on another device would not be recorded. cuBLAS keeps a workspace per stream, so graphs
    that run one after another share a stream, and those that run concurrently have another.
    """
    return torch.cuda.Stream(replays_on.device)


class Steps(PagedCall):
    """The decode steps of one generation. `cache` holds the prompts and belongs to this object from
    the first step on. `starts`: number of padding columns before each row, or None.
    """

    def __init__(self, model: "CausalLM", cache: KVCache, starts: Tensor | None):
        self.model, self.cache, self.starts = model, cache, starts
        self.tokens: Tensor | None = None
        self.recorded: Any = None
        self.recordable = model.device.type == "cuda"

    def logits(self, tokens: Tensor) -> Tensor:
        """(B,) int64 tokens, after those in the cache -> (B, V), valid until the next call."""
        with torch.cuda.device(tokens.device) if tokens.is_cuda else contextlib.nullcontext():
            return self._logits(tokens)

    def _logits(self, tokens: Tensor) -> Tensor:
        if self.tokens is None:
            self._begin(tokens)  # compiles and caches what a recording must not
        else:
            self.tokens.copy_(tokens[:, None])
            if self.recordable and self.recorded is None:
                self._record()
        if self.recorded is None:
            self.out = self._step()
        else:
            self.recorded.replay()
        self.cache.length += 1
        return self.out

    def _begin(self, tokens: Tensor) -> None:
        cache, device = self.cache, tokens.device
        rows = tokens.shape[0]
        positions = cache.align(self.starts).int()[:, None]
        self.tokens, self.positions = tokens[:, None].clone(), positions
        self.table = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        # (B, capacity, Hkv, D)
        self.keys_and_values = [[t.transpose(1, 2) for t in layer] for layer in cache.layers]
        # kept here: `RotaryTables` may replace them with longer ones
        self.rotary = self.model.model.rotary(0, cache.capacity, cache.capacity, device)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # What a graph reads must stay alive, even if the model is moved, changed, or fused again by
        # another generation
        model = self.model
        self.kept = [t.detach() for t in (*model.parameters(), *model.buffers())]
        fused = (f for m in model.modules() for f in vars(m).values() if isinstance(f, Fused))
        self.kept += [f.bias for f in fused if f.bias is not None]
        current = torch.cuda.current_stream()
        try:
            with (
                _recording,
                torch.cuda.stream(current),  # restores it, even after an error
                # other threads (data loaders, say) may allocate and wait for events meanwhile
                torch.cuda.graph(graph, stream=_stream(current), capture_error_mode="thread_local"),
            ):
                self.out = self._step()
        except RuntimeError as error:
            warnings.warn(f"decode steps are not recorded: {error}", stacklevel=2)
            self.recordable = False
            _failed.append(graph)
        else:
            self.recorded = graph

    def _step(self) -> Tensor:
        """Run one step from what the device holds, and nothing else."""
        assert self.tokens is not None
        self.lengths = self.positions[:, 0] + 1
        call = Call(None, None, None, [], fused=True, step=self)
        logits = self.model.logits(self.model.model(self.tokens, call)[:, -1])
        self.positions += 1
        return logits
