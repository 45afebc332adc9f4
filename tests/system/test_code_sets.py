"""Code sets: answers are programs that run against tests."""

import math

import pytest
import question_files as files
from question_files import measure, oracle
from test_question_sets import HUMANEVAL, MBPP, request

from fastlm.errors import InputError
from fastlm.evals.registry import load_task


def test_programs_pass_their_tests_or_do_not(tmp_path):
    rows = [request("", "    return a + b\n", HUMANEVAL)]
    files.write_requests(tmp_path, "codex_humaneval", "gold_bpb_0shot", rows)
    rows = [request("Add.\n```python\n", "", MBPP)]
    path = files.write_requests(tmp_path, "codex_mbpp", "gold_bpb_0shot", rows)
    for name in ("humaneval", "humaneval:gold_bpb_0shot", "mbpp"):
        task = load_task(name, tmp_path)
        task.check()  # this machine can run programs
        (q,) = task.questions
        body = q.gold if q.gold.startswith("def") else HUMANEVAL["prompt"] + q.gold
        answers = [
            q.gold,
            f"```python\n{body}\n```\nDone.",
            q.gold.replace("+", "-"),
            "",
            "assert 0",
        ]
        assert task.judge([(item, q.row) for item in answers]) == [1, 1, 0, 0, 0]
    assert measure(task, oracle(task), tmp_path) == {
        "bits_per_byte": pytest.approx(-1.0 / -math.log(2) / len(q.gold)), "pass@1": 1,
    }  # fmt: skip
    files.write_requests(
        tmp_path, "codex_mbpp", "gold_bpb_0shot", [*rows, request("", "", {**MBPP, "code": "x"})]
    )
    with pytest.raises(
        InputError, match=f"{path.name}, line 2: expected a question, got ValueError"
    ):
        load_task("mbpp", tmp_path)
