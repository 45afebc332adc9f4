"""Personal data out of text: e-mail addresses, phone numbers and IP addresses become placeholders.

Policy. E-mail: every address, save those under the names reserved for examples (RFC 2606). IP: public addresses only;
private, loopback, link-local and documentation ranges (RFC 1918, 5737, 3849) are nobody's. Dotted numbers that read as
a version ("version 2.6.32.5", "openssl-1.0.2.1", four single digits without a word like "host" nearby) stay. Phone:
international (+CC ...), North American, and numbers after "phone", "tel", "fax"; a bare run of digits is never taken.
Rejected: Presidio and the like, a spaCy model per document; validated national identifiers are the full stage's matter.
"""

import ipaddress
import re

# {1,64}: RFC 5321's limit, and it keeps the scan linear on long runs of letters.
EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]{0,63}@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}([A-Za-z]{2,24}))(?![\w-])",
    re.ASCII,
)
RESERVED = re.compile(
    r"(^|\.)(example\.(com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE
)
# name@2x.png, getty@tty1.service: not top-level domains
NOT_DOMAINS = frozenset(
    "png jpg jpeg gif svg webp ico html htm xml json yaml yml toml txt md rst js ts css py pl rb sh c h cc cpp hpp java go rs so"
    " service socket target timer mount slice scope device path conf cfg ini log lock tar gz bz2 xz zip deb rpm git".split()
)

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = re.compile(rf"(?<![\w.+~-])(?:{OCTET}\.){{3}}{OCTET}(?![\w~+]|[.-]\w)")
# 2000::/3, all that is handed out: "std::", "a::b" and "12:30:45" are none
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])")
VERSION_BEFORE = re.compile(
    r"(?:versions?|release[sd]?|ver|kernel|linux|section|chapter|clause|rfc|oid|since|before|until|upgrade[sd]?|v|§)[ .:(=]*$"
    r"|[=<>~!^]=?\s*$|\d\s*[-–]\s*$",
    re.IGNORECASE,
)
ADDRESS_NEAR = re.compile(
    r"\b(?:ip|address|host|server|dns|resolver|ping|gateway|router|proxy|from|peer)\b|://",
    re.IGNORECASE,
)
NEAR = 40  # characters looked at before a number, about six words

SEPARATOR = r"[ .\u2011\u2013-]"
PHONE = re.compile(
    # +44 20 7946 0958, +1 (212) 555-1234, +33-1-42-68-53-00
    rf"(?<![\w+.])\+[1-9]\d{{0,2}}(?:{SEPARATOR}?\(\d{{1,4}}\))?(?:{SEPARATOR}\d{{2,5}}){{2,5}}(?![\w-])"
    rf"|(?<![\w+.])\+[1-9]\d{{9,13}}(?![\w.-])"
    # (212) 555-1234, 212-555-1234, 1-800-555-1234
    rf"|(?<![\w.+/-])(?:1{SEPARATOR})?(?:\([2-9]\d{{2}}\) ?|[2-9]\d{{2}}-)[2-9]\d{{2}}-\d{{4}}(?![\w/-])",
)
# "Tel.: 030 1234567", "phone 0171/2345678", "fax (030) 123 45-67"
NAMED_PHONE = re.compile(
    rf"(?i:\b(?:phone|telephone|tel|fax|mobile|cell)\b)[.:]*(?: ?(?:number|no\.?|is))?[:#]? {{0,2}}"
    rf"(\+?\(?\d[\d()]{{1,6}}(?:{SEPARATOR}|/)\(?\d[\d ()/.-]{{3,14}}\d)(?![\w-])"
)


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """-> (text with ``<EMAIL>``, ``<PHONE>``, ``<IP>`` in place of personal data, how many of each)."""
    counts = {"email": 0, "phone": 0, "ip": 0}

    def email(m: re.Match[str]) -> str:
        if RESERVED.search(m[1]) or m[2].lower() in NOT_DOMAINS:
            return m[0]
        counts["email"] += 1
        return "<EMAIL>"

    def ip(m: re.Match[str]) -> str:
        before = m.string[max(0, m.start() - NEAR) : m.start()]
        if not _is_public(m[0]) or (m.re is IPV4 and _is_version(m[0], before)):
            return m[0]
        counts["ip"] += 1
        return "<IP>"

    def phone(m: re.Match[str]) -> str:
        if not 7 <= sum(c.isdigit() for c in m[m.lastindex or 0]) <= 15:  # ITU-T E.164: 15 at most
            return m[0]
        counts["phone"] += 1
        return m[0][: m.start(1) - m.start()] + "<PHONE>" if m.lastindex else "<PHONE>"

    # Most documents hold no candidate at all: a plain search for the sign comes first where there is one.
    if "@" in text:
        text = EMAIL.sub(email, text)
    text = IPV4.sub(ip, text)
    if "::" in text or ":" in text:
        text = IPV6.sub(ip, text)
    text = NAMED_PHONE.sub(phone, PHONE.sub(phone, text))
    return text, counts


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False


def _is_version(number: str, before: str) -> bool:
    if VERSION_BEFORE.search(before):
        return True
    single_digits = len(number) == 7
    return single_digits and not ADDRESS_NEAR.search(before)
