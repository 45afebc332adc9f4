"""The process that draws the rows of a generator. `fastlm.sources.reasoning_gym` starts it with
``PYTHONHASHSEED=0``.

Some generators (ransom_note, word_ladder) iterate over sets of texts. Their order depends on
hashes. By default Python salts these in each process, so a resumed training would get other
prompts. This file is run by its path and imports nothing of fastlm.

A request is a line of JSON. The response is a pickle per row, then None: rows hold tuples, which
the scores need. A text instead of a row is an error.
"""

import json
import pickle
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the host
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the host has ended
    request = json.loads(sys.stdin.readline())
    sys.path[:] = request["path"]
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # a generator may print
    from reasoning_gym.factory import create_dataset

    try:
        dataset = create_dataset(request["name"], **request["options"])
        for i in range(len(dataset)):
            pickle.dump(dataset[i], out)
            out.flush()
        pickle.dump(None, out)
    except Exception as error:
        pickle.dump(f"{type(error).__name__}: {error}", out)
    out.flush()


if __name__ == "__main__":
    main()
