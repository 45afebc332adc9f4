"""Sample completions of several turns: the policy writes, an environment answers, the policy
continues.

A turn ends with an end token or one of the environment's ``stop`` texts. What the environment
answers (the observation) is appended as tokens: a message of the chat template with the next
generation prompt, or plain text where the template has no messages of tools. The tokens before it
stay as they were sampled, and the engine has their keys and values in its prefix cache. Nothing is
learnt from observations (`fastlm.train.rollouts.sampled_mask`).

The completions of a batch take their turns together. Rejected: a completion continues as soon as it
has its observation. The engine would have full batches for longer, but it runs in this thread, and
a slow tool would stop it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastlm.data.conversations import Message
from fastlm.errors import InputError
from fastlm.inference.output_format import CLOSE, OPEN
from fastlm.inference.requests import Completion, FinishReason, Request, TokenLogprob, request_seed
from fastlm.inference.sampling import Sampling
from fastlm.model.generation import make_engine
from fastlm.train.encoding import decode_text
from fastlm.train.environments import Environment
from fastlm.train.rollouts import Episode, check_prompt_lengths

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer

TOOLS = (
    "You can call these functions, given as JSON:\n{tools}\n\n"
    f'To call one, write {OPEN}{{{{"name": NAME, "arguments": {{{{...}}}}}}}}{CLOSE}.'
)
RESPONSE = "\n<tool_response>\n{observation}\n</tool_response>\n"  # Hermes' tags
TRANSCRIPT = "\n[{role}] {observation}\n[assistant] "  # of an observation


@dataclass
class RunningEpisode:
    """An `Episode` while it is sampled. ``finish_reason`` is None while it continues."""

    prompt: Sequence[int]
    environment: Environment
    seed: int
    location: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    observation_indices: list[int] = field(default_factory=list)
    text: str = ""
    transcript: str = ""
    finish_reason: FinishReason | None = None

    def add_observation(self, ids: Sequence[int], text: str) -> None:
        self.transcript += text
        start = len(self.token_ids)
        self.token_ids += ids
        self.observation_indices += range(start, len(self.token_ids))


class EpisodeSampler:
    """Samples episodes in environments of one class.

    ``identity`` identifies the class. ``date``: see `Tokenizer.encode_chat`. InputError: the chat
    template or the tokenizer cannot write what the environment needs.
    """

    def __init__(
        self,
        environment: type[Environment],
        identity: str,
        tokenizer: "Tokenizer",
        date: str | None = None,
    ):
        self.environment, self.identity = environment, identity
        self.tokenizer, self.date = tokenizer, date
        for text in environment.stop:
            if text in tokenizer.special_tokens:
                raise InputError(
                    f"environment: expected a tokenizer that writes {text} as text, got one in"
                    " which it is a special token"
                )
        self._call("environment", environment)  # raises InputError if this machine cannot run it
        try:
            tokenizer.encode_reply({"role": environment.role, "content": "a"}, date=date)
            self.has_role = True
        except InputError as error:
            if environment.role != "tool":
                raise InputError(f"environment: {error}") from None
            self.has_role = False

    def prompt(self, row: "Prompt") -> tuple[list[Message], list[Any] | None]:
        """Return the messages of the prompt, and the tools for the chat template. A template that
        does not write tools gets them as text of the first message.
        """
        messages = self._reset(row)[1] or row.messages
        tools = self.environment.tools
        if not tools:
            return messages, row.tools
        if self._writes([*messages, {"role": "assistant", "content": "a"}], {"tools": tools}):
            return messages, tools
        text = TOOLS.format(tools=json.dumps([tool["function"] for tool in tools]))
        first, *rest = messages
        system = [{"role": "system", "content": text}, *messages]
        if first["role"] != "system" and self._writes(system, {}):
            return system, None
        return [{**first, "content": f"{text}\n\n{first['content']}"}, *rest], None

    def _writes(self, messages: list[Message], variables: dict[str, Any]) -> bool:
        try:
            self.tokenizer.check_template_is_complete(messages, variables, self.date)
        except InputError:
            return False
        return True

    def _reset(self, row: "Prompt") -> tuple[Environment, list[Message] | None]:
        environment = self._call(row.location, self.environment)
        return environment, self._call(row.location, environment.reset, row.row)

    def _call(self, location: str, method: Any, *args: Any) -> Any:
        try:
            return method(*args)
        except InputError as error:
            raise InputError(f"{location}: {error}") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"{location}: the environment failed: {reason}") from None

    def sample(
        self,
        model: "CausalLM",
        prompts: Sequence[Sequence[int]],
        rows: "Sequence[Prompt]",
        *,
        max_turns: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        seed: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        max_num_seqs: int = 64,
        on_piece: Callable[..., Any] | None = None,
    ) -> list[Episode]:
        """Sample an episode of every prompt, as `fastlm.train.rollouts.sample_completions` samples
        completions: the first turn has the same seed and tokens.

        ``max_new_tokens`` limits a completion with its observations. A completion ends as "stop" if
        its environment ends it, and as "length" after ``max_turns`` turns, or where an observation
        leaves no token for another turn; such an observation is dropped. So the last token is
        always a sampled one. Ids that only a padded model has are not sampled.
        """
        check_prompt_lengths(model, prompts, max_new_tokens)
        if not prompts:
            return []
        episodes = [
            RunningEpisode(prompt, self._reset(row)[0], (seed + i) % 2**63, row.location)
            for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        end_ids = stop_ids | model.config.stop_ids | self.tokenizer.stop_ids
        engine = None
        for turn in range(max_turns):
            running = [episode for episode in episodes if episode.finish_reason is None]
            requests = [
                Request(
                    [*episode.prompt, *episode.token_ids],
                    max_new_tokens - len(episode.token_ids), Sampling(temperature),
                    seed=request_seed(episode.seed, f"turn {turn}") if turn else episode.seed,
                    stop=self.environment.stop, stop_ids=stop_ids, logprobs=0,
                )
                for episode in running
            ]  # fmt: skip
            if not running:
                break
            if engine is None:  # its blocks are for complete episodes
                engine = make_engine(model, requests, self.tokenizer, max_num_seqs=max_num_seqs)
            completions = engine.generate(requests, on_piece=on_piece)
            for episode, completion in zip(running, completions, strict=True):
                if completion.error:
                    raise RuntimeError(completion.error)
                self._add_turn(episode, completion, end_ids, max_new_tokens, turn + 1 < max_turns)
        return [
            Episode(
                episode.token_ids, episode.text, episode.logprobs,
                episode.finish_reason or "length", prompt_tokens=len(episode.prompt),
                observation_indices=episode.observation_indices,
                reward=self._call(episode.location, episode.environment.reward),
                transcript=episode.transcript,
            )
            for episode in episodes
        ]  # fmt: skip

    def _add_turn(
        self,
        episode: RunningEpisode,
        completion: Completion,
        end_ids: frozenset[int],
        max_new_tokens: int,
        can_continue: bool,
    ) -> None:
        ids = completion.token_ids
        episode.token_ids += ids
        episode.logprobs += completion.logprobs
        has_end = ids[-1] in end_ids
        episode.text = decode_text(self.tokenizer, ids[:-1] if has_end else ids)
        episode.transcript += episode.text
        if not completion.is_stopped:
            episode.finish_reason = "length"
            return
        observation = self._call(episode.location, episode.environment.step, episode.text)
        if observation is None:
            episode.finish_reason = "stop"
            return
        if not isinstance(observation, str):
            raise InputError(
                f"{episode.location}: expected a text or None as observation,"
                f" got {type(observation).__name__}"
            )
        observation_ids = self._encode(observation, has_end)
        if not can_continue or len(episode.token_ids) + len(observation_ids) >= max_new_tokens:
            episode.finish_reason = "length"
            return
        text = TRANSCRIPT.format(role=self.environment.role, observation=observation)
        episode.add_observation(observation_ids, text)

    def _encode(self, observation: str, has_end: bool) -> list[int]:
        """Return the ids of an observation. ``has_end``: the turn before it has its end token."""
        text = observation.encode(errors="replace").decode()
        if not self.has_role:
            return self.tokenizer.encode(RESPONSE.format(observation=text))
        message = {"role": self.environment.role, "content": text}
        return self.tokenizer.encode_reply(message, date=self.date)[int(has_end) :]
