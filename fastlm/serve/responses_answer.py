"""Answers in the shapes of /v1/responses: whole, or as its events."""

import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic_core import to_json

from fastlm.serve.answers import Answer, Event
from fastlm.serve.api_error import ApiError


class ResponsesAnswer(Answer):
    """The answer to a `ChatOfResponses`: a message, calls of functions, or both."""

    prefix, ends = "resp_", b""  # the last event says that it is the last

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers = itertools.count()
        # The log-probabilities as JSON, token by token, and what stands for them in events: four
        # events have them all, which would stop the server for a second.
        self._scored: list[bytes] = []
        self._mark = secrets.token_hex(16)

    def encode(self, event: Event) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), self._json(event))

    def _json(self, value: Event) -> bytes:
        return to_json(value).replace(f'"{self._mark}"'.encode(), b"[%b]" % b",".join(self._scored))

    def failed(self, error: ApiError) -> bytes:
        told = {"code": error.code or error.kind, "message": str(error), "param": error.param}
        return self.encode(self._event("error", **told))

    def usage(self) -> dict[str, Any]:
        told = super().usage()
        return {
            "input_tokens": told["prompt_tokens"],
            "input_tokens_details": told["prompt_tokens_details"],
            "output_tokens": told["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": told["total_tokens"],
        }

    def _body(self) -> bytes:
        self._scored = [to_json(one) for one in self._scored_tokens(self.choices[0].logprobs)]
        return self._json(self._response(self._output()))

    def _response(self, output: list[Event] | None = None) -> Event:
        """The response; without ``output``, one that has begun."""
        cut = output is not None and self.choices[0].finish_reason == "length"
        status = "in_progress" if output is None else "incomplete" if cut else "completed"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self.model, "output": output or [], "background": False,
            **self.request.repeated, "usage": None if output is None else self.usage(),
        }  # fmt: skip

    def _output(self) -> list[Event]:
        choice = self.choices[0]
        calls = [
            {
                "id": f"fc_{call['id'].removeprefix('call_')}", "type": "function_call",
                "status": "completed", "call_id": call["id"], **call["function"],
            }
            for call in choice.calls
        ]  # fmt: skip
        if calls and not choice.text:
            return calls
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        part = self._part(choice.text, self._mark if self._scored else [])
        return [self._message_item(status, [part]), *calls]

    def _message_item(self, status: str, content: list[Event]) -> Event:
        return {
            "id": f"msg_{self.id.removeprefix('resp_')}", "type": "message", "role": "assistant",
            "status": status, "content": content,
        }  # fmt: skip

    def _part(self, text: str, logprobs: Any) -> Event:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _event(self, type: str, **told: Any) -> Event:
        return {"type": type, "sequence_number": next(self._numbers), **told}

    async def events(self) -> AsyncIterator[Event]:
        choice, began = self.choices[0], False
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response())
        message = self._message_item("in_progress", [])
        at: Event = {"item_id": message["id"], "output_index": 0, "content_index": 0}
        waiting: list[Event] = []  # log-probabilities of text that is held back
        async for index, piece in self.running:
            text, scored = self._take(index, piece)
            new = list(self._scored_tokens(scored))
            waiting += new
            self._scored += map(to_json, new)
            if not began and (text or (choice.finish_reason is not None and not choice.calls)):
                began = True
                yield self._event("response.output_item.added", output_index=0, item=message)
                begin = self._part("", [])
                yield self._event("response.content_part.added", **at, part=begin)
            if text:
                told, waiting = waiting, []
                yield self._event("response.output_text.delta", **at, delta=text, logprobs=told)
        output = self._output()
        for index, item in enumerate(output):
            events = self._text_end if item["type"] == "message" else self._call_events
            for event in events(index, item):
                yield event
            yield self._event("response.output_item.done", output_index=index, item=item)
        response = self._response(output)
        yield self._event(f"response.{response['status']}", response=response)

    def _text_end(self, index: int, item: Event) -> Iterator[Event]:
        at = {"item_id": item["id"], "output_index": index, "content_index": 0}
        (part,) = item["content"]
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        yield self._event("response.output_text.done", **at, **done)
        yield self._event("response.content_part.done", **at, part=part)

    def _call_events(self, index: int, item: Event) -> Iterator[Event]:
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        at, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **at, delta=arguments)
        yield self._event(f"{kind}.done", **at, name=item["name"], arguments=arguments)
