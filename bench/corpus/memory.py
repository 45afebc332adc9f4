"""Memory and time of a build against the size of its input.

    python bench/corpus/memory.py [--gigabytes 0.25 0.5 1 ...] [--workers 2] [--memory 1GB]

Input: a generated stream of JSON lines in compressed files of 64 MB text: documents of about 3 KB
from a vocabulary of 200,000 words, of which 2 % have the text of an earlier document, 3 % have it
with one word in 60 replaced, and 10 % have a paragraph of 2,000 that repeat. It is written once and
kept; a smaller size is the beginning of a larger one. Memory: the largest sum of proportional set
sizes of the command and its workers, sampled five times a second. Time: CPU seconds. Linear: the
CPU seconds a GB do not grow.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from pages import work_folder
from printing import print_rows
from processes import FASTLM, Usage, run_command

FILE_BYTES = 64_000_000  # of text
WORDS = 200_000
COMMON = ("the", "of", "and", "to", "that", "with", "be", "have", "in", "is", "it", "for", "as")
SENTENCES = 300_000  # from which paragraphs are drawn
EQUAL, SIMILAR, REPEATED = 0.02, 0.03, 0.1  # shares of documents
LIMIT = 2 << 30
TARGET_BYTES = 10_000_000_000


def row(bar: str, value: object, target: object, unit: str, note: str = "") -> dict:
    return {"bar": f"memory: {bar}", "value": value, "target": target, "unit": unit, "note": note}


def sentences() -> list[str]:
    """Return the sentences of the stream."""
    rng = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    weights = np.arange(len(letters), 0, -1) / np.arange(len(letters), 0, -1).sum()
    lengths = rng.integers(3, 10, WORDS)
    flat = rng.choice(letters, int(lengths.sum()), p=weights)
    ends = np.cumsum(lengths).tolist()
    words = ["".join(flat[end - n : end]) for end, n in zip(ends, lengths.tolist())]
    frequencies = 1 / np.arange(5, WORDS + 5)
    counts = rng.integers(8, 22, SENTENCES)
    drawn = rng.choice(WORDS, int(counts.sum()), p=frequencies / frequencies.sum()).tolist()
    common = rng.integers(0, len(COMMON), len(drawn)).tolist()
    is_common = (rng.random(len(drawn)) < 0.3).tolist()
    result, start = [], 0
    for count in counts.tolist():
        part = range(start, start + count)
        text = " ".join(COMMON[common[i]] if is_common[i] else words[drawn[i]] for i in part)
        result.append(f"{text.capitalize()}.")
        start += count
    return result


def write_file(path: Path, number: int, pool: list[str]) -> None:
    """Write one file of the stream. It depends on its number alone."""
    import zstandard

    rng = np.random.default_rng([2, number])
    boilerplate = [" ".join(pool[i : i + 3]) for i in range(0, 6_000, 3)]
    recent: list[str] = []
    total = 0
    part = path.with_suffix(".part")
    with open(part, "wb") as file, zstandard.ZstdCompressor(3).stream_writer(file) as stream:
        while total < FILE_BYTES:
            kind = rng.random()
            if recent and kind < EQUAL + SIMILAR:
                text = recent[int(rng.integers(len(recent)))]
                if kind > EQUAL:
                    words = text.split(" ")
                    for index in rng.integers(0, len(words), len(words) // 60).tolist():
                        words[index] = "replaced"
                    text = " ".join(words)
            else:
                chosen = rng.integers(0, len(pool), int(rng.integers(10, 50))).tolist()
                groups = [chosen[i : i + 4] for i in range(0, len(chosen), 4)]
                paragraphs = [" ".join(pool[i] for i in group) for group in groups]
                if kind > 1 - REPEATED:
                    paragraphs.append(boilerplate[int(rng.integers(len(boilerplate)))])
                text = "\n\n".join(paragraphs)
                if len(recent) < 2_000:
                    recent.append(text)
            stream.write(json.dumps({"text": text}).encode() + b"\n")
            total += len(text)
    part.rename(path)


def write_stream(size: int) -> Path:
    """Return a folder with links to the first files of the stream, ``size`` bytes of text."""
    home = work_folder() / "stream"
    home.mkdir(exist_ok=True)
    count = max(1, round(size / FILE_BYTES))
    missing = [n for n in range(count) if not (home / f"{n:05d}.jsonl.zst").exists()]
    if missing:
        pool = sentences()
        for number in missing:
            write_file(home / f"{number:05d}.jsonl.zst", number, pool)
    folder = work_folder() / "stream-part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number in range(count):
        name = f"{number:05d}.jsonl.zst"
        (folder / name).hardlink_to(home / name)
    return folder


def prepare(size: float, workers: int, memory: str) -> Usage:
    """Build a corpus of ``size`` GB of the stream."""
    folder = write_stream(int(size * 1e9))
    out = work_folder() / "stream-out"
    shutil.rmtree(out, ignore_errors=True)
    command = [*FASTLM, "data", "prepare", folder, "-o", out, "--workers", workers]
    usage = run_command([*command, "--memory", memory], sample_memory=True)
    shutil.rmtree(out)
    return usage


def rows(
    sizes: tuple[float, ...] = (0.25, 0.5, 1), workers: int = 2, memory: str = "1GB"
) -> list[dict]:
    """Measure; return {bar, value, target, unit, note} of each bar. About 400 CPU s a GB."""
    seconds, peaks, texts = [], [], []
    one = prepare(sizes[0], 1, memory)
    for size in sizes:
        usage = prepare(size, workers, memory)
        seconds.append(usage.cpu_seconds)
        peaks.append(usage.memory)
        texts.append(
            f"{size} GB: {usage.memory / 2**20:.0f} MiB, {usage.cpu_seconds:.0f} CPU s, "
            f"{usage.wall_seconds:.0f} s at load {usage.load:.1f}"
        )
        if size == sizes[0]:
            walls = one.wall_seconds, usage.wall_seconds
    a = np.polyfit(sizes, peaks, 1)[0] if len(sizes) > 1 else 0.0
    measured = max(sizes) * 1e9 >= TARGET_BYTES * 0.99
    rates = [s / size for s, size in zip(seconds, sizes)]
    note = f"{workers} workers, --memory {memory}; " + "; ".join(texts)
    return [
        row(f"largest, {max(sizes)} GB", round(max(peaks) / 2**20), LIMIT >> 20, "MiB", note),
        row(
            "at 10 GB", round(max(peaks) / 2**20) if measured else None, LIMIT >> 20, "MiB",
            "measured" if measured else f"unmeasured: {a / 2**20:.0f} MiB a GB between these,"
            " until one range of hashes takes --memory; then more ranges follow",
        ),
        row(
            "CPU seconds a GB, largest against smallest", round(rates[-1] / rates[0], 2),
            1.1, "times", ", ".join(f"{rate:.0f}" for rate in rates),
        ),
        row(
            f"{workers} workers against one, wall time, {sizes[0]} GB",
            round(walls[0] / walls[1], 2), 1.8 if workers == 2 else None, "times",
            f"{walls[0]:.0f} and {walls[1]:.0f} s",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.25, 0.5, 1])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--memory", default="1GB")
    options = parser.parse_args()
    print_rows(rows(tuple(options.gigabytes), options.workers, options.memory))


if __name__ == "__main__":
    main()
