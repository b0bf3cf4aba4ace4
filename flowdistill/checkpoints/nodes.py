"""What a pickle is made of before its names are given a meaning, and how much of it there may be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowdistill.checkpoints.content import Global, Refusal

Node = Any
"""As `Content`, without records and tensors but with `Call` and `Persistent`."""

TEXT_BYTES = 256
"""Bytes of text that are as much work as one instruction."""


@dataclass
class Budget:
    """The work that one file may still ask for, all its pickles together, in instructions of a pickle.

    Time is not counted, so that a file gets the same verdict on a slow machine. A snapshot of EDM's with
    1,000 tensors and the state of Adam needs about 760,000.
    """

    work: int = 1_200_000
    preamble: bytes = b""
    """How the storages of this file begin, which is the same for all and need be read once only."""

    def spend(self, work: int) -> None:
        self.work -= work
        if self.work < 0:
            raise Refusal(
                "the file asks for more work than any known checkpoint",
                "if it is a good one, save its weights alone and import that",
            )


@dataclass(eq=False, slots=True)
class Call:
    """A call that was not made: what REDUCE, NEWOBJ, BUILD and SETITEMS asked to do with a name.

    `at` is where in the file.
    """

    function: Global
    arguments: Node
    at: int
    state: Node = None
    items: dict[Any, Node] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Persistent:
    """A reference to something outside of the pickle; only the container understands its `identity`."""

    identity: Node
    at: int


def is_key(node: Node) -> bool:
    """Whether a dict or set may hold it.

    Tuples and integers of more than 64 bits are left out: their hashes are no secret, so a file could be made
    in which all collide.
    """
    kind = type(node)
    if kind is int:
        return bool(-(1 << 63) <= node < 1 << 64)
    return kind in (str, float, bool, bytes, Global) or node is None
