"""Answers to judge, and a server that replies as a judge."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fastlm.evals.judge.rubric import Rubric
from fastlm.evals.judge.stage import JudgeAnswers

PASS, PAIR = Rubric.read("pass", None, 4), Rubric.read("pair", None, 4)
QUESTION = [{"role": "user", "content": "please now what is stone"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer_rows(count, pairs=False):
    other = {"answer_b": "now"} if pairs else {}
    return [{"prompt": f"what is {i}", "answer": f"stone {i}", **other} for i in range(count)]


def assistant(*texts):
    """Return answers as `JudgeItem.answer_messages` does."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def ask_judge(judge, prompts, grades):
    """Return the replies in the order of the prompts."""
    return [reply for _, reply in sorted(judge.reply(prompts, grades), key=lambda x: x[0])]


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def stub_server(*replies, port=0):
    """Serve these replies, the last one again and again: (status, body, headers). Yield the address
    and the list of requests: (path, headers, body)."""
    requests, remaining, lock = [], list(replies), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.handle_request(None)

        def do_POST(self):
            self.handle_request(json.loads(self.rfile.read(int(self.headers["content-length"]))))

        def handle_request(self, body):
            with lock:
                requests.append((self.path, self.headers, body))
                reply = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            status, data, *headers = reply(body) if callable(reply) else reply
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def chat_reply(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


GOOD = chat_reply('{"reason": "it is right", "grade": "pass"}')
MODELS = (200, {"data": [{"id": "big"}, {"id": "small"}]})


def run_judge(address, answers, out, **options):
    events = []
    options = {"judge_model": "m", "retries": 0, "timeout": 5.0, **options}
    stage = JudgeAnswers(answers=(str(answers),), **options)
    return stage(out, judge=address, on_event=events.append), [
        e["warning"] for e in events if "warning" in e
    ]
