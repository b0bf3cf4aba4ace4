"""Pairs of other toolkits come in and go out exactly, and what is wrong with them is refused by name."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from faults import content, watched
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from flowdistill import randomness
from flowdistill.errors import (
    ArtifactError,
    FlowdistillError,
    MissingInput,
    ResourceError,
    UsageError,
)
from flowdistill.exchange import (
    Imported,
    export_pairs,
    fastgen,
    growing,
    import_pairs,
    npy,
    orientation,
    recognise,
    rfpp,
    sources,
    tars,
)
from flowdistill.pairstore import Block, PairSpec, PairStore, PairWriter

RFPP = Path(__file__).parent / "fixtures" / "rfpp_pairs"


def noise(count: int, shape: Sequence[int], seed: int = 1) -> Tensor:
    return randomness.noise(seed, range(count), shape)


def data(count: int, shape: Sequence[int], seed: int = 2) -> Tensor:
    """Nothing that looks normal: two heaps, within [-1, 1]."""
    return noise(count, shape, seed).sign() * 0.8 + 0.1 * noise(count, shape, seed + 1).tanh()


def every(store: PairStore | Path) -> tuple[Tensor, Tensor, Tensor | None]:
    store = store if isinstance(store, PairStore) else PairStore.open(store)
    assert store.verify() == []
    return store.batch(range(len(store)))


def same(left: PairStore | Path, right: PairStore | Path) -> bool:
    """Whether the pairs are equal, to the last bit."""
    pairs = zip(every(left), every(right), strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def make_store(folder: Path, spec: PairSpec, x0: Tensor, labels: Tensor | None = None) -> PairStore:
    with PairWriter(folder, spec) as writer:
        for shard in writer.missing():
            rows = spec.indices(shard)
            eps, record = spec.draw(rows)
            some = slice(rows.start, rows.stop)
            given = None if labels is None else labels[some]
            writer.commit(shard, Block(eps, x0[some], given, record=record))
    return PairStore.open(folder)


# rf++


def png(image: Tensor, **how: Any) -> bytes:
    """[channels, height, width] bytes as a PNG."""
    file = io.BytesIO()
    array = image.permute(1, 2, 0).numpy()
    Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array)).save(
        file, "PNG", **how
    )
    return file.getvalue()


def zip_file(path: Path, members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> None:
    path.unlink(missing_ok=True)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore")  # names that occur twice
        for name, content in members:
            archive.writestr(name, content)


def make_rfpp(
    folder: Path, images: Tensor, labels: Sequence[int] | None = None, seed: int = 0, depth: int = 2
) -> Path:
    """A set as rf++ has it, of bytes [n, channels, height, width]; names in as many folders as `depth`."""
    folder.mkdir(parents=True)
    stems = [f"{i % depth}/{i:05d}" if depth else f"{i:05d}" for i in range(len(images))]
    records = randomness.pcg64_records(seed, range(len(images)))
    zip_file(
        folder / "samples.zip",
        [(f"{stem}.png", png(image)) for stem, image in zip(stems, images, strict=True)],
    )
    zip_file(
        folder / "z.zip",
        [(f"{stem}.bin", record.numpy().tobytes()) for stem, record in zip(stems, records, strict=True)],
    )
    if labels is not None:
        rows = [f"{stem}.png,{label}\r\n" for stem, label in zip(stems, labels, strict=True)]
        (folder / "images_labels.csv").write_bytes("".join(rows).encode())
    return folder


def bytes_of(count: int, shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def test_a_set_that_rfpp_made_comes_in_exactly(tmp_path: Path) -> None:
    assert recognise(RFPP) == "rfpp"
    made = import_pairs(RFPP, tmp_path / "store", shard_size=4)
    store = PairStore.open(tmp_path / "store")
    eps, x0, labels = every(store)
    known = load_file(RFPP / "expected.safetensors")
    assert torch.equal(eps, known["noise"])
    assert torch.equal(x0, known["images"])
    assert labels is not None and labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert made.spec == store.spec and made.files == {**made.files, **_hashes(tmp_path / "store")}
    assert (made.folder, made.format, made.notes) == (tmp_path / "store", "rfpp", [])
    assert (store.spec.noise, store.spec.dtype, store.spec.classes, store.spec.seed) == (
        "pcg64",
        "uint8",
        3,
        0,
    )
    assert store.spec.orientation == "t=0 data, t=1 noise"
    assert store.spec.origin["format"] == "rfpp" and store.spec.origin["source"] == "rfpp_pairs"
    states = json.loads((RFPP / "states.json").read_text())["states"]
    for record, (state, increment) in zip(store.column("record").numpy(), states, strict=True):
        assert record.tobytes() == int(state).to_bytes(16, "big") + int(increment).to_bytes(16, "big")


def _hashes(folder: Path) -> dict[str, str]:
    from flowdistill import artifact

    return {
        str(path.relative_to(folder)): artifact.sha256(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name != artifact.MANIFEST and not path.name.startswith(".")
    }


def store_bytes(folder: Path) -> dict[str, bytes]:
    """All but the manifest, which has dates."""
    return {name: data for name, data in content(folder).items() if name != "manifest.json"}


@pytest.mark.parametrize("case", range(8))
def test_rfpp_goes_out_and_comes_in_again(tmp_path: Path, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(case)
    if case % 2:
        monkeypatch.setattr(rfpp, "_IN_A_FOLDER", 5)
    count, channels = chance.choice([1, 5, 7, 13]), chance.choice([1, 3])
    shape = (channels, chance.randint(1, 9), chance.randint(1, 9))
    labels = [chance.randrange(4) for _ in range(count)] if chance.random() < 0.6 else None
    images = bytes_of(count, shape, case)
    source = make_rfpp(tmp_path / "theirs", images, labels, seed=case, depth=chance.choice([0, 1, 3]))
    import_pairs(source, tmp_path / "store", shard_size=chance.choice([1, 3, 1024]))
    store = PairStore.open(tmp_path / "store")

    with zipfile.ZipFile(source / "samples.zip") as archive:
        order = [int(Path(name).stem) for name in sorted(archive.namelist())]
    eps, x0, given = every(store)
    assert torch.equal(x0, images[order].float() / 127.5 - 1)
    assert torch.equal(
        eps, randomness.pcg64_noise(randomness.pcg64_records(case, range(count))[order], shape)
    )
    assert (given is None) == (labels is None)
    assert given is None or given.tolist() == [labels[i] for i in order if labels]

    files = export_pairs(store, tmp_path / "ours", "rfpp")
    assert files == [
        tmp_path / "ours" / name
        for name in ("samples.zip", "z.zip", *(["images_labels.csv"] if labels else []))
    ]
    with zipfile.ZipFile(files[0]) as archive:
        folders = case % 2 and count > 5
        assert archive.namelist() == [
            f"{i // 5}/{i:05d}.png" if folders else f"{i:05d}.png" for i in range(count)
        ]
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.flag_bits for info in archive.infolist()} == {0}  # no descriptors behind the members
    assert not labels or files[2].read_bytes().count(b"\r\n") == count
    import_pairs(tmp_path / "ours", tmp_path / "again", classes=store.spec.classes or None)
    assert same(store, tmp_path / "again")
    export_pairs(PairStore.open(tmp_path / "again"), tmp_path / "twice", "rfpp")
    assert content(tmp_path / "ours") == content(tmp_path / "twice")


def test_the_parts_of_a_large_archive_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_rfpp(tmp_path / "theirs", bytes_of(50, (3, 4, 4)))
    import_pairs(source, tmp_path / "store")
    store = PairStore.open(tmp_path / "store")
    export_pairs(store, tmp_path / "whole", "rfpp")
    monkeypatch.setattr(growing.Growing.store, "__defaults__", (100,))
    monkeypatch.setattr(sources, "_BATCH_BYTES", 1000)
    export_pairs(store, tmp_path / "parts", "rfpp")
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def test_x0_that_is_stored_as_numbers_is_rounded_to_bytes(tmp_path: Path) -> None:
    spec = PairSpec(count=9, shape=(1, 3, 5), dtype="float32", seed=3, noise="pcg64", shard_size=4)
    x0 = data(9, spec.shape) * 1.4  # some beyond [-1, 1]
    store = make_store(tmp_path / "store", spec, x0)
    export_pairs(store, tmp_path / "out", "rfpp")
    import_pairs(tmp_path / "out", tmp_path / "back")
    eps, found, labels = every(tmp_path / "back")
    assert torch.equal(eps, every(store)[0]) and labels is None
    assert torch.allclose(found, x0.clamp(-1, 1), atol=0.5 / 127.5 + 1e-6)


def test_only_images_with_records_can_become_a_set_of_rfpp(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"count": 2, "dtype": "float32", "seed": 0}
    seeded = make_store(tmp_path / "a", PairSpec(shape=(3, 2, 2), **fields), data(2, (3, 2, 2)))
    with pytest.raises(UsageError, match=r"is seeded.*\n.*`pairs.noise: pcg64`, or export them as npy"):
        export_pairs(seeded, tmp_path / "out", "rfpp")
    for number, shape in enumerate([(4, 2, 2), (3, 2), (3, 1, 2, 2)]):
        spec = PairSpec(shape=shape, noise="pcg64", **fields)
        latents = make_store(tmp_path / f"b{number}", spec, data(2, shape))
        with pytest.raises(UsageError, match=r"grey or RGB images\nexport them as npy"):
            export_pairs(latents, tmp_path / "out", "rfpp")
    assert not (tmp_path / "out").exists()


def _members(path: Path) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def _with(path: Path, *added: tuple[str, bytes], without: int | None = None) -> None:
    members = [each for at, each in enumerate(_members(path)) if at != without]
    zip_file(path, [*members, *added])


def _replaced(path: Path, at: int, data: bytes) -> None:
    members = _members(path)
    members[at] = (members[at][0], data)
    zip_file(path, members)


def _patched(path: Path, old: bytes, new: bytes) -> None:
    found = path.read_bytes()
    assert old in found
    path.write_bytes(found.replace(old, new))


def _csv(text: str | bytes) -> Callable[[Path], object]:
    return lambda s: (s / "images_labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())


def _image(mode: str, size: tuple[int, int] = (4, 4)) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return file.getvalue()


def _header_of(width: int, height: int, bits: int = 8, kind: int = 2) -> bytes:
    """A PNG of this size that holds no pixels."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ]
    framed = (struct.pack(">I", len(c)) + t + c + struct.pack(">I", zlib.crc32(t + c)) for t, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def _deep(width: int, height: int) -> bytes:
    """An RGB image of 16 bits."""
    rows = zlib.compress((b"\0" + bytes(6 * width)) * height)
    whole = _header_of(width, height, 16)
    old = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    return whole.replace(
        old, struct.pack(">I", len(rows)) + b"IDAT" + rows + struct.pack(">I", zlib.crc32(b"IDAT" + rows))
    )


SIX = "".join(f"{i % 2}/{i:05d}.png,{i}\r\n" for i in range(6))
RFPP_REFUSALS: dict[str, tuple[Callable[[Path], object], type[FlowdistillError], str]] = {
    "no noise": (lambda s: (s / "z.zip").unlink(), MissingInput, "z.zip: no such file"),
    "no samples": (lambda s: (s / "samples.zip").unlink(), MissingInput, "samples.zip: no such file"),
    "a sample twice": (
        lambda s: _with(s / "samples.zip", ("0/00002.png", _image("RGB"))),
        ArtifactError,
        "samples.zip: holds 0/00002.png twice: rf++ was cut off and started again, which appends",
    ),
    "a record twice": (
        lambda s: _with(s / "z.zip", ("1/00003.bin", bytes(32))),
        ArtifactError,
        "holds 1/00003.bin twice",
    ),
    "a record missing": (
        lambda s: _with(s / "z.zip", without=2),
        ArtifactError,
        "z.zip: lacks 0/00002.bin, whose",
    ),
    "a sample missing": (
        lambda s: _with(s / "samples.zip", without=5),
        ArtifactError,
        "samples.zip: lacks 1/00005.png",
    ),
    "another name": (
        lambda s: _with(s / "z.zip", ("x.bin", b"\1" * 32), without=0),
        ArtifactError,
        "lacks 0/00000.bin",
    ),
    "no members": (lambda s: zip_file(s / "z.zip", []), ArtifactError, "z.zip: holds no .bin"),
    "a short record": (
        lambda s: _replaced(s / "z.zip", 1, bytes(31)),
        ArtifactError,
        "1/00001.bin has 31 bytes, expected 32",
    ),
    "a long record": (
        lambda s: _replaced(s / "z.zip", 1, bytes(1 << 20)),
        ArtifactError,
        "has 1048576 bytes, expected 32",
    ),
    "no state": (
        lambda s: _replaced(s / "z.zip", 1, bytes(32)),
        ArtifactError,
        "1/00001.bin is no state of a PCG64: its increment",
    ),
    "something else": (
        lambda s: _with(s / "samples.zip", ("dataset.json", b"{}")),
        ArtifactError,
        "holds dataset.json, expected names",
    ),
    "an odd name": (lambda s: _with(s / "z.zip", ("../\n", b"")), ArtifactError, r"holds '../\n', expected"),
    "no zip": (
        lambda s: (s / "z.zip").write_bytes(b"hello"),
        ArtifactError,
        "z.zip: cannot be read as a zip archive",
    ),
    "no image": (
        lambda s: _replaced(s / "samples.zip", 0, b"hello"),
        ArtifactError,
        "0/00000.png cannot be read as a PNG",
    ),
    "half an image": (
        lambda s: _replaced(s / "samples.zip", 4, _image("RGB")[:-25]),
        ArtifactError,
        "0/00004.png cannot be read",
    ),
    "palette": (
        lambda s: _replaced(s / "samples.zip", 0, _image("P")),
        ArtifactError,
        "0/00000.png is a PNG of mode P",
    ),
    "alpha": (lambda s: _replaced(s / "samples.zip", 1, _image("RGBA")), ArtifactError, "mode RGBA"),
    "16 bits, grey": (
        lambda s: _replaced(s / "samples.zip", 1, _image("I;16")),
        ArtifactError,
        "mode I;16, 16 bits",
    ),
    "16 bits, RGB": (
        lambda s: _replaced(s / "samples.zip", 1, _deep(4, 4)),
        ArtifactError,
        "mode RGB, 16 bits",
    ),
    "grey among RGB": (
        lambda s: _replaced(s / "samples.zip", 1, _image("L")),
        ArtifactError,
        "1/00001.png has shape [1, 4, 4], the first image has [3, 4, 4]",
    ),
    "another size": (
        lambda s: _replaced(s / "samples.zip", 1, _image("RGB", (4, 5))),
        ArtifactError,
        "shape [3, 5, 4]",
    ),
    "a bomb": (
        lambda s: _replaced(s / "samples.zip", 0, _header_of(60_000, 60_000)),
        ArtifactError,
        "decompression bomb",
    ),
    "a small bomb": (
        lambda s: _replaced(s / "samples.zip", 0, _header_of(8_000, 8_000)),
        ArtifactError,
        "8000 x 8000 pixels; expected",
    ),
    "encrypted": (
        lambda s: _patched(s / "z.zip", b"PK\1\2\x14\x03\x14\0\0", b"PK\1\2\x14\x03\x14\0\1"),
        ArtifactError,
        "encrypted",
    ),
    "packed oddly": (
        lambda s: zip_file(s / "z.zip", _members(s / "z.zip"), zipfile.ZIP_LZMA),
        ArtifactError,
        "unusual",
    ),
    "a label missing": (
        _csv(SIX.replace("0/00002.png,2\r\n", "")),
        ArtifactError,
        "images_labels.csv: has no label for 0/00002.png",
    ),
    "all labels for others": (_csv("x.png,1\r\n"), ArtifactError, "no label for 0/00000.png, 0/00002.png,"),
    "two labels": (_csv(SIX + "0/00004.png,3\r\n"), ArtifactError, "0/00004.png has two labels, 4 and 3"),
    "no label in a row": (_csv("0/00000.png\r\n"), ArtifactError, "line 1 is not `name.png,label`"),
    "a label of text": (_csv(SIX + "0/00000.png,cat\r\n"), ArtifactError, "line 7 is not"),
    "a negative label": (_csv("0/00000.png,-1\r\n"), ArtifactError, "line 1 is not"),
    "a label in other digits": (_csv("0/00000.png,\u0663\r\n"), ArtifactError, "line 1 is not"),
    "a label that is too large": (_csv("0/00000.png,12345678901\r\n"), ArtifactError, "line 1 is not"),
    "an open quote": (_csv('"0/00000.png,1\r\n'), ArtifactError, "line 1 is not"),
    "no text": (_csv(b"\xff\xfe0,1\r\n"), ArtifactError, "not UTF-8"),
    "an endless line": (_csv("0" * 5000), ArtifactError, "a line of more than 4096 bytes"),
}


@pytest.mark.parametrize("what", RFPP_REFUSALS)
@pytest.mark.filterwarnings("ignore:.*decompression bomb")
def test_sets_of_rfpp_that_are_refused(tmp_path: Path, what: str) -> None:
    harm, error, words = RFPP_REFUSALS[what]
    source = make_rfpp(tmp_path / "theirs", bytes_of(6, (3, 4, 4)), range(6))
    harm(source)
    with pytest.raises(error) as caught:
        import_pairs(source, tmp_path / "store")
    assert words in str(caught.value) and str(source) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_an_image_that_is_too_large_is_not_even_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_rfpp(tmp_path / "theirs", bytes_of(3, (3, 4, 4)))
    monkeypatch.setattr(rfpp, "_PNG_BYTES_AT_MOST", 1000)
    _replaced(source / "samples.zip", 2, bytes(1001))
    monkeypatch.setattr(sources, "_SHARD_BYTES", 2 * 4 * 48 * 2)
    with pytest.raises(ArtifactError, match=r"0/00002.png has 1001 bytes, expected 1000 at most"):
        import_pairs(source, tmp_path / "store")


def test_labels_that_rfpp_wrote_too_many_of_are_left_out(tmp_path: Path) -> None:
    source = make_rfpp(tmp_path / "theirs", bytes_of(6, (3, 4, 4)))
    _csv(SIX + "\r\n0/00006.png,9\r\n1/00007.png,9\r\n" + SIX)(source)
    made = import_pairs(source, tmp_path / "store")
    labels = every(tmp_path / "store")[2]
    assert labels is not None and labels.tolist() == [0, 2, 4, 1, 3, 5] and made.spec.classes == 6
    assert made.notes == ["images_labels.csv has 2 labels without an image"]


def test_an_empty_list_of_labels_is_none(tmp_path: Path) -> None:
    source = make_rfpp(tmp_path / "theirs", bytes_of(3, (1, 4, 4)))
    first = import_pairs(source, tmp_path / "a")
    (source / "images_labels.csv").write_bytes(b"")
    second = import_pairs(source, tmp_path / "b")
    assert first.spec.classes == second.spec.classes == 0
    assert first.files == second.files


def test_names_may_be_anything(tmp_path: Path) -> None:
    images = bytes_of(4, (1, 2, 2))
    names = ["a", "a-b", 'ä, "b"', "../../c"]  # a-b.png comes before a.png
    records = randomness.pcg64_records(5, range(4))
    source = tmp_path / "theirs"
    source.mkdir()
    zip_file(
        source / "samples.zip",
        [("folder/", b""), *((f"{n}.png", png(i)) for n, i in zip(names, images, strict=True))],
    )
    shuffled = [(f"{n}.bin", r.numpy().tobytes()) for n, r in zip(names, records, strict=True)][::-1]
    zip_file(source / "z.zip", shuffled, zipfile.ZIP_DEFLATED)
    rows = 'a.png,0\r\na-b.png,1\r\n"ä, ""b"".png",2\r\n../../c.png,3\r\n'
    _csv(rows)(source)
    import_pairs(source, tmp_path / "store")
    eps, x0, labels = every(tmp_path / "store")
    order = [3, 1, 0, 2]
    assert labels is not None and labels.tolist() == order
    assert torch.equal(x0, images[order].float() / 127.5 - 1)
    assert torch.equal(eps, randomness.pcg64_noise(records[order], (1, 2, 2)))


@pytest.mark.parametrize("name", ["samples.zip", "z.zip"])
def test_archives_that_are_cut_off_or_altered(tmp_path: Path, name: str) -> None:
    source = make_rfpp(tmp_path / "theirs", bytes_of(5, (3, 4, 4)), range(5))
    import_pairs(source, tmp_path / "whole")
    whole = (source / name).read_bytes()
    cuts = [whole[:length] for length in range(0, len(whole), 37)]
    chance = random.Random(name)
    altered = []
    for _ in range(60):
        changed = bytearray(whole)
        changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        altered.append(bytes(changed))
    refused = 0
    for number, damage in enumerate([*cuts, *altered]):
        (source / name).write_bytes(damage)
        target = tmp_path / "store"
        try:
            import_pairs(source, target)
            assert number >= len(cuts) and same(tmp_path / "whole", target)  # a date, or the like
        except ArtifactError as error:
            assert str(source / name) in str(error) or "lacks" in str(error)
            refused += 1
        shutil.rmtree(target, ignore_errors=True)
    assert refused > len(cuts) + 30  # of the alterations, half or more


# RectifiedFlow and SlimFlow


def make_npy(folder: Path, eps: Tensor, x0: Tensor, labels: Tensor | None = None) -> Path:
    folder.mkdir(parents=True)
    np.save(folder / "z0.npy", eps.numpy())
    np.save(folder / "z1.npy", x0.numpy())
    if labels is not None:
        np.save(folder / "label.npy", labels.numpy())
    return folder


@pytest.mark.parametrize("case", range(8))
def test_npy_comes_in_goes_out_and_comes_in_again(tmp_path: Path, case: int) -> None:
    chance = random.Random(case)
    shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(1, 4)))
    counts = [chance.choice([1, 2, 5, 201]) for _ in range(chance.choice([0, 1, 4]))]
    kind = chance.choice(["none", "numbers", "floats", "one-hot"])
    total = sum(counts) if counts else 333
    eps, x0 = noise(total, shape), data(total, shape)
    labels = randomness.integers(case, "labels", range(total), 5)
    labels[0] = 4
    written = {
        "none": None,
        "numbers": labels,
        "floats": labels.float(),
        "one-hot": torch.eye(7)[labels],
    }[kind]
    source = tmp_path / "theirs"
    begin = 0
    for number, count in enumerate(counts):
        some = slice(begin, begin := begin + count)
        make_npy(source / f"{number:02d}", eps[some], x0[some], None if written is None else written[some])
    if not counts:
        make_npy(source, eps, x0, written)
    (source / "readme.txt").write_text("not a sub-folder")
    (source / "logs").mkdir()

    assert recognise(source) == "npy"
    made = import_pairs(
        source, tmp_path / "store", shard_size=chance.choice([7, 100, 1024]), force=total < 50
    )
    found = every(tmp_path / "store")
    assert torch.equal(found[0], eps) and torch.equal(found[1], x0)
    assert found[2] is None if written is None else found[2] is not None and torch.equal(found[2], labels)
    assert made.spec.classes == {"none": 0, "one-hot": 7}.get(kind, 5)
    assert (made.spec.noise, made.spec.dtype, made.spec.seed) == ("stored", "float32", 0)
    origin = dict(made.spec.origin)
    assert origin.pop("noise_ks") == pytest.approx(orientation.look(eps.flatten()).distance, abs=6e-4)
    assert len(str(origin.pop("sha256"))) == 64
    assert origin == {
        "format": "npy",
        "source": "theirs",
        "swapped": False,
        "orientation": "t=0 noise, t=1 data",
    }

    store = PairStore.open(tmp_path / "store")
    files = export_pairs(store, tmp_path / "ours", "npy")
    assert [path.name for path in files] == [
        "z0.npy",
        "z1.npy",
        *(["label.npy"] if written is not None else []),
    ]
    loaded = [np.load(path, allow_pickle=False) for path in files]
    assert torch.equal(torch.from_numpy(loaded[0]), eps) and torch.equal(torch.from_numpy(loaded[1]), x0)
    assert {array.dtype.str for array in loaded} == {"<f4"}
    if written is not None:  # rows that SlimFlow's networks take
        assert np.array_equal(loaded[2], np.eye(store.spec.classes, dtype=np.float32)[labels.numpy()])
    again = import_pairs(tmp_path / "ours", tmp_path / "again", force=True)
    assert same(store, tmp_path / "again") and again.spec.classes == store.spec.classes


def test_any_kind_of_store_goes_out_as_npy(tmp_path: Path) -> None:
    for noise_from in ("seeded", "pcg64"):
        spec = PairSpec(
            count=7, shape=(2, 3), dtype="bfloat16", seed=4, noise=noise_from, shard_size=4, classes=3
        )
        labels = torch.tensor([2, 1, 0, 0, 1, 2, 2])
        store = make_store(tmp_path / noise_from, spec, data(7, (2, 3)), labels)
        files = export_pairs(store, tmp_path / f"{noise_from}-npy", "npy")
        eps, x0, _ = every(store)
        assert torch.equal(torch.from_numpy(np.load(files[0])), eps)
        assert torch.equal(torch.from_numpy(np.load(files[1])), x0)
        assert np.load(files[2]).argmax(1).tolist() == labels.tolist()


@pytest.mark.parametrize("how", ["float16", "float64", ">f4", "columns"])
def test_arrays_of_other_layouts(tmp_path: Path, how: str) -> None:
    eps, x0 = noise(400, (3, 2)).numpy(), data(400, (3, 2)).numpy()
    stored = [np.asfortranarray(a) if how == "columns" else a.astype(how) for a in (eps, x0)]
    source = tmp_path / "theirs"
    source.mkdir()
    np.save(source / "z0.npy", stored[0])
    np.save(source / "z1.npy", stored[1])
    made = import_pairs(source, tmp_path / "store", shard_size=64)
    found = every(tmp_path / "store")
    for tensor, array in zip(found, stored, strict=False):
        assert tensor is not None and np.array_equal(tensor.numpy(), array.astype(np.float32))
    assert made.notes == (["numbers of type float64 are rounded to float32"] if how == "float64" else [])


def test_arrays_are_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, shape = 3000, (8, 16, 16)
    source = make_npy(tmp_path / "theirs", noise(count, shape), data(count, shape), torch.arange(count) % 3)
    taken: list[int] = []

    class Watched(np.memmap):  # type: ignore[type-arg]
        def __getitem__(self, rows: Any) -> Any:
            found = super().__getitem__(rows)
            taken.append(found.nbytes if isinstance(found, np.ndarray) else 0)
            return np.asarray(found)

    real = np.lib.format.open_memmap
    monkeypatch.setattr(np.lib.format, "open_memmap", lambda *a, **k: real(*a, **k).view(Watched))
    monkeypatch.setattr(orientation, "_NUMBERS", 100_000)
    monkeypatch.setattr(sources, "_BATCH_BYTES", 1 << 20)
    monkeypatch.setattr(growing.Growing.store, "__defaults__", (1 << 20,))
    tracemalloc.start()
    import_pairs(source, tmp_path / "store", shard_size=100)
    export_pairs(PairStore.open(tmp_path / "store"), tmp_path / "out", "npy")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    whole = count * 8 * 16 * 16 * 4
    assert max(taken) == 100 * 8 * 16 * 16 * 4 and len(taken) > 2 * count // 100
    assert peak < whole / 3
    assert (tmp_path / "out" / "z0.npy").read_bytes() == (source / "z0.npy").read_bytes()


def _save(name: str, array: Any, pickles: bool = False) -> Callable[[Path], object]:
    return lambda s: np.save(s / name, array, allow_pickle=pickles)


def _with_sub_folder(*names: str, shape: tuple[int, ...] = (3, 4)) -> Callable[[Path], object]:
    def harm(source: Path) -> None:
        for number in (1, 2):
            (source / f"{number}").mkdir()
            for name in ("z0.npy", "z1.npy", "label.npy"):
                shutil.copy(source / name, source / f"{number}" / name)
        for name in ("z0.npy", "z1.npy", "label.npy"):
            (source / name).unlink()
        for name in names:
            (source / "2" / name).unlink()
        if shape != (3, 4):
            make_npy(source / "3", noise(9, shape), data(9, shape), torch.zeros(9, dtype=torch.int64))

    return harm


def _mixed(source: Path) -> None:
    _with_sub_folder()(source)
    np.save(source / "2" / "label.npy", np.eye(300, 3, dtype=np.float32))


NPY_REFUSALS: dict[str, tuple[Callable[[Path], object], type[FlowdistillError], str]] = {
    "no data": (lambda s: (s / "z1.npy").unlink(), MissingInput, "z1.npy: no such file"),
    "no noise": (lambda s: (s / "z0.npy").unlink(), MissingInput, "z0.npy: no such file"),
    "no noise in a sub-folder": (_with_sub_folder("z0.npy"), MissingInput, "2/z0.npy: no such file"),
    "a folder as noise": (
        lambda s: ((s / "z0.npy").unlink(), (s / "z0.npy").mkdir()),
        MissingInput,
        "z0.npy: no such",
    ),
    "objects": (
        _save("z0.npy", np.array([hostile.Attack(os.system, "touch canary")] * 300), True),
        ArtifactError,
        "z0.npy: cannot be read as an array of numbers (Array can't be memory-mapped: Python objects",
    ),
    "objects as labels": (
        _save("label.npy", np.array([hostile.Attack(os.system, "touch canary")] * 300), True),
        ArtifactError,
        "label.npy",
    ),
    "a pickle": (
        lambda s: (s / "z1.npy").write_bytes(pickle.dumps(hostile.Attack(os.system, "touch canary"))),
        ArtifactError,
        "z1.npy: cannot be read",
    ),
    "a zip": (
        lambda s: np.savez((s / "z1.npy").open("wb"), np.zeros((300, 3, 4))),
        ArtifactError,
        "z1.npy: cannot",
    ),
    "nothing": (lambda s: (s / "z0.npy").write_bytes(b""), ArtifactError, "z0.npy: cannot be read"),
    "no pairs": (
        lambda s: (
            _save("z0.npy", np.zeros((0, 3, 4), "f4"))(s),
            _save("z1.npy", np.zeros((0, 3, 4), "f4"))(s),
        ),
        ArtifactError,
        "z1.npy: has shape [0, 3, 4], which holds nothing",
    ),
    "bytes": (
        _save("z1.npy", np.zeros((300, 3, 4), np.uint8)),
        ArtifactError,
        "z1.npy: holds uint8, expected float32",
    ),
    "texts": (
        _save("z1.npy", np.full((300, 3, 4), "a")),
        ArtifactError,
        "z1.npy: holds <U1, expected float32",
    ),
    "records": (_save("z1.npy", np.zeros((300, 3, 4), "f4,f4")), ArtifactError, "expected float32"),
    "one number a pair": (
        _save("z0.npy", np.zeros(300, "f4")),
        ArtifactError,
        "z0.npy: has shape [300], expected [n, ...]",
    ),
    "another shape": (
        _save("z1.npy", np.zeros((300, 4, 3), "f4")),
        ArtifactError,
        "z1.npy: has shape [300, 4, 3], expected [300, 3, 4]",
    ),
    "another number": (
        _save("z1.npy", np.zeros((299, 3, 4), "f4")),
        ArtifactError,
        "has shape [299, 3, 4], expected",
    ),
    "another shape in a sub-folder": (
        _with_sub_folder(shape=(4, 3)),
        ArtifactError,
        "3/z1.npy: has shape [4, 3]",
    ),
    "too few labels": (
        _save("label.npy", np.zeros(299)),
        ArtifactError,
        "label.npy: holds 299 labels, expected 300",
    ),
    "labels of three dimensions": (
        _save("label.npy", np.zeros((300, 2, 2))),
        ArtifactError,
        "expected labels [n]",
    ),
    "labels of text": (
        _save("label.npy", np.full(300, "a")),
        ArtifactError,
        "holds <U1 [300], expected labels",
    ),
    "labels below zero": (_save("label.npy", np.full(300, -1)), ArtifactError, "not whole numbers from 0 on"),
    "labels between": (_save("label.npy", np.full(300, 0.5)), ArtifactError, "not whole numbers from 0 on"),
    "labels that are none": (
        _save("label.npy", np.full(300, np.nan)),
        ArtifactError,
        "not whole numbers from 0 on",
    ),
    "labels beyond all": (
        _save("label.npy", np.full(300, 1e10)),
        ArtifactError,
        "not whole numbers from 0 on",
    ),
    "rows of nothing": (_save("label.npy", np.zeros((300, 4))), ArtifactError, "not one 1 among zeros"),
    "rows of two": (_save("label.npy", np.full((300, 2), 1)), ArtifactError, "not one 1 among zeros"),
    "rows of shares": (_save("label.npy", np.full((300, 2), 0.5)), ArtifactError, "not one 1 among zeros"),
    "labels in some": (_with_sub_folder("label.npy"), MissingInput, "no label.npy in 2, but in others"),
    "two kinds of labels": (_mixed, ArtifactError, "one-hot in some sub-folders and not in others"),
    "noise that is infinite": (
        _save("z0.npy", np.full((300, 3, 4), np.inf, "f4")),
        ArtifactError,
        "the noise holds values",
    ),
    "data that are too large": (
        _save("z1.npy", np.full((300, 3, 4), 1e300)),
        ArtifactError,
        "the data holds values",
    ),
}


@pytest.mark.parametrize("what", NPY_REFUSALS)
def test_arrays_that_are_refused(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    harm, error, words = NPY_REFUSALS[what]
    source = make_npy(tmp_path / "theirs", noise(300, (3, 4)), data(300, (3, 4)), torch.arange(300) % 4)
    harm(source)
    with pytest.raises(error) as caught:
        import_pairs(source, tmp_path / "store")
    assert words in str(caught.value) and str(source) in str(caught.value)
    assert not (tmp_path / "canary").exists()


def test_arrays_that_are_cut_off_or_altered(tmp_path: Path) -> None:
    source = make_npy(tmp_path / "theirs", noise(50, (4,)), data(50, (4,)))
    whole = (source / "z0.npy").read_bytes()
    for length in (*range(0, 128, 9), 128, 200, len(whole) - 1):
        (source / "z0.npy").write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"z0.npy"):
            import_pairs(source, tmp_path / "store")
    chance = random.Random(0)
    for _ in range(100):
        changed = bytearray(whole)
        changed[chance.randrange(128)] = chance.randrange(256)
        (source / "z0.npy").write_bytes(changed)
        try:
            import_pairs(source, tmp_path / "store")
        except FlowdistillError as error:
            assert "z0.npy" in str(error) or str(source) in str(error) or "store" in str(error)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)


def test_numbers_that_are_not_finite_are_found_wherever_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orientation, "_NUMBERS", 3000)
    eps, x0 = noise(1000, (3, 4)), data(1000, (3, 4))
    x0[777, 1, 2] = torch.nan
    with pytest.raises(ArtifactError, match=r"theirs: the data of pair 777 holds values that are not finite"):
        import_pairs(make_npy(tmp_path / "theirs", eps, x0), tmp_path / "store", shard_size=100)


# Which of the two is the noise


def test_the_distance_of_known_numbers() -> None:
    count = 1000
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    exact = orientation.look(torch.special.ndtri(middles)[torch.randperm(count)])
    assert exact.distance == pytest.approx(0.5 / count) and exact.normal
    assert exact.variance == pytest.approx(1, abs=0.01)
    assert orientation.look(torch.zeros(10)).distance == 0.5
    assert orientation.look(torch.full((10,), 9.0)).distance == pytest.approx(1)
    uniform = orientation.look(2 * middles - 1)  # sup |(x + 1) / 2 - Phi(x)| on [-1, 1] lies at its ends
    assert uniform.distance == pytest.approx(0.1587, abs=1e-3) and not uniform.normal
    for variance, normal in ((1.0, True), (1.45, True), (1.7, False), (0.7, True), (0.6, False)):
        values = torch.special.ndtri(middles) * variance**0.5
        assert orientation.look(values).normal == normal
    assert orientation.look(noise(40, (2,)).flatten()).normal  # where chance alone exceeds 0.05


def test_noise_and_data_that_are_exchanged(tmp_path: Path) -> None:
    eps, x0 = noise(300, (3, 4)), data(300, (3, 4))
    wrong = make_npy(tmp_path / "wrong", x0, eps)
    with pytest.raises(UsageError) as caught:
        import_pairs(wrong, tmp_path / "store")
    measured = orientation.look(x0.flatten())
    assert str(caught.value) == (
        f"{wrong}: the two look swapped: the noise has KS distance {measured.distance:.3g}, variance "
        f"{measured.variance:.3g}; the data have {orientation.look(eps.flatten())}, as N(0, 1) has\n"
        "pass --swap"
    )
    assert not (tmp_path / "store").exists()
    made = import_pairs(wrong, tmp_path / "store", swap=True)
    assert made.spec.origin["swapped"] is True and made.notes == []
    found = every(tmp_path / "store")
    assert torch.equal(found[0], eps) and torch.equal(found[1], x0)
    right = make_npy(tmp_path / "right", eps, x0)
    with pytest.raises(UsageError, match=r"look swapped.*\nleave out --swap"):
        import_pairs(right, tmp_path / "other", swap=True)


def test_noise_that_is_not_normal(tmp_path: Path) -> None:
    eps, x0 = 80 * noise(300, (3, 4)), data(300, (3, 4))
    scaled = make_npy(tmp_path / "scaled", eps, x0)
    for swap in (False, True):
        with pytest.raises(UsageError) as caught:
            import_pairs(scaled, tmp_path / "store", swap=swap)
        assert "neither of the two is N(0, 1): the noise has KS distance" in str(caught.value)
        assert str(orientation.look(eps.flatten())) in str(caught.value)
        assert "--force" in str(caught.value) and "--swap" not in str(caught.value)
    made = import_pairs(scaled, tmp_path / "store", force=True)
    assert len(made.notes) == 1 and "it was taken as it is" in made.notes[0]
    assert made.spec.origin["noise_ks"] == pytest.approx(0.49, abs=5e-3)
    assert torch.equal(every(tmp_path / "store")[0], eps)


def test_data_that_are_normal_too(tmp_path: Path) -> None:
    both = make_npy(tmp_path / "both", noise(300, (3, 4), 1), noise(300, (3, 4), 2))
    for swap in (False, True):
        made = import_pairs(both, tmp_path / f"{swap}", swap=swap)
        assert len(made.notes) == 1 and "the data look like N(0, 1) too" in made.notes[0]


def test_pairs_are_looked_at_all_over_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orientation, "_NUMBERS", 600)
    eps, x0 = noise(1000, (2, 3)), data(1000, (2, 3))
    eps[500:] *= 9
    with pytest.raises(UsageError, match="neither"):
        import_pairs(make_npy(tmp_path / "late", eps, x0), tmp_path / "store")
    eps = noise(20, (2, 3, 500))
    eps[:, :, :, 1::2] = 0  # large pairs: numbers all over each
    with pytest.raises(UsageError, match="neither"):
        import_pairs(make_npy(tmp_path / "wide", eps, data(20, (2, 3, 500))), tmp_path / "store")


# FastGen


def pth(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def tar_file(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **how) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(eps: Tensor, x0: Tensor, first: int = 0) -> dict[str, bytes]:
    members = {}
    for row, (z, x) in enumerate(zip(eps, x0, strict=True), start=first):
        members[f"{row:04d}.txt_emb.pth"] = pth(torch.zeros(2, 2))
        members[f"{row:04d}.latent.pth"] = pth(x.clone())
        members[f"{row:04d}.json"] = b"{}"
        members[f"{row:04d}.noise.pth"] = pth(z.clone())
    return members


LATENT = (4, 6, 5)


@pytest.mark.parametrize("layout", ["tar", "tars", "folder", "batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fastgen_comes_in(tmp_path: Path, layout: str, dtype: torch.dtype) -> None:
    count = 1 if layout == "sample" else 13
    eps, x0 = noise(count, LATENT).to(dtype), data(count, LATENT).to(dtype)
    source = tmp_path / "theirs"
    if layout == "tar":
        source = tar_file(tmp_path / "theirs.tar", samples(eps, x0))
    elif layout == "tars":
        tar_file(source / "00001.tar", samples(eps[8:], x0[8:]))  # keys may begin anew in each
        tar_file(source / "00000.tar", samples(eps[:8], x0[:8]))
    else:
        source.mkdir()
        members = samples(eps, x0)
        if layout == "batch":
            members = {"latent.pth": pth(x0), "noise.pth": pth(eps)}
        if layout == "sample":
            members = {"latent.pth": pth(x0[0].clone()), "noise.pth": pth(eps[0].clone())}
        for name, content in members.items():
            (source / name).write_bytes(content)
    assert recognise(source) == "fastgen"
    made = import_pairs(source, tmp_path / "store", shard_size=5)
    found = every(tmp_path / "store")
    assert torch.equal(found[0], eps.float()) and torch.equal(found[1], x0.float()) and found[2] is None
    assert (made.spec.noise, made.spec.dtype, made.spec.classes) == ("stored", "float32", 0)
    assert made.spec.origin["format"] == "fastgen" and made.spec.origin["source"] == source.name
    notes = {
        "batch": "latent.pth [13, 4, 6, 5] is read as 13 samples of shape [4, 6, 5]",
        "sample": "latent.pth [1, 4, 6, 5] is read as 1 samples of shape [4, 6, 5]",
    }
    expected = [notes.get(layout, "prompt embeddings (txt_emb.pth) are left out: pairs are without labels")]
    if dtype == torch.float64:
        expected.append("numbers of type float64 are rounded to float32")
    assert made.notes == expected


@pytest.mark.parametrize("shape", [(7,), (30, 2), (2, 3, 4), (9, 2, 3, 4), (3, 2, 2, 2, 2)])
def test_one_sample_or_several(tmp_path: Path, shape: tuple[int, ...]) -> None:
    eps, x0 = torch.randn(shape, generator=torch.Generator().manual_seed(0)), data(1, shape)[0]
    (tmp_path / "noise.pth").write_bytes(pth(eps))
    (tmp_path / "latent.pth").write_bytes(pth(x0))
    made = import_pairs(tmp_path, tmp_path / "store", force=True)
    one = len(shape) in (1, 3)  # a vector, or an image of latents
    assert (made.spec.count, made.spec.shape) == ((1, shape) if one else (shape[0], shape[1:]))
    assert torch.equal(every(tmp_path / "store")[0].reshape(shape), eps)


def test_noise_and_data_of_fastgen_can_be_exchanged(tmp_path: Path) -> None:
    eps, x0 = noise(9, LATENT), data(9, LATENT)
    source = tar_file(tmp_path / "theirs.tar", samples(x0, eps))
    with pytest.raises(UsageError, match=r"look swapped.*\npass --swap"):
        import_pairs(source, tmp_path / "store")
    import_pairs(source, tmp_path / "store", swap=True)
    assert torch.equal(every(tmp_path / "store")[0], eps)


def test_nothing_in_a_shard_of_fastgen_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    latent = pth(data(1, LATENT)[0])
    every_file = hostile.corpus()
    hostile_files = hostile._that_execute() | {name: every_file[name] for name in sorted(every_file)[::4]}
    for name, (damage, _) in hostile_files.items():
        source = tar_file(tmp_path / "theirs.tar", {"a.latent.pth": latent, "a.noise.pth": damage})
        with pytest.raises(ArtifactError) as caught:
            import_pairs(source, tmp_path / "store")
        assert str(caught.value).startswith(f"{source}: a.noise.pth: "), name
        assert str(caught.value).count("\n") <= 2, name
    assert len(hostile_files) > 80
    assert sorted(each.name for each in tmp_path.iterdir()) == ["theirs.tar"]


def test_a_hostile_file_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "theirs"
    source.mkdir()
    attack = pickle.dumps(hostile.Attack(os.system, "touch canary"))
    for name in ("latent.pth", "a.latent.pth"):
        other = name.replace("latent", "noise")
        (source / name).write_bytes(attack)
        (source / other).write_bytes(pth(noise(1, LATENT)))
        with pytest.raises(ArtifactError, match=r"latent.pth: .*posix.system"):
            import_pairs(source, tmp_path / "store", force=True)
        (source / name).unlink()
        (source / other).unlink()
    assert not (tmp_path / "canary").exists()


GOOD = {"a.latent.pth": pth(data(1, LATENT)[0]), "a.noise.pth": pth(noise(1, LATENT)[0])}
FASTGEN_REFUSALS: dict[str, tuple[dict[str, bytes], type[FlowdistillError], str]] = {
    "nothing": ({}, MissingInput, "no KEY.latent.pth and KEY.noise.pth in it"),
    "other things": (
        {"a.jpg": b"", ".a.noise.pth": b"", ".noise.pth": b"", "b": b"", "c.pth": b""},
        MissingInput,
        "no KEY.latent.pth",
    ),
    "no noise": (
        GOOD | {"b.latent.pth": b""},
        ArtifactError,
        "lacks b.noise.pth, whose counterpart is there",
    ),
    "no data": (GOOD | {"x/b.noise.pth": b""}, ArtifactError, "lacks x/b.latent.pth"),
    "trajectories": (
        {"a.latent.pth": b"", "a.path.pth": b""},
        UsageError,
        "holds trajectories (path.pth), not pairs (noise.pth and",
    ),
    "not a tensor": (
        GOOD | {"a.noise.pth": pth({"x": torch.ones(2)})},
        ArtifactError,
        "holds a dict, expected one tensor",
    ),
    "a number": (
        GOOD | {"a.noise.pth": pth(3)},
        ArtifactError,
        "a.noise.pth: holds a int, expected one tensor",
    ),
    "whole numbers": (
        GOOD | {"a.noise.pth": pth(torch.ones(4, 6, 5, dtype=torch.int64))},
        ArtifactError,
        "holds int64 [4, 6, 5], expected",
    ),
    "no numbers": (
        GOOD | {"a.noise.pth": pth(torch.ones(4, 0, 5))},
        ArtifactError,
        "holds float32 [4, 0, 5], expected",
    ),
    "another shape": (
        GOOD | {"a.latent.pth": pth(torch.ones(4, 5, 6))},
        ArtifactError,
        "a.latent.pth: has shape [4, 5, 6], expected [4, 6, 5]",
    ),
    "nothing in it": (GOOD | {"a.latent.pth": b""}, ArtifactError, "a.latent.pth: is empty"),
    "text": (GOOD | {"a.latent.pth": b"hello"}, ArtifactError, "a.latent.pth: "),
    "not finite": (GOOD | {"a.noise.pth": pth(torch.full(LATENT, torch.nan))}, ArtifactError, "not finite"),
}


@pytest.mark.parametrize("what", FASTGEN_REFUSALS)
def test_sets_of_fastgen_that_are_refused(tmp_path: Path, what: str) -> None:
    members, error, words = FASTGEN_REFUSALS[what]
    packed, folder = tar_file(tmp_path / "theirs.tar", members), tmp_path / "theirs"
    folder.mkdir()
    for name, data in members.items():
        (folder / Path(name).name).write_bytes(data)
    for source in (packed, folder):
        with pytest.raises(error) as caught:
            if source.is_file() or recognise(source):
                import_pairs(source, tmp_path / "store")
            else:
                raise MissingInput(words + str(source))
        assert (words if source.is_file() else words.replace("x/", "")) in str(caught.value)
        assert str(source) in str(caught.value)


def test_half_a_batch_is_refused(tmp_path: Path) -> None:
    for name, other in (("latent.pth", "noise.pth"), ("noise.pth", "latent.pth")):
        source = tmp_path / name
        source.mkdir()
        (source / name).write_bytes(pth(noise(9, LATENT)))
        with pytest.raises(MissingInput, match=f"{other}: no such file"):
            import_pairs(source, tmp_path / "store")
        (source / other).write_bytes(pth(noise(8, LATENT)))
        with pytest.raises(
            ArtifactError, match=r"latent.pth: has shape \[[89], 4, 6, 5\], expected \[[89], 4, 6, 5\]"
        ):
            import_pairs(source, tmp_path / "store")
        for each in (name, other):
            (source / each).write_bytes(pth(torch.tensor(1.0)))
        with pytest.raises(ArtifactError, match=r"noise.pth: holds one number, expected \[n, ...\]"):
            import_pairs(source, tmp_path / "store")


def test_a_full_disk_for_what_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tar_file(tmp_path / "theirs.tar", GOOD)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResourceError, match=r"latent.pth: writing failed \(No space left on device\)"):
        import_pairs(source, tmp_path / "store")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_are_read_as_others_read_them(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    chance = random.Random(form)
    with tarfile.open(path, "w", format=form) as archive:
        for number in range(30):
            length = (
                chance.choice([1, 50, 99, 100, 101, 150])
                if form == tarfile.USTAR_FORMAT
                else chance.randint(1, 400)
            )
            name = f"{number}" + "/abcdefgh" * (length // 9) + chance.choice(["", "ö"])
            info = tarfile.TarInfo(name)
            content = chance.randbytes(chance.choice([0, 1, 511, 512, 513, 5000]))
            info.size, info.mtime = len(content), 1e9 + 0.25 * number * (form == tarfile.PAX_FORMAT)
            archive.addfile(info, io.BytesIO(content))
            folder = tarfile.TarInfo(f"folder{number}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    whole = path.read_bytes()
    found = [(member.name, whole[member.start : member.start + member.size]) for member in tars.members(path)]
    with tarfile.open(path) as archive:
        known = [(i.name, archive.extractfile(i).read()) for i in archive if i.isfile()]  # type: ignore[union-attr]
    assert found == known and len(found) == 30


def _header(name: str, kind: bytes = b"0", size: bytes = b"00000000000\0", link: str = "") -> bytes:
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136], block[156:157], block[257:265] = size, kind, b"ustar\x0000"
    block[157 : 157 + len(link)] = link.encode()
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(records: bytes, kind: bytes = b"x") -> bytes:
    return _header("h", kind, b"%011o\0" % len(records)) + records + bytes(-len(records) % 512)


END = bytes(1024)
TAR_REFUSALS: dict[str, tuple[bytes, str]] = {
    "a symbolic link": (
        _header("a.noise.pth", b"2", link="/etc/passwd") + END,
        "a.noise.pth is a link, expected",
    ),
    "a link": (_header("a.noise.pth", b"1", link="b") + END, "a.noise.pth is a link"),
    "a character device": (_header("x", b"3") + END, "x is a device"),
    "a block device": (_header("x", b"4") + END, "x is a device"),
    "a pipe": (_header("x", b"6") + END, "x is a pipe"),
    "a sparse file": (_header("x", b"S") + END, "x is sparse"),
    "a sparse file of PAX": (_pax(b"22 GNU.sparse.major=1\n") + _header("x") + END, "is sparse, expected"),
    "an unknown kind": (_header("x", b"Z") + END, "x is of type b'Z'"),
    "an empty file": (b"", "is cut short: no header"),
    "no end": (_header("x"), "is cut short: no header and no end mark at byte 512"),
    "a member beyond the end": (_header("x", size=b"00000077777\0") + END, "is cut short: x has 32767 bytes"),
    "a size below zero": (_header("x", size=b"\xff" * 12) + END, "no valid size"),
    "a size with a sign": (_header("x", size=b"-0000000512\0") + END, "no valid size"),
    "a size in Python's words": (_header("x", size=b"0o000_000_0\0") + END, "no valid size"),
    "a size of 2^80": (_header("x", size=b"\x80" + b"\xff" * 11) + END, "is cut short"),
    "a size below zero of PAX": (_pax(b"13 size=-512\n") + _header("x") + END, "no valid size"),
    "a size beyond the end of PAX": (_pax(b"16 size=9999999\n") + _header("x") + END, "is cut short"),
    "a record of no length": (_pax(b"0 a=b\n") + _header("x") + END, "no valid extended header"),
    "a record that is too long": (_pax(b"99 a=b\n") + _header("x") + END, "no valid extended header"),
    "a record without a value": (_pax(b"5 ab\n") + _header("x") + END, "no valid extended header"),
    "a record without an end": (_pax(b"6 a=bc") + _header("x") + END, "no valid extended header"),
    "half a header of PAX": (
        _header("h", b"x", b"00000001000\0") + b"1" * 80,
        "the header at byte 0 has 512 bytes",
    ),
    "a size of a header in front": (
        _pax(b"16 size=9999999\n") + _pax(b"12 path=abc\n") + _header("x") + END,
        "is cut short: abc has 9999999 bytes",
    ),
    "a header of megabytes": (_pax(b"1" * (2 << 20)) + _header("x") + END, "has 2097152 bytes"),
    "another checksum": (_header("x").replace(b"x", b"y", 1) + END, "is no tar archive, or is packed"),
    "a packed archive": (b"\x1f\x8b" + bytes(1000), "is no tar archive, or is packed"),
    "damage further on": (_header("x") + b"\x01" * 512 + END, "is damaged (byte 512: no header)"),
}


@pytest.mark.parametrize("what", TAR_REFUSALS)
def test_archives_that_are_refused(tmp_path: Path, what: str) -> None:
    content, words = TAR_REFUSALS[what]
    source = tmp_path / "theirs.tar"
    source.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        import_pairs(source, tmp_path / "store")
    assert words in str(caught.value) and str(caught.value).startswith(str(source))


def test_what_is_said_of_all_members_and_of_links_is_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "theirs.tar"
    before = _pax(b"15 comment=abc\n", b"g") + _pax(b"12 path=abc\n") + _pax(b"target\0", b"K")
    folder = _header("folder", b"5", b"00000001000\0")  # whose size means nothing
    source.write_bytes(before + _header("x", b"\0") + folder + _header("y", b"7") + END)
    assert [member.name for member in tars.members(source)] == ["abc", "y"]


def test_many_small_headers_take_no_time(tmp_path: Path) -> None:
    source = tmp_path / "theirs.tar"
    source.write_bytes(_pax(b"5 a=\n" * 200_000) + _pax(b"12 path=abc\n") * 2000 + _header("x") + END)
    assert [member.name for member in tars.members(source)] == ["abc"]


def test_names_of_members_lead_nowhere(tmp_path: Path) -> None:
    eps, x0 = noise(9, LATENT), data(9, LATENT)
    members = {f"../../{name}": content for name, content in samples(eps, x0).items()}
    members |= {f"/etc/{name}": content for name, content in samples(eps, x0).items()}
    source = tar_file(tmp_path / "a" / "b" / "theirs.tar", members)
    before = {path for path in tmp_path.rglob("*")}
    import_pairs(source, tmp_path / "a" / "b" / "store")
    assert torch.equal(every(tmp_path / "a" / "b" / "store")[0], torch.cat([eps, eps]))
    after = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "a" / "b" / "store")}
    assert after == before


def test_shards_that_are_cut_off_or_altered(tmp_path: Path) -> None:
    eps, x0 = noise(9, (2, 3, 4)), data(9, (2, 3, 4))
    members = {
        f"{i}.{kind}.pth": pth(t[i].clone()) for i in range(9) for kind, t in (("noise", eps), ("latent", x0))
    }
    source = tar_file(tmp_path / "theirs.tar", members)
    whole = source.read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in range(0, end, 1511):
        source.write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            import_pairs(source, tmp_path / "store")
    chance = random.Random(0)
    for _ in range(60):
        changed = bytearray(whole[: end + 1024])
        changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
        source.write_bytes(changed)
        try:
            import_pairs(source, tmp_path / "store", force=True)
        except FlowdistillError as error:
            assert str(source) in str(error)
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    source.write_bytes(whole)
    with tarfile.open(source, "a") as archive:
        info = tarfile.TarInfo("3.noise.pth")
        archive.addfile(info)
    with pytest.raises(ArtifactError, match=r"theirs.tar: holds 3.noise.pth twice"):
        import_pairs(source, tmp_path / "store")


# All of them


def a_source(form: str, folder: Path) -> Path:
    """Some 20 pairs in each format."""
    eps, x0 = noise(20, (3, 4, 4)), data(20, (3, 4, 4))
    if form == "rfpp":
        return make_rfpp(folder, bytes_of(20, (3, 4, 4)), [i % 3 for i in range(20)])
    if form == "npy":
        return make_npy(folder / "7", eps, x0, torch.arange(20) % 3).parent
    return tar_file(folder / "0.tar", samples(eps, x0)).parent


FORMS = ("rfpp", "npy", "fastgen")


def test_recognising(tmp_path: Path) -> None:
    for form in FORMS:
        assert recognise(a_source(form, tmp_path / form)) == form
    (tmp_path / "none" / "inner").mkdir(parents=True)
    (tmp_path / "none" / "my_noise.pth").touch()
    (tmp_path / "none" / "z0_tmp.npy").touch()
    assert recognise(tmp_path / "none") is None
    assert recognise(tmp_path / "none" / "my_noise.pth") is None
    assert recognise(tmp_path / "missing") is None
    with pytest.raises(MissingInput, match="missing: no such file or folder"):
        import_pairs(tmp_path / "missing", tmp_path / "store")
    with pytest.raises(UsageError, match=r"none: holds no pairs of a known toolkit; expected samples.zip"):
        import_pairs(tmp_path / "none", tmp_path / "store")
    with pytest.raises(MissingInput, match="none: no z0.npy and z1.npy in it"), npy.opened(tmp_path / "none"):
        pass
    for part, form in (
        ("samples.zip", "rfpp"),
        ("z1.npy", "npy"),
        ("noise.pth", "fastgen"),
        ("k.latent.pth", "fastgen"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / part).touch()
        assert recognise(tmp_path / part) == form


@pytest.mark.parametrize("form", FORMS)
def test_an_import_that_is_cut_off_goes_on_to_the_same_bytes(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = a_source(form, tmp_path / "theirs")
    whole = import_pairs(source, tmp_path / "whole", shard_size=3)
    real, asked, stop = sources.Source.__init__, list[list[int]](), -1

    def init(self: sources.Source, **fields: Any) -> None:
        read = fields.pop("read")

        def failing(rows: Sequence[int]) -> Block:
            asked.append(list(rows))
            if list(rows)[0] == stop and len(rows) <= 3:
                raise KeyboardInterrupt
            return read(rows)

        real(self, **fields, read=failing)

    monkeypatch.setattr(sources.Source, "__init__", init)
    for first in (0, 9, 18):
        stop = first
        with pytest.raises(KeyboardInterrupt):
            import_pairs(source, tmp_path / "parts", shard_size=3)
    stop = -1
    asked.clear()
    made = import_pairs(source, tmp_path / "parts", shard_size=3)
    assert [rows for rows in asked if len(rows) <= 3] == [[18, 19]]  # the rest is there
    assert made == replace(whole, folder=tmp_path / "parts")
    assert store_bytes(tmp_path / "parts") == store_bytes(tmp_path / "whole")
    done = content(tmp_path / "parts")
    import_pairs(source, tmp_path / "parts", shard_size=3)  # there is nothing left to do
    assert content(tmp_path / "parts") == done  # its date among it


@pytest.mark.parametrize("form", FORMS)
def test_the_spec_depends_on_what_the_files_hold_and_not_on_where_they_are(tmp_path: Path, form: str) -> None:
    first = import_pairs(a_source(form, tmp_path / "a" / "theirs"), tmp_path / "1")
    second = import_pairs(a_source(form, tmp_path / "b" / "theirs"), tmp_path / "2")
    assert first.files == second.files and first.spec == second.spec
    moved = tmp_path / "b" / "others"
    (tmp_path / "b" / "theirs").rename(moved)
    with pytest.raises(UsageError, match=r"holds other pairs \(origin.source 'theirs' -> 'others'\)"):
        import_pairs(moved, tmp_path / "2")
    (tmp_path / "a" / "theirs").rename(tmp_path / "a" / "kept")
    changed = a_source(form, tmp_path / "a" / "theirs")
    victim = next(path for path in sorted(changed.rglob("*")) if path.suffix in (".zip", ".npy", ".tar"))
    if form == "npy":
        np.save(victim, np.load(victim)[::-1].copy())
    else:
        victim.write_bytes(victim.read_bytes() + (bytes(512) if form == "fastgen" else b""))
        if form == "rfpp":
            _replaced(changed / "samples.zip", 0, png(bytes_of(1, (3, 4, 4), 9)[0]))
    with pytest.raises(UsageError, match=r"holds other pairs \(origin.*sha256"):
        import_pairs(changed, tmp_path / "1")


def test_what_is_asked_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, plain = a_source("npy", tmp_path / "labelled"), a_source("fastgen", tmp_path / "plain")

    def imported(source: Path, **how: Any) -> Imported:
        return import_pairs(source, tmp_path / f"{len(list(tmp_path.iterdir()))}", **how)

    assert imported(labelled).spec.classes == 3
    assert imported(labelled, classes=10).spec.classes == 10
    none = imported(labelled, classes=0)
    assert none.spec.classes == 0 and none.notes == ["labels are left out"]
    assert every(none.folder)[2] is None
    assert imported(plain, classes=0).spec.classes == 0
    assert imported(labelled, dtype="bfloat16").spec.dtype == "bfloat16"
    rounded = imported(labelled, dtype="uint8")
    assert torch.allclose(every(rounded.folder)[1], data(20, (3, 4, 4)), atol=0.5 / 127.5 + 1e-6)
    assert every(rounded.folder)[0].equal(noise(20, (3, 4, 4)))
    before = len(list(tmp_path.iterdir()))
    for source, how, words in (
        (labelled, {"classes": 1}, "its labels need 3 classes, found `classes` 1"),
        (labelled, {"classes": 2}, "its labels need 3 classes, found `classes` 2"),
        (plain, {"classes": 2}, "its pairs have no labels; leave `classes` out"),
        (labelled, {"classes": -1}, "classes: "),
        (labelled, {"dtype": "int8"}, "dtype: Input should be 'uint8', 'float16', 'bfloat16' or 'float32'"),
        (labelled, {"shard_size": 0}, "shard_size: Input should be greater than 0"),
        (RFPP, {"swap": True}, "its noise is drawn from records and can not be the data; leave out --swap"),
    ):
        with pytest.raises(UsageError) as caught:
            imported(source, **how)
        assert words in str(caught.value)
    with pytest.raises(UsageError, match="labelled: is the source itself"):
        import_pairs(labelled, tmp_path / "plain" / ".." / "labelled")
    assert len(list(tmp_path.iterdir())) == before and not (labelled / "store.json").exists()
    monkeypatch.setattr(sources, "_SHARD_BYTES", 5 * 2 * 4 * 48)
    small = imported(labelled)
    assert small.spec.shard_size == 5
    assert small.notes == ["a shard holds 5 pairs, so that it is made in little memory"]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UsageError, match=r"cannot be read \(Permission denied\)"):
        import_pairs(tmp_path, tmp_path / "store")


def test_one_pair_is_never_too_large() -> None:
    assert sources.fitting((10**6, 10**6), 1) == 1


def exportable(folder: Path, count: int = 40) -> PairStore:
    spec = PairSpec(
        count=count, shape=(3, 4, 4), dtype="uint8", seed=3, noise="pcg64", shard_size=16, classes=3
    )
    return make_store(folder, spec, data(count, spec.shape), torch.arange(count) % 3)


@pytest.mark.parametrize("form", ["rfpp", "npy"])
def test_an_export_that_fails_leaves_nothing_behind(
    tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing.Growing.store, "__defaults__", (1000,))
    monkeypatch.setattr(sources, "_BATCH_BYTES", 5000)
    store = exportable(tmp_path / "store")
    every(store)  # nothing of it is opened later
    (tmp_path / "out").mkdir()
    with watched() as calls:
        export_pairs(store, tmp_path / "out" / "whole", form)
    whole = content(tmp_path / "out" / "whole")
    assert len(calls.trace) > 20
    for number, (call, subject) in enumerate(calls.trace):
        for code in (errno.ENOSPC, errno.EIO):
            target = tmp_path / "out" / "new"
            with watched(number, code), pytest.raises((ResourceError, UsageError, OSError)) as caught:
                export_pairs(store, target, form)
            assert isinstance(caught.value, ResourceError), (call, subject)
            if target.exists():  # the last call: the folder could not be synced
                assert content(target) == whole and number >= len(calls.trace) - 3
                shutil.rmtree(target)
            assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["whole"]
            if code == errno.ENOSPC and call == "write":
                assert "disk full" in str(caught.value)


@pytest.mark.parametrize("form", ["rfpp", "npy"])
def test_an_export_of_a_damaged_store_leaves_nothing_behind(tmp_path: Path, form: Any) -> None:
    exportable(tmp_path / "store")
    shard = tmp_path / "store" / "shards" / "00001.safetensors"
    damage = bytearray(shard.read_bytes())
    damage[-1] ^= 1
    shard.unlink()
    shard.write_bytes(damage)
    with pytest.raises(ArtifactError, match=r"00001.safetensors: its SHA-256 does not match"):
        export_pairs(PairStore.open(tmp_path / "store"), tmp_path / "out" / "new", form)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["rfpp", "npy"])
def test_an_export_is_written_to_a_new_folder_only(tmp_path: Path, form: Any) -> None:
    store = exportable(tmp_path / "store")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link", "store"):
        with pytest.raises(UsageError, match=f"{name}: is there already; choose another name"):
            export_pairs(store, tmp_path / name, form)
    assert list((tmp_path / "folder").iterdir()) == []
    export_pairs(store, tmp_path / "new" / "inner", form)
    with pytest.raises(UsageError, match=r"unknown format 'rfp', did you mean 'rfpp'\? \(rfpp, npy\)"):
        export_pairs(store, tmp_path / "other", "rfp")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown format 'fastgen'"):
        export_pairs(store, tmp_path / "other", "fastgen")  # type: ignore[arg-type]


def test_what_is_read_of_fastgen_does_not_stay_mapped(tmp_path: Path) -> None:
    def mapped() -> set[str]:
        maps = Path("/proc/self/maps")
        return {line for line in maps.read_text().splitlines() if ".pth" in line} if maps.exists() else set()

    source = tar_file(tmp_path / "theirs.tar", samples(noise(9, LATENT), data(9, LATENT)))
    before = mapped()
    with fastgen.opened(source) as found:
        kept = [found.read([row]) for row in range(9)]
        assert mapped() <= before
    assert torch.equal(torch.cat([block.eps for block in kept]), noise(9, LATENT))
    with npy.opened(a_source("npy", tmp_path / "arrays")) as arrays:
        block = arrays.read([0, 19])
    assert torch.equal(block.x0, data(20, (3, 4, 4))[[0, 19]])
