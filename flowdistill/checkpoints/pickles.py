"""A pickle is a program; this machine runs it without the instructions that do anything.

It builds lists, dicts and numbers, and where Python would import a name, call it or set attributes, it
makes an inert `Global`, `Call` or `Persistent`: nothing here imports, calls or touches an attribute of what
a file names. Names that are not on the caller's list are refused where they stand, and so are all
instructions that no maker of checkpoints writes.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import Any, NoReturn

from flowdistill.checkpoints.content import Global, Refusal
from flowdistill.checkpoints.instructions import INSTRUCTIONS, SHORT_BYTES, STOP, UNTRUSTED
from flowdistill.checkpoints.nodes import TEXT_BYTES, Budget, Call, Node, Persistent, is_key
from flowdistill.errors import quoted

_LINE_BYTES_AT_MOST = 1 << 16  # of a text in protocol 0
_LINE_WORK, _CALL_WORK, _NAME_WORK = 2, 4, 8  # compared with a plain instruction
_NAME_CHARACTERS_AT_MOST = 256
_CUT_SHORT = ("the pickle is cut short", "download or copy it again")


class Machine:
    """Reads one pickle after another from `data`; `position` is where the next begins, `at` the instruction.

    `known` are the names that may occur. `persistent` collects the references of the last pickle. `place`
    ends a message, such as ` of the storage at byte 7`.
    """

    def __init__(self, data: memoryview, known: Container[str], budget: Budget, place: str = "") -> None:
        self.data, self.end, self.known, self.budget, self.place = data, len(data), known, budget, place
        self.position = self.at = self.frame_end = 0
        self.persistent: list[Persistent] = []
        self.stack: list[Node] = []
        self.marked: list[list[Node]] = []
        self.memo: dict[int, Node] = {}

    def read(self) -> Node:
        """The value of the next pickle.

        Raises:
            Refusal: it is malformed, too large, or asks for what no checkpoint needs.
        """
        self.stack, self.marked, self.memo, self.persistent = [], [], {}, []
        self.frame_end = self.position
        try:
            self._run()
            value = self.stack.pop()
        except IndexError:
            self.refuse("an instruction finds too little on the stack")
        if self.stack or self.marked:
            self.refuse("the pickle ends with values left over")
        return value

    def _run(self) -> None:
        data, end, budget, code = self.data, self.end, self.budget, -1
        while code != STOP:
            at = self.at = self.position
            if at >= end:
                self.refuse(*_CUT_SHORT)
            if budget.work <= 0:
                budget.spend(1)
            budget.work -= 1
            self.position = at + 1
            code = data[at]
            INSTRUCTIONS[code](self)
            # Python's own readers disagree on what lies across the end of a frame.
            if at < self.frame_end < self.position:
                self.refuse("an instruction does not end with its frame")
        if self.frame_end > self.position:
            self.refuse("the pickle ends before its frame does")

    def refuse(self, found: str, fix: str = "") -> NoReturn:
        """Raise the refusal of what stands at the current instruction."""
        raise Refusal(found, fix, f"byte {self.at}{self.place}")

    # What instructions are made of

    def take(self, size: int) -> memoryview:
        start = self.position
        if size > self.end - start:
            self.refuse(*_CUT_SHORT)
        self.position = start + size
        return self.data[start : self.position]

    def byte(self) -> int:
        at = self.position
        if at >= self.end:
            self.refuse(*_CUT_SHORT)
        self.position = at + 1
        return self.data[at]

    def number(self, form: struct.Struct) -> Any:
        start = self.position
        self.position = start + form.size
        if self.position > self.end:
            self.refuse(*_CUT_SHORT)
        return form.unpack_from(self.data, start)[0]

    def line(self) -> bytes:
        self.budget.spend(_LINE_WORK)
        for size in (SHORT_BYTES, _LINE_BYTES_AT_MOST):
            text, newline, _ = bytes(self.data[self.position : self.position + size]).partition(b"\n")
            if newline:
                self.position += len(text) + 1
                return text
        self.refuse("a line of text has no end")

    def decoded(self, text: bytes | memoryview, encoding: str) -> str:
        self.budget.spend(1 + len(text) // TEXT_BYTES)
        try:
            return str(text, encoding)
        except UnicodeDecodeError:
            self.refuse(f"a text is not {encoding}")

    def since_mark(self) -> list[Node]:
        values, self.stack = self.stack, self.marked.pop()
        return values

    def name(self, module: Node, name: Node) -> None:
        if type(module) is not str or type(name) is not str:
            self.refuse("a name is not text")
        self.budget.spend(_NAME_WORK)
        full = f"{module[:_NAME_CHARACTERS_AT_MOST]}.{name[:_NAME_CHARACTERS_AT_MOST]}"
        if full not in self.known or "." in name:
            self.refuse(f"the pickle names {quoted(full)}, which no known checkpoint needs", UNTRUSTED)
        self.stack.append(Global(full))

    def call(self, function: Node, arguments: Node) -> None:
        if type(function) is not Global or type(arguments) is not tuple:
            self.refuse("the pickle calls what is not a name", UNTRUSTED)
        self.budget.spend(_CALL_WORK)
        self.stack.append(Call(function, arguments, self.at))

    def put(self, target: Node, keys: list[Node], values: list[Node]) -> None:
        items = target.items if type(target) is Call else target
        if type(items) is not dict or len(keys) != len(values):
            self.refuse("the pickle sets items of what is not a dict")
        if not all(map(is_key, keys)):
            self.refuse("a dict has a key that is not a text or number")
        before = len(items)
        items.update(zip(keys, values, strict=True))
        if len(items) != before + len(keys):
            self.refuse("a dict has a key twice")

    def extend(self, target: Node, values: list[Node]) -> None:
        if type(target) is not list:
            self.refuse("the pickle appends to what is not a list")
        target += values

    def members(self, values: list[Node]) -> list[Node]:
        if not all(map(is_key, values)):
            self.refuse("a set has a member that is not a text or number")
        return values
