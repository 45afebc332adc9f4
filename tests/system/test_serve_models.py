"""Other features of a server, and several models of one: `/tokenize`, pages of other
origins, a chat template of a file, adapters by name.
"""

from types import SimpleNamespace

import pytest
import torch
from serve_app import HTTP, ask, run_server, tiny_model
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.model.adapter import save_adapter
from fastlm.model.lora import add_lora
from fastlm.serve import uvicorn_server
from fastlm.serve.app import Server

PAGE = "https://chat.example.org"
USER = {"role": "user", "content": "Hi"}
SHOUT = "{% for message in messages %}HEY {{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a model, an adapter that gives other answers, and a template."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = tiny_model()
    model.save_pretrained(folder / "base")
    tokenizer.save(folder / "base")
    add_lora(model, 4, alpha=64, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    save_adapter(model, folder / "poet", base=folder / "base")
    (folder / "shout.jinja").write_text(SHOUT)
    return folder


def serve(monkeypatch, folder, *options):
    """Return the `Server` that `fastlm serve` would run, or the error message."""
    servers = []
    monkeypatch.setattr(
        uvicorn_server.UvicornServer, "run", lambda self, sockets: servers.append(self.server)
    )
    command = ["serve", "--model", str(folder / "base"), "--port", "0", *map(str, options)]
    result = CliRunner().invoke(app, command)
    return servers[0] if servers else result.output


@pytest.fixture(scope="module")
def server(folder):
    with pytest.MonkeyPatch.context() as patch:
        server = serve(
            patch, folder, "--chat-template", folder / "shout.jinja", "--allow-origin", PAGE,
            "--adapter", f"poet={folder / 'poet'}",
        )  # fmt: skip
    assert isinstance(server, Server), server
    with run_server(server) as url:
        yield SimpleNamespace(url=url, app=server, tokenizer=server.served_model.tokenizer)


def test_tokens_of_a_text(server):
    ids = server.tokenizer.encode("The tree é")
    response = ask(server.url, {"prompt": "The tree é"}, "/tokenize").json()
    assert response == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    body = {"model": "base", "prompt": "The tree", "return_token_strs": True}
    assert "".join(ask(server.url, body, "/tokenize").json()["token_strs"]) == "The tree"
    assert ask(server.url, {"prompt": ""}, "/tokenize").json()["count"] == 0
    text = ask(server.url, {"tokens": ids}, "/detokenize").json()
    assert text == {"prompt": "The tree é"}
    long = ask(server.url, {"prompt": "tree " * 5000}, "/tokenize").json()
    assert (
        long["count"] > 5000
    )  # more than a context: clients count tokens before they split a text


def test_tokens_of_a_conversation(server):
    body = {"model": "base", "messages": [USER]}
    response = ask(server.url, body, "/tokenize").json()
    assert server.tokenizer.decode(response["tokens"]) == "HEY Hi"
    answer = ask(server.url, {**body, "max_tokens": 1}).json()
    assert answer["usage"]["prompt_tokens"] == response["count"]
    tool = {"type": "function", "function": {"name": "add"}}
    tools = ask(server.url, {**body, "tools": [tool], "max_tokens": 1})
    both = ask(server.url, {**body, "tools": [tool]}, "/tokenize").json()
    assert both["count"] == tools.json()["usage"]["prompt_tokens"] > response["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": "a", "quality": 1}, "quality"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"prompt": "x" * (2**20 + 1)}, "prompt"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_refusals_of_tokens(server, path, body, param):
    response = ask(server.url, body, path)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_pages_of_other_origins(server):
    asks = {"access-control-request-method": "POST", "access-control-request-headers":
            "authorization,content-type,x-stainless-os"}  # fmt: skip
    path = server.url + "/v1/chat/completions"
    response = HTTP.options(path, headers={"origin": PAGE, **asks})
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == PAGE
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert HTTP.options(path, headers={"origin": "https://evil.org", **asks}).status_code == 400
    body = {"model": "base", "messages": [USER], "max_tokens": 1}
    assert ask(server.url, body, origin=PAGE).headers["access-control-allow-origin"] == PAGE
    refused = ask(server.url, {**body, "n": 0}, origin=PAGE)  # the page may read the error
    assert refused.status_code == 400
    assert refused.headers["access-control-allow-origin"] == PAGE
    other = ask(server.url, body, origin="https://evil.org")
    assert "access-control-allow-origin" not in other.headers


def test_adapters_by_name(server):
    def complete(**fields):
        body = {"messages": [USER], "max_tokens": 2, "temperature": 0, "logprobs": True, **fields}
        return ask(server.url, body).json()

    base, poet = complete(model="base"), complete(model="poet")
    assert poet["model"] == "poet" and base["model"] == "base"
    assert base["choices"] != poet["choices"]
    names = [model["id"] for model in HTTP.get(server.url + "/v1/models").json()["data"]]
    assert names == ["base", "poet"]
    assert complete(model="other")["error"]["code"] == "model_not_found"
    assert "expected 'base' or 'poet'" in complete(model="other")["error"]["message"]
    vectors = [
        ask(server.url, {"model": name, "input": "Hi"}, "/v1/embeddings").json()["data"]
        for name in names
    ]
    assert vectors[0] != vectors[1]


def test_adapters_share_the_memory_of_the_cache(server, folder, monkeypatch):
    monkeypatch.setattr("fastlm.inference.block_manager.total_memory", lambda: 2**22)
    single = serve(monkeypatch, folder)
    both = serve(monkeypatch, folder, "--adapter", f"poet={folder / 'poet'}")
    blocks = [model.engine.stats().num_blocks for model in both.models.live]
    expected = single.served_model.engine.stats().num_blocks // 2
    assert len(blocks) == 2 and blocks[0] == blocks[1] == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adapter", "poet"], "adapter: expected NAME=PATH, each name once, got 'poet'"),
        (["--adapter", "a=x", "--adapter", "a=y"], "each name once, got 'a=y'"),
        (["--adapter", "base=x"], "adapter: expected another name than the model's, got 'base'"),
        (["--adapter", "a=/nowhere/x"], "/nowhere/x"),
        (["--chat-template", "/nowhere/x.jinja"], "/nowhere/x.jinja"),
        (["--allow-origin", "*"], "allow_origin: expected API keys (--api-key-file) with '*'"),
        (["--allow-origin", "chat.example.org"], "allow_origin: expected '*' or a page's scheme"),
        (["--allow-origin", f"{PAGE}/"], f"as https://example.org, got '{PAGE}/'"),
    ],
)
def test_refused_options(folder, monkeypatch, options, message):
    assert message in " ".join(serve(monkeypatch, folder, *options).split())


def test_a_template_that_cannot_be_rendered(folder, monkeypatch, tmp_path):
    (tmp_path / "bad.jinja").write_text("{{ raise_exception('no') }}")
    output = serve(monkeypatch, folder, "--chat-template", tmp_path / "bad.jinja")
    assert "chat_template: cannot render these messages" in output
