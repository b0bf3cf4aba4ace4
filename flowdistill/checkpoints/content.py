"""What a checkpoint is made of once it is read: plain data, inert names and records, and tensors in place.

The shape, stride and offset of a tensor in a file are claims. `StoredTensor.view` checks them against the
bytes that are there, in Python's unbounded integers, before torch hears of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowdistill.errors import quoted

if TYPE_CHECKING:
    import torch

Content = Any
"""dict, list, tuple, set, frozenset, str, int, float, bool, None, bytes (memoryview where they are long),
`Global`, `Record` or `StoredTensor`; containers hold the same, at most `resolving.DEPTH_AT_MOST` deep."""

ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint16": 2,
    "int16": 2,
    "float16": 2,
    "bfloat16": 2,
    "uint32": 4,
    "int32": 4,
    "float32": 4,
    "uint64": 8,
    "int64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
}
"""Every element type that is read, named as in torch; quantised and sparse tensors are refused."""

_DIMENSIONS_AT_MOST = 64  # torch's own limit
_ELEMENTS_AT_MOST = 2**62


class Refusal(Exception):
    """Why a file is not taken: what was found, where (such as `byte 7`), and what to do where that is known.

    `flowdistill.checkpoints.read` puts the file's name before it and raises it as an ArtifactError.
    """

    def __init__(self, found: str, fix: str = "", place: str = "") -> None:
        super().__init__(found, fix, place)
        self.found, self.fix, self.place = found, fix, place

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.found}{place}" + (f"\n{self.fix}" if self.fix else "")


@dataclass(frozen=True)
class Global:
    """The name of something importable, such as `torch.float32`. It was not imported."""

    name: str


@dataclass(frozen=True)
class Record:
    """An object that was not made: the name of its class, what would have been passed, and its attributes.

    `argparse.Namespace` has them as state, and so have modules of torch.nn. A persistent object of EDM's has
    the name `PERSISTENT_OBJECT`, the class name as its one argument, and the module's `__dict__` as state.
    Configurations and callbacks of other libraries have the name alone.
    """

    name: str
    arguments: tuple[Content, ...] = ()
    state: Content = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that still lies in the file; `shape`, `stride` and `offset` are checked to stay inside `data`.

    `stride` and `offset` count elements. No two elements share bytes, so a tensor is never larger in memory
    than it is in the file. `data` are the bytes of the whole storage, which several tensors may share.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    data: memoryview = field(repr=False)

    @classmethod
    def whole(cls, dtype: str, data: bytes | memoryview) -> StoredTensor:
        """All of a storage as one row."""
        if len(data) % ITEM_BYTES[dtype]:
            raise Refusal(f"{len(data)} bytes are no whole number of {dtype} elements")
        # torch takes only memory that it may write to; the file itself is mapped privately.
        data = memoryview(data)
        writable = memoryview(bytearray(data)) if data.readonly else data
        return cls(dtype, (len(data) // ITEM_BYTES[dtype],), (1,), 0, writable)

    def view(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: str | None = None
    ) -> StoredTensor:
        """Another tensor in the same bytes.

        Raises:
            Refusal: it leaves them, or several of its elements share bytes.
        """
        dtype = dtype or self.dtype
        if len(shape) != len(stride):
            raise Refusal(f"a tensor with {len(shape)} sizes and {len(stride)} strides")
        _check_counts((offset,))
        _check_counts(stride)
        _check_counts(shape)
        stop, available = offset + _reach(shape, stride), len(self.data) // ITEM_BYTES[dtype]
        if stop > available:
            raise Refusal(f"a tensor that needs {stop} elements of a storage that has {available} ({dtype})")
        return StoredTensor(dtype, shape, stride, offset, self.data)

    def filled(self, shape: tuple[int, ...], by_columns: bool = False) -> StoredTensor:
        """All of this row as a contiguous tensor, its first axis changing slowest (`by_columns`: fastest).

        Raises:
            Refusal: it has another number of elements.
        """
        _check_counts(shape)
        if math.prod(shape) != self.shape[0]:
            raise Refusal(f"a tensor of shape {quoted(shape)} with {self.shape[0]} elements")
        stride = _row_major(shape[::-1])[::-1] if by_columns else _row_major(shape)
        return self.view(0, shape, stride)

    @property
    def nbytes(self) -> int:
        """Size of the tensor itself, not of the storage it lies in."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def load(self) -> torch.Tensor:
        """The tensor, contiguous: the mapped file itself where that is possible, else a copy.

        Writing to it never reaches the file, but may reach other tensors of the same storage.
        """
        import torch

        dtype, item_bytes = getattr(torch, self.dtype), ITEM_BYTES[self.dtype]
        if not self.nbytes:
            return torch.empty(self.shape, dtype=dtype)
        start, length = self.offset * item_bytes, _reach(self.shape, self.stride) * item_bytes
        raw = torch.frombuffer(self.data[start : start + length], dtype=torch.uint8)
        if self.dtype == "bool":
            raw = raw != 0  # any other byte than 0 and 1 in a bool is undefined behaviour
        elif raw.data_ptr() % item_bytes:
            raw = raw.clone()
        return raw.view(dtype).as_strided(self.shape, self.stride).contiguous()


def _check_counts(numbers: tuple[int, ...]) -> None:
    """Refuse a shape, stride or offset that torch's own integers could not hold."""
    if len(numbers) > _DIMENSIONS_AT_MOST:
        raise Refusal(f"a tensor with {len(numbers)} dimensions")
    if not all(type(number) is int and 0 <= number <= _ELEMENTS_AT_MOST for number in numbers):
        raise Refusal(f"a tensor whose shape, stride or offset holds {quoted(numbers)}")


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor, both included."""
    if 0 in shape and math.prod(size or 1 for size in shape) <= _ELEMENTS_AT_MOST:
        return 0
    last = 0
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size > 1):
        if step <= last:
            raise Refusal(
                f"a tensor whose elements share bytes: shape {quoted(shape)}, stride {quoted(stride)}"
            )
        last += (size - 1) * step
    return last + 1
