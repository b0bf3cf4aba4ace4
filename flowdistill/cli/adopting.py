"""Commands for the models of others: bring one in, and ask whether it does what its card says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from flowdistill.cli import options
from flowdistill.cli.options import Device, Json, Verbose
from flowdistill.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from flowdistill.probing import Report


def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="the checkpoint", show_default=False)],
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="the model file to write, .safetensors", show_default=False)
    ],
    preset: Annotated[
        str | None,
        typer.Option("--preset", metavar="NAME", help="published network, like rf-cifar10, or its family"),
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option("--card", metavar="FILE", help="YAML with keys of the card, before all else"),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", metavar="KIND", help="ema or model; ema where the file has one"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a model file of a foreign checkpoint; nothing in it is executed.

    Reads EDM's pickles, checkpoints of RectifiedFlow, SlimFlow, rf++, SiT, DiT, LFM and torchcfm, and
    safetensors; checks every tensor against the network that it is to be; writes DEST, which must not be
    there. What a checkpoint does not say of itself is given by --preset or --card (docs/teachers.md).

    \b
    Examples:
      flowdistill import edm-cifar10-32x32-uncond-vp.pkl edm.safetensors
      flowdistill import checkpoint_8.pth rf.safetensors --preset rf-cifar10
    """
    from flowdistill import console, importing

    kind = options.one_of("--weights", weights, ("ema", "model"))
    made = importing.convert(
        source,
        destination,
        preset=preset,
        card=card,
        weights=cast("Literal['ema', 'model'] | None", kind),
    )
    facts = {
        "sha256": made.sha256,
        "tensors": made.tensors,
        "parameters": made.parameters,
        **made.card.model_dump(mode="json", exclude_none=True),
    }
    if as_json:
        options.print_json({"path": str(made.path), **facts})
        return
    console.facts(f"{made.path}: {facts['source']['family']}, {made.parameters:,} parameters", facts)
    console.lines(f"next: flowdistill probe {made.path}")


def probe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help=f"{options.MODEL_HELP}, or a recipe's file for its teacher",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="IMAGES", help="real data: a folder of images, .npz or .safetensors"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="the part that every stage asks before it works: exit 4 if wrong")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Ask a model whether it is the velocity field that its card says.

    Reads the model and asks for laws that hold whatever its data are: direction, clock, scale, marginals,
    and where those hold for the round trip, the effect of classes, and half precision. Writes nothing. What
    is wrong is named, with the keys of the card that would mend it (`flowdistill import MODEL NEW --card
    FILE`); the exit code is then 4.

    \b
    Examples:
      flowdistill probe builtin:shapes
      flowdistill probe edm.safetensors --data photos
    """
    from flowdistill import console, hardware, images, probing, teachers

    if strict and data is not None:
        raise UsageError("--strict asks without data; leave --data or --strict out")
    recipe = model.endswith((".yaml", ".yml"))
    reference = options.open_recipe(model).recipe.teacher if recipe else model
    opened = teachers.open_model(reference, hardware.resolve(device))
    if strict:
        probing.strict(opened, model)
        if as_json:
            options.print_json({"model": model, "wrong": False})
        else:
            console.lines(f"{model}: points the right way")
        return
    real = None if data is None else images.samples(data, opened.card.shape, probing.SAMPLES)
    report = probing.probe(opened, real)
    if as_json:
        options.print_json(_document(model, report))
    else:
        console.probe(model, report)
    if report.wrong:
        raise ArtifactError(f"{model}: {report.diagnosis}")


def _document(model: str, report: Report) -> dict[str, Any]:
    findings = [
        {"name": each.name, "verdict": each.verdict, "value": each.value, "text": each.text}
        for each in report.findings
    ]
    return {
        "model": model,
        "wrong": report.wrong,
        "diagnosis": report.diagnosis,
        "remedy": report.remedy,
        "findings": findings,
    }
