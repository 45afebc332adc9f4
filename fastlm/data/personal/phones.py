"""Find telephone numbers: groups of digits that are written as people write telephone numbers.

A number counts where one of these holds:

- it has a country code ("+", "00") and the length of that country's numbers;
- a word names it ("phone", "call me at", "fax" behind it), whatever its country and form;
- it is a national number of one of ``regions`` in a usual form: with the leading 0 of most
  countries, in the groups of North America, or in the groups of countries that use no 0.

The first two need no hint where a text comes from. The last one is a guess: with all 245 regions
it takes 52 numbers such as 0123456789 and 04.08.37.81412 of 26 MB of documentation for telephones,
with WEB_REGIONS none. In chats a miss costs more than a false placeholder: use all regions. Lengths
and prefixes are Google's numbering plans (`phonenumbers`).

A run of digits without "+", word or usual groups is never a number: it may be an order, an id or a
sum. Numbers in words ("oh one seven oh") are not found.

Rejected: `phonenumbers.PhoneNumberMatcher`. It needs one region per text and runs at 11 to 19 MB/s;
one pass for each region takes 13 ms a number, and it takes 2147483647, 13107328 and 2.147.483.648
for numbers of the United States.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

from fastlm.data.personal.spans import CONTEXT, Span
from fastlm.errors import InputError

# No number of the documentation was taken for one of these (docs/data.md)
WEB_REGIONS = ("US", "GB")
MAX_INTEGER = 78  # digits of 2^256; int() refuses thousands
MIN_DIGITS, MAX_DIGITS = 7, 15  # digits: the shortest local numbers; ITU-T E.164
MAX_GROUPS = 6  # "+33 6 12 34 56 78"
MAX_RUN = 12  # groups; a longer run is a row of a table
NUMBER_WORDS = (
    r"telephone|phone|tel|fax|telefax|mobile|cell|cellphone|landline|whats ?app|telegram|sms"
    r"|(?:call|text|ring|dial|reach|contact|phone)(?: (?:me|us|him|her|them|you))?(?: back)?"
    r" (?:at|on|under)|(?:can|may|please|to) (?:call|ring|dial)|(?:messages?|texts?|sms) (?:to|on)"
    r"|answer(?:ing)? (?:me |us )?(?:at|on)|my registered|desk"
    r"|(?:my|our|his|her|their|your|phone|contact) (?:number|no)"
    r"|handy|mobil|rufnummer|telefonnummer|durchwahl|(?:meine|unsere|deine) nummer"
    r"|t[ée]l[ée]phone|portable|(?:mon|notre|son) num[ée]ro|appele[zr]|appelle[- ]moi"
    r"|tel[ée]fono|m[óo]vil|celular|(?:mi|nuestro|su) n[úu]mero|ll[áa]m[ae](?:me|nos)"
    r"|telefone|telem[óo]vel|(?:meu|nosso|seu) n[úu]mero|cellulare|(?:mio|nostro) numero"
    r"|telefoon|(?:mijn|ons) nummer|telefon\w{0,3}|(?:m[óo]j|nasz) numer|телефон\w{0,3}|тел"
    r"|(?:мой|наш) номер|звоните"
)
WIDE_WORDS = (
    r"电话|手机|電話|手機|(?:手机|我的|联系)号码|携帯|電話番号|전화|휴대폰"
    r"|फ़ोन|फोन|موبايل|هاتف|(?:فون|فون کا) نمبر"
)
# No digit and at most one new line stand between word and number. In lower case
END = r"[^\d\n]{0,24}\n?[^\d\n]{0,4}\Z"
WORD = re.compile(rf"\b(?:{NUMBER_WORDS})\b{END}")
WIDE_WORD = re.compile(rf"(?:{WIDE_WORDS}){END}")
WORD_AFTER = re.compile(
    r"(?: ?x\d{1,6})? ?[-\u2013(]? ?(?:office|fax|mobile|cell|home|landline)\b", re.IGNORECASE
)
EXTENSION = re.compile(r" ?(?:x|ext\.?|extension|#) ?\d{1,6}(?![\w])", re.IGNORECASE)
# not within a word, a path, a query or an amount of money
BEFORE = re.compile(
    r"[A-Za-z_\u00c0-\u024f/=#$€£¥@~]\Z|\d[.,:]\Z|[A-Za-z0-9_.]-\Z|[+=\u00d7÷*^<>][ ]?\Z"
)
PLUS_BEFORE = re.compile(r"[A-Za-z_\u00c0-\u024f\d/#$€£¥@~]\Z")
AFTER = re.compile(r"[A-Za-z_\u00c0-\u024f%€£@~]|[,:]\d|[ ]?[=\u00d7÷*^<>]|\+| \+ |-[A-Za-z_]")
MINUS = re.compile(r" [\u2010-\u2015\u2212-] ")
DATE = re.compile(r"(?:\d{1,2}\D\d{1,2}\D(?:19|20)\d\d|(?:19|20)\d\d\D\d{1,2}\D\d{1,2})(?!\d)")
DATE_AFTER_PLUS = re.compile(r"\d{4,6}-\d\d-\d\d")  # ISO 8601 has years with a sign
YEAR = re.compile(r"(?:1[0-9]|20)\d\d")
NANP = re.compile(r"1?[2-9]\d{2}[2-9]\d{6}")
# regions where people write numbers in groups and without a leading 0
GROUPED = frozenset("ES PT PL CZ DK NO GR IT SG HK IN CN BR MX CO CL RU".split())


class _Groups(NamedTuple):
    """Groups of digits of a run that may be a number."""

    text: str
    spans: Sequence[tuple[int, int]]
    run_start: int  # with "+" and "(" before the first digit
    starts: bool  # they are the first, the last ones of the run
    ends: bool
    word: bool  # a word names a telephone

    @property
    def has_plus(self) -> bool:
        return self.starts and self.text[self.run_start] in "+\uff0b"

    @property
    def sizes(self) -> list[int]:
        return [end - start for start, end in self.spans]

    @property
    def digits(self) -> str:
        digits = "".join(self.text[start:end] for start, end in self.spans)
        return digits if digits.isascii() else "".join(str(unicodedata.digit(c)) for c in digits)


def find_phones(
    text: str, runs: Sequence[list[tuple[int, int]]], regions: Sequence[str] | None = WEB_REGIONS
) -> Iterator[Span]:
    """Yield the telephone numbers among ``runs`` of digits. None: regions of all countries.

    The value is "+" and digits where the country is known, digits alone elsewhere.
    """
    check_regions(regions)
    codes = None if regions is None else tuple(regions)
    for run in runs:
        yield from _find_numbers(text, run, codes)


def check_regions(regions: Sequence[str] | None) -> None:
    """Check codes of regions (ISO 3166-1). InputError: an unknown one."""
    for code in regions or ():
        if code != "US" and code not in _supported_regions():
            raise InputError(f"regions: expected codes of regions such as US or DE, got {code!r}")


@cache
def _supported_regions() -> frozenset[str]:
    from phonenumbers import SUPPORTED_REGIONS

    return frozenset(SUPPORTED_REGIONS)


def _find_numbers(
    text: str, run: list[tuple[int, int]], regions: tuple[str, ...] | None
) -> Iterator[Span]:
    start = run[0][0]
    start -= text[start - 1 : start] == "("
    start -= text[start - 1 : start] in ("+", "\uff0b")
    before = text[max(0, start - CONTEXT) : start].lower()
    last = run[min(len(run), MAX_GROUPS) - 1][1]
    word = _is_named(before) or WORD_AFTER.match(text, last) is not None
    if len(run) > MAX_RUN:
        if text[start] not in "+\uff0b" and not word:
            return
        run = run[:MAX_GROUPS]
    plus = text[start] in "+\uff0b"
    behind = (PLUS_BEFORE if plus else BEFORE).search(text[max(0, start - 2) : start])
    i = int(behind is not None and not (word and text[start - 1] in "=#:,"))
    while i < len(run):
        for j in range(min(len(run), i + MAX_GROUPS), i, -1):
            groups = _Groups(text, run[i:j], start, i == 0, j == len(run), word)
            if _is_phone(groups, regions):
                yield _span(groups)
                i = j - 1
                break
        else:
            # of "+442079460958123456" the first digits are a number; not of +9223372036854775807
            groups = _Groups(text, run[i : i + 1], start, i == 0, len(run) == 1, word)
            if groups.has_plus and _has_number(groups.digits):
                yield _span(groups)
        i += 1


def _is_named(before: str) -> bool:
    """Return True if a word for a telephone stands at the end of a text in lower case."""
    if WORD.search(before) is not None:
        return True
    return not before.isascii() and WIDE_WORD.search(before) is not None


def _span(groups: _Groups) -> Span:
    text, (start, _), (_, end) = groups.text, groups.spans[0], groups.spans[-1]
    digits = groups.digits
    if text[start - 1 : start] == "(" and ")" in text[start:end]:
        start -= 1
    plus = groups.has_plus
    if plus:
        start = groups.run_start
    else:
        plus = digits.startswith("00")
        digits = digits.removeprefix("00") if plus else digits
        if not plus and NANP.fullmatch(digits):
            plus, digits = True, f"1{digits[-10:]}"
    if plus and "(0)" in text[start:end]:  # +49 (0)170
        code = text[start : text.index("(0)", start)]
        size = sum(c.isdigit() for c in code.removeprefix("00"))
        digits = digits[:size] + digits[size + 1 :]
    extension = EXTENSION.match(text, end)
    if extension is not None:
        end = extension.end()
        digits += f";ext={''.join(c for c in extension[0] if c.isdigit())}"
    return Span(start, end, "phone", "+" * plus + digits)


def _is_phone(groups: _Groups, regions: tuple[str, ...] | None) -> bool:
    text, sizes = groups.text, groups.sizes
    first, last = groups.spans[0][0], groups.spans[-1][1]
    plus = groups.has_plus
    total = sum(sizes)
    if not plus and (total > MAX_DIGITS + 2 or (1 in sizes[groups.starts :])):
        return False
    if total < MIN_DIGITS and not (groups.word and groups.starts and len(sizes) > 1 and total == 6):
        return False
    if groups.ends and AFTER.match(text, last) and not EXTENSION.match(text, last):
        if not groups.word or text[last] not in "-\u2013":
            return False
    digits = groups.digits
    if plus:
        if DATE_AFTER_PLUS.fullmatch(text, first, last):
            return False
        decimal = len(sizes) == 2 and text[groups.spans[0][1] : groups.spans[1][0]] == "."
        plain = len(sizes) == 1 and regions is not None and not groups.word
        return _is_international(digits, decimal or plain)
    if groups.starts and digits.startswith("00") and sizes[0] > 1 and _is_international(digits[2:]):
        return len(sizes) > 1 or regions is None
    if total > MAX_DIGITS or DATE.match(text, first, last) or _is_power_of_two(digits):
        return False
    if groups.word and groups.starts:
        return _is_named_number(groups)
    if not groups.starts and text[first - 1] == ".":  # of a decimal
        return False
    return _is_national(groups, digits, regions)


def _is_power_of_two(digits: str) -> bool:
    """Return True for bounds of integer types: 2147483647, 2.147.483.648."""
    number = int(digits)
    return number & (number - 1) == 0 or number & (number + 1) == 0


def _is_named_number(groups: _Groups) -> bool:
    sizes = groups.sizes
    if all(YEAR.fullmatch(groups.text[a:b]) for a, b in groups.spans):
        return False
    bracket = groups.text[groups.spans[0][1] : groups.spans[0][1] + 1] == ")"
    return sizes[0] > 1 or sum(sizes) > 8 or bracket  # (1) 501-3830


def _is_national(groups: _Groups, digits: str, regions: tuple[str, ...] | None) -> bool:
    text, sizes = groups.text, groups.sizes
    first, last = groups.spans[0][0], groups.spans[-1][1]
    if digits[0] == "0":
        zero = sizes[0] > 1 or text[groups.spans[0][1] : groups.spans[0][1] + 1] == ")"  # (0)30
        return zero and len(digits) > 8 and _zero_numbers(regions).fullmatch(digits) is not None
    if MINUS.search(text, first, last):
        return False
    between = {c for c in text[first:last] if not c.isdigit()}
    if (regions is None or "US" in regions) and NANP.fullmatch(digits):
        if sizes in ([3, 3, 4], [1, 3, 3, 4], [3, 7], [1, 10]):
            if regions is None:
                return len(sizes) > 2 or "(" in text[first - 1 : last]
            area = text[first - 1 : first] == "(" or "(" in between or "-" in between
            return area and len(sizes) > 2 and "/" not in between
    if not (groups.starts and groups.ends) or len(sizes) < 2 or between & {".", "/"}:
        return False
    years = all(YEAR.fullmatch(text[a:b]) for a, b in groups.spans)
    return not years and _is_grouped(digits, sizes, regions)


def _is_international(digits: str, strict: bool = False) -> bool:
    """Return True if digits after "+" can be a number: a country's code and a length that it uses.
    ``strict``: one that its plan allows, since the digits may be any number with a sign.
    """
    if digits[:1] in ("", "0") or len(digits) > MAX_DIGITS:
        return False
    import phonenumbers

    try:
        number = phonenumbers.parse("+" + digits)
    except phonenumbers.NumberParseException:
        return False
    return (phonenumbers.is_valid_number if strict else phonenumbers.is_possible_number)(number)


def _has_number(digits: str) -> bool:
    """Return True if the first digits of more than MAX_DIGITS are an international number that its
    country's plan allows, and all of them are no bound of a machine's integers.
    """
    if len(digits) <= MAX_DIGITS or (len(digits) <= MAX_INTEGER and _is_power_of_two(digits)):
        return False
    sizes = range(MAX_DIGITS, MIN_DIGITS, -1)
    return any(_is_international(digits[:n], strict=True) for n in sizes)


def _plans(regions: tuple[str, ...] | None):
    """Yield (code, numbering plan, pattern of its personal numbers) of regions."""
    from phonenumbers import PhoneMetadata

    for code in sorted(_supported_regions()) if regions is None else regions:
        plan = PhoneMetadata.metadata_for_region(code)
        if plan is None:
            continue
        kinds = (plan.fixed_line, plan.mobile, plan.personal_number, plan.voip)
        patterns = [kind.national_number_pattern for kind in kinds if kind is not None]
        if numbers := "|".join(f"(?:{pattern})" for pattern in patterns if pattern):
            yield code, plan, numbers


@cache
def _zero_numbers(regions: tuple[str, ...] | None) -> re.Pattern[str]:
    """Return a pattern of numbers with the 0 that is written within a country."""
    patterns = []
    for _, plan, numbers in _plans(regions):
        zero = plan.national_prefix or ""
        patterns.append(f"(?:{zero if zero.startswith('0') else ''})(?:{numbers})")
    return re.compile("|".join(patterns) or r"(?!)")


@cache
def _grouped_formats(
    regions: tuple[str, ...] | None,
) -> list[tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]]:
    """Return patterns per format of a region: its numbers, their leading digits, its groups."""
    formats = []
    for code, plan, pattern in _plans(regions):
        if code not in GROUPED:
            continue
        numbers = re.compile(pattern)
        for form in plan.number_format:
            leads = "|".join(form.leading_digits_pattern[-1:])
            formats.append((numbers, re.compile(leads), re.compile(form.pattern or "")))
    return formats


def _is_grouped(digits: str, sizes: Sequence[int], regions: tuple[str, ...] | None) -> bool:
    """Return True if digits are a number in the usual groups of its region."""
    if digits[0] == "8" and sizes[0] == 1:  # Russia's 0
        digits, sizes = digits[1:], sizes[1:]
    for numbers, leads, form in _grouped_formats(regions):
        match = form.fullmatch(digits)
        if match and leads.match(digits) and numbers.fullmatch(digits):
            if [len(group) for group in match.groups()] == list(sizes):
                return True
    return False
