"""Measure the memory of a process that serves and swaps models, and does nothing else:
swap_memory.py FOLDER prints its resident MiB before and after each of four promotions between
FOLDER/1 and FOLDER/2.
"""

import resource
import sys
from pathlib import Path

from canary_app import canary_server, wait_until_freed
from serve_app import ask

from fastlm.serve.models import release_memory


def resident(url):
    body = {"model": "tiny", "prompt": "The", "max_tokens": 4, "ignore_eos": True}
    assert ask(url, body, "/v1/completions").status_code == 200
    release_memory()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main(folder):
    state = folder / "state.json"
    with canary_server(folder / "1", state, models_dir=folder) as (url, server):
        print(resident(url))
        for name in "2121":
            answer = ask(url, {"model": name}, "/v1/admin/promote")
            assert answer.status_code == 200, answer.text
            wait_until_freed(server)
            print(resident(url))


main(Path(sys.argv[1]))
