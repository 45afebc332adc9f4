"""A teacher's output on disk, to train students on: its completions, and its distributions.

Completions of the data's prompts are conversations to fine-tune on: sequence-level distillation
(Kim and Rush 2016, arXiv:1606.07947). Each file ``completions-00000.jsonl``, ... of a folder has
the completions of `BATCH` prompts that ended and are not empty. A file is written at once, so an
interruption loses one batch. Next to the folder, ``NAME.json`` records the options of sampling. The
student may have another tokenizer than the teacher, because the files contain text.

Distributions are stored per loss token: its k likeliest tokens, their log-probabilities, and the
log of the remaining probability. A folder has shards ``teacher-*.safetensors``, each complete in
itself. For an example with the digest D (`fastlm.train.objective.examples_digest`) they contain one
row for each loss token:

- ``D.ids`` (rows, k), uint16 or int32;
- ``D.logprobs`` (rows, k + 1) float16, the rest last. Reading divides a row by its sum, so that
  rounding leaves a distribution;
- the metadata "header" is the JSON of `TeacherHeader`.

So an example is found by its tokens and mask: order, held-out share and other examples do not
matter.

The loss (`topk_forward_kl`) is a forward KL over the k tokens and the rest:

    KL = sum over the k of t (log t - log s) + t_rest (log t_rest - log s_rest)

with ``t_rest = 1 - sum t`` and ``s_rest = 1 - sum s`` over the same k tokens: the divergence after
merging all other tokens into one. It is at most the divergence over the vocabulary, and equal to it
if k is the vocabulary, or if the student divides the rest as the teacher does.

Rejected: omitting the rest, or distributing it over the k. Both teach a higher probability of the k
than the teacher's (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870).
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fastlm.data.conversations import Conversation
from fastlm.data.forget_log import PROVENANCE
from fastlm.errors import InputError
from fastlm.files import make_folder, read_json, reason, save_atomic, write_json, write_text
from fastlm.ops import linear_logprobs
from fastlm.progress import silent
from fastlm.schema import parse
from fastlm.train.encoding import decode_text
from fastlm.train.objective import IGNORE, Example, examples_digest, pack, weights_digest
from fastlm.train.options import expect
from fastlm.train.rollouts import sample_completions

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

BATCH = 64  # prompts that are sampled in one batch
SHARD_BYTES = 1 << 28  # maximum size of a shard
SAVE_SECONDS = 60.0  # maximum time between shards: a kill loses less work than this
FORWARD_TOKENS = 4096  # of one forward of the teacher
WORKSPACE = 1 << 26  # bytes of the teacher's logits, or of gathered rows of the head, at a time
MAX_SUM_ERROR = 0.02  # float16 changes the sum of a row by less
# 1 - sum s is a difference of float32 numbers near 1: below this it is rounding error
MIN_REST = 2.0**-20


@dataclass(frozen=True)
class TeacherHeader:
    """Identifies stored distributions. ``teacher``: a digest of its weights; ``temperature``
    divides the logits.
    """

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float


class TeacherLogits:
    """The distributions in ``folder``. ``header`` is None for a folder without shards, which is
    allowed with ``empty``. InputError: no shards, damaged ones, or shards of two teachers.
    """

    def __init__(self, folder: Path, *, empty: bool = False):
        self.folder = folder
        self.header: TeacherHeader | None = None
        self.shards: dict[str, Any] = {}  # digest of an example -> its shard
        for path in sorted(folder.glob("teacher-*.safetensors")):
            try:
                shard = safe_open(path, framework="np")
                meta = shard.metadata() or {}
                header = parse(meta.get("header", ""), TeacherHeader, "header", extra="forbid")
            except (OSError, SafetensorError, InputError) as error:
                raise self._bad(path, reason(error)) from None
            if self.header not in (None, header):
                raise self._bad(path, "another header than that of the previous shards")
            self.header = header
            self.shards |= {key.partition(".")[0]: shard for key in shard.keys()}
        if self.header is None and not empty:
            raise InputError(f"teacher_logits: expected shards in {folder}, got none")

    def __contains__(self, example: Example) -> bool:
        return examples_digest([example]) in self.shards

    def rows(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (rows, k) int64 and logprobs (rows, k + 1) float32 of the loss tokens of
        ``examples``, in order. InputError: an example is missing (the message names its line), or
        rows are no distributions.
        """
        assert self.header is not None
        arrays = []
        for example in examples:
            if (key := examples_digest([example])) not in self.shards:
                raise InputError(
                    f"teacher_logits: expected the tokens of {example.location} in {self.folder},"
                    " got other ones; data, chat template, date, max_length and truncation must"
                    " be the same"
                )
            try:
                ids, logprobs = (
                    self.shards[key].get_tensor(f"{key}.{name}") for name in ("ids", "logprobs")
                )
            except SafetensorError as error:
                raise self._bad(self.folder, reason(error)) from None
            ids, logprobs = ids.astype(np.int64), logprobs.astype(np.float32)
            rows, k = example.num_loss_tokens, self.header.top_k
            if (ids.shape, logprobs.shape) != ((rows, k), (rows, k + 1)):
                raise self._bad(self.folder, f"ids of shape {ids.shape}, not {(rows, k)}")
            if (ids < 0).any() or (ids >= self.header.vocab_size).any():
                raise self._bad(self.folder, f"ids beyond {self.header.vocab_size}")
            total = np.exp(logprobs).sum(-1, dtype=np.float32)
            if not (np.abs(total - 1) < MAX_SUM_ERROR).all():  # nor NaN
                raise self._bad(self.folder, "rows that are no distributions")
            arrays.append((ids, logprobs - np.log(total)[:, None]))
        ids, logprobs = zip(*arrays)
        return np.concatenate(ids), np.concatenate(logprobs)

    def identity(self, examples: Sequence[Example]) -> str:
        """Return a hash of the header and the rows of ``examples``. This reads and checks all
        rows.
        """
        assert self.header is not None
        digest = hashlib.sha256(json.dumps(asdict(self.header)).encode())
        for example in examples:
            for array in self.rows([example]):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    @staticmethod
    def _bad(path: Path, got: str) -> InputError:
        return InputError(f"teacher_logits: {path}: expected shards of `fastlm distill`, got {got}")


def write_logits(
    folder: Path,
    teacher: "CausalLM",
    examples: Sequence[Example],
    header: TeacherHeader,
    *,
    track: Callable[..., Any] = silent,
    shard_bytes: int = SHARD_BYTES,
) -> TeacherLogits:
    """Compute the teacher's distributions at the loss tokens of ``examples``, except those that
    ``folder`` already has, and return the distributions of the folder.

    A shard is written for every `SHARD_BYTES`, every `SAVE_SECONDS`, and at an interruption; the
    next call continues from them. InputError: the folder's shards have another header.
    """
    stored = TeacherLogits(make_folder(folder), empty=True)
    for name, expected in asdict(header).items():
        got = expected if stored.header is None else getattr(stored.header, name)
        if got != expected:
            raise InputError(
                f"teacher_logits: {folder}: expected logits with {name} {expected}, got {got}"
            )
    missing = {examples_digest([e]): e for e in examples if e not in stored}
    dtype = np.int32 if header.vocab_size > 1 << 16 else np.uint16
    tensors: dict[str, np.ndarray] = {}

    def save() -> None:
        meta = {"header": json.dumps(asdict(header))}
        path = folder / f"teacher-{next(iter(tensors)).removesuffix('.ids')}.safetensors"
        save_atomic(path, lambda part: save_file(tensors, part, meta))
        tensors.clear()

    saved = time.monotonic()
    batches = list(_batches(missing))
    try:
        for batch in track(batches, "teacher logits", unit="batches"):
            ids, logprobs = _topk_logprobs(teacher, [missing[key] for key in batch], header)
            ends = np.cumsum([missing[key].num_loss_tokens for key in batch])[:-1]
            for key, *rows in zip(batch, np.split(ids, ends), np.split(logprobs, ends)):
                tensors |= {f"{key}.ids": rows[0].astype(dtype), f"{key}.logprobs": rows[1]}
            size = sum(tensor.nbytes for tensor in tensors.values())
            if size >= shard_bytes or time.monotonic() - saved >= SAVE_SECONDS:
                save()
                saved = time.monotonic()
    finally:
        if tensors:
            save()
    return TeacherLogits(folder)


def _batches(missing: dict[str, Example]) -> Iterator[list[str]]:
    """Yield groups of examples of about `FORWARD_TOKENS` tokens."""
    batch: list[str] = []
    tokens = 0
    for key, example in missing.items():
        if batch and tokens + len(example.ids) > FORWARD_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(key)
        tokens += len(example.ids)
    if batch:
        yield batch


@torch.no_grad()
def _topk_logprobs(
    teacher: "CausalLM", examples: Sequence[Example], header: TeacherHeader
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (rows, k) and logprobs with the rest (rows, k + 1) float16."""
    ids, labels, cu_seqlens = pack(examples, teacher.device)
    hidden = teacher.hidden(ids, cu_seqlens=cu_seqlens)[0][labels[0] != IGNORE]
    head = teacher.head_matrix(hidden.dtype)
    step = max(1, WORKSPACE // (4 * len(head)))
    parts = []
    for rows in hidden.split(step):
        # 16-bit scores select the tokens; their log-probabilities are computed in float32
        top = torch.nn.functional.linear(rows, head).float().topk(header.top_k).indices
        logprobs = logprobs_at(
            rows, head, top, temperature=header.temperature,
            softcap=teacher.config.final_logit_softcapping,
        )  # fmt: skip
        rest = 1 - logprobs.exp().sum(-1, keepdim=True)
        if header.top_k == header.vocab_size:
            rest = torch.zeros_like(rest)
        rest = torch.where(rest > MIN_REST, rest, torch.zeros_like(rest)).log()
        parts.append((top, torch.cat([logprobs, rest], -1)))
    ids, logprobs = (torch.cat(column).cpu().numpy() for column in zip(*parts))
    return ids, logprobs.astype(np.float16)


def topk_forward_kl(student: Tensor, teacher: Tensor, rest: Tensor) -> Tensor:
    """Return the divergence (N,) of log-probabilities ``student`` and ``teacher`` (N, k) at the
    same tokens. ``rest`` (N,): the log of the teacher's remaining probability, -inf for 0.

    The student's rest counts as 2^-20 if it is less.
    """
    terms = teacher.exp() * (teacher - student)
    student_rest = torch.log((1 - student.exp().sum(-1)).clamp(min=MIN_REST))
    rest_term = rest.exp() * (rest - student_rest)
    zero = terms.new_zeros(())
    return torch.where(teacher > -torch.inf, terms, zero).sum(-1) + torch.where(
        rest > -torch.inf, rest_term, zero
    )


def logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return log-probabilities (N, k) of the tokens ``ids`` (N, k) under the head ``weight`` (V, D)
    at ``hidden`` (N, D), with gradients to both.

    Only the logits of the k tokens are computed. `linear_logprobs` of the first token provides the
    normaliser: ``log p_j = log p_0 + z_j - z_0``. For a 16-bit head the two gradients are therefore
    rounded separately.
    """
    first = linear_logprobs(hidden, weight, ids[:, 0], temperature=temperature, softcap=softcap)
    assert isinstance(first, Tensor)  # a pair only with return_entropy
    scores: Any = _Scores.apply(hidden, weight, ids)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores / temperature
    return first[:, None] + (scores - scores[:, :1])


class _Scores(torch.autograd.Function):
    """Computes ``hidden @ weight[ids].T`` row by row, in float32 (float64 for float64). It gathers
    the head's rows in parts of `WORKSPACE` bytes, and again in the backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        parts = [
            torch.bmm(w, h[:, :, None])[:, :, 0] for h, w, _ in _gather_rows(hidden, weight, ids)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(ids.shape, dtype=_wide_dtype(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            parts = [
                torch.bmm(grad[rows, None, :], w)[:, 0].to(hidden.dtype)
                for _, w, rows in _gather_rows(hidden, weight, ids)
            ]
            d_hidden = torch.cat(parts) if parts else torch.zeros_like(hidden)
        if ctx.needs_input_grad[1]:
            rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            indices = torch.stack([ids.reshape(-1), rows.reshape(-1)])
            sparse = torch.sparse_coo_tensor(
                indices, grad.reshape(-1), (len(weight), len(hidden)), check_invariants=False
            )
            d_weight = torch.sparse.mm(sparse, hidden.to(grad.dtype)).to(weight.dtype)
        return d_hidden, d_weight, None


def _wide_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _gather_rows(hidden: Tensor, weight: Tensor, ids: Tensor):
    """Yield (hidden (n, D), weight[ids] (n, k, D), slice of the rows), in the wide dtype."""
    wide = _wide_dtype(hidden)
    step = max(1, WORKSPACE // (ids.shape[1] * weight.shape[1] * wide.itemsize))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        yield hidden[rows].to(wide), weight[ids[rows]].to(wide), rows


def write_completions(
    folder: Path,
    teacher: "CausalLM",
    tokenizer: "Tokenizer",
    prompts: "Sequence[tuple[list[int], Prompt]]",
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    track: Callable[..., Any] = silent,
) -> int:
    """Sample the teacher's completions of ``prompts`` (token ids and prompt) and write them to
    ``folder``, except the batches that it already has. Return the number of completions.

    Prompt i draws from ``seed + i``; temperature 0 is greedy. InputError: the folder's completions
    were sampled with other options.
    """
    digest = hashlib.sha256(json.dumps([ids for ids, _ in prompts]).encode()).hexdigest()[:16]
    options = {
        "teacher": weights_digest(teacher), "prompts": digest, "temperature": temperature,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    options_path = make_folder(folder).with_name(f"{folder.name}.json")
    if options_path.exists():
        stored = read_json(options_path)
        for name, value in options.items():
            got = stored.get(name)
            expect(got == value, "teacher_completions", f"{folder} made with {name} {value}", got)
    else:
        write_json(options_path, options)
    count = 0
    starts = range(0, len(prompts), BATCH)
    for start in track(starts, "sampling from the teacher", unit="batches"):
        path = folder / f"completions-{start // BATCH:05d}.jsonl"
        if not path.exists():
            part = prompts[start : start + BATCH]
            completions = sample_completions(
                teacher, [ids for ids, _ in part], max_new_tokens=max_new_tokens,
                temperature=temperature, seed=seed + start, max_num_seqs=BATCH,
                stop_ids=tokenizer.stop_ids,
            )  # fmt: skip
            rows = []
            for (_, prompt), completion in zip(part, completions, strict=True):
                text = decode_text(tokenizer, completion.token_ids[:-1])
                if completion.is_stopped and text.strip():
                    rows.append(json.dumps(_row(prompt, text), ensure_ascii=False) + "\n")
            write_text(path, "".join(rows))
        count += path.read_bytes().count(b"\n")
    return count


def _row(prompt: "Prompt", text: str) -> dict[str, Any]:
    """Return the conversation as a row; only the answer has a loss. It keeps the provenance of its
    prompt, so that `fastlm data forget` finds it.
    """
    messages = [*prompt.messages, {"role": "assistant", "content": text}]
    loss_mask = [False] * len(prompt.messages) + [True]
    row = Conversation(messages, loss_mask, prompt.location, prompt.tools).to_row()
    return row | {key: prompt.row[key] for key in (PROVENANCE,) if key in prompt.row}
