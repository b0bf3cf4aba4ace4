"""Models: a velocity field in canonical coordinates, its card, and how a reference becomes one.

References: `builtin` or `builtin:NAME` (ships with the package), `analytic:NAME` with options (closed form),
the path of a `model.safetensors`, or the folder of a stage that made one. Importing this package does not
import torch, so that a recipe's inputs are identified before anything heavy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput, UsageError, unknown
from flowdistill.recipe import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

Reference = str | Mapping[str, Any]
ANALYTIC: Mapping[str, tuple[str, int]] = {
    "gaussian": ("dim", 2),
    "mixture": ("dim", 2),
    "ring": ("components", 8),
}
"""Closed-form teachers: name -> their one option, an integer, and its default."""
ASSETS = Path(str(resources.files("flowdistill"))) / "assets"
DEFAULT = "shapes"


class Card(Settings):
    """What a model is: enough to rebuild, use and judge it from its one file."""

    format: Literal[1] = 1
    kind: Literal["velocity", "classifier"] = Field("velocity", description="what the network returns")
    architecture: str = Field(description="file of flowdistill/networks that holds the class")
    arguments: dict[str, Any] = Field(default_factory=dict, description="its constructor's arguments")
    shape: tuple[int, ...] = Field(description="shape of one sample, [C, H, W] for images")
    classes: int = Field(0, ge=0, description="number of classes; 0 is unconditional")
    data: str | None = Field(None, description="data set that the model imitates, where we can draw from it")
    nfe: int | None = Field(None, description="number of evaluations that the model was trained for")
    parents: dict[str, str] = Field(
        default_factory=dict, description="SHA-256 of the artifacts it was made from"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="section of the recipe that made it")
    licence: str = "Apache-2.0"
    notes: str = ""
    figures: dict[str, Any] = Field(
        default_factory=dict, description="measured properties that belong to the file"
    )

    def write(self, path: Path, state: Mapping[str, Tensor], dtype: str = "float32") -> None:
        """Write a model file: `state` in `dtype`, this card in the header."""
        import torch

        kept = {
            name: value.to(getattr(torch, dtype)) if value.is_floating_point() else value
            for name, value in state.items()
        }
        artifact.save_tensors(path, kept, self.model_dump(mode="json"))

    @classmethod
    def parse(cls, header: Mapping[str, Any], path: Path) -> Card:
        """The card of a model file's header."""
        try:
            return cls.model_validate_json(json.dumps(header))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(
                f"{path}: not a flowdistill model, header key '{where}': {first['msg']}; "
                "`flowdistill inspect` shows what the file is"
            ) from error


@dataclass(frozen=True)
class Model:
    """A network that is used as velocity field `(x [B, *shape], t [B], labels [B] | None) -> [B, *shape]`."""

    card: Card
    network: nn.Module
    digest: str
    device: str = "cpu"

    @property
    def field(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The velocity field, for solvers: no dropout, no gradient."""
        import torch

        network = self.network.eval()

        def velocity(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            with torch.inference_mode():
                v: Tensor = network(x, t, labels)
            return v

        return velocity

    def labels(self, seed: int, indices: Sequence[int]) -> Tensor | None:
        """Labels [B] of samples, each a function of (seed, index) alone; None without classes."""
        from flowdistill import randomness

        if not self.card.classes:
            return None
        drawn = randomness.integers(seed, "labels", indices, self.card.classes)
        return drawn.to(self.device)


def locate(reference: str) -> Path:
    """File of a reference that is a file: a built-in model, a model file, a stage's folder."""
    if reference == "builtin" or reference.startswith("builtin:"):
        name = reference.partition(":")[2] or DEFAULT
        known = sorted(file.stem for file in ASSETS.glob("*.safetensors") if "-" not in file.stem)
        if name not in known:
            raise UsageError(unknown("built-in teacher", name, known))
        return ASSETS / f"{name}.safetensors"
    path = Path(reference)
    scheme, colon, _ = reference.partition(":")
    if colon and not path.exists():
        raise UsageError(unknown("kind of teacher", scheme, ("builtin", "analytic")) + ", or give a path")
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise MissingInput(
            f"{path}: no such model; expected a model.safetensors, a stage's folder, or builtin:{DEFAULT}"
        )
    return path


def identify(reference: Reference) -> str:
    """SHA-256 that changes whenever the model does; raises what `open_model` raises for the reference."""
    name, options = _split(reference)
    if name.startswith("analytic:"):
        return artifact.digest({"analytic": name, **_size(name, options)})
    return artifact.sha256(_file(name, options))


def open_model(reference: Reference, device: str = "cpu") -> Model:
    """Open a model for use on `device`, its weights in float32.

    Raises `UsageError` for unknown names and options, `MissingInput` where there is no file and
    `ArtifactError` where its content is not what its card says.
    """
    name, options = _split(reference)
    if not name.startswith("analytic:"):
        return load(_file(name, options), device)
    from flowdistill import analytic

    arguments = _size(name, options)
    ((option, size),) = arguments.items()
    flow = getattr(analytic, name.partition(":")[2])((size,) if option == "dim" else size)
    card = Card(
        architecture="analytic",
        arguments={"name": name, **arguments},
        shape=flow.shape,
        classes=flow.classes,
        data=name,
        notes="closed form, no weights",
    )
    return Model(card, flow.to(device), identify(reference), device)


def load(path: Path, device: str = "cpu") -> Model:
    """Open a model file."""
    from flowdistill import networks

    tensors, header = artifact.load_tensors(path)
    card = Card.parse(header, path)
    digest = artifact.sha256(path)
    network = networks.build(card.architecture, card.arguments)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if expected != found:
        wrong = sorted(expected.items() ^ found.items())[0][0]
        raise ArtifactError(
            f"{path}: tensor '{wrong}' has shape {found.get(wrong, 'none')}, "
            f"architecture '{card.architecture}' expects {expected.get(wrong, 'none')}"
        )
    network.load_state_dict({name: value.float() for name, value in tensors.items()})
    return Model(card, network.to(device).eval().requires_grad_(False), digest, device)


def _file(name: str, options: Mapping[str, Any]) -> Path:
    """The file of a teacher that has one, and so no options."""
    if options:
        raise UsageError(f"teacher {name}: takes no options, found {', '.join(map(repr, options))}")
    return locate(name)


def _size(name: str, options: Mapping[str, Any]) -> dict[str, int]:
    """The one option of an analytic teacher, by name, its default filled in."""
    kind = name.partition(":")[2]
    if kind not in ANALYTIC:
        raise UsageError(unknown("analytic teacher", kind, ANALYTIC))
    option, default = ANALYTIC[kind]
    for key, value in options.items():
        if key != option:
            raise UsageError(unknown(f"option of teacher {name}", key, (option,)))
        if type(value) is not int or not 1 <= value <= 4096:
            raise UsageError(f"teacher {name}: expected {key} from 1 to 4096, found {value!r}")
    return {option: options.get(option, default)}


def _split(reference: Reference) -> tuple[str, dict[str, Any]]:
    if isinstance(reference, str):
        return reference, {}
    options = dict(reference)
    return str(options.pop("name")), options
