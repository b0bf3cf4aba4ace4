"""Guidance against its formulas; against the pipelines that it comes from in test_diffusers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from flowdistill.guidance import Clip, Deviation, Guidance, Row, Token, first_steps


def pair(seed: int = 0, shape: tuple[int, ...] = (4, 4, 6)) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(3, *shape, generator=source), torch.randn(3, *shape, generator=source)


T = torch.tensor([0.1, 0.5, 0.9])


@settings(deadline=None)
@given(st.floats(0, 10), st.floats(-3, 3), st.floats(0.1, 3))
def test_guidance_commutes_with_every_affine_conversion(scale: float, a: float, b: float) -> None:
    """v = a z + b p for the prediction p of any network: it matters not where p is guided."""
    guidance, (p, null), (z, _) = Guidance(scale=scale), pair(), pair(1)
    before = a * z + b * guidance.combine(p, null, T)
    after = guidance.combine(a * z + b * p, a * z + b * null, T)
    torch.testing.assert_close(before, after, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rescale", [Token(), Row(), Clip(factor=0.8), Deviation()])
def test_rescaled_guidance_is_the_same_for_either_sign(rescale: Token | Row | Clip | Deviation) -> None:
    guidance, (v, null) = Guidance(scale=4.0, rescale=rescale), pair()
    torch.testing.assert_close(-guidance.combine(-v, -null, T), guidance.combine(v, null, T))


def test_scale_one_and_times_outside_leave_the_condition_alone() -> None:
    v, null = pair()
    assert not Guidance().needs_null and Guidance(scale=0.0).needs_null
    torch.testing.assert_close(Guidance().combine(v, null, T), v)
    torch.testing.assert_close(Guidance(scale=0.0).combine(v, null, T), null)
    inside = Guidance(scale=3.0, interval=(0.4, 0.9)).combine(v, null, T)
    assert torch.equal(inside[0], v[0])
    torch.testing.assert_close(inside[1:], (3 * v - 2 * null)[1:])


def test_only_some_channels_are_guided() -> None:
    v, null = pair()
    found = Guidance(scale=1.5, channels=3).combine(v, null, T)
    torch.testing.assert_close(found[:, :3], (1.5 * v - 0.5 * null)[:, :3])
    assert torch.equal(found[:, 3:], v[:, 3:])


NORMS: list[tuple[Token | Row | Clip | Deviation, Callable[[Tensor], Tensor]]] = [
    (Token(), lambda x: torch.nn.functional.unfold(x, 2, stride=2).norm(dim=1)),
    (Row(), lambda x: x.norm(dim=-1)),
    (Deviation(strength=1.0), lambda x: x.flatten(1).std(1)),
]


@pytest.mark.parametrize(("rescale", "norm"), NORMS)
def test_rescaling_restores_the_norm_under_the_condition(
    rescale: Token | Row | Deviation, norm: Callable[[Tensor], Tensor]
) -> None:
    v, null = pair()
    found = Guidance(scale=5.0, rescale=rescale).combine(v, null, T)
    torch.testing.assert_close(norm(found), norm(v))


def test_clipping_leaves_what_is_short_enough() -> None:
    v, null = pair()
    plain = Guidance(scale=5.0).combine(v, null, T)
    assert torch.equal(Guidance(scale=5.0, rescale=Clip(factor=100.0)).combine(v, null, T), plain)
    clipped = Guidance(scale=5.0, rescale=Clip(factor=0.5)).combine(v, null, T)
    torch.testing.assert_close(clipped.flatten(1).norm(dim=1), 0.5 * v.flatten(1).norm(dim=1))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 20))
def test_first_steps_are_those_that_an_index_would_choose(steps: int, twentieths: int) -> None:
    """`(i + 1) / steps > share` is how pipelines leave steps out."""
    share = twentieths / 20
    times = [(1 - i / steps) ** 0.7 for i in range(steps + 1)]
    chosen = [(i + 1) * 20 <= twentieths * steps for i in range(steps)]
    if not any(chosen):
        with pytest.raises(ValueError, match="set scale to 1"):
            first_steps(times, share)
        return
    guidance = Guidance(scale=2.0, interval=first_steps(times, share))
    assert guidance.applies(torch.tensor(times[:-1])).tolist() == chosen


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_intervals_must_lie_between_0_and_1(interval: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="expected an interval"):
        Guidance(interval=interval)


def test_importing_the_settings_and_the_opener_imports_nothing_heavy() -> None:
    code = (
        "import sys, flowdistill.guidance, flowdistill.teachers.pipelines\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'torchvision', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
