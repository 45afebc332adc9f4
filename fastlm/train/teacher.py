"""What a teacher says, on disk, to train students on: its answers, and its distributions.

Answers to the prompts of the data are conversations to fine-tune on: sequence-level distillation
(Kim and Rush 2016, arXiv:1606.07947). The files ``completions-00000.jsonl`` and so on of a folder
hold `BATCH` prompts each, with the answers that ended and are not empty. Each is written whole, so
an interruption loses one batch. Beside the folder, ``NAME.json`` says what the answers were made
with. The student may have another tokenizer than the teacher: what passes is text.

Distributions: per learnt token its k likeliest tokens, their log-probabilities, and the log of what
is left over. A folder has shards ``teacher-*.safetensors``, each complete in itself. They hold, of
an example that `fastlm.train.objective.examples_digest` identifies as D, a row for each learnt
token:

- ``D.ids`` (rows, k), uint16 or int32;
- ``D.logprobs`` (rows, k + 1) float16, the rest last. A row is divided by its sum when it is read,
  so that rounding leaves a distribution;
- the metadata "header" is the JSON of `TeacherHeader`.

So an example is found by its tokens and mask: order, held-out share and other examples do not
matter.

The loss (`topk_forward_kl`) is a forward KL to the k tokens and how much is left over:

    KL = sum over the k of t (log t - log s) + t_rest (log t_rest - log s_rest)

with ``t_rest = 1 - sum t`` and ``s_rest = 1 - sum s`` over the same k tokens: the divergence after
all other tokens are made one. It is at most the divergence over the vocabulary, and equal to it
where k is the vocabulary, or where the student divides the rest as the teacher does.

Rejected: to leave the rest out, or to divide it among the k. Both teach more of the k than the
teacher gives them (Anshumann et al. 2025, "Sparse Logit Sampling", arXiv:2503.16870).
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

BATCH = 64  # prompts that are answered side by side
SHARD_BYTES = 1 << 28  # written at once
SAVE_SECONDS = 60.0  # or what was measured in this time: what a kill loses is less
FORWARD_TOKENS = 4096  # of a forward of the teacher
WORKSPACE = 1 << 26  # bytes of the teacher's logits, or of gathered rows of the head, at a time
MAX_SUM_ERROR = 0.02  # float16 moves the sum of a row by less
# 1 - sum s is a difference of float32 numbers near 1: below this it is rounding
MIN_REST = 2.0**-20


@dataclass(frozen=True)
class TeacherHeader:
    """``teacher``: a digest of its weights. Logits were divided by ``temperature``."""

    teacher: str
    vocab_size: int
    top_k: int
    temperature: float


class TeacherLogits:
    """The distributions in ``folder``. InputError: no shards, damaged ones, ones of two teachers.

    ``header`` is None for a folder without shards, which ``empty`` allows.
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
                raise self._bad(path, "another header than in the shards before it")
            self.header = header
            self.shards |= {key.partition(".")[0]: shard for key in shard.keys()}
        if self.header is None and not empty:
            raise InputError(f"teacher_logits: expected shards in {folder}, got none")

    def __contains__(self, example: Example) -> bool:
        return examples_digest([example]) in self.shards

    def rows(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Return ids (rows, k) int64 and logprobs (rows, k + 1) float32 of the learnt tokens of
        ``examples``, in order. InputError: an example that is not there, with its line, or rows
        that are no distributions.
        """
        assert self.header is not None
        found = []
        for example in examples:
            if (key := examples_digest([example])) not in self.shards:
                raise InputError(
                    f"teacher_logits: expected the tokens of {example.location} in {self.folder},"
                    " which holds other ones: was it made with this data, chat template, date,"
                    " max_length and truncation?"
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
            found.append((ids, logprobs - np.log(total)[:, None]))
        ids, logprobs = zip(*found)
        return np.concatenate(ids), np.concatenate(logprobs)

    def identity(self, examples: Sequence[Example]) -> str:
        """Identify the header and the rows of ``examples``, all of which are read and checked."""
        assert self.header is not None
        found = hashlib.sha256(json.dumps(asdict(self.header)).encode())
        for example in examples:
            for array in self.rows([example]):
                found.update(array.tobytes())
        return found.hexdigest()[:16]

    @staticmethod
    def _bad(where: Path, got: str) -> InputError:
        return InputError(
            f"teacher_logits: {where}: expected shards of `fastlm distill`, got {got}"
        )


def write_logits(
    folder: Path,
    teacher: "CausalLM",
    examples: Sequence[Example],
    header: TeacherHeader,
    *,
    track: Callable[..., Any] = silent,
    shard_bytes: int = SHARD_BYTES,
) -> TeacherLogits:
    """Measure the teacher's distributions over the learnt tokens of ``examples``, but for those
    that ``folder`` has already, and return the folder's.

    A shard is written for `SHARD_BYTES`, every `SAVE_SECONDS`, and where the call is interrupted;
    the next call keeps them. InputError: the folder's shards have another header.
    """
    known = TeacherLogits(make_folder(folder), empty=True)
    for name, wanted in asdict(header).items():
        got = wanted if known.header is None else getattr(known.header, name)
        if got != wanted:
            raise InputError(f"teacher_logits: {folder} was made with {name} {got}, not {wanted}")
    missing = {examples_digest([e]): e for e in examples if e not in known}
    dtype = np.int32 if header.vocab_size > 1 << 16 else np.uint16
    tensors: dict[str, np.ndarray] = {}

    def save() -> None:
        meta = {"header": json.dumps(asdict(header))}
        path = folder / f"teacher-{next(iter(tensors)).removesuffix('.ids')}.safetensors"
        save_atomic(path, lambda part: save_file(tensors, part, meta))
        tensors.clear()

    saved = time.monotonic()
    batches = list(_passes(missing))
    try:
        for batch in track(batches, "asking the teacher", unit="batches"):
            ids, logprobs = _measure(teacher, [missing[key] for key in batch], header)
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


def _passes(missing: dict[str, Example]) -> Iterator[list[str]]:
    """Groups of examples of about `FORWARD_TOKENS` tokens."""
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
def _measure(
    teacher: "CausalLM", examples: Sequence[Example], header: TeacherHeader
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (rows, k) and logprobs with the rest (rows, k + 1) float16."""
    ids, labels, cu_seqlens = pack(examples, teacher.device)
    hidden = teacher.hidden(ids, cu_seqlens=cu_seqlens)[0][labels[0] != IGNORE]
    head = teacher.head_matrix(hidden.dtype)
    step = max(1, WORKSPACE // (4 * len(head)))
    parts = []
    for rows in hidden.split(step):
        # 16-bit scores choose the tokens; their log-probabilities are sums in float32
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
    """The divergence (N,) of log-probabilities ``student`` and ``teacher`` (N, k) at the same
    tokens; ``rest`` (N,), the log of what the teacher leaves over, -inf for nothing.

    The student's rest counts as 2^-20 where it is less.
    """
    known = teacher.exp() * (teacher - student)
    left = torch.log((1 - student.exp().sum(-1)).clamp(min=MIN_REST))
    over = rest.exp() * (rest - left)
    zero = known.new_zeros(())
    return torch.where(teacher > -torch.inf, known, zero).sum(-1) + torch.where(
        rest > -torch.inf, over, zero
    )


def logprobs_at(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Log-probabilities (N, k) of the tokens ``ids`` (N, k) under the head ``weight`` (V, D) at
    ``hidden`` (N, D), with gradients to both.

    Logits exist at the k tokens alone. `linear_logprobs` of the first token knows the log of the
    normaliser: ``log p_j = log p_0 + z_j - z_0``. So of a 16-bit head the two gradients are rounded
    one by one.
    """
    first = linear_logprobs(hidden, weight, ids[:, 0], temperature=temperature, softcap=softcap)
    assert isinstance(first, Tensor)  # a pair only with return_entropy
    scores: Any = _Scores.apply(hidden, weight, ids)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores / temperature
    return first[:, None] + (scores - scores[:, :1])


class _Scores(torch.autograd.Function):
    """``hidden @ weight[ids].T`` row by row, in float32 (float64 of float64). Gathers the head's
    rows for `WORKSPACE` bytes at a time, in the backward once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        parts = [torch.bmm(w, h[:, :, None])[:, :, 0] for h, w, _ in _gathered(hidden, weight, ids)]
        return torch.cat(parts) if parts else hidden.new_zeros(ids.shape, dtype=_wide(hidden))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        hidden, weight, ids = ctx.saved_tensors
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            parts = [
                torch.bmm(grad[rows, None, :], w)[:, 0].to(hidden.dtype)
                for _, w, rows in _gathered(hidden, weight, ids)
            ]
            d_hidden = torch.cat(parts) if parts else torch.zeros_like(hidden)
        if ctx.needs_input_grad[1]:
            rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
            places = torch.stack([ids.reshape(-1), rows.reshape(-1)])
            sparse = torch.sparse_coo_tensor(
                places, grad.reshape(-1), (len(weight), len(hidden)), check_invariants=False
            )
            d_weight = torch.sparse.mm(sparse, hidden.to(grad.dtype)).to(weight.dtype)
        return d_hidden, d_weight, None


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype is torch.float64 else torch.float32


def _gathered(hidden: Tensor, weight: Tensor, ids: Tensor):
    """Yield (hidden (n, D), weight[ids] (n, k, D), slice of the rows), wide."""
    wide = _wide(hidden)
    step = max(1, WORKSPACE // (ids.shape[1] * weight.shape[1] * wide.itemsize))
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        yield hidden[rows].to(wide), weight[ids[rows]].to(wide), rows


def write_completions(
    folder: Path,
    teacher: "CausalLM",
    tokenizer: "Tokenizer",
    questions: "Sequence[tuple[list[int], Prompt]]",
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    track: Callable[..., Any] = silent,
) -> int:
    """Write the teacher's answers to ``questions`` (the ids of a prompt, and the prompt) into
    ``folder``, but for the batches that it has already. Return the number of answers.

    Prompt i draws from ``seed + i``; temperature 0 is greedy. InputError: the folder's answers were
    made otherwise.
    """
    prompts = hashlib.sha256(json.dumps([ids for ids, _ in questions]).encode()).hexdigest()[:16]
    made = {
        "teacher": weights_digest(teacher), "prompts": prompts, "temperature": temperature,
        "max_new_tokens": max_new_tokens, "seed": seed,
    }  # fmt: skip
    about = make_folder(folder).with_name(f"{folder.name}.json")
    if about.exists():
        known = read_json(about)
        for name, value in made.items():
            got = known.get(name)
            expect(got == value, "teacher_completions", f"{folder} made with {name} {value}", got)
    else:
        write_json(about, made)
    count = 0
    starts = range(0, len(questions), BATCH)
    for start in track(starts, "sampling from the teacher", unit="batches"):
        path = folder / f"completions-{start // BATCH:05d}.jsonl"
        if not path.exists():
            part = questions[start : start + BATCH]
            answers = sample_completions(
                teacher, [ids for ids, _ in part], max_new_tokens=max_new_tokens,
                temperature=temperature, seed=seed + start, max_num_seqs=BATCH,
                stop_ids=tokenizer.stop_ids,
            )  # fmt: skip
            rows = []
            for (_, prompt), answer in zip(part, answers, strict=True):
                text = decode_text(tokenizer, answer.token_ids[:-1])
                if answer.ended and text.strip():
                    rows.append(json.dumps(_row(prompt, text), ensure_ascii=False) + "\n")
            write_text(path, "".join(rows))
        count += path.read_bytes().count(b"\n")
    return count


def _row(prompt: "Prompt", text: str) -> dict[str, Any]:
    """The conversation, of which the answer alone is learnt. By the provenance of its prompt
    `fastlm data forget` finds it.
    """
    messages = [*prompt.messages, {"role": "assistant", "content": text}]
    learnt = [False] * len(prompt.messages) + [True]
    row = Conversation(messages, learnt, prompt.location, prompt.tools).row()
    return row | {key: prompt.row[key] for key in (PROVENANCE,) if key in prompt.row}
