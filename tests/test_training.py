"""The loop: exact resume, its random numbers, what it leaves behind, what is not finite, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from flowdistill import artifact, randomness
from flowdistill.analytic import gaussian, mixture
from flowdistill.data import DIGITS
from flowdistill.errors import Diverged, Interrupted, UsageError
from flowdistill.flow import interpolate, velocity
from flowdistill.sources import DataSource, Draws, shuffled
from flowdistill.stages import Ema, Optimizer, Training
from flowdistill.stages.train import Classification, FlowMatching, Train
from flowdistill.timesteps import BINS
from flowdistill.training import CHECKPOINT, LOG, MODEL, Batch, State, averages, loop
from flowdistill.training.batches import nothing_measured
from flowdistill.training.state import Window
from flowdistill.work import Progress, Stop, Work

CPU = torch.device("cpu")


class Killed(BaseException):
    """Stands for SIGKILL: nothing is saved on its way."""


def train(**changes: Any) -> Train:
    """A stage that trains a tiny network on digits in about a second."""
    small = {
        "data": "digits",
        "network": {"name": "unet", "channels": 8, "multipliers": [1], "attention": [], "dropout": 0.1},
        "steps": 12,
        "batch_size": 8,
        "optimizer": {"name": "adam", "lr": 1e-2, "warmup": 2, "decay": "cosine", "clip": 1.0},
        "log_every": 5,
        "checkpoint_every": 4,
    }
    return Train.model_validate_json(json.dumps({**small, **changes}))


def work(folder: Path, stage: Train, report: Callable[[Progress], None] = lambda _: None) -> Work:
    folder.mkdir(parents=True, exist_ok=True)
    plain = stage.model_dump(mode="json")
    return Work("train", folder, 7, "cpu", {}, {}, plain, report, Stop())


def run(folder: Path, stage: Train, report: Callable[[Progress], None] = lambda _: None) -> dict[str, bytes]:
    done = stage.run(work(folder, stage, report))
    return {name: (folder / name).read_bytes() for name in done.outputs}


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 9, 11])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, kill_at: int) -> None:
    stage = train()
    whole = run(tmp_path / "whole", stage)

    def kill(progress: Progress) -> None:
        if progress.done == kill_at:
            raise Killed

    with pytest.raises(Killed):
        run(tmp_path / "killed", stage, kill)
    assert not (tmp_path / "killed" / MODEL).exists()
    assert run(tmp_path / "killed", stage) == whole
    assert (tmp_path / "killed" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_signal_saves_the_step_it_met(tmp_path: Path) -> None:
    stage = train(checkpoint_every=1000)
    whole = run(tmp_path / "whole", stage)
    flag = Stop()

    def stop(progress: Progress) -> None:
        flag.signum = 15 if progress.done == 7 else 0

    with pytest.raises(Interrupted) as caught:
        stage.run(replace(work(tmp_path / "stopped", stage, stop), stop=flag))
    assert caught.value.exit_code == 143
    assert artifact.read_header(tmp_path / "stopped" / CHECKPOINT)["step"] == 7
    assert run(tmp_path / "stopped", stage) == whole


def test_an_infinite_loss_stops_the_run_and_leaves_the_last_state(tmp_path: Path) -> None:
    stage = train(optimizer={"name": "adam", "lr": 1e30})
    with pytest.raises(Diverged, match=r"at step \d+: loss"):
        run(tmp_path, stage)
    assert not (tmp_path / MODEL).exists()
    if (tmp_path / CHECKPOINT).exists():
        tensors, _ = artifact.load_tensors(tmp_path / CHECKPOINT)
        assert all(value.isfinite().all() for value in tensors.values())


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run(tmp_path, train())
    with pytest.raises(UsageError, match="other settings"):
        run(tmp_path, train(batch_size=16))


def test_stages_of_one_process_have_their_own_precision(tmp_path: Path) -> None:
    exact, rounded = (run(tmp_path / name, train(precision=name)) for name in ("fp32", "bf16"))
    losses = [json.loads(found[LOG].splitlines()[0])["loss"] for found in (exact, rounded)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_the_log_has_a_line_for_each_window_and_the_last_step(tmp_path: Path) -> None:
    run(tmp_path, train())
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 12]
    assert all(line["loss"] > 0 and line["lr"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_the_shipped_weights_are_the_average(tmp_path: Path) -> None:
    run(tmp_path, train(weights="float16"))
    state, _ = artifact.load_tensors(tmp_path / CHECKPOINT)
    shipped, header = artifact.load_tensors(tmp_path / MODEL)
    assert shipped["out.weight"].dtype is torch.float16
    for name, value in shipped.items():
        assert torch.equal(value, state[f"average.{name}"].half())
    assert not torch.equal(state["average.out.weight"], state["network.out.weight"])
    assert header["architecture"] == "unet"
    assert header["classes"] == 10


@pytest.mark.parametrize("accumulate", [2, 8])
def test_a_batch_in_parts_trains_as_a_whole_one(tmp_path: Path, accumulate: int) -> None:
    network = {"name": "unet", "channels": 8, "multipliers": [1], "attention": [], "dropout": 0.0}
    run(tmp_path / "whole", train(network=network))
    run(tmp_path / "parts", train(network=network, accumulate=accumulate))
    logs = [
        [json.loads(line) for line in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for whole, parts in zip(*logs, strict=True):
        by_time = [[loss or 0.0 for loss in line.pop("loss_by_t")] for line in (whole, parts)]
        assert by_time[1] == pytest.approx(by_time[0], rel=1e-4)
        assert parts == pytest.approx(whole, rel=1e-4)
    weights = [load_file(tmp_path / name / MODEL) for name in ("whole", "parts")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=1e-5, rtol=1e-4)


def test_parts_that_do_not_divide_the_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"8 does not divide by 1 processes with accumulate 3"):
        run(tmp_path, train(accumulate=3))


@pytest.mark.parametrize("ramp", [True, False])
def test_the_average_is_the_weighted_sum_that_its_decay_says(ramp: bool) -> None:
    network = nn.Linear(1, 1, bias=False)
    rules = averages.chosen(Ema(decay=0.6, ramp=ramp, also=[0.9]), None, "model.safetensors")
    assert [rule.file for rule in rules] == ["model.safetensors", "model-ema-0.9.safetensors"]
    state = State(network, torch.optim.Adam(network.parameters()), rules)
    expected = [network.weight.item()] * 2
    for step in range(1, 20):
        value = float(step**2)
        nn.init.constant_(network.weight, value)
        state.advance({}, nothing_measured())
        for number, constant in enumerate((0.6, 0.9)):
            decay = min(constant, (1 + step) / (10 + step)) if ramp else constant
            expected[number] = decay * expected[number] + (1 - decay) * value
    found = [float(average["weight"]) for average in state.averages]
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_learning_rate_warms_up_and_decays() -> None:
    warm = Optimizer(lr=1.0, warmup=4)
    assert [warm.lr_at(step, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    linear = Optimizer(lr=1.0, decay="linear", decay_from=0.5)
    assert [linear.lr_at(step, 100) for step in (0, 50)] == [1.0, 1.0]
    assert linear.lr_at(75, 100) == pytest.approx(1 - 0.99 * 0.5)
    cosine = Optimizer(lr=1.0, decay="cosine")
    assert cosine.lr_at(50, 100) == pytest.approx(0.01 + 0.99 * 0.5)
    assert 0.01 <= cosine.lr_at(99, 100) < 0.02


# --- averages, snapshots and pictures -------------------------------------------------------------

PLAIN = {"name": "unet", "channels": 8, "multipliers": [1], "attention": [], "dropout": 0.0}
LEFT = {
    "ema": {"decay": 0.8, "also": [0.5, 0.9]},
    "post_hoc": {"every": 5, "stds": [0.05, 0.1]},
    "previews": {"every": 5, "count": 3, "nfe": [1, 2]},
    "objective": {"name": "flow-matching", "timesteps": {"name": "fitted"}},
}


def dies(after: int) -> Callable[[Progress], None]:
    """A report that kills the run at its call number `after`."""
    calls = iter(range(1, after))

    def report(_: Progress) -> None:
        if next(calls, None) is None:
            raise Killed

    return report


@pytest.mark.parametrize("kill_at", [3, 5, 6, 10, 12])
def test_all_that_a_killed_run_leaves_has_the_same_bytes(tmp_path: Path, kill_at: int) -> None:
    stage = train(**LEFT)
    whole = run(tmp_path / "whole", stage)
    steps = ("00000005", "00000010", "00000012")
    assert sorted(whole) == sorted(
        [
            LOG,
            MODEL,
            "model-ema-0.5.safetensors",
            "model-ema-0.9.safetensors",
            *(f"previews/{step}.png" for step in steps),
            *(f"snapshots/{step}-{std}.safetensors" for step in steps for std in ("0.05", "0.1")),
        ]
    )
    with pytest.raises(Killed):
        run(tmp_path / "killed", stage, dies(kill_at))
    assert run(tmp_path / "killed", stage) == whole
    assert (tmp_path / "killed" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


def test_a_run_that_is_killed_when_all_is_learnt_has_the_figures_of_its_last_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = train()
    whole = stage.run(work(tmp_path / "whole", stage)).figures

    def kill(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Trainer, "_finish", kill)
        run(tmp_path / "killed", stage)
    figures = stage.run(work(tmp_path / "killed", stage)).figures
    assert whole.keys() == figures.keys() > {"loss", "grad_norm"}
    assert (figures["loss"], figures["grad_norm"]) == (whole["loss"], whole["grad_norm"])


def test_every_average_is_shipped_in_a_file_of_its_own(tmp_path: Path) -> None:
    run(tmp_path, train(**LEFT, weights="float16"))
    state, _ = artifact.load_tensors(tmp_path / CHECKPOINT)
    files = (MODEL, "model-ema-0.5.safetensors", "model-ema-0.9.safetensors")
    files += tuple(f"snapshots/00000012-{std}.safetensors" for std in ("0.05", "0.1"))
    for number, file in enumerate(files):
        for name, value in load_file(tmp_path / file).items():
            assert torch.equal(value, state[f"average{number or ''}.{name}"].half())
    headers = [artifact.read_header(tmp_path / file) for file in files[:3]]
    assert headers[0] == headers[1] == headers[2]


def test_pictures_do_not_touch_the_training_and_are_drawn_alike(tmp_path: Path) -> None:
    previews = {"every": 4, "count": 5}
    drawn = [run(tmp_path / name, train(previews=previews)) for name in ("one", "two")]
    assert drawn[0] == drawn[1]
    pictures = [drawn[0].pop(f"previews/{step:08d}.png") for step in (4, 8, 12)]
    assert all(each.startswith(b"\x89PNG") for each in pictures) and len(set(pictures)) == 3
    plain = run(tmp_path / "plain", train())
    assert plain[LOG] == drawn[0][LOG]
    for name, value in load_file(tmp_path / "plain" / MODEL).items():
        assert torch.equal(load_file(tmp_path / "one" / MODEL)[name], value)


# --- what is measured -----------------------------------------------------------------------------


def test_the_loss_by_t_is_the_loss_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean, weighted by how often each stretch was seen, is the loss of the window."""
    seen: list[Tensor] = []
    original = FlowMatching.per_sample

    def spy(self: FlowMatching, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, terms = original(self, network, batch)
        seen.append(terms["t"])
        return loss, terms

    monkeypatch.setattr(FlowMatching, "per_sample", spy)
    run(tmp_path, train(accumulate=2))
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert len(seen) == 24 and "t" not in lines[0]
    for line, first, end in zip(lines, (0, 10, 20), (10, 20, 24), strict=True):
        numbers = torch.histc(torch.cat(seen[first:end]), BINS, 0, 1)
        assert [loss is None for loss in line["loss_by_t"]] == (numbers == 0).tolist()
        sums = torch.tensor([loss or 0.0 for loss in line["loss_by_t"]]) * numbers
        assert float(sums.sum() / numbers.sum()) == pytest.approx(line["loss"], rel=1e-5)


def test_a_window_takes_means_and_begins_anew() -> None:
    window = Window()
    by_time = nothing_measured()
    by_time[:, 3], by_time[:, 7] = torch.tensor([6.0, 2.0]), torch.tensor([1.0, 4.0])
    window.add({"loss": 1.0, "grad_norm": 3.0}, by_time)
    window.add({"loss": 2.0, "grad_norm": 5.0}, by_time)
    means, stretches = Window(**window.as_dict()).take()
    assert means == {"loss": 1.5, "grad_norm": 4.0}
    assert {place: loss for place, loss in enumerate(stretches) if loss is not None} == {3: 3.0, 7: 0.25}
    window.take()
    assert window.take() == ({}, [])


def test_a_classifier_has_no_loss_by_t(tmp_path: Path) -> None:
    network = {"name": "classifier", "channels": [4]}
    run(tmp_path, train(network=network, objective={"name": "classification"}))
    assert all("loss_by_t" not in json.loads(line) for line in (tmp_path / LOG).read_text().splitlines())


# --- what is not finite ---------------------------------------------------------------------------


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], bool]], list[int]]:
    """Makes the loss of chosen draws NaN; the list is of all draws that were made."""

    def planted(bad: Callable[[int], bool]) -> list[int]:
        draws: list[int] = []

        def per_sample(self: Train, network: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            draws.append(batch.draw.step)
            loss, terms = self.objective.per_sample(network, batch)
            return loss * (float("nan") if bad(batch.draw.step) else 1.0), terms

        monkeypatch.setattr(Train, "per_sample", per_sample)
        return draws

    return planted


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / LOG).read_text().splitlines()]


def test_a_skipped_step_counts_and_changes_nothing(tmp_path: Path, plant: Any) -> None:
    plant({3, 6}.__contains__)
    stage = train(non_finite={"policy": "skip"}, checkpoint_every=1)
    states: dict[int, dict[str, Tensor]] = {}

    def keep(progress: Progress) -> None:
        if progress.done > 1:  # the state is saved after the report
            states[progress.done - 1], header = artifact.load_tensors(tmp_path / CHECKPOINT)
            assert (header["step"], header["skipped"]) == (progress.done - 1, 0)

    done = stage.run(work(tmp_path, stage, keep))
    assert done.figures["not_finite"] == 2
    for before in range(1, 11):
        same = all(torch.equal(value, states[before + 1][name]) for name, value in states[before].items())
        assert same == (before in (3, 6))
    assert steps_logged(tmp_path) == [5, 10, 12]
    assert all("NaN" not in line for line in (tmp_path / LOG).read_text().splitlines())


@pytest.mark.parametrize("policy", ["abort", "skip", "roll-back"])
def test_enough_is_enough(tmp_path: Path, plant: Any, policy: str) -> None:
    draws = plant(lambda draw: draw >= 6)
    stage = train(non_finite={"policy": policy, "limit": 3})
    times = "" if policy == "abort" else r" \(4 times by now\)"
    step = 9 if policy == "skip" else 6 if policy == "abort" else 4
    with pytest.raises(Diverged, match=rf"diverged at step {step}{times}: loss nan, gradient norm nan"):
        run(tmp_path, stage)
    assert draws == list(range(7 if policy == "abort" else 10))
    tensors, header = artifact.load_tensors(tmp_path / CHECKPOINT)
    assert header["step"] == (8 if policy == "skip" else 4) and not (tmp_path / MODEL).exists()
    assert all(value.isfinite().all() for value in tensors.values())


def test_a_training_rolls_back_and_goes_on_with_other_samples(tmp_path: Path, plant: Any) -> None:
    draws = plant({6}.__contains__)
    stage = train(non_finite={"policy": "roll-back"}, log_every=1)
    done = stage.run(work(tmp_path / "rolled", stage))
    assert draws == [0, 1, 2, 3, 4, 5, 6, *range(7, 15)]
    assert steps_logged(tmp_path / "rolled") == list(range(1, 13))
    assert done.figures["not_finite"] == 1
    # The same by hand: the state of step 4, told that three batches are to be left out.
    with pytest.raises(Killed):
        run(tmp_path / "by hand", stage, dies(5))
    path = tmp_path / "by hand" / CHECKPOINT
    tensors, header = artifact.load_tensors(path)
    artifact.save_tensors(path, tensors, {**header, "skipped": 3, "setbacks": 1})
    expected = run(tmp_path / "by hand", stage)
    assert {name: (tmp_path / "rolled" / name).read_bytes() for name in expected} == expected


@pytest.mark.parametrize("bad", [(0,), (2, 3), (6, 7), (6, 9, 14), (11,)], ids=str)
def test_a_run_that_is_killed_while_it_rolls_back_ends_in_the_same_bytes(
    tmp_path: Path, plant: Any, monkeypatch: pytest.MonkeyPatch, bad: tuple[int, ...]
) -> None:
    plant(bad.__contains__)
    stage = train(non_finite={"policy": "roll-back"}, log_every=1, checkpoint_every=4)
    whole = run(tmp_path / "whole", stage)
    assert steps_logged(tmp_path / "whole") == list(range(1, 13))
    saves, original = iter(range(100)), State.save

    def save(self: State, *arguments: Any, **named: Any) -> None:
        if next(saves) % 2:  # killed before every second save, and directly after it
            raise Killed
        original(self, *arguments, **named)
        raise Killed

    monkeypatch.setattr(State, "save", save)
    for _ in range(40):
        try:
            found = run(tmp_path / "killed", stage)
            break
        except Killed:
            continue
    assert found == whole
    assert (tmp_path / "killed" / CHECKPOINT).read_bytes() == (tmp_path / "whole" / CHECKPOINT).read_bytes()


@pytest.mark.parametrize("policy", ["abort", "skip", "roll-back"])
@pytest.mark.parametrize("every", [1, 5])
def test_weights_that_an_update_makes_infinite_are_never_written(
    tmp_path: Path, policy: str, every: int
) -> None:
    changes = {
        "optimizer": {"lr": 1e39},
        "non_finite": {"policy": policy, "limit": 3},
        "post_hoc": {"every": 1},
        "previews": {"every": 1},
        "checkpoint_every": every,
    }
    with pytest.raises(Diverged, match="not finite, nothing was written"):
        run(tmp_path, train(**changes))
    assert not (tmp_path / MODEL).exists()
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in artifact.load_tensors(path)[0].values())


# --- precision, order, compilation ----------------------------------------------------------------


def test_half_precision_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="train.precision: fp16 is for GPUs"):
        run(tmp_path, train(precision="fp16"))


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 with its loss scaler on a CPU, which accelerate has on GPUs only."""
    original = loop._accelerator

    def accelerator(stage: Training, work: Work) -> Any:
        made = original(stage.model_copy(update={"precision": "fp32"}), work)
        made.state._mixed_precision = "fp16"
        made.native_amp = True
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)
        return made

    monkeypatch.setattr(loop, "_accelerator", accelerator)


@pytest.mark.usefixtures("scaled")
def test_a_step_whose_scaled_gradient_overflows_counts_and_changes_nothing(tmp_path: Path) -> None:
    stage = train(precision="fp16", log_every=1, checkpoint_every=1, steps=30)
    scales: list[float] = []

    def keep(progress: Progress) -> None:
        if progress.done > 1:
            scales.append(artifact.read_header(tmp_path / CHECKPOINT)["scaler"]["scale"])

    stage.run(work(tmp_path, stage, keep))
    assert scales[0] == 2.0**29 and min(scales) < 2.0**20 and scales != sorted(scales, reverse=True)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert "loss" not in lines[0] and "loss" in lines[-1]


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("kill_at", [3, 5, 9, 20])
def test_the_scaler_is_part_of_the_state(tmp_path: Path, kill_at: int) -> None:
    stage = train(precision="fp16", steps=24)
    whole = run(tmp_path / "whole", stage)
    with pytest.raises(Killed):
        run(tmp_path / "killed", stage, dies(kill_at))
    assert run(tmp_path / "killed", stage) == whole


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("policy", ["skip", "roll-back"])
def test_a_scaled_loss_that_is_not_finite_is_dealt_with_as_any_other(
    tmp_path: Path, plant: Any, policy: str
) -> None:
    plant({15, 16}.__contains__)
    stage = train(precision="fp16", steps=24, non_finite={"policy": policy})
    done = stage.run(work(tmp_path, stage))
    assert done.figures["not_finite"] == 2


def test_channels_last_is_the_same_training_and_resumes_exactly(tmp_path: Path) -> None:
    plain, last = train(network=PLAIN), train(network=PLAIN, channels_last=True)
    run(tmp_path / "plain", plain)
    whole = run(tmp_path / "last", last)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / LOG).read_text().splitlines()]
        for name in ("plain", "last")
    ]
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    for name, value in load_file(tmp_path / "plain" / MODEL).items():
        torch.testing.assert_close(load_file(tmp_path / "last" / MODEL)[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(Killed):
        run(tmp_path / "killed", last, dies(6))
    assert run(tmp_path / "killed", last) == whole


def test_a_compiled_network_trains_as_a_plain_one_under_its_own_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    original = nn.Module.compile

    def eager(self: nn.Module) -> None:
        compiled.append(type(self).__name__)
        original(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", eager)
    run(tmp_path / "plain", train(**LEFT))
    assert not compiled
    run(tmp_path / "compiled", train(**LEFT, compile=True))
    assert compiled == ["UNet"]
    for file in (MODEL, "model-ema-0.5.safetensors", "snapshots/00000010-0.1.safetensors", CHECKPOINT):
        found, expected = (load_file(tmp_path / name / file) for name in ("compiled", "plain"))
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


# --- data position and random numbers -------------------------------------------------------------


def draws(step: int, total: int, part: slice, seed: int = 3) -> Draws:
    return Draws(seed, step, part, total, CPU)


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 3))
@settings(deadline=None, max_examples=60)
def test_every_epoch_sees_every_sample_once(count: int, total: int, epoch: int) -> None:
    steps = range((epoch + 1) * count // total + 2)
    seen = torch.cat(
        [shuffled(3, "order", draws(step, total, slice(0, total)).numbers, count) for step in steps]
    )
    one_epoch = seen[epoch * count : (epoch + 1) * count]
    assert sorted(one_epoch.tolist()) == list(range(count))


@given(st.integers(0, 50), st.sampled_from([1, 2, 4]), st.sampled_from([None, 10, 64]))
@settings(deadline=None, max_examples=40)
def test_parts_of_a_batch_do_not_depend_on_the_number_of_processes(
    step: int, world: int, count: int | None
) -> None:
    total, size = 8, 8 // world
    parts = [draws(step, total, slice(rank * size, (rank + 1) * size)) for rank in range(world)]
    whole = draws(step, total, slice(0, total))
    assert torch.equal(torch.cat([part.numbers for part in parts]), whole.numbers)
    if count is not None:
        seen = [shuffled(3, "order", part.numbers, count) for part in parts]
        assert torch.equal(torch.cat(seen), shuffled(3, "order", whole.numbers, count))
    assert torch.equal(torch.cat([part.uniform("t") for part in parts]), whole.uniform("t"))
    assert torch.equal(torch.cat([part.normal("n", (2,)) for part in parts]), whole.normal("n", (2,)))


def test_steps_and_purposes_draw_different_numbers() -> None:
    part = slice(0, 4)
    noise = [draws(step, 4, part).normal("noise", (3,)) for step in (0, 1)]
    assert not torch.equal(*noise)
    assert not torch.equal(draws(0, 4, part).normal("other", (3,)), noise[0])
    x0, eps, labels = DataSource(DIGITS).batch(draws(0, 4, part))
    assert x0.shape == eps.shape == (4, 1, 8, 8)
    assert labels is not None and labels.shape == (4,)


# --- objectives of `train` ------------------------------------------------------------------------


class Shifted(nn.Module):
    """The exact velocity plus parameters that are zero: at the optimum their gradient is noise."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow
        self.offset = nn.Parameter(torch.zeros(2))
        self.slope = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        v: Tensor = self.flow(x, t, None)
        return v + self.offset + self.slope * x


def batch(flow: Any, count: int, step: int) -> Batch:
    x0, _ = flow.data(range(step * count, (step + 1) * count), seed=1)
    eps = randomness.noise(2, range(step * count, (step + 1) * count), flow.shape)
    return Batch(x0, eps, None, 0, draws(step, count, slice(0, count)), 0.0)


@pytest.mark.parametrize("timesteps", [{"name": "uniform"}, {"name": "logit-normal"}])
def test_the_exact_velocity_is_stationary_for_flow_matching(timesteps: dict[str, Any]) -> None:
    objective = FlowMatching.model_validate({"timesteps": timesteps})
    network = Shifted(mixture((2,)))
    gradients = []
    for step in range(40):
        network.zero_grad()
        loss, _ = objective.per_sample(network, batch(network.flow, 500, step))
        loss.mean().backward()
        gradients.append(torch.cat([network.offset.grad, network.slope.grad]))  # type: ignore[list-item]
    stacked = torch.stack(gradients)
    error = stacked.std(0) / len(stacked) ** 0.5
    assert (stacked.mean(0).abs() < 5 * error).all()


def test_wcfm_weighs_short_pairs_and_keeps_the_mean_weight() -> None:
    flow = gaussian((2,))
    drawn = batch(flow, 400, 0)
    plain, _ = FlowMatching().per_sample(flow, drawn)
    weighted, terms = FlowMatching(wcfm_kappa=0.5).per_sample(flow, drawn)
    weight = weighted / plain
    assert torch.equal(terms["unweighted"], plain)
    assert float(weight.mean()) == pytest.approx(1.0, rel=1e-4)
    length = velocity(drawn.x0, drawn.eps).norm(dim=1)
    order = length.argsort()
    assert (weight[order].diff() <= 1e-6).all()


def test_labels_are_withheld_at_the_rate_that_was_asked() -> None:
    labels = torch.zeros(4000, dtype=torch.int64)
    x = torch.zeros(4000, 2)
    drawn = Batch(x, x, labels, 9, draws(0, 4000, slice(0, 4000)), 0.0)
    found = drawn.some_labels(0.25)
    assert found is not None
    assert set(found.tolist()) == {0, 9}
    assert float((found == 9).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert drawn.some_labels(0.0) is labels


def test_classification_is_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    x, labels = torch.zeros(2, 1), torch.tensor([0, 0])
    drawn = Batch(x, x, labels, 2, draws(0, 2, slice(0, 2)), 0.0)
    loss, terms = Classification().per_sample(lambda x: logits, drawn)  # type: ignore[arg-type]
    expected = torch.tensor([1 / (1 + 2.718281828**-2.0), 1 / (1 + 2.718281828)]).log().neg()
    assert torch.allclose(loss, expected, atol=1e-5)
    assert terms["accuracy"].tolist() == [1.0, 0.0]


def test_a_classifier_carries_the_moments_of_its_data(tmp_path: Path) -> None:
    stage = train(
        network={"name": "classifier", "channels": [8, 8]},
        objective={"name": "classification"},
        held_out=True,
        steps=60,
        batch_size=64,
    )
    done = stage.run(work(tmp_path, stage))
    assert done.figures["reference_count"] == 1797
    assert done.figures["held_out_accuracy"] > 0.5
    tensors, header = artifact.load_tensors(tmp_path / MODEL)
    assert header["kind"] == "classifier"
    assert header["figures"]["held_out_accuracy"] == done.figures["held_out_accuracy"]
    covariance = tensors["reference_covariance"]
    assert torch.allclose(covariance, covariance.T)
    assert torch.linalg.eigvalsh(covariance.double()).min() > -1e-6


def test_interpolation_meets_the_exact_mean(tmp_path: Path) -> None:
    """E[x_t] of a Gaussian flow is (1 - t) mu: the batch really is what the objective says."""
    flow = gaussian((2,))
    drawn = batch(flow, 20000, 0)
    t = torch.full((20000,), 0.3)
    mean = interpolate(drawn.x0, drawn.eps, t).mean(0)
    assert torch.allclose(mean, 0.7 * flow.means[0].float(), atol=0.03)
