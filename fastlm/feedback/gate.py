"""The stage `Gate`: it decides whether the new model may replace the old one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict

from fastlm.errors import InputError
from fastlm.feedback.gate_metrics import ModelId
from fastlm.files import write_json
from fastlm.pipeline.stage import Facts, InputSpec, ReportSection, Stage, StageContext
from fastlm.sources.input_digest import InputDigest

DECISION = "decision.json"


class GateCheck(TypedDict):
    """One gate and whether its score passed."""

    passed: bool
    reason: str


class GateDecision(TypedDict):
    """The fields of a decision.json; scores of another program have no models."""

    promoted: bool
    gates: list[GateCheck]
    models: NotRequired[dict[Literal["old", "new"], ModelId]]


@dataclass(frozen=True)
class Gate(Stage):
    """Decide by stated gates whether a model may replace the one that serves.

    A gate bounds the end of a score's interval, not the point. In scores of several models, the
    first is the model that serves and the last is the new one; all scores have to be about the same
    two models. If a gate fails, the exit status is 1.
    """

    kind = "gate"
    command = ("gate",)
    version = 3
    inputs = {
        "scores": InputSpec(
            ("scores",), "Folders or scores.json files of winrate, eval and safety",
            several=True, flag="s",
        ),
    }  # fmt: skip
    outputs = {"gate_decision": DECISION}
    result = {"promoted": bool, "gates": list[dict[str, Any]]}
    settings_in = ("gates",)

    gates: Annotated[str, "Read the bounds on scores from this TOML file (docs/improve.md)"] = ""

    def check(self) -> None:
        from fastlm.evals.gates import read_gates

        if not self.gates:
            raise InputError("gates: expected a TOML file of bounds, got none")
        read_gates(self.gates)

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        from fastlm.evals.gates import read_gates

        names = [facts["name"] for facts in inputs["scores"]]
        for gate in read_gates(self.gates):
            if gate.score.partition(".")[0] not in names and not any("/" in n for n in names):
                raise InputError(
                    f"gates: {gate.score}: expected a score of {', '.join(names)}, got none of them"
                )
        return {}

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        return input_digest.hash_tree(self.gates)

    def run(self, ctx: StageContext) -> dict[str, Any]:
        from fastlm.evals.gates import read_gates
        from fastlm.feedback.gate_metrics import models_of, read_scores, scores_of

        scores: dict[str, Any] = {}
        tables = []
        for source in ctx.inputs["scores"]:
            path = source.path / "scores.json" if source.path.is_dir() else source.path
            stage = path.resolve().parent.name
            table = read_scores(path)
            stage_scores = scores_of(stage, table)
            if scores.keys() & stage_scores.keys():
                raise InputError(
                    f"scores: expected folders of different names, got two called {stage}"
                )
            scores |= stage_scores
            tables.append((source.source, table.get("ids", ())))
            if not tables[-1][1]:
                ctx.warning(f"scores: {source.source} does not say which models it is about")
        models = models_of(tables)
        checks = []
        for gate in read_gates(self.gates):
            failure, score = gate.failure(scores), scores.get(gate.score, {})
            checks.append({
                "score": gate.score, "bounds": _bounds(gate), "passed": failure is None,
                "reason": failure or "",
                **{key: score.get(key) for key in ("value", "low", "high", "n")},
            })  # fmt: skip
        result = {
            "promoted": all(check["passed"] for check in checks), "gates": checks,
            "models": {key: asdict(model) for key, model in models.items()},
        }  # fmt: skip
        write_json(ctx.out / DECISION, result)
        for check in checks:
            if not check["passed"]:
                ctx.warning(f"gate failed: {check['reason']}")
        return result

    def status(self, result: Mapping[str, Any]) -> int:
        return 0 if result["promoted"] else 1

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        failed = [check["reason"] for check in result["gates"] if not check["passed"]]
        if failed:
            return f"not promoted: {'; '.join(failed)}"
        return f"promoted: all {len(result['gates'])} gates passed: {ctx.out / DECISION}"

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        del ctx
        facts = {f"{key} model": model["name"] for key, model in result.get("models", {}).items()}
        for check in result["gates"]:
            value = "not measured" if check["value"] is None else f"{check['value']:.3f}"
            if check["low"] is not None and check["high"] is not None:
                value += " ({low:.3f} to {high:.3f})".format(**check)
            passed = "passed" if check["passed"] else "failed"
            facts[check["score"]] = f"{value}, expected {check['bounds']}: {passed}"
        total = len(result["gates"])
        failed = sum(not check["passed"] for check in result["gates"])
        promoted = "" if result["promoted"] else "not "
        outcome = f"{failed} of {total} gates failed" if failed else "all gates passed"
        return ReportSection(
            "May the new model replace the old one?",
            f"The new model is {promoted}promoted: {outcome}. A gate bounds the end of the"
            " interval, not the point.",
            facts=facts,
            cards=[(f"{total - failed} of {total}", f"gates passed: {promoted}promoted")],
        )


def _bounds(gate: Any) -> str:
    bounds = (("at least", gate.min_value), ("at most", gate.max_value))
    return ", ".join(f"{side} {bound:g}" for side, bound in bounds if math.isfinite(bound))
