"""Comparing all documents: what a process holds open while it does."""

import os

import numpy as np
import pytest

from fastlm.data import matching
from fastlm.data.unit_files import rows_of_unit, save_rows
from fastlm.pipeline.units import Work


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files by /proc")
def test_candidates_from_many_units_need_few_open_files(tmp_path, monkeypatch):
    """A mapped file holds a descriptor. Each unit has three files, and many systems allow 1,024."""
    monkeypatch.setattr(matching, "MAX_MAPPED_UNITS", 4)
    work = Work(tmp_path)
    (tmp_path / "shingles").mkdir()
    for unit in range(40):
        arrays = {"positions": [3, 5], "ends": [2, 5], "shingles": [unit, 1, 2, unit + 7, 9]}
        for name, values in arrays.items():
            np.save(work.path("shingles", unit, f"{name}.npy"), np.array(values, np.uint64))
    files = matching._ShingleFiles(work)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for unit in range(40):
            assert files[unit << 32 | 3].tolist() == [unit, 1]
            assert files[unit << 32 | 5].tolist() == [2, unit + 7, 9]
    assert len(os.listdir("/proc/self/fd")) <= before + 3 * 4


def test_rows_of_a_unit_come_from_all_units_of_the_step(tmp_path):
    work = Work(tmp_path)
    work.begin({})
    work.begin_step("exact", units=2)
    documents = [[0, 7, 1 << 32, 3 << 32], [5, (1 << 32) + 2, (2 << 32) - 1]]
    for number, values in enumerate(documents):
        out = tmp_path / str(number)
        out.mkdir()
        save_rows(out, "duplicates", np.array(values, "<u8"), np.arange(len(values)))
        os.rename(out / "duplicates.npy", work.path("exact", number, "duplicates.npy"))

    def rows(unit):
        return rows_of_unit(work, "exact", "duplicates", unit)[:, 0].tolist()

    assert rows(0) == [0, 7, 5]
    assert rows(1) == [1 << 32, (1 << 32) + 2, (2 << 32) - 1]
    assert rows(2) == [] and rows(3) == [3 << 32]
