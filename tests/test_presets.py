"""Recipes with published hyperparameters: they say what was published, and train, on small networks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from test_cli import ROOT, Shell
from test_importing import shaken, snapshot
from test_lpips import drawn
from tiny_pipelines import make

from flowdistill import artifact, networks
from flowdistill.pairstore import PairStore
from flowdistill.recipe import Recipe, load
from flowdistill.stages import Stage, verbs

RECIPES = ROOT / "recipes"
WIDTH = 110


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def read(name: str) -> Recipe[Stage]:
    return load(RECIPES / f"{name}.yaml", verbs(), missing_ok=True)


# What was published ----------------------------------------------------------------------------------------

UNIFORM, U_SHAPED = {"name": "uniform"}, {"name": "u-shaped", "a": 4.0}
SQUARED, HUBER = (
    {"name": "squared-l2", "on": "velocity"},
    {"name": "pseudo-huber", "on": "velocity", "c": None},
)
LPIPS = {"name": "lpips", "net": "vgg", "pooling": "average", "resolution": 224, "precision": "fp32"}
E = {"name": "lpips-huber", "distance": LPIPS | {"weights": None}, "share": 1.0, "divide_by_t": False}
F = E | {"divide_by_t": True}
CONFIGS: Mapping[str, tuple[Any, Any]] = {
    "a": (UNIFORM, SQUARED),
    "b": (UNIFORM, SQUARED),
    "c": (U_SHAPED, SQUARED),
    "d": (U_SHAPED, HUBER),
    "e": (U_SHAPED, E),
    "f": (U_SHAPED, F),
    "g": (U_SHAPED, F),
}
"""rf++'s densities of t and losses, by config (arXiv 2405.20320, Table 1)."""

# stages; pairs, their steps; steps of a training, batch size, parts, precision; lr, warm-up
PUBLISHED: Mapping[str, tuple[str, tuple[int, int], tuple[int, int, int, str], tuple[float, int]]] = {
    "cifar10": ("abcdefg", (1_000_000, 18), (800_000, 512, 1, "fp32"), (2e-4, 5000)),
    "afhq": ("bcdef", (1_000_000, 40), (1_000_000, 256, 1, "fp32"), (2e-4, 5000)),
    "ffhq": ("bcdef", (1_000_000, 40), (1_000_000, 256, 1, "fp32"), (2e-4, 5000)),
    "imagenet64": ("ef", (5_000_000, 40), (700_000, 2048, 4, "fp16"), (1e-4, 2500)),
}
TEACHERS = {
    "cifar10": "edm-cifar10-32x32-uncond-ve",
    "afhq": "edm-afhqv2-64x64-uncond-ve",
    "ffhq": "edm-ffhq-64x64-uncond-ve",
    "imagenet64": "edm-imagenet-64x64-cond-adm",
}
# What single stages have otherwise: a's batches; how g is fine-tuned.
OTHERWISE: Mapping[tuple[str, str], tuple[tuple[int, int, int, str], tuple[float, int]]] = {
    ("cifar10", "a"): ((800_000, 128, 1, "fp32"), (2e-4, 5000)),
    ("cifar10", "g"): ((5_000, 512, 1, "fp32"), (2e-5, 0)),
}
EDM_GRID = {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
CASES = [(name, stage) for name, (stages, *_) in PUBLISHED.items() for stage in stages]


def adam(lr: float, warmup: int, clip: float | None = None) -> dict[str, Any]:
    """The optimizer of a training."""
    return {
        "name": "adam",
        "lr": lr,
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "weight_decay": 0.0,
        "warmup": warmup,
        "decay": "constant",
        "decay_from": 0.0,
        "clip": clip,
    }


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_training_is_the_published_one(name: str, stage: str) -> None:
    recipe = read(f"rfpp/{name}")
    found = recipe.settings_json(stage)
    assert (found["timesteps"], found["loss"]) == CONFIGS[stage]
    numbers, (lr, warmup) = OTHERWISE.get((name, stage), PUBLISHED[name][2:])
    assert tuple(found[key] for key in ("steps", "batch_size", "accumulate", "precision")) == numbers
    assert found["optimizer"] == adam(lr, warmup)
    assert found["ema"] == {"decay": 0.9999, "ramp": False, "also": []}
    assert found["label_dropout"] == 0
    assert found["feed"]["weights"] == ([0.9, 0.1] if stage == "g" else None)
    assert not found["feed"]["flip"] and not found["feed"]["drop_farthest"] and not found["feed"]["subset"]
    begins = {"a": ("same", "teacher"), "g": (None, "f")}.get(stage, (None, "teacher"))
    assert (found["network"], recipe.references[stage]["init"]) == begins
    assert recipe.references[stage]["pairs"] == (("pairs", "real") if stage == "g" else "pairs")


@pytest.mark.parametrize("name", PUBLISHED)
def test_pairs_are_the_published_ones(name: str) -> None:
    recipe = read(f"rfpp/{name}")
    assert recipe.teacher == str(RECIPES / "rfpp" / f"{TEACHERS[name]}.safetensors")
    assert sorted(s.name for s in recipe.stages if s.verb == "reflow") == list(PUBLISHED[name][0])
    found = recipe.settings_json("pairs")
    assert (found["count"], found["steps"]) == PUBLISHED[name][1]
    assert (found["solver"], found["schedule"], found["dtype"]) == ("heun", EDM_GRID, "uint8")
    assert (found["precision"], found["guidance"], found["classes"]) == ("fp32", None, None)
    if name == "cifar10":
        real = recipe.settings_json("real")
        assert (real["source"], real["count"], real["invert_from"]) == ("data", 50_000, 0.001)


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> values, nested ones dotted, where two settings are not equal."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= {f"{key}.{inner}": each for inner, each in differing(old, new).items()}
        elif old != new:
            found[key] = old, new
    return found


@pytest.mark.parametrize("name", ["shapes", *PUBLISHED])
def test_each_config_adds_one_ingredient(name: str) -> None:
    recipe = read(f"rfpp/{name}")
    stages = [stage.name for stage in recipe.stages if stage.verb == "reflow" and stage.name != "g"]
    ingredients = {
        "b": {"network", "batch_size"} | ({"steps"} if name == "shapes" else set()),
        "c": {"timesteps.name", "timesteps.a"},
        "d": {"loss.name", "loss.c"},
        "e": {"loss.name", "loss.c", "loss.on", "loss.distance", "loss.share", "loss.divide_by_t"},
        "f": {"loss.divide_by_t"},
    }
    for before, stage in zip(stages, stages[1:], strict=False):
        found = differing(recipe.settings_json(before), recipe.settings_json(stage))
        assert found.pop("name") == (before, stage)
        assert found.keys() <= ingredients[stage], stage
        assert found.keys() & {"network", "timesteps.name", "loss.name", "loss.divide_by_t"}, stage
    if "b" in stages:  # all see as many pairs, or a as many steps
        a, b = (recipe.settings_json(stage) for stage in ("a" if "a" in stages else "b", "b"))
        assert a["steps"] == b["steps"] or a["steps"] * a["batch_size"] == b["steps"] * b["batch_size"]


def test_rectified_diffusion_is_the_published_one() -> None:
    recipe = read("rectified-diffusion")
    found, pairs = recipe.settings_json("reflow"), recipe.settings_json("pairs")
    assert recipe.references["reflow"]["init"] == "teacher" and found["network"] is None
    assert found["loss"] == {"name": "squared-l2", "on": "eps"}
    path = found["timesteps"]["interpolant"]
    assert found["timesteps"]["name"] == "native"
    assert (path["name"], path["betas"], path["beta_start"], path["beta_end"], path["steps"]) == (
        *("ddpm", "scaled_linear"),
        *(0.00085, 0.012, 1000),
    )
    assert (found["steps"], found["batch_size"], found["precision"]) == (200_000, 128, "fp16")
    optimizer = found["optimizer"]
    assert (optimizer["name"], optimizer["lr"], optimizer["weight_decay"], optimizer["clip"]) == (
        *("adamw", 5e-6),
        *(1e-3, 1.0),
    )
    assert (found["ema"]["decay"], found["ema"]["ramp"], found["label_dropout"]) == (0.9999, False, 0.1)
    assert isinstance(recipe.teacher, dict) and recipe.teacher["guidance"] == {"scale": 5.0}
    assert (pairs["count"], 2 * pairs["steps"] - 1, pairs["guidance"]) == (1_600_000, 25, None)


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_head_of_a_recipe_names_its_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert any("flowdistill run" in line or "flowdistill eval" in line for line in head)
    assert all(len(line) <= WIDTH for line in lines if not line.startswith("#"))
    stages = {stage.name: stage.verb for stage in load(path, verbs(), missing_ok=True).stages}
    for verb, stage in re.findall(r"flowdistill (\w+) \S+ --stage (\S+)", "\n".join(head)):
        assert stages[stage] == verb


# Without the weights ---------------------------------------------------------------------------------------


FOREIGN = [
    *(f"rfpp/{name}" for name in PUBLISHED),
    *(f"slimflow/{name}" for name in ("cifar10", "ffhq", "imagenet64")),
    *("rectified-diffusion", "instaflow"),
]
"""Recipes whose teachers do not ship."""


@pytest.mark.parametrize("name", FOREIGN)
def test_a_recipe_is_valid_where_its_files_are_not(name: str, shell: Shell) -> None:
    answer = shell("validate", name)
    assert (answer.code, answer.err) == (0, "")
    assert f"{name}: no mistakes" in answer.out and "not there, and needed before it runs:" in answer.out
    missing = shell("validate", name, "--json").json["missing"]
    teacher = read(name).teacher
    file = f"teacher: '{Path(teacher).name}'" if isinstance(teacher, str) else "teacher.prompts: 'prompts"
    of_g = ["real.data: 'cifar10-train.npz' does not exist"] if name == "rfpp/cifar10" else []
    for line, words in zip(missing, [file, *of_g], strict=True):
        assert words in line and f"{name}.yaml:" in line


@pytest.mark.parametrize("command", ["run", "plan", "status", "reflow"])
def test_work_without_the_weights_is_refused_with_the_place(command: str, shell: Shell) -> None:
    assert shell("recipes", "copy", "rfpp/afhq", ".").code == 0
    answer = shell(command, "afhq.yaml")
    assert answer.code == 2
    assert "afhq.yaml:" in answer.err and "afhqv2-64x64-uncond-ve.safetensors' does not exist" in answer.err


def test_mistakes_are_told_together_with_missing_files(shell: Shell) -> None:
    Path("r.yaml").write_text("teacher: a.safetensors\nstages:\n  - pairs: {cuont: 1}\n")
    told = shell("validate", "r.yaml").err.splitlines()
    assert [line.split(": ")[0] for line in told] == ["r.yaml:1:10", "r.yaml:3:13"]


def test_a_teacher_that_is_there_is_still_looked_at(shell: Shell) -> None:
    Path("r.yaml").write_text("teacher: builtin:shape\nstages:\n  - pairs: {labels: l.txt}\n")
    answer = shell("validate", "r.yaml")
    assert answer.code == 2 and "did you mean 'shapes'?" in answer.err


# With weights: EDM's layouts, small and random -------------------------------------------------------------

SMALL = {
    "pairs": "count=8 steps=2 batch_size=4 shard_size=4 check=2",
    "real": "count=8 steps=2 batch_size=4 shard_size=4 check=2",
    "reflow": "steps=2 batch_size=4 optimizer.warmup=1 log_every=1",
    "slimflow": "steps=3 batch_size=4 optimizer.warmup=1 log_every=1",
    "distill": "steps=2 batch_size=4 log_every=1",
    "eval": "samples=4 batch_size=4 reference.steps=2 reference.samples=4 straightness=2 latency=false",
}
ADM = {
    "img_resolution": 8,
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 2,
    "attn_resolutions": [8],
    "dropout": 0.1,
}


def smaller(recipe: Recipe[Stage], teacher: str) -> list[str]:
    """Overrides that make a preset one of seconds; random networks would not pass the probe."""
    changes = [f"teacher={{name: {teacher}, probe: false}}"]
    for stage in recipe.stages:
        found = recipe.settings_json(stage.name)
        own = SMALL[stage.name if stage.name in SMALL else stage.verb].split()
        if found.get("loss", {}).get("distance"):
            own += ["loss.distance.resolution=16", "loss.distance.weights=vgg.safetensors"]
        if found.get("annealing", {}).get("steps"):
            own += ["annealing.steps=2"]
        if found.get("precision") == "fp16":  # is for GPUs
            own += ["precision=bf16"]
        changes += [f"{stage.name}.{change}" for change in own]
    return overriding(*changes)


def overriding(*changes: str) -> list[str]:
    """The changes as options of a command."""
    return [part for change in changes for part in ("-s", change)]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    safetensors.torch.save_file(drawn("vgg"), path)
    return path


def placed(name: str, shell: Shell, vgg: Path) -> list[str]:
    """The preset beside what it needs, in the current folder, by the commands of its head; overrides."""
    recipe, here = read(name), Path().absolute()
    assert isinstance(recipe.teacher, str)
    teacher = Path(recipe.teacher).name
    if "-adm" in teacher:
        torch.manual_seed(0)
        torch.save({"ema": shaken(networks.build("dhariwalunet", ADM)).state_dict()}, "adm.pt")
        Path("adm.yaml").write_text(json.dumps({"architecture": "dhariwalunet", "arguments": ADM}))
        made = shell("import", "adm.pt", teacher, "--preset", "edm", "--card", "adm.yaml")
    else:
        pickled = snapshot(here).rename(Path(teacher).with_suffix(".pkl"))
        made = shell("import", pickled, teacher)
    assert made.code == 0, made.err
    (here / "vgg.safetensors").symlink_to(vgg)
    source = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez("cifar10-train.npz", source)
    assert shell("recipes", "copy", name, ".").code == 0
    return smaller(recipe, teacher)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_can_be_planned(name: str, shell: Shell, vgg: Path) -> None:
    changes = placed(f"rfpp/{name}", shell, vgg)
    stages = shell("plan", f"{name}.yaml", "--json", *changes).json["stages"]
    assert not Path("runs").exists()
    for each in stages:
        if each["stage"] == "g":
            assert each["remark"] == "needs pairs, f"
        elif each["verb"] in ("pairs", "reflow"):
            assert each["cost"] and each["cost"]["per_second"] > 0, each


@pytest.mark.parametrize(("name", "student"), [("cifar10", "f"), ("afhq", "f"), ("imagenet64", "e")])
def test_the_command_of_the_head_trains(name: str, student: str, shell: Shell, vgg: Path) -> None:
    """`flowdistill eval` does what it rests on, and nothing else; dropout stays on."""
    changes = placed(f"rfpp/{name}", shell, vgg)
    answer = shell("eval", f"{name}.yaml", "-q", *changes)
    assert answer.code == 0, answer.err
    out = Path("runs") / name
    assert sorted(path.parent.name for path in out.glob(f"*/{artifact.MANIFEST}")) == sorted(
        ["eval", student, "pairs"]
    )
    log = [json.loads(line) for line in (out / student / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2]
    assert all(line["perceptual"] > 0 and line["grad_norm"] > 0 for line in log)
    card = artifact.read_header(out / student / "model.safetensors")
    assert card["arguments"]["dropout"] > 0
    assert card["figures"]["perceptual_distance"].startswith("lpips-vgg@")
    last = load_file(out / student / "checkpoints" / "last.safetensors")
    first = load_file(f"{TEACHERS[name]}.safetensors")
    moved = [
        float((last[f"network.network.{key}"] - value).abs().max())
        for key, value in first.items()
        if f"network.network.{key}" in last and value.is_floating_point()
    ]
    assert len(moved) > 20 and 0 < max(moved) < 1e-2


def test_the_first_and_the_last_config_of_cifar10_train(shell: Shell, vgg: Path) -> None:
    """a is the teacher's network with fresh weights; g begins as f and sees real images."""
    changes = placed("rfpp/cifar10", shell, vgg)
    for stage in ("a", "g"):
        answer = shell("reflow", "cifar10.yaml", "--stage", stage, "-q", *changes)
        assert answer.code == 0, answer.err
    out = Path("runs/cifar10")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"pairs", "a", "f", "real", "g"}
    teacher, header = artifact.load_tensors(Path(f"{TEACHERS['cifar10']}.safetensors"))
    fresh, own = artifact.load_tensors(out / "a" / "model.safetensors")
    for key in ("architecture", "arguments", "convention", "shape", "classes"):
        assert own.get(key) == header.get(key), key
    assert fresh.keys() == teacher.keys()
    kernel = "enc.8x8_block0.conv0.weight"
    assert (fresh[kernel] - teacher[kernel]).abs().max() > 0.01
    f, g = (artifact.load_tensors(out / stage / "model.safetensors")[0] for stage in "fg")
    assert 0 < max(float((f[key].float() - g[key].float()).abs().max()) for key in f) < 1e-3
    assert set(artifact.Manifest.read(out / "g").inputs) == {"f", "pairs", "real", "vgg.safetensors"}


def test_a_rectified_diffusion_trains_on_a_small_pipeline(shell: Shell) -> None:
    """The student of a noise-predicting pipeline keeps its prediction and clock, and its null prompt."""
    make(Path("sd"), "UNet2DConditionModel")
    Path("sd/embeddings.safetensors").rename("prompts.safetensors")
    assert shell("recipes", "copy", "rectified-diffusion", ".").code == 0
    changes = ["pairs.count=8", "pairs.steps=2", "pairs.batch_size=4", "pairs.shard_size=4", "pairs.check=2"]
    changes += ["reflow.steps=2", "reflow.batch_size=4", "reflow.log_every=1", "reflow.precision=fp32"]
    changes += ["teacher.name=diffusers:sd", "teacher.probe=false", "teacher.pixels=[64, 64]"]
    options = overriding(*changes)
    validated = shell("validate", "rectified-diffusion.yaml", *options, "--json")
    assert validated.code == 0 and validated.json["missing"] == [], validated.err
    answer = shell("run", "rectified-diffusion.yaml", "-q", *options)
    assert answer.code == 0, answer.err
    out = Path("runs/rectified-diffusion")
    card = artifact.read_header(out / "reflow" / "model.safetensors")
    recipe = load(Path("rectified-diffusion.yaml"), verbs(), changes)
    asked = recipe.settings_json("reflow")["timesteps"]["interpolant"]
    assert (card["convention"]["prediction"], card["convention"]["interpolant"]) == ("eps", asked)
    assert card["guidance"] is None and card["distilled"]
    guidance = PairStore.open(out / "pairs").spec.origin["guidance"]
    assert isinstance(guidance, Mapping) and guidance["scale"] == 5.0
    log = [json.loads(line) for line in (out / "reflow" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2] and all(line["grad_norm"] > 0 for line in log)
