"""Training in several processes: the curve and weights of one, and equal bytes whatever interrupts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_processes import children, command, environment, gloo

from flowdistill import artifact
from flowdistill.cli import execute

RECIPE = """
teacher: {name: analytic:ring}
stages:
  - pairs: {count: 64, solver: euler, steps: 2, dtype: float32, check: 0}
  - reflow:
      network: {name: mlp, width: 32, depth: 2}
      steps: 60
      batch_size: 32
      loss: {name: squared-l2}
      optimizer: {lr: 1.0e-3, warmup: 5, clip: 1.0}
      log_every: 5
      checkpoint_every: 20
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def curve(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "reflow" / "log.jsonl").read_text().splitlines()]


def reflow(recipe: Path, out: Path, *more: str) -> list[str]:
    return command(recipe, out, *more, verb="reflow")


@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_processes_train_as_one_does(recipe: Path, tmp_path: Path, accumulate: int) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert execute(["reflow", str(recipe), "--out", str(one), "-q"]) == 0
    recipe.write_text(RECIPE.replace("batch_size: 32", f"batch_size: 32\n      accumulate: {accumulate}"))
    with gloo(recipe, two, 2, "reflow") as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    alone, together = curve(one), curve(two)
    assert [line["step"] for line in together] == [line["step"] for line in alone] == list(range(5, 65, 5))
    for mine, theirs in zip(alone, together, strict=True):
        by_time = [[loss or 0.0 for loss in line.pop("loss_by_t")] for line in (mine, theirs)]
        assert by_time[1] == pytest.approx(by_time[0], rel=1e-5, abs=1e-6)
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6)
    assert together[-1]["loss"] < 0.8 * together[0]["loss"]  # it has learnt something
    weights = [load_file(out / "reflow" / "model.safetensors") for out in (one, two)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-5)


def test_two_processes_that_share_the_weights_train_as_one_does(recipe: Path, tmp_path: Path) -> None:
    """With all that has to be gathered for it: averages, snapshots, pictures, the norm that is clipped."""
    one, two = tmp_path / "one", tmp_path / "two"
    kept = (
        RECIPE.replace("clip: 1.0", "clip: 0.5")
        + """\
      ema: {decay: 0.9, also: [0.5]}
      post_hoc: {every: 30}
      previews: {every: 30, count: 8}
      timesteps: {name: fitted}
"""
    )
    recipe.write_text(kept)
    assert execute(["reflow", str(recipe), "--out", str(one), "-q"]) == 0
    recipe.write_text(f"{kept}      accumulate: 2\n      sharded: true\n")
    with gloo(recipe, two, 2, "reflow") as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        by_time = [[loss or 0.0 for loss in line.pop("loss_by_t")] for line in (mine, theirs)]
        assert by_time[1] == pytest.approx(by_time[0], rel=1e-5, abs=1e-6)
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6)
    made = [artifact.Manifest.read(out / "reflow").outputs for out in (one, two)]
    assert made[0].keys() == made[1].keys() and len(made[0]) == 2 + 4 + 2 + 1
    for name in [*made[0], "checkpoints/last.safetensors"]:
        if name.endswith(".safetensors"):
            mine, theirs = (load_file(out / "reflow" / name) for out in (one, two))
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                torch.testing.assert_close(theirs[key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "reflow.sharded: there is one process only; start several with --procs"),
        (["reflow.precision=fp16"], "fp16 needs a loss scaler, which sharded gradients lack"),
    ],
)
def test_weights_that_cannot_be_shared_are_refused(
    more: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute(["pairs", str(recipe), "--out", str(tmp_path / "out"), "-q"]) == 0
    capsys.readouterr()
    given = [argument for each in ["reflow.sharded=true", *more] for argument in ("-s", each)]
    assert execute(["reflow", str(recipe), "--out", str(tmp_path / "out"), "-q", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out" / "reflow").exists()


@pytest.mark.parametrize(
    "more", [(), ("-s", "reflow.sharded=true", "-s", "reflow.accumulate=2")], ids=["", "sharded"]
)
def test_killed_and_stopped_launches_end_in_the_same_bytes(
    recipe: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    slow = ("-s", "reflow.steps=400", "-s", "reflow.checkpoint_every=20", *more, "--procs", "2")
    assert subprocess.run(reflow(recipe, whole, *slow), env=environment(), timeout=180).returncode == 0

    parent = subprocess.Popen(
        reflow(recipe, broken, *slow), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_for_checkpoint(broken, parent)
    os.kill(children(parent.pid)[1], signal.SIGKILL)  # all begin again, from the checkpoint
    time.sleep(0.5)
    wait_for_checkpoint(broken, parent)
    parent.send_signal(signal.SIGTERM)
    _, said = parent.communicate(timeout=180)
    if parent.returncode:  # else it was as good as done
        assert parent.returncode == 143 and "the state is saved" in said, said
        assert subprocess.run(reflow(recipe, broken, *slow), env=environment(), timeout=180).returncode == 0
    for name in ("model.safetensors", "log.jsonl", "checkpoints/last.safetensors"):
        assert (broken / "reflow" / name).read_bytes() == (whole / "reflow" / name).read_bytes()


HALF_BAD = """
import sys
from flowdistill.cli import execute
from flowdistill.stages.reflow import Reflow
original = Reflow.per_sample
def per_sample(self, network, batch):
    loss, terms = original(self, network, batch)
    bad = batch.draw.step == 6 and batch.draw.part.start
    return loss * (float("nan") if bad else 1.0), terms
Reflow.per_sample = per_sample
sys.exit(execute(sys.argv[1:]))
"""


@pytest.mark.parametrize(("policy", "sharded"), [("skip", "false"), ("roll-back", "true")])
def test_what_is_not_finite_in_one_process_is_so_in_all(
    recipe: Path, tmp_path: Path, policy: str, sharded: str
) -> None:
    """The second half of a batch is NaN, which is the part of the second process."""
    (tmp_path / "bad.py").write_text(HALF_BAD)
    given = ["-s", "reflow.steps=12", "-s", "reflow.checkpoint_every=4"]
    given += ["-s", f"reflow.non_finite={{policy: {policy}}}"]
    alone = [sys.executable, str(tmp_path / "bad.py"), *reflow(recipe, tmp_path / "one", *given)[3:]]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    given += ["-s", f"reflow.sharded={sharded}"]
    together = [*launcher, str(tmp_path / "bad.py"), *reflow(recipe, tmp_path / "two", *given)[3:]]
    for arguments in (alone + ["-s", "reflow.accumulate=2"], together):
        ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=180)
        assert ended.returncode == 0, ended.stderr
    stages = [tmp_path / out / "reflow" for out in ("one", "two")]
    headers = [artifact.read_header(stage / "checkpoints" / "last.safetensors") for stage in stages]
    for header in headers:
        assert (header["setbacks"], header["skipped"]) == (1, 3 if policy == "roll-back" else 0)
    for name, value in load_file(stages[0] / "model.safetensors").items():
        torch.testing.assert_close(
            load_file(stages[1] / "model.safetensors")[name], value, atol=1e-5, rtol=1e-5
        )


def wait_for_checkpoint(out: Path, parent: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not (out / "reflow" / "checkpoints" / "last.safetensors").exists():
        assert time.monotonic() < until and parent.poll() is None
        time.sleep(0.02)


def test_a_batch_that_does_not_divide_is_refused(recipe: Path, tmp_path: Path) -> None:
    arguments = reflow(recipe, tmp_path / "out", "--procs", "2", "-s", "reflow.batch_size=31")
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=180)
    assert ended.returncode == 2 and "31 does not divide by 2 processes" in ended.stderr
    assert not (tmp_path / "out" / "reflow").exists()
