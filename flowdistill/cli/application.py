"""All commands, put together.

Only typer is imported here; what a command needs it imports itself, so that `--help` and the commands that
merely look at files answer at once. The verbs of recipes are found in the folder of stages, without importing
it, and share one implementation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from shutil import get_terminal_size
from typing import Annotated, Any

import typer

from flowdistill import __version__
from flowdistill.boundary import Invocation
from flowdistill.cli import adopting, drawing, judging, looking, reporting, working
from flowdistill.errors import UsageError

# typer shows only this exception of its own copy of click; the base is what a wrong command line raises.
_WrongUsage: Any = typer.BadParameter.__base__
_WIDTH = 100


def invoke(invocation: Invocation) -> int:
    """Do what the arguments of the invocation say; the exit code."""
    command = typer.main.get_command(application())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of other packages; -v shows them
        try:
            code = command.main(invocation.arguments, "flowdistill", standalone_mode=False, obj=invocation)
        except _WrongUsage as error:
            context = error.ctx.command_path if error.ctx else "flowdistill"
            text = error.format_message()
            raise UsageError(
                f"{text[0].lower()}{text[1:]}\n`{context} --help` shows how it is used"
            ) from None
    return code if isinstance(code, int) else 0


def application() -> typer.Typer:
    """All commands: those of a recipe first, then those that look."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,  # plain help takes a tenth of the time
        pretty_exceptions_enable=False,
        context_settings={
            "help_option_names": ["-h", "--help"],
            "terminal_width": min(get_terminal_size((_WIDTH, 24)).columns, _WIDTH),
        },
    )
    app.callback(invoke_without_command=True)(_root)
    _add(app, working.run, looking.status, looking.plan)
    for verb, about in stage_verbs().items():
        command = working.OWN_COMMANDS.get(verb) or working.stage_command(verb)
        _add_one(app, verb, f"{about}\n\n{cleandoc(command.__doc__ or '')}", command)
    _add(app, judging.compare, judging.gate)
    _add(app, drawing.sample, adopting.import_, adopting.export, adopting.probe)
    _add(app, reporting.report, looking.inspect, looking.verify, looking.validate)
    recipes = typer.Typer(rich_markup_mode=None)
    recipes.callback(invoke_without_command=True)(_help)
    _add(recipes, looking.ls, looking.show, looking.copy)
    app.add_typer(recipes, name="recipes")
    _add(app, looking.schema, looking.doctor)
    return app


def _add(app: typer.Typer, *commands: Callable[..., None]) -> None:
    for command in commands:
        _add_one(app, command.__name__.removesuffix("_"), cleandoc(command.__doc__ or ""), command)


def _add_one(app: typer.Typer, name: str, text: str, command: Callable[..., None]) -> None:
    # Without a short help of its own, a command's first sentence is cut where its line ends.
    app.command(name, help=text, short_help=text.partition("\n\n")[0])(command)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"flowdistill {__version__}")
        raise typer.Exit


def _help(context: typer.Context) -> None:
    """List, show or copy the recipes that ship."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Flow and diffusion models that need 20 to 200 network calls, made to need 1 to 8.

    `flowdistill run quickstart` does the whole chain on the teacher that comes with the package.
    """
    _help(context)


def stage_verbs() -> dict[str, str]:
    """Verb -> what its stage says of itself, read from the text of the stages' files.

    The same verbs as `stages.verbs()`, whose import would cost more than all else that `--help` does.
    """
    found = {}
    for file in sorted((Path(__file__).parents[1] / "stages").glob("*.py")):
        text = file.read_text("utf-8")
        for verb in re.findall(r'^    verb: ClassVar\[str\] = "([a-z0-9-]+)"$', text, re.MULTILINE):
            found[verb] = text.split('"""')[1].strip()
    return found
