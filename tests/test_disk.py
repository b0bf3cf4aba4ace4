"""A disk that fails at any moment of a command costs a rerun and nothing else."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from faults import watched
from test_processes import made

from flowdistill.cli import execute


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_call_costs_nothing_that_was_made(
    tmp_path: Path, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "teacher: {name: analytic:gaussian}\n"
        "stages: [{pairs: {count: 4, solver: euler, steps: 1, shard_size: 2, check: 1}}]"
    )
    arguments = ["pairs", str(recipe), "-q", "--device", "cpu", "--out"]
    assert execute([*arguments, str(tmp_path / "whole")]) == 0
    whole = made(tmp_path / "whole")
    capsys.readouterr()
    for number in range(1000):
        out = tmp_path / str(number)
        with watched(number, code, more=("unlink", "rmdir")) as calls:
            ended = execute([*arguments, str(out)])
        said = capsys.readouterr().err
        assert ended == 5 and said.startswith("error: ") or ended == 0, (number, calls.trace[number], said)
        assert execute([*arguments, str(out)]) == 0, (number, calls.trace[number], capsys.readouterr().err)
        assert made(out) == whole, (number, calls.trace[number])
        if len(calls.trace) <= number:
            break
    assert number > 80  # so many calls can fail
