"""The status by which the monitor counts a response."""

import pytest

from fastlm.serve.middleware import _final_status


@pytest.mark.parametrize(
    "status, log_fields, expected",
    [
        (200, {}, 200), (200, {"failed": True}, 500), (200, {"disconnected": True}, 499),
        (0, {}, 499),
        (200, {"error": "grammar", "error_status": 400}, 400),  # in a stream: the client's fault
        (200, {"error": "server_error", "error_status": 500}, 500), (400, {}, 400),
    ],
)  # fmt: skip
def test_a_stream_has_the_status_of_its_error(status, log_fields, expected):
    assert _final_status(status, log_fields) == expected
