"""The prompts of requests as token ids, within the model's context."""

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.inference.forms import OPEN
from fastlm.serve.api_error import ApiError
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
        self.why_not = cache(self._why_not)
        longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
        self.most_bytes = context_limit * longest

    def chat(self, request: ChatCompletionRequest) -> list[int]:
        """The ids of a conversation through the chat template. ApiError: the model has none, it
        refuses the messages or leaves a part of them out, no room for an answer.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(
                "messages: expected a model with a chat template, this one has none"
                " (/v1/completions continues text)",
                param="messages",
            )
        self._check_parts(request)
        variables = request.template_variables
        if request.tools is not None:
            variables["tools"] = request.tools
        try:
            check = partial(self._check_size, name="messages")
            ids = self.tokenizer.encode_chat(
                request.messages,
                check=check,
                add_generation_prompt=request.add_generation_prompt,
                **variables,
            )
        except ApiError:
            raise
        except InputError as error:
            raise ApiError(str(error), param="messages") from None
        return self._fitting(ids, "messages")

    def text(self, prompt: str | list[int], name: str = "prompt", room: int = 1) -> list[int]:
        """The ids of a prompt to be continued: as given, or those of the text after the token that
        begins texts.
        """
        if isinstance(prompt, list):
            if (most := max(prompt)) >= self.tokenizer.vocab_size:
                raise ApiError(
                    f"{name}: expected token ids below {self.tokenizer.vocab_size}, got {most}",
                    param=name,
                )
            return self._fitting(prompt, name, room)
        self._check_size(prompt, name)
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
            raise ApiError("input: expected a text that is not empty, got ''", param="input")
        return ids

    def _check_size(self, text: str, name: str) -> None:
        """Refuse a text that has more tokens than the context, without encoding all of it: for a
        megabyte that takes seconds and 300 MB.
        """
        if (size := len(text.encode())) > self.most_bytes:
            refused = f"the {self.most_bytes} bytes that the model's context of"
            refused += f" {self.context_limit} tokens can hold, got {size}"
        elif size > PLAIN * self.context_limit and self.tokenizer.is_longer(
            text, self.context_limit
        ):
            refused = f"the {self.context_limit} tokens of the model's context, got more"
        else:
            return
        raise ApiError(
            f"{name}: expected at most {refused}", param=name, code="context_length_exceeded"
        )

    def _fitting(self, ids: list[int], name: str, room: int = 1) -> list[int]:
        if len(ids) + room > self.context_limit:
            raise ApiError(
                f"{name}: expected at most {self.context_limit - room} tokens of the model's"
                f" context of {self.context_limit}, got {len(ids)}",
                param=name,
                code="context_length_exceeded",
            )
        return ids

    def _check_parts(self, request: ChatCompletionRequest) -> None:
        roles = {message["role"] for message in request.messages}
        called = "tool" in roles or any(message.get("tool_calls") for message in request.messages)
        has = {
            "tools": request.tools is not None,
            "a system message": "system" in roles,
            "tool calls": called,
        }
        for part, given in has.items():
            if given and (why := self.why_not(part)):
                param = "tools" if part == "tools" else "messages"
                raise ApiError(
                    f"{param}: expected none with {part}: the model's chat template does not write"
                    f" that: {why}",
                    param=param,
                )
        form, template = request.form, self.tokenizer.chat_template or ""
        if form is not None and form.kind == "calls":
            if OPEN not in template or OPEN in self.tokenizer.special_tokens:
                what = "strict: true" if form.param == "tools" else "false"
                raise ApiError(
                    f"{form.param}: expected {what} with tool_choice 'required' or a named"
                    f" function, got 'auto': this model does not write calls as {OPEN}, the one"
                    " form that can be kept to a schema inside free text",
                    param=form.param,
                )

    def _why_not(self, part: str) -> str | None:
        """Why the template drops this part of a conversation, None if it writes it."""
        messages, tools = PARTS[part]
        variables = {} if tools is None else {"tools": tools}
        try:
            self.tokenizer.check_written(messages, variables, None)
        except InputError as error:
            return str(error)
        return None
