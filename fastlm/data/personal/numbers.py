"""Find payment cards, IBANs and identity numbers of persons, all of which have check digits.

A card needs an issuer's prefix, the length that this issuer uses, the groups that cards have, and
the check digit of Luhn (ISO/IEC 7812). The check digit alone takes one of ten numbers: 26 time
stamps in 19 MB of documentation. After a word such as "card", length and check digit are enough. An
IBAN needs its country's length and two check digits (ISO
13616).

National numbers are checked by `python-stdnum` (LGPL, extra ``data``). SHAPES lists those whose
form and check digits are distinctive alone; plain digits (WORDS) need the number's name before
them, since one of 11 or 97 random numbers passes the check. Left out: numbers of companies and VAT
numbers (public), passports and driving licences (no check digits, a form per state).
"""

import importlib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise

from fastlm.data.personal.spans import CONTEXT, Span
from fastlm.errors import InputError

# first and last prefix, lengths: ranges that the issuers publish
ISSUERS = (
    (4, 4, (16, 19)),  # Visa
    (51, 55, (16,)), (2221, 2720, (16,)),  # Mastercard
    (34, 34, (15,)), (37, 37, (15,)),  # American Express
    (300, 305, (14, 16)), (36, 36, (14, 16)), (38, 39, (14, 16)),  # Diners Club
    (6011, 6011, (16, 19)), (644, 649, (16, 19)), (65, 65, (16, 19)),  # Discover
    (3528, 3589, (16, 19)), (1800, 1800, (15,)), (2131, 2131, (15,)),  # JCB
    (62, 62, (16, 17, 18, 19)),  # UnionPay
    (2200, 2204, (16, 19)),  # Mir
    (5018, 5018, (16, 19)), (5020, 5020, (16, 19)), (5038, 5038, (16, 19)),  # Maestro
    (6304, 6304, (16, 19)), (6759, 6763, (16, 19)), (5893, 5893, (16, 19)),
)  # fmt: skip
MIN_CARD, MAX_CARD = 12, 19  # digits
CARD_GROUPS = {(4, 4, 4, 4), (4, 6, 5), (4, 6, 4), (4, 4, 4, 4, 3), (4, 4, 4, 3)}
CARD_WORD = re.compile(
    r"\b(?:card|cc|credit|debit|visa|maestro|mastercard|carte|carta|tarjeta|cartão|karte"
    r"|kreditkarte|kaart|карт\w)\b"
)
# not in a word, a decimal, a path or a query
NUMBER_BEFORE = re.compile(r"[\w/=&?%~@+]\Z|\w[-.,:_]\Z")
NUMBER_AFTER = re.compile(r"[\w/=&%~@]|[-.,:_]\w")

# ISO 13616: country and number of characters
IBAN_LENGTHS = {
    item[:2]: int(item[2:])
    for item in (
        "AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27"
        " DK18 DO28 EE20 EG29 ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28"
        " IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22"
        " MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 PT25 QA29 RO24 RS22 RU33 SA24"
        " SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 YE30"
    ).split()
}
# a capital before two digits, as in IBANs and LETTER_SHAPE: one scan lets most texts skip both
LETTER_DIGITS = re.compile(r"[0-9](?:(?<=[A-Z].)|(?<=[A-Z]-.))[0-9]")
IBAN = re.compile(
    r"[A-Z](?<![A-Za-z0-9_/=-].)[A-Z][0-9]{2}(?:[ \xa0-]?[A-Z0-9]{4}){2,7}"
    r"(?:[ \xa0-]?[A-Z0-9]{1,3})?(?![A-Za-z0-9])"
)

# Forms of numbers that nothing else has, by module of python-stdnum
DIGIT_SHAPES = (
    ("us.ssn", r"[0-8]\d\d-\d\d-\d{4}"), ("us.itin", r"9\d\d-[5-9]\d-\d{4}"),
    ("br.cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d"), ("cl.rut", r"\d{1,2}\.\d{3}\.\d{3}-[\dkK]"),
    ("be.nn", r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d"), ("ch.ssn", r"756\.\d{4}\.\d{4}\.\d\d"),
    ("kr.rrn", r"\d{6}-[1-8]\d{6}"), ("se.personnummer", r"(?:19|20)?\d{6}[-+]\d{4}"),
    ("cz.rc", r"\d{6}/\d{4}"), ("fi.hetu", r"\d{6}[-+A-FU-Y]\d{3}[0-9A-FHJ-NPR-Y]"),
    ("fr.nir", r"[12] \d\d (?:0[1-9]|1[0-2]) \d[\dAB] \d{3} \d{3} ?\d\d"),
    ("cn.ric", r"[1-8]\d{5}(?:19|20)\d{9}[\dXx]"), ("th.pin", r"\d-\d{4}-\d{5}-\d\d-\d"),
    ("ar.cuit", r"2[0347]-\d{8}-\d"), ("do.cedula", r"\d{3}-\d{7}-\d"),
)  # fmt: skip
LETTER_SHAPES = (  # behind a capital
    ("it.codicefiscale", r"[A-Z]{5}\d\d[ABCDEHLMPRST]\d\d[A-Z]\d{3}[A-Z]"),
    ("mx.curp", r"[A-Z]{3}\d{6}[HMX][A-Z]{5}[A-Z\d]\d"), ("es.nie", r"(?<=[XYZ])-?\d{7}-?[A-Z]"),
)  # fmt: skip
# Names before plain digits (the first one is no pattern), and the modules of these numbers
WORDS = (
    (r"ssn|social security", ("us.ssn",)), (r"itin", ("us.itin",)), (r"nhs", ("gb.nhs",)),
    (r"idnr|steuer-?id\w*|tax id", ("de.idnr", "us.ssn")), (r"pesel", ("pl.pesel",)),
    (r"bsn|burgerservicenummer", ("nl.bsn",)),
    (r"rijksregisternummer|registre national", ("be.nn",)),
    (r"nir|s[ée]curit[ée] sociale|s[ée]cu", ("fr.nir",)), (r"cpr", ("dk.cpr",)),
    (r"personnummer|f[øo]dselsnummer", ("no.fodselsnummer", "se.personnummer")),
    (r"dni|nif|contribuinte", ("es.dni", "pt.nif")), (r"oib", ("hr.oib",)), (r"cnp", ("ro.cnp",)),
    (r"egn|егн", ("bg.egn",)), (r"isikukood|asmens kodas", ("ee.ik", "lt.asmens")),
    (r"amka|αμκα", ("gr.amka",)), (r"kimlik|tckn", ("tr.tckimlik",)), (r"инн", ("ru.inn",)),
    (r"sin|social insurance", ("ca.sin",)), (r"tfn|tax file", ("au.tfn",)), (r"ird", ("nz.ird",)),
    (r"id number|identity number|id no", ("za.idnr", "il.idnr", "ee.ik")), (r"cpf", ("br.cpf",)),
    (r"aadhaar|adhaar|uidai", ("in_.aadhaar",)), (r"rut|run", ("cl.rut",)),
    (r"emšo|emso", ("si.emso",)),
    (r"kennitala", ("is_.kennitala",)), (r"マイナンバー|個人番号", ("jp.in_",)),
    (r"rodné číslo|rodne cislo", ("cz.rc",)), (r"cuit|cuil", ("ar.cuit",)), (r"hetu", ("fi.hetu",)),
    (r"cédula|cedula", ("ec.ci", "do.cedula")), (r"nric|mykad", ("my.nric",)),
    (r"pps", ("ie.pps",)),
)  # fmt: skip
MODULES = sorted(
    {module for module, _ in (*DIGIT_SHAPES, *LETTER_SHAPES)}
    | {module for _, modules in WORDS for module in modules}
)


def _alternatives(patterns: Sequence[str]) -> str:
    return "|".join(f"({pattern})" for pattern in patterns)


DIGIT_SHAPE = re.compile(
    rf"(?<![\w.,+/=-])(?:{_alternatives([shape for _, shape in DIGIT_SHAPES])})(?![\w+/=-]|[.,]\d)"
)
# The scan skips to the first character, if no group begins there
LETTER_SHAPE = re.compile(
    r"[A-Z](?<![\w+/=-].)"
    rf"(?:{_alternatives([shape for _, shape in LETTER_SHAPES])})(?![A-Za-z0-9_])"
)
WORD = re.compile(
    rf"(?<!\w)(?:{_alternatives([word for word, _ in WORDS])})(?!\w)[^\d\n]{{0,24}}\Z"
)
LETTERS_AFTER = re.compile(r"-?[A-Za-z]{1,2}(?![A-Za-z0-9])")  # 12345678Z, 12345678-Z
MIN_NATIONAL, MAX_NATIONAL = 6, 18  # digits


@cache
def check_library() -> None:
    """Raise InputError if python-stdnum is not installed."""
    try:
        import stdnum  # noqa: F401
    except ImportError:
        raise InputError(
            "kinds: expected python-stdnum for national numbers, install fastlm[data]"
        ) from None


@cache
def _validator(module: str):
    return importlib.import_module(f"stdnum.{module}")


def find_cards(text: str, runs: Sequence[list[tuple[int, int]]]) -> Iterator[Span]:
    """Yield the numbers of payment cards among runs of digits. Their values are digits."""
    for run in runs:
        if sum(end - start for start, end in run) >= MIN_CARD:
            yield from _find_cards(text, run)


def _find_cards(text: str, run: list[tuple[int, int]]) -> Iterator[Span]:
    i = 0
    while i < len(run):
        size = 1
        digits = run[i][1] - run[i][0]
        for count in (5, 4, 3) if digits == 4 else (1,) if digits >= MIN_CARD else ():
            groups = run[i : i + count]
            if len(groups) == count and _is_card(text, groups):
                start, end = groups[0][0], groups[-1][1]
                yield Span(start, end, "card", _ascii_digits(text[start:end]))
                size = count
                break
        i += size


def _is_card(text: str, groups: list[tuple[int, int]]) -> bool:
    sizes = tuple(end - start for start, end in groups)
    start, end = groups[0][0], groups[-1][1]
    if len(sizes) > 1:
        between = {text[a:b] for (_, a), (b, _) in pairwise(groups)}
        if sizes not in CARD_GROUPS or len(between) != 1 or between.isdisjoint((" ", "-", "\xa0")):
            return False
    elif max(sizes) > MAX_CARD:
        return False
    digits = _ascii_digits(text[start:end])
    if not _has_issuer(digits):
        before = text[max(0, start - CONTEXT) : start]
        if CARD_WORD.search(before.lower()) is None:
            return False
    return _passes_luhn(digits) and len(set(digits)) > 1 and _stands_alone(text, start, end)


def _has_issuer(digits: str) -> bool:
    return any(
        len(digits) in lengths and first <= int(digits[: len(str(first))]) <= last
        for first, last, lengths in ISSUERS
    )


def _passes_luhn(digits: str) -> bool:
    doubled = [2 * int(c) for c in digits[-2::-2]]
    return sum(map(int, digits[-1::-2])) % 10 == -sum(d - 9 * (d > 9) for d in doubled) % 10


def _stands_alone(text: str, start: int, end: int) -> bool:
    """Return False for a part of a word, a decimal, a path or a query."""
    if NUMBER_BEFORE.search(text[max(0, start - 2) : start]) is not None:
        return False
    return NUMBER_AFTER.match(text, end) is None


def _ascii_digits(text: str) -> str:
    return "".join(str(int(c)) for c in text if c.isdecimal())


def find_ibans(text: str) -> Iterator[Span]:
    """Yield the international bank account numbers of a text. Values have no spaces."""
    for m in IBAN.finditer(text):
        length = IBAN_LENGTHS.get(m[0][:2])
        if length is None:
            continue
        # the pattern may run on into words after the number: cut at the country's length
        end, size = m.start(), 0
        while end < m.end() and size < length:
            size += text[end] not in " -\xa0"
            end += 1
        value = "".join(c for c in text[m.start() : end] if c not in " -\xa0")
        if size == length and not text[end : end + 1].isalnum() and _passes_mod_97(value):
            yield Span(m.start(), end, "iban", value)


def _passes_mod_97(value: str) -> bool:
    return int("".join(str(int(c, 36)) for c in value[4:] + value[:4])) % 97 == 1


def find_national(
    text: str, runs: Sequence[list[tuple[int, int]]], letters: bool = True
) -> Iterator[Span]:
    """Yield the identity and tax numbers of persons. Values are those of python-stdnum.

    ``letters`` False: LETTER_DIGITS has no match in the text.
    """
    for m in LETTER_SHAPE.finditer(text) if letters else ():
        module = LETTER_SHAPES[(m.lastindex or 1) - 1][0]
        yield from _national(text, m.start(), m.end(), (module,))
    for run in runs:
        if sum(end - start for start, end in run) < MIN_NATIONAL:
            continue
        start, end = run[0][0], run[-1][1]
        for m in DIGIT_SHAPE.finditer(text, start, min(len(text), end + 6)):
            yield from _national(text, *m.span(), (DIGIT_SHAPES[(m.lastindex or 1) - 1][0],))
        name = WORD.search(text[max(0, start - CONTEXT) : start].lower())
        if name is not None:
            modules = WORDS[(name.lastindex or 1) - 1][1]
            if (letters_after := LETTERS_AFTER.match(text, end)) is not None:
                end = letters_after.end()
            if end - start <= 2 * MAX_NATIONAL:
                yield from _national(text, start, end, modules)


def _national(text: str, start: int, end: int, modules: Sequence[str]) -> Iterator[Span]:
    for module in modules:
        validator = _validator(module)
        if validator.is_valid(text[start:end]):
            yield Span(start, end, "national", validator.compact(text[start:end]))
            return
