"""Layouts of checkpoints: where in what a file holds the weights are, and what else it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeGuard

from flowdistill.checkpoints import PERSISTENT_OBJECT, Checkpoint, Record, StoredTensor
from flowdistill.errors import ArtifactError, UsageError, listed, quoted
from flowdistill.importing import families
from flowdistill.networks import dit

Wanted: TypeAlias = Literal["ema", "model"]
Tensors: TypeAlias = Mapping[str, StoredTensor]

_AVERAGES = ("ema", "ema_model", "ema_state_dict", "model_ema")
_TRAINED = ("model", "net_model", "model_dict", "model_state_dict", "state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and preconditioning wrappers put before every name."""
_EDM_NETWORKS = {"SongUNet": "songunet", "DhariwalUNet": "dhariwalunet"}


@dataclass(frozen=True)
class Found:
    """Weights by name and what is known of them; `card` has parts of a card, and `family`, as far as told."""

    tensors: Tensors
    weights: str
    card: Mapping[str, Any] = field(default_factory=dict)
    ordered: Sequence[StoredTensor] = ()
    """The average of the parameters without names, in the order of the network's own list."""


def find(checkpoint: Checkpoint, wanted: Wanted | None) -> Found:
    """The weights in a checkpoint: the average, unless the file has none or `wanted` says otherwise."""
    content = checkpoint.content
    if checkpoint.format == "safetensors":
        return _recognised(Found(_unprefixed(content["tensors"]), "unknown"), {})
    for holder in (content, *(content.values() if isinstance(content, Mapping) else ())):
        if _is_persistent(holder):
            return _edm(content, wanted)
    if not isinstance(content, Mapping):
        raise ArtifactError(f"holds {_what(content)}, expected a dict with weights in it")
    options = content.get("args")
    hints = dict(options.state) if isinstance(options, Record) and isinstance(options.state, Mapping) else {}
    if _is_state(content):
        return _recognised(Found(_unprefixed(content), "unknown"), hints)
    average = next((content[key] for key in _AVERAGES if key in content), None)
    trained = next((content[key] for key in _TRAINED if _is_state(content.get(key))), None)
    if isinstance(average, Mapping) and isinstance(average.get("shadow_params"), list):
        return _list_average(trained, average["shadow_params"], wanted)
    if wanted != "model" and _is_state(average):
        return _recognised(Found(_unprefixed(average), "ema"), hints)
    if wanted == "ema":
        raise UsageError(
            f"holds no averaged weights, only {listed(list(map(str, content)))}; --weights model"
        )
    if trained is None:
        raise ArtifactError(
            f"holds {listed(list(map(str, content)))} and no weights among them; expected one of "
            f"{', '.join((*_AVERAGES, *_TRAINED))}, or the weights alone"
        )
    return _recognised(Found(_unprefixed(trained), "model"), hints)


def _edm(content: Any, wanted: Wanted | None) -> Found:
    """EDM's snapshots, {ema: wrapper, ...}, and training states, {net: wrapper, ...}."""
    holders = content if isinstance(content, Mapping) else {"ema": content}
    key = next((key for key in ("ema", "net") if _is_persistent(holders.get(key))), None)
    if key is None:
        raise ArtifactError(
            f"holds EDM's objects under {listed(list(map(str, holders)))}, expected ema or net"
        )
    if wanted == "model" and key == "ema":
        raise UsageError("holds the averaged weights alone; leave --weights out")
    wrapper = holders[key]
    network = _members(wrapper, "_modules").get("model")
    if not _is_persistent(network) or network.arguments[0] not in _EDM_NETWORKS:
        name = network.arguments[0] if _is_persistent(network) else _what(network)
        raise ArtifactError(f"its network is {quoted(name)}, expected one of {', '.join(_EDM_NETWORKS)}")
    architecture = _EDM_NETWORKS[network.arguments[0]]
    arguments = _members(network, "_init_kwargs")
    for name, value in arguments.items():
        if not _plain(value):
            raise ArtifactError(f"argument '{name}' of its network is {_what(value)}, expected plain values")
    card = families.described(architecture, arguments)
    card |= families.FAMILIES["edm"].card
    card |= {"convention": families.edm_reading(wrapper.arguments[0], wrapper.state), "family": "EDM"}
    return Found(dict(_walk(network, "")), "ema" if key == "ema" else "model", card)


def _walk(module: Record, prefix: str) -> Iterator[tuple[str, StoredTensor]]:
    """Parameters and buffers of a module that was saved whole, as its state dict would name them."""
    for group in ("_parameters", "_buffers"):
        for name, value in _members(module, group).items():
            if isinstance(value, StoredTensor):
                yield prefix + name, value
    for name, child in _members(module, "_modules").items():
        if isinstance(child, Record) and isinstance(child.state, Mapping):
            yield from _walk(child, f"{prefix}{name}.")
        elif child is not None:
            raise ArtifactError(f"module '{prefix}{name}' is {_what(child)}")


def _members(module: Record, group: str) -> dict[str, Any]:
    """A mapping by name in the attributes of a module that was saved whole."""
    members = module.state.get(group) or {}
    if not isinstance(members, Mapping) or not all(isinstance(name, str) for name in members):
        raise ArtifactError(f"'{group}' of one of its modules is {_what(members)}, expected a dict by name")
    return dict(members)


def _plain(value: Any) -> bool:
    """Whether a value can stand in a card."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _list_average(trained: Any, average: list[Any], wanted: Wanted | None) -> Found:
    """The layout of score_sde, which RectifiedFlow and SlimFlow share: an average that is a list."""
    if not _is_state(trained):
        raise ArtifactError("holds an average without names and no 'model' that would name it")
    if not all(isinstance(value, StoredTensor) for value in average):
        raise ArtifactError("its average 'shadow_params' holds more than tensors")
    tensors = _unprefixed(trained)
    return Found(tensors, "model") if wanted == "model" else Found(tensors, "ema", ordered=tuple(average))


def _recognised(found: Found, hints: Mapping[str, Any]) -> Found:
    """SiT, DiT and LFM's transformer, whose arguments the shapes of their weights tell."""
    if families.SIGNATURES["dit"] not in found.tensors:
        return found
    shapes = {name: value.shape for name, value in found.tensors.items()}
    try:
        arguments = dit.infer(shapes)
    except ValueError as error:
        raise ArtifactError(f"its names are those of a DiT, but {error}") from None
    if arguments["in_channels"] == 8 and arguments["depth"] == 1:
        raise ArtifactError("is a refiner of FlowTurbo, which corrects a velocity and is none itself")
    card = families.described("dit", {key: value for key, value in arguments.items() if value is not None})
    if "path_type" in hints:
        sit = families.FAMILIES["sit"]
        card |= {**sit.card, "convention": families.sit_reading(hints), "family": sit.title}
    elif "label_dropout" in hints:
        card |= families.card_of("lfm")
    return Found(found.tensors, found.weights, card)


def _unprefixed(tensors: Tensors) -> Tensors:
    """Names without what wrappers put before each of them."""
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            return _unprefixed({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _is_state(value: Any) -> TypeGuard[Tensors]:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(each, StoredTensor) for name, each in value.items())
    )


def _is_persistent(value: Any) -> TypeGuard[Record]:
    return isinstance(value, Record) and value.name == PERSISTENT_OBJECT and isinstance(value.state, Mapping)


def _what(value: Any) -> str:
    return f"a {value.name}" if isinstance(value, Record) else f"a {type(value).__name__}"
