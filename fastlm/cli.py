"""``fastlm VERB``: each verb is thin; the work is a function of the package with the same options.

Nothing heavy is imported before a verb runs, so that ``--help`` answers at once. Bad input is one
line on stderr and exit status 2, a diverged run 3, Ctrl-C 130. Results go to stdout, progress and
notes to stderr.
"""

import errno
import importlib.metadata
import io
import json
import shlex
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastlm.errors import InputError
from fastlm.progress import bars
from fastlm.threads import Threads, Watch

DIVERGED, INTERRUPTED = 3, 130


class Verbs(TyperGroup):
    """The one place where an exception becomes a line and a status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as e:
            _fail(e, 2)
        except typer.BadParameter as e:
            if (line := _bad_value(e)) is None:
                raise
            _fail(line, 2)
        except OSError as e:
            if e.errno == errno.EPIPE:  # the reader has gone: click ends quietly
                raise
            _fail(e, 2)
        except KeyboardInterrupt as e:
            _fail(e, INTERRUPTED)
        except ArithmeticError as e:
            from fastlm.train.loop import NonFiniteError

            if not isinstance(e, NonFiniteError):
                raise
            _fail(e, DIVERGED)


def _bad_value(error: typer.BadParameter) -> InputError | None:
    """Typer's refusal of an option's value as ours: with the value, which pydantic's text lacks."""
    found = getattr(error.__cause__, "errors", list)()
    param: Any = error.param
    if not found or param is None:
        return None
    wanted = found[0]["msg"].partition(",")[0].removeprefix("Input should be ")
    return InputError(f"{max(param.opts, key=len)}: wanted {wanted}, got {found[0]['input']!r:.80}")


def _fail(error: BaseException, status: int) -> None:
    text = " ".join(str(error).split())
    typer.echo(f"fastlm: {text}" if text else "fastlm: interrupted", err=True)
    raise typer.Exit(status)


app = typer.Typer(
    cls=Verbs,
    help="From raw text to a quantized language model, on fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
tokenizer_app = typer.Typer(help="Train a tokenizer, look at what it does.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")

Model = Annotated[
    Path,
    typer.Option("--model", "-m", help="Hugging Face folder, .gguf, fastlm run or model:smollm2"),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")]
TopK = Annotated[int | None, typer.Option(help="Choose among the K likeliest tokens")]
TopP = Annotated[float | None, typer.Option(help="Choose among the likeliest that hold this share")]
MinP = Annotated[float | None, typer.Option(help="Only tokens so likely beside the likeliest")]
Penalty = Annotated[float, typer.Option(help="Above 1: what was said becomes less likely")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given again")]
ActBits = Annotated[
    int | None,
    typer.Option(
        help="8: multiply quantized weights with inputs rounded to int8, 16: not rounded;"
        " default: as the model says, 8 for .gguf files"
    ),
]
Seed = Annotated[int | None, typer.Option(help="The same seed writes the same text")]
Stats = Annotated[
    bool | None,
    typer.Option(
        "--stats/--no-stats",
        help="Tokens and tokens/s on stderr; default: where stderr is a terminal",
        show_default=False,
    ),
]


_watch = Watch()  # until the work begins: loading torch takes a second


def _on_terminal() -> bool:
    return sys.stderr.isatty()


def _say_if_busy() -> None:
    """To a user who waits for the answer; a script's stderr stays empty."""
    import torch

    if _on_terminal() and (line := _watch.line(torch.get_num_threads())):
        typer.echo(f"fastlm: {line}", err=True)


def main() -> None:
    """The console script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal of another encoding shows "?"
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 is refused where it is used
        sys.stdin.reconfigure(errors="surrogateescape")
    app(prog_name="fastlm")


def _data_commands() -> None:
    from fastlm.data.commands import app as data_app

    app.add_typer(data_app, name="data")


_data_commands()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastlm {importlib.metadata.version('fastlm')}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass


@app.command(short_help="Versions, hardware, and which implementation of every op runs.")
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
    threads: Threads = None,
) -> None:
    """Versions, hardware, extensions, and which implementation of every op runs here."""
    from fastlm import backend

    have = backend.info()
    if as_json:
        typer.echo(json.dumps(have, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    facts = Table(box=None, show_header=False)
    for key, value in have.items():
        if not isinstance(value, dict):
            facts.add_row(key, str(value))
    for key in ("cpu_isa_why_not", "backends"):
        for name, why in have[key].items():
            facts.add_row(f"{key.removesuffix('_why_not')} {name}", why or "yes")
    console.print(facts)
    # what runs an op, and what else could here; why a backend cannot run at all stands above
    columns = [name for name, why in have["backends"].items() if why is None]
    ops = Table(
        Column("op", no_wrap=True), "runs on", *(Column(c, justify="center") for c in columns)
    )
    for name, row in have["ops"].items():
        marks = ["" if column in row["why_not"] else "✓" for column in columns]
        ops.add_row(name, row["picked"] or "nothing", *marks)
    console.print(ops)


@app.command(short_help="From a recipe to a model and its report, or on from where it was.")
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, such as recipes/demo.toml")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Run folder; default runs/NAME")
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value for a key: --set pretrain.max_seconds=60"),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(help="Stop after data, tokenizer, shards, pretrain, eval, quantize or report"),
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Where packages are kept")] = None,
    threads: Threads = None,
) -> None:
    """Run a whole recipe; what is finished is skipped, what was cut off goes on."""
    from fastlm.run import run_recipe

    _say_if_busy()
    summary = run_recipe(
        recipe, out, overrides=sets or (), until=until, cache=cache, command=_command(),
        track=bars, on_event=_EventLines(),
    )  # fmt: skip
    keys = ("bits_per_byte", "bits_per_byte_xz", "bits_per_byte_zstd", "bits_per_byte_int4")
    if until is None:
        typer.echo("  ".join(f"{k} {summary[k]:.4f}" for k in keys))
        typer.echo(str((out or Path("runs") / summary["recipe"]) / "report.html"))


def _command() -> str:
    return shlex.join(["fastlm", *sys.argv[1:]])


class _EventLines:
    """Stages, validations and samples, one line each. The steps since the last line (mean loss,
    median speed, time left at their pace) have a line at every multiple of `every`, or end a
    validation's.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.before: dict[str, Any] = {"seconds": 0.0, "progress": 0.0}
        self.steps: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        if "stage" in event:
            took = f" in {event['seconds']:.1f} s" if "seconds" in event else ""
            if "path" in event:
                took = f", it no longer fits; what was trained is now in {event['path']}"
            typer.echo(f"{event['stage']}: {event['state']}{took}", err=True)
        elif "loss" in event:
            self.steps.append(event)
            if self.every and event["step"] % self.every == 0:
                typer.echo(f"step {event['step']}: {self._training()}", err=True)
        elif "val_loss" in event:
            training = "" if self.every or not self.steps else f"; {self._training()}"
            typer.echo(
                f"step {event['step']}: held-out loss {event['val_loss']:.4f}, "
                f"{event['bits_per_byte']:.4f} bits per byte{training}",
                err=True,
            )
        elif "sample" in event:
            typer.echo(f"step {event['step']} writes: {event['sample']!r}", err=True)

    def _training(self) -> str:
        from fastlm.report import seconds_text

        last = self.steps[-1]
        loss = statistics.fmean(step["loss"] for step in self.steps)
        rate = statistics.median(step["tokens_per_second"] for step in self.steps)
        took, done = (last[key] - self.before[key] for key in ("seconds", "progress"))
        left = (1 - last["progress"]) * took / done
        self.before, self.steps = last, []
        return (
            f"training loss {loss:.4g}, lr {last['lr']:.3g}, {rate:,.0f} tokens/s,"
            f" {seconds_text(left)} left"
        )


def _show_skipped(message: str) -> None:
    typer.echo(f"skipped: {message}", err=True)


@app.command(short_help="Train a model on token shards, or go on with it.")
def pretrain(
    train: Annotated[Path, typer.Option(help="Folder of token shards to train on")],
    config: Annotated[Path, typer.Option(help="config.json of the model (Hugging Face's names)")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder")],
    heldout: Annotated[
        Path | None, typer.Option(help="Folder of token shards to validate on")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer, for samples and the model folder")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Steps of the whole run")] = None,
    max_seconds: Annotated[
        float | None, typer.Option(help="Seconds of the whole run; validations are not counted")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of the whole run")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch")] = 16,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence")] = 256,
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate")] = 1e-3,
    schedule: Annotated[str, typer.Option(help="cosine or wsd")] = "cosine",
    warmup: Annotated[float, typer.Option(help="Share of the run")] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Of matrices")] = 0.1,
    max_grad_norm: Annotated[float, typer.Option(help="Clip the gradient to this norm")] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="bfloat16 (with float32 master weights) or float32")
    ] = "bfloat16",
    checkpoint_every: Annotated[int, typer.Option(help="Steps")] = 200,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines on stderr")] = 10,
    keep: Annotated[int, typer.Option(help="Checkpoints to keep")] = 2,
    seed: Annotated[int, typer.Option(help="Of weights, data order and samples")] = 0,
    threads: Threads = None,
) -> None:
    """Train a model on token shards; the same command again resumes from the last checkpoint.

    With a larger budget it trains on, at the rate that the schedule of the whole new run has there.
    """
    import torch

    from fastlm.architectures import config_of
    from fastlm.data.shards import BatchSampler, TokenDataset
    from fastlm.files import read_json
    from fastlm.model import CausalLM
    from fastlm.tokenizer import Tokenizer
    from fastlm.train.loop import TrainOptions
    from fastlm.train.pretrain import pretrain as train_model

    _say_if_busy()
    model_config = config_of(read_json(config), config)
    options = TrainOptions(
        max_steps=max_steps, max_seconds=max_seconds, max_tokens=max_tokens, accumulate=accumulate,
        dtype=dtype, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay,
        max_grad_norm=max_grad_norm, checkpoint_every=checkpoint_every, keep=keep,
    )  # fmt: skip
    options.check()
    words = Tokenizer.load(tokenizer) if tokenizer else None
    sampler = BatchSampler(TokenDataset(train), batch_size, seq_len, seed=seed)
    model = CausalLM(model_config, seed=seed)
    torch.manual_seed(seed)
    result = train_model(
        model, sampler, TokenDataset(heldout) if heldout else None, options, out,
        tokenizer=words, track=bars, on_event=_EventLines(log_every),
    )  # fmt: skip
    model.save_pretrained(out / "model")
    if words:
        words.save(out / "model")
    typer.echo(
        f"{result.steps} steps, loss {result.loss:.4f}, {result.tokens_per_second:,.0f} tokens/s:"
        f" {out / 'model'}"
    )


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the quantized model")],
    format: Annotated[str, typer.Option(help="w4a16, w8a16, w8a8 or w4a8")] = "w4a16",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale")] = 128,
    method: Annotated[str, typer.Option(help="rtn: round to nearest")] = "rtn",
    embeddings: Annotated[int, typer.Option(help="Bits; 16: left alone; 0: as the format")] = 0,
    head: Annotated[int, typer.Option(help="Bits; 16: left alone; 0: as the format")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="Held-out text: prints the change in bits per byte")
    ] = None,
    threads: Threads = None,
) -> None:
    """Store the weights in 4 or 8 bits."""
    from fastlm.chat import load_model
    from fastlm.evals.commands import text_bits_per_byte
    from fastlm.model import CausalLM
    from fastlm.quant import quantize as quantize_model
    from fastlm.stages import weight_bytes

    if out.exists() and not out.is_dir():  # before the work, not after it
        raise InputError(f"out: wanted a folder, got the file {out}")
    if out.suffix == ".gguf":
        raise InputError(f"out: wanted the name of a folder (GGUF is only read), got {out}")
    if out.exists() and any(p.exists() and out.samefile(p) for p in (model, model / "model")):
        raise InputError(f"out: wanted another folder than the model's, got {out}")
    network, tokenizer = load_model(model)
    size = sum(parameter.nbytes for parameter in network.parameters())
    before = text_bits_per_byte(network, tokenizer, data, track=bars) if data else None
    network = quantize_model(
        network,
        format,
        group_size=group_size,
        method=method,
        embeddings=embeddings,
        head=head,
        track=bars,
    )
    assert isinstance(network, CausalLM)  # only modules inside it are replaced
    network.save_pretrained(out)
    tokenizer.save(out)
    small = weight_bytes(out)
    typer.echo(
        f"{out}: {small / 1e6:,.2f} MB of weights, {small / size:.2f} of the {size / 1e6:,.2f} MB"
        " before"
    )
    if data and before:
        after = text_bits_per_byte(network, tokenizer, data, track=bars)
        change = 100 * (after["bits_per_byte"] / before["bits_per_byte"] - 1)
        typer.echo(
            f"held-out bits per byte: {before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f}"
            f" ({change:+.2f} %)"
        )


@app.command("eval", short_help="Bits per byte of a text, beside those of xz and zstd.")
def eval_command(
    model: Model,
    data: Annotated[
        Path, typer.Option(help="Folder of token shards, heldout.jsonl.zst, or files of text")
    ],
    seq_len: Annotated[
        int | None, typer.Option(help="Window; default: the model's context, at most 1024")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens scored of a window; default: half")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON")] = False,
    threads: Threads = None,
) -> None:
    """Bits per byte of a text, beside xz -9e and zstd -19 of the same text."""
    from fastlm.chat import load_model
    from fastlm.evals.commands import text_bits_per_byte

    network, tokenizer = load_model(model)
    result = text_bits_per_byte(
        network, tokenizer, data, seq_len=seq_len, stride=stride, batch_size=batch_size, track=bars,
        tell=_show_skipped,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        for key, value in result.items():
            typer.echo(f"{key}  {value:.4f}" if isinstance(value, float) else f"{key}  {value:,}")


@app.command(short_help="Answer a prompt, or continue it.")
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", "-p",
            help="What to continue or to answer; - reads stdin; several are one batch",
        ),
    ] = None,
    prompt_files: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A prompt is the text of this file")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    act_bits: ActBits = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Continue the prompt as it stands, without the chat template"),
    ] = False,
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Texts and times as JSON")] = False,
    stats: Stats = None,
) -> None:  # fmt: skip
    """Write a text, token by token; through the chat template where the model has one.

    Several prompts are written together; their texts follow in order, an empty line between.
    """
    from fastlm.chat import Writer
    from fastlm.chat_terminal import echo

    _say_if_busy()
    texts = _prompts(prompts or [], prompt_files or [])
    writer = Writer(model, act_bits)
    ids = [writer.prompt_ids(text, raw=raw) for text in texts]
    streams = len(texts) == 1 and not as_json
    answers = writer.write(
        ids,
        (lambda _, piece: echo(piece)) if streams else (lambda *_: None),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop or (),
        seed=seed,
    )
    if as_json:
        results = [
            {
                "prompt": text, "prompt_tokens": len(prompt), "text": answer.text,
                "new_tokens": len(answer.tokens), "finish_reason": answer.finish_reason,
            }
            for text, prompt, answer in zip(texts, ids, answers)
        ]  # fmt: skip
        typer.echo(json.dumps({"results": results, "stats": writer.speed.figures()}, indent=1))
    elif streams:
        typer.echo()
    else:
        typer.echo("\n\n".join(answer.text for answer in answers))
    if any(answer.finish_reason == "context" for answer in answers):
        limit = writer.context_limit
        typer.echo(
            f"the model's context of {limit:,} tokens is full: the text ends there", err=True
        )
    if _wants_stats(stats):
        typer.echo(str(writer.speed), err=True)


def _prompts(given: list[str], files: list[Path]) -> list[str]:
    """Texts of --prompt, then of --prompt-file; a file's last newline is its editor's."""
    if given.count("-") > 1:
        raise InputError("prompt: wanted - once, stdin is read once")
    texts = [sys.stdin.read().removesuffix("\n") if text == "-" else text for text in given]
    for file in files:
        try:
            texts.append(file.read_text("utf-8").removesuffix("\n"))
        except UnicodeDecodeError as error:
            raise InputError(f"prompt_file {file}: wanted UTF-8 text: {error}") from None
    if not texts:
        raise InputError(
            "prompt: wanted --prompt TEXT (- for stdin) or --prompt-file FILE, got none"
        )
    return texts


def _wants_stats(stats: bool | None) -> bool:
    return _on_terminal() if stats is None else stats


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System message")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_k: TopK = None,
    top_p: TopP = 0.95,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = None,
    act_bits: ActBits = None,
    threads: Threads = None,
    stats: Stats = None,
) -> None:
    """Talk with a chat model. /help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.

    Where stdin is no terminal, each of its lines is a message.
    """
    from fastlm import chat_terminal
    from fastlm.chat import Conversation, Writer

    _say_if_busy()
    chat_terminal.run(
        Conversation(Writer(model, act_bits), system=system, max_new_tokens=max_new_tokens),
        stats=_wants_stats(stats), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, stop=stop or (), seed=seed,
    )  # fmt: skip


@tokenizer_app.command("train")
def tokenizer_train(
    sources: Annotated[list[str], typer.Argument(help="Text: files, folders, or train.jsonl.zst")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the tokenizer")],
    vocab_size: Annotated[int, typer.Option(help="Entries of the vocabulary")] = 32768,
    threads: Threads = None,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from fastlm.evals.commands import read_texts
    from fastlm.tokenizer import Tokenizer

    texts = (text for source in sources for text in read_texts(source, tell=_show_skipped))
    tokenizer = Tokenizer.train(texts, vocab_size, track=bars)
    tokenizer.save(out)
    typer.echo(f"{out}: {tokenizer.vocab_size:,} tokens")


@tokenizer_app.command("encode")
def tokenizer_encode(
    tokenizer: Annotated[
        Path, typer.Option("--tokenizer", "-t", help="Folder, tokenizer.json or .gguf file")
    ],
    text: Annotated[str | None, typer.Argument(help="Text; from stdin if left out")] = None,
    pieces: Annotated[bool, typer.Option("--pieces", help="The bytes of every token too")] = False,
    threads: Threads = None,
) -> None:
    """The tokens of a text."""
    from fastlm.tokenizer import Tokenizer

    tool = Tokenizer.load(tokenizer)
    ids = tool.encode(sys.stdin.read() if text is None else text)
    if pieces:
        for i in ids:
            typer.echo(f"{i}\t{tool.token_bytes(i)!r}")
    else:
        typer.echo(" ".join(map(str, ids)))


if __name__ == "__main__":
    main()
