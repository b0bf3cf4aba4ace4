"""What a tar archive holds and where, read without extracting anything.

Only regular files are taken, whose bytes lie in the archive as they are: links, devices and sparse files are
refused, and so is whatever points backwards or beyond the end. (`tarfile` of older Python versions can be led
into endless loops by sizes below zero, and holds extended headers of any size in memory.)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from flowdistill import artifact
from flowdistill.errors import bare
from flowdistill.exchange.sources import damaged

_BLOCK = 512
_EXTENDED_BYTES_AT_MOST = 1 << 20
_REGULAR, _FOLDER = (b"0", b"\0", b"7"), b"5"
_PAX, _LONG_NAME = b"x", b"L"
_IN_FRONT = (_PAX, _LONG_NAME, b"g", b"K")
"""Kinds that say something of the next member, or (g) of all; and of the target of a link (K)."""
_LENGTH = re.compile(rb"[0-9]{1,7} ")
_REFUSED = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "sparse",
}


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file: `size` bytes of the archive from `start` on."""

    name: str
    start: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular files of an archive in their order; names are not used as paths here, nor must they be.

    Raises:
        MissingInput: there is no such file.
        ArtifactError: the archive is damaged, packed, cut short, or holds what is no regular file.
    """
    with artifact.opened(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        position, extended = 0, _Extended()
        while (header := _header(path, file, position)) is not None:
            start = position + _BLOCK
            if header.kind in _IN_FRONT:
                size = header.size
                extended = extended.over(path, position, header.kind, _extended(path, file, start, size))
            else:
                member = extended.member(path, header, start)
                size, extended = member.size, _Extended()
                if start + size > size_bytes:
                    raise damaged(path, f"is cut short: {bare(member.name)} has {size} bytes")
                if header.kind != _FOLDER:
                    yield member
            position = start + -(-size // _BLOCK) * _BLOCK


@dataclass(frozen=True)
class _Header:
    name: str
    kind: bytes
    size: int


@dataclass(frozen=True)
class _Extended:
    """What the blocks in front of a header say in its place."""

    name: str = ""
    size: int | None = None

    def member(self, path: Path, header: _Header, start: int) -> Member:
        """What the header means; folders have no bytes, whatever their size."""
        name = self.name or header.name
        if header.kind not in _REGULAR and header.kind != _FOLDER:
            what = _REFUSED.get(header.kind, f"of type {header.kind!r}")
            raise damaged(path, f"{bare(name)} is {what}, expected a regular file")
        size = header.size if self.size is None else self.size
        return Member(name, start, 0 if header.kind == _FOLDER else size)

    def over(self, path: Path, position: int, kind: bytes, data: bytes) -> _Extended:
        if kind not in (_PAX, _LONG_NAME):
            return self
        if kind == _LONG_NAME:
            return _Extended(_text(data), self.size)
        found = _pax(path, position, data)
        if any(key.startswith(b"GNU.sparse") for key in found):
            raise damaged(path, f"the member at byte {position} is sparse, expected a regular file")
        size = found.get(b"size")
        if size is not None and not re.fullmatch(rb"[0-9]{1,18}", size):
            raise damaged(path, f"the header at byte {position} has no valid size")
        name = _text(found[b"path"]) if b"path" in found else self.name
        return _Extended(name, self.size if size is None else int(size))


def _header(path: Path, file: BufferedReader, position: int) -> _Header | None:
    """The header at this place; None at the end mark."""
    file.seek(position)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        raise damaged(path, f"is cut short: no header and no end mark at byte {position}")
    if not any(block):
        return None
    found = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if _number(block[148:156]) != found:
        what = "is damaged" if position else "is no tar archive, or is packed"
        raise damaged(path, f"{what} (byte {position}: no header)")
    size = _number(block[124:136])
    if size is None:
        raise damaged(path, f"the header at byte {position} has no valid size")
    posix = block[257:263] == b"ustar\0"
    prefix = _text(block[345:500]) if posix else ""
    name = _text(block[:100])
    return _Header(f"{prefix}/{name}" if prefix else name, block[156:157], size)


def _extended(path: Path, file: BufferedReader, start: int, size: int) -> bytes:
    if size > _EXTENDED_BYTES_AT_MOST:
        raise damaged(path, f"the header at byte {start - _BLOCK} has {size} bytes")
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise damaged(path, f"is cut short: the header at byte {start - _BLOCK} has {size} bytes")
    return data


def _pax(path: Path, position: int, data: bytes) -> Mapping[bytes, bytes]:
    """Records `LENGTH KEY=VALUE`, each ended by a newline that its length includes."""
    found, at = {}, 0
    while at < len(data):
        digits = _LENGTH.match(data, at)
        stop = at + int(digits[0]) if digits else at
        record = data[digits.end() : stop] if digits else b""
        key, equals, value = record.partition(b"=")
        if stop > len(data) or not record.endswith(b"\n") or not equals:
            raise damaged(path, f"the header at byte {position} is no valid extended header")
        found[key], at = value[:-1], stop
    return found


def _number(field: bytes) -> int | None:
    """Octal digits, or a number in base 256; None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")
