"""Test vectors of the consent standards, written from their texts: a page, what its site says, and
what one standard then says about training (None: nothing). bench/corpus/consent.py counts them.
"""

from dataclasses import dataclass, field
from typing import Any

from fastlm.data.consent import PolicyFile, statements

SITE = "https://x.example"


@dataclass
class Vector:
    """One case. section: where the text says so. source: what the statement's source contains."""

    standard: str
    section: str
    verdict: str | None
    path: str = "/a"
    files: dict[str, Any] = field(default_factory=dict)  # by path, or by address
    headers: Any = None
    html: str = ""
    crawler: Any = "ExampleBot"
    source: str = ""
    url: str = ""

    def __str__(self) -> str:
        return f"{self.standard} {self.section}"

    def statement(self):
        """Return what the standard says, None for nothing."""
        policies = {k if "://" in k else SITE + k: v for k, v in self.files.items()}
        url = self.url or SITE + self.path
        found = statements(
            url, headers=self.headers, html=self.html, policies=policies, crawler=self.crawler
        )
        return next((s for s in found if s.standard == self.standard), None)

    def problem(self) -> str:
        """Return what is wrong with the answer, "" if it is right."""
        statement = self.statement()
        verdict = statement and statement.verdict
        if verdict != self.verdict:
            return f"{self}: expected {self.verdict}, got {statement}"
        if statement and self.source not in statement.source:
            return f"{self}: expected source {self.source!r}, got {statement.source!r}"
        return ""


def robots(section, verdict, text, path, crawler="ExampleBot", line=0, status=200):
    if status != 200:
        text = PolicyFile(f"{SITE}/robots.txt", "", status, text)
    source = f"{SITE}/robots.txt, line {line}" if line else ""
    return Vector(
        "robots.txt", section, verdict, path, {"/robots.txt": text}, crawler=crawler, source=source
    )


SIMPLE = """User-Agent: *
Disallow: *.gif$
Disallow: /example/
Allow: /publications/

User-Agent: foobot
Disallow:/
Allow:/example/page.html
Allow:/example/allowed.gif

User-Agent: barbot
User-Agent: bazbot
Disallow: /example/page.html

User-Agent: quxbot
"""
MERGED = """user-agent: ExampleBot
disallow: /foo
disallow: /bar

user-agent: *
disallow: /star

user-agent: ExampleBot
disallow: /baz
"""
LONGEST = "User-Agent: *\nAllow: /example/page/\nDisallow: /example/page/disallowed.gif\n"


def rule(pattern):
    return f"User-agent: *\nDisallow: {pattern}\n"


ROBOTS = [
    robots("5.1 any bot, $", "no", SIMPLE, "/x.gif", line=2),
    robots("5.1 $ needs the end", None, SIMPLE, "/x.gif?y"),
    robots("5.1 prefix", "no", SIMPLE, "/example/page.html", line=3),
    robots("5.1 allow", None, SIMPLE, "/publications/"),
    robots("5.1 no rule matches", None, SIMPLE, "/other"),
    robots("5.1 own group", "no", SIMPLE, "/other", "foobot", 7),
    robots("5.1 own group, longest allows", None, SIMPLE, "/example/page.html", "foobot"),
    robots("5.1 two names, the first", "no", SIMPLE, "/example/page.html", "barbot", 13),
    robots("5.1 two names, the second", "no", SIMPLE, "/example/page.html", "bazbot", 13),
    robots("5.1 own group hides *", None, SIMPLE, "/x.gif", "barbot"),
    robots("5.1 empty group", None, SIMPLE, "/example/page.html", "quxbot"),
    robots("5.2 longest match", "no", LONGEST, "/example/page/disallowed.gif", line=3),
    robots("5.2 shorter match", None, LONGEST, "/example/page/other.gif"),
    robots("2.2.1 case of names", "no", SIMPLE, "/", "FooBot", 7),
    robots("2.2.1 groups are merged, first", "no", MERGED, "/foo", line=2),
    robots("2.2.1 groups are merged, second", "no", MERGED, "/baz", line=9),
    robots("2.2.1 merged group hides *", None, MERGED, "/star"),
    robots("2.2.1 token with a version", "no", MERGED, "/bar", "ExampleBot/2.1", 3),
    robots("2.2.1 line with a version", "no", "User-agent: ABot/2.0\nDisallow: /\n", "/", "ABot"),
    robots("2.2.1 a prefix is no match", None, "User-agent: Example\nDisallow: /\n", "/"),
    robots("2.2.1 no group", None, "User-agent: other\nDisallow: /\n", "/"),
    robots("2.2.2 case of paths", None, rule("/Secret"), "/secret"),
    robots("2.2.2 allow wins a tie", None, rule("/p") + "Allow: /p\n", "/p"),
    robots("2.2.2 query", "no", rule("/foo/bar?baz=quz"), "/foo/bar?baz=quz"),
    robots("2.2.2 address in the query", "no", rule("/b?z=https://f.b"), "/b?z=https://f.b"),
    robots("2.2.2 letters of others", "no", rule("/foo/bar/ツ"), "/foo/bar/%E3%83%84"),
    robots("2.2.2 escaped in the rule", "no", rule("/foo/bar/%E3%83%84"), "/foo/bar/ツ"),
    robots("2.2.2 small digits", "no", rule("/foo/%E3%83%84"), "/foo/%e3%83%84"),
    robots("2.2.2 escaped letters", "no", rule("/foo/bar/%62%61%7A"), "/foo/bar/baz"),
    robots("2.2.2 reserved stays escaped", None, rule("/a%2Fb"), "/a/b"),
    robots("2.2.3 # comment", "no", "User-agent: * # all\nDisallow: /a # b\n", "/a", line=2),
    robots("2.2.3 $", None, rule("/this/path/exactly$"), "/this/path/exactly/not"),
    robots("2.2.3 *", "no", rule("/this/*/exactly"), "/this/path/exactly/too"),
    robots("2.2.3 * as a character", "no", rule("/file-%2A.html"), "/file-*.html"),
    robots("2.2.3 $ as a character", "no", rule("/foo-%24"), "/foo-$"),
    robots("2.2.4 other records", "no", "User-agent: *\nSitemap: /s\nDisallow: /\n", "/", line=3),
    robots("2.2 rules before groups", None, "Disallow: /\nUser-agent: *\nAllow: /x\n", "/"),
    robots("2.2 empty rule", None, rule(""), "/"),
    robots("2.2 ends of lines", "no", "User-agent: *\rDisallow: /\r\n", "/", line=2),
    robots("2.3 byte order mark", "no", "\ufeffUser-agent: *\nDisallow: /\n", "/", line=2),
    robots("2.3.1.3 unavailable", None, rule("/"), "/", status=404),
    robots("2.3.1.4 unreachable", "no", "", "/", status=503),
    robots("2.5 limit", "no", rule("/") + "# " + "x" * 600_000, "/", line=2),
    robots("beyond: digits in a name", "no", "User-agent: AI2Bot\nDisallow: /\n", "/", "AI2Bot"),
]


def usage(section, verdict, text="", path="/a", header=None, crawler="ExampleBot", line=0):
    files = {"/robots.txt": text} if text else {}
    source = f"robots.txt, line {line}" if line else ""
    headers = {"Content-Usage": header} if header else None
    return Vector("aipref", section, verdict, path, files, headers, "", crawler, source)


ATTACH = """User-Agent: *
Allow: /
Disallow: /never/
Content-Usage: train-ai=n
Content-Usage: /ai-ok/ train-ai=y

User-Agent: ExampleBot
Allow: /
Content-Usage: train-ai=y
"""


def for_all(value):
    return f"User-agent: *\nAllow: /\nContent-Usage: {value}\n"


AIPREF = [
    usage("attach 3.4 /test", "no", ATTACH, "/test", crawler="Other", line=4),
    usage("attach 3.4 /never/test", None, ATTACH, "/never/test", crawler="Other"),
    usage("attach 3.4 /ai-ok/test", "yes", ATTACH, "/ai-ok/test", crawler="Other", line=5),
    usage("attach 3.4 ExampleBot", "yes", ATTACH, "/never/test", line=9),
    usage("attach 1.2 header", "no", header="train-ai=n"),
    usage("attach 2 header, two fields", "no", header=["search=y", "train-ai=n"]),
    usage("attach 3.1 same path, conflict", "no", for_all("train-ai=y\nContent-Usage: train-ai=n")),
    usage("attach 3.1 longest path", "yes", for_all("/ train-ai=n\nContent-Usage: /a train-ai=y")),
    usage("attach 3.1 path does not match", None, for_all("/b train-ai=n")),
    usage("attach 3.1 escaped path", "no", for_all("/a%20b train-ai=n"), "/a b"),
    usage("attach 3.2 blanks", "no", "User-agent: *\n \tContent-Usage \t:\t/a\ttrain-ai=n\n"),
    usage("attach 3.2 comment", "no", for_all("train-ai=n # not yet")),
    usage("attach 3.2 case of the label", "no", "user-agent: *\nCONTENT-USAGE: train-ai=n\n"),
    usage(
        "attach 3 the line ends the names",
        "yes",
        "User-agent: ExampleBot\nContent-Usage: train-ai=y\n"
        "User-agent: *\nContent-Usage: train-ai=n\n",
    ),
    usage("vocab 5.1 header against file", "no", for_all("train-ai=n"), header="train-ai=y"),
    usage("vocab 5.1 allow and nothing", "yes", for_all("search=n"), header="train-ai=y"),
    usage("vocab 6 other categories", None, header="search=n, ai-use=n"),
    usage("vocab 6.1 case of labels", None, header="Train-AI=n"),
    usage("vocab 6.2 other token", None, header="train-ai=no"),
    usage("vocab 6.4 unknown label", "no", header="train-genai=y, train-ai=n"),
    usage("vocab 6.4 unknown parameter", "no", header="train-ai=n;because=law"),
    usage("vocab 6.5 text is no token", None, header='train-ai="n"'),
    usage("vocab 6.5 bare key", None, header="train-ai"),
    usage("vocab 6.5 boolean", None, header="train-ai=?0"),
    usage("vocab 6.5.1 the last counts", None, header='train-ai=y, train-ai, search=n, search="n"'),
    usage("vocab 6.5.1 cannot be parsed", None, header="train-ai=n,"),
    usage("vocab 6.5.1 blanks around =", None, header="train-ai = n"),
    usage("vocab 6.5.2 parameters of the last", "yes", header="train-ai;allow=n, train-ai=y"),
    usage("vocab 3 nothing stated", None),
]


def signal(section, verdict, text="", path="/a", header=None, crawler="ExampleBot", line=0):
    files = {"/robots.txt": text} if text else {}
    source = f"robots.txt, line {line}" if line else ""
    headers = {"Content-Signal": header} if header else None
    return Vector("content-signal", section, verdict, path, files, headers, "", crawler, source)


def signals(value, more=""):
    return f"User-agent: *\nContent-Signal: {value}\nAllow: /\n{more}"


OWN = "\nUser-agent: ExampleBot\nAllow: /\n"
CONTENT_SIGNAL = [
    signal("no", "no", signals("ai-train=no"), line=2),
    signal("yes", "yes", signals("ai-train=yes"), line=2),
    signal("managed file", "no", signals("search=yes,ai-train=no,use=reference")),
    signal("not stated", None, signals("search=yes, ai-input=no")),
    signal("other value", None, signals("ai-train=maybe")),
    signal(
        "case and blanks", "no", "user-agent: *\ncontent-signal :  Search=Yes , AI-Train = NO\n"
    ),
    signal("comment", "no", signals("ai-train=no # ask us")),
    signal("twice in a line", "no", signals("ai-train=yes, ai-train=no")),
    signal("two lines", "no", signals("ai-train=yes\nContent-Signal: ai-train=no")),
    signal("use=immediate", "no", signals("use=immediate")),
    signal("use=reference", "no", signals("search=yes, use=reference")),
    signal("use=full says nothing", None, signals("use=full")),
    signal("ai-train before use", "yes", signals("ai-train=yes, use=reference")),
    signal("path matches", "no", signals("/a ai-train=no")),
    signal("path does not match", None, signals("/b ai-train=no")),
    signal("longest path", "yes", signals("ai-train=no\nContent-Signal: /a ai-train=yes")),
    signal(
        "longest path, other page", "no", signals("ai-train=no\nContent-Signal: /b ai-train=yes")
    ),
    signal("path with *", "no", signals("*.html ai-train=no"), "/x/y.html"),
    signal("same path twice", "no", signals("/a ai-train=yes\nContent-Signal: /a ai-train=no")),
    signal("own group hides *", None, signals("ai-train=no", OWN)),
    signal("own group hides *, * itself", "no", signals("ai-train=no", OWN), crawler="*"),
    signal(
        "own group hides *, corpus",
        "no",
        signals("ai-train=no", OWN),
        crawler=("ExampleBot", "*"),
    ),
    signal(
        "yes must be said to all", None, signals("ai-train=yes", OWN), crawler=["ExampleBot", "*"]
    ),
    signal(
        "own group", "yes", signals("ai-train=no", OWN + "Content-Signal: ai-train=yes"), line=7
    ),
    signal(
        "names end at the signal",
        "yes",
        "User-agent: ExampleBot\nContent-Signal: ai-train=yes\n"
        "User-agent: *\nContent-Signal: ai-train=no\nAllow: /\n",
    ),
    signal("outside of groups", None, "Content-Signal: ai-train=no\nUser-agent: *\nAllow: /\n"),
    signal("path that may not be fetched", None, signals("ai-train=yes", "Disallow: /a\n")),
    signal("header no", "no", header="search=yes, ai-train=no"),
    signal("header yes is no consent", None, header="ai-train=yes, search=yes"),
    signal("header no, file yes", "no", signals("ai-train=yes"), header="ai-train=no"),
]


def tdm(section, verdict, text=None, path="/a", header=None, html="", line=0):
    files = {} if text is None else {"/.well-known/tdmrep.json": text}
    headers = None if header is None else {"TDM-Reservation": header}
    source = f"tdmrep.json, line {line}" if line else ""
    return Vector("tdmrep", section, verdict, path, files, headers, html, source=source)


def meta(name, content):
    return f'<html><head><meta name="{name}" content="{content}"></head><body></body></html>'


THREE = """[
  {
  "location": "/directory-a/",
  "tdm-reservation": 1
  },
  {
  "location": "/directory-b/html/",
  "tdm-reservation": 1,
  "tdm-policy":"https://provider.com/policies/policy.json"
  },
  {
  "location": "/directory-b/images/*.jpg",
  "tdm-reservation": 0
  }
]"""


def location(pattern, value="1"):
    return f'[{{"location": "{pattern}", "tdm-reservation": {value}}}]'


TDMREP = [
    tdm("example: whole site", "no", location("/"), line=1),
    tdm("example: group a", "no", THREE, "/directory-a/x.pdf", line=2),
    tdm("example: group b with a policy", "no", THREE, "/directory-b/html/x", line=6),
    tdm("example: group c, not reserved", "yes", THREE, "/directory-b/images/x.jpg", line=11),
    tdm("file: no match is unset", None, THREE, "/other"),
    tdm("file: first in sequence", "yes", location("/a", "0")[:-1] + "," + location("/")[1:]),
    tdm(
        "file: first in sequence, longer later",
        "no",
        location("/")[:-1] + "," + location("/a", 0)[1:],
    ),
    tdm("file: case", None, location("/A")),
    tdm("file: escaped letters", "no", location("/%61")),
    tdm("file: $", None, location("/a$"), "/ab"),
    tdm("file: *", "no", location("/*/c"), "/a/b/c"),
    tdm("file: %24", "no", location("/foo-%24"), "/foo-$"),
    tdm("file: other value is unset", None, location("/", "2")),
    tdm("file: true is no integer", None, location("/", "true")),
    tdm(
        "file: unset rule is still the first", None, location("/", 2)[:-1] + "," + location("/")[1:]
    ),
    tdm("file: brackets are mandatory", None, '{"location": "/", "tdm-reservation": 1}'),
    tdm("file: location is mandatory", None, '[{"tdm-reservation": 1}]'),
    tdm("file: reservation is mandatory", None, '[{"location": "/"}]'),
    tdm("file: not JSON", None, "tdm-reservation: 1"),
    tdm("header 1", "no", header="1"),
    tdm("header 0", "yes", header="0"),
    tdm("header, other value", None, header="yes"),
    tdm("meta 1", "no", html=meta("tdm-reservation", "1")),
    tdm("meta 0", "yes", html=meta("TDM-Reservation", "0")),
    tdm("meta, other value", None, html=meta("tdm-reservation", "true")),
    tdm("priority: header over file", "yes", location("/"), header="0"),
    tdm("priority: html over header", "no", header="0", html=meta("tdm-reservation", "1")),
    tdm("priority: html over file", "yes", location("/"), html=meta("tdm-reservation", "0")),
    tdm("priority: unset header leaves the file", "no", location("/"), header="2"),
    tdm(
        "priority: unset html leaves the header",
        "no",
        header="1",
        html=meta("tdm-reservation", "x"),
    ),
]

LICENCE = f"{SITE}/licence.xml"


def rsl(section, verdict, inner, path="/a", *, where="robots", html="", more=None, line=0):
    """A licence document with this content, named in robots.txt, a header or the page."""
    text = inner
    if "<rsl" not in inner:
        text = f'<?xml version="1.0"?>\n<rsl xmlns="https://rslstandard.org/rsl">\n{inner}\n</rsl>'
    files = {LICENCE: text} | (more or {})
    headers = None
    if where == "robots":
        files.setdefault("/robots.txt", f"License: {LICENCE}\nUser-agent: *\nAllow: /\n")
    elif where == "header":
        headers = {"Link": f'<{LICENCE}>; rel="license"; type="application/rsl+xml"'}
    elif where == "html":
        html = f'<head><link rel="license" type="application/rsl+xml" href="{LICENCE}"></head>'
    source = f"licence.xml, line {line}" if line else ""
    return Vector("rsl", section, verdict, path, files, headers, html, source=source)


def content(*licences, url="/", extra=""):
    inner = "".join(f"<license>{licence}</license>" for licence in licences)
    return f'<content url="{url}"{extra}>{inner}</content>'


def permits(tokens="ai-train", type="usage"):
    return f'<permits type="{type}">{tokens}</permits>'


def prohibits(tokens="ai-train", type="usage"):
    return f'<prohibits type="{type}">{tokens}</prohibits>'


def payment(type):
    return f'<payment type="{type}"/>'


GROUPS = {
    "/robots.txt": f"License: {SITE}/other.xml\nUser-agent: *\nAllow: /\nLicense: {LICENCE}\n"
}
OTHER_GROUP = {
    "/robots.txt": f"License: {LICENCE}\nUser-agent: *\nAllow: /\n"
    f"User-agent: Other\nLicense: {SITE}/other.xml\n"
}
INLINE = (
    '<head><script type="application/rsl+xml"><rsl xmlns="https://rslstandard.org/rsl">'
    f"{content(prohibits(), url='')}</rsl></script></head>"
)
RSL = [
    rsl("1.1 no AI use", "no", content(prohibits("ai-all")), line=3),
    rsl(
        "3.1.2 example, articles",
        "no",
        content(permits("all")) + content(prohibits(), url="/articles/"),
        "/articles/1",
    ),
    rsl(
        "3.1.2 example, others",
        "yes",
        content(permits("all")) + content(prohibits(), url="/articles/"),
        "/b",
    ),
    rsl(
        "3.1.1 order means nothing", "no", content(prohibits(), url="/a") + content(permits("all"))
    ),
    rsl("3.1.1 narrow permission", "yes", content(prohibits("all")) + content(permits(), url="/a")),
    rsl("3.1.1 prohibition over permission", "no", content(permits() + prohibits())),
    rsl("3.1.1 ... in two licences", "no", content(permits(), prohibits("ai-all"))),
    rsl(
        "3.1.1 silent narrow scope", "no", content(prohibits()) + content(payment("free"), url="/a")
    ),
    rsl("3.3 absolute url", "no", content(prohibits(), url=f"{SITE}/a")),
    rsl("3.3 url of another site", None, content(prohibits(), url="https://y.example/")),
    rsl("3.3 * and $", "no", content(prohibits(), url="/*.html$"), "/x/y.html"),
    rsl("3.3 server", "no", content(permits(), extra=' server="https://l.example"')),
    rsl(
        "3.4 free offer beside a priced one",
        "yes",
        content(permits() + payment("crawl"), permits()),
    ),
    rsl("3.4.1.1 all", "yes", content(permits("all"))),
    rsl("3.4.1.1 ai-all", "yes", content(permits("ai-all"))),
    rsl("3.4.1.1 ai-train among others", "yes", content(permits("search ai-train"))),
    rsl("3.4.1 extension token", None, content(prohibits("x:ai-train"))),
    rsl("3.5 only the listed values", "no", content(permits("search ai-input"))),
    rsl("3.5 nothing about usage", None, content(payment("free"))),
    rsl("3.5 for some users", "unknown", content(permits() + permits("non-commercial", "user"))),
    rsl("3.5 for some countries", "unknown", content(permits() + prohibits("EU", "geo"))),
    rsl("3.6 other prohibition", None, content(prohibits("search"))),
    rsl("3.7 payment absent", "yes", content(permits())),
    rsl("3.7 free", "yes", content(permits() + payment("free"))),
    rsl("3.7 training", "no", content(permits() + payment("training"))),
    rsl("3.7 attribution", "unknown", content(permits() + payment("attribution"))),
    rsl(
        "3.9 custom terms",
        "unknown",
        content(permits() + "<payment><custom>/ask</custom></payment>"),
    ),
    rsl(
        "3.12 reporting", "unknown", content(permits() + '<reporting type="audit" profile="x:y"/>')
    ),
    rsl("3 unknown element cannot permit", None, content(permits() + "<permit/>")),
    rsl("3 foreign element is ignored", "yes", content(permits() + '<x xmlns="urn:x"/>')),
    rsl("2.2 other namespace", None, f'<rsl xmlns="urn:x">{content(prohibits())}</rsl>'),
    rsl("4.3 broken document", None, content(prohibits()) + "<broken>"),
    rsl(
        "4.3 missing document",
        None,
        content(prohibits()),
        more={LICENCE: PolicyFile(LICENCE, "", 404, "")},
    ),
    rsl("4.4.2 group over global", "no", content(prohibits()), more=GROUPS),
    rsl("4.4.2 group of others", "no", content(prohibits()), more=OTHER_GROUP),
    rsl("4.5 Link header", "no", content(prohibits()), where="header"),
    rsl("4.6.1 linked", "no", content(prohibits()), where="html"),
    rsl("4.6.1 linked, url of the association", "no", content(prohibits(), url=""), where="html"),
    rsl("4.6.2 inline", "no", content(permits()), html=INLINE),
    rsl(
        "4.9 page over site",
        "yes",
        content(permits()),
        where="html",
        more={
            "/robots.txt": f"License: {SITE}/o.xml\nUser-agent: *\nAllow: /\n",
            "/o.xml": f'<rsl xmlns="https://rslstandard.org/rsl">{content(prohibits())}</rsl>',
        },
    ),
    rsl("0.9 commas", "no", content(prohibits("search, ai-train"))),
]


def noai(section, verdict, header=None, html="", crawler="ExampleBot", source=""):
    headers = None if header is None else {"X-Robots-Tag": header}
    return Vector("noai", section, verdict, "/a", {}, headers, html, crawler, source)


NOAI = [
    noai("header noai", "no", "noai", source="header X-Robots-Tag"),
    noai("header noimageai", "no", "noimageai"),
    noai("header noml", "no", "noml"),
    noai("header, list", "no", "noindex, noai"),
    noai("header, several", "no", ["noindex", "noai"]),
    noai("header, case", "no", "NoAI"),
    noai("header, blanks", "no", "noai noimageai"),
    noai("header, others only", None, "noindex, nofollow, noarchive"),
    noai("header, part of a word", None, "noaix"),
    noai("header, other crawler", None, "otherbot: noai"),
    noai("header, this crawler", "no", "examplebot: noai"),
    noai("header, this crawler, list", "no", "ExampleBot: noindex, noai"),
    noai("header, one of several crawlers", "no", "gptbot: noai", crawler=["CCBot", "GPTBot"]),
    noai("header, crawler after crawler", None, "examplebot: noindex, otherbot: noai"),
    noai("header, directive with a value", "no", "max-snippet: 10, noai"),
    noai("header, date", "no", "unavailable_after: Fri, 25 Jun 2010 15:00:00 PST, noai"),
    noai("header none", None, None),
    noai("meta noai", "no", html=meta("robots", "noai"), source="html meta robots"),
    noai("meta noimageai", "no", html=meta("robots", "noimageai")),
    noai("meta list", "no", html=meta("robots", "noai, noimageai")),
    noai("meta without blanks", "no", html=meta("robots", "index,noai")),
    noai("meta case", "no", html="<HEAD><META NAME='ROBOTS' CONTENT='NOAI'></HEAD>"),
    noai("meta of this crawler", "no", html=meta("ExampleBot", "noai")),
    noai("meta of another crawler", None, html=meta("otherbot", "noai")),
    noai("meta of another kind", None, html=meta("description", "noai")),
    noai("meta others only", None, html=meta("robots", "noindex")),
    noai("meta in the body", None, html="<head></head><body>" + meta("robots", "noai")),
    noai("meta in a comment", None, html=f"<head><!-- {meta('robots', 'noai')} --></head>"),
    noai(
        "meta after a script with </head>",
        "no",
        html='<head><script>x = "</head>"</script><meta name=robots content=noai></head>',
    ),
]


def ai_txt(
    section, verdict, text, path="/a", file="/.well-known/ai.txt", crawler="ExampleBot", line=0
):
    source = f"ai.txt, line {line}" if line else ""
    return Vector("ai.txt", section, verdict, path, {file: text}, crawler=crawler, source=source)


def spawning(section, verdict, text, path="/a", crawler="ExampleBot", line=0):
    return ai_txt(f"Spawning: {section}", verdict, text, path, "/ai.txt", crawler, line)


BLOG = "# ai.txt\n# Spec-Version: 1.0\nSite-Name: My Blog\nSite-URL: https://myblog.com\n"
NEWS = """# ai.txt
Site-Name: News Daily
Site-URL: https://newsdaily.com

Training: conditional
Scraping: allow

Training-Allow: /articles/free/*
Training-Deny: /articles/premium/*
Training-Deny: /articles/free/new/*
Training-License: CC-BY-4.0

Agent: *
  Rate-Limit: 30/minute

Agent: ClaudeBot
  Training: allow
  Rate-Limit: 120/minute

Agent: GPTBot
  Training: deny

Attribution: required
"""
TYPES = "# Spawning AI\nUser-Agent: *\nDisallow: *.txt\nDisallow: *.pdf\nAllow: /ok\n"
AI_TXT = [
    ai_txt("2.2 minimal file", "no", BLOG + "Training: deny\n", line=5),
    ai_txt("2.4 allow is no consent", None, BLOG + "Training: allow\n"),
    ai_txt("2.4 default", "no", BLOG),
    ai_txt("2.4 scraping", "no", BLOG + "Training: allow\nScraping: deny\n", line=6),
    ai_txt("2.4 indexing is another use", None, BLOG + "Training: allow\nIndexing: deny\n"),
    ai_txt("2.5 path allowed", None, NEWS, "/articles/free/1"),
    ai_txt("2.5 path denied", "no", NEWS, "/articles/premium/1", line=9),
    ai_txt("2.5 more specific pattern", "no", NEWS, "/articles/free/new/1", line=10),
    ai_txt("2.5 condition without a path", "unknown", NEWS, "/other", line=5),
    ai_txt(
        "2.5 glob is the whole path",
        None,
        BLOG + "Training: conditional\nTraining-Deny: /b\nTraining-Allow: /*\n",
        "/bc",
    ),
    ai_txt("2.7 block of the agent", "no", NEWS, "/articles/free/1", crawler="GPTBot", line=21),
    ai_txt("2.7 block that allows", None, NEWS, "/articles/premium/1", crawler="ClaudeBot"),
    ai_txt("2.7 case of names", "no", NEWS, "/x", crawler="gptbot", line=21),
    ai_txt("2.7 block of *", "no", BLOG + "Training: allow\nAgent: *\n  Training: deny\n", line=7),
    ai_txt(
        "2.7 field after a block", "no", BLOG + "Agent: GPTBot\n  Training: allow\nTraining: deny\n"
    ),
    ai_txt(
        "2.7 one of several crawlers", "no", NEWS, "/articles/free/1", crawler=["CCBot", "GPTBot"]
    ),
    ai_txt("2.1 other place", "no", BLOG + "Training: deny\n", file="/ai.txt"),
    ai_txt("another file of that name", None, "# My app\n\nIt plays music: all of it.\n"),
    spawning("file type", "no", TYPES, "/files/a.pdf", line=4),
    spawning("other type", None, TYPES, "/files/a.jpg"),
    spawning("allow is no consent", None, TYPES, "/ok"),
    spawning("whole site", "no", "User-Agent: *\nDisallow: /\nDisallow: *\n", line=2),
    spawning("star", "no", "User-Agent: *\nDisallow: *\n", line=2),
    spawning("own group", "no", "User-Agent: ExampleBot\nDisallow: /\n", line=2),
    spawning("group of others", None, "User-Agent: Other\nDisallow: /\n"),
    spawning("everything allowed", None, "User-Agent: *\nAllow: /\n"),
]

VECTORS = [*ROBOTS, *AIPREF, *CONTENT_SIGNAL, *TDMREP, *RSL, *NOAI, *AI_TXT]
