"""Arguments and options that commands share, and what they come to: an opened recipe, JSON on stdout."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowdistill.errors import UsageError, quoted, unknown

if TYPE_CHECKING:
    from flowdistill import recipe
    from flowdistill.pipeline import Pipeline
    from flowdistill.stages import Stage
    from flowdistill.work import Stop

RECIPE_HELP = "a recipe's file, or the name of one that ships (flowdistill recipes ls)"
MODEL_HELP = "builtin:NAME, analytic:NAME, diffusers:FOLDER, a model.safetensors or the folder of its stage"

_TIMES = (
    r"([0-9]{1,6}):([0-5][0-9]):([0-5][0-9])",
    r"(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,9})s)?",
)
"""Hours, minutes and seconds."""


def _be_verbose(context: typer.Context, value: bool) -> bool:
    if value:
        context.obj.verbose = True
        warnings.simplefilter("default")
    return value


Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP, show_default=False)]
Shipped = Annotated[
    str, typer.Argument(metavar="NAME", help="as `flowdistill recipes ls` has it", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-s", metavar="KEY=VALUE", help="set a key of the recipe, like reflow.steps=500; repeatable"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="folder of the results")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="in place of the recipe's seed")]
Procs = Annotated[
    int,
    typer.Option("--procs", min=1, metavar="N", help="processes on this machine, for stages that can share"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="make anew what is stale or asked for; the old is kept beside it")
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time", metavar="TIME", help="save and stop after 90m, 1h30m, 01:30:00 or so many seconds"
    ),
]
StageName = Annotated[
    str | None, typer.Option("--stage", metavar="NAME", help="which stage, where several have this verb")
]
Only = Annotated[bool, typer.Option("--only", help="fail where an input is not done, instead of making it")]
ProveResume = Annotated[
    bool,
    typer.Option(
        "--prove-resume", help="train a few steps elsewhere, with and without kills, and compare the bytes"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout, all else on stderr")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="show no progress")]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", callback=_be_verbose, help="show warnings, and tracebacks of errors"),
]


def open_recipe(
    name: str, overrides: Sequence[str] | None = None, seed: int | None = None, out: Path | None = None
) -> Pipeline:
    """The recipe of this file or, where there is no such file, of this name."""
    from flowdistill import recipe, stages
    from flowdistill.pipeline import Pipeline

    return Pipeline(recipe.load(_recipe_file(name), stages.verbs(), _all(overrides, seed), out))


def read_recipe(name: str, overrides: Sequence[str] | None = None) -> recipe.Recipe[Stage]:
    """The same, to be looked at only: files that it names need not be there."""
    from flowdistill import recipe, stages
    from flowdistill.pipeline import Pipeline

    found = recipe.load(_recipe_file(name), stages.verbs(), _all(overrides, None), missing_ok=True)
    if any(problem.key.startswith("teacher") for problem in found.missing):
        return found
    return Pipeline(found).recipe


def without_recipe(
    verb: str,
    stages: Sequence[dict[str, Any]],
    model: str,
    label: str,
    overrides: Sequence[str] | None,
    seed: int | None,
    out: Path | None,
) -> Pipeline:
    """The recipe that nobody had to write, on one model; `label` tells its results from others of `verb`."""
    from flowdistill import recipe, teachers
    from flowdistill.pipeline import Pipeline
    from flowdistill.stages import verbs

    teachers.identify(model)
    content = {"teacher": model, "stages": list(stages)}
    slug = re.sub("[^a-z0-9]+", "-", f"{model.lower()}{label}")[-60:].strip("-")
    folder = out or Path("runs", verb, slug)
    data = json.dumps(content).encode()
    return Pipeline(recipe.parse(data, Path(f"<{verb}>"), verbs(), _all(overrides, seed), folder))


def _all(overrides: Sequence[str] | None, seed: int | None) -> list[str]:
    return [*(overrides or ()), *([] if seed is None else [f"seed={seed}"])]


def _recipe_file(name: str) -> Path:
    """A file comes before a shipped recipe of the same name; what is neither is left for `load` to refuse."""
    if os.path.isfile(name):
        return Path(name)
    if name in shipped():
        return shipped()[name]
    if not os.path.exists(name) and not name.endswith((".yaml", ".yml")):
        raise UsageError(f"{unknown('recipe', name, shipped())}; a recipe of your own ends in .yaml")
    return Path(name)


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that ship: with an installed package, or in the repository around it."""
    package = Path(__file__).parents[1]
    inside = package / "recipes"
    folder = inside if inside.is_dir() else package.parent / "recipes"
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder).parts), file))
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}


def shipped_recipe(name: str) -> Path:
    """The file of one of them."""
    if name not in shipped():
        raise UsageError(unknown("recipe", name, shipped()))
    return shipped()[name]


def is_model(reference: str) -> bool:
    """Whether an argument that may be a recipe or a model is a model."""
    if re.match("builtin$|[a-z]+:", reference) or reference.endswith(".safetensors"):
        return True
    return Path(reference).is_dir()


def one_of(option: str, value: str | None, known: Sequence[str]) -> str | None:
    """The value of an option that has only so many; UsageError for another."""
    if value is not None and value not in known:
        raise UsageError(f"{option}: {unknown('value', value, known)}")
    return value


def time_limit(text: str | None) -> Stop:
    """What stops work when the time is up that --max-time gives; UsageError where it is none."""
    from flowdistill.work import Stop

    if text is None:
        return Stop()
    whole = f"{text}s" if text.isdecimal() else text
    found = re.fullmatch(_TIMES[0], whole) or re.fullmatch(_TIMES[1], whole)
    hours, minutes, seconds = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise UsageError(
            f"--max-time {quoted(text)}: expected a time like 90m, 1h30m, 45s, 01:30:00 or seconds"
        )
    return Stop(total, f"--max-time {text}")


def print_json(document: Any) -> None:
    """The result, for machines."""
    typer.echo(json.dumps(document, indent=2))
