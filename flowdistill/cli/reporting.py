"""The command that shows a run to people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowdistill.cli import options
from flowdistill.cli.options import Json, Verbose


def report(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="folder of a run, or of an evaluation", show_default=False),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="the page; left out, RUN/report.html")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option("--compare", metavar="OTHER", help="show another evaluation beside it; repeatable"),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run as one HTML page: a verdict, plots, pictures, tables, lineage.

    Reads the finished stages of a run, or one evaluation, and checks their files. Writes one file that needs
    nothing outside it, in place of an earlier one. Needs matplotlib.

    \b
    Examples:
      flowdistill report runs/quickstart
      flowdistill report runs/new --compare runs/old --out new.html
    """
    from flowdistill import report as pages

    path = pages.write(run, out, compare or ())
    if as_json:
        options.print_json({"run": str(run), "file": str(path)})
    else:
        typer.echo(str(path))
