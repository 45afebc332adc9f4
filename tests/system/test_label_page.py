"""The page of `fastlm label`: its API on the store of the terminal, and the command."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from serve_app import HTTP, run_server
from test_cli import call, refused

from fastlm.errors import InputError
from fastlm.evals.judge.graded_file import read_graded
from fastlm.evals.judge.grading import SWAPPED, GradedItem
from fastlm.evals.judge.items import JudgeItem, make_items
from fastlm.evals.judge.label_store import LabelStore
from fastlm.evals.judge.labels import label_order, read_label_rows
from fastlm.evals.judge.rubric import Rubric
from fastlm.serve.label_server import LabelServer

GRADES = {
    "pass": ["pass", "fail"],
    "1-5": [1, 2, 3, 4, 5],
    "1-10": [*range(1, 11)],
    "pair": ["A", "B", "tie"],
}
REASON = "the judge's reason"


def write_grades(folder, scale, n=20):
    """Write what `fastlm judge` writes. The first answer of a pair has the text "good"."""
    rubric = Rubric.read(scale, None, 4)
    answers = ("good", "bad") if scale == "pair" else ("good",)
    messages = [[{"role": "user", "content": f"what {i}"}] for i in range(n)]
    items = make_items(JudgeItem("", m, answers) for m in messages)
    rows = []
    for i, item in enumerate(items):
        grade = GRADES[scale][i % len(GRADES[scale])]
        grades = (grade, SWAPPED[grade]) if scale == "pair" else (grade,)
        replies = tuple({"grade": g, "reason": REASON, "probability": 0.5} for g in grades)
        rows.append(GradedItem(item, replies).as_row())
    folder.mkdir()
    (folder / "grades.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "scores.json").write_text(json.dumps({"rubric": rubric.as_dict()}))
    return rubric


@contextmanager
def label_server(folder, path, **options):
    graded, rubric = read_graded(folder)
    store = LabelStore([g.item for g in label_order(graded, rubric, 12)], rubric, path)
    with run_server(LabelServer(store, **options)) as url:
        yield url


def post(url, name, status=200, **body):
    response = HTTP.post(f"{url}/v1/label/{name}", json=body)
    assert response.status_code == status, response.text
    return response.json()


def label(url, rater, *labels):
    """Label the rater's next items; return what the page shows of them."""
    items = []
    for value in labels:
        items.append(post(url, "next", rater=rater)["item"])
        fields = {} if value is None else {"label": value}
        answer = post(url, "label", rater=rater, item=items[-1]["id"], **fields)
        assert answer == {"item": items[-1]["id"], "skipped": value is None}
    return items


@pytest.mark.parametrize(
    ("scale", "lines", "labels"),
    [
        ("pass", "pfspf", ["pass", "fail", None, "pass", "fail"]),
        ("1-5", "15s34", [1, 5, None, 3, 4]),
        ("1-10", ["1", "10", "s", "9"], [1, 10, None, 9]),
        ("pair", "12s=2121112", ["A", "B", None, "tie", "B", "A", "B", "A", "A", "A", "B"]),
    ],
)
def test_the_page_stores_what_the_terminal_stores(tmp_path, scale, lines, labels):
    rubric = write_grades(tmp_path / "judged", scale)
    done = call(
        "label", tmp_path / "judged", tmp_path / "terminal.jsonl", "--rater", "Ann", "--count", 12,
        input="\n".join(lines),
    )  # fmt: skip
    assert f"Ann: {len(labels) - 1} of 12 labelled, 1 skipped" in done.stdout
    path = tmp_path / "page.jsonl"
    with label_server(tmp_path / "judged", path) as url:
        items = label(url, "Ann", *labels)
    assert path.read_text() == (tmp_path / "terminal.jsonl").read_text()
    stored = read_label_rows(path, rubric)
    if scale == "pair":
        first = [item["answers"][0][0]["content"] for item in items]
        assert {*first} == {"good", "bad"}
        for item, text, value in zip(items, first, labels):
            expected = SWAPPED[value] if value and text == "bad" else value
            assert stored[item["id"], "Ann"] == expected
    else:
        assert [stored[item["id"], "Ann"] for item in items] == labels


def test_a_restart_and_another_browser_continue(tmp_path):
    rubric = write_grades(tmp_path / "judged", "pass")
    path = tmp_path / "labels.jsonl"
    with label_server(tmp_path / "judged", path) as url:
        first, second = label(url, "Ann", "pass", None)
        assert len(path.read_text().splitlines()) == 2  # at once
        response = post(url, "next", rater="Ann")  # another browser
        assert response["progress"] == {"labelled": 1, "skipped": 1, "total": 12}
        assert response["rubric"] == {"scale": "pass", "text": rubric.text}
        assert response["item"]["id"] not in (first["id"], second["id"])
        assert post(url, "next", rater="Bob")["item"] == first
        # back: the last label counts
        assert post(url, "next", rater="Ann", item=second["id"])["item"] == second
        post(url, "label", rater="Ann", item=second["id"], label="fail")
        assert post(url, "next", rater="Ann")["progress"]["labelled"] == 2
        for text in (REASON, "grade", "probability"):  # the rater does not see the judge
            assert text not in json.dumps(response)
    with label_server(tmp_path / "judged", path) as url:
        assert post(url, "next", rater="Ann") == {
            **response, "progress": {"labelled": 2, "skipped": 0, "total": 12}
        }  # fmt: skip
        label(url, "Ann", *["pass"] * 10)
        assert post(url, "next", rater="Ann")["item"] is None
    rows = read_label_rows(path, rubric)
    assert len(rows) == 12 and rows[second["id"], "Ann"] == "fail"


def test_the_page_and_the_terminal_label_at_the_same_time(tmp_path):
    write_grades(tmp_path / "judged", "pass")
    path = tmp_path / "labels.jsonl"
    with label_server(tmp_path / "judged", path) as url:
        (first,) = label(url, "Ann", "pass")
        call(
            "label", tmp_path / "judged", path, "--rater", "Ann", "--count", 12, input="p\ns\n"
        )  # fmt: skip
        response = post(url, "next", rater="Ann")
        assert response["progress"] == {"labelled": 2, "skipped": 1, "total": 12}
        done = {json.loads(line)["id"] for line in path.read_text().splitlines()}
        assert len(done) == 3 and first["id"] in done and response["item"]["id"] not in done


def test_bad_requests_are_refused_and_nothing_is_stored(tmp_path):
    write_grades(tmp_path / "judged", "1-5")
    path = tmp_path / "labels.jsonl"
    key = "a-key-of-this-server"
    with label_server(tmp_path / "judged", path) as url:
        item = post(url, "next", rater="Ann")["item"]["id"]
        for fields, message in (
            ({"label": 6}, "label: expected one of 1, 2, 3, 4, 5, got 6"),
            ({"label": "5"}, "label: expected one of 1, 2, 3, 4, 5, got '5'"),
            ({"label": True}, "label: expected a whole number or a string, got True"),
            ({"label": [1]}, "label: expected a whole number or a string"),
            ({"item": "x", "label": 1}, "item: expected one of the answers to label, got 'x'"),
            ({"rater": " ", "label": 1}, "rater: expected a name"),
            ({"rater": "A\nn", "label": 1}, "rater"),
            ({"grade": 1}, "grade: unknown field"),
        ):
            body = {"rater": "Ann", "item": item, **fields}
            assert post(url, "label", 400, **body)["error"]["message"].startswith(message)
        assert post(url, "next", 400, rater="")["error"]["param"] == "rater"
        assert path.read_text() == ""
        assert "/v1/label/label" in HTTP.get(url + "/openapi.json").json()["paths"]
        assert HTTP.get(url + "/health").json() == {"status": "ok"}
        assert 'path="/v1/label/label",status="400"' in HTTP.get(url + "/metrics").text
        assert HTTP.get(url + "/v1/models").status_code == 404
    hosts = frozenset(("127.0.0.1",))
    with label_server(tmp_path / "judged", path, keys=[key], hosts=hosts) as url:
        assert HTTP.get(url + "/", headers={"host": "elsewhere.test"}).status_code == 403
        page = HTTP.get(url + "/")
        assert "Label answers" in page.text and "default-src 'none'" in str(page.headers)
        assert post(url, "next", 401, rater="Ann")["error"]["code"] == "invalid_api_key"
        response = HTTP.post(
            url + "/v1/label/next",
            json={"rater": "Ann"},
            headers={"authorization": f"Bearer {key}"},
        )
        assert response.status_code == 200
        form = HTTP.post(url + "/v1/label/label", data={"rater": "Ann"})
        assert form.status_code == 401


def test_the_command_serves_the_page(tmp_path):
    write_grades(tmp_path / "judged", "pass")
    path = tmp_path / "labels.jsonl"
    command = [sys.executable, "-P", "-m", "fastlm", "label", tmp_path / "judged", path]
    process = subprocess.Popen(
        [*command, "--page", "--port", "0", "--count", "12"], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        listening, ready = (json.loads(process.stderr.readline()) for _ in range(2))
        url = listening["url"]
        assert ready["event"] == "ready"
        label(url, "Ann", "pass")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["rater"], row["label"]) == ("Ann", "pass")
    for arguments, message in (
        ([], "rater: expected --rater NAME or --page"),
        (["--page", "--rater", "Ann"], "rater: expected --rater NAME or --page"),
        (["--page", "--host", "0.0.0.0"], "host: expected API keys"),
        (["--rater", "Ann", "--port", "9000"], "port: expected with --page, got 9000 without it"),
        (["--rater", "Ann", "--host", "0.0.0.0"], "host: expected with --page, got 0.0.0.0"),
        (["--rater", "Ann", "--api-key-file", "keys"], "api_key_file: expected with --page"),
        (["--rater", "Ann", "--allow-host", "box"], "allow_host: expected with --page, got box"),
        (["--page", "--port", "70000"], "port: expected 0 to 65535, got 70000"),
        (["--page", "--score", "a"], "score: expected with a folder of fastlm safety"),
        (["--page", "--count", "0"], "count: expected 1 or more, got 0"),
    ):
        refused("label", tmp_path / "judged", path, *arguments, text=message)


def test_a_folder_without_grades_is_refused(tmp_path):
    with pytest.raises(InputError, match="grades: expected a folder of fastlm judge"):
        read_graded(tmp_path)


def test_a_rater_of_the_page_belongs_to_a_key(tmp_path):
    """Who has another key cannot replace what a rater said."""
    rubric = write_grades(tmp_path / "judge", "pass")
    path = tmp_path / "labels.jsonl"
    keys = ["a-key-of-this-server", "another-key-of-it"]
    with label_server(tmp_path / "judge", path, keys=keys) as url:
        item = None
        for key, label in zip(keys, ("pass", "fail")):
            headers = {"authorization": f"Bearer {key}"}
            for name, body in (("next", {}), ("label", {"label": label})):
                body = {"rater": "ann", "item": item, **body}
                response = HTTP.post(f"{url}/v1/label/{name}", json=body, headers=headers)
                assert response.status_code == 200, response.text
                item = item or response.json()["item"]["id"]
        body = {"rater": " ", "item": item, "label": "pass"}  # a key's letters make it no name
        response = HTTP.post(f"{url}/v1/label/label", json=body, headers=headers)
        assert response.status_code == 400 and "expected a name" in response.text
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(read_label_rows(path, rubric)) == 2
    assert [row["label"] for row in rows] == ["pass", "fail"]
    assert len({row["rater"] for row in rows}) == 2
    assert all(row["rater"].endswith(":ann") for row in rows)


def test_a_store_that_cannot_be_written_is_no_fault_of_the_client(tmp_path):
    write_grades(tmp_path / "judge", "pass")
    path = tmp_path / "labels.jsonl"
    with label_server(tmp_path / "judge", path) as url:
        item = post(url, "next", rater="ann")["item"]["id"]
        path.unlink(missing_ok=True)
        path.mkdir()
        error = post(url, "label", 503, rater="ann", item=item, label="pass")["error"]
        assert "cannot be used" in error["message"] and str(tmp_path) not in error["message"]
