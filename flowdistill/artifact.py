"""Files that are whole or absent, and that say what they are and where they came from.

Everything the package puts on disk goes through this module: `durable` writes it, tensors carry
their description and a checksum in the one file, and a stage ends by writing a `Manifest` of what
it read and made. What a safetensors file holds is read without torch, so asking is fast.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, JsonValue, ValidationError

from flowdistill.durable import (
    CLAIMS,
    UNSEALED,
    append,
    atomic_write,
    claimed,
    create_folder,
    joined,
    lock,
    rename,
    sweep,
    write_sealed,
)
from flowdistill.errors import (
    ArtifactError,
    Diverged,
    FlowdistillError,
    MissingInput,
    ResourceError,
    UsageError,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "CLAIMS",
    "FORMAT",
    "MANIFEST",
    "Entry",
    "Layout",
    "Manifest",
    "all_finite",
    "append",
    "atomic_write",
    "claimed",
    "corrupt",
    "create_folder",
    "differs",
    "digest",
    "fingerprint",
    "joined",
    "layout",
    "load_json",
    "load_tensors",
    "lock",
    "opened",
    "read_header",
    "rename",
    "safe_child",
    "save_json",
    "save_tensors",
    "sha256",
    "sweep",
]

FORMAT = 1
"""Version of everything written here; a manifest of another version is refused."""
MANIFEST = "manifest.json"

_METADATA = "flowdistill"
_DESCRIPTION_BYTES_AT_MOST = 100_000_000  # the limit of the safetensors format itself
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
_DTYPE_CODES = {name: code for code, (name, _) in _DTYPES.items()}


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """A file for reading; whatever the system refuses becomes an error that names the file."""
    try:
        with path.open("rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingInput(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, expected a file") from error
    except PermissionError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except OSError as error:
        raise ResourceError(f"{path}: reading failed ({error.strerror})") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a folder, of the names and sizes of the files in it."""
    if not path.is_dir():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file())
    return digest([[each.relative_to(path).as_posix(), each.stat().st_size] for each in files])


def digest(content: object) -> str:
    """SHA-256 of anything JSON can hold, whatever the order of its keys; tuples count as lists."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def save_json(path: Path, content: Mapping[str, Any]) -> str:
    """Write JSON that carries its own checksum under `check`; returns the file's SHA-256."""
    return atomic_write(path, _checked_json(content))


def load_json(path: Path) -> dict[str, Any]:
    """Read what `save_json` wrote; any other byte in it is an ArtifactError."""
    with opened(path) as file:
        data = file.read()
    content = _parse_object(data, path, "JSON")
    content.pop("check", None)
    try:
        intact = _checked_json(content) == data
    except (ValueError, RecursionError):  # such as NaN or a million brackets, which are not ours
        intact = False
    if not intact:
        raise corrupt(path, "its checksum does not match: it was changed after it was written")
    return content


def safe_child(root: Path, name: str) -> Path:
    """`root / name` for a relative name with `/`; UsageError where it could lie elsewhere.

    Refused are absolute and empty names, `..`, names that begin with a dot (kept for locks and
    unfinished files), control characters, backslashes, and links that lead out of `root`.
    """
    parts = name.split("/")
    odd = any(not char.isprintable() or char == "\\" for char in name)
    if odd or any(part.startswith(".") or not 0 < len(os.fsencode(part)) < 256 for part in parts):
        raise UsageError(f"{name!r}: not a plain relative file name")
    path = root.joinpath(*parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{path}: leads out of {root}")
    return path


def corrupt(
    path: Path,
    found: str,
    fix: str = "restore the file, or delete it and run the command that made it again",
) -> ArtifactError:
    """The error for a file that is not what its maker wrote."""
    return ArtifactError(f"{path}: {found}\n{fix}")


def _canonical(content: object) -> str:
    # ASCII, so that file names that are not valid text (lone surrogates) have a digest too.
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checked_json(content: Mapping[str, Any]) -> bytes:
    if "check" in content:
        raise ValueError("the key 'check' is kept for the checksum")
    checked = {**content, "check": digest(content)}
    return (json.dumps(checked, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def _parse_object(data: bytes | str, path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(data, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise corrupt(path, f"not valid {what} ({error})") from None
    if not isinstance(content, dict):
        raise corrupt(path, f"not valid {what} (expected an object)")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """What a safetensors file says of itself; its tensors begin at byte `start`.

    Files of other makers have no seal and an empty header.
    """

    header: dict[str, Any]
    tensors: dict[str, Entry]
    start: int
    seal: str | None


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    """Write tensors with their description into one safetensors file; returns the file's SHA-256.

    The same tensors and header make the same bytes, always. The header is one metadata key (the
    library writes several in random order); it also holds `seal`, the SHA-256 of the whole file
    with zeros in the seal's own place, so that one file alone can be checked.

    Raises:
        Diverged: a tensor holds values that are not finite; nothing is written.
    """
    if "seal" in header or "__metadata__" in tensors:
        raise ValueError("the header key 'seal' and the tensor name '__metadata__' are taken")
    # Large items first keeps every tensor aligned to its own item size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in names:
        _refuse_non_finite(path, name, tensors[name])
    table = _table({name: tensors[name] for name in names})
    payload = [_raw(tensors[name]) for name in names]
    return write_sealed(path, lambda seal: _description(table, header, seal), payload)


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and header of a safetensors file; the seal is checked where there is one.

    Files of other makers load with an empty header and are checked for form alone.
    """
    import safetensors.torch

    found = layout(path)
    if found.seal is not None and _seal_of(path, found.start, found.seal) != found.seal:
        raise corrupt(path, "its SHA-256 does not match the one in its header")
    try:
        return safetensors.torch.load_file(path, device=device), found.header
    except safetensors.SafetensorError as error:
        raise corrupt(path, f"not a safetensors file ({error})") from error


def read_header(path: Path) -> dict[str, Any]:
    """The description in a safetensors file, read without torch and without its tensors."""
    return layout(path).header


def layout(path: Path) -> Layout:
    """What a safetensors file holds and where, checked to fill it without gap or overlap."""
    with opened(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or not 2 <= length <= min(size_bytes - 8, _DESCRIPTION_BYTES_AT_MOST):
            raise corrupt(path, "not a safetensors file, or cut short")
        description = _parse_object(file.read(length), path, "safetensors header")
    header, seal = _header(description.pop("__metadata__", {}), path)
    end = start = 8 + length
    tensors = {name: _entry(entry, start, name, path) for name, entry in description.items()}
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise corrupt(path, f"tensor '{name}' does not follow the one before it")
        end = entry.stop
    if end != size_bytes:
        raise corrupt(path, f"{size_bytes} bytes long, its header says {end}")
    return Layout(header, tensors, start, seal)


def _header(metadata: object, path: Path) -> tuple[dict[str, Any], str | None]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise corrupt(path, "not valid safetensors metadata (expected texts)")
    if _METADATA not in metadata:
        return {}, None
    header = _parse_object(metadata[_METADATA], path, f"JSON in metadata key '{_METADATA}'")
    seal = header.pop("seal", None)
    if not isinstance(seal, str) or not re.fullmatch("[0-9a-f]{64}", seal):
        raise corrupt(path, "its header has no seal")
    return header, seal


def _entry(entry: object, origin: int, name: str, path: Path) -> Entry:
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(start), int(stop)]}:
            name_of_type, item_bytes = _DTYPES.get(code, ("", 0))
            whole = all(type(size) is int and size >= 0 for size in shape)
            if name_of_type and whole and math.prod(shape) * item_bytes == stop - start:
                return Entry(name_of_type, tuple(shape), origin + start, origin + stop)
    raise corrupt(path, f"tensor '{name}' has no valid dtype, shape and place")


def _seal_of(path: Path, start: int, seal: str) -> str:
    with opened(path) as file:
        seen = hashlib.sha256(file.read(start).replace(seal.encode(), UNSEALED.encode(), 1))
        return hashlib.file_digest(file, lambda: seen).hexdigest()


def _description(table: Mapping[str, Any], header: Mapping[str, Any], seal: str) -> bytes:
    metadata = {_METADATA: _canonical({**header, "seal": seal})}
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _table(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    table, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        code = _DTYPE_CODES[str(tensor.dtype).removeprefix("torch.")]
        table[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    return table


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, of one value or more.

    One NaN makes both extremes NaN; this is ten times faster than asking every value.
    """
    return all(math.isfinite(extreme) for extreme in values.detach().aminmax())


def _refuse_non_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.float() if tensor.element_size() == 1 else tensor  # float8 cannot compare
    if not all_finite(values):
        share = f"{int((~values.isfinite()).sum())} of {values.numel()}"
        raise Diverged(f"{path}: {share} values of '{name}' are not finite, nothing was written")


class Manifest(BaseModel):
    """What a stage read and made; it is written last, so a folder without one is not done.

    `settings` is the resolved section of the recipe in JSON types, `inputs` the digest of each
    artifact that was read, `outputs` the SHA-256 of each file by its path in the folder, `figures`
    what was measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    format: int = FORMAT
    stage: str
    verb: str
    settings: dict[str, JsonValue]
    inputs: dict[str, str]
    outputs: dict[str, str]
    seed: int
    versions: dict[str, str]
    device: str
    dtype: str
    started: AwareDatetime
    finished: AwareDatetime
    figures: dict[str, JsonValue] = {}

    @property
    def digest(self) -> str:
        """Identity of the artifact: the digest of its outputs, without dates, versions and figures."""
        return digest(self.outputs)

    def write(self, folder: Path) -> None:
        """Declare the stage done; every output must be in its place."""
        save_json(folder / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            MissingInput: there is none, so the stage is not done.
            ArtifactError: it was altered, or made by another version of the format.
        """
        path = folder / MANIFEST
        if not path.exists():
            raise MissingInput(f"{folder}: no finished artifact here ({MANIFEST} is missing)")
        content = load_json(path)
        if content.get("format") != FORMAT:
            raise ArtifactError(
                f"{path}: artifact format {content.get('format')}, expected {FORMAT}\n"
                "use the flowdistill that made it, or make it again with this one"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            raise corrupt(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def verify(self, folder: Path) -> list[str]:
        """Every output that is missing, unreadable or altered, one line each."""
        return [line for name, sha in self.outputs.items() for line in differs(folder, name, sha)]


def differs(folder: Path, name: str, sha: str) -> list[str]:
    """What is wrong with a file that should have this SHA-256: one line, or nothing."""
    try:
        found = sha256(safe_child(folder, name))
    except FlowdistillError as error:
        return [str(error)]
    if found == sha:
        return []
    return [f"{folder / name}: SHA-256 is {found[:12]}…, recorded as {sha[:12]}…"]
