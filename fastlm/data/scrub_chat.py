"""Remove personal data from chat messages, where a miss costs more than a false placeholder. The
rules of `fastlm.data.scrub`, which is made for web text, run after these:

- e-mail addresses in any script (``ann@müller.de``, ``иван@почта.рф``);
- phone numbers in the national formats of most countries: with a leading 0, in the groups of North
  America and of countries that use no 0, or in any form after a word such as "phone", "call me at"
  or "my number".

A number's digits must be valid in a region (`phonenumbers`, Google's tables of numbering plans).
A run of digits without a leading 0, without "+" and without such a word stays: it may be an order,
an id or a sum. Addresses and numbers in words ("ann at mail dot org", "oh one seven oh") are not
found.

Rejected: `phonenumbers.PhoneNumberMatcher`. It needs one region per text. One pass for each of 245
regions takes 13 ms a number and finds numbers in half of all dates.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache

import phonenumbers
from phonenumbers import NumberParseException, PhoneMetadata

from fastlm.data.scrub import NOT_DOMAINS, RESERVED, scrub

# Letters of scripts without spaces between words: the text before an address is no part of it
WIDE = (
    r"\u0e00-\u0eff\u1780-\u17ff\u3005-\u3007\u3031-\u30ff\u3400-\u9fff\uac00-\ud7af\uff10-\uff19"
    r"\uff21-\uff3a\uff41-\uff5a\uff66-\uff9f"
)
FOREIGN = rf"[^\x00-\x7f\s{WIDE}\u3000-\u3004\uff00-\uff0f\uff1a-\uff20]"
LABEL = rf"(?:(?:[A-Za-z0-9-]|{FOREIGN}){{1,63}}|[{WIDE}0-9-]{{1,63}})"
EMAIL = re.compile(
    r"(?:[A-Za-z0-9][A-Za-z0-9.!#$&'*+/=?^_`{|}~%-]{0,63}"
    rf"|[^\W{WIDE}](?:[^\W{WIDE}]|[.%+'-]){{0,63}}|[{WIDE}][{WIDE}0-9._-]{{0,63}})"
    rf"[@\uff20]((?:{LABEL}[.\uff0e]){{1,8}}(xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}(?![A-Za-z0-9_-])"
    rf"|{FOREIGN}{{2,24}}|[{WIDE}]{{2,24}}))"
)

SPACE = " \t\xa0\u2007\u2009\u202f"
GAP = rf"[{SPACE}./()\u2010-\u2015\u2212·-]{{1,3}}"
# not within a word, a decimal, a path, a query or an amount of money
RUN = re.compile(rf"(?<![A-Za-z_\u00c0-\u024f\d/=#$€£¥@])(?<!\d[.,:])[+\uff0b]?\(?\d+(?:{GAP}\d+)*")
DIGITS = re.compile(r"\d+")
AFTER = re.compile(r"[A-Za-z_\u00c0-\u024f%€£@]|[,:]\d|[ ]?[+=\u00d7÷*^<>]")
BEFORE = re.compile(r"[+=\u00d7÷*^<>][ ]?$")  # of a sum
MINUS = re.compile(r" [\u2010-\u2015\u2212-] ")
MIN_DIGITS, MAX_DIGITS = 7, 15  # digits: the shortest local numbers; ITU-T E.164
GROUPS = 6  # "+33 6 12 34 56 78"
CONTEXT = 40  # characters examined before a number
WORDS = re.compile(
    r"(?:\b(?:(?:tele)?phone|tel|fax|mobile|cell|whats ?app|signal|telegram|sms"
    r"|(?:call|text|ring|dial|reach|contact|message)(?: (?:me|us|him|her|them))?"
    r"|(?:my|our|his|her|their|phone|contact) (?:number|no)|handy|rufnummer|mobil|nummer"
    r"|t[ée]l[ée]phone|num[ée]ro|portable|appel\w*|tel[ée]fono|m[óo]vil|celular|telefone"
    r"|n[úu]mero|cellulare|telefoon|telefon\w*|numer|телефон\w*|тел|номер\w*|звони\w*)\b"
    r"|电话|手机|電話|手機|号码|携帯|番号|전화|번호|फ़ोन|फोन|نمبر|هاتف|رقم)[^\d\n]*$",
    re.IGNORECASE,
)
DATE = re.compile(r"(?:\d{1,2}\D\d{1,2}\D(?:19|20)\d\d|(?:19|20)\d\d\D\d{1,2}\D\d{1,2})(?!\d)")
YEAR = re.compile(r"(?:1[0-9]|20)\d\d")
NANP = re.compile(r"1?[2-9]\d{2}[2-9]\d{6}")
# regions where people write numbers in groups and without a leading 0
GROUPED = ("ES", "PT", "PL", "CZ", "DK", "NO", "GR", "IT", "SG", "HK", "IN", "CN", "BR", "MX", "CO",
           "CL", "RU")  # fmt: skip


def scrub_chat(text: str) -> tuple[str, dict[str, int]]:
    """Return (text with ``<EMAIL>``, ``<PHONE>``, ``<IP>`` for personal data, count of each)."""
    emails = phones = 0
    if "@" in text or "\uff20" in text:
        text, emails = _replace_emails(text)
    text, phones = _replace_phones(text)
    text, counts = scrub(text)
    return text, {**counts, "email": counts["email"] + emails, "phone": counts["phone"] + phones}


def _replace_emails(text: str) -> tuple[str, int]:
    count = 0

    def mark(m: re.Match[str]) -> str:
        nonlocal count
        if RESERVED.search(m[1]) or m[2].lower() in NOT_DOMAINS:
            return m[0]
        count += 1
        return "<EMAIL>"

    return EMAIL.sub(mark, text), count


def _replace_phones(text: str) -> tuple[str, int]:
    parts, end, count = [], 0, 0
    for run in RUN.finditer(text):
        for first, last in _find_numbers(text, run):
            parts += [text[end:first], "<PHONE>"]
            end, count = last, count + 1
    return "".join([*parts, text[end:]]), count


def _find_numbers(text: str, run: re.Match[str]) -> Iterator[tuple[int, int]]:
    """Yield the begin and end of each phone number in a run of groups of digits."""
    groups = [(m.start(), m.end()) for m in DIGITS.finditer(text, run.start(), run.end())]
    if sum(b - a for a, b in groups) < MIN_DIGITS:
        return
    word = WORDS.search(text, max(0, run.start() - CONTEXT), run.start()) is not None
    i = 0
    while i < len(groups):
        for j in range(min(len(groups), i + GROUPS), i, -1):
            if _is_phone(text, run, groups[i:j], i == 0, j == len(groups), word):
                first = groups[i][0]
                while first > run.start() and text[first - 1] in "+\uff0b(":
                    first -= 1
                yield first, groups[j - 1][1]
                i = j - 1
                break
        i += 1


def _is_phone(
    text: str,
    run: re.Match[str],
    groups: Sequence[tuple[int, int]],
    starts: bool,
    ends: bool,
    word: bool,
) -> bool:
    """Return True for a phone number. ``starts``, ``ends``: the groups are the first, the last of
    the run.
    """
    sizes = [b - a for a, b in groups]
    first, last = groups[0][0], groups[-1][1]
    plus = starts and text[run.start()] in "+\uff0b"
    if not plus and (not MIN_DIGITS <= sum(sizes) <= MAX_DIGITS + 2 or 1 in sizes[starts:]):
        return False
    digits = "".join(str(unicodedata.digit(c)) for a, b in groups for c in text[a:b])
    if plus:
        return _is_international(digits)
    if digits.startswith("00") and sizes[0] > 1 and _is_international(digits[2:]):
        return True
    if len(digits) > MAX_DIGITS or DATE.match(text, first, last):
        return False
    if word and starts:
        return len(digits) >= MIN_DIGITS and (sizes[0] > 1 or len(digits) > 8)
    if not starts and text[first - 1] == ".":  # of a decimal
        return False
    if (ends and AFTER.match(text, last)) or (starts and BEFORE.search(text, first - 2, first)):
        return False
    if digits[0] == "0":
        zero = sizes[0] > 1 or text[groups[0][1] : groups[0][1] + 1] == ")"  # (0)30
        return zero and len(digits) > 8 and _national_numbers().fullmatch(digits) is not None
    if MINUS.search(text, first, last):
        return False
    separators = {c for c in text[first:last] if not c.isdigit()}
    if NANP.fullmatch(digits) and sizes in ([3, 3, 4], [1, 3, 3, 4], [3, 7], [1, 10]):
        return len(sizes) > 2 or "(" in text[run.start() : last]
    if not starts or not ends or len(sizes) < 2 or "." in separators or "/" in separators:
        return False
    return not all(YEAR.fullmatch(text[a:b]) for a, b in groups) and _is_grouped(digits, sizes)


def _is_international(digits: str) -> bool:
    """Return True if digits after "+" can be a number, or begin with one."""
    for size in dict.fromkeys((len(digits), *range(MAX_DIGITS, MIN_DIGITS - 1, -1))):
        try:
            number = phonenumbers.parse("+" + digits[:size])
        except NumberParseException:
            continue
        if phonenumbers.is_possible_number(number):
            return True
        if len(digits) <= MAX_DIGITS:
            return False
    return False


def _region_numbers(region: str) -> str:
    """Return a pattern of the personal numbers of a region."""
    plan = PhoneMetadata.metadata_for_region(region)
    kinds = () if plan is None else (plan.fixed_line, plan.mobile, plan.personal_number, plan.voip)
    patterns = [k.national_number_pattern for k in kinds if k is not None]
    return "|".join(f"(?:{pattern})" for pattern in patterns if pattern)


@cache
def _national_numbers() -> re.Pattern[str]:
    """Return a pattern of numbers with the 0 that is written within a country."""
    patterns = []
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        plan = PhoneMetadata.metadata_for_region(region)
        if plan is not None and (numbers := _region_numbers(region)):
            zero = plan.national_prefix or ""
            patterns.append(f"(?:{zero if zero.startswith('0') else ''})(?:{numbers})")
    return re.compile("|".join(patterns))


@cache
def _grouped_formats() -> list[tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]]:
    """Return patterns per format of a region: its numbers, their leading digits, its groups."""
    formats = []
    for region in GROUPED:
        plan = PhoneMetadata.metadata_for_region(region)
        if plan is None:
            continue
        numbers = re.compile(_region_numbers(region))
        for form in plan.number_format:
            leads = "|".join(form.leading_digits_pattern[-1:])
            formats.append((numbers, re.compile(leads), re.compile(form.pattern or "")))
    return formats


def _is_grouped(digits: str, sizes: Sequence[int]) -> bool:
    """Return True if digits are a number in the usual groups of its region."""
    if digits[0] == "8" and sizes[0] == 1:  # Russia's 0
        digits, sizes = digits[1:], sizes[1:]
    for numbers, leads, form in _grouped_formats():
        match = form.fullmatch(digits)
        if match and leads.match(digits) and numbers.fullmatch(digits):
            if [len(group) for group in match.groups()] == list(sizes):
                return True
    return False
