"""Files survive what happens to their writer; what is read is what was written, or an error."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from faults import content, watched

from flowdistill import artifact
from flowdistill.artifact import Manifest
from flowdistill.errors import ArtifactError, Diverged, MissingInput, ResourceError, UsageError

REPOSITORY = Path(__file__).parents[1]
FLOATS = ["float8_e5m2", "float8_e4m3fn", "float16", "bfloat16", "float32", "float64"]
SIGNED = ["int8", "int16", "int32", "int64"]
UNSIGNED = ["bool", "uint8", "uint16", "uint32", "uint64"]
DTYPES = FLOATS + SIGNED + UNSIGNED
MASKS = (0x01, 0x10, 0x20, 0x80)  # 0x20 changes the case of a letter, 0x01 the value of a digit


def python(code: str, *arguments: object, **environment: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=settings).stdout


def flipped(data: bytes, at: int, mask: int) -> bytes:
    return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :]


def put(path: Path, data: bytes) -> None:
    """Write quickly: a file that is truncated, not new, is flushed to the disk by some systems."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def some_tensors() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.tensor([1, 2], dtype=torch.int16)}


# Writing


def test_write_returns_the_sha256_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "a"
    before = os.umask(0o027)
    try:
        assert artifact.atomic_write(path, b"content") == hashlib.sha256(b"content").hexdigest()
    finally:
        os.umask(before)
    assert path.read_bytes() == b"content"
    assert path.stat().st_mode & 0o777 == 0o640


def test_order_of_system_calls(tmp_path: Path) -> None:
    with watched() as calls:
        artifact.atomic_write(tmp_path / "a", b"content")
    folder = tmp_path.name
    assert calls.trace == [
        ("open", "*.tmp"),
        ("write", "*.tmp"),
        ("fsync", "*.tmp"),
        ("close", "*.tmp"),
        ("replace", "*.tmp"),
        ("open", folder),
        ("fsync", folder),
        ("close", folder),
    ]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:3]))
    artifact.atomic_write(tmp_path / "a", b"0123456789")
    artifact.append(tmp_path / "b", b"0123456789", at=0)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"0123456789"


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (errno.ENOSPC, ResourceError, "3000 bytes needed, "),
        (errno.EDQUOT, ResourceError, "3000 bytes needed, "),
        (errno.EIO, ResourceError, "Input/output error"),
        (errno.EINTR, ResourceError, "Interrupted"),
        (errno.EACCES, UsageError, "folder is not writable"),
        (errno.EROFS, UsageError, "folder is not writable"),
    ],
)
def test_every_failing_call_leaves_the_old_or_the_new_file(
    tmp_path: Path, code: int, error: type[Exception], says: str
) -> None:
    path, old, new = tmp_path / "a", b"old" * 1000, b"new" * 1000
    for number in range(100):
        path.write_bytes(old)
        with watched(fail_at=number, code=code) as calls:
            try:
                artifact.atomic_write(path, new)
                break
            except error as raised:
                assert str(tmp_path) in str(raised) and says in str(raised)
        replaced = ("replace", "*.tmp") in calls.trace[:-1]
        assert content(tmp_path) == {"a": new if replaced else old}
    assert number == 8  # as many calls as can fail, then success
    assert path.read_bytes() == new


def test_a_folder_that_cannot_be_synced_is_tolerated(tmp_path: Path) -> None:
    with watched(fail_at=6, code=errno.EINVAL) as calls:
        artifact.atomic_write(tmp_path / "a", b"content")
    assert calls.trace[6] == ("fsync", tmp_path.name)


def test_an_interrupt_leaves_no_unfinished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(file: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        artifact.atomic_write(tmp_path / "a", b"content")
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["missing/a", "file/a", "folder", "x" * 300])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    before = content(tmp_path)
    with pytest.raises(UsageError, match=r"no such folder|no file of this name"):
        artifact.atomic_write(tmp_path / name, b"content")
    assert content(tmp_path) == before


def test_odd_paths(tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner" / "папка 文件夹" / ("long " * 40)
    artifact.create_folder(folder)
    path = folder / ("é" * 127)  # 254 bytes, the temporary must not need more
    artifact.save_tensors(path, some_tensors(), {"name": "日本"})
    assert artifact.read_header(path) == {"name": "日本"}


def test_append_survives_every_failing_call(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    for code in (errno.ENOSPC, errno.EIO):
        for number in range(100):
            path.write_bytes(b"first\n")
            with watched(fail_at=number, code=code):
                try:
                    artifact.append(path, b"a second line\n", at=6)
                    break
                except ResourceError as raised:
                    assert str(path) in str(raised)
            assert path.read_bytes()[:6] == b"first\n"
            assert artifact.append(path, b"2nd\n", at=6) == 10
            assert path.read_bytes() == b"first\n2nd\n"
        assert number == 6


def test_appending_to_a_new_file_syncs_its_name(tmp_path: Path) -> None:
    with watched() as calls:
        artifact.append(tmp_path / "journal", b"line\n", at=0)
    assert calls.trace[-2] == ("fsync", tmp_path.name)


def test_folders_are_made_durably(tmp_path: Path) -> None:
    with watched() as calls:
        artifact.create_folder(tmp_path / "a" / "b")
        artifact.create_folder(tmp_path / "a" / "b")
    synced = [name for call, name in calls.trace if call == "fsync"]
    assert synced == [tmp_path.name, "a"]
    (tmp_path / "file").write_bytes(b"")
    for name in ("file", "file/below"):
        with pytest.raises(UsageError):
            artifact.create_folder(tmp_path / name)


def test_sweep_removes_unfinished_files_alone(tmp_path: Path) -> None:
    for name in (".0123.tmp", ".lock", "kept.tmp", "kept"):
        (tmp_path / name).write_bytes(b"")
    artifact.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "kept", "kept.tmp"]
    artifact.sweep(tmp_path / "missing")


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flowdistill import artifact\n"
        "with artifact.lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(UsageError, match=f"in use by process {holder.pid} on "),
            artifact.lock(tmp_path),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    with artifact.lock(tmp_path):
        with (
            pytest.raises(UsageError, match=f"in use by process {os.getpid()} on "),
            artifact.lock(tmp_path),
        ):
            pass
        with artifact.lock(tmp_path / ".."):
            pass  # another folder is free
    with artifact.lock(tmp_path):
        pass


def test_a_lock_that_cannot_be_written(tmp_path: Path) -> None:
    with watched(fail_at=0, code=errno.EROFS), pytest.raises(UsageError, match="not writable"):
        artifact.lock(tmp_path).__enter__()


# Tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    values = torch.tensor([[0, 1, 2], [3, 100, 127]]).to(getattr(torch, dtype))
    tensors = {
        "plain": values,
        "transposed": values.t(),
        "scalar": values[0, 1],
        "empty": values[:, :0],
    }
    path = tmp_path / "a.safetensors"
    assert artifact.save_tensors(path, tensors, {"k": [1, None]}) == artifact.sha256(path)
    loaded, header = artifact.load_tensors(path)
    assert header == {"k": [1, None]} == artifact.read_header(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype and loaded[name].shape == value.shape
        assert loaded[name].tolist() == value.tolist()


def test_the_library_reads_our_files_and_finds_one_key(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    weight = torch.nn.Linear(3, 2).weight  # requires grad
    artifact.save_tensors(path, {"weight": weight}, {"b": 2, "a": 1})
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["flowdistill"]
        assert list(json.loads(file.metadata()["flowdistill"])) == ["a", "b", "seal"]
        assert torch.equal(file.get_tensor("weight"), weight)


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    path = tmp_path / "a"
    dtypes = {f"{i:02d}": torch.ones(3, dtype=getattr(torch, d)) for i, d in enumerate(DTYPES)}
    artifact.save_tensors(path, dtypes, {})
    for name, entry in artifact.layout(path).tensors.items():
        assert entry.start % dtypes[name].element_size() == 0


def test_equal_content_makes_equal_bytes_in_every_process(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    names = [f"layer.{i}.weight" for i in range(50)]
    artifact.save_tensors(path, {name: torch.ones(2) for name in names}, {"x": 1, "y": {"b": 1, "a": 2}})
    code = (
        "import sys, torch; from pathlib import Path; from flowdistill import artifact\n"
        "names = [f'layer.{i}.weight' for i in range(50)]; names = list(set(names))\n"
        "header = {'y': {'a': 2, 'b': 1}, 'x': 1}\n"
        "artifact.save_tensors(Path(sys.argv[1]), {n: torch.ones(2) for n in names}, header)"
    )
    python(code, other, PYTHONHASHSEED="7")
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(tmp_path: Path, dtype: str, value: float) -> None:
    if dtype == "float8_e4m3fn":
        value = float("nan")  # this type has no infinities
    path = tmp_path / "a"
    path.write_bytes(b"old")
    weight = torch.zeros(4).index_fill(0, torch.tensor([2]), value).to(getattr(torch, dtype))
    with pytest.raises(Diverged, match="1 of 4 values of 'weight' are not finite"):
        artifact.save_tensors(path, {"fine": torch.zeros(2), "weight": weight}, {})
    assert content(tmp_path) == {"a": b"old"}


def test_names_that_are_taken_are_refused(tmp_path: Path) -> None:
    for tensors, header in (({}, {"seal": 1}), ({"__metadata__": torch.zeros(1)}, {})):
        with pytest.raises(ValueError, match="taken"):
            artifact.save_tensors(tmp_path / "a", tensors, header)


def test_every_flipped_byte_is_found_in_the_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifact.save_tensors(path, some_tensors(), {"architecture": "unet", "note": 'a "quote" \\ é'})
    data = path.read_bytes()
    for at in range(len(data)):
        for mask in MASKS:
            put(path, flipped(data, at, mask))
            try:
                header = artifact.load_tensors(path)[1]
            except ArtifactError as error:
                assert str(path) in str(error)
            else:  # the name of the metadata key was hit: a foreign file without a description
                assert header == {}


def test_every_truncation_and_extension_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifact.save_tensors(path, some_tensors(), {"a": 1})
    data = path.read_bytes()
    for changed in [*(data[:end] for end in range(len(data))), data + b"\0"]:
        put(path, changed)
        with pytest.raises(ArtifactError, match=r"cut short|bytes long"):
            artifact.read_header(path)
        with pytest.raises(ArtifactError):
            artifact.load_tensors(path)


def test_files_of_other_makers_load_without_a_description(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file(some_tensors(), path, metadata)
        loaded, header = artifact.load_tensors(path)
        assert header == {}
        assert torch.equal(loaded["weight"], some_tensors()["weight"])


def test_we_accept_no_file_that_the_library_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a"
    safetensors.torch.save_file(some_tensors(), path, {"format": "pt"})
    data = path.read_bytes()
    for at in range(len(data) - 28):  # the payload cannot be wrong
        for mask in MASKS:
            put(path, flipped(data, at, mask))
            try:
                found = artifact.layout(path)
                loaded, _ = artifact.load_tensors(path)
            except ArtifactError:
                continue
            shapes = {name: tuple(value.shape) for name, value in loaded.items()}
            assert shapes == {name: entry.shape for name, entry in found.tensors.items()}


def entry(start: Any = 0, stop: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


BAD_DESCRIPTIONS = {
    "gap": {"a": entry(8, 16)},
    "overlap": {"a": entry(), "b": entry(4, 12)},
    "too short": {"a": entry(0, 4, (1,))},
    "shape and place differ": {"a": entry(shape=(3,))},
    "negative size": {"a": entry(shape=(-2,))},
    "two negative sizes": {"a": entry(shape=(-1, -2))},
    "truth as a size": {"a": entry(shape=(True, 2))},
    "text as a size": {"a": entry(shape=("2",))},
    "negative place": {"a": entry(-8, 0)},
    "unknown dtype": {"a": entry(dtype="F33")},
    "dtype is a list": {"a": entry(dtype=["F32"])},
    "three offsets": {"a": {**entry(), "data_offsets": [0, 4, 8]}},
    "missing key": {"a": {"dtype": "F32", "shape": [2]}},
    "not an object": {"a": [1]},
    "metadata is a list": {"__metadata__": [], "a": entry()},
    "metadata is no text": {"__metadata__": {"flowdistill": {}}, "a": entry()},
    "metadata is no JSON": {"__metadata__": {"flowdistill": "{"}, "a": entry()},
    "metadata is no object": {"__metadata__": {"flowdistill": "[]"}, "a": entry()},
    "no seal": {"__metadata__": {"flowdistill": "{}"}, "a": entry()},
    "seal is no digest": {"__metadata__": {"flowdistill": '{"seal": "\\ud800"}'}, "a": entry()},
}
BAD_TEXTS = {
    "list": b"[]",
    "no JSON": b"{a}",
    "not UTF-8": b'{"\xff": 1}',
    "duplicate": b'{"a":%b,"a":%b}' % ((b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2),
    "deep": b'{"a":' * 50_000,
    "long number": b'{"a":' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("what", [*BAD_DESCRIPTIONS, *BAD_TEXTS])
def test_descriptions_that_cannot_be_are_errors(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a"
    text = BAD_TEXTS.get(what) or json.dumps(BAD_DESCRIPTIONS[what]).encode()
    payload = {"gap": 16, "overlap": 12, "too short": 8, "negative place": 0}.get(what, 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(payload))
    for read in (artifact.read_header, artifact.load_tensors):
        with pytest.raises(ArtifactError, match=str(path)):
            read(path)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_absurd_header_lengths_are_errors(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(8))
    with pytest.raises(ArtifactError, match="not a safetensors file, or cut short"):
        artifact.read_header(path)


def test_a_header_is_read_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "a"
    artifact.save_tensors(path, some_tensors(), {"kind": "velocity"})
    code = (
        "import sys; from pathlib import Path; from flowdistill import artifact\n"
        "print(artifact.read_header(Path(sys.argv[1])))\n"
        "print(sorted({'torch', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    assert python(code, path).splitlines() == ["{'kind': 'velocity'}", "[]"]


@pytest.mark.parametrize("read", [artifact.sha256, artifact.load_json, artifact.read_header])
def test_what_cannot_be_read(tmp_path: Path, read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("missing", "file/below"):
        with pytest.raises(MissingInput, match="no such file"):
            read(tmp_path / name)
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)
    for code, error in ((errno.EACCES, UsageError), (errno.EIO, ResourceError)):
        with monkeypatch.context() as patch:

            def refuse(self: Path, mode: str, code: int = code) -> None:
                raise OSError(code, os.strerror(code))

            patch.setattr(Path, "open", refuse)
            with pytest.raises(error, match="file"):
                read(tmp_path / "file")


# JSON and manifests


def test_digest_is_of_the_content_alone() -> None:
    known = hashlib.sha256(b'{"a":[1,2.5],"b":null}').hexdigest()
    assert artifact.digest({"b": None, "a": (1, 2.5)}) == known
    assert artifact.digest({"a": 1}) != artifact.digest({"a": "1"})
    with pytest.raises(ValueError, match="JSON"):
        artifact.digest(float("nan"))


def test_every_changed_byte_of_a_document_is_found(tmp_path: Path) -> None:
    path, data = tmp_path / "a.json", {"count": 10, "name": "é", "rate": 0.1, "list": [True, None]}
    assert artifact.save_json(path, data) == artifact.sha256(path)
    assert artifact.load_json(path) == data
    whole = path.read_bytes()
    changes = [flipped(whole, at, mask) for at in range(len(whole)) for mask in MASKS]
    changes += [whole[:end] for end in range(len(whole))]
    changes += [whole + b"\n", b"NaN", b'{"a": NaN}', b'{"a": 1e999}', b'{"a":' * 10**5, b"\xff"]
    for changed in changes:
        put(path, changed)
        with pytest.raises(ArtifactError, match="a.json"):
            artifact.load_json(path)


def a_manifest(folder: Path, **changes: Any) -> Manifest:
    started = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    fields: dict[str, Any] = {
        "stage": "reflow-1",
        "verb": "reflow",
        "settings": {"steps": 500, "loss": {"name": "pseudo-huber", "c": None}},
        "inputs": {"pairs": "ab" * 32},
        "outputs": {"model.safetensors": artifact.sha256(folder / "model.safetensors")},
        "seed": 7,
        "versions": {"torch": "2.13.0"},
        "device": "cpu",
        "dtype": "float32",
        "started": started,
        "finished": started + timedelta(seconds=90),
        "figures": {"loss": 0.123456789012345678},
    }
    return Manifest(**(fields | changes))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def test_a_manifest_comes_back(stage: Path) -> None:
    manifest = a_manifest(stage)
    manifest.write(stage)
    assert Manifest.read(stage) == manifest
    assert manifest.verify(stage) == []
    text = json.loads((stage / artifact.MANIFEST).read_text())
    assert (text["format"], text["started"]) == (1, "2026-01-02T03:04:05.678901Z")


def test_the_digest_is_of_the_outputs(stage: Path) -> None:
    digest = a_manifest(stage).digest
    assert a_manifest(stage, seed=8, finished=datetime.now(UTC)).digest == digest
    assert a_manifest(stage, outputs={"model.safetensors": "0" * 64}).digest != digest


def test_a_folder_without_a_manifest_is_not_done(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(MissingInput, match=r"manifest.json is missing"):
            Manifest.read(folder)


def test_manifests_that_were_altered_or_are_of_another_version(stage: Path) -> None:
    a_manifest(stage).write(stage)
    path = stage / artifact.MANIFEST
    data = path.read_bytes()
    for at in range(len(data)):
        put(path, flipped(data, at, 1 << at % 8))
        with pytest.raises(ArtifactError, match="manifest.json"):
            Manifest.read(stage)
    known = artifact.MANIFEST
    for changes, says in (
        ({"format": 2}, "artifact format 2, expected 1\nuse the flowdistill"),
        ({"seed": "x"}, "seed: "),
        ({"colour": "red"}, "colour: "),
    ):
        artifact.save_json(stage / known, a_manifest(stage).model_dump(mode="json") | changes)
        with pytest.raises(ArtifactError, match=says):
            Manifest.read(stage)


def test_verify_names_what_is_wrong_and_nothing_else(stage: Path) -> None:
    (stage / "log.jsonl").write_bytes(b"")  # no output: no concern
    manifest = a_manifest(stage)
    (stage / "model.safetensors").write_bytes(b"Weights")
    (line,) = manifest.verify(stage)
    assert "model.safetensors: SHA-256 is " in line
    (stage / "model.safetensors").unlink()
    (line,) = manifest.verify(stage)
    assert line.endswith("model.safetensors: no such file")
    lines = a_manifest_of_outputs("../../etc/passwd", "/etc/passwd").verify(stage)
    assert len(lines) == 2 and all("not a plain relative file name" in line for line in lines)


def a_manifest_of_outputs(*names: str) -> Manifest:
    time = datetime.now(UTC)
    fields = dict.fromkeys(("stage", "verb", "device", "dtype"), "x")
    outputs = dict.fromkeys(names, "0" * 64)
    return Manifest(
        **fields, settings={}, inputs={}, outputs=outputs, seed=0, versions={}, started=time, finished=time
    )


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/", "/etc/passwd", "a/../b", "../a", "a//b", "a/", "./a", ".lock", "a/.x.tmp"]
    + ["a\0b", "a\nb", "a\\b", "\udc80", "x" * 256, "out", "out/a", "loop"],
)
def test_names_that_could_lie_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to(tmp_path)
    (root / "loop").symlink_to("/")
    with pytest.raises(UsageError):
        artifact.safe_child(root, name)


@pytest.mark.parametrize("name", ["a", "shards/00000.safetensors", "mit Leerzeichen/é文.json", "in/b"])
def test_names_below_the_root_are_fine(tmp_path: Path, name: str) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "in").symlink_to("real")
    (tmp_path / "link").symlink_to(".")
    assert artifact.safe_child(tmp_path, name) == tmp_path / name
    assert artifact.safe_child(tmp_path / "link", name) == tmp_path / "link" / name
