"""Serve a tiny chat model, in this process or another, on a free port."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import torch

from fastlm.checkpoint.config import ModelConfig
from fastlm.inference.engine import Engine
from fastlm.inference.output_format import OutputFormat
from fastlm.model.causal_lm import CausalLM
from fastlm.serve.app import Server
from fastlm.serve.models import ServedModel, ServedModels
from fastlm.serve.monitor.monitor import Monitor, MonitorConfig
from fastlm.serve.uvicorn_server import UvicornServer, uvicorn_config
from fastlm.tokenizer.tokenizer import Tokenizer

logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about clients
# one client: each loads certificates. A new connection for each request
HTTP = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0), timeout=60, trust_env=False)
COMMAND = [sys.executable, "-P", "-m", "fastlm", "serve"]
TEXT = ['The tree sees the river. What is 1 + 1? It is 2. [1, 2, 3] {"name": "Ann", "age": 30}']
# ChatML with tools as Qwen has them
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{%- if shout %}LOUD{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}"
    "{{ ' ' + message.name if message.name and message.role == 'user' else '' }}"
    "\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(context=512, seed=1):
    """Make a random model, and a tokenizer with a chat template for tools."""
    tokenizer = Tokenizer.train(TEXT, 320)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=context,
        eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = CausalLM(config, seed=seed).eval()
    with torch.no_grad():  # tokens differ in likelihood
        model.lm_head.weight.mul_(30)
    return model, tokenizer


@contextlib.contextmanager
def serve_model(
    model, tokenizer, *, engine=None, pause=0.0, buffer=None, drain=0.0, connections=1024,
    name="tiny", feedback=None, monitoring=None, **options,
):  # fmt: skip
    """Serve a model under this name; yield (URL, server). ``engine``: options of the engine;
    ``pause``: extra seconds of each of its steps; ``monitoring``: settings of the monitor, with
    ``feedback``; for the others see `run_server`.
    """
    runs = Engine(model, tokenizer, **(engine or {}))
    if pause:
        step = runs.step
        runs.step = lambda: (time.sleep(pause), step())[1]
    server = Server(
        ServedModels(ServedModel(runs, model, tokenizer, name)), feedback=feedback,
        monitor=monitor_of(feedback, monitoring), **options,
    )  # fmt: skip
    with run_server(server, buffer=buffer, drain=drain, connections=connections) as url:
        yield url, server


def monitor_of(store, settings):
    return None if store is None else Monitor(store, settings or MonitorConfig())


@contextlib.contextmanager
def run_server(server, *, buffer=None, drain=0.0, connections=1024):
    """Run a server; yield its URL. At the end it stops as by SIGTERM. ``buffer``: size of the
    system's send buffer for a slow client, bytes; ``drain``: seconds that answers may take at the
    end; ``connections``: the maximum number of connections.
    """
    runner = UvicornServer(uvicorn_config(server, connections, drain), server, drain)
    listening = socket.create_server(("127.0.0.1", 0))
    if buffer:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        until = time.monotonic() + 30
        while not runner.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        runner.should_exit = True
        thread.join()


@contextlib.contextmanager
def serve_process(*options, **environment):
    """Run `fastlm serve` with these options in a separate process on a free port; yield (process,
    URL, lines of its log so far).
    """
    process = subprocess.Popen(
        [*COMMAND, "--port", "0", *map(str, options)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    lines, ready = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"] == "ready":
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(300) and process.poll() is None, lines
        yield process, next(line["url"] for line in lines if "url" in line), lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()


def script(server, *texts):
    """Let the server's model answer each request with the next of the texts, in a cycle."""
    submit, at = server.served_model.engine.submit, 0

    def scripted(request, listener):
        nonlocal at
        form = OutputFormat("choice", (texts[at % len(texts)],), "choice")
        at += 1
        return submit(
            replace(request, constraint=server.served_model.grammar_compiler.constraint(form)),
            listener,
        )

    server.served_model.engine.submit = scripted


def ask(url, body, path="/v1/chat/completions", **headers):
    return HTTP.post(url + path, json=body, headers=headers)
