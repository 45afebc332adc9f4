"""Helpers for tests of single fields of the API: a server, a client of one of its paths, and a
table of tests by field, which `check` runs.
"""

import contextlib
import copy
import json
import re
import subprocess
from types import SimpleNamespace
from typing import Literal

import httpx
import openai
import pydantic
from paths import ROOT
from serve_app import ask, serve_model, tiny_model

from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.protocol.chat_completion import ChatCompletionRequest
from fastlm.serve.protocol.completion import CompletionRequest
from fastlm.serve.protocol.embedding import EmbeddingRequest
from fastlm.serve.protocol.responses_api import ResponsesRequest

MODELS = {
    "chat": ChatCompletionRequest, "text": CompletionRequest, "embed": EmbeddingRequest,
    "responses": ResponsesRequest,
}  # fmt: skip
FIELDS = {kind: set(model.model_fields) for kind, model in MODELS.items()}
PATHS = {
    "chat": "/v1/chat/completions", "text": "/v1/completions", "embed": "/v1/embeddings",
    "responses": "/v1/responses",
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}},
}
PAGES = sorted((ROOT / "docs").glob("serving*.md"), reverse=True)  # serving.md first


class Person(pydantic.BaseModel):
    name: Literal["Ann", "Bob"]
    tall: bool
    age: int = pydantic.Field(ge=0, le=99)


@contextlib.contextmanager
def field_server(folder):
    """Serve a tiny model. The requests that its engine gets are in ``requests``."""
    model, tokenizer = tiny_model()
    store = FeedbackStore(folder / "feedback.sqlite")
    with (
        serve_model(model, tokenizer, feedback=store) as (url, app),
        openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client,
    ):
        requests, submit = [], app.served_model.engine.submit

        def spy(request, listener):
            requests.append(request)
            return submit(request, listener)

        app.served_model.engine.submit = spy
        yield SimpleNamespace(
            url=url, app=app, requests=requests, store=store, tokenizer=tokenizer, client=client
        )  # fmt: skip
    store.close()


def by_httpx(server, kind, body):
    return ask(server.url, body, PATHS[kind])


def by_openai(server, kind, body):
    path = PATHS[kind].removeprefix("/v1")
    try:
        return server.client.post(path, body=body, cast_to=httpx.Response)
    except openai.APIStatusError as error:
        return error.response


def by_curl(server, kind, body):
    command = ["curl", "-sN", server.url + PATHS[kind], "-H", "content-type: application/json"]
    completed = subprocess.run(
        [*command, "-d", "@-", "-w", "\n%{http_code}"], input=json.dumps(body), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    text, _, status = completed.stdout.rpartition("\n")
    return httpx.Response(int(status), text=text)


def stable_text(response):
    """Return the text of a response without ids and times, which differ each time."""
    keys = "id|item_id|call_id|created|created_at|cached_tokens"
    return re.sub(rf'"({keys})":("[^"]*"|\d+)', r'"\1":0', response.text)


class FieldClient:
    """A client of one path that fills in the required fields."""

    def __init__(self, server, kind):
        self.server, self.kind = server, kind
        self.client = server.client
        self.token = server.tokenizer.encode("T")[0]
        self.sent = []  # bodies and responses

    def send(self, **fields):
        needs = {
            "chat": {"messages": [{"role": "user", "content": "Hi"}]},
            "text": {"prompt": "The tree"},
            "embed": {"input": "The tree"},
            "responses": {"input": "Hi"},
        }[self.kind]
        length = "max_output_tokens" if self.kind == "responses" else "max_tokens"
        defaults = {} if self.kind == "embed" else {length: 8, "temperature": 0}
        body = {"model": "tiny", **defaults, **needs, **fields}
        response = by_httpx(self.server, self.kind, body)
        self.sent.append((copy.deepcopy(body), response))
        return response

    def answer(self, **fields):
        response = self.send(**fields)
        assert response.status_code == 200, response.text
        return response.json()

    def texts(self, **fields):
        response = self.answer(**fields)
        if self.kind == "responses":
            return [part["text"] for item in response["output"] for part in item.get("content", ())]
        choices = response["choices"]
        return [c["text"] if self.kind == "text" else c["message"]["content"] for c in choices]

    def expect_error(self, param, **fields):
        response = self.send(**fields)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["param"] == param and param in error["message"], error
        assert error["type"] == "invalid_request_error"
        return error["message"]


def case_table():
    """Return a dict of tests by (kind, names of fields), and the decorator `case` that adds one."""
    cases = {}

    def case(*names, kinds=("chat",)):
        def keep(function):
            cases.update({(kind, names): function for kind in kinds})
            return function

        return keep

    return cases, case


def check(server, kind, names, test):
    """Run the test of some fields. Each field must be accepted and refused in it, and all clients
    must get the same responses.
    """
    api = FieldClient(server, kind)
    test(api)
    for name in names:
        for accepted in (True, False):
            requests = [sent for sent in api.sent if name in sent[0]]
            matches = [sent for sent in requests if (sent[1].status_code == 200) == accepted]
            assert matches, f"{name}: {'accepted' if accepted else 'refused'} nowhere"
            # prefer a request with a reproducible answer
            reproducible = [s for s in matches if not s[0].get("temperature") or "seed" in s[0]]
            body, response = (reproducible or matches)[0]
            for by in (by_openai, by_curl):
                repeated = by(server, kind, body)
                assert repeated.status_code == response.status_code
                if reproducible or not accepted:
                    assert stable_text(repeated) == stable_text(response), (name, by)
