"""The command line as a person or a script meets it: exit codes, both streams, what is written."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from flowdistill import artifact, stages
from flowdistill.boundary import Invocation
from flowdistill.cli import execute, options
from flowdistill.cli.application import application, stage_verbs

ROOT = Path(__file__).parents[1]
SHIPPED = {
    path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    for path in (ROOT / "recipes").rglob("*.yaml")
}
CHAIN = """
seed: 3
teacher: {name: analytic:ring, components: 3}
stages:
  - pairs: {count: 128, solver: heun, steps: 2, batch_size: 64, shard_size: 64}
  - reflow: {steps: 4, batch_size: 8, network: {name: mlp, width: 8, depth: 1}, loss: {name: squared-l2}}
  - boss: {model: teacher, nfe: [2, 4], choose: boss, grid: 8, trajectories: 8, held_out: 16, batch_size: 8}
  - eval: {models: [teacher, reflow], schedule: boss, samples: 64, nfe: [1, 2], latency: false}
"""


@dataclass(frozen=True)
class Answer:
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *arguments: object) -> Answer:
        self.capture.readouterr()
        code = execute([str(argument) for argument in arguments])
        streams = self.capture.readouterr()
        assert "Traceback" not in streams.err
        return Answer(code, streams.out, streams.err)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text(CHAIN)
    return Shell(capsys)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the chain was run; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "chain.yaml").write_text(CHAIN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert execute(["run", "chain.yaml", "-q"]) == 0
    return folder


@pytest.fixture
def there(shell: Shell, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(finished)
    return shell


def commands(group: Any = None, prefix: str = "") -> dict[str, Any]:
    """Name -> command, those of groups by both names."""
    group = group or typer.main.get_command(application())
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        is_group = isinstance(command, typer.core.TyperGroup)
        found |= commands(command, f"{prefix}{name} ") if is_group else {f"{prefix}{name}": command}
    return found


# The set of commands and options ---------------------------------------------------------------------------

WORK_OPTIONS = "--device --json --out --quiet --seed --verbose -q -v"
RECIPE_OPTIONS = f"--fresh --max-time -s {WORK_OPTIONS}"
STAGE_OPTIONS = f"--only --stage {RECIPE_OPTIONS}"
OPTIONS = {
    "run": f"--procs {RECIPE_OPTIONS}",
    "status": "--json --out --seed --verbose -s -v",
    "plan": f"-s {WORK_OPTIONS}",
    "train": f"--procs --prove-resume {STAGE_OPTIONS}",
    "pairs": f"--procs {STAGE_OPTIONS}",
    "reflow": f"--procs --prove-resume {STAGE_OPTIONS}",
    "slimflow": f"--procs --prove-resume {STAGE_OPTIONS}",
    "distill": f"--procs --prove-resume {STAGE_OPTIONS}",
    "straighten": f"--procs --prove-resume {STAGE_OPTIONS}",
    "boss": f"--latency-budget --model --nfe --refine --straighten {STAGE_OPTIONS}",
    "eval": f"--procs {STAGE_OPTIONS}",
    "compare": "--json --margin --row --unpaired --verbose -v",
    "gate": "--annotate --baseline --json --junit --markdown --rehearse --rule --rules --unpaired "
    "--verbose -v",
    "sample": f"--count --force --invert --labels --nfe --schedule --solver --times {WORK_OPTIONS}",
    "import": "--card --classes --force --json --preset --swap --verbose --weights -v",
    "export": "--as --ema --json --mu --schedule --shift --verbose -v",
    "report": "--compare --json --out --verbose -v",
    "inspect": "--grid --json --verbose -v",
    "probe": "--data --device --json --strict --verbose -v",
    "verify": "--json --quiet --repair --verbose -q -v",
    "validate": "--json --verbose -s -v",
    "recipes ls": "--json --verbose -v",
    "recipes show": "--verbose -v",
    "recipes copy": "--verbose -v",
    "schema": "--verbose -v",
    "doctor": "--json --out --verbose -v",
}


def test_no_command_or_option_comes_or_goes_unnoticed() -> None:
    """An option is a test that is owed for ever: think before you add one here."""
    found = {
        name: sorted(
            flag for each in command.params if each.param_type_name == "option" for flag in each.opts
        )
        for name, command in commands().items()
    }
    assert found == {name: sorted(flags.split()) for name, flags in OPTIONS.items()}


def test_verbs_read_from_the_text_are_those_of_the_stages() -> None:
    assert set(stage_verbs()) == set(stages.verbs())
    for verb, stage in stages.verbs().items():
        assert stage_verbs()[verb] == (sys.modules[stage.__module__].__doc__ or "").strip()


@pytest.mark.parametrize("name", OPTIONS)
def test_help_says_what_is_read_and_written_and_shows_two_examples(name: str, shell: Shell) -> None:
    answer = shell(*name.split(), "--help")
    assert (answer.code, answer.err) == (0, "")
    about = commands()[name].help
    summary, _, body = about.partition("\n\n")
    assert summary.endswith(".") and len(summary) < 110, "one line that says what it does"
    assert re.search(r"\b[Rr]eads\b", body) and re.search(r"\b[Ww]rites\b", body)
    examples = re.findall(r"^  (flowdistill .*)$", about, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert example in answer.out, "examples keep their lines"
        parse(shlex.split(re.split("[|>]", example)[0])[1:])


def parse(arguments: list[str]) -> None:
    """Fail where the arguments are not those of a command."""
    group: Any = typer.main.get_command(application())
    while isinstance(group, typer.core.TyperGroup):
        name, *arguments = arguments
        group = group.commands[name]
    group.make_context(group.name, arguments, obj=Invocation(arguments))


def test_without_a_command_the_help_is_shown(shell: Shell) -> None:
    assert shell().out == shell("--help").out
    assert shell("recipes").out == shell("recipes", "--help").out
    assert (shell().code, shell("recipes").code) == (0, 0)


def test_pages_of_commands_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = ROOT / "docs" / "commands"
    written = {path.name: path.read_text("utf-8") for path in folder.iterdir()}
    assert written == module.pages(), "run python docs/make_commands.py"


# Quick to ask ----------------------------------------------------------------------------------------------

LOADED = """
import sys
from flowdistill.cli import execute
code = execute(sys.argv[1:])
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ("--help", "torch numpy pydantic yaml rich safetensors"),
        ("reflow --help", "torch numpy yaml rich safetensors"),
        ("recipes ls", "torch numpy"),
        ("recipes show ring", "torch numpy yaml rich"),
        ("validate ring", "torch numpy rich"),
        ("schema", "torch numpy rich"),
        ("status ring", "torch numpy"),
        ("inspect ring.safetensors", "torch numpy rich"),
        ("inspect ring.yaml", "torch numpy rich"),
    ],
)
def test_commands_that_look_import_little(arguments: str, absent: str, tmp_path: Path) -> None:
    artifact.save_tensors(tmp_path / "ring.safetensors", {}, {"kind": "samples"})
    (tmp_path / "ring.yaml").write_text(CHAIN)
    command = [sys.executable, "-c", LOADED, *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert not set(absent.split()) & set(done.stderr.split())


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


# Bad input -------------------------------------------------------------------------------------------------

FILES = {
    "empty.yaml": b"",
    "binary.yaml": bytes(range(256)),
    "list.yaml": b"- 1\n",
    "unknown.yaml": b"stages:\n  - boss: {nfee: [4]}\n",
    "twice.yaml": b"seed: 1\nseed: 2\nstages:\n  - boss:\n",
    "anchor.yaml": b"seed: &a 1\nstages:\n  - boss:\n",
    "merge.yaml": b"stages:\n  - boss: {<<: 1}\n",
    "outside.yaml": b"out: ../elsewhere\nstages:\n  - boss:\n",
    "huge.yaml": b"seed: 0 # " + b"x" * 10_000_000,
    "deep.yaml": b"stages: " + b"[" * 5000,
    "missing-teacher.yaml": b"teacher: nowhere/model.safetensors\nstages:\n  - boss:\n",
    "builtin.yaml": b"teacher: builtin:shape\nstages:\n  - boss:\n",
    "two.yaml": b"stages:\n  - boss:\n  - boss: {name: other}\n",
    "noise.safetensors": bytes(range(256)),
    "notes.txt": b"hello",
    "foreign.json": b"{}",
    "broken.json": b"{",
}
BAD = [
    ("run", 2, "missing argument 'RECIPE'"),
    ("refow chain.yaml", 2, "no such command 'refow'. Did you mean 'reflow'?"),
    ("run chain.yaml --frsh", 2, "--fresh"),
    ("run quickstrat", 2, "unknown recipe 'quickstrat', did you mean 'quickstart'?"),
    ("run nowhere.yaml", 2, "nowhere.yaml: no such file"),
    ("run folder", 2, "folder: a folder, expected a recipe file"),
    ("run empty.yaml", 2, "empty"),
    ("validate binary.yaml", 2, "binary.yaml: a binary file"),
    ("validate list.yaml", 2, "list.yaml:1:1: expected a recipe"),
    ("boss unknown.yaml", 2, "unknown.yaml:2:12: boss.nfee: unknown key, did you mean 'nfe'?"),
    ("run twice.yaml", 2, "twice.yaml:2:1: duplicate key 'seed'"),
    ("run anchor.yaml", 2, "anchor.yaml:1:7: anchor"),
    ("run merge.yaml", 2, "merge key '<<' is not supported"),
    ("run outside.yaml", 2, "outside.yaml:1:6: out: expected a folder inside the current one"),
    ("run huge.yaml", 2, "larger than"),
    ("run deep.yaml", 2, "deep"),
    ("run missing-teacher.yaml", 2, "missing-teacher.yaml:1:10: teacher"),
    ("validate builtin.yaml", 2, "unknown built-in teacher 'shape', did you mean 'shapes'?"),
    ("train chain.yaml", 2, "has no stage 'train' (it has pairs, reflow, boss, eval)"),
    ("boss two.yaml", 2, "choose with --stage boss|other"),
    (
        "run chain.yaml -s reflow.stepz=3",
        2,
        "-s reflow.stepz=3: reflow.stepz: unknown key, did you mean 'steps'?",
    ),
    ("run chain.yaml -s reflow.steps=many", 2, "expected an integer, found 'many'"),
    ("run chain.yaml -s nothing", 2, "expected KEY=VALUE"),
    ("reflow chain.yaml --stage nope", 2, "--stage: unknown stage 'nope'"),
    ("reflow chain.yaml --only", 3, "reflow: needs pairs, which is not done"),
    ("run chain.yaml --device gpu", 2, "--device: unknown device 'gpu', did you mean 'cpu'?"),
    ("run chain.yaml --device cuda:99", 3, "--device cuda:99: this machine has none"),
    ("run chain.yaml --seed x", 2, "--seed"),
    ("run chain.yaml --out notes.txt", 2, "notes.txt: is a file, expected a folder"),
    ("boss --nfe 0", 2, "--nfe"),
    ("boss --nfe 4 --model nowhere", 3, "nowhere: no such model"),
    ("boss --nfe 200 --model analytic:ring", 2, "200 is more than the 100 steps of the grid"),
    ("eval nowhere.safetensors", 3, "nowhere.safetensors: no such model"),
    ("eval nowhere", 2, "unknown recipe 'nowhere'"),
    ("sample analytic:rng", 2, "unknown analytic teacher 'rng', did you mean 'ring'?"),
    ("sample builtin:shape", 2, "unknown built-in teacher 'shape', did you mean 'shapes'?"),
    ("sample nowhere.safetensors", 3, "nowhere.safetensors: no such model"),
    ("sample noise.safetensors", 4, "noise.safetensors: not a safetensors file, or cut short"),
    ("sample analytic:ring --solver huen", 2, "--solver: unknown solver 'huen', did you mean 'heun'?"),
    (
        "sample analytic:ring --solver heun --nfe 8",
        2,
        "solver heun cannot make exactly 8 evaluations: 7 or 9 would do",
    ),
    ("sample analytic:ring --labels a,b", 2, "--labels a,b: expected numbers"),
    ("sample analytic:ring --labels 8", 2, "--labels: 8 is no class of this model, which has 0 to 7"),
    ("sample analytic:gaussian --labels 0", 2, "--labels: this model has no classes"),
    ("sample analytic:ring --schedule nowhere.json", 3, "nowhere.json: no such file"),
    ("sample analytic:ring --schedule broken.json", 4, "broken.json: not valid JSON"),
    ("sample analytic:ring --count 0", 2, "--count"),
    ("inspect nowhere", 3, "nowhere: no such file or folder"),
    ("inspect noise.safetensors", 4, "noise.safetensors: not a safetensors file"),
    ("inspect notes.txt", 4, "notes.txt: not an artifact"),
    ("inspect foreign.json", 4, "foreign.json"),
    ("inspect folder", 4, "folder: neither a stage's folder nor one with stages in it"),
    ("verify nowhere", 3, "nowhere: no such file or folder"),
    ("verify folder", 3, "folder: no finished stage here"),
    ("verify broken.json", 4, "broken.json: not valid JSON"),
    ("recipes show nope", 2, "unknown recipe 'nope'"),
    ("recipes copy ring chain.yaml", 2, "chain.yaml: exists, and is not overwritten"),
    ("recipes copy ring nowhere/my.yaml", 2, "nowhere: no such folder"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=[each[0] for each in BAD])
def test_bad_input(arguments: str, code: int, message: str, shell: Shell) -> None:
    for name, content in FILES.items():
        Path(name).write_bytes(content)
    Path("folder").mkdir()
    before = sorted(path.name for path in Path().iterdir())
    answer = shell(*arguments.split())
    assert (answer.code, answer.out) == (code, "")
    assert message in answer.err
    told = [line for line in answer.err.splitlines() if not line.endswith(": starts")]
    assert 1 <= len(told) <= 3
    assert re.match(r"error: |\S+: |-s \S+: ", told[0]), "an error, or the place of a mistake in a recipe"
    left = {path.name for path in Path().iterdir()} - set(before)
    assert left <= {"runs"} and not list(Path().rglob(artifact.MANIFEST))


def test_all_mistakes_of_a_recipe_are_told_at_once(shell: Shell) -> None:
    Path("bad.yaml").write_text("sed: 1\nstages:\n  - boss: {nfee: 1, grid: no}\n")
    told = shell("run", "bad.yaml").err.splitlines()
    assert [line.split(": ")[0] for line in told] == ["bad.yaml:1:1", "bad.yaml:3:12", "bad.yaml:3:27"]


# Recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_recipes_are_valid_and_listed(name: str, shell: Shell) -> None:
    listed = {each["name"]: each for each in shell("recipes", "ls", "--json").json}
    assert set(listed) == SHIPPED
    assert listed[name]["about"], "a recipe begins with a line that says what it does"
    answer = shell("validate", name)
    assert (answer.code, answer.err) == (0, "")
    assert shell("recipes", "show", name).out == Path(listed[name]["path"]).read_text("utf-8")


def test_recipes_are_found_in_an_installed_package_too(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path("site-packages/flowdistill").absolute()
    (package / "recipes" / "more").mkdir(parents=True)
    (package / "recipes" / "more" / "mine.yaml").write_text(CHAIN)
    monkeypatch.setattr(options, "__file__", str(package / "cli" / "options.py"))
    assert shell("validate", "more/mine").code == 0
    assert shell("validate", "ring").code == 2


def test_a_file_comes_before_a_shipped_recipe_and_a_folder_does_not(shell: Shell) -> None:
    Path("ring").write_text("stages: []\n")
    assert "ring:1:9: stages" in shell("validate", "ring").err
    Path("ring").unlink()
    Path("ring").mkdir()
    assert shell("validate", "ring").code == 0


def test_copies_are_the_recipe_and_overwrite_nothing(shell: Shell) -> None:
    text = shell("recipes", "show", "ring").out
    Path("folder").mkdir()
    assert shell("recipes", "copy", "ring", "folder").out == "folder/ring.yaml\n"
    assert Path("folder/ring.yaml").read_text() == text
    Path("folder/ring.yaml").write_text("mine")
    assert shell("recipes", "copy", "ring", "folder").code == 2
    assert Path("folder/ring.yaml").read_text() == "mine"


def test_validate_shows_what_references_lead_to(shell: Shell) -> None:
    facts = shell("validate", "chain.yaml", "--json", "-s", "seed=7").json
    assert facts["seed"] == 7
    assert facts["stages"]["reflow"] == {"verb": "reflow", "pairs": "pairs", "init": "teacher"}
    assert facts["stages"]["eval"]["models"] == ["teacher", "reflow"]


def test_schema_is_the_one_of_the_recipe_module(shell: Shell) -> None:
    from flowdistill.recipe import json_schema

    assert shell("schema").json == json.loads(json.dumps(json_schema(stages.verbs())))


# Work ------------------------------------------------------------------------------------------------------


def test_run_does_the_chain_and_then_nothing(shell: Shell, finished: Path) -> None:
    answer = shell("run", "chain.yaml", "--json")
    document = answer.json
    assert [each["stage"] for each in document["stages"]] == ["pairs", "reflow", "boss", "eval"]
    assert not any(each["skipped"] for each in document["stages"])
    assert "pairs: starts" in answer.err and "eval: done in" in answer.err
    for each in document["stages"]:
        manifest = artifact.Manifest.read(Path(each["folder"]))
        assert (each["digest"], each["figures"]) == (manifest.digest, manifest.figures)
        assert manifest.digest == artifact.Manifest.read(finished / each["folder"]).digest
    again = shell("run", "chain.yaml", "--json", "-q")
    assert again.err == ""
    assert all(each["skipped"] for each in again.json["stages"])


def test_run_ends_with_the_table_of_the_evaluation_and_all_places(there: Shell) -> None:
    answer = there("run", "chain.yaml", "-q")
    assert (answer.code, answer.err) == (0, "")
    evaluation = artifact.load_json(Path("runs/chain/eval/eval.json"))
    for row in evaluation["rows"]:
        shown = f"{row['metrics']['fd@64']['value']:.3g} ["
        assert any(row["model"] in line and shown in line for line in answer.out.splitlines())
    for place in (
        "pairs/ check.safetensors, journal.jsonl",
        "reflow/ log.jsonl, model.safetensors",
        "boss/ boss.safetensors",
        "grid.png",
    ):
        assert place in answer.out


def test_a_verb_does_what_it_needs_and_no_more(shell: Shell) -> None:
    answer = shell("reflow", "chain.yaml", "--json", "--out", "elsewhere")
    assert [each["stage"] for each in answer.json["stages"]] == ["pairs", "reflow"]
    states = {
        each["stage"]: each["state"]
        for each in shell("status", "chain.yaml", "--out", "elsewhere", "--json").json["stages"]
    }
    assert states == {"pairs": "done", "reflow": "done", "boss": "missing", "eval": "missing"}
    assert shell("reflow", "chain.yaml", "--only", "--out", "elsewhere").code == 0


def test_status_names_what_is_stale_and_run_refuses_it(there: Shell) -> None:
    answer = there("status", "chain.yaml", "-s", "reflow.steps=5")
    assert "reflow: steps: 4 -> 5" in answer.out and "eval: input reflow is stale" in answer.out
    refused = there("run", "chain.yaml", "-s", "reflow.steps=5")
    assert refused.code == 2
    assert "reflow: made with other settings or inputs (steps: 4 -> 5)" in refused.err
    assert "--fresh" in refused.err
    assert not list(Path("runs/chain").glob("*.old-*"))


def test_another_seed_is_another_run(there: Shell) -> None:
    stale = {
        each["stage"]: each["state"]
        for each in there("status", "chain.yaml", "--seed", "4", "--json").json["stages"]
    }
    assert set(stale.values()) <= {"done", "stale"}


def test_boss_works_without_a_recipe(shell: Shell) -> None:
    small = ("-s", "boss.grid=8", "-s", "boss.trajectories=8", "-s", "boss.held_out=16", "-q")
    answer = shell("boss", "--model", "analytic:ring", "--nfe", "3", "--nfe", "2", *small)
    assert (answer.code, answer.err) == (0, "")
    folder = Path("runs/boss/analytic-ring-nfe-2-3/boss")
    for steps in (2, 3):
        content = artifact.load_json(folder / f"schedule-nfe{steps}.json")
        times = re.escape(" ".join(f"{t:.4g}" for t in content["times"]))
        assert content["nfe"] == steps
        assert re.search(rf"{steps} evaluations\n  times +{times}\n", answer.out)
        assert f"{content['held_out']['boss']['value']:.3g} [" in answer.out
    other = shell("boss", "--model", "analytic:ring", "--nfe", "4", *small)
    assert other.code == 0, "another number of steps is no conflict with the first"


def test_nfe_overrides_that_of_the_recipe(shell: Shell) -> None:
    assert shell("boss", "chain.yaml", "--nfe", "3", "-q", "--out", "three").code == 0
    assert [path.name for path in Path("three/boss").glob("schedule-*.json")] == ["schedule-nfe3.json"]


def test_eval_takes_a_model(shell: Shell) -> None:
    small = ("-s", "eval.samples=32", "-s", "eval.latency=false", "-s", "eval.nfe=[1, 2]")
    document = shell("eval", "analytic:gaussian", *small, "--json").json
    rows = artifact.load_json(Path(document["stages"][0]["folder"]) / "eval.json")["rows"]
    assert [(row["model"], row["nfe"]) for row in rows] == [("teacher", 1), ("teacher", 2)]


# Samples ---------------------------------------------------------------------------------------------------


def test_samples_depend_on_their_index_alone(shell: Shell) -> None:
    few = shell("sample", "analytic:ring", "--nfe", "2", "--count", "3", "--out", "few", "--json").json
    shell("sample", "analytic:ring", "--nfe", "2", "--count", "70", "--out", "many", "-q")
    assert few["files"] == ["few/samples.safetensors", "few/grid.png"]
    first, header = artifact.load_tensors(Path("few/samples.safetensors"))
    more, _ = artifact.load_tensors(Path("many/samples.safetensors"))
    assert first["labels"].tolist() == [0, 1, 2]
    assert first["samples"].equal(more["samples"][:3])
    assert (header["nfe"], header["seed"], header["times"]) == (2, 0, [1.0, 0.5, 0.0])
    assert Path("few/grid.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_the_solution_of_the_ode(shell: Shell) -> None:
    """Gaussian data: the flow map is affine in the noise and known."""
    from flowdistill.analytic import gaussian
    from flowdistill.randomness import noise

    shell(
        "sample", "analytic:gaussian", "--solver", "rk4", "--nfe", "256", "--count", "5", "--seed", "9", "-q"
    )
    found, _ = artifact.load_tensors(Path("runs/samples/samples.safetensors"))
    exact = gaussian((2,)).flow_map(noise(9, range(5), (2,)))
    assert (found["samples"] - exact).abs().max() < 1e-4


def test_labels_are_drawn_in_turn(shell: Shell) -> None:
    shell("sample", "analytic:ring", "--labels", "2,5", "--count", "4", "-q")
    assert artifact.load_tensors(Path("runs/samples/samples.safetensors"))[0]["labels"].tolist() == [
        2,
        5,
        2,
        5,
    ]


def test_a_schedule_serves_the_model_it_was_made_for(there: Shell, tmp_path: Path) -> None:
    path = "runs/chain/boss/schedule-nfe4.json"
    times = artifact.load_json(Path(path))["times"]
    Path(tmp_path / "teacher.yaml").write_text("")
    refused = there("sample", "analytic:ring", "--schedule", path, "--out", tmp_path)
    assert refused.code == 4
    assert "made for another model" in refused.err and "--force" in refused.err
    forced = there("sample", "analytic:ring", "--schedule", path, "--out", tmp_path, "--force", "--json")
    assert forced.json["nfe"] == 4
    assert artifact.load_tensors(tmp_path / "samples.safetensors")[1]["times"] == times
    for asked in (("--nfe", "8"), ("--solver", "heun")):
        conflict = there("sample", "analytic:ring", "--schedule", path, *asked, "--force", "--out", tmp_path)
        assert conflict.code == 2 and f"{asked[0]} {asked[1]}" in conflict.err


def test_a_model_made_for_one_step_is_sampled_so_and_warns_otherwise(there: Shell, tmp_path: Path) -> None:
    from flowdistill.teachers import Card

    tensors, header = artifact.load_tensors(Path("runs/chain/reflow/model.safetensors"))
    path = tmp_path / "one-step.safetensors"
    Card.parse({**header, "nfe": 1}, path).write(path, tensors)
    plain = there("sample", path, "--json", "-q", "--out", tmp_path)
    assert (plain.json["nfe"], plain.err) == (1, "")
    asked = there("sample", path, "--json", "-q", "--out", tmp_path, "--nfe", "2")
    assert (asked.code, asked.json["nfe"]) == (0, 2)
    assert asked.err == f"warning: {path} was made for 1 evaluations, not 2\n"


# Looking ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("runs/chain", "run with 4 stages"),
        ("runs/chain/pairs", "finished stage 'pairs'"),
        ("runs/chain/pairs/store.json", "pairs"),
        ("runs/chain/pairs/shards/00000.safetensors", "shard of pairs"),
        ("runs/chain/reflow", "finished stage 'reflow'"),
        ("runs/chain/reflow/model.safetensors", "model"),
        ("runs/chain/reflow/manifest.json", "manifest of a finished stage 'reflow'"),
        ("runs/chain/reflow/started.json", "what a stage is made from"),
        ("runs/chain/reflow/checkpoints/last.safetensors", "training checkpoint at step 4"),
        ("runs/chain/boss/schedule-nfe4.json", "schedule of 4 steps"),
        ("runs/chain/boss/boss.safetensors", "costs and paths of schedules"),
        ("runs/chain/eval/eval.json", "evaluation"),
        ("chain.yaml", "recipe"),
        ("builtin:shapes", "model"),
    ],
)
def test_inspect_tells_what_things_are(path: str, kind: str, there: Shell) -> None:
    answer = there("inspect", path)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[0].endswith(f": {kind}")
    assert there("inspect", path, "--json").json["kind"] == kind


def test_inspect_tells_where_a_model_is_from(there: Shell) -> None:
    facts = there("inspect", "runs/chain/reflow/model.safetensors", "--json").json
    assert facts["sha256"] == artifact.sha256(Path("runs/chain/reflow/model.safetensors"))
    assert facts["parents"]["pairs"] == artifact.Manifest.read(Path("runs/chain/pairs")).digest
    assert facts["settings"]["steps"] == 4


def test_inspect_knows_an_unfinished_stage(shell: Shell) -> None:
    Path("half").mkdir()
    artifact.save_json(Path("half/started.json"), {"settings": {}, "inputs": {}})
    assert "half: unfinished stage" in shell("inspect", "half").out
    assert shell("verify", "half").code == 3


def test_verify_finds_a_flipped_bit_and_names_the_file(shell: Shell, finished: Path) -> None:
    import shutil

    shutil.copytree(finished / "runs", "runs")
    whole = shell("verify", "runs/chain", "--json").json
    assert whole["problems"] == [] and whole["files"] > 10
    bad = [Path("runs/chain/reflow/model.safetensors"), Path("runs/chain/pairs/shards/00001.safetensors")]
    for path in bad:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    answer = shell("verify", "runs/chain")
    assert (answer.code, answer.out) == (4, "")
    assert all(str(path) in answer.err for path in bad) and len(answer.err.splitlines()) == 2
    assert len(shell("verify", "runs/chain", "--json").json["problems"]) == 2
    assert shell("verify", "runs/chain/boss").code == 0
    for path in bad:
        assert shell("verify", path).code == 4


def test_doctor_says_what_is_there_and_leaves_nothing_behind(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", "torch")
    Path("torch/hub/checkpoints").mkdir(parents=True)
    Path("torch/hub/checkpoints/vgg16.pth").touch()
    answer = shell("doctor", "--out", "runs/new", "--json")
    found = {each["what"]: each for each in answer.json}
    assert answer.code == (3 if any(each["state"] == "broken" for each in found.values()) else 0)
    assert found["results"]["state"] == "ok" and found["device cpu"]["state"] == "ok"
    assert found["torch cache"]["found"] == "vgg16.pth"
    assert not Path("runs").exists()
    shapes = ROOT / "flowdistill" / "assets" / "shapes.safetensors"
    assert artifact.sha256(shapes)[:16] in found["builtin shapes"]["found"]


def test_doctor_fails_where_results_cannot_be_written(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowdistill import examination

    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(examination, "TemporaryFile", refuse)
    answer = shell("doctor")
    assert answer.code == 3 and "results" in answer.err


# Faults of the system --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_samples(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell("sample", "analytic:ring", "--count", "2", "-q")
    before = Path("runs/samples/samples.safetensors").read_bytes()

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        answer = shell("sample", "analytic:ring", "--count", "3", "-q")
    assert (answer.code, answer.out) == (5, "")
    assert "runs/samples/samples.safetensors: disk full" in answer.err and "free" in answer.err
    assert Path("runs/samples/samples.safetensors").read_bytes() == before
    assert not list(Path("runs/samples").glob(".*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    answer = shell("run", "chain.yaml", "-q")
    assert answer.code == 2 and "folder is not writable (Permission denied)" in answer.err


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flowdistill", "schema"]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
