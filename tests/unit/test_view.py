"""What a command shows of a training: one line that is redrawn on a terminal, lines elsewhere."""

import io
import os
import re
import time
from dataclasses import replace

import pytest
import tiny_run
from tiny_run import OPTIONS, start

from fastlm.pipeline import events
from fastlm.pipeline.events import View

pytestmark = pytest.mark.usefixtures("one_thread")


class Terminal(io.StringIO):
    """A terminal that keeps what its lines have held."""

    def __init__(self) -> None:
        super().__init__()
        self.lines, self.drawn = [""], []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for part in re.split(r"(\r\x1b\[K|\n)", text):
            if part == "\r\x1b[K":
                self.lines[-1] = ""
            elif part == "\n":
                self.lines.append("")
            else:
                self.lines[-1] += part
                self.drawn += [self.lines[-1]] if part else []
        return len(text)


def step(number: int, seconds: float, progress: float, loss: float = 4.0) -> dict[str, object]:
    return {
        "step": number, "loss": loss, "lr": 3e-3, "tokens_per_second": 900.0, "seconds": seconds,
        "progress": progress,
    }  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    return folder


def test_a_terminal_has_one_line_for_the_steps(data, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(events, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    view = View(10, terminal)
    view({"stage": "base", "state": "started"})
    start(data, tmp_path, OPTIONS, track=view.track, on_event=view)
    live = [re.sub(r"[\d.,]+ s left", "T", line) for line in terminal.drawn]
    steps = {
        int(match[1])
        for line in live
        if (match := re.fullmatch(
            r"base: step (\d+) of 24 \(\d+%\), loss \d\.\d+, lr [\d.e-]+, [\d,]+ tokens/s, T", line
        ))
    }  # fmt: skip
    assert steps == set(range(1, 25))
    lines = [re.sub(r" [\d.]+, .*|: '.*", "", line) for line in terminal.lines]
    validations = [f"step {n}: held-out loss" for n in (0, 6, 12, 18, 24)]
    wrote = [f"step {n} writes" for n in (0, 12, 24)]
    assert lines == [
        "base: started", validations[0], wrote[0], validations[1], validations[2], wrote[1],
        validations[3], validations[4], wrote[2], "",
    ]  # fmt: skip

    # resumed: the steps are those of the whole training
    terminal = Terminal()
    view = View(10, terminal)
    longer = replace(OPTIONS, max_steps=30)
    start(data, tmp_path, longer, track=view.track, on_event=view)
    assert any(line.startswith("step 25 of 30 (83%), ") for line in terminal.drawn)


def test_the_line_fits_and_names_the_rank_and_gives_way(monkeypatch) -> None:
    monkeypatch.setattr(events, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    terminal = Terminal()
    view = View(stream=terminal)
    for _ in view.track(range(1), "training", total=None, unit="s"):
        view(step(3, 30.0, 0.25))
        assert terminal.lines == ["rank 0 of 4: step 3 (25%), loss 4, lr 0.0"[:39]]
        view({"warning": "look"})
        assert terminal.lines == ["warning: look", "rank 0 of 4: step 3 (25%), loss 4, lr 0.0"[:39]]
    assert terminal.lines == ["warning: look", ""]
    view({"info": "done"})
    assert terminal.lines == ["warning: look", "done", ""]
    monkeypatch.setenv("TERM", "dumb")
    assert not View(stream=Terminal()).live


def test_mean_speed_and_time_left_are_of_the_last_steps(monkeypatch) -> None:
    monkeypatch.setattr(events, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    view = View(stream=terminal)
    view(step(1, 1000.0, 0.1, 9.0))  # resumed: the earlier steps were slow
    for i in range(2, 25):
        view(step(i, 1000.0 + i, 0.1 + i / 100, float(i)))
    assert terminal.drawn[-1] == (
        "step 24 (34%), loss 14.5, lr 0.003, 900 tokens/s, 1 min 06 s left"
    )


def test_elsewhere_lines_come_at_intervals(monkeypatch, capsys) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    view = View()
    assert not view.live
    for i in range(1, 8):
        clock[0] += 11.0
        view(step(i, 11.0 * i, i / 10))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 3", "step 6"]
    assert lines[0] == "step 3: training loss 4, lr 0.003, 900 tokens/s, 1 min 17 s left"
    assert "\x1b" not in "".join(lines) and os.linesep not in lines[0]
