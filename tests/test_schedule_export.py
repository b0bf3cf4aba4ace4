"""Schedules go out to diffusers and ComfyUI, and what is sampled there is what is sampled here."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import content
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import Shell
from tiny_pipelines import TINY, TRANSFORMERS, call, conditions, draw, make, package, pipeline
from torch import Tensor, nn

from flowdistill import artifact, foreign
from flowdistill.errors import ArtifactError, MissingInput, UsageError
from flowdistill.exchange import export_schedule, schedules
from flowdistill.schedule import Schedule
from flowdistill.solvers import SOLVERS, integrate
from flowdistill.stages import boss
from flowdistill.teachers import Model, open_model
from flowdistill.tuning.candidates import Candidate

for needed in ("diffusers", "transformers"):
    pytest.importorskip(needed, reason="the extra flowdistill[diffusers] is not installed")

TIMES = (1.0, 0.83, 0.47, 0.12, 0.0)


def written(folder: Path, times: tuple[float, ...] = TIMES, **changes: Any) -> Path:
    """A schedule file, as the boss stage writes it."""
    chosen = Candidate(SOLVERS["euler"], Schedule(times, "boss"))
    found = boss.schedule_file(chosen, open_model("analytic:gaussian"))
    path = folder / f"schedule-nfe{len(times) - 1}.json"
    artifact.save_json(path, {**found, **changes})
    return path


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    written(Path())
    return Shell(capsys)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_schedule(written(folder), folder / "diffusers", "diffusers")
    return folder / "diffusers"


def fixed(folder: Path) -> Any:
    from flowdistill.exchange.fixed_sigmas import FixedSigmas

    return FixedSigmas.from_pretrained(folder)


def neutral(folder: Path) -> Any:
    return package().FlowMatchEulerDiscreteScheduler.from_pretrained(folder)


def sigmas_in(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "sigmas.json").read_text())
    return found


# What is written -------------------------------------------------------------------------------------------


def test_diffusers_reads_the_times_of_the_schedule(exported: Path) -> None:
    assert sorted(content(exported)) == ["fixed_sigmas.py", "scheduler_config.json", "sigmas.json"]
    assert sigmas_in(exported) == list(TIMES[:-1])
    scheduler = neutral(exported)
    assert (scheduler.config.shift, scheduler.config.use_dynamic_shifting) == (1.0, False)
    assert (scheduler.config.shift_terminal, scheduler.config.stochastic_sampling) == (None, False)
    assert scheduler.config.num_train_timesteps == 1000
    scheduler.set_timesteps(sigmas=sigmas_in(exported), mu=1.15)  # a stray mu changes nothing
    assert scheduler.sigmas.tolist() == pytest.approx(TIMES, abs=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * t for t in TIMES[:-1]], rel=1e-6)


def test_the_scheduler_of_fixed_sigmas(exported: Path, tmp_path: Path) -> None:
    scheduler = fixed(exported)
    for arguments in ({}, {"num_inference_steps": 4}, {"sigmas": [1.0, 0.9, 0.8, 0.7], "mu": 2.0}):
        scheduler.set_timesteps(**arguments)
        assert scheduler.sigmas.tolist() == pytest.approx(TIMES, abs=1e-6)
    for arguments in ({"num_inference_steps": 50}, {"sigmas": [1.0, 0.5]}):
        with pytest.raises(ValueError, match=r"has 4 steps, asked for (50|2): pass num_inference_steps=4"):
            scheduler.set_timesteps(**arguments)
    for wrong in ((), (1.0, 0.5, 0.5), (0.5, 0.7), (1.0, 0.0), (1.5, 0.5)):
        with pytest.raises(ValueError, match="fixed_sigmas must fall from 1 and end above 0"):
            type(scheduler)(fixed_sigmas=wrong)

    scheduler.save_pretrained(tmp_path / "saved")  # as part of a pipeline, say
    assert not (tmp_path / "saved" / "sigmas.json").exists()
    again = type(scheduler).from_pretrained(tmp_path, subfolder="saved")
    again.set_timesteps(4)
    assert torch.equal(again.sigmas, scheduler.sigmas)
    shifts = {"shift": 3.0, "use_dynamic_shifting": True, "shift_terminal": 0.1}
    of_another = package().FlowMatchEulerDiscreteScheduler(**shifts).config
    again = type(scheduler).from_config(of_another, fixed_sigmas=list(TIMES[:-1]))
    again.set_timesteps(4)
    assert torch.equal(again.sigmas, scheduler.sigmas)


def test_the_class_needs_no_flowdistill(exported: Path) -> None:
    file = exported / "fixed_sigmas.py"
    assert not re.search(r"^(from|import) flowdistill", file.read_text(), re.MULTILINE)
    spec = importlib.util.spec_from_file_location("copied_fixed_sigmas", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    scheduler = module.FixedSigmas.from_pretrained(str(exported))
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx(TIMES, abs=1e-6)


def test_comfyui_reads_the_line(tmp_path: Path) -> None:
    """ManualSigmas finds its numbers by this expression, for which 1e-05 would be 1 and -05."""
    times = (1.0, 0.75, 1 / 3, 0.00001, 0.0)
    made = export_schedule(written(tmp_path, times), tmp_path / "line.txt", "comfyui")
    line = (tmp_path / "line.txt").read_text()
    assert line == "1, 0.75, 0.3333333333333333, 0.00001, 0\n"
    assert tuple(float(each) for each in re.findall(r"[-+]?(?:\d*\.*\d+)", line)) == times
    assert (made.sigmas, made.steps, made.read_back) == (list(times), 4, None)


falling = st.lists(st.integers(1, 999), unique=True, max_size=12).map(
    lambda found: (1.0, *(n / 1000 for n in sorted(found, reverse=True)), 0.0)
)


@settings(max_examples=60, deadline=None)
@given(times=falling, shift=st.floats(0.3, 20.0), dynamic=st.booleans())
def test_what_a_scheduler_shifts_arrives_at_the_times(
    times: tuple[float, ...], shift: float, dynamic: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shifted")
    option = {"mu": math.log(shift)} if dynamic else {"shift": shift}
    export_schedule(written(folder, times), folder / "list.json", "sigmas", **option)
    kind = {"use_dynamic_shifting": True} if dynamic else {"shift": shift}
    scheduler = package().FlowMatchEulerDiscreteScheduler(**kind)
    scheduler.set_timesteps(sigmas=json.loads((folder / "list.json").read_text()), mu=option.get("mu"))
    assert scheduler.sigmas.tolist() == pytest.approx(times, abs=1e-6)


# The pipelines ---------------------------------------------------------------------------------------------

Made = Callable[[str], tuple[Path, nn.Module, Model]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folder, network and teacher of a family, each made once."""

    @cache
    def find(name: str) -> tuple[Path, nn.Module, Model]:
        folder = tmp_path_factory.mktemp(name)
        network = make(folder, name)
        options = {"prompts": str(folder / "embeddings.safetensors"), "pixels": TINY[name]["pixels"]}
        return folder, network, open_model({"name": f"diffusers:{folder}", **options})

    return find


def theirs(name: str, made: Made, scheduler: Any = None, **arguments: Any) -> Tensor:
    """What the pipeline makes of the test's noise, guided as it is by default."""
    folder, network, teacher = made(name)
    pipe = pipeline(name, network, folder)
    if scheduler is not None:
        pipe.scheduler = scheduler
    guided = teacher.card.guidance is not None
    given = conditions(name, load_file(folder / "embeddings.safetensors"), guided)
    return call(pipe, name, draw(name), guided, **given, **arguments)


def ours(name: str, made: Made, times: tuple[float, ...] = TIMES) -> Tensor:
    grid = Schedule(times, "boss")
    return integrate(made(name)[2].field, draw(name), grid, SOLVERS["euler"], torch.tensor([0, 1]))


def takes_sigmas(name: str) -> bool:
    kind = getattr(package(), TINY[name]["pipeline"])
    return "sigmas" in inspect.signature(kind.__call__).parameters


def test_which_pipelines_take_sigmas() -> None:
    """docs/export.md names those that do not."""
    assert [name for name in TRANSFORMERS if not takes_sigmas(name)] == [
        "WanTransformer3DModel",
        "LTXVideoTransformer3DModel",
    ]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_pipeline_samples_as_its_teacher_does(name: str, made: Made, exported: Path) -> None:
    expected = ours(name, made)
    if takes_sigmas(name):
        found = theirs(name, made, neutral(exported), sigmas=sigmas_in(exported))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        without = theirs(name, made, neutral(exported))
        assert (without - expected).abs().max() > 1e-3  # the sigmas are what matters
    found = theirs(name, made, fixed(exported), num_inference_steps=4)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["SD3Transformer2DModel", "SanaTransformer2DModel", "FluxTransformer2DModel"]
)
def test_a_pipeline_keeps_its_own_scheduler(name: str, made: Made, tmp_path: Path) -> None:
    """Shifted by 3 in SD3 and SANA, and in FLUX dynamically, by a mu that follows from the size."""
    source, target = written(tmp_path), tmp_path / "list.json"
    if name.startswith("Flux"):
        height, width = TINY[name]["pixels"]
        tokens = height * width // 16**2
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        calculate_shift = import_module("diffusers.pipelines.flux.pipeline_flux").calculate_shift
        assert mu == pytest.approx(calculate_shift(tokens))  # as docs/export.md has it
        export_schedule(source, target, "sigmas", mu=mu)
    else:
        export_schedule(source, target, "sigmas", shift=3.0)
    expected = ours(name, made)
    found = theirs(name, made, sigmas=json.loads(target.read_text()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    unshifted = theirs(name, made, sigmas=list(TIMES[:-1]))
    assert (unshifted - expected).abs().max() > 1e-3


def test_from_a_recipe_to_a_pipeline(made: Made, shell: Shell) -> None:
    """The schedule that boss finds for a pipeline, sampled here and by the pipeline."""
    name = "SD3Transformer2DModel"
    folder, _, _ = made(name)
    teacher = {
        "name": f"diffusers:{folder}",
        "prompts": f"{folder}/embeddings.safetensors",
        "pixels": TINY[name]["pixels"],
        "probe": False,  # random weights are no flow
    }
    chosen = {"nfe": [3], "choose": "boss", "grid": 8, "trajectories": 2, "held_out": 16, "batch_size": 8}
    chosen |= {"model": "teacher"}
    Path("recipe.yaml").write_text(json.dumps({"teacher": teacher, "stages": [{"boss": chosen}]}))
    assert shell("run", "recipe.yaml", "-q").code == 0
    assert shell("export", "runs/recipe/boss/schedule-nfe3.json", "three", "--as", "diffusers").code == 0
    times = tuple(artifact.load_json(Path("runs/recipe/boss/schedule-nfe3.json"))["times"])
    expected = ours(name, made, times)
    found = theirs(name, made, neutral(Path("three")), sigmas=sigmas_in(Path("three")))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# What cannot be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", schedules.FORMS)
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "euler"])
def test_other_solvers_than_eulers_are_refused(solver: str, form: Any, tmp_path: Path) -> None:
    source = written(tmp_path, solver=solver)
    before = content(tmp_path)
    message = re.escape(f"is for the solver {solver}, and {form} would take Euler steps")
    with pytest.raises(UsageError, match=message):
        export_schedule(source, tmp_path / "new", form)
    assert content(tmp_path) == before


def test_heun_of_diffusers_takes_no_sigmas() -> None:
    """Which is why a schedule for heun is refused, though its steps would be the same."""
    heun = package().FlowMatchHeunDiscreteScheduler
    assert "sigmas" not in inspect.signature(heun.set_timesteps).parameters


class Shifting:
    """A diffusers that moves what it is given."""

    __version__ = "9.9"

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> Any:
        return cls()

    def set_timesteps(self, sigmas: list[float]) -> None:
        self.sigmas = torch.tensor([*(0.99 * sigma for sigma in sigmas), 0.0])


def test_what_is_not_read_back_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path)
    before = content(tmp_path)
    monkeypatch.setattr(foreign, "member", lambda package, name: Shifting)
    with pytest.raises(ArtifactError, match=r"does not come to the times of .*: off by 0.01, at most 1e-06"):
        export_schedule(source, tmp_path / "new" / "folder", "diffusers")
    assert content(tmp_path) == before and not list((tmp_path / "new").iterdir())


def test_without_diffusers_there_is_nobody_to_read_it_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path)
    before = content(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingInput, match=r"pip install 'flowdistill\[diffusers\]'"):
        export_schedule(source, tmp_path / "new", "diffusers")
    assert content(tmp_path) == before
    export_schedule(source, tmp_path / "list.json", "sigmas")  # nor is it needed for these
    export_schedule(source, tmp_path / "line.txt", "comfyui")


def test_a_shift_that_single_precision_cannot_undo(tmp_path: Path) -> None:
    source = written(tmp_path, (1.0, 0.999, 0.998, 0.0))
    with pytest.raises(ArtifactError, match="a scheduler with shift 0.001 does not come to the times"):
        export_schedule(source, tmp_path / "new", "sigmas", shift=0.001)
    assert not (tmp_path / "new").exists()


# The command -----------------------------------------------------------------------------------------------


def test_the_command_says_what_it_wrote(shell: Shell) -> None:
    source = "schedule-nfe4.json"
    version = package().__version__
    answer = shell("export", source, "folder", "--as", "diffusers")
    assert (answer.code, answer.err) == (0, "")
    head, *rest = answer.out.splitlines()
    assert head == f"folder: 4 Euler steps as diffusers, read back by diffusers {version}"
    assert [line.strip() for line in rest] == [
        "folder/scheduler_config.json",
        "folder/sigmas.json",
        "folder/fixed_sigmas.py",
        "next: docs/export.md shows how a pipeline takes them",
    ]
    answer = shell("export", source, "line.txt", "--as", "comfyui")
    assert answer.out.splitlines()[:2] == ["line.txt: 4 Euler steps as comfyui", "  1, 0.83, 0.47, 0.12, 0"]
    assert Path("line.txt").read_text() == "1, 0.83, 0.47, 0.12, 0\n"
    assert shell("export", source, "list.json", "--as", "sigmas", "--json").json == {
        "path": "list.json",
        "format": "sigmas",
        "files": ["list.json"],
        "steps": 4,
        "sigmas": [1.0, 0.83, 0.47, 0.12],
        "read_back": None,
    }
    assert json.loads(Path("list.json").read_text()) == [1.0, 0.83, 0.47, 0.12]
    found = shell("export", source, "again", "--as", "diffusers", "--json").json
    assert found["read_back"] == f"diffusers {version}" and len(found["files"]) == 3
    assert shell("export", source, "shifted.json", "--as", "sigmas", "--shift", "3", "--json").json[
        "sigmas"
    ] == pytest.approx([1.0, 0.83 / 1.34, 0.47 / 2.06, 0.12 / 2.76])


REFUSED: Mapping[str, tuple[int, str]] = {
    "schedule-nfe4.json new": (
        2,
        "expected --as FORMAT for pairs or a schedule, ",
    ),
    "schedule-nfe4.json new --as sigmas --ema 0.05": (2, "expected --as FORMAT for pairs or a schedule"),
    "schedule-nfe4.json new --as npy": (2, "--as npy: is for a store of pairs, schedule-nfe4.json is a file"),
    "schedule-nfe4.json new --as comfy": (2, "--as: unknown value 'comfy', did you mean 'comfyui'?"),
    "folder new --as diffusers": (2, "folder: is a folder, and --as diffusers is for a schedule file"),
    "schedule-nfe4.json folder --as diffusers": (2, "folder: is there already"),
    "schedule-nfe4.json other.json --as sigmas": (2, "other.json: is there already"),
    "schedule-nfe4.json no/new.json --as sigmas": (2, "no: no such folder"),
    "nowhere.json new --as comfyui": (3, "nowhere.json: no such file"),
    "other.json new --as comfyui": (4, "other.json: not a schedule, expected a file that `flowdistill boss`"),
    "upwards.json new --as comfyui": (4, "upwards.json: not a schedule, expected a file that"),
    "broken.json new --as comfyui": (4, "broken.json: its checksum does not match"),
    "schedule-nfe4.json new --as comfyui --shift 3": (2, "--shift: is for --as sigmas alone"),
    "schedule-nfe4.json new --as diffusers --mu 1": (2, "--mu: is for --as sigmas alone"),
    "folder new --as npy --shift 3": (2, "--shift: not here, since --as npy is for pairs"),
    "folder new --ema 0.05 --mu 3": (2, "--mu: not here, since --ema is for a training"),
    "schedule-nfe4.json new --as sigmas --mu 1 --shift 3": (
        2,
        "--shift and --mu: a scheduler has one of them",
    ),
    "schedule-nfe4.json new --as sigmas --shift 0": (2, "--shift 0: expected a shift from 0.001 to 1000"),
    "schedule-nfe4.json new --as sigmas --shift nan": (2, "--shift nan: expected a shift from 0.001 to 1000"),
    "schedule-nfe4.json new --as sigmas --mu 710": (2, "--mu 710: expected a number from -6.9 to 6.9"),
    "heun.json new --as diffusers": (2, "heun.json: is for the solver heun, and diffusers would take Euler"),
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_the_command_refuses_with_one_line(arguments: str, shell: Shell) -> None:
    Path("folder").mkdir()
    artifact.save_json(Path("other.json"), {"kind": "something else"})
    artifact.save_json(Path("upwards.json"), {"solver": "euler", "times": [0.0, 0.5, 1.0]})
    artifact.save_json(Path("heun.json"), {"solver": "heun", "times": list(TIMES)})
    Path("broken.json").write_text('{"solver": "euler", "times": [1.0, 0.0]}\n')
    before = content(Path())
    code, message = REFUSED[arguments]
    answer = shell("export", *arguments.split())
    assert (answer.code, answer.out) == (code, "")
    lines = answer.err.splitlines()
    assert lines[0].startswith("error: ") and message in lines[0]
    assert len(lines) == (2 if "broken" in arguments else 1)
    assert content(Path()) == before


def test_a_folder_of_schedules_names_them(shell: Shell) -> None:
    Path("boss").mkdir()
    for times in ((1.0, 0.0), TIMES):
        written(Path("boss"), times)
    answer = shell("export", "boss", "new", "--as", "sigmas")
    assert answer.code == 2 and "like schedule-nfe1.json, schedule-nfe4.json" in answer.err
