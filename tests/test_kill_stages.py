"""Some of what `make kill` does: commands killed at random moments come to the same end."""

import kill_stages
import pytest


@pytest.mark.parametrize("case, kills", [("shards", 6), ("dpo", 3)])
def test_killed_and_started_again(case: str, kills: int) -> None:
    told: list[str] = []
    assert kill_stages.torment_all([case], kills, 0, told.append) == []
    assert f"{case}: {kills} kills" in told[-1]


def test_differences_are_seen() -> None:
    same = {"a.json": [{"loss": 1.0, "steps": [1, 2]}], "model": b"1"}
    assert kill_stages.difference(same, dict(same)) == ""
    other = {**same, "a.json": [{"loss": 1.0, "steps": [1, 3]}]}
    told = "a.json differs: [0].steps[1] wanted 2, got 3"
    assert kill_stages.difference(same, other) == told
    assert kill_stages.difference(same, {**same, ".model.part": b""}) == (
        ".model.part should not be there"
    )
    assert kill_stages.difference({**same, "x": b""}, same) == "x is missing"
    assert kill_stages.timeless([{"load": "1", "seconds": 2.0, "loss": 3.0}]) == [{"loss": 3.0}]
