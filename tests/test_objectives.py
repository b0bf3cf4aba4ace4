"""Losses against sums by hand, against rf++, and against the quantity that they are said to compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flowdistill.errors import MissingInput
from flowdistill.flow import eps_from_velocity, x0_from_velocity
from flowdistill.objectives import (
    L2,
    Loss,
    Lpips,
    LpipsHuber,
    Perceptual,
    PseudoHuber,
    SquaredL2,
    of_some,
    wcfm_weight,
)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(("net", "least"), [("vgg", 16), ("alex", 32), ("squeeze", 24)])
def test_lpips_takes_images_from_its_least_size_on(net: Any, least: int) -> None:
    assert Lpips(net=net, resolution=least).resolution == least
    with pytest.raises(ValidationError, match=f"{net} needs {least} pixels or more, found {least - 1}"):
        Lpips(net=net, resolution=least - 1)


def test_every_sample_has_its_perceptual_term_unless_a_share_is_asked_for() -> None:
    assert LpipsHuber().share == Perceptual(share=1.0).share == 1


def test_defaults_are_the_papers() -> None:
    assert PseudoHuber().c is None
    assert LpipsHuber().divide_by_t is False
    assert Lpips() == Lpips(net="vgg", pooling="average", resolution=224, precision="fp32", weights=None)


@pytest.mark.parametrize(
    "recipe, expected",
    [
        ({"name": "squared-l2"}, SquaredL2()),
        ({"name": "pseudo-huber", "c": 0.1}, PseudoHuber(c=0.1)),
        ({"name": "l2"}, L2()),
        ({"name": "squared-l2", "on": "x0"}, SquaredL2(on="x0")),
        ({"name": "pseudo-huber", "on": "eps", "c": 1}, PseudoHuber(on="eps", c=1.0)),
        ({"name": "perceptual", "divide_by_t": True}, Perceptual(divide_by_t=True)),
        ({"name": "perceptual"}, Perceptual()),
        ({"name": "perceptual", "distance": {"name": "lpips"}}, Perceptual(distance=Lpips())),
        ({"name": "perceptual", "distance": {}, "share": 0.5}, Perceptual(distance=Lpips(), share=0.5)),
        (
            {"name": "lpips-huber", "distance": {"name": "lpips", "net": "alex", "resolution": "native"}},
            LpipsHuber(distance=Lpips(net="alex", resolution="native")),
        ),
        ({"name": "lpips-huber", "divide_by_t": True}, LpipsHuber(divide_by_t=True)),
    ],
)
def test_recipes_of_losses(recipe: dict[str, Any], expected: object) -> None:
    assert TypeAdapter(Loss).validate_python(recipe) == expected


@pytest.mark.parametrize(
    "recipe",
    [
        {"name": "l3"},
        {"name": "l2", "on": "score"},
        {"name": "lpips-huber", "on": "x0"},
        {"name": "squared-l2", "divide_by_t": True},
        {"name": "pseudo-huber", "c": 0.0},
        {},
        {"name": "squared-l2", "distance": {"name": "lpips"}},
        {"name": "perceptual", "share": 0.0},
        {"name": "perceptual", "share": 1.1},
        {"name": "perceptual", "distance": {"name": "dists"}},
        {"name": "perceptual", "distance": {"net": "vgg19"}},
        {"name": "perceptual", "distance": {"resolution": "large"}},
        {"name": "perceptual", "distance": {"net": "vgg", "resolution": 15}},
        {"name": "perceptual", "distance": {"net": "squeeze", "resolution": 23}},
        {"name": "perceptual", "distance": {"net": "alex", "resolution": 31}},
        {"name": "perceptual", "distance": {"resolution": True}},
    ],
)
def test_wrong_recipes_of_losses_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(recipe)


# Losses


def absolute(x_hat: Tensor, x: Tensor) -> Tensor:
    """A stand-in for a perceptual distance that tells its arguments apart."""
    return ((x_hat - x).abs() * (2 + x)).flatten(1).sum(1)


def batch(*shape: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    v_hat, v, x_t = torch.randn(3, *shape, generator=drawn, dtype=torch.float64)
    t = torch.rand(shape[0], generator=drawn, dtype=torch.float64)
    return {"v_hat": v_hat, "v": v, "x_t": x_t, "t": t}


def huber_by_hand(parts: dict[str, Tensor], c: float | None = None) -> Tensor:
    rows = []
    for v_hat, v in zip(parts["v_hat"], parts["v"], strict=True):
        d = v.numel()
        knee = 0.00054 * d if c is None else c
        norm2 = sum(float(a - b) ** 2 for a, b in zip(v_hat.flatten(), v.flatten(), strict=True))
        rows.append((math.sqrt(norm2 + knee**2) - knee) / d)
    return torch.tensor(rows, dtype=torch.float64)


def distance_by_hand(parts: dict[str, Tensor]) -> Tensor:
    t = parts["t"].reshape(-1, 1, 1, 1)
    return absolute(parts["x_t"] - t * parts["v_hat"], parts["x_t"] - t * parts["v"])


def test_squared_l2_is_the_mean_square() -> None:
    parts = batch(5, 3, 4, 4)
    loss, terms = SquaredL2()(**parts, perceptual=None)
    expected = [
        np.mean((a - b) ** 2) for a, b in zip(parts["v_hat"].numpy(), parts["v"].numpy(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected))
    assert terms == {}


def test_l2_is_the_root_of_the_mean_square() -> None:
    parts = batch(5, 3, 4, 4)
    loss, terms = L2()(**parts, perceptual=None)
    torch.testing.assert_close(loss, SquaredL2()(**parts, perceptual=None)[0].sqrt())
    assert terms == {}


@pytest.mark.parametrize(("on", "read"), [("x0", x0_from_velocity), ("eps", eps_from_velocity)])
@pytest.mark.parametrize("kind", [SquaredL2, L2, PseudoHuber])
def test_what_is_compared_is_what_both_velocities_point_at(kind: Any, on: Any, read: Any) -> None:
    parts = batch(5, 3, 4, 4)
    found, terms = kind(on=on)(**parts, perceptual=None)
    guessed, true = (read(parts["x_t"], parts[name], parts["t"]) for name in ("v_hat", "v"))
    expected, _ = kind()(guessed, true, parts["x_t"], parts["t"], None)
    torch.testing.assert_close(found, expected)
    assert terms == {} and kind(on="velocity") == kind()


@pytest.mark.parametrize(("on", "power"), [("x0", 0.2), ("eps", 0.8)])
def test_to_compare_another_quantity_is_to_weigh_times_otherwise(on: Any, power: float) -> None:
    parts = batch(2, 3, 4, 4) | {"t": torch.full((2,), 0.2, dtype=torch.float64)}
    squared, plain = SquaredL2(on=on)(**parts, perceptual=None)[0], SquaredL2()(**parts, perceptual=None)[0]
    torch.testing.assert_close(squared, power**2 * plain)


def enlarged_mse(x_hat: Tensor, x: Tensor) -> Tensor:
    """What stood in for LPIPS when the original code made the fixture."""
    x_hat, x = (
        torch.nn.functional.interpolate(each, size=(224, 224), mode="bilinear") * 0.5 + 0.5
        for each in (x_hat, x)
    )
    return (x_hat - x).square().flatten(1).mean(1)


@pytest.mark.parametrize(
    "key, loss",
    [
        ("l2", L2()),
        ("l2_squared", SquaredL2()),
        ("huber", PseudoHuber()),
        ("stub_mse224", Perceptual()),
        ("lpips_only_divt", Perceptual(divide_by_t=True)),
        ("E_lpips_huber", LpipsHuber()),
        ("F_lpips_huber_divt", LpipsHuber(divide_by_t=True)),
    ],
)
def test_losses_are_those_of_rf_plus_plus(key: str, loss: Any) -> None:
    case = json.loads((FIXTURES / "rfpp_losses.json").read_text())

    def normal(seed: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(seed).standard_normal((4, 3, 32, 32)).astype("float32"))

    x, z = normal(1).tanh(), normal(2)
    error = 0.05 * torch.tensor([0.1, 1, 5, 20]).reshape(4, 1, 1, 1) * normal(3)
    t = torch.tensor(case["t"])
    at = t.reshape(4, 1, 1, 1)
    found, _ = loss(z - x + error, z - x, (1 - at) * x + at * z, t, enlarged_mse)
    assert found.dtype == torch.float32
    # The first sample's images differ by 1e-8, which float32 can hardly hold.
    np.testing.assert_allclose(found.numpy(), case[key], rtol=2e-5, atol=1e-11)


@pytest.mark.parametrize("c", [None, 0.5])
def test_pseudo_huber_by_hand(c: float | None) -> None:
    parts = batch(5, 3, 4, 4)
    loss, terms = PseudoHuber(c=c)(**parts, perceptual=None)
    torch.testing.assert_close(loss, huber_by_hand(parts, c))
    assert terms == {}


def test_pseudo_huber_is_linear_far_away_and_quadratic_near() -> None:
    v = torch.zeros(1, 1000, dtype=torch.float64)
    assert PseudoHuber()(v + 1e4, v, v, v[:, 0], None)[0].item() == pytest.approx(
        1e4 * math.sqrt(1000) / 1000, rel=1e-5
    )
    near = v.float() + 1e-8  # 1e-13 beside c^2 = 0.29: the plain formula gives 0 in float32
    assert PseudoHuber()(near, v.float(), near, near[:, 0], None)[0].item() == pytest.approx(
        1e-16 * 1000 / (2 * 0.54) / 1000, rel=1e-5
    )


def test_perceptual_compares_the_images_that_the_velocities_point_at() -> None:
    parts = batch(5, 3, 4, 4)
    loss, terms = Perceptual()(**parts, perceptual=absolute)
    torch.testing.assert_close(loss, distance_by_hand(parts))
    assert set(terms) == {"perceptual"}


@pytest.mark.parametrize("divide_by_t", [False, True])
def test_lpips_huber_is_config_e_or_f(divide_by_t: bool) -> None:
    parts = batch(5, 3, 4, 4)
    loss, terms = LpipsHuber(divide_by_t=divide_by_t)(**parts, perceptual=absolute)
    huber, distance, t = huber_by_hand(parts), distance_by_hand(parts), parts["t"]
    expected = (1 - t) * huber + (distance / t if divide_by_t else distance)
    torch.testing.assert_close(loss, expected)
    assert set(terms) == {"huber", "perceptual"}
    torch.testing.assert_close(terms["huber"], huber)
    torch.testing.assert_close(terms["perceptual"], distance)


def squares(x_hat: Tensor, x: Tensor) -> Tensor:
    return (x_hat - x).square().flatten(1).sum(1)


LOSSES = [
    SquaredL2(),
    L2(),
    PseudoHuber(),
    SquaredL2(on="x0"),
    L2(on="eps"),
    PseudoHuber(on="x0"),
    Perceptual(),
    Perceptual(divide_by_t=True),
    LpipsHuber(),
    LpipsHuber(divide_by_t=True),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_pull_the_velocity_towards_the_target(loss: Any) -> None:
    parts = batch(4, 2, 3, 3)
    v_hat = parts["v_hat"].requires_grad_()
    per_sample = loss(**parts, perceptual=squares)[0]
    assert per_sample.shape == (4,) and bool((per_sample > 0).all())
    (gradient,) = torch.autograd.grad(per_sample.sum(), v_hat)
    # Every one of them is a function of |v_hat - v| here, so the gradient is along the error.
    error = v_hat.detach() - parts["v"]
    cosine = torch.cosine_similarity(gradient.flatten(1), error.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses_are_zero_with_zero_gradient_at_the_target(loss: Any) -> None:
    parts = batch(4, 2, 3, 3)
    parts["v_hat"] = parts["v"].clone().requires_grad_()
    per_sample = loss(**parts, perceptual=squares)[0]
    (gradient,) = torch.autograd.grad(per_sample.sum(), parts["v_hat"])
    assert torch.equal(per_sample, torch.zeros_like(per_sample))
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("loss", [Perceptual(), LpipsHuber()])
def test_a_perceptual_loss_without_a_distance_is_refused(loss: Any) -> None:
    with pytest.raises(MissingInput, match="perceptual distance"):
        loss(**batch(2, 1, 2, 2), perceptual=None)


def test_losses_say_whether_they_need_a_distance() -> None:
    assert [loss.needs_perceptual for loss in LOSSES] == [False] * 6 + [True] * 4


@pytest.mark.parametrize("loss", [Perceptual(), LpipsHuber(divide_by_t=True)], ids=repr)
def test_the_term_of_a_share_has_the_mean_and_gradient_of_all(loss: Any) -> None:
    parts = batch(4, 2, 3, 3)
    v_hat = parts["v_hat"].requires_grad_()
    whole = loss(**parts, perceptual=squares)[0].mean()
    # Every sample is chosen in 1 of 4 choices.
    some = [loss(**parts, perceptual=of_some(squares, row, 4.0))[0].mean() for row in torch.eye(4).bool()]
    torch.testing.assert_close(torch.stack(some).mean(), whole)
    (expected,) = torch.autograd.grad(whole, v_hat)
    (found,) = torch.autograd.grad(torch.stack(some).mean(), v_hat)
    torch.testing.assert_close(found, expected)


def test_the_distance_of_those_not_chosen_is_not_computed() -> None:
    x_hat, x = torch.zeros(4, 1, 2, 2, requires_grad=True), torch.ones(4, 1, 2, 2)
    seen: list[int] = []

    def counted(x_hat: Tensor, x: Tensor) -> Tensor:
        seen.append(len(x))
        return squares(x_hat, x)

    some = of_some(counted, torch.tensor([True, False, False, True]), 2.0)(x_hat, x)
    assert some.tolist() == [8.0, 0.0, 0.0, 8.0]
    none = of_some(counted, torch.zeros(4, dtype=torch.bool), 2.0)(x_hat, x)
    none.sum().backward()
    assert none.tolist() == [0.0] * 4 and x_hat.grad is not None and not x_hat.grad.any()
    assert seen == [2]


# Weights


def test_wcfm_weights_by_hand() -> None:
    x0 = torch.full((3, 1, 2, 2), 0.3, dtype=torch.float64)
    eps = x0 + torch.tensor([1.0, 2.0, -4.0]).double().reshape(3, 1, 1, 1)
    raw = torch.tensor([math.exp(-2 * length / (0.5 * 2)) for length in (1, 2, 4)]).double()
    torch.testing.assert_close(wcfm_weight(x0, eps, kappa=0.5), raw / raw.mean())


def test_wcfm_weights_have_mean_1_and_survive_underflow() -> None:
    parts = batch(64, 3, 4, 4)
    for kappa in (1e-6, 0.1, 1.0, 1e9):
        weight = wcfm_weight(parts["v"].float(), parts["x_t"].float(), kappa)
        assert weight.shape == (64,)
        assert float(weight.mean()) == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(weight, torch.ones(64))
    same = torch.ones(5, 2)
    torch.testing.assert_close(wcfm_weight(same, 3 * same, 0.3), torch.ones(5))
