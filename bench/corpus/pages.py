"""Pages of Debian packages as WARC files, the common input of the benchmarks of whole builds.

    python bench/corpus/pages.py [--megabytes 100] [FOLDER]

All pages of php-doc, libreoffice-help-en-us and python3.13-doc (154 MB of HTML, 14,956 pages), or
the same share of each: a host per package, its robots.txt first, one gzip member a record, about
8 MB of HTML a file, with WARC-Date and response headers. The folder is used again if it has them.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

SOURCES = ("php-doc", "libreoffice-help-en-us", "python3.13-doc")
FILE_BYTES = 8_000_000  # of HTML
DATE = datetime(2026, 11, 1, 12, tzinfo=UTC)
ROBOTS = b"User-agent: *\nContent-Signal: search=yes, ai-train=yes\nDisallow: /private/\n"
VERSION = 1  # raised when the same packages give other files


def work_folder() -> Path:
    """Return the folder of what benchmarks generate: $FASTLM_BENCH, else one in the system's
    folder of temporary files.
    """
    path = os.environ.get("FASTLM_BENCH") or Path(tempfile.gettempdir()) / "fastlm-bench"
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_pages(folder: Path, size: int) -> dict:
    """Write ``size`` bytes of HTML, the same share of each package. Return what was written."""
    from fastlm.data.warc_files import WarcWriter
    from fastlm.sources.packages import default_cache, fetch

    pages = {}
    for name in SOURCES:
        root = fetch("deb", name, cache=default_cache())
        paths = sorted(path for path in root.rglob("*.html") if path.is_file())
        pages[name] = [(path.relative_to(root).as_posix(), path) for path in paths]
    total = sum(path.stat().st_size for entries in pages.values() for _, path in entries)
    share = min(1.0, size / total)
    writer = WarcWriter(folder, {"software": "fastlm bench/corpus/pages.py"})
    headers = [(b"Server", b"nginx"), (b"Date", b"Sun, 01 Nov 2026 12:00:00 GMT")]
    html = [(b"Content-Type", b"text/html; charset=utf-8"), *headers]
    text = [(b"Content-Type", b"text/plain; charset=utf-8"), *headers]
    count = html_bytes = 0
    for name, entries in pages.items():
        host = f"https://{name.replace('.', '-')}.example/"
        writer.write(f"{host}robots.txt", DATE, "HTTP/1.1 200 OK", text, ROBOTS, {})
        limit = sum(path.stat().st_size for _, path in entries) * share
        written = in_file = 0
        for address, path in entries:
            body = path.read_bytes()
            if written + len(body) > limit:
                continue
            writer.write(host + address, DATE, "HTTP/1.1 200 OK", html, body, {})
            count, written, in_file = count + 1, written + len(body), in_file + len(body)
            if in_file > FILE_BYTES:
                writer.close()  # the next page begins a new file
                in_file = 0
        writer.close()
        html_bytes += written
    versions = {name: fetch("deb", name, cache=default_cache()).name for name in SOURCES}
    return {"version": VERSION, "pages": count, "bytes": html_bytes, "packages": versions}


def warc_pages(size: int = 160_000_000, folder: Path | None = None) -> tuple[Path, dict]:
    """Return a folder of WARC files with ``size`` bytes of HTML, or all there is, and
    {"version", "pages", "bytes", "packages"}. It is written once.
    """
    folder = folder or work_folder() / f"pages-{size // 1_000_000}"
    record = folder.with_name(f"{folder.name}.json")
    try:
        facts = json.loads(record.read_text())
        if facts["version"] == VERSION and folder.is_dir():
            return folder, facts
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    facts = write_pages(folder, size)
    record.write_text(json.dumps(facts))
    return folder, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--megabytes", type=int, default=160)
    options = parser.parse_args()
    folder, facts = warc_pages(options.megabytes * 1_000_000, options.folder)
    files = sorted(folder.glob("*.warc.gz"))
    size = sum(file.stat().st_size for file in files)
    print(f"{folder}: {len(files)} files, {size / 1e6:.0f} MB compressed")
    print(f"command: {' '.join(sys.argv)}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
