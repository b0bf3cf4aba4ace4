"""The command line: arguments in, one call into the package, results on stdout.

Only typer is imported here; what a command needs it imports itself, so that `--help` and the commands that
merely look at files answer at once. The verbs of recipes are found in the folder of stages, without importing
it, and share one implementation.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowdistill import __version__
from flowdistill.boundary import Session, guard, signals, tell
from flowdistill.errors import MissingInput, UsageError, unknown

if TYPE_CHECKING:
    from flowdistill.pipeline import Event, Finished, Pipeline

PACKAGE = Path(__file__).parent

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help takes a tenth of the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
recipes_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", help="The recipes that ship: list, show or copy them.")

# typer shows only one exception of its own copy of click; its base is what a wrong command line raises.
_WrongUsage: Any = typer.BadParameter.__base__


def main() -> None:
    """The console script."""
    sys.exit(execute(sys.argv[1:]))


def execute(arguments: Sequence[str]) -> int:
    """Do what the arguments say and return the exit code; nothing is raised."""
    session = Session(arguments)
    with signals(session):
        return guard(lambda: _invoke(session), session)


def _invoke(session: Session) -> int:
    command = typer.main.get_command(app)
    try:
        code = command.main(session.arguments, "flowdistill", standalone_mode=False, obj=session)
    except _WrongUsage as error:
        context = error.ctx.command_path if error.ctx else "flowdistill"
        text = error.format_message()
        raise UsageError(f"{text[0].lower()}{text[1:]}\n`{context} --help` shows how it is used") from None
    return code if isinstance(code, int) else 0


# Options ------------------------------------------------------------------------------------------------


def _verbose(context: typer.Context, value: bool) -> bool:
    context.obj.verbose |= value
    return value


def _version(value: bool) -> None:
    if value:
        typer.echo(f"flowdistill {__version__}")
        raise typer.Exit


_RECIPE = "a recipe's file, or the name of one that ships (flowdistill recipes ls)"
_MODEL = "builtin:NAME, analytic:NAME, a model.safetensors or the folder of a stage that made one"

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE, show_default=False)]
PathArgument = Annotated[Path, typer.Argument(metavar="PATH", help="a file or folder", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option("-s", metavar="KEY=VALUE", help="set a key of the recipe, as in -s reflow.steps=500; repeatable"),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="folder of the results, instead of the recipe's", show_default=False)
]
Device = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="seed, instead of the recipe's", show_default=False)]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="make anew what is stale or asked for; what was there is kept beside it")
]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="which stage, where several have this verb", show_default=False)
]
Only = Annotated[bool, typer.Option("--only", help="refuse where an input is not done, instead of making it")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON document on stdout, all else on stderr")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="no progress")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", callback=_verbose, help="show tracebacks and warnings")]


# Commands that do work ----------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")] = False,
) -> None:
    """Flow and diffusion models that need 20 to 200 network calls, made to need 1 to 8.

    `flowdistill run quickstart` does the whole chain on the teacher that comes with the package.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command("run")
def run(
    context: typer.Context,
    recipe: RecipeArgument,
    overrides: Overrides = [],  # noqa: B006  (typer copies it)
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Do all stages of a recipe, in order.

    Reads the recipe and writes a folder for each stage, whose manifest comes last. What is done is skipped,
    what was interrupted continues, and what was made with other settings is refused unless --fresh is given.

    \b
    Examples:
      flowdistill run quickstart
      flowdistill run recipe.yaml -s reflow.steps=500 --out runs/short
    """
    _work(context.obj, _open(recipe, overrides, seed, out), None, device, fresh=fresh, json=json, quiet=quiet)


def _stage_command(verb: str) -> Callable[..., None]:
    """The command of a verb that needs nothing of its own."""

    def command(
        context: typer.Context,
        recipe: RecipeArgument,
        stage: StageName = None,
        only: Only = False,
        overrides: Overrides = [],  # noqa: B006
        out: Out = None,
        device: Device = "auto",
        seed: Seed = None,
        fresh: Fresh = False,
        json: Json = False,
        quiet: Quiet = False,
        verbose: Verbose = False,
    ) -> None:
        pipeline = _open(recipe, overrides, seed, out)
        target = pipeline.select(verb, stage)
        _work(context.obj, pipeline, target, device, only=only, fresh=fresh, json=json, quiet=quiet)

    command.__doc__ = f"""
    Reads the recipe and the artifacts that its stage '{verb}' refers to, and writes the folder of the stage, whose
    manifest comes last. Inputs that are not done are made first.

    \b
    Examples:
      flowdistill {verb} recipe.yaml
      flowdistill {verb} recipe.yaml --seed 1 --out runs/seed1
    """
    return command


def boss(
    context: typer.Context,
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help=_RECIPE, show_default=False)] = None,
    nfe: Annotated[
        list[int], typer.Option(min=1, metavar="N", help="number of evaluations to make a schedule for; repeatable")
    ] = [],  # noqa: B006
    model: Annotated[str, typer.Option(metavar="MODEL", help=f"without a recipe: {_MODEL}")] = "builtin:shapes",
    stage: StageName = None,
    only: Only = False,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe, or without one only a model, and writes schedule-nfeN.json for every N, which
    `flowdistill sample --schedule` takes, and boss.safetensors with what they were computed from. Without
    --out they lie in the recipe's folder, or below runs/boss.

    \b
    Examples:
      flowdistill boss --nfe 4
      flowdistill boss quickstart --nfe 2 --nfe 6 --out runs/boss-quickstart
    """
    wanted = sorted(set(nfe))
    if recipe is None:
        target, label = "boss", "-".join(["nfe", *map(str, wanted)]) if wanted else "default"
        overrides = [*overrides, *([f"boss.nfe={wanted}"] if wanted else [])]
        pipeline = _without_recipe("boss", {}, model, overrides, seed, out, label)
    else:
        pipeline = _open(recipe, overrides, seed, out)
        target = pipeline.select("boss", stage)
        if wanted:
            pipeline = _open(recipe, [*overrides, f"{target}.nfe={wanted}"], seed, out)
    _work(context.obj, pipeline, target, device, only=only, fresh=fresh, json=json, quiet=quiet)


def evaluate(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help=f"{_RECIPE}; or {_MODEL}", show_default=False)],
    stage: StageName = None,
    only: Only = False,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    device: Device = "auto",
    seed: Seed = None,
    fresh: Fresh = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Reads a recipe, or evaluates a model as it is, and writes eval.json with every number and its interval,
    the rows behind them in safetensors, and grid.png. The results of a model lie below runs/eval, if --out
    does not say otherwise.

    \b
    Examples:
      flowdistill eval quickstart
      flowdistill eval builtin:digits -s eval.samples=1000
    """
    if _is_model(target):
        pipeline = _without_recipe("eval", {"models": ["teacher"]}, target, overrides, seed, out, "default")
        chosen: str | None = "eval"
    else:
        pipeline = _open(target, overrides, seed, out)
        chosen = pipeline.select("eval", stage)
    _work(context.obj, pipeline, chosen, device, only=only, fresh=fresh, json=json, quiet=quiet)


@app.command("status")
def status(
    recipe: RecipeArgument,
    overrides: Overrides = [],  # noqa: B006
    out: Out = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say which stages of a recipe are done, stale (and why) or missing.

    Reads the recipe and the manifests in its folder; writes nothing.

    \b
    Examples:
      flowdistill status quickstart
      flowdistill status recipe.yaml -s reflow.steps=500
    """
    from flowdistill import console

    standings = _open(recipe, overrides, seed, out).status()
    console.emit_status(standings, json)
