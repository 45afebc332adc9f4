"""The stages of ``fastlm run``: each a function of the run folder and of the results before it."""

import json
import math
import os
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlm.data.prepare import HELDOUT, TRAIN, DataOptions, Funnel, prepare, read_documents
from fastlm.data.shards import BatchSampler, TokenDataset, write_shards
from fastlm.errors import InputError
from fastlm.evals.bits_per_byte import compressed_bits_per_byte, evaluate
from fastlm.files import parse_json, read_text, save_atomic
from fastlm.model import CausalLM
from fastlm.quant import quantize
from fastlm.run import SUMMARY, Context, Stage, local_sources, machine
from fastlm.tokenizer import Tokenizer
from fastlm.train.loop import METRICS
from fastlm.train.pretrain import pretrain
from fastlm.train.state import FOLDER as CHECKPOINTS
from fastlm.typed import check

MODEL, QUANTIZED = "model", "model-int4"
DECODE_TOKENS = (
    64  # long enough to hide the first step, short enough for an untrained 2-core machine
)
DECODE_ROUNDS = 3  # in turn, medians


def run_data(c: Context) -> dict[str, Any]:
    section = asdict(c.recipe.data)
    sources = section.pop("sources")
    funnel = prepare(
        sources, c.out / "data", options=DataOptions(**section), cache=c.cache, track=c.track
    )
    steps = {s["step"]: s for s in funnel.steps}
    if not steps["heldout"]["documents"]:
        raise InputError(
            "data.heldout_bytes: wanted room for at least one whole document to hold out, got "
            f"{c.recipe.data.heldout_bytes} bytes"
        )
    return {"train_bytes": steps["train"]["bytes"], "heldout_bytes": steps["heldout"]["bytes"]}


def _prepared(c: Context, part: str) -> tuple[int, int]:
    """Documents and bytes of "train" or "heldout": what is known before they are read, so that
    progress has an end.
    """
    (step,) = (s for s in Funnel.load(c.out / "data").steps if s["step"] == part)
    return step["documents"], step["bytes"]


def run_tokenizer(c: Context) -> dict[str, Any]:
    def texts():
        left = c.recipe.tokenizer.train_bytes
        for document in read_documents(c.out / "data" / TRAIN):
            if left <= 0:
                return
            yield document.text
            left -= len(document.text.encode())

    documents, size = _prepared(c, "train")
    documents = math.ceil(documents * min(1.0, c.recipe.tokenizer.train_bytes / size))
    track = partial(c.track, total=documents)
    tokenizer = Tokenizer.train(texts(), c.recipe.tokenizer.vocab_size, track=track)
    tokenizer.chat_template = None  # a base model continues text; fine-tuning gives it a template
    tokenizer.save(c.out / "tokenizer")
    return {"vocab_size": tokenizer.vocab_size}


def run_shards(c: Context) -> dict[str, Any]:
    tokenizer = Tokenizer.load(c.out / "tokenizer")
    result = {}
    for name, file in (("train", TRAIN), ("heldout", HELDOUT)):
        texts = (document.text for document in read_documents(c.out / "data" / file))
        track = partial(c.track, total=_prepared(c, name)[0])
        info = write_shards(texts, tokenizer, c.out / "shards" / name, track=track)
        result |= {f"{name}_tokens": info.tokens, f"{name}_bytes": info.bytes_of_text}
    return result


def run_pretrain(c: Context) -> dict[str, Any]:
    section = c.recipe.pretrain
    tokenizer = Tokenizer.load(c.out / "tokenizer")
    model = CausalLM(
        c.recipe.model_config(tokenizer.vocab_size, tokenizer.eos_id), seed=c.recipe.seed
    )
    sampler = BatchSampler(
        TokenDataset(c.out / "shards/train"),
        section.batch_size,
        section.seq_len,
        seed=c.recipe.seed,
    )
    torch.manual_seed(c.recipe.seed)
    before = os.getloadavg()[0]
    result = pretrain(
        model, sampler, TokenDataset(c.out / "shards/heldout"), section, c.out,
        tokenizer=tokenizer, track=c.track, on_event=c.on_event,
    )  # fmt: skip
    model.save_pretrained(c.out / MODEL)
    tokenizer.save(c.out / MODEL)
    parameters = sum(p.numel() for p in model.parameters())
    values = asdict(result)
    values["used_seconds"] = values.pop("seconds")  # of all sittings
    load = f"{before:.1f} when the training began, {os.getloadavg()[0]:.1f} when it ended"
    return {**values, "parameters": parameters, "epochs": sampler.epoch + 1, "load": load}


def run_eval(c: Context) -> dict[str, Any]:
    texts = [document.text for document in read_documents(c.out / "data" / HELDOUT)]
    began = time.perf_counter()
    model = CausalLM.from_pretrained(c.out / MODEL)
    value = bits_per_byte(c, model)
    seconds = time.perf_counter() - began
    packed = compressed_bits_per_byte(texts)
    return {
        "bits_per_byte": value,
        "bits_per_byte_xz": packed["xz"], "bits_per_byte_zstd": packed["zstd"],
        "heldout_bytes": sum(len(t.encode()) for t in texts), "heldout_documents": len(texts),
        "eval_seconds": seconds,
    }  # fmt: skip


def bits_per_byte(c: Context, model: torch.nn.Module) -> float:
    section = c.recipe.eval
    return evaluate(
        model, TokenDataset(c.out / "shards/heldout"), c.recipe.pretrain.seq_len,
        section.batch_size, stride=section.stride, track=c.track,
    ).bits_per_byte  # fmt: skip


def run_quantize(c: Context) -> dict[str, Any]:
    section = asdict(c.recipe.quantize)
    tokenizer = Tokenizer.load(c.out / "tokenizer")
    before = CausalLM.from_pretrained(c.out / MODEL)
    small = quantize(CausalLM.from_pretrained(c.out / MODEL), track=c.track, **section)
    assert isinstance(small, CausalLM)  # only modules inside it are replaced
    small.save_pretrained(c.out / QUANTIZED)
    tokenizer.save(c.out / QUANTIZED)
    after = CausalLM.from_pretrained(c.out / QUANTIZED, dtype=before.dtype)
    speed = decode_speeds({"bf16": before, "int4": after}, tokenizer.eos_id or 0)
    return {
        "format": section["format"], "group_size": section["group_size"],
        "bits_per_byte_int4": bits_per_byte(c, after),
        "bf16_bytes": weight_bytes(c.out / MODEL), "int4_bytes": weight_bytes(c.out / QUANTIZED),
        "decode_tokens_per_second_bf16": speed["bf16"],
        "decode_tokens_per_second_int4": speed["int4"],
    }  # fmt: skip


def weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def decode_speeds(models: dict[str, CausalLM], start: int) -> dict[str, float]:
    """Tokens per second at batch 1, the models in turn, medians."""
    rates: dict[str, list[float]] = {name: [] for name in models}
    prompt = torch.tensor([[start]])
    length = min(DECODE_TOKENS, min(m.config.max_position_embeddings for m in models.values()) - 1)
    for _ in range(DECODE_ROUNDS):
        for name, model in models.items():
            began = time.perf_counter()
            model.generate(prompt, max_new_tokens=length, temperature=0.0, ignore_eos=True)
            rates[name].append(length / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def run_report(c: Context) -> dict[str, Any]:
    from fastlm.report import write_report

    r = c.results
    summary = {
        "recipe": c.recipe.name, "command": c.command,
        **{k: r["eval"][k] for k in ("bits_per_byte", "bits_per_byte_xz", "bits_per_byte_zstd")},
        **r["quantize"],
        "tokens_per_second": r["pretrain"]["tokens_per_second"],
        "parameters": r["pretrain"]["parameters"], "tokens": r["pretrain"]["tokens"],
        "steps": r["pretrain"]["steps"], "epochs": r["pretrain"]["epochs"],
        "train_loss": r["pretrain"]["loss"],
        "vocab_size": r["tokenizer"]["vocab_size"], **r["shards"],
        "heldout_documents": r["eval"]["heldout_documents"],
        "seconds": sum(c.seconds.values()), "stage_seconds": dict(c.seconds),
        "machine": {**machine(), "load": r["pretrain"].get("load", "not known")},
    }  # fmt: skip
    metrics = read_metrics(c.out / METRICS)
    write_report(c.out / "report.html", summary, Funnel.load(c.out / "data"), metrics, c.recipe)
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    save_atomic(c.out / SUMMARY, lambda p: p.write_text(text, "utf-8"))
    return summary


MAX_METRICS = 2**33  # bytes; a step's line takes 225


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl: of steps ("loss"), validations ("val_loss") and samples."""
    schemas = {
        "loss": {"loss": float, "lr": float, "tokens": int, "seconds": float},
        "val_loss": {"val_loss": float, "bits_per_byte": float},
        "sample": {"sample": str, "progress": float},
    }
    lines, steps = [], {0}
    # not by splitlines: a sample may hold U+2028
    for number, text in enumerate(read_text(path, MAX_METRICS).split("\n"), 1):
        if not text:
            continue
        where = f"{path}: line {number}"
        line = parse_json(text, where)
        check(line, {"step": int}, where)
        for kind, schema in schemas.items():
            if kind in line:
                check(line, schema, where)
        steps |= {line["step"]} if "loss" in line else set()
        if line["step"] not in steps:
            raise InputError(f"{where}: wanted a step that was trained, got {line['step']}")
        lines.append(line)
    return lines


def _data_inputs(c: Context) -> list[Any]:
    return [asdict(replace(c.recipe.data, workers=1)), local_sources(c)]


def _training_inputs(c: Context) -> list[Any]:
    return [c.recipe.pretrain.identity(), c.recipe.model, c.recipe.seed]


_BYTES = {"train_bytes": int, "heldout_bytes": int}
_TRAINING = {
    "steps": int, "tokens": int, "tokens_per_second": float, "loss": float | None,
    "parameters": int, "epochs": int,
}  # fmt: skip
_BITS = dict.fromkeys(("bits_per_byte", "bits_per_byte_xz", "bits_per_byte_zstd"), float)
_QUANTIZED = {
    "bits_per_byte_int4": float, "bf16_bytes": int, "int4_bytes": int,
    "decode_tokens_per_second_bf16": float, "decode_tokens_per_second_int4": float,
}  # fmt: skip
CHAIN = (
    Stage("data", _data_inputs, ("data",), run_data, _BYTES),
    Stage(
        "tokenizer", lambda c: asdict(c.recipe.tokenizer), ("tokenizer",), run_tokenizer,
        {"vocab_size": int},
    ),
    Stage(
        "shards", lambda c: None, ("shards",), run_shards,
        _BYTES | {"train_tokens": int, "heldout_tokens": int},
    ),
    Stage(
        "pretrain", _training_inputs, (MODEL, METRICS), run_pretrain, _TRAINING,
        scratch=(CHECKPOINTS,),
    ),
    Stage(
        "eval", lambda c: asdict(c.recipe.eval), (), run_eval, _BITS | {"heldout_documents": int}
    ),
    Stage("quantize", lambda c: asdict(c.recipe.quantize), (QUANTIZED,), run_quantize, _QUANTIZED),
    Stage(
        "report", lambda c: c.recipe.name, ("report.html", SUMMARY), run_report,
        {"recipe": str, "bits_per_byte_int4": float} | _BITS,
    ),
)  # fmt: skip
