"""Decode steps on a GPU, recorded once and replayed: one token per row runs through the whole model
as one CUDA graph.

Each layer runs some ten kernels of a few microseconds; Python takes ten times as long to launch
one. Nothing in a graph may depend on host state, so a step reads its tokens, the position of each
row's next key and the pages of each row from the device. `fastlm.ops.paged_append` writes keys and
values to the pages; attention is `fastlm.ops.paged_attention`.

In a small model, launches are most of a step, so some ops are fused: rotation with append
(`rope_append`), and a norm or a gate with the rounding of its result for a projection in int8
(`rms_norm_round`, `glu_round`).

`unsupported_reason` decides which models run module by module instead. Not measured on a GPU.
"""

import contextlib
import functools
import threading
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm import backend
from fastlm.inference.decode_batch import MAX_ROWS
from fastlm.model import cpu_decode
from fastlm.model.layers import ForwardContext, FusedProjection
from fastlm.model.module_decode import PagedDecodeAttention
from fastlm.model.quantized_modules import QuantizedEmbedding

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM


def unsupported_reason(model: "CausalLM") -> str | None:
    """Return why this model's steps are not recorded, or None if they are."""
    if model.device.type != "cuda":
        return "graphs need a GPU"
    if model.model.depends_on_length:
        return "its rotary frequencies depend on the length of the context"
    if backend.forced_backend() not in (None, "cuda"):
        return "another backend is forced"
    if backend.backend_for("paged_append", model.model.norm.weight) != "cuda":
        return "the CUDA kernels are not built, or do not support its dtype"
    if backend.unavailable_reason("triton"):  # attention that the CUDA kernel does not support
        return backend.unavailable_reason("triton")
    if torch.is_autocast_enabled("cuda"):
        return "the dtype of the cache is not that of autocast, and a graph would outlive its casts"
    embedding: Any = model.model.embed_tokens
    quantized = isinstance(embedding, QuantizedEmbedding)
    if (embedding.dtype if quantized else embedding.weight.dtype) != model.dtype:
        return "the dtype of its activations is not that of its norms and of the cache"
    return cpu_decode.custom_module_reason(model)


_recording = threading.Lock()  # torch allows one recording at a time per process
_failed: list[Any] = []  # graphs in which torch's allocator still looks for an ongoing recording


@functools.cache
def _stream(replay_stream: torch.cuda.Stream) -> torch.cuda.Stream:
    """Return the stream to record on. Torch's own stream belongs to the device of the first
    recording, and work on another device would not be recorded. cuBLAS keeps a workspace per
    stream, so graphs that run one after another share a stream, and those that run concurrently
    have another.
    """
    return torch.cuda.Stream(replay_stream.device)


# Minimum capacity of the pages of a row, in tokens: shorter rows share their graphs. The kernels
# skip the tokens that a row lacks.
_MIN_CAPACITY = 1024


def _padded_rows(rows: int) -> int:
    """Return a power of two up to `MAX_ROWS`, the limit of an engine's step; above, a multiple of
    it."""
    if rows < MAX_ROWS:
        return 1 << (rows - 1).bit_length()
    return -(-rows // MAX_ROWS) * MAX_ROWS


def _parts(words: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens (rows,) int64, positions (rows,) and table (rows, width) int32: views of
    `_words`."""
    rest = words[rows:].view(torch.int32)
    return words[:rows], rest[:rows], rest[rows : rows * (1 + width)].view(rows, width)


def _words(rows: int, width: int, **options: Any) -> Tensor:
    """Return memory for all inputs of a step, so that one copy fills them."""
    return torch.zeros(rows + (rows * (1 + width) + 1) // 2, dtype=torch.int64, **options)


class _RecordedStep(PagedDecodeAttention):
    """A step of ``rows`` rows with ``width`` pages each, on inputs at fixed addresses."""

    def __init__(self, model: "CausalLM", data: Tensor, rows: int, width: int):
        self.model, self.has_run, self.graph = model, False, None
        # per layer (pages, page_size, Hkv, D)
        self.keys_and_values = [[t.transpose(1, 2) for t in layer] for layer in data]
        self.inputs = _words(rows, width, device=data.device)
        tokens, positions, self.table = _parts(self.inputs, rows, width)
        self.tokens, self.positions = tokens[:, None], positions[:, None]
        # a reference, because `RotaryTables` may replace them with longer ones
        capacity = min(width * data.shape[-2], model.context_limit)
        self.rotary = model.model.rotary(0, capacity, capacity, data.device)

    def fill(self, tokens: Tensor, lengths: Tensor, table: Tensor) -> None:
        """Write the inputs. Padding rows are at position -1: they attend to nothing and write
        nothing."""
        rows, width = table.shape
        # torch's allocator keeps pinned memory until the copy from it has ended
        words = _words(*self.table.shape, pin_memory=self.inputs.is_cuda)
        word_tokens, word_positions, word_table = _parts(words, *self.table.shape)
        word_positions.fill_(-1)
        word_tokens[:rows], word_positions[:rows] = tokens, lengths
        word_table[:rows, :width] = table
        self.inputs.copy_(words, non_blocking=True)

    def run(self) -> Tensor:
        """Return the logits (rows, V). Reads nothing but memory of the device."""
        self.lengths = self.positions[:, 0] + 1
        context = ForwardContext(None, None, None, [], fused=True, decode_attention=self)
        return self.model.logits(self.model.model(self.tokens, context)[:, -1])

    def record(self, pool: Any) -> None:
        """Record `graph`; its replay writes to `out`. Raises RuntimeError, also when out of
        memory."""
        graph = torch.cuda.CUDAGraph()
        # The tensors that a graph reads must stay alive, even if the model is moved, changed, or
        # fused again by another generation
        model = self.model
        self.references = [t.detach() for t in (*model.parameters(), *model.buffers())]
        fused = (
            f for m in model.modules() for f in vars(m).values() if isinstance(f, FusedProjection)
        )
        self.references += [f.bias for f in fused if f.bias is not None]
        current = torch.cuda.current_stream()
        # other threads (data loaders, for example) may allocate and wait for events meanwhile
        options: Any = {"stream": _stream(current), "capture_error_mode": "thread_local"}
        try:
            # the first restores the stream, even after an error
            with _recording, torch.cuda.stream(current), torch.cuda.graph(graph, pool, **options):
                self.out = self.run()
        except RuntimeError:
            _failed.append(graph)
            raise
        self.graph = graph


class CudaDecodeRunner:
    """Runs decode steps of rows with keys and values in pages: ``data`` (layers, 2, pages, Hkv,
    page_size, D).

    The number of rows and of pages per row are padded to powers of two, so few graphs serve all
    steps. A graph is recorded when it is needed a second time. All graphs share their memory, which
    is safe because graphs run one at a time. Graphs read weights in place: create a new object when
    a weight has moved.
    """

    def __init__(self, model: "CausalLM", data: Tensor):
        self.model, self.data = model, data
        self.can_record = data.is_cuda
        self.steps: dict[tuple[int, int], _RecordedStep] = {}
        self.pool: Any = None

    @torch.inference_mode()
    def logits(
        self,
        tokens: Tensor,
        lengths: Tensor,
        table: Tensor,
        *,
        logits_indices: Tensor | None = None,
    ) -> Tensor:
        """Return the logits (B, V) of (B,) int64 tokens after ``lengths`` (B,) int64 cached ones,
        valid until the next call; or a copy (L, V), of the rows ``logits_indices`` (L,) int64, in
        order.

        ``table`` (B, P) int32: the pages of each row, in order; entries after its last page are not
        read. The key and value of each row are written after its cached ones.
        """
        rows, width = table.shape
        width = max(1 << (width - 1).bit_length(), _MIN_CAPACITY // self.data.shape[-2])
        shape = _padded_rows(rows), width
        with self._on_device():
            step = self.steps.get(shape)
            if step is None:
                step = self.steps[shape] = _RecordedStep(self.model, self.data, *shape)
            step.fill(tokens, lengths, table)
            out = self._run(step)[:rows]
            if logits_indices is None:
                return out
            return (
                out.clone() if len(logits_indices) == rows else out[logits_indices.to(out.device)]
            )

    def _on_device(self) -> contextlib.AbstractContextManager:
        return (
            torch.cuda.device(self.data.device) if self.data.is_cuda else contextlib.nullcontext()
        )

    def _run(self, step: _RecordedStep) -> Tensor:
        # the first run compiles and fills caches, which a recording must not do
        if self.can_record and step.has_run and step.graph is None:
            self._record(step)
        step.has_run = True
        if step.graph is None:
            return step.run()
        step.graph.replay()
        return step.out

    def _record(self, step: _RecordedStep) -> None:
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        try:
            step.record(self.pool)
        except RuntimeError as error:
            warnings.warn(f"decode steps are not recorded: {error}", stacklevel=2)
            self.can_record = False
