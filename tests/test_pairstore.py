"""A store holds exactly what was put in, survives its writer, and notices every change."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import content, watched
from torch import Tensor

from flowdistill import artifact, durable, randomness
from flowdistill.errors import (
    ArtifactError,
    Diverged,
    FlowdistillError,
    MissingInput,
    ResourceError,
    UsageError,
)
from flowdistill.pairstore import Block, PairSpec, PairStore, PairWriter, mend, shard_path
from flowdistill.pairstore import writer as writer_module

REPOSITORY = Path(__file__).parents[1]


def a_spec(**changes: Any) -> PairSpec:
    fields: dict[str, Any] = {
        "count": 10,
        "shape": (3, 2, 2),
        "classes": 5,
        "shard_size": 4,
        "dtype": "float32",
        "seed": 7,
        "origin": {"teacher": "ab" * 32, "solver": "heun", "steps": 18},
    }
    return PairSpec(**(fields | changes))


def pairs(spec: PairSpec, indices: range) -> Block:
    """What a teacher might make: each pair a function of its index, within [-1, 1]."""
    x0 = randomness.noise(spec.seed + 1, indices, spec.shape).tanh()
    labels = torch.tensor([-index % spec.classes for index in indices]) if spec.classes else None
    eps, record = spec.draw(indices)
    if spec.noise == "stored":
        eps = randomness.noise(spec.seed + 2, indices, spec.shape)
    error = x0.flatten(1)[:, 0].abs() if spec.error else None
    nfe = torch.tensor([7 + index % 3 for index in indices]) if spec.evaluations else None
    return Block(eps, x0, labels, error, nfe, record)


def fill(folder: Path, spec: PairSpec, shards: list[int] | None = None) -> Path:
    """Make what is missing, in the given order."""
    with PairWriter(folder, spec) as writer:
        for shard in writer.missing() if shards is None else shards:
            writer.commit(shard, pairs(spec, spec.indices(shard)))
    return folder


def put(path: Path, data: bytes) -> None:
    """Replace a file; one that is truncated, not new, is flushed to the disk by some systems."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


# What comes back


def uint8(x: Tensor) -> Tensor:
    levels = torch.arange(256.0) / 127.5 - 1
    nearest = (x.reshape(-1, 1) - levels).abs().argmin(1)
    return levels[nearest].reshape(x.shape)


STORED: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda x: x,
    "float16": lambda x: x.half().float(),
    "bfloat16": lambda x: x.bfloat16().float(),
    "uint8": uint8,
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("classes", [0, 5, 40_000])
@pytest.mark.parametrize("noise", ["seeded", "pcg64", "stored"])
def test_pairs_come_back(tmp_path: Path, dtype: str, classes: int, noise: str) -> None:
    more = noise == "pcg64"
    spec = a_spec(dtype=dtype, classes=classes, noise=noise, error=more, evaluations=more)
    store = PairStore.open(fill(tmp_path, spec))
    assert len(store) == 10 and store.spec == spec and store.verify() == []
    order = [9, 0, 3, 3, 4, 8, 1]  # all shards, a repetition, no order
    eps, x0, labels = store.batch(order)
    made = pairs(spec, range(10))
    assert torch.equal(x0, STORED[dtype](made.x0)[order])
    assert torch.equal(eps, made.eps[order])
    if noise == "seeded":
        assert torch.equal(eps, randomness.noise(7, order, spec.shape))
    if made.labels is None:
        assert labels is None
    else:
        assert labels is not None and labels.dtype == torch.int64
        assert torch.equal(labels, made.labels[order])
    assert eps.dtype == x0.dtype == torch.float32
    distance = (eps - x0).double().square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(store.column("distance", order).double(), distance, atol=1e-6, rtol=1e-6)
    assert torch.equal(store.column("distance")[order], store.column("distance", order))
    if more:
        assert made.error is not None and torch.equal(store.column("error"), made.error)
        assert made.nfe is not None and torch.equal(
            store.column("nfe", range(9, -1, -1)).long(), made.nfe.flip(0)
        )
    else:
        with pytest.raises(KeyError, match="nfe"):
            store.column("nfe")


def test_uint8_keeps_all_its_levels_and_clips(tmp_path: Path) -> None:
    spec = a_spec(count=258, shape=(1,), classes=0, shard_size=258, dtype="uint8")
    levels = torch.arange(256.0) / 127.5 - 1
    given = torch.cat([levels, torch.tensor([-3.0, 3.0])])[:, None]
    with PairWriter(tmp_path, spec) as writer:
        writer.commit(0, Block(spec.draw(range(258))[0], given))
    _, x0, _ = PairStore.open(tmp_path).batch(range(258))
    assert torch.equal(x0[:256, 0], levels)
    assert x0[256:, 0].tolist() == [-1.0, 1.0]


def test_batches_take_any_kind_of_index(tmp_path: Path) -> None:
    store = PairStore.open(str(fill(tmp_path, a_spec())))
    expected = store.batch([2, 9])
    for indices in (torch.tensor([2, 9]), torch.tensor([2, 9], dtype=torch.int32), range(2, 10, 7)):
        for found, known in zip(store.batch(indices), expected, strict=True):
            assert found is not None and known is not None and torch.equal(found, known)
    eps, x0, labels = store.batch([])
    assert eps.shape == x0.shape == (0, 3, 2, 2) and labels is not None and labels.shape == (0,)
    for indices in ([-1], [10], [0, 10]):
        with pytest.raises(IndexError):
            store.batch(indices)


def test_what_is_returned_can_be_changed_without_harm(tmp_path: Path) -> None:
    store = PairStore.open(fill(tmp_path, a_spec(noise="stored")))
    kept = []
    for tensor in store.batch([1]):
        assert tensor is not None
        kept.append(tensor.clone())
        tensor.zero_()
    for found, known in zip(store.batch([1]), kept, strict=True):
        assert found is not None and torch.equal(found, known)


@pytest.mark.parametrize("dtype", STORED)
def test_the_bytes_do_not_depend_on_the_order_of_commits(tmp_path: Path, dtype: str) -> None:
    spec = a_spec(dtype=dtype)
    reference = content(fill(tmp_path / "reference", spec))
    assert sorted(reference) == sorted(PairWriter(tmp_path / "reference", spec).files())
    for order in itertools.permutations(range(3)):
        folder = tmp_path / "".join(map(str, order))
        fill(folder, spec, list(order[:2]))
        assert content(fill(folder, spec)) == reference
    for order in itertools.permutations(range(3)):
        assert content(fill(tmp_path / f"at once {order}", spec, list(order))) == reference


def test_odd_paths(tmp_path: Path) -> None:
    folder = tmp_path / "ein Ordner" / "пары 对" / ("x" * 250)
    assert len(PairStore.open(fill(folder, a_spec()))) == 10


def test_a_pair_of_bytes_costs_its_payload_and_one_percent(tmp_path: Path) -> None:
    spec = a_spec(count=2048, shape=(3, 32, 32), shard_size=1024, dtype="uint8", classes=10)
    with PairWriter(tmp_path, spec) as writer:
        for shard in writer.missing():
            zeros = torch.zeros(1024, 3, 32, 32)
            writer.commit(shard, Block(zeros, zeros, torch.zeros(1024, dtype=torch.int64)))
    written = sum(map(len, content(tmp_path).values()))
    assert written <= 2048 * 3072 * 1.01
    assert abs(spec.size_bytes / written - 1) < 0.001  # what `plan` says


def test_a_million_pairs_open_by_reading_two_files(tmp_path: Path) -> None:
    spec = a_spec(count=1_000_000, shape=(1,), shard_size=65_536, dtype="uint8", classes=0)
    with PairWriter(tmp_path, spec) as writer:
        for shard in writer.missing():
            x0 = torch.full((len(spec.indices(shard)), 1), shard / 16)
            writer.commit(shard, Block(x0, x0))
    opened: list[str] = []
    watch_opens(tmp_path, opened)
    store = PairStore.open(tmp_path)
    assert opened == ["store.json", "journal.jsonl"]
    opened.clear()
    order = torch.randint(1_000_000, (4096,), generator=torch.Generator().manual_seed(0))
    _, x0, _ = store.batch(order)
    assert (x0[:, 0] - order // 65_536 / 16).abs().max() <= 1 / 255 + 1e-6
    touched = len(opened)
    store.batch(order)
    assert len(opened) == touched <= 3 * spec.shards  # SHA-256, header, mapping; then nothing


def watch_opens(folder: Path, opened: list[str]) -> None:
    """Note each file of the folder that this process opens, however it does so."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(f"{folder}{os.sep}"):
            opened.append(Path(arguments[0]).name)

    sys.addaudithook(hook)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mappings through /proc")
def test_mappings_take_a_part_of_the_files_that_may_be_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    store = PairStore.open(fill(tmp_path, a_spec(count=100, shape=(1,), shard_size=1)))
    for _ in range(2):
        _, x0, _ = store.batch(range(100))
        assert torch.equal(x0, pairs(store.spec, range(100)).x0)
    assert 0 < Path("/proc/self/maps").read_text().count(f"{tmp_path}/shards/") <= 16


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 12}, "(count 10 -> 12)"),
        ({"shape": (3, 4)}, "(shape [3, 2, 2] -> [3, 4])"),
        ({"classes": 6}, "(classes 5 -> 6)"),
        ({"shard_size": 5}, "(shard_size 4 -> 5)"),
        ({"dtype": "uint8"}, "(dtype 'float32' -> 'uint8')"),
        ({"seed": 8, "noise": "stored"}, "(noise 'seeded' -> 'stored', seed 7 -> 8)"),
        (
            {"origin": {"teacher": "ab" * 32, "solver": "euler", "steps": 18, "cfg": 2.0}},
            "(origin.cfg None -> 2.0, origin.solver 'heun' -> 'euler')",
        ),
    ],
)
def test_a_store_of_another_spec_is_left_alone(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    fill(tmp_path, a_spec(), [1])
    before = content(tmp_path)
    with pytest.raises(UsageError) as raised:
        PairWriter(tmp_path, a_spec(**changes))
    assert says in str(raised.value) and str(tmp_path) in str(raised.value)
    assert content(tmp_path) == before
    PairWriter(tmp_path, a_spec()).close()  # and it is not locked


@pytest.mark.parametrize("name", ["journal.jsonl", "shards/something.bin", "notes.txt"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(UsageError, match="holds something else"):
        PairWriter(tmp_path, a_spec())
    assert content(tmp_path) == {name: b"precious"}


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(UsageError, match="is a file"):
        PairWriter(tmp_path / "file", a_spec())


def test_other_documents_are_not_stores(tmp_path: Path) -> None:
    for document in ({"kind": "model"}, {"kind": "pairs", "format": 2}):
        artifact.save_json(tmp_path / "store.json", document)
        with pytest.raises(ArtifactError, match="expected pairs of format 1"):
            PairStore.open(tmp_path)
    artifact.save_json(tmp_path / "store.json", {"kind": "pairs", "format": 1, "spec": {"count": 0}})
    with pytest.raises(ArtifactError, match=r"store\.json: count: "):
        PairStore.open(tmp_path)


def test_a_folder_that_somebody_has_alone_is_left_alone(tmp_path: Path) -> None:
    fill(tmp_path, a_spec(), [0])
    with (
        artifact.lock(tmp_path),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(UsageError, match=f"in use by process {os.getpid()}"),
    ):
        patch.setattr(durable, "_SWEEP_S", 0.0)
        PairWriter(tmp_path, a_spec())
    with (
        PairWriter(tmp_path, a_spec()),
        pytest.raises(UsageError, match="in use by process"),
        artifact.lock(tmp_path),
    ):
        pass
    fill(tmp_path, a_spec())


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"x0": torch.full((4, 3, 2, 2), float("nan"))}, Diverged, "shard 0: x0"),
        ({"x0": torch.full((4, 3, 2, 2), float("inf"))}, Diverged, "shard 0: x0"),
        ({"labels": torch.tensor([0, 1, 2, 5])}, UsageError, "labels 0..5, expected 0..4"),
        ({"labels": torch.tensor([0, -1, 2, 3])}, UsageError, "labels -1..3, expected 0..4"),
        ({"labels": None}, ValueError, "expected"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected"),
        ({"x0": torch.zeros(3, 3, 2, 2)}, ValueError, "expected"),
        ({"eps": torch.zeros(3, 3, 2, 2)}, ValueError, "expected"),
        ({"error": torch.zeros(4)}, ValueError, "expected"),
        ({"shard": 1}, ValueError, "committed already"),
        ({"shard": 3}, IndexError, "shard 3 of 3"),
        ({"shard": -1}, IndexError, "shard -1 of 3"),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_pairs_that_do_not_fit_are_refused(
    tmp_path: Path, given: dict[str, Any], error: type[Exception], says: str, dtype: str
) -> None:
    spec = a_spec(dtype=dtype)
    fill(tmp_path, spec, [1])
    before = content(tmp_path)
    shard = given.get("shard", 0)
    changed = replace(pairs(spec, range(4)), **{k: v for k, v in given.items() if k != "shard"})
    with PairWriter(tmp_path, spec) as writer, pytest.raises(error, match=says):
        writer.commit(shard, changed)
    assert content(tmp_path) == before


def test_what_overflows_its_type_is_refused(tmp_path: Path) -> None:
    spec = a_spec(dtype="float16", classes=0)
    large = torch.full((4, 3, 2, 2), 1e5)
    with PairWriter(tmp_path, spec) as writer, pytest.raises(Diverged, match="x0 is too large for float16"):
        writer.commit(0, Block(large, large))
    assert not shard_path(tmp_path, 0).exists()


def test_unfinished_and_missing_stores_do_not_open(tmp_path: Path) -> None:
    fill(tmp_path, a_spec(), [2, 0])
    with pytest.raises(ArtifactError, match="incomplete, 2 of 3 shards"):
        PairStore.open(tmp_path)
    for folder in (tmp_path / "missing", tmp_path / "shards"):
        with pytest.raises(MissingInput, match="no such file"):
            PairStore.open(folder)


# What is damaged


def test_every_flipped_byte_of_store_and_journal_is_found(tmp_path: Path) -> None:
    fill(tmp_path, a_spec())
    for name in ("store.json", "journal.jsonl"):
        path = tmp_path / name
        data = path.read_bytes()
        for at in range(len(data)):
            for mask in (0x01, 0x10, 0x20, 0x80):
                put(path, data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
                with pytest.raises(ArtifactError, match=str(tmp_path)):
                    PairStore.open(tmp_path)
        put(path, data)
    assert len(PairStore.open(tmp_path)) == 10


def test_flipped_bytes_of_a_shard_are_found(tmp_path: Path) -> None:
    fill(tmp_path, a_spec())
    path = shard_path(tmp_path, 1)
    data = path.read_bytes()
    for at in range(0, len(data), 3):
        put(path, data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        store = PairStore.open(tmp_path)
        store.batch([0, 9])  # the other shards are fine
        with pytest.raises(ArtifactError, match=r"00001\.safetensors: its SHA-256"):
            store.batch([0, 5])
        (line,) = store.verify()
        assert "00001.safetensors: SHA-256 is " in line


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    fill(tmp_path, a_spec(), [0, 1])
    path = tmp_path / "journal.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (
        [lines[0], lines[1].upper()],
        [lines[0], b"\n"],
        [lines[0], lines[1][:-20] + b"\n", lines[0]],
        [lines[0], journal_line({"shard": 0})],
        [lines[0], journal_line({"shard": 7, "first": 28, "count": 4, "size_bytes": 1, "sha256": ""})],
        [lines[0], journal_line({"shard": 1, "first": 0, "count": 4, "size_bytes": 1, "sha256": ""})],
        [lines[0], journal_line(["shard"])],
    ):
        put(path, b"".join(damaged))
        with pytest.raises(ArtifactError, match="line 2 is damaged"):
            PairStore.open(tmp_path)
        with pytest.raises(ArtifactError, match="line 2 is damaged"):
            PairWriter(tmp_path, a_spec())
    put(path, lines[0])
    with PairWriter(tmp_path, a_spec()) as writer:
        assert writer.missing() == [1, 2]


def journal_line(document: Any) -> bytes:
    """A line whose CRC is right, whatever it says."""
    text = json.dumps(document).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def test_a_journal_may_end_anywhere(tmp_path: Path) -> None:
    spec = a_spec()
    whole = content(fill(tmp_path, spec))
    journal = tmp_path / "journal.jsonl"
    for end in range(0, len(whole["journal.jsonl"]), 13):
        put(journal, whole["journal.jsonl"][:end])
        with pytest.raises(ArtifactError, match="incomplete"):
            PairStore.open(tmp_path)
        with PairWriter(tmp_path, spec) as writer:
            missing = writer.missing()
        assert missing == list(range(whole["journal.jsonl"][:end].count(b"\n"), 3))
        fill(tmp_path, spec, missing[:1])  # its line takes the place of the torn one
        with PairWriter(tmp_path, spec) as writer:
            assert writer.missing() == missing[1:]
        assert content(fill(tmp_path, spec)) == whole
    put(journal, whole["journal.jsonl"] + b"0123")  # a torn line behind the last one
    assert len(PairStore.open(tmp_path)) == 10
    assert content(fill(tmp_path, spec)) == whole


def test_shards_that_are_cut_or_gone_are_made_again(tmp_path: Path) -> None:
    spec = a_spec()
    whole = content(fill(tmp_path, spec))
    path = shard_path(tmp_path, 1)
    for end in (None, 0, 1, 200, path.stat().st_size - 1):
        path.unlink()
        if end is not None:
            path.write_bytes(whole["shards/00001.safetensors"][:end])
        store = PairStore.open(tmp_path)
        assert len(store.verify()) == 1 and "00001.safetensors" in store.verify()[0]
        with pytest.raises((ArtifactError, MissingInput), match=r"00001\.safetensors"):
            store.batch([4])
        with PairWriter(tmp_path, spec) as writer:
            assert writer.missing() == [1]
        assert content(fill(tmp_path, spec)) == whole


def test_a_shard_that_shrinks_after_its_check_is_an_error(tmp_path: Path) -> None:
    store = PairStore.open(fill(tmp_path, a_spec(count=20, shard_size=1)))
    store._mapped_at_most = 16
    store.batch(range(20))  # the first ones are no longer mapped
    put(shard_path(tmp_path, 0), b"short")
    with pytest.raises(ArtifactError, match=r"00000\.safetensors: its size changed"):
        store.batch([0])


# What happens to the writer


def test_a_commit_is_synced_before_it_counts(tmp_path: Path) -> None:
    spec = a_spec()
    fill(tmp_path, spec, [0])
    with PairWriter(tmp_path, spec) as writer, watched() as calls:
        writer.commit(1, pairs(spec, spec.indices(1)))
    order = [call for call in calls.trace if call[0] in ("fsync", "replace", "write")]
    assert [call for call, _ in itertools.groupby(order)] == [
        ("write", "*.tmp"),
        ("fsync", "*.tmp"),
        ("replace", "*.tmp"),
        ("fsync", "shards"),
        ("write", "journal.jsonl"),
        ("fsync", "journal.jsonl"),
    ]


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, ResourceError), (errno.EIO, ResourceError)],
)
def test_a_store_survives_every_failing_call(
    tmp_path: Path, code: int, error: type[FlowdistillError]
) -> None:
    spec = a_spec(count=6, shard_size=2)
    whole = content(fill(tmp_path / "whole", spec))
    for number in range(500):
        folder = tmp_path / str(number)
        committed: list[int] = []
        with watched(number, code, more=("unlink", "rmdir")) as calls:
            try:
                fill_backwards(folder, spec, committed)
            except error as raised:
                assert str(tmp_path) in str(raised)
        with PairWriter(folder, spec) as writer:  # the disk is fine again
            assert not set(committed) & set(writer.missing())
        assert content(fill(folder, spec)) == whole
        if len(calls.trace) <= number:
            break
    assert number > 60  # so many calls can fail


def fill_backwards(folder: Path, spec: PairSpec, committed: list[int]) -> None:
    """All shards, last first so that the journal has to be put in order; notes what counts."""
    with PairWriter(folder, spec) as writer:
        for shard in reversed(writer.missing()):
            writer.commit(shard, pairs(spec, spec.indices(shard)))
            committed.append(shard)


def test_the_same_writer_goes_on_after_a_full_disk(tmp_path: Path) -> None:
    spec = a_spec()
    whole = content(fill(tmp_path / "whole", spec))
    for number in range(16):  # up to the first call of the second commit that changes nothing
        folder = tmp_path / str(number)
        with PairWriter(folder, spec) as writer:
            writer.commit(0, pairs(spec, spec.indices(0)))
            with watched(fail_at=number, code=errno.ENOSPC), pytest.raises(ResourceError):
                writer.commit(1, pairs(spec, spec.indices(1)))
                raise ResourceError("all calls were fine")
            for shard in writer.missing():
                writer.commit(shard, pairs(spec, spec.indices(shard)))
        assert content(folder) == whole


def test_what_a_killed_writer_left_unfinished_is_removed(tmp_path: Path) -> None:
    whole = content(fill(tmp_path, a_spec()))
    for folder in (tmp_path, tmp_path / "shards"):
        (folder / ".0123456789abcdef.tmp").write_bytes(b"half")
    PairWriter(tmp_path, a_spec()).close()
    assert content(tmp_path) == whole


@pytest.mark.parametrize("writers", [1, 2, 4])
def test_killed_writers_lose_nothing_that_was_acknowledged(tmp_path: Path, writers: int) -> None:
    code = (
        f"import sys, test_pairstore; test_pairstore.kill_writers(sys.argv[1], {writers}, {KILLS[writers]})"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, env=settings).stdout)
    assert found.pop("kills") >= KILLS[writers]
    assert found.pop("unfinished_files") > 0  # some were hit in the middle of a write
    assert found == {"lost": 0, "different": 0}


KILLS = {1: 100, 2: 60, 4: 60}
"""Together more than 200."""


def kill_writers(folder: str, writers: int, kills: int) -> None:
    """Kill -9 forked writers at random moments; prints what came of it. Runs in its own process."""
    torch.set_num_threads(1)
    writer_module._POLL_S = 0.002
    spec = a_spec(count=12, shape=(3, 64, 64), shard_size=1)
    started = time.monotonic()
    Writer(Path(folder, "reference"), spec).wait()
    longest = time.monotonic() - started
    reference = content(Path(folder, "reference"))
    draw = random.Random(writers)
    counts = {"kills": 0, "unfinished_files": 0, "lost": 0, "different": 0}
    for trial in itertools.count():
        store, done, acknowledged = Path(folder, str(trial)), False, set[int]()
        while not done:
            crew = [Writer(store, spec) for _ in range(writers)]
            for each in draw.sample(crew, draw.randint(1, writers)):  # some see the end
                time.sleep(draw.uniform(0, longest / 2 / writers))
                os.kill(each.process, signal.SIGKILL)
            ends = [each.wait() for each in crew]
            acknowledged.update(shard for shards, _ in ends for shard in shards)
            done = any(finished for _, finished in ends)
            counts["kills"] += sum(not finished for _, finished in ends)
            counts["unfinished_files"] += sum(name.endswith(".tmp") for name in content(store))
            with PairWriter(store, spec) as writer:
                counts["lost"] += len(acknowledged & set(writer.missing()))
        counts["different"] += content(store) != reference
        if counts["kills"] >= kills:
            break
    print(json.dumps(counts))


class Writer:
    """A forked process that makes a store and says which shards it has committed."""

    def __init__(self, folder: Path, spec: PairSpec) -> None:
        self._reading, writing = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            with PairWriter(folder, spec) as writer:
                for shard in writer.claims():
                    writer.commit(shard, pairs(spec, spec.indices(shard)))
                    os.write(writing, bytes([shard]))
            os._exit(0)
        os.close(writing)

    def wait(self) -> tuple[list[int], bool]:
        """The shards that it acknowledged, and whether it saw the store finished."""
        status = os.waitpid(self.process, 0)[1]
        with os.fdopen(self._reading, "rb") as pipe:
            return list(pipe.read()), status == 0


# What several writers make of one folder


def test_writers_share_the_shards_and_make_the_same_bytes(tmp_path: Path) -> None:
    spec = a_spec(count=40)
    whole = content(fill(tmp_path / "whole", spec))
    with PairWriter(tmp_path / "shared", spec) as one, PairWriter(tmp_path / "shared", spec) as two:
        takers = [(one, one.claims()), (two, two.claims())]
        made: list[list[int]] = [[], []]
        for turn in range(10):
            writer, claims = takers[turn % 2]
            shard = next(claims)
            writer.commit(shard, pairs(spec, spec.indices(shard)))
            made[turn % 2].append(shard)
        assert [next(claims, None) for _, claims in takers] == [None, None]
        assert one.files() == two.files() and one.committed_pairs == 40
    assert made == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    assert content(tmp_path / "shared") == whole


def test_what_a_dead_process_had_claimed_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "_POLL_S", 0.01)
    code = (
        "import sys, time; from pathlib import Path; import test_pairstore as t\n"
        "with t.PairWriter(Path(sys.argv[1]), t.a_spec()) as writer:\n"
        "    claims = writer.claims(); print(next(claims), flush=True); time.sleep(60)"
    )
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    spec, made, waited = a_spec(), list[int](), list[int]()

    def idle() -> None:
        waited.append(len(made))
        if len(waited) == 5:
            holder.send_signal(signal.SIGKILL)

    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"0\n"
        with PairWriter(tmp_path, spec) as writer:
            for shard in writer.claims(idle):
                writer.commit(shard, pairs(spec, spec.indices(shard)))
                made.append(shard)
        holder.kill()
    assert made == [1, 2, 0] and waited[:5] == [2] * 5
    assert not (tmp_path / ".claims").exists()


def test_a_writer_notices_what_another_has_finished(tmp_path: Path) -> None:
    spec = a_spec()
    with PairWriter(tmp_path, spec) as late:
        fill(tmp_path, spec)  # puts the journal in order too, which makes it another file
        assert list(late.claims()) == [] and late.missing() == []


def test_writers_of_other_pairs_are_told_so_while_one_is_at_work(tmp_path: Path) -> None:
    with PairWriter(tmp_path, a_spec()), pytest.raises(UsageError, match=r"\(count 10 -> 3\)"):
        PairWriter(tmp_path, a_spec(count=3))


# What is mended


@pytest.mark.parametrize("at_once", [False, True])
def test_damage_is_mended_and_nothing_else_is_made_again(tmp_path: Path, at_once: bool) -> None:
    spec = a_spec(count=40)
    whole = content(fill(tmp_path, spec))
    assert mend(tmp_path, spec) == []
    damage = {
        "store.json": [],
        "journal.jsonl": [1],
        "shards/00003.safetensors": [3],
        "shards/00007.safetensors": [7],
    }
    for names in [list(damage)] if at_once else [[name] for name in damage]:
        for name in names:
            data = whole[name]
            middle = len(data) * 3 // 20 if name == "journal.jsonl" else len(data) // 2
            put(tmp_path / name, data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        shards = sorted(shard for name in names for shard in damage[name])
        kept = {
            shard: shard_path(tmp_path, shard).stat().st_ino for shard in range(10) if shard not in shards
        }
        expected = {*names, *(f"shards/{shard:05d}.safetensors" for shard in shards)}
        assert set(mend(tmp_path, spec)) == expected
        with PairWriter(tmp_path, spec) as writer:
            assert writer.missing() == shards
        assert content(fill(tmp_path, spec)) == whole
        assert kept == {shard: shard_path(tmp_path, shard).stat().st_ino for shard in kept}
    put(tmp_path / "store.json", b"")
    with pytest.raises(UsageError, match="other settings or inputs"):
        mend(tmp_path, a_spec(count=40, seed=8))
    assert (tmp_path / "store.json").read_bytes() == b""
