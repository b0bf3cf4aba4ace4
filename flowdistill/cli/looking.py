"""Commands that look: at recipes, at artifacts, at the machine. None of them changes what it looks at."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flowdistill.boundary import Invocation
from flowdistill.cli import options
from flowdistill.cli.options import Device, Json, Out, Overrides, Quiet, Recipe, Seed, Shipped, Verbose
from flowdistill.errors import ArtifactError, UsageError


def status(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    seed: Seed = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say which stages of a recipe are done, stale (and why) or missing.

    Reads the recipe and the manifests of its stages; writes nothing.

    \b
    Examples:
      flowdistill status quickstart
      flowdistill status recipe.yaml -s reflow.steps=500
    """
    from flowdistill import console

    pipeline = options.open_recipe(recipe, overrides, seed, out)
    standings = pipeline.status()
    if as_json:
        stages = [
            {
                "stage": each.stage,
                "verb": each.verb,
                "state": each.state,
                "folder": str(each.folder),
                "inputs": dict(each.inputs),
                "reasons": [*each.conflicts, *each.waits],
            }
            for each in standings
        ]
        options.print_json({"recipe": str(pipeline.recipe.path), "out": str(pipeline.out), "stages": stages})
    else:
        console.status(standings)


def inspect(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="a file or folder, or builtin:NAME", show_default=False)
    ],
    grid: Annotated[
        Path | None, typer.Option("--grid", metavar="FILE", help="of pairs: write a PNG of some of them")
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what a file or folder is, and where it came from.

    Reads models, pairs, schedules, evaluations, samples, checkpoints, recipes, and folders of stages and
    runs; does not check their contents (see `flowdistill verify`) and writes nothing but the file of --grid.

    \b
    Examples:
      flowdistill inspect builtin:shapes
      flowdistill inspect runs/quickstart/pairs --grid pairs.png
    """
    from flowdistill import console, inspection
    from flowdistill.durable import atomic_write

    found = inspection.describe(path)
    if grid is not None:
        atomic_write(grid, inspection.grid(found.path))
    if as_json:
        options.print_json({"path": str(found.path), "kind": found.kind, **found.facts})
    else:
        console.facts(f"{found.path}: {found.kind}", found.facts)


def verify(
    context: typer.Context,
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a file, or a folder of a stage or run", show_default=False)
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="of pairs: make what is damaged again, bit for bit")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check that an artifact is what its maker wrote, byte for byte.

    Reads all files of a stage, of every stage of a run, or one file, and compares their SHA-256. Writes
    nothing; with --repair those files of a stage's pairs that are damaged or missing, and no others.

    \b
    Examples:
      flowdistill verify runs/quickstart
      flowdistill verify runs/quickstart/pairs --repair
    """
    from flowdistill import console, inspection

    repaired = _repair(context.obj, path, quiet) if repair else []
    files, problems = inspection.verify(path)
    if as_json:
        document = {"path": str(path), "files": files, "problems": problems}
        options.print_json({**document, "repaired": repaired} if repair else document)
    if problems:
        raise ArtifactError("\n".join(problems))
    if not as_json:
        again = [f"made again: {name}" for name in repaired] or (["nothing was damaged"] if repair else [])
        console.lines(f"{path}: {files} {'file' if files == 1 else 'files'}, as written", *again)


def _repair(invocation: Invocation, path: Path, quiet: bool) -> list[str]:
    from flowdistill import console, repairing
    from flowdistill.work import Stop

    invocation.stop = stop = Stop()
    with console.progress(quiet) as show:
        return repairing.repair(path, console.reporter("repair", show), stop)


def validate(
    recipe: Recipe, overrides: Overrides = None, as_json: Json = False, verbose: Verbose = False
) -> None:
    """Check a recipe without running it.

    Reads the recipe and reports all mistakes in it at once, each with line, column and the nearest right key.
    Files that it names need not be there yet, and are listed as missing. Writes nothing.

    \b
    Examples:
      flowdistill validate quickstart
      flowdistill validate recipe.yaml -s reflow.steps=500
    """
    from flowdistill import console, inspection

    found = options.read_recipe(recipe, overrides)
    facts, missing = inspection.recipe_facts(found), [str(each) for each in found.missing]
    if as_json:
        options.print_json({"recipe": recipe, **facts, "missing": missing})
    else:
        console.facts(f"{recipe}: no mistakes", facts)
        if missing:
            console.lines("not there, and needed before it runs:", *missing)


def schema(verbose: Verbose = False) -> None:
    """Print the JSON Schema of recipes, for editors.

    Reads nothing; writes to stdout.

    \b
    Examples:
      flowdistill schema > recipe.schema.json
      flowdistill schema | grep description
    """
    from flowdistill import recipe, stages

    options.print_json(recipe.json_schema(stages.verbs()))


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a recipe will cost before it is spent: pairs per second, hours, GB, memory.

    Reads the recipe and its inputs, and runs a few batches of each stage whose cost can be measured, on this
    device and in one process; writes nothing.

    \b
    Examples:
      flowdistill plan quickstart
      flowdistill plan recipe.yaml -s pairs.count=1000000
    """
    from flowdistill import console, hardware, planning

    pipeline = options.open_recipe(recipe, overrides, seed, out)
    with console.progress(quiet) as show:
        found = planning.plan(pipeline, hardware.resolve(device), show)
    if as_json:
        options.print_json(asdict(found))
    else:
        console.plan(found)


def doctor(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="where results are to go")] = Path("runs"),
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say whether this machine is ready: versions, devices, disk, teachers, optional packages.

    Reads what is installed and cached; writes one empty file where results are to go, and removes it.

    \b
    Examples:
      flowdistill doctor
      flowdistill doctor --out runs --json
    """
    from flowdistill import console, examination

    findings = examination.examine(out)
    if as_json:
        options.print_json([asdict(finding) for finding in findings])
    else:
        rows = [(each.what, each.state, each.found) for each in findings]
        console.table(("what", "state", "found"), rows)
    examination.conclude(findings)


def ls(as_json: Json = False, verbose: Verbose = False) -> None:
    """List the recipes that ship; their names stand wherever a command takes RECIPE.

    Reads the first line of each; writes nothing.

    \b
    Examples:
      flowdistill recipes ls
      flowdistill recipes ls --json
    """
    from flowdistill import console

    found: list[dict[str, Any]] = [
        {"name": name, "about": path.read_text("utf-8").partition("\n")[0].lstrip("# "), "path": str(path)}
        for name, path in options.shipped().items()
    ]
    if as_json:
        options.print_json(found)
    else:
        console.table(("name", "about"), [(each["name"], each["about"]) for each in found])


def show(name: Shipped, verbose: Verbose = False) -> None:
    """Print a recipe that ships.

    Reads the recipe; writes to stdout.

    \b
    Examples:
      flowdistill recipes show quickstart
      flowdistill recipes show ring > my.yaml
    """
    typer.echo(options.shipped_recipe(name).read_text("utf-8"), nl=False)


def copy(
    name: Shipped,
    destination: Annotated[
        Path, typer.Argument(metavar="DEST", help="a new file, or a folder to put it in", show_default=False)
    ],
    verbose: Verbose = False,
) -> None:
    """Copy a recipe that ships, to change it.

    Reads the recipe; writes DEST or, where that is a folder, the recipe's name in it. Never overwrites.

    \b
    Examples:
      flowdistill recipes copy quickstart my.yaml
      flowdistill recipes copy ring .
    """
    from flowdistill.durable import atomic_write

    source = options.shipped_recipe(name)
    target = destination / source.name if destination.is_dir() else destination
    if target.exists():
        raise UsageError(f"{target}: exists, and is not overwritten; choose another name")
    atomic_write(target, source.read_bytes())
    typer.echo(str(target))
