"""README.md and docs/*.md: short lines, cells and paragraphs; links to files and headings."""

import re
from pathlib import Path

import pytest
from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COLUMNS = 120  # a paragraph is counted in lines of this width
MAX_LINE, MAX_CELL_WORDS, MAX_PARAGRAPH_LINES = 400, 30, 4


def prose(text: str) -> list[str]:
    """The lines of a page; those of code blocks are empty."""
    lines, code = [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith("```")
        code ^= fence
        lines.append("" if code or fence else line)
    return lines


def long_cells(text: str) -> list[str]:
    rows = (line.strip() for line in prose(text))
    cells = (cell for row in rows if row.startswith("|") for cell in re.split(r"(?<!\\)\|", row))
    return [cell for cell in cells if len(cell.split()) > MAX_CELL_WORDS]


def long_paragraphs(text: str) -> list[str]:
    """A list's item is a paragraph of its own; tables, headings, pictures and comments are none."""
    paragraphs: list[list[str]] = [[]]
    for line in prose(text):
        if not line.strip() or re.match(r"\s*(\||#|!\[|<!--)", line):
            paragraphs.append([])
        elif re.match(r"\s*([-*]|\d+\.) ", line):
            paragraphs.append([line])
        else:
            paragraphs[-1].append(line)
    lines = [sum(-(-len(line) // COLUMNS) for line in lines) for lines in paragraphs]
    return [p[0] for p, n in zip(paragraphs, lines, strict=True) if n > MAX_PARAGRAPH_LINES]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = [re.match(r"#+ (.*)", line) for line in prose(page.read_text("utf-8"))]
    words = [re.sub(r"[^\w\- ]", "", h[1].lower()) for h in headings if h]
    return {w.replace(" ", "-") for w in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_and_cells_are_short(page):
    text = page.read_text("utf-8")
    assert [line for line in text.splitlines() if len(line) > MAX_LINE] == []
    assert long_cells(text) == []


def test_the_readme_has_no_long_paragraph():
    assert long_paragraphs((ROOT / "README.md").read_text("utf-8")) == []


def test_the_rules_find_what_is_long():
    words = "word " * 31
    code = f"```\n| {words}|\n{words * 4}\n```\n"
    text = f"# {words * 4}\n\n| a | {words}|\n|---|---|\n\n- {words * 4}\n- short\n\n{code}"
    assert long_cells(text) == [" " + words]
    assert long_paragraphs(text) == [f"- {words * 4}"]
    assert long_paragraphs("one\n" * 4) == [] and long_paragraphs("one\n" * 5) == ["one"]


def test_links_lead_somewhere():
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for link in re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose(page.read_text("utf-8")))):
            if "://" not in link:
                file, _, anchor = link.partition("#")
                target = page.parent / file if file else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"
