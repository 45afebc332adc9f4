"""A stage: one step in the life of a model, from raw text to a model in service.

A stage is a frozen dataclass. Its fields are its options and are written once. They are the keys of
``[[stage]]`` in a recipe, the flags of its command and the arguments of the Python call.

    Quantize(format="w4a16")("out", model="runs/demo")      # Python
    fastlm quantize --format w4a16 --out out --model runs/demo
    [[stage]]                                               # a recipe
    kind = "quantize"
    format = "w4a16"

Every input and output of a stage has a type (`TYPES`), by which a recipe connects stages.
`fastlm.stages` lists the stages; CONTRIBUTING.md adds one as an example. Modules that define
stages import nothing heavy, so that ``fastlm --help`` answers at once.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from fastlm.errors import InputError, unknown_key
from fastlm.progress import silent
from fastlm.sources.input_digest import InputDigest
from fastlm.sources.remote import is_remote

T = TypeVar("T")
# What stages pass to each other
TYPES = {
    "corpus": "clean documents: parts in train/ and heldout/, funnel.json",
    "tokenizer": "tokenizer.json",
    "shards": "token shards in train/ and heldout/",
    "model": "a model that can be trained further: config.json, safetensors, tokenizer.json",
    "reward": "a model that scores answers: config.json, safetensors, tokenizer.json",
    "quantized": "a model of 4- or 8-bit weights",
    "exported": "a model in another program's format",
    "scores": "scores.json",
    "feedback_db": "a feedback database of fastlm serve",
    "feedback": "rows from users: train/, judge/ and test/, each with a .jsonl file per form",
    "gate_decision": "decision.json: whether a model passed its gates",
}


class Positional(str):
    """The help of an option that is a positional argument of the command."""


class MaybePositional(Positional):
    """One that may be left out."""


class Repeated(str):
    """The help of an option of several values, each of which has the flag before it."""


@dataclass(frozen=True)
class InputSpec:
    """The declaration of one input of a stage.

    Args:
        types: the types it accepts. If a recipe names no stage, the input is the last stage that
            makes the first of these types, else the second, and so on.
        help: for the command line.
        several: accepts a list.
        optional: the stage also runs without it; ``[]`` in a recipe leaves it out.
        default: if a recipe names no stage, the input is the last one that fits.
        flag: the letter of its short flag.
        positional: a positional argument of the command.
        addresses: accepts also the address of a server (`is_address`).
    """

    types: tuple[str, ...]
    help: str
    several: bool = False
    optional: bool = False
    default: bool = True
    flag: str = ""
    positional: bool = False
    addresses: bool = False


@dataclass(frozen=True)
class Input:
    """An input of a stage. ``name``: the stage that made it, or the path as the user wrote it.
    ``source``: its path, or a source of text (`fastlm.sources.source_files`).
    """

    name: str
    source: str

    @property
    def path(self) -> Path:
        return Path(self.source)


@dataclass
class StageContext:
    """What a stage works with: its folder, its inputs, and how it reports progress.

    ``in_recipe``: later stages rely on the outputs of this one.
    """

    name: str
    out: Path
    inputs: Mapping[str, Sequence[Input]]
    cache_dir: Path
    track: Callable = silent
    on_event: Callable[[dict[str, Any]], None] | None = None
    in_recipe: bool = False

    def path(self, key: str) -> Path:
        """Return the path of the only input of this name."""
        (only,) = self.inputs[key]
        return only.path

    def optional(self, key: str) -> Path | None:
        return self.path(key) if self.inputs.get(key) else None

    def skipped(self, message: str) -> None:
        """Report what was left out, and why."""
        self.warning(f"skipped: {message}")

    def warning(self, message: str) -> None:
        """Report what looks wrong."""
        self._report("warning", message)

    def info(self, message: str) -> None:
        """Report the result of a part of the work."""
        self._report("info", message)

    def _report(self, level: str, message: str) -> None:
        if self.on_event is not None:
            self.on_event({level: message})


@dataclass
class ReportSection:
    """A section of report.html, made by a stage.

    ``template`` names a file in pipeline/parts/ that draws ``values``. Without one, the page lists
    ``facts`` and shows ``charts`` (SVG). ``cards``, (number, what it is), are shown at the top of
    the page. ``wide``: a section of its own, not next to others of its kind.
    """

    title: str
    note: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    charts: Sequence[str] = ()
    cards: Sequence[tuple[str, str]] = ()
    template: str = "any.html.jinja"
    values: Mapping[str, Any] = field(default_factory=dict)
    wide: bool = False


@dataclass(frozen=True)
class Option:
    """A field of a stage, in the form the command line needs. The type of ``help`` says how it is
    passed (`Positional`, `Repeated`). ``short``: flags in addition to ``--name``."""

    name: str
    hint: Any
    default: Any  # MISSING: the option is required
    help: str
    short: tuple[str, ...] = ()


Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """The base of all stages; subclasses are frozen dataclasses.

    Class attributes:
        kind: its name in recipes.
        command: its words on the command line.
        version: raised when the same options and inputs give another result.
        inputs: name -> `InputSpec`. The first input is also called ``from`` in a recipe, or
            ``of`` if it accepts several. An instance may have fewer.
        outputs: type -> file or folder in the stage's folder, "." for the folder itself.
            An instance may have others.
        checkpoints: what it needs to continue after an interruption. A stage with checkpoints is a
            training: a run never deletes it, but archives it (`fastlm.pipeline.archive`).
        resumable: what else it continues from after an interruption, with the same options and
            inputs. It is deleted with the rest of the folder where those have changed.
        result: what `run` returns at least -> its type.
        notes: what ``--help`` shows after the docstring.
        unused: fields that it inherits and has no use for. They are not offered.
        sources_in: the options that name sources of text or rows.
        settings_in: the options that name a file of settings, "TABLE.KEY" of one in a table. A
            recipe looks for it in its own folder.
        kind_in: the option that names the kind of stage that makes its outputs.
        instructs: its model follows instructions, says a model card.
        card_section: the section of a model card that has its scores.
        writes_objects: its folder may be on object storage (``s3://``).
    """

    kind: ClassVar[str]
    command: ClassVar[tuple[str, ...]]
    version: ClassVar[int] = 1
    inputs: ClassVar[Mapping[str, InputSpec]] = {}
    outputs: ClassVar[Mapping[str, str]] = {}
    checkpoints: ClassVar[tuple[str, ...]] = ()
    resumable: ClassVar[tuple[str, ...]] = ()
    result: ClassVar[Mapping[str, Any]] = {}
    notes: ClassVar[str] = ""
    unused: ClassVar[tuple[str, ...]] = ()
    sources_in: ClassVar[tuple[str, ...]] = ()
    settings_in: ClassVar[tuple[str, ...]] = ()
    kind_in: ClassVar[str] = ""
    instructs: ClassVar[bool] = False
    __pydantic_config__: ClassVar[dict[str, Any]] = {"allow_inf_nan": False}  # of options
    card_section: ClassVar[str] = "Evaluation"
    writes_objects: ClassVar[bool] = False

    def check(self) -> None:
        """Refuse options that cannot work. InputError names the option."""

    def plan(self, inputs: Mapping[str, Sequence[Facts]]) -> Facts:
        """Refuse what cannot work with the stages before, and return facts for the stages after.

        A recipe calls this for all stages before the first one runs. ``inputs`` holds what the
        `plan` of each input's stage returned: "vocab_size", "config" (a ModelConfig), ..., and its
        "name". For an input from outside the run only the name is known.
        """
        del inputs
        return {}

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the result; changing any other one reruns nothing."""
        return asdict(self)

    def can_continue(self, changed: Collection[str], folder: Path, finished: bool) -> bool:
        """Return whether the work in ``folder``, begun with other values of the options
        ``changed``, can continue with these. ``finished``: that work was complete.
        """
        del changed, folder, finished
        return False

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        """Return the state of the files that the options name, for the fingerprint."""
        del input_digest

    def run(self, ctx: StageContext) -> dict[str, Any]:
        """Do the work; return a JSON-serialisable result. Called again after an interruption, it
        continues.
        """
        raise NotImplementedError

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        """Return one line for the user: the result of `run`."""
        del result
        return str(ctx.out)

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        """Return what the command of the stage prints: text or a rich renderable."""
        return self.summary(result, ctx)

    def status(self, result: Mapping[str, Any]) -> int:
        """Return the exit status of the stage's own command."""
        del result
        return 0

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection | None:
        """Return the section of report.html for this stage, None if it has none."""
        del ctx, result

    def __call__(self, out: str | Path, **options: Any) -> dict[str, Any]:
        """Run this stage alone and return its result. The arguments are those of `context`."""
        return self.run(self.context(out, **options))

    def context(
        self,
        out: str | Path,
        *,
        cache_dir: Path | None = None,
        track: Callable = silent,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        **inputs: str | Path | Sequence[str | Path],
    ) -> StageContext:
        """Check everything that needs no work, and return the context of this stage alone in the
        folder ``out``. ``inputs`` are named as in `Stage.inputs`. InputError: options, inputs.
        """
        from fastlm.sources.packages import default_cache

        self.check()
        if is_remote(out) and not self.writes_objects:
            raise InputError(f"out: expected a folder of this machine, got {out}")
        defaults = {f.name: f.default for f in fields(self)}
        for name in self.unused:
            if (value := getattr(self, name)) != defaults[name]:
                raise InputError(f"{name}: {self.kind} has no use for it, got {value!r:.80}")
        for key in inputs.keys() - self.inputs.keys():
            raise InputError(unknown_key(key, key, self.inputs))
        input_tuples: dict[str, tuple[Input, ...]] = {}
        for key, spec in self.inputs.items():
            value = inputs.get(key)
            values = () if value is None else (value,) if isinstance(value, str | Path) else value
            if not values and not spec.optional:
                help = spec.help[:1].lower() + spec.help[1:]
                raise InputError(f"{key}: expected {help}, got none")
            if len(values) > 1 and not spec.several:
                raise InputError(f"{key}: expected one, got {len(values)}")
            input_tuples[key] = tuple(Input(str(v), str(v)) for v in values)
        return StageContext(
            self.kind, Path(out), input_tuples, cache_dir or default_cache(),
            track=track, on_event=on_event,
        )  # fmt: skip


def options_of(cls: Any) -> list[Option]:
    """Return the options of a stage, or of another dataclass, in the order of their definition."""
    hints = get_type_hints(cls, include_extras=True)
    options = []
    for f in fields(cls):
        if f.name in getattr(cls, "unused", ()):
            continue
        hint, text, short = hints[f.name], "", ()
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            text, *short = (note for note in notes if isinstance(note, str))
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        options.append(Option(f.name, hint, default, text, tuple(short)))
    return options


def is_address(source: str) -> bool:
    """Return whether an input is the address of a server."""
    return source.startswith(("http://", "https://"))


def at_least_one(stage: Any, *names: str) -> None:
    """Raise InputError if one of these options is below 1."""
    for name in names:
        if getattr(stage, name) < 1:
            raise InputError(f"{name}: expected 1 or more, got {getattr(stage, name)}")


def not_negative(stage: Any, *names: str) -> None:
    """Raise InputError unless each of these options is a finite number of 0 or more."""
    for name in names:
        if not 0 <= getattr(stage, name) < math.inf:
            raise InputError(f"{name}: expected 0 or more, got {getattr(stage, name)}")


def positive(stage: Any, *names: str) -> None:
    """Raise InputError unless each of these options is None or a finite number above 0."""
    for name in names:
        value = getattr(stage, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"{name}: expected a positive number, got {value}")


def one_of(stage: Any, **choices: Collection[str]) -> None:
    """Raise InputError unless each of these options is among its choices."""
    for name, allowed in choices.items():
        if (value := getattr(stage, name)) not in allowed:
            raise InputError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def select_options(stage: Any, options: type[T]) -> T:
    """Return the options of ``stage`` that the dataclass ``options`` has, as one."""
    return options(**{f.name: getattr(stage, f.name) for f in fields(options)})  # type: ignore[arg-type]
