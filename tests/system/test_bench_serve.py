"""bench/serve/: the measurements of its clients, on a tiny model and on wrong servers."""

import asyncio
import json
import os
import random
import re
import sys
import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import serve
import serve_tables
import servers
import soak_clients
from serve_app import serve_model, tiny_model
from traffic import (
    CONTEXT,
    NEW_TOKENS,
    PROMPT_WORDS,
    Load,
    arrivals,
    closed_loop,
    open_loop,
    parse_event,
    percentile,
    random_body,
)

from fastlm.serve.feedback_store import FeedbackStore


def test_percentiles_interpolate():
    assert percentile([3.0, 1.0], 99) == pytest.approx(2.98)
    assert percentile(list(range(101)), 99) == 99 and percentile([7.0], 50) == 7.0
    assert percentile([], 99) != percentile([], 99)


def test_arrivals_are_a_poisson_process():
    times = arrivals(50, 200, 1)
    assert times == arrivals(50, 200, 1) != arrivals(50, 200, 2)
    assert times == sorted(times) and 0 < times[0] and times[-1] < 200
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    # of 10,000 exponential gaps, whose spread is their mean
    assert mean == pytest.approx(1 / 50, rel=0.05) and spread == pytest.approx(mean, rel=0.05)


def test_no_prompt_is_sent_twice():
    seeds = serve.Seeds()
    draws = chain.from_iterable((random.Random(start + i) for i in range(3)) for start in
                                (seeds(), seeds()))  # fmt: skip
    bodies = [random_body(draw, "m") for draw in draws for _ in range(50)]
    prompts = [body["messages"][0]["content"] for body in bodies]
    assert len(set(prompts)) == len({body["seed"] for body in bodies}) == len(bodies)
    words = [len(prompt.split()) for prompt in prompts]
    assert PROMPT_WORDS[0] <= min(words) < max(words) <= PROMPT_WORDS[1]
    assert max(words) + NEW_TOKENS[1] + 40 < CONTEXT


def test_a_line_of_a_stream():
    assert parse_event('data: {"choices": []}') == {"choices": []}
    assert parse_event("data: [DONE]") is parse_event("") is parse_event(": ping") is None


def test_commands(monkeypatch):
    monkeypatch.setattr(servers, "llama_cpp", lambda program: f"/bin/{program}")
    words = servers.server_command("llama-server", "m.gguf", 81, 2, slots=4)
    assert words[0] == "/bin/llama-server"
    options = dict(zip(words[-10::2], words[-9::2]))
    expected = {"--model": "m.gguf", "--port": "81", "-t": "2", "-np": "4", "-c": str(4 * CONTEXT)}
    assert options == expected
    ours = " ".join(servers.server_command("fastlm", "m.gguf", 81, 2, slots=4))
    assert ours.endswith("--name model --model m.gguf --port 81 --threads 2 --max-num-seqs 4")
    assert "-np" not in servers.server_command("llama-server", "m.gguf", 81, 2)


def test_a_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serve, "llama_cpp", lambda program: None)
    assert serve.peer_servers("none", "m.gguf") == [] and not capsys.readouterr().out
    assert serve.peer_servers(None, "m.gguf") == []
    assert "llama-server is skipped: sh bench/peers/llama_cpp.sh" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match=r"--peer llama-server: sh bench/peers/llama_cpp.sh builds it"
    ):
        serve.peer_servers("llama-server", "m.gguf")
    monkeypatch.setattr(serve, "llama_cpp", lambda program: program)
    assert serve.peer_servers(None, "m.gguf") == ["llama-server"]
    with pytest.raises(SystemExit, match="it reads GGUF, not folder"):
        serve.peer_servers("llama-server", "folder")


@contextmanager
def fake_server(answer):
    """Run a server; yield it and the bodies that it gets. `answer(body)` returns a status and the
    events of a stream.
    """
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            status, events = answer(bodies[-1])
            self.send_response(status)
            self.end_headers()
            for event in events:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield servers.Server(f"http://127.0.0.1:{http.server_port}/v1/", 0), bodies
        finally:
            http.shutdown()
            thread.join()


def stream(body, *, short=0, prompt=40):
    pieces = ["", "a", "b"]  # the first has a role alone
    events = [{"choices": [{"delta": {"content": piece}}]} for piece in pieces]
    usage = {"completion_tokens": body["max_tokens"] - short, "prompt_tokens": prompt}
    usage["prompt_tokens_details"] = {"cached_tokens": 10}
    return [*events, {"choices": [], "usage": usage}]


def test_client_measurements():
    with fake_server(lambda body: (200, stream(body))) as (server, bodies):
        load = asyncio.run(open_loop(server.url, "m", 100, 0.1, seed=3))
    count = len(arrivals(100, 0.1, 3))
    assert count == len(bodies) == load.done == len(load.first) == len(load.between) > 3
    assert all(body["ignore_eos"] and body["temperature"] == 0.8 for body in bodies)
    assert load.tokens == sum(body["max_tokens"] for body in bodies) and not load.faults
    assert load.figures()["cached_share"] == 0.25
    assert load.figures()["tokens_per_piece"] == load.tokens / (2 * count)
    total = Load()
    total.add(load), total.add(load)
    assert (total.done, total.tokens) == (2 * count, 2 * load.tokens)


@pytest.mark.parametrize(
    ("answer", "fault"),
    (
        (lambda body: (200, stream(body, short=3)), "an answer of [0-9]+ tokens, expected"),
        (lambda body: (200, stream(body)[:-1]), "the stream had no usage"),
        (lambda body: (200, [{"error": "broken"}]), "event: broken"),
        (lambda body: (429, [{"error": "full"}]), "429: data:.*full"),
    ),
)
def test_a_wrong_answer_is_a_fault(answer, fault):
    with fake_server(answer) as (server, bodies):
        load = asyncio.run(open_loop(server.url, "m", 100, 0.05, seed=3))
    assert len(load.faults) == len(bodies) > 1
    assert all(re.search(fault, message) for message in load.faults)


def test_other_work_is_a_fault():
    ours, theirs = Load(prompts={1: 40, 2: 50}), Load(prompts={2: 51, 3: 60}, faults=["slow"])
    assert serve.all_faults({"a": [ours], "b": [ours]}) == []
    assert serve.all_faults({"a": [ours], "b": [theirs]}) == [
        "b: slow", "b: a prompt of 51 tokens, 50 before",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    model, tokenizer = tiny_model(2048)
    store = FeedbackStore(tmp_path_factory.mktemp("soak") / "feedback.sqlite")
    with store, serve_model(model, tokenizer, feedback=store) as (url, _):
        yield servers.Server(f"{url}/v1/", 0, "tiny")


def test_load_and_arrivals_on_a_tiny_model(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "WARM_UP", 0.05)
    monkeypatch.setattr(serve, "CAPACITY_CLIENTS", 3)
    sides = {"fastlm": lambda slots: nullcontext(tiny), "other": lambda slots: nullcontext(tiny)}
    seeds = serve.Seeds()
    rows, faults = serve.measure_load(sides, [1, 2], 0.2, 1, seeds)
    assert not faults and all(rows[name]["2"]["requests"] >= 2 for name in sides)
    row = rows["fastlm"]["1"]
    assert row["first_token_p50"] + row["between_tokens_p50"] < row["latency_p99"]
    poisson, faults = serve.poisson_load({"fastlm": sides["fastlm"]}, 0.5, 0.3, seeds)
    assert not faults
    result = poisson["fastlm"]
    assert result["rate"] == 0.5 * result["capacity"]["requests_per_second"]
    serve_tables.plot(rows, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:4] == b"\x89PNG"
    cold = {"chat": {"fastlm": {"seconds": 0.5, "all": [0.5]}, "x": {"seconds": 1.0, "all": [1.0]}}}
    lines = serve_tables.tables({"serve": rows, "poisson": poisson, "cold": cold}).splitlines()
    assert sum(line.startswith(("| 1 |", "| 2 |")) for line in lines) == 4
    assert lines[-1] == "| chat | x | 1.00 s | 1.00 | 0.50x |"
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_misbehaving_clients_on_a_tiny_model(tiny, monkeypatch):
    server = servers.Server(tiny.url, os.getpid(), tiny.model)
    assert not serve.cache_is_used(server.url)  # its cache is large
    monkeypatch.setattr(serve, "cache_is_used", lambda url: True)
    result = serve.soak(server, 2, 0.2, serve.Seeds())
    assert result["faults"] == 0, result["first_faults"]
    assert (
        sum(result["outcomes"].values()) >= 20
        and result["outcomes"]["complete"] <= result["requests"]
    )
    assert any(kind.startswith("malformed, 4") for kind in result["outcomes"])
    assert result["cached_share"] > 0.1  # the text that half of the prompts begin with
    assert len(result["memory_mib"]) == 10 and min(result["memory_mib"]) > 0


def test_requests_of_a_soak():
    draw = random.Random(5)
    turns = [soak_clients.random_request(draw, "m", f"m{i}x") for i in range(400)]

    def share(expected):
        return sum(map(expected, turns)) / len(turns)

    text = [json.dumps(turn.body.get("prompt") or turn.body["messages"]) for turn in turns]
    assert all(f"m{i}x" in prompt and f"m{i}x" in turns[i].prefix for i, prompt in enumerate(text))
    assert share(lambda t: soak_clients.SYSTEM in json.dumps(t.body)) == pytest.approx(
        0.5, abs=0.08
    )
    assert share(lambda t: not t.body.get("stream")) == pytest.approx(0.2, abs=0.07)
    assert share(lambda t: t.path == "completions") == pytest.approx(0.2, abs=0.07)
    assert share(lambda t: t.body.get("n") == 2) == pytest.approx(0.125, abs=0.06)
    assert share(lambda t: "tools" in t.body) == pytest.approx(0.1, abs=0.05)
    longest = max(len(prompt.split()) for prompt in text)
    assert longest + soak_clients.TOOL_TOKENS < serve.SOAK_BLOCKS * 64 / 2


def test_an_answer_for_another_client_is_a_fault(tiny, monkeypatch):
    right = soak_clients.random_request

    def wrong(draw, model, marker):
        turn = right(draw, model, marker)
        return replace(turn, prefix=turn.prefix.replace(marker, marker + "7"))

    monkeypatch.setattr(soak_clients, "random_request", wrong)
    load = asyncio.run(
        closed_loop(tiny.url, tiny.model, 8, 0, seed=11_000, turn=soak_clients.take_turn)
    )
    kinds = load.outcomes["complete"] + load.outcomes["disconnected"]
    assert kinds >= 4 and load.outcomes["complete"] <= len(load.faults) <= kinds
    assert all(fault.startswith("crossed") for fault in load.faults), load.faults


def test_a_cold_server_gets_requests_until_it_answers(monkeypatch):
    statuses = iter([503, 503, 200])
    with fake_server(lambda body: (next(statuses), stream(body))) as (server, bodies):
        port = int(server.url.split(":")[2].split("/")[0])
        process = SimpleNamespace(poll=lambda: None, terminate=lambda: None, wait=lambda s: 0)
        monkeypatch.setattr(servers, "free_port", lambda: port)
        monkeypatch.setattr(servers.subprocess, "Popen", lambda *_, **options: process)
        assert 0 < servers.cold_chat("llama-server", "m.gguf", 1) < 60
    assert len(bodies) == 3 and bodies[0]["max_tokens"] == 8


def test_cold_starts_take_turns(monkeypatch, tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"x")
    times = iter([1.0, 5.0, 3.0, 4.0, 2.0, 9.0])
    monkeypatch.setattr(servers, "cold_chat", lambda name, model, threads: next(times))
    results = servers.measure_cold_starts({"chat": ["a", "b"]}, str(tmp_path / "m.gguf"), 1, 3)
    assert results["chat"]["a"] == {"seconds": 2.0, "all": [1.0, 3.0, 2.0]}
    assert results["chat"]["b"]["seconds"] == 5.0


def test_a_server_that_does_not_start(monkeypatch):
    command = [sys.executable, "-c", "import sys; sys.exit('first\\nno such model')"]
    monkeypatch.setattr(servers, "server_command", lambda *_: command)
    with pytest.raises(SystemExit, match=r"fastlm: expected it ready .*, exit 1: no such model"):
        with servers.running_server("fastlm", "m.gguf", 1, 1):
            pass
