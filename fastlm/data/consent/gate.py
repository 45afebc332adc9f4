"""Apply a build's rules of consent to its documents: who may not be used, and why.

Four checks, in this order: opt-out lists, the consent of the page, what to do if nothing is said,
the allow-list of licences. Each document that passes carries what was decided.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from fastlm.data.consent.crawlers import product_tokens
from fastlm.data.consent.decision import decide
from fastlm.data.consent.licence import allowed, licence_of
from fastlm.data.consent.opt_out import OptOut
from fastlm.data.consent.policy_index import PolicyIndex
from fastlm.data.consent.statement import NOTHING, Consent
from fastlm.sources.document import Document
from fastlm.sources.warc import PolicyFile

if TYPE_CHECKING:
    from fastlm.data.options import DataOptions


@dataclass
class DocumentConsent:
    """What the rules say about a document.

    refusal: (reason, detail) if it may not be used; the reason is counted, so it is one of few.
    meta: what a document that passes carries: ``consent`` and, if a standard says something,
    ``consent_rule``; ``licence`` if one is stated.
    """

    refusal: tuple[str, str] | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class ConsentGate:
    """The rules of one build.

    options: its ``consent``, ``unknown``, ``crawlers``, ``opt_out`` and ``licences``. policies: the
    policy files of all its sites, or their index. now: the date of the plan, if it is no index.
    source_licences: the licence of a source (a package) for documents that state none themselves.
    """

    def __init__(
        self,
        options: "DataOptions",
        policies: PolicyIndex | Iterable[PolicyFile] = (),
        *,
        now: datetime | None = None,
        source_licences: Mapping[str, str | None] | None = None,
    ):
        self._options = options
        self._index = policies if isinstance(policies, PolicyIndex) else PolicyIndex(policies, now)
        self._crawlers = product_tokens(options.crawlers or None)
        self.lists = OptOut.load(*options.opt_out)
        self._source_licences = source_licences or {}

    def __call__(self, document: Document) -> DocumentConsent:
        """Decide on a document as it was read: with its markup, address, date and headers."""
        meta, options = document.meta, self._options
        if len(self.lists) and (entry := self.lists.match(meta)):
            return DocumentConsent(("opt-out", entry))
        url, headers = meta.get("url"), meta.get("headers")
        headers = headers if isinstance(headers, Mapping) else None
        html = document.text if meta.get("format") == "html" else None
        result = DocumentConsent()
        if options.consent != "off":
            consent = self._consent(url, headers, html, meta.get("date"))
            detail = f"{consent.rule} [{consent.source}]" if consent.standard else ""
            if consent.verdict == "no":
                return DocumentConsent((consent.standard, detail))
            if consent.verdict == "unknown" and options.unknown == "drop":
                reason = f"{consent.standard}: a condition" if detail else "nothing said"
                return DocumentConsent((reason, detail))
            if isinstance(url, str) or detail:
                result.meta["consent"] = consent.verdict
            if detail:
                result.meta["consent_rule"] = detail
        licence = licence_of(html, headers) if html or headers else None
        licence = licence or meta.get("licence") or meta.get("license")
        licence = licence or self._source_licences.get(document.source)
        if not isinstance(licence, str):
            licence = None
        if licence:
            result.meta["licence"] = licence
        if options.licences:
            if not licence:
                return DocumentConsent(("licence: none stated", ""))
            if not allowed(licence, options.licences):
                return DocumentConsent(("licence: not in the list", licence))
        return result

    def _consent(
        self, url: Any, headers: Mapping[str, Any] | None, html: str | None, date: Any
    ) -> Consent:
        if not isinstance(url, str):
            url = ""
        if not (html or headers or url):
            return NOTHING
        return decide(
            url,
            date=date if isinstance(date, str) else None,
            headers=headers,
            html=html,
            policies=self._index,
            crawler=self._crawlers,
            mode=self._options.consent,
        )

    def refuses_text(self, text: str) -> str | None:
        """Return the entry of an opt-out list that has the hash of a text, None for none."""
        return self.lists.match({}, text) if len(self.lists) else None
