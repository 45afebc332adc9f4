"""The stage that gathers and cleans text."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from fastlm.data.filter import TECHNICAL, WEB
from fastlm.data.forget_log import forgotten_keys
from fastlm.data.options import VERSION, WORK, DataOptions
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel, StepCounts
from fastlm.pipeline.stage import Positional, ReportSection, Stage, StageContext
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.source_files import DOCUMENTS, UNSUPPORTED_TYPE, VERBATIM, printable

TYPES_READ = f"""These files are read, compressed (.gz, .zst) or not: documents
({" ".join(DOCUMENTS)}), .json (an array of texts or of objects with one), notebooks (.ipynb), and
code and tables verbatim ({" ".join(VERBATIM)}). Of a package only the documents are read, unless a
glob names more. Of Parquet files (.parquet), a column of text is read. PDF and Word files are not
read. Unsupported files are counted by ending."""
RULES = {"technical": TECHNICAL, "web": WEB, "none": ()}  # names for rules = ["technical"]


@dataclass(frozen=True)
class Data(DataOptions, Stage):
    """Clean text from files, folders and packages, and split it into train and held-out."""

    kind = "data"
    command = ("data", "prepare")
    version = VERSION
    outputs = {"corpus": "."}
    resumable = (WORK,)
    result = {"train_bytes": int, "heldout_bytes": int}
    notes = TYPES_READ
    sources_in = ("sources",)
    writes_objects = True

    sources: Annotated[
        tuple[str, ...],
        Positional("Read pypi:NAME, sdist:NAME, deb:NAME, a file or a folder; #GLOB selects files"),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = tuple(r for name in self.rules for r in RULES.get(name, (name,)))
        object.__setattr__(self, "rules", rules)

    def check(self) -> None:
        super().check()
        if not self.sources:
            raise InputError("sources: expected at least one source, got none")
        self.check_mix_names([printable(source) for source in self.sources])

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        entries = input_digest.hash_sources(self.sources)
        if self.policies:
            entries = [*entries, ["policies", input_digest.hash_sources(self.policies)]]
        for corpus in self.earlier:
            entries = [*entries, ["earlier", corpus, input_digest.hash_corpus(corpus)]]
        forgotten = forgotten_keys([input_digest.folder, *map(Path, self.earlier)])
        if forgotten:
            entries = [*entries, ["forgotten", sorted(forgotten)]]
        hashes = {key: v for key, v in self.identity().items() if key.endswith("_sha256") and v}
        return [*entries, ["options", hashes]] if hashes else entries

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.data.prepare import prepare

        names = [f.name for f in fields(DataOptions)]
        options = DataOptions(**{name: getattr(self, name) for name in names})
        # of the run, the folder of runs and earlier builds: nothing comes back from a source that
        # still has it
        folders = [Path(corpus) for corpus in self.earlier]
        if ctx.in_recipe:
            folders += [ctx.out.parent, ctx.out.absolute().parent.parent]
        funnel = prepare(
            self.sources, ctx.out, options=options, cache=ctx.cache_dir, track=ctx.track,
            forgotten=forgotten_keys([ctx.out, *folders]),
        )  # fmt: skip
        for message in funnel.warnings:
            ctx.warning(message)
        steps = {s["step"]: s for s in funnel.steps}
        if ctx.in_recipe and self.heldout_bytes and not steps["heldout"]["documents"]:
            raise InputError(
                "heldout_bytes: expected enough for at least one whole document, got "
                f"{self.heldout_bytes} bytes"
            )
        return {f"{split}_{n}": steps[split][n] for split in SPLITS for n in ("bytes", "documents")}

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        train, heldout = (
            f"{result[f'{split}_documents']:,} documents ({result[f'{split}_bytes'] / 1e6:,.2f} MB)"
            for split in SPLITS
        )
        return f"{ctx.out}: {train} for training, {heldout} held out"

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        del result
        return funnel_tables(Funnel.load(ctx.out))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.pipeline.text import count_text, size_text

        del result
        funnel = Funnel.load(ctx.out)
        documents = funnel.steps[-1]["documents"] + funnel.steps[-2]["documents"]
        size = sum(step["bytes"] for step in funnel.steps[-2:])  # with copies, as the documents
        return ReportSection(
            "Sources of the text, and how much was kept",
            "Bytes of text after each step, and what the step removed.",
            cards=[(size_text(size), f"clean text in {count_text(documents)} documents")],
            template="data.html.jinja",
            values=funnel_values(funnel),
        )


SPLITS = ("train", "heldout")


def funnel_values(funnel: Funnel) -> dict[str, Any]:
    """Return the values for data.html.jinja: a row per step (what remains, as a share of the
    gathered text, and what was removed), and the sources, the largest first.
    """
    max_bytes = max((s["bytes"] for s in funnel.steps), default=1) or 1
    rows = [
        {**s, "percent": 100 * s["bytes"] / max_bytes, "why": describe_removals(s)}
        for s in funnel.steps
    ]
    sources = sorted(funnel.sources.items(), key=lambda kv: -kv[1]["bytes"])
    return {
        "funnel": rows, "sources": sources, "unit": funnel.unit, "files": _in_files(funnel),
        "warnings": funnel.warnings,
    }  # fmt: skip


def funnel_tables(funnel: Funnel) -> Any:
    """Return rich tables (what each step kept and removed, what each source yielded, and the mix),
    and one line for each file that could not be read.
    """
    from rich.console import Group
    from rich.table import Table

    from fastlm.pipeline.text import size_text

    def table(title: str, first: str, *headings: str) -> Table:
        result = Table(first, title=title)
        for heading in headings:
            result.add_column(heading, justify="right", no_wrap=True)
        return result

    steps = table("What each step kept and removed", "step", funnel.unit, "text")
    steps.add_column("removed")
    for s in funnel.steps:
        remaining = f"{s['documents']:,}", size_text(s["bytes"])
        steps.add_row(s["step"], *remaining, ", ".join(describe_removals(s)))
    files = ("files",) * _in_files(funnel)
    sources = table("What was kept of each source", "source", *files, funnel.unit, "text")
    for name, s in funnel.sources.items():
        counts = [f"{s[key]:,}" for key in (*files, "documents")]
        sources.add_row(name, *counts, size_text(s["bytes"]))
    mixes = []
    for kind, entries in funnel.mix.items():
        headings = "weight", "documents", "text", "of all", "in training", "of all", "epochs"
        mix = table(f"Mix of {kind}", kind.removesuffix("s"), *headings)
        for name, m in entries.items():
            mix.add_row(
                name, f"{m['weight']:g}", f"{m['documents']:,}", size_text(m["bytes"]),
                f"{m['share']:.1%}", size_text(m["train_bytes"]), f"{m['train_share']:.1%}",
                f"{m['epochs']:.2f}",
            )  # fmt: skip
        mixes.append(mix)
    messages = [f"warning: {message}" for message in funnel.warnings]
    messages += [f"skipped: {message}" for message in funnel.unreadable]
    return Group(steps, sources, *mixes, *messages)


def _in_files(funnel: Funnel) -> bool:
    """Return True if the number of files deserves a column. A feedback database is always one."""
    return any(source["files"] != 1 for source in funnel.sources.values())


# singular of what `fastlm.data.prepare` counts -> plural; other words have one form
PLURALS = {
    "paragraph": "paragraphs",
    "document mostly repeated": "documents mostly repeated",
    "document left too short": "documents left too short",
    "document cut": "documents cut",
    "part produced": "parts produced",
    "copy added": "copies added",
    "record that is no page": "records that are no pages",
    "page over the size limit": "pages over the size limit",
    "policy record": "policy records",
    "policy over the size limit": "policies over the size limit",
    "near duplicate": "near duplicates",
    "near copy of a forgotten text": "near copies of forgotten texts",
    "link inside a package": "links inside a package",
    "e-mail address replaced": "e-mail addresses replaced",
    "phone number replaced": "phone numbers replaced",
    "IP address replaced": "IP addresses replaced",
    "card number replaced": "card numbers replaced",
    "IBAN replaced": "IBANs replaced",
    "key replaced": "keys replaced",
    "national number replaced": "national numbers replaced",
}
MAX_ENDINGS = 8  # of unsupported types of files that are named; funnel.json has all
PERSONAL_DATA = {
    "email": "e-mail address", "phone": "phone number", "ip": "IP address", "card": "card number",
    "iban": "IBAN", "national": "national number",
}  # fmt: skip


def describe_removals(step: StepCounts) -> list[str]:
    """Say what a step removed and why, the largest count first, then what it changed."""
    types = step.get("unsupported_types", {})
    names = [f"{ending} {n:,}" for ending, n in [*types.items()][:MAX_ENDINGS]]
    if len(types) > MAX_ENDINGS:
        names.append(f"{len(types) - MAX_ENDINGS:,} other endings")
    endings = ", ".join(names)
    removed = sorted(step["removed"].items(), key=lambda item: -item[1])
    replaced = {
        f"{PERSONAL_DATA.get(kind, kind)} replaced": n
        for kind, n in step.get("replaced", {}).items()
    }
    fallbacks = {f"page extracted fast: {k}": n for k, n in step.get("fallbacks", {}).items()}
    return [
        format_count(n, reason) + f" ({endings})" * reason.endswith(UNSUPPORTED_TYPE)
        for reason, n in [
            *removed,
            *replaced.items(),
            *step.get("cut", {}).items(),
            *fallbacks.items(),
            *(("copy added", n) for n in step.get("repeated", {}).values()),
        ]
        if n
    ]


def format_count(n: int, reason: str) -> str:
    """Write a count and a reason as people do: "2 files: hidden", "1 file: hidden"."""
    unit, colon, rest = reason.partition(": ")
    if colon:  # "file", "line", ...
        return f"{n:,} {unit}{'s' * (n != 1)}: {PLURALS.get(rest, rest) if n != 1 else rest}"
    return f"{n:,} {PLURALS.get(reason, reason) if n != 1 else reason}"
