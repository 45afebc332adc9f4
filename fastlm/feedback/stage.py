"""The stage `FeedbackBuild`: feedback about answers becomes rows to train on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.forget_log import forgotten_keys
from fastlm.data.stage import funnel_tables, funnel_values
from fastlm.errors import InputError
from fastlm.feedback.build import PARTS, TRAIN, BuildOptions
from fastlm.feedback.feedback_items import is_export
from fastlm.pipeline.funnel import Funnel
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    MaybePositional,
    ReportSection,
    Stage,
    StageContext,
)
from fastlm.serve.commands import open_store
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.feedback.overlap import Overlap


@dataclass(frozen=True)
class FeedbackBuild(BuildOptions, Stage):
    """Make rows to train on from feedback about answers, where users consented.

    The rows are scrubbed, filtered and deduplicated. Questions of evaluations, and raters who
    disagree with the others, are left out. Every step counts what it removes.
    """

    kind = "feedback"
    command = ("feedback", "build")
    version = 3
    inputs = {
        "feedback_db": InputSpec(
            ("feedback_db",),
            "Database of `fastlm feedback simulate`, in addition to others",
            optional=True,
        ),
    }  # fmt: skip
    outputs = {"feedback": "."}
    result = {"rows": dict[str, dict[str, int]], "raters": dict[str, Any]}
    notes = """The output is train/, judge/ and test/ with sft.jsonl, preferences.jsonl (for dpo and
reward), kto.jsonl (for dpo with loss_type = kto) and prompts.jsonl; funnel.json (fastlm data
show); and raters.json."""

    database: Annotated[
        tuple[str, ...],
        MaybePositional(
            "Read feedback databases (SQLite files or postgresql://USER@HOST/NAME) or .jsonl files"
        ),
    ] = ()
    decontaminate: Annotated[
        tuple[str, ...],
        "Leave out feedback that contains questions of: question sets (fastlm tasks), all; sets"
        " that fastlm safety uses, safety (all of them); files of held-out prompts",
    ] = ()

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        if not self.database and not inputs.get("feedback_db"):
            raise InputError("database: expected at least one database or .jsonl file, got none")
        return {}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        rows = [
            input_digest.hash_tree(name) if is_export(name) else _digest(name)
            for name in self.database
        ]
        files = [input_digest.hash_tree(name) for name in self.decontaminate if _is_file(name)]
        return [rows, files, sorted(forgotten_keys([input_digest.folder]))]

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.feedback.build import build

        self.plan(ctx.inputs)
        path = ctx.optional("feedback_db")
        databases = [*self.database, *([] if path is None else [str(path)])]
        questions = self._questions(ctx) if self.decontaminate else None
        if questions is None:
            ctx.warning(
                "decontaminate: names no question sets: their questions may get into the rows"
            )
        # the logs of the run and of the folder of runs count, as for prepared text
        parents = (ctx.out.parent, ctx.out.absolute().parent.parent) if ctx.in_recipe else ()
        forgotten = forgotten_keys([ctx.out, *parents])
        result = build(
            databases, ctx.out, options=self, questions=questions, forgotten=forgotten,
            cache=ctx.cache_dir,
        )  # fmt: skip
        weights = result.raters.values()
        return {
            "rows": result.rows,
            "raters": {
                "total": len(weights),
                "excluded": sum(r.weight < self.min_rater_weight for r in weights),
                "without_overlap": sum(r.shared_votes == 0 for r in weights),
            },
        }  # fmt: skip

    def _questions(self, ctx: StageContext) -> "Overlap":
        from fastlm.data.prompts import read_prompts
        from fastlm.evals.contamination import question_texts
        from fastlm.evals.registry import load_task, task_names
        from fastlm.evals.safety.sets import TEXTS, SafetySets
        from fastlm.evals.safety.sets import set_names as safety_sets
        from fastlm.feedback.overlap import Overlap

        questions: list[tuple[str, str]] = []
        rest = []
        for name in dict.fromkeys(self.decontaminate):
            sets = safety_sets(name)
            if _is_file(name):
                prompts = read_prompts([name], cache=ctx.cache_dir)
                questions += [(Path(name).name, p.messages[-1]["content"]) for p in prompts]
            elif sets:
                questions += [
                    (key, text) for key in sets for text in TEXTS[key](SafetySets(ctx.cache_dir))
                ]
            else:
                rest.append(name)
        for name in task_names(rest):
            parts = question_texts(load_task(name, ctx.cache_dir).questions)
            questions += [(name, "".join(part)) for part in parts]
        return Overlap(dict.fromkeys(questions), self.ngram)

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        rows = ", ".join(f"{n:,} {form}" for form, n in result["rows"][TRAIN].items())
        raters = result["raters"]
        return (
            f"{ctx.out}: {rows} to learn from; {raters['excluded']:,} of {raters['total']:,}"
            " raters excluded"
        )

    def render(self, result: Mapping[str, Any], ctx: StageContext) -> Any:
        from rich.console import Group
        from rich.table import Table

        forms = Table("part", title="Rows")
        for form in result["rows"][TRAIN]:
            forms.add_column(form, justify="right")
        for part in PARTS:
            forms.add_row(part, *(f"{n:,}" for n in result["rows"][part].values()))
        return Group(funnel_tables(Funnel.load(ctx.out)), forms, self.summary(result, ctx))

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        funnel = Funnel.load(ctx.out)
        raters = result["raters"]
        remaining = sum(step["documents"] for step in funnel.steps[-len(PARTS) :])
        return ReportSection(
            "User feedback, and what is left of it after each step",
            f"The steps count feedback items (thumbs, picks, corrections). {raters['excluded']:,}"
            f" of {raters['total']:,} raters disagree with the others and were excluded."
            f" {raters['without_overlap']:,} raters have no answer in common with another rater, so"
            " that their agreement is unknown.",
            cards=[(f"{remaining:,}", "feedback items")],
            template="data.html.jinja",
            values=funnel_values(funnel),
        )


def _is_file(name: str) -> bool:
    return "/" in name or is_export(name)


def _digest(database: str) -> str:
    """Return a hash of the content of a database."""
    import hashlib
    import json
    from dataclasses import asdict

    with open_store(database) as store:
        digest = hashlib.sha256()
        for row in [*store.responses().values(), *store.all_feedback(), *store.ratings()]:
            digest.update(json.dumps(asdict(row), sort_keys=True).encode("utf-8", "replace"))
        digest.update("\n".join(sorted(store.withdrawn_keys())).encode("utf-8", "replace"))
    return digest.hexdigest()
