"""Pairs as a user meets them: planned, made, looked at, damaged and mended, carried away and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from faults import content
from PIL import Image
from test_cli import Shell

from flowdistill import artifact
from flowdistill.cli import execute
from flowdistill.pairstore import PairStore

RECIPE = """
teacher: builtin:shapes
stages:
  - pairs: {count: 40, solver: euler, steps: 2, batch_size: 8, shard_size: 8, check: 4, noise: pcg64}
  - reflow: {steps: 1, batch_size: 4, loss: {name: squared-l2}}
"""
SHARDS = [f"shards/{number:05d}.safetensors" for number in range(5)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert execute(["pairs", "recipe.yaml", "-q"]) == 0
    return folder


@pytest.fixture
def shell(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """In a folder where the pairs are made, for the test to do with as it likes."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return Shell(capsys)


PAIRS = Path("runs/recipe/pairs")


def flip(name: str) -> None:
    data = bytearray((PAIRS / name).read_bytes())
    data[len(data) // 2] ^= 1
    (PAIRS / name).unlink()
    (PAIRS / name).write_bytes(data)


# plan


def test_plan_says_what_it_will_take_and_writes_nothing(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowdistill.stages.pairs._TRIAL_S", 0.0)
    answer = shell("plan", "recipe.yaml", "--out", "elsewhere", "-s", "pairs.count=1000000", "--json")
    assert answer.code == 0 and not Path("elsewhere").exists()
    plan = answer.json
    pairs, reflow = plan["stages"]
    assert (pairs["cost"]["units"], pairs["cost"]["unit"]) == (1_000_000, "pair")
    assert pairs["cost"]["seconds"] == pytest.approx((1_000_000 + 3 * 4) / pairs["cost"]["per_second"])
    per_pair = 2 * 3 * 16 * 16 + 2 + 4 + 32  # x0, label, distance, record
    assert per_pair < pairs["cost"]["size_bytes"] / 1_000_000 < per_pair + 110  # small shards
    assert (reflow["cost"]["units"], reflow["cost"]["unit"]) == (1, "step")
    assert reflow["cost"]["seconds"] == pytest.approx(1 / reflow["cost"]["per_second"])
    assert plan["free_bytes"] > 0 and plan["peak_memory_bytes"] > 1e7
    answer = shell("plan", "recipe.yaml", "--out", "elsewhere", "-s", "pairs.count=1000000")
    assert "1000000 pairs" in answer.out and "GB" in answer.out and "pairs/s" in answer.out


def test_plan_of_what_cannot_be_measured_yet(shell: Shell) -> None:
    Path("recipe.yaml").write_text(RECIPE + "  - pairs: {name: more, model: reflow}\n")
    answer = shell("plan", "recipe.yaml", "--json")
    assert answer.json["stages"][2]["remark"] == "needs reflow"


def test_plan_of_what_is_done(shell: Shell) -> None:
    Path("recipe.yaml").write_text(RECIPE + "  - boss: {model: teacher}\n")
    answer = shell("plan", "recipe.yaml", "--json")
    remarks = [stage["remark"] for stage in answer.json["stages"]]
    assert remarks == ["done", "", ""]


def test_plan_counts_the_evaluations_of_boss_and_eval(shell: Shell) -> None:
    rows = "eval: {models: [teacher], nfe: [2, 3], samples: 40, straightness: 5, inversion: 4"
    Path("more.yaml").write_text(
        "teacher: analytic:ring\nstages:\n"
        "  - boss: {nfe: [3], choose: boss, grid: 10, trajectories: 8, held_out: 16}\n"
        f"  - {rows}, reference: {{solver: heun, steps: 6, samples: 20}}, latency: false}}\n"
    )
    boss, evaluation = (each["cost"] for each in shell("plan", "more.yaml", "--json").json["stages"])
    # The trajectories; Heun's accurate solutions; BOSS's times and uniform ones.
    assert boss["units"] == 8 * 10 + 16 * 63 + 16 * 2 * 3
    # Heun's 2 steps - 1; the paths; both rows, and what of them goes back up.
    assert evaluation["units"] == 20 * 11 + 5 * 6 + 40 * (2 + 3) + 4 * (2 + 3)
    for cost in (boss, evaluation):
        assert cost["unit"] == "evaluation" and cost["size_bytes"] > 0
        assert cost["seconds"] == pytest.approx(cost["units"] / cost["per_second"])
    assert not Path("runs/more").exists()


def test_plan_says_when_the_disk_is_too_small(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.stages.pairs._TRIAL_S", 0.0)
    monkeypatch.setattr("flowdistill.planning._free", lambda folder: 1_000_000)
    answer = shell("plan", "recipe.yaml", "--out", "elsewhere", "-s", "pairs.count=1000000")
    assert answer.code == 0 and "NOT ENOUGH ROOM" in answer.out


# inspect


def test_inspect_shows_classes_distances_and_a_picture(shell: Shell) -> None:
    answer = shell("inspect", PAIRS, "--grid", "grid.png", "--json")
    store = PairStore.open(PAIRS)
    facts = answer.json["store"]
    labels = store.column("labels").long()
    assert facts["pairs of each class"] == labels.bincount(minlength=8).tolist()
    distance = store.column("distance")
    assert facts["distance"]["mean"] == pytest.approx(float(distance.mean()), rel=1e-5)
    assert facts["distance"]["least"] == float(distance.min())
    assert sum(facts["distance"]["histogram"]["counts"]) == 40
    assert facts["shards"] == "5 of 5" and facts["noise"] == "pcg64"
    assert answer.json["figures"]["solver_error"]["pairs"] == 4
    with Image.open("grid.png") as picture:
        assert picture.size == (8 * 66 + 2, 5 * 66 + 2)
        first = np.asarray(picture.convert("RGB"))[2:66:4, 2:66:4] / 127.5 - 1
    x0 = store.batch([0])[1][0].permute(1, 2, 0).clamp(-1, 1).numpy()
    assert np.abs(first - x0).max() <= 1 / 127.5
    text = shell("inspect", PAIRS).out
    assert "histogram" in text and "█" in text


def test_inspect_and_verify_of_an_unfinished_store(shell: Shell) -> None:
    (PAIRS / artifact.MANIFEST).unlink()
    journal = (PAIRS / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (PAIRS / "journal.jsonl").write_bytes(b"".join(journal[:2]))
    answer = shell("inspect", PAIRS, "--json")
    assert answer.json["kind"] == "unfinished store of pairs" and answer.json["shards"] == "2 of 5"
    assert sum(answer.json["pairs of each class"]) == 16
    assert shell("inspect", PAIRS, "--grid", "grid.png").code == 4
    assert shell("verify", PAIRS, "--json").json == {"path": str(PAIRS), "files": 4, "problems": []}
    flip(SHARDS[1])
    assert "00001.safetensors: SHA-256 is" in shell("verify", PAIRS).err


# verify and repair


@pytest.mark.parametrize(
    "names", [[name] for name in ("journal.jsonl", "store.json", "manifest.json", SHARDS[3])]
)
def test_a_flipped_bit_is_found_and_mended(shell: Shell, names: list[str]) -> None:
    mend(shell, names)


def test_all_that_is_damaged_is_mended_at_once(shell: Shell) -> None:
    mend(shell, ["journal.jsonl", "store.json", "check.safetensors", SHARDS[0], SHARDS[4]])


def mend(shell: Shell, names: list[str]) -> None:
    whole = content(PAIRS)
    written = {name: (PAIRS / name).stat().st_mtime_ns for name in SHARDS if name not in names}
    for name in names:
        flip(name)
    answer = shell("verify", PAIRS)
    assert answer.code == 4
    assert all(Path(name).name in answer.err for name in names)
    answer = shell("verify", PAIRS, "--repair", "--json", "-q")
    assert answer.code == 0, answer.err
    again = set(answer.json["repaired"])
    if "journal.jsonl" in names:  # a shard whose line is lost has to be made again
        extra = again - set(names)
        assert len(extra) == 1 and extra < set(SHARDS)
        again -= extra
        written.pop(extra.pop(), None)
    assert again == set(names)
    found = content(PAIRS)
    if "manifest.json" in names:
        assert found.pop("manifest.json") != whole.pop("manifest.json")  # new dates
    assert found == whole
    assert {name: (PAIRS / name).stat().st_mtime_ns for name in written} == written
    assert shell("verify", PAIRS).code == 0
    assert "nothing was damaged" in shell("verify", PAIRS, "--repair", "-q").out


def test_what_cannot_be_repaired(shell: Shell) -> None:
    assert shell("reflow", "recipe.yaml", "-q").code == 0
    answer = shell("verify", "runs/recipe/reflow", "--repair")
    assert answer.code == 2 and "make it anew: flowdistill reflow RECIPE --fresh" in answer.err
    assert shell("verify", "runs/recipe", "--repair").code == 3
    begun = artifact.load_json(PAIRS / "started.json")
    artifact.save_json(PAIRS / "started.json", {**begun, "locations": {"model": "builtin:digits"}})
    flip(SHARDS[2])
    before = content(PAIRS)
    answer = shell("verify", PAIRS, "--repair", "-q")
    assert answer.code == 2 and "origin.model" in answer.err and content(PAIRS) == before
    artifact.save_json(PAIRS / "started.json", {**begun, "locations": {"model": "gone/model.safetensors"}})
    assert shell("verify", PAIRS, "--repair", "-q").code == 3


def test_training_on_a_damaged_shard_names_it_and_the_fix(shell: Shell) -> None:
    for name in SHARDS:
        flip(name)
    answer = shell("reflow", "recipe.yaml", "-q")
    assert answer.code == 4
    assert "its SHA-256 does not match the journal" in answer.err and f"verify --repair {PAIRS}" in answer.err


# bad input


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-s", "pairs.steps=3"], "steps: 2 -> 3"),
        (["-s", "teacher=builtin:digits"], "input teacher: "),
        (["--seed", "1"], "seed: 0 -> 1"),
        (["-s", "pairs.count=-5"], "pairs.count: expected a number > 0, found -5"),
        (["-s", "pairs.solver=huen"], "did you mean 'heun'?"),
        (
            ["--out", "elsewhere", "-s", "pairs.classes=[0, 8]"],
            "8 is no class of the model, which has 0 to 7",
        ),
        (["--out", "elsewhere", "-s", "pairs.labels=nowhere.txt"], "'nowhere.txt' does not exist"),
    ],
)
def test_what_is_refused_leaves_everything_as_it_is(shell: Shell, arguments: list[str], says: str) -> None:
    before = content(Path())
    answer = shell("pairs", "recipe.yaml", "-q", *arguments)
    assert answer.code == 2 and says in answer.err and len(answer.err.splitlines()) <= 3
    assert content(Path()) == before and not Path("elsewhere/pairs").exists()


def test_a_folder_that_holds_something_else(shell: Shell) -> None:
    folder = Path("elsewhere/pairs/shards")
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("precious")
    answer = shell("pairs", "recipe.yaml", "-q", "--out", "elsewhere")
    assert answer.code == 2 and "holds something else" in answer.err
    assert (folder / "precious.txt").read_text() == "precious"


# other toolkits


@pytest.mark.parametrize("form", ["rfpp", "npy"])
def test_pairs_go_out_and_come_back(shell: Shell, form: str) -> None:
    assert shell("export", PAIRS, "out", "--as", form).code == 0
    answer = shell("import", "out", "back", "--classes", "8", "--json")
    assert answer.code == 0 and answer.json["format"] == form
    ours, theirs = PairStore.open(PAIRS), PairStore.open("back")
    eps, ours_x0, labels = ours.batch(range(40))
    for mine, other in zip((eps, ours_x0, labels), theirs.batch(range(40)), strict=True):
        assert mine is not None and other is not None
        rounded = form == "rfpp" and mine is ours_x0
        off = (mine.clamp(-1, 1) - other if rounded else mine - other).abs().max()
        assert off <= (0.5 / 127.5 + 1e-6 if rounded else 0)
    assert shell("verify", "back").code == 0
    recipe = RECIPE.replace("- reflow: {", "- reflow: {pairs: [pairs, ./back/], feed: {weights: [1, 3]}, ")
    Path("recipe.yaml").write_text(recipe)
    assert shell("reflow", "recipe.yaml", "-q").code == 0
    parents = json.loads((Path("runs/recipe/reflow") / artifact.MANIFEST).read_text())["inputs"]
    assert artifact.Manifest.read(Path("back")).digest in parents.values()
    assert shell("export", PAIRS, "out", "--as", form).code == 2  # it is there already
    assert shell("import", "out", "back2", "--preset", "edm").code == 2
    assert "--as" in shell("export", PAIRS, "out2", "--as", "zip").err


def test_swapped_pairs_are_refused(shell: Shell) -> None:
    assert shell("export", PAIRS, "out", "--as", "npy").code == 0
    Path("out/z0.npy").rename("out/z.npy")
    Path("out/z1.npy").rename("out/z0.npy")
    Path("out/z.npy").rename("out/z1.npy")
    answer = shell("import", "out", "back")
    assert answer.code == 2 and "--swap" in answer.err and not Path("back").exists()
    assert shell("import", "out", "back", "--swap").code == 0
    eps, x0, _ = PairStore.open("back").batch(range(40))
    assert abs(float(eps.var()) - 1) < 0.1 and float(x0.var()) < 0.7
