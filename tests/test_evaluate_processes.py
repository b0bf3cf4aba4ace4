"""Several processes at an evaluation: the bytes are those of one, and one's mistakes end all."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluate import lasting, still, unet
from test_processes import gloo

from flowdistill import artifact
from flowdistill.cli import execute
from flowdistill.data import SHAPES
from flowdistill.evaluation.features import as_bytes

RECIPE = """
teacher: {name: analytic:ring}
stages:
  - eval:
      models: [teacher]
      samples: 500
      batch_size: 64
      nfe: [1, 3]
      reference: {steps: 8, samples: 200}
      straightness: 70
      inversion: 70
      latency: true
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Parts of eight, of four, and of two batches, the last of them smaller; a reference in two blocks."""
    recipe = tmp_path / "recipe.yaml"
    unet(tmp_path / "net.safetensors", data="shapes")
    np.savez(tmp_path / "images.npz", as_bytes(SHAPES.batch(torch.arange(150))[0]).numpy())
    changed = RECIPE.replace("analytic:ring", "./net.safetensors").replace("size: 64", "size: 8")
    changed = changed.replace("500", "60").replace("200", "30").replace("70", "10")
    recipe.write_text(f"{changed}      reference_data: images.npz\n")
    one, two = tmp_path / "one" / "eval", tmp_path / "two" / "eval"
    assert execute(["eval", str(recipe), "--out", str(one.parent), "-q"]) == 0
    with gloo(recipe, two.parent, 2, "eval") as ranks:
        answers = [rank.communicate(timeout=120) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    assert [bool(printed) for printed, _ in answers] == [True, False]
    for name in ("samples.safetensors", "grid.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    contents = [artifact.load_json(folder / "eval.json") for folder in (one, two)]
    assert lasting(contents[0]) == lasting(contents[1])
    assert contents[1]["features"]["shipped"]["reference"] == "images.npz, 150 samples"
    assert contents[1]["latency"].keys() == contents[1]["throughput"].keys() == {"teacher-1", "teacher-3"}
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (one, two)]
    assert kept[0] == kept[1], "nothing of the exchange is left"


def test_a_model_that_makes_nan_ends_all_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(still(tmp_path / "broken.safetensors"))
    tensors, header = artifact.load_tensors(path)
    tensors["out.bias"] += 1e38
    tensors["first.weight"] += 1e3
    artifact.save_tensors(path, tensors, header)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    changed = RECIPE.replace("models: [teacher]", f"models: [teacher, {path}]")
    recipe.write_text(changed.replace("analytic:ring", "analytic:gaussian"))
    for procs in ([], ["--procs", "2"]):
        assert execute(["eval", str(recipe), "--out", str(out), "-q", *procs]) == 6
        assert "the samples are not finite, the model is of no use" in capfd.readouterr().err
        assert not (out / "eval" / "eval.json").exists() and not (out / "eval" / "manifest.json").exists()


def test_a_signal_to_one_process_is_one_to_all_and_they_continue(tmp_path: Path) -> None:
    """The second row takes its time; what is there of it when the signal comes is made again."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("[1, 3]", "[1, 700]").replace("latency: true", "latency: false"))
    with gloo(recipe, out, 2, "eval") as ranks:
        until = time.monotonic() + 90
        while not list((out / "eval" / "checkpoints").glob("row-*")):
            assert time.monotonic() < until and all(rank.poll() is None for rank in ranks)
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGTERM)
        answers = [rank.communicate(timeout=90) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [143, 143], answers
    assert len(list((out / "eval" / "checkpoints").glob("row-*"))) == 1
    assert not (out / "eval" / "eval.json").exists()
    for folder in (out, tmp_path / "whole"):
        assert execute(["eval", str(recipe), "--out", str(folder), "-q"]) == 0
    names = ("samples.safetensors", "grid.png")
    made = [[(folder / "eval" / name).read_bytes() for name in names] for folder in (out, tmp_path / "whole")]
    assert made[0] == made[1]
