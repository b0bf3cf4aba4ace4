"""Several processes make one store: the bytes are those of one process, whoever dies on the way."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from faults import content

from flowdistill.cli import execute

RECIPE = """
teacher: {name: analytic:ring}
stages:
  - pairs: {count: 320, solver: rk4, steps: 60, batch_size: 16, shard_size: 16, dtype: float32, check: 8}
  - boss: {model: teacher, nfe: [2], grid: 4, trajectories: 2, held_out: 16}
"""
SHARDS = 20
MADE_EACH_TIME = ("manifest.json",)  # its dates and rates


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def alone(recipe: Path) -> dict[str, bytes]:
    """What one process makes."""
    assert execute(["pairs", str(recipe), "--out", str(recipe.parent / "alone"), "-q"]) == 0
    return made(recipe.parent / "alone")


def made(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(out / "pairs").items() if name not in MADE_EACH_TIME}


def command(recipe: Path, out: Path, *more: str, verb: str = "pairs") -> list[str]:
    return [sys.executable, "-m", "flowdistill", verb, str(recipe), "--out", str(out), "-q", *more]


def environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return {**clean, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def gloo(recipe: Path, out: Path, size: int, verb: str = "pairs") -> Iterator[list[subprocess.Popen[str]]]:
    """The processes of one world, as a launcher starts them; whoever is left at the end is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            command(recipe, out, verb=verb),
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def wait_for_shards(out: Path, count: int, of: Sequence[subprocess.Popen[str]]) -> None:
    """Until so many shards are there."""
    until = time.monotonic() + 120
    while len(list((out / "pairs" / "shards").glob("*.safetensors"))) < count:
        assert time.monotonic() < until and any(each.poll() is None for each in of)
        time.sleep(0.01)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gloo_processes_make_the_bytes_of_one(
    recipe: Path, alone: dict[str, bytes], tmp_path: Path, size: int
) -> None:
    out = tmp_path / "out"
    with gloo(recipe, out, size) as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size, answers
    assert made(out) == alone
    assert [bool(printed) for printed, _ in answers] == [True] + [False] * (size - 1)


@pytest.mark.parametrize(("size", "killed"), [(2, [1]), (4, [0, 2])])
def test_the_shards_of_killed_processes_are_taken_over(
    recipe: Path, alone: dict[str, bytes], tmp_path: Path, size: int, killed: list[int]
) -> None:
    """Rank 0, which holds the rendezvous, among them."""
    out, draw = tmp_path / "out", random.Random(size)
    with gloo(recipe, out, size) as ranks:
        for number in killed:
            wait_for_shards(out, draw.randint(1, 6), ranks)
            ranks[number].send_signal(signal.SIGKILL)
        left = [rank for number, rank in enumerate(ranks) if number not in killed]
        answers = [rank.communicate(timeout=180) for rank in left]
        assert [rank.returncode for rank in left] == [0] * len(left), answers
    assert made(out) == alone


def test_commands_that_know_nothing_of_each_other_share_the_work(
    recipe: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    both = [
        subprocess.Popen(command(recipe, out), env=environment(), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    wait_for_shards(out, 3, both)
    assert [each.wait(180) for each in both] == [0, 0], [each.stderr for each in both]
    assert made(out) == alone


def test_a_process_that_procs_started_and_that_is_killed_is_started_again(
    recipe: Path, alone: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    parent = subprocess.Popen(
        command(recipe, out, "--procs", "2"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_shards(out, 2, [parent])
    os.kill(children(parent.pid)[0], signal.SIGKILL)
    _, said = parent.communicate(timeout=180)
    assert parent.returncode == 0, said
    assert "was killed; all begin again" in said
    assert made(out) == alone


def test_an_interrupted_launch_continues(recipe: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    parent = subprocess.Popen(
        command(recipe, out, "--procs", "2"), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_shards(out, 2, [parent])
    parent.send_signal(signal.SIGTERM)
    _, said = parent.communicate(timeout=180)
    assert parent.returncode == 143, said
    assert said.count("the state is saved\ncontinue: flowdistill pairs") == 1
    assert len(said.splitlines()) <= 4  # one of the processes says that it saves, this one the rest
    assert execute(["pairs", str(recipe), "--out", str(out), "-q"]) == 0
    assert made(out) == alone


def test_what_a_launched_process_fails_of_is_told(recipe: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        command(recipe, tmp_path / "out", "--procs", "2", "-s", "pairs.tolerance=1e-30"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 2, ended.stderr
    assert "pairs.tolerance: the solver's error is" in ended.stderr and "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) <= 5  # twice, where the second process ended before the first
    assert not (tmp_path / "out" / "pairs").exists()


def test_torchrun(recipe: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run(
        [*launcher, *command(recipe, out)[1:]], env=environment(), capture_output=True, text=True, timeout=180
    )
    assert ended.returncode == 0, ended.stderr
    assert made(out) == alone


def children(process: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["boss"], "'boss' is not for several processes"),
        (["run"], "'boss' is not for several processes"),
        (["pairs", "--fresh"], "--fresh, --procs and --prove-resume are for one process"),
        (["pairs", "--procs", "2"], "--fresh, --procs and --prove-resume are for one process"),
    ],
)
def test_what_a_launcher_cannot_start(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(recipe.parent)
    assert execute([arguments[0], str(recipe), *arguments[1:], "--device", "cpu"]) == 2
    assert says in capsys.readouterr().err
    assert not (recipe.parent / "runs").exists()
