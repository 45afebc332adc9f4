"""Remove personal data from text: e-mail addresses, phone numbers and IP addresses become
placeholders.

Policy. E-mail: every address is replaced, except those under the names reserved for examples (RFC
2606). IP: public addresses are replaced, but not networks (128.1.0.0/16). Private, loopback,
link-local and documentation ranges (RFC 1918, 5737, 3849) identify nobody and stay. Dotted numbers
that look like a version ("version 2.6.32.5", "openssl-1.0.2.1", four single digits without a word
like "host" before them) or like a section number stay. Phone: international (+CC ...) and North
American numbers, and numbers after "phone", "tel", "fax", are replaced; a bare run of digits never
is.

Every pattern starts with a literal or a character class, which Python's matcher skips to quickly. A
leading look-behind would be tried at each character and take five times as long. Where a match has
no distinctive start (the name before @, the area code), the tail is found first and the head is
searched just before it.

Rejected: Presidio and similar tools, which run a spaCy model on each document. Validated national
identifiers are not detected.
"""

import ipaddress
import re
from collections.abc import Callable

# RFC 5321: a local part has at most 64 characters, a domain label 63.
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
IPV4 = re.compile(r"[0-9](?<![\w.+~-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w~+]|[.-]\w|/\d)")
# 2000::/3, all assigned addresses: "std::", "a::b" and "12:30:45" do not match
IPV6 = re.compile(r"[23](?<![\w:.].)[0-9a-fA-F]{3}:[0-9a-fA-F:]{2,34}(?![\w:]|/\d)")
VERSION_BEFORE = re.compile(
    r"(?:versions?|release[sd]?|ver|kernel|linux|section|chapter|clause|rfc|oid|since|before|until"
    r"|upgrade[sd]?|v|§)[ .:(=]*$|[=<>~!^]=?\s*$|\d\s*[-–]\s*$",  # noqa: RUF001
    re.IGNORECASE,
)
ADDRESS_NEAR = re.compile(
    r"\b(?:ip|address|host|server|dns|resolver|ping|gateway|router|proxy|from|peer)\b|://",
    re.IGNORECASE,
)
HEADING_AFTER = re.compile(r"\.?[ \t]+\w")
CONTEXT = 40  # characters examined before a number, about six words

GAP = "[ .\u2011\u2013-]"
# +44 20 7946 0958, +1 (212) 555-1234, +33-1-42-68-53-00, +442079460958
INTERNATIONAL = re.compile(
    rf"\+(?<![\w+.]\+)(?:[1-9]\d{{0,2}}(?:{GAP}?\(\d{{1,4}}\))?(?:{GAP}\d{{2,8}}|{GAP}\d(?={GAP}\d))"
    rf"{{2,6}}(?![\w-])|[1-9]\d{{10,13}}(?![\w.-]))"
)
# (212) 555-1234, 212-555-1234, 1-800-555-1234
AMERICAN = re.compile(r"[2-9]\d{2}-\d{4}(?![\w/-])")
AREA = re.compile(rf"(?<![\w.+/-])(?:1{GAP})?(?:\([2-9]\d{{2}}\) ?|[2-9]\d{{2}}-)$")
# "Tel.: 030 1234567", "phone 0171/2345678", "fax (030) 123 45-67"
NAMES = ("phone", "tel.", "tel:", "tel ", "fax", "mobile")
LABELLED = re.compile(
    r"(?i:\b(?:phone|telephone|tel|fax|mobile)\b)[.:]*(?: ?(?:number|no\.?|is))?[:#]? {0,2}"
    rf"(\+?\(?\d[\d()]{{1,6}}(?:{GAP}|/)\(?\d[\d ()/.-]{{3,14}}\d)(?![\w-])"
)


def scrub(text: str) -> tuple[str, dict[str, int]]:
    """Return (text with ``<EMAIL>``, ``<PHONE>``, ``<IP>`` for personal data, count of each)."""
    counts = {"email": 0, "phone": 0, "ip": 0}

    def ip(m: re.Match[str]) -> str:
        if not _is_public(m[0]) or (m.re is IPV4 and _is_version(m)):
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
        text = LABELLED.sub(phone, text)
    counts["phone"] += american
    return text, counts


def _replace(
    text: str, head: re.Pattern, tail: re.Pattern, mark: str, accept: Callable[[re.Match], bool]
) -> tuple[str, int]:
    """Replace each match of ``head`` directly followed by a match of ``tail`` with ``mark``."""
    parts, end = [], 0
    for m in tail.finditer(text):
        # 66: the longest head is 64 characters, and its look-behind needs one more
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


def _is_version(m: re.Match[str]) -> bool:
    """Return whether a dotted number is a version or a section number ("17.7.4.2. Debugging")."""
    before = m.string[max(0, m.start() - CONTEXT) : m.start()]
    if VERSION_BEFORE.search(before):
        return True
    starts_line = not before.rpartition("\n")[2].strip()
    if starts_line and HEADING_AFTER.match(m.string, m.end()):
        return all(int(part) < 100 for part in m[0].split("."))
    single_digits = len(m[0]) == 7
    return single_digits and not ADDRESS_NEAR.search(before)
