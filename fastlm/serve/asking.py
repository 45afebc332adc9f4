"""What an engine is asked for by a request to /v1/chat/completions or /v1/completions."""

from typing import TYPE_CHECKING

from fastlm.inference.requests import Request
from fastlm.inference.structured_output import FormError
from fastlm.serve.answers import Echo
from fastlm.serve.fields import ApiError
from fastlm.serve.generic_tools import generic
from fastlm.serve.openai_api import Asked, ChatAsked, TextAsked

if TYPE_CHECKING:
    from fastlm.serve.middleware import Limits
    from fastlm.serve.models import Served

MOST_LOGPROBS = 2**18  # in one response: about 30 MB


def requests_of(
    served: "Served", asked: Asked, limits: "Limits", client: str, cache_salt: bytes = b""
) -> tuple[Asked, list[list[int]], list[Echo], list[Request]]:
    """The request as the model takes it (`fastlm.serve.generic_tools`), its prompts, their echoes,
    and what the engine is asked for. Takes a while.

    ApiError: what the model cannot do.
    """
    context = served.context_limit
    most = limits.new_tokens or context
    if (asked.max_new_tokens or 0) > most and limits.new_tokens is not None:
        raise ApiError(
            f"max_tokens: wanted at most {most}, got {asked.max_new_tokens}", param="max_tokens"
        )
    length = most if asked.max_new_tokens is None else min(asked.max_new_tokens, most)
    echoes: list[Echo] = []
    scored = None  # of the likeliest tokens of a prompt
    if isinstance(asked, ChatAsked):
        asked = generic(asked, served.prompts.why_not)
        prompts = [served.prompts.chat(asked)]
    else:
        assert isinstance(asked, TextAsked)
        prompts = [served.prompts.text(prompt) for prompt in asked.prompts]
        scored = asked.logprobs if asked.echo else None
        for given, ids in zip(asked.prompts if asked.echo else (), prompts):
            text = given if isinstance(given, str) else served.tokenizer.decode(given)
            # a token that begins texts is not one of the text's
            begins = isinstance(given, str) and served.tokenizer.bos_id is not None
            echoes.append(Echo(text, None if begins else ids[0]))
    # a padded model has more
    vocab = min(served.tokenizer.vocab_size, served.model.config.vocab_size)
    for name, ids in (
        ("logit_bias", [id for id, _ in asked.sampling.logit_bias]),
        ("stop_token_ids", asked.stop_ids),
    ):
        if ids and max(ids) >= vocab:
            raise ApiError(f"{name}: wanted token ids below {vocab}, got {max(ids)}", param=name)
    try:
        constraint = None if asked.form is None else served.grammars.constraint(asked.form)
    except FormError as error:
        raise ApiError(str(error), param=error.param) from None
    requests = [
        Request(
            prompt,
            # of 0 tokens, one is drawn and dropped
            max_new_tokens=max(1, min(length, context - len(prompt))),
            min_new_tokens=asked.min_new_tokens,
            sampling=asked.sampling,
            # choice i of seed s is that of a single request with seed s + i
            seed=None if asked.seed is None else (asked.seed + i) % 2**63,
            stop=asked.stop,
            stop_ids=asked.stop_ids,
            ignore_eos=asked.ignore_eos,
            logprobs=asked.logprobs,
            prompt_logprobs=scored,
            constraint=constraint,
            deadline=limits.answer_seconds,
            client=client,  # not its `user`, of which it may make up many
            cache_salt=cache_salt,
        )
        for prompt in prompts
        for i in range(asked.n)
    ]
    room = min(request.max_new_tokens for request in requests)
    if asked.min_new_tokens > room:
        raise ApiError(
            f"min_tokens: expected at most the {room} tokens that the answer may have, got"
            f" {asked.min_new_tokens}",
            param="min_tokens",
        )
    if asked.logprobs is not None:
        tokens = sum(request.max_new_tokens for request in requests)
        tokens += sum(map(len, prompts)) * asked.n if scored is not None else 0
        count = tokens * (asked.logprobs + 1)
        if count > MOST_LOGPROBS:
            raise ApiError(
                f"logprobs: wanted at most {MOST_LOGPROBS} in one request, got up to {count}:"
                " answers x max_tokens (with echo: and the prompt's) x (top_logprobs + 1)",
                param="logprobs",
            )
    return asked, prompts, echoes, requests
