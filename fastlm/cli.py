"""The command line, ``fastlm COMMAND``. A command is thin: a function with the same options works.

Nothing heavy is imported before a command runs, so that ``--help`` answers at once. Results go to
stdout, progress and messages to stderr. Exit status: 2 after bad input, with one line on stderr; 3
if a run diverged; 4 if another process of a run is lost; 130 after Ctrl-C.
"""

import errno
import importlib.metadata
import io
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastlm.errors import InputError
from fastlm.pipeline.commands import Cache, command_of, options_command
from fastlm.pipeline.stage import Repeated, at_least_one
from fastlm.startup import fast_imports
from fastlm.terminal import console, echo, write_answer
from fastlm.threads import Threads
from fastlm.tokenizer import chat_template
from fastlm.train.distributed import LostRankError, is_first_report

DIVERGED, LOST, INTERRUPTED = 3, 4, 130


class CommandGroup(TyperGroup):
    """Turns exceptions into a line on stderr and an exit status, for all commands."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (InputError, OSError) as e:
            if getattr(e, "errno", None) == errno.EPIPE:  # the reader has gone: click exits quietly
                raise
            _fail(e, 2)
        except typer.BadParameter as e:
            if (line := _bad_value(e)) is None:
                raise
            _fail(line, 2)
        except KeyboardInterrupt as e:
            _fail(e, INTERRUPTED)
        except LostRankError as e:
            _fail(e, LOST)
        except ArithmeticError as e:
            from fastlm.train.objective import DivergedError

            if not isinstance(e, DivergedError):
                raise
            _fail(e, DIVERGED)


def _bad_value(error: typer.BadParameter) -> InputError | None:
    """Return typer's error for an option's value as an InputError that also names the value."""
    errors = getattr(error.__cause__, "errors", list)()
    param: Any = error.param
    if not errors or param is None:
        return None
    message = errors[0]["msg"].removeprefix("Value error, ")
    if " is not one of " in message:  # typer's own, of a Literal
        expected = f"one of {message.partition(' is not one of ')[2].rstrip('.')}"
    else:
        expected = message.partition(",")[0].removeprefix("Input should be ")
    return InputError(
        f"{max(param.opts, key=len)}: expected {expected}, got {errors[0]['input']!r:.80}"
    )


def _fail(error: BaseException, status: int) -> None:
    text = " ".join(str(error).split())
    if is_first_report(text):
        echo(f"fastlm: {text}" if text else "fastlm: interrupted", err=True)
    raise typer.Exit(status)


app = typer.Typer(
    cls=CommandGroup,
    help="Train, evaluate, quantize and serve language models on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(
    help="Train a tokenizer, or encode a text with one.", no_args_is_help=True
)


@dataclass(frozen=True, kw_only=True)
class PromptOptions:
    """Input and output options of ``fastlm generate``."""

    prompt: Annotated[
        tuple[str, ...],
        Repeated("Continue or answer this text. - reads stdin. Several are one batch"), "-p",
    ] = ()  # fmt: skip
    prompt_file: Annotated[tuple[Path, ...], Repeated("Read a prompt from this file")] = ()
    raw: Annotated[bool, "Continue the prompt unchanged, without the chat template"] = False
    json: Annotated[bool, "Print texts and times as JSON"] = False


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Options of commands that generate text: a model, and how it samples tokens."""

    model: Annotated[
        Path, "Generate with this Hugging Face folder, .gguf, fastlm run or model:smollm2", "-m"
    ]
    max_new_tokens: Annotated[int, "Generate at most this many tokens"] = 256
    temperature: Annotated[
        float, "Sample at this temperature. 0 always takes the likeliest token"
    ] = 0.7
    top_k: Annotated[int | None, "Sample from the K likeliest tokens"] = None
    top_p: Annotated[
        float | None, "Sample from the likeliest tokens that add up to this probability"
    ] = None
    min_p: Annotated[
        float | None, "Sample from tokens with at least this share of the highest probability"
    ] = None
    repetition_penalty: Annotated[
        float, "Make tokens that are already in the text less likely, if above 1"
    ] = 1.0
    stop: Annotated[tuple[str, ...], Repeated("End before this text. Repeat it for more")] = ()
    seed: Annotated[int | None, "Sample with this seed: the same seed generates the same text"] = (
        None
    )
    act_bits: Annotated[
        int | None,
        "Multiply quantized weights with inputs rounded to int8 (8) or not rounded (16). Default:"
        " what the model states, 8 for .gguf files",
    ] = None
    stats: Annotated[
        bool | None, "Print tokens and tokens/s to stderr. Default: if stderr is a terminal"
    ] = None

    def __post_init__(self) -> None:
        at_least_one(self, "max_new_tokens")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling options of `fastlm.serve.text_generator.TextGenerator.generate`."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def shows_stats(self) -> bool:
        return sys.stderr.isatty() if self.stats is None else self.stats


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(GenerationOptions, PromptOptions):
    """The options of ``fastlm generate``."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(GenerationOptions):
    """The options of ``fastlm chat``."""

    system: Annotated[str | None, "Begin the conversation with this system message"] = None
    max_new_tokens: Annotated[int, "Generate at most this many tokens"] = 512
    top_p: Annotated[
        float | None, "Sample from the likeliest tokens that add up to this probability"
    ] = 0.95


def main() -> None:
    """Run the command line: the console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal with another encoding shows "?"
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # invalid UTF-8 is refused where the text is used
        sys.stdin.reconfigure(errors="surrogateescape")
    app(prog_name="fastlm")


def _show_version(value: bool) -> None:
    if value:
        echo(f"fastlm {importlib.metadata.version('fastlm')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass


@app.command(short_help="Print versions, hardware, and the implementation of every op.")
def info(
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="Describe this model folder or .gguf file instead"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
    threads: Threads = None,
) -> None:
    """Print versions, hardware, extensions, and which implementation of every op runs here."""
    if model is not None:
        from fastlm.checkpoint.describe import describe_model

        values = describe_model(model)
    else:
        from fastlm import inventory

        values = inventory.info()
    if as_json:
        echo(json.dumps(values, indent=1))
        return
    if model is not None:
        for key, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{count:,} {name}" for name, count in value.items())
            if value is not None:
                echo(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
        return
    from rich.table import Column, Table

    from fastlm.ops import __all__ as public_ops

    facts = Table(box=None, show_header=False)
    for key, value in values.items():
        if not isinstance(value, dict):
            facts.add_row(key, str(value))
    for key in ("cpu_isa_unavailable", "backends"):
        for name, reason in values[key].items():
            facts.add_row(f"{key.removesuffix('_unavailable')} {name}", reason or "yes")
    # what runs each op and what else can; the first table has the reason why a backend cannot
    columns = [name for name, reason in values["backends"].items() if reason is None]
    ops = Table(
        Column("op", no_wrap=True), "runs on", *(Column(c, justify="center") for c in columns)
    )
    limits = Table(Column("~ partial support", no_wrap=True), "", box=None, header_style="")
    helpers = []
    for name, row in values["ops"].items():
        if row["backend"] == "reference" and name not in public_ops:
            helpers.append(name)
        marks = ["" if c in row["unavailable"] else "✓~"[c in row["supports"]] for c in columns]
        ops.add_row(name, row["backend"] or "nothing", *marks)
        by_text: dict[str, list[str]] = {}
        for backend, text in row["supports"].items():
            by_text.setdefault(text, []).append(backend)
        for text, backends in by_text.items():
            limits.add_row(name, f"{', '.join(backends)}: {text}")
    if helpers:
        ops.caption = (
            f"{', '.join(helpers)}: parts of ops that model code calls where a backend has a"
            " kernel for them, and else not"
        )
    console().print(facts, ops, limits)


@app.command(short_help="List the question sets of `fastlm eval --tasks`.")
def tasks(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Sets or abilities whose questions are written, or all; with --out"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write questions to this .jsonl file, for data prepare --decontaminate",
        ),
    ] = None,
    cache: Cache = None,
    ability: Annotated[str | None, typer.Option(help="List only sets of this ability")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """List the question sets: the ability they measure, their formats, licences and sources. With
    NAMES and --out, write the questions of these sets to a file.
    """
    if names or out is not None:
        _write_questions(names or [], out, cache)
        return
    from fastlm.evals.registry import registered_tasks
    from fastlm.evals.task import ABILITIES

    if ability is not None and ability not in ABILITIES:
        raise InputError(f"ability: expected one of {', '.join(ABILITIES)}, got {ability!r:.60}")
    task_rows = [row for row in registered_tasks() if ability in (None, row["ability"])]
    if as_json:
        echo(json.dumps(task_rows, indent=1))
        return
    from rich.table import Table

    table = Table(box=None)
    for key in task_rows[0]:
        table.add_column(key, no_wrap=key != "formats", overflow="fold")
    for row in sorted(task_rows, key=lambda row: ABILITIES.index(row["ability"])):
        table.add_row(*row.values())
    output = console(width=None if sys.stdout.isatty() else 140)
    output.print(table, markup=False, highlight=False)


def _write_questions(names: list[str], out: Path | None, cache: Path | None) -> None:
    if out is None or not names:
        got = "NAMES" if names else "--out"
        raise InputError(f"out: needs NAMES of question sets and --out FILE, got only {got}")
    from fastlm.evals.contamination import write_questions
    from fastlm.sources.packages import default_cache

    if not out.name.endswith(".jsonl"):
        raise InputError(f"out: expected a name that ends in .jsonl, got {out.name}")
    counts = write_questions(names, out, cache or default_cache())
    total = sum(counts.values())
    echo(f"{out}: {total:,} questions of {', '.join(counts)}")


@app.command(short_help="Run a recipe, or continue it.")
def run(
    recipe: Annotated[Path, typer.Argument(help="Run this recipe, such as recipes/full.toml")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write to this run folder. Default: runs/NAME"),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change an option of a stage: --set pretrain.max_seconds=60"),
    ] = None,
    until: Annotated[str | None, typer.Option(help="Stop after the stage with this name")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop")] = False,
    cache: Annotated[Path | None, typer.Option(help="Keep packages in this folder")] = None,
    threads: Threads = None,
) -> None:
    """Run all stages of a recipe. Finished stages are skipped, an interrupted one continues."""
    from fastlm.pipeline.events import View
    from fastlm.stages import run_recipe

    summaries: dict[str, str] = {}
    view = View()

    def on_event(event: dict[str, Any]) -> None:
        view(event)
        if "summary" in event:
            summaries[event["stage"]] = event["summary"]

    run_recipe(
        recipe, out, overrides=sets or (), until=until, cache=cache, dry_run=dry_run,
        command=_command(), track=view.track, on_plan=_show_plan, on_event=on_event,
    )  # fmt: skip
    for name, text in summaries.items():
        echo(text if name == "report" else f"{name}: {text}")


def _show_plan(plan: list[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "kind", "inputs", "", "why", box=None)
    for planned in plan:
        step = planned.step
        sources = [name for names in step.inputs.values() for name in names]
        action = f"{planned.action}, archive the old one" if planned.training else planned.action
        cells = (step.name, step.stage.kind, ", ".join(sources), action, planned.reason)
        table.add_row(*map(Text, cells))  # Text: a recipe's words are not markup
    console(stderr=True).print(table)


def _command() -> str:
    return shlex.join(["fastlm", *sys.argv[1:]])


def _stage_commands() -> None:
    """Add the commands of the stages (`fastlm.stages`): one word, or a command in a group."""
    from fastlm.data.commands import app as data_app
    from fastlm.evals.safety.commands import canaries_command, toxicity_command
    from fastlm.feedback.commands import forget_command
    from fastlm.feedback.rank_commands import app as rank_app
    from fastlm.pipeline.registry_commands import app as runs_app
    from fastlm.pipeline.registry_commands import card_command, diff_command
    from fastlm.serve.admin_commands import promote, rollback
    from fastlm.serve.commands import app as feedback_app
    from fastlm.serve.commands import serve
    from fastlm.serve.label_commands import label_command
    from fastlm.stages import KINDS

    generate = options_command(GenerateOptions, _generate)
    app.command("generate", short_help="Generate text for a prompt.")(generate)
    app.command("chat")(options_command(ChatOptions, _chat))
    app.command("serve", short_help="Serve a model over HTTP, with a chat page.")(serve)
    app.command("label", short_help="Label judged answers, to measure the judge.")(label_command)
    app.command("promote", short_help="Switch a running server to another model.")(promote)
    app.command("rollback", short_help="End the canary of a server, or undo its last promotion.")(
        rollback
    )
    data_app.command("canaries")(canaries_command)
    data_app.command("toxicity")(toxicity_command)
    data_app.command("forget")(forget_command)
    runs_app.command("diff")(diff_command(KINDS))
    runs_app.command("card")(card_command(KINDS))
    groups = {"data": data_app, "tokenizer": tokenizer_app, "rank": rank_app}
    groups |= {"feedback": feedback_app, "runs": runs_app}
    for group, typed in groups.items():
        app.add_typer(typed, name=group)
    for stage in KINDS.values():
        *group, word = stage.command
        (groups[group[0]] if group else app).command(word)(command_of(stage))


def _generate(options: GenerateOptions) -> None:
    """Generate text, token by token, with the chat template if the model has one.

    Several prompts are one batch. Their texts follow in order, with an empty line between them.
    """
    if not options.raw:
        chat_template.start_worker()
    with fast_imports():
        from fastlm.serve.text_generator import TextGenerator

    texts = _prompts(options)
    generator = TextGenerator(options.model, options.act_bits)
    ids = [generator.prompt_ids(text, raw=options.raw) for text in texts]
    streams = len(texts) == 1 and not options.json
    on_piece = (lambda _, piece: write_answer(piece)) if streams else (lambda *_: None)
    answers = generator.generate(
        ids, on_piece, max_new_tokens=options.max_new_tokens, **options.sampling
    )
    if options.json:
        results = [
            {
                "prompt": text, "prompt_tokens": len(prompt), "text": answer.text,
                "new_tokens": len(answer.token_ids), "finish_reason": answer.finish_reason,
            }
            for text, prompt, answer in zip(texts, ids, answers)
        ]  # fmt: skip
        echo(json.dumps({"results": results, "stats": generator.timing.figures()}, indent=1))
    elif streams:
        echo()
    else:
        write_answer("\n\n".join(answer.text for answer in answers) + "\n")
    if any(answer.finish_reason == "context" for answer in answers):
        limit = f"the model's context of {generator.context_limit:,} tokens is full"
        echo(f"{limit}: the text ends there", err=True)
    if options.shows_stats:
        echo(str(generator.timing), err=True)


def _prompts(options: PromptOptions) -> list[str]:
    """Return the texts of --prompt, then of --prompt-file, without the last newline."""
    if options.prompt.count("-") > 1:
        raise InputError("prompt: expected - once, stdin is read once")
    texts = [sys.stdin.read() if text == "-" else text for text in options.prompt]
    for file in options.prompt_file:
        try:
            texts.append(file.read_text("utf-8"))
        except UnicodeDecodeError as error:
            raise InputError(f"prompt_file {file}: expected UTF-8 text: {error}") from None
    if not texts:
        raise InputError(
            "prompt: expected --prompt TEXT (- for stdin) or --prompt-file FILE, got none"
        )
    return [text.removesuffix("\n") for text in texts]


def _chat(options: ChatOptions) -> None:
    """Chat with a model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.

    If stdin is not a terminal, each of its lines is a message.
    """
    chat_template.start_worker()
    with fast_imports():
        from fastlm.serve import chat_terminal
        from fastlm.serve.chat_session import ChatSession
        from fastlm.serve.text_generator import TextGenerator

    generator = TextGenerator(options.model, options.act_bits)
    session = ChatSession(generator, system=options.system, max_new_tokens=options.max_new_tokens)
    chat_terminal.run(session, stats=options.shows_stats, **options.sampling)


@app.command()
def merge(
    model: Annotated[
        Path, typer.Option("--model", "-m", help="Merge this LoRA adapter, of fastlm or PEFT")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write to this folder")],
    base: Annotated[
        Path | None,
        typer.Option(help="Merge into this base model. Default: the one that the adapter names"),
    ] = None,
    threads: Threads = None,
) -> None:
    """Merge a LoRA adapter into its base model."""
    from fastlm.checkpoint.folder import find_base_model
    from fastlm.model.adapter import load_adapter
    from fastlm.model.causal_lm import CausalLM
    from fastlm.model.lora import merge_lora
    from fastlm.pipeline.run_folder import is_adapter, locate_model
    from fastlm.tokenizer.load import load_tokenizer

    if not is_adapter(adapter := locate_model(model)):
        raise InputError(f"model: expected a LoRA adapter, got another model, {model}")
    merged = load_adapter(CausalLM.from_pretrained(base or find_base_model(adapter)), adapter)
    merge_lora(merged).save_pretrained(out)
    load_tokenizer(adapter, merged.config.to_dict()).save(out)
    echo(str(out))


@tokenizer_app.command("encode")
def tokenizer_encode(
    tokenizer: Annotated[
        Path,
        typer.Option(
            "--tokenizer", "-t", help="Use this tokenizer: a folder, tokenizer.json or .gguf file"
        ),
    ],
    text: Annotated[str | None, typer.Argument(help="Encode this text. Default: stdin")] = None,
    pieces: Annotated[
        bool, typer.Option("--pieces", help="Also print the bytes of every token")
    ] = False,
    threads: Threads = None,
) -> None:
    """Print the tokens of a text."""
    from fastlm.tokenizer.tokenizer import Tokenizer

    tool = Tokenizer.load(tokenizer)
    ids = tool.encode(sys.stdin.read() if text is None else text)
    if pieces:
        for i in ids:
            echo(f"{i}\t{tool.token_bytes(i)!r}")
    else:
        echo(" ".join(map(str, ids)))


_stage_commands()

if __name__ == "__main__":
    main()
