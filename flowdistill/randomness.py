"""Every random number of the package, keyed by (seed, purpose, index).

What is drawn for a sample depends on its key alone, never on a global generator, the batch it
travels in or the rank that computes it, so resumed, sharded and re-batched runs see the same
numbers. All draws are made on the CPU and moved by the caller, so that every device sees them too.

Tensors come from numpy's Philox with a 128-bit key. torch's CPU generator keeps only the low 32
bits of its seed: among a million samples keyed through it, about a hundred would repeat the noise
of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor


def key(seed: int, *parts: str | int) -> int:
    """A 63-bit number that depends on the seed and all parts; the same for ever and everywhere.

    A derived seed keeps purposes apart: `noise(key(seed, "boss"), ...)`.
    """
    return int.from_bytes(_digest(seed, *parts)[:8], "little") >> 1


def generator(seed: int, *parts: str | int) -> torch.Generator:
    """A CPU generator for what torch itself must draw, such as initial weights.

    Not for one generator a sample: torch uses 32 bits of the key (see above).
    """
    return torch.Generator().manual_seed(key(seed, *parts))


def noise(seed: int, indices: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise [B, *shape] float32; row b is a pure function of (seed, indices[b])."""
    numbers = _integers(indices)
    rows = np.empty((len(numbers), *shape), dtype=np.float32)
    streams = _streams(_digest(seed, "noise", index) for index in numbers)
    for row, stream in zip(rows, streams, strict=True):
        stream.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


PCG64_BYTES = 32
"""State and increment of a PCG64, 16 bytes each, the highest byte first."""


def pcg64_records(seed: int, indices: Sequence[int] | Tensor) -> Tensor:
    """States for `pcg64_noise`, each a function of (seed, index), [B, 32] uint8."""
    drawn = [blake2b(_digest(seed, "pcg64", i), digest_size=PCG64_BYTES).digest() for i in _integers(indices)]
    records = torch.frombuffer(bytearray(b"".join(drawn)), dtype=torch.uint8).reshape(-1, PCG64_BYTES)
    records[:, -1] |= 1  # increments are odd
    return records


def pcg64_noise(records: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise [B, *shape] float32 that rf++ draws in float64 from its records [B, 32] uint8."""
    rows = np.empty((len(records), *shape), dtype=np.float32)
    generator = np.random.PCG64(0)
    stream, state = np.random.Generator(generator), generator.state
    for row, record in zip(rows, records.numpy(), strict=True):
        before, increment = (int.from_bytes(half, "big") for half in np.split(record, 2))
        state["state"] = {"state": before, "inc": increment}
        generator.state = state
        row[...] = stream.standard_normal(shape)
    return torch.from_numpy(rows)


def uniforms(seed: int, purpose: str, step: int, count: int) -> Tensor:
    """Numbers in [0, 1) for one step, [count] float64; a rank takes its slice of the batch."""
    return torch.from_numpy(_stream(seed, "uniforms", purpose, step).random(count))


def permutation(seed: int, purpose: str, epoch: int, count: int) -> Tensor:
    """The order of `count` samples in one epoch, [count] int64."""
    order = _stream(seed, "permutation", purpose, epoch).permutation(count)
    return torch.from_numpy(order.astype(np.int64, copy=False))


def integers(seed: int, purpose: str, indices: Sequence[int] | Tensor, high: int) -> Tensor:
    """Numbers in [0, high), one an index, [B] int64; for labels, coins and choices."""
    numbers = [key(seed, "integers", purpose, index) % high for index in _integers(indices)]
    return torch.tensor(numbers, dtype=torch.int64)


def _integers(indices: Sequence[int] | Tensor) -> list[int]:
    listed: Iterable[int] = indices.tolist() if isinstance(indices, Tensor) else indices
    return [int(index) for index in listed]


def _stream(seed: int, *parts: str | int) -> np.random.Generator:
    return next(_streams([_digest(seed, *parts)]))


def _streams(digests: Iterable[bytes]) -> Iterator[np.random.Generator]:
    """One generator, set anew for each digest: to make a Philox costs more than its draws."""
    philox = np.random.Philox(key=0)
    stream, state = np.random.Generator(philox), philox.state
    for digest in digests:
        state["state"]["key"] = np.frombuffer(digest, dtype="<u8")
        philox.state = state
        yield stream


def _digest(seed: int, *parts: str | int) -> bytes:
    """128 bits of the parts, written with type and length so that no two lists read alike."""
    written = (f"s{len(p)}:{p}" if isinstance(p, str) else f"i{int(p)}," for p in (seed, *parts))
    return blake2b("".join(written).encode(), digest_size=16).digest()
