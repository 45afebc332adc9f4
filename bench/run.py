"""``make bench``: every op file and the end-to-end runs; results and the README's table.

Writes bench/results/<machine>.json and replaces what stands between the two marker lines of
README.md.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -P leaves the script's folder out
from harness import ROOT, Row, machine, table

OPS = (
    "attention",
    "cross_entropy",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "glu",
    "adamw",
    "quantized_linear",
    "boundary",
)
END_TO_END = ("train_step", "decode")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def run(script: str, *arguments: str) -> dict:
    """Runs one benchmark, shows its output, returns the JSON of its last line."""
    command = [sys.executable, "-P", str(Path(__file__).parent / f"{script}.py"), *arguments]
    print(f"\n== {script}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    *lines, last = done.stdout.splitlines() or [""]
    print("\n".join(lines), flush=True)
    if done.returncode:
        return {"error": f"{script} ended with status {done.returncode}"}
    return {**json.loads(last), "table": [line for line in lines if line.startswith("|")]}


def readme_section(results: dict) -> str:
    about = results["machine"]
    parts = [
        f"Measured by `make bench` on {about['date']}: {about['cpu']}, {about['threads']} threads, "
        f"instruction set {about['cpu_isa']}, torch {about['torch']}, commit {about['commit']}. "
        "Medians of rounds in which both sides take turns; ratios below 1 are where the peer wins.",
    ]
    rows = [Row(**row) for op in OPS for row in results.get(op, {}).get("rows", [])]
    parts.append(table(rows))
    for name in END_TO_END:
        if lines := results.get(name, {}).get("table"):
            parts.append(f"`python -P bench/{name}.py`:\n\n" + "\n".join(lines))
    errors = [r["error"] for r in results.values() if isinstance(r, dict) and "error" in r]
    parts += [f"Not measured: {e}." for e in errors]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    known = [*OPS, *END_TO_END]
    parser.add_argument("only", nargs="*", help=f"of {', '.join(known)}; default: all")
    options = parser.parse_args()
    if unknown := set(options.only) - set(known):
        parser.error(f"only: wanted some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    about = machine()
    name = re.sub(
        r"[^a-z0-9]+", "-", f"{about['cpu']}-{about['cpu_isa']}-{about['threads']}t".lower()
    )
    path = ROOT / "bench" / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = about
    for script in options.only or known:
        results[script] = run(script)
    path.write_text(json.dumps(results, indent=1) + "\n")
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN in text and END in text:
        head, rest = text.split(BEGIN, 1)
        tail = rest.split(END, 1)[1]
        readme.write_text(f"{head}{BEGIN}\n{readme_section(results)}\n{END}{tail}")
    print(f"\nwritten: {path.relative_to(ROOT)}, README.md")


if __name__ == "__main__":
    main()
