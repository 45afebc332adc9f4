"""The package as others install it: wheel and sdist, outside the repository; the public surface;
the guard for kernels/.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from paths import ROOT

import fastlm


def test_public_names_resolve_and_are_listed():
    for name in fastlm.__all__:
        assert getattr(fastlm, name) is not None
    assert set(fastlm.__all__) <= set(dir(fastlm))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fastlm.nonsense


def test_import_does_not_wait_for_torch():
    code = "import sys, fastlm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_loading_a_model_does_not_wait_for_dynamo():
    """As `CausalLM.from_pretrained` does: drawing an embedding on meta imports torch._dynamo."""
    code = (
        "import sys, torch, fastlm\n"
        "config = fastlm.ModelConfig.from_dict({'model_type': 'llama', 'vocab_size': 8,"
        " 'hidden_size': 16, 'intermediate_size': 16, 'num_hidden_layers': 1,"
        " 'num_attention_heads': 1, 'pad_token_id': 0})\n"
        "with torch.device('meta'):\n"
        "    model = fastlm.CausalLM(config)\n"
        "sys.exit('torch._dynamo' in sys.modules or not model.model.embed_tokens.weight.is_meta)"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code]).returncode == 0


def test_kernels_stands_in_nobodys_way(tmp_path):
    """In the root of a clone ``import kernels`` gets PyPI's package of that name."""

    def run(code, site=None):
        path = {} if site is None else {"PYTHONPATH": str(site)}
        command = [sys.executable, "-c", code]  # the working directory is on sys.path
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | path
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stdout.split()

    pypi = tmp_path / "kernels"
    pypi.mkdir()
    (pypi / "__init__.py").write_text("from kernels.sub import get_kernel\n")
    (pypi / "sub.py").write_text("def get_kernel(): return 'theirs'\n")
    theirs = (
        "import kernels; from kernels import get_kernel, sub; print(get_kernel(), sub.__name__)"
    )
    assert run(theirs, tmp_path) == ["theirs", "kernels.sub"]
    ours = "import fastlm.kernels.rope as r, kernels; print(r.__name__, kernels.get_kernel())"
    assert run(ours, tmp_path) == ["fastlm.kernels.rope", "theirs"]
    # not find_spec: other tests of this process may have put a module of that name in
    if "kernels" not in importlib.metadata.packages_distributions():
        none = "try: from kernels import get_kernel\nexcept ImportError as e: print(e.name)"
        assert run(none) == ["kernels"]
        probe = "from transformers import AutoConfig, utils; print(utils.is_kernels_available())"
        assert run(probe) == ["False"]


def test_wheel_and_sdist_work_outside_the_repository(tmp_path):
    """The sdist is built from the tree and the wheel from the sdist. The wheel is installed into a
    fresh venv that only borrows this one's dependencies.

    Objects are those of the tree: the sdist has every source, and equal sources compile to them.
    """

    def build(kind: str, source: Path) -> Path:
        command = [sys.executable, "-P", "-m", "build", "--no-isolation", kind]
        command += ["--outdir", str(tmp_path), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (archive,) = tmp_path.glob("*.tar.gz" if kind == "--sdist" else "*.whl")
        return archive

    with tarfile.open(build("--sdist", ROOT)) as t:
        t.extractall(tmp_path, filter="data")
    (source,) = tmp_path.glob("fastlm-*/")
    for folder in ("csrc", "kernels", "fastlm"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".inl", ".py"):
                copy = source / path.relative_to(ROOT)
                assert copy.read_bytes() == path.read_bytes(), copy
    assert (source / "LICENSE").exists()
    shutil.copytree(ROOT / "build/release", source / "build/release")
    wheel = build("--wheel", source)
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    expected = ("kernels/__init__.py", "ops/rms_norm.py", "data/prepare.py", "stages.py")
    assert {f"fastlm/{name}" for name in expected} <= names
    assert any(n.startswith("fastlm/_cpu.") for n in names)
    has_cuda = any(n.startswith("fastlm/_cuda.") for n in names)
    assert has_cuda == (importlib.util.find_spec("fastlm._cuda") is not None)
    assert not any(n.startswith("fastlm/_simt.") for n in names)
    templates, tables = (
        [str(p.relative_to(ROOT)) for p in (ROOT / "fastlm").rglob(f"*.{kind}")]
        for kind in ("jinja", "toml")
    )
    pages = [str(p.relative_to(ROOT)) for p in (ROOT / "fastlm/serve/page").iterdir()]
    assert len(templates) > 5 and len(pages) > 5
    assert {*templates, *tables, *pages, "fastlm/serve/grafana.json"} <= set(names)
    assert not any(n.startswith(("tests/", "bench/", "kernels/")) for n in names)

    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python3*")) / "site-packages"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(site),
            str(wheel),
        ],
        check=True,
    )
    borrowed = [p for p in sys.path if p.endswith("site-packages")]
    (site / "zz_borrowed.pth").write_text("\n".join(borrowed))
    code = (
        "import fastlm, fastlm.kernels, torch, pathlib;"
        f"assert pathlib.Path(fastlm.__file__).is_relative_to({str(site)!r}), fastlm.__file__;"
        f"has_cuda = {has_cuda};"
        "exec('import fastlm._cuda' if has_cuda else '');"  # also without a GPU
        "print(fastlm.ops.rms_norm(torch.ones(2, 8), torch.ones(8)).sum().item())"
    )
    done = subprocess.run(
        [home / "bin" / "python", "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    script = subprocess.run(
        [home / "bin" / "python", "-P", "-m", "fastlm", "info", "--json"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert json.loads(script.stdout)["ops"]["rms_norm"]["backend"] == "cpu", script.stderr
    assert done.stdout.strip().startswith("16") or abs(float(done.stdout) - 16) < 1e-3, done.stderr
