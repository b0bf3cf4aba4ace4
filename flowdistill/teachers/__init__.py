"""Models: a velocity field in canonical coordinates, its card, and how a reference becomes one.

References: `builtin` or `builtin:NAME` (ships with the package), `analytic:NAME` with options (closed form),
`diffusers:PATH-OR-ID` (a pipeline), the path of a `model.safetensors`, or the folder of a stage that made
one. Importing this package does not import torch, so that a recipe's inputs are identified before anything
heavy is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput, UsageError, quoted, unknown
from flowdistill.guidance import Guidance
from flowdistill.settings import Settings
from flowdistill.teachers.cards import Card

__all__ = ["ANALYTIC", "Card", "Model", "identify", "load", "locate", "new", "open_model"]

if TYPE_CHECKING:
    from torch import Tensor, nn

    from flowdistill.schedule import Schedule
    from flowdistill.solvers import Solver

Reference = str | Mapping[str, Any]
ANALYTIC: Mapping[str, tuple[str, int]] = {
    "gaussian": ("dim", 2),
    "mixture": ("dim", 2),
    "ring": ("components", 8),
}
"""Closed-form teachers: name -> their one option, an integer, and its default."""
ASSETS = Path(str(resources.files("flowdistill"))) / "assets"
DEFAULT = "shapes"
SCHEMES = ("builtin", "analytic", "diffusers")
PIPELINE = "diffusers:"


@dataclass(frozen=True)
class Model:
    """A network that is used as velocity field `(x [B, *shape], t [B], labels [B] | None) -> [B, *shape]`."""

    card: Card
    network: nn.Module
    digest: str
    device: str = "cpu"
    probe: bool = False
    """Whether it has to prove itself before compute is spent on it."""
    folder: Path | None = None
    """Of the pipeline that it is part of, where its autoencoder is."""

    @property
    def field(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The velocity field, for solvers: guided as the card says, no dropout, no gradient."""
        import torch

        return torch.inference_mode()(self.velocity)

    @property
    def velocity(self) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
        """The same field with gradients."""
        network, guidance = self.network.eval(), self.card.guidance

        def velocity(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            v: Tensor = network(x, t, labels)
            if guidance is None or labels is None or not guidance.needs_null:
                return v
            if guidance.interval != (0.0, 1.0) and not guidance.applies(t).any():
                return v
            return guidance.combine(v, network(x, t, self.null(labels)), t)

        return velocity

    def carried(self, nfe: int) -> tuple[Solver, Schedule] | None:
        """How its card says that it is sampled in so many evaluations; None where it says nothing."""
        from flowdistill.solvers import recorded

        found = self.card.schedules.get(str(nfe))
        return None if found is None else recorded(found, str(found["schedule"]))

    @property
    def passes(self) -> int:
        """Times that the network is called for one evaluation of the field."""
        return 2 if self.card.guidance is not None and self.card.guidance.needs_null else 1

    def forward_passes(
        self, solver: Solver, schedule: Schedule, inverse: bool = False, start: float = 0.0
    ) -> int:
        """Calls of the network for one sample: with guidance two an evaluation, where it applies.

        Times of the schedule's 0 to 1 stand for `start` to 1.
        """
        import torch

        from flowdistill.solvers import integrate, nfe

        guidance = self.card.guidance
        if guidance is None or self.passes == 1 or not self.card.classes:
            return nfe(solver, schedule, inverse)
        asked: list[int] = []

        def count(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
            asked.append(1 + int(guidance.applies(start + (1 - start) * t).any()))
            return x

        integrate(count, torch.zeros(1, 1), schedule, solver, inverse=inverse)
        return sum(asked)

    @property
    def weights(self) -> nn.Module:
        """The network under its maker's names, without what makes it canonical."""
        from flowdistill.teachers.canonical import Canonical

        return self.network.network if isinstance(self.network, Canonical) else self.network

    def null(self, labels: Tensor) -> Tensor | None:
        """What stands for no condition in place of `labels` [B]."""
        null = self.card.null_label
        return None if null is None else labels.new_full(labels.shape, null)

    def guided(self, guidance: Guidance | None) -> Model:
        """The model under other guidance, None its own; UsageError where it cannot have it."""
        if guidance is None:
            return self
        _check_guidance(guidance, self.card)
        return replace(self, card=self.card.model_copy(update={"guidance": guidance}))

    def labels(self, seed: int, indices: Sequence[int]) -> Tensor | None:
        """Labels [B] of samples, each a function of (seed, index) alone; None without classes."""
        from flowdistill import randomness

        if not self.card.classes:
            return None
        drawn = randomness.integers(seed, "labels", indices, self.card.classes)
        return drawn.to(self.device)

    def pixels(self, x0: Tensor) -> Tensor | None:
        """Pictures [B, C, H, W] in [-1, 1] of samples; None of latents whose autoencoder is not at hand."""
        if self.folder is not None and self.card.latent is not None:
            from flowdistill.teachers.latents import Decoder

            return Decoder(self.folder, self.device)(x0).cpu()
        if self.card.latent is None:
            return x0
        return None if self.card.latent.vae else self.card.latent.decode(x0)

    def write(self, path: Path, dtype: str | None = "float32") -> None:
        """Write the model's file, its weights in `dtype` or, with None, each as it is."""
        self.card.write(path, self.weights.state_dict(), dtype)


class Options(Settings):
    """What a recipe can say of a teacher that has a file: `teacher: {name: PATH, guidance: {scale: 2}}`."""

    guidance: Guidance | None = Field(None, description="in place of the card's")
    probe: bool = Field(
        True, description="false: trust the card of a foreign model without asking the network"
    )

    @property
    def changes(self) -> dict[str, Any]:
        """What makes another velocity field of the file."""
        return {} if self.guidance is None else {"guidance": self.guidance.model_dump(mode="json")}


def new(card: Card) -> Model:
    """A model with random weights, from torch's global generator."""
    from flowdistill import networks

    return Model(card, _canonical(card, networks.build(card.architecture, card.arguments)), digest="")


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
        raise UsageError(unknown("kind of teacher", scheme, SCHEMES) + ", or give a path")
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
    if name.startswith(PIPELINE):
        from flowdistill.teachers import pipelines

        chosen, own = _options(name, options, Options, pipelines.Options)
        return _digest(pipelines.identify(name.removeprefix(PIPELINE), own), chosen)
    (chosen,) = _options(name, options, Options)
    return _digest(artifact.sha256(locate(name)), chosen)


def open_model(reference: Reference, device: str = "cpu") -> Model:
    """Open a model for use on `device`, its weights in float32.

    Raises `UsageError` for unknown names and options, `MissingInput` where there is no file and
    `ArtifactError` where its content is not what its card says.
    """
    name, options = _split(reference)
    if name.startswith("analytic:"):
        return _closed_form(name, options, device)
    if name.startswith(PIPELINE):
        from flowdistill.teachers import pipelines

        chosen, own = _options(name, options, Options, pipelines.Options)
        opened = pipelines.open_pipeline(name.removeprefix(PIPELINE), own)
        network = _canonical(opened.card, opened.network).to(device).eval().requires_grad_(False)
        found = Model(opened.card, network, identify(reference), device, folder=opened.folder)
    else:
        (chosen,) = _options(name, options, Options)
        found = load(locate(name), device)
        found = replace(found, digest=_digest(found.digest, chosen))
    try:
        guided = found.guided(chosen.guidance or found.card.guidance)
    except UsageError as error:
        raise UsageError(f"teacher {name}: {error}") from None
    return replace(guided, probe=chosen.probe and found.card.foreign)


def _check_guidance(guidance: Guidance, card: Card) -> None:
    """Refuse guidance that the model cannot have."""
    if not card.classes:
        raise UsageError("guidance needs a model with classes or prompts, this one has none")
    if guidance.channels is not None and guidance.channels > card.shape[0]:
        raise UsageError(f"guidance.channels is {guidance.channels}, the model has {card.shape[0]}")
    predicted = card.convention.prediction if card.convention else "velocity"
    if guidance.rescale is not None and predicted != "velocity":
        raise UsageError(f"guidance.rescale is for networks that predict velocity, this one: {predicted}")


def _closed_form(name: str, options: Mapping[str, Any], device: str) -> Model:
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
    return Model(card, flow.to(device), artifact.digest({"analytic": name, **arguments}), device)


def load(path: Path, device: str = "cpu") -> Model:
    """Open a model file."""
    from accelerate import init_empty_weights

    from flowdistill import networks

    tensors, header = artifact.load_tensors(path)
    card = Card.parse(header, path)
    outline(card, tensors, f"{path}: ")
    with init_empty_weights():
        network = networks.build(card.architecture, card.arguments)
    put(network, tensors)
    canonical = _canonical(card, network).to(device).eval().requires_grad_(False)
    return Model(card, canonical, artifact.sha256(path), device)


def outline(card: Card, tensors: Mapping[str, Any], where: str = "") -> nn.Module:
    """The network of a card without values, whose weights are to be `tensors`, by name.

    Raises `ArtifactError`, beginning with `where`, for a card whose network cannot be built or is another
    one: the first name or shape that differs is named.
    """
    import torch

    from flowdistill import networks

    try:
        with torch.device("meta"):
            network = networks.build(card.architecture, card.arguments, 2 * len(tensors) + 1000)
    except ArtifactError as error:
        raise ArtifactError(f"{where}{error}") from error
    what = f"{where}architecture '{card.architecture}'"
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [name for name in expected if name in found and expected[name] != found[name]]
    if wrong:
        name = wrong[0]
        detail = f"expects '{name}' as {list(expected[name])}, found {list(found[name])}"
    elif missing:
        detail = f"expects '{missing[0]}' {list(expected[missing[0]])}, which is not there"
    elif extra:
        detail = f"does not know '{extra[0]}' {list(found[extra[0]])}"
    else:
        return network
    raise ArtifactError(
        f"{what} {detail} (of {len(expected)} tensors {len(missing)} are missing and {len(wrong)} have "
        f"another shape; {len(extra)} are unknown)"
    )


def put(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the tensors the weights of a network that was built empty, as float32.

    They are copied only where type or memory layout differ from the network's.
    """
    import torch

    placed = {}
    for name, place in network.state_dict().items():
        value = tensors[name]
        if value.is_floating_point():
            value = value.float()
        if place.ndim == 4 and place.stride() != value.stride():
            value = torch.empty_strided(place.shape, place.stride(), dtype=value.dtype).copy_(value)
        placed[name] = value
    network.load_state_dict(placed, assign=True)


def _canonical(card: Card, network: nn.Module) -> nn.Module:
    if card.convention is None:
        return network
    from flowdistill.teachers.canonical import Canonical

    return Canonical(network, card.convention)


def _digest(file: str, options: Options) -> str:
    return artifact.digest({"file": file, **options.changes}) if options.changes else file


def _options(name: str, options: Mapping[str, Any], *kinds: type[Settings]) -> tuple[Any, ...]:
    """The options of a teacher, each where it belongs."""
    known = {key: kind for kind in kinds for key in kind.model_fields}
    for key in options:
        if key not in known:
            raise UsageError(unknown(f"option of teacher {name}", key, known))
    try:
        return tuple(
            kind.model_validate_json(json.dumps({k: v for k, v in options.items() if known[k] is kind}))
            for kind in kinds
        )
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UsageError(f"teacher {name}: {key}: {first['msg']}, found {quoted(first['input'])}") from None


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
