"""Fixtures for tests of stages, servers, browsers, several processes and builds."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def postgresql():
    """Start a PostgreSQL server that only a socket reaches, and return its URL."""
    from fastlm.errors import InputError
    from fastlm.serve.feedback_store import FeedbackStore

    programs = Path("/usr/lib/postgresql").glob("*/bin/initdb")
    initdb = next(iter(sorted(programs, reverse=True)), None)
    if initdb is None:
        pytest.skip("expected PostgreSQL (Debian: postgresql), not found")
    folder = Path(tempfile.mkdtemp(prefix="fastlm-pg-"))  # other users cannot read pytest's folders
    folder.chmod(0o755)
    data, other = folder / "data", {}
    data.mkdir()
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(data, "postgres")
        other = {"user": "postgres", "group": "postgres", "extra_groups": []}
    initialize = [initdb, "-D", data, "-U", "postgres", "--no-sync", "--auth=trust"]
    subprocess.run(initialize, check=True, capture_output=True, cwd=data, **other)
    options = ["-c", "listen_addresses=", "-k", data, "-c", "fsync=off"]
    command = [initdb.with_name("postgres"), "-D", data, *options]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=data, **other)
    url = f"postgresql://postgres@/postgres?host={data}"
    until = time.monotonic() + 120
    while True:
        try:
            FeedbackStore(url).close()
            break
        except InputError:
            assert time.monotonic() < until and server.poll() is None
            time.sleep(0.05)
    yield url
    server.send_signal(signal.SIGQUIT)
    server.wait()
    shutil.rmtree(folder)


@pytest.fixture(params=("sqlite", "postgresql"))
def database_url(request, tmp_path):
    """Return the URL of a database for feedback, on SQLite and on PostgreSQL."""
    if request.param == "sqlite":
        yield str(tmp_path / "feedback.sqlite")
        return
    from fastlm.serve.feedback_store import FeedbackStore

    url = request.getfixturevalue("postgresql")
    yield url
    with FeedbackStore(url) as store, store.write() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
