"""Write the card of a corpus: card.md (with Hugging Face's front matter), card.html with plots, and
card.json with every fact behind them.

Markdown and HTML show the same `CardSection` list, so neither can say something that the other does
not. A section says where nothing was recorded.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.data.corpus import CARD_FILES
from fastlm.data.corpus_facts import BUCKETS, TOXICITY_BINS, corpus_facts
from fastlm.data.options import DataOptions
from fastlm.data.stage import PERSONAL_DATA, describe_removals
from fastlm.files import write_json, write_text
from fastlm.pipeline.charts import bar_chart
from fastlm.pipeline.lineage import NOT_RECORDED
from fastlm.pipeline.templates import card_environment, page_environment, with_front_matter
from fastlm.pipeline.text import count_text, size_text
from fastlm.terminal import visible

MAX_ROWS = 20  # of a table; card.json has all
MAX_EXAMPLES = 2  # removed documents per reason; card.json has more
EXCERPT, MAX_CELL = 100, 160  # characters
LANGUAGE = re.compile("[a-z]{2,3}", re.ASCII)  # a code of ISO 639
MIN_SHARE = 0.01  # of the text: languages that the front matter names
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7, 10**8, 10**9, 10**10, 10**11, 10**12)
UNDECIDED = (
    "Whether the law of a country permits training on these documents. This card is no legal "
    "advice: a verdict says what a site wrote for programs.",
    "Whether a licence that a source or a page states is right, and what it asks of a model.",
    "What no program looked for: names and street addresses of people, facts that are wrong, texts "
    "by machines, images of a page.",
    "For which uses a model trained on it is fit.",
)


@dataclass(frozen=True)
class CardTable:
    """Rows under headings. A heading that begins with ">" is that of numbers. ``shares``: of each
    row, in percent, drawn as a bar in HTML. A cell that is a list has one line per item.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Any]]
    shares: Sequence[float] = ()
    title: str = ""

    @property
    def bar_column(self) -> int:
        """The number of columns before the bar, which is after the last number."""
        return max((n for n, h in enumerate(self.headings, 1) if h.startswith(">")), default=0)


@dataclass(frozen=True)
class CardSection:
    """A section of the card. ``charts`` (SVG) are shown in HTML only, instead of the tables that
    are marked as their numbers by ``chart_tables``.
    """

    title: str
    note: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[CardTable] = ()
    charts: Sequence[str] = ()
    chart_tables: Sequence[CardTable] = ()
    items: Sequence[str] = ()
    commands: Sequence[str] = ()


def write_card(out: Path, target: Path | None = None, *, licence: str | None = None) -> list[Path]:
    """Write card.md, card.html and card.json of the corpus ``out`` into ``target`` (default:
    ``out``). Return their paths.

    licence: what the owner states for the whole, an id of Hugging Face's.

    InputError: no finished corpus, damaged records, no folder to write to.
    """
    facts = corpus_facts(out)
    sections = card_sections(facts)
    target = target or out
    paths = [target / name for name in CARD_FILES]
    write_text(paths[0], render_markdown(facts, sections, licence))
    write_text(paths[1], render_page(facts, sections))
    write_json(paths[2], facts)
    return paths


def render_markdown(
    facts: Mapping[str, Any], sections: Sequence[CardSection], licence: str | None = None
) -> str:
    """Return the card as Markdown, with the front matter of a dataset card of Hugging Face."""
    from huggingface_hub import DatasetCardData

    total = sum(split["documents"] for split in facts["splits"].values())
    size = max(1, sum(split["bytes"] for split in facts["splits"].values()))
    languages = [
        row["name"] for row in facts["languages"]
        if row["bytes"] / size >= MIN_SHARE and LANGUAGE.fullmatch(row["name"])
        and row["name"] != "und"
    ]  # fmt: skip
    configs = [
        {"split": split, "path": counts["files"]}
        for split, counts in facts["splits"].items() if counts["documents"]
    ]  # fmt: skip
    front = DatasetCardData(
        license=licence or "unknown", language=languages or None,
        pretty_name=visible(facts["name"]),
        task_categories=["text-generation"], size_categories=[_size_category(total)],
        tags=["fastlm"], configs=[{"config_name": "default", "data_files": configs}],
    )  # fmt: skip
    body = card_environment().get_template("data_card.md.jinja")
    return with_front_matter(front, body.render(name=visible(facts["name"]), sections=sections))


def _size_category(documents: int) -> str:
    """Return Hugging Face's name of a number of rows."""
    names = [*(count_name for count_name in map(_power_name, SIZES))]
    for number, limit in enumerate(SIZES):
        if documents < limit:
            return f"n<{names[0]}" if not number else f"{names[number - 1]}<n<{names[number]}"
    return f"n>{names[-1]}"


def _power_name(power: int) -> str:
    for unit in ("", "K", "M", "B"):
        if power < 1000:
            return f"{power}{unit}"
        power //= 1000
    return f"{power}T"


def render_page(facts: Mapping[str, Any], sections: Sequence[CardSection]) -> str:
    """Return the card as a self-contained page."""
    splits = facts["splits"].values()
    cards = [
        (size_text(sum(s["bytes"] for s in splits)), "clean text"),
        (count_text(sum(s["documents"] for s in splits)), facts["unit"]),
        (f"{len(facts['sources']):,}", "source" if len(facts["sources"]) == 1 else "sources"),
    ]
    if facts["languages"]:
        cards.append((f"{len(facts['languages']):,}", "languages"))
    page = page_environment().get_template("data_card.html.jinja")
    text = page.render(name=visible(facts["name"]), cards=cards, sections=sections)
    return text.encode("utf-8", "replace").decode()


def card_sections(facts: Mapping[str, Any]) -> list[CardSection]:
    """Return the sections of the card of a corpus, from `corpus_facts`."""
    facts = _visible(facts)
    return [
        _content(facts), _sources(facts), _funnel(facts), _removed(facts), _languages(facts),
        _scores(facts), _licences(facts), _consent(facts), _duplicates(facts), _personal(facts),
        *_mix(facts), _lengths(facts), *_origins(facts), _plan(facts), _reproduce(facts),
        CardSection("What is not decided", items=UNDECIDED),
    ]  # fmt: skip


def _visible(value: Any) -> Any:
    """Return a JSON value whose texts have no characters that control a terminal or the direction
    of writing.
    """
    if isinstance(value, Mapping):
        return {visible(str(key)): _visible(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_visible(item) for item in value]
    return visible(value) if isinstance(value, str) else value


def _content(facts: Mapping[str, Any]) -> CardSection:
    splits = {
        f"{split}/": f"{counts['documents']:,} {facts['unit']}, {size_text(counts['bytes'])}"
        for split, counts in facts["splits"].items()
    }
    table = {
        **splits,
        "date of the plan": facts["plan"].get("date") or NOT_RECORDED,
        "content id": facts["build"].get("ids", {}).get("corpus") or NOT_RECORDED,
        "intended use": NOT_RECORDED,
    }
    note = "Text to train language models on, prepared by fastlm data prepare."
    return CardSection("Content", note, facts=table, items=facts["warnings"])


def _sources(facts: Mapping[str, Any]) -> CardSection:
    rows = [
        (
            s["source"], s["package"] or "local", s["licence"] or NOT_RECORDED,
            f"{s['files']:,}", f"{s['documents']:,}", size_text(s["bytes"]),
        )
        for s in facts["sources"]
    ]  # fmt: skip
    headings = ("source", "package", "licence it states", ">files", ">documents", ">text")
    return CardSection("Sources", "What remains of each.", tables=[_table(headings, rows)])


def _funnel(facts: Mapping[str, Any]) -> CardSection:
    steps = facts["funnel"]
    max_bytes = max((step["bytes"] for step in steps), default=0) or 1
    rows = [
        (step["step"], f"{step['documents']:,}", size_text(step["bytes"]),
         ", ".join(describe_removals(step)))
        for step in steps
    ]  # fmt: skip
    shares = [100 * step["bytes"] / max_bytes for step in steps]
    table = CardTable(("step", f">{facts['unit']}", ">text", "removed"), rows, shares)
    skipped = [f"skipped: {message}" for message in facts["unreadable"][:MAX_ROWS]]
    note = "What each step left, and what it removed or changed."
    return CardSection("From sources to text", note, tables=[table], items=skipped)


def _removed(facts: Mapping[str, Any]) -> CardSection:
    rows = [
        (
            [entry["step"], entry["reason"]], f"{entry['count']:,}",
            [*map(_example, entry["examples"][:MAX_EXAMPLES])],
        )
        for entry in facts["removed"] if entry["examples"]
    ]  # fmt: skip
    if not rows:
        return CardSection("Removed documents", f"Records of removed documents: {NOT_RECORDED}.")
    table = CardTable(("step and reason", ">documents", "examples"), rows)
    note = "fastlm data show --dropped REASON lists all of them, --id and --url one of them."
    return CardSection("Removed documents", note, tables=[table])


def _example(row: Mapping[str, Any]) -> str:
    name = row["url"] or row["id"]
    text = " ".join(row["text"].split())[:EXCERPT]
    parts = [name, row["detail"], f"“{text} …”" if text else ""]
    return ": ".join(part[:MAX_CELL] for part in parts if part)


def _languages(facts: Mapping[str, Any]) -> CardSection:
    return _by_value(facts, "Languages", "language", facts["languages"], "As the build identified.")


def _licences(facts: Mapping[str, Any]) -> CardSection:
    note = "Stated by the documents themselves, in their markup, headers or metadata."
    return _by_value(facts, "Licences of documents", "licence", facts["licences"], note)


def _by_value(
    facts: Mapping[str, Any], title: str, name: str, rows: Sequence[Mapping[str, Any]], note: str
) -> CardSection:
    if not rows:
        return CardSection(title, f"{title}: {NOT_RECORDED}.")
    return CardSection(title, note, tables=[_value_table(facts, name, rows)])


def _value_table(
    facts: Mapping[str, Any], name: str, rows: Sequence[Mapping[str, Any]], title: str = ""
) -> CardTable:
    """Return documents and text by value: the largest, the others, those without one."""
    all_bytes = max(1, facts["scanned_bytes"])
    cells = [(row["name"], row["documents"], row["bytes"]) for row in rows[:MAX_ROWS]]
    if rest := rows[MAX_ROWS:]:
        total = sum(row["documents"] for row in rest), sum(row["bytes"] for row in rest)
        cells.append((f"{len(rest):,} others", *total))
    missing = [
        facts[f"scanned_{key}"] - sum(row[key] for row in rows) for key in ("documents", "bytes")
    ]
    if missing[0] > 0:
        cells.append((NOT_RECORDED, *missing))
    shares = [100 * size / all_bytes for _, _, size in cells]
    texts = [(label, f"{n:,}", size_text(size)) for label, n, size in cells]
    return CardTable((name, ">documents", ">text"), texts, shares, title)


def _scores(facts: Mapping[str, Any]) -> CardSection:
    charts, tables, missing = [], [], []
    if facts["quality_buckets"]:
        labels = [str(n) for n in range(BUCKETS)]
        rows = list(zip(labels, (f"{n:,}" for n in facts["quality_buckets"])))
        label = "quality bucket (0: worst)"
        charts.append(bar_chart(labels, facts["quality_buckets"], label, "documents"))
        tables.append(CardTable((label, ">documents"), rows))
    else:
        missing.append("quality")
    if facts["toxicity"]:
        labels = [f"{n / TOXICITY_BINS:.1f}" for n in range(TOXICITY_BINS)]
        rows = list(zip(labels, (f"{n:,}" for n in facts["toxicity"])))
        label = "toxicity, from"
        charts.append(bar_chart(labels, facts["toxicity"], label, "documents"))
        tables.append(CardTable((label, ">documents"), rows))
    else:
        missing.append("toxicity")
    notes = ["Scores of models that the owner trained, not of people."] if charts else []
    if missing:
        notes.append(f"{' and '.join(missing).capitalize()}: {NOT_RECORDED}.")
    return CardSection("Quality and toxicity", " ".join(notes), charts=charts, chart_tables=tables)


def _consent(facts: Mapping[str, Any]) -> CardSection:
    consent = facts["consent"]
    options = facts["plan"].get("options") or {}
    refused = [e for e in facts["removed"] if e["step"] == "consent"]
    table = {
        "mode": options.get("consent") or NOT_RECORDED,
        "where nothing is said": options.get("unknown") or NOT_RECORDED,
        "crawlers": ", ".join(options.get("crawler_names") or ()) or NOT_RECORDED,
    }
    policies = facts["plan"].get("policies")
    if isinstance(policies, Mapping) and policies["files"]:  # earlier plans have the hash alone
        dates = " to ".join(dict.fromkeys(policies[k][:10] for k in ("first", "last")
                                          if policies[k]))  # fmt: skip
        table["policy files"] = (
            f"{policies['files']:,} of {policies['sites']:,} sites, "
            f"fetched {dates or 'at times that are not recorded'}"
        )
        table["sha256 of the policy files"] = policies["sha256"]
    tables = []
    if consent["verdicts"]:
        title = "Verdicts on documents that remain"
        tables.append(_value_table(facts, "verdict", consent["verdicts"], title))
    if consent["rules"]:
        rows = [
            (row["name"], f"{row['documents']:,}", size_text(row["bytes"]))
            for row in consent["rules"][:MAX_ROWS]
        ]
        table_of_rules = ("rule", ">documents", ">text")
        tables.append(CardTable(table_of_rules, rows, title="Rules that decided about them"))
    if refused:
        rows = [(entry["reason"], f"{entry['count']:,}") for entry in refused]
        title = "Removed, by standard"
        tables.append(CardTable(("standard or reason", ">documents"), rows, title=title))
    note = "What sites say about training in files and headers for programs."
    return CardSection("Consent", note, facts=table, tables=tables)


def _duplicates(facts: Mapping[str, Any]) -> CardSection:
    clusters, largest = facts["clusters"], facts["largest_clusters"]
    if not clusters:
        return CardSection("Near duplicates", f"Clusters: {NOT_RECORDED}.")
    threshold = (facts["plan"].get("options") or {}).get("near_duplicates")
    rows = [(f"{c['size']:,}", f"{c['documents']:,}") for c in clusters[:MAX_ROWS]]
    if rest := clusters[MAX_ROWS:]:
        rows.append((f"{rest[0]['size']:,} or more", f"{sum(c['documents'] for c in rest):,}"))
    tables = [CardTable(("documents in a cluster", ">of these remain, in all"), rows)]
    if largest and largest[0]["size"] > 2:
        rows = [(f"{c['size']:,}", c["source"], c["id"]) for c in largest]
        tables.append(
            CardTable(("documents", "source", "document that remains"), rows,
                      title="Largest clusters")
        )  # fmt: skip
    note = (
        "A cluster is a group of near copies"
        + f" (Jaccard similarity of word 5-grams {threshold} or more)" * bool(threshold)
        + ", most of which were removed."
    )
    return CardSection("Near duplicates", note, tables=tables)


def _personal(facts: Mapping[str, Any]) -> CardSection:
    replaced = facts["personal_data"]
    title = "Personal data"
    if not replaced:
        return CardSection(title, f"Replaced personal data: {NOT_RECORDED}.")
    rows = [(PERSONAL_DATA.get(kind, kind), f"{n:,}") for kind, n in replaced.items()]
    note = "Replaced by numbered placeholders. Names and street addresses were not looked for."
    return CardSection(title, note, tables=[CardTable(("kind", ">replaced"), rows)])


def _mix(facts: Mapping[str, Any]) -> list[CardSection]:
    """Return the section of the mix; none if documents were not weighed."""
    mix = facts["mix"]
    if not mix:
        return []
    options = (facts["plan"].get("options") or {}).get("mix") or {}
    limit = {"at most": f"{options['max_epochs']:g} epochs"} if "max_epochs" in options else {}
    tables = []
    for name, title in (("sources", "source"), ("languages", "language"), ("buckets", "bucket")):
        table = list(mix.get(name, {}).items())[:MAX_ROWS]
        rows = [
            (
                key, f"{counts['weight']:g}", size_text(counts["bytes"]),
                f"{counts['share']:.1%}", f"{counts['epochs']:.2f}",
                size_text(counts["train_bytes"]), f"{counts['train_share']:.1%}",
            )
            for key, counts in table
        ]  # fmt: skip
        shares = [100 * counts["train_share"] for _, counts in table]
        if rows:
            before, after = (">text before", ">share"), (">in training", ">share")
            headings = (title, ">weight", *before, ">epochs", *after)
            tables.append(CardTable(headings, rows, shares))
    note = (
        "A document's weight is the product of its weights: its expected number of copies in the"
        " training part. Epochs are copies on average, less what is held out. The other sections"
        " count copies."
    )
    return [CardSection("Mix", note, facts=limit, tables=tables)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _lengths(facts: Mapping[str, Any]) -> CardSection:
    rows = [
        (f"{row['min']:,} to {row['max']:,}", f"{row['documents']:,}") for row in facts["lengths"]
    ]
    labels = [count_text(row["min"]).replace(" ", "") for row in facts["lengths"]]
    counts = [row["documents"] for row in facts["lengths"]]
    return CardSection(
        "Length of documents", "Characters of a document that remains.",
        charts=[bar_chart(labels, counts, "characters, from", "documents")] if counts else [],
        chart_tables=[CardTable(("characters", ">documents"), rows)],
    )  # fmt: skip


def _origins(facts: Mapping[str, Any]) -> list[CardSection]:
    """Return the section of web sites and years; none if no document has an address or a date."""
    tables = [
        _value_table(facts, name, facts[key])
        for name, key in (("site", "sites"), ("year of the fetch", "years")) if facts[key]
    ]  # fmt: skip
    return [CardSection("Web sites and dates", tables=tables)] if tables else []


def _plan(facts: Mapping[str, Any]) -> CardSection:
    plan, build = facts["plan"], facts["build"]
    if not plan:
        return CardSection("Plan", f"Options, versions and hashes of inputs: {NOT_RECORDED}.")
    libraries = ", ".join(f"{name} {v}" for name, v in (plan["libraries"] or {}).items())
    table = {
        "date": plan["date"] or NOT_RECORDED,
        "inputs": f"{size_text(plan['input_bytes'])} in {plan['input_files']:,} files; plan.json "
        "has their SHA-256",
        "sha256 of plan.json": plan["sha256"],
        "left out because forgotten": f"{plan['forgotten']:,} keys",
        "version of the steps": plan["version"],
        "libraries": libraries or NOT_RECORDED,
        "code": _facts(build.get("code")),
        "machine": _facts(build.get("machine")),
    }
    defaults = DataOptions().identity()
    rows = [
        (key, _cell(value)) for key, value in (plan["options"] or {}).items()
        if value != json.loads(json.dumps(defaults.get(key)))
    ]  # fmt: skip
    note = "The other options have their defaults; plan.json has all."
    tables = [CardTable(("option", "value"), rows)] if rows else []
    return CardSection("Plan", note, facts=table, tables=tables)


def _facts(table: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{k} {v}" for k, v in (table or {}).items() if v) or NOT_RECORDED


def _reproduce(facts: Mapping[str, Any]) -> CardSection:
    command = facts["build"].get("command")
    if not command and facts["sources"]:
        sources = " ".join(shlex.quote(s["source"]) for s in facts["sources"])
        return CardSection(
            "How to reproduce",
            f"The command was not recorded. These are the sources and options of plan.json: "
            f"fastlm data prepare {sources}.",
        )
    note = "The same inputs, options and versions give the same bytes."
    return CardSection("How to reproduce", note, commands=[command] if command else [])


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> CardTable:
    """Return a table of at most MAX_ROWS rows; the last one says how many are left out."""
    shown_rows = [[cell for cell in row] for row in rows[:MAX_ROWS]]
    if len(rows) > MAX_ROWS:
        rest = f"{len(rows) - MAX_ROWS:,} more: card.json"
        shown_rows.append([rest, *[""] * (len(headings) - 1)])
    return CardTable(headings, shown_rows)
