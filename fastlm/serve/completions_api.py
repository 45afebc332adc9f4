"""Answer ``POST /v1/chat/completions``, ``/v1/completions`` and ``/v1/responses``: from the body of
a request to the end of its response."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from anyio.to_thread import run_sync
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from fastlm.data.conversations import parse_messages
from fastlm.errors import InputError
from fastlm.inference.output_format import OutputFormat
from fastlm.inference.requests import EngineClosed, QueueFull, Request
from fastlm.inference.sampling import Sampling
from fastlm.inference.structured_output import OutputFormatError
from fastlm.serve.api_error import ApiError, field_error, server_error, stopping
from fastlm.serve.completion_response import ChatCompletionResponse, CompletionResponse, PromptEcho
from fastlm.serve.feedback import StoredResponse
from fastlm.serve.middleware import cancel_on_disconnect, describe_error, log
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest
from fastlm.serve.protocol.responses_api import ResponsesChatRequest, ResponsesRequest
from fastlm.serve.response_stream import ResponseStream
from fastlm.serve.responses_response import ResponsesResponse

if TYPE_CHECKING:
    from fastlm.serve.app import Server
    from fastlm.serve.feedback_store import FeedbackStore
    from fastlm.serve.middleware import RequestLimits
    from fastlm.serve.models import ModelLease, ServedModel

MAX_LOGPROBS = 2**18  # in one response: about 30 MB
RESPONSES: dict[type[GenerationRequest], type[ChatCompletionResponse]] = {
    ChatCompletionRequest: ChatCompletionResponse, CompletionRequest: CompletionResponse,
    ResponsesChatRequest: ResponsesResponse,
}  # fmt: skip
EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once
]
Body = GenerationRequest | ResponsesRequest


async def complete(server: "Server", model: type[Body], http: HttpRequest) -> Response:
    """Submit a request to its model, or to the current one if the canary refuses it; return the
    sender of the response."""
    body = await server.parse_body(http, model)
    request = body.chat if isinstance(body, ResponsesRequest) else body
    if isinstance(body, ResponsesRequest) and body.previous_response_id is not None:
        request = await run_sync(
            with_previous, body.chat, server.feedback, limiter=server.database_limiter
        )
    if isinstance(request, ChatCompletionRequest) and request.store and server.feedback is None:
        raise field_error("store", "this server stores no conversations (fastlm serve --feedback)")
    lease = server.models.lease(request, http.state.client)
    try:
        try:
            response = await _submit(server, http, request, lease.served_model)
        except ApiError:
            if not lease.fall_back():
                raise
            response = await _submit(server, http, request, lease.served_model)
            await lease.record_refusal(response.id)
    except BaseException:
        lease.end()
        raise
    return ResponseSender(server, response, lease, http.state.log_fields)


async def _submit(
    server: "Server", http: HttpRequest, request: GenerationRequest, served_model: "ServedModel"
) -> ChatCompletionResponse:
    state, log_fields = http.state, http.state.log_fields
    state.ignored = server.ignored_fields(request, served_model)
    lengths, echoes, output_format, requests = await server.run_in_thread(
        build_requests, served_model, request, server.limits, state.client,
        # with several keys, clients share no cached prompts
        state.client.encode() if len(server.keys) > 1 else b"",
    )  # fmt: skip
    response_class = RESPONSES[type(request)]
    id = f"{response_class.id_prefix}{state.id}"
    log_fields["model"], log_fields["prompt_tokens"] = served_model.name, sum(lengths)
    if server.monitor is not None:  # the middleware calls its `end`
        state.observer = server.monitor.observe(request, served_model.name, id, lengths)
    with engine_errors():
        stream = ResponseStream(served_model.engine, requests, server.metrics, server.quota)
    for length in lengths:
        server.metrics.prompt_length.observe(length)
    response = response_class(
        request, id, served_model.name, stream, served_model.tokenizer, output_format,
        log_fields["prompt_tokens"], echoes,
    )  # fmt: skip
    if server.monitor is not None:
        state.observer.response = response
    return response


def build_requests(
    served_model: "ServedModel", request: GenerationRequest, limits: "RequestLimits", client: str,
    cache_salt: bytes,
) -> tuple[list[int], list[PromptEcho], OutputFormat | None, list[Request]]:  # fmt: skip
    """Return the lengths of a request's prompts, their echoes, the format of its answers, and the
    requests to the engine. Encoding takes a while, so run it outside the event loop.

    ApiError: the request asks for something that the model cannot do.
    """
    context = served_model.context_limit
    limit = limits.max_new_tokens or context
    max_tokens, logprobs = request.max_tokens, request.num_logprobs
    if (max_tokens or 0) > limit and limits.max_new_tokens is not None:
        raise field_error("max_tokens", f"expected at most {limit}, got {max_tokens}")
    length = limit if max_tokens is None else min(max_tokens, limit)
    output_format, echoes, prompt_logprobs = request.output_format, list[PromptEcho](), None
    if isinstance(request, ChatCompletionRequest):
        ids, output_format = served_model.prompt_encoder.encode_chat(request)
        prompts = [ids]
    else:
        assert isinstance(request, CompletionRequest)
        prompts = [served_model.prompt_encoder.encode_text(prompt) for prompt in request.prompts]
        prompt_logprobs = logprobs if request.echo else None
        for prompt, ids in zip(request.prompts if request.echo else (), prompts):
            text = prompt if isinstance(prompt, str) else served_model.tokenizer.decode(prompt)
            # a BOS token that the server adds is not part of the text
            has_bos = isinstance(prompt, str) and served_model.tokenizer.bos_id is not None
            echoes.append(PromptEcho(text, None if has_bos else ids[0]))
    seed = request.seed
    bias = {int(token): bias for token, bias in request.logit_bias.items()}
    sampling = Sampling(
        temperature=request.temperature,
        # -1 (vLLM) and 0 (llama.cpp) switch it off
        top_k=request.top_k if request.top_k is not None and request.top_k > 0 else None,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=tuple(sorted(bias.items())),
    )
    # the vocabulary of a padded model is larger than its tokenizer's
    vocab = min(served_model.tokenizer.vocab_size, served_model.model.config.vocab_size)
    for name, ids in (("logit_bias", bias), ("stop_token_ids", request.stop_token_ids)):
        if ids and max(ids) >= vocab:
            raise field_error(name, f"expected token ids below {vocab}, got {max(ids)}")
    try:
        constraint = (
            None
            if output_format is None
            else served_model.grammar_compiler.constraint(output_format)
        )
    except OutputFormatError as error:
        raise ApiError(str(error), param=error.param) from None
    requests = [
        Request(
            prompt,
            # for 0 tokens the engine draws one, which is dropped
            max_new_tokens=max(1, min(length, context - len(prompt))),
            min_new_tokens=request.min_tokens,
            sampling=sampling,
            # choice i of seed s equals the choice of a single request with seed s + i
            seed=None if seed is None else (seed + i) % 2**63,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop),
            stop_ids=frozenset(request.stop_token_ids),
            ignore_eos=request.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            deadline=limits.answer_seconds,
            client=client,  # not `user`, which a client may invent
            cache_salt=cache_salt,
        )
        for prompt in prompts
        for i in range(request.n)
    ]
    lengths = [len(prompt) for prompt in prompts]
    budget = min(item.max_new_tokens for item in requests)
    if request.min_tokens > budget:
        bound = f"the {budget} tokens that the answer may have, got {request.min_tokens}"
        raise field_error("min_tokens", f"expected at most {bound}")
    if logprobs is not None:
        tokens = sum(item.max_new_tokens for item in requests)
        tokens += sum(lengths) * request.n if prompt_logprobs is not None else 0
        if (count := tokens * (logprobs + 1)) > MAX_LOGPROBS:
            raise field_error(
                "logprobs",
                f"expected at most {MAX_LOGPROBS} in one request, got up to {count}:"
                " answers x max_tokens (with echo: and the prompt's) x (top_logprobs + 1)",
            )
    return lengths, echoes, output_format, requests


class ResponseSender(Response):
    """Waits for a response and sends it: as one body, or as events. The last event is
    `ChatCompletionResponse.end_marker` or an error."""

    background = None

    def __init__(
        self, server: "Server", response: ChatCompletionResponse, lease: "ModelLease",
        log_fields: dict[str, Any],
    ):  # fmt: skip
        self.server, self.response, self.lease, self.log_fields = (
            server,
            response,
            lease,
            log_fields,
        )

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        response, log_fields = self.response, self.log_fields
        try:
            await cancel_on_disconnect(receive, self._send(send))
        finally:
            response.stream.close(disconnected=True)
            self.lease.end()
            log_fields["new_tokens"] = sum(choice.tokens for choice in response.choices)
            log_fields["finish_reason"] = [choice.finish_reason for choice in response.choices]
            log_fields["cached_tokens"] = response.cached_tokens

    async def _send(self, send: Any) -> None:
        response, stream = self.response, self.response.request.stream
        start = {"type": "http.response.start", "status": 200, "headers": [*EVENTS]}
        body = {"type": "http.response.body", "body": b"", "more_body": True}
        if stream:
            await send(start)
        try:
            try:
                if not stream:
                    last = await response.body()
                else:
                    async for event in response.events():
                        await send({**body, "body": response.encode(event)})
                    last = response.end_marker
            except ClientDisconnect:
                raise
            except Exception as error:
                await self.lease.record_failure(response.id, error)
                raise
            await self.lease.record_response(response)
            if getattr(response.request, "store", False):
                await self._store()
        except ApiError as error:
            if not stream:
                raise
            self.server.metrics.errors.labels(error.code or error.kind).inc()
            self.log_fields["error"], self.log_fields["error_status"] = (
                error.code or error.kind,
                error.status,
            )
            last = response.error_event(error)
        if not stream:
            size = str(len(last)).encode()
            headers = [(b"content-type", b"application/json"), (b"content-length", size)]
            await send({**start, "headers": headers})
        await send({**body, "body": last, "more_body": False})

    async def _store(self) -> None:
        """Store the conversation. If the database fails, the conversation is lost but the client
        gets its answer; the failure is counted and logged with its reason."""
        response, request, store = self.response, self.response.request, self.server.feedback
        assert store is not None
        try:
            stored = StoredResponse(
                response.id, response.model, request.messages, response.messages(), request.tools,
                request.conversation_id,
            )  # fmt: skip
            await run_sync(store.add_response, stored, limiter=self.server.database_limiter)
        except Exception as error:
            self.log_fields["stored"] = False
            self.server.metrics.store_failures.inc()
            reason = {"message": str(error)[:200]} if isinstance(error, InputError) else {}
            id = re.split("[-_]", response.id)[-1]  # of the request
            log("failure", id=id, what="store", **describe_error(error), **reason)


@contextmanager
def engine_errors() -> Iterator[None]:
    """Convert the engine's refusals into errors for the client."""
    try:
        yield
    except QueueFull as full:
        wait = str(max(1, round(full.retry_after)))
        raise ApiError(
            str(full), status=429, code="queue_full", kind="rate_limit_error",
            headers={"retry-after": wait},
        ) from None  # fmt: skip
    except EngineClosed:
        raise stopping() from None
    except InputError as error:
        raise ApiError(str(error)) from None


def with_previous(
    request: ResponsesChatRequest, store: "FeedbackStore | None"
) -> ResponsesChatRequest:
    """Return a request to /v1/responses with the conversation that it continues. New instructions
    replace the old ones. ApiError: the conversation is not stored.
    """
    param = "previous_response_id"
    previous, instructions = request.response_fields[param], request.response_fields["instructions"]
    send = "send the whole conversation as input"
    if store is None:
        reason = "this server stores no conversations (fastlm serve --feedback)"
        raise field_error(param, f"{reason}: {send}")
    try:
        stored = store.response(previous)
    except InputError:
        message = f"{param}: the database of conversations cannot be read now"
        raise server_error(message, 503, param=param) from None
    if stored is None or not stored.choices:  # another program may have written the database
        message = f"expected a response that was stored (store: true), got {previous!r}"
        raise field_error(param, f"{message}: {send}", "previous_response_not_found")
    earlier = [*stored.prompt, *stored.choices[0]]
    start = int(bool(instructions))
    if start and earlier and earlier[0]["role"] == "system":
        earlier = earlier[1:]
    earlier = [message for _, message in parse_messages(earlier, param)]
    # a continuation is stored under the conversation it continues: forgetting one forgets both
    conversation = request.conversation_id
    if request.store and conversation is None:
        conversation = stored.conversation_id or previous
    messages = [*request.messages[:start], *earlier, *request.messages[start:]]
    return request.model_copy(update={"messages": messages, "conversation_id": conversation})
