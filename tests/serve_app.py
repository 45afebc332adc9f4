"""A tiny chat model behind the server, in this process on a port of its own."""

import contextlib
import threading
import time

import httpx
import torch
import uvicorn
from serve_double import Double

from fastlm.model.causal_lm import CausalLM
from fastlm.model.config import ModelConfig
from fastlm.serve.app import Server
from fastlm.tokenizer.tokenizer import Tokenizer

TEXT = ['The tree sees the river. What is 1 + 1? It is 2. [1, 2, 3] {"name": "Ann", "age": 30}']
# ChatML with tools as Qwen has them
TEMPLATE = (
    "{%- if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{%- if shout %}LOUD{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{%- endfor %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(context=512):
    """A random model and a tokenizer whose chat template writes tools."""
    tokenizer = Tokenizer.train(TEXT, 320)
    tokenizer.chat_template = TEMPLATE
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64,
        num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=context,
        eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = CausalLM(config, seed=1).eval()
    with torch.no_grad():  # tokens differ in likelihood
        model.lm_head.weight.mul_(30)
    return model, tokenizer


@contextlib.contextmanager
def serving(model, tokenizer, *, engine=None, **options):
    """Context: (URL, server). Answers of a random model are noise, but the same noise each time."""
    engine = engine or Double(model, tokenizer)
    server = Server(engine, model, tokenizer, "tiny", **options)
    runner = uvicorn.Server(
        uvicorn.Config(server.app, port=0, log_level="error", timeout_graceful_shutdown=3)
    )
    thread = threading.Thread(target=runner.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not runner.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        port = runner.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", server
    finally:
        runner.should_exit = True
        thread.join()


def ask(url, body, path="/v1/chat/completions", **headers):
    return httpx.post(url + path, json=body, headers=headers, timeout=30)
