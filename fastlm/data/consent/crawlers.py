"""The names of crawlers for which a corpus obeys robots.txt: `crawlers.toml`, a dated list."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from typing_extensions import TypedDict

from fastlm.data.consent.robots import product_token
from fastlm.errors import InputError, show
from fastlm.schema import read_toml, validate

FILE = Path(__file__).with_name("crawlers.toml")
MAX_CRAWLERS = 100


class Crawler(TypedDict):
    """An entry of the list."""

    name: str  # product token, or "*" for crawlers without a group of their own
    operator: str
    source: str  # where its purpose is stated
    default: bool


class CrawlerList(TypedDict):
    """The file. date: ISO 8601, of the last check."""

    date: str
    source: str
    crawler: list[Crawler]


@cache
def read_crawlers(path: Path = FILE) -> CrawlerList:
    """Return a list of crawlers. InputError: not such a file."""
    table, _ = read_toml(path)
    return validate(table, CrawlerList, str(path))


@cache
def default_crawlers() -> tuple[str, ...]:
    """Return the names that are obeyed unless others are chosen: a "no" to one of them is a "no"
    to the corpus.
    """
    return tuple(entry["name"] for entry in read_crawlers()["crawler"] if entry["default"])


@cache
def all_crawlers() -> tuple[str, ...]:
    """Return all names of the list."""
    return tuple(entry["name"] for entry in read_crawlers()["crawler"])


def product_tokens(crawler: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the product tokens of one or several crawlers (``CCBot`` of ``CCBot/2.0``); the
    default list for None. InputError: a name without a token, too many names, none.
    """
    if crawler is None:
        return default_crawlers()
    return _product_tokens((crawler,) if isinstance(crawler, str) else tuple(crawler))


@cache
def _product_tokens(names: tuple[str, ...]) -> tuple[str, ...]:
    if not 0 < len(names) <= MAX_CRAWLERS:
        raise InputError(f"crawler: expected 1 to {MAX_CRAWLERS} names, got {len(names)}")
    tokens = tuple(product_token(name) if isinstance(name, str) else "" for name in names)
    for name, token in zip(names, tokens):
        if not token:
            raise InputError(f"crawler: expected a product token such as CCBot, got {show(name)}")
    return tuple(dict.fromkeys(tokens))
