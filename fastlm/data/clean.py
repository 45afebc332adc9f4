"""What is done to one document alone: consent, extract, cut, apply the quality rules, scrub.

The result depends on the document and the options only, so documents can be cleaned anywhere and in
any order. What depends on other documents is in `fastlm.data.steps`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from fastlm.data.consent.gate import ConsentGate
from fastlm.data.consent.policy_index import PolicyIndex
from fastlm.data.dedup import content_key
from fastlm.data.extract import extract
from fastlm.data.filter import first_failed
from fastlm.data.forget_log import document_key, line_key, text_key
from fastlm.data.near_copies import NearCopies, is_signature
from fastlm.data.nesting import costly_markup
from fastlm.data.options import DataOptions
from fastlm.data.personal import replace as scrub
from fastlm.data.split import split_text
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
    """

    document: Document
    key: bytes = b""
    extracted_bytes: int = 0
    removal: Removal | None = None
    rejected_text: str = ""
    replacements: dict[str, int] = field(default_factory=dict)


EXCERPT = 600  # characters that show people why a text was removed


class Cleaner:
    """``cleaner(document)`` returns the cleaned document, or its parts if it was cut.

    policies: the policy files of all sites of the build, or their index. now: the date of its plan,
    with which dates in the future are compared.
    """

    def __init__(
        self,
        options: DataOptions,
        forgotten: Collection[str] = (),
        policies: PolicyIndex | Iterable[PolicyFile] = (),
        now: datetime | None = None,
    ):
        self.options, self.forgotten = options, frozenset(forgotten)
        self.copies = NearCopies(signatures=filter(is_signature, self.forgotten))
        self.gate = ConsentGate(options, policies, now=now)

    def __call__(self, document: Document) -> list[CleanDocument]:
        decision = self.gate(document)
        bare = replace(document, text="", meta=document.meta | decision.meta)
        if decision.refusal:
            return [CleanDocument(bare, removal=Removal("consent", *decision.refusal))]
        text = extract(document)
        if not text.strip():
            is_html = document.meta.get("format") == "html"
            reason = (costly_markup(document.text) if is_html else None) or "no text"
            return [CleanDocument(bare, removal=Removal("extract", reason))]
        parts = split_text(text, self.options.max_words)
        if len(parts) == 1:
            return [self._clean_part(bare, text)]
        return [
            self._clean_part(replace(bare, id=f"{document.id}:{number}"), part)
            for number, part in enumerate(parts)
        ]

    def _clean_part(self, document: Document, text: str) -> CleanDocument:
        meta = {k: v for k, v in document.meta.items() if k not in TRANSIENT}
        result = CleanDocument(replace(document, meta=meta), content_key(text), len(text.encode()))
        rule = first_failed(text, self.options.rules)
        clean, replacements = "", {}
        if rule is None:
            clean, replacements = scrub(text) if self.options.scrub else (text, {})
        if entry := self.gate.refuses_text(text):
            result.removal, result.key = Removal("consent", "opt-out", entry), b""
        elif self.forgotten and not _forget_keys(result, clean).isdisjoint(self.forgotten):
            result.removal, result.key = Removal("extract", "forgotten"), b""
        elif self.copies and any(self.copies.similarities([text])):
            result.removal, result.key = Removal("extract", "near copy of a forgotten text"), b""
        elif rule is not None:
            result.removal, result.rejected_text = Removal("quality rules", rule), text
        else:
            result.document.text, result.replacements = clean, replacements
        return result

    def excerpt(self, text: str) -> str:
        """Return the beginning of a removed text, without personal data."""
        text = text[:EXCERPT]
        return scrub(text)[0] if self.options.scrub else text


TRANSIENT = {"format", "headers"}  # needed for the decisions about a document, not stored


def _forget_keys(result: CleanDocument, text: str) -> set[str]:
    """Return the keys by which a document, or a part of it, is forgotten."""
    location: tuple[Any, Any] = result.document.source, result.document.id
    content = f"text:{result.key.hex()}"
    return {document_key(*location), line_key(*location), content, text_key(text)}
