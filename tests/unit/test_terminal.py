"""What reaches a terminal."""

import io

import pytest
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastlm.terminal import console

HOSTILE = "x\x1b[2Jy\x9b\u202ez"


def table(cell: RenderableType) -> Table:
    grid = Table("a", title="t")
    grid.add_row(cell)
    return grid


@pytest.mark.parametrize(
    "item", [HOSTILE, Text(HOSTILE, "bold"), table(HOSTILE), table(Text(HOSTILE)),
             Group(Panel(Text(HOSTILE), title=Text(HOSTILE)))],
)  # fmt: skip
@pytest.mark.parametrize("highlight", [False, True])
def test_a_console_writes_no_foreign_control_characters(item, highlight):
    file = io.StringIO()
    console(file=file, width=60).print(item, highlight=highlight)
    assert "x\ufffd[2Jy" in file.getvalue()  # a cell that is a Text may lose its end
    file = io.StringIO()
    console(file=file, width=60, force_terminal=True).print(item, highlight=False)
    assert "\x1b[2J" not in file.getvalue() and not {"\x9b", "\u202e"} & set(file.getvalue())


def test_a_console_keeps_its_own_markup():
    file = io.StringIO()
    console(file=file, force_terminal=True, color_system="standard").print("[red]a[/]")
    assert file.getvalue() == "\x1b[31ma\x1b[0m\n"
