"""Pickles without a container: plain ones, and those that torch wrote before its zip files, with storages.

The old format of torch is a row of five pickles (a magic number, a version, the machine's properties, the
content, the keys of its storages) and then each storage: the number of its elements in eight bytes, and its
bytes. A plain pickle holds such a row inside of itself for every tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowdistill.checkpoints.content import ITEM_BYTES, Content, Global, Refusal, StoredTensor
from flowdistill.checkpoints.meanings import KNOWN, STORAGES
from flowdistill.checkpoints.nodes import Budget, Node, Persistent
from flowdistill.checkpoints.pickles import Machine
from flowdistill.checkpoints.resolving import resolve
from flowdistill.errors import quoted

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_COUNT_BYTES = 8
_STREAM_WORK = 80  # of beginning with one, compared with an instruction of a pickle


@dataclass(frozen=True)
class Reference:
    """What a persistent id of torch's says: where a storage is kept, and how many elements of what it has."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]

    @classmethod
    def of(cls, node: Persistent) -> Reference:
        match node.identity:
            case ("storage", Global(kind), str(key), str(), int(count)) | (
                "storage", Global(kind), str(key), str(), int(count), None
            ) if kind in STORAGES and count >= 0:  # fmt: skip
                return cls(key, STORAGES[kind], count)
        raise Refusal(
            "a reference to something that is not a plain storage of torch's", place=f"byte {node.at}"
        )


def read_stream(data: memoryview, budget: Budget, nested_at: int | None = None) -> tuple[str, Content]:
    """The format and content of a pickle, or of torch's old format, that fills `data`.

    `nested_at` is where in the file it stands if it stands inside of another pickle.

    Raises:
        Refusal: something in it is malformed or unknown.
    """
    budget.spend(_STREAM_WORK)
    place = "" if nested_at is None else f" of the storage at byte {nested_at}"
    machine = Machine(data, KNOWN, budget, place)
    if budget.preamble and data[: len(budget.preamble)] == budget.preamble:
        machine.position = len(budget.preamble)
        return "legacy torch", _legacy(machine, budget)
    root = machine.read()
    if type(root) is int and root == _MAGIC:
        _check_preamble(machine)
        budget.preamble = bytes(data[: machine.position])
        return "legacy torch", _legacy(machine, budget)
    if nested_at is not None:
        raise Refusal("bytes that should be a storage of torch's are not", place=f"byte {nested_at}")
    if machine.position != len(data):
        machine.refuse("something follows the end of the pickle")

    def nested(payload: bytes | memoryview, at: int) -> Content:
        return read_stream(memoryview(payload), budget, at)[1]

    return "pickle", resolve(root, _no_storage, nested, budget, len(data))


def _check_preamble(machine: Machine) -> None:
    """The version and the machine's properties, which follow the magic number."""
    version, system = machine.read(), machine.read()
    if version != _VERSION:
        machine.refuse(f"torch's old format in another version than {_VERSION}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        machine.refuse("it was written on a big-endian machine", "convert it on a little-endian one")


def _legacy(machine: Machine, budget: Budget) -> Content:
    """The content behind the preamble."""
    root = machine.read()
    references = {found.key: found for found in map(Reference.of, machine.persistent)}
    storages = _storages(machine, machine.read(), references)

    def storage(node: Persistent) -> StoredTensor:
        reference = Reference.of(node)
        if reference not in storages:
            raise Refusal(f"storage {quoted(reference.key)} is read as two types")
        return StoredTensor.whole(reference.dtype, storages[reference])

    return resolve(root, storage, no_nested, budget, len(machine.data))


def _storages(machine: Machine, keys: Node, references: dict[str, Reference]) -> dict[Reference, memoryview]:
    """The bytes behind the pickles, which are exactly those that the pickles refer to."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        machine.refuse("the keys of the storages are not texts")
    if len(keys) != len(references) or set(keys) != set(references):
        machine.refuse("the storages that follow are not those that the content refers to")
    storages = {}
    for key in keys:
        machine.at = machine.position
        reference = references[key]
        count = int.from_bytes(machine.take(_COUNT_BYTES), "little", signed=True)
        if count != reference.count:
            machine.refuse(f"a storage of {count} elements, but the content says {reference.count}")
        storages[reference] = machine.take(reference.nbytes)
    if machine.position != len(machine.data):
        machine.refuse("something follows the last storage")
    return storages


def no_nested(payload: bytes | memoryview, at: int) -> Content:
    """For `resolve` where a pickle has its storages beside it and may hold none."""
    raise Refusal("a storage inside of a storage", place=f"byte {at}")


def _no_storage(node: Persistent) -> StoredTensor:
    raise Refusal("a reference to a storage outside of the file", place=f"byte {node.at}")
