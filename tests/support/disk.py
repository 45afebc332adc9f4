"""A full disk, as the kernel reports it."""

from pathlib import Path

import fastlm.files


def full_disk(monkeypatch, path: Path) -> None:
    """Send what ``fastlm.files`` writes next to ``path`` to /dev/full, but no other files."""
    part = path.parent / f".{path.name}.fastlm-full.part"
    part.symlink_to("/dev/full")
    draw = fastlm.files.secrets.token_hex

    class Names:
        @staticmethod
        def token_hex(size):
            return "full" if part.is_symlink() else draw(size)

    monkeypatch.setattr(fastlm.files, "secrets", Names)
