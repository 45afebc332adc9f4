"""Encode the prompts of requests into token ids, and check that they fit the model's context."""

from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.inference.output_format import OPEN, OutputFormat
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
# Bytes per token of prose: a text with at most this many bytes per token of context is encoded
# without a check of its length first
BYTES_PER_TOKEN = 4
USER: Message = {"role": "user", "content": "Hello"}
ANSWER: Message = {"role": "assistant", "content": "Yes"}
CALL_MESSAGE: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
# parts of a conversation that a chat template may leave out, each with a conversation to test it
PARTS: dict[str, tuple[list[Message], list[Any] | None]] = {
    "tools": ([USER], [TOOL]),
    "a system message": ([{"role": "system", "content": "Be kind"}, USER], None),
    "tool calls": ([USER, CALL_MESSAGE, {"role": "tool", "content": "7"}, ANSWER, USER], [TOOL]),
}


class PromptEncoder:
    """Encodes prompts with a tokenizer. Any thread may call its methods."""

    def __init__(self, tokenizer: "Tokenizer", context_limit: int):
        self.tokenizer, self.context_limit = tokenizer, context_limit
        self.unsupported_reason = cache(self._unsupported_reason)
        longest = max(len(tokenizer.token_bytes(id)) for id in range(tokenizer.vocab_size))
        self.max_bytes = context_limit * longest

    def encode_chat(self, request: ChatCompletionRequest) -> tuple[list[int], OutputFormat | None]:
        """Encode a conversation with the chat template. Return its ids and the format of the
        answer: that of the request, or that of `fastlm.serve.generic_tools`.

        ApiError: the model has no template, the template refuses the messages or leaves a part of
        them out, or the context has no tokens left for an answer.
        """
        if self.tokenizer.chat_template is None:
            hint = "this one has none (/v1/completions continues text)"
            raise field_error("messages", f"expected a model with a chat template, {hint}")
        messages, tools, output_format = with_generic_tools(request, self.unsupported_reason)
        self._check_parts(messages, tools, output_format)
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
        return self._check_length(ids, "messages"), output_format

    def encode_text(
        self, prompt: str | list[int], name: str = "prompt", min_new_tokens: int = 1
    ) -> list[int]:
        """Return the ids of a prompt to continue: the ids of the request, or the BOS token and
        those of the text. ApiError: the context has fewer than ``min_new_tokens`` tokens left.
        """
        if isinstance(prompt, list):
            if (largest := max(prompt)) >= (vocab := self.tokenizer.vocab_size):
                raise field_error(name, f"expected token ids below {vocab}, got {largest}")
            return self._check_length(prompt, name, min_new_tokens)
        self._check_size(name, prompt)
        try:
            ids = self.tokenizer.encode(prompt)
        except InputError as error:
            raise ApiError(str(error), param=name) from None
        start = () if self.tokenizer.bos_id is None else (self.tokenizer.bos_id,)
        return self._check_length([*start, *ids], name, min_new_tokens)

    def encode_for_embedding(self, text: str | list[int]) -> list[int]:
        """Return the ids of a text for an embedding; for an empty text, its BOS or EOS token.
        ApiError: as `encode_text`, or the text is empty and there is no such token.
        """
        ids = self.encode_text(text, "input", min_new_tokens=0) if text else []
        special = (self.tokenizer.bos_id, self.tokenizer.eos_id)
        ids = ids or [token for token in special if token is not None][:1]
        if not ids:
            raise field_error("input", "expected a text that is not empty, got ''")
        return ids

    def _check_size(self, name: str, text: str) -> None:
        """Refuse a text with more tokens than the context, without encoding all of it: a megabyte
        takes seconds and 300 MB.
        """
        limit, size = self.context_limit, len(text.encode())
        if size > self.max_bytes:
            bound = f"the model's context of {limit} tokens can hold, got {size}"
            raise _too_long(name, f"the {self.max_bytes} bytes that {bound}")
        if size > BYTES_PER_TOKEN * limit and self.tokenizer.is_longer(text, limit):
            counts = "/tokenize counts those of a prompt"
            bound = f"the {limit} tokens of the model's context"
            raise _too_long(name, f"{bound}, got more, which are not counted ({counts})")

    def _check_length(self, ids: list[int], name: str, min_new_tokens: int = 1) -> list[int]:
        limit = self.context_limit
        if len(ids) + min_new_tokens > limit:
            context = f"tokens of the model's context of {limit}"
            raise _too_long(name, f"{limit - min_new_tokens} {context}, got {len(ids)}")
        return ids

    def _check_parts(
        self, messages: list[Message], tools: list[Any] | None, output_format: OutputFormat | None
    ) -> None:
        roles = {message["role"] for message in messages}
        has_calls = any(message.get("tool_calls") for message in messages) or "tool" in roles
        has_parts = (tools is not None, "system" in roles, has_calls)
        for part, has_part in zip(PARTS, has_parts, strict=True):
            if has_part and (reason := self.unsupported_reason(part)):
                reason = f"the model's chat template does not write that: {reason}"
                param = "tools" if part == "tools" else "messages"
                raise field_error(param, f"expected none with {part}: {reason}")
        template = self.tokenizer.chat_template or ""
        if output_format is None or output_format.kind != "calls":
            return
        if OPEN not in template or OPEN in self.tokenizer.special_tokens:
            value = "strict: true" if output_format.param == "tools" else "false"
            raise field_error(
                output_format.param,
                f"expected {value} with tool_choice 'required' or a named function, got 'auto':"
                f" this model does not write calls as {OPEN}, the only format that a grammar can"
                " constrain inside free text",
            )

    def _unsupported_reason(self, part: str) -> str | None:
        """Return why the template drops this part of a conversation; None: it writes the part."""
        messages, tools = PARTS[part]
        variables = {} if tools is None else {"tools": tools}
        try:
            self.tokenizer.check_template_is_complete(messages, variables, None)
        except InputError as error:
            return str(error)
        return None


def _too_long(name: str, bound: str) -> ApiError:
    return field_error(name, f"expected at most {bound}", "context_length_exceeded")
