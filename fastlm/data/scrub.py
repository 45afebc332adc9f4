"""Personal data out of text: e-mail addresses, phone numbers and IP addresses become placeholders.

Policy. E-mail: every address, save those under the names reserved for examples (RFC 2606). IP:
public addresses only; private, loopback, link-local and documentation ranges (RFC 1918, 5737, 3849)
are nobody's. Dotted numbers that read as a version ("version 2.6.32.5", "openssl-1.0.2.1", four
single digits without a word like "host" before them) stay. Phone: international (+CC ...), North
American, and numbers after "phone", "tel", "fax"; a bare run of digits is never taken.

Every pattern starts with a literal or a character class, which Python's matcher skips to quickly; a
leading look-behind tries each character and takes five times as long. Where nothing telling comes
first (the name before @, the area code), the tail is found and the head looked for just before it.

Rejected: Presidio and the like, a spaCy model per document. Validated national identifiers are the
full data stage's matter.
"""

import ipaddress
import re
from collections.abc import Callable

# RFC 5321: a local part has 64 characters at most; a domain label 63.
LOCAL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9][\w.%+-]{0,63}$", re.ASCII)
DOMAIN = re.compile(
    r"@((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}([A-Za-z]{2,24}))(?![\w-])", re.ASCII
)
RESERVED = re.compile(
    r"(^|\.)(example\.(com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE
)
# name@2x.png, getty@tty1.service: not top-level domains
NOT_DOMAINS = frozenset(
    "png jpg jpeg gif svg webp ico html htm xml json yaml yml toml txt md rst js ts css py pl rb sh"
    " c h cc cpp hpp java go rs so conf cfg ini log lock tar gz bz2 xz zip deb rpm git service"
    " socket target timer mount slice scope device path".split()
)

# Octets over 255 and leading zeros are left to ipaddress.
IPV4 = re.compile(r"[0-9](?<![\w.+~-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w~+]|[.-]\w)")
# 2000::/3, all that is handed out: "std::", "a::b" and "12:30:45" are none
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:])")
VERSION_BEFORE = re.compile(
    r"(?:versions?|release[sd]?|ver|kernel|linux|section|chapter|clause|rfc|oid|since|before|until"
    r"|upgrade[sd]?|v|§)[ .:(=]*$|[=<>~!^]=?\s*$|\d\s*[-–]\s*$",  # noqa: RUF001
    re.IGNORECASE,
)
ADDRESS_NEAR = re.compile(
    r"\b(?:ip|address|host|server|dns|resolver|ping|gateway|router|proxy|from|peer)\b|://",
    re.IGNORECASE,
)
NEAR = 40  # characters looked at before a number, about six words

GAP = "[ .\u2011\u2013-]"
# +44 20 7946 0958, +1 (212) 555-1234, +33-1-42-68-53-00, +442079460958
INTERNATIONAL = re.compile(
    rf"\+(?<![\w+.]\+)(?:[1-9]\d{{0,2}}(?:{GAP}?\(\d{{1,4}}\))?(?:{GAP}\d{{2,8}}|{GAP}\d(?={GAP}\d))"
    rf"{{2,6}}(?![\w-])|[1-9]\d{{9,13}}(?![\w.-]))"
)
# (212) 555-1234, 212-555-1234, 1-800-555-1234
AMERICAN = re.compile(r"[2-9]\d{2}-\d{4}(?![\w/-])")
AREA = re.compile(rf"(?<![\w.+/-])(?:1{GAP})?(?:\([2-9]\d{{2}}\) ?|[2-9]\d{{2}}-)$")
# "Tel.: 030 1234567", "phone 0171/2345678", "fax (030) 123 45-67"
NAMES = ("phone", "tel.", "tel:", "tel ", "fax", "mobile")
NAMED = re.compile(
    r"(?i:\b(?:phone|telephone|tel|fax|mobile)\b)[.:]*(?: ?(?:number|no\.?|is))?[:#]? {0,2}"
    rf"(\+?\(?\d[\d()]{{1,6}}(?:{GAP}|/)\(?\d[\d ()/.-]{{3,14}}\d)(?![\w-])"
)


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """-> (text with ``<EMAIL>``, ``<PHONE>``, ``<IP>`` for personal data, how many of each)."""
    counts = {"email": 0, "phone": 0, "ip": 0}

    def ip(m: re.Match[str]) -> str:
        before = m.string[max(0, m.start() - NEAR) : m.start()]
        if not _is_public(m[0]) or (m.re is IPV4 and _is_version(m[0], before)):
            return m[0]
        counts["ip"] += 1
        return "<IP>"

    def phone(m: re.Match[str]) -> str:
        if not 7 <= sum(c.isdigit() for c in m[m.lastindex or 0]) <= 15:  # ITU-T E.164
            return m[0]
        counts["phone"] += 1
        return m[0][: m.start(m.lastindex or 0) - m.start()] + "<PHONE>"

    text, counts["email"] = _replace(text, LOCAL, DOMAIN, "<EMAIL>", _is_email)
    text = text.replace("<<EMAIL>>", "<EMAIL>")  # Name <name@host>
    text = IPV6.sub(ip, IPV4.sub(ip, text))
    text = INTERNATIONAL.sub(phone, text)
    text, american = _replace(text, AREA, AMERICAN, "<PHONE>", lambda m: True)
    lower = text.lower()
    if any(name in lower for name in NAMES):
        text = NAMED.sub(phone, text)
    counts["phone"] += american
    return text, counts


def _replace(
    text: str, head: re.Pattern, tail: re.Pattern, mark: str, accept: Callable[[re.Match], bool]
) -> tuple[str, int]:
    """Put ``mark`` for each match of ``tail`` that follows right on a match of ``head``."""
    parts, end = [], 0
    for m in tail.finditer(text):
        # 66: the longest head is 64 characters, and its look-behind one more
        before = head.search(text[max(end, m.start() - 66) : m.start()]) if accept(m) else None
        if before is not None:
            parts += [text[end : m.start() - len(before[0])], mark]
            end = m.end()
    return "".join([*parts, text[end:]]), len(parts) // 2


def _is_email(m: re.Match[str]) -> bool:
    return not RESERVED.search(m[1]) and m[2].lower() not in NOT_DOMAINS


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
