"""Read text verbatim: local files as strict UTF-8, long ones as pieces cut at blank lines.

A piece ends at the last blank line before a multiple of PIECE_BYTES of the file, so that a reader
which starts at any piece cuts the same pieces as one that starts at the beginning.
"""

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fastlm.errors import InputError
from fastlm.sources.document import (
    MAX_DOCUMENT_BYTES,
    Document,
    FileRange,
    SourceFile,
    decode_web,
)
from fastlm.sources.json_rows import read_json
from fastlm.sources.streams import open_stream

# Long text files become documents of about this size, cut at blank lines.
PIECE_BYTES = 1 << 19
CONTROL = bytes(set(range(32)) - set(b"\t\n\r\f\b\x1b"))
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


class TextPiece(NamedTuple):
    """A part of a long text. ``offset``: its first byte in the decompressed file."""

    offset: int
    data: bytes
    last: bool


def refuse_binary(file: SourceFile, head: bytes) -> None:
    """Raise InputError if the first bytes of a file are not text."""
    head = head[:8192]
    if head.startswith(UTF16_MARKS):  # UTF-16 with its mark: zeros are valid there
        return
    control = len(head) - len(head.translate(None, CONTROL))
    # 1 in 10: text has none; executables and images have a third or more
    if b"\0" in head or control * 10 > len(head):
        raise InputError(f"{file.path}: expected text, it holds binary data")


def text_pieces(file: SourceFile, stream: BinaryIO, offset: int = 0) -> Iterator[TextPiece]:
    """Yield the pieces of a UTF-8 text from ``offset``, where a piece begins.

    InputError: binary data, or a line over MAX_DOCUMENT_BYTES.
    """
    # the blocks end at the same places whatever the offset
    rest = bytearray(stream.read(PIECE_BYTES - offset % PIECE_BYTES))
    if not offset:
        refuse_binary(file, bytes(rest[:8192]))
    while True:
        block = stream.read(PIECE_BYTES)
        if len(rest) > PIECE_BYTES or not block:
            cut = len(rest) if not block else rest.rfind(b"\n\n") + 1
            if not cut and len(rest) > 2 * PIECE_BYTES:
                cut = rest.rfind(b"\n") + 1
            if cut:
                yield TextPiece(offset, bytes(rest[:cut]), not block)
                offset += cut
                del rest[:cut]
        if not block:
            return
        rest += block
        if len(rest) - rest.rfind(b"\n") > MAX_DOCUMENT_BYTES:
            line = _line_at(file, offset) + rest.count(b"\n")
            raise InputError(
                f"{file.path}, line {line}: expected lines of at most {MAX_DOCUMENT_BYTES:,} bytes"
            )


def read_text(file: SourceFile, stream: BinaryIO, range: FileRange) -> Iterator[Document]:
    """Yield the documents of a text file: one, or a piece each. ``stream`` is at ``range.offset``.

    InputError: as `text_pieces`, invalid UTF-8, UTF-16 over MAX_DOCUMENT_BYTES.
    """
    head = b"" if range.offset else stream.peek(2)[:2]  # type: ignore[attr-defined]
    if head in UTF16_MARKS:
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InputError(
                f"{file.path}: expected UTF-8 for text over {MAX_DOCUMENT_BYTES:,} bytes, got "
                "UTF-16"
            )
        if range.start == 0:
            text = data.decode("utf-16", "replace")
            yield Document(text, file.name, file.source, {"format": "text"})
        return
    part = range.start if range.offset else 0
    for piece in text_pieces(file, stream, range.offset):
        if range.stop is not None and part >= range.stop:
            return
        if piece.data.strip():
            name = file.name if piece.last and not part else f"{file.name}:{part}"
            if part >= range.start:
                text = _decode(file, piece.data, piece.offset)
                yield Document(text, name, file.source, {"format": "text"})
            part += 1


def read_notebook(file: SourceFile, stream: BinaryIO) -> Document:
    """Return the text and the code of a Jupyter notebook, without outputs."""
    book = read_json(file, stream)
    cells = book.get("cells") if isinstance(book, dict) else None
    if not isinstance(cells, list):
        raise InputError(f"{file.path}: expected a notebook with cells (nbformat 4)")
    texts = []
    for cell in cells:
        source = cell.get("source") if isinstance(cell, dict) else None
        if isinstance(source, list):
            source = "".join(line for line in source if isinstance(line, str))
        if isinstance(source, str) and cell.get("cell_type") in ("markdown", "code"):
            texts.append(source.strip("\n"))
    text = "\n\n".join(texts).encode("utf-8", "replace").decode()
    return Document(text, file.name, file.source, {"format": "text"})


def _decode(file: SourceFile, data: bytes, offset: int) -> str:
    """Decode local files as strict UTF-8, so that a wrong byte is found before training."""
    try:
        return data.decode("utf-8" if offset else "utf-8-sig")
    except UnicodeDecodeError as e:
        if file.package:
            return decode_web(data, html=False)
        line = _line_at(file, offset) + data.count(b"\n", 0, e.start)
        raise InputError(
            f"{file.path}, line {line}: expected UTF-8, got byte 0x{data[e.start]:02x} "
            "(iconv converts other encodings)"
        ) from None


def _line_at(file: SourceFile, offset: int) -> int:
    """Return the number of the line that begins at ``offset``. Reads the file: for errors only."""
    line = 1
    with open_stream(file.path) as stream:
        while offset > 0 and (block := stream.read(min(offset, PIECE_BYTES))):
            line += block.count(b"\n")
            offset -= len(block)
    return line
