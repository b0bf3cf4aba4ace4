"""Pair data sets of other toolkits, to and from stores of ours; schedules for other programs.

    rfpp     rf++: samples.zip, z.zip and images_labels.csv     there and back; 32 bytes of noise a pair
    npy      RectifiedFlow, SlimFlow: z0.npy, z1.npy, label.npy    there and back
    fastgen  FastGen: KEY.latent.pth and KEY.noise.pth, in .tar shards or folders    there only

Schedules, which only go out, are in `schedules`.

Nothing that a file holds is executed, and no name in an archive is used as a path. Where noise is kept as
numbers, it has to look like noise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from flowdistill import artifact, hardware
from flowdistill.errors import MissingInput, UsageError, unknown
from flowdistill.exchange import fastgen, npy, orientation, rfpp
from flowdistill.exchange.schedules import export_schedule
from flowdistill.exchange.sources import Source, describe, fill
from flowdistill.pairstore import PairSpec, PairStore

__all__ = ["Imported", "export_pairs", "export_schedule", "import_pairs", "recognise"]

_OPENED: dict[str, Callable[[Path], AbstractContextManager[Source]]] = {
    "rfpp": rfpp.opened,
    "npy": npy.opened,
    "fastgen": fastgen.opened,
}
_EXPORTS = {"rfpp": rfpp.export, "npy": npy.export}
_EXPECTED = (
    "samples.zip and z.zip (rf++), z0.npy and z1.npy (RectifiedFlow), KEY.latent.pth or .tar (FastGen)"
)


@dataclass(frozen=True)
class Imported:
    """A store that was made of another toolkit's pairs."""

    folder: Path
    format: str
    spec: PairSpec
    files: dict[str, str]
    """Files of the store, relative to it, and their SHA-256."""
    notes: list[str]
    """What the user should know: what was left out, rounded, or could not be checked."""


def recognise(source: Path) -> str | None:
    """Whose pairs these are, by the names of the files alone; None if nobody's."""
    if source.is_file():
        return "fastgen" if source.suffix == ".tar" else None
    if not source.is_dir():
        return None
    names = {each.name for each in source.iterdir()}
    if {rfpp.SAMPLES, rfpp.NOISES} & names:
        return "rfpp"
    if {npy.NOISE, npy.DATA} & names:
        return "npy"
    tensors = (fastgen.DATA, fastgen.NOISE)
    if any(name in tensors or name.endswith((".tar", *(f".{each}" for each in tensors))) for name in names):
        return "fastgen"
    nested = any((source / name / inner).exists() for name in names for inner in (npy.NOISE, npy.DATA))
    return "npy" if nested else None


def import_pairs(
    source: Path,
    folder: Path,
    *,
    swap: bool = False,
    force: bool = False,
    classes: int | None = None,
    dtype: str | None = None,
    shard_size: int = 1024,
) -> Imported:
    """Make the store `folder` of the pairs in `source`, or continue to.

    `swap` exchanges noise and data; `force` takes noise that is not N(0, 1). `classes` is the number of
    classes, by default what the labels need; 0 leaves the labels out. x0 is stored as `dtype`, by default
    without loss. `shard_size` is a maximum: shards of large pairs hold fewer.

    Raises:
        MissingInput: there is no such source, or a file of it is missing.
        UsageError: it is nobody's format, its noise is not noise, or `folder` holds something else.
        ArtifactError: a file is damaged or hostile, or does not fit to the others.
        ResourceError: the disk is full or fails.
    """
    form = _form(source)
    if folder.resolve() == source.resolve():
        raise UsageError(f"{folder}: is the source itself; choose another name for the store")
    with _OPENED[form](source) as given:
        found, notes = _oriented(given, swap), list(given.notes)
        facts: dict[str, JsonValue] = {}
        if found.noise == "stored":
            distance, doubts = orientation.check(found, swap=swap, force=force)
            facts = {"swapped": swap, "noise_ks": round(distance, 3)}
            notes += doubts
        spec = describe(found, classes=classes, dtype=dtype, shard_size=shard_size, found=facts)
        if found.classes and not spec.classes:
            notes.append("labels are left out")
        if spec.shard_size < shard_size:
            notes.append(f"a shard holds {spec.shard_size} pairs, so that it is made in little memory")
        started = datetime.now(UTC)
        files = fill(folder, spec, found)
        _declare(folder, source, spec, files, started)
        return Imported(folder, form, spec, files, notes)


def export_pairs(store: PairStore, folder: Path, form: Literal["rfpp", "npy"]) -> list[Path]:
    """Write a store's pairs as another toolkit keeps them, into the new folder `folder`; the files in it.

    What other toolkits have no place for, such as errors and numbers of evaluations, is left out. Nothing is
    left behind if anything is wrong.

    Raises:
        UsageError: the folder is there already, or these pairs have no place in that format.
        ArtifactError: the store is damaged.
        ResourceError: the disk is full or fails.
    """
    if form not in _EXPORTS:
        raise UsageError(unknown("format", form, _EXPORTS))
    return _EXPORTS[form](store, folder)


def _form(source: Path) -> str:
    if not source.exists():
        raise MissingInput(f"{source}: no such file or folder")
    try:
        form = recognise(source)
    except OSError as error:
        raise UsageError(f"{source}: cannot be read ({error.strerror})") from error
    if form is None:
        raise UsageError(f"{source}: holds no pairs of a known toolkit; expected {_EXPECTED}")
    return form


def _declare(folder: Path, source: Path, spec: PairSpec, files: dict[str, str], started: datetime) -> None:
    """Write the manifest, which makes the store an input for the stages of recipes, if there is none."""
    if (folder / artifact.MANIFEST).exists():
        return
    artifact.Manifest(
        stage=folder.name,
        verb="import",
        settings=dict(spec.origin),
        inputs={source.name: str(spec.origin["sha256"])},
        outputs=files,
        seed=spec.seed,
        dtype=spec.dtype,
        started=started,
        finished=datetime.now(UTC),
        figures={"pairs": spec.count},
        **hardware.describe("cpu"),
    ).write(folder)


def _oriented(source: Source, swap: bool) -> Source:
    if swap and source.noise == "pcg64":
        raise UsageError(
            f"{source.path}: its noise is drawn from records and can not be the data; leave out --swap"
        )
    return source.swapped() if swap else source
