"""The options of preparing text: what decides the result, and how the work is spread."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fastlm.data.dedup import MIN_PARAGRAPH, THRESHOLD
from fastlm.data.filter import MAX_WORDS, TECHNICAL, check_rules
from fastlm.data.mix import Mix, check_mix, check_names, complete
from fastlm.data.personal import DEFAULT_KINDS, KINDS, check_kinds
from fastlm.data.personal.phones import WEB_REGIONS, check_regions
from fastlm.errors import InputError
from fastlm.pipeline.stage import Repeated
from fastlm.pipeline.units import file_sha256

SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(i?)B?", re.IGNORECASE)
VERSION = 7  # raised when the same options and inputs give another result
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


def personal_kinds(kinds: Sequence[str] | bool) -> tuple[str, ...]:
    """Return the kinds of personal data that an option names. "all", "none", and True and False of
    earlier versions are names for several.
    """
    if isinstance(kinds, bool):
        return DEFAULT_KINDS if kinds else ()
    names = {"all": KINDS, "none": ()}
    return tuple(dict.fromkeys(kind for name in kinds for kind in names.get(name, (name,))))


class KindsOrBool:
    """The schema of `personal_kinds`: an array of texts, or true or false."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core.core_schema import no_info_before_validator_function

        def as_names(value: Any) -> Any:
            if isinstance(value, bool):
                return personal_kinds(value)
            return tuple(value) if isinstance(value, list) else value

        return no_info_before_validator_function(as_names, handler(source))


@dataclass(frozen=True)
class DataOptions:
    """Options of `fastlm.data.prepare.prepare`. At most ``heldout_bytes`` of clean text are held
    out, and at most ``heldout_fraction`` of all of it.

    ``rules`` names quality rules of ``fastlm.data.filter``. ``text_field`` is the field of JSON
    lines that holds the text. Gathering stops at ``max_bytes`` of text that passed the rules;
    duplicates are removed after that. A document of more than ``max_words`` words, such as a book,
    is cut into parts of at most ``max_words`` words.
    """

    text_field: Annotated[str, "Read the text from this field of JSON lines"] = "text"
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
    extract: Annotated[
        Literal["fast", "precise"],
        "Find the main content of a page fast, or more exactly (by trafilatura) at 5 to 10 times "
        "the cost",
    ] = "fast"
    max_words: Annotated[
        int, "Cut a document of more words into parts, at the ends of paragraphs"
    ] = MAX_WORDS
    language_method: Annotated[
        Literal["langid", "cld2", "off"],
        "Identify the language of each document by this method; cld2 is faster, langid more exact",
    ] = "langid"
    languages: Annotated[
        tuple[str, ...], "Keep only documents in these languages: ISO 639 codes with commas"
    ] = ()
    rules: Annotated[
        tuple[str, ...], "Apply these quality rules: technical, web, none, or names with commas"
    ] = TECHNICAL
    quality: Annotated[
        str | None, "Score documents by this model of `fastlm data quality`, in buckets 0 to 19"
    ] = None
    min_quality_bucket: Annotated[int, "Remove documents in lower buckets of quality"] = 0
    toxicity: Annotated[
        str | None,
        "Score the toxicity of documents, 0 to 1, by this model of `fastlm data toxicity`",
    ] = None
    max_toxicity: Annotated[float, "Remove documents with a higher score of toxicity"] = 1.0
    scrub: Annotated[
        tuple[str, ...],
        KindsOrBool(),
        f"Replace personal data of these kinds: {', '.join(KINDS)}; all, or none",
    ] = DEFAULT_KINDS
    regions: Annotated[
        tuple[str, ...],
        "Also replace telephone numbers without a country code, if they are written as in these "
        "countries: ISO 3166 codes, or all",
    ] = WEB_REGIONS
    earlier: Annotated[
        tuple[str, ...],
        Repeated("Remove what is a duplicate of a document in this corpus of an earlier build"),
    ] = ()
    near_duplicates: Annotated[
        float, "Remove a document whose word 5-grams are this similar (Jaccard); 0: compare none"
    ] = THRESHOLD
    min_paragraph: Annotated[
        int, "Keep a repeated paragraph of this many characters or more only once"
    ] = MIN_PARAGRAPH
    decontaminate: Annotated[
        tuple[str, ...],
        Repeated(
            "Remove documents that contain a question of this file (fastlm tasks -o) or folder"
        ),
    ] = ()
    mix: Annotated[
        Mix | None,
        "Weigh documents by source, language and quality bucket: a TOML table such as "
        "'{languages = {de = 2}, max_epochs = 4}'",
    ] = None
    heldout_bytes: Annotated[int, "Hold out at most this many bytes of clean text"] = 1 << 20
    heldout_fraction: Annotated[float, "Hold out at most this share of all text"] = 0.1
    max_bytes: Annotated[int | None, "Stop after this many bytes of text that passed the rules"] = (
        None
    )
    unit_bytes: Annotated[
        int, "Do the work in units of this many bytes of input, each with its own output file"
    ] = 1 << 23
    strict: Annotated[bool, "Stop at the first file or record that cannot be read"] = False
    workers: Annotated[int, "Clean text in this many processes"] = 1
    executor: Annotated[
        Literal["pool", "ray"], "Run the units in processes of this machine, or on a Ray cluster"
    ] = "pool"
    memory: Annotated[
        str, "Use at most about this much memory for the steps that compare all documents"
    ] = "1GB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scrub", personal_kinds(self.scrub))

    def region_codes(self) -> tuple[str, ...] | None:
        """Return ``regions`` as `fastlm.data.personal.find` takes them."""
        return None if self.regions == ("all",) else self.regions

    def check(self) -> None:
        """Check the values. InputError names the option."""
        check_rules(self.rules)
        try:
            check_kinds(self.scrub)
        except InputError as error:
            raise InputError(f"scrub: {str(error).removeprefix('kinds: ')}") from None
        check_regions(self.region_codes())
        self._check_languages()
        self._check_models()
        if self.extract == "precise":
            from fastlm.data.extract import check_method

            check_method(self.extract)
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
        if self.consent == "off" and self.unknown == "drop":
            raise InputError("unknown: expected keep, since consent is off, got drop")
        for path in self.opt_out:
            if not Path(path).is_file():
                raise InputError(f"opt_out: expected a file, got {path}")
        if self.mix:
            check_mix(
                self.mix, has_languages=self.language_method != "off",
                has_quality=bool(self.quality),
            )  # fmt: skip
        if self.decontaminate:
            from fastlm.data.contamination import QuestionIndex

            QuestionIndex.load(self.decontaminate)
        if parse_size(self.memory, "memory") < MIN_MEMORY:
            raise InputError(f"memory: expected 64MiB or more, got {self.memory}")

    def check_mix_names(self, sources: Sequence[str]) -> None:
        """Refuse a mix with names that are not those of ``sources`` or of languages. InputError."""
        if self.mix:
            from fastlm.data.language import codes

            languages = codes(self.language_method) if self.mix.get("languages") else ()
            check_names(self.mix, sources, [*languages])

    def _check_languages(self) -> None:
        from fastlm.data.language import check_method, codes

        if self.language_method == "off":
            if self.languages:
                raise InputError("languages: expected a method to identify them, got 'off'")
            return
        check_method(self.language_method)
        if self.languages and (unknown := {*self.languages} - codes(self.language_method)):
            raise InputError(
                f"languages: expected ISO 639 codes such as en, got {min(unknown)!r:.40}, which "
                f"{self.language_method} does not know"
            )

    def _check_models(self) -> None:
        for name, limit, path in (
            ("min_quality_bucket", self.min_quality_bucket > 0, self.quality),
            ("max_toxicity", self.max_toxicity < 1, self.toxicity),
        ):
            model = name.split("_")[1]
            if limit and not path:
                raise InputError(f"{model}: expected a model, which {name} needs, got none")
            if path and not Path(path).is_file():
                raise InputError(f"{model}: expected a file, got {path}")
        if not 0 <= self.min_quality_bucket < 20:
            raise InputError(f"min_quality_bucket: expected 0 to 19, got {self.min_quality_bucket}")
        if not 0 <= self.max_toxicity <= 1:
            raise InputError(f"max_toxicity: expected 0 to 1, got {self.max_toxicity}")

    def identity(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        values = asdict(self)
        for name in ("workers", "executor", "memory"):
            del values[name]
        values["opt_out_sha256"] = [file_sha256(Path(path)) for path in self.opt_out]
        values["mix"] = complete(self.mix, self.quality) if self.mix else None
        if self.decontaminate:
            from fastlm.data.contamination import questions_sha256

            values["decontaminate_sha256"] = [questions_sha256(p) for p in self.decontaminate]
        for name, path in (("quality", self.quality), ("toxicity", self.toxicity)):
            if path:
                values[f"{name}_sha256"] = file_sha256(Path(path))
        if self.consent != "off":
            from fastlm.data.consent.crawlers import product_tokens

            values["crawler_names"] = product_tokens(self.crawlers or None)
        return values
