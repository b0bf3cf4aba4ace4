"""`flowdistill sample` with times of one's own, every solver, and the way up and down again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import Shell
from torch import Tensor

from flowdistill import artifact, data, randomness
from flowdistill.analytic import gaussian, ring
from flowdistill.evaluation.metrics import endpoint_error
from flowdistill.randomness import noise
from flowdistill.schedule import Schedule
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.teachers import Card, new, open_model

OUT = Path("runs/samples")


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def tensors(name: str = "samples", folder: Path = OUT) -> dict[str, Tensor]:
    return artifact.load_tensors(folder / f"{name}.safetensors")[0]


def refusal(shell: Shell, arguments: str) -> str:
    """The one line that a command is refused with, before it writes anything."""
    before = sorted(Path().rglob("*"))
    answer = shell("sample", "-q", *arguments.split())
    assert (answer.code, answer.out) == (2, "") and sorted(Path().rglob("*")) == before
    (line,) = answer.err.splitlines()
    return line


# Times -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_any_solver_takes_times(shell: Shell, name: Any) -> None:
    times = (1.0, 0.6, 0.3, 0.0)
    answer = shell(
        "sample", "analytic:ring", "--solver", name, "--times", "1,0.6,.3,0", "--count", "9", "--json", "-q"
    )
    solver, schedule = SOLVERS[name], Schedule(times, "by hand")
    assert (answer.json["solver"], answer.json["nfe"]) == (solver.name, nfe(solver, schedule))
    found, header = artifact.load_tensors(OUT / "samples.safetensors")
    assert header["times"] == list(times) and header["kind"] == "samples"
    labels = torch.arange(9) % 8
    expected = integrate(
        open_model("analytic:ring").field, noise(0, range(9), (2,)), schedule, solver, labels
    )
    assert torch.equal(found["samples"], expected) and torch.equal(found["labels"], labels)


@pytest.mark.parametrize(("arguments", "message"), [
    ("--times 1,a,0", "--times 1,a,0: expected numbers with commas between them, as in 1,0.6,0.3,0"),
    ("--times 1,,0", "--times 1,,0: expected numbers with commas between them, as in 1,0.6,0.3,0"),
    ("--times 1,0.5", "schedule '--times': times must fall strictly from 1 to 0, found 1, 0.5"),
    ("--times 0,0.5,1", "schedule '--times': times must fall strictly from 1 to 0, found 0, 0.5, 1"),
    ("--times 1,0.5,0.5,0", "schedule '--times': times must fall strictly from 1 to 0, found 1, 0.5, 0.5, 0"),
    ("--times 1,nan,0", "schedule '--times': times must fall strictly from 1 to 0, found 1, nan, 0"),
    ("--times 1", "schedule '--times': times must fall strictly from 1 to 0, found 1"),
    ("--times 1,0 --nfe 1", "--times: says which steps there are; leave out --nfe and --schedule"),
    ("--times 1,0 --schedule x.json", "--times: says which steps there are; leave out --nfe and --schedule"),
    ("--times 1,0 --solver huen", "--solver: unknown solver 'huen', did you mean 'heun'? (euler, heun, "
     "midpoint, rk4, rf-solver, ab2, midpoint-cached, fireflow, pec, dpm++2m, reinterpolate, "
     "reinterpolate-heun)"),
    ("--solver pec --nfe 1", "solver pec cannot make exactly 1 evaluations: 2 would do"),
    ("--solver reinterpolate-heun --nfe 4", "solver reinterpolate-heun cannot make exactly 4 evaluations: "
     "3 or 5 would do"),
])  # fmt: skip
def test_times_that_cannot_be_are_refused(shell: Shell, arguments: str, message: str) -> None:
    assert refusal(shell, f"analytic:ring {arguments}") == f"error: {message}"


# There and back --------------------------------------------------------------------------------------------


def test_samples_of_a_gaussian_are_taken_to_their_noise_and_back(shell: Shell) -> None:
    """From x_t with t = 0.001, whose quantiles the flow keeps; from the noise to where it belongs."""
    flow = gaussian((2,))
    x0, _ = flow.data(range(70), seed=8)
    np.savez("x.npz", samples=x0.numpy())
    options = ("--invert", "x.npz", "--solver", "rk4", "--nfe", "160", "--count", "100", "--seed", "3")
    found = shell("sample", "analytic:gaussian", *options, "--json", "-q").json
    assert found["files"] == [
        f"{OUT}/{name}" for name in ("noise.safetensors", "samples.safetensors", "grid.png")
    ]
    assert (found["count"], found["nfe"], found["inversion_nfe"]) == (70, 160, 160)

    t = 0.001
    mean, std = flow.means[0], flow.stds[0]
    fresh = noise(randomness.key(3, "inversion"), range(70), (2,))
    eps = ((1 - t) * (x0 - mean) + t * fresh) / ((1 - t) ** 2 * std**2 + t**2).sqrt()
    torch.testing.assert_close(tensors("noise")["noise"], eps.float(), atol=1e-4, rtol=0)
    back = tensors()["samples"]
    torch.testing.assert_close(back, flow.flow_map(eps).float(), atol=1e-4, rtol=0)
    assert found["round_trip_error"] == pytest.approx(float(endpoint_error(back, x0).mean()), rel=1e-9)
    assert found["round_trip_error"] < 2 * t
    assert found["noise_norm"] == pytest.approx(float(eps.square().sum(1).mean() / 2), abs=1e-3)
    assert artifact.load_tensors(OUT / "noise.safetensors")[1]["inverted"] == "x.npz"

    told = shell("sample", "analytic:gaussian", *options, "-q").out.splitlines()
    assert told[0].startswith(
        "70 samples of x.npz to their noise and back by analytic:gaussian, 160 and 160 "
    )
    assert told[1].strip() == f"round trip   off by {found['round_trip_error']:.3g}, root mean square"
    assert told[2].strip() == f"noise        |noise|^2 / d is {found['noise_norm']:.3g}, of normal noise 1"


def test_a_noise_is_drawn_as_what_it_came_from(shell: Shell) -> None:
    """The samples of a model are inverted to nearly the noise that they were drawn from."""
    rule = ("--solver", "heun", "--nfe", "127", "-q", "--count", "40")
    shell("sample", "analytic:ring", *rule)
    shell("sample", "analytic:ring", *rule, "--invert", OUT / "samples.safetensors", "--out", "up")
    assert torch.equal(tensors("noise", Path("up"))["labels"], tensors()["labels"])
    off = endpoint_error(tensors("noise", Path("up"))["noise"], noise(0, range(40), (2,)))
    assert off.median() < 0.1
    assert endpoint_error(tensors("samples", Path("up"))["samples"], tensors()["samples"]).max() < 0.01


def test_the_round_trip_is_shorter_with_more_steps(shell: Shell) -> None:
    off = [
        shell("sample", "builtin:digits", "--invert", "digits", "--count", "24", "--nfe", n, "--json", "-q")
        .json["round_trip_error"]
        for n in (4, 8, 16)
    ]  # fmt: skip
    assert off[0] < 0.4 and off[1] < off[0] / 1.5 and off[2] < off[1] / 1.5


def test_what_is_inverted_depends_on_its_place_alone(shell: Shell) -> None:
    x0, labels = ring().data(range(70), seed=1)
    np.savez("x.npz", samples=x0.numpy(), labels=labels.numpy())
    for count in (3, 70):
        shell("sample", "analytic:ring", "--invert", "x.npz", "--count", count, "--out", str(count), "-q")
    few, many = (tensors("noise", Path(name)) for name in ("3", "70"))
    assert torch.equal(few["noise"], many["noise"][:3]) and torch.equal(many["labels"], labels)


def test_labels_are_those_that_are_named_else_the_samples_own(shell: Shell) -> None:
    flow = ring()
    x0, own = flow.data(range(12), seed=1)
    np.savez("own.npz", samples=x0.numpy(), labels=own.numpy())
    np.savez("bare.npz", samples=x0.numpy())
    rule = ("--solver", "rk4", "--nfe", "400", "-q")
    t, fresh = 0.001, noise(randomness.key(0, "inversion"), range(12), (2,))
    start = (1 - t) * x0 + t * fresh

    def expected(labels: Tensor) -> Tensor:
        mean, std = flow.means[labels], flow.stds[labels]
        return ((start - (1 - t) * mean) / ((1 - t) ** 2 * std**2 + t**2).sqrt()).float()

    shell("sample", "analytic:ring", "--invert", "own.npz", *rule)
    torch.testing.assert_close(tensors("noise")["noise"], expected(own), atol=2e-3, rtol=0)
    shell("sample", "analytic:ring", "--invert", "own.npz", "--labels", "2,5", *rule)
    in_turn = torch.tensor([2, 5]).repeat(6)
    assert torch.equal(tensors("noise")["labels"], in_turn)
    torch.testing.assert_close(tensors("noise")["noise"], expected(in_turn), atol=5e-2, rtol=1e-3)
    shell("sample", "analytic:ring", "--invert", "bare.npz", "--labels", "null", *rule)
    assert set(tensors("noise")) == {"noise"}
    schedule = Schedule(tuple(1 - i / 100 for i in range(100)) + (0.0,), "by hand")
    again = lambda x, s, y: (1 - t) * flow(x, t + (1 - t) * s)  # noqa: E731
    whole = integrate(again, start, schedule, SOLVERS["rk4"], inverse=True)
    torch.testing.assert_close(tensors("noise")["noise"], whole, atol=1e-4, rtol=0)


def test_null_stands_for_no_class_of_samples_too(shell: Shell) -> None:
    shell("sample", "analytic:ring", "--labels", "null", "--count", "6", "--nfe", "3", "-q")
    eps, schedule = noise(0, range(6), (2,)), Schedule((1.0, 2 / 3, 1 / 3, 0.0), "by hand")
    torch.testing.assert_close(tensors()["samples"], integrate(ring(), eps, schedule, SOLVERS["euler"]))
    assert "labels" not in tensors()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_null_is_refused_where_the_network_has_no_null_class(shell: Shell, dropout: float) -> None:
    arguments = {
        "input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2,
        "num_classes": 3, "class_dropout_prob": dropout,
    }  # fmt: skip
    new(Card(architecture="dit", arguments=arguments, shape=(1, 4, 4), classes=3)).write(
        Path("m.safetensors")
    )
    asked = "m.safetensors --labels null --count 2"
    if dropout:
        assert shell("sample", "-q", *asked.split()).code == 0
    else:
        assert refusal(shell, asked).startswith(
            "error: --labels null: no labels given, but the network has no null"
        )


def test_pictures_in_a_folder_are_shown_beside_what_they_came_back_as(shell: Shell) -> None:
    images, digits = data.DIGITS.batch(torch.arange(11))
    for number, (image, digit) in enumerate(zip(images, digits.tolist(), strict=True)):
        folder = Path("pictures", str(digit))
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((image[0] + 1) * 127.5).round().to(torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    options = ("--solver", "heun", "--nfe", "31", "-q")
    answer = shell("sample", "builtin:digits", "--invert", "pictures", *options, "--json").json
    assert answer["count"] == 11 and answer["round_trip_error"] < 0.05
    assert tensors("noise")["labels"].tolist() == sorted(digits.tolist())
    with Image.open(OUT / "grid.png") as grid:
        pixels = np.asarray(grid.convert("L")).astype(float)
    assert pixels.shape[0] == 4 * 66 + 2, "8 and 3 pictures of 64 points, and as many below"
    above, below = pixels[:66, -530:], pixels[66:132, -530:]
    assert np.abs(above - below).mean() < 8 < np.abs(above - pixels[132:198, -530:]).mean()


def test_samples_that_cannot_be_drawn_are_inverted_without_a_picture(shell: Shell) -> None:
    new(Card(architecture="mlp", arguments={"shape": [3], "width": 8}, shape=(3,))).write(
        Path("m.safetensors")
    )
    np.savez("x.npz", samples=np.ones((2, 3), np.float32))
    found = shell("sample", "m.safetensors", "--invert", "x.npz", "--json", "-q").json
    assert [Path(file).name for file in found["files"]] == ["noise.safetensors", "samples.safetensors"]
    assert not (OUT / "grid.png").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    ("analytic:ring --invert bare.npz", "bare.npz: has no labels, and the model has 8 classes: add --labels"),
    ("analytic:ring --invert wrong.npz", "wrong.npz: labels 0 to 8, the model has 0 to 7"),
    ("analytic:ring --invert digits", "digits: has samples of shape [1, 8, 8], the model's have [2]"),
    ("analytic:gaussian --invert bare.npz --labels 0", "--labels: this model has no classes"),
    ("analytic:gaussian --invert bare.npz --labels null", "--labels: this model has no classes"),
    ("analytic:gaussian --invert bare.npz --solver reinterpolate", "solver reinterpolate has no way from "
     "data to noise; those that have one are euler, heun, midpoint, rk4, rf-solver, ab2, midpoint-cached, "
     "fireflow, pec, dpm++2m"),
])  # fmt: skip
def test_what_cannot_be_inverted_is_refused(shell: Shell, arguments: str, message: str) -> None:
    x0 = np.zeros((9, 2), np.float32)
    np.savez("bare.npz", samples=x0)
    np.savez("wrong.npz", samples=x0, labels=np.arange(9))
    assert refusal(shell, arguments) == f"error: {message}"


def test_a_file_that_is_not_there_is_an_input_that_is_missing(shell: Shell) -> None:
    answer = shell("sample", "analytic:gaussian", "--invert", "nowhere", "-q")
    assert answer.code == 3 and "nowhere: no such file or folder" in answer.err


@pytest.mark.parametrize(("stage", "allowed"), [
    ("pairs: {solver: %s}", False),
    ("eval: {reference: {solver: %s}}", False),
    ("eval: {solver: %s, nfe: [1]}", True),
])  # fmt: skip
def test_rules_that_solve_no_ode_are_for_sampling_only(shell: Shell, stage: str, allowed: bool) -> None:
    Path("r.yaml").write_text(f"teacher: analytic:ring\nstages:\n  - {stage % 'reinterpolate'}\n")
    answer = shell("validate", "r.yaml")
    assert answer.code == (0 if allowed else 2)
    if not allowed:
        assert re.search(
            r"solver: unknown solver 'reinterpolate'.* \(euler, heun, midpoint, rk4, rf-solver", answer.err
        )
