"""Turn feedback about answers into rows to train on, through the steps that web text goes through:
consent, scrubbing, quality rules, decontamination, raters, duplicates, a split.

The unit of all counts is a feedback item: a thumb, a pick, a correction. Every step counts what it
removed and why, in a `fastlm.pipeline.funnel.Funnel` like that of prepared text. The same items
give the same bytes.

The split is by the opening of a conversation, into three parts: rows that models learn from, rows
that only a judge of answers learns from, and prompts that are never trained on, which the old and
the new model answer. A later turn contains the earlier ones, so all turns are in the same part.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.conversations import parse_conversation
from fastlm.data.filter import check_rules, first_failed
from fastlm.data.forget_log import PROVENANCE
from fastlm.data.personal import DEFAULT_KINDS, Placeholders
from fastlm.data.preferences import Comparison, UnpairedPreference, parse_preference
from fastlm.errors import InputError
from fastlm.feedback.feedback_items import (
    ANONYMOUS,
    FeedbackItem,
    read_feedback_items,
    withdrawn_keys,
)
from fastlm.feedback.rater_weights import RaterWeight, estimate_rater_weights, key_of
from fastlm.files import atomic_file, make_folder, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel, StepCounts
from fastlm.serve.commands import needs_serve
from fastlm.sources.source_files import printable

if TYPE_CHECKING:
    from fastlm.feedback.overlap import Overlap

FORMS = ("sft", "preferences", "kto", "prompts")
TRAIN, JUDGE, TEST = "train", "judge", "test"
PARTS = (TRAIN, JUDGE, TEST)
RATERS = "raters.json"
# Those of `fastlm.data.filter` that suit an answer of one line
RULES = ("symbol_ratio", "ellipsis_lines", "repeated_characters", "lorem_ipsum")


@dataclass(frozen=True)
class BuildOptions:
    """The options of `build`."""

    judge: Annotated[float, "Use this share of the prompts only to train judges"] = 0.2
    test: Annotated[float, "Hold out this share of the prompts, which is never trained on"] = 0.1
    scrub: Annotated[bool, "Replace addresses, telephone, card and account numbers, and keys"] = (
        True
    )
    rules: Annotated[tuple[str, ...], "Apply these quality rules to good answers"] = RULES
    ngram: Annotated[int, "Find evaluation questions by n-grams of this many words"] = 8
    min_rater_weight: Annotated[
        float, "Leave out raters with a lower weight, 0 to 1; 0 gives all raters the weight 1"
    ] = 0.25
    max_rater_share: Annotated[
        float, "Limit one rater to this share of all feedback, or to twice the mean rater's"
    ] = 0.05
    licence: Annotated[str, "Write this licence into the rows; a row with a licence keeps it"] = (
        "LicenseRef-user-consent"
    )

    def check(self) -> None:
        """Check the values. InputError names the option."""
        check_rules(self.rules)
        for name in ("judge", "test"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: expected a share in [0, 1), got {getattr(self, name)}")
        if self.judge + self.test >= 1:
            raise InputError(
                f"judge: expected less than 1 together with test, got {self.judge} + {self.test}"
            )
        if not 0 <= self.min_rater_weight <= 1:
            raise InputError(f"min_rater_weight: expected 0 to 1, got {self.min_rater_weight}")
        if not 0 < self.max_rater_share <= 1:
            raise InputError(
                f"max_rater_share: expected above 0, at most 1, got {self.max_rater_share}"
            )
        if self.ngram < 1:
            raise InputError(f"ngram: expected 1 or more, got {self.ngram}")


@dataclass
class BuildResult:
    """The result of `build`. ``rows``: part -> form -> rows written. ``raters``: by name."""

    funnel: Funnel = field(default_factory=lambda: Funnel(unit="feedback items"))
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    raters: dict[str, RaterWeight] = field(default_factory=dict)


def build(
    databases: Sequence[str],
    out: Path,
    *,
    options: BuildOptions,
    questions: "Overlap | None" = None,
    forgotten: Collection[str] = frozenset(),
    cache: Path,
) -> BuildResult:
    """Write the rows of ``databases`` (`read_feedback_items`) below ``out``: in each of train,
    judge and test the files sft.jsonl, preferences.jsonl, kto.jsonl and prompts.jsonl; raters.json;
    and, last, funnel.json.

    Args:
        questions: an index of evaluation questions, which must not get into the rows.
        forgotten: keys of data that must not get into the rows (`fastlm.data.forget_log`), in
            addition to those of withdrawn consent that the databases have.

    InputError: a database or a row that cannot be read, nothing left to learn from.
    """
    options.check()
    result = BuildResult()
    skipped: Counter[str] = Counter()
    items = read_feedback_items(databases, cache, skipped)
    _add_step(result.funnel, "gather", items, +skipped)

    def keep(step: str, reject: Callable[[FeedbackItem], str | None]) -> None:
        """Keep the items for which ``reject`` returns no reason."""
        nonlocal items
        reasons = [reject(item) for item in items]
        items = [item for item, reason in zip(items, reasons, strict=True) if reason is None]
        _add_step(result.funnel, step, items, Counter(filter(None, reasons)))

    withdrawn = frozenset(forgotten).union(*map(withdrawn_keys, databases))
    keep("consent", lambda item: _reject_without_consent(item, withdrawn))
    keep("rows to train on", _reject_invalid)
    if options.scrub:
        replaced: Counter[str] = Counter(dict.fromkeys(DEFAULT_KINDS, 0))
        items = [_scrub(item, replaced) for item in items]
        _add_step(result.funnel, "scrub", items)["replaced"] = dict(replaced)
    keep("quality rules", lambda item: _reject_by_rules(item, options.rules))
    if questions is not None:
        keep("decontamination", lambda item: _reject_leaks(item, questions))
    result.raters = estimate_rater_weights(item.vote() for item in items)
    if not options.min_rater_weight:
        result.raters = {name: replace(r, weight=1.0) for name, r in result.raters.items()}
    keep("raters", lambda item: _reject_by_rater(item, result.raters, options))
    keep("share of one rater", _rater_limit(items, options.max_rater_share))
    keep("duplicates and votes", _majority_vote(items, result.raters))
    _write(items, out, options, result)
    if not any(result.rows[TRAIN][form] for form in FORMS):
        raise InputError(f"database: expected feedback to learn from, got none; {_removed(result)}")
    raters = {name or "without a name": asdict(r) for name, r in sorted(result.raters.items())}
    write_json(out / RATERS, raters)
    write_json(out / FUNNEL, asdict(result.funnel))
    return result


def _removed(result: BuildResult) -> str:
    """Return in one line what all steps removed."""
    removed = Counter[str]()
    for step in result.funnel.steps:
        removed.update(step["removed"])
    for part, option in ((JUDGE, "--judge"), (TEST, "--test")):
        removed[f"kept for {part}/ ({option} 0 keeps none)"] = result.rows[part]["prompts"]
    removed = +removed  # what is above 0
    return ", ".join(f"{n:,} {reason}" for reason, n in removed.items()) or "no feedback at all"


def _add_step(
    funnel: Funnel,
    name: str,
    items: Sequence[FeedbackItem],
    removed: Mapping[str, int] | None = None,
) -> StepCounts:
    size = sum(item.size for item in items)
    step: StepCounts = {
        "step": name, "documents": len(items), "bytes": size,
        "removed": dict(sorted((removed or {}).items())),
    }  # fmt: skip
    funnel.steps.append(step)
    return step


def _reject_without_consent(item: FeedbackItem, withdrawn: frozenset[str]) -> str | None:
    if item.prompt is None:
        return "no consent to store the text"
    return None if withdrawn.isdisjoint(item.forget_keys()) else "consent withdrawn"


def _reject_invalid(item: FeedbackItem) -> str | None:
    try:
        for row in chain(*_rows_by_form(item).values()):
            (parse_conversation if "messages" in row else parse_preference)(row)
    except InputError:
        equal = item.kind in ("pick", "correction") and item.better == item.worse
        return "equal answers" if equal else "messages that no training reads"
    return None


def _scrub(item: FeedbackItem, replaced: Counter[str]) -> FeedbackItem:
    with needs_serve():
        from fastlm.serve.feedback_rows import scrubbed
    numbers = Placeholders()  # <EMAIL_1> in an answer is that of its prompt
    prompt = scrubbed(item.prompt, replaced, numbers)
    better, worse = (scrubbed(a, replaced, numbers.copy()) for a in (item.better, item.worse))
    tools = scrubbed(item.tools, replaced)
    return replace(item, prompt=prompt, better=better, worse=worse, tools=tools)


def _reject_by_rules(item: FeedbackItem, rules: Sequence[str]) -> str | None:
    texts = [m["content"] for m in item.better or () if isinstance(m.get("content"), str)]
    return next((rule for text in texts if (rule := first_failed(text, rules))), None)


def _reject_leaks(item: FeedbackItem, questions: "Overlap") -> str | None:
    name = questions.find(item.texts)
    return None if name is None else f"a question of {name}"


def _reject_by_rater(
    item: FeedbackItem, raters: Mapping[str, RaterWeight], options: BuildOptions
) -> str | None:
    """Reject raters below the lowest weight, and of the others the share 1 - weight of their items:
    a training takes each row once or not at all.
    """
    weight = raters[item.rater].weight
    if weight < options.min_rater_weight:
        return "raters who disagree with the others"
    if _random_number(item.rater, item.key) >= weight:
        return "a share, of raters who agree less"
    return None


def _random_number(text: str, key: bytes) -> float:
    """Return a number in [0, 1) that depends only on the two arguments."""
    digest = blake2b(text.encode("utf-8", "replace") + b"\0" + key, digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _rater_limit(
    items: Sequence[FeedbackItem], share: float
) -> Callable[[FeedbackItem], str | None]:
    """Reject the items of a rater beyond ``share`` of all, or beyond twice the mean rater's; and of
    the raters of an API key, whose names a client chooses, by the same rule for keys.
    """

    def limit(names: set[str]) -> int:
        return math.ceil(len(items) * max(share, 2 / max(1, len(names))))

    max_items = limit({item.rater for item in items})
    max_key_items = limit({key_of(item.rater) or item.rater for item in items})
    counts: Counter[str] = Counter()

    def reject(item: FeedbackItem) -> str | None:
        if counts[item.rater] == max_items:
            name = "raters without a name" if item.rater == ANONYMOUS else "one rater"
            return f"beyond the limit of {name}"
        if key := key_of(item.rater):
            if counts[key] == max_key_items:
                return "beyond the limit of one API key"
            counts[key] += 1
        counts[item.rater] += 1
        return None

    return reject


def _majority_vote(
    items: Sequence[FeedbackItem], raters: Mapping[str, RaterWeight]
) -> Callable[[FeedbackItem], str | None]:
    """Keep one of the items about the same text, by the weights of their raters. A rater with
    several votes on the same text, of several responses or of several kinds, has one: the last.
    """
    last = {(key, rater): yes for key, rater, yes in (item.vote() for item in items)}
    votes: dict[tuple[bytes, bool], float] = defaultdict(float)
    for (key, rater), yes in last.items():
        votes[key, yes] += raters[rater].weight
    seen: set[bytes] = set()

    def reject(item: FeedbackItem) -> str | None:
        key, _, yes = item.vote()
        if votes[key, yes] <= votes[key, not yes]:
            return "outvoted, or no majority"
        if item.key in seen:
            return "duplicate"
        seen.add(item.key)
        return None

    return reject


def _rows_by_form(item: FeedbackItem) -> dict[str, list[dict[str, Any]]]:
    """Return form -> rows. A correction is a demonstration, a pair, and two labels."""
    prompt, tools = item.prompt or [], item.tools
    rows: dict[str, list[dict[str, Any]]] = {}
    if item.kind in ("pick", "correction"):
        answers = (item.better or [], item.worse or [])
        corrected = item.kind == "correction"
        pair = Comparison(prompt, answers, (0, 1), tools=tools, corrected=corrected)
        rows["preferences"] = [pair.to_row()]
        if corrected:
            rows["sft"] = [pair.demonstration().to_row()]
            rows["kto"] = [label.to_row() for label in pair.labels()]
    else:
        label = UnpairedPreference(
            prompt, item.better or item.worse or [], item.kind == "up", tools
        )
        rows["kto"] = [label.to_row()]
        if item.kind == "up":
            rows["sft"] = [label.conversation().to_row()]
    return rows


def _write(
    items: Sequence[FeedbackItem], out: Path, options: BuildOptions, result: BuildResult
) -> None:
    parts: dict[str, list[FeedbackItem]] = {part: [] for part in PARTS}
    for item in items:
        number = _random_number("part", item.opening_key)
        is_judge = number < options.test + options.judge
        parts[TEST if number < options.test else JUDGE if is_judge else TRAIN].append(item)
        counts = result.funnel.sources.setdefault(
            printable(item.source), {"files": 1, "documents": 0, "bytes": 0}
        )
        counts["documents"] += 1
        counts["bytes"] += item.size
    corrected = {id for item in items if item.kind == "correction" for id in item.response_ids}
    for part, part_items in parts.items():
        rows = _part_rows(part_items, corrected, options)
        folder = make_folder(out / part)
        for form in FORMS:
            with atomic_file(folder / f"{form}.jsonl") as file:
                for row in rows[form]:
                    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
                    file.write(b"\n")
        result.rows[part] = {form: len(rows[form]) for form in FORMS}
        _add_step(result.funnel, part, part_items)


def _part_rows(
    items: Sequence[FeedbackItem], corrected: set[str], options: BuildOptions
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    prompt_keys: set[bytes] = set()
    for item in items:
        metadata: dict[str, Any] = {
            PROVENANCE: {
                "responses": list(item.response_ids),
                "conversations": list(item.conversation_ids),
            },
            "licence": item.licence or options.licence,
        }
        if item.model is not None:
            metadata["model"] = item.model
        for form, form_rows in _rows_by_form(item).items():
            if form == "sft" and item.kind == "up" and corrected.intersection(item.response_ids):
                continue  # a correction of it is better
            rows[form] += [row | metadata for row in form_rows]
        if item.prompt_key not in prompt_keys:
            prompt_keys.add(item.prompt_key)
            tools = {"tools": item.tools} if item.tools is not None else {}
            rows["prompts"].append({"prompt": item.prompt, **tools, **metadata})
    return rows
