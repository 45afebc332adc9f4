"""Answers of a model to be ranked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.preferences import Unranked
from fastlm.data.prompts import Prompt, read_prompts
from fastlm.errors import InputError
from fastlm.progress import Track, silent
from fastlm.serve.ranking import Added, RankingStore
from fastlm.sources.rows import ignore

if TYPE_CHECKING:
    from fastlm.serve.chat import Writer


def sample_answers(
    where: str | Path,
    model: str | Path,
    prompts: Sequence[str],
    *,
    k: int,
    cache: Path,
    temperature: float = 1.0,
    top_p: float | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    skip_bad: bool = False,
    track: Track = silent,
    tell: Callable[[str], None] = ignore,
) -> Added:
    """Sample ``k`` answers of ``model`` to each prompt of the sources ``prompts``
    (`fastlm.data.prompts.prompt_of`) and add them to the store at ``where``, one transaction
    per prompt.

    Row i of prompt p draws with seed ``seed + p k + i``. A prompt that the store has
    already is not sampled again. Equal and empty answers are left out, and a prompt with fewer than
    two is counted as alike.
    """
    from fastlm.serve.chat import Writer

    rows = list(read_prompts(prompts, cache=cache, skip_bad=skip_bad, tell=tell))
    writer, added = Writer(model), Added()
    with RankingStore(where) as store:
        for number, row in enumerate(track(rows, "sampling", unit="prompts")):
            if store.has_prompt(row.messages, row.tools):
                added.known += 1
                continue
            try:
                answers = writer.write(
                    [_ids(writer, row)] * k, max_new_tokens=max_new_tokens,
                    seed=seed + number * k, temperature=temperature, top_p=top_p,
                )  # fmt: skip
            except InputError as error:
                raise InputError(f"{row.place}: {error}") from None
            texts = dict.fromkeys(answer.text for answer in answers if answer.text.strip())
            if len(texts) < 2:
                added.alike += 1
                continue
            messages = tuple([{"role": "assistant", "content": text}] for text in texts)
            store.add_items([Unranked(row.messages, messages, row.tools)], Path(model).name)
            added.items += 1
    return added


def _ids(writer: "Writer", row: Prompt) -> list[int]:
    if writer.tokenizer.chat_template is not None:
        variables: dict[str, Any] = {} if row.tools is None else {"tools": row.tools}
        return writer.tokenizer.encode_chat(row.messages, **variables)
    if len(row.messages) > 1:
        raise InputError("model: wanted a chat template for a prompt of several messages, has none")
    return writer.prompt_ids(row.messages[0]["content"], raw=True)
