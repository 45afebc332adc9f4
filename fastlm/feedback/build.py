"""Turn what people said about answers into rows to train on, through the steps that web text goes
through: consent, scrubbing, quality rules, decontamination, raters, duplicates, a split.

What is counted are judgements: a thumb, a pick, a correction. Every step counts what it removed and
why, in the `fastlm.pipeline.funnel.Funnel` that prepared text has. The same judgements give the
same bytes.

The split is by what a conversation opens with, into three parts: what models learn from, what only
a judge of their answers learns from, and prompts that nothing learns from, which old and new model
answer. A later turn holds the earlier ones, so all turns are in the same part.
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

from fastlm.data.conversations import conversation_of
from fastlm.data.dedup import DocumentDedup
from fastlm.data.filter import check_rules, first_failed
from fastlm.data.forgotten import PROVENANCE
from fastlm.data.preferences import Comparison, Label, preference_of
from fastlm.errors import InputError
from fastlm.feedback.annotators import Rater, rate
from fastlm.feedback.judgements import ANONYMOUS, Judgement, read_judgements, withdrawn_keys
from fastlm.files import make_folder, replacing, write_json
from fastlm.pipeline.funnel import FUNNEL, Funnel, StepCounts
from fastlm.serve.commands import needs_serve
from fastlm.sources.rows import printable

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
    """Options of `build`."""

    judge: Annotated[float, "Share of the prompts whose feedback only a judge learns from"] = 0.2
    test: Annotated[float, "Share of the prompts that nothing learns from"] = 0.1
    scrub: Annotated[bool, "Replace e-mail addresses, phone numbers and public IP addresses"] = True
    rules: Annotated[tuple[str, ...], "Quality rules that a good answer has to pass"] = RULES
    ngram: Annotated[int, "Words of the runs that a question of an evaluation is found by"] = 8
    least_weight: Annotated[
        float, "A rater who agrees less with the others, up to 1, is left out; 0: all count alike"
    ] = 0.25
    rater_share: Annotated[
        float, "Most of all judgements that one rater may give, or twice the mean rater's"
    ] = 0.05
    licence: Annotated[str, "Of what users consented to; a row that states its own keeps it"] = (
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
        if not 0 <= self.least_weight <= 1:
            raise InputError(f"least_weight: expected 0 to 1, got {self.least_weight}")
        if not 0 < self.rater_share <= 1:
            raise InputError(f"rater_share: expected above 0, at most 1, got {self.rater_share}")
        if self.ngram < 1:
            raise InputError(f"ngram: expected 1 or more, got {self.ngram}")


@dataclass
class Built:
    """``rows``: part -> form -> rows written. ``raters``: by name."""

    funnel: Funnel = field(default_factory=lambda: Funnel(counted="judgements"))
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    raters: dict[str, Rater] = field(default_factory=dict)


def build(
    databases: Sequence[str],
    out: Path,
    *,
    options: BuildOptions,
    questions: "Overlap | None" = None,
    forgotten: Collection[str] = frozenset(),
    cache: Path,
) -> Built:
    """Write the rows of ``databases`` (`read_judgements`) below ``out``: in each of train, judge
    and test the files sft.jsonl, preferences.jsonl, kto.jsonl and prompts.jsonl; raters.json; and,
    last, funnel.json.

    Args:
        questions: of evaluations, which must not enter.
        forgotten: keys of what must not enter (`fastlm.data.forgotten`), beside those that the
            databases keep of withdrawn consent.

    InputError: a database or a row that cannot be read, nothing left to learn from.
    """
    options.check()
    done = Built()
    passed: Counter[str] = Counter()
    found = read_judgements(databases, cache, passed)
    _add(done.funnel, "gather", found, +passed)

    def keep(step: str, why_not: Callable[[Judgement], str | None]) -> None:
        """Keep what ``why_not`` has nothing to say against."""
        nonlocal found
        reasons = [why_not(one) for one in found]
        found = [one for one, reason in zip(found, reasons, strict=True) if reason is None]
        _add(done.funnel, step, found, Counter(filter(None, reasons)))

    gone = frozenset(forgotten).union(*map(withdrawn_keys, databases))
    keep("consent", lambda one: _not_allowed(one, gone))
    keep("rows to train on", _refused)
    if options.scrub:
        replaced: Counter[str] = Counter({"email": 0, "phone": 0, "ip": 0})
        found = [_scrubbed(one, replaced) for one in found]
        _add(done.funnel, "scrub", found)["replaced"] = dict(replaced)
    keep("quality rules", lambda one: _failed(one, options.rules))
    if questions is not None:
        keep("decontamination", lambda one: _leaks(one, questions))
    done.raters = rate(one.vote() for one in found)
    if not options.least_weight:
        done.raters = {name: replace(one, weight=1.0) for name, one in done.raters.items()}
    keep("raters", lambda one: _distrusted(one, done.raters, options))
    keep("share of one rater", _bounded(found, options.rater_share))
    keep("duplicates and votes", _outvoted(found, done.raters))
    _write(found, out, options, done)
    if not any(done.rows[TRAIN][form] for form in FORMS):
        raise InputError(f"database: expected feedback to learn from, got none; {_why(done)}")
    told = {name or "without a name": asdict(one) for name, one in sorted(done.raters.items())}
    write_json(out / RATERS, told)
    write_json(out / FUNNEL, asdict(done.funnel))
    return done


def _why(done: Built) -> str:
    removed = Counter[str]()
    for step in done.funnel.steps:
        removed.update(step["removed"])
    for part, option in ((JUDGE, "--judge"), (TEST, "--test")):
        removed[f"kept for {part}/ ({option} 0 keeps none)"] = done.rows[part]["prompts"]
    removed = +removed  # what is above 0
    return ", ".join(f"{n:,} {reason}" for reason, n in removed.items()) or "nobody said anything"


def _add(
    funnel: Funnel, name: str, left: Sequence[Judgement], removed: Mapping[str, int] | None = None
) -> StepCounts:
    size = sum(one.size for one in left)
    step: StepCounts = {
        "step": name, "documents": len(left), "bytes": size,
        "removed": dict(sorted((removed or {}).items())),
    }  # fmt: skip
    funnel.steps.append(step)
    return step


def _not_allowed(one: Judgement, gone: frozenset[str]) -> str | None:
    if one.prompt is None:
        return "no consent to keep the text"
    return None if gone.isdisjoint(one.forgotten_keys()) else "consent withdrawn"


def _refused(one: Judgement) -> str | None:
    try:
        for row in chain(*_forms(one).values()):
            (conversation_of if "messages" in row else preference_of)(row)
    except InputError:
        equal = one.kind in ("pick", "correction") and one.better == one.worse
        return "equal answers" if equal else "messages that no training reads"
    return None


def _scrubbed(one: Judgement, replaced: Counter[str]) -> Judgement:
    with needs_serve():
        from fastlm.serve.feedback_rows import scrubbed
    texts = {key: getattr(one, key) for key in ("prompt", "better", "worse", "tools")}
    return replace(one, **{key: scrubbed(text, replaced) for key, text in texts.items()})


def _failed(one: Judgement, rules: Sequence[str]) -> str | None:
    texts = [m["content"] for m in one.better or () if isinstance(m.get("content"), str)]
    return next((why for text in texts if (why := first_failed(text, rules))), None)


def _leaks(one: Judgement, questions: "Overlap") -> str | None:
    found = questions.find(one.texts)
    return None if found is None else f"a question of {found}"


def _distrusted(one: Judgement, raters: Mapping[str, Rater], options: BuildOptions) -> str | None:
    """Leave out raters far from the others, and of the others between, a share: a training takes
    each row once or not at all.
    """
    weight = raters[one.rater].weight
    if weight < options.least_weight:
        return "of raters who do not agree with the others"
    return "a share, of raters who agree less" if _number(one.rater, one.key) >= weight else None


def _number(rater: str, key: bytes) -> float:
    """A number in [0, 1) that rater and judgement decide."""
    found = blake2b(rater.encode("utf-8", "replace") + b"\0" + key, digest_size=8).digest()
    return int.from_bytes(found, "big") / 2**64


def _bounded(found: Sequence[Judgement], share: float) -> Callable[[Judgement], str | None]:
    """Leave out what a rater said beyond ``share`` of all, or twice the mean rater's."""
    raters = {one.rater for one in found}
    most = math.ceil(len(found) * max(share, 2 / max(1, len(raters))))
    counts: Counter[str] = Counter()

    def why_not(one: Judgement) -> str | None:
        counts[one.rater] += 1
        if counts[one.rater] <= most:
            return None
        nobody = " without a name" * (one.rater == ANONYMOUS)
        return f"beyond what one rater may give{nobody}"

    return why_not


def _outvoted(
    found: Sequence[Judgement], raters: Mapping[str, Rater]
) -> Callable[[Judgement], str | None]:
    """Keep one of the judgements about the same text, by the weights of their raters. A rater who
    said it of several responses with the same text, or in several ways, has one vote: the last.
    """
    last = {(item, rater): yes for item, rater, yes in (one.vote() for one in found)}
    votes: dict[tuple[bytes, bool], float] = defaultdict(float)
    for (item, rater), yes in last.items():
        votes[item, yes] += raters[rater].weight
    seen = DocumentDedup()

    def why_not(one: Judgement) -> str | None:
        item, _, yes = one.vote()
        if votes[item, yes] <= votes[item, not yes]:
            return "outvoted, or no majority"
        return None if seen.is_new(one.key) else "same judgement"

    return why_not


def _forms(one: Judgement) -> dict[str, list[dict[str, Any]]]:
    """Form -> rows. A correction is something to imitate, a pair, and both labels."""
    prompt, tools = one.prompt or [], one.tools
    made: dict[str, list[dict[str, Any]]] = {}
    if one.kind in ("pick", "correction"):
        answers = (one.better or [], one.worse or [])
        corrected = one.kind == "correction"
        pair = Comparison(prompt, answers, (0, 1), tools=tools, corrected=corrected)
        made["preferences"] = [pair.row()]
        if corrected:
            made["sft"] = [pair.demonstration().row()]
            made["kto"] = [label.row() for label in pair.labels()]
    else:
        label = Label(prompt, one.better or one.worse or [], one.kind == "up", tools)
        made["kto"] = [label.row()]
        if one.kind == "up":
            made["sft"] = [label.conversation().row()]
    return made


def _write(left: Sequence[Judgement], out: Path, options: BuildOptions, done: Built) -> None:
    parts: dict[str, list[Judgement]] = {part: [] for part in PARTS}
    for one in left:
        place = _number("part", one.opening_key)
        kept = place < options.test + options.judge
        parts[TEST if place < options.test else JUDGE if kept else TRAIN].append(one)
        tally = done.funnel.sources.setdefault(
            printable(one.source), {"files": 1, "documents": 0, "bytes": 0}
        )
        tally["documents"] += 1
        tally["bytes"] += one.size
    corrected = {id for one in left if one.kind == "correction" for id in one.ids}
    for part, found in parts.items():
        rows = _part_rows(found, corrected, options)
        folder = make_folder(out / part)
        for form in FORMS:
            with replacing(folder / f"{form}.jsonl") as file:
                for row in rows[form]:
                    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
                    file.write(b"\n")
        done.rows[part] = {form: len(rows[form]) for form in FORMS}
        _add(done.funnel, part, found)


def _part_rows(
    found: Sequence[Judgement], corrected: set[str], options: BuildOptions
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
    asked = DocumentDedup()
    for one in found:
        told: dict[str, Any] = {
            PROVENANCE: {"responses": list(one.ids), "conversations": list(one.talks)},
            "licence": one.licence or options.licence,
        }
        if one.model is not None:
            told["model"] = one.model
        for form, made in _forms(one).items():
            if form == "sft" and one.kind == "up" and corrected.intersection(one.ids):
                continue  # somebody knew better
            rows[form] += [row | told for row in made]
        if asked.is_new(one.prompt_key):
            tools = {"tools": one.tools} if one.tools is not None else {}
            rows["prompts"].append({"prompt": one.prompt, **tools, **told})
    return rows
