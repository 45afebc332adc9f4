"""The Jinja environments of pages (HTML) and cards (Markdown), which escape every value.

Texts from outside (names, sources, licences, options, samples) cannot become markup: jinja2 escapes
for HTML, `escape` for Markdown. The templates are in ``parts/``; report.html.jinja is beside it.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.pipeline.text import seconds_text, size_text

FOLDER = Path(__file__).parent
MARKUP = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")


class Safe(str):
    """Text that is Markdown already and is not escaped."""


def escape(value: Any) -> str:
    """Return text as one line of Markdown that shows it as it is."""
    return value if isinstance(value, Safe) else MARKUP.sub(r"\\\1", " ".join(str(value).split()))


def code_span(value: Any) -> Safe:
    """Return text as an inline code span, also if it contains backticks."""
    text = " ".join(str(value).split()) or " "
    fence = "`" * (max(map(len, re.findall(r"`+", text)), default=0) + 1)
    pad = " " if "`" in text else ""
    return Safe(f"{fence}{pad}{text}{pad}{fence}")


def code_block(lines: Sequence[str], language: str) -> Safe:
    """Return lines as a code block that no backticks inside can end."""
    text = "\n".join(" ".join(line.split()) if language == "sh" else line for line in lines)
    return Safe(f"```{language}\n{text.replace('```', chr(39) * 3)}\n```")


def table_cell(value: Any) -> Safe:
    """Return a value, or a list of lines, as the content of a cell of a table."""
    lines = value if isinstance(value, list | tuple) else [value]
    return Safe("<br>".join(map(escape, lines)))


def page_environment() -> Any:
    """Return the environment of HTML pages, which are self-contained and have no scripts."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([FOLDER, FOLDER / "parts"]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # our own SVG is the only text that is not escaped
    environment.filters |= {"size": size_text, "seconds": seconds_text, "markup": Markup}
    return environment


def card_environment() -> Any:
    """Return the environment of cards in Markdown, which are UTF-8 and escape each value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "parts"), finalize=escape,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "code": code_span, "block": code_block, "cell": table_cell, "raw": Safe,
    }  # fmt: skip
    return environment


def with_front_matter(front: Any, body: str) -> str:
    """Return a card: the YAML of huggingface_hub's card data, then the text."""
    return f"---\n{front.to_yaml()}\n---\n\n{body}".encode("utf-8", "replace").decode()
