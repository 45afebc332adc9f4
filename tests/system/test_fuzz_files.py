"""A few seconds of `fuzz_files.py`, in a process of its own: a crash or a limit ends only that."""

import os
import re
import subprocess
import sys

from paths import SUPPORT


def test_damaged_files_are_read_or_refused():
    script = SUPPORT / "fuzz_files.py"
    done = subprocess.run(
        [sys.executable, str(script), "--seconds", "3"],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"([\d,]+) files, 0 failed", done.stdout)[0].replace(",", "")) > 50
    assert re.search(r"refused", done.stdout) and re.search(r"fine", done.stdout)
