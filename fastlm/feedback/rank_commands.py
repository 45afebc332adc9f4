"""Define ``fastlm rank``: store answers in a feedback database, rank them, export the rankings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastlm.errors import InputError
from fastlm.pipeline.commands import Cache
from fastlm.progress import bars
from fastlm.serve.commands import needs_serve
from fastlm.sources.packages import default_cache
from fastlm.terminal import console, echo
from fastlm.threads import Threads

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.serve.ranking import RankingStore
    from fastlm.serve.text_generator import TextGenerator

app = typer.Typer(help="Rank answers to prompts, as preferences to train on.", no_args_is_help=True)
Store = Annotated[
    str, typer.Argument(help="Use this feedback database: SQLite file or postgresql://...")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Count bad rows and continue")]


def _note(text: str) -> None:
    echo(text, err=True)


def _open_store(store: str, *, seed: int = 0) -> "RankingStore":
    """Open the database, which must exist."""
    with needs_serve():
        from fastlm.serve.ranking import RankingStore
    return RankingStore(store, create=False, seed=seed)


@app.command("import", short_help="Add prompts with answers to a store.")
def import_command(
    store: Store,
    sources: Annotated[
        list[str],
        typer.Argument(help="Read .jsonl or .json files, folders, pypi:, sdist: or deb:NAME"),
    ],
    skip_bad: SkipBad = False,
    cache: Cache = None,
) -> None:
    """Add prompts with answers to a feedback database; a missing file is created.

    Rows are {"prompt", "answers"}, or preferences: pairs, ranked lists, corrections. Their ranks
    are those of the row's "rater", or of a rater called "file".
    """
    from fastlm.data.conversations import RowCounts

    with needs_serve():
        from fastlm.serve.ranking import RankingStore, read_ranking_examples

    rows = RowCounts()
    examples = list(
        read_ranking_examples(
            sources, cache=cache or default_cache(), skip_bad=skip_bad, rows=rows, on_skip=_note
        )
    )  # before the store is created, so that a bad row leaves no empty file
    with RankingStore(store) as ranking_store:
        added = ranking_store.add_items(examples)
    rows.by_reason["with answers that differ only in personal data"] = added.indistinct
    skipped = "".join(f", {count:,} {reason}" for reason, count in (+rows.by_reason).items())
    echo(
        f"{store}: {rows.total:,} rows read{skipped}, {added.duplicates:,} duplicates;"
        f" new prompts {added.items:,}, rankings {added.rankings:,},"
        f" corrections {added.corrections:,}"
    )


@app.command("sample", short_help="Add a model's answers to prompts to a store.")
def sample_command(
    store: Store,
    prompts: Annotated[
        list[str], typer.Option(help="Read rows with a prompt, or conversations; may be repeated")
    ],
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", help="Use this Hugging Face folder, .gguf, run or model:smollm2"
        ),
    ],
    num_generations: Annotated[int, typer.Option(min=2, help="Sample N answers per prompt")] = 4,
    temperature: Annotated[float, typer.Option(min=0.01, help="Set the temperature")] = 1.0,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens up to this probability")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit the tokens per answer")] = 256,
    seed: Annotated[int, typer.Option(help="Set the seed; it determines the answers")] = 0,
    skip_bad: SkipBad = False,
    cache: Cache = None,
    threads: Threads = None,
) -> None:
    """Sample answers to each prompt from a model, and add them to a store.

    Each prompt's answers are stored at once: after Ctrl-C the same command continues. Equal and
    empty answers are left out.
    """
    with needs_serve():
        from fastlm.data.preferences import UnrankedAnswers
        from fastlm.data.prompts import read_prompts
        from fastlm.serve.ranking import ImportCounts, RankingStore
        from fastlm.serve.text_generator import TextGenerator

    sources = read_prompts(
        prompts, cache=cache or default_cache(), skip_bad=skip_bad, on_skip=_note
    )
    rows, generator, added = list(sources), TextGenerator(model), ImportCounts()
    sampling = {"temperature": temperature, "top_p": top_p, "max_new_tokens": max_new_tokens}
    with RankingStore(store) as ranking_store:
        for number, row in enumerate(bars(rows, "sampling", unit="prompts")):
            if ranking_store.has_prompt(row.messages, row.tools):
                added.duplicates += 1
                continue
            try:
                ids = _prompt_ids(generator, row)
                answers = generator.generate(
                    [ids] * num_generations, seed=seed + number * num_generations, **sampling
                )
            except InputError as error:
                raise InputError(f"{row.location}: {error}") from None
            texts = dict.fromkeys(answer.text for answer in answers if answer.text.strip())
            if len(texts) < 2:
                added.indistinct += 1
                continue
            messages = tuple([{"role": "assistant", "content": text}] for text in texts)
            ranking_store.add_items(
                [UnrankedAnswers(row.messages, messages, row.tools)], model.name
            )
            added.items += 1
    echo(
        f"{store}: new prompts {added.items:,}, duplicates {added.duplicates:,}, left out because"
        f" their answers are equal {added.indistinct:,}"
    )


def _prompt_ids(generator: "TextGenerator", row: "Prompt") -> list[int]:
    if generator.tokenizer.chat_template is not None:
        variables: dict[str, Any] = {} if row.tools is None else {"tools": row.tools}
        return generator.tokenizer.encode_chat(row.messages, **variables)
    if len(row.messages) > 1:
        raise InputError(
            "model: expected a chat template for a prompt of several messages, has none"
        )
    return generator.prompt_ids(row.messages[0]["content"], raw=True)


@app.command("judge", short_help="Rank the answers, prompt by prompt.")
def judge_command(
    store: Store,
    rater: Annotated[str, typer.Option("--rater", "-r", help="Set your name")],
    skipped: Annotated[
        bool, typer.Option("--skipped", help="Rank only the prompts that you skipped")
    ] = False,
    seed: Annotated[int, typer.Option(help="Set the seed of the display order")] = 0,
) -> None:
    """Rank the answers to each prompt: type their numbers, the best first. ? shows the commands.

    Each ranking is stored at once. Several raters can work at the same time. If stdin is not a
    terminal, each of its lines is an input.
    """
    with needs_serve():
        from fastlm.feedback import rank_terminal

    with _open_store(store, seed=seed) as ranking_store:
        rank_terminal.rank_items(ranking_store, rater, skipped=skipped)


@app.command("agreement", short_help="Show what each rater did, and how far raters agree.")
def agreement_command(
    store: Store, as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False
) -> None:
    """Show what each rater did, and how far raters agree: Krippendorff's alpha, and pairs of
    answers in the same order."""
    import json

    from rich.table import Column, Table
    from rich.text import Text

    with _open_store(store) as ranking_store:
        report = ranking_store.agreement_report()
    if as_json:
        echo(json.dumps(report, indent=1))
        return
    output = console(highlight=False)
    counts = Table(
        "rater", *(Column(c, justify="right") for c in ("ranked", "skipped", "corrected"))
    )
    for name, n in report["raters"].items():
        counts.add_row(Text(name), *(f"{n[key]:,}" for key in ("ranked", "skipped", "corrected")))
    output.print(counts)
    if report["pairs"]:
        table = Table(
            "raters", Column("prompts in common", justify="right"),
            Column("pairs of answers in the same order", justify="right"),
        )  # fmt: skip
        for pair in report["pairs"]:
            share = f"{pair['alike'] / pair['pairs']:.0%} of {pair['pairs']:,}"
            table.add_row(Text(", ".join(pair["raters"])), f"{pair['items']:,}", share)
        output.print(table)
    if report["alpha"] is None:
        echo("Krippendorff's alpha: none, no two raters ranked the same prompt")
    else:
        echo(
            f"Krippendorff's alpha (ordinal): {report['alpha']:.3f}; prompts with two raters or"
            f" more: {report['items']:,}"
        )


@app.command("export", short_help="Write rankings and corrections as rows to train on.")
def export_command(
    store: Store,
    path: Annotated[Path, typer.Argument(help="Write this .jsonl file")],
    form: Annotated[
        str, typer.Option(help="Write pairs, ranked, labels, corrected or demonstrations")
    ] = "pairs",
    rater: Annotated[
        str | None, typer.Option("--rater", "-r", help="Export only this rater")
    ] = None,
) -> None:
    """Write rankings and corrections as rows to train on.

    pairs: the better and the worse one of two answers. ranked: whole rankings. labels: the best
    and the worst answers. corrected: corrections. demonstrations: corrections as conversations.
    """
    if path.suffix not in (".jsonl", ".ndjson"):
        raise InputError(f"path: expected a name that ends in .jsonl, got {path}")
    with _open_store(store) as ranking_store:
        rows = ranking_store.export(path, form, rater=rater)
    echo(f"{path}: {rows:,} rows")
