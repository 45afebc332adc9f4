"""Answers in the shapes of /v1/responses: whole, or as its events."""

import itertools
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastlm.serve.answers import Answer, Event, to_json
from fastlm.serve.api_error import ApiError
from fastlm.serve.protocol.responses_api import ChatOfResponses


class ResponsesAnswer(Answer):
    """The answer to a `ChatOfResponses`: a message, calls of functions, or both."""

    ends = b""  # the last event says that it is the last

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        assert isinstance(self.request, ChatOfResponses)
        self.repeated = self.request.repeated
        self._numbers = itertools.count()
        # The log-probabilities as JSON, token by token, and what stands for them in events: four
        # events have them all, and `json.dumps` of so many would stop the server for seconds.
        self._scored: list[str] = []
        self._mark = secrets.token_hex(16)

    def encode(self, event: Event) -> bytes:
        return f"event: {event['type']}\ndata: {self._json(event)}\n\n".encode()

    def _json(self, value: Event) -> str:
        return to_json(value).replace(f'"{self._mark}"', f"[{','.join(self._scored)}]")

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
        self._scored = [to_json(one) for one in self._chat_logprobs(self.choices[0].logprobs)]
        return self._json(self._response(self._output())).encode()

    def _response(self, output: list[Event] | None = None) -> Event:
        """The response; without ``output``, one that has begun."""
        cut = output is not None and self.choices[0].finish_reason == "length"
        status = "in_progress" if output is None else "incomplete" if cut else "completed"
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "model": self.model, "output": output or [], "background": False, **self.repeated,
            "usage": None if output is None else self.usage(),
        }  # fmt: skip

    def _output(self) -> list[Event]:
        choice = self.choices[0]
        calls = self._calls()
        return [*([self._message_item()] if choice.text or not calls else []), *calls]

    def _message_item(self, status: str | None = None) -> Event:
        """The message; of another ``status``, before its text."""
        done = "incomplete" if self.choices[0].finish_reason == "length" else "completed"
        return {
            "id": f"msg_{self.id.removeprefix('resp_')}", "type": "message", "role": "assistant",
            "status": status or done, "content": [] if status else [self._part(whole=True)],
        }  # fmt: skip

    def _part(self, whole: bool) -> Event:
        scored = self._mark if whole and self._scored else []
        text = self.choices[0].text if whole else ""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": scored}

    def _calls(self) -> list[Event]:
        tools = self.choices[0].tools
        return [
            {
                "id": f"fc_{call['id'].removeprefix('call_')}", "type": "function_call",
                "status": "completed", "call_id": call["id"], **call["function"],
            }
            for call in (tools.calls if tools is not None else ())
        ]  # fmt: skip

    def _event(self, type: str, **told: Any) -> Event:
        return {"type": type, "sequence_number": next(self._numbers), **told}

    async def events(self) -> AsyncIterator[Event]:
        choice, began = self.choices[0], False
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response())
        at: Event = {"item_id": self._message_item("in_progress")["id"], "output_index": 0}
        part: Event = {**at, "content_index": 0}
        waiting: list[Event] = []  # log-probabilities of text that is held back
        async for index, piece in self.running:
            text, scored = self._take(index, piece)
            new = list(self._chat_logprobs(scored))
            waiting += new
            self._scored += map(to_json, new)
            ended = choice.finish_reason is not None
            if not began and (text or (ended and not self._calls())):
                began = True
                for event in self._begin(part):
                    yield event
            if text:
                told, waiting = waiting, []
                yield self._event("response.output_text.delta", **part, delta=text, logprobs=told)
        output = self._output()
        if began:
            (content,) = output[0]["content"]
            done = {"text": content["text"], "logprobs": content["logprobs"]}
            yield self._event("response.output_text.done", **part, **done)
            yield self._event("response.content_part.done", **part, part=content)
            yield self._event("response.output_item.done", output_index=0, item=output[0])
        for index, item in enumerate(output):
            if item["type"] == "function_call":
                for event in self._call_events(index, item):
                    yield event
        response = self._response(output)
        yield self._event(f"response.{response['status']}", response=response)

    def _begin(self, part: Event) -> Iterator[Event]:
        item = self._message_item("in_progress")
        yield self._event("response.output_item.added", output_index=0, item=item)
        yield self._event("response.content_part.added", **part, part=self._part(whole=False))

    def _call_events(self, index: int, item: Event) -> Iterator[Event]:
        begun = {**item, "status": "in_progress", "arguments": ""}
        yield self._event("response.output_item.added", output_index=index, item=begun)
        at, arguments = {"item_id": item["id"], "output_index": index}, item["arguments"]
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **at, delta=arguments)
        yield self._event(f"{kind}.done", **at, name=item["name"], arguments=arguments)
        yield self._event("response.output_item.done", output_index=index, item=item)
