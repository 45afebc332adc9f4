"""bench/data.py: the bars of the data stage; bench/corpus: how processes and units are counted."""

import importlib.util
import json
import sys

import pytest
from paths import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(f"bench_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path, monkeypatch):
    """bench/data.py with two topics of its own, of which one fails."""
    module = load(ROOT / "bench" / "data.py")
    row = {"bar": "a | b", "value": 3, "target": None, "unit": "pages", "note": ""}
    (tmp_path / "good.py").write_text(f"def rows():\n    return [{row!r}]\n")
    (tmp_path / "bad.py").write_text("def rows():\n    raise ValueError('no pages')\n")
    (tmp_path / "helper.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(module, "CORPUS", tmp_path)
    return module


def test_a_failure_is_a_row_and_others_are_stored(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    data.save(out, {"older": {"rows": [], "load": 1.0}, "good": {"rows": [], "load": 2.0}})
    monkeypatch.setattr(sys, "argv", ["data.py", "--json", str(out)])
    with pytest.raises(SystemExit, match="1"):
        data.main()
    stored = json.loads(out.read_text())["topics"]
    assert stored.keys() == {"older", "good", "bad"}
    assert stored["good"]["rows"][0]["value"] == 3 and not stored["good"]["failed"]
    assert "no pages" in stored["bad"]["rows"][0]["note"]
    lines = capsys.readouterr().out.splitlines()
    assert "| a / b | 3 | - | pages |  |" in lines
    assert json.loads(lines[-1])["topics"].keys() == {"good", "bad"}


def test_topics_are_the_files_with_rows(data, monkeypatch, capsys):
    assert data.topics() == ["bad", "good"]
    monkeypatch.setattr(sys, "argv", ["data.py", "helper"])
    with pytest.raises(SystemExit):
        data.main()
    assert "topic: expected one of bad, good, got 'helper'" in capsys.readouterr().err


def test_time_and_memory_of_child_processes_count():
    processes = load(ROOT / "bench" / "corpus" / "processes.py")
    work = "import time\nx = bytearray(60 << 20)\nwhile time.process_time() < 0.7: pass\n"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {work!r}], check=True)"
    usage = processes.run_command([sys.executable, "-c", parent], sample_memory=True)
    assert usage.cpu_seconds > 0.7 and usage.memory > 60 << 20
    with pytest.raises(processes.CommandError, match="exit code 3"):
        processes.run_command([sys.executable, "-c", "raise SystemExit(3)"])


def test_units_that_are_done_again_are_counted(tmp_path):
    units = load(ROOT / "bench" / "corpus" / "logged_units.py")
    log = tmp_path / "log"
    log.write_text(
        "begin read 0\nbegin read 1\nend read 0 0.5\nbegin read 1\nend read 1 0.25\nbegin read 0\n"
    )
    assert units.repeated_units(log) == (2, 2, 1)
    assert units.unit_seconds(log) == {"read": [0.5, 0.25]}
