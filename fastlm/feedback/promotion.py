"""The stage `Promotion`: it selects which of two models serves next."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastlm.errors import InputError
from fastlm.feedback.gate import DECISION, GateDecision
from fastlm.files import make_folder, save_atomic, write_json
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext
from fastlm.schema import read_document

MODEL, PROMOTION = "model", "promotion.json"


@dataclass(frozen=True)
class Promotion(Stage):
    """Copy the new model if `fastlm gate` promoted it, else the old one.

    So the model that serves next, which later stages read, is always at the same path. A decision
    about other models is refused.
    """

    kind = "promotion"
    command = ("promotion",)
    inputs = {
        "new": InputSpec(("model",), "New model"),
        "old": InputSpec(("model",), "Model that serves now", default=False),
        "decision": InputSpec(("gate_decision",), "Folder of `fastlm gate`, or its decision.json"),
    }
    outputs = {"model": MODEL}
    result = {"promoted": bool, "served_model": str, "failures": list[str]}

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        new, old = inputs["new"][0], inputs["old"][0]
        return {key: new[key] for key in new if key in old and new[key] == old[key]}

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.suite import model_id
        from fastlm.feedback.gate_metrics import NEW, OLD, ModelId
        from fastlm.pipeline.provenance import MODEL as FILES
        from fastlm.pipeline.run_folder import is_adapter, locate_model

        path = ctx.path("decision")
        decision = read_document(path / DECISION if path.is_dir() else path, GateDecision)
        promoted, gates = decision["promoted"], decision["gates"]
        models = {
            key: ModelId(m.name, model_id(m.source)) for key in (NEW, OLD) for m in ctx.inputs[key]
        }
        decided_models: Mapping[str, ModelId] = {**decision.get("models", {})}
        if any(
            key in decided_models and decided_models[key].id != models[key].id for key in models
        ):
            raise InputError(
                f"decision: expected one about {_pair(models)}, got one about"
                f" {_pair(decided_models)}: {path}"
            )
        if unknown := [key for key in models if key not in decided_models]:
            ctx.warning(f"decision: {path} does not name the {' and the '.join(unknown)} model")
        (model,) = ctx.inputs["new" if promoted else "old"]
        folder = locate_model(model.path)
        if folder.is_file() or is_adapter(folder):
            raise InputError(
                f"{model.name}: expected a model folder with all weights, got {folder}"
            )
        result = {
            "promoted": promoted, "served_model": model.name,
            "failures": [gate["reason"] for gate in gates if not gate["passed"]],
        }  # fmt: skip

        def copy_model(part: Path) -> None:
            part.mkdir()
            for path in sorted(folder.iterdir()):
                if any(fnmatch(path.name, pattern) for pattern in FILES):
                    shutil.copyfile(path, part / path.name)

        save_atomic(make_folder(ctx.out) / MODEL, copy_model)
        write_json(ctx.out / PROMOTION, result)
        return result

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        return f"{_summary(result)}: {ctx.out / MODEL}"

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        facts = {"model": str(ctx.out / MODEL)}
        for number, reason in enumerate(result["failures"], 1):
            facts[f"failed gate {number}"] = reason
        return ReportSection(
            "Which model serves next",
            f"{_summary(result)}. Stages after this one read that model.",
            facts=facts,
            cards=[(result["served_model"], "is the model that serves next")],
        )


def _pair(models: Mapping[str, Any]) -> str:
    return " and ".join(f"the {key} model {models[key]}" for key in ("new", "old") if key in models)


def _summary(result: Mapping[str, Any]) -> str:
    name = result["served_model"]
    if result["promoted"]:
        return f"The new model was promoted: {name} serves next"
    return f"The new model was not promoted: {name} still serves"
