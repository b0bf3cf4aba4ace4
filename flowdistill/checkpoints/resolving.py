"""From the nodes of a pickle to content: calls get their meaning, and what cannot be walked is refused."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from flowdistill.checkpoints.content import Content, Record, Refusal, StoredTensor
from flowdistill.checkpoints.meanings import DROPPED, Asked, meaning
from flowdistill.checkpoints.nodes import Budget, Call, Node, Persistent

DEPTH_AT_MOST = 128
"""EDM's snapshots have 30 levels."""

_TOO_DEEP = f"the content holds itself, or is over {DEPTH_AT_MOST} levels deep"

_WORK = 12  # of one node, compared with an instruction
_VALUES_AT_MOST = 1_000_000
"""Values counted once for each place where they stand, so that walking the content ends."""
_BYTES_PER_BYTE_AT_MOST = 4
_SPARE_BYTES = 1 << 20


def resolve(
    root: Node,
    storage: Callable[[Persistent], StoredTensor],
    nested: Callable[[bytes | memoryview, int], Content],
    budget: Budget,
    file_bytes: int,
) -> Content:
    """The content that a pickle stands for.

    `storage` finds what is kept outside of the pickle, `nested(payload, at)` reads a storage that is written
    inside, `file_bytes` bounds the size of all tensors together.

    Raises:
        Refusal: a name is used in an unknown way, a tensor leaves its storage, or the content is too deep,
            refers to itself, or becomes far larger than the file when its shared parts are written out.
    """
    bytes_at_most = _BYTES_PER_BYTE_AT_MOST * file_bytes + _SPARE_BYTES
    return _Resolver(storage, nested, budget, bytes_at_most).resolve(root)


class _Weighed(NamedTuple):
    """Content, its levels, and the number of values and bytes of tensors in it if nothing were shared."""

    content: Content
    depth: int
    values: int
    nbytes: int


class _Resolver:
    """Goes through the nodes from the leaves up, without recursion, each once however often it is shared."""

    def __init__(
        self,
        storage: Callable[[Persistent], StoredTensor],
        nested: Callable[[bytes | memoryview, int], Content],
        budget: Budget,
        bytes_at_most: int,
    ) -> None:
        self.storage, self.nested, self.budget, self.bytes_at_most = storage, nested, budget, bytes_at_most
        self.done: dict[int, _Weighed] = {}

    def resolve(self, root: Node) -> Content:
        if not root or type(root) not in _PARTS:
            return root
        done, path = self.done, set[int]()
        waiting: list[tuple[Node, Collection[Node]]] = [(root, ())]
        while waiting:
            node, branches = waiting.pop()
            if branches:
                path.discard(id(node))
            elif id(node) in done:
                continue
            else:
                branches = [part for part in _PARTS[type(node)](node) if part and type(part) in _PARTS]
                missing = [part for part in branches if id(part) not in done]
                if missing:
                    path.add(id(node))
                    if len(path) > DEPTH_AT_MOST or any(id(part) in path for part in missing):
                        raise Refusal(_TOO_DEEP)
                    waiting.append((node, branches))
                    waiting += [(part, ()) for part in missing]
                    continue
            done[id(node)] = self.weighed(node, branches)
        return done[id(root)].content

    def weighed(self, node: Node, branches: Collection[Node]) -> _Weighed:
        self.budget.spend(_WORK)
        parts = _PARTS[type(node)](node)
        depth, values, nbytes = 0, 1 + len(parts) - len(branches), 0
        for branch in branches:
            _, levels, values_inside, bytes_inside = self.done[id(branch)]
            depth, values, nbytes = max(depth, levels), values + values_inside, nbytes + bytes_inside
        content = self.content(node, parts) if branches or type(node) in (Call, Persistent) else node
        if type(content) is StoredTensor:
            nbytes = content.nbytes  # not also that of the storage it was made from
        if values > _VALUES_AT_MOST or nbytes > self.bytes_at_most:
            raise Refusal("the content is far larger than the file when its shared parts are written out")
        if depth >= DEPTH_AT_MOST:
            raise Refusal(_TOO_DEEP)
        return _Weighed(content, depth + 1, values, nbytes)

    def content(self, node: Node, parts: Collection[Node]) -> Content:
        done = self.done
        contents = [done[id(part)].content if part and type(part) in _PARTS else part for part in parts]
        match node:
            case dict():
                return dict(zip(node, contents, strict=True))
            case list():
                return contents
            case tuple():
                return tuple(contents)
        try:
            return self.outcome(node, contents)
        except Refusal as refusal:
            refusal.place = refusal.place or f"byte {node.at}"
            raise

    def outcome(self, node: Call | Persistent, contents: list[Content]) -> Content:
        if isinstance(node, Persistent):
            return self.storage(node)
        if node.function.name in DROPPED:
            return Record(node.function.name)
        arguments, state, items = contents
        return meaning(Asked(node.function.name, arguments, state, items, self.nested, self.budget, node.at))


def _asked(call: Call) -> tuple[Node, ...]:
    return () if call.function.name in DROPPED else (call.arguments, call.state, call.items)


_PARTS: dict[type, Callable[[Node], Collection[Node]]] = {
    dict: dict.values,
    list: lambda node: node,
    tuple: lambda node: node,
    Call: _asked,
    Persistent: lambda node: (),
}
"""What has to be resolved first, for every type of node that does not stand for itself unless it is empty."""
