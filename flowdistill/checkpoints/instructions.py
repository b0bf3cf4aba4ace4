"""The instructions of a pickle, as what each does to the `Machine` that reads it."""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flowdistill.checkpoints.nodes import Call, Node, Persistent

if TYPE_CHECKING:
    from flowdistill.checkpoints.pickles import Machine

STOP = ord(".")
PROTOCOL_AT_MOST = 5
SHORT_BYTES = 256
"""More bytes than these are not copied out of the file."""
UNTRUSTED = "nothing of it was executed; ask its maker for a plain state dict or a safetensors file"

_INTEGER_BYTES_AT_MOST = 64  # seeds and states of generators are the largest integers in checkpoints

_REFUSED = {
    b"0": "POP",
    b"1": "POP_MARK",
    b"2": "DUP",
    b"P": "PERSID",
    b"i": "INST",
    b"o": "OBJ",
    b"\x82": "EXT1",
    b"\x83": "EXT2",
    b"\x84": "EXT4",
    b"\x92": "NEWOBJ_EX",
    b"\x97": "NEXT_BUFFER",
    b"\x98": "READONLY_BUFFER",
}
"""Instructions of Python's own that stand in no checkpoint, for the message."""


def _protocol(m: Machine) -> None:
    if m.byte() > PROTOCOL_AT_MOST:
        m.refuse(f"a pickle of protocol {m.data[m.at + 1]}, the newest known is {PROTOCOL_AT_MOST}")


def _frame(m: Machine) -> None:
    size = m.number(_UINT64)
    if m.at < m.frame_end or size > m.end - m.position:
        m.refuse("a frame leaves the pickle or lies inside another")
    m.frame_end = m.position + size


def _push(value: Node) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(value)


def _push_number(form: struct.Struct) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.number(form))


def _push_integer(prefix: struct.Struct) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        size = m.number(prefix)
        if not 0 <= size <= _INTEGER_BYTES_AT_MOST:
            m.refuse(f"an integer of {size} bytes")
        m.stack.append(int.from_bytes(m.take(size), "little", signed=True))

    return run


def _push_text(prefix: struct.Struct) -> Callable[[Machine], None]:
    return lambda m: m.stack.append(m.decoded(m.take(m.number(prefix)), "utf-8"))


def _push_bytes(prefix: struct.Struct) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        part = m.take(m.number(prefix))
        m.stack.append(part if len(part) > SHORT_BYTES else bytes(part))

    return run


def _push_text_of_python_2(prefix: struct.Struct) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        size = m.number(prefix)
        if size < 0:
            m.refuse(f"a text of {size} bytes")
        m.stack.append(m.decoded(m.take(size), "ascii"))

    return run


def _decimal(m: Machine) -> None:
    text = m.line()
    if text in (b"00", b"01"):
        m.stack.append(text == b"01")
        return
    digits = text.removesuffix(b"L")
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 2 * _INTEGER_BYTES_AT_MOST:
        m.refuse("an integer is malformed or too long")
    m.stack.append(int(digits))


def _decimal_float(m: Machine) -> None:
    text = m.line()
    try:
        m.stack.append(float(text))
    except ValueError:
        m.refuse("a number is malformed")


def _quoted_text(m: Machine) -> None:
    text = m.line()
    if len(text) < 2 or text[0] not in b"'\"" or text[-1] != text[0] or b"\\" in text:
        m.refuse("a text of Python 2 is malformed or escaped")
    m.stack.append(m.decoded(text[1:-1], "ascii"))


def _escaped_text(m: Machine) -> None:
    try:  # not `str`, which would import the codec
        text, _ = codecs.raw_unicode_escape_decode(m.line())
    except UnicodeDecodeError:
        m.refuse("a text has a malformed escape")
    m.stack.append(m.decoded(text.encode("utf-8", "surrogatepass"), "utf-8"))  # refuses half characters


def _global(m: Machine) -> None:
    module, name = m.decoded(m.line(), "utf-8"), m.decoded(m.line(), "utf-8")
    m.name(module, name)


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.name(module, name)


def _mark(m: Machine) -> None:
    m.marked.append(m.stack)
    m.stack = []


def _tuple_of(count: int) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        if len(m.stack) < count:
            raise IndexError
        m.stack[-count:] = [tuple(m.stack[-count:])]

    return run


def _collect(make: Callable[[Machine, list[Node]], Node]) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        values = m.since_mark()
        m.stack.append(make(m, values))

    return run


def _new_dict(m: Machine, values: list[Node]) -> dict[Any, Node]:
    new: dict[Any, Node] = {}
    m.put(new, values[::2], values[1::2])
    return new


def _append(m: Machine) -> None:
    value = m.stack.pop()
    m.extend(m.stack[-1], [value])


def _appends(m: Machine) -> None:
    values = m.since_mark()
    m.extend(m.stack[-1], values)


def _add_items(m: Machine) -> None:
    values = m.members(m.since_mark())
    if type(m.stack[-1]) is not set:
        m.refuse("the pickle adds to what is not a set")
    m.stack[-1].update(values)


def _set_item(m: Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.put(m.stack[-1], [key], [value])


def _set_items(m: Machine) -> None:
    values = m.since_mark()
    m.put(m.stack[-1], values[::2], values[1::2])


def _memoize(m: Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


def _store(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        m.memo[index(m)] = m.stack[-1]

    return run


def _recall(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    def run(m: Machine) -> None:
        number = index(m)
        if number not in m.memo:
            m.refuse(f"the pickle refers to value {number}, which it has not stored")
        m.stack.append(m.memo[number])

    return run


def _index_in_text(m: Machine) -> int:
    text = m.line()
    if not text.isdigit() or len(text) > 10:
        m.refuse("a stored value's number is malformed")
    return int(text)


def _reduce(m: Machine) -> None:
    arguments, function = m.stack.pop(), m.stack.pop()
    m.call(function, arguments)


def _build(m: Machine) -> None:
    state, target = m.stack.pop(), m.stack[-1]
    if type(target) is not Call or target.state is not None:
        m.refuse("the pickle sets attributes of what has none, or twice", UNTRUSTED)
    target.state = state


def _persistent(m: Machine) -> None:
    reference = Persistent(m.stack.pop(), m.at)
    m.persistent.append(reference)
    m.stack.append(reference)


def _refused(m: Machine) -> None:
    code = bytes(m.data[m.at : m.at + 1])
    if code in _REFUSED:
        m.refuse(f"the pickle uses {_REFUSED[code]}, which no checkpoint needs", UNTRUSTED)
    m.refuse(f"byte {code[0]:#04x} is no pickle instruction", "download or copy the file again")


_UINT8, _UINT16, _UINT32, _UINT64 = (struct.Struct(f"<{code}") for code in "BHIQ")
_INT32, _FLOAT64_BIG_ENDIAN = struct.Struct("<i"), struct.Struct(">d")
_RUN: dict[bytes, Callable[[Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    # Numbers and constants
    b"N": _push(None),
    b"\x88": _push(True),
    b"\x89": _push(False),
    b"I": _decimal,
    b"L": _decimal,
    b"F": _decimal_float,
    b"J": _push_number(_INT32),
    b"K": lambda m: m.stack.append(m.byte()),
    b"M": _push_number(_UINT16),
    b"G": _push_number(_FLOAT64_BIG_ENDIAN),
    b"\x8a": _push_integer(_UINT8),
    b"\x8b": _push_integer(_INT32),
    # Texts and bytes
    b"V": _escaped_text,
    b"X": _push_text(_UINT32),
    b"\x8c": _push_text(_UINT8),
    b"\x8d": _push_text(_UINT64),
    b"S": _quoted_text,
    b"T": _push_text_of_python_2(_INT32),
    b"U": _push_text_of_python_2(_UINT8),
    b"B": _push_bytes(_UINT32),
    b"C": _push_bytes(_UINT8),
    b"\x8e": _push_bytes(_UINT64),
    b"\x96": _push_bytes(_UINT64),
    # Containers
    b"(": _mark,
    b")": _push(()),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": _collect(lambda m, values: tuple(values)),
    b"]": lambda m: m.stack.append([]),
    b"l": _collect(lambda m, values: values),
    b"a": _append,
    b"e": _appends,
    b"}": lambda m: m.stack.append({}),
    b"d": _collect(_new_dict),
    b"s": _set_item,
    b"u": _set_items,
    b"\x8f": lambda m: m.stack.append(set()),
    b"\x90": _add_items,
    b"\x91": _collect(lambda m, values: frozenset(m.members(values))),
    # Memory
    b"\x94": _memoize,
    b"p": _store(_index_in_text),
    b"q": _store(lambda m: m.byte()),
    b"r": _store(lambda m: int(m.number(_UINT32))),
    b"g": _recall(_index_in_text),
    b"h": _recall(lambda m: m.byte()),
    b"j": _recall(lambda m: int(m.number(_UINT32))),
    # What Python would do, and we only write down
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _reduce,
    b"\x81": _reduce,
    b"b": _build,
    b"Q": _persistent,
    b".": lambda m: None,
}
INSTRUCTIONS = [_RUN.get(bytes([code]), _refused) for code in range(256)]
