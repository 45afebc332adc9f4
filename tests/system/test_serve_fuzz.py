"""Requests drawn from the server's own OpenAPI schema, by schemathesis: those that keep to it and
those that break it. No answer is a 5xx or late, each is as the schema says, and what breaks the
schema is refused.
"""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serve_app import HTTP, run_server, serve_model, tiny_model

from fastlm.data.preferences import UnrankedAnswers
from fastlm.evals.judge.items import JudgeItem, make_items
from fastlm.evals.judge.label_store import LabelStore
from fastlm.evals.judge.rubric import Rubric
from fastlm.serve import app, label_api, openapi
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.serve.label_server import LabelServer
from fastlm.serve.middleware import RequestLimits
from fastlm.serve.ranking import RankingStore


def refusal(context, response, case):
    """Check that a body that violates the schema, or is too long, is refused."""
    if response.status_code == 413:
        return None
    return negative_data_rejection(context, response, case)


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    refusal,
]
EXAMPLES = int(os.environ.get("FASTLM_FUZZ_EXAMPLES", "20"))  # of a path, of each kind
SECONDS = 30  # of one answer, on a machine under load
PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/feedback",
)  # fmt: skip
RANKS = ("/v1/rank/next", "/v1/rank/judge", "/v1/rank/correct")
LABELS = tuple(label_api.PATHS)
NEW_TOKENS = 4
KNOWN = {  # values that random requests rarely have, so that they pass the first check
    "model": {"const": "tiny"},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": NEW_TOKENS},
    "max_completion_tokens": {"type": "integer", "minimum": 1, "maximum": NEW_TOKENS},
    "max_output_tokens": {"type": "integer", "minimum": 1, "maximum": NEW_TOKENS},
    "item": {"enum": [1, 2]},
}
REQUIRED = {"/v1/feedback": ["response_id", "thumb"]}  # of several that suffice


@pytest.fixture(scope="module")
def fuzz_server(tmp_path_factory):
    """Run a server; yield (URL, its schema)."""
    folder = tmp_path_factory.mktemp("fuzz")
    with (
        RankingStore(folder / "ranks.sqlite") as ranks,
        FeedbackStore(folder / "feedback.sqlite") as store,
    ):
        for i in range(2):
            answers = tuple([{"role": "assistant", "content": f"{i}, {j}"}] for j in range(3))
            ranks.add_items(
                [UnrankedAnswers([{"role": "user", "content": f"Which, {i}?"}], answers)]
            )
        limits = RequestLimits(max_new_tokens=NEW_TOKENS)
        options = {"feedback": store, "ranking": ranks}
        with serve_model(*tiny_model(), limits=limits, **options) as (url, _):
            yield url, schema_of(url, (*PATHS, *RANKS), KNOWN)


@pytest.fixture(scope="module")
def label_fuzz_server(tmp_path_factory):
    """Run a server of the page to label; yield (URL, its schema)."""
    rows = [JudgeItem("", [{"role": "user", "content": f"Which, {i}?"}], ("a",)) for i in range(2)]
    items, path = make_items(rows), tmp_path_factory.mktemp("labels") / "labels.jsonl"
    store = LabelStore(items, Rubric.read("1-5", None, 4), path)
    known = {"item": {"enum": [item.id for item in items]}}
    with run_server(LabelServer(store)) as url:
        yield url, schema_of(url, LABELS, known)


def schema_of(url, paths, known):
    """Return the server's schema, with ``known`` values of fields."""
    raw = HTTP.get(url + "/openapi.json").json()
    for path in paths:
        body = raw["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        name = body["schema"].pop("$ref").rpartition("/")[2]
        body["schema"] |= raw["components"]["schemas"][name]
        fields = body["schema"]["properties"]
        fields.update({name: known[name] for name in known.keys() & fields.keys()})
        for name in REQUIRED.get(path, ()):
            fields[name] = fields[name]["anyOf"][0]  # not null
            body["schema"].setdefault("required", []).append(name)
    return schemathesis.openapi.from_dict(raw)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", [*PATHS, *RANKS, *LABELS])
def test_posts(request, path, mode):
    server = "label_fuzz_server" if path in LABELS else "fuzz_server"
    url, schema = request.getfixturevalue(server)

    @settings(
        max_examples=EXAMPLES, derandomize=True, database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path]["POST"].as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=SECONDS)

    check()


def test_gets(fuzz_server):
    url, schema = fuzz_server
    for path in {**app.GETS, **openapi.GETS}:
        schema[path]["GET"].Case().call_and_validate(base_url=url, checks=CHECKS, timeout=SECONDS)
