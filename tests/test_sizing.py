"""Sizes counted by hand, networks chosen by brute force, and budgets on the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from faults import content
from test_cli import Shell
from test_processes import gloo
from test_stages import make, work
from torch import nn

from flowdistill import artifact, networks, sizing, students
from flowdistill.architectures import Budget, Published, Scaled
from flowdistill.errors import ArtifactError, RecipeError, UsageError
from flowdistill.recipe import json_schema, load
from flowdistill.sizing import FAMILIES, candidates, choose, scaled, size_of
from flowdistill.stages import verbs
from flowdistill.stages.slimflow import SlimFlow
from flowdistill.teachers import Card, new, open_model
from flowdistill.training import Batch

IMAGE = (3, 8, 8)
SMALL: Mapping[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    "unet": (
        {
            "shape": [3, 8, 8],
            "classes": 3,
            "channels": 24,
            "multipliers": [1, 2],
            "blocks": 2,
            "embedding": 24,
        },
        IMAGE,
        3,
    ),
    "mlp": ({"shape": [2], "classes": 3, "width": 32, "depth": 3}, (2,), 3),
    "songunet": (
        {"img_resolution": 8, "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "label_dim": 3},
        IMAGE,
        3,
    ),
    "dhariwalunet": (
        {"img_resolution": 8, "model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2, "label_dim": 3},
        IMAGE,
        3,
    ),
    "ncsnpp": ({"image_size": 8, "nf": 64, "ch_mult": [1, 2], "attn_resolutions": [4]}, IMAGE, 0),
    "admunet": (
        {
            "image_size": 8,
            "model_channels": 64,
            "channel_mult": [1, 2],
            "num_res_blocks": 2,
            "num_classes": 3,
        },
        IMAGE,
        3,
    ),
    "dit": (
        {
            "input_size": 8,
            "in_channels": 3,
            "hidden_size": 192,
            "depth": 3,
            "num_heads": 3,
            "num_classes": 3,
            "class_dropout_prob": 0.0,  # no class for none: it has to be given labels
        },
        IMAGE,
        3,
    ),
}
"""By family: arguments, shape, classes."""


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(capsys)


def teacher(family: str, path: Path, **changes: Any) -> Path:
    arguments, shape, classes = SMALL[family]
    card = Card(architecture=family, arguments={**arguments, **changes}, shape=shape, classes=classes)
    torch.manual_seed(1)
    model = new(card)
    for parameter in model.network.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.write(path)
    return path


def builds(family: str, given: Mapping[str, Any]) -> bool:
    try:
        networks.build(family, given)
    except ArtifactError:
        return False
    return True


def parameters(network: nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


# --- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "depth", "classes"), [(8, 1, 0), (16, 3, 0), (24, 2, 4)])
def test_a_perceptron_is_counted_as_by_hand(width: int, depth: int, classes: int) -> None:
    given = {"shape": [5], "classes": classes, "width": width, "depth": depth}
    size = size_of("mlp", given, (5,))
    linear = [(32, width), (5, width), *[(width, width)] * (depth - 1), (width, 5), (32, 5)]
    labels = (classes + 1) * width if classes else 0
    assert size.parameters == sum(i * o + o for i, o in linear) + labels
    assert size.macs == sum(i * o for i, o in linear)


@pytest.mark.parametrize(("c", "blocks", "e", "classes"), [(8, 1, 16, 0), (16, 2, 24, 5)])
def test_a_unet_is_counted_as_by_hand(c: int, blocks: int, e: int, classes: int) -> None:
    given = {"shape": [3, 8, 8], "classes": classes, "channels": c, "blocks": blocks, "embedding": e}
    size = size_of("unet", given | {"multipliers": [1, 2]}, IMAGE)
    d = 2 * c
    # (kernel's side, inputs, outputs, pixels of the output); linear maps have one pixel.
    layers = [(1, 32, e, 1), (1, e, e, 1), (3, 3, c, 64), (3, c, d, 16), (1, d, c, 16), (3, c, 3, 64)]
    norms, attention = c, 0
    for channels, pixels, count in ((c, 64, 2 * blocks + 1), (d, 16, blocks)):
        layers += [(3, channels, channels, pixels)] * 2 * count + [(1, e, 2 * channels, 1)] * count
        norms += 2 * channels * count
    layers += [(1, d, 3 * d, 16), (1, d, d, 16)] * blocks
    norms += d * blocks
    attention = 2 * 16 * 16 * d * blocks  # queries by keys, and shares by values
    assert size.parameters == sum(k * k * i * o + o for k, i, o, _ in layers) + 2 * norms + (classes + 1) * e
    assert size.macs == sum(k * k * i * o * pixels for k, i, o, pixels in layers) + attention


PUBLISHED = {
    "rf-cifar10": (61_804_419, 10.68),
    "slimflow-28m": (27_906_179, 6.79),
    "slimflow-15m": (15_707_235, 3.82),
    "slimflow-7m": (6_989_891, 1.70),
    "slimflow-3m": (3_437_123, 0.72),
    "slimflow-imagenet64-81m": (80_685_315, None),
    "slimflow-imagenet64-45m": (44_685_827, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_have_the_published_sizes(name: str) -> None:
    """Billions of multiply-adds without attention's products, which take up to 3 % more."""
    counted, billions = PUBLISHED[name]
    architecture, arguments = networks.presets()[name]
    side = 64 if "64" in name else 32
    size = size_of(architecture, arguments, (3, side, side))
    assert size.parameters == counted
    if billions is not None:
        assert billions * 0.995 < size.macs / 1e9 < billions * 1.04


@pytest.mark.parametrize(
    ("size", "side", "counted", "billions"),
    [("3m", 64, 3_536_195, 2.87), ("7m", 64, 6_989_891, 6.65), ("15m", 32, 15_707_235, 3.82)],
)
def test_slimflows_networks_take_the_side_of_the_data(
    size: str, side: int, counted: int, billions: float
) -> None:
    like = Card(architecture="songunet", arguments={"img_resolution": side}, shape=(3, side, side))
    described = students._published(Published(size=size), like, "slimflow.student")
    found = size_of(described["architecture"], described["arguments"], like.shape)
    assert found.parameters == counted
    assert billions * 0.995 < found.macs / 1e9 < billions * 1.05


# --- narrower and shallower -----------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("width", "blocks"), [(0.5, None), (0.25, 1), (0.7, 1)])
def test_a_scaled_student_is_smaller_and_runs(
    family: str, width: float, blocks: int | None, tmp_path: Path
) -> None:
    like = open_model(str(teacher(family, tmp_path / "t.safetensors")))
    stage = make(SlimFlow, steps=1, student={"name": "scaled", "width": width, "blocks": blocks})
    student = stage.new_student(work(tmp_path / "s", stage, {"like": str(tmp_path / "t.safetensors")}))
    assert parameters(student.network) < parameters(like.network)
    names = FAMILIES[family]
    before, after = like.card.arguments, student.card.arguments
    channels = before[names.width]
    distances = [
        abs(wide / channels - width)
        for wide in range(names.multiple, channels + 1, names.multiple)
        if builds(family, scaled(family, before, wide / channels, blocks))
    ]
    assert abs(after[names.width] / channels - width) == min(distances)
    assert networks.argument(family, after, names.depth) == blocks or blocks is None
    x = torch.randn(2, *like.card.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2]) if like.card.classes else None
    found = student.network(x, torch.tensor([0.2, 0.9]), labels)
    assert found.shape == x.shape and found.isfinite().all()
    counted = size_of(family, after, like.card.shape)
    assert counted.parameters == parameters(student.network)


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in FAMILIES]
    + [
        ("unet", {"channels": 12, "embedding": 20}),
        ("mlp", {"width": 5}),
        ("songunet", {"model_channels": 8}),
    ],
    ids=str,
)
def test_a_student_of_the_whole_width_that_starts_warm_is_its_teacher(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = teacher(family, tmp_path / "t.safetensors", **changes)
    stage = make(SlimFlow, steps=1, student={"name": "scaled"}, warm_start=True)
    student = stage.new_student(work(tmp_path / "s", stage, {"like": str(path)}))
    like = open_model(str(path))
    for name in SMALL[family][0]:
        assert student.card.arguments[name] == like.card.arguments[name]
    state = student.network.state_dict()
    for name, value in like.network.state_dict().items():
        assert torch.equal(state[name], value)
    cold = make(SlimFlow, steps=1, student={"name": "scaled"}).new_student(
        work(tmp_path / "c", stage, {"like": str(path)})
    )
    assert any(not torch.equal(value, state[name]) for name, value in cold.network.state_dict().items())


@pytest.mark.parametrize("width", [0.01, 0.3, 0.99, 1.0])
@pytest.mark.parametrize("channels", [4, 8, 12, 20, 100])
def test_no_student_is_wider_than_its_teacher(width: float, channels: int) -> None:
    found = scaled("unet", {"channels": channels, "embedding": 64}, width, None)
    assert 1 <= found["channels"] <= channels and 1 <= found["embedding"] <= 64
    assert found["channels"] % 8 == 0 or found["channels"] == channels


def test_a_warm_start_takes_the_leading_entries() -> None:
    torch.manual_seed(0)
    wide, narrow = (
        nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 2)),
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(7, 2)),
    )
    before = {name: value.clone() for name, value in narrow.state_dict().items()}
    state = wide.state_dict()
    assert sizing.sliced(narrow, {**state, "other": torch.zeros(1)}) == 3
    found = narrow.state_dict()
    assert torch.equal(found["0.weight"], state["0.weight"][:5, :3])
    assert torch.equal(found["0.bias"], state["0.bias"][:5])
    assert torch.equal(found["1.weight"], before["1.weight"])  # wider than the teacher's
    assert torch.equal(found["1.bias"], state["1.bias"])


# --- budgets --------------------------------------------------------------------------------------


def brute_force(family: str) -> list[tuple[int, dict[str, Any]]]:
    """Every network of the family that can be built, with its parameters."""
    arguments, names = SMALL[family][0], FAMILIES[family]
    found: dict[tuple[int, int], tuple[int, dict[str, Any]]] = {}
    for depth in range(1, networks.argument(family, arguments, names.depth) + 1):
        for eighths in range(1, 9):
            given = scaled(family, arguments, eighths / 8, depth)
            if builds(family, given):
                count = parameters(networks.build(family, given))
                found[given[names.width], depth] = (count, given)
    return sorted(found.values(), key=lambda each: each[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_largest_network_within_a_budget_is_chosen(family: str) -> None:
    arguments, shape, _ = SMALL[family]
    every = brute_force(family)
    tried = candidates(family, arguments, shape)
    assert [size.parameters for size in tried] == [count for count, _ in every]
    assert tried[-1].parameters == parameters(networks.build(family, arguments))
    chosen = []
    for count in (
        every[0][0],
        every[1][0] - 1,
        every[len(every) // 2][0],
        every[-1][0] - 1,
        every[-1][0] + 1,
    ):
        size = choose(family, arguments, shape, Budget(params=count), "cpu")
        assert size.parameters == max(each for each, _ in every if each <= count)
        chosen.append(size.parameters)
    assert chosen == sorted(chosen)
    with pytest.raises(UsageError, match=f"the smallest that was tried has {every[0][0]:,} parameters"):
        choose(family, arguments, shape, Budget(params=every[0][0] - 1), "cpu")
    macs = sorted(size.macs for size in tried)[len(tried) // 2]
    within = [size for size in tried if size.macs <= macs]
    best = choose(family, arguments, shape, Budget(macs=macs), "cpu")
    assert best.macs <= macs and best.parameters == max(size.parameters for size in within)


def test_a_budget_in_milliseconds_takes_the_largest_that_is_fast_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def clock(network: nn.Module, shape: tuple[int, ...], batch: int, device: str) -> float:
        return parameters(network) / 1000 * batch

    monkeypatch.setattr(sizing, "latency_ms", clock)
    arguments, shape, _ = SMALL["mlp"]
    sizes = [size.parameters for size in candidates("mlp", arguments, shape)]
    for limit in (sizes[3] / 1000, sizes[-1] / 1000):
        for batch in (1, 2):
            budget = Budget.model_validate_json(
                json.dumps({"latency_ms": f"{limit * batch} @ batch {batch}"})
            )
            size = choose("mlp", arguments, shape, budget, "cpu")
            assert size.parameters == max(each for each in sizes if each <= limit * 1000 + 1e-6)
            assert size.latency_ms == pytest.approx(size.parameters / 1000 * batch)
    both = Budget(latency_ms=sizes[-1] / 1000, params=sizes[5])
    assert choose("mlp", arguments, shape, both, "cpu").parameters == sizes[5]
    with pytest.raises(UsageError, match="no 'mlp' keeps to 0.01 ms for 1 at once; the smallest"):
        choose("mlp", arguments, shape, Budget(latency_ms=0.01), "cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_latency_is_measured_on_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_RUNS_SECONDS", 0.0)
    arguments, shape, _ = SMALL[family]
    least = candidates(family, arguments, shape)[0]
    assert sizing.latency_ms(networks.build(family, least.arguments), shape, 2, "cpu") > 0


@pytest.mark.parametrize(
    ("given", "limits"),
    [
        ({"params": "15M"}, (15_000_000, None, None, 1)),
        ({"params": "1.5k"}, (1500, None, None, 1)),
        ({"macs": "4G"}, (None, 4_000_000_000, None, 1)),
        ({"macs": 70}, (None, 70, None, 1)),
        ({"latency_ms": 5}, (None, None, 5.0, 1)),
        ({"latency_ms": 5.5, "batch": 4}, (None, None, 5.5, 4)),
        ({"latency_ms": "5.5 @ batch 4"}, (None, None, 5.5, 4)),
        ({"params": "7M", "macs": "1G", "latency_ms": 2}, (7_000_000, 10**9, 2.0, 1)),
    ],
    ids=str,
)
def test_budgets_are_written_as_people_say_them(
    given: dict[str, Any], limits: tuple[Any, ...], tmp_path: Path
) -> None:
    """And the schema accepts what the loader does, before and after."""
    budget = recipe(tmp_path, given)
    assert (budget.params, budget.macs, budget.latency_ms, budget.batch) == limits
    again = {key: value for key, value in budget.model_dump(mode="json").items() if value is not None}
    assert recipe(tmp_path, again) == budget


STUDENTS: list[Any] = [
    {"name": "scaled", "width": 0.5, "blocks": 2},
    {"name": "slimflow", "size": "15m"},
    {"name": "mlp"},
    {"name": "unet", "channels": 8},
]


@pytest.mark.parametrize("given", STUDENTS, ids=str)
def test_the_schema_accepts_the_students_that_the_loader_does(given: Any, tmp_path: Path) -> None:
    assert recipe(tmp_path, given).name == given["name"]


BAD: list[tuple[Any, str]] = [
    ({"params": "15X"}, "expected a number, as in 15M, found '15X'"),
    ({"params": "-1M"}, "expected a number, as in 15M, found '-1M'"),
    ({"params": 0}, "expected a number > 0, found 0"),
    ({"params": "0M"}, "expected a number > 0"),
    ({"macs": "4 G"}, "expected a number, as in 15M, found '4 G'"),
    ({"macs": 1.5}, "expected an integer, found 1.5"),
    ({"latency_ms": "5"}, "expected a number"),
    ({"latency_ms": "5 @ batch 0"}, "expected a number"),
    ({"latency_ms": "5 ms"}, "expected a number"),
    ({"latency_ms": 0}, "expected a number > 0"),
    ({"batch": 2}, "expected a limit: params, macs or latency_ms"),
    ({"parms": "15M"}, "student.parms: unknown key, did you mean 'params'?"),
    ({"name": "slimflow", "size": "16m"}, "unknown size '16m'"),
    ({"name": "slimflow"}, "slimflow.student.size: is required but missing"),
    ({"name": "scaled", "width": 1.5}, "width: expected a number <= 1"),
    ({"name": "budget", "params": 1}, "unknown"),
    ("15M", "expected a mapping, found '15M'"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=str)
def test_students_that_cannot_be_are_refused(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, given, schema=False)
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{tmp_path}/r.yaml:") or "r.yaml:" in str(caught.value)


def recipe(folder: Path, student: Any, schema: bool = True) -> Any:
    """The student of a recipe that is read from a file, which the schema has to accept as well."""
    stages = [{"pairs": {"count": 8}}, {"slimflow": {"steps": 1, "student": student}}]
    text = json.dumps({"teacher": "builtin:digits", "stages": stages})
    (folder / "r.yaml").write_text(text)
    if schema:
        jsonschema.Draft202012Validator(json_schema(verbs())).validate(json.loads(text))
    stage = load(folder / "r.yaml", verbs()).stages[1]
    assert isinstance(stage, SlimFlow)
    return stage.student


# --- command lines --------------------------------------------------------------------------------

RECIPE = """\
teacher: ./t.safetensors
stages:
  - pairs: {count: 64, solver: euler, steps: 1, check: 0, dtype: float32}
  - slimflow: {steps: 20, batch_size: 8, checkpoint_every: 5, student: %s}
"""


def test_a_budget_gives_the_student_of_the_recipe(shell: Shell) -> None:
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % "{params: 1k}")
    assert shell("slimflow", "r.yaml", "-q").code == 0
    arguments, shape, _ = SMALL["mlp"]
    best = choose("mlp", arguments, shape, Budget(params=1000), "cpu")
    student = open_model("runs/r/slimflow")
    assert student.card.arguments == dict(best.arguments)
    assert parameters(student.network) == best.parameters <= 1000
    assert artifact.load_json(Path("runs/r/slimflow") / students.CHOSEN)["arguments"] == best.arguments


@pytest.mark.parametrize("budget", ["{params: 10}", "{macs: 10}", "{latency_ms: 1.0e-9}"])
def test_a_budget_that_is_too_small_names_the_smallest_network(shell: Shell, budget: str) -> None:
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % budget)
    assert shell("pairs", "r.yaml", "-q").code == 0
    before = content(Path())
    answer = shell("slimflow", "r.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and len(answer.err.splitlines()) == 1
    arguments, shape, _ = SMALL["mlp"]
    least = candidates("mlp", arguments, shape)[0]
    assert "no 'mlp' keeps to " in answer.err
    assert f"the smallest that was tried has {least.parameters:,} parameters" in answer.err
    assert content(Path()) == before


class Killed(BaseException):
    pass


def test_a_latency_is_measured_once_and_kept(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def clock(network: nn.Module, shape: tuple[int, ...], batch: int, device: str) -> float:
        measured.append(batch)
        return parameters(network) / 1000

    monkeypatch.setattr(sizing, "latency_ms", clock)
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % '{latency_ms: "1 @ batch 3"}')
    assert shell("slimflow", "r.yaml", "-q", "--out", "whole").code == 0
    kept = artifact.load_json(Path("whole/slimflow") / students.CHOSEN)
    assert kept["latency_ms"] <= 1 and set(measured) == {3}
    original, before = SlimFlow.per_sample, len(measured)

    def killed(self: SlimFlow, network: nn.Module, batch: Batch) -> Any:
        if batch.draw.step == 12:
            raise Killed
        return original(self, network, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SlimFlow, "per_sample", killed)
        assert shell("slimflow", "r.yaml", "-q", "--out", "broken").code == 1
    assert len(measured) == 2 * before
    monkeypatch.setattr(sizing, "latency_ms", lambda *_: 1e9)  # the machine is busy now
    assert shell("slimflow", "r.yaml", "-q", "--out", "broken").code == 0
    for name in ("model.safetensors", "checkpoints/last.safetensors", students.CHOSEN):
        assert (Path("broken/slimflow") / name).read_bytes() == (Path("whole/slimflow") / name).read_bytes()
    student = open_model("whole/slimflow")
    assert student.card.arguments == kept["arguments"] and parameters(student.network) <= 1000


def test_two_processes_choose_the_same_network(shell: Shell, tmp_path: Path) -> None:
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % "{latency_ms: 0.5}")
    assert shell("pairs", "r.yaml", "-q", "--out", "out").code == 0
    with gloo(tmp_path / "r.yaml", tmp_path / "out", 2, "slimflow") as ranks:
        answers = [rank.communicate(timeout=180) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], answers
    kept = artifact.load_json(Path("out/slimflow") / students.CHOSEN)
    assert open_model("out/slimflow").card.arguments == kept["arguments"]


@pytest.mark.parametrize("budget", ["{params: 1k}", "{latency_ms: 1}"])
def test_a_plan_lists_what_may_be_chosen_and_writes_nothing(
    shell: Shell, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowdistill.training.loop._TRIAL_S", 0.0)
    monkeypatch.setattr("flowdistill.stages.pairs._TRIAL_S", 0.0)
    monkeypatch.setattr(sizing, "latency_ms", lambda network, *_: parameters(network) / 1000)
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % budget)
    answer = shell("plan", "r.yaml", "--json", "-q")
    assert answer.code == 0 and not Path("runs").exists()
    pairs, planned = (each["cost"] for each in answer.json["stages"])
    assert pairs["candidates"] == []
    arguments, shape, _ = SMALL["mlp"]
    found = planned["candidates"]
    assert [each["parameters"] for each in found] == [
        size.parameters for size in candidates("mlp", arguments, shape)
    ]
    assert found[0].keys() == {"width", "depth", "parameters", "macs", "ms for 1", "chosen"}
    chosen = [each for each in found if each["chosen"]]
    assert [each["parameters"] for each in chosen] == [
        max(e["parameters"] for e in found if e["parameters"] <= 1000)
    ]
    text = shell("plan", "r.yaml", "-q").out
    assert "\nslimflow chooses among\n" in text
    [row] = [line for line in text.splitlines() if line.rstrip().endswith("<")]
    assert f"{chosen[0]['parameters']:,}" in row and str(chosen[0]["width"]) in row
    assert not Path("runs").exists()


def test_a_described_student_has_no_candidates(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowdistill.training.loop._TRIAL_S", 0.0)
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text(RECIPE % "{name: mlp, width: 8}")
    answer = shell("plan", "r.yaml", "--json", "-q")
    assert answer.json["stages"][1]["cost"]["candidates"] == []
    assert "chooses among" not in shell("plan", "r.yaml", "-q").out


@pytest.mark.parametrize(
    ("name", "student", "message"),
    [
        (
            "./t.safetensors",
            "{name: slimflow, size: 15m}",
            "slimflow.student: SlimFlow's networks are for square images, found shape [2]",
        ),
        (
            "builtin:shapes",
            "{name: slimflow, size: 15m}",
            "slimflow.student: SlimFlow's 15m has no classes, the teacher has 8",
        ),
        (
            "{name: analytic:ring}",
            "{params: 1M}",
            "slimflow.student: nothing is known of smaller networks of 'analytic', only of unet, mlp",
        ),
        (
            "{name: analytic:ring}",
            "{name: scaled}",
            "slimflow.student: nothing is known of smaller networks of 'analytic', only of unet, mlp",
        ),
    ],
)
def test_students_that_do_not_fit_the_teacher_are_refused(
    shell: Shell, name: str, student: str, message: str
) -> None:
    teacher("mlp", Path("t.safetensors"))
    Path("r.yaml").write_text((RECIPE % student).replace("./t.safetensors", name).replace("64", "8"))
    answer = shell("slimflow", "r.yaml", "-q")
    assert (answer.code, answer.out) == (2, "") and message in answer.err
    assert len(answer.err.splitlines()) == 1
    assert not list(Path("runs/r").glob("slimflow*"))


def test_a_budget_reads_as_a_person_says_it() -> None:
    budget = Budget(params=15_000_000, macs=4 * 10**9, latency_ms=5, batch=8)
    assert str(budget) == "15,000,000 parameters, 4,000,000,000 multiply-adds, 5 ms for 8 at once"
    assert budget.allows(15_000_000, 4 * 10**9) and not budget.allows(15_000_001, 1)
    assert Scaled().width == 1.0
