"""The prompts of requests as token ids, within the model's context."""

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.inference.forms import OPEN, Form
from fastlm.serve.api_error import ApiError, field_error
from fastlm.serve.generic_tools import with_generic_tools
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest

if TYPE_CHECKING:
    from fastlm.tokenizer.tokenizer import Tokenizer

CALL: dict[str, Any] = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Do it.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}},
    },
}
# Bytes a token of prose: a text of no more of them is encoded as a whole
PLAIN = 4
USER: Message = {"role": "user", "content": "Hello"}
ANSWER: Message = {"role": "assistant", "content": "Yes"}
CALLED: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
# what a chat template may leave out, and a conversation that shows whether it does
PARTS: dict[str, tuple[list[Message], list[Any] | None]] = {
    "tools": ([USER], [TOOL]),
    "a system message": ([{"role": "system", "content": "Be kind"}, USER], None),
    "tool calls": ([USER, CALLED, {"role": "tool", "content": "7"}, ANSWER, USER], [TOOL]),
}


class Prompts:
    """Encodes prompts with a tokenizer. Its methods may run in any thread."""

    def __init__(self, tokenizer: "Tokenizer", context_limit: int):
        self.tokenizer, self.context_limit = tokenizer, context_limit
        self.unsupported_reason = cache(self._unsupported_reason)
        longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
        self.most_bytes = context_limit * longest

    def chat(self, request: ChatCompletionRequest) -> tuple[list[int], Form | None]:
        """The ids of a conversation through the chat template, and the form that the answer must
        have: that of the request, or the one of `fastlm.serve.generic_tools`. ApiError: the model
        has no template, it refuses the messages or leaves a part of them out, no room for an
        answer.
        """
        if self.tokenizer.chat_template is None:
            why = "this one has none (/v1/completions continues text)"
            raise field_error("messages", f"expected a model with a chat template, {why}")
        messages, tools, form = with_generic_tools(request, self.unsupported_reason)
        self._check_parts(messages, tools, form)
        variables = {"reasoning_effort": request.reasoning_effort, "tools": tools}
        variables = {name: value for name, value in variables.items() if value is not None}
        variables |= request.chat_template_kwargs or {}
        try:
            ids = self.tokenizer.encode_chat(
                messages, check=partial(self._check_size, "messages"),
                add_generation_prompt=request.add_generation_prompt, **variables,
            )  # fmt: skip
        except ApiError:
            raise
        except InputError as error:
            raise ApiError(str(error), param="messages") from None
        return self._fitting(ids, "messages"), form

    def text(self, prompt: str | list[int], name: str = "prompt", room: int = 1) -> list[int]:
        """The ids of a prompt to be continued: as given, or those of the text after the token that
        begins texts.
        """
        if isinstance(prompt, list):
            if (most := max(prompt)) >= (vocab := self.tokenizer.vocab_size):
                raise field_error(name, f"expected token ids below {vocab}, got {most}")
            return self._fitting(prompt, name, room)
        self._check_size(name, prompt)
        try:
            ids = self.tokenizer.encode(prompt)
        except InputError as error:
            raise ApiError(str(error), param=name) from None
        start = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        return self._fitting([*start, *ids], name, room)

    def embedded(self, text: str | list[int]) -> list[int]:
        """The ids of a text for an embedding; of an empty one the token that begins or ends texts.
        ApiError: as `text`; there is no such token.
        """
        ids = self.text(text, "input", room=0) if text else []
        ends = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        ids = ids or [token for token in ends if token is not None][:1]
        if not ids:
            raise field_error("input", "expected a text that is not empty, got ''")
        return ids

    def _check_size(self, name: str, text: str) -> None:
        """Refuse a text that has more tokens than the context, without encoding all of it: for a
        megabyte that takes seconds and 300 MB.
        """
        limit, size = self.context_limit, len(text.encode())
        if size > self.most_bytes:
            can = f"the model's context of {limit} tokens can hold, got {size}"
            raise _too_long(name, f"the {self.most_bytes} bytes that {can}")
        if size > PLAIN * limit and self.tokenizer.is_longer(text, limit):
            raise _too_long(name, f"the {limit} tokens of the model's context, got more")

    def _fitting(self, ids: list[int], name: str, room: int = 1) -> list[int]:
        limit = self.context_limit
        if len(ids) + room > limit:
            context = f"tokens of the model's context of {limit}"
            raise _too_long(name, f"{limit - room} {context}, got {len(ids)}")
        return ids

    def _check_parts(
        self, messages: list[Message], tools: list[Any] | None, form: Form | None
    ) -> None:
        roles = {message["role"] for message in messages}
        called = any(message.get("tool_calls") for message in messages)
        has = (tools is not None, "system" in roles, called or "tool" in roles)
        for part, given in zip(PARTS, has, strict=True):
            if given and (why := self.unsupported_reason(part)):
                why = f"the model's chat template does not write that: {why}"
                param = "tools" if part == "tools" else "messages"
                raise field_error(param, f"expected none with {part}: {why}")
        template = self.tokenizer.chat_template or ""
        if form is None or form.kind != "calls":
            return
        if OPEN not in template or OPEN in self.tokenizer.special_tokens:
            what = "strict: true" if form.param == "tools" else "false"
            raise field_error(
                form.param,
                f"expected {what} with tool_choice 'required' or a named function, got 'auto': this"
                f" model does not write calls as {OPEN}, the one form that can be kept to a schema"
                " inside free text",
            )

    def _unsupported_reason(self, part: str) -> str | None:
        """Why the template drops this part of a conversation, None if it writes it."""
        messages, tools = PARTS[part]
        variables = {} if tools is None else {"tools": tools}
        try:
            self.tokenizer.check_written(messages, variables, None)
        except InputError as error:
            return str(error)
        return None


def _too_long(name: str, most: str) -> ApiError:
    return field_error(name, f"expected at most {most}", "context_length_exceeded")
