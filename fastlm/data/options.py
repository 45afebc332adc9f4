"""The options of preparing text: what decides the result, and how the work is spread."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastlm.data.dedup import MIN_PARAGRAPH, THRESHOLD
from fastlm.data.filter import MAX_WORDS, TECHNICAL, check_rules
from fastlm.errors import InputError
from fastlm.pipeline.stage import Repeated
from fastlm.pipeline.units import file_sha256

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
VERSION = 5  # raised when the same options and inputs give another result
WORK = "work"  # the folder of an unfinished build, in that of its corpus
MIN_MEMORY = 64 << 20  # a worker with its libraries needs more than that already


def parse_size(text: str, name: str) -> int:
    """Return the bytes of a size such as 512MB, 2GiB or 1e9 written out. InputError names it."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{name}: expected a size such as 512MB or 2GB, got {text!r:.40}")
    number, unit, binary = match.groups()
    power = "KMGT".find(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


@dataclass(frozen=True)
class DataOptions:
    """Options of `fastlm.data.prepare.prepare`. At most ``heldout_bytes`` of clean text are held
    out, and at most ``heldout_fraction`` of all of it.

    ``rules`` names quality rules of ``fastlm.data.filter``. ``text_field`` is the field of JSON
    lines that holds the text. Gathering stops at ``max_bytes`` of text that passed the rules;
    duplicates are removed after that. A document of more than ``max_words`` words, such as a book,
    is cut into parts of at most ``max_words`` words.
    """

    rules: Annotated[
        tuple[str, ...], "Apply these quality rules: technical, web, none, or names with commas"
    ] = TECHNICAL
    heldout_bytes: Annotated[int, "Hold out at most this many bytes of clean text"] = 1 << 20
    heldout_fraction: Annotated[float, "Hold out at most this share of all text"] = 0.1
    scrub: Annotated[bool, "Replace addresses, telephone, card and account numbers, and keys"] = (
        True
    )
    min_paragraph: Annotated[
        int, "Keep a repeated paragraph of this many characters or more only once"
    ] = MIN_PARAGRAPH
    near_duplicates: Annotated[
        float, "Remove a document whose word 5-grams are this similar (Jaccard); 0: compare none"
    ] = THRESHOLD
    earlier: Annotated[
        tuple[str, ...],
        Repeated("Remove what is a duplicate of a document in this corpus of an earlier build"),
    ] = ()
    consent: Annotated[
        Literal["as-crawled", "latest", "strictest", "off"],
        "Obey what sites say about training: their files of the time of the crawl, the newest, all",
    ] = "as-crawled"
    policies: Annotated[
        tuple[str, ...], Repeated("Read more policy files of sites from this WARC file or folder")
    ] = ()
    unknown: Annotated[
        Literal["keep", "drop"], "Keep or drop pages about which nothing is said"
    ] = "keep"
    crawlers: Annotated[
        tuple[str, ...],
        "Obey the robots.txt groups of these crawlers, names with commas; default: a dated list",
    ] = ()
    opt_out: Annotated[
        tuple[str, ...],
        Repeated(
            "Leave out what this list names: domains, addresses, repositories, authors, hashes"
        ),
    ] = ()
    licences: Annotated[
        tuple[str, ...],
        "Keep only documents under these licences: SPDX names with commas, * for any characters",
    ] = ()
    text_field: Annotated[str, "Read the text from this field of JSON lines"] = "text"
    max_words: Annotated[
        int, "Cut a document of more words into parts, at the ends of paragraphs"
    ] = MAX_WORDS
    max_bytes: Annotated[int | None, "Stop after this many bytes of text that passed the rules"] = (
        None
    )
    unit_bytes: Annotated[
        int, "Do the work in units of this many bytes of input, each with its own output file"
    ] = 1 << 24
    strict: Annotated[bool, "Stop at the first file or record that cannot be read"] = False
    workers: Annotated[int, "Clean text in this many processes"] = 1
    executor: Annotated[
        Literal["pool", "ray"], "Run the units in processes of this machine, or on a Ray cluster"
    ] = "pool"
    memory: Annotated[
        str, "Use at most about this much memory for the steps that compare all documents"
    ] = "1GB"

    def check(self) -> None:
        """Check the values. InputError names the option."""
        check_rules(self.rules)
        for name, value, minimum in (
            ("heldout_bytes", self.heldout_bytes, 0), ("min_paragraph", self.min_paragraph, 1),
            ("workers", self.workers, 1), ("max_words", self.max_words, 1),
            ("max_bytes", 1 if self.max_bytes is None else self.max_bytes, 1),
            ("unit_bytes", self.unit_bytes, 1),
        ):  # fmt: skip
            if value < minimum:
                raise InputError(f"{name}: expected {minimum} or more, got {value}")
        if not 0 <= self.heldout_fraction <= 0.5:
            raise InputError(f"heldout_fraction: expected 0 to 0.5, got {self.heldout_fraction}")
        if self.near_duplicates and not 0.1 <= self.near_duplicates <= 1:
            raise InputError(
                f"near_duplicates: expected 0 (none) or 0.1 to 1, got {self.near_duplicates}"
            )
        if self.max_words > MAX_WORDS and "word_count" in self.rules:
            raise InputError(
                f"max_words: expected at most {MAX_WORDS:,}, which the rule word_count lets pass, "
                f"got {self.max_words:,}"
            )
        if self.crawlers:
            from fastlm.data.consent.crawlers import product_tokens

            product_tokens(self.crawlers)
        for path in self.opt_out:
            if not Path(path).is_file():
                raise InputError(f"opt_out: expected a file, got {path}")
        if parse_size(self.memory, "memory") < MIN_MEMORY:
            raise InputError(f"memory: expected 64MiB or more, got {self.memory}")

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        values = asdict(self)
        for name in ("workers", "executor", "memory"):
            del values[name]
        values["opt_out_sha256"] = [file_sha256(Path(path)) for path in self.opt_out]
        if self.consent != "off":
            from fastlm.data.consent.crawlers import product_tokens

            values["crawler_names"] = product_tokens(self.crawlers or None)
        return values
