"""The loop: exact resume, its random numbers, its averages, and what it refuses."""

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
from flowdistill.stages import Ema, Optimizer
from flowdistill.stages.train import Classification, FlowMatching, Train
from flowdistill.training import CHECKPOINT, LOG, MODEL, Batch, State, averages
from flowdistill.training.batches import nothing_measured
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
