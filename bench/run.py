"""Run all benchmarks (``make bench``) and write results, docs/benchmarks.md and the README.

It runs every op file and the end-to-end runs. It writes bench/results/<machine>.json,
docs/benchmarks.md with every row, the ten rows of `HEADLINE` between the two marker lines of
README.md, and the same rows as bars in docs/peers.png. ``--headline`` runs the README's rows alone
(some 40 minutes) and writes only them. The README is written from committed code only, with all
of its rows, and never with ``--busy`` or ``--no-gate``, whose results have a file of their own.
Results of uncommitted code are stored, not published.

``--isa avx2`` limits both sides to one instruction set (`ISA_SETTINGS`), runs the ops and writes
docs/benchmarks-avx2.md and a separate results file; the README stays unchanged. ``--page NAME``
writes every row to docs/benchmarks-NAME.md instead, for a machine other than the README's.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, Row, machine, save, table
from losing import is_lost, losing_rows

OPS = (
    "attention",
    "cross_entropy",
    "linear",
    "linear_cross_entropy",
    "linear_logprobs",
    "linear_distillation",
    "rms_norm",
    "layer_norm",
    "rope",
    "glu",
    "adamw",
    "quantized_linear",
    "boundary",
)
# name in the results -> command, content of its table
END_TO_END = {
    "train_step": (
        "train/train_step.py",
        "Training of a Llama-like 42 M, 8 x 512 tokens a step; spread: range / median",
    ),
    "patch": (
        "train/patch.py",
        "Training of a Hugging Face Llama of 42 M, 8 x 512 tokens a step, with `fastlm.patch`",
    ),
    "decode": (
        "peers/decode.py",
        "{model}, 512 tokens of prompt, 64 new; tokens/s of all users",
    ),
    "scaling": (
        "train/train_step.py --scaling",
        "Training at other sizes, lengths and thread counts, against the faster of torch.compile"
        " under bf16 autocast and in float32",
    ),
    "profile_step": ("train/profile_step.py", "Where a training step of the 42 M model goes"),
}
# The rows of the README, including some that a peer wins: (op, name, shape) -> description
HEADLINE = {
    ("attention", "causal bf16 forward+backward", "(8, 8/8, 512, 64)"): "attention with gradients",
    ("attention", "decode bf16", "(1, 9/3, 1 x 1024, 64)"): "attention, one new token",
    ("cross_entropy", "cross_entropy fwd+bwd bfloat16", "4096 x 32768"): "cross-entropy",
    (
        "linear_cross_entropy", "linear_cross_entropy fwd+bwd bfloat16", "4096 x 512 -> 32768",
    ): "linear layer and cross-entropy",
    ("rms_norm", "fwd+bwd", "4096 x 512"): "RMSNorm",
    ("glu", "silu fwd+bwd", "4096 x 2816"): "SwiGLU",
    ("adamw", "clip + step + bf16 copy", "40 M"): "AdamW: clip, step, bf16 copy",
    ("quantized_linear", "w4a16", "1 x 4096 -> 4096"): "int4 weights, one row",
    ("linear", "fwd+bwd bf16", "4096 x 512 -> 512"): "linear layer",
    ("quantized_linear", "w8a16", "4 x 576 -> 1536"): "int8 weights, four rows",
}  # fmt: skip
# --isa -> settings that limit fastlm, ATen, oneDNN, MKL and torch.compile's code to it. The limits
# of oneDNN and MKL are needed too: without them torch's matrix products ignore ATEN_CPU_CAPABILITY.
ISA_SETTINGS = {
    "avx512": {
        "FASTLM_CPU_ISA": "avx512",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",  # as fastlm's avx512: bf16 and int8 dot products
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_fma": {  # an Intel CPU without tiles: the peers keep its bf16 and fp16 instructions
        "FASTLM_CPU_ISA": "avx512_fma",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512f": {  # Skylake: no dot products of int8 and bf16
        "FASTLM_CPU_ISA": "avx512f",
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
        "TORCHINDUCTOR_CPP_MARCH": "skylake-avx512",
    },
    "avx2": {
        "FASTLM_CPU_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    },
    "scalar": {
        "FASTLM_CPU_ISA": "scalar",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64",
    },
}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def run(command: str, *arguments: str) -> dict:
    """Run one benchmark, show its output and return its results."""
    script, *fixed = command.split()
    print(f"\n== {command}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        words = [sys.executable, str(Path(__file__).parent / script), *fixed, *arguments]
        done = subprocess.run([*words, "--json", str(path)], stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        if done.returncode:
            return {"error": f"{script} ended with status {done.returncode}"}
        lines = [s for s in done.stdout.splitlines() if s.startswith(("|", "unsteady:"))]
        return {**json.loads(path.read_text()), "table": lines}


def published(results: dict) -> dict:
    """Return the results without those of uncommitted code."""
    return {k: r for k, r in results.items() if k == "machine" or not is_dirty(r)}


def is_dirty(result: dict) -> bool:
    commit = result.get("machine", {}).get("commit", "unknown")
    return not commit or commit.endswith("-dirty")  # none: the code is no checkout


def rows_of(results: dict) -> list[Row]:
    """Return the rows of all ops, with the op in their names."""
    rows = []
    for op in OPS:
        for row in (Row(**r) for r in results.get(op, {}).get("rows", [])):
            if op not in row.name:
                row.name = f"{op}: {row.name}"
            rows.append(row)
    return rows


def headline(results: dict) -> list[tuple[str, str, str, str, float, str]]:
    """Return (description, shape, fastlm, the best peer, ratio, why it is unsteady) for the
    available rows of `HEADLINE` and for the training step."""
    rows = []
    for (op, name, shape), words in HEADLINE.items():
        for row in (Row(**r) for r in results.get(op, {}).get("rows", [])):
            if (row.name, row.shape) == (name, shape) and row.ratio and row.best_peer:
                ours, theirs = row.milliseconds["fastlm"], row.milliseconds[row.best_peer]
                peer = f"{row.best_peer} {theirs:.3g} ms"
                rows.append((words, shape, f"{ours:.3g} ms", peer, row.ratio, row.unsteady))
    steps = results.get("train_step", {}).get("rows", [])
    rates = {r["variant"]: r["tokens_per_second"] for r in steps}
    if peers := [name for name in rates if not name.startswith("fastlm")]:
        ours, best = rates["fastlm"], max(peers, key=lambda name: rates[name])
        peer = f"{best} {rates[best]:,.0f} tokens/s"
        words = "a training step", "Llama, 42 M, 8 x 512 tokens"
        rows.insert(0, (*words, f"{ours:,.0f} tokens/s", peer, ours / rates[best], ""))
    return rows


def commits_of(results: dict) -> str:
    """Return the commits at which the rows were measured."""
    measured = (results[n] for n in (*OPS, *END_TO_END) if "machine" in results.get(n, {}))
    commits = dict.fromkeys(str(r["machine"]["commit"]) for r in measured)
    return " and ".join(commits) or results["machine"]["commit"]


def readme_section(results: dict) -> str:
    """Return the README's rows as Markdown."""
    host = results["machine"]
    lines = ["| | shape | fastlm | the best of torch | |", "|---|---|---|---|---|"]
    for *cells, ratio, unsteady in headline(results):
        note = unsteady and f" ({unsteady})"
        lines.append(f"| {' | '.join(cells)} | **{ratio:.2f}x**{note} |")
    return (
        f"{host['cpu']}, {host['threads']} threads, {host['cpu_isa']}, torch {host['torch']},"
        f" {host['date']}, commit {commits_of(results)} (`bench/run.py`); bf16,"
        " medians of rounds in turn. A spread marks an unsteady row.\n\n"
        + "\n".join(lines)
        + "\n\n![these ratios as bars](docs/peers.png)"
    )


def plot_headline(results: dict, path: Path) -> None:
    """Draw the README's rows as bars of the ratio to the best peer. A row that the peer wins is
    red."""
    from matplotlib.figure import Figure

    rows = sorted(headline(results), key=lambda row: row[4])
    figure = Figure(figsize=(8, 0.3 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    values = [row[4] for row in rows]
    colors = ["#b3452f" if value < 1 else "#2f6fde" for value in values]
    axes.barh([row[0] for row in rows], values, color=colors, height=0.62)
    for y, value in enumerate(values):  # always right of the line
        axes.text(max(value, 1) + 0.05, y, f"{value:.2f}x", va="center", fontsize=9)
    axes.axvline(1, color="#1c2733", linewidth=1)
    axes.set_xlabel(
        "times as fast as the best of torch and torch.compile (line: equal)", fontsize=9
    )
    axes.set_xlim(right=1.12 * max(values))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, labelsize=9)
    figure.savefig(path, dpi=150)


def section(results: dict, isa: str | None = None, flag: str = "") -> str:
    """Return Markdown: machine, table of the ops, tables of the end-to-end runs, failures.

    `flag` is the option of bench/run.py, if the run was not `make bench`.
    """
    withdrawn = sorted(name for name, r in results.items() if name != "machine" and is_dirty(r))
    results = published(results)
    host = results["machine"]
    rows = rows_of(results)
    command = f"python bench/run.py {flag}" if flag else "make bench"
    parts = [
        f"Measured by `{command}` on {host['date']}: {host['cpu']}, {host['threads']} threads, "
        f"instruction set {host['cpu_isa']}, torch {host['torch']}, "
        f"commit {commits_of(results)}.",
        "Medians of rounds in which both sides take turns. Below a ratio of 1 the peer is faster. "
        "The share is relative to the best instruction for the accuracy of the work, measured on "
        "registers in the same run, or to reading memory; above 100 % the data was in a cache. In "
        "end-to-end runs the best peer is bold. A row is marked unsteady if other processes "
        "disturbed it twice.",
        "Shapes: attention has (batch, query heads/key heads, length, head size); `M x K -> N` has "
        "M rows of K inputs and N outputs; w4a16 has weights of 4 bits and activations of 16. The "
        "spread is (upper - lower quartile) / median of the least steady variant. Other variants "
        "of fastlm are listed with the peers and do not count for the ratio.",
        table(rows),
    ]
    if isa:
        limits = " ".join(f"{k}={v}" for k, v in ISA_SETTINGS[isa].items())
        parts.insert(1, f"Both sides are limited to {isa}: `{limits}`.")
    compared = sum(r.ratio is not None for r in rows)
    lost = sum(map(is_lost, rows))
    parts.insert(-1, f"{compared} rows with a peer, {lost} of them under 1.00x.")
    if lost:
        parts.append(f"Rows under 1.00x, and why:\n\n{losing_rows(rows)}")
    for name in END_TO_END:
        if lines := results.get(name, {}).get("table"):
            script, title = END_TO_END[name]
            title = title.format(**{"model": "a model", **results[name].get("options", {})})
            heading = f"{title} (`python bench/{script}`):"
            parts.append(f"{heading}\n\n" + "\n".join(lines))
    if withdrawn:
        parts.append(f"Withdrawn, because the code was not committed: {', '.join(withdrawn)}.")
    errors = [r["error"] for r in results.values() if isinstance(r, dict) and "error" in r]
    parts += [f"Not measured: {e}." for e in errors]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--write-only", action="store_true", help="Write the pages from existing results."
    )
    parser.add_argument("--of", metavar="FILE", type=Path, help="Use another machine's results.")
    parser.add_argument("--no-gate", action="store_true", help="Skip the tests (not for claims).")
    parser.add_argument(
        "--busy", action="store_true", help="Run while other processes run (not for claims)."
    )
    parser.add_argument(
        "--isa", choices=ISA_SETTINGS, help="Limit both sides to one instruction set."
    )
    parser.add_argument(
        "--page", metavar="NAME", help="Write docs/benchmarks-NAME.md, not the README."
    )
    parser.add_argument(
        "--headline", action="store_true", help="Run the README's rows alone, and write only them."
    )
    names = [*OPS, *END_TO_END]
    parser.add_argument("only", nargs="*", help=f"Run only these: {', '.join(names)}.")
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"only: expected some of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    isa = options.isa
    if options.headline and (isa or options.page):
        parser.error("--headline: is of the README; expected no --isa and no --page")
    if isa and any(os.environ.get(name) != value for name, value in ISA_SETTINGS[isa].items()):
        # torch reads them at import, so restart
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA_SETTINGS[isa]})
    host = machine()
    if not (isa or options.page or options.write_only):
        if options.busy or options.no_gate:
            parser.error("README.md: is written without --busy and --no-gate; add --page NAME")
        if is_dirty({"machine": host}):
            got = host["commit"] or "no checkout"
            parser.error(f"README.md: expected committed code, got {got}")
    kind = f"forced-{isa}" if isa else host["cpu_isa"]
    name = re.sub(r"[^a-z0-9]+", "-", f"{host['cpu']}-{kind}-{host['threads']}t".lower())
    name += "-headline" if options.headline else ""
    name += "-not-for-claims" if options.busy or options.no_gate else ""
    path = options.of or ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    if not options.write_only:
        results["machine"] = host
        # the boundary has no peer in torch; the end-to-end runs use the machine without such limits
        scripts = [op for op in OPS if op != "boundary"] if isa else names
        cases: dict[str, list[str]] = {}
        if options.headline:
            for op, *case in HEADLINE:
                cases.setdefault(op, []).append(" ".join(case))
            scripts = [*cases, "train_step"]
        for script in options.only or scripts:
            flags = cases.get(script, [])[:]
            flags += ["--no-gate"] if options.no_gate and script in OPS else []
            flags += ["--busy"] if options.busy else []
            results[script] = run(END_TO_END.get(script, (f"ops/{script}.py",))[0], *flags)
        save(path, results)
    if isa or options.page:
        page = ROOT / "docs" / f"benchmarks-{options.page or isa}.md"
        title = f"Every op with {isa} forced" if isa else f"Rows on {results['machine']['cpu']}"
        flag = f"--isa {isa}" if isa else f"--page {options.page}"
        page.write_text(f"# {title}\n\n{section(results, isa=isa, flag=flag)}\n")
        print(f"\nwritten: {path.name}, {page.relative_to(ROOT)}")
        return
    if not options.headline:
        write_every_row(results, ROOT / "docs" / "benchmarks.md")
    count, needed = len(headline(published(results))), len(HEADLINE) + 1
    if count < needed:
        sys.exit(f"bench: README.md: unchanged: expected {needed} measured rows, got {count}")
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text(f"{head}{BEGIN}\n{readme_section(published(results))}\n{END}{tail}")
    plot_headline(published(results), ROOT / "docs" / "peers.png")
    print(f"\nwritten: {path.name}, docs/peers.png, README.md")


def write_every_row(results: dict, path: Path) -> None:
    pages = [isa for isa in ISA_SETTINGS if (ROOT / "docs" / f"benchmarks-{isa}.md").exists()]
    links = ", ".join(f"[{isa}](benchmarks-{isa}.md)" for isa in pages)
    path.write_text(
        "# Every row of `make bench`\n\n"
        + (f"The same with an instruction set forced on both sides: {links}.\n\n" if pages else "")
        + f"{section(results)}\n"
    )
    print(f"\nwritten: {path.name}")


if __name__ == "__main__":
    main()
