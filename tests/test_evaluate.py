"""The eval stage end to end, against closed forms: what a Gaussian's samples must come out as."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from test_lpips import drawn
from torch import Tensor

from flowdistill import artifact, networks, teachers
from flowdistill.analytic import gaussian
from flowdistill.data import SHAPES
from flowdistill.errors import ArtifactError, Diverged, Interrupted, UsageError
from flowdistill.evaluation import extractors, lpipsdistance, metrics, table
from flowdistill.evaluation.choices import Measured
from flowdistill.evaluation.kinds import KINDS
from flowdistill.networks.classifier import Classifier
from flowdistill.randomness import key, noise
from flowdistill.stages.eval import Evaluate
from flowdistill.teachers import Card
from flowdistill.work import Progress, Stop, Work

GAUSSIAN = {"name": "analytic:gaussian", "dim": 2}
QUICK: dict[str, Any] = {"samples": 600, "straightness": 16, "latency": False, "batch_size": 128}


@dataclass
class Result:
    """What an evaluation left behind."""

    folder: Path
    progress: list[Progress] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def content(self) -> dict[str, Any]:
        return artifact.load_json(self.folder / "eval.json")

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in self.content["rows"]}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return artifact.load_tensors(self.folder / "samples.safetensors")[0]


def evaluate(
    folder: Path,
    models: Mapping[str, Any],
    schedule: Path | None = None,
    on_progress: Callable[[Progress, Stop], None] = lambda progress, stop: None,
    inputs: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Run the stage as the pipeline does."""
    folder.mkdir(exist_ok=True)
    found, stop = Result(folder), Stop()

    def report(progress: Progress) -> None:
        found.progress.append(progress)
        on_progress(progress, stop)

    stage = Evaluate.model_validate_json(
        json.dumps({"name": "eval", "models": list(models), **QUICK, **settings})
    )
    inputs = {"models": list(models.items()), "schedule": schedule, **(inputs or {})}
    work = Work(
        stage="eval", folder=folder, seed=3, device="cpu", inputs=inputs, parents={}, settings={},
        report=report, stop=stop,
    )  # fmt: skip
    done = stage.run(work)
    assert all((folder / name).is_file() for name in done.outputs)
    found.figures = done.figures
    return found


def save(path: Path, architecture: str, arguments: dict[str, Any], **card: Any) -> str:
    """A model file with a new network's weights."""
    torch.manual_seed(0)
    network = networks.build(architecture, arguments)
    Card(architecture=architecture, arguments=arguments, **card).write(path, network.state_dict())
    return str(path)


def still(path: Path) -> str:
    """A new MLP, whose velocity is 0: every sample is its noise."""
    return save(path, "mlp", {"shape": [2], "width": 8}, shape=(2,), data="analytic:gaussian")


def noises(count: int, seed: int = 0) -> Tensor:
    return noise(key(seed, "evaluation"), range(count), (2,)).double()


def euler(eps: Tensor, times: Sequence[float]) -> Tensor:
    """Where Euler's steps carry noise in the Gaussian's flow.

    x - (1-t) mu shrinks by 1 - (t-s) c'/c in the step from t to s, c^2 = (1-t)^2 s^2 + t^2.
    """
    flow, y = gaussian((2,)), eps
    for t, s in itertools.pairwise(times):
        variance = flow.stds[0] ** 2
        y = y * (1 - (t - s) * (t - (1 - t) * variance) / ((1 - t) ** 2 * variance + t**2))
    return flow.means[0] + y


# --- closed forms ---------------------------------------------------------------------------------


def test_one_step_of_a_gaussian_is_its_mean(tmp_path: Path) -> None:
    """v(eps, 1) = eps - mu, so Euler's one step ends at mu, and the solution is mu + s eps."""
    found = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[1])
    row, stds = found.rows["teacher-1"], gaussian((2,)).stds[0]
    error = found.tensors["teacher-1.endpoint_error"]
    expected = (stds * noises(512)).square().mean(1).sqrt()
    assert torch.allclose(error, expected, atol=3e-3), "Heun's 63 evaluations are nearly exact"
    assert row["metrics"]["endpoint_error@512"]["value"] == pytest.approx(float(error.mean()))
    distance = row["metrics"]["fd@600"]
    assert distance["value"] == pytest.approx(float((stds**2).sum()), rel=1e-5)
    assert distance["high"] - distance["low"] < 1e-5, "all samples are the same"
    assert distance["extractor"] == "analytic:gaussian-coordinates"
    assert row["skipped"] == {"accuracy": "the model or its data has no classes"}
    assert row["times"] == [1.0, 0.0] and row["forward_passes"] == row["nfe"] == 1


def test_more_steps_come_nearer_and_real_data_is_the_floor(tmp_path: Path) -> None:
    found = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[8, 1, 2, 2, 32])
    assert list(found.rows) == ["teacher-1", "teacher-2", "teacher-8", "teacher-32"]
    errors = [row["metrics"]["endpoint_error@512"] for row in found.rows.values()]
    distances = [row["metrics"]["fd@600"] for row in found.rows.values()]
    for figures in (errors, distances):
        assert all(a["low"] > b["high"] for a, b in zip(figures[:-1], figures[1:-1], strict=False))
        assert all(f["low"] <= f["value"] <= f["high"] for f in figures)
    floor = found.content["data"]["metrics"]["fd@600"]
    assert 0 < floor["value"] < 0.02
    assert floor["low"] <= distances[-1]["value"]


def test_a_model_that_stands_still(tmp_path: Path) -> None:
    """Its samples are the noises of the others' rows, its paths have no length."""
    models = {"teacher": GAUSSIAN, "still": still(tmp_path / "still.safetensors")}
    found = evaluate(tmp_path / "eval", models, nfe={"teacher": [4], "still": [1, 3]})
    assert list(found.rows) == ["teacher-4", "still-1", "still-3"]
    flow, eps = gaussian((2,)), noises(512)
    expected = metrics.endpoint_error(eps, flow.flow_map(eps))
    for steps in (1, 3):
        error = found.tensors[f"still-{steps}.endpoint_error"]
        assert torch.allclose(error, expected, atol=3e-3)
    error = metrics.endpoint_error(euler(eps, [1.0, 0.75, 0.5, 0.25, 0.0]), flow.flow_map(eps))
    assert torch.allclose(found.tensors["teacher-4.endpoint_error"], error, atol=3e-3)
    distance = found.rows["still-1"]["metrics"]["fd@600"]
    extractor = extractors.extractor(teachers.open_model(GAUSSIAN).card)
    assert extractor is not None
    of_noise = extractor.reference.estimate(noises(600))
    assert distance["value"] == pytest.approx(of_noise.value, rel=1e-6)
    assert distance["high"] == pytest.approx(of_noise.high, rel=1e-6)
    shift, narrowing = flow.means[0].square().sum(), (1 - flow.stds[0]).square().sum()
    assert distance["value"] == pytest.approx(float(shift + narrowing), rel=0.15)
    still_paths = found.content["models"]["still"]["metrics"]
    assert still_paths["straightness@16"]["value"] == 0.0
    assert found.content["models"]["still"]["skipped"] == {"curvature": "the samples are their noise"}
    teacher_paths = found.content["models"]["teacher"]["metrics"]
    total, per_dim, norm = (
        teacher_paths[f"straightness{ending}@16"]["value"] for ending in ("", "_per_dim", "_norm")
    )
    assert total == pytest.approx(2 * per_dim) and total > 0.01
    assert 0 < norm < total**0.5  # Jensen's inequality
    for figure in teacher_paths.values():
        assert figure["low"] < figure["value"] < figure["high"]
        assert (figure["n"], figure["paths"]) == (16, "32 Euler steps")
    times = [1 - step / 32 for step in range(33)]
    moved = (noises(16) - euler(noises(16), times)).square().sum(1).mean()
    assert teacher_paths["curvature@16"]["value"] == pytest.approx(total / float(moved), rel=1e-4)


def test_classes_are_as_frequent_as_in_the_data(tmp_path: Path) -> None:
    """The ring's eight components weigh 2 to 9 of 44; with equal shares the mean would be off."""
    found = evaluate(tmp_path, {"teacher": "analytic:ring"}, nfe=[1], samples=2000)
    labels = found.tensors["label"]
    share = labels.bincount(minlength=8) / 2000
    assert torch.allclose(share, torch.arange(2, 10) / 44, atol=0.03)
    row = found.rows["teacher-1"]["metrics"]
    # One step ends at the component's own mean.
    assert row["accuracy@2000"]["value"] == 1.0
    assert found.tensors["teacher-1.correct"].all()
    assert row["fd@2000"]["value"] < 4e-3


# --- what each sample has for itself, and what sampling costs -----------------------------------------


def upwards(x: Tensor, times: Sequence[float]) -> Tensor:
    """Euler's steps from the data at t = 0 to the noise, in the Gaussian's flow: see `euler`."""
    flow = gaussian((2,))
    y = x - flow.means[0]
    for s, t in itertools.pairwise(times[::-1]):
        variance = flow.stds[0] ** 2
        y = y * (1 + (t - s) * (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2))
    return y


def test_the_way_back_to_the_noise_is_the_same_solvers(tmp_path: Path) -> None:
    found = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[1, 4, 64], inversion=40)
    for steps in (1, 4, 64):
        times = [1 - step / steps for step in range(steps + 1)]
        expected = metrics.endpoint_error(upwards(euler(noises(40), times), times), noises(40))
        error = found.tensors[f"teacher-{steps}.inversion"]
        assert torch.allclose(error, expected, atol=1e-4)
        figure = found.rows[f"teacher-{steps}"]["metrics"]["inversion@40"]
        assert figure["value"] == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.tensors["teacher-64.inversion"].mean() < 0.1 * found.tensors["teacher-4.inversion"].mean()
    total = found.progress[-1]
    assert total.done == total.total


def test_solvers_without_a_way_back_and_too_few_samples_say_so(tmp_path: Path) -> None:
    found = evaluate(tmp_path / "a", {"teacher": GAUSSIAN}, nfe=[2], solver="reinterpolate")
    assert found.rows["teacher-2-reinterpolate"]["skipped"]["inversion"] == (
        "solver reinterpolate has no way from data to noise"
    )
    found = evaluate(tmp_path / "b", {"teacher": GAUSSIAN}, nfe=[2], inversion=1)
    assert found.rows["teacher-2"]["skipped"]["inversion"] == "fewer than 2 samples; raise `inversion`"


def test_every_figure_is_in_the_samples_as_a_mean_an_influence_or_a_quantile(tmp_path: Path) -> None:
    found = evaluate(tmp_path, {"teacher": "analytic:ring"}, nfe=[2], inversion=8)
    row, tensors = found.rows["teacher-2"]["metrics"], found.tensors
    for name, figure in row.items():
        kind, n = name.split("@")
        assert kind in KINDS and figure["n"] == int(n) and figure["low"] <= figure["value"] <= figure["high"]
        stem = f"teacher-2.{'correct' if kind == 'accuracy' else kind}"
        if stem in tensors:
            assert float(tensors[stem].double().mean()) == pytest.approx(figure["value"], rel=1e-9)
            assert len(tensors[stem]) == figure["n"]
        elif f"{stem}.influence" in tensors:
            influence = tensors[f"{stem}.influence"].double()
            assert len(influence) == 600 and abs(float(influence.mean())) < 1e-6 * float(influence.std())
        else:
            share = {"endpoint_error_median": 0.5, "endpoint_error_p95": 0.95}[kind]
            assert figure["value"] == pytest.approx(
                float(tensors["teacher-2.endpoint_error"].quantile(share))
            )
    assert {name.partition("@")[0] for name in row} == {
        "fd", "kd", "precision", "recall", "accuracy", "inversion",
        "endpoint_error", "endpoint_error_median", "endpoint_error_p95",
    }  # fmt: skip
    assert (found.content["format"], found.content["preprocessing"]) == (1, None)
    own = found.content["features"]["shipped"]
    assert own["extractor"] == found.content["extractor"]
    assert own["reference"] == "analytic:ring, 600 real samples"


def test_images_are_compared_with_the_solution_as_images(tmp_path: Path, assets: Path, squeeze: Path) -> None:
    """A random network's solution, and samples that are their noise."""
    model, other = unet(tmp_path / "net.safetensors", data="shapes"), tmp_path / "moved.safetensors"
    unet(other, data="shapes")
    tensors, header = artifact.load_tensors(other)
    torch.manual_seed(1)
    moved = {name: 0.1 * torch.randn_like(each) + each for name, each in tensors.items()}
    artifact.save_tensors(other, moved, header)
    lpips = {"net": "squeeze", "resolution": 32, "weights": str(squeeze)}
    settings: dict[str, Any] = {"samples": 24, "reference": {"steps": 1, "samples": 12}, "straightness": 0}
    found = evaluate(
        tmp_path / "eval", {"net": str(other), "still": model}, nfe=[1], lpips=lpips,
        inputs={"lpips.weights": str(squeeze)}, **settings,
    )  # fmt: skip
    eps = noise(key(0, "evaluation"), range(12), (3, 16, 16))
    labels = found.tensors["label"][:12]
    solution = eps - teachers.open_model(str(other)).field(eps, torch.ones(12), labels)
    clamped = (eps.clamp(-1, 1) - solution.clamp(-1, 1)).square().flatten(1).mean(1)
    expected = 10 * (4 / clamped).log10()
    assert torch.allclose(found.tensors["still-1.psnr"].float(), expected, rtol=1e-4)
    assert (found.tensors["net-1.psnr"] == 100).all()
    card = teachers.open_model(str(other)).card
    choice = Measured(net="squeeze", resolution=32)
    published = lpipsdistance.lpips_distance(choice, card, squeeze)
    assert torch.allclose(found.tensors["still-1.lpips"], published(eps, solution), rtol=1e-4)
    assert found.rows["still-1"]["metrics"]["lpips@12"]["extractor"] == published.label
    perceptual = extractors.perceptual(Card(architecture="", shape=(3, 16, 16), data="shapes"))
    assert perceptual is not None
    assert torch.allclose(found.tensors["still-1.perceptual"], perceptual(eps, solution), rtol=1e-4)
    assert not {"lpips", "perceptual"} & found.rows["still-1"]["skipped"].keys()


@pytest.mark.parametrize(
    ("lpips", "reason"),
    [
        ({}, "images of 16 pixels are too small for net: alex, which needs 32; give `lpips.resolution`"),
        ({"resolution": 64}, "alexnet-owt-7be5be79.pth: no such file"),
    ],
)
def test_lpips_that_cannot_be_had_is_skipped(
    lpips: dict[str, Any], reason: str, tmp_path: Path, assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = evaluate(
        tmp_path / "eval", {"net": unet(tmp_path / "net.safetensors", data="shapes")},
        nfe=[1], samples=4, reference={"steps": 1}, straightness=0, lpips=lpips,
    )  # fmt: skip
    assert reason in found.rows["net-1"]["skipped"]["lpips"]
    assert "lpips@4" not in found.rows["net-1"]["metrics"]


def test_guidance_makes_two_passes_where_it_applies(tmp_path: Path) -> None:
    """Of the times 1, 0.75, 0.5 and 0.25, one lies within."""
    guidance = {"scale": 2.0, "interval": [0.3, 0.6]}
    model = unet(tmp_path / "net.safetensors", data="shapes", null_label=8)
    teacher = {"name": model, "guidance": guidance, "probe": False}
    settings: dict[str, Any] = {"samples": 4, "reference": {"steps": 1}, "straightness": 0}
    found = evaluate(tmp_path / "eval", {"guided": teacher, "plain": model}, nfe=[4], **settings)
    passes = {name: (row["nfe"], row["forward_passes"]) for name, row in found.rows.items()}
    assert passes == {"guided-4": (4, 5), "plain-4": (4, 4)}


def test_multiply_adds_are_those_of_the_network(tmp_path: Path) -> None:
    path = still(tmp_path / "still.safetensors")
    found = evaluate(tmp_path / "eval", {"still": path, "teacher": GAUSSIAN}, nfe=[1]).content["models"]
    network = teachers.open_model(path).network
    layers = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    assert found["still"]["macs"] == sum(each.weight.numel() for each in layers) > 0
    assert found["still"]["parameters"] == sum(each.numel() for each in network.parameters())
    assert found["teacher"]["macs"] is None, "a formula is no network"


# --- keeping and comparing ------------------------------------------------------------------------


def lasting(content: dict[str, Any]) -> dict[str, Any]:
    """What is the same whenever it is measured."""
    return {name: each for name, each in content.items() if name not in ("latency", "throughput", "memory")}


def test_an_interrupted_evaluation_continues_and_ends_the_same(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"nfe": [1, 2, 4], "latency": True, "samples": 300}
    whole = evaluate(tmp_path / "whole", {"teacher": "analytic:ring"}, **settings)
    total = whole.progress[-1].total
    assert whole.progress[-1].done == total

    def interrupt(progress: Progress, stop: Stop) -> None:
        if progress.done > total - 2 * 300:
            stop.signum = 15

    folder = tmp_path / "parts"
    with pytest.raises(Interrupted):
        evaluate(folder, {"teacher": "analytic:ring"}, on_progress=interrupt, **settings)
    assert not (folder / "eval.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()}
    assert len(kept) == 5, "the real data, the solution, the paths, two of three rows"
    continued = evaluate(folder, {"teacher": "analytic:ring"}, **settings)
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (folder / "checkpoints").iterdir()}.items()
    assert continued.progress[-1].done == total
    assert lasting(continued.content) == lasting(whole.content)
    for name in ("samples.safetensors", "grid.png"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = evaluate(folder, {"teacher": "analytic:ring"}, **settings)
    assert again.content == continued.content, "latencies are kept too"
    assert set(again.content["latency"]["teacher-4"]) == {"p50_ms", "p95_ms", "runs"}
    assert again.content["throughput"]["teacher-4"]["batch_size"] == 128
    assert again.content["throughput"]["teacher-4"]["samples_per_second"] > 0
    assert again.content["memory"]["teacher-4"]["peak_mb"] > 10


def test_what_is_kept_belongs_to_its_settings_and_models(tmp_path: Path) -> None:
    first = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[1], reference={"samples": 64}).rows
    other = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[1], reference={"samples": 64}, seed=1)
    assert other.rows["teacher-1"] != first["teacher-1"]
    fine = evaluate(tmp_path, {"teacher": GAUSSIAN}, nfe=[1], reference={"samples": 64, "steps": 2})
    assert fine.rows["teacher-1"]["metrics"] != first["teacher-1"]["metrics"]
    path = {"teacher": still(tmp_path / "still.safetensors")}
    still_row = evaluate(tmp_path, path, nfe=[1], reference={"samples": 64}).rows["teacher-1"]
    assert still_row["metrics"] != first["teacher-1"]["metrics"]


def test_the_noise_is_neither_that_of_training_nor_of_another_seed(tmp_path: Path) -> None:
    """The stage's own seed (3, here) makes no difference, so that runs of several seeds compare."""
    errors = [
        evaluate(tmp_path / str(seed), {"teacher": GAUSSIAN}, nfe=[1], seed=seed).tensors[
            "teacher-1.endpoint_error"
        ]
        for seed in (0, 1)
    ]
    stds = gaussian((2,)).stds[0]
    for seed, error in enumerate(errors):
        expected = (stds * noises(512, seed)).square().mean(1).sqrt()
        assert torch.allclose(error, expected, atol=3e-3)
    assert not torch.allclose(errors[0], errors[1], atol=3e-3)


# --- schedules ------------------------------------------------------------------------------------


def schedule(folder: Path, model: str, nfe: int, times: list[float]) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"nfe": nfe, "solver": "euler", "times": times, "model": model}
    artifact.save_json(folder / f"schedule-nfe{nfe}.json", content)
    return folder


def test_a_schedule_is_tried_on_its_own_model_beside_uniform_steps(tmp_path: Path) -> None:
    digest = teachers.open_model(GAUSSIAN).digest
    folder = schedule(tmp_path / "boss", digest, 2, [1.0, 0.7, 0.0])
    schedule(tmp_path / "boss", digest, 4, [1.0, 0.75, 0.5, 0.25, 0.0])
    schedule(tmp_path / "boss", digest, 3, [1.0, 0.8, 0.3, 0.0])
    models = {"teacher": GAUSSIAN, "still": still(tmp_path / "still.safetensors")}
    found = evaluate(tmp_path / "eval", models, folder, nfe=[2, 4])
    # Four steps turned out uniform, and three were not asked for.
    assert list(found.rows) == ["teacher-2", "teacher-2-boss", "teacher-4", "still-2", "still-4"]
    assert found.rows["teacher-2-boss"]["times"] == [1.0, 0.7, 0.0]
    exact = gaussian((2,)).flow_map(noises(512))
    expected = metrics.endpoint_error(euler(noises(512), [1.0, 0.7, 0.0]), exact)
    error = found.tensors["teacher-2-boss.endpoint_error"]
    assert torch.allclose(error, expected, atol=3e-3)


def test_a_schedule_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = schedule(tmp_path / "boss", "0" * 64, 2, [1.0, 0.7, 0.0])
    with pytest.raises(ArtifactError, match="no schedule for teacher"):
        evaluate(tmp_path / "eval", {"teacher": GAUSSIAN}, folder, nfe=[2])


# --- images ---------------------------------------------------------------------------------------


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small random classifier of shapes, in the place of the package's own."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"shape": [3, 16, 16], "classes": 8, "channels": [4, 4, 6]}
    network = Classifier(**arguments)
    mean, covariance, _ = extractors.measure(network, SHAPES, 400)
    network.reference_mean.copy_(mean)
    network.reference_covariance.copy_(covariance)
    card = Card(kind="classifier", architecture="classifier", arguments=arguments, shape=(3, 16, 16))
    card.write(tmp_path / "shapes-classifier.safetensors", network.state_dict())
    monkeypatch.setattr(teachers, "ASSETS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a small network of LPIPS."""
    path = tmp_path_factory.mktemp("squeeze") / "squeeze.safetensors"
    save_file(drawn("squeeze"), path)
    return path


def unet(path: Path, **card: Any) -> str:
    """A new network, whose velocity is 0."""
    arguments = {"shape": [3, 16, 16], "classes": 8, "channels": 4, "multipliers": [1, 1]}
    return save(path, "unet", arguments, shape=(3, 16, 16), classes=8, **card)


def test_images(tmp_path: Path, assets: Path) -> None:
    model = unet(tmp_path / "net.safetensors", data="shapes")
    settings: dict[str, Any] = {"samples": 90, "reference": {"steps": 2, "samples": 40}}
    found = evaluate(tmp_path / "eval", {"net": model}, nfe=[1], **settings)
    row, real = found.rows["net-1"], found.content["data"]
    label = found.content["extractor"]
    assert label.startswith("shapes-classifier@")
    assert row["metrics"]["fd@90"]["extractor"] == real["metrics"]["fd@90"]["extractor"] == label
    extractor = extractors.extractor(Card(architecture="", shape=(3, 16, 16), data="shapes"))
    assert extractor is not None
    eps = noise(key(0, "evaluation"), range(90), (3, 16, 16))
    features, classes = extractor.read(eps)
    assert row["metrics"]["fd@90"]["value"] == pytest.approx(extractor.reference.estimate(features).value)
    assert row["metrics"]["fd@90"]["value"] > 10 * real["metrics"]["fd@90"]["value"]
    images, labels = SHAPES.held_out.batch(torch.arange(90), key(0, "evaluation"))
    assert torch.equal(found.tensors["label"], labels)
    assert classes is not None
    assert torch.equal(found.tensors["net-1.correct"], classes == labels)
    of_real = extractor.read(images)[1]
    assert of_real is not None
    assert real["metrics"]["accuracy@90"]["value"] == float((of_real == labels).double().mean())
    assert row["metrics"]["endpoint_error@40"]["value"] == 0.0


def test_what_cannot_be_computed_is_skipped_with_its_reason(tmp_path: Path, assets: Path) -> None:
    few = evaluate(
        tmp_path / "few", {"net": unet(tmp_path / "net.safetensors", data="shapes")},
        nfe=[1], samples=10, reference={"steps": 1}, straightness=0,
    )  # fmt: skip
    skipped = few.rows["net-1"]["skipped"]
    assert set(skipped) == {"fd", "fid", "kid", "lpips", "endpoint_error_p95"}
    assert skipped["fd"] == "10 samples are too few for 14 features"
    assert skipped["fid"].startswith("not asked for; `features: {inception: {}}`")
    assert skipped["endpoint_error_p95"].startswith("10 pairs are too few")
    assert few.content["models"]["net"]["skipped"] == {"straightness": "fewer than 2 paths"}
    foreign = evaluate(
        tmp_path / "foreign", {"net": unet(tmp_path / "other.safetensors")},
        nfe=[1], samples=20, reference={"steps": 1},
    )  # fmt: skip
    reason = "there is no feature extractor for the data of the model"
    kinds = {"fd", "kd", "precision", "recall", "accuracy"}
    skipped = foreign.rows["net-1"]["skipped"]
    assert {kind for kind, why in skipped.items() if why == reason} == kinds
    found = {name.partition("@")[0] for name in foreign.rows["net-1"]["metrics"]}
    assert found == {"endpoint_error", "endpoint_error_median", "psnr", "inversion"}
    assert set(foreign.content["data"]["skipped"]) == {"fd", "accuracy"}
    assert foreign.content["extractor"] is None
    assert foreign.tensors["label"].shape == (20,)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": ["a", "a"]}, "listed twice"),
        ({"nfe": {"a": [1], "techer": [2]}, "models": ["a", "teacher"]}, "did you mean 'teacher'"),
        ({"nfe": {"a": [1]}, "models": ["a", "b"]}, "no entry for model 'b'"),
        ({"nfe": [1, 2], "solver": "heun"}, "heun cannot make exactly 2 evaluations: 1 or 3"),
        ({"nfe": {"a": [3]}, "models": ["a"], "solver": "rk4"}, "rk4 cannot make exactly 3"),
        ({"nfe": [0]}, "greater than or equal to 1"),
        ({"nfe": []}, "at least 1 item"),
        ({"samples": 1}, "greater than or equal to 2"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Evaluate.model_validate_json(json.dumps({"name": "eval", **settings}))


def test_models_of_different_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="agree in data, found teacher analytic:gaussian, ring"):
        evaluate(tmp_path, {"teacher": GAUSSIAN, "ring": "analytic:ring"}, nfe=[1])
    three = {"teacher": GAUSSIAN, "three": {"name": "analytic:gaussian", "dim": 3}}
    with pytest.raises(UsageError, match=r"agree in shape, found teacher \(2,\), three \(3,\)"):
        evaluate(tmp_path, three, nfe=[1])


def test_a_model_that_makes_nan_is_named(tmp_path: Path) -> None:
    path = Path(still(tmp_path / "broken.safetensors"))
    tensors, header = artifact.load_tensors(path)
    tensors["out.bias"] += 1e38
    tensors["first.weight"] += 1e3
    artifact.save_tensors(path, tensors, header)
    models = {"teacher": GAUSSIAN, "broken": str(path)}
    with pytest.raises(Diverged, match="broken, 2 NFE: the samples are not finite") as error:
        evaluate(tmp_path / "eval", models, nfe={"teacher": [1], "broken": [2]}, straightness=0)
    assert error.value.exit_code == 6


def test_paths_get_short_names_where_these_are_unique(tmp_path: Path) -> None:
    for folder in ("a", "b/reflow"):
        (tmp_path / folder).mkdir(parents=True)
    paths = [
        still(tmp_path / "a" / "model.safetensors"),
        still(tmp_path / "b" / "reflow" / "model.safetensors"),
        str(tmp_path / "b" / "reflow"),
        still(tmp_path / "plain.safetensors"),
    ]
    found = evaluate(tmp_path / "eval", {path: path for path in paths}, nfe=[1], samples=8)
    assert [row["model"] for row in found.content["rows"]] == ["a", paths[1], paths[2], "plain"]


# --- the table ------------------------------------------------------------------------------------


def test_the_table(tmp_path: Path) -> None:
    models = {"teacher": GAUSSIAN, "still": still(tmp_path / "still.safetensors")}
    settings: dict[str, Any] = {"nfe": {"teacher": [1, 3], "still": [1]}, "solver": "heun"}
    found = evaluate(tmp_path / "eval", models, latency=True, **settings)
    rows = table(found.content)
    headings = ["model", "NFE", "steps", "fd@600", "endpoint_error@512", "ms"]
    assert all(list(row) == headings for row in rows)
    names = [(row["model"], row["NFE"], row["steps"]) for row in rows]
    assert names == [
        ("real data", "", ""),
        ("teacher", "1", "uniform, heun"),
        ("teacher", "3", "uniform, heun"),
        ("still", "1", "uniform, heun"),
    ]
    distance = found.rows["teacher-3-heun"]["metrics"]["fd@600"]
    assert rows[2]["fd@600"] == "{value:.3g} [{low:.3g}, {high:.3g}]".format(**distance)
    assert rows[0]["endpoint_error@512"] == rows[0]["ms"] == ""
    assert float(rows[1]["ms"]) > 0
    assert found.figures["still-1-heun"]["fd@600"] == pytest.approx(
        found.rows["still-1-heun"]["metrics"]["fd@600"]["value"]
    )
