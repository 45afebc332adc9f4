"""Generate commands from stages and other dataclasses: the fields of the class are the flags."""

import inspect
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from typing_extensions import is_typeddict

from fastlm.errors import InputError
from fastlm.pipeline.events import View
from fastlm.pipeline.stage import (
    InputSpec,
    MaybePositional,
    Option,
    Positional,
    Repeated,
    Stage,
    options_of,
)
from fastlm.progress import silent
from fastlm.schema import parse_toml, validate
from fastlm.sources.remote import is_remote
from fastlm.terminal import console, echo
from fastlm.threads import Threads
from fastlm.torchrun import check_single_process, is_main_process

T = TypeVar("T")
Cache = Annotated[
    Path | None,
    typer.Option(help="Keep packages in this folder. Default: $FASTLM_CACHE or ~/.cache/fastlm"),
]


def options_command(cls: type[T], run: Callable[[T], None]) -> Callable[..., None]:
    """Return a function that calls ``run`` with its flags as a ``cls``, which typer turns into a
    command. ``cls`` is a dataclass; the docstring of ``run`` is the help."""
    options = options_of(cls)

    def command(**values: Any) -> None:
        run(cls(**_values(options, values)))

    parameters = [*map(_option, options), _flag("threads", Threads, None, None)]
    return _signed(command, parameters, run.__name__, inspect.getdoc(run) or "")


def command_of(cls: type[Stage], before: Callable[[], None] = lambda: None) -> Callable[..., None]:
    """Return a function that runs one stage, which typer turns into a command.

    ``before`` is called when the options are read, before any work.
    """
    options = [o for o in options_of(cls) if o.help or get_origin(_plain(o.hint)) is not dict]
    trains = bool(cls.checkpoints)
    only_scores = set(cls.outputs) == {"scores"}

    def run(
        out: Path | None,
        as_json: bool,
        cache: Path | None,
        threads: int | None,
        log_every: int | None = None,
        **values: Any,
    ) -> None:
        del threads  # set by its own callback
        stage = cls(**_values(options, values))
        stage.check()
        if not trains:
            check_single_process(cls.command[-1], "it is no training")
        is_main = is_main_process()
        if is_main:
            before()
        inputs = {key: values[key] for key in cls.inputs if values[key]}
        view = View(log_every)
        with tempfile.TemporaryDirectory() as temporary:
            ctx = stage.context(
                out or temporary, cache_dir=cache, track=view.track if is_main else silent,
                on_event=view if is_main else None, **inputs,
            )  # fmt: skip
            start = time.perf_counter()
            result = stage.run(ctx)
            if not is_main:
                return
            if out is not None:
                from fastlm.pipeline.record import record_stage

                seconds = time.perf_counter() - start
                command = shlex.join(["fastlm", *sys.argv[1:]])
                if not is_remote(out):
                    record_stage(stage, ctx, result, seconds, command=command)
                if only_scores:
                    from fastlm.pipeline.report import write_stage_report

                    write_stage_report(stage, ctx, result, seconds, command)
            text = json.dumps(result, indent=1) if as_json else stage.render(result, ctx)
        print_result(text)
        if status := stage.status(result):
            raise typer.Exit(status)

    out = typer.Option("--out", "-o", help="Write to this folder")
    parameters = [
        *(_input(key, spec) for key, spec in cls.inputs.items()),
        *map(_option, options),
        _flag("out", Path | None, out, None) if only_scores else _flag("out", Path, out),
    ]
    if trains:
        log_option = typer.Option(
            min=1, help="Log every N steps to stderr. On a terminal one line is redrawn instead"
        )
        parameters.append(_flag("log_every", int, log_option, 10))
    as_json = typer.Option("--json", help="Print the result as JSON")
    parameters.append(_flag("as_json", bool, as_json, False))
    parameters += [_flag("cache", Cache, None, None), _flag("threads", Threads, None, None)]
    help = "\n\n".join(filter(None, (inspect.getdoc(cls), cls.notes)))
    return _signed(run, parameters, cls.command[-1], help)


def print_result(result: Any) -> None:
    """Print text, or a rich renderable, to stdout."""
    if isinstance(result, str):
        echo(result)
    else:
        console().print(result, markup=False, highlight=False)


def _signed(
    run: Callable[..., None], parameters: list[inspect.Parameter], name: str, help: str
) -> Callable[..., None]:
    """Return ``run`` with the name, docstring and signature that typer reads."""
    run.__doc__, run.__name__ = help, name
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _flag(name: str, hint: Any, info: Any, *default: Any) -> inspect.Parameter:
    """Return a parameter with its typer annotation. Without a default it is required."""
    value = default[0] if default else inspect.Parameter.empty
    annotation = Annotated[hint, info] if info else hint
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=value, annotation=annotation)


def _input(key: str, spec: InputSpec) -> inspect.Parameter:
    hint: Any = list[str] if spec.several else str
    if spec.positional:
        return _flag(key, hint, typer.Argument(help=spec.help))
    flags = [f"--{key.replace('_', '-')}", *([f"-{spec.flag}"] if spec.flag else [])]
    option = typer.Option(*flags, help=spec.help)
    return _flag(key, hint | None, option, None) if spec.optional else _flag(key, hint, option)


def _option(option: Option) -> inspect.Parameter:
    plain, default, hint = _plain(option.hint), option.default, option.hint
    if isinstance(option.help, Positional):
        (item, *_) = get_args(plain) or (plain,)
        hint = list[item] if get_origin(plain) is tuple else plain
        argument = typer.Argument(help=option.help)
        if isinstance(option.help, MaybePositional):
            return _flag(option.name, hint | None, argument, None)
        return _flag(option.name, hint, argument)
    if isinstance(option.help, Repeated):
        default, hint = None, list[get_args(plain)[0]] | None
    elif _is_table(plain):
        default, hint = None, str | None
    elif _has_commas(option):
        default, hint = ",".join(map(str, default)), str
    flags = [f"--{option.name.replace('_', '-')}", *option.short] if option.short else []
    info = typer.Option(*flags, help=option.help)
    return _flag(option.name, hint, info, *([] if default is MISSING else [default]))


def _values(options: Iterable[Option], values: dict[str, Any]) -> dict[str, Any]:
    return {option.name: _value(option, values[option.name]) for option in options}


def _value(option: Option, value: Any) -> Any:
    """Return the value of a flag as the field of the stage expects it."""
    plain = _plain(option.hint)
    if value is None:
        return option.default
    if _is_table(plain):
        table = parse_toml(f"value = {value}", option.name)["value"]
        return validate(table, plain, f"{option.name}.", extra="forbid")
    if _has_commas(option):
        item, words = get_args(plain)[0], [word.strip() for word in value.split(",")]
        try:
            value = [item(word) for word in words if word]
        except ValueError:
            raise InputError(
                f"{option.name}: expected numbers with commas between, got {value!r:.80}"
            ) from None
    if isinstance(value, list | tuple):
        if any(isinstance(v, float) and not math.isfinite(v) for v in value):
            raise InputError(f"{option.name}: expected finite numbers, got {list(value)!r:.80}")
        return tuple(value) if get_origin(plain) is tuple else list(value)
    return value


def _plain(hint: Any) -> Any:
    """Return ``X`` of ``X | None``."""
    if get_origin(hint) in (Union, UnionType):
        (hint,) = (a for a in get_args(hint) if a is not NoneType)
    return hint


def _is_table(plain: Any) -> bool:
    """Return whether the flag takes an inline table of TOML."""
    return is_typeddict(plain) or get_origin(plain) is dict


def _has_commas(option: Option) -> bool:
    """Return whether the flag takes one text with commas between its values."""
    plain = _plain(option.hint)
    several = get_origin(plain) is tuple and get_args(plain)[-1] is Ellipsis
    return several and not isinstance(option.help, Positional | Repeated)
