"""What an engine is asked for by a request to /v1/chat/completions or /v1/completions."""

from typing import TYPE_CHECKING

from fastlm.serve.fields import ApiError
from fastlm.serve.openai_api import Asked, ChatAsked, TextAsked
from fastlm.serve.requests import Request

if TYPE_CHECKING:
    from fastlm.serve.gate import Limits
    from fastlm.serve.models import Served

MOST_LOGPROBS = 2**18  # in one response: about 30 MB


def requests_of(
    served: "Served", asked: Asked, limits: "Limits", client: str, cache_salt: bytes = b""
) -> tuple[list[list[int]], list[str], list[Request]]:
    """The prompts, their texts for an echo, and what the engine is asked for. Takes a while.

    ApiError: what the model cannot do.
    """
    context = served.context_limit
    most = limits.new_tokens or context
    if (asked.max_new_tokens or 0) > most and limits.new_tokens is not None:
        raise ApiError(
            f"max_tokens: wanted at most {most}, got {asked.max_new_tokens}", param="max_tokens"
        )
    echoes: list[str] = []
    if isinstance(asked, ChatAsked):
        prompts = [served.prompts.chat(asked)]
    else:
        assert isinstance(asked, TextAsked)
        prompts = [served.prompts.text(prompt) for prompt in asked.prompts]
        for given in asked.prompts if asked.echo else ():
            text = given if isinstance(given, str) else served.tokenizer.decode(given)
            echoes.append(text)
    # a padded model has more
    vocab = min(served.tokenizer.vocab_size, served.model.config.vocab_size)
    for name, ids in (
        ("logit_bias", [id for id, _ in asked.sampling.logit_bias]),
        ("stop_token_ids", asked.stop_ids),
    ):
        if ids and max(ids) >= vocab:
            raise ApiError(f"{name}: wanted token ids below {vocab}, got {max(ids)}", param=name)
    constraint = None if asked.form is None else served.grammars.constraint(asked.form)
    requests = [
        Request(
            prompt,
            max_new_tokens=min(asked.max_new_tokens or most, most, context - len(prompt)),
            sampling=asked.sampling,
            # choice i of seed s is that of a single request with seed s + i
            seed=None if asked.seed is None else (asked.seed + i) % 2**63,
            stop=asked.stop,
            stop_ids=asked.stop_ids,
            ignore_eos=asked.ignore_eos,
            logprobs=asked.logprobs,
            constraint=constraint,
            deadline=limits.answer_seconds,
            client=client,  # not its `user`, of which it may make up many
            cache_salt=cache_salt,
        )
        for prompt in prompts
        for i in range(asked.n)
    ]
    if asked.logprobs is not None:
        count = sum(request.max_new_tokens for request in requests) * (asked.logprobs + 1)
        if count > MOST_LOGPROBS:
            raise ApiError(
                f"logprobs: wanted at most {MOST_LOGPROBS} in one request, got up to {count}:"
                " answers x max_tokens x (top_logprobs + 1)",
                param="logprobs",
            )
    return prompts, echoes, requests
