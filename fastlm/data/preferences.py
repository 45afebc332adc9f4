"""Read preferences: which of several answers to a prompt is better, or whether an answer is good.

Rows come from the same sources as conversations (`fastlm.data.conversations`). The format is
recognised by a row's keys:

- pairs: ``{"prompt", "chosen", "rejected", "margin"?, "score_chosen"?, "score_rejected"?}`` (TRL,
  UltraFeedback). Instead of a prompt, chosen and rejected may be full conversations with a common
  beginning: lists of messages, or texts with ``Human:`` and ``Assistant:`` turns (HH-RLHF). Also
  ``{"chosen_messages", "rejected_messages"}`` (LLaMA-Factory), and OpenAI's ``{"input":
  {"messages"}, "preferred_output", "non_preferred_output"}``;
- ranked lists: ``{"prompt", "answers", "ranks"}``, rank 0 is the best and ties are allowed; or
  ``"scores"``, higher is better;
- corrections: ``{"prompt", "answer", "corrected"}``;
- labels: ``{"prompt", "completion", "label"}`` (TRL, KTO), or ``{"messages", "label"}`` with the
  labelled answer as the last message.

A prompt has one of the formats of `fastlm.data.prompts`. An answer is a text, a message or a list
of messages. Each row may have ``"system"``, ``"tools"`` and ``"rater"``.

Rejected: to cut texts without a prompt at their first difference, as TRL does. A row that lacks its
prompt would become a question of a few words.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, permutations, takewhile
from typing import Any

from fastlm.data.conversations import (
    Conversation,
    LocatedMessages,
    Message,
    add_system,
    check_messages,
    check_text,
    describe_keys,
    message_contents,
    parse_messages,
    parse_tools,
    read_examples,
)
from fastlm.data.prompts import parse_dialogue, parse_prompt_messages, strip_locations
from fastlm.errors import InputError, show

ROW_FORMATS = (
    "chosen and rejected, prompt with answers and ranks or scores, prompt with completion and"
    " label, or prompt with answer and corrected"
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two or more answers to a prompt, and their order.

    ``prompt``: messages, the last one a user's or a tool's. ``answers``: the messages that follow,
    each from the assistant's first to its last. ``ranks``: per answer, 0 is the best. Equal answers
    share a rank, no rank is skipped, and there are at least two. ``scores``: per answer, higher is
    better, or None. ``margin``: of two answers, how much better the better one is (>= 0).
    ``corrected``: the best answer is a person's correction of the other. ``location``: file and
    line, for error messages.
    """

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    ranks: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    margin: float | None = None
    tools: list[Any] | None = None
    rater: str | None = None
    corrected: bool = False
    location: str = ""

    def pairs(self) -> "list[Comparison]":
        """Return every pair of answers with different ranks, the better one first. The margin is
        the difference of the scores, if there are some.
        """
        if len(self.answers) == 2 and self.ranks == (0, 1):
            return [self]
        order = sorted(range(len(self.ranks)), key=self.ranks.__getitem__)
        pairs = combinations(order, 2)
        return [self._pair(a, b) for a, b in pairs if self.ranks[a] < self.ranks[b]]

    def _pair(self, better: int, worse: int) -> "Comparison":
        scores, margin = None, self.margin
        if self.scores is not None:
            scores = (self.scores[better], self.scores[worse])
            margin = scores[0] - scores[1] if margin is None else margin
        answers = (self.answers[better], self.answers[worse])
        return replace(self, answers=answers, ranks=(0, 1), scores=scores, margin=margin)

    def labels(self) -> "list[UnpairedPreference]":
        """Return the best answers as desirable and the worst as not. Those between are left out: a
        middle rank does not say whether an answer is good.
        """
        worst = max(self.ranks)
        return [
            UnpairedPreference(
                self.prompt, answer, rank == 0, self.tools, self.rater, self.location
            )
            for answer, rank in zip(self.answers, self.ranks)
            if rank in (0, worst)
        ]

    def conversation(self, answer: int) -> Conversation:
        """Return prompt and answer; the model is trained on the answer."""
        return _conversation(self.prompt, self.answers[answer], self.tools, self.location)

    def demonstration(self) -> Conversation:
        """Return prompt and best answer (the first of equals), for supervised fine-tuning."""
        return self.conversation(self.ranks.index(0))

    def to_row(self) -> dict[str, Any]:
        """Return this comparison as a row that `parse_preference` reads: a pair in TRL's
        conversational form, a ranked list, or a correction.
        """
        row: dict[str, Any] = {"prompt": self.prompt}
        if self.corrected:
            (best,) = self.pairs()
            row |= {"answer": best.answers[1], "corrected": best.answers[0]}
        elif len(self.answers) == 2:
            (pair,) = self.pairs()
            row |= {"chosen": pair.answers[0], "rejected": pair.answers[1]}
            if pair.scores is not None:
                row |= {"score_chosen": pair.scores[0], "score_rejected": pair.scores[1]}
            if pair.margin is not None:
                row["margin"] = pair.margin
        else:
            row |= {"answers": list(self.answers), "ranks": list(self.ranks)}
            if self.scores is not None:
                row["scores"] = list(self.scores)
        return {**row, **_optional_fields(self)}


@dataclass(frozen=True, slots=True)
class UnpairedPreference:
    """An answer to a prompt, and whether it is desirable (KTO). ``prompt`` and ``answer`` as in
    `Comparison`.
    """

    prompt: list[Message]
    answer: list[Message]
    desirable: bool
    tools: list[Any] | None = None
    rater: str | None = None
    location: str = ""

    def conversation(self) -> Conversation:
        """Return prompt and answer; the model is trained on the answer."""
        return _conversation(self.prompt, self.answer, self.tools, self.location)

    def to_row(self) -> dict[str, Any]:
        """Return this answer as a row in TRL's conversational form, for `parse_preference`."""
        row = {"prompt": self.prompt, "completion": self.answer, "label": self.desirable}
        return {**row, **_optional_fields(self)}


@dataclass(frozen=True, slots=True)
class UnrankedAnswers:
    """A prompt and answers without a ranking; fields as in `Comparison`."""

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    tools: list[Any] | None = None
    location: str = ""


def parse_preference(row: Any, location: str = "") -> Comparison | UnpairedPreference:
    """Parse a row of one of the formats of `ROW_FORMATS`.

    InputError: the row has another format, an empty message, roles out of order, different prompts,
    equal answers with different ranks, answers that are all tied, ranks that are not whole numbers
    from 0, scores or a margin that are not finite.
    """
    row = _present_fields(row)
    if "chosen_messages" in row and "rejected_messages" in row:
        row |= {"chosen": row["chosen_messages"], "rejected": row["rejected_messages"]}
    elif "preferred_output" in row and "non_preferred_output" in row:
        row = _from_openai(row)
    pairs = (("chosen", "rejected"), ("corrected", "answer"))
    pair = next((names for names in pairs if all(name in row for name in names)), None)
    if pair is not None:
        prompt, answers = _prompt_and_answers(row, {name: row[name] for name in pair})
        ranks, scores = (0, 1), _pair_scores(row) if "chosen" in pair else None
    elif "label" in row or "kto_tag" in row:
        return _parse_label(row, location)
    elif _answers_key(row) and ("ranks" in row or "scores" in row):
        prompt, answers = _parse_answer_list(row)
        ranks, scores = _ranks_and_scores(row, answers)
    else:
        raise _unknown_format(row)
    if len(set(ranks)) < 2:
        raise InputError("ranks: expected a better and a worse answer, all are tied")
    for i, j in _equal_pairs(answers):
        if ranks[i] != ranks[j]:
            names = " and ".join(pair) if pair else f"answers {i} and {j}"
            raise InputError(f"expected different answers, {names} are equal")
    margin = None
    if len(answers) == 2:
        if "margin" in row:
            if (margin := _parse_number(row["margin"], "margin")) < 0:
                raise InputError(f"margin: expected a number >= 0, got {margin}")
        elif scores is not None:
            margin = abs(scores[0] - scores[1])
    corrected = pair is not None and "corrected" in pair
    return Comparison(
        prompt,
        tuple(answers),
        ranks,
        scores,
        margin,
        parse_tools(row),
        _parse_rater(row),
        corrected,
        location,
    )


def parse_answers(
    row: Any, location: str = ""
) -> "Comparison | UnpairedPreference | UnrankedAnswers":
    """Parse a row as `parse_preference` does, or a row ``{"prompt", "answers"}`` without ranks.
    InputError: also two equal answers of such a row.
    """
    values = _present_fields(row)
    ranked = ("ranks", "scores", "chosen", "corrected", "label", "kto_tag")
    if not _answers_key(values) or any(key in values for key in ranked):
        return parse_preference(row, location)
    prompt, answers = _parse_answer_list(values)
    for first, second in _equal_pairs(answers):
        raise InputError(f"expected different answers, answers {first} and {second} are equal")
    return UnrankedAnswers(prompt, tuple(answers), parse_tools(values), location)


def _present_fields(row: Any) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise InputError(f"expected an object with {ROW_FORMATS}, got {type(row).__name__}")
    return {key: value for key, value in row.items() if value is not None}


def _unknown_format(row: Mapping[str, Any]) -> InputError:
    return InputError(f"expected an object with {ROW_FORMATS}, got {describe_keys(row)}")


def _from_openai(row: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the fields of OpenAI's preference fine-tuning to TRL's."""
    source = row.get("input")
    if not isinstance(source, Mapping) or "messages" not in source:
        raise InputError(f"input: expected an object with messages, got {show(source):.60}")
    tools = {"tools": source["tools"]} if source.get("tools") else {}
    answers = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    return {**tools, **row, "prompt": source["messages"], **answers}


def _pair_scores(row: Mapping[str, Any]) -> tuple[float, float] | None:
    if "score_chosen" not in row or "score_rejected" not in row:
        return None
    better, worse = (_parse_number(row[key], key) for key in ("score_chosen", "score_rejected"))
    if better < worse:
        raise InputError(f"score_chosen: expected at least score_rejected {worse}, got {better}")
    return better, worse


def _ranks_and_scores(
    row: Mapping[str, Any], answers: list[Any]
) -> tuple[tuple[int, ...], tuple[float, ...] | None]:
    """Return ranks without gaps, and the scores or None."""
    scores, ranks = None, ()
    if "scores" in row:
        values = _enumerate_values(row["scores"], "scores", answers)
        scores = tuple(_parse_number(value, f"scores[{i}]") for i, value in values)
        ranks = tuple(-score for score in scores)
    if "ranks" in row:
        ranks = _parse_ranks(row["ranks"], answers)
        for (better, a), (worse, b) in permutations(zip(ranks, scores or ()), 2):
            if better < worse and a < b:
                raise InputError(
                    f"scores: expected the order of the ranks, got {b} at rank {worse} and {a} at"
                    f" rank {better}"
                )
    distinct = sorted(set(ranks))
    return tuple(distinct.index(rank) for rank in ranks), scores


def _parse_ranks(values: Any, answers: list[Any]) -> tuple[int, ...]:
    for i, rank in _enumerate_values(values, "ranks", answers):
        if type(rank) is not int or not 0 <= rank < len(answers):
            raise InputError(
                f"ranks[{i}]: expected a whole number from 0 to {len(answers) - 1},"
                f" got {show(rank):.60}"
            )
    if 0 not in values:
        raise InputError(f"ranks: expected 0 for the best answer, got {min(values)} as the lowest")
    return tuple(values)


def _enumerate_values(values: Any, name: str, answers: list[Any]) -> Iterator[tuple[int, Any]]:
    if not isinstance(values, list) or len(values) != len(answers):
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise InputError(f"{name}: expected one for each of {len(answers)} answers, got {got}")
    yield from enumerate(values)


def _parse_number(value: Any, location: str) -> float:
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond float64
        pass
    raise InputError(f"{location}: expected a finite number, got {show(value):.60}")


def _parse_label(row: Mapping[str, Any], location: str) -> UnpairedPreference:
    key = "label" if "label" in row else "kto_tag"
    if not isinstance(row[key], bool):
        raise InputError(f"{key}: expected true or false, got {show(row[key]):.60}")
    name = next((n for n in ("completion", "response", "answer", "output") if n in row), None)
    if name is not None:
        prompt, (answer,) = _prompt_and_answers(row, {name: row[name]})
    else:
        messages = parse_prompt_messages(row)
        if messages is None:
            raise _unknown_format(row)
        add_system(row, messages)
        check_messages(messages)
        (*prompt, last) = strip_locations(messages)
        answer = [last]
    return UnpairedPreference(
        prompt, answer, row[key], parse_tools(row), _parse_rater(row), location
    )


def _answers_key(row: Mapping[str, Any]) -> str | None:
    return next((key for key in ("answers", "responses", "completions") if key in row), None)


def _parse_answer_list(row: Mapping[str, Any]) -> tuple[list[Message], list[list[Message]]]:
    key = _answers_key(row)
    values = row[key] if key else None
    if not isinstance(values, list) or len(values) < 2:
        got = len(values) if isinstance(values, list) else type(values).__name__
        raise InputError(f"{key}: expected a list of two or more answers, got {got}")
    return _prompt_and_answers(row, {f"{key}[{i}]": answer for i, answer in enumerate(values)})


def _prompt_and_answers(
    row: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[list[Message], list[list[Message]]]:
    """Return the prompt of a row and its answers. ``values``: field name -> answer.

    Answers that are full conversations are cut after their common beginning, which must begin with
    the prompt if there is one.
    """
    prompt = parse_prompt_messages(row)
    answers = {name: _parse_answer(value, name, prompt is None) for name, value in values.items()}
    conversations = [
        name for name, answer in answers.items() if answer[0][1]["role"] in ("system", "user")
    ]
    if len(conversations) == len(answers) and len(answers) > 1:
        columns = zip(*map(_contents, answers.values()))
        length = len(
            list(takewhile(lambda column: column.count(column[0]) == len(column), columns))
        )
        common = next(iter(answers.values()))[:length]
        if prompt is not None and not _begins_with(common, prompt):
            raise InputError(
                f"prompt: expected the beginning of {' and '.join(answers)}, got another one"
            )
        prompt, answers = common, {name: answer[length:] for name, answer in answers.items()}
    elif conversations:
        raise InputError(
            f"{conversations[0]}: expected an answer by the assistant, got a conversation"
        )
    elif prompt is None:
        raise InputError(
            f"expected a prompt in addition to {' and '.join(answers)}, got {describe_keys(row)}"
        )
    add_system(row, prompt)
    for name, answer in answers.items():
        if not answer:
            raise InputError(f"{name}: expected an answer that differs from the others, got none")
        check_messages([*prompt, *answer])
        for location, message in answer:
            if message["role"] not in ("assistant", "tool"):
                raise InputError(
                    f"{location}: expected one prompt for all answers, got a {message['role']}'s "
                    "message"
                    " after they differ"
                )
    return strip_locations(prompt), [strip_locations(answer) for answer in answers.values()]


def _parse_answer(value: Any, name: str, needs_prompt: bool) -> LocatedMessages:
    """Parse an answer or a conversation. ``needs_prompt``: there is no prompt, so a text must have
    it.
    """
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        if not value:
            raise InputError(f"{name}: expected an answer, got no message")
        return parse_messages(value, name)
    text = check_text(value, name)
    if needs_prompt and (messages := parse_dialogue(text, name)):
        return messages
    return [(name, {"role": "assistant", "content": text})]


def _contents(messages: LocatedMessages) -> list[list[Any]]:
    return message_contents([message for _, message in messages])


def _begins_with(messages: LocatedMessages, beginning: LocatedMessages) -> bool:
    """Return True if messages begin with others; one of the two may lack the system message."""
    a, b = _contents(messages), _contents(beginning)
    if a[:1] != b[:1]:
        a, b = ([m for m in x if m[0] != "system"] for x in (a, b))
    return a[: len(b)] == b


def _equal_pairs(answers: Sequence[list[Message]]) -> Iterator[tuple[int, int]]:
    """Yield (i, j), i < j, of equal answers."""
    contents = [message_contents(answer) for answer in answers]
    for j, content in enumerate(contents):
        if (i := contents.index(content)) < j:
            yield i, j


def _parse_rater(row: Mapping[str, Any]) -> str | None:
    return check_text(row.get("rater"), "rater") or None


def _optional_fields(example: Comparison | UnpairedPreference) -> dict[str, Any]:
    fields = {"tools": example.tools, "rater": example.rater}
    return {key: value for key, value in fields.items() if value is not None}


def _conversation(
    prompt: list[Message], answer: list[Message], tools: list[Any] | None, location: str
) -> Conversation:
    loss_mask = [False] * len(prompt) + [m["role"] == "assistant" for m in answer]
    return Conversation([*prompt, *answer], loss_mask, location, tools)


read_preferences = partial(read_examples, parse=parse_preference)
