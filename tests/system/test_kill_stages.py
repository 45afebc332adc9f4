"""A part of `make kill`: commands that are killed at random moments have the same result."""

import sqlite3
from pathlib import Path

import kill_stages
import pytest


@pytest.mark.parametrize("case, kills", [("shards", 6), ("dpo", 3)])
def test_killed_and_started_again(case: str, kills: int) -> None:
    lines: list[str] = []
    assert kill_stages.run_cases([case], kills, 0, lines.append) == []
    assert f"{case}: {kills} kills" in lines[-1]


def test_differences_are_reported() -> None:
    same = {"a.json": [{"loss": 1.0, "steps": [1, 2]}], "model": b"1"}
    assert kill_stages.difference(same, dict(same)) == ""
    other = {**same, "a.json": [{"loss": 1.0, "steps": [1, 3]}]}
    message = "a.json differs: [0].steps[1] expected 2, got 3"
    assert kill_stages.difference(same, other) == message
    assert kill_stages.difference(same, {**same, ".model.part": b""}) == (
        ".model.part should not be there"
    )
    assert kill_stages.difference({**same, "x": b""}, same) == "x is missing"
    assert kill_stages.timeless([{"machine_load": "1", "seconds": 2.0, "loss": 3.0}]) == [
        {"loss": 3.0}
    ]


def test_databases_are_compared_without_random_ids_and_times(tmp_path: Path) -> None:
    def database_content(name: str, ids: list[str], time: str, thumb: str = "up") -> object:
        with sqlite3.connect(tmp_path / name) as store:
            store.execute("CREATE TABLE fastlm_feedback (id TEXT, over TEXT, thumb TEXT, at TEXT)")
            store.execute("CREATE TABLE fastlm_measurements (id TEXT, seconds FLOAT)")
            for id in ids:
                row = (f"chatcmpl-{id}", f'[["chatcmpl-{ids[0]}", 1]]', thumb, time)
                store.execute("INSERT INTO fastlm_feedback VALUES (?, ?, ?, ?)", row)
                store.execute("INSERT INTO fastlm_measurements VALUES (?, ?)", (id, len(name) / 7))
        return kill_stages.content(tmp_path / name, "out")

    content = database_content("one.db", ["a1", "b2"], "2026-11-28T19:35:56+00:00")
    assert content == database_content("another.db", ["c3", "d4"], "2026-11-29T00:00:00.5+00:00")
    assert content != database_content("same.db", ["a1", "a1"], "2026-11-28T19:35:56+00:00")
    assert content != database_content("down.db", ["a1", "b2"], "2026-11-28T19:35:56+00:00", "down")
