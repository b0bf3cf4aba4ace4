"""The command that draws samples of a model, or takes samples to their noise and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowdistill.boundary import tell
from flowdistill.cli import options, preview
from flowdistill.cli.options import Device, Json, Quiet, Verbose
from flowdistill.errors import UsageError


def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=options.MODEL_HELP)] = "builtin:shapes",
    nfe: Annotated[
        int | None,
        typer.Option(
            "--nfe",
            min=1,
            metavar="N",
            help="evaluations for a sample; left out, the model's own number, or 8",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=1, metavar="N", help="number of samples; of --invert, the most")
    ] = 64,
    solver: Annotated[
        str | None,
        typer.Option(
            "--solver",
            metavar="NAME",
            help="euler (if left out), heun, midpoint (rf-solver), rk4, ab2, midpoint-cached (fireflow), "
            "pec, dpm++2m, reinterpolate, reinterpolate-heun",
        ),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", metavar="FILE", help="what `flowdistill boss` wrote for this model"),
    ] = None,
    times: Annotated[
        str | None,
        typer.Option("--times", metavar="T,T", help="times of the steps, from 1 (noise) down to 0 (data)"),
    ] = None,
    inverted: Annotated[
        str | None,
        typer.Option(
            "--invert",
            metavar="FILE",
            help="take these samples to their noise and back: a folder of images, .npz or .safetensors",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="N,N",
            help="classes to draw in turn, or null for none; left out, all or, of --invert, the file's own",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="of the noise")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the files")] = Path(
        "runs/samples"
    ),
    force: Annotated[
        bool, typer.Option("--force", help="use a schedule that was made for another model")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw samples of a model.

    Reads a model, and a schedule if one is given. Writes samples.safetensors and, for images and points in
    the plane, grid.png, in place of those of an earlier call, and shows it where the terminal can (kitty,
    iTerm2, WezTerm, Ghostty). Sample i depends on the seed and i alone.

    With --invert, reads samples too. Writes their noises to noise.safetensors, what these are drawn as to
    samples.safetensors, and grid.png with the originals above; prints how far the two are apart.

    \b
    Examples:
      flowdistill sample analytic:ring --times 1,0.6,0.3,0 --solver heun --count 500 --out runs/ring
      flowdistill sample --invert pictures --solver heun --nfe 31 --out runs/inverted
    """
    from flowdistill import console, hardware, sampling, teachers

    wanted = _labels(labels)
    if times is not None and (nfe is not None or schedule is not None):
        raise UsageError("--times: says which steps there are; leave out --nfe and --schedule")
    opened = teachers.open_model(model, hardware.resolve(device))
    made_for = opened.card.nfe
    if times is not None:
        rule = sampling.timed(solver or "euler", times)
    elif schedule is not None:
        rule = sampling.scheduled(schedule, opened, solver, nfe, force)
    else:
        rule = sampling.by_default(opened, solver, nfe)
    if made_for not in (None, rule.nfe):
        tell(f"warning: {model} was made for {made_for} evaluations, not {rule.nfe}")
    with console.progress(quiet) as show:
        job = sampling.Job(opened, rule, count, wanted, seed, out, console.reporter("sample", show))
        trip = None if inverted is None else sampling.invert(job, inverted)
        files = sampling.sample(job) if trip is None else trip.files
    if as_json:
        facts = {"model": model, "digest": opened.digest, "solver": rule.solver.name, "nfe": rule.nfe}
        measured = {"count": count} if trip is None else trip.figures
        options.print_json({**facts, **measured, "seed": seed, "files": list(map(str, files))})
    elif trip is None:
        console.lines(f"{count} samples of {model}, {rule.nfe} evaluations each ({rule.solver.name})", *files)
    else:
        console.lines(
            f"{trip.count} samples of {inverted} to their noise and back by {model}, "
            f"{trip.nfe} and {rule.nfe} evaluations each ({rule.solver.name})",
            f"round trip   off by {trip.error:.3g}, root mean square",
            f"noise        |noise|^2 / d is {trip.noise:.3g}, of normal noise 1",
            *files,
        )
    if files[-1].suffix == ".png" and not (as_json or quiet):
        preview.preview(files[-1])


def _labels(text: str | None) -> list[int] | None:
    if text == "null":
        return None
    try:
        return [int(label) for label in text.split(",")] if text else []
    except ValueError:
        raise UsageError(
            f"--labels {text}: expected numbers with commas between them, as in 0,1, or null"
        ) from None
