"""Checkpoints that are hostile or broken, as bytes, each with words that the refusal must hold."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C
FLOATS = struct.pack("<4f", 1, 2, 3, 4)
ORDERED = "collections.OrderedDict"
REBUILD = "torch._utils._rebuild_tensor_v2"
RUN = b"touch canary"
SHELL = b"(S'" + RUN + b"'\ntR."
MILLION = 1_000_000


# A tiny assembler


@dataclass(frozen=True)
class Named:
    name: str


@dataclass(frozen=True)
class Apply:
    function: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


@dataclass(frozen=True)
class Stored:
    identity: Any


@dataclass(frozen=True)
class Raw:
    code: bytes


def code(value: Any) -> bytes:
    """Instructions that put a value on the stack."""
    match value:
        case tuple():
            return b"(" + b"".join(map(code, value)) + b"t"
        case list():
            return b"](" + b"".join(map(code, value)) + b"e"
        case dict():
            return b"}(" + b"".join(code(key) + code(item) for key, item in value.items()) + b"u"
        case Named(name):
            return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()
        case Apply(function, arguments, state):
            built = b"" if state is None else code(state) + b"b"
            return code(Named(function)) + code(arguments) + b"R" + built
        case Stored(identity):
            return code(identity) + b"Q"
        case Raw(instructions):
            return instructions
    return _scalar_code(value)


def _scalar_code(value: Any) -> bytes:
    match value:
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes([len(digits)]) + digits
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
    raise TypeError(value)


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + code(value) + b"."


def tensor(
    shape: Any = (4,),
    stride: Any = (1,),
    offset: Any = 0,
    count: Any = 4,
    kind: str = "torch.FloatStorage",
    key: Any = "0",
) -> Apply:
    storage = Stored(("storage", Named(kind), key, "cpu", count))
    return Apply(REBUILD, (storage, offset, shape, stride, False, Apply(ORDERED)))


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()


def torch_zip(content: Any, storages: dict[str, bytes] | None = None, **more: bytes) -> bytes:
    """As `torch.save` lays it out; `more` replaces or adds members."""
    storages = {"0": FLOATS} if storages is None else storages
    members = {"data.pkl": pickled(content), "byteorder": b"little", "version": b"3\n"} | more
    members |= {f"data/{key}": data for key, data in storages.items()}
    return zipped({f"archive/{name}": data for name, data in members.items()})


def legacy(content: Any, storages: dict[str, bytes] | None = None, **system: Any) -> bytes:
    """As torch wrote before it had zip files."""
    storages = {"0": struct.pack("<q", 4) + FLOATS} if storages is None else storages
    properties = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}} | system
    pickles = [MAGIC, 1001, properties, content, list(storages)]
    return b"".join(map(pickled, pickles)) + b"".join(storages.values())


def edm(source: str, state: Any) -> Apply:
    """A persistent object of EDM's, with the text of its module."""
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": "Net", "state": state}
    return Apply("torch_utils.persistence._reconstruct_persistent_obj", (meta,))


def nested(payload: bytes) -> Apply:
    """How a storage stands inside of a plain pickle."""
    return Apply("torch.storage._load_from_bytes", (payload,))


def plain_tensor(values: bytes, count: int) -> Apply:
    """A tensor in a plain pickle."""
    inner = legacy(
        Stored(("storage", Named("torch.FloatStorage"), "7", "cpu", count)),
        {"7": struct.pack("<q", count) + values},
    )
    return Apply(REBUILD, (nested(inner), 0, (count,), (1,), False, Apply(ORDERED)))


class Attack:
    """What Python would run when it unpickles this."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


# The corpus

Corpus = dict[str, tuple[bytes, str]]


def _that_execute() -> Corpus:
    import os
    import subprocess

    attack = Attack(os.system, RUN.decode())
    memoised = b"cos\nsystem\nq\x000h\x00" + SHELL
    return {
        "os.system, protocol 0": (b"cos\nsystem\n" + SHELL, "'os.system'"),
        "os.system, protocol 2": (pickle.dumps(attack, 2), "posix.system"),
        "os.system, protocol 4": (pickle.dumps({"ema": attack}, 4), "posix.system"),
        "os.system, protocol 5": (pickle.dumps([attack], 5), "posix.system"),
        "subprocess": (pickle.dumps(Attack(subprocess.Popen, RUN.decode()), 4), "subprocess.Popen"),
        "eval": (pickle.dumps(Attack(eval, "open('canary', 'w')"), 4), "builtins.eval"),
        "exec": (pickle.dumps(Attack(exec, "open('canary', 'w')"), 2), "__builtin__.exec"),
        "import": (pickle.dumps(Attack(__import__, "colorsys"), 4), "__import__"),
        "getattr chain": (b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'os'\ntRS'system'\ntR.", "getattr"),
        "a name that is not called": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "'os.system'"),
        "memoised callable": (memoised, "'os.system'"),
        "runpy": (pickled(Apply("runpy._run_code", ("open('canary', 'w')", {}))), "runpy"),
        "torch.load": (pickled(Apply("torch.serialization.load", ("x",))), "torch.serialization.load"),
        "torch.hub": (pickled(Apply("torch.hub.load", ("x", "y"))), "torch.hub.load"),
        "dotted name": (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "fromkeys"),
        "known name, split oddly": (b"\x80\x04\x8c\x05torch\x8c\x18storage._load_from_bytes\x93.", "names"),
        "name from numbers": (b"\x80\x04K\x01K\x02\x93.", "not text"),
        "name that is very long": (pickled(Named("os." + "x" * MILLION)), "line"),
        "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
        "EXT2": (b"\x80\x02\x83\x01\x00.", "EXT2"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        "INST": (b"(S'" + RUN + b"'\nios\nsystem\n.", "INST"),
        "OBJ": (b"(ccollections\nOrderedDict\no.", "OBJ"),
        "NEWOBJ": (b"\x80\x02csubprocess\nPopen\n(X\x02\x00\x00\x00lst\x81.", "subprocess.Popen"),
        "NEWOBJ_EX": (b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "NEWOBJ_EX"),
        "BUILD of a dict": (b"\x80\x02}}b.", "attributes"),
        "BUILD twice": (pickled(Raw(code(Apply("argparse.Namespace", (), {"a": 1})) + b"}b")), "attributes"),
        "BUILD of a tensor": (torch_zip(Raw(code(tensor()) + code({"__class__": 1}) + b"b")), "not used as"),
        "items of a tensor": (torch_zip(Raw(code(tensor()) + b"K\x01K\x02s")), "not used as"),
        "PERSID": (b"P0\n.", "text"),
        "PERSID in a list": (b"(lP0\na.", "PERSID"),
        "BINPERSID in a plain pickle": (pickled(tensor()), "outside of the file"),
        "out-of-band buffer": (b"\x80\x05\x97.", "NEXT_BUFFER"),
        "nested payload": (pickled([nested(b"cos\nsystem\n" + SHELL)]), "os.system"),
        "nested payload in torch's format": (
            pickled([nested(legacy(Apply("os.system", (RUN.decode(),)), {}))]),
            "os.system",
        ),
        "nested in nested": (pickled(nested(legacy(nested(legacy(1, {})), {}))), "inside of a storage"),
        "nested plain pickle": (pickled(nested(pickled({"a": 1}))), "storage"),
        "attack behind a state dict": (
            torch_zip({"a": tensor(), "b": Apply("os.system", ("touch canary",))}),
            "os.system",
        ),
        "call of a call": (pickled(Raw(code(Apply(ORDERED)) + b")R")), "not a name"),
        "call without a tuple": (b"\x80\x02ccollections\nOrderedDict\n]R.", "not a name"),
        "call of a type": (pickled(Apply("torch.float32", (1,))), "only names something"),
        "sklearn": (pickled(Apply("sklearn.tree._tree.Tree", (1,))), "sklearn.tree._tree.Tree"),
        "joblib": (pickled(Apply("joblib.numpy_pickle.NumpyArrayWrapper")), "joblib"),
        "encoder": (pickled(Apply("_codecs.encode", ("x", "zlib"))), "_codecs.encode"),
        "reconstructor": (
            pickled(Apply("copyreg._reconstructor", (Named("torch.Size"), Named("builtins.object"), None))),
            "torch.Size",
        ),
        "tensor of a type": (
            pickled(
                Apply(
                    "torch._tensor._rebuild_from_type_v2", (Named("torch.Size"), Named("torch.Tensor"), (), 1)
                )
            ),
            "not used as",
        ),
    }


def _that_are_malformed() -> Corpus:
    levels = 10_000
    deep = {
        "list": b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b".",
        "tuple": b"\x80\x02)" + b"\x85" * levels + b".",
        "dict": b"\x80\x02" + b"}K\x01" * levels + b"N" + b"s" * levels + b".",
        "list of 200": b"\x80\x02" + b"]" * 200 + b"a" * 199 + b".",
        "shared list, from the inside": b"\x80\x02](N\x85q\x00" + b"h\x00\x85q\x00" * 200 + b"e.",
    }  # fmt: skip
    return {f"deep {what}": (data, "128 levels") for what, data in deep.items()} | {
        "memo bomb of lists": (b"\x80\x02(]q\x00" + b"(h\x00h\x00h\x00h\x00lq\x00" * 40 + b"t.", "larger"),
        "memo bomb of tuples": (b"\x80\x02(Nq\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"t.", "larger"),
        "memo bomb of dicts": (b"\x80\x02(}q\x00" + b"(K\x01h\x00K\x02h\x00dq\x00" * 60 + b"t.", "larger"),
        "a list in itself": (b"\x80\x02]q\x00h\x00a.", "holds itself"),
        "a dict in itself": (b"\x80\x02}q\x00K\x01h\x00s.", "holds itself"),
        "a list in its own tuple": (b"\x80\x02]q\x00h\x00\x85a.", "holds itself"),
        "attributes that are their owner": (
            b"\x80\x02cargparse\nNamespace\n)Rq\x00}K\x01h\x00sb.",
            "holds itself",
        ),
        "LONG4 of 1 GB": (b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".", "integer of"),
        "LONG4 of negative size": (b"\x80\x02\x8b" + struct.pack("<i", -1) + b".", "integer of"),
        "LONG4 of 1 MB": (b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".", "integer of"),
        "LONG1 of 255 bytes": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "integer of"),
        "decimal of a million digits": (b"(I" + b"9" * MILLION + b"\ndL.", "line"),
        "decimal of 1,000 digits": (b"(L" + b"9" * 1000 + b"L\nl.", "integer"),
        "decimal that is none": (b"(I0x10\nl.", "integer"),
        "float that is none": (b"(F1.2.3\nl.", "number"),
        "BINBYTES8 of 2^63 bytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "cut short"),
        "BYTEARRAY8 of 2^63 bytes": (b"\x80\x05\x96" + b"\xff" * 8 + b".", "cut short"),
        "BINUNICODE8 of 2^63 bytes": (b"\x80\x04\x8d" + b"\xff" * 8 + b".", "cut short"),
        "BINSTRING of negative size": (b"\x80\x01T" + struct.pack("<i", -5) + b".", "-5 bytes"),
        "text that is not UTF-8": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", "utf-8"),
        "text with a bad escape": (b"(V\\u12\nl.", "escape"),
        "text with half a character": (b"(V\\ud800\nl.", "utf-8"),
        "text that is not closed": (b"(S'abc\nl.", "Python 2"),
        "frame beyond the file": (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.", "frame"),
        "frame in a frame": (
            b"\x80\x04\x95" + struct.pack("<Q", 11) + b"\x95" + struct.pack("<Q", 2) + b"}.",
            "frame",
        ),
        "instruction across a frame": (
            b"\x80\x04\x95" + struct.pack("<Q", 2) + b"M\x01\x00" + b".",
            "frame",
        ),
        "end inside of a frame": (b"\x80\x04\x95" + struct.pack("<Q", 4) + b"}.N.", "frame"),
        "no end": (b"\x80\x02N", "cut short"),
        "nothing but a protocol": (b"\x80\x04", "cut short"),
        "protocol 6": (b"\x80\x06}.", "protocol 6"),
        "bytes behind the end": (b"\x80\x02}.}", "follow"),
        "values left over": (b"\x80\x02NN.", "left over"),
        "an open mark": (b"\x80\x02(N.", "left over"),
        "empty stack": (b"\x80\x02.", "stack"),
        "tuple without a mark": (b"\x80\x02Nt.", "stack"),
        "TUPLE2 of one": (b"\x80\x02N\x86.", "stack"),
        "odd items": (b"\x80\x02}(NNNu.", "dict"),
        "items of a list": (b"\x80\x02](NNu.", "dict"),
        "append to a dict": (b"\x80\x02}Na.", "list"),
        "add to a list": (b"\x80\x04](N\x90.", "set"),
        "list as key": (b"\x80\x02}(]Nu.", "key"),
        "tuple as key": (b"\x80\x02}()Nu.", "key"),
        "integer of 65 bits as key": (pickled({1 << 64: 1}), "key"),
        "list in a set": (b"\x80\x04\x8f(]\x90.", "member"),
        "the same key twice": (b"\x80\x02}(K\x01NK\x01Nu.", "twice"),
        "unknown memory": (b"\x80\x02h\x07.", "value 7"),
        "memory with a negative number": (b"(lp-1\n.", "number"),
        "POP": (b"\x80\x02NN0.", "POP"),
        "DUP": (b"\x80\x02N2\x86.", "DUP"),
        "no instruction": (b"\x80\x02\xff.", "0xff"),
    }


def that_take_long(times: int) -> Corpus:
    """Files that ask for hours or gigabytes, if `times` is large and what they say is done as they say."""

    def memo(at: int, value: Any) -> bytes:
        return code(value) + b"q" + bytes([at])

    def again(prepared: bytes, each: bytes, times: int = times) -> Raw:
        """The prepared values, and a list of what `each` leaves."""
        return Raw(b"(" + prepared + b"](" + each * times + b"et")

    dtype = Apply("numpy.dtype", ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))
    long_set = memo(1, Named("builtins.set")) + memo(2, (list(range(10_000)),))
    long_dict = memo(1, Named(ORDERED)) + memo(2, ([(at, None) for at in range(2_000)],))
    text = memo(1, Named("_codecs.encode")) + memo(2, ("\0" * 100_000, "latin1"))
    storage = tensor().arguments[0]
    shaped = memo(1, Named(REBUILD)) + memo(2, (storage, 0, (1,) * 10_000, (1,) * 10_000, False, None))
    array = memo(1, Named("numpy._core.multiarray._reconstruct")) + memo(2, (0,)) + memo(3, dtype)
    inner = legacy(Stored(("storage", Named("torch.FloatStorage"), "0", "cpu", 4)))
    load = memo(1, Named("torch.storage._load_from_bytes")) + memo(2, (inner,))
    big = tensor((250_000,), (1,), 0, 250_000)
    zeros = {"0": bytes(MILLION)}
    return {
        "no end of marks": (b"\x80\x02" + b"(" * times, "work"),
        "no end of nothing": (b"\x80\x02" + b"N" * times + b".", "work"),
        "no end of lists": (b"\x80\x02]" + b"]K\x01aa" * times + b".", "work"),
        "no end of calls": (pickled(again(memo(1, Named(ORDERED)), b"h\x01)R")), "work"),
        "no end of names": (pickled(again(b"", code(Named(ORDERED)))), "work"),
        "no end of texts": (b"\x80\x04](" + b"\x8c\x00" * times + b"e.", "work"),
        "no end of numbers in text": (b"(" + b"L12345678901234567890L\n" * times + b"l.", "work"),
        "no end of arrays": (pickled(again(array, b"h\x01h\x02R(K\x01h\x02h\x03\x89C\x00tb")), "work"),
        "a set of a long list, often": (pickled(again(long_set, b"h\x01h\x02R")), "work"),
        "a dict of long pairs, often": (pickled(again(long_dict, b"h\x01h\x02R")), "work"),
        "encoding a long text, often": (pickled(again(text, b"h\x01h\x02R")), "work"),
        "a long shape, often": (torch_zip(again(shaped, b"h\x01h\x02R")), "work"),
        "a nested storage, often": (pickled(again(load, b"h\x01h\x02R")), "work"),
        "a hundred tensors of one storage": (torch_zip([big] * 100, zeros), "larger"),
        "a tensor in a thousand places": (torch_zip(again(memo(1, big), b"h\x01", 1000), zeros), "larger"),
        "a directory of many members": (
            b"PK\x03\x04" + bytes(60) + b"PK\x01\x02" + bytes(times * 46)
            + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, times * 46 + 4, 64, 0),
            "",
        ),
        "a safetensors header of 90 MB": (struct.pack("<Q", 90_000_000) + b'{"a":' + b"[" * 99, "long"),
    }  # fmt: skip


def _with_impossible_tensors() -> Corpus:
    sparse = Apply("torch._utils._rebuild_sparse_tensor", (Named("torch.sparse_coo"), ()))
    dtype = Apply("numpy.dtype", ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))
    big = Apply("numpy.dtype", ("f4", False, True), (3, ">", None, None, None, -1, -1, 0))
    new = ("numpy._core.multiarray._reconstruct", (Named("numpy.ndarray"), (0,), b"b"))

    def array(*state: Any) -> bytes:
        return pickled({"a": Apply(*new, state)})

    def v3(*tail: Any) -> bytes:
        storage = Stored(("storage", Named("torch.storage.UntypedStorage"), "0", "cpu", 16))
        function = "torch._utils._rebuild_tensor_v3"
        return torch_zip(Apply(function, (storage, 0, (4,), (1,), False, Apply(ORDERED), *tail)))

    tensors = {
        "shape beyond the storage": (tensor((5,)), "needs 5 elements"),
        "offset beyond the storage": (tensor((4,), (1,), 1), "needs 5 elements"),
        "offset far beyond": (tensor((1,), (1,), 1 << 61), "elements"),
        "negative offset": (tensor((1,), (1,), -1), "holds (-1"),
        "negative size": (tensor((-4,)), "holds (-4"),
        "negative stride": (tensor((4,), (-1,), 3), "holds (-1"),
        "size of 2^64": (tensor((1 << 64,)), "holds"),
        "count that overflows 64 bits": (tensor((1 << 32, 1 << 32, 4), (1 << 34, 4, 1)), "elements"),
        "no elements, but an overflow": (tensor((0, 1 << 62, 1 << 62), (1, 1, 1)), "share bytes"),
        "stride 0 bomb": (tensor((1 << 40,), (0,)), "share bytes"),
        "overlapping rows": (tensor((3, 2), (1, 1)), "share bytes"),
        "more strides than sizes": (tensor((4,), (1, 1)), "1 sizes and 2 strides"),
        "sizes that are bool": (tensor((True,), (1,)), "holds"),
        "sizes that are float": (tensor((4.0,), (1,)), "holds"),
        "a list as shape": (tensor([4], (1,)), "not used as"),
        "65 dimensions": (tensor((1,) * 65, (1,) * 65), "65 dimensions"),
        "storage of another length": (tensor(count=5), "16 bytes, not 20"),
        "storage of negative length": (tensor(count=-4), "storage of torch's"),
        "storage of 2^70 elements": (tensor(count=1 << 70), "bytes, not"),
        "storage that is missing": (tensor(key="1"), "missing"),
        "storage with a path as key": (tensor(key="../../etc/passwd"), "missing"),
        "storage with a number as key": (tensor(key=0), "storage of torch's"),
        "storage of an unknown type": (tensor(kind="torch.QInt8Storage"), "torch.QInt8Storage"),
        "storage of a type that is none": (tensor(kind="torch.float32"), "storage of torch's"),
        "persistent id that is text": (Stored("0"), "storage of torch's"),
        "sparse tensor": (sparse, "_rebuild_sparse_tensor"),
        "quantised tensor": (Apply("torch._utils._rebuild_qtensor", (1,)), "_rebuild_qtensor"),
        "tensor without data": (
            Apply("torch._utils._rebuild_meta_tensor_no_storage", (1,)),
            "_rebuild_meta_tensor",
        ),
        "conjugated tensor": (Apply(REBUILD, (*tensor().arguments, {"conj": True})), "not used as"),
        "tensor of nothing": (Apply(REBUILD, ()), "not used as"),
        "parameter of text": (Apply("torch._utils._rebuild_parameter", ("x", True, {})), "not used as"),
    }
    storage = struct.pack("<q", 4) + FLOATS
    whole = legacy(tensor())
    return {
        name: (torch_zip({"a": tensor(), "b": value}), words) for name, (value, words) in tensors.items()
    } | {
        "version 3 beyond the storage": (v3(Named("torch.float64")), "elements"),
        "version 3 of no type": (v3(Named("torch.FloatStorage")), "not used as"),
        "array of objects": (pickled([Apply("numpy.dtype", ("O8", False, True))]), "O8"),
        "array in big-endian order": (array(1, (1,), big, False, bytes(4)), "big-endian"),
        "array of another size": (array(1, (3,), dtype, False, bytes(16)), "with 4 elements"),
        "array of part of a number": (array(1, (1,), dtype, False, bytes(5)), "whole number"),
        "array with a text as shape": (array(1, ("x",), dtype, False, bytes(4)), "holds"),
        "array that was never filled": (pickled([Apply(*new)]), "not used as"),
        "scalar of another size": (
            pickled([Apply("numpy.core.multiarray.scalar", (dtype, bytes(5)))]),
            "not used as",
        ),
        "old format, big-endian": (legacy(tensor(), little_endian=False), "big-endian"),
        "old format, another version": (whole.replace(pickled(1001), pickled(1002), 1), "version"),
        "old format, keys of others": (legacy(tensor(), {"1": storage}), "not those"),
        "old format, a storage too many": (legacy(tensor(), {"0": storage, "1": storage}), "not those"),
        "old format, another count": (legacy(tensor(), {"0": struct.pack("<q", 3) + FLOATS}), "elements"),
        "old format, negative count": (legacy(tensor(count=-4), {"0": storage}), "storage of torch's"),
        "old format, cut short": (whole[:-1], "cut short"),
        "old format, something behind": (whole + b"\0", "follow"),
        "old format, one key of two types": (
            legacy([tensor(), tensor(kind="torch.IntStorage")]),
            "two types",
        ),
        "old format, views of storages": (
            legacy(Stored(("storage", Named("torch.FloatStorage"), "0", "cpu", 4, ("1", 0, 4)))),
            "storage of torch's",
        ),
        "old format, a module": (legacy(Stored(("module", Named(ORDERED), "f.py", "source"))), "storage of"),
        "zip, big-endian": (torch_zip(tensor(), byteorder=b"big"), "big-endian"),
    }


def _bad_zips() -> Corpus:
    good = torch_zip({"a": tensor()})
    entry = good.index(b"PK\x01\x02")
    last = good.rindex(b"PK\x05\x06")
    named = good.index(b"archive/data/0", entry)  # in the directory
    local = good.index(b"archive/data/0")
    place = named - 46

    def patched(at: int, data: bytes, of: bytes = good) -> bytes:
        return of[:at] + data + of[at + len(data) :]

    def entry_and_local(offset: int, local_offset: int, data: bytes) -> bytes:
        return patched(place + offset, data, patched(local - 30 + local_offset, data))

    def twice() -> bytes:
        """Two entries of the same length of name, made equal."""
        two = torch_zip({"a": tensor(), "b": tensor(key="1")}, {"0": FLOATS, "1": FLOATS})
        return two.replace(b"archive/data/1", b"archive/data/0")

    def overlapping() -> bytes:
        """The second member's entry points to the first member."""
        two = torch_zip({"a": tensor(), "b": tensor(key="1")}, {"0": FLOATS, "1": FLOATS})
        directory = two.index(b"PK\x01\x02")
        first = two.index(b"archive/data/0", directory) - 46
        second = two.index(b"archive/data/1", directory) - 46
        return patched(second + 42, two[first + 42 : first + 46], two)

    def inside() -> bytes:
        """A member that lies in the bytes of another, with a header of its own."""
        payload = bytes(8)
        name = b"archive/data/1"
        header = struct.pack(
            "<4s5H3I2H", b"PK\x03\x04", 20, 0, 0, 0, 33, zlib.crc32(payload), 8, 8, len(name), 0
        )
        outer = header + name + payload
        content = {"a": tensor((1,), (1,), 0, 2, key="1"), "b": tensor((1,), (1,), 0, len(outer) // 4)}
        data = torch_zip(content, {"0": outer, "1": payload})
        directory = data.index(b"PK\x01\x02")
        at = data.index(name, directory) - 46
        return patched(at + 42, struct.pack("<I", data.index(outer)), data)

    def long_name(name: str) -> bytes:
        return zipped({"archive/data.pkl": pickled({}), name: b""})

    script = {"m/data.pkl": pickled({}), "m/constants.pkl": b"", "m/code/x.py": b"import os"}
    return {
        "zip: compressed bomb": (zipped({"a/data.pkl": bytes(MILLION)}, zipfile.ZIP_DEFLATED), "compressed"),
        "zip: encrypted": (entry_and_local(8, 6, b"\x01\x00"), "encrypted"),
        "zip: strongly encrypted": (entry_and_local(8, 6, b"\x41\x00"), "encrypted"),
        "zip: another method": (entry_and_local(10, 8, b"\x63\x00"), "compressed"),
        "zip: size of the directory alone": (patched(place + 20, struct.pack("<2I", 32, 32)), "differently"),
        "zip: size of the member alone": (patched(local - 30 + 18, struct.pack("<2I", 8, 8)), "differently"),
        "zip: sizes that differ": (patched(place + 20, struct.pack("<2I", 8, 16)), "compressed"),
        "zip: sizes beyond the file": (
            entry_and_local(20, 18, struct.pack("<2I", 1 << 31, 1 << 31)),
            "directory",
        ),
        "zip: size for an extra field that is not there": (
            entry_and_local(20, 18, b"\xff" * 8),
            "directory",
        ),
        "zip: other names in two places": (patched(local, b"archive/data/9"), "differently"),
        "zip: wrong checksum": (entry_and_local(16, 14, struct.pack("<I", 12345)), "checksum"),
        "zip: changed number": (patched(local + 14 + 3, b"\x41"), "checksum"),
        "zip: member beyond the file": (patched(place + 42, struct.pack("<I", 1 << 30)), "outside"),
        "zip: member in the middle of another": (patched(place + 42, struct.pack("<I", 3)), "differently"),
        "zip: the same name twice": (twice(), "twice"),
        "zip: two entries for one member": (overlapping(), "differently"),
        "zip: a member in another": (inside(), "overlaps"),
        "zip: name with ..": (long_name("archive/../../etc/passwd"), "name"),
        "zip: absolute name": (long_name("/etc/passwd"), "name"),
        "zip: name with a backslash": (long_name("archive\\x"), "name"),
        "zip: name with a line feed": (long_name("archive/a\nb"), "name"),
        "zip: cut short": (good[:-30], "cut short"),
        "zip: cut in half": (good[: len(good) // 2], "cut short"),
        "zip: only a beginning": (good[:20], "cut short"),
        "zip: bytes behind the end": (good + b"x", "cut short"),
        "zip: a comment": (patched(len(good) - 2, b"\x04\x00") + b"boo!", "cut short"),
        "zip: directory elsewhere": (patched(last + 16, struct.pack("<I", 0)), "not where"),
        "zip: directory outside": (patched(last + 16, struct.pack("<I", 1 << 31)), "not where"),
        "zip: too few entries": (patched(last + 8, b"\x01\x00\x01\x00"), "more entries"),
        "zip: too many entries": (patched(last + 8, b"\x09\x00\x09\x00"), "cut short"),
        "zip: several disks": (patched(last + 4, b"\x01\x00"), "not where"),
        "zip: entries that are none": (patched(entry, b"XXXX"), "damaged"),
        "zip: wide end that lies": (
            good[:last]
            + struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 60, 0)
            + struct.pack("<4sIQI", b"PK\x06\x07", 0, last, 1)
            + good[last:],
            "contradicts",
        ),
        "zip: nothing in it": (zipped({}), "nothing"),
        "zip: no data.pkl": (zipped({"archive/weights": FLOATS}), "not one of torch's"),
        "zip: a checkpoint inside": (zipped({"model.pt": good}), "model.pt"),
        "zip: a zip as data.pkl": (torch_zip(0, **{"data.pkl": good}), "PERSID"),
        "zip: two roots": (zipped({"a/data.pkl": pickled({}), "b/data.pkl": pickled({})}), "a/data.pkl"),
        "zip: TorchScript": (zipped(script), "TorchScript"),
        "zip: an unused storage": (torch_zip([tensor()], {"0": FLOATS, "1": FLOATS}), "belong to nothing"),
        "zip: bytes behind the pickle": (torch_zip(0, **{"data.pkl": pickled({}) + b"}"}), "follow"),
    }  # fmt: skip


def _other_files() -> Corpus:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 223000000\n"
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    safe = struct.pack("<Q", len(header)) + header + FLOATS
    overlap = header.replace(b"}}", b'}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}')
    return {
        "empty": (b"", "empty"),
        "web page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        "web page after a blank": (b"\n  <html lang='en'>Sign in</html>", "web page"),
        "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "web page"),
        "LFS pointer": (lfs, "git lfs pull"),
        "gzip": (gzip.compress(pickled({})), "gunzip"),
        "zlib, as joblib writes": (zlib.compress(pickled({})), "joblib"),
        "tar": (tar.getvalue(), "tar"),
        "7-Zip": (b"7z\xbc\xaf\x27\x1c" + bytes(50), "7-Zip"),
        "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        "numpy": (b"\x93NUMPY\x01\x00" + bytes(50), "numpy"),
        "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(50), "PNG"),
        "JSON": (b'{"model": "edm"}', "JSON"),
        "text": (b"Dear reader,\nthis is no checkpoint.\n", "text"),
        "text that ends like a pickle": (b"This is no checkpoint.", "text"),
        "one byte": (b"\x00", "no checkpoint"),
        "noise": (bytes(range(128, 256)) * 9, ""),
        "safetensors: cut short": (safe[:-1], "bytes long"),
        "safetensors: header beyond the file": (struct.pack("<Q", 4000) + header, "cut short"),
        "safetensors: overlapping": (
            struct.pack("<Q", len(overlap)) + overlap + FLOATS,
            "follow",
        ),
        "safetensors: another shape": (safe.replace(b"[4]", b"[5]"), "dtype, shape and place"),
    }


def corpus() -> Corpus:
    """Name -> content and words of the refusal, of every file that must be refused."""
    return (
        _that_execute()
        | _that_are_malformed()
        | that_take_long(60_000)
        | _with_impossible_tensors()
        | _bad_zips()
        | _other_files()
    )
