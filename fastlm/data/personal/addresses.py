"""Find e-mail addresses of any script and public IP addresses.

Policy. E-mail: every address is personal data, except those under the names reserved for examples
(RFC 2606). IP: public addresses are, but not networks (128.1.0.0/16). Private, loopback, link-local
and documentation ranges (RFC 1918, 5737, 3849) identify nobody. Dotted numbers that look like a
version ("version 2.6.32.5", "openssl-1.0.2.1", four single digits without a word like "host" before
them) or like a section number are no addresses.

Both are searched from a rare character: "@", a digit, ":". The name before "@" is matched on the
reversed text, which needs no search. Addresses in words ("ann at mail dot org") are not found.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence

from fastlm.data.personal.spans import CONTEXT, Span

# Letters of scripts without spaces between words: the text before an address is no part of it
WIDE = (
    r"\u0e00-\u0eff\u1780-\u17ff\u3005-\u3007\u3031-\u30ff\u3400-\u9fff\uac00-\ud7af\uff10-\uff19"
    r"\uff21-\uff3a\uff41-\uff5a\uff66-\uff9f"
)
FOREIGN = rf"[^\x00-\x7f\s{WIDE}\u2000-\u206f\u3000-\u3004\uff00-\uff0f\uff1a-\uff20]"
LABEL = rf"(?:(?:[A-Za-z0-9-]|{FOREIGN}){{1,63}}|[{WIDE}0-9-]{{1,63}})"
# RFC 5321: a local part has at most 64 characters, a domain label 63
MAX_LOCAL = 64
DOMAIN = re.compile(
    r"((?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}([A-Za-z]{2,24}))(?![A-Za-z0-9_-])"
    rf"(?!{FOREIGN})"
)
FOREIGN_DOMAIN = re.compile(
    rf"((?:{LABEL}[.\uff0e]){{1,8}}(xn--[A-Za-z0-9-]{{2,59}}|[A-Za-z]{{2,24}}(?![A-Za-z0-9_-])"
    rf"|{FOREIGN}{{2,24}}|[{WIDE}]{{2,24}}))"
)
AT = re.compile("[@\uff20]")
# reversed: the last character of the pattern is the first one of the name
REVERSED_LOCAL = re.compile(r"[A-Za-z0-9_.%+'-]*[A-Za-z0-9]")
REVERSED_FOREIGN_LOCAL = re.compile(rf"[{WIDE}0-9._-]*[{WIDE}]|(?:[^\W{WIDE}]|[.%+'-])*[^\W{WIDE}]")
RESERVED = re.compile(
    r"(^|\.)(example\.(com|org|net)|example|test|invalid|localhost)$", re.IGNORECASE
)
# name@2x.png, getty@tty1.service: not top-level domains
NOT_DOMAINS = frozenset(
    "png jpg jpeg gif svg webp ico html htm xml json yaml yml toml txt md rst js ts css php"
    " py pl rb sh c h cc cpp hpp java go rs so conf cfg ini log lock tar gz bz2 xz zip deb rpm"
    " git service socket target timer mount slice scope device path".split()
)

# Octets over 255 and leading zeros are left to ipaddress.
IPV4 = re.compile(r"[0-9](?<![\w.+~-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![\w~+]|[.-]\w|/\d)")
# searched from the first colon: "std::" has no hexadecimal digit before it
IPV6_TAIL = re.compile(r":(?<=[0-9a-fA-F]:)(?:[0-9a-fA-F]{0,4}:){1,6}[0-9a-fA-F]{0,4}(?![\w:]|/\d)")
IPV6_HEAD = re.compile(r"(?<![\w:.])[0-9a-fA-F]{1,4}\Z")
VERSION_BEFORE = re.compile(
    r"(?:versions?|release[sd]?|ver|kernel|linux|section|chapter|clause|rfc|oid|since|before|until"
    r"|upgrade[sd]?|v|§)[ .:(=]*$|[=<>~!^]=?\s*$|\d\s*[-–]\s*$|[A-Za-z]/$",  # noqa: RUF001
    re.IGNORECASE,
)
ADDRESS_NEAR = re.compile(
    r"\b(?:ip|address|host|server|dns|resolver|ping|gateway|router|proxy|from|peer)\b|://",
    re.IGNORECASE,
)
HEADING_AFTER = re.compile(r"\.?[ \t]+\w")


def find_emails(text: str) -> Iterator[Span]:
    """Yield the e-mail addresses of a text. Their values are in lower case."""
    if "@" not in text and "\uff20" not in text:
        return
    end = 0
    for at in AT.finditer(text):
        domain = DOMAIN.match(text, at.end())
        if domain is None and not text.isascii():
            domain = FOREIGN_DOMAIN.match(text, at.end())
        if domain is None or domain[2].lower() in NOT_DOMAINS or RESERVED.search(domain[1]):
            continue
        before = text[max(end, at.start() - MAX_LOCAL - 1) : at.start()][::-1]
        pattern = REVERSED_LOCAL if before.isascii() else REVERSED_FOREIGN_LOCAL
        local = pattern.match(before)
        if local is None or len(local[0]) > MAX_LOCAL:
            continue
        start, end = at.start() - len(local[0]), domain.end()
        yield Span(start, end, "email", text[start:end].lower())


def find_ips(text: str, runs: Sequence[tuple[int, int]]) -> Iterator[Span]:
    """Yield the public IP addresses of a text; ``runs`` are its runs of digits. Values are in the
    shortest form.
    """
    for m in IPV6_TAIL.finditer(text):
        head = IPV6_HEAD.search(text[max(0, m.start() - 5) : m.start()])
        if head is not None and _may_be_ipv6(head[0], m[0]):
            start = m.start() - len(head[0])
            if address := _public(text[start : m.end()]):
                yield Span(start, m.end(), "ip", address)
    for start, end in runs:
        if text.count(".", start, end) >= 3:
            for m in IPV4.finditer(text, start, end + 2):  # 2: what must not follow
                if (address := _public(m[0])) and not _is_version(m):
                    yield Span(m.start(), m.end(), "ip", address)


def _may_be_ipv6(head: str, tail: str) -> bool:
    """Return True for 2000::/3, all assigned addresses, and for eight groups of any prefix. Eight
    bytes ("20:01:0d:b8:...") and times are none.
    """
    if len(head) == 4 and head[0] in "23":
        return True
    return tail.count(":") == 7 and max(map(len, tail.split(":"))) > 2


def _public(address: str) -> str:
    """Return the shortest form of a public address, "" for any other text."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return ""
    return ip.compressed if ip.is_global and not ip.is_multicast else ""


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
