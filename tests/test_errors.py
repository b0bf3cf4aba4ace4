# ruff: noqa: E501  (messages stand here as they are printed)
"""Exit codes, and messages that keep to their lines."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdistill import errors
from flowdistill.errors import Interrupted, Problem, RecipeError, quoted, unknown

EXIT_CODES = {
    "FlowdistillError": 1,
    "UsageError": 2,
    "RecipeError": 2,
    "MissingInput": 3,
    "ArtifactError": 4,
    "ResourceError": 5,
    "Diverged": 6,
}


def test_every_error_has_its_exit_code() -> None:
    found = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.FlowdistillError)
    }
    found.pop("Interrupted")
    assert found == EXIT_CODES


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruptions_exit_like_a_shell_reports_them(signum: signal.Signals, code: int) -> None:
    error = Interrupted(signum)
    assert error.exit_code == code
    assert str(error) == f"interrupted by {signum.name}; run the same command again to continue"


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (Problem("a.yaml", 12, 7, "reflow.loss.nmae", "unknown key"), "a.yaml:12:7: reflow.loss.nmae: unknown key"),
        (Problem("a.yaml", 3, 1, "", "not valid YAML"), "a.yaml:3:1: not valid YAML"),
        (Problem("a.yaml", None, None, "", "no such file"), "a.yaml: no such file"),
        (Problem("-s seed=x", None, None, "seed", "expected an integer"), "-s seed=x: seed: expected an integer"),
    ],
)  # fmt: skip
def test_a_problem_is_file_line_column_key_message(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_a_recipe_error_lists_its_problems_and_counts_the_rest() -> None:
    problems = [Problem("a.yaml", line, 1, "", "wrong") for line in range(1, 24)]
    assert str(RecipeError(problems[:2])) == "a.yaml:1:1: wrong\na.yaml:2:1: wrong"
    lines = str(RecipeError(problems)).split("\n")
    assert (len(lines), lines[19], lines[20]) == (21, "a.yaml:20:1: wrong", "and 3 more problems")
    assert RecipeError(problems).problems == tuple(problems)


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("huen", ["euler", "heun", "midpoint", "rk4"], "unknown solver 'huen', did you mean 'heun'? (euler, heun, midpoint, rk4)"),
        ("HEUN", ["euler", "heun"], "unknown solver 'HEUN', did you mean 'heun'? (euler, heun)"),
        ("zzz", ["euler", "heun"], "unknown solver 'zzz' (euler, heun)"),
        ("x\ny", ["euler"], r"unknown solver 'x\ny' (euler)"),
        ("heun", [], "unknown solver 'heun'"),
        ("b", [f"a{i}" for i in range(21)], "unknown solver 'b' (" + ", ".join(f"a{i}" for i in range(20)) + " and 1 more)"),
        ("b", [f"a{i}" for i in range(22)], "unknown solver 'b' (" + ", ".join(f"a{i}" for i in range(20)) + " and 2 more)"),
    ],
)  # fmt: skip
def test_unknown_names_the_nearest(name: str, known: list[str], text: str) -> None:
    assert unknown("solver", name, known) == text


@settings(max_examples=50, deadline=None)
@given(name=st.text(max_size=9), known=st.lists(st.text(max_size=9), max_size=30))
def test_unknown_is_one_line_of_bounded_length(name: str, known: list[str]) -> None:
    text = unknown("solver", name * 50, known)
    assert text.isprintable()
    assert len(text) < 1600


@pytest.mark.parametrize("value", [3, "a", [1, 2], "x" * 58])
def test_short_values_are_quoted_whole(value: object) -> None:
    assert quoted(value) == repr(value)


def test_long_values_are_cut() -> None:
    assert quoted("x" * 59) == "'" + "x" * 58 + "…"
