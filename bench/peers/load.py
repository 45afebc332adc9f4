"""The memory and the time that loading a GGUF file takes.

The peak is VmHWM of a process after `fastlm.CausalLM.from_pretrained`, less that of its imports.
It counts the pages of the file that the process has mapped, and the weights that it keeps.

    python bench/peers/load.py FILE.gguf [FILE.gguf ..]
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from finetune import peak


def measure(path: Path) -> str:
    """Load a file, and return a row of the table."""
    from fastlm import CausalLM

    imports, size, start = peak(), path.stat().st_size / 2**20, time.perf_counter()
    model = CausalLM.from_pretrained(path)
    seconds, used = time.perf_counter() - start, peak() - imports
    del model  # kept until here
    return f"| {path.name} | {size:,.0f} | {used:,.0f} | {used / size:.2f}x | {seconds:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(measure(options.files[0]), flush=True)
        return
    print("| file | MiB | peak MiB | of the file | seconds |\n|---|---|---|---|---|", flush=True)
    for path in options.files:  # a process each: VmHWM never falls
        subprocess.run([sys.executable, __file__, str(path), "--row"], check=True)


if __name__ == "__main__":
    main()
