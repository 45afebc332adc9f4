"""A request for answers from its prompt to its end, which becomes measures."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastlm.serve.monitor import features, judges
from fastlm.serve.monitor.recorder import Measure, Recorder
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest, GenerationRequest

if TYPE_CHECKING:
    from fastlm.serve.answers import Answer

MOST_NAME = 256  # characters of a model's name


@dataclass
class RequestTrace:
    """A ``request`` to ``model``: prompts of so many ``lengths`` tokens, answered under
    ``id``. ``answer``: once the engine has it.
    """

    recorder: Recorder
    request: GenerationRequest
    model: str
    id: str
    lengths: Sequence[int]
    answer: "Answer | None" = None

    def end(self, status: int) -> None:
        """Pass the measures on; at once. ``status``: of the response; 499: the client went away.

        A response of 200 has one measure per choice, another has one.
        """
        common: dict[str, Any] = {
            "response_id": self.id, "model": self.model[:MOST_NAME], "at": time.time(),
            "status": status, "choice": 0,
        }  # fmt: skip
        if isinstance(self.request, ChatCompletionRequest) and self.request.store:
            common["conversation_id"] = self.request.conversation_id
        if status != 200 or self.answer is None:
            self.recorder.put(Measure(common | {"prompt_tokens": sum(self.lengths)}))
            return
        request = self.request
        turns = len(request.messages) if isinstance(request, ChatCompletionRequest) else 1
        for index, choice in enumerate(self.answer.choices):
            times, prompt = self.answer.running.times[index], index // self.request.n
            values = common | {
                "choice": index, "finish_reason": choice.finish_reason,
                "queue_seconds": times.queue, "first_token_seconds": times.first,
                "seconds": times.whole, "prompt_tokens": self.lengths[prompt],
                "new_tokens": choice.tokens,
            }  # fmt: skip
            # of several choices, the first stands for the prompt
            text = self._prompt(prompt) if index % self.request.n == 0 else None
            answer = choice.text[: judges.MOST_CHARACTERS]
            self.recorder.put(Measure(values, text, turns, answer))

    def _prompt(self, index: int) -> str | None:
        """The last message of the user, or the text; None where it is tokens."""
        found: Any = None
        if isinstance(self.request, ChatCompletionRequest):
            users = (m for m in reversed(self.request.messages) if m["role"] == "user")
            found = next(users, {}).get("content")
        elif isinstance(self.request, CompletionRequest):
            found = self.request.prompts[index]
        if isinstance(found, list):  # a message's parts
            parts = [part["text"] for part in found if isinstance(part, dict)]
            found = "".join(parts) if parts else None
        return found[: features.MOST_CHARACTERS] if isinstance(found, str) else None
