"""Commands for the models of others: bring one in, and ask whether it does what its card says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from flowdistill.cli import options
from flowdistill.cli.options import Device, Json, Verbose
from flowdistill.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from flowdistill.probing import Report

_PAIRS = ("rfpp", "npy")
_SCHEDULES = ("diffusers", "comfyui", "sigmas")


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="a checkpoint, or a folder of pairs", show_default=False)
    ],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DEST", help="a .safetensors file; of pairs a folder", show_default=False),
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
    swap: Annotated[
        bool, typer.Option("--swap", help="of pairs: take noise for data and data for noise")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="of pairs: take noise that is not N(0, 1)")] = False,
    classes: Annotated[
        int | None,
        typer.Option("--classes", min=0, metavar="N", help="of pairs: left out, as many as the labels need"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a model file of a foreign checkpoint, or a store of foreign pairs; nothing in them is executed.

    Reads EDM's pickles, checkpoints of RectifiedFlow, SlimFlow, rf++, SiT, DiT, LFM and torchcfm, and
    safetensors; checks every tensor against the network that it is to be; writes DEST, which must not be
    there. What a checkpoint does not say of itself is given by --preset or --card (docs/teachers.md).
    Reads pairs of rf++ (samples.zip, z.zip), RectifiedFlow and SlimFlow (z0.npy, z1.npy) and FastGen
    (.latent.pth, .noise.pth); checks which of the two is the noise (docs/pairs.md).

    \b
    Examples:
      flowdistill import checkpoint_8.pth rf.safetensors --preset rf-cifar10
      flowdistill import cifar10-rfpp runs/pairs/cifar10
    """
    from flowdistill import console, exchange, importing

    if exchange.recognise(source):
        of_models = {"--preset": preset, "--card": card, "--weights": weights}
        _refuse_options(of_models, f"{source} holds pairs")
        _import_pairs(source, destination, swap=swap, force=force, classes=classes, as_json=as_json)
        return
    of_pairs = {"--swap": swap or None, "--force": force or None, "--classes": classes}
    _refuse_options(of_pairs, f"{source} holds no pairs")
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


def _refuse_options(given: Mapping[str, object], because: str) -> None:
    wrong = [name for name, value in given.items() if value is not None]
    if wrong:
        raise UsageError(f"{', '.join(wrong)}: not here, since {because}")


def _import_pairs(
    source: Path, folder: Path, *, swap: bool, force: bool, classes: int | None, as_json: bool
) -> None:
    from flowdistill import console, exchange

    made = exchange.import_pairs(source, folder, swap=swap, force=force, classes=classes)
    if as_json:
        facts = made.spec.model_dump(mode="json")
        options.print_json({"path": str(folder), "format": made.format, "notes": made.notes, **facts})
        return
    console.facts(f"{folder}: {made.spec.count} pairs of {made.format}", made.spec.flat())
    console.lines(f"next: flowdistill inspect {folder} --grid pairs.png", *made.notes)


def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="folder of a store of pairs or of a training, or a schedule",
            show_default=False,
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(metavar="DEST", help="a new folder or file, as --as wants it", show_default=False),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            "--as",
            metavar="FORMAT",
            help="of pairs: rfpp (rf++) or npy (RectifiedFlow, SlimFlow); "
            "of a schedule: diffusers, comfyui or sigmas",
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            "--ema", metavar="STD", help="of a training with post_hoc: the average of this width, like 0.075"
        ),
    ] = None,
    carried: Annotated[
        list[Path] | None,
        typer.Option(
            "--schedule",
            metavar="FILE",
            help="of a model: write it with this schedule in its card, for sample and eval; repeatable",
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option("--shift", metavar="S", help="of --as sigmas: for a scheduler that has this shift"),
    ] = None,
    mu: Annotated[
        float | None,
        typer.Option(
            "--mu", metavar="MU", help="of --as sigmas: for one that shifts dynamically, by exp(MU)"
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write pairs or a schedule for other programs, or a model of another average than the shipped one.

    Reads a finished store of pairs and writes the folder DEST, which must not be there: for rf++ samples.zip,
    z.zip and images_labels.csv, for RectifiedFlow and SlimFlow z0.npy, z1.npy and label.npy. Of a schedule
    file of `boss`, diffusers is a folder with a scheduler and the sigmas for it, comfyui the line for the
    node ManualSigmas, and sigmas a JSON list (docs/export.md). With --ema, reads the averages that a training
    has kept (`post_hoc` in its recipe) and writes the model file DEST. With --schedule, reads a model and
    writes it to DEST with these schedules in its card.

    \b
    Examples:
      flowdistill export runs/recipe/pairs z-pairs --as npy
      flowdistill export runs/recipe/boss/schedule-nfe4.json four-steps --as diffusers
    """
    if sum(each is not None for each in (form, ema, carried)) != 1:
        raise UsageError(
            "expected --as FORMAT for pairs or a schedule, --ema STD for a training, or --schedule FILE for "
            "a model"
        )
    shifts = {"--shift": shift, "--mu": mu}
    if carried is not None:
        _refuse_options(shifts, "--schedule is for a model")
        _export_with_schedules(source, destination, carried, as_json)
        return
    if form in _SCHEDULES:
        _export_schedule(source, destination, form, shift, mu, as_json)
        return
    if form is None:
        _refuse_options(shifts, "--ema is for a training")
        _export_average(source, destination, cast(float, ema), as_json)
    else:
        options.one_of("--as", form, (*_PAIRS, *_SCHEDULES))
        _refuse_options(shifts, f"--as {form} is for pairs")
        _export_pairs(source, destination, form, as_json)


def _export_with_schedules(model: Path, destination: Path, files: list[Path], as_json: bool) -> None:
    from flowdistill import console, sampling

    digest = sampling.carry(str(model), files, destination)
    if as_json:
        options.print_json({"path": str(destination), "schedules": list(map(str, files)), "sha256": digest})
    else:
        console.lines(f"{destination}: {model} with {len(files)} schedules in its card")


def _export_average(stage: Path, destination: Path, std: float, as_json: bool) -> None:
    from flowdistill import console
    from flowdistill.training import averages

    digest = averages.export(stage, destination, std)
    if as_json:
        options.print_json({"path": str(destination), "ema": std, "sha256": digest})
    else:
        console.lines(f"{destination}: {stage} averaged with width {std:g}")


def _export_pairs(source: Path, destination: Path, form: str, as_json: bool) -> None:
    from flowdistill import console, exchange
    from flowdistill.pairstore import PairStore

    if source.is_file():
        raise UsageError(
            f"--as {form}: is for a store of pairs, {source} is a file; "
            f"those of a schedule are {', '.join(_SCHEDULES)}"
        )
    store = PairStore.open(source)
    files = exchange.export_pairs(store, destination, cast("Literal['rfpp', 'npy']", form))
    if as_json:
        options.print_json({"path": str(destination), "format": form, "files": list(map(str, files))})
    else:
        console.lines(f"{destination}: {len(store)} pairs as {form}", *files)


def _export_schedule(
    source: Path, destination: Path, form: str, shift: float | None, mu: float | None, as_json: bool
) -> None:
    from flowdistill import console
    from flowdistill.exchange import schedules

    chosen = cast("Literal['diffusers', 'comfyui', 'sigmas']", form)
    made = schedules.export_schedule(source, destination, chosen, shift=shift, mu=mu)
    if as_json:
        facts = {"files": list(map(str, made.files)), "steps": made.steps, "sigmas": made.sigmas}
        options.print_json({"path": str(destination), "format": form, **facts, "read_back": made.read_back})
        return
    by = f", read back by {made.read_back}" if made.read_back else ""
    steps = "1 Euler step" if made.steps == 1 else f"{made.steps} Euler steps"
    shown: dict[str, list[object]] = {
        "diffusers": [*made.files, "next: docs/export.md shows how a pipeline takes them"],
        "comfyui": [schedules.comfyui(made.sigmas), "for the node ManualSigmas; the sampler is euler"],
        "sigmas": ["next: pipe(..., sigmas=...), as in docs/export.md"],
    }
    console.lines(f"{destination}: {steps} as {form}{by}", *shown[form])


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
