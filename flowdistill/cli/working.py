"""Commands that do work: the stages of recipes, all or one, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowdistill.boundary import Invocation, tell
from flowdistill.cli import options
from flowdistill.cli.options import (
    Device,
    Fresh,
    Json,
    Only,
    Out,
    Overrides,
    Procs,
    Quiet,
    Recipe,
    Seed,
    StageName,
    Verbose,
)
from flowdistill.errors import UsageError

if TYPE_CHECKING:
    from flowdistill.pipeline import Event, Finished, Pipeline

NfeList = Annotated[
    list[int] | None, typer.Option("--nfe", min=1, metavar="N", help="network evaluations; repeatable")
]


def run(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    procs: Procs = 1,
    seed: Seed = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do all stages of a recipe, in order.

    Reads the recipe and writes a folder for each stage, whose manifest comes last. What is done is skipped,
    what was interrupted continues, and what was made with other settings is refused without --fresh. Prints
    the table of what was measured.

    \b
    Examples:
      flowdistill run quickstart
      flowdistill run recipe.yaml -s reflow.steps=500 --out runs/short
    """
    pipeline = options.open_recipe(recipe, overrides, seed, out)
    again = _again(recipe, overrides, seed, out, device)
    _work(
        context.obj,
        pipeline,
        None,
        device,
        procs=procs,
        again=again,
        fresh=fresh,
        as_json=as_json,
        quiet=quiet,
    )


def stage_command(verb: str) -> Callable[..., None]:
    """The command of any verb that needs nothing of its own."""

    def command(
        context: typer.Context,
        recipe: Recipe,
        stage: StageName = None,
        only: Only = False,
        overrides: Overrides = None,
        out: Out = None,
        device: Device = "auto",
        procs: Procs = 1,
        seed: Seed = None,
        fresh: Fresh = False,
        as_json: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        pipeline = options.open_recipe(recipe, overrides, seed, out)
        target = pipeline.select(verb, stage)
        _work(
            context.obj,
            pipeline,
            target,
            device,
            procs=procs,
            again=_again(recipe, overrides, seed, out, device),
            only=only,
            fresh=fresh,
            as_json=as_json,
            quiet=quiet,
        )

    command.__doc__ = f"""Reads the recipe and the inputs of its stage '{verb}'; writes the stage's folder,
    its manifest last. Inputs that are not done are made first. {_TOGETHER.get(verb, _IN_STEP)}

    \b
    Examples:
      flowdistill {verb} recipe.yaml
      flowdistill {verb} recipe.yaml --procs 2 --seed 1 --out runs/seed1
    """
    return command


_IN_STEP = """Several processes, of --procs or a launcher such as
    torchrun, train on parts of each batch."""
_TOGETHER = {
    "pairs": """Any number of processes, of --procs, a
    launcher or started one by one, on this machine or on others that share the folder, each take the shards
    that no other has."""
}


def boss(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{options.RECIPE_HELP}; left out, --model")
    ] = None,
    nfe: NfeList = None,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=f"without a recipe: {options.MODEL_HELP}")
    ] = "builtin:shapes",
    stage: StageName = None,
    only: Only = False,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe or, without one, a model. Writes schedule-nfeN.json for every N, for `flowdistill sample
    --schedule`, and boss.safetensors with what they come from; without a recipe into a folder of runs/boss.
    Prints the times and what they gain over uniform steps.

    \b
    Examples:
      flowdistill boss --nfe 4
      flowdistill boss quickstart --nfe 2 --nfe 6 --out runs/boss-6
    """
    wanted = sorted(set(nfe or ()))
    if recipe is None:
        target: str | None = "boss"
        label = "-nfe-" + "-".join(map(str, wanted)) if wanted else ""
        settings = {"nfe": wanted} if wanted else {}
        pipeline = options.without_recipe("boss", settings, model, label, overrides, seed, out)
    else:
        pipeline = options.open_recipe(recipe, overrides, seed, out)
        target = pipeline.select("boss", stage)
        if wanted:  # the name that the override needs is known only now
            overrides = [*(overrides or ()), f"{target}.nfe={wanted}"]
            pipeline = options.open_recipe(recipe, overrides, seed, out)
    _work(context.obj, pipeline, target, device, only=only, fresh=fresh, as_json=as_json, quiet=quiet)


def evaluate(
    context: typer.Context,
    target: Annotated[
        str, typer.Argument(metavar="RECIPE|MODEL", help=f"{options.RECIPE_HELP}; or {options.MODEL_HELP}")
    ],
    stage: StageName = None,
    only: Only = False,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe, or a model to be evaluated as it is. Writes eval.json with every number and its
    interval, samples.safetensors with the rows behind them, and grid.png; without a recipe into a folder of
    runs/eval.

    \b
    Examples:
      flowdistill eval quickstart
      flowdistill eval builtin:shapes -s eval.samples=1000
    """
    if options.is_model(target):
        pipeline = options.without_recipe("eval", {"models": ["teacher"]}, target, "", overrides, seed, out)
        chosen: str | None = "eval"
    else:
        pipeline = options.open_recipe(target, overrides, seed, out)
        chosen = pipeline.select("eval", stage)
    _work(context.obj, pipeline, chosen, device, only=only, fresh=fresh, as_json=as_json, quiet=quiet)


OWN_COMMANDS: dict[str, Callable[..., None]] = {"boss": boss, "eval": evaluate}
"""Verbs whose command takes more than a recipe."""


def sample(
    context: typer.Context,
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
    count: Annotated[int, typer.Option("--count", min=1, metavar="N", help="number of samples")] = 64,
    solver: Annotated[
        str | None,
        typer.Option("--solver", metavar="NAME", help="euler (if left out), heun, midpoint (rf-solver), rk4"),
    ] = None,
    schedule: Annotated[
        Path | None,
        typer.Option("--schedule", metavar="FILE", help="what `flowdistill boss` wrote for this model"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="N,N", help="classes to draw in turn; left out, all")
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
    the plane, grid.png, in place of those of an earlier call. Sample i depends on the seed and i alone.

    \b
    Examples:
      flowdistill sample --nfe 8
      flowdistill sample analytic:ring --nfe 15 --solver heun --count 500 --out runs/ring
    """
    from flowdistill import console, hardware, sampling, teachers

    wanted = _labels(labels)
    opened = teachers.open_model(model, hardware.resolve(device))
    made_for = opened.card.nfe
    if schedule is None:
        rule = sampling.stepwise(solver or "euler", nfe or made_for or sampling.DEFAULT_NFE)
    else:
        rule = sampling.scheduled(schedule, opened, solver, nfe, force)
    if made_for not in (None, rule.nfe):
        tell(f"warning: {model} was made for {made_for} evaluations, not {rule.nfe}")
    with console.progress(quiet) as show:
        report = console.reporter("sample", show)
        files = sampling.sample(
            opened, rule, count=count, labels=wanted, seed=seed, folder=out, report=report
        )
    if as_json:
        facts = {"model": model, "digest": opened.digest, "solver": rule.solver.name, "nfe": rule.nfe}
        options.print_json({**facts, "count": count, "seed": seed, "files": list(map(str, files))})
    else:
        console.lines(f"{count} samples of {model}, {rule.nfe} evaluations each ({rule.solver.name})", *files)


def _labels(text: str | None) -> list[int]:
    try:
        return [int(label) for label in text.split(",")] if text else []
    except ValueError:
        raise UsageError(f"--labels {text}: expected numbers with commas between them, as in 0,1") from None


def _work(
    invocation: Invocation,
    pipeline: Pipeline,
    target: str | None,
    device: str,
    *,
    procs: int = 1,
    again: Sequence[str] = (),
    only: bool = False,
    fresh: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a stage, or all, and print what came out.

    `again` are the arguments for another process at the same recipe, of which there are to be `procs`.
    """
    from flowdistill import console, hardware, processes
    from flowdistill.pipeline import Finished
    from flowdistill.work import Stop

    invocation.stop = stop = Stop()
    finished: list[Finished] = []
    chosen = hardware.resolve(device)

    def in_processes(name: str) -> None:
        arguments = [pipeline.stages[name].verb, *again, "--stage", name, "--only"]
        processes.launch(arguments, procs, tell)

    if processes.launched() > 1:
        _check_shareable(pipeline, target, fresh or procs > 1)
    with (
        processes.joined(chosen, _is_collective(pipeline, target)) as world,
        console.progress(quiet or world.rank > 0) as show,
    ):

        def observe(event: Event) -> None:
            if isinstance(event, Finished):
                finished.append(event)
            if procs == 1 or not pipeline.can_share(event.stage):  # else the first process shows it
                show(event)

        pipeline.run(
            target,
            only=only,
            fresh=fresh,
            device=chosen,
            observe=observe,
            stop=stop,
            parallel=in_processes if procs > 1 else None,
            world=world,
        )
    if world.rank:
        return
    if as_json:
        options.print_json(_document(pipeline, finished))
    else:
        console.results(finished, whole=target is None)


def _again(
    recipe: str, overrides: Sequence[str] | None, seed: int | None, out: Path | None, device: str
) -> list[str]:
    """The arguments that name a recipe and what is changed of it."""
    named = [recipe, *(part for each in overrides or () for part in ("-s", each)), "--device", device]
    named += [] if seed is None else ["--seed", str(seed)]
    return named if out is None else [*named, "--out", str(out)]


def _is_collective(pipeline: Pipeline, target: str | None) -> bool:
    """Whether processes will have to be in step."""
    return any(pipeline.stages[name].collective for name in pipeline.needed(target))


def _check_shareable(pipeline: Pipeline, target: str | None, alone: bool) -> None:
    """Refuse what several processes that a launcher has started cannot do together."""
    for name in pipeline.needed(target):
        if not pipeline.can_share(name):
            raise UsageError(
                f"stage '{name}' is not for several processes: do it in one, and others under the launcher"
            )
    if alone:
        raise UsageError("--fresh and --procs are for one process: leave them out under a launcher")


def _document(pipeline: Pipeline, finished: list[Finished]) -> dict[str, Any]:
    stages = [
        {
            "stage": each.stage,
            "verb": each.verb,
            "folder": str(each.folder),
            "skipped": each.skipped,
            "digest": each.manifest.digest,
            "outputs": each.manifest.outputs,
            "figures": each.manifest.figures,
        }
        for each in finished
    ]
    return {"recipe": str(pipeline.recipe.path), "out": str(pipeline.out), "stages": stages}
