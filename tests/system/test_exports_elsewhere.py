"""Exports in the programs that they are for: the checks `llama_cpp_check.py` and
`compressed_tensors_check.py`, on a small model that knows its text by heart. Skipped where those
programs are not installed; their files say how.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import preference_models
import pytest
import torch
from paths import SUPPORT

from fastlm.export.stage import Export
from fastlm.model.causal_lm import CausalLM
from fastlm.quant import quantize
from fastlm.tokenizer.tokenizer import Tokenizer

TEXT = " ".join(preference_models.WORDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "base"
    preference_models.make_base(folder, initializer_range=0.1)
    model = CausalLM.from_pretrained(folder).train()
    ids = torch.tensor([Tokenizer.load(folder).encode(TEXT)[: model.context_limit]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # rounded activations do not change its choices
    model.save_pretrained(folder)
    return folder


def check(script: str, *arguments: Path) -> str:
    command = [sys.executable, str(SUPPORT / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def exported(base: Path, folder: Path, format: str, kind: str | None) -> tuple[Path, Path]:
    source = base
    if kind:
        source = folder / "small"
        model = quantize(CausalLM.from_pretrained(base), kind, group_size=32)
        model.save_pretrained(source)
        Tokenizer.load(base).save(source)
    Export(format=format)(folder / "export", model=source)
    return source, folder / "export"


@pytest.mark.skipif(
    not importlib.util.find_spec("llama_cpp_py_sync"), reason="llama-cpp-py-sync is not installed"
)
@pytest.mark.parametrize("kind", [None, "w4a16", "w8a16"])
def test_llama_cpp_chooses_the_same_tokens(base, tmp_path, kind):
    source, folder = exported(base, tmp_path, "gguf", kind)
    result = check("llama_cpp_check.py", source, folder / "model.gguf")
    assert result.count("32 of 32 greedy tokens equal") == 2 and "ids of" in result


@pytest.mark.skipif(
    not importlib.util.find_spec("compressed_tensors"), reason="compressed-tensors is not installed"
)
@pytest.mark.parametrize("kind", ["w4a16", "w8a16"])
def test_transformers_reads_the_same_weights(base, tmp_path, kind):
    _, folder = exported(base, tmp_path, "compressed-tensors", kind)
    result = check("compressed_tensors_check.py", folder)
    assert "export: weights equal" in result and "greedy tokens equal" in result
