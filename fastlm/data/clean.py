"""What is done to one document alone: consent, extract, cut, identify the language, apply the
quality rules, score quality and toxicity, scrub.

The result depends on the document and the options only, so documents can be cleaned anywhere and in
any order. What depends on other documents is in `fastlm.data.steps`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from fastlm.data.consent.gate import ConsentGate
from fastlm.data.consent.policy_index import PolicyIndex
from fastlm.data.contamination import QuestionIndex
from fastlm.data.dedup import content_key
from fastlm.data.extract import extract_page
from fastlm.data.filter import first_failed, is_too_short
from fastlm.data.forget_log import document_key, line_key, text_key
from fastlm.data.language import Language, identify
from fastlm.data.near_copies import NearCopies, is_signature
from fastlm.data.options import DataOptions
from fastlm.data.personal import Placeholders
from fastlm.data.personal import replace as replace_personal_data
from fastlm.data.quality import QualityModel
from fastlm.data.split import split_text
from fastlm.data.toxicity import ToxicityModel
from fastlm.sources.source_files import Document
from fastlm.sources.warc import PolicyFile


@dataclass(slots=True)
class Removal:
    """Why a document was removed: the step of the funnel, its reason (counted), and more detail."""

    step: str
    reason: str
    detail: str = ""


@dataclass(slots=True)
class CleanDocument:
    """A document, or a part of a long one, after cleaning.

    Attributes:
        document: its id, source and metadata; its text is the one that is kept, "" if none is.
        key: `content_key` of the extracted text; b"" if there was none.
        extracted_bytes: of the extracted text.
        removal: None for a document that passes.
        rejected_text: the text that was removed, of which an excerpt may be stored.
        replacements: personal data that was replaced, by kind.
        fallback: why its page was not extracted as asked, "" if it was.
    """

    document: Document
    key: bytes = b""
    extracted_bytes: int = 0
    removal: Removal | None = None
    rejected_text: str = ""
    replacements: dict[str, int] = field(default_factory=dict)
    fallback: str = ""


EXCERPT = 600  # characters that show people why a text was removed


@dataclass(slots=True)
class _Draft:
    """A document between two steps: the results if it is removed, else its parts with their texts
    and languages.
    """

    results: list[CleanDocument]
    parts: list[tuple[Document, str]] = field(default_factory=list)
    languages: list[Language | None] = field(default_factory=list)
    fallback: str = ""


class Cleaner:
    """``cleaner(document)`` returns the cleaned document, or its parts if it was cut.

    policies: the policy files of all sites of the build, or their index. now: the date of its plan,
    with which dates in the future are compared. licences: of packages, by source.
    """

    def __init__(
        self,
        options: DataOptions,
        forgotten: Collection[str] = (),
        policies: PolicyIndex | Iterable[PolicyFile] = (),
        now: datetime | None = None,
        licences: Mapping[str, str] | None = None,
    ):
        self.options, self.forgotten = options, frozenset(forgotten)
        self.copies = NearCopies(signatures=filter(is_signature, self.forgotten))
        self.gate = ConsentGate(options, policies, now=now, source_licences=licences)
        self.quality = QualityModel.load(options.quality) if options.quality else None
        self.toxicity = ToxicityModel.load(options.toxicity) if options.toxicity else None
        paths = options.decontaminate
        self.questions = QuestionIndex.load(paths) if paths else None

    def __call__(self, document: Document) -> list[CleanDocument]:
        return self.clean([document])[0]

    def clean(self, documents: Sequence[Document]) -> list[list[CleanDocument]]:
        """Return what a call returns for each of several documents. Each step is done for all of
        them before the next one, so that its tables stay in the processor's caches.
        """
        texts = [self._extract(document) for document in documents]
        method = self.options.language_method
        if method != "off":
            for draft in texts:
                draft.languages = [self._identify(text, method) for _, text in draft.parts]
        return [draft.results or self._clean_parts(draft) for draft in texts]

    def _identify(self, text: str, method: str) -> Language | None:
        if not self.options.languages and is_too_short(text, self.options.rules):
            return None  # it is removed
        return identify(text, method=method)

    def _clean_parts(self, draft: "_Draft") -> list[CleanDocument]:
        placeholders = Placeholders()  # a value has the same number in all parts
        results = [
            self._clean_part(document, text, language, placeholders)
            for (document, text), language in zip(
                draft.parts, draft.languages or [None] * len(draft.parts)
            )
        ]
        results[0].fallback = draft.fallback
        return results

    def _extract(self, document: Document) -> "_Draft":
        decision = self.gate(document)
        bare = replace(document, text="", meta=document.meta | decision.meta)
        if decision.refusal:
            return _Draft([CleanDocument(bare, removal=Removal("consent", *decision.refusal))])
        extraction = extract_page(document, self.options.extract)
        text = extraction.text
        if not text.strip():
            reason = extraction.reason or "no text"
            return _Draft([CleanDocument(bare, removal=Removal("extract", reason))])
        texts = split_text(text, self.options.max_words)
        if len(texts) == 1:
            parts = [(bare, text)]
        else:
            parts = [(replace(bare, id=f"{document.id}:{i}"), part) for i, part in enumerate(texts)]
        return _Draft([], parts, fallback=extraction.reason)

    def _clean_part(
        self, document: Document, text: str, language: Language | None, placeholders: Placeholders
    ) -> CleanDocument:
        meta = {k: v for k, v in document.meta.items() if k not in TRANSIENT}
        result = CleanDocument(replace(document, meta=meta), content_key(text), len(text.encode()))
        rejection = self._score(text, meta, language)
        clean, replacements = "", {}
        if rejection is None:
            clean, replacements = self._scrub(text, placeholders)
        if entry := self.gate.refuses_text(text):
            result.removal, result.key = Removal("consent", "opt-out", entry), b""
        elif self.forgotten and not _forget_keys(result, clean).isdisjoint(self.forgotten):
            result.removal, result.key = Removal("extract", "forgotten"), b""
        elif self.copies and any(self.copies.similarities([text])):
            result.removal, result.key = Removal("extract", "near copy of a forgotten text"), b""
        elif rejection is not None:
            result.removal, result.rejected_text = rejection, text
        else:
            result.document.text, result.replacements = clean, replacements
        return result

    def _score(
        self, text: str, meta: dict[str, Any], identified: Language | None
    ) -> Removal | None:
        """Add language and scores of a text to ``meta``. Return why it is rejected, if it is."""
        options, language = self.options, "en"
        if identified is not None:
            language, probability = identified
            meta |= {"language": language, "language_probability": round(probability, 3)}
            if options.languages and language not in options.languages:
                return Removal("language", language, f"probability {probability:.3f}")
        if rule := first_failed(text, options.rules, language):
            return Removal("quality rules", rule)
        if self.quality is not None:
            (score,) = scores = self.quality.score([text])
            bucket = int(self.quality.bucket(scores)[0])
            meta |= {"quality": float(score), "quality_bucket": bucket}
            if bucket < options.min_quality_bucket:
                return Removal("quality", f"bucket {bucket}", f"score {score:.3f}")
        if self.toxicity is not None:
            toxicity = float(self.toxicity.score([text])[0])
            meta["toxicity"] = toxicity
            if toxicity > options.max_toxicity:
                return Removal("toxicity", "over the limit", f"score {toxicity:.4f}")
        if self.questions is not None and (overlap := self.questions.find(text)):
            detail = f"{overlap.share:.2f} of {overlap.id}: {overlap.first}"
            return Removal("contamination", f"overlaps {overlap.set}", detail)
        return None

    def _scrub(
        self, text: str, placeholders: Placeholders | None = None
    ) -> tuple[str, dict[str, int]]:
        options = self.options
        if not options.scrub:
            return text, {}
        return replace_personal_data(
            text, kinds=options.scrub, regions=options.region_codes(), placeholders=placeholders
        )

    def excerpt(self, text: str) -> str:
        """Return the beginning of a removed text, without personal data."""
        return self._scrub(text[:EXCERPT])[0]


TRANSIENT = {"format", "headers"}  # needed for the decisions about a document, not stored


def _forget_keys(result: CleanDocument, text: str) -> set[str]:
    """Return the keys by which a document, or a part of it, is forgotten."""
    location: tuple[Any, Any] = result.document.source, result.document.id
    content = f"text:{result.key.hex()}"
    return {document_key(*location), line_key(*location), content, text_key(text)}
