"""What is done, what is stale and why, and that nothing is lost or overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flowdistill import artifact
from flowdistill.errors import ArtifactError, MissingInput, UsageError
from flowdistill.pipeline import Advanced, Event, Finished, Pipeline
from flowdistill.recipe import load
from flowdistill.stages import verbs
from flowdistill.work import Stop

RECIPE = """
teacher: {name: analytic:gaussian, dim: 2}
stages:
  - pairs: {count: 64, steps: 2, batch_size: 32, shard_size: 32}
  - reflow: {steps: 4, batch_size: 8, network: {name: mlp, width: 8}, loss: {name: squared-l2}}
  - pairs: {name: more, count: 16, steps: 2, model: reflow}
  - boss: {model: reflow, nfe: [2], grid: 4, trajectories: 8, held_out: 16}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "chain.yaml"
    path.write_text(RECIPE)
    return path


def pipeline(path: Path, *overrides: str) -> Pipeline:
    return Pipeline(load(path, verbs(), overrides, path.parent / "out"))


def run(made: Pipeline, target: str | None = None, only: bool = False, fresh: bool = False) -> list[str]:
    """Names of the stages that were really run."""
    events: list[Event] = []
    made.run(target, only=only, fresh=fresh, device="cpu", observe=events.append, stop=Stop())
    return [event.stage for event in events if isinstance(event, Finished) and not event.skipped]


def states(made: Pipeline) -> dict[str, str]:
    return {standing.stage: standing.state for standing in made.status()}


def test_a_run_does_every_stage_once_and_in_order(recipe: Path) -> None:
    made = pipeline(recipe)
    assert set(states(made).values()) == {"missing"}
    assert run(made) == ["pairs", "reflow", "more", "boss"]
    assert set(states(made).values()) == {"done"}
    assert run(made) == []


def test_the_same_recipe_makes_the_same_digests_elsewhere(recipe: Path, tmp_path: Path) -> None:
    run(pipeline(recipe))
    other = Pipeline(load(recipe, verbs(), (), tmp_path / "elsewhere"))
    run(other)
    for name in other.stages:
        there, here = (artifact.Manifest.read(tmp_path / out / name) for out in ("elsewhere", "out"))
        assert there.digest == here.digest
        assert there.verify(tmp_path / "elsewhere" / name) == []


def test_a_verb_does_what_it_needs_and_no_more(recipe: Path) -> None:
    made = pipeline(recipe)
    assert run(made, "reflow") == ["pairs", "reflow"]
    assert states(made) == {"pairs": "done", "reflow": "done", "more": "missing", "boss": "missing"}
    assert run(made, "boss") == ["boss"]


def test_only_refuses_what_is_not_ready(recipe: Path) -> None:
    made = pipeline(recipe)
    with pytest.raises(MissingInput, match="boss: needs pairs, reflow"):
        run(made, "boss", only=True)
    assert not (recipe.parent / "out" / "boss").exists()
    run(made, "pairs", only=True)
    assert states(made)["pairs"] == "done"


def test_fresh_makes_what_was_never_made(recipe: Path) -> None:
    assert run(pipeline(recipe), "pairs", fresh=True) == ["pairs"]


def test_references_choose_the_nearest_or_the_named(recipe: Path) -> None:
    inputs = {standing.stage: dict(standing.inputs) for standing in pipeline(recipe).status()}
    assert inputs["reflow"] == {"pairs": "pairs", "init": "teacher"}
    assert inputs["more"] == {"model": "reflow"}
    assert inputs["pairs"] == {"model": "teacher"}


def test_a_changed_setting_makes_stale_and_is_named(recipe: Path) -> None:
    run(pipeline(recipe))
    changed = pipeline(recipe, "reflow.steps=5")
    assert states(changed) == {"pairs": "done", "reflow": "stale", "more": "stale", "boss": "stale"}
    reflow = changed.status()[1]
    assert reflow.conflicts == ("steps: 4 -> 5",)
    assert changed.status()[3].waits == ("input reflow is stale",)


def test_a_changed_teacher_makes_everything_stale(recipe: Path) -> None:
    run(pipeline(recipe))
    recipe.write_text(RECIPE.replace("dim: 2", "dim: 3"))
    changed = pipeline(recipe)
    assert set(states(changed).values()) == {"stale"}
    assert any(reason.startswith("input teacher: ") for reason in changed.status()[0].conflicts)


def test_what_was_made_with_other_settings_is_refused_and_kept(recipe: Path) -> None:
    run(pipeline(recipe))
    out = recipe.parent / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"steps: 4 -> 5(.|\n)*--fresh"):
        run(pipeline(recipe, "reflow.steps=5"))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_fresh_makes_anew_what_is_stale_and_keeps_the_old(recipe: Path) -> None:
    run(pipeline(recipe))
    out = recipe.parent / "out"
    old = (out / "reflow" / "model.safetensors").read_bytes()
    changed = pipeline(recipe, "reflow.steps=5")
    assert run(changed, fresh=True) == ["reflow", "more", "boss"]
    assert (out / "reflow.old-1" / "model.safetensors").read_bytes() == old
    assert (out / "reflow" / "model.safetensors").read_bytes() != old
    assert set(states(changed).values()) == {"done"}


def test_fresh_with_a_verb_redoes_that_stage(recipe: Path) -> None:
    made = pipeline(recipe)
    run(made)
    assert run(made, "reflow", fresh=True) == ["reflow"]
    assert set(states(made).values()) == {"done"}, "the same bytes came out, so nothing became stale"


def test_a_lost_input_is_made_again_and_the_rest_stays_done(recipe: Path) -> None:
    made = pipeline(recipe)
    run(made)
    (recipe.parent / "out" / "pairs" / artifact.MANIFEST).unlink()
    assert states(made) == {"pairs": "partial", "reflow": "stale", "more": "stale", "boss": "stale"}
    assert run(made) == ["pairs"]
    assert set(states(made).values()) == {"done"}


@pytest.mark.parametrize("stage", ["pairs", "reflow", "boss"])
def test_an_interrupted_stage_continues_to_the_same_digest(recipe: Path, stage: str) -> None:
    whole = pipeline(recipe)
    run(whole)
    digest = artifact.Manifest.read(recipe.parent / "out" / stage).digest
    broken = Pipeline(load(recipe, verbs(), (), recipe.parent / "broken"))

    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced) and event.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.run(None, only=False, fresh=False, device="cpu", observe=interrupt, stop=Stop())
    assert states(broken)[stage] == "partial"
    run(broken)
    assert artifact.Manifest.read(recipe.parent / "broken" / stage).digest == digest


def test_an_interrupted_stage_of_other_settings_is_refused(recipe: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced) and event.stage == "reflow":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(recipe).run(None, only=False, fresh=False, device="cpu", observe=interrupt, stop=Stop())
    with pytest.raises(UsageError, match=r"batch_size: 8 -> 16"):
        run(pipeline(recipe, "reflow.batch_size=16"))
    assert run(pipeline(recipe, "reflow.batch_size=16"), fresh=True) == ["reflow", "more", "boss"]


def test_a_damaged_manifest_is_an_error_and_not_a_rerun(recipe: Path) -> None:
    made = pipeline(recipe)
    run(made)
    manifest = recipe.parent / "out" / "pairs" / artifact.MANIFEST
    data = bytearray(manifest.read_bytes())
    data[len(data) // 2] ^= 1
    manifest.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        made.status()


@pytest.mark.parametrize(
    ("verb", "stage", "found"),
    [(None, None, None), ("reflow", None, "reflow"), ("pairs", "more", "more"), (None, "boss", "boss")],
)
def test_a_command_means_a_stage(recipe: Path, verb: Any, stage: Any, found: Any) -> None:
    assert pipeline(recipe).select(verb, stage) == found


@pytest.mark.parametrize(
    ("verb", "stage", "message"),
    [
        ("pairs", None, r"has 2 stages 'pairs'; choose with --stage pairs\|more"),
        ("eval", None, "has no stage 'eval'"),
        ("pairs", "reflwo", "unknown stage 'reflwo', did you mean 'reflow'"),
        ("pairs", "reflow", "'reflow' is a reflow stage"),
    ],
)
def test_a_command_that_means_no_stage_says_so(recipe: Path, verb: str, stage: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline(recipe).select(verb, stage)


def test_another_seed_is_another_artifact(recipe: Path) -> None:
    run(pipeline(recipe))
    other = pipeline(recipe, "seed=5")
    assert other.status()[0].conflicts == ("seed: 0 -> 5",)
    with pytest.raises(UsageError, match="seed: 0 -> 5"):
        run(other)
    assert run(other, fresh=True) == ["pairs", "reflow", "more", "boss"]


def test_inputs_may_be_folders_of_other_runs(recipe: Path) -> None:
    run(pipeline(recipe))
    text = RECIPE.replace("reflow: {", f"reflow: {{pairs: {recipe.parent}/out/pairs, ").split(
        "  - pairs: {name: more"
    )[0]
    elsewhere = recipe.with_name("elsewhere.yaml")
    elsewhere.write_text(
        text.replace("  - pairs: {count: 64, steps: 2, batch_size: 32, shard_size: 32}\n", "")
    )
    made = Pipeline(load(elsewhere, verbs(), (), recipe.parent / "elsewhere"))
    assert run(made) == ["reflow"]
    here = artifact.Manifest.read(recipe.parent / "elsewhere" / "reflow")
    assert list(here.inputs.values())[0] == artifact.Manifest.read(recipe.parent / "out" / "pairs").digest


def test_an_interrupted_stage_is_not_continued_on_another_device(recipe: Path) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Advanced):
            raise KeyboardInterrupt

    made = pipeline(recipe)
    with pytest.raises(KeyboardInterrupt):
        made.run("pairs", only=False, fresh=False, device="cpu", observe=interrupt, stop=Stop())
    begun = recipe.parent / "out" / "pairs" / "started.json"
    content = artifact.load_json(begun)
    artifact.save_json(begun, {**content, "device": "cuda"})
    with pytest.raises(UsageError, match="begun on cuda, this is cpu"):
        run(made)
    assert run(made, fresh=True)[0] == "pairs"
