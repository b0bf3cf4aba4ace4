"""Students: a network that a recipe describes, beside the model that it is made after.

They live in that model's coordinates and imitate its data, so its card is theirs but for the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flowdistill.architectures import Budget, Published, Scaled, arguments
from flowdistill.conventions import Convention, Linear
from flowdistill.errors import UsageError

if TYPE_CHECKING:
    from flowdistill.architectures import Architecture, Student
    from flowdistill.teachers import Card, Model
    from flowdistill.work import Work

_SLIMFLOW = Convention(sign=-1, clock=Linear(scale=999.0, reversed=True), t_max=0.999)
"""What SlimFlow's networks are fed and return."""
CHOSEN = "student.json"


def card(like: Card, work: Work, **changes: Any) -> Card:
    """The card of a student that is made after a model: guidance, if there was any, is in the pairs."""
    own = {
        "parents": dict(work.parents),
        "settings": dict(work.settings),
        "nfe": None,
        "schedules": {},
        "guidance": None,
        "distilled": True,
        "figures": {},
        "notes": "",
    }
    return like.model_copy(update={**own, **changes})


def refuse_formula(name: str, key: str) -> None:
    """Raise `UsageError` where a student could not begin as this model; `key` is its place in the recipe."""
    if name.startswith("analytic:"):
        raise UsageError(
            f"{key}: '{name}' has no weights that a student could begin with; take a model that was trained"
        )


def continued(start: Model, work: Work, key: str, **changes: Any) -> Model:
    """A student that begins as another model; UsageError where that is a formula."""
    from flowdistill import teachers

    if start.card.architecture == "analytic":
        refuse_formula(start.card.arguments["name"], key)
    student = teachers.new(card(start.card, work, **changes))
    student.weights.load_state_dict(start.weights.state_dict())
    return student


def fresh(student: Student | Architecture, like: Model, work: Work, key: str, **changes: Any) -> Model:
    """A student with random weights, which depend on the seed alone.

    Raises `UsageError` where the description does not fit the model; `key` is its place in the recipe.
    """
    import torch

    from flowdistill import randomness, teachers

    described = _described(student, like, work, key)
    torch.manual_seed(randomness.key(work.seed, "weights"))
    return teachers.new(card(like.card, work, **{**described, **changes}))


def _described(student: Student | Architecture, like: Model, work: Work, key: str) -> dict[str, Any]:
    """Architecture, arguments and convention."""
    from flowdistill import sizing

    its = like.card
    if isinstance(student, Budget):
        return {"arguments": _within(student, like, work, key)}
    if isinstance(student, Scaled):
        _check_family(its, key)
        sizes = student.width, student.blocks
        return {"arguments": sizing.fitting(its.architecture, its.arguments, its.shape, *sizes)}
    if isinstance(student, Published):
        return _published(student, its, key)
    return {
        "architecture": student.name,
        "arguments": arguments(student, its.shape, its.classes),
        "convention": None,
        "null_label": None,
    }


def _within(budget: Budget, like: Model, work: Work, key: str) -> dict[str, Any]:
    """Arguments of the network that a budget allows; what is settled stays."""
    from flowdistill import artifact, sizing

    its, path = like.card, work.folder / CHOSEN
    _check_family(its, key)
    if path.exists():
        return dict(artifact.load_json(path)["arguments"])
    return dict(sizing.choose(its.architecture, its.arguments, its.shape, budget, work.device).arguments)


def settle(student: Student, work: Work, key: str) -> None:
    """Choose within a budget once, for whoever continues and for all processes: clocks differ."""
    from flowdistill import artifact, sizing

    path = work.folder / CHOSEN
    if not isinstance(student, Budget):
        return
    if work.world.rank == 0 and not path.exists():
        its = work.model("like").card
        _check_family(its, key)
        size = sizing.choose(its.architecture, its.arguments, its.shape, student, work.device)
        artifact.save_json(path, {"arguments": dict(size.arguments), "latency_ms": size.latency_ms})
    work.world.wait()


def _check_family(its: Card, key: str) -> None:
    from flowdistill import sizing

    if its.architecture not in sizing.FAMILIES:
        raise UsageError(
            f"{key}: nothing is known of smaller networks of '{its.architecture}', only of "
            f"{', '.join(sizing.FAMILIES)}; describe the student itself"
        )


def _published(student: Published, its: Card, key: str) -> dict[str, Any]:
    from flowdistill import networks

    architecture, published = networks.presets()[f"slimflow-{student.size}"]
    if len(its.shape) != 3 or its.shape[1] != its.shape[2]:
        raise UsageError(f"{key}: SlimFlow's networks are for square images, found shape {list(its.shape)}")
    channels, side, _ = its.shape
    if architecture == "ncsnpp":
        if its.classes:
            raise UsageError(
                f"{key}: SlimFlow's {student.size} has no classes, the teacher has {its.classes}"
            )
        sized: Mapping[str, Any] = {"num_channels": channels, "image_size": side}
    else:
        sized = {
            "in_channels": channels,
            "out_channels": channels,
            "img_resolution": side,
            "label_dim": its.classes,
        }
    return {
        "architecture": architecture,
        "arguments": {**published, **sized},
        "convention": _SLIMFLOW,
        "null_label": None,
    }


def candidates(student: Student, like: Model, work: Work) -> list[dict[str, Any]]:
    """Width, depth and cost of the networks among which a budget chooses, the chosen one marked.

    None where the recipe describes the student itself.
    """
    from flowdistill import networks, sizing

    if not isinstance(student, Budget):
        return []
    its, found = like.card, []
    family, chosen = sizing.FAMILIES[its.architecture], _within(student, like, work, work.stage)
    for size in sizing.candidates(its.architecture, its.arguments, its.shape):
        network = networks.build(its.architecture, size.arguments)
        found.append(
            {
                family.width: size.arguments[family.width],
                family.depth: size.arguments[family.depth],
                "parameters": size.parameters,
                "macs": size.macs,
                f"ms for {student.batch}": sizing.latency_ms(network, its.shape, student.batch, work.device),
                "chosen": size.arguments == chosen,
            }
        )
    return found
