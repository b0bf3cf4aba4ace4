"""Commands that do work: the stages of recipes, all or one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowdistill.boundary import Invocation, tell
from flowdistill.cli import options
from flowdistill.cli.options import (
    Device,
    Fresh,
    Json,
    MaxTime,
    Only,
    Out,
    Overrides,
    Procs,
    ProveResume,
    Quiet,
    Recipe,
    Seed,
    StageName,
    Verbose,
)
from flowdistill.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from flowdistill.pipeline import Event, Finished, Pipeline
    from flowdistill.work import Stop

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
    max_time: MaxTime = None,
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
        max_time,
        procs=procs,
        again=again,
        fresh=fresh,
        as_json=as_json,
        quiet=quiet,
    )


def stage_command(verb: str) -> Callable[..., None]:
    """The command of any verb that trains, and needs nothing of its own."""

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
        prove_resume: ProveResume = False,
        max_time: MaxTime = None,
        as_json: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        pipeline = options.open_recipe(recipe, overrides, seed, out)
        _work(
            context.obj,
            pipeline,
            pipeline.select(verb, stage),
            device,
            max_time,
            procs=procs,
            again=_again(recipe, overrides, seed, out, device),
            only=only,
            fresh=fresh,
            prove_resume=prove_resume,
            as_json=as_json,
            quiet=quiet,
        )

    command.__doc__ = f"""Reads the recipe and the inputs of its stage '{verb}'; writes the stage's folder,
    its manifest last. Inputs that are not done are made first. Several processes, of --procs or a launcher
    such as torchrun, train on parts of each batch.

    \b
    Examples:
      flowdistill {verb} recipe.yaml
      flowdistill {verb} recipe.yaml --procs 2 --seed 1 --out runs/seed1
    """
    return command


def pairs(
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
    max_time: MaxTime = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads the recipe and the inputs of its stage 'pairs'; writes the stage's folder, its manifest last.
    Inputs that are not done are made first. Any number of processes, of --procs, a launcher or started one by
    one, on this machine or on others that share the folder, each take the shards that no other has.

    \b
    Examples:
      flowdistill pairs recipe.yaml
      flowdistill pairs recipe.yaml --procs 2 --seed 1 --out runs/seed1
    """
    pipeline = options.open_recipe(recipe, overrides, seed, out)
    _work(
        context.obj,
        pipeline,
        pipeline.select("pairs", stage),
        device,
        max_time,
        procs=procs,
        again=_again(recipe, overrides, seed, out, device),
        only=only,
        fresh=fresh,
        as_json=as_json,
        quiet=quiet,
    )


def boss(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help=f"{options.RECIPE_HELP}; left out, --model")
    ] = None,
    nfe: NfeList = None,
    latency_budget: Annotated[
        str | None,
        typer.Option(
            "--latency-budget",
            metavar="TIME",
            help="in place of --nfe, without a recipe: as many evaluations as one sample may take, like 20ms",
        ),
    ] = None,
    straighten: Annotated[
        bool,
        typer.Option(
            "--straighten",
            help="without a recipe: then train the model on the chords of its schedules; -s "
            "straighten.steps=N says how long",
        ),
    ] = False,
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help=f"without a recipe: {options.MODEL_HELP}")
    ] = "builtin:shapes",
    refine: Annotated[
        str | None,
        typer.Option(
            "--refine",
            metavar="knots|coefficients",
            help="make the best of them better by rollouts: its times, or its coefficients too",
        ),
    ] = None,
    stage: StageName = None,
    only: Only = False,
    overrides: Overrides = None,
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    max_time: MaxTime = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe or, without one, a model. Writes schedule-nfeN.json for every N, for `flowdistill sample
    --schedule`, and boss.safetensors with what they come from; without a recipe into a folder of runs/boss.
    Prints the times and what they gain over uniform steps. With --straighten, a model that was trained for
    them follows in the folder `straighten`.

    \b
    Examples:
      flowdistill boss --nfe 4
      flowdistill boss --nfe 4 --straighten
    """
    wanted = sorted(set(nfe or ()))
    if latency_budget is not None:
        if recipe is not None or wanted:
            raise UsageError("--latency-budget: is for --model, and in place of --nfe: leave those out")
        wanted = [_evaluations_within(latency_budget, model, device)]
    if straighten:
        if recipe is not None:
            raise UsageError("--straighten: is for --model; a recipe has a stage `straighten`")
        wanted = wanted or [4]
    refined = {"refine": refine} if refine else {}
    if recipe is None:
        target: str | None = "straighten" if straighten else "boss"
        label = "-nfe-" + "-".join(map(str, wanted)) if wanted else ""
        settings = {"nfe": wanted} if wanted else {}
        stages = [{"boss": {**settings, **refined}}, *(_straightening(settings) if straighten else ())]
        pipeline = options.without_recipe("boss", stages, model, label, overrides, seed, out)
    else:
        pipeline = options.open_recipe(recipe, overrides, seed, out)
        target = pipeline.select("boss", stage)
        given = {**({"nfe": wanted} if wanted else {}), **refined}
        if given:  # the name that the override needs is known only now
            overrides = [*(overrides or ()), *(f"{target}.{key}={value}" for key, value in given.items())]
            pipeline = options.open_recipe(recipe, overrides, seed, out)
    _work(
        context.obj, pipeline, target, device, max_time, only=only, fresh=fresh, as_json=as_json, quiet=quiet
    )


def _straightening(nfe: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that follow `boss`: the model's paths, as many as in the paper, and a training on them."""
    training = {"batch_size": 64, "optimizer": {"warmup": 100, "decay": "cosine"}, "ema": {"decay": 0.998}}
    return [
        {"pairs": {"name": "paths", "count": 5000, "path": {"schedule": "boss"}}},
        {"straighten": {"schedule": "boss", "steps": 2000, **nfe, **training}},
    ]


def _evaluations_within(budget: str, model: str, device: str) -> int:
    """How many evaluations a sample may take: measured, one sample at a time."""
    import re

    from flowdistill import hardware, sizing, teachers
    from flowdistill.stages.boss import Boss

    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(ms|s)", budget)
    if found is None or not float(found[1]):
        raise UsageError(f"--latency-budget {budget}: expected a time like 20ms or 0.5s")
    opened = teachers.open_model(model, hardware.resolve(device))
    once = sizing.latency_ms(opened.network, opened.card.shape, 1, opened.device) * opened.passes
    milliseconds = float(found[1]) * (1000 if found[2] == "s" else 1)
    if milliseconds < once:
        raise UsageError(f"--latency-budget {budget}: one evaluation of {model} takes {once:.3g} ms here")
    fitting = int(milliseconds / once)
    tell(f"{model}: an evaluation takes {once:.3g} ms, so {fitting} fit into {budget}")
    grid = int(Boss.model_fields["grid"].default)
    if fitting > grid:
        tell(f"{grid} evaluations, the steps of the fine trajectory, are as good as exact, and are taken")
    return min(fitting, grid)


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
    procs: Procs = 1,
    seed: Seed = None,
    fresh: Fresh = False,
    max_time: MaxTime = None,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe, or a model to be evaluated as it is. Writes eval.json with every number and its
    interval, samples.safetensors with the rows behind them, and grid.png; without a recipe into a folder of
    runs/eval. Several processes, of --procs or a launcher, take the batches in turn, and find the same.

    \b
    Examples:
      flowdistill eval quickstart
      flowdistill eval builtin:shapes -s eval.samples=1000 --procs 2
    """
    if options.is_model(target):
        stages = [{"eval": {"models": ["teacher"]}}]
        pipeline = options.without_recipe("eval", stages, target, "", overrides, seed, out)
        chosen: str | None = "eval"
    else:
        pipeline = options.open_recipe(target, overrides, seed, out)
        chosen = pipeline.select("eval", stage)
    _work(
        context.obj,
        pipeline,
        chosen,
        device,
        max_time,
        procs=procs,
        again=_again(target, overrides, seed, out, device),
        only=only,
        fresh=fresh,
        as_json=as_json,
        quiet=quiet,
    )


OWN_COMMANDS: dict[str, Callable[..., None]] = {"pairs": pairs, "boss": boss, "eval": evaluate}
"""The commands of verbs that do not train."""


def _work(
    invocation: Invocation,
    pipeline: Pipeline,
    target: str | None,
    device: str,
    max_time: str | None,
    *,
    procs: int = 1,
    again: Sequence[str] = (),
    only: bool = False,
    fresh: bool,
    prove_resume: bool = False,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a stage, or all, and print what came out.

    `again` are the arguments for another process at the same recipe, of which there are to be `procs`.
    """
    from flowdistill import console, processes

    invocation.stop = stop = options.time_limit(max_time)
    if processes.launched() > 1:
        alone = fresh or procs > 1 or prove_resume
        _check_shareable(pipeline, [target] if only and target else pipeline.needed(target), alone)
    doing = _Doing(pipeline, device, procs, again, stop, quiet)
    if prove_resume:
        assert target is not None
        _prove(doing, target, only, fresh, as_json)
        return
    finished = doing.stages(target, only, fresh)
    if finished is None:
        return
    if as_json:
        options.print_json(_document(pipeline, finished))
    else:
        console.results(finished, whole=target is None)


@dataclass(frozen=True)
class _Doing:
    """How the stages of a recipe are to be done."""

    pipeline: Pipeline
    device: str
    procs: int
    again: Sequence[str]
    stop: Stop
    quiet: bool

    def stages(self, target: str | None, only: bool, fresh: bool) -> list[Finished] | None:
        """Do a stage and what it needs, or all; None in all processes of a launcher but the first."""
        from flowdistill import console, hardware, processes
        from flowdistill.pipeline import Finished

        finished: list[Finished] = []
        chosen = hardware.resolve(self.device)
        with (
            processes.joined(chosen, _is_collective(self.pipeline, target)) as world,
            console.progress(self.quiet or world.rank > 0) as show,
        ):

            def observe(event: Event) -> None:
                if isinstance(event, Finished):
                    finished.append(event)
                if self.procs == 1 or not self.pipeline.can_share(event.stage):  # else the first process does
                    show(event)

            self.pipeline.run(
                target,
                only=only,
                fresh=fresh,
                device=chosen,
                observe=observe,
                stop=self.stop,
                parallel=self._in_processes if self.procs > 1 else None,
                world=world,
            )
        return None if world.rank else finished

    def _in_processes(self, name: str) -> None:
        from flowdistill import processes

        def arguments() -> list[str]:
            self.stop.check()
            left = max(1, self.stop.seconds_left)
            limit = [] if math.isinf(left) else ["--max-time", str(math.ceil(left))]
            return [self.pipeline.stages[name].verb, *self.again, *limit, "--stage", name, "--only"]

        processes.launch(arguments, self.procs, tell)


def _prove(doing: _Doing, target: str, only: bool, fresh: bool, as_json: bool) -> None:
    """Prove that a training resumes exactly, and print it."""
    from flowdistill import console, proving

    if fresh:
        raise UsageError(
            "--fresh and --prove-resume: a proof leaves the stage as it is, so leave out one of them"
        )
    for name in [] if only else doing.pipeline.needed(target)[:-1]:
        doing.stages(name, only=False, fresh=False)
    arguments = [*doing.again, "--procs", str(doing.procs)]
    with console.progress(doing.quiet) as show:
        report = console.reporter(f"proof of {target}", show)
        proof = proving.prove(doing.pipeline, target, arguments, doing.stop, report)
    if as_json:
        options.print_json(asdict(proof))
    kills = f"{proof.steps} steps, killed {len(proof.killed_at)} times"
    if proof.different:
        raise ArtifactError(
            f"{target} does not resume exactly: {', '.join(proof.different)} differ ({kills})\n"
            "what comes out depends on interruptions: not all that is random comes from the seed and the step"
        )
    if not as_json:
        console.lines(f"{target} resumes exactly: {', '.join(proof.compared)} are equal ({kills})")


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


def _check_shareable(pipeline: Pipeline, names: Sequence[str], alone: bool) -> None:
    """Refuse those of the stages that several processes which a launcher has started cannot do together."""
    for name in names:
        if not pipeline.can_share(name):
            raise UsageError(
                f"stage '{name}' is not for several processes: do it in one, and others under the launcher"
            )
    if alone:
        options_alone = "--fresh, --procs and --prove-resume"
        raise UsageError(f"{options_alone} are for one process: leave them out under a launcher")


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
