"""Generation: the tokens of a batch, or one text piece by piece, through an engine that is created
for the call.

The engine computes prompts without padding, so a row has the same result alone, up to rounding.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastlm.errors import InputError
from fastlm.inference.answer_text import check_stop_strings
from fastlm.inference.block_manager import BLOCK_SIZE, default_num_blocks
from fastlm.inference.engine import Engine
from fastlm.inference.requests import Completion, Piece, Request, batch_requests
from fastlm.inference.sampling import Sampling, check_seed

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

_DEFAULT = Sampling()
_STEP_TOKENS = 4096  # many, because nobody waits for a running answer
_CPU_STEP_TOKENS = 1024  # as fast as 4096 on Zen 4, with less memory and earlier first tokens


def make_engine(
    model: "CausalLM",
    requests: Sequence[Request],
    tokenizer: "Tokenizer | None" = None,
    *,
    max_num_seqs: int | None = None,
    batch_invariant: bool = False,
) -> Engine:
    """Return an engine for these requests, ``max_num_seqs`` (default: all) at a time. It has the
    blocks that they need, within the memory that `default_num_blocks` allows. Where rotary
    frequencies depend on the length of the context, they are those of the longest request. Without
    ``batch_invariant``, it computes the prompts of a step in one product.
    """
    limit, count = model.context_limit, len(requests)
    lengths = sorted(min(len(r.prompt) + r.max_new_tokens, limit) for r in requests)
    blocks = [-(-length // BLOCK_SIZE) + 1 for length in lengths[-(max_num_seqs or count) :]]
    # a GPU allocates the memory at once, and others need the rest
    max_blocks = default_num_blocks(
        model.config, count, dtype=model.dtype, device=model.device, max_model_len=lengths[-1],
        expected_tokens=lengths[-1],
    )  # fmt: skip
    return Engine(
        model,
        tokenizer,
        num_blocks=max(blocks[-1], min(sum(blocks), max_blocks)),
        max_num_seqs=max_num_seqs or count,
        max_num_batched_tokens=_CPU_STEP_TOKENS if model.device.type == "cpu" else _STEP_TOKENS,
        max_model_len=lengths[-1] if model.model.depends_on_length else None,
        batch_invariant=batch_invariant,
    )


def generate(
    model: "CausalLM",
    input_ids: Tensor | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = _DEFAULT,
    seed: int | None = None,
    stop_ids: Sequence[int] | frozenset[int] = (),
    ignore_eos: bool = False,
    attention_mask: Tensor | None = None,
    on_token: Callable[[int, int], Any] | None = None,
    return_logprobs: bool = False,
) -> Any:
    """Continue every row by at most `max_new_tokens` tokens.

    A row ends with the first of the model's end tokens (``model.config.stop_ids``) that is sampled.
    That token is kept. A row also ends where its context reaches max_position_embeddings.

    Args:
        input_ids: (B, S) integers, or a list of B lists of ids of any lengths >= 1.
        sampling: see `Sampling`; default: temperature 1 without filters.
        seed: row r draws with seed + r, as it would alone with that seed. None: torch's generator.
        stop_ids: further tokens that end a row.
        ignore_eos: only `stop_ids` end a row, not the model's end tokens.
        attention_mask: (B, S), 0 where a row of the tensor is padding; padding is on the left.
        on_token: called with (row, token) for each new token, in the order of rows; a true result
            ends the row.
        return_logprobs: also return the new tokens' log-probabilities (`Sampling.logprobs`).

    Where rotary frequencies depend on the length of the context (`dynamic`, `longrope`), all rows
    have those of the longest row with max_new_tokens.

    Returns:
        For a tensor, (B, S + new) int64, padded after a row's end with pad_token_id (with the row's
        last token where the config has none). For a list, a list of B lists: prompt and new tokens,
        without padding. With return_logprobs, the pair of that and B lists of a float per new
        token.

    Raises InputError: empty prompts, ids out of range, a prompt as long as the context, impossible
    options. RuntimeError: the model fails, or its logits are not finite.
    """
    prompts = _prompts(model, input_ids, attention_mask)
    _check_steps(max_new_tokens)
    check_seed(seed)
    completions = [Completion([]) for _ in prompts]
    if max_new_tokens and prompts:
        longest = max(map(len, prompts))
        if longest + 1 > model.context_limit:
            raise InputError(
                "input_ids: expected a prompt shorter than max_position_embeddings"
                f" {model.context_limit}, got {longest} tokens"
            )

        def on_piece(row: int, piece: Piece) -> bool:
            return on_token is not None and any([on_token(row, token) for token in piece.tokens])

        requests = batch_requests(
            prompts, max_new_tokens, sampling, seed=seed, stop_ids=frozenset(stop_ids),
            ignore_eos=ignore_eos, logprobs=0 if return_logprobs else None,
        )  # fmt: skip
        completions = make_engine(model, requests).generate(requests, on_piece=on_piece)
        _check_completions(completions)
    new = [completion.token_ids for completion in completions]
    if isinstance(input_ids, Tensor):
        width, pad = max(map(len, new), default=0), model.config.pad_token_id
        # a slice: with max_new_tokens 0 no row has a last token
        rows = [row + (row[-1:] if pad is None else [pad]) * (width - len(row)) for row in new]
        ids = input_ids.to(model.device, torch.int64)
        tail = torch.tensor(rows, dtype=torch.int64, device=ids.device).view(len(rows), width)
        result = torch.cat((ids, tail), 1)
    else:
        result = [prompt + row for prompt, row in zip(prompts, new, strict=True)]
    if not return_logprobs:
        return result
    logprobs = [[token.logprob for token in completion.logprobs] for completion in completions]
    return result, logprobs


def _prompts(
    model: "CausalLM", input_ids: Tensor | Sequence[Sequence[int]], mask: Tensor | None
) -> list[list[int]]:
    """Check the prompts, and return them without padding."""
    if not isinstance(input_ids, Tensor):
        if mask is not None:
            raise InputError(
                "attention_mask: expected with a tensor of input_ids, got it with a list"
            )
        if isinstance(input_ids, str):
            raise InputError(
                "input_ids: expected a tensor (B, S) or a list of B lists of token ids, got a str"
                " (fastlm.Tokenizer encodes text, fastlm.generate_text continues it)"
            )
        if isinstance(input_ids, Mapping) or any(isinstance(row, int | str) for row in input_ids):
            raise InputError(
                "input_ids: expected a tensor (B, S) or a list of B lists,"
                f" got a flat {type(input_ids).__name__}"
            )
        prompts = [torch.as_tensor(row, dtype=torch.int64).tolist() for row in input_ids]
        model.check_ids(torch.tensor([[*chain.from_iterable(prompts)]], dtype=torch.int64))
    else:
        ids = input_ids.cpu()
        model.check_ids(ids)
        prompts = ids.tolist()
        if mask is not None:
            if mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask: expected {tuple(ids.shape)} as input_ids,"
                    f" got {tuple(mask.shape)}"
                )
            mask = mask.cpu().bool()
            if not bool((mask.long().diff(dim=1) >= 0).all()):
                raise InputError(
                    "attention_mask: expected padding on the left only, got it elsewhere"
                )
            starts = (~mask).sum(1).tolist()
            prompts = [row[start:] for row, start in zip(prompts, starts, strict=True)]
    if not all(prompts):
        raise InputError("input_ids: expected at least one token in each row, got an empty prompt")
    return prompts


def _check_steps(count: Any) -> None:
    if not isinstance(count, int) or count < 0:
        raise InputError(f"max_new_tokens: expected an integer >= 0, got {count!r}")


def _check_completions(completions: Sequence[Completion | Piece]) -> None:
    for completion in completions:
        if completion.error is not None:
            raise RuntimeError(completion.error)


def generate_text(
    model: "CausalLM",
    tokenizer: "Tokenizer",
    prompt: str | Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling = _DEFAULT,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | frozenset[int] = (),
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue one prompt, and yield text piece by piece as soon as it is certain.

    `stop` strings end the text before they appear in it, even where they straddle tokens: text that
    may become one is buffered. The end tokens of model and tokenizer (unless `ignore_eos`) and
    `stop_ids` end the text, too, and are not part of it. `fastlm serve` answers with the same text
    for the same options. For several prompts, use `Engine.generate`.
    """
    _check_steps(max_new_tokens)
    stops = tuple(check_stop_strings(stop))
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    _prompts(model, [ids], None)
    if not max_new_tokens:
        return iter(())
    requests = batch_requests(
        [ids], max_new_tokens, sampling, seed=seed, stop=stops, stop_ids=frozenset(stop_ids),
        ignore_eos=ignore_eos,
    )  # fmt: skip
    engine, pieces = make_engine(model, requests, tokenizer, batch_invariant=True), deque[Piece]()
    engine.submit(requests[0], pieces.append)
    return _texts(engine, pieces)


def _texts(engine: Engine, pieces: deque[Piece]) -> Iterator[str]:
    reason = None
    while reason is None:
        engine.step()
        while pieces:
            piece = pieces.popleft()
            _check_completions([piece])
            reason = piece.finish_reason
            if piece.text:
                yield piece.text
