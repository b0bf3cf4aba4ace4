"""What the names in checkpoints stand for: the whole list, and nothing on it is imported.

Three kinds of names occur. Some are functions and classes whose result is plain data, a tensor or a record
of a network (`MEANINGS`); what they would do is done here, on data. Some only name a thing, such as an
element type (`INERT`). And some belong to configurations and callbacks of other libraries, which are no
part of a network: of these the name is kept and the content dropped unread (`DROPPED`). A pickle with any
other name is refused, wherever in it the name stands. EDM's persistent objects carry the text of their
Python module, which is dropped; their class names are taken as they come, since a class name alone does
nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import NoReturn

from flowdistill.checkpoints.content import (
    ITEM_BYTES,
    Content,
    Global,
    Record,
    Refusal,
    StoredTensor,
)
from flowdistill.checkpoints.nodes import TEXT_BYTES, Budget, is_key
from flowdistill.errors import quoted

_SHORT = 256  # parts of a path and their characters
PERSISTENT_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"

STORAGES: Mapping[str, str] = {
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.ShortStorage": "int16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.FloatStorage": "float32",
    "torch.DoubleStorage": "float64",
    "torch.ComplexFloatStorage": "complex64",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.storage.UntypedStorage": "uint8",
}
_NUMPY = {
    "b1": ("bool", "?"),
    "u1": ("uint8", "B"),
    "i1": ("int8", "b"),
    "u2": ("uint16", "H"),
    "i2": ("int16", "h"),
    "f2": ("float16", "e"),
    "u4": ("uint32", "I"),
    "i4": ("int32", "i"),
    "f4": ("float32", "f"),
    "u8": ("uint64", "Q"),
    "i8": ("int64", "q"),
    "f8": ("float64", "d"),
}
"""The code of numpy -> the name of torch and the code of `struct`."""
_SCALARS = {f"numpy.{name}": struct.Struct(f"<{code}") for name, code in _NUMPY.values()}
_DTYPES = {f"torch.{name}": name for name in ITEM_BYTES}


@dataclass(slots=True)
class Asked:
    """A call whose parts have been given their meaning."""

    name: str
    arguments: tuple[Content, ...]
    state: Content
    items: dict[Content, Content]
    nested: Callable[[bytes | memoryview, int], Content]
    budget: Budget
    at: int

    def counted(self, values: Sequence[Content]) -> Sequence[Content]:
        """The values, paid for: a pickle can pass the same list to many calls."""
        self.budget.spend(len(values))
        return values

    def refuse(self) -> NoReturn:
        raise Refusal(f"'{self.name}' is not used as its library uses it")


# Functions and classes whose result is known


def meaning(asked: Asked) -> Content:
    """What a call stands for; Refusal where it is not made as the library of that name makes it."""
    make = MEANINGS.get(asked.name)
    if make is None:
        raise Refusal(f"the pickle calls '{asked.name}', which only names something")
    if (asked.items and make not in _WITH_ITEMS) or (asked.state is not None and make not in _WITH_STATE):
        asked.refuse()
    return make(asked)


def _mapping(asked: Asked) -> dict[Content, Content]:
    """A dict of any kind; attributes that it may also have do not matter."""
    match asked.arguments:
        case () | (Global() | None,):  # of a defaultdict, the type of what is missing
            return asked.items
        case (dict(given),) if not asked.items:
            return given
        case (list(pairs),) if not asked.items and all(_is_pair(pair) for pair in asked.counted(pairs)):
            return dict(pairs)
    asked.refuse()


def _is_pair(pair: Content) -> bool:
    return type(pair) in (list, tuple) and len(pair) == 2 and is_key(pair[0])


def _attributes(asked: Asked) -> Record:
    match asked.arguments, asked.state:
        case (), (dict() | None) as state:
            return Record(asked.name, (), state or {})
    asked.refuse()


def _members(asked: Asked) -> set[Content] | frozenset[Content]:
    make = frozenset if asked.name.endswith(".frozenset") else set
    match asked.arguments:
        case ():
            return make()
        case (list(members),) if all(map(is_key, asked.counted(members))):
            return make(members)
    asked.refuse()


def _reconstructor(asked: Asked) -> Content:
    """How protocols 0 and 1 make an object: its class, the base type, and that one's value."""
    match asked.arguments:
        case Global(name), Global("builtins.object" | "__builtin__.object"), None:
            return meaning(replace(asked, name=name, arguments=()))
        case Global(name), Global("builtins.dict" | "__builtin__.dict"), dict() as given:
            return meaning(replace(asked, name=name, arguments=(given,)))
    asked.refuse()


def _module(asked: Asked) -> Record:
    return Record(asked.name, asked.arguments, asked.state)


def _persistent_object(asked: Asked) -> Record:
    match asked.arguments:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            return Record(PERSISTENT_OBJECT, (name,), state)
    asked.refuse()


def _path(asked: Asked) -> str:
    parts = asked.arguments
    if len(parts) > _SHORT or not all(isinstance(part, str) and len(part) < _SHORT for part in parts):
        asked.refuse()
    flavour = PureWindowsPath if "Windows" in asked.name else PurePosixPath
    return str(flavour(*parts))


def _size(asked: Asked) -> tuple[Content, ...]:
    match asked.arguments:
        case (list(sizes) | tuple(sizes),) if all(type(size) is int for size in asked.counted(sizes)):
            return tuple(sizes)
    asked.refuse()


def _device(asked: Asked) -> str:
    match asked.arguments:
        case (str(kind), *index) if len(kind) < _SHORT and len(index) < 2:
            return ":".join([kind, *map(str, index)])
    asked.refuse()


def _encoded(asked: Asked) -> memoryview:
    """How protocols before 3 write bytes: as text, one character for each."""
    match asked.arguments:
        case (str(text), "latin1" | "latin-1"):
            asked.budget.spend(len(text) // TEXT_BYTES)
            with suppress(UnicodeEncodeError):
                return memoryview(bytearray(text, "latin-1"))
    asked.refuse()


def _no_bytes(asked: Asked) -> bytes:
    return b"" if asked.arguments == () else asked.refuse()


# Tensors and arrays


def _storage(asked: Asked) -> StoredTensor:
    match asked.arguments:
        case (bytes() | memoryview() as payload,):
            found = asked.nested(payload, asked.at)
            if isinstance(found, StoredTensor):
                return found
    asked.refuse()


def _tensor(asked: Asked) -> StoredTensor:
    """`_rebuild_tensor(storage, offset, size, stride)`; version 2 adds what only matters for training.

    Its last argument, where there is one, marks values that are kept conjugated or negated.
    """
    match asked.arguments:
        case StoredTensor() as storage, int(offset), tuple(shape), tuple(stride), *rest:
            if len(rest) in (0, 2) or (len(rest) == 3 and not rest[2]):
                return storage.view(offset, shape, stride)
    asked.refuse()


def _tensor_of_type(asked: Asked) -> StoredTensor:
    """Version 3, for element types that have no storage of their own: the type comes as an argument."""
    match asked.arguments:
        case StoredTensor() as storage, int(offset), tuple(shape), tuple(stride), _, _, Global(name), *rest:
            if name in _DTYPES and not any(rest):
                return storage.view(offset, shape, stride, _DTYPES[name])
    asked.refuse()


def _parameter(asked: Asked) -> StoredTensor:
    match asked.arguments:
        case StoredTensor() as tensor, *_:
            return tensor
    asked.refuse()


def _typed(asked: Asked) -> StoredTensor:
    """A tensor with attributes: `(function, class, its arguments, attributes)`."""
    match asked.arguments:
        case Global(name), Global(kind), tuple(arguments), _ if name in _REBUILDS and kind in _TENSOR_TYPES:
            return _REBUILDS[name](replace(asked, name=name, arguments=arguments))
    asked.refuse()


def _dtype(asked: Asked) -> Global:
    """`numpy.dtype("f4", False, True)`, whose state begins with a version and the order of bytes."""
    match asked.arguments, asked.state:
        case (str(code), *_), (None | (_, "<" | "|" | "=", *_)) if code in _NUMPY:
            return Global(f"numpy.{_NUMPY[code][0]}")
        case (str(code), *_), _:
            raise Refusal(f"a numpy array of type {quoted(code)}, or in big-endian order")
    asked.refuse()


def _scalar(asked: Asked) -> bool | int | float:
    match asked.arguments:
        case Global(name), (bytes() | memoryview()) as raw if name in _SCALARS:
            if len(raw) == _SCALARS[name].size:
                value: bool | int | float = _SCALARS[name].unpack(raw)[0]
                return value
    asked.refuse()


def _array(asked: Asked) -> StoredTensor:
    """An array is made empty and gets `(version, shape, dtype, column-major?, bytes)` as its state."""
    match asked.state:
        case _, tuple(shape), Global(name), bool(by_columns), (bytes() | memoryview()) as raw:
            return _numbers(asked, raw, name, shape, by_columns)
    asked.refuse()


def _array_of_buffer(asked: Asked) -> StoredTensor:
    match asked.arguments:
        case (bytes() | memoryview()) as raw, Global(name), tuple(shape), ("C" | "F") as order:
            return _numbers(asked, raw, name, shape, order == "F")
    asked.refuse()


def _numbers(
    asked: Asked, raw: bytes | memoryview, name: str, shape: tuple[Content, ...], by_columns: bool
) -> StoredTensor:
    if name not in _SCALARS:
        asked.refuse()
    return StoredTensor.whole(name.removeprefix("numpy."), raw).filled(shape, by_columns)


_WITH_ITEMS = {_mapping, _reconstructor}
_WITH_STATE = {_mapping, _attributes, _reconstructor, _module, _dtype, _array}
_REBUILDS: Mapping[str, Callable[[Asked], StoredTensor]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
_TENSOR_TYPES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
_BUILTINS = ("builtins", "__builtin__")  # as Python 3 and, up to protocol 2, Python 2 call it
_LAYERS = {
    "activation": ("GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Softmax", "Tanh"),
    "batchnorm": ("BatchNorm2d",),
    "container": ("ModuleDict", "ModuleList", "ParameterDict", "ParameterList", "Sequential"),
    "conv": ("Conv1d", "Conv2d", "ConvTranspose2d"),
    "dropout": ("Dropout", "Dropout2d"),
    "linear": ("Identity", "Linear"),
    "normalization": ("GroupNorm", "LayerNorm"),
    "pooling": ("AdaptiveAvgPool2d", "AvgPool2d", "MaxPool2d"),
    "sparse": ("Embedding",),
    "upsampling": ("Upsample",),
}

MEANINGS: Mapping[str, Callable[[Asked], Content]] = {
    **_REBUILDS,
    "torch._tensor._rebuild_from_type_v2": _typed,
    "torch.storage._load_from_bytes": _storage,
    "torch.Size": _size,
    "torch.device": _device,
    **{f"torch.nn.modules.{file}.{name}": _module for file, names in _LAYERS.items() for name in names},
    "torch.nn.parallel.data_parallel.DataParallel": _module,
    "torch.nn.parallel.distributed.DistributedDataParallel": _module,
    PERSISTENT_OBJECT: _persistent_object,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_of_buffer for core in ("core", "_core")},
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": _mapping,
    "collections.Counter": _mapping,
    "dnnlib.util.EasyDict": _mapping,
    "easydict.EasyDict": _mapping,
    "pytorch_lightning.utilities.parsing.AttributeDict": _mapping,
    "lightning.fabric.utilities.data.AttributeDict": _mapping,
    "lightning_fabric.utilities.data.AttributeDict": _mapping,
    "argparse.Namespace": _attributes,
    "types.SimpleNamespace": _attributes,
    **{f"{builtins}.{name}": _members for builtins in _BUILTINS for name in ("set", "frozenset")},
    **{f"{builtins}.bytes": _no_bytes for builtins in _BUILTINS},
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": _reconstructor,
    "copy_reg._reconstructor": _reconstructor,
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}
INERT = {
    *STORAGES,
    *_DTYPES,
    *_TENSOR_TYPES,
    "numpy.ndarray",
    *(
        f"{builtins}.{name}"
        for builtins in _BUILTINS
        for name in ("object", "dict", "list", "tuple", "str", "int", "float", "bool")
    ),
    "__builtin__.long",
    "__builtin__.unicode",
}
DROPPED = {
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Float", "Integer", "String")),
    "typing.Any",
    "ml_collections.config_dict.config_dict.ConfigDict",
    "ml_collections.config_dict.config_dict.FrozenConfigDict",
    "ml_collections.config_dict.config_dict.FieldReference",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
}
KNOWN = frozenset(MEANINGS) | INERT | DROPPED
"""Every name that may occur."""
