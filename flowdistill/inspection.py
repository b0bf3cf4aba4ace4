"""What a file or folder is, where it came from, and whether it is whole.

Kinds are told by what a file says of itself, not by its name. Nothing here imports torch, apart from looking
into stores of pairs and checking a lone tensor file byte by byte.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import artifact, teachers
from flowdistill.errors import ArtifactError, MissingInput
from flowdistill.pipeline import STARTED, Pipeline
from flowdistill.recipe import Recipe, load
from flowdistill.stages import Stage, verbs

if TYPE_CHECKING:
    from torch import Tensor


STORE = "store.json"
"""What a store of pairs is told by."""
_THUMBNAILS, _COLUMNS = 64, 8
_POINTS = 4096
_BINS = 20


@dataclass(frozen=True)
class Description:
    """What something is, in a few words, and its facts in JSON types."""

    path: Path
    kind: str
    facts: dict[str, Any]


def grid(folder: Path) -> bytes:
    """PNG of samples of a store of pairs, evenly spaced over it; latents are decoded by their pipeline.

    Raises `UsageError` where they are not images or points, and what opening the store raises.
    """
    from flowdistill import pictures
    from flowdistill.pairstore import PairStore

    store = PairStore.open(folder)
    most = _POINTS if len(store.spec.shape) == 1 else _THUMBNAILS
    stride = max(1, len(store) // most)
    x0 = store.batch(range(0, len(store), stride)[:most])[1]
    return pictures.grid(x0 if pictures.drawable(store.spec.shape) else _decoded(folder, x0), _COLUMNS)


def _decoded(folder: Path, x0: Tensor) -> Tensor:
    """Latents as images, by the autoencoder of the pipeline that they come from; others as they are."""
    if not (folder / STARTED).is_file():
        return x0
    location = artifact.load_json(folder / STARTED)["locations"]["model"]
    name = location if isinstance(location, str) else location["name"]
    if not name.startswith(teachers.PIPELINE):
        return x0
    from flowdistill.teachers import hub, latents

    return latents.Decoder(hub.locate(name.removeprefix(teachers.PIPELINE), "vae"))(x0)


def describe(reference: str) -> Description:
    """What a path, or `builtin:NAME`, is.

    Raises `MissingInput` where there is nothing, `ArtifactError` for what flowdistill does not read.
    """
    path = teachers.locate(reference) if reference.split(":")[0] == "builtin" else Path(reference)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise MissingInput(f"{path}: no such file or folder")
    if path.suffix in (".yaml", ".yml"):
        return Description(path, "recipe", recipe_facts(Pipeline(load(path, verbs())).recipe))
    return _json(path) if path.suffix == ".json" else _tensors(path)


def recipe_facts(recipe: Recipe[Stage]) -> dict[str, Any]:
    """Seed, folder, teacher, and each stage with what its references lead to."""
    stages = {
        stage.name: {
            "verb": stage.verb,
            **{key: value for key, value in recipe.references[stage.name].items() if value},
        }
        for stage in recipe.stages
    }
    return {"seed": recipe.seed, "out": str(recipe.out), "teacher": recipe.teacher, "stages": stages}


def verify(path: Path) -> tuple[int, list[str]]:
    """How many files were checked against their SHA-256, and what is wrong with them, one line each."""
    if path.is_dir():
        if (path / STORE).is_file() and not (path / artifact.MANIFEST).exists():
            return _verify_unfinished(path)
        manifests = _manifests(path)
        problems = [line for folder, manifest in manifests.items() for line in manifest.verify(folder)]
        # The manifests themselves were checked when they were read.
        return sum(1 + len(manifest.outputs) for manifest in manifests.values()), problems
    if not path.exists():
        raise MissingInput(f"{path}: no such file or folder")
    try:
        artifact.load_json(path) if path.suffix == ".json" else artifact.load_tensors(path)
    except ArtifactError as error:
        return 1, [str(error)]
    return 1, []


def _verify_unfinished(folder: Path) -> tuple[int, list[str]]:
    from flowdistill.pairstore import PairStore

    store = PairStore.open(folder, finished=False)
    return 2 + len(store.committed), store.verify()


def _manifests(path: Path) -> dict[Path, artifact.Manifest]:
    """Folder -> manifest, of a stage's folder or of all finished stages in a run's folder."""
    folders = [path] if _is_stage(path) else sorted(each for each in path.iterdir() if _is_stage(each))
    finished = [folder for folder in folders if (folder / artifact.MANIFEST).exists()]
    if not finished:
        raise MissingInput(f"{path}: no finished stage here ({artifact.MANIFEST} is missing)")
    return {folder: artifact.Manifest.read(folder) for folder in finished}


def _is_stage(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (artifact.MANIFEST, STARTED))


def _folder(path: Path) -> Description:
    if (path / artifact.MANIFEST).is_file():
        manifest = artifact.Manifest.read(path)
        facts = {"digest": manifest.digest, **manifest.model_dump(mode="json")}
        if (path / "model.safetensors").is_file():
            facts["model"] = _tensors(path / "model.safetensors").facts
        if (path / STORE).is_file():
            facts["store"] = _store(path)
        return Description(path, f"finished stage '{manifest.verb}'", facts)
    if (path / STORE).is_file():
        return Description(path, "unfinished store of pairs", _store(path))
    if (path / STARTED).is_file():
        return Description(path, "unfinished stage", artifact.load_json(path / STARTED))
    stages = {}
    for folder in sorted(each for each in path.iterdir() if _is_stage(each)):
        done = (folder / artifact.MANIFEST).is_file()
        stages[folder.name] = artifact.Manifest.read(folder).digest if done else "unfinished"
    if not stages:
        raise ArtifactError(f"{path}: neither a stage's folder nor one with stages in it")
    return Description(path, f"run with {len(stages)} stages", {"stages": stages})


def _store(folder: Path) -> dict[str, Any]:
    """What is in a store of pairs, as far as it is made."""
    from flowdistill.pairstore import PairStore

    store = PairStore.open(folder, finished=False)
    spec = store.spec
    facts: dict[str, Any] = {"shards": f"{len(store.committed)} of {spec.shards}", **spec.flat()}
    done = store.committed_indices()
    if not len(done):
        return facts
    if spec.classes:
        counts = store.column("labels", done).long().bincount(minlength=spec.classes).tolist()
        facts["pairs of each class"] = counts
    for name in ("distance", "error"):
        if name in spec.columns():
            facts[name] = _spread(store.column(name, done).double())
    return facts


def _spread(values: Tensor) -> dict[str, Any]:
    """Quantiles and a histogram of numbers [n]."""
    import torch

    low, high = float(values.min()), float(values.max())
    edges = torch.linspace(low, high, _BINS + 1).tolist()
    counts = torch.histc(values, _BINS, low, high).long().tolist() if high > low else [len(values)]
    ranks = values.sort().values
    quantiles = {f"p{q:02d}": float(ranks[int(q / 100 * (len(ranks) - 1))]) for q in (5, 50, 95)}
    return {"mean": float(values.mean()), **quantiles, "least": low, "most": high} | {
        "histogram": {"edges": edges, "counts": counts}
    }


def _json(path: Path) -> Description:
    content = artifact.load_json(path)
    if path.name == STARTED:
        return Description(path, "what a stage is made from", content)
    if "verb" in content:
        return Description(path, f"manifest of a finished stage '{content['verb']}'", content)
    if "times" in content:
        return Description(path, f"schedule of {len(content['times']) - 1} steps", content)
    kind = content.pop("kind", "JSON of flowdistill")
    return Description(path, str(kind), content)


def _tensors(path: Path) -> Description:
    if path.suffix != ".safetensors":
        raise ArtifactError(
            f"{path}: not an artifact; those are folders, .safetensors, .json, and recipes in .yaml"
        )
    found = artifact.layout(path)
    kind, header = _kind(found), dict(found.header)
    header.pop("kind", None)
    types = Counter(entry.dtype for entry in found.tensors.values())
    facts = {
        "sha256": artifact.sha256(path),
        "bytes": path.stat().st_size,
        "tensors": ", ".join(f"{count} {dtype}" for dtype, count in types.most_common()),
        "values": sum(math.prod(entry.shape) for entry in found.tensors.values()),
    }
    return Description(path, kind, {**facts, **header})


def _kind(found: artifact.Layout) -> str:
    header = found.header
    if found.seal is None:
        return "safetensors of another maker"
    if "architecture" in header:
        return "classifier" if header.get("kind") == "classifier" else "model"
    if "step" in header and "key" in header:
        return f"training checkpoint at step {header['step']}"
    return {"pairs": "shard of pairs", "schedule": "costs and paths of schedules"}.get(
        str(header.get("kind")), str(header.get("kind", "tensors"))
    )
