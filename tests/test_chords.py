"""Paths that pairs keep, and the chords of them that a training sees: against integration and brute force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import Shell
from test_pairs import GAUSSIAN, RING, contents, made
from test_sources import draws, joined, same
from test_stages import _raise_after, make, work
from torch import Tensor

from flowdistill import artifact, randomness
from flowdistill.chords import ChordSource, Drawn, bellman_schedules, merged
from flowdistill.errors import Diverged, UsageError
from flowdistill.pairstore import Block, PairSpec, PairStore, PairWriter
from flowdistill.schedule import Schedule, bellman, uniform
from flowdistill.solvers import SOLVERS, integrate, nfe
from flowdistill.sources import Draws, PairSource
from flowdistill.stages import Feed
from flowdistill.stages.boss import Boss
from flowdistill.stages.pairs import Pairs
from flowdistill.teachers import Model, open_model


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


# Pairs that keep their paths -------------------------------------------------------------------------------

MERGED = (1, 0.9, 0.75, 2 / 3, 0.5, 1 / 3, 0.25, 0)
KEPT = (0.9, 2 / 3, 0.5, 1 / 3)
PATH: dict[str, Any] = {"path": {"uniform": [3, 2, 3], "times": [0.9, 0.5]}, "steps": 4}


@pytest.mark.parametrize(("solver", "calls"), [("euler", 7), ("heun", 13), ("ab2", 7), ("rk4", 28)])
def test_the_states_are_those_of_the_merged_grid(tmp_path: Path, solver: Any, calls: int) -> None:
    done = made(tmp_path, RING, count=50, solver=solver, batch_size=16, shard_size=20, **PATH)
    store = PairStore.open(tmp_path)
    assert store.spec.path == KEPT and store.spec.times == (1, *KEPT, 0)
    eps, x0, labels = store.batch(range(50))
    seen: dict[float, Tensor] = {}

    def keep(i: int, t: float, x: Tensor, v: Tensor) -> None:
        seen[t] = x

    field, grid = open_model(RING).field, Schedule(MERGED, "by hand")
    end = integrate(field, eps, grid, SOLVERS[solver], labels, keep)
    torch.testing.assert_close(store.column("path"), torch.stack([seen[t] for t in KEPT], 1))
    torch.testing.assert_close(x0, end)
    assert done.figures["nfe"] == nfe(SOLVERS[solver], grid) == calls


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("uint8", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32")],
)
def test_states_are_rounded_to_the_type_of_the_data_and_never_to_bytes(
    tmp_path: Path, dtype: Any, kept: str
) -> None:
    options = {"count": 12, "solver": "euler", "shard_size": 5, "check": 0, **PATH}
    for name, chosen in (("exact", "float32"), ("rounded", dtype)):
        made(tmp_path / name, dtype=chosen, **options)
    exact, rounded = (PairStore.open(tmp_path / name) for name in ("exact", "rounded"))
    assert rounded.column("path").dtype == getattr(torch, kept)
    assert torch.equal(rounded.column("path"), exact.column("path").to(getattr(torch, kept)))
    size = sum(path.stat().st_size for path in (tmp_path / "rounded").rglob("*") if path.is_file())
    assert size <= rounded.spec.size_bytes + 2000  # store.json and the locks are not in it


def test_the_order_in_which_times_are_named_does_not_matter(tmp_path: Path) -> None:
    options = {"count": 12, "solver": "euler", "steps": 4}
    paths = ({"uniform": [3, 2], "times": [0.9, 0.1]}, {"uniform": [2, 3], "times": [0.1, 0.9, 0.5]})
    one, other = (
        contents(tmp_path / str(number), made(tmp_path / str(number), path=path, **options))
        for number, path in enumerate(paths)
    )
    assert one == other


def test_pairs_with_paths_do_not_depend_on_interruptions_or_on_who_makes_them(tmp_path: Path) -> None:
    stage: Pairs = make(Pairs, count=90, solver="heun", batch_size=8, shard_size=20, **PATH)
    given = {"model": GAUSSIAN}
    whole = contents(tmp_path / "whole", stage.run(work(tmp_path / "whole", stage, given)))
    broken = replace(work(tmp_path / "broken", stage, given), report=_raise_after(7))
    with pytest.raises(KeyboardInterrupt):
        stage.run(broken)
    done = stage.run(work(tmp_path / "broken", stage, given))
    assert contents(tmp_path / "broken", done) == whole

    shared = work(tmp_path / "shared", stage, given)
    maker = stage.maker(shared)
    with PairWriter(shared.folder, maker.spec) as one, PairWriter(shared.folder, maker.spec) as two:
        for number, shard in enumerate(reversed(range(maker.spec.shards))):
            writer = (one, two)[number % 2]
            writer.commit(shard, *maker.shard(shard, writer))
    done = stage.run(shared)
    assert contents(shared.folder, done) == whole


def test_a_store_without_paths_is_named_as_it_was_before_there_were_any() -> None:
    fields: dict[str, Any] = {"count": 3, "shape": (2,), "dtype": "float32", "seed": 1, "origin": {"a": 1}}
    plain = PairSpec(**fields)
    before = {
        "count": 3,
        "shape": [2],
        "classes": 0,
        "shard_size": 1024,
        "dtype": "float32",
        "seed": 1,
        "noise": "seeded",
        "error": False,
        "evaluations": False,
        "orientation": "t=0 data, t=1 noise",
        "origin": {"a": 1},
    }
    assert plain.model_dump(mode="json") == before and plain.digest == artifact.digest(before)
    assert PairSpec.model_validate(before) == plain and "path" not in plain.columns()
    with_path = PairSpec(**fields, path=(0.5,))
    assert with_path.digest == artifact.digest(before | {"path": [0.5]}) != plain.digest


RECIPE = "teacher: analytic:gaussian\nstages:\n  - pairs: {count: 8, check: 0, %s}\n"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("solver: rk45, path: {uniform: [4]}", "path: needs `source: noise` and a solver of given steps"),
        ("source: data, path: {uniform: [4]}", "path: needs `source: noise` and a solver of given steps"),
        ("path: {}", "pairs.path: expected `schedule`, `uniform` or `times`"),
        ("path: {uniform: [1]}", "path.uniform[0]: expected a number >= 2, found 1"),
        ("path: {times: [0.5, 1]}", "path.times[1]: expected a number < 1"),
        ("path: {times: [0]}", "path.times[0]: expected a number > 0"),
        ("path: {schedule: other}", "path.schedule: unknown stage 'other'"),
    ],
)
def test_paths_that_cannot_be_are_refused(shell: Shell, settings: str, says: str) -> None:
    Path("r.yaml").write_text(RECIPE % settings)
    answer = shell("pairs", "r.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and says in answer.err, answer.err
    assert len(answer.err.splitlines()) == 1 and not Path("runs").exists()


def far_away(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """Out to 2^18 and back, so that only what lies between is large."""
    return torch.full_like(x, 2.0**19) * (1 - 2 * (t > 0.75).to(x))[:, None]


def test_states_that_are_too_large_for_their_type_are_not_written(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "field", property(lambda self: far_away))
    Path("r.yaml").write_text(RECIPE % "solver: euler, steps: 2, dtype: float16, path: {uniform: [2]}")
    answer = shell("pairs", "r.yaml", "-q")
    assert (answer.code, answer.out) == (Diverged.exit_code, "") and len(answer.err.splitlines()) == 1
    assert "path is too large for float16, nothing was written; store it as float32" in answer.err
    assert not list(Path("runs").rglob("*.safetensors")) and not list(Path("runs").rglob("manifest.json"))
    assert shell("pairs", "r.yaml", "-q", "--out", "new", "-s", "pairs.dtype=float32").code == 0
    assert float(PairStore.open("new/pairs").column("path").min()) > 2.0**17


# States of a store -----------------------------------------------------------------------------------------

TIMES = (0.75, 0.5, 0.125)


def kept(folder: Path, number: int, count: int, **fields: Any) -> PairStore:
    """A store whose samples and states are a function of (number, index), and of the place on the path."""
    chosen: dict[str, Any] = {"shape": (3,), "dtype": "float32", "shard_size": 8, "path": TIMES}
    spec = PairSpec(count=count, seed=number, **(chosen | fields))
    size = 1 + len(spec.path)
    with PairWriter(folder, spec) as writer:
        for shard in range(spec.shards):
            indices = spec.indices(shard)
            drawn = [randomness.noise(100 * number + k, indices, spec.shape).tanh() for k in range(size)]
            eps, record = spec.draw(indices)
            if spec.noise == "stored":
                eps = randomness.noise(77, indices, spec.shape)
            labels = torch.tensor([i % spec.classes for i in indices]) if spec.classes else None
            path = torch.stack(drawn[1:], 1) if spec.path else None
            writer.commit(shard, Block(eps, drawn[0], labels, record=record, path=path))
    return PairStore.open(folder)


def by_brute_force(store: PairStore, indices: Sequence[int], which: Sequence[int]) -> Tensor:
    """One pair at a time."""
    found = []
    for index, k in zip(indices, which, strict=True):
        eps, x0, _ = store.batch([index])
        path = store.column("path", [index])[0].float()
        found.append([eps[0], *path, x0[0]][k])
    return torch.stack(found)


FORMS: list[dict[str, Any]] = [{"dtype": dtype} for dtype in ("uint8", "float16", "bfloat16", "float32")] + [
    {"noise": "pcg64"},
    {"noise": "stored"},
    {"shape": (2, 2, 3), "classes": 3, "dtype": "uint8"},
]


@pytest.fixture(scope="module", params=FORMS, ids=str)
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    return kept(tmp_path_factory.mktemp("form"), 3, 29, **request.param)


@given(st.lists(st.tuples(st.integers(0, 28), st.integers(0, 4)), min_size=1, max_size=20))
@settings(max_examples=20, deadline=None)
def test_states_are_found_one_by_one_and_many_at_once(form: PairStore, asked: list[tuple[int, int]]) -> None:
    indices, which = (list(each) for each in zip(*asked, strict=True))
    states = form.states(indices, torch.tensor(which))
    assert states.dtype == torch.float32
    assert torch.equal(states, by_brute_force(form, indices, which))


def test_states_and_pairs_that_are_not_there_are_refused(form: PairStore) -> None:
    for which in (-1, 5):
        with pytest.raises(IndexError, match="of a path with 5"):
            form.states([0, 1], torch.tensor([0, which]))
    for index in (-1, 29):
        with pytest.raises(IndexError, match="of a store of 29"):
            form.states([index], torch.tensor([0]))
    assert form.states([], torch.tensor([], dtype=torch.int64)).shape == (0, *form.spec.shape)


def test_a_store_without_a_path_has_its_ends(tmp_path: Path) -> None:
    store = kept(tmp_path, 1, 5, path=())
    eps, x0, _ = store.batch([3, 2])
    assert torch.equal(store.states([3, 2], torch.tensor([0, 1])), torch.stack([eps[0], x0[1]]))


# States of a batch -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[PairStore]:
    """Three stores of images of different sizes, of two types."""
    return [
        kept(tmp_path_factory.mktemp("kept"), number, count, shape=(2, 2, 3), classes=4, dtype=dtype)
        for number, (count, dtype) in enumerate(((20, "float32"), (37, "uint8"), (9, "float32")), start=1)
    ]


FEEDS = [
    Feed(),
    Feed(flip=True),
    Feed(weights=[1.0, 2.5, 3.0]),
    Feed(subset=(2, 9)),
    Feed(drop_farthest=0.4),
    Feed(weights=[3.0, 1.0, 1.0], subset=(1, 9), drop_farthest=0.3, flip=True),
]


def identified(stores: Sequence[PairStore], source: PairSource, draw: Draws) -> list[tuple[PairStore, int]]:
    """Store and index of each pair of a batch, known by its noise."""
    unflipped = PairSource(stores, source.feed.model_copy(update={"flip": False}))
    _, eps, _ = unflipped.batch(draw)
    known = {
        tuple(row.flatten().tolist()): (store, index)
        for store in stores
        for index, row in enumerate(store.batch(range(len(store)))[0])
    }
    return [known[tuple(row.flatten().tolist())] for row in eps]


@pytest.mark.parametrize("feed", FEEDS, ids=["all", "flip", "weights", "subset", "near", "everything"])
def test_the_states_of_a_batch_are_those_of_its_pairs(several: list[PairStore], feed: Feed) -> None:
    source = PairSource(several, feed)
    for step in (0, 5):
        draw = draws(step, 60)
        x0, eps, labels = source.batch(draw)
        every = [source.states(draw, torch.full((60,), k)) for k in range(5)]
        assert torch.equal(every[0], eps) and torch.equal(every[-1], x0)
        assert labels is not None and torch.equal(source.labels(draw), labels)  # type: ignore[arg-type]
        mirrored = draw.uniform("flip") < 0.5 if feed.flip else torch.zeros(60, dtype=torch.bool)
        for row, (store, index) in enumerate(identified(several, source, draw)):
            path = store.column("path", [index])[0].float()
            wanted = path.flip(-1) if mirrored[row] else path
            assert torch.equal(torch.stack([each[row] for each in every[1:-1]]), wanted)
        which = torch.arange(60) % 5
        assert torch.equal(source.states(draw, which), torch.stack(every)[which, torch.arange(60)])


def test_a_process_has_the_states_of_its_part(several: list[PairStore]) -> None:
    source = PairSource(several, FEEDS[-1])
    which = torch.arange(24) % 5
    parts = [slice(0, 8), slice(8, 16), slice(16, 24)]
    found = [source.states(draws(3, 24, part), which[part]) for part in parts]
    assert torch.equal(torch.cat(found), source.states(draws(3, 24), which))
    labels = [source.labels(draws(3, 24, part)) for part in parts]
    assert same(joined([[each] for each in labels]), [source.labels(draws(3, 24))])


def test_stores_without_classes_have_no_labels(tmp_path: Path) -> None:
    assert PairSource([kept(tmp_path, 1, 5)], Feed()).labels(draws(0, 4)) is None


# Which chords a step sees ----------------------------------------------------------------------------------

THREE = (uniform(2), Schedule((1.0, 0.8, 0.3, 0.0), "boss"), uniform(6))


def test_every_schedule_and_every_interval_of_it_is_drawn_equally_often() -> None:
    drawn, counts = Drawn(THREE), {schedule.times: np.zeros(schedule.steps) for schedule in THREE}
    for step in range(60):
        chord = drawn.at(draws(step, 500))
        for row, number in zip(chord.grid.tolist(), chord.number.tolist(), strict=True):
            (times,) = [each for each in counts if tuple(row) == (*each, *[0.0] * (7 - len(each)))]
            counts[times][number] += 1
    total = 60 * 500
    assert scipy.stats.chisquare([each.sum() for each in counts.values()]).pvalue > 1e-3
    for each in counts.values():
        assert scipy.stats.chisquare(each).pvalue > 1e-3
    assert sum(each.sum() for each in counts.values()) == total


def test_a_chord_is_one_interval_of_a_schedule() -> None:
    chord = Drawn(THREE).at(draws(4, 300))
    assert not chord.own and chord.start.dtype == torch.float64
    found = set(zip(chord.start.tolist(), chord.end.tolist(), strict=True))
    assert found == {interval for schedule in THREE for interval in pairwise(schedule.times)}


def test_chords_are_a_function_of_the_step() -> None:
    drawn = Drawn(THREE, own=0.5)
    whole = [drawn.at(draws(step, 24)) for step in range(40)]
    for step in (39, 7):
        again = Drawn(THREE, own=0.5).at(draws(step, 24))
        parts = [drawn.at(draws(step, 24, slice(first, first + 6))) for first in range(0, 24, 6)]
        assert torch.equal(again.grid, whole[step].grid) and again.own == whole[step].own
        assert torch.equal(torch.cat([each.grid for each in parts]), whole[step].grid)
        assert torch.equal(torch.cat([each.number for each in parts]), whole[step].number)
        assert {each.own for each in parts} == {whole[step].own}
    assert not torch.equal(whole[7].number, whole[8].number)
    assert not torch.equal(drawn.at(draws(7, 24, seed=1)).number, whole[7].number)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_steps_begins_at_the_students_own_states(share: float) -> None:
    own = np.array([Drawn(THREE, share).at(draws(step, 4)).own for step in range(1000)])
    assert abs(own.mean() - share) <= 4 * (share * (1 - share) / 1000) ** 0.5


# Chords as batches -----------------------------------------------------------------------------------------

TWO = (Schedule((1.0, 0.5, 0.0), "two"), Schedule((1.0, 0.75, 0.125, 0.0), "three"))
PLACES = {1.0: 0, 0.75: 1, 0.5: 2, 0.125: 3, 0.0: 4}


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_batch_has_both_ends_of_its_chords(several: list[PairStore], own: float) -> None:
    """Where the student walks to the beginning itself, it is given the noise."""
    pairs = PairSource(several, FEEDS[-1])
    drawn = Drawn(TWO, own)
    source = ChordSource(pairs, drawn, "s.pairs")
    seen = set()
    for step in range(4):
        draw = draws(step, 50)
        chord = drawn.at(draw)
        later, earlier, labels = source.batch(draw)
        x0, eps, expected = pairs.batch(draw)
        every = torch.stack([pairs.states(draw, torch.full((50,), k)) for k in range(5)])
        for row, (t, s) in enumerate(zip(chord.start.tolist(), chord.end.tolist(), strict=True)):
            seen.add((t, s))
            assert torch.equal(later[row], every[PLACES[s], row])
            assert torch.equal(earlier[row], eps[row] if own else every[PLACES[t], row])
            if s == 0:
                assert torch.equal(later[row], x0[row])
        assert same([labels], [expected])
    assert seen == {interval for each in TWO for interval in each.intervals}


def test_times_may_be_written_in_another_way(several: list[PairStore]) -> None:
    near = Schedule((1.0, 0.75 - 1e-12, 0.5 + 1e-12, 0.0), "near")
    draw = draws(1, 30)
    found = ChordSource(PairSource(several, Feed()), Drawn([near]), "s.pairs").batch(draw)
    exact = Schedule((1.0, 0.75, 0.5, 0.0), "exact")
    assert same(found, ChordSource(PairSource(several, Feed()), Drawn([exact]), "s.pairs").batch(draw))


def test_times_that_were_not_kept_are_named_with_what_to_do(several: list[PairStore]) -> None:
    with pytest.raises(UsageError) as refused:
        ChordSource(PairSource(several, Feed()), Drawn([TWO[0], uniform(4)]), "s.pairs")
    assert str(refused.value) == (
        f"s.pairs: {several[0].folder} has kept no states at t = 0.25 of 4 steps 'uniform'; make the pairs "
        "with path: {schedule: STAGE} or {uniform: [4]}"
    )


def test_stores_with_other_times_are_not_mixed(tmp_path: Path) -> None:
    stores = [kept(tmp_path / str(n), n, 5, path=path) for n, path in enumerate((TIMES, (0.5,)))]
    with pytest.raises(UsageError, match="1 keeps its states at other times than"):
        ChordSource(PairSource(stores, Feed()), Drawn([uniform(2)]), "s.pairs")


# Schedules of a boss stage ---------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["boss", "best"])
def test_schedules_are_those_of_the_dynamic_programme_whatever_was_chosen(
    tmp_path: Path, choose: str
) -> None:
    stage = make(Boss, grid=20, nfe=[1, 3, 5], trajectories=8, held_out=16, choose=choose)
    model = {"name": "analytic:mixture"}
    stage.run(work(tmp_path, stage, {"model": model}))
    digest = open_model(model).digest
    found = bellman_schedules(tmp_path, digest, "s.schedule")
    assert list(found) == [1, 3, 5]
    tensors, _ = artifact.load_tensors(tmp_path / "boss.safetensors")
    solution = bellman(tensors["cost"].numpy())
    for k, schedule in found.items():
        assert schedule.name == "boss"
        assert schedule.times == tuple(uniform(20).times[i] for i in solution.path(k))
        written = artifact.load_json(tmp_path / f"schedule-nfe{k}.json")
        if choose == "boss":
            assert written["times"] == list(schedule.times)
    with pytest.raises(UsageError) as refused:
        bellman_schedules(tmp_path, "another", "s.schedule")
    assert str(refused.value) == (
        f"s.schedule: {tmp_path / 'boss.safetensors'} was made for another model; name the boss stage of the "
        "model itself"
    )


def test_times_that_rounding_tells_apart_are_one() -> None:
    assert merged((1.0, 0.5, 0.0), (0.5 + 1e-12, 1e-30, 0.25, 1.0)) == (1.0, 0.5, 0.25, 0.0)
