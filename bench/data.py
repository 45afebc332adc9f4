"""Run the benchmarks of the data stage, `bench/corpus`, and print and store their rows.

    python bench/data.py                             all topics, one to two hours
    python bench/data.py consent language            some of them; --list names all
    python bench/data.py throughput --datatrove DIR/bin/python

A topic is a file of `bench/corpus` with ``rows() -> list[dict]`` of {bar, value, target, unit,
note}. It runs in a process of its own, so that none pays for the imports of another one. A topic
that fails has a row that says so. Results are merged into bench/results/data-<cpu>.json, a topic at
a time, with its command, versions and load. The last line is JSON.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

from corpus.printing import cpu_model, installed_versions

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "bench" / "corpus"
LIBRARIES = (
    "fastlm", "resiliparse", "fastwarc", "rensa", "py3langid", "pycld2", "phonenumbers",
    "python-stdnum", "trafilatura", "fast-robotstxt", "protego", "scrapy", "ray", "numpy",
    "presidio-analyzer", "datasketch",
)  # fmt: skip
MAX_SECONDS = 3 * 3600
PROGRAM = "import json, importlib; print(json.dumps(importlib.import_module({topic!r}).rows()))"
COLUMNS = ("bar", "value", "target", "unit", "note")


def topics() -> list[str]:
    """Return the names of the files of bench/corpus that have rows."""
    names = []
    for path in sorted(CORPUS.glob("*.py")):
        if re.search(r"^def rows\(", path.read_text("utf-8"), re.MULTILINE):
            names.append(path.stem)
    return names


def run_topic(topic: str, variables: dict[str, str]) -> dict:
    """Return {"rows", "command", "versions", "load", "seconds", "date"} of one topic."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(topic=topic)], cwd=ROOT, text=True,
            env={**os.environ, **variables, "PYTHONPATH": str(CORPUS), "OMP_NUM_THREADS": "1"},
            capture_output=True, timeout=MAX_SECONDS,
        )  # fmt: skip
        failure = (
            (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
        )
    except subprocess.TimeoutExpired:
        failure = f"it took more than {MAX_SECONDS} s"
    if failure:
        rows = [{"bar": topic, "value": None, "target": None, "unit": "", "note": failure[:300]}]
    else:
        rows = json.loads(done.stdout.splitlines()[-1])
    return {
        "rows": rows, "command": f"python bench/data.py {topic}", "versions": versions(),
        "load": round(os.getloadavg()[0], 1), "seconds": round(time.monotonic() - start),
        "date": time.strftime("%Y-%m-%d"), "failed": bool(failure),
    }  # fmt: skip


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **installed_versions(LIBRARIES)}


def table(results: dict[str, dict]) -> str:
    """Return a Markdown table of all rows."""
    lines = ["| bar | value | target | unit | note |", "|---|---:|---:|---|---|"]
    for result in results.values():
        for row in result["rows"]:
            cells = ["-" if row[key] is None else str(row[key]) for key in COLUMNS]
            lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def result_path() -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")
    return ROOT / "bench" / "results" / f"data-{slug}.json"


def save(path: Path, results: dict[str, dict]) -> None:
    """Merge results into a file, a line per row."""
    stored = json.loads(path.read_text("utf-8"))["topics"] if path.exists() else {}
    stored |= results
    parts = []
    for topic in sorted(stored):
        facts = {key: value for key, value in stored[topic].items() if key != "rows"}
        rows = ",\n   ".join(json.dumps(row) for row in stored[topic]["rows"])
        head = json.dumps(facts)[:-1]
        parts.append(f'  {json.dumps(topic)}: {head},\n  "rows": [\n   {rows}\n  ]}}')
    text = (
        f'{{\n "cpu": {json.dumps(cpu_model())},\n "topics": {{\n' + ",\n".join(parts) + "\n }\n}\n"
    )
    json.loads(text)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("topics", nargs="*", metavar="TOPIC", help="of --list; default: all")
    parser.add_argument("--list", action="store_true", help="name the topics and stop")
    parser.add_argument(
        "--datatrove", metavar="PYTHON", help="of an environment with datatrove, for throughput"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file instead")
    options = parser.parse_args()
    names = topics()
    if options.list:
        print("\n".join(names))
        return
    if unknown := [name for name in options.topics if name not in names]:
        parser.error(f"topic: expected one of {', '.join(names)}, got {unknown[0]!r}")
    variables = {"FASTLM_DATATROVE": options.datatrove} if options.datatrove else {}
    results = {}
    for topic in options.topics or names:
        results[topic] = run_topic(topic, variables)
        save(options.json or result_path(), {topic: results[topic]})
        print(f"{topic}: {results[topic]['seconds']} s", file=sys.stderr)
    print(table(results))
    print(f"command: {' '.join(sys.argv)}; {versions()}; {cpu_model()}")
    print(json.dumps({"cpu": cpu_model(), "topics": results}))
    if any(result["failed"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
