"""The options of ``fastlm serve``, and of every server; each field is a flag of a command."""

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
KV_CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8")
MIN_VALUES = {
    "measure_days": 1, "max_new_tokens": 1, "max_body": 1024, "max_queue_size": 1,
    "max_num_seqs": 1, "max_model_len": 2, "num_speculative_tokens": 0, "max_connections": 1,
    "max_seconds": 1, "drain": 0,
}  # fmt: skip
RANGES = {"measure_rows": (0, 10**7), "num_blocks": (1, 2**31 - 1)}
# The options that `fastlm.inference.engine.Engine` takes under the same names
ENGINE_OPTIONS = (
    "num_blocks", "max_num_seqs", "max_queue_size", "max_model_len", "num_speculative_tokens",
    "kv_cache_dtype",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where a server listens, and which clients it answers."""

    host: Annotated[str, "Listen on this address; one that other machines reach needs API keys"] = (
        "127.0.0.1"
    )
    port: Annotated[int, "Listen on this port; 0 takes a free one"] = 8000
    api_key_file: Annotated[
        Path | None,
        "Read API keys from this file, one a line, each of 16 or more printable ASCII characters"
        f" without spaces (default: the variable {KEYS_VARIABLE}, with commas)",
    ] = None
    allow_host: Annotated[
        tuple[str, ...],
        Repeated("Let clients call this machine by another name; may be repeated"),
    ] = ()

    def check_address(self, keys: Sequence[str]) -> None:
        """InputError: the port is out of range, or the address needs keys."""
        if not 0 <= self.port <= 65535:
            raise InputError(f"port: expected 0 to 65535, got {self.port}")
        if self.host not in LOCAL_NAMES and not keys:
            raise InputError(
                f"host: expected API keys (--api-key-file) to listen on {self.host}, got none"
            )

    def host_names(self) -> frozenset[str] | None:
        """Return the names by which clients may call the server; None: by any."""
        if self.host not in LOCAL_NAMES:
            return None
        return frozenset((*LOCAL_NAMES, *map(str.lower, self.allow_host)))


@dataclass(frozen=True)
class ServeOptions(ListenOptions):
    """The options of `fastlm serve`; `check` refuses those that cannot work."""

    model: Annotated[
        Path, "Serve this Hugging Face folder, .gguf file, fastlm run or model:smollm2", "-m"
    ]
    name: Annotated[
        str | None,
        "Call the model by this name in the API (default: the name of its folder or file)",
    ] = None
    feedback: Annotated[
        str | None, "Store feedback in this SQLite file, or in postgresql://USER@HOST/NAME"
    ] = None
    metrics: Annotated[
        Path | None, "Read the numbers that people may give with --feedback from this TOML file"
    ] = None
    alerts: Annotated[
        Path | None, "Read the rules for alerts on what --feedback measures from this TOML file"
    ] = None
    measure_days: Annotated[float, "Keep measurements of responses for this number of days"] = 90.0
    measure_rows: Annotated[int, "Keep at most this many measurements; 0 measures nothing"] = (
        100_000
    )
    rank: Annotated[
        str | None, "Let people rank the answers of this feedback database at /rank (`fastlm rank`)"
    ] = None
    allow_origin: Annotated[
        tuple[str, ...],
        Repeated(
            "Let web pages of this origin call the server (CORS), such as https://example.org; '*'"
            " allows any origin and needs API keys. May be repeated"
        ),
    ] = ()
    chat_template: Annotated[
        Path | None, "Use this Jinja file as the chat template (default: the model's own)"
    ] = None
    adapter: Annotated[
        tuple[str, ...],
        Repeated(
            "Serve another adapter or model, given as NAME=PATH; clients choose it by NAME. Each"
            " takes the memory of a model. May be repeated"
        ),
    ] = ()
    max_new_tokens: Annotated[
        int | None, "Limit an answer to this number of tokens (default: the model's context)"
    ] = None
    max_body: Annotated[int, "Limit the body of a request to this number of bytes"] = 4 * 2**20
    max_queue_size: Annotated[int, "Let at most this many requests wait in the queue"] = 256
    max_num_seqs: Annotated[int, "Compute at most this many answers at the same time"] = 64
    max_model_len: Annotated[
        int | None,
        "Limit a prompt with its answer to this number of tokens (default: the model's context)."
        " The rotary frequencies of dynamic and longrope models depend on it",
    ] = None
    num_blocks: Annotated[
        int | None,
        "Give the key/value cache this number of blocks of 64 tokens, at most what fits the memory."
        " The default holds --max-num-seqs answers of 512 tokens with their prompts, or one context"
        " if that is more, within a quarter of the memory; on a GPU --max-num-seqs contexts, within"
        " half of its free memory",
    ] = None
    kv_cache_dtype: Annotated[
        str | None,
        f"Store keys and values as {', '.join(KV_CACHE_DTYPES)} (default: the model's dtype,"
        " float16 where its activations are rounded to 8 bits)",
    ] = None
    draft_model: Annotated[
        Path | None,
        "Propose tokens with this smaller model of the same tokenizer (speculative decoding); the"
        " answers stay the same",
    ] = None
    num_speculative_tokens: Annotated[
        int | None,
        "Propose this number of tokens in each step (default: 4 with --draft-model, else 0)."
        " Without --draft-model they come from the prompt, for answers that repeat it",
    ] = None
    max_connections: Annotated[int, "Accept at most this many connections at the same time"] = 1024
    max_seconds: Annotated[float, "End an answer after this time, where it is then"] = 600.0
    drain: Annotated[float, "Wait for running answers for this many seconds after SIGTERM"] = 30.0
    act_bits: Annotated[
        int | None,
        "Multiply quantized weights with inputs rounded to int8 (8) or not rounded (16); the"
        " default is the model's, 8 for .gguf files",
    ] = None
    canary: Annotated[
        str | None,
        "Try this model: it answers --canary-share of the conversations until a test promotes it or"
        " rolls it back (with --feedback)",
    ] = None
    canary_share: Annotated[float, "Give --canary this share of the conversations"] = 0.1
    canary_metric: Annotated[
        str,
        "Count as success: thumb (up), pick (preferred over the other model's answer), stop (the"
        " answer ended by itself), or a number of --metrics (in the better half)",
    ] = "thumb"
    canary_rule: Annotated[
        str,
        "Promote a canary that is better (superiority), or worse by less than --canary-margin"
        " (non-inferiority)",
    ] = "superiority"
    canary_margin: Annotated[
        float, "Accept this loss of success rate under the rule non-inferiority"
    ] = 0.05
    canary_alpha: Annotated[float, "Limit the rate of false promotions to this"] = 0.05
    canary_max_outcomes: Annotated[
        int, "Keep the old model after this number of outcomes without a decision"
    ] = 5000
    models_dir: Annotated[
        Path | None, "Let `fastlm promote` load models from below this folder"
    ] = None
    state: Annotated[
        Path | None,
        "Store decisions about models in this file, for the next start (default: next to the"
        " --feedback file)",
    ] = None
    admin_key_file: Annotated[
        Path | None,
        "Read the keys that may promote and roll back from this file (default: the variable"
        f" {ADMIN_KEYS_VARIABLE})",
    ] = None

    def check(self, keys: Sequence[str], admin_keys: Sequence[str]) -> None:
        """Refuse options that cannot work. InputError names the option."""
        self.check_address(keys)
        bounds = {name: (low, math.inf) for name, low in MIN_VALUES.items()} | RANGES
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                bound = f"{low} to {high}" if high < math.inf else f"at least {low}"
                raise InputError(f"{name}: expected {bound}, got {value}")
        for wrong, message in (
            (admin_keys and not keys, "admin_key_file: expected API keys, too (--api-key-file)"),
            ("*" in self.allow_origin and not keys,
             "allow_origin: expected API keys (--api-key-file) with '*'"),
            (self.metrics and not self.feedback, "metrics: needs --feedback"),
            (self.alerts and not self.feedback, "alerts: needs --feedback"),
            (self.canary and not self.feedback,
             "canary: expected --feedback, where its outcomes are stored"),
        ):  # fmt: skip
            if wrong:
                raise InputError(f"{message}, got none")
        for origin in self.allow_origin:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise InputError(
                    "allow_origin: expected '*' or a page's scheme, host and port, as"
                    f" https://example.org, got {origin!r:.80}"
                )
        if self.kv_cache_dtype not in (None, *KV_CACHE_DTYPES):
            names = ", ".join(KV_CACHE_DTYPES)
            raise InputError(f"kv_cache_dtype: expected {names}, got {self.kv_cache_dtype!r:.80}")
        self.adapters()
        self.state_file()

    def adapters(self) -> dict[str, Path]:
        """Return the models of --adapter by their names."""
        adapters: dict[str, Path] = {}
        for text in self.adapter:
            name, _, path = text.partition("=")
            if not name or not path or not name.isprintable() or name in adapters:
                raise InputError(f"adapter: expected NAME=PATH, each name once, got {text!r:.200}")
            adapters[name] = Path(path)
        return adapters

    def state_file(self) -> Path | None:
        """Return the file of decisions; None: the models of this server do not change."""
        if self.canary is None and self.models_dir is None:
            return None
        if self.state is None and (self.feedback is None or "://" in self.feedback):
            raise InputError("state: expected a file for decisions (--state), got none")
        return self.state or Path(f"{self.feedback}.models.json")

    def engine(self) -> dict[str, Any]:
        """Return the options of `fastlm.inference.engine.Engine`."""
        import torch

        options = {name: getattr(self, name) for name in ENGINE_OPTIONS}
        dtype = options["kv_cache_dtype"]
        return options | {"kv_cache_dtype": None if dtype is None else getattr(torch, dtype)}
