"""The requests to an engine that a request to /v1/chat/completions or /v1/completions becomes."""

from typing import TYPE_CHECKING

from fastlm.inference.requests import Request
from fastlm.inference.structured_output import FormError
from fastlm.serve.answers import Echo
from fastlm.serve.api_error import ApiError
from fastlm.serve.generic_tools import with_generic_tools
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest

if TYPE_CHECKING:
    from fastlm.serve.middleware import Limits
    from fastlm.serve.models import Served

MAX_LOGPROBS = 2**18  # in one response: about 30 MB


def build_requests(
    served: "Served",
    request: GenerationRequest,
    limits: "Limits",
    client: str,
    cache_salt: bytes = b"",
) -> tuple[GenerationRequest, list[list[int]], list[Echo], list[Request]]:
    """Return the request as the model takes it (`fastlm.serve.generic_tools`), its prompts, their
    echoes, and the requests to the engine. Takes a while.

    ApiError: what the model cannot do.
    """
    context = served.context_limit
    longest = limits.new_tokens or context
    max_tokens, logprobs = request.max_tokens, request.num_logprobs
    if (max_tokens or 0) > longest and limits.new_tokens is not None:
        raise ApiError(
            f"max_tokens: expected at most {longest}, got {max_tokens}", param="max_tokens"
        )
    length = longest if max_tokens is None else min(max_tokens, longest)
    echoes: list[Echo] = []
    prompt_logprobs = None
    if isinstance(request, ChatCompletionRequest):
        request = with_generic_tools(request, served.prompts.why_not)
        prompts = [served.prompts.chat(request)]
    else:
        assert isinstance(request, CompletionRequest)
        prompts = [served.prompts.text(prompt) for prompt in request.prompts]
        prompt_logprobs = logprobs if request.echo else None
        for given, ids in zip(request.prompts if request.echo else (), prompts):
            text = given if isinstance(given, str) else served.tokenizer.decode(given)
            # a token that begins texts is not one of the text's
            begins = isinstance(given, str) and served.tokenizer.bos_id is not None
            echoes.append(Echo(text, None if begins else ids[0]))
    sampling, seed, form = request.sampling(), request.seed, request.form
    # a padded model has more
    vocab = min(served.tokenizer.vocab_size, served.model.config.vocab_size)
    for name, ids in (
        ("logit_bias", [id for id, _ in sampling.logit_bias]),
        ("stop_token_ids", request.stop_token_ids),
    ):
        if ids and max(ids) >= vocab:
            raise ApiError(f"{name}: expected token ids below {vocab}, got {max(ids)}", param=name)
    try:
        constraint = None if form is None else served.grammars.constraint(form)
    except FormError as error:
        raise ApiError(str(error), param=error.param) from None
    requests = [
        Request(
            prompt,
            # of 0 tokens, one is drawn and dropped
            max_new_tokens=max(1, min(length, context - len(prompt))),
            min_new_tokens=request.min_tokens,
            sampling=sampling,
            # choice i of seed s is that of a single request with seed s + i
            seed=None if seed is None else (seed + i) % 2**63,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
            stop_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            deadline=limits.answer_seconds,
            client=client,  # not its `user`, of which it may make up many
            cache_salt=cache_salt,
        )
        for prompt in prompts
        for i in range(request.n)
    ]
    budget = min(one.max_new_tokens for one in requests)
    if request.min_tokens > budget:
        raise ApiError(
            f"min_tokens: expected at most the {budget} tokens that the answer may have, got"
            f" {request.min_tokens}",
            param="min_tokens",
        )
    if logprobs is not None:
        tokens = sum(one.max_new_tokens for one in requests)
        tokens += sum(map(len, prompts)) * request.n if prompt_logprobs is not None else 0
        count = tokens * (logprobs + 1)
        if count > MAX_LOGPROBS:
            raise ApiError(
                f"logprobs: expected at most {MAX_LOGPROBS} in one request, got up to {count}:"
                " answers x max_tokens (with echo: and the prompt's) x (top_logprobs + 1)",
                param="logprobs",
            )
    return request, prompts, echoes, requests
