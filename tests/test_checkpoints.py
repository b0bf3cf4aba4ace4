"""Checkpoints are data: what was saved comes back, nothing in them runs, what is wrong is refused by name."""

from __future__ import annotations

import argparse
import collections
import gzip
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import safetensors.torch
import torch
from hostile import (
    Apply,
    Named,
    Raw,
    Stored,
    code,
    edm,
    legacy,
    nested,
    pickled,
    plain_tensor,
    tensor,
    torch_zip,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdistill import checkpoints
from flowdistill.checkpoints import PERSISTENT_OBJECT, Global, Record, StoredTensor
from flowdistill.checkpoints.content import ITEM_BYTES
from flowdistill.checkpoints.resolving import DEPTH_AT_MOST
from flowdistill.errors import ArtifactError, MissingInput, UsageError

REPOSITORY = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SNAPSHOT = FIXTURES / "checkpoints" / "snapshot_like_edm.pkl.gz"
RECTIFIED = FIXTURES / "checkpoints" / "ckpt_ddpmpp.pth"
FLOATS = torch.tensor([1.0, 2.0, 3.0, 4.0])
CPU_SECONDS_AT_MOST = 4.0  # the promise is 2; a busy machine counts more for the same work


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edm") / "network-snapshot.pkl"
    path.write_bytes(gzip.decompress(SNAPSHOT.read_bytes()))
    return path


def put(path: Path, data: bytes) -> Path:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def content_of(path: Path, data: bytes) -> Any:
    return checkpoints.read(put(path, data)).content


def loaded(content: Any) -> Any:
    """Content with its tensors as torch's."""
    match content:
        case StoredTensor():
            return content.load()
        case memoryview():
            return bytes(content)
        case dict():
            return {key: loaded(value) for key, value in content.items()}
        case list() | tuple():
            return type(content)(map(loaded, content))
        case Record(name, arguments, state):
            return Record(name, loaded(arguments), loaded(state))
    return content


def expected(value: Any) -> Any:
    """What should come back for what was saved."""
    match value:
        case torch.Tensor():
            return value.detach()
        case np.ndarray():
            return torch.from_numpy(value.copy())
        case np.generic():
            return value.item()
        case torch.Size():
            return tuple(value)
        case torch.dtype():
            return Global(str(value))
        case torch.device() | pathlib.PurePath():
            return str(value)
        case argparse.Namespace():
            return Record("argparse.Namespace", (), expected(vars(value)))
        case dict():
            return {key: expected(item) for key, item in value.items()}
        case list() | tuple():
            return type(value)(map(expected, value))
    return value


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.is_contiguous()
        assert (
            found.numpy(force=True).tobytes() == wanted.contiguous().numpy(force=True).tobytes()
            if (wanted.dtype.itemsize > 1 and wanted.dtype not in (torch.bfloat16,))
            else torch.equal(found.float(), wanted.float())
        )
        return
    assert type(found) is type(wanted), (found, wanted)
    if isinstance(wanted, Record):
        assert found.name == wanted.name
        assert_same((found.arguments, found.state), (wanted.arguments, wanted.state))
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        assert_same(list(found.values()), list(wanted.values()))
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    else:
        assert found == wanted or (found != found and wanted != wanted)


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


OLD = {"_use_new_zipfile_serialization": False}
WRITERS: dict[str, Callable[[Any], bytes]] = {
    "zip": saved,
    "zip, protocol 4": lambda value: saved(value, pickle_protocol=4),
    "old format": lambda value: saved(value, **OLD),
    "old format, protocol 5": lambda value: saved(value, pickle_protocol=5, **OLD),
    **{
        f"pickle, protocol {protocol}": lambda value, protocol=protocol: pickle.dumps(value, protocol)
        for protocol in range(6)
    },
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


# The originals' files


class Persistent:
    """The data of one of EDM's objects, as a second reader sees it."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.name, self.state = meta["class_name"], meta["state"]


class Second(pickle.Unpickler):
    """Python's own machine with a list of names: slow and trusted, for comparison only."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "torch_utils.persistence._reconstruct_persistent_obj": Persistent,
            "torch.storage._load_from_bytes": lambda data: torch.load(io.BytesIO(data), weights_only=True),
            "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
            "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
            "torch.nn.modules.container.ModuleDict": torch.nn.ModuleDict,
            "collections.OrderedDict": collections.OrderedDict,
            "numpy.dtype": np.dtype,
            "numpy._core.multiarray.scalar": np._core.multiarray.scalar,
        }
        return known[f"{module}.{name}"]


def tensors_of_module(name: str, state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """A state dict from the `__dict__`s of modules, whoever read them."""
    for key, value in {**state["_parameters"], **state["_buffers"]}.items():
        if value is not None:
            yield name + key, value
    for key, module in state["_modules"].items():
        inner = module.state if isinstance(module, Record | Persistent) else vars(module)
        yield from tensors_of_module(f"{name}{key}.", inner)


def test_a_snapshot_of_edm_is_read_to_the_bit(snapshot: Path) -> None:
    facts = json.loads((FIXTURES / "checkpoints" / "snapshot_like_edm.json").read_text())
    found = checkpoints.read(snapshot)
    assert (found.format, found.path) == ("pickle", snapshot)
    assert found.sha256 == hashlib.sha256(snapshot.read_bytes()).hexdigest()
    assert list(found.content) == facts["top_keys"]
    assert found.content["dataset_kwargs"]["resolution"] == 8
    network = found.content["ema"]
    assert (network.name, network.arguments) == (PERSISTENT_OBJECT, ("EDMPrecond",))
    assert list(network.state) == list(facts["ema_attrs"])
    given = {key: network.state["_init_kwargs"][key] for key in facts["constructor_kwargs"]}
    assert given == facts["constructor_kwargs"]
    with snapshot.open("rb") as file:
        second = Second(file).load()["ema"]
    tensors = dict(tensors_of_module("", network.state))
    others = dict(tensors_of_module("", second.state))
    assert {name: list(value.shape) for name, value in tensors.items()} == facts["state_dict"]
    assert_same(loaded(tensors), expected(others))
    block = network.state["_modules"]["model"].state["_modules"]["enc"].state["_modules"]["8x8_block0"]
    assert block.state["skip_scale"] == pytest.approx(0.5**0.5) and type(block.state["skip_scale"]) is float


def test_a_checkpoint_of_rectified_flow_is_read_to_the_bit() -> None:
    found = checkpoints.read(RECTIFIED)
    assert found.format == "zip"
    scalar = (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")
    with torch.serialization.safe_globals([scalar, np.dtype, type(np.dtype("f8"))]):
        wanted = torch.load(RECTIFIED, weights_only=True)
    assert_same(loaded(found.content), expected(wanted))
    facts = json.loads((FIXTURES / "ncsnpp" / "ckpt_ddpmpp.json").read_text())
    numbers = safetensors.torch.load_file(FIXTURES / "ncsnpp" / "ckpt_ddpmpp.expected.safetensors")
    average = zip(facts["ema_param_order"], found.content["ema"]["shadow_params"], strict=True)
    for name, value in average:
        assert torch.equal(value.load(), numbers[f"ema.{name}"])


# What was saved comes back


def some_of_everything() -> dict[str, Any]:
    base = torch.arange(24.0)
    linear = torch.nn.Linear(3, 2)
    return {
        "state": collections.OrderedDict(linear.state_dict()),
        "parameter": linear.weight,
        "with attributes": torch.nn.Parameter(torch.ones(2)),
        "view": base[4:12].view(2, 4),
        "transposed": base.view(4, 6).t(),
        "every other": base[::2],
        "expanded by one": base[:3].view(3, 1).expand(3, 1),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 3),
        "step": np.int64(7),
        "lr": np.float32(0.1),
        "args": argparse.Namespace(model="SiT-XL/2", cfg=1.5, path=pathlib.Path("/a/b c"), nested=[1, None]),
        "sizes": torch.Size([3, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "default": collections.defaultdict(dict, {"a": {}}),
        "count": collections.Counter("aab"),
        "sets": ({1, 2}, frozenset({"a"}), set(), frozenset()),
        "bytes": (b"", b"short", bytes(range(256)) * 3),
        "texts": ["", "ä\n'\"\\ \U0001f600", "x" * 1000],
        "numbers": [
            0,
            -1,
            255,
            256,
            65536,
            -(2**31),
            2**31,
            2**63,
            -(2**100),
            1e300,
            float("inf"),
            True,
            False,
        ],
        "types": [int, dict],
        1: "number as key",
        None: (),
    }


@every_writer
def test_what_was_saved_comes_back(write: Callable[[Any], bytes], tmp_path: Path) -> None:
    value = some_of_everything()
    value["with attributes"].note = {"some": "attribute"}
    found = loaded(content_of(tmp_path / "a", write(value)))
    kinds = {each.name.rpartition(".")[2] for each in found.pop("types")}
    assert kinds in ({"int", "dict"}, {"long", "dict"})
    del value["types"]
    assert_same(found, expected(value))


@every_writer
@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_every_element_type_comes_back(write: Callable[[Any], bytes], dtype: str, tmp_path: Path) -> None:
    value = torch.tensor([[0, 1, 0], [1, 1, 0]]).to(getattr(torch, dtype))
    found = content_of(tmp_path / "a", write({"a": value, "b": [value]}))
    assert found["a"].dtype == dtype
    assert_same(loaded(found), {"a": value, "b": [value]})


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("array", ["b1", "u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])
def test_arrays_come_back(protocol: int, array: str, tmp_path: Path) -> None:
    numbers = np.arange(12).reshape(3, 4).astype(array)
    value = {
        "rows": numbers,
        "columns": np.asfortranarray(numbers),
        "part": numbers[1:, ::2],
        "none": numbers[:0],
        "one": numbers[1, 1],
        "scalar": np.array(3).astype(array),
        "large": np.arange(1000).astype(array),
    }
    found = content_of(tmp_path / "a", pickle.dumps(value, protocol))
    assert_same(loaded(found), expected(value))


names = st.text(max_size=8)
leaves = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | names | st.binary(max_size=300)
    | st.builds(
        lambda shape, dtype: torch.ones(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float32, torch.float16, torch.bool, torch.int64]),
    )
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(names | st.integers(-9, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(tree=st.dictionaries(names, trees), writer=st.sampled_from(list(WRITERS)))
def test_any_tree_comes_back(tree: Any, writer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree"
    assert_same(loaded(content_of(path, WRITERS[writer](tree))), expected(tree))


def test_safetensors_come_with_their_metadata(tmp_path: Path) -> None:
    value = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True, False]),
        "c": torch.tensor(1).short(),
    }
    safetensors.torch.save_file(value, tmp_path / "a", {"format": "pt"})
    found = checkpoints.read(tmp_path / "a")
    assert (found.format, found.content["metadata"]) == ("safetensors", {"format": "pt"})
    assert_same(dict(sorted(loaded(found.content["tensors"]).items())), value)


def test_tensors_lie_in_the_file_where_they_can(tmp_path: Path) -> None:
    value = {"a": torch.arange(6.0).view(2, 3), "whole": torch.arange(100.0)}
    value["part"] = value["whole"][20:30]
    path = put(tmp_path / "a", saved(value))
    found = checkpoints.read(path).content
    first, again = found["whole"].load(), found["whole"].load()
    assert first.data_ptr() == again.data_ptr()
    assert found["part"].load().data_ptr() == first.data_ptr() + 80
    assert (found["part"].nbytes, found["part"].offset) == (40, 20)
    first.zero_()
    assert not again.any()
    assert_same(loaded(checkpoints.read(path).content), value)  # the file itself is untouched
    path.unlink()
    del found
    assert_same(first, torch.zeros(100))


def test_reading_needs_no_torch(snapshot: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from flowdistill import checkpoints\n"
        "for name in sys.argv[1:]: checkpoints.read(Path(name))\n"
        "assert not {'torch', 'pickle', 'numpy', 'zipfile'} & set(sys.modules), set(sys.modules)"
    )
    python(script, snapshot, RECTIFIED)


def python(script: str, *arguments: object, cwd: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names


def test_the_source_in_a_persistent_object_is_dropped(tmp_path: Path) -> None:
    source = f"open({str(tmp_path / 'canary')!r}, 'w')\nimport this\nraise SystemExit"
    value = {
        "ema": edm(source, {"_parameters": {"w": plain_tensor(hostile.FLOATS, 4)}, "_init_kwargs": {"a": 1}})
    }
    path = put(tmp_path / "a", pickled(value))
    found = checkpoints.read(path).content["ema"]
    assert (found.name, found.arguments) == (PERSISTENT_OBJECT, ("Net",))
    assert found.state["_init_kwargs"] == {"a": 1}
    assert_same(found.state["_parameters"]["w"].load(), FLOATS)
    assert source not in repr(found)
    assert not (tmp_path / "canary").exists()
    assert "this" not in sys.modules


@pytest.mark.parametrize(
    "state", [Raw(b"}"), {"_parent": Raw(b"h\x63"), "_content": {"a": Apply("typing.Any")}}]
)
def test_configurations_of_others_are_only_named(state: Any, tmp_path: Path) -> None:
    """Those of omegaconf refer to their parents, which would be refused in anything that is kept."""
    config = Raw(code(Named("omegaconf.dictconfig.DictConfig")) + b")\x81q\x63" + code(state) + b"b")
    found = content_of(tmp_path / "a", pickled({"hyper_parameters": config, "state_dict": {}}))
    assert found == {"hyper_parameters": Record("omegaconf.dictconfig.DictConfig"), "state_dict": {}}


@pytest.mark.parametrize("protocol", range(6))
def test_dicts_with_attributes_are_dicts(
    protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("dnnlib.util")
    monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
    exec("class EasyDict(dict):\n    __module__ = 'dnnlib.util'", vars(module))
    monkeypatch.setitem(sys.modules, "dnnlib.util", module)
    value = module.EasyDict(a=1, b=module.EasyDict())
    assert content_of(tmp_path / "a", pickle.dumps([value], protocol)) == [{"a": 1, "b": {}}]


def test_modules_that_were_saved_whole_are_records(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.SiLU())
    found = content_of(tmp_path / "a", saved(network))
    assert found.name == "torch.nn.modules.container.Sequential"
    tensors = dict(tensors_of_module("", found.state))
    assert_same(loaded(tensors), expected(dict(network.state_dict())))


def test_old_pairs_make_an_ordered_dict(tmp_path: Path) -> None:
    value = Apply("collections.OrderedDict", ([["b", 1], ["a", 2]],))
    assert content_of(tmp_path / "a", pickled({"x": value})) == {"x": {"b": 1, "a": 2}}


def test_content_is_at_most_so_deep(tmp_path: Path) -> None:
    deepest = b"\x80\x02" + b"]" * DEPTH_AT_MOST + b"Na" + b"a" * (DEPTH_AT_MOST - 1) + b"."
    content_of(tmp_path / "a", deepest)
    with pytest.raises(ArtifactError, match="levels deep"):
        content_of(tmp_path / "a", deepest.replace(b"]]", b"]]]", 1).replace(b"aa", b"aaa", 1))


# Containers


def test_zip_files_of_other_tools_are_read(tmp_path: Path) -> None:
    """Packed again: with folders, sizes in front, and a name with a blank."""
    original = zipfile.ZipFile(io.BytesIO(saved({"a": FLOATS})))
    path = tmp_path / "a"
    with zipfile.ZipFile(path, "w") as archive:
        archive.mkdir("my model")
        for name in original.namelist():
            with archive.open(name.replace("archive", "my model", 1), "w", force_zip64=True) as member:
                member.write(original.read(name))
    assert_same(loaded(checkpoints.read(path).content), {"a": FLOATS})


def test_zip_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        data = saved({"a": FLOATS})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(loaded(content_of(tmp_path / "a", data)), {"a": FLOATS})


def test_sizes_and_offsets_beyond_32_bits_stand_in_extra_fields(tmp_path: Path) -> None:
    """As in files of more than 4 GB; here the numbers in those fields are small."""
    data = torch_zip({"a": tensor()})
    start, end = data.index(b"PK\x01\x02"), data.rindex(b"PK\x05\x06")
    entries, at, count = [], start, 0
    while at < end:
        fields = list(struct.unpack("<4s6H3I5H2I", data[at : at + 46]))
        name = data[at + 46 : at + 46 + fields[10]]
        wide = struct.pack("<2H3Q", 1, 24, fields[9], fields[8], fields[16])
        fields[8] = fields[9] = fields[16] = 0xFFFFFFFF
        fields[11] = 4 + len(wide)
        entries.append(struct.pack("<4s6H3I5H2I", *fields) + name + b"FB\x00\x00" + wide)
        at, count = at + 46 + fields[10], count + 1
    directory = b"".join(entries)
    place = start + len(directory)
    tail = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), start)
    tail += struct.pack("<4sIQI", b"PK\x06\x07", 0, place, 1)
    tail += struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    assert_same(loaded(content_of(tmp_path / "a", data[:start] + directory + tail)), {"a": FLOATS})


def test_what_is_no_file_is_a_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="no such file"):
        checkpoints.read(tmp_path / "missing.pt")
    with pytest.raises(UsageError, match="is a folder"):
        checkpoints.read(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="no regular file"):
        checkpoints.read(tmp_path / "pipe")


# Hostile files


WATCH = """
import json, os, sys, time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from flowdistill import checkpoints

folder, work = Path(sys.argv[1]), int(sys.argv[2])
if work:
    checkpoints.Budget = partial(checkpoints.Budget, work)
if "python's own" in sys.argv:
    import pickle
    checkpoints.read = lambda path: SimpleNamespace(content=pickle.loads(path.read_bytes()))
quiet = {"builtins.id", "mmap.__new__", "_thread.start_new_thread", "_thread.start_joinable_thread"}
events, results = set(), {}


def hook(event, arguments):
    if event not in quiet and not (event == "open" and str(arguments[0]).startswith(str(folder))):
        events.add((event, repr(arguments)[:200]))


def outcome(path):
    began = time.process_time()
    try:
        content = checkpoints.read(path).content
        found = ["taken", repr(content)[:200]]
    except Exception as error:
        found = [type(error).__name__, str(error)]
    return [*found, time.process_time() - began]


paths = sorted(folder.iterdir())
outcome(paths[0])  # whatever a first use imports
modules = set(sys.modules)
sys.addaudithook(hook)
for path in paths:
    results[path.name] = outcome(path)
modules = set(sys.modules) - modules
print(json.dumps({"results": results, "events": sorted(events), "modules": sorted(modules)}))
"""


def watched(folder: Path, corpus: hostile.Corpus, *how: object) -> tuple[dict[str, Any], list[Any]]:
    """What becomes of every file of a corpus in a process that reports whatever it does beside."""
    files = folder / "files"
    files.mkdir()
    for number, (data, _) in enumerate(corpus.values()):
        (files / f"{number:03}.pt").write_bytes(data)
    report = json.loads(python(WATCH, files, *how, cwd=folder))
    return dict(zip(corpus, report["results"].values(), strict=True)), report["events"] + report["modules"]


def test_no_hostile_file_does_anything_but_be_refused(tmp_path: Path) -> None:
    """With a smaller budget of work than the real one, to be quick; it is not what refuses most of them."""
    corpus = hostile.corpus()
    assert len(corpus) > 200
    results, events = watched(tmp_path, corpus, 50_000)
    assert events == []
    assert [path.name for path in tmp_path.iterdir()] == ["files"]  # no canary
    for number, (name, (_, words)) in enumerate(corpus.items()):
        kind, message, _ = results[name]
        assert kind == "ArtifactError", (name, kind, message)
        assert words in message, (name, message)
        assert message.startswith(f"{tmp_path / 'files'}/{number:03}.pt: "), (name, message)
        assert message.count("\n") <= 2 and all(map(str.isprintable, message.split("\n"))), (name, message)


def test_the_watch_sees_what_python_would_do(tmp_path: Path) -> None:
    corpus = hostile.corpus()
    names = ("empty", "os.system, protocol 4", "import", "subprocess")
    _, events = watched(tmp_path, {name: corpus[name] for name in names}, 0, "python's own")
    seen = {event[0] for event in events if isinstance(event, list)}
    assert {"os.system", "import", "subprocess.Popen", "pickle.find_class"} <= seen
    assert (tmp_path / "canary").exists()


def test_no_hostile_file_takes_long(tmp_path: Path) -> None:
    corpus = hostile.that_take_long(150_000)
    costly = {name: corpus[name] for name in ("no end of lists", "a nested storage, often")}
    results, _ = watched(tmp_path, {"empty": (b"", "")} | costly, 0)
    for name in costly:
        kind, message, seconds = results[name]
        assert (kind, "work" in message) == ("ArtifactError", True)
        assert seconds < CPU_SECONDS_AT_MOST


def test_the_builders_of_hostile_files_can_build_good_ones(tmp_path: Path) -> None:
    """Otherwise the corpus could be refused for the wrong reasons."""
    for data in (
        torch_zip({"a": tensor()}),
        legacy({"a": tensor()}),
        pickled({"a": plain_tensor(hostile.FLOATS, 4)}),
    ):
        assert_same(loaded(content_of(tmp_path / "a", data)), {"a": FLOATS})
    storage = Stored(("storage", Named("torch.FloatStorage"), "0", "cpu", 4))
    assert_same(loaded(content_of(tmp_path / "a", pickled(nested(legacy(storage))))), FLOATS)


# Damage


def weights(content: Any, name: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every tensor by its place, with type, shape and bytes."""
    match content:
        case StoredTensor():
            yield name, (content.dtype, content.shape, content.load().numpy(force=True).tobytes())
        case dict():
            for key, value in content.items():
                yield from weights(value, f"{name}.{key!r}")
        case list() | tuple():
            for at, value in enumerate(content):
                yield from weights(value, f"{name}[{at}]")
        case Record(_, arguments, state):
            yield from weights((arguments, state), name)


def mutated(data: bytes, places: list[int], draw: random.Random) -> bytes:
    """One change: a bit, a byte, a piece removed, added, doubled or cut off, at one of these places."""
    at, size = draw.choice(places), draw.choice([1, 1, 1, 2, 4, 9])
    match draw.randrange(6):
        case 0 | 1:
            return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        case 2:
            return data[:at] + draw.randbytes(1) + data[at + 1 :]
        case 3:
            return data[:at] + data[at + size :]
        case 4:
            return data[:at] + draw.randbytes(size) + data[at:]
        case _:
            return data[:at] if draw.random() < 0.3 else data[:at] + data[at : at + size] + data[at:]


def assert_damage_is_noticed(path: Path, data: bytes, places: list[int], times: int, seed: int) -> int:
    """Returns how many changes are accepted: what keeps its name, type and shape has its values then."""
    draw, accepted = random.Random(seed), 0
    original = dict(weights(content_of(path, data)))
    for _ in range(times):
        damaged = mutated(data, places, draw)
        try:
            found = dict(weights(content_of(path, damaged)))
        except ArtifactError as error:
            assert str(error).count("\n") <= 2
            continue
        accepted += 1
        for name, value in found.items():
            if name in original and original[name][:2] == value[:2]:
                assert value == original[name], name
    return accepted


def structure(data: bytes, payloads: list[bytes]) -> list[int]:
    """The places outside of the raw numbers."""
    inside = set[int]()
    for payload in payloads:
        at = data.find(payload)
        assert at >= 0
        while at >= 0:
            inside |= set(range(at, at + len(payload)))
            at = data.find(payload, at + 1)
    return [at for at in range(len(data)) if at not in inside]


def small_network() -> dict[str, Any]:
    """Its raw numbers are also text, so that they are the same bytes in all protocols."""
    raw = (torch.arange(144) % 90 + 33).to(torch.uint8).view(torch.float32)
    names = ("conv0.weight", "conv1.weight")
    return {
        "state": {name: raw[12 * at :][:12].clone().view(4, 3) for at, name in enumerate(names)},
        "bias": raw[24:].clone(),
        "step": np.float64(3),
    }


def payloads(value: dict[str, Any]) -> list[bytes]:
    return [each.numpy().tobytes() for each in (*value["state"].values(), value["bias"])]


def test_damage_to_a_zip_is_noticed_everywhere(tmp_path: Path) -> None:
    """Its checksums cover numbers and structure; what may change are dates and padding."""
    data = saved(small_network())
    places = list(range(len(data)))
    assert assert_damage_is_noticed(tmp_path / "a", data, places, 1000, seed=1) < 400


@pytest.mark.parametrize("writer", ["old format", "pickle, protocol 2", "pickle, protocol 4"])
def test_damage_to_the_structure_of_a_pickle_is_noticed(writer: str, tmp_path: Path) -> None:
    """These have no checksums: another raw number is another number, and a tensor that is a view of a larger
    storage could become another view of it. Where every tensor has a storage of its own, as in the snapshots
    of EDM, what stays under its name with its type and shape has its values.
    """
    value = small_network()
    data = WRITERS[writer](value)
    places = structure(data, payloads(value))
    assert assert_damage_is_noticed(tmp_path / "a", data, places, 1000, seed=2) < 300


def test_damage_to_the_originals_is_noticed(snapshot: Path, tmp_path: Path) -> None:
    data = snapshot.read_bytes()
    raw = {raw for _, (_, _, raw) in weights(checkpoints.read(snapshot).content)}
    places = structure(data, list(raw))
    assert assert_damage_is_noticed(tmp_path / "a", data, places, 50, seed=3) < 25
    data = RECTIFIED.read_bytes()
    assert assert_damage_is_noticed(tmp_path / "a", data, list(range(len(data))), 30, seed=4) < 15
