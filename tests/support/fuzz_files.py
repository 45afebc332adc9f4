"""Read damaged model files until the time is up: GGUF, and safetensors folders in every format.

    python tests/support/fuzz_files.py [--seconds 600] [--seed 0]

A file is either read, or refused in one line. A case fails by any other exception, a crash, more
than `HANG` seconds of processor time, or more than `SPARE` bytes beyond what the process had after
it read the undamaged files (which are below 1 MB). A failing case is printed with its seed, and
``--seed N --seconds 0`` repeats it. tests/system/test_fuzz_files.py runs a few seconds of this.
"""

import argparse
import collections
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import packed_models
import torch
from damage import change_json, outcome
from model_files import write_gguf

from fastlm.checkpoint.config import ModelConfig
from fastlm.checkpoint.folder import load_state, save_hf
from fastlm.checkpoint.gguf_blocks import UNPACK
from fastlm.checkpoint.gguf_file import GGUFFile
from fastlm.checkpoint.tensor_folder import INDEX
from fastlm.export.gguf_write import save_gguf
from fastlm.model.causal_lm import CausalLM
from fastlm.quant import quantize

SHARD = 20_000  # bytes: the small model has several
HANG = 10  # seconds; an undamaged file takes under 0.1
SPARE = 2**28  # bytes: 300 times the largest file, and the allocator's arenas
EXTREMES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def undamaged(folder: Path) -> dict[str, Path]:
    """Write the undamaged files. Return name -> file or folder."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "unit"))
    from test_foreign_weights import CASES

    files = {}
    for case in (
        *("gptq-v1-asym", "gptq-v2", "gptq-v2-asym", "gptq-8", "awq", "pack-4-asym", "int8"),
        *("mxfp4", "nvfp4", "modelopt"),
    ):
        entry, pack, options, _ = CASES[case]
        packed_models.write(folder / case, entry, pack, **options)
        files[case] = folder / case
    packed_models.write(
        folder / "act-order", CASES["gptq-v1"][0], packed_models.gptq, act_order=True
    )
    files["act-order"] = folder / "act-order"
    config = {k: v for k, v in packed_models.CONFIG.items() if k != "architectures"}
    model = quantize(CausalLM(ModelConfig.from_dict(config), seed=0), "w4a16", group_size=32)
    model.save_pretrained(folder / "own")
    files["own"] = folder / "own"
    save_hf(folder / "sharded", model.config.to_dict(), model.weights(), max_shard_bytes=SHARD)
    files["sharded"] = folder / "sharded"
    save_gguf(folder / "model.gguf", model.config, model.weights(), None, "m")
    files["gguf"] = folder / "model.gguf"
    draw = np.random.default_rng(0)
    import gguf

    tensors = {
        kind.name: (draw.integers(0, 256, (4, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        for kind in UNPACK
    }
    texts = {"tokenizer__names": ["a", "b"] * 9, "tokenizer__count": 3}
    files["blocks"] = write_gguf(folder / "blocks.gguf", tensors, **texts)
    return files


def read(path: Path) -> None:
    if path.name == "blocks.gguf":
        file = GGUFFile(path)
        for name in file.tensors:
            file.load(name)
        return
    for _ in load_state(path)[1]:
        pass


def damage_bytes(data: bytearray, header: int, draw: random.Random) -> bytearray:
    """Change some bytes, mostly in the first ``header`` bytes, or cut the file."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        end = min(header if draw.random() < 0.8 else len(data), len(data))
        at, choice = draw.randrange(max(end, 1)), draw.random()
        if choice < 0.1:
            return data[:at]
        if choice < 0.5 and at + 8 <= len(data):
            size, code = draw.choice(((4, "<I"), (8, "<Q")))
            value = draw.choice(EXTREMES) + draw.choice((0, 0, draw.randrange(64)))
            data[at : at + size] = struct.pack(code, value % 2 ** (8 * size))
        elif at < len(data):
            data[at] = draw.randrange(256)
    return data


def damage_index(index: Path, draw: random.Random) -> None:
    """Change the index of shards, or remove, exchange or shorten one of them."""
    value = json.loads(index.read_text())
    shards = sorted(index.parent.glob("*.safetensors"))
    choice = draw.random()
    if choice < 0.5:
        index.write_text(json.dumps(change_json(value, draw)))
    elif choice < 0.7:  # a tensor in another shard, or outside the folder
        name = draw.choice(sorted(value["weight_map"]))
        names = [shard.name for shard in shards]
        value["weight_map"][name] = draw.choice([*names, "../model.safetensors", "/dev/zero", ""])
        index.write_text(json.dumps(value))
    elif choice < 0.8:
        index.write_bytes(damage_bytes(bytearray(index.read_bytes()), 2**20, draw))
    elif choice < 0.9:
        draw.choice(shards).unlink()
    else:
        a, b = draw.sample(shards, 2)
        shutil.copy(a, b)


def damage_folder(folder: Path, draw: random.Random) -> None:
    index = folder / INDEX
    if index.exists() and draw.random() < 0.4:
        damage_index(index, draw)
        return
    if draw.random() < 0.4:
        file = folder / "config.json"
        value = json.loads(file.read_text())
        if draw.random() < 0.7:
            value["quantization_config"] = change_json(value["quantization_config"], draw)
        else:
            value = change_json(value, draw)
        file.write_text(json.dumps(value))
        return
    file = draw.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    if draw.random() < 0.6:  # a header that is JSON
        header = json.loads(data[8 : 8 + size])
        if draw.random() < 0.5:  # two tensors change places, dtype or shape: what fits together
            names = draw.sample([n for n in header if n != "__metadata__"], 2)
            key = draw.choice(("dtype", "shape", "data_offsets", None))
            a, b = (header[n] for n in names)
            if key is None:
                header[names[0]], header[names[1]] = b, a
            else:
                a[key], b[key] = b[key], a[key]
        else:
            header = change_json(header, draw)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    else:
        file.write_bytes(damage_bytes(bytearray(data), 8 + size, draw))


def case(files: dict[str, Path], seed: int, folder: Path) -> tuple[str, str]:
    """Run one case; return its file and the outcome."""
    draw = random.Random(seed)
    name = draw.choice(sorted(files))
    source, target = files[name], folder / files[name].name
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
        damage_folder(target, draw)
    else:
        target.write_bytes(damage_bytes(bytearray(source.read_bytes()), 6000, draw))
    return name, outcome(lambda: read(target))


def hung(*_: object) -> None:
    raise TimeoutError(f"more than {HANG} s of processor time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: collections.Counter = collections.Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        files = undamaged(Path(folder) / "good")
        for path in files.values():
            read(path)
        (work := Path(folder) / "work").mkdir()
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + SPARE, resource.RLIM_INFINITY))
        signal.signal(signal.SIGVTALRM, hung)
        seed, began = options.seed, time.process_time()
        while True:
            signal.setitimer(signal.ITIMER_VIRTUAL, HANG)
            try:
                counts[case(files, seed, work)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            seed += 1
            if time.process_time() - began >= options.seconds:
                break
    for (name, result), count in sorted(counts.items()):
        print(f"{name:14} {result:8} {count:,}")
    print(f"{seed - options.seed:,} files, {failures} failed")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
