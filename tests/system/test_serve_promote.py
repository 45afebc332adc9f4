"""``fastlm serve`` as a process whose model changes: the commands promote and rollback, a kill, and
what is refused at the start.
"""

import json
import threading
import time

import pytest
from canary_app import model_folders
from serve_app import HTTP, ask, serve_model, serve_process, tiny_model
from typer.testing import CliRunner

from fastlm.cli import app

KEY, ADMIN = "client-key-0123456", "admin-key-01234567"


def call(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_commands_and_a_kill(tmp_path):
    models = model_folders(tmp_path / "models", "abc")
    keys, admin_keys = tmp_path / "keys", tmp_path / "admin_keys"
    keys.write_text(KEY)
    admin_keys.write_text(ADMIN)
    state = tmp_path / "state.json"
    options = (
        "--model", models["a"], "--name", "tiny", "--models-dir", tmp_path / "models", "--state",
        state, "--api-key-file", keys, "--admin-key-file", admin_keys,
    )  # fmt: skip

    def answers(url):
        body = {"model": "tiny", "prompt": "The", "max_tokens": 3}
        response = ask(url, body, "/v1/completions", authorization=f"Bearer {KEY}")
        assert response.status_code == 200, response.text
        return response.json()["model"]

    with serve_process(*options) as (process, url, _):
        to = ("--server", url, "--api-key", ADMIN)
        first = answers(url)
        result = call("promote", models["b"], "--server", url, "--api-key", KEY)
        assert result.exit_code == 2 and "expected an admin key" in result.stderr
        result = call("rollback", *to)
        assert result.exit_code == 2
        assert "rollback: refused: expected a promotion to undo, got none" in result.stderr
        result = call("promote", models["b"], *to)
        assert result.exit_code == 0, result.stderr
        result_again = call("promote", models["b"], *to)
        refusal = f"model: expected one that can be served, got: {models['b']}, which is"
        assert result_again.exit_code == 2 and refusal in result_again.stderr
        second = answers(url)
        assert result.stdout == f"{models['b']} answers as {second}\n" and second != first
        assert call("rollback", *to).exit_code == 0 and answers(url) == first
        result = call("rollback", *to)  # not forward again
        assert result.exit_code == 2 and "expected a promotion to undo" in result.stderr
        status = json.loads(call("promote", "c", *to, "--json").stdout)  # below --models-dir
        assert status["path"] == str(models["c"]) and status["previous"] == str(models["a"])
        # killed while models change
        changing = threading.Thread(
            target=lambda: [call("promote", "abc"[i % 3], *to) for i in range(50)]
        )
        changing.start()
        before = len(json.loads(state.read_text())["decisions"])
        while len(json.loads(state.read_text())["decisions"]) < before + 3:
            time.sleep(0.001)
        process.kill()
        process.wait()
        changing.join()
        current = json.loads(state.read_text())["current"]
        result = call("promote", "a", *to)
        assert result.exit_code == 2 and f"expected `fastlm serve` at {url}" in result.stderr
    with serve_process(*options) as (_, url, _):
        assert answers(url) == f"tiny@{current['digest'][:8]}"
        status = HTTP.get(url + "/v1/canary", headers={"authorization": f"Bearer {ADMIN}"}).json()
        assert status["path"] == current["path"]
    result = call("promote", "x", "--server", "file:///etc/passwd")
    assert result.exit_code == 2 and "server: expected http://HOST:PORT" in result.stderr


@pytest.mark.parametrize(
    "options, message",
    [
        (("--canary", "b"), "canary: expected --feedback"),
        (("--models-dir", "."), "state: expected a file"),
        (("--admin-key-file", "keys"), "admin_key_file: expected API keys, too"),
        (("--canary", "b", "--feedback", "x", "--canary-share", "1.5"), "canary_share: expected a"),
        (("--canary", "b", "--feedback", "x", "--canary-metric", "fun"), "canary_metric: expected"),
        (("--canary", "b", "--feedback", "x", "--canary-rule", "x"), "canary_rule: expected super"),
    ],
)
def test_refusals(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text(ADMIN)
    result = call("serve", "-m", "a", *options)
    assert result.exit_code == 2 and message in result.stderr


def test_a_server_without_changes_has_no_admin_paths(tmp_path):
    with serve_model(*tiny_model()) as (url, _):
        result = call("promote", "x", "--server", url)
        assert result.exit_code == 2 and "the server changes no models" in result.stderr
        assert HTTP.get(url + "/v1/canary").status_code == 404
