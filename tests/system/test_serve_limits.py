"""The server's limits: keys, sizes and times; clients that disconnect or are slow; requests that
fail; the log and the metrics.
"""

import contextlib
import http.client
import importlib.metadata
import json
import re
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from serve_app import HTTP, ask, serve_model, tiny_model

import fastlm.serve
from fastlm.checkpoint.config import ModelConfig
from fastlm.errors import InputError
from fastlm.inference.requests import EngineClosed, QueueFull
from fastlm.model.causal_lm import CausalLM
from fastlm.serve.api_error import ApiError
from fastlm.serve.commands import read_keys
from fastlm.serve.http_server import ENCODER_THREADS
from fastlm.serve.middleware import RequestLimits
from fastlm.serve.prompt_encoder import PromptEncoder
from fastlm.serve.protocol.body import count_containers, parse_json, read_request
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest
from fastlm.tokenizer import tokenizer as tokenizer_module

KEY = "a-key-of-this-server"
SECRET = "swordfish"  # in prompts; no log may have it


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def body(**fields):
    messages = [{"role": "user", "content": SECRET}]
    return {"model": "tiny", "messages": messages, "max_tokens": 4, **fields}


def wait_until(condition, seconds=20):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def connect(url, sent: bytes):
    host, port = url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.sendall(sent)
    return sock


def head(content, path="/v1/chat/completions"):
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    ).encode()


def test_keys_hosts_paths_and_bodies(tiny):
    limits = RequestLimits(body_bytes=3000, body_seconds=0.5, max_new_tokens=50)
    options = {"keys": [KEY, "another-key-of-it"], "hosts": frozenset(("127.0.0.1",))}
    with serve_model(*tiny, limits=limits, **options) as (url, _):
        good = {"authorization": f"Bearer {KEY}"}

        def refused(status, sent=None, path="/v1/chat/completions", method="POST", **headers):
            sent = json.dumps(body()) if sent is None else sent
            response = HTTP.request(
                method, url + path, content=sent,
                headers={"content-type": "application/json", **good, **headers},
            )  # fmt: skip
            assert response.status_code == status, response.text
            error = response.json()["error"]
            assert (
                set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
            )
            assert "default-src 'none'" in response.headers["content-security-policy"]
            assert "access-control-allow-origin" not in response.headers
            return response

        assert ask(url, body(), **good).status_code == 200
        for wrong in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x"):
            response = refused(401, authorization=wrong)
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/v1/nothing"):
            refused(401, path=path, method="GET", authorization="")
        version = HTTP.get(url + "/version", headers=good).json()
        assert version == {"version": importlib.metadata.version("fastlm")}
        for path in ("/", "/health", "/ready"):
            assert HTTP.get(url + path).status_code == 200
        refused(403, host="evil.example")
        message = refused(404, path="/v1/nothing").json()["error"]["message"]
        assert message == "path: expected one that /openapi.json lists, got '/v1/nothing'"
        refused(404, path="/v1/feedback", sent='{"response_id": "x", "thumb": "up"}')
        assert refused(405, method="GET").headers["allow"] == "POST"
        refused(405, method="OPTIONS", origin="http://evil.example")  # no CORS
        refused(405, path="/health", **{"content-type": "text/plain"})
        refused(415, **{"content-type": "text/plain"})
        refused(413, sent="x" * 3001)
        refused(400, sent=json.dumps(body(max_tokens=51)))
        for bad in (
            "", "{", "[]", "7", '"x"', "\xff", "null", "[" * 2000, '{"model": NaN}',
            '{"model": "tiny", "model": "tiny"}', '{"model": 1e999}', '{"temperature": 1e999}',
            '{"seed": ' + "9" * 2500 + "}", '{"model": "\\ud800"}',
            json.dumps(body(messages=[{"role": "user", "content": "\ud800"}])),
            json.dumps(body(stop="\ud800")), '{"\\ud800": 1}', '{"\\ud800": 1, "\\ud800": 2}',
            json.dumps(body(tools=[{"type": "function", "function": {"name": "\ud800"}}])),
            json.dumps(body(chat_template_kwargs={"\ud800": {"x": "\ud800"}})),
        ):  # fmt: skip
            refused(400, sent=bad.encode("latin-1"))
        with connect(url, head(b"x" * 99).replace(b"host: localhost", b"host: 127.0.0.1")
                     .replace(b"\r\n\r\n", f"\r\nauthorization: Bearer {KEY}\r\n\r\n{{".encode())
                     ) as slow:  # fmt: skip
            assert slow.recv(99).startswith(b"HTTP/1.1 408")
        chunked = HTTP.post(
            url + "/v1/completions", content=(b"x" * 1000 for _ in range(9)),
            headers={**good, "content-type": "application/json"},
        )  # fmt: skip
        assert chunked.status_code == 413
        assert ask(url, body(), **good).status_code == 200


def test_a_client_that_still_sends_receives_the_refusal(tiny):
    """The connection of an unread body was reset: http.client lost 20 of 20 responses."""
    limits = RequestLimits(body_bytes=100_000)
    with serve_model(*tiny, limits=limits) as (url, _):
        host = url.removeprefix("http://")
        for kind, status in (("application/json", 413), ("text/plain", 415)):
            for _ in range(10):
                connection = http.client.HTTPConnection(host, timeout=20)
                headers = {"content-type": kind}
                connection.request("POST", "/v1/completions", b"x" * 5_000_000, headers)
                assert connection.getresponse().status == status
                connection.close()


def test_a_body_has_a_bounded_number_of_lists():
    """4 MB of empty lists held the interpreter for seconds; brackets in a text are text."""
    lists = b'{"prompt":[' + b"[]," * 1_300_000 + b"[]]}"
    began = time.process_time()
    with pytest.raises(ApiError, match="at most 100,000 lists and objects, got 1,300,003"):
        parse_json(lists)
    assert time.process_time() - began < 0.3
    text = '[{"' * 400_000 + "\\"
    assert parse_json(json.dumps({"prompt": [text]}).encode()) == {"prompt": [text]}
    strings = b'{"prompt":["' + b"[" * 100_001 + b'",' + b'"",' * 1_300_000 + b'""]}'
    began = time.process_time()  # splitting at the quotes took 0.26 s
    assert count_containers(strings) == 2
    assert time.process_time() - began < 0.1


def test_the_arguments_of_a_call_have_a_bounded_number_of_lists():
    """They are JSON in texts, whose brackets the body's bound does not count. The bound is of all
    calls together."""
    for count in (10, 60_000):
        arguments = '{"x":[' + "[]," * count + "[]]}"
        call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": arguments}
        responses = {"model": "m", "input": [call, call]}
        calls = [{"function": {"name": "f", "arguments": arguments}}]
        message = {"role": "assistant", "tool_calls": calls}
        chat = {"model": "m", "messages": [message, message]}
        for request, kind in ((responses, ResponsesRequest), (chat, ChatCompletionRequest)):
            refused = pytest.raises(ApiError, match="expected at most 100,000 lists")
            with refused if count > 10 else contextlib.nullcontext():
                read_request(json.dumps(request).encode(), kind)


def test_many_keys_are_read_in_one_pass():
    pairs = ", ".join(f'"{i}": 1' for i in range(100_000))
    began = time.process_time()
    with pytest.raises(ApiError, match="99999: expected once, got it twice"):
        parse_json(f'{{{pairs}, "99999": 1}}'.encode())
    assert time.process_time() - began < 5  # comparing all pairs of keys takes minutes


def test_a_large_body_is_parsed_outside_the_event_loop(tiny, monkeypatch):
    threads = []

    def recorded(data, model):
        threads.append(threading.current_thread().name)
        return read_request(data, model)

    monkeypatch.setattr("fastlm.serve.http_server.read_request", recorded)
    with serve_model(*tiny) as (url, _):
        for count, path in ((10, "completions"), (10**5, "completions"), (10**5, "embeddings")):
            field = "prompt" if path == "completions" else "input"
            request = {
                "model": "tiny",
                field: [1] * count if path == "completions" else "x" * count,
            }
            ask(url, request, f"/v1/{path}")
    assert [name.startswith("fastlm-encoder") for name in threads] == [False, True, True]


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text(f"# ours\n{KEY}\n\nanother-key-of-it\n")
    assert read_keys(tmp_path / "keys") == [KEY, "another-key-of-it"]
    monkeypatch.setenv("FASTLM_API_KEYS", f"{KEY}, another-key-of-it")
    assert read_keys(None) == [KEY, "another-key-of-it"]
    for text in ("short\n", "", "with a space in it\n", "ümlaut-in-this-key\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(InputError, match="api_key_file: expected"):
            read_keys(tmp_path / "keys")


def test_a_client_that_disconnects_frees_its_slot(tiny):
    with serve_model(*tiny, pause=0.02) as (url, server):
        engine = server.served_model.engine
        for stream in (False, True):
            content = json.dumps(body(max_tokens=400, ignore_eos=True, stream=stream, n=2)).encode()
            sock = connect(url, head(content) + content)
            wait_until(lambda: engine.stats().running == 2)
            sock.close()
            wait_until(lambda: engine.stats().running == 0)
        assert engine.stats().finished["cancelled"] == 4
        sock = connect(url, head(b"x" * 50)[:-10])  # within the headers, then within the body
        sock.close()
        connect(url, head(b"x" * 50) + b"{").close()
        assert ask(url, body()).status_code == 200
        assert re.search(r"fastlm_cancellations_total [1-9]", server.metrics.text().decode())


def test_a_client_that_does_not_read_is_disconnected():
    limits = RequestLimits(write_seconds=0.3)
    options = {"limits": limits, "buffer": 4096, "connections": 2}
    with serve_model(*tiny_model(4096), **options) as (url, server):
        engine = server.served_model.engine
        content = json.dumps(body(stream=True, max_tokens=4000, ignore_eos=True)).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect((host, int(port)))
            sock.sendall(head(content) + content)
            wait_until(lambda: engine.stats().finished.get("cancelled") == 1, 60)
            # its connection is closed, too, which frees one of the two
            wait_until(lambda: HTTP.get(url + "/health").status_code == 200)


def test_connections_with_incomplete_headers_are_closed(tiny):
    """They would use all connections, and every client would get a 503."""
    request = head(b"{}") + b"{}"
    with serve_model(*tiny, limits=RequestLimits(header_seconds=1.5), connections=4) as (url, _):
        sent = (b"", b"P", request[:40], b"GET /health HTTP/1.1\r\n")
        idle = [connect(url, part) for part in sent]
        assert HTTP.get(url + "/health").status_code == 503
        wait_until(lambda: HTTP.get(url + "/health").status_code == 200)
        for sock in idle:
            with sock, contextlib.suppress(ConnectionResetError):
                assert sock.recv(99) == b""
        with connect(url, request[:40]) as slow:  # single bytes do not extend the time
            with pytest.raises(OSError):
                for byte in request[40:]:
                    time.sleep(0.05)
                    slow.sendall(bytes((byte,)))
        with connect(url, b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n") as idle_sock:
            assert _response(idle_sock).startswith(b"HTTP/1.1 200")
            time.sleep(1.7)  # a connection between requests is not one that lacks headers
            idle_sock.sendall(request)
            assert _response(idle_sock).startswith(b"HTTP/1.1 400")
            idle_sock.sendall(request[:40])
            with contextlib.suppress(ConnectionResetError):
                assert idle_sock.recv(99) == b""


def test_an_unread_body_ends_the_connection(tiny):
    """`GET /health` needs no key and no body."""
    begin = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
    limits = RequestLimits(body_bytes=2**16, body_seconds=1)
    with serve_model(*tiny, limits=limits) as (url, _):
        small = begin + b"content-length: 9\r\n\r\n" + b"x" * 9
        with connect(url, small) as sock:
            assert _response(sock).startswith(b"HTTP/1.1 200")
            sock.sendall(small)  # the connection stays open
            assert _response(sock).startswith(b"HTTP/1.1 200")
        for fields in (b"content-length: 99999999999\r\n", b"transfer-encoding: chunked\r\n"):
            with connect(url, begin + fields + b"\r\n") as sock:
                assert _response(sock).startswith(b"HTTP/1.1 200")
                piece = b"10000\r\n" + b"x" * 2**16 + b"\r\n"
                with pytest.raises(OSError):
                    for _ in range(200):  # 13 MB: more than the system's buffers hold
                        sock.sendall(piece)
        with connect(url, begin + b"content-length: 999\r\n\r\n") as sock:  # a slow one
            assert _response(sock).startswith(b"HTTP/1.1 200")
            with pytest.raises(OSError):
                for _ in range(200):
                    sock.sendall(b"x")
                    time.sleep(0.02)


def test_refused_framing_and_headers(tiny):
    """RFC 9112, 6.1: a request with both lengths may be smuggled, so the connection ends."""
    both = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    large = b"x-large: " + b"x" * 100_000 + b"\r\n\r\n"
    with serve_model(*tiny) as (url, _):
        for first in (b"POST /v1/completions HTTP/1.1\r\n", b"GET /health HTTP/1.1\r\n"):
            for rest, message in ((both, b"transfer-encoding: "), (large, b"headers: ")):
                with connect(url, first + b"host: localhost\r\n" + rest) as sock:
                    got = b"".join(iter(lambda sock=sock: _received(sock), b""))
                    assert got.startswith(b"HTTP/1.1 400"), got[:300]
                    assert message in got or b"Invalid HTTP request" in got
                    assert got.count(b"HTTP/1.1") == 1 and b"connection: close" in got.lower()


def test_a_response_that_the_client_does_not_receive_is_dropped(tiny):
    """The server writes the response at once, so that no write waits."""
    limits = RequestLimits(write_seconds=1.5)  # long enough for a busy machine to notice
    with serve_model(*tiny, limits=limits, buffer=4096, connections=2) as (url, _):
        get = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        host, port = url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect((host, int(port)))
            sock.sendall(get)
            # another client must not come before: then this one would get the 503
            assert sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 200"
            wait_until(lambda: HTTP.get(url + "/health").status_code == 503)
            wait_until(lambda: HTTP.get(url + "/health").status_code == 200)
            got = b"".join(iter(lambda: _received(sock), b""))
        assert 0 < len(got) < len(HTTP.get(url + "/openapi.json").content)
        with socket.socket() as sock:  # a slow reader gets the response
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect((host, int(port)))
            sock.sendall(get)
            got = b""
            while piece := sock.recv(2000):
                got += piece
                time.sleep(0.02)
        assert json.loads(got.partition(b"\r\n\r\n")[2])["openapi"]


def _response(sock):
    """A response whose body is an object."""
    got = b""
    while not got.endswith(b"}"):
        got += sock.recv(9999)
    return got


def _received(sock):
    try:
        return sock.recv(2**16)
    except ConnectionResetError:
        return b""


def test_a_full_queue_is_a_429_and_takes_nothing(tiny):
    with serve_model(*tiny, engine={"max_num_seqs": 1, "max_queue_size": 2}, pause=0.02) as (
        url,
        server,
    ):
        engine = server.served_model.engine
        long = body(max_tokens=60, ignore_eos=True)
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(ask, url, long) for _ in range(2)]
            wait_until(lambda: engine.stats().waiting == engine.stats().running == 1)
            for stream in (False, True):  # two answers, with space for one
                full = ask(url, body(n=2, stream=stream))
                assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
                assert full.json()["error"]["code"] == "queue_full"
            wait_until(lambda: engine.stats().waiting == 1)
            assert [r.result().status_code for r in running] == [200, 200]
        assert ask(url, body(n=2)).status_code == 200


def test_texts_that_exceed_the_context_are_not_encoded(tiny):
    with serve_model(*tiny) as (url, server):
        backend = server.served_model.tokenizer._text_backend

        class Refuses:
            def __getattr__(self, name):
                raise AssertionError("encoded")

        server.served_model.tokenizer.__dict__["_text_backend"] = Refuses()
        long, backs = "ab" * 300_000, server.served_model.tokenizer._backend
        server.served_model.tokenizer._backend = Refuses()
        try:
            for path, fields in (
                ("/v1/completions", {"prompt": long}),
                ("/v1/embeddings", {"input": ["x" * 600_000]}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": long}]}),
            ):
                response = ask(url, {"model": "tiny", **fields}, path)
                assert (
                    response.status_code == 400 and "bytes" in response.json()["error"]["message"]
                )
        finally:
            server.served_model.tokenizer.__dict__["_text_backend"] = backend
            server.served_model.tokenizer._backend = backs


def test_a_prompt_is_encoded_until_the_context_is_full(tiny, monkeypatch):
    _, tokenizer = tiny
    prompts = PromptEncoder(tokenizer, 4096)
    encoded, part = [], tokenizer_module.PART_CHARACTERS
    encode = tokenizer_module._encode
    monkeypatch.setattr(
        tokenizer_module, "_encode", lambda *args: (encoded.append(args[1]), encode(*args))[1]
    )
    text = "".join(chr(ord("a") + i % 25) for i in range(8 * part))
    monkeypatch.setattr(prompts, "max_bytes", 2**20)  # as with a real vocabulary
    chat = ChatCompletionRequest(model="tiny", messages=[{"role": "user", "content": text}])
    for name, encode_prompt in (
        ("prompt", lambda: prompts.encode_text(text)),
        ("input", lambda: prompts.encode_text(text, "input", 0)),
        ("messages", lambda: prompts.encode_chat(chat)),
    ):
        encoded.clear()
        with pytest.raises(ApiError, match=f"{name}: expected at most the 4096 tokens") as refused:
            encode_prompt()
        assert (refused.value.param, refused.value.code) == (name, "context_length_exceeded")
        assert "got more, which are not counted (/tokenize counts those of a" in str(refused.value)
        assert sum(map(len, encoded)) < 2 * part


def test_embeddings_when_the_engine_is_full_or_stops(tiny):
    sent = {"model": "tiny", "input": ["a", "b"]}

    def refuse(error):
        def call(*_):
            raise error

        return call

    def ended(*_):
        future = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future

    with serve_model(*tiny) as (url, server):
        call = server.served_model.engine.call
        for wrong, status, code in (
            (refuse(QueueFull(3, 2.0)), 429, "queue_full"),
            (refuse(EngineClosed()), 503, "stopping"),
            (ended, 503, "stopping"),
        ):
            server.served_model.engine.call = wrong
            response = ask(url, sent, "/v1/embeddings")
            assert (response.status_code, response.json()["error"]["code"]) == (status, code)
            assert int(response.headers["retry-after"]) >= 1
        server.served_model.engine.call = call
        submit, server.served_model.engine.submit = (
            server.served_model.engine.submit,
            refuse(EngineClosed()),
        )
        response = ask(url, body())
        assert (response.status_code, response.json()["error"]["code"]) == (503, "stopping")
        server.served_model.engine.submit = submit


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/embeddings", {"input": ["a", "b", "c"]}), ("/v1/completions", {"prompt": "a"})],
)
def test_accepted_requests_are_answered_within_the_drain_time(tiny, path, fields):
    """The body is read before the stop, and the engine gets the request after it."""
    for drain, status in ((20.0, 200), (0.0, 503)):
        began = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            with serve_model(*tiny, drain=drain) as (url, server):
                text = server.served_model.prompt_encoder.encode_text

                def late(*args, server=server, text=text, began=began, **options):
                    began.set()
                    wait_until(lambda: server.stopping)
                    time.sleep(0.1)
                    return text(*args, **options)

                server.served_model.prompt_encoder.encode_text = late
                future = pool.submit(ask, url, {"model": "tiny", **fields}, path)
                assert began.wait(20)
            assert future.result().status_code == status, future.result().text


def test_one_key_uses_at_most_half_of_the_queue(tiny):
    keys, long = [KEY, "another-key-of-it"], body(max_tokens=60, ignore_eos=True)
    options = {"engine": {"max_num_seqs": 1, "max_queue_size": 8}, "pause": 0.02, "keys": keys}
    with serve_model(*tiny, **options) as (url, server):
        mine, other = ({"authorization": f"Bearer {key}"} for key in keys)
        with ThreadPoolExecutor(9) as pool:
            running = [pool.submit(ask, url, {**long, "user": "0"}, **mine)]
            wait_until(
                lambda: server.served_model.engine.stats().running and not server.quota.waiting
            )
            running += [pool.submit(ask, url, {**long, "user": str(i)}, **mine) for i in range(4)]
            wait_until(lambda: server.served_model.engine.stats().waiting == 4)
            full = ask(url, {**long, "user": "x"}, **mine)
            assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
            assert ask(url, body(), **other).status_code == 200
            assert [r.result().status_code for r in running] == [200] * 5
        assert not server.quota.waiting


def test_embeddings_of_one_key_use_at_most_half_of_the_queue(tiny):
    keys, sent = [KEY, "another-key-of-it"], {"model": "tiny", "input": "a"}
    began, go = threading.Event(), threading.Event()
    with serve_model(*tiny, engine={"max_queue_size": 2}, keys=keys) as (url, server):
        embedding = server.served_model.embedding
        server.served_model.embedding = lambda *args: (
            began.set(),
            go.wait(20),
            embedding(*args),
        )[2]
        mine, other = ({"authorization": f"Bearer {key}"} for key in keys)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(ask, url, sent, "/v1/embeddings", **mine)]
            assert began.wait(20)
            assert ask(url, sent, "/v1/embeddings", **mine).status_code == 429
            running.append(pool.submit(ask, url, sent, "/v1/embeddings", **other))
            wait_until(lambda: len(server.quota.waiting) == 2)
            go.set()
            assert [r.result().status_code for r in running] == [200, 200]
        assert not server.quota.waiting


def test_many_log_probabilities_are_refused():
    with serve_model(*tiny_model(4096)) as (url, _):
        request = body(logprobs=True, top_logprobs=20, n=16, max_tokens=4000)
        error = ask(url, request).json()["error"]
        assert error["param"] == "logprobs" and "answers x max_tokens" in error["message"]


def test_keys_learn_nothing_of_each_others_prompts(tiny):
    keys, request = [KEY, "another-key-of-it"], body(temperature=0)
    request["messages"][0]["content"] = "The tree sees the river. " * 12

    def cached(url, key):
        response = ask(url, request, **({"authorization": f"Bearer {key}"} if key else {})).json()
        return response["usage"]["prompt_tokens_details"]["cached_tokens"]

    with serve_model(*tiny, keys=keys) as (url, _):
        assert cached(url, keys[0]) == 0 and cached(url, keys[0]) > 0
        assert cached(url, keys[1]) == 0
    with serve_model(*tiny) as (url, _):
        assert cached(url, None) == 0 and cached(url, None) > 0


def test_an_embedding_that_is_not_finite_is_an_error(tiny):
    broken = CausalLM(tiny[0].config, seed=1).eval()
    with torch.no_grad():
        broken.model.embed_tokens.weight[:] = torch.nan
    with serve_model(broken, tiny[1]) as (url, _):
        for form in ("float", "base64"):
            request = {"model": "tiny", "input": "a", "encoding_format": form}
            response = ask(url, request, "/v1/embeddings")
            assert response.status_code == 500
            assert response.json()["error"]["message"].startswith("model: expected finite numbers")


def test_token_ids_beyond_the_tokenizer(tiny):
    _, tokenizer = tiny
    vocab = tokenizer.vocab_size + 8
    config = ModelConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = CausalLM(config, seed=1).eval()
    with torch.no_grad():  # the padding has the highest probability
        model.lm_head.weight[-8:] *= 50
    with serve_model(model, tokenizer) as (url, _):
        refused = ask(url, body(logit_bias={str(vocab - 1): 1}))
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "logit_bias"
        request = {"model": "tiny", "prompt": "The", "max_tokens": 8, "temperature": 0}
        for stream in (False, True):
            response = ask(url, {**request, "logprobs": 20, "stream": stream}, "/v1/completions")
            assert response.status_code == 200 and '"error"' not in response.text


def test_a_request_that_fails_does_not_end_the_server(tiny, capfd):
    model, tokenizer = tiny
    with serve_model(model, tokenizer) as (url, server):
        compute = server.served_model.engine._compute

        def broken(*_):
            raise RuntimeError(SECRET)

        server.served_model.engine._compute = broken
        failed = ask(url, body())
        assert failed.status_code == 500 and failed.json()["error"]["type"] == "server_error"
        streamed = ask(url, body(stream=True))
        assert '"error"' in streamed.text and "[DONE]" not in streamed.text
        server.served_model.engine._compute = compute
        embedding, server.served_model.embedding = server.served_model.embedding, broken
        response = ask(url, {"model": "tiny", "input": "x"}, "/v1/embeddings")
        assert response.status_code == 500 and SECRET not in response.text
        server.served_model.embedding = embedding
        assert ask(url, body()).status_code == 200
        assert ask(url, {"model": "tiny", "input": "x"}, "/v1/embeddings").status_code == 200
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [500, 200, 500, 200, 200]
    assert requests[3]["prompt_tokens"] > 10 and requests[3]["new_tokens"] == 4
    assert [line["type"] for line in lines if line["event"] == "failure"] == ["RuntimeError"]
    assert SECRET not in json.dumps(lines)


def test_an_answer_ends_at_the_time_limit(tiny):
    with serve_model(*tiny, pause=0.05, limits=RequestLimits(answer_seconds=1.5)) as (url, _):
        response = ask(url, body(max_tokens=400, ignore_eos=True)).json()
        assert 0 < response["usage"]["completion_tokens"] < 100
        assert response["choices"][0]["finish_reason"] == "length"


def test_a_request_that_does_not_begin_in_time(tiny):
    with serve_model(*tiny, engine={"max_num_seqs": 1}, pause=0.05) as (url, server):
        with ThreadPoolExecutor(1) as pool:
            long = body(max_tokens=40, ignore_eos=True)
            running = pool.submit(ask, url, long)
            wait_until(lambda: server.served_model.engine.stats().running == 1)
            server.served_model.engine.submit, submit = (
                lambda request, listen: submit(replace(request, deadline=0.01), listen),
                server.served_model.engine.submit,
            )
            late = ask(url, body(n=2))
            assert late.status_code == 503 and late.json()["error"]["code"] == "too_late"
            assert running.result().status_code == 200
        assert "fastlm_cancellations_total 0.0" in server.metrics.text().decode()


def test_an_error_is_not_counted_as_a_cancellation(tiny):
    with serve_model(*tiny) as (url, server):

        def broken(*_):
            raise RuntimeError("no")

        server.served_model.engine._run_rows = broken
        assert ask(url, body(n=3)).status_code == 500
        assert '"error"' in ask(url, body(n=3, stream=True)).text
        text = server.metrics.text().decode()
        assert "fastlm_cancellations_total 0.0" in text
        assert 'fastlm_errors_total{type="server_error"} 2.0' in text


def test_metrics_and_the_dashboard(tiny):
    with serve_model(*tiny) as (url, server):
        ask(url, body(max_tokens=5, ignore_eos=True))
        ask(url, body(nothing=1))
        text = HTTP.get(url + "/metrics").text
        metrics = [metric.name for metric in server.metrics.registry.collect()]
    ends = ("", "_total", "_bucket", "_sum", "_count")
    exported = {f"{name}{end}" for name in metrics for end in ends}

    def value(name):
        return float(re.search(rf"^{re.escape(name)} (.*)$", text, re.M)[1])

    assert value("fastlm_time_to_first_token_seconds_count") == 1
    assert value("fastlm_inter_token_seconds_count") == 4
    assert value("fastlm_queue_seconds_count") == 1
    assert 0 < value("fastlm_queue_seconds_sum") < value("fastlm_time_to_first_token_seconds_sum")
    assert value("fastlm_new_tokens_total") == 5
    assert value('fastlm_requests_total{path="/v1/chat/completions",status="200"}') == 1
    assert value('fastlm_errors_total{type="invalid_request_error"}') == 1
    assert value('fastlm_answers_total{reason="length"}') == 1
    board = json.loads(Path(fastlm.serve.__file__).with_name("grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"fastlm_\w+", query)}
    changing = {"model_answers_total", "model_decisions_total", "canary", "canary_difference"}
    exported |= {f"fastlm_{name}" for name in (*changing, "alert")}  # test_serve_canary.py
    assert len(queries) > 8 and used <= exported, used - exported
    for expected in (
        "first_token",
        "inter_token",
        "waiting",
        "queue_seconds",
        "drafted",
        "accepted",
        "used_blocks",
        "cached",
        "cancellations",
    ):
        assert any(expected in name for name in used), expected


def test_few_threads_encode_prompts(tiny):
    """The tokenizers package keeps the words of each thread that encodes: with one thread for each
    of 64 clients, the memory of a server grew for hours.
    """
    with serve_model(*tiny) as (url, server):
        chat, threads = server.served_model.prompt_encoder.encode_chat, set()

        def recorded(request):
            threads.add(threading.get_ident())
            time.sleep(0.01)  # so that the clients meet
            return chat(request)

        server.served_model.prompt_encoder.encode_chat = recorded
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda _: ask(url, body()).status_code, range(48)))
    assert set(answers) == {200}
    assert len(threads) <= ENCODER_THREADS
