"""Batches of pairs: which pair is seen when, of one store or several, and what a recipe can say about it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import Shell
from torch import Tensor

from flowdistill import artifact, data, randomness
from flowdistill.errors import RecipeError, UsageError
from flowdistill.pairstore import Block, PairSpec, PairStore, PairWriter
from flowdistill.recipe import parse
from flowdistill.sources import DataSource, Draws, PairSource, shuffled
from flowdistill.stages import Feed, verbs
from flowdistill.teachers import open_model

SIZES = (37, 64, 11)
CLASSES = 5
SEED = 9
CPU = torch.device("cpu")


def label_of(store: Tensor, index: Tensor) -> Tensor:
    return (7 * index + store) % CLASSES


def fill(folder: Path, number: int, count: int, **fields: Any) -> PairStore:
    """A store whose pairs say of themselves which they are: x0 begins with [store, index]."""
    chosen: dict[str, Any] = {"shape": (2,), "classes": CLASSES, "dtype": "float32", "shard_size": 16}
    spec = PairSpec(count=count, seed=number, **(chosen | fields))
    with PairWriter(folder, spec) as writer:
        for shard in range(spec.shards):
            indices = spec.indices(shard)
            index = torch.tensor(list(indices))
            x0 = torch.rand(len(indices), *spec.shape, generator=torch.Generator().manual_seed(shard))
            x0.flatten(1)[:, 0], x0.flatten(1)[:, 1] = number, index.float()
            labels = label_of(torch.tensor(number), index) if spec.classes else None
            eps, record = spec.draw(indices)
            writer.commit(shard, Block(eps, x0, labels, record=record))
    return PairStore.open(folder)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[PairStore]:
    return [fill(tmp_path_factory.mktemp("store"), number, count) for number, count in enumerate(SIZES)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[PairStore]:
    """Two stores of images, no row or column of which is its own mirror image."""
    folders = [tmp_path_factory.mktemp("pictures") for _ in range(2)]
    return [fill(folder, number, 40, shape=(2, 3, 4)) for number, folder in enumerate(folders)]


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> PairStore:
    """A hundred pairs, the noise of every third 1 from its sample, of the others at random."""
    spec = PairSpec(count=100, seed=4, shape=(3,), dtype="float32", noise="stored", shard_size=64)
    folder = tmp_path_factory.mktemp("far")
    with PairWriter(folder, spec) as writer:
        for shard in range(spec.shards):
            indices = torch.tensor(list(spec.indices(shard)))
            x0 = indices.float()[:, None].expand(-1, 3)
            away = torch.where(indices % 3 == 0, 1.0, 2 * randomness.noise(4, indices, (1,))[:, 0].abs())
            writer.commit(shard, Block(x0 + away[:, None], x0))
    return PairStore.open(folder)


def draws(step: int, total: int, part: slice = slice(None), seed: int = SEED) -> Draws:
    return Draws(seed, step, slice(*part.indices(total)), total, CPU)


def seen(source: PairSource, steps: int, total: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Store and index of every pair of the first steps, in order, [steps * total] each."""
    batches = [source.batch(draws(step, total, seed=seed))[0] for step in range(steps)]
    first = torch.cat([x0.flatten(1)[:, :2] for x0 in batches]).long()
    return first[:, 0], first[:, 1]


def same(one: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> bool:
    return all(
        a is None and b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def joined(parts: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    columns = zip(*parts, strict=True)
    return [None if column[0] is None else torch.cat(column) for column in columns]  # type: ignore[arg-type]


def test_the_chosen_of_a_batch_are_exactly_so_many_in_any_number_of_processes() -> None:
    found = torch.stack([draws(step, 12).chosen("some", 3) for step in range(400)])
    assert (found.sum(1) == 3).all()
    assert ((found.double().mean(0) - 0.25).abs() < 5 * (0.25 * 0.75 / 400) ** 0.5).all()
    parts = [draws(7, 12, slice(first, first + 4)).chosen("some", 3) for first in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), found[7])
    assert not torch.equal(draws(7, 12).chosen("others", 3), found[7])


# One store -------------------------------------------------------------------------------------------------


def test_one_store_is_seen_in_the_order_of_its_permutations(stores: list[PairStore]) -> None:
    """29 a batch and 37 pairs: every epoch but the first begins inside a batch."""
    _, index = seen(PairSource(stores[:1], Feed()), steps=14, total=29)
    orders = [randomness.permutation(SEED, "order", epoch, 37) for epoch in range(11)]
    assert torch.equal(index, torch.cat(orders)[: 14 * 29])
    assert torch.equal(index, shuffled(SEED, "order", torch.arange(14 * 29), 37))
    assert all(sorted(epoch.tolist()) == list(range(37)) for epoch in index[: 10 * 37].split(37))
    assert len({tuple(epoch.tolist()) for epoch in index[: 10 * 37].split(37)}) == 10


def test_a_batch_larger_than_the_store_runs_through_several_epochs(stores: list[PairStore]) -> None:
    _, index = seen(PairSource(stores[2:], Feed()), steps=1, total=5 * 11 + 3)
    assert sorted(Counter(index.tolist()).values()) == [5] * 8 + [6] * 3


@given(st.integers(1, 50), st.integers(0, 10**9), st.integers(0, 5), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_any_stretch_of_an_endless_run_is_an_order_of_all(
    count: int, first: int, seed: int, length: int
) -> None:
    numbers = torch.arange(first * count, first * count + length)
    chosen = shuffled(seed, "order", numbers, count)
    for epoch in chosen.split(count):
        assert len(epoch.unique()) == len(epoch) and 0 <= int(epoch.min()) <= int(epoch.max()) < count
    backwards = shuffled(seed, "order", numbers.flip(0), count)
    assert torch.equal(backwards.flip(0), chosen)


def test_pairs_come_with_their_own_noise_and_label(stores: list[PairStore]) -> None:
    x0, eps, labels = PairSource(stores, Feed()).batch(draws(3, 200))
    store, index = x0[:, 0].long(), x0[:, 1].long()
    assert labels is not None and torch.equal(labels, label_of(store, index))
    assert set(store.tolist()) == {0, 1, 2}
    for number in range(3):
        of = store == number
        assert torch.equal(eps[of], randomness.noise(number, index[of], (2,)))


def test_stores_without_classes_have_no_labels(tmp_path: Path) -> None:
    plain = [fill(tmp_path / name, number, 8, classes=0) for number, name in enumerate("ab")]
    for chosen in (plain, plain[:1]):
        assert PairSource(chosen, Feed()).batch(draws(0, 20))[2] is None


def test_data_are_read_in_epochs_with_fresh_noise() -> None:
    source = DataSource(data.DIGITS.held_out)
    count = data.DIGITS.held_out.count
    assert count is not None
    batches = [source.batch(draws(step, 100)) for step in range(2 * count // 100 + 1)]
    x0, eps, _ = (
        torch.cat([each for each in column if each is not None]) for column in zip(*batches, strict=True)
    )
    for epoch in (x0[:count], x0[count : 2 * count]):
        assert len(epoch.unique(dim=0)) == len(
            data.DIGITS.held_out.batch(torch.arange(count))[0].unique(dim=0)
        )
    assert not torch.equal(x0[:count], x0[count : 2 * count])
    assert len(eps.unique(dim=0)) == len(eps)


# Several stores --------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 10.0), min_size=2, max_size=3), st.integers(0, 99), st.integers(0, 2**40))
@settings(max_examples=25, deadline=None)
def test_shares_are_exact_over_a_thousand_and_even_within_it(
    stores: list[PairStore], weights: list[float], offset: int, seed: int
) -> None:
    source = PairSource(stores[: len(weights)], Feed(weights=weights))
    store, _ = seen(source, steps=2, total=1200, seed=seed)
    there = torch.nn.functional.one_hot(store, len(weights))
    before = torch.cat([torch.zeros(1, len(weights), dtype=torch.int64), there.cumsum(0)])
    share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for first in (0, offset, 1000, 1000 + offset):
        assert ((before[first + 1000] - before[first]) - 1000 * share).abs().max() < 1
    assert ((before[100:] - before[:-100]) - 100 * share).abs().max() <= 2


@pytest.mark.parametrize("weights", [[1.0, 3.0, 2.0], None])
def test_each_store_runs_through_epochs_of_its_own(
    stores: list[PairStore], weights: list[float] | None
) -> None:
    """Its pairs in the order in which they are seen are whole permutations, one after the other."""
    store, index = seen(PairSource(stores, Feed(weights=weights)), steps=31, total=64)
    for number, size in enumerate(SIZES):
        epochs = index[store == number].split(size)
        assert len(epochs) > 3
        assert all(len(epoch.unique()) == len(epoch) for epoch in epochs)
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)
    orders = [tuple(index[store == number][:11].tolist()) for number in range(3)]
    assert len(set(orders)) == 3


def test_stores_of_one_size_are_not_seen_in_one_order(pictures: list[PairStore]) -> None:
    store, index = seen(PairSource(pictures, Feed()), steps=4, total=20)
    assert not torch.equal(index[store == 0], index[store == 1])


def test_shares_go_by_the_numbers_of_pairs_where_nothing_else_is_said(stores: list[PairStore]) -> None:
    def shares(feed: Feed) -> list[int]:
        store, _ = seen(PairSource(stores, feed), steps=10, total=100)
        return torch.bincount(store, minlength=3).tolist()

    assert shares(Feed()) == [330, 572, 98]  # of 37, 64 and 11: 330.4, 571.4, 98.2
    assert shares(Feed(subset=(0, 10))) == [334, 333, 333]
    assert shares(Feed(drop_farthest=0.5)) == [333, 562, 105]  # of 19, 32 and 6
    assert shares(Feed(weights=[1.0, 1.0, 2.0])) == [250, 250, 500]


def test_a_weight_of_next_to_nothing_is_still_seen(stores: list[PairStore]) -> None:
    store, _ = seen(PairSource(stores, Feed(weights=[1e-9, 1.0, 1.0])), steps=10, total=100)
    assert torch.bincount(store).tolist() in ([1, 499, 500], [1, 500, 499])


def test_scaled_weights_are_the_same_weights(stores: list[PairStore]) -> None:
    one, other = (PairSource(stores, Feed(weights=[k, 3 * k, 2.5 * k])) for k in (1.0, 2.0**20))
    assert same(one.batch(draws(5, 300)), other.batch(draws(5, 300)))


# A function of the step ------------------------------------------------------------------------------------

FEEDS = [Feed(), Feed(flip=True), Feed(weights=[5.0, 1.0], subset=(3, 33), drop_farthest=0.2, flip=True)]


@pytest.mark.parametrize("feed", FEEDS, ids=["plain", "flip", "all"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_batch_depends_on_nothing_but_its_step(pictures: list[PairStore], feed: Feed, count: int) -> None:
    feed = feed if count == 2 else feed.model_copy(update={"weights": None})
    worn = PairSource(pictures[:count], feed)
    walked = [worn.batch(draws(step, 24)) for step in range(40)]
    fresh = PairSource([PairStore.open(store.folder) for store in pictures[:count]], feed)
    assert same(fresh.batch(draws(39, 24)), walked[39])
    assert same(fresh.batch(draws(7, 24)), walked[7])
    assert not same(walked[7], walked[8])
    assert not same(fresh.batch(draws(7, 24, seed=SEED + 1)), walked[7])


@pytest.mark.parametrize("feed", FEEDS, ids=["plain", "flip", "all"])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_the_processes_are_the_whole_batch(
    pictures: list[PairStore], feed: Feed, processes: int
) -> None:
    source, size = PairSource(pictures, feed), 24 // processes
    for step in (0, 3, 1000):
        parts = [
            PairSource(pictures, feed).batch(draws(step, 24, slice(rank * size, (rank + 1) * size)))
            for rank in range(processes)
        ]
        assert same(joined(parts), source.batch(draws(step, 24)))


def test_what_a_batch_holds_can_be_changed_without_harm(pictures: list[PairStore]) -> None:
    source = PairSource(pictures, Feed(flip=True))
    for tensor in source.batch(draws(2, 24)):
        assert tensor is not None
        tensor.zero_()
    assert same(source.batch(draws(2, 24)), PairSource(pictures, Feed(flip=True)).batch(draws(2, 24)))


# Flips -----------------------------------------------------------------------------------------------------


def coins(pictures: list[PairStore], step: int, total: int) -> Tensor:
    """Which pairs of a step are flipped; checks that these are mirrored along the width, the others not."""
    plain = PairSource(pictures, Feed()).batch(draws(step, total))
    flipped = PairSource(pictures, Feed(flip=True)).batch(draws(step, total))
    assert plain[2] is not None and flipped[2] is not None and torch.equal(plain[2], flipped[2])

    def alike(change: Any) -> Tensor:
        """[2, B], of x0 and of the noise."""
        pairs = zip(plain[:2], flipped[:2], strict=True)
        return torch.stack([(change(a) == b).flatten(1).all(1) for a, b in pairs])

    kept, mirrored = alike(lambda x: x), alike(lambda x: x.flip(-1))
    assert torch.equal(kept[0], kept[1]), "noise and sample are flipped together"
    assert torch.equal(mirrored[0], ~kept[0]) and torch.equal(mirrored[0], mirrored[1])
    assert not alike(lambda x: x.flip(-2)).any()
    return mirrored[0]


@pytest.mark.parametrize("count", [1, 2])
def test_half_the_pairs_are_mirrored_anew_in_each_step(pictures: list[PairStore], count: int) -> None:
    tossed = torch.stack([coins(pictures[:count], step, 200) for step in range(20)])
    assert abs(float(tossed.double().mean()) - 0.5) < 0.03  # 4 standard deviations of 4000 coins
    assert len(tossed.unique(dim=0)) == 20
    agree = (tossed[1:] == tossed[:-1]).double().mean()
    assert abs(float(agree) - 0.5) < 0.04


def test_the_same_pair_is_seen_either_way(pictures: list[PairStore]) -> None:
    _, index = seen(PairSource(pictures[:1], Feed()), steps=20, total=40)  # a step is an epoch
    flipped = torch.stack([coins(pictures[:1], step, 40) for step in range(20)]).flatten()
    times = torch.zeros(40).index_add(0, index, flipped.float())
    assert times.min().item() > 0 and times.max().item() < 20


# Which pairs take part -------------------------------------------------------------------------------------


def test_a_subset_is_what_lies_between_two_numbers(stores: list[PairStore]) -> None:
    _, index = seen(PairSource(stores[:1], Feed(subset=(5, 30))), steps=4, total=25)
    for epoch in index.split(25):
        assert sorted(epoch.tolist()) == list(range(5, 30))
    store, index = seen(PairSource(stores[:2], Feed(subset=(30, 37))), steps=1, total=200)
    assert {(s, i) for s in (0, 1) for i in range(30, 37)} == set(
        zip(store.tolist(), index.tolist(), strict=True)
    )


@given(st.integers(0, 99), st.integers(1, 100), st.integers(1, 99))
@settings(max_examples=60, deadline=None)
def test_the_farthest_pairs_are_left_out(far: PairStore, first: int, length: int, percent: int) -> None:
    """Against sorting the distances of the pairs by hand; of equal ones the first stay."""
    end = min(100, first + length)
    eps, x0, _ = far.batch(range(first, end))
    distances = (eps - x0).double().square().mean(1).sqrt().float().tolist()
    count = end - first
    kept = max(1, count - percent * count // 100)
    nearest = sorted(range(count), key=lambda i: (distances[i], i))[:kept]
    source = PairSource([far], Feed(subset=(first, end), drop_farthest=percent / 100))
    x0, _, _ = source.batch(draws(0, 2 * kept))
    assert Counter(x0[:, 0].long().tolist()) == {first + i: 2 for i in nearest}


def test_something_is_left_however_much_is_dropped(far: PairStore) -> None:
    for share in (0.999, 1 - 2**-53):
        x0, _, _ = PairSource([far], Feed(drop_farthest=share)).batch(draws(0, 5))
        assert len(x0.unique(dim=0)) == 1


def test_a_share_that_is_no_binary_number_drops_what_it_says(far: PairStore) -> None:
    """0.29 * 100 is 28.999999999999996."""
    x0, _, _ = PairSource([far], Feed(drop_farthest=0.29)).batch(draws(0, 71))
    assert len(x0.unique(dim=0)) == 71


# What does not go together ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("fields", "what", "values"), [
    ({"shape": (3,)}, "shape", ("(2,)", "(3,)")),
    ({"classes": 6}, "classes", ("5", "6")),
    ({"classes": 0}, "classes", ("5", "0")),
])  # fmt: skip
def test_stores_that_differ_are_both_named(
    stores: list[PairStore], tmp_path: Path, fields: dict[str, Any], what: str, values: tuple[str, str]
) -> None:
    other = fill(tmp_path / "other", 0, 8, **fields)
    with pytest.raises(UsageError) as refused:
        PairSource([*stores, other], Feed())
    said = str(refused.value)
    assert f"must agree in {what}" in said
    assert f"{stores[2].folder} has {values[0]}" in said and f"{other.folder} has {values[1]}" in said


@pytest.mark.parametrize(("feed", "says"), [
    (Feed(weights=[1.0]), "feed.weights: 1 numbers for 3 stores"),
    (Feed(weights=[1.0] * 4), "feed.weights: 4 numbers for 3 stores"),
    (Feed(flip=True), r"feed.flip: pairs of shape \[2\] cannot be flipped, expected images"),
])  # fmt: skip
def test_feeds_that_do_not_fit_the_stores(stores: list[PairStore], feed: Feed, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        PairSource(stores, feed)


def test_a_subset_beyond_a_store_names_it(stores: list[PairStore]) -> None:
    PairSource(stores, Feed(subset=(0, 11)))
    with pytest.raises(UsageError) as refused:
        PairSource(stores, Feed(subset=(0, 12)))
    assert f"feed.subset: [0, 12], but {stores[2].folder} has 11 pairs" in str(refused.value)


# Recipes ---------------------------------------------------------------------------------------------------

RECIPE = """
seed: 3
teacher: {name: analytic:ring, components: 3}
stages:
  - pairs: {name: a, count: 96, steps: 2, check: 0}
  - pairs: {name: b, count: 64, solver: euler, steps: 2, check: 0}
  - reflow:
      pairs: PAIRS
      feed: FEED
      steps: 4
      batch_size: 8
      network: {name: mlp, width: 8, depth: 1}
      loss: {name: squared-l2}
      log_every: 1
"""


def recipe(pairs: str, feed: str = "{}") -> bytes:
    return RECIPE.replace("PAIRS", pairs).replace("FEED", feed).encode()


def test_several_stores_and_their_feed_are_read() -> None:
    feed = "{weights: [1, 2.5], subset: [0, 50], drop_farthest: 0.1, flip: true}"
    found = parse(recipe("[a, b]", feed), Path("r.yaml"), verbs())
    assert found.references["reflow"]["pairs"] == ("a", "b")
    stage: Any = found.stages[2]
    assert stage.feed == Feed(weights=[1.0, 2.5], subset=(0, 50), drop_farthest=0.1, flip=True)
    assert parse(recipe("b"), Path("r.yaml"), verbs()).references["reflow"]["pairs"] == "b"
    assert parse(recipe(""), Path("r.yaml"), verbs()).references["reflow"]["pairs"] == "b"
    plain: Any = parse(recipe("b"), Path("r.yaml"), verbs()).stages[2]
    assert plain.feed == Feed()


@pytest.mark.parametrize(("pairs", "feed", "says"), [
    ("[a, c]", "{}", "r.yaml:8:18: reflow.pairs[1]: unknown stage 'c'"),
    ("[a, reflow]", "{}", "r.yaml:8:18: reflow.pairs[1]: expected pairs, 'reflow' makes a model"),
    ("[a, 3]", "{}", "r.yaml:8:18: reflow.pairs[1]: expected text, found 3"),
    ("[a, ./nowhere]", "{}", "r.yaml:8:18: reflow.pairs[1]: './nowhere' does not exist"),
    ("[a, b]", "{wieghts: [1, 1]}", "r.yaml:9:14: reflow.feed.wieghts: unknown key, did you mean 'weights'?"),
    ("[a, b]", "{weights: [1, 0]}", "r.yaml:9:27: reflow.feed.weights[1]: expected a number > 0.0, found 0"),
    ("[a, b]", "{weights: [1, x]}", "r.yaml:9:27: reflow.feed.weights[1]: expected a number, found 'x'"),
    ("[a, b]", "{weights: 2}", "r.yaml:9:23: reflow.feed.weights: expected a list, found 2; write [2]"),
    ("[a, b]", "{subset: [5, 3]}", "r.yaml:9:13: reflow.feed: expected a subset [first, end]"),
    ("[a, b]", "{subset: [5, 5]}", "r.yaml:9:13: reflow.feed: expected a subset [first, end]"),
    ("[a, b]", "{subset: [-1, 5]}", "r.yaml:9:23: reflow.feed.subset[0]: expected a number >= 0, found -1"),
    ("[a, b]", "{subset: [5]}", "r.yaml:9:22: reflow.feed.subset"),
    ("[a, b]", "{drop_farthest: 1}", "reflow.feed.drop_farthest: expected a number < 1.0, found 1"),
    ("[a, b]", "{drop_farthest: -0.1}", "reflow.feed.drop_farthest: expected a number >= 0.0, found -0.1"),
    ("[a, b]", "{flip: 1}", "r.yaml:9:20: reflow.feed.flip: expected true or false, found 1"),
])  # fmt: skip
def test_mistakes_in_a_feed_have_their_place(pairs: str, feed: str, says: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(recipe(pairs, feed), Path("r.yaml"), verbs())
    assert says in str(refused.value)


@pytest.mark.parametrize(("pairs", "feed"), [
    ("[]", "{}"),
    ("[a, a]", "{}"),
    ("[a, b]", "{weights: []}"),
    ("[a, b]", "{weights: [1]}"),
    ("b", "{weights: [1, 2]}"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_any_pairs_are_made(pairs: str, feed: str) -> None:
    with pytest.raises(RecipeError):
        parse(recipe(pairs, feed), Path("r.yaml"), verbs())


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def test_reflow_learns_from_two_stores(shell: Shell) -> None:
    Path("r.yaml").write_bytes(recipe("[a, b]", "{weights: [1, 3], subset: [0, 60], drop_farthest: 0.1}"))
    document = shell("run", "r.yaml", "--json", "-q").json
    assert [each["stage"] for each in document["stages"]] == ["a", "b", "reflow"]
    manifest = artifact.Manifest.read(Path("runs/r/reflow"))
    digests = {each["stage"]: each["digest"] for each in document["stages"]}
    assert {name: manifest.inputs[name] for name in "ab"} == {name: digests[name] for name in "ab"}
    assert open_model("runs/r/reflow").card.parents == manifest.inputs
    losses = {}
    for name, pairs, feed in (("same", "[a, b]", "[1, 3]"), ("other", "[a, b]", "[3, 1]")):
        Path("r.yaml").write_bytes(recipe(pairs, f"{{weights: {feed}, subset: [0, 60], drop_farthest: 0.1}}"))
        assert shell("run", "r.yaml", "-q", "--out", name).code == 0
    for name in ("runs/r", "same", "other"):
        lines = Path(name, "reflow", "log.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["same"]) == 4 and losses["same"] == losses["runs/r"] != losses["other"]


def test_what_the_stores_do_not_allow_is_told_by_key(shell: Shell) -> None:
    Path("r.yaml").write_bytes(recipe("[a, b]"))
    assert shell("run", "r.yaml", "-q").code == 0
    for feed, says in (
        ("weights: [1]", "1 numbers for 2 stores"),
        ("subset: [0, 65]", "runs/r/b has 64 pairs"),
    ):
        Path("r.yaml").write_bytes(recipe("[a, b]", f"{{{feed}}}"))
        answer = shell("run", "r.yaml", "-q", "--fresh")
        assert answer.code == 2 and f"feed.{feed.split(':')[0]}" in answer.err and says in answer.err


def test_a_recipe_that_was_refused_can_be_put_right(shell: Shell) -> None:
    Path("r.yaml").write_bytes(recipe("[a, b]", "{subset: [0, 65]}"))
    assert shell("run", "r.yaml", "-q").code == 2
    Path("r.yaml").write_bytes(recipe("[a, b]", "{subset: [0, 64]}"))
    assert shell("run", "r.yaml", "-q").code == 0


def neighbours(order: Sequence[int]) -> set[tuple[int, int]]:
    return set(pairwise(order))


def test_an_epoch_is_no_shift_of_another() -> None:
    """Neighbours in one order are hardly ever neighbours in the next."""
    orders = [shuffled(0, "order", torch.arange(e * 500, (e + 1) * 500), 500).tolist() for e in range(4)]
    assert all(len(neighbours(one) & neighbours(other)) < 10 for one, other in pairwise(orders))
