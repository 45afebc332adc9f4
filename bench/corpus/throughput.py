"""The whole chain on pages of packages: pages per CPU second, against datatrove's own blocks.

    python bench/corpus/throughput.py [--datatrove DIR/bin/python] [--megabytes 160]

Input: the WARC files of `bench/corpus/pages.py`. fastlm: `data prepare` with every step on:
consent, extraction, language, equal texts, quality rules, quality and toxicity models (trained
before, not timed), personal data, near duplicates, repeated paragraphs. datatrove:
`bench/peers/datatrove_chain.py` in an environment of its own (see there). CPU seconds of the
command and its children, start-up included. Each of three rounds runs fastlm on all pages and
datatrove on every third file, so that datatrove reads each page once. Two workers are compared with
one by wall time, in three rounds, beside two builds at once, which share nothing but the machine;
and by CPU time outside units of work, which no number of workers divides.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from logged_units import LOG, PROGRAM, unit_seconds
from pages import warc_pages, work_folder
from printing import print_rows
from processes import FASTLM, ROOT, CommandError, Usage, run_command

ROUNDS = 3
GOOD, OTHER = ("deb:python3.13-doc",), ("deb:php-doc", "deb:libreoffice-help-en-us")


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": f"chain: {bar}", "value": value, "target": target, "unit": unit, "note": note}


def models() -> list[str]:
    """Return the options of a quality and a toxicity model, which are trained once."""
    quality, toxicity = (work_folder() / f"{name}.model" for name in ("quality", "toxicity"))
    if not quality.exists():
        sources = [x for s in GOOD for x in ("--good", s)] + [
            x for s in OTHER for x in ("--other", s)
        ]
        run_command([*FASTLM, "data", "quality", *sources, "-o", quality])
    if not toxicity.exists():
        run_command([*FASTLM, "data", "toxicity", "-o", toxicity])
    return ["--quality", str(quality), "--toxicity", str(toxicity)]


def prepare(folder: Path, out: Path, *options: object) -> Usage:
    """Run `fastlm data prepare` into a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    return run_command([*FASTLM, "data", "prepare", folder, "-o", out, *options])


def datatrove_usage(python: str, files: list[Path]) -> tuple[Usage, dict]:
    program = ROOT / "bench" / "peers" / "datatrove_chain.py"
    usage = run_command([python, program, work_folder() / "datatrove", *files])
    return usage, json.loads(usage.output.splitlines()[-1])


def serial_share(folder: Path, options: list[str]) -> tuple[float, float]:
    """Return the CPU seconds outside units of work, and those in units, of a build in one process.

    Steps of one unit count as serial, too.
    """
    out = work_folder() / "serial"
    log = out.with_suffix(".log")
    shutil.rmtree(out, ignore_errors=True)
    log.unlink(missing_ok=True)
    command = [sys.executable, "-c", PROGRAM, "data", "prepare", folder, "-o", out, *options]
    variables = {LOG: str(log), "PYTHONPATH": str(Path(__file__).parent)}
    total = run_command(command, variables=variables).cpu_seconds
    divided = sum(sum(seconds) for seconds in unit_seconds(log).values() if len(seconds) > 1)
    return total - divided, divided


def worker_rows(folder: Path, options: list[str]) -> list[dict]:
    """Compare two workers with one."""
    one, two, at_once = [], [], []
    for _ in range(ROUNDS):
        one.append(prepare(folder, work_folder() / "one", *options, "--workers", 1))
        two.append(prepare(folder, work_folder() / "two", *options, "--workers", 2))
        with ThreadPoolExecutor(2) as threads:
            outs = [work_folder() / name for name in ("first", "second")]
            at_once.append(list(threads.map(lambda out: prepare(folder, out, *options), outs)))
    seconds = [[u.wall_seconds for u in usages] for usages in (one, two)]
    builds = [max(u.wall_seconds for u in pair) for pair in at_once]
    of_workers = statistics.median(a / b for a, b in zip(*seconds))
    of_machine = statistics.median(2 * a / b for a, b in zip(seconds[0], builds))
    serial, divided = serial_share(folder, options)
    bound = (serial + divided) / (serial + divided / 2)
    texts = [", ".join(f"{s:.1f}" for s in values) for values in (*seconds, builds)]
    cpu_seconds = [statistics.median(u.cpu_seconds for u in usages) for usages in (one, two)]
    return [
        row(
            "two workers, wall time", round(of_workers, 2), 1.8, "times",
            f"median of rounds: {texts[0]} s and {texts[1]} s; load average {two[-1].load:.1f} on"
            f" {os.cpu_count()} cores; two builds at once reach {of_machine:.2f} ({texts[2]} s)",
        ),
        row(
            "two workers, bound by CPU time outside units", round(bound, 2), 1.8, "times",
            f"serial {serial:.2f} s, in units of several {divided:.1f} s, one process; two workers "
            f"need {cpu_seconds[1]:.1f} CPU s, one {cpu_seconds[0]:.1f}",
        ),
    ]  # fmt: skip


def rows(datatrove: str | None = None, size: int = 160_000_000) -> list[dict]:
    """Measure; return {bar, value, target, unit, note} of each bar. Some 18 minutes of CPU time
    with datatrove, 8 without. The Python of datatrove is also read from $FASTLM_DATATROVE.
    """
    datatrove = datatrove or os.environ.get("FASTLM_DATATROVE")
    folder, facts = warc_pages(size)
    options = models()
    own, peer, peer_facts, failure = [], [], {}, ""
    files = sorted(folder.glob("*.warc.gz"))
    for number in range(ROUNDS):
        own.append(prepare(folder, work_folder() / "chain", *options))
        if datatrove and not failure:
            try:
                usage, peer_facts = datatrove_usage(datatrove, files[number::ROUNDS])
                peer.append(usage)
            except (CommandError, OSError, ValueError) as error:
                failure = str(error)[-200:]
    seconds = [usage.cpu_seconds for usage in own]
    speed = facts["pages"] / statistics.median(seconds)
    result = [
        row(
            "pages per CPU second, all steps", round(speed), 500, "pages/s",
            f"{facts['pages']:,} pages, {facts['bytes'] / 1e6:.0f} MB HTML; rounds "
            f"{', '.join(f'{s:.1f}' for s in seconds)} s; load {own[-1].load:.1f}",
        )
    ]  # fmt: skip
    if len(peer) == ROUNDS:
        peer_seconds = sum(usage.cpu_seconds for usage in peer)
        peer_speed = facts["pages"] / peer_seconds
        extras = "with" if peer_facts["language"] else "without"
        note = f"datatrove {peer_facts['datatrove']}, trafilatura {peer_facts['trafilatura']}, "
        note += f"{extras} language; {peer_seconds:.0f} CPU s for all pages; no toxicity, consent"
        result += [
            row("datatrove's own blocks", round(peer_speed, 1), None, "pages/s", note),
            row("against datatrove's own blocks", round(speed / peer_speed, 1), 8, "times"),
        ]
    else:
        note = failure or "no environment: --datatrove PYTHON"
        result.append(row("against datatrove's own blocks", None, 8, "times", note))
    return [*result, *worker_rows(folder, options)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--datatrove", metavar="PYTHON")
    parser.add_argument("--megabytes", type=int, default=160)
    options = parser.parse_args()
    print_rows(
        rows(options.datatrove, options.megabytes * 1_000_000),
        ("resiliparse", "fastwarc", "rensa", "py3langid", "phonenumbers"),
    )


if __name__ == "__main__":
    main()
