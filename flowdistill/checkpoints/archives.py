"""The zip files of torch: a directory that is believed nowhere, and storages that are used where they lie.

A member is taken only if the directory at the end and the header in front of the member agree about it, if
it is stored plainly inside of the file, apart from all others, and if its checksum is right. Names are
never used as paths. Torch has an option to write no checksums; such files have zero for all of them and are
accepted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flowdistill.checkpoints.content import Content, Refusal, StoredTensor
from flowdistill.checkpoints.meanings import KNOWN
from flowdistill.checkpoints.nodes import Budget, Persistent
from flowdistill.checkpoints.pickles import Machine
from flowdistill.checkpoints.resolving import resolve
from flowdistill.checkpoints.streams import Reference, no_nested
from flowdistill.errors import listed, quoted

_LOCAL, _ENTRY, _END, _END64, _LOCATOR = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x06\x07",
)
_LOCAL_FORM = struct.Struct("<4s5H3I2H")
_ENTRY_FORM = struct.Struct("<4s6H3I5H2I")
_END_FORM = struct.Struct("<4s4H2IH")
_END64_FORM = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_FORM = struct.Struct("<4sIQI")
_ENCRYPTED, _SIZES_BEHIND = 1 << 0, 1 << 3  # general purpose flags
_STRONGLY_ENCRYPTED = 1 << 6
_IN_EXTRA = 0xFFFFFFFF
_ZIP64 = 1
_DIRECTORY_BYTES_AT_MOST = 2 << 20  # 1,000 tensors with the state of Adam need 0.4 MB
_AGAIN = "download or copy it again"


@dataclass(frozen=True)
class _Member:
    """A member as the directory has it; `content` is what the file has at that place."""

    name: str
    flags: int
    method: int
    crc: int
    packed_bytes: int
    nbytes: int
    header: int
    start: int = 0
    content: memoryview = memoryview(b"")
    """Known, with `start`, once the member's own header has been read."""


def read_archive(data: memoryview, budget: Budget) -> Content:
    """The content of a zip file that `torch.save` made.

    Raises:
        Refusal: the container is not what torch writes, or something in its pickle is malformed or unknown.
    """
    members = _members(data)
    root = _root(members)
    order = members.get(f"{root}/byteorder")
    if order is not None and bytes(order.content) != b"little":
        raise Refusal("it was written on a big-endian machine", "convert it on a little-endian one")
    machine = Machine(members[f"{root}/data.pkl"].content, KNOWN, budget, " of data.pkl")
    tree = machine.read()
    if machine.position != len(machine.data):
        machine.refuse("something follows the end of the pickle")
    folder = f"{root}/data/"
    stored = {
        name.removeprefix(folder): member for name, member in members.items() if name.startswith(folder)
    }
    used = {Reference.of(node).key for node in machine.persistent}
    if used != stored.keys():
        odd = sorted(used ^ stored.keys())
        raise Refusal(f"storages that are missing, or belong to nothing: {listed(odd)}", _AGAIN)

    def storage(node: Persistent) -> StoredTensor:
        reference = Reference.of(node)
        content = stored[reference.key].content
        if len(content) != reference.nbytes:
            raise Refusal(f"storage {quoted(reference.key)} has {len(content)} bytes, not {reference.nbytes}")
        return StoredTensor.whole(reference.dtype, content)

    return resolve(tree, storage, no_nested, budget, len(data))


def _root(members: dict[str, _Member]) -> str:
    """The folder that torch puts everything into; its name is any."""
    roots = {name.partition("/")[0] for name in members}
    root = next(iter(roots)) if len(roots) == 1 else ""
    if f"{root}/constants.pkl" in members or any(name.startswith(f"{root}/code/") for name in members):
        raise Refusal("a TorchScript program", "save the network's state dict with torch.save instead")
    if f"{root}/data.pkl" not in members:
        fix = "if one of these is the checkpoint, unpack it and import that"
        raise Refusal(f"a zip file, but not one of torch's: it holds {listed(members) or 'nothing'}", fix)
    return root


def _members(data: memoryview) -> dict[str, _Member]:
    """Every member by name, checked against its own header and apart from all others."""
    start, stop, count = _directory(data)
    members: dict[str, _Member] = {}
    for member in _entries(data, start, stop, count):
        if member.name in members:
            raise Refusal(f"the zip file has {quoted(member.name)} twice")
        if not member.name.endswith("/") or member.nbytes:  # others are empty folders
            members[member.name] = _located(data, member, start)
    _check_apart(members)
    _check_sums(members)
    return members


def _directory(data: memoryview) -> tuple[int, int, int]:
    """Where the directory begins and ends, and how many entries it has.

    Torch's files end with it: nothing may follow, and nothing may lie between its parts.
    """
    at = len(data) - _END_FORM.size
    if at < 0 or data[at : at + 4] != _END:
        raise Refusal("a zip file without a directory at its end: it is cut short", _AGAIN)
    _, disk, first_disk, here, count, size, start, comment = _END_FORM.unpack(data[at:])
    stop = at
    locator = at - _LOCATOR_FORM.size
    if locator >= _END64_FORM.size and data[locator : locator + 4] == _LOCATOR:
        stop = locator - _END64_FORM.size
        _, _, end64, _ = _LOCATOR_FORM.unpack(data[locator:at])
        signature, _, _, _, _, _, *found64 = _END64_FORM.unpack(data[stop:locator])
        pairs = zip((here, count, size, start), found64, strict=True)
        agree = all(narrow in (wide, 0xFFFF, _IN_EXTRA) for narrow, wide in pairs)
        if end64 != stop or signature != _END64 or not agree:
            raise Refusal("the zip file's directory contradicts itself", _AGAIN)
        here, count, size, start = found64
    if (
        disk
        or first_disk
        or comment
        or here != count
        or start + size != stop
        or size > _DIRECTORY_BYTES_AT_MOST
    ):
        raise Refusal("the zip file's directory is not where its end says, or too large", _AGAIN)
    return start, stop, count


def _entries(data: memoryview, at: int, stop: int, count: int) -> Iterator[_Member]:
    for _ in range(count):
        texts = at + _ENTRY_FORM.size
        if texts > stop:
            raise Refusal("the zip file's directory is cut short", _AGAIN)
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            names,
            extras,
            comments,
            disk,
            _,
            _,
            header,
        ) = _ENTRY_FORM.unpack(data[at:texts])
        at = texts + names + extras + comments
        if signature != _ENTRY or at > stop or disk:
            raise Refusal("the zip file's directory is damaged", _AGAIN)
        name = _plain_name(bytes(data[texts : texts + names]))
        wide = _wide(data[texts + names : texts + names + extras], [size, packed, header])
        yield _Member(name, flags, method, crc, wide[1], wide[0], wide[2])
    if at != stop:
        raise Refusal("the zip file's directory has more entries than it says", _AGAIN)


def _plain_name(raw: bytes) -> str:
    name = raw.decode("utf-8", "replace")
    parts = name.removesuffix("/").split("/")
    if not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise Refusal(f"the zip file holds a member with the name {quoted(name)}")
    return name


def _wide(extra: memoryview, numbers: list[int]) -> list[int]:
    """Size, packed size and offset, of which those beyond 32 bits stand in an extra field."""
    at, values = 0, list(numbers)
    while _IN_EXTRA in values and at + 4 <= len(extra):
        kind, size = struct.unpack("<2H", extra[at : at + 4])
        field, at = bytes(extra[at + 4 : at + 4 + size]), at + 4 + size
        if kind == _ZIP64:
            given = iter(number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8]))
            values = [next(given, value) if value == _IN_EXTRA else value for value in values]
    return values


def _located(data: memoryview, member: _Member, directory: int) -> _Member:
    """A member with its bytes, if its own header agrees with the directory's entry."""
    what = f"member {quoted(member.name)} of the zip file"
    if member.flags & (_ENCRYPTED | _STRONGLY_ENCRYPTED):
        raise Refusal(f"{what} is encrypted", "decrypt the file first")
    if member.method != 0 or member.packed_bytes != member.nbytes:
        raise Refusal(
            f"{what} is compressed, which torch never does", "unpack it, and zip it again with `zip -0`"
        )
    texts = member.header + _LOCAL_FORM.size
    if texts > directory:
        raise Refusal(f"{what} lies outside of the file", _AGAIN)
    signature, _, flags, method, _, _, crc, packed, size, names, extras = _LOCAL_FORM.unpack(
        data[member.header : texts]
    )
    unset = {0, _IN_EXTRA} if flags & _SIZES_BEHIND else {_IN_EXTRA}
    agree = (
        packed in {member.nbytes, *unset} and size in {member.nbytes, *unset} and crc in {member.crc, *unset}
    )
    same = signature == _LOCAL and flags == member.flags and method == member.method and agree
    start = texts + names + extras
    if not same or bytes(data[texts : texts + names]) != member.name.encode():
        raise Refusal(f"{what} is described differently in two places", _AGAIN)
    if start + member.nbytes > directory:
        raise Refusal(f"{what} reaches into the zip file's directory", _AGAIN)
    return replace(member, start=start, content=data[start : start + member.nbytes])


def _check_apart(members: dict[str, _Member]) -> None:
    end = 0
    for member in sorted(members.values(), key=lambda member: member.header):
        if member.header < end:
            raise Refusal(f"member {quoted(member.name)} of the zip file overlaps another")
        end = member.start + member.nbytes


def _check_sums(members: dict[str, _Member]) -> None:
    if not any(member.crc for member in members.values()):
        return
    for member in members.values():
        if zlib.crc32(member.content) != member.crc:
            raise Refusal(f"the checksum of member {quoted(member.name)} is wrong", _AGAIN)
