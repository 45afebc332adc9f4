"""Responses of /v1/responses: one JSON body, or the events of that API."""

import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic_core import to_json

from fastlm.serve.api_error import ApiError
from fastlm.serve.completion_response import ChatCompletionResponse, Event


class ResponsesResponse(ChatCompletionResponse):
    """The response to a `ResponsesChatRequest`: a message, function calls, or both."""

    id_prefix, end_marker = "resp_", b""  # the type of the last event says that it is the last

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sequence_numbers = itertools.count()
        # The log-probabilities as JSON, one entry per token, and their placeholder in events: four
        # events contain all of them, and encoding them each time would block the server for 1 s.
        self._logprobs_json: list[bytes] = []
        self._placeholder = secrets.token_hex(16)

    def encode(self, event: Event) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), self._json(event))

    def _json(self, value: Event) -> bytes:
        logprobs = b"[%b]" % b",".join(self._logprobs_json)
        return to_json(value).replace(f'"{self._placeholder}"'.encode(), logprobs)

    def error_event(self, error: ApiError) -> bytes:
        fields = {"code": error.code or error.kind, "message": str(error), "param": error.param}
        return self.encode(self._event("error", **fields))

    def usage(self) -> dict[str, Any]:
        usage = super().usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    def _encode_body(self) -> bytes:
        entries = self._token_logprobs(self.choices[0].logprobs)
        self._logprobs_json = [to_json(entry) for entry in entries]
        return self._json(self._response(self._output()))

    def _response(self, output: list[Event] | None = None) -> Event:
        """Return the response object; without ``output``, one that is in progress."""
        is_cut = output is not None and self.choices[0].finish_reason == "length"
        status = "in_progress" if output is None else "incomplete" if is_cut else "completed"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self.model, "output": output or [], "background": False,
            **self.request.response_fields, "usage": None if output is None else self.usage(),
        }  # fmt: skip

    def _output(self) -> list[Event]:
        choice = self.choices[0]
        calls = [
            {
                "id": f"fc_{call['id'].removeprefix('call_')}", "type": "function_call",
                "status": "completed", "call_id": call["id"], **call["function"],
            }
            for call in choice.tool_calls
        ]  # fmt: skip
        if calls and not choice.text:
            return calls
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        part = self._part(choice.text, self._placeholder if self._logprobs_json else [])
        return [self._message_item(status, [part]), *calls]

    def _message_item(self, status: str, content: list[Event]) -> Event:
        return {
            "id": f"msg_{self.id.removeprefix('resp_')}", "type": "message", "role": "assistant",
            "status": status, "content": content,
        }  # fmt: skip

    def _part(self, text: str, logprobs: Any) -> Event:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _event(self, type: str, **fields: Any) -> Event:
        return {"type": type, "sequence_number": next(self._sequence_numbers), **fields}

    async def events(self) -> AsyncIterator[Event]:
        choice, has_begun = self.choices[0], False
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response())
        message = self._message_item("in_progress", [])
        ids: Event = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        pending: list[Event] = []  # log-probabilities of text that is not sent yet
        async for index, piece in self.stream:
            text, entries = self._add_piece(index, piece)
            logprobs = list(self._token_logprobs(entries))
            pending += logprobs
            self._logprobs_json += map(to_json, logprobs)
            is_last = choice.finish_reason is not None
            if not has_begun and (text or (is_last and not choice.tool_calls)):
                has_begun = True
                yield self._event("response.output_item.added", output_index=0, item=message)
                part = self._part("", [])
                yield self._event("response.content_part.added", **ids, part=part)
            if text:
                logprobs, pending = pending, []
                yield self._event(
                    "response.output_text.delta", **ids, delta=text, logprobs=logprobs
                )
        output = self._output()
        for index, item in enumerate(output):
            events = self._text_events if item["type"] == "message" else self._call_events
            for event in events(index, item):
                yield event
            yield self._event("response.output_item.done", output_index=index, item=item)
        response = self._response(output)
        yield self._event(f"response.{response['status']}", response=response)

    def _text_events(self, index: int, item: Event) -> Iterator[Event]:
        ids = {"item_id": item["id"], "output_index": index, "content_index": 0}
        (part,) = item["content"]
        text = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", **ids, **text)
        yield self._event("response.content_part.done", **ids, part=part)

    def _call_events(self, index: int, item: Event) -> Iterator[Event]:
        empty_item = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=empty_item)
        ids, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **ids, delta=arguments)
        yield self._event(f"{kind}.done", **ids, name=item["name"], arguments=arguments)
