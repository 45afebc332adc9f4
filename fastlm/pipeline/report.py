"""Write report.html: one self-contained page about a run, without scripts or network, printable.

Each stage provides its `ReportSection`. The page shows the sections in the order of the recipe, and
those of the same kind side by side. jinja2 escapes every text of a run, because samples are written
by a model and names of sources come from a recipe.
"""

import inspect
import platform
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.files import write_json, write_text
from fastlm.machine import git_commit
from fastlm.pipeline.recipe import Recipe, RecipeStep
from fastlm.pipeline.stage import ReportSection, Stage, StageContext
from fastlm.pipeline.templates import page_environment

REPORT, SUMMARY = "report.html", "summary.json"
SHADES = ("#2f6fde", "#5b8ee6", "#86adee", "#2e8b6a", "#d9822b", "#e6a766", "#8a97a6")


@dataclass(frozen=True)
class FinishedStage:
    """A finished stage: what it worked on, its result, and the seconds it took."""

    step: RecipeStep
    ctx: StageContext
    result: dict[str, Any]
    seconds: float


def write_report(
    out: Path, recipe: Recipe, done: Sequence[FinishedStage], command: str, until: str | None = None
) -> dict[str, Any]:
    """Write report.html and summary.json into ``out``; return the content of summary.json.

    ``until``: the stage after which the run stopped.
    """
    stages = {
        d.step.name: {"kind": d.step.stage.kind, "seconds": d.seconds, **d.result} for d in done
    }
    summary = {
        "recipe": recipe.name, "command": command, "seconds": sum(d.seconds for d in done),
        "stages": stages, "machine": _machine(),
    }  # fmt: skip
    parts = [(d.step, part) for d in done if (part := _part(d))]
    write_text(out / REPORT, render_report(summary, recipe, parts, until, out.absolute().name))
    write_json(out / SUMMARY, summary)
    return summary


def write_stage_report(
    stage: Stage, ctx: StageContext, result: dict[str, Any], seconds: float, command: str
) -> None:
    """Write the report.html and summary.json of a stage that ran alone into its folder."""
    inputs = {
        key: tuple(input.source for input in inputs_of_key)
        for key, inputs_of_key in ctx.inputs.items()
    }
    step = RecipeStep(ctx.name, stage, inputs)
    recipe = Recipe(ctx.name, inspect.getdoc(type(stage)) or "", 0, (step,), {}, {})
    write_report(ctx.out, recipe, [FinishedStage(step, ctx, result, seconds)], command)


def _part(done: FinishedStage) -> ReportSection | None:
    """Return the section of one stage. A result that it cannot show means a damaged record."""
    try:
        return done.step.stage.report(done.ctx, done.result)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"{done.step.name}: its result in stages.json cannot be shown"
            f" ({type(error).__name__}: {error}); delete {done.ctx.out} to run it again"
        ) from error


def render_report(
    summary: dict[str, Any],
    recipe: Recipe,
    parts: Sequence[tuple[RecipeStep, ReportSection]],
    until: str | None = None,
    name: str = "",
) -> str:
    """Return the page. ``summary`` as in summary.json, ``until`` as in `write_report`. ``name``: of
    the run, its title; default: the recipe's.
    """
    sections: dict[str, list[tuple[RecipeStep, ReportSection]]] = {}
    for step, part in parts:
        sections.setdefault(step.name if part.wide else step.stage.kind, []).append((step, part))
    kinds = Counter(step.stage.kind for step, _ in parts)
    cards = [
        {
            "value": value, "lead": "scores" in step.stage.outputs,
            "what": label if kinds[step.stage.kind] == 1 else f"{label} ({step.name})",
        }
        for step, part in parts
        for value, label in part.cards
    ]  # fmt: skip
    seconds = {name: stage["seconds"] for name, stage in summary["stages"].items()}
    total = sum(seconds.values()) or 1.0
    rows = [
        {"name": name, "seconds": value, "percent": 100 * value / total, "color": color}
        for (name, value), color in zip(seconds.items(), cycle(SHADES))
    ]
    command = summary["command"]
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            s=summary,
            commands={
                step.name: command_until(command, step.name) if recipe.table else command
                for step, _ in parts
            },
            recipe=recipe,
            not_run=[step.name for step in recipe.steps if step.name not in seconds],
            until=until,
            name=name,
            sections=list(sections.values()),
            cards=cards,
            stages=rows,
        )
    )


def command_until(command: str, name: str) -> str:
    """Return the command that runs a recipe up to the stage ``name``."""
    plain = re.sub(r" --until[ =]('[^']*'|\S+)", "", command)
    return f"{plain} --until {shlex.quote(name)}"


def _machine() -> dict[str, Any]:
    """Describe the machine of the run: CPU, threads, device, versions, commit, system."""
    from fastlm.inventory import info

    have = info()
    keys = ("cpu", "cpu_isa", "threads", "device", "fastlm", "torch", "python")
    lines = {"commit": git_commit() or "not a clone", "system": platform.platform()}
    return {key: have.get(key) for key in keys} | lines
