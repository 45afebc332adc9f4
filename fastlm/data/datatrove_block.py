"""Steps of fastlm as blocks of a datatrove pipeline.

    from datatrove.executor import LocalPipelineExecutor
    from fastlm.data.datatrove_block import clean_block

    LocalPipelineExecutor([WarcReader(...), clean_block(html=True), JsonlWriter(...)], ...).run()

A block takes and yields datatrove's documents. What it removes goes to its exclusion writer, with
``filter_reason`` in the metadata, and into the statistics (``dropped_...``), as datatrove's filters
do. Steps that compare documents are not offered: they need all documents, and a unit of datatrove
sees only its own.

Only pipelines of datatrove import this module: datatrove is no dependency of fastlm.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from fastlm.data.clean import CleanDocument, Cleaner, Removal
from fastlm.data.extract import check_method as check_extraction
from fastlm.data.extract import extract_page
from fastlm.data.filter import TECHNICAL, check_rules, first_failed
from fastlm.data.language import check_method as check_detector
from fastlm.data.language import identify
from fastlm.data.options import DataOptions
from fastlm.data.personal import DEFAULT_KINDS, check_kinds, replace
from fastlm.errors import InputError
from fastlm.sources.document import Document

try:
    from datatrove.pipeline.base import PipelineStep  # type: ignore[import-not-found]
except ImportError:
    raise InputError(
        "datatrove_block: expected the package datatrove, it is missing: pip install datatrove"
    ) from None

Step = Callable[[Document], Iterable[CleanDocument]]


class FastlmBlock(PipelineStep):
    """A block that does ``make()(document)`` for each document.

    Args:
        name: of the block.
        make: returns the step; called in the process that runs the block, so that only ``make``
            is pickled.
        html: the text of the documents is markup.
        source: of documents whose metadata names no ``dataset``; lists of opt-outs may name it.
        exclusion_writer: a writer of datatrove for what is removed, as in datatrove's filters.
    """

    type = "🧹 - FASTLM"

    def __init__(
        self,
        name: str,
        make: Callable[[], Step],
        *,
        html: bool = False,
        source: str = "",
        exclusion_writer: Any = None,
    ):
        self.name = name
        super().__init__()
        self.make, self.html, self.source = make, html, source
        self.exclusion_writer = exclusion_writer

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yield the documents that remain; a document that was cut has several parts."""
        del world_size
        step = self.make()
        with self.exclusion_writer or nullcontext() as writer:
            for item in data:
                self.stat_update("total")
                with self.track_time():
                    results = list(step(self._document(item)))
                for result in results:
                    other = self._item(item, result)
                    for kind, count in result.replacements.items():
                        self.stat_update(f"replaced_{kind}", value=count)
                    if result.removal is None:
                        self.stat_update("forwarded")
                        self.update_doc_stats(other)
                        yield other
                        continue
                    reason = f"{result.removal.step}: {result.removal.reason}"
                    self.stat_update("dropped", f"dropped_{reason}")
                    if writer is not None:
                        other.metadata["filter_reason"] = reason
                        if result.removal.detail:
                            other.metadata["filter_detail"] = result.removal.detail
                        writer.write(other, rank)

    def _document(self, item: Any) -> Document:
        source = item.metadata.get("dataset")
        meta = {**item.metadata, "format": "html" if self.html else "text"}
        return Document(
            item.text, item.id, source if isinstance(source, str) else self.source, meta
        )

    def _item(self, item: Any, result: CleanDocument) -> Any:
        document = result.document
        meta = {key: value for key, value in document.meta.items() if key != "format"}
        text = document.text if result.removal is None else result.rejected_text
        return type(item)(text=text, id=document.id, media=item.media, metadata=meta)


def clean_block(
    options: DataOptions | None = None, *, policies: Iterable[Any] = (), **block: Any
) -> FastlmBlock:
    """Return a block that does all that `fastlm.data.clean.Cleaner` does: consent, extraction,
    cutting, language, quality rules, scores, personal data.

    ``policies``: the policy files of sites (`fastlm.sources.warc.PolicyFile`). ``block``: as in
    `FastlmBlock`. InputError: bad options.
    """
    options = options or DataOptions()
    options.check()
    return FastlmBlock("clean", partial(Cleaner, options, policies=tuple(policies)), **block)


def extract_block(method: str = "fast", **block: Any) -> FastlmBlock:
    """Return a block that extracts the main text of pages (`fastlm.data.extract`)."""
    check_extraction(method)
    return FastlmBlock("extract", partial(partial, _extract, method), **{"html": True, **block})


def rules_block(rules: Sequence[str] = TECHNICAL, **block: Any) -> FastlmBlock:
    """Return a block that removes what fails a quality rule (`fastlm.data.filter`)."""
    check_rules(rules)
    return FastlmBlock("quality rules", partial(partial, _check_rules, tuple(rules)), **block)


def personal_data_block(kinds: Sequence[str] = DEFAULT_KINDS, **block: Any) -> FastlmBlock:
    """Return a block that replaces personal data by placeholders (`fastlm.data.personal`)."""
    check_kinds(kinds)
    return FastlmBlock("personal data", partial(partial, _scrub, tuple(kinds)), **block)


def language_block(
    languages: Sequence[str] = (), *, method: str = "langid", **block: Any
) -> FastlmBlock:
    """Return a block that adds ``language`` and ``language_probability`` to the metadata, and
    removes other languages than ``languages``, if some are named.
    """
    check_detector(method)
    return FastlmBlock("language", partial(partial, _identify, tuple(languages), method), **block)


def _extract(method: str, document: Document) -> list[CleanDocument]:
    extraction = extract_page(document, method)
    result = CleanDocument(document)
    document.text, markup = extraction.text, document.text
    if not extraction.text.strip():
        result.removal = Removal("extract", extraction.reason or "no text")
        result.rejected_text = markup
    return [result]


def _check_rules(rules: tuple[str, ...], document: Document) -> list[CleanDocument]:
    result = CleanDocument(document)
    if rule := first_failed(document.text, rules, document.meta.get("language", "en")):
        result.removal, result.rejected_text = Removal("quality rules", rule), document.text
    return [result]


def _scrub(kinds: tuple[str, ...], document: Document) -> list[CleanDocument]:
    document.text, replacements = replace(document.text, kinds=kinds)
    return [CleanDocument(document, replacements=replacements)]


def _identify(languages: tuple[str, ...], method: str, document: Document) -> list[CleanDocument]:
    language, probability = identify(document.text, method=method)
    document.meta |= {"language": language, "language_probability": round(probability, 3)}
    result = CleanDocument(document)
    if languages and language not in languages:
        detail = f"probability {probability:.3f}"
        result.removal = Removal("language", language, detail)
        result.rejected_text = document.text
    return [result]
