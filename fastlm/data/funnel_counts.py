"""The funnel of a build: the sum of what its units counted."""

from collections import Counter
from typing import Any, cast

from fastlm.data.mix import MixWeights
from fastlm.data.options import DataOptions
from fastlm.data.plan import options_of_plan
from fastlm.data.unit_files import Counts, outputs_of
from fastlm.pipeline.funnel import Funnel, MixCounts, StepCounts
from fastlm.pipeline.units import (
    Work,
)

STEPS = (
    "gather", "consent", "extract", "exact duplicates", "language", "quality rules", "quality",
    "toxicity", "contamination", "scrub", "near duplicates", "repeated paragraphs", "mix",
    "train", "heldout",
)  # fmt: skip
# Steps that are shown if an option makes them remove documents
LIMITS = {
    "language": "languages", "quality": "min_quality_bucket", "toxicity": "max_toxicity",
    "contamination": "decontaminate", "mix": "mix",
}  # fmt: skip
EXTRA_COUNTS = {
    "replaced": "scrub",
    "cut": "extract",
    "fallbacks": "extract",
    "repeated": "mix",
}  # name -> the step that shows it
NEAR = "near duplicates"
MAX_NEAR_SHARE = 0.5  # of a source's documents; more is a template, or the source is a copy


def build_funnel(work: Work) -> Funnel:
    """Return the sum of what all units counted."""
    counts, plan = Counts(), work.plan
    counts.messages += plan["messages"]
    counts.removed["gather"] = Counter(plan["skipped"])
    if plan["options"]["scrub"]:
        counts.add("replaced", dict.fromkeys(plan["options"]["scrub"], 0))
    for step in ("read", "apply", "write"):
        for unit in outputs_of(work):
            if (marker := work.marker(step, unit)) is not None:
                counts.update(marker["counts"])
    funnel = Funnel()
    options = options_of_plan(plan)
    for step in STEPS:
        limit = LIMITS.get(step)
        if limit and getattr(options, limit) == getattr(DataOptions, limit):
            continue
        entry: dict[str, Any] = {"step": step}
        for key in ("documents", "bytes"):
            entry[key] = counts.remaining[f"{step} {key}"]
        removed = counts.removed.get(step, {})
        entry["removed"] = dict(sorted((k, n) for k, n in removed.items() if n))
        funnel.steps.append(cast(StepCounts, entry))
    for name, step in EXTRA_COUNTS.items():
        if values := counts.extra.get(name):
            entry = cast(dict[str, Any], next(s for s in funnel.steps if s["step"] == step))
            entry[name] = dict(values)
    if work.has_begun("near"):
        units = range(work.parameters("near")["units"])
        markers = [work.marker("near", unit) for unit in units]
        if limited := sum(marker["counts"]["limited"] for marker in markers if marker):
            entry = cast(dict[str, Any], next(s for s in funnel.steps if s["step"] == NEAR))
            entry["limited"] = limited
    if plan["unsupported_types"]:
        funnel.steps[0]["unsupported_types"] = plan["unsupported_types"]
    for source, files in plan["sources"]:
        tally = counts.sources.get(source, {})
        funnel.sources[source] = {
            "files": files, "documents": tally.get("documents", 0), "bytes": tally.get("bytes", 0)
        }  # fmt: skip
        if tally.get("near_duplicates", 0) > MAX_NEAR_SHARE * tally.get("compared", 0):
            funnel.warnings.append(
                f"{source}: {tally['near_duplicates']:,} of {tally['compared']:,} documents are"
                " near duplicates of others and were removed"
            )
    if options.mix:
        funnel.mix = _mix_counts(counts, MixWeights(options.mix))
    for message in counts.messages:
        funnel.add_skipped(message)
    return funnel


def _mix_counts(counts: Counts, mixture: MixWeights) -> dict[str, dict[str, MixCounts]]:
    """Return the text before the mix and after it, by source, language and bucket."""
    result: dict[str, dict[str, MixCounts]] = {}
    total = max(1, counts.remaining["repeated paragraphs bytes"])
    train_total = max(1, counts.remaining["train bytes"])
    for full_name, tally in sorted(counts.mixture.items()):
        table, _, name = full_name.partition(" ")
        documents, size = tally["before documents"], tally["before bytes"]
        result.setdefault(table, {})[name] = {
            "weight": mixture.key_weight(table, name),
            "documents": documents, "bytes": size, "share": round(size / total, 4),
            "train_documents": tally["train documents"], "train_bytes": tally["train bytes"],
            "train_share": round(tally["train bytes"] / train_total, 4),
            "epochs": round(tally["train documents"] / documents, 3),
        }  # fmt: skip
    if buckets := result.get("buckets"):
        result["buckets"] = {name: buckets[name] for name in sorted(buckets, key=int)}
    return result
