"""The options of ``fastlm serve``, which are the flags of its command."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import Repeated

LOCAL_NAMES = ("127.0.0.1", "::1", "localhost")
KEYS_VARIABLE = "FASTLM_API_KEYS"
ADMIN_KEYS_VARIABLE = "FASTLM_ADMIN_KEYS"
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#]+")
KV_DTYPES = ("float32", "bfloat16", "float16", "int8")
AT_LEAST = {
    "measure_days": 1, "max_new_tokens": 1, "max_body": 1024, "max_waiting": 1, "max_rows": 1,
    "max_length": 2, "draft_tokens": 0, "max_connections": 1, "max_seconds": 1, "drain": 0,
}  # fmt: skip
BETWEEN = {"port": (0, 65535), "measure_rows": (0, 10**7), "pages": (1, 2**31 - 1)}
# Options of `fastlm.inference.engine.Engine` -> those of the server, by which users know them
ENGINE_OPTIONS = {
    "num_blocks": "pages", "max_num_seqs": "max_rows", "max_queue_size": "max_waiting",
    "max_model_len": "max_length", "num_speculative_tokens": "draft_tokens",
    "kv_cache_dtype": "kv_dtype",
}  # fmt: skip


@dataclass(frozen=True)
class ServeOptions:
    """How `fastlm serve` serves a model; `check` refuses what cannot work."""

    model: Annotated[Path, "Hugging Face folder, .gguf, fastlm run or model:smollm2", "-m"]
    host: Annotated[str, "Address to listen on; another than this machine's needs API keys"] = (
        "127.0.0.1"
    )
    port: Annotated[int, "0: any free one"] = 8000
    name: Annotated[
        str | None,
        "What clients call the model; default: the folder's name, of model:smollm2 smollm2",
    ] = None
    feedback: Annotated[
        str | None, "Keep feedback in this SQLite file, or in postgresql://USER@HOST/NAME"
    ] = None
    metrics: Annotated[
        Path | None, "TOML: numbers that people may give with --feedback (docs/serving.md)"
    ] = None
    alerts: Annotated[
        Path | None, "TOML: rules for alerts about what --feedback measures of answers"
    ] = None
    measure_days: Annotated[float, "Days that measures of answers are kept"] = 90.0
    measure_rows: Annotated[int, "Measures kept at most; 0: nothing is measured"] = 100_000
    rank: Annotated[
        str | None, "Feedback database whose answers people rank at /rank (`fastlm rank`)"
    ] = None
    api_key_file: Annotated[
        Path | None, f"API keys, one a line; or in the variable {KEYS_VARIABLE}, with commas"
    ] = None
    allow_host: Annotated[
        tuple[str, ...],
        Repeated("Another name by which clients call this machine; may be given again"),
    ] = ()
    allow_origin: Annotated[
        tuple[str, ...],
        Repeated(
            "A web page's origin that may call the server (CORS), as https://example.org; '*': any,"
            " with API keys. May be given again"
        ),
    ] = ()
    chat_template: Annotated[Path | None, "Jinja file; default: the model's own template"] = None
    adapter: Annotated[
        tuple[str, ...],
        Repeated(
            "NAME=PATH: another adapter or model, which clients choose by this name. May be given"
            " again; each takes the memory of a model"
        ),
    ] = ()
    max_new_tokens: Annotated[int | None, "Longest answer; default: the model's context"] = None
    max_body: Annotated[int, "Bytes of a request"] = 4 * 2**20
    max_waiting: Annotated[int, "Requests in the queue"] = 256
    max_rows: Annotated[int, "Answers at the same time"] = 64
    max_length: Annotated[
        int | None,
        "Tokens of a prompt with its answer, at most (default: what the model allows); dynamic and"
        " longrope models turn by it",
    ] = None
    pages: Annotated[
        int | None,
        "Pages of 64 tokens in the key/value cache, at most what fits the memory; default:"
        " --max-rows answers of 512 tokens with their prompts, or one whole context if that is"
        " more, within a quarter of the memory (on a GPU: --max-rows contexts, within half of its"
        " free memory)",
    ] = None
    kv_dtype: Annotated[
        str | None,
        f"Of cached keys and values: {', '.join(KV_DTYPES)}; default: the model's, float16 where"
        " its activations are rounded to 8 bits",
    ] = None
    draft_model: Annotated[
        Path | None,
        "A smaller model with the same tokenizer, which guesses the next tokens; the answers stay"
        " the same",
    ] = None
    draft_tokens: Annotated[
        int | None,
        "Tokens that a step guesses; without --draft-model from the prompt, for answers that repeat"
        " it. Default: 4 with --draft-model, else 0",
    ] = None
    max_connections: Annotated[int, "Connections at the same time"] = 1024
    max_seconds: Annotated[float, "An answer ends after so many seconds as it is"] = 600.0
    drain: Annotated[float, "Seconds that answers may take to end after SIGTERM"] = 30.0
    act_bits: Annotated[int | None, "As for generate"] = None
    canary: Annotated[
        str | None,
        "A model that may take over: it answers --share of the conversations until a test promotes"
        " it or rolls it back (with --feedback)",
    ] = None
    share: Annotated[float, "Of the conversations, for --canary"] = 0.1
    canary_metric: Annotated[
        str,
        "What is a success: thumb (up), pick (preferred over the other model's answer), stop (the"
        " answer ended by itself), or a number of --metrics (in the better half)",
    ] = "thumb"
    canary_rule: Annotated[
        str,
        "superiority: promote a canary that is better; non-inferiority: one that is worse by less"
        " than --canary-margin",
    ] = "superiority"
    canary_margin: Annotated[float, "Of the success rate"] = 0.05
    canary_alpha: Annotated[float, "Rate of promotions that the rule does not want"] = 0.05
    canary_most: Annotated[int, "Outcomes after which the old model stays"] = 5000
    models_dir: Annotated[Path | None, "`fastlm promote` may load models below this folder"] = None
    state: Annotated[
        Path | None, "What was decided, for the next start; default: next to the --feedback file"
    ] = None
    admin_key_file: Annotated[
        Path | None, f"Keys that may promote and roll back; or in {ADMIN_KEYS_VARIABLE}"
    ] = None

    def check(self, keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        """Refuse options that cannot work. InputError names the option."""
        bounds = {name: (least, math.inf) for name, least in AT_LEAST.items()} | BETWEEN
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"{low} to {high}" if high < math.inf else f"at least {low}"
                raise InputError(f"{name}: expected {bound}, got {value}")
        for wrong, message in (
            (admin_keys and not keys, "admin_key_file: expected API keys, too (--api-key-file)"),
            (self.host not in LOCAL_NAMES and not keys,
             f"host: expected API keys (--api-key-file) to listen on {self.host}"),
            ("*" in self.allow_origin and not keys,
             "allow_origin: expected API keys (--api-key-file) with '*'"),
            (self.metrics and not self.feedback, "metrics: expected with --feedback"),
            (self.alerts and not self.feedback, "alerts: expected with --feedback"),
            (self.canary and not self.feedback,
             "canary: expected --feedback, where its outcomes are kept"),
        ):  # fmt: skip
            if wrong:
                raise InputError(f"{message}, got none")
        for origin in self.allow_origin:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise InputError(
                    "allow_origin: expected '*' or a page's scheme, host and port, as"
                    f" https://example.org, got {origin!r:.80}"
                )
        if self.kv_dtype not in (None, *KV_DTYPES):
            names = ", ".join(KV_DTYPES)
            raise InputError(f"kv_dtype: expected {names}, got {self.kv_dtype!r:.80}")
        self.adapters()
        self.state_file()

    def adapters(self) -> dict[str, Path]:
        """The models of --adapter by their names."""
        adapters: dict[str, Path] = {}
        for text in self.adapter:
            name, _, path = text.partition("=")
            if not name or not path or not name.isprintable() or name in adapters:
                raise InputError(f"adapter: expected NAME=PATH, each name once, got {text!r:.200}")
            adapters[name] = Path(path)
        return adapters

    def state_file(self) -> Path | None:
        """Where decisions are kept; None: the models of this server do not change."""
        if self.canary is None and self.models_dir is None:
            return None
        if self.state is None and (self.feedback is None or "://" in self.feedback):
            raise InputError("state: expected a file for what is decided (--state), got none")
        return self.state or Path(f"{self.feedback}.models.json")

    def engine(self) -> dict[str, Any]:
        """The options of `fastlm.inference.engine.Engine`."""
        import torch

        kv_dtype = None if self.kv_dtype is None else getattr(torch, self.kv_dtype)
        options = {name: getattr(self, option) for name, option in ENGINE_OPTIONS.items()}
        return options | {"kv_cache_dtype": kv_dtype}
