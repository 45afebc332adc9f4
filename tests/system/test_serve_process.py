"""``fastlm serve`` as a process: its start and its refusals, an orderly end, a kill, and several of
them behind nginx.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import httpx
import pytest
from paths import ROOT
from serve_app import COMMAND, HTTP, ask, serve_process, tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.errors import InputError
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.monitor.window import read_feedback_rows, read_measurements
from fastlm.serve.uvicorn_server import listen
from fastlm.tokenizer.tokenizer import Tokenizer

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, tokenizer = tiny_model(4096)
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def body(**fields):
    return {"model": "tiny", "prompt": "The", "max_tokens": 3, **fields}


def test_refusals(folder, tmp_path):
    def refused(*options, **environment):
        completed = subprocess.run(
            [*COMMAND, *map(str, options)], capture_output=True, text=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        assert completed.returncode == 2, completed.stderr
        return completed.stderr.strip().splitlines()[-1]

    assert "host: expected API keys" in refused("-m", folder, "--host", "0.0.0.0")
    line = refused("-m", folder, "--kv-cache-dtype", "int4")
    assert line == "fastlm: kv_cache_dtype: expected float32, bfloat16, float16, int8, got 'int4'"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with pytest.raises(InputError, match=r"port: expected a free one on 127\.0\.0\.1"):
            listen("127.0.0.1", listener.getsockname()[1])
    serve = ["serve", "-m", str(folder), "--port", "0", "--num-blocks", "2000000000"]
    result = CliRunner().invoke(app, serve)
    assert (
        result.exit_code == 2 and "num_blocks: expected as many as fit the memory" in result.stderr
    )
    Tokenizer.train(["Another text."], 320).save(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copy(folder / "model.safetensors", tmp_path)
    serve = ["serve", "-m", str(folder), "--port", "0", "--draft-model", str(tmp_path)]
    result = CliRunner().invoke(app, serve)
    assert result.exit_code == 2
    assert "draft_model: expected one with the model's tokenizer, got" in result.stderr
    # without the extra: one line names the package to install
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(name='uvicorn')")
    line = refused("-m", folder, PYTHONPATH=str(tmp_path))
    assert line == (
        "fastlm: serve: expected the package uvicorn, not found: pip install 'fastlm[serve]'"
    )


def test_a_draft_model(folder):
    texts = []
    for options in ((), ("--draft-model", folder)):
        with serve_process("--model", folder, *options) as (_, url, _):
            answer = ask(url, body(max_tokens=60, ignore_eos=True, seed=1), "/v1/completions")
            texts.append(answer.json()["choices"][0]["text"])
            counters = HTTP.get(url + "/metrics").text
    assert texts[0] == texts[1]
    drafted, accepted = (
        float(re.search(rf"^fastlm_{name}_tokens_total (.*)$", counters, re.M)[1])
        for name in ("drafted", "accepted")
    )
    assert 30 < accepted <= drafted and "\nfastlm_draft_failures_total 0.0\n" in counters


def test_sigterm_lets_running_answers_end(folder, tmp_path):
    base = tmp_path / "f.sqlite"
    options = ("--drain", 60, "--num-blocks", 40, "--kv-cache-dtype", "int8", "--feedback", base)
    with (
        serve_process("--model", folder, *options) as (process, url, lines),
        ThreadPoolExecutor(1) as pool,
    ):
        (described,) = HTTP.get(url + "/v1/models").json()["data"]
        assert described["fastlm"]["context_limit"] == 40 * 64
        long = pool.submit(ask, url, body(max_tokens=1600, ignore_eos=True), "/v1/completions")
        running = re.compile(r"^fastlm_running 1\.0$", re.M)
        until = time.monotonic() + 60
        while not running.search(HTTP.get(url + "/metrics").text):
            assert time.monotonic() < until
        process.send_signal(signal.SIGTERM)
        assert long.result().json()["usage"]["completion_tokens"] == 1600
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.TransportError):
            HTTP.get(url + "/health")
    assert [file.name for file in tmp_path.iterdir()] == ["f.sqlite"]  # no write-ahead log remains
    with FeedbackStore(base) as store:
        assert len(read_measurements(store, 0, time.time() + 9)) == 1
    events = [line["event"] for line in lines]
    assert lines[0]["num_blocks"] == 40 and lines[0]["block_bytes"] == 64 * 2 * 2 * (16 + 4)
    assert events[-3:] == ["stopping", "request", "stopped"] and "uvicorn" not in events


def test_the_drain_time_ends_answers_with_an_error(folder):
    with (
        serve_process("--model", folder, "--drain", 0.2) as (process, url, _),
        ThreadPoolExecutor(2) as pool,
    ):
        request = body(max_tokens=4000, ignore_eos=True)
        future = pool.submit(ask, url, request, "/v1/completions")
        stream = pool.submit(ask, url, {**request, "stream": True}, "/v1/completions")
        while "fastlm_running 2.0" not in HTTP.get(url + "/metrics").text:
            pass
        process.send_signal(signal.SIGTERM)
        assert future.result().status_code == 503
        assert json.loads(stream.result().text.split("\n\n")[-2][6:])["error"]["code"] == "stopping"
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_a_kill_loses_nothing_acknowledged(folder, database_url):
    acknowledged, contents = [], {}

    def send_feedback(client, url, thread, i):
        feedback = {"response_id": f"{thread}-{i}", "comment": "x" * 500}
        if client.post(url + "/v1/feedback", json=feedback).status_code == 200:
            acknowledged.append(feedback["response_id"])

    def chat(client, url, thread, i):
        request = {
            "model": "tiny", "messages": [{"role": "user", "content": f"Hi {thread}"}],
            "structured_outputs": {"regex": "[a-z]{8}"},  # nothing that is scrubbed
            "store": True, "stream": thread == 4,
        }  # fmt: skip
        response = client.post(url + "/v1/chat/completions", json=request)
        if not request["stream"]:
            completion = response.json()
            contents[completion["id"]] = completion["choices"][0]["message"]["content"]
        elif response.text.endswith("data: [DONE]\n\n"):  # otherwise the stream is incomplete
            events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-2]]
            pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
            contents[events[0]["id"]] = "".join(pieces)

    def repeat(act, *args):
        with httpx.Client(timeout=60) as client, suppress(httpx.TransportError):
            for i in range(10_000):
                act(client, *args, i)

    with (
        serve_process("--model", folder, "--feedback", database_url) as (process, url, _),
        ThreadPoolExecutor(5) as pool,
    ):
        for thread, act in enumerate((send_feedback, send_feedback, send_feedback, chat, chat)):
            pool.submit(repeat, act, url, thread)
        until = time.monotonic() + 300
        while len(acknowledged) < 60 or len(contents) < 10:
            assert time.monotonic() < until
            time.sleep(0.01)
        process.kill()
    with FeedbackStore(database_url) as store:
        stored = {feedback.response_id for feedback in store.all_feedback()}
        stored_contents = {
            id: answer.choices[0][0]["content"] for id, answer in store.responses().items()
        }
    assert set(acknowledged) <= stored
    assert contents == {id: stored_contents.get(id) for id in contents}


@pytest.mark.skipif(not shutil.which("nginx"), reason="expected nginx (Debian: nginx), not found")
def test_replicas_behind_nginx(folder, tmp_path):
    """Use the configuration of docs/serving-operation.md."""
    base = tmp_path / "feedback.sqlite"
    with ExitStack() as stack:
        both = [
            stack.enter_context(serve_process("--model", folder, "--feedback", base))
            for _ in range(2)
        ]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        text = (DOCS / "serving-operation.md").read_text()
        (block,) = re.findall(r"```nginx\n(.*?)```", text, re.S)
        for name, (_, url, _) in zip(("8001", "8002"), both):
            assert f"127.0.0.1:{name}" in block
            block = block.replace(f"127.0.0.1:{name}", url.removeprefix("http://"))
        block = block.replace("listen 127.0.0.1:8000", f"listen 127.0.0.1:{port}")
        conf = tmp_path / "nginx.conf"
        conf.write_text(
            f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/errors;\nevents {{}}\n"
            f"http {{ access_log off; client_body_temp_path {tmp_path}/body;\n{block} }}\n"
        )
        nginx = subprocess.Popen(["nginx", "-p", str(tmp_path), "-c", str(conf)])
        stack.callback(nginx.wait)
        stack.callback(nginx.terminate)
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 30
        while True:
            try:
                HTTP.get(url + "/ready")
                break
            except httpx.TransportError:
                assert time.monotonic() < until
                time.sleep(0.05)
        texts = {
            ask(url, body(temperature=0), "/v1/completions").json()["choices"][0]["text"]
            for _ in range(4)
        }
        assert len(texts) == 1
        events = ask(url, body(stream=True), "/v1/completions")
        assert events.text.endswith("data: [DONE]\n\n")
        for i in range(6):
            feedback = {"response_id": f"r{i}", "thumb": "up"}
            assert ask(url, feedback, "/v1/feedback").status_code == 200

        def counts():  # a line of the log follows its response
            return [sum(line.get("path") == "/v1/feedback" for line in log) for _, _, log in both]

        while sum(counts()) < 6:
            assert time.monotonic() < until + 60
            time.sleep(0.05)
        assert min(counts()) > 0
        both[0][0].kill()  # the other takes over
        both[0][0].wait()
        answers = [ask(url, body(), "/v1/completions").status_code for _ in range(4)]
        assert answers == [200] * 4
    with FeedbackStore(base) as store:
        assert len(store.all_feedback()) == 6


def test_files_of_metrics_and_alerts(folder, tmp_path):
    """The files are used, and a wrong file ends the command with an error that names the line."""
    metrics, alerts = tmp_path / "metrics.toml", tmp_path / "alerts.toml"
    for file, table in ((metrics, "metric"), (alerts, "alert")):
        text = (DOCS / "serving-feedback.md").read_text()
        (block,) = (b for b in re.findall(r"```toml\n(.*?)```", text, re.S) if f"[[{table}]]" in b)
        file.write_text(block)
    alerts.write_text(alerts.read_text() + '[[alert]]\nname = "unsolved"\nmetric = "solved"\n'
                      'below = 0.5\nwindow = "1d"\n')  # fmt: skip
    base = tmp_path / "f.sqlite"
    options = ("--feedback", base, "--metrics", metrics, "--alerts", alerts)
    with serve_process("--model", folder, *options) as (process, url, log):
        (listening,) = (line for line in log if line["event"] == "listening")
        assert listening["kv_cache_dtype"] == "float32"
        ratings = HTTP.get(url + "/v1/models/tiny").json()["fastlm"]["metrics"]
        assert [item["name"] for item in ratings] == ["stars", "solved"]
        dashboard = HTTP.get(url + "/dashboard/data").json()
        names = [item["name"] for item in dashboard["alerts"]]
        assert names == ["refuses too often", "slow", "unsolved"]
        assert dashboard["drift"]["reference"] == "2026-11-01 to 2026-11-08"
        completion = ask(url, body(), "/v1/completions").json()
        ask(url, {"response_id": completion["id"], "metrics": {"stars": 5}}, "/v1/feedback")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    with FeedbackStore(base) as store:  # the last measures were written at the end
        (feedback,) = read_feedback_rows(store, 0, time.time() + 9)
        assert (feedback.model, feedback.kind, feedback.value) == ("tiny", "metrics.stars", 5.0)
    alerts.write_text("[[alert]]\nname = 1\n")
    for case_options, message in (
        (options, "alerts.toml line 2: name: expected a string, got 1"),
        (("--alerts", alerts), "alerts: needs --feedback, got none"),
    ):
        arguments = ["serve", "--model", str(folder), "--port", "0", *map(str, case_options)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 2 and message in done.stderr, (done.stderr, done.exception)
