"""A foreign checkpoint becomes one model file: its weights as they are, its card, and where it came from."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdistill import __version__, artifact, checkpoints, networks, teachers
from flowdistill.errors import ArtifactError, Diverged, RecipeError, UsageError, listed
from flowdistill.importing import families
from flowdistill.importing.layouts import Found, Wanted, find
from flowdistill.settings import check
from flowdistill.teachers import Card
from flowdistill.teachers.cards import Stanza
from flowdistill.yaml_nodes import read_file

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Imported", "Wanted", "convert"]


@dataclass(frozen=True)
class Imported:
    """What was made of a checkpoint."""

    path: Path
    card: Card
    sha256: str
    tensors: int
    parameters: int


def convert(
    source: Path,
    destination: Path,
    *,
    preset: str | None = None,
    card: Path | None = None,
    weights: Wanted | None = None,
) -> Imported:
    """Read `source` as data, check it against its architecture, and write the model file `destination`.

    What the file does not say is taken from `preset`, a published network, or from `card`, a YAML file with
    keys of a model card, which come before all else. Nothing is left behind if anything is wrong.

    Raises:
        UsageError: the destination is there already, or the preset or card is not known or not complete.
        ArtifactError: the file is damaged or hostile, or its weights are not those of the architecture.
    """
    _check_destination(destination)
    stanza = {} if card is None else read_stanza(card)
    known = {} if preset is None else families.card_of(preset)
    checkpoint = checkpoints.read(source)
    try:
        found = find(checkpoint, weights)
        _check_family(preset, known, found.card)
        known = _over(stanza, {**found.card, **_own_card(checkpoint, source), **known})
        if not {"architecture", "convention"} <= known.keys():
            known = _over(known, _recognised(found))
        families.check_architecture(preset, known)
        complete = _card(known, checkpoint, found)
        network = teachers.outline(complete, found.tensors)
        tensors = {**found.tensors, **_named(network, found.ordered)}
        _check_numbers(network, tensors)
    except (ArtifactError, UsageError) as error:
        text = str(error).removeprefix(f"{source}: ")
        raise type(error)(f"{source}: {text}") from None
    try:
        sha256 = complete.write(
            destination, {name: value.load() for name, value in tensors.items()}, dtype=None
        )
    except Diverged as error:
        detail = str(error).removeprefix(f"{destination}: ").removesuffix(", nothing was written")
        raise ArtifactError(f"{source}: {detail}; nothing was written") from None
    return Imported(
        destination,
        complete,
        sha256,
        len(tensors),
        sum(math.prod(each.shape) for each in network.parameters()),
    )


def read_stanza(path: Path) -> dict[str, Any]:
    """The keys of a model card in a YAML file; RecipeError with the place of every mistake."""
    with artifact.opened(path) as file:
        node, problems = read_file(file.read(), str(path))
    checked = check(Stanza, node, "")
    problems += checked if isinstance(checked, list) else []
    if problems or isinstance(checked, list):
        raise RecipeError(problems)
    return checked.model_dump(mode="json", exclude_unset=True)


def _check_destination(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: expected a name that ends in .safetensors")
    if path.exists():
        raise UsageError(f"{path}: is there already; choose another name, or delete it first")


def _own_card(checkpoint: checkpoints.Checkpoint, path: Path) -> dict[str, Any]:
    """The card in a file that flowdistill wrote."""
    if checkpoint.format != "safetensors":
        return {}
    header = artifact.read_header(path)
    if header:
        artifact.load_tensors(path)  # a file of ours has a seal, which must not be made anew over damage
    return Card.parse(header, path).model_dump(mode="json", exclude_unset=True) if header else {}


def _recognised(found: Found) -> dict[str, Any]:
    """The card of the one preset that has these names and shapes."""
    shapes = {name: tuple(value.shape) for name, value in found.tensors.items()}
    fitting = [name for name, expected in _shapes_of_presets(shapes) if expected == shapes]
    if len(fitting) == 1:
        return families.card_of(fitting[0])
    if fitting:
        raise UsageError(
            f"several networks have these weights; say which with --preset: {', '.join(fitting)}"
        )
    raise UsageError(
        f"its {len(shapes)} tensors ({listed(list(shapes)[:3])}, ...) are those of no preset; name one with "
        "--preset to see where it differs, or describe network and convention with --card (docs/teachers.md)"
    )


def _over(card: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """A user's card over what is known; convention, latent and the same network's arguments key by key."""
    known = dict(below)
    for key, value in card.items():
        beneath = known.get(key)
        joined = isinstance(value, Mapping) and isinstance(beneath, Mapping)
        if key == "arguments" and card.get("architecture", below.get("architecture")) != below.get(
            "architecture"
        ):
            joined = False
        known[key] = {**beneath, **value} if joined else value  # type: ignore[dict-item]
    return known


def _shapes_of_presets(names: Collection[str]) -> Iterator[tuple[str, dict[str, tuple[int, ...]]]]:
    """Names and shapes of the published networks of the architectures that have these names."""
    for name, (architecture, arguments) in networks.presets().items():
        if families.SIGNATURES[architecture] not in names:
            continue
        network = _empty(architecture, arguments)
        yield name, {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _card(known: Mapping[str, Any], checkpoint: checkpoints.Checkpoint, found: Found) -> Card:
    """The complete card, with the provenance."""
    content = {key: value for key, value in known.items() if key != "family"}
    if "shape" not in content or content["architecture"] in families.SIGNATURES:
        described = families.described(content["architecture"], content.get("arguments", {}))
        content = described | content
        if list(content["shape"]) != described["shape"]:
            raise UsageError(f"its card says shape {content['shape']}, its network has {described['shape']}")
        if content["classes"] > described["classes"]:
            raise UsageError(
                f"its card says {content['classes']} classes, its network has {described['classes']}"
            )
    content["source"] = known.get("source") or {
        "file": checkpoint.path.name,
        "sha256": checkpoint.sha256,
        "format": checkpoint.format,
        "family": known.get("family", "as its card says"),
        "weights": found.weights,
        "importer": __version__,
    }
    card = Card.parse(content, checkpoint.path)
    _check_channels(card)
    return card


def _check_channels(card: Card) -> None:
    """Numbers a channel are as many as channels, or one."""
    given: dict[str, tuple[float, ...]] = {}
    if card.latent is not None:
        given |= {"latent.scale": card.latent.scale, "latent.shift": card.latent.shift}
    if card.statistics is not None:
        given |= {"statistics.mean": card.statistics.mean, "statistics.std": card.statistics.std}
    for key, values in given.items():
        if len(values) not in (1, card.shape[0]):
            raise UsageError(f"its card's {key} has {len(values)} numbers for {card.shape[0]} channels")


def _check_family(preset: str | None, named: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Refuse a preset of another family than the file says it is."""
    if preset is not None and told.get("family") not in (None, named["family"]):
        raise UsageError(f"it is a file of {told['family']}, --preset {preset} is of {named['family']}")


def _check_numbers(network: nn.Module, tensors: Mapping[str, checkpoints.StoredTensor]) -> None:
    """Weights are floating-point numbers."""
    for name, _ in network.named_parameters():
        if "float" not in tensors[name].dtype:
            raise ArtifactError(f"'{name}' holds {tensors[name].dtype}, expected floating-point numbers")


def _named(
    network: nn.Module, average: Sequence[checkpoints.StoredTensor]
) -> dict[str, checkpoints.StoredTensor]:
    """An average without names, by the parameters that are trained, in the order of their registration."""
    trained = [(name, value) for name, value in network.named_parameters() if value.requires_grad]
    if average and len(trained) != len(average):
        raise ArtifactError(
            f"its average has {len(average)} tensors, the network {len(trained)} parameters; "
            "is it another network, or another --preset?"
        )
    named = dict(zip((name for name, _ in trained), average, strict=False))
    for name, value in trained:
        if name in named and tuple(value.shape) != named[name].shape:
            raise ArtifactError(
                f"in its average '{name}' has shape {list(named[name].shape)}, expected {list(value.shape)}; "
                "is it another network, or another --preset?"
            )
    return named


def _empty(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A network without values."""
    import torch

    with torch.device("meta"):
        return networks.build(architecture, arguments)
