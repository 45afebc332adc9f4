"""A limit of CPU time in the main thread and in others."""

import threading
import time

import pytest

from fastlm.data.cpu_limit import CpuLimitReached, call_with_cpu_limit


def burn(seconds: float) -> str:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


def stubborn() -> str:
    """Catch what parsers catch, and use far more CPU time than any limit here."""
    for _ in range(100):
        try:
            burn(1)
        except Exception:
            continue
    return "done"


def limited(results: list, function, seconds: float) -> None:
    began = time.thread_time()
    try:
        results.append(call_with_cpu_limit(function, seconds))
    except CpuLimitReached:
        results.append(time.thread_time() - began)


@pytest.mark.parametrize("thread", [False, True])
def test_the_limit_ends_a_function_in_every_thread(thread):
    results: list = []
    if thread:
        worker = threading.Thread(target=limited, args=(results, stubborn, 0.2))
        worker.start()
        worker.join(60)
    else:
        limited(results, stubborn, 0.2)
    assert 0.2 <= results[0] < 5


def test_waiting_is_no_cpu_time():
    assert call_with_cpu_limit(lambda: time.sleep(0.5) or "done", 0.2) == "done"


def test_a_call_that_ends_late_counts_as_stopped_and_others_go_on():
    with pytest.raises(CpuLimitReached):
        call_with_cpu_limit(lambda: burn(0.01), 0.001)  # ends before anybody looks
    for _ in range(3):
        assert call_with_cpu_limit(lambda: burn(0.02), 60) == "done"
    for thread in threading.enumerate():
        if thread.name == "cpu-limit":
            thread.join(10)
            assert not thread.is_alive()


def test_errors_of_the_function_pass():
    with pytest.raises(KeyError):
        call_with_cpu_limit(lambda: {}["missing"], 60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_destructor_that_drops_the_exception_only_delays_the_end():
    class Slow:
        def __del__(self):
            burn(0.3)

    def run():
        Slow()
        burn(60)

    results: list = []
    limited(results, run, 0.1)
    assert results[0] < 20
