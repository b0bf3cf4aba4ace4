"""YAML as plain data that knows its places: a reader of scalars, lists and mappings, nothing else.

It goes by the parser's events, so nothing is constructed, expanded or executed. What surprises in
YAML is refused (anchors, aliases, merge keys, tags, duplicate keys, several documents) or goes by
the core rules of YAML 1.2: `1e-4` is a number, `no` and `12:30` are text, `012` is 12. Size, depth
and the number of values are capped, so that any text is answered quickly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

from flowdistill.errors import Problem, RecipeError, bare, quoted

MAX_BYTES = 1_000_000
MAX_DEPTH = 64
MAX_VALUES = 10_000

Scalar = None | bool | int | float | str

# libyaml's parser is many times faster; the pure one differs in the words of its errors only.
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What YAML forbids, and the byte order mark and the line ends that few editors know.
_NOT_TEXT = re.compile("[^\t\n\r -~\xa0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")

_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# More digits than that make a float, or infinity: Python refuses to print such integers.
_INTEGER = re.compile(r"[-+]?[0-9]{1,1000}")
_BASED_INTEGER = re.compile(r"0o[0-7]{1,64}|0x[0-9a-fA-F]{1,64}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands: a file with line and column (from 1), or a whole override."""

    source: str
    line: int | None = None
    column: int | None = None

    def problem(self, message: str, key: str = "") -> Problem:
        """A problem at this place."""
        return Problem(self.source, self.line, self.column, key, message)


@dataclass(frozen=True, slots=True)
class Node:
    """A value, its place, and the place of its key if it is in a mapping."""

    value: Scalar | list[Node] | dict[str, Node]
    place: Place
    key: Place | None = None

    @property
    def heading(self) -> Place:
        """Where a reader would look for it: its key, if it has one."""
        return self.key or self.place

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def shown(self) -> str:
        """The value as a message names it: `'heun'`, `3.0`, `true`, `a list of 2`."""
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}" if self.value else "an empty list"
        if isinstance(self.value, dict):
            return "a mapping" if self.value else "an empty mapping"
        if isinstance(self.value, bool):
            return str(self.value).lower()
        return "nothing" if self.value is None else quoted(self.value)


def read_file(data: bytes, source: str) -> tuple[Node, list[Problem]]:
    """`read` for the bytes of a file, which have to be UTF-8 text."""
    nowhere = Place(source)
    if len(data) > MAX_BYTES:
        raise RecipeError([nowhere.problem(f"larger than {MAX_BYTES:,} bytes, which is the most")])
    if b"\0" in data:
        raise RecipeError([nowhere.problem("a binary file, expected YAML text")])
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        message = f"not UTF-8 text ({found}); save it as UTF-8"
        raise RecipeError([nowhere.problem(message)]) from None
    return read(text, source)


def read(text: str, source: str) -> tuple[Node, list[Problem]]:
    """Root of the one document in `text`, and the mistakes after which reading could go on.

    Raises `RecipeError` with these and the first mistake that leaves the meaning of the rest open.
    """
    reader = _Reader(source)
    if odd := _NOT_TEXT.search(text):
        lines = text[: odd.start()].split("\n")
        place = Place(source, len(lines), len(lines[-1]) + 1)
        raise RecipeError([place.problem(f"control character {odd[0]!r} is not allowed")])
    try:
        for event in yaml.parse(text, Loader=_PARSER):
            reader.take(event)
    except yaml.MarkedYAMLError as error:
        raise RecipeError([*reader.problems, _syntax_problem(error, text, source)]) from None
    return reader.root or Node(None, Place(source)), reader.problems


def read_value(text: str, place: Place) -> Node:
    """A value on its own, as in `-s reflow.steps=500`; all that is in it is at `place`."""
    try:
        node, problems = read(text, place.source)
    except RecipeError as error:
        node, problems = Node(None, place), list(error.problems)
    if problems:
        raise RecipeError([place.problem(problem.message) for problem in problems])
    return _moved(node, place)


def scalar(text: str) -> Scalar:
    """Value of an unquoted scalar by YAML 1.2's core schema, with leading zeros as in decimal."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _BASED_INTEGER.fullmatch(text):
        return int(text, base=0)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not come, and the key that waits for its value."""

    node: Node
    key: str | None = None
    key_place: Place | None = None


class _Reader:
    """Builds nodes from events, with an explicit stack: the depth of a text costs no recursion."""

    def __init__(self, source: str) -> None:
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._source = source
        self._stack: list[_Open] = []
        self._values = 0

    def take(self, event: Event) -> None:
        """Add one event."""
        if isinstance(event, DocumentStartEvent):
            if self.root is not None:
                self._stop(event, "a second document; a recipe is one document, remove the '---'")
        elif isinstance(event, CollectionEndEvent):
            self._stack.pop()
        elif isinstance(event, NodeEvent):
            self._check(event)
            self._add(event)

    def _check(self, event: NodeEvent) -> None:
        self._values += 1
        if isinstance(event, AliasEvent):
            self._stop(event, f"alias {quoted(event.anchor)} is not supported; write the value out")
        if self._values > MAX_VALUES:
            self._stop(event, f"more than {MAX_VALUES:,} values")
        if len(self._stack) > MAX_DEPTH:
            self._stop(event, f"nested more than {MAX_DEPTH} levels deep")
        if event.anchor is not None:
            self._note(event, f"anchor {quoted(event.anchor)} is not supported; remove it")
        if isinstance(event, ScalarEvent | CollectionStartEvent) and event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._note(event, f"tag {quoted(tag)} is not supported; remove it")
        if isinstance(event, ScalarEvent) and (odd := _NOT_TEXT.search(event.value)):
            self._stop(event, f"control character {odd[0]!r} is not allowed")

    def _add(self, event: NodeEvent) -> None:
        parent = self._stack[-1] if self._stack else None
        if parent and isinstance(parent.node.value, dict) and parent.key is None:
            parent.key, parent.key_place = self._key(event), self._place(event)
            return
        node = Node(self._value(event), self._place(event), parent.key_place if parent else None)
        if parent is None:
            self.root = node
        elif isinstance(parent.node.value, list):
            parent.node.value.append(node)
        elif isinstance(parent.node.value, dict) and parent.key is not None:
            self._insert(parent.node.value, parent.key, node)
            parent.key = parent.key_place = None
        if isinstance(event, CollectionStartEvent):
            self._stack.append(_Open(node))

    def _insert(self, mapping: dict[str, Node], key: str, node: Node) -> None:
        first = mapping.setdefault(key, node)
        if first is not node and node.key is not None and first.key is not None:
            message = f"duplicate key {quoted(key)}, already in line {first.key.line}"
            self.problems.append(node.key.problem(message))

    def _key(self, event: NodeEvent) -> str:
        if not isinstance(event, ScalarEvent):
            self._stop(event, "a list or mapping as a key; keys are text")
        if event.value == "<<" and not event.style:
            self._stop(event, "merge key '<<' is not supported; write the keys out")
        return str(event.value)

    @staticmethod
    def _value(event: NodeEvent) -> Scalar | list[Node] | dict[str, Node]:
        if isinstance(event, ScalarEvent):
            return event.value if event.style else scalar(event.value)
        return {} if isinstance(event, MappingStartEvent) else []

    def _place(self, event: Event) -> Place:
        mark = event.start_mark
        return Place(self._source, mark.line + 1, mark.column + 1) if mark else Place(self._source)

    def _note(self, event: Event, message: str) -> None:
        self.problems.append(self._place(event).problem(message))

    def _stop(self, event: Event, message: str) -> NoReturn:
        self._note(event, message)
        raise RecipeError(self.problems)


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, source: str) -> Problem:
    """The parser's complaint, with a fix for the two that everybody meets."""
    mark, message = error.problem_mark, f"not valid YAML: {error.problem}"
    if mark is None:
        return Place(source).problem(message)
    if error.context_mark and error.context_mark.line != mark.line:
        message += f" ({error.context} that begins in line {error.context_mark.line + 1})"
    line = "".join(text.split("\n")[mark.line : mark.line + 1])
    if line[mark.column : mark.column + 1] == "\t":
        message += "; a tab cannot indent, use spaces"
    elif "mapping values" in str(error.problem):
        message += "; put quotes around text that holds ': '"
    return Place(source, mark.line + 1, mark.column + 1).problem(message)


def _moved(node: Node, place: Place) -> Node:
    """The same values, all at one place."""
    value = node.value
    if isinstance(value, dict):
        value = {key: _moved(inner, place) for key, inner in value.items()}
    elif isinstance(value, list):
        value = [_moved(inner, place) for inner in value]
    return Node(value, place, place)


def walk(node: Node, key: str = "") -> Iterator[tuple[str, Node]]:
    """Every node below and with `node`, by its dotted key (`reflow.loss.name`, `boss.nfe[0]`)."""
    yield key, node
    if isinstance(node.value, dict):
        for name, inner in node.value.items():
            yield from walk(inner, join(key, name))
    elif isinstance(node.value, list):
        for index, inner in enumerate(node.value):
            yield from walk(inner, join(key, index))


def join(key: str, *parts: str | int) -> str:
    """Dotted key of what is below `key`."""
    for part in parts:
        if isinstance(part, int):
            key += f"[{part}]"
        else:
            key += f".{bare(part)}" if key else bare(part)
    return key
