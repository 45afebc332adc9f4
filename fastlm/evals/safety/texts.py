"""Data of the package: texts written for fastlm, and the sources of the sets."""

import tomllib
from pathlib import Path
from typing import Any


def _table(name: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(name).read_text("utf-8"))


SENTENCES = _table("sentences.toml")
SOURCES: dict[str, dict[str, str]] = _table("sources.toml")
