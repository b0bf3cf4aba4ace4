"""Commands that judge: one evaluation beside another, and against rules."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowdistill.boundary import tell
from flowdistill.cli import options
from flowdistill.cli.options import Json, Verbose
from flowdistill.errors import UsageError

if TYPE_CHECKING:
    from flowdistill.comparison.comparing import Change
    from flowdistill.comparison.gating import Judgement
    from flowdistill.comparison.rehearsing import Rehearsal
    from flowdistill.comparison.verdicts import Comparison, Line

_EVALUATION = "folder of an eval stage, or its eval.json"
Unpaired = Annotated[
    bool, typer.Option("--unpaired", help="compare even what cannot be paired, with wider intervals")
]


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help=_EVALUATION, show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="another", show_default=False)],
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", metavar="ID", help="only this row, or A_ID=B_ID for these two; repeatable"),
    ] = None,
    margin: Annotated[
        str, typer.Option("--margin", metavar="SHARE", help="change, in per cent of A, that does not matter")
    ] = "1%",
    unpaired: Unpaired = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say for each metric whether B is better than A, worse, equivalent, or not yet known.

    Reads both evaluations and joins their samples by noise; writes nothing. Evaluations of other noises,
    extractors or accurate solutions are refused, since their samples cannot be paired.

    \b
    Examples:
      flowdistill compare runs/old/eval runs/new/eval
      flowdistill compare runs/old/eval runs/new/eval --row old-4=new-4 --margin 0.5%
    """
    from flowdistill.comparison import verdicts
    from flowdistill.comparison.joining import Evaluation

    share = verdicts.parse_margin(margin)
    first, second = (Evaluation.open(path, samples=not unpaired) for path in (a, b))
    found = verdicts.compare(first, second, rows or (), share, paired=not unpaired)
    if as_json:
        document = {"a": str(first.path), "b": str(second.path), "margin": share}
        rest = {"paired": not unpaired, "differ": list(found.differ), "notes": list(found.notes)}
        options.print_json({**document, **rest, "metrics": [line.facts() for line in found.lines]})
    else:
        _print_comparison(found, margin)


def gate(
    evaluation: Annotated[Path, typer.Argument(metavar="EVAL", help=_EVALUATION, show_default=False)],
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="BASE", help="the evaluation that is compared with")
    ] = None,
    rules: Annotated[
        Path | None, typer.Option("--rules", metavar="FILE", help="rules in YAML: docs/gates.md")
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule", metavar="RULE", help="like endpoint_error<=+2%; repeatable; left out, <=+1% of each row"
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="write JUnit XML, one case for each check")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="write a table for a job's summary")
    ] = None,
    annotate: Annotated[
        bool, typer.Option("--annotate", help="print ::error and ::warning lines for GitHub Actions")
    ] = False,
    unpaired: Unpaired = False,
    runs: Annotated[
        int | None,
        typer.Option(
            "--rehearse", min=1, metavar="N", help="judge N pairs without a difference instead, and count"
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Judge an evaluation by rules, with a known chance of a false alarm.

    Reads the evaluation and its baseline; writes the files of --junit and --markdown. The exit code is 0
    where all rules are kept, 1 for a regression, 3 where too few samples or missing figures leave it open.

    \b
    Examples:
      flowdistill gate runs/new/eval --baseline baseline
      flowdistill gate runs/new/eval --baseline baseline --rule 'endpoint_error<=+2%' --rehearse 1000
    """
    from flowdistill.comparison import announcing, gating, rehearsing
    from flowdistill.comparison.joining import Evaluation
    from flowdistill.comparison.rules import policy
    from flowdistill.durable import atomic_write

    if runs is not None and (junit or markdown or annotate):
        raise UsageError("--rehearse judges nothing: leave out --junit, --markdown and --annotate")
    chosen = policy(rules, rule or ())
    read = not unpaired and baseline is not None and chosen.needs_baseline
    base = None if baseline is None else Evaluation.open(baseline, samples=read)
    checks = gating.checks(chosen, Evaluation.open(evaluation, samples=read), base, paired=not unpaired)
    if runs is not None:
        _tell_rehearsal(rehearsing.rehearse(checks, chosen, runs), as_json)
        return
    found = gating.judge(checks, chosen)
    if junit is not None:
        atomic_write(junit, announcing.junit(found))
    if markdown is not None:
        atomic_write(markdown, announcing.markdown(found).encode())
    _tell_judgement(found, as_json)
    for line in announcing.workflow_commands(found) if annotate else []:
        tell(line) if as_json else typer.echo(line)
    raise typer.Exit(found.exit_code)


# What is printed -------------------------------------------------------------------------------------------


def _print_comparison(found: Comparison, margin: str) -> None:
    from flowdistill import console

    headings = ("row", "metric", "A", "B", "B - A [95 %]", "change [95 %]", "p", "verdict")
    console.table(headings, [_cells(line) for line in found.lines])
    notes = [
        f"B is better or worse by more than {margin}, or equivalent within it; p is of no difference at all, "
        "by Holm's method for all lines."
    ]
    if found.differ:
        notes.append(f"the evaluations differ in: {'; '.join(found.differ)}")
    typer.echo()
    for note in [*notes, *found.notes]:
        typer.echo(note)


def _cells(line: Line) -> list[str]:
    from flowdistill import console

    a, b = line.pair.a.alone(line.kind), line.pair.b.alone(line.kind)
    assert a is not None and b is not None
    verdict = f"{line.verdict}; about {line.needed:,} samples would tell" if line.needed else line.verdict
    metric = f"{line.kind}@{line.change.n}" if line.change.n else line.kind
    values = [console.number(a.value), console.number(b.value), _interval(line.change)]
    change = _interval(line.relative, 100, " %") if line.relative else ""
    p = "" if line.p is None else "<0.001" if line.p < 0.001 else f"{line.p:.3f}"
    return [line.pair.title, metric, *values, change, p, verdict]


def _interval(change: Change, scale: float = 1.0, unit: str = "") -> str:
    from flowdistill.comparison.verdicts import bounds

    value, low, high = (f"{scale * bounds(change)[name]:+.3g}" for name in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def _tell_judgement(found: Judgement, as_json: bool) -> None:
    from flowdistill import console
    from flowdistill.comparison import announcing

    if as_json:
        document: dict[str, Any] = {"verdict": found.verdict, "exit_code": found.exit_code}
        document |= {"alpha": found.policy.alpha, "on_inconclusive": found.policy.on_inconclusive}
        options.print_json({**document, "checks": [outcome.facts() for outcome in found.outcomes]})
    else:
        console.table(("", "row", "rule", "found"), announcing.lines(found))
        typer.echo(f"\n{found.headline}")


def _tell_rehearsal(found: Rehearsal, as_json: bool) -> None:
    from flowdistill import console

    if as_json:
        options.print_json(found.facts())
        return
    regressions = list(found.powers[0].caught)
    headings = ("check", *(f"caught at {100 * each:g} %" for each in regressions), "caught in 95 %")
    console.table(
        headings,
        [
            (power.name, *(f"{100 * share:.1f} %" for share in power.caught.values()), _worse(power.smallest))
            for power in found.powers
        ],
    )
    typer.echo()
    for name, share in (("false alarms", found.false_alarms), ("inconclusive", found.inconclusive)):
        low, high = 100 * share.low, 100 * share.high
        typer.echo(
            f"{name}: {round(share.value * found.runs)} of {found.runs} A/A gates, "
            f"{100 * share.value:.2f} % [{low:.2f}, {high:.2f}]"
        )
    if found.same:
        typer.echo("no sample differs between the two, so there was no noise to rehearse with")
    for name in found.left_out:
        typer.echo(f"left out, for it has no pairs of samples: {name}")


def _worse(share: float) -> str:
    return f"{100 * share:.2f} % worse"
