"""A disk that is full, by the kernel's own word."""

from pathlib import Path

import fastlm.files


def full_disk(monkeypatch, path: Path) -> None:
    """What ``fastlm.files`` writes beside ``path`` goes to /dev/full; other files as ever."""
    (path.parent / f".{path.name}.full.part").symlink_to("/dev/full")
    draw = fastlm.files.secrets.token_hex

    class Names:
        @staticmethod
        def token_hex(size):
            return "full" if (path.parent / f".{path.name}.full.part").is_symlink() else draw(size)

    monkeypatch.setattr(fastlm.files, "secrets", Names)
