"""Affine paths from data to noise, x = alpha(time) x0 + sigma(time) eps, in canonical coordinates.

Every such path is the canonical line seen through a clock and a scale (Karras et al. 2022, arXiv 2206.00364,
Sec. 2; Lee et al. 2024, arXiv 2405.20320, Prop. 1): at equal ratio of signal to noise

    t = sigma / (alpha + sigma),   z = x / (alpha + sigma) = (1 - t) x0 + t eps

`time` is the path's own clock, rising with noise, `t` the canonical one; both are [B] or any shape. Each
class is a choice in a model card, its fields are the keys. Arithmetic is done in the type of the argument;
the conversions of `conventions` hand over float64.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import Field

from flowdistill.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    Pair: TypeAlias = tuple[Tensor, Tensor]


class AffinePath(Settings):
    """What all paths can do, from `alpha_sigma`, `rates` and `time_at`."""

    def alpha_sigma(self, time: Tensor) -> Pair:
        """Shares of data and noise in the state."""
        raise NotImplementedError

    def rates(self, time: Tensor) -> Pair:
        """Derivatives of alpha and sigma by the path's own time."""
        raise NotImplementedError

    def time_at(self, t: Tensor) -> Tensor:
        """The path's own time at canonical t: the inverse of `t_at`."""
        raise NotImplementedError

    @property
    def span(self) -> tuple[float, float]:
        """The canonical t at which networks on this path were trained, [low, high]."""
        return 0.0, 1.0

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the data for which the state has variance 1 at all times; None if none is."""
        return None

    def t_at(self, time: Tensor) -> Tensor:
        """Canonical t = sigma / (alpha + sigma)."""
        alpha, sigma = self.alpha_sigma(time)
        return sigma / (alpha + sigma)

    def canonical_rate(self, time: Tensor) -> Tensor:
        """dt / dtime = W / (alpha + sigma)^2 with W = alpha sigma' - alpha' sigma > 0.

        A density of native times, divided by it, is the density of canonical t.
        """
        alpha, sigma = self.alpha_sigma(time)
        return self.wronskian(time) / (alpha + sigma).square()

    def wronskian(self, time: Tensor) -> Tensor:
        """W = alpha sigma' - alpha' sigma."""
        (alpha, sigma), (d_alpha, d_sigma) = self.alpha_sigma(time), self.rates(time)
        return alpha * d_sigma - d_alpha * sigma


class Rectified(AffinePath):
    """alpha = 1 - time, sigma = time: the canonical path itself (SD3, FLUX, SiT, RectifiedFlow, torchcfm)."""

    name: Literal["rectified"] = "rectified"

    def alpha_sigma(self, time: Tensor) -> Pair:
        return 1 - time, time

    def rates(self, time: Tensor) -> Pair:
        return -time.new_ones(time.shape), time.new_ones(time.shape)

    def time_at(self, t: Tensor) -> Tensor:
        return t


class LFM(AffinePath):
    """alpha = 1 - time, sigma = s + (1 - s) time: data with a little noise (arXiv 2210.02747)."""

    name: Literal["lfm"] = "lfm"
    sigma_min: float = Field(1e-5, ge=0, lt=1, description="s, the noise that is left at time 0")

    def alpha_sigma(self, time: Tensor) -> Pair:
        return 1 - time, self.sigma_min + (1 - self.sigma_min) * time

    def rates(self, time: Tensor) -> Pair:
        ones = time.new_ones(time.shape)
        return -ones, (1 - self.sigma_min) * ones

    def time_at(self, t: Tensor) -> Tensor:
        s = self.sigma_min
        return (t - s * (1 - t)) / (1 - s * (1 - t))

    @property
    def span(self) -> tuple[float, float]:
        return self.sigma_min / (1 + self.sigma_min), 1.0


class Cosine(AffinePath):
    """alpha = cos(pi time / 2), sigma = sin(pi time / 2): SiT's GVP path (arXiv 2401.08740)."""

    name: Literal["cosine"] = "cosine"

    def alpha_sigma(self, time: Tensor) -> Pair:
        angle = 0.5 * math.pi * time
        return angle.cos(), angle.sin()

    def rates(self, time: Tensor) -> Pair:
        alpha, sigma = self.alpha_sigma(time)
        return -0.5 * math.pi * sigma, 0.5 * math.pi * alpha

    def time_at(self, t: Tensor) -> Tensor:
        return t.atan2(1 - t) * (2 / math.pi)

    @property
    def deviation(self) -> float:
        return 1.0


class VE(AffinePath):
    """alpha = 1, sigma = time: the variance explodes (Song et al. 2021, arXiv 2011.13456)."""

    name: Literal["ve"] = "ve"
    sigma_min: float = Field(0.02, gt=0, description="smallest noise level that was trained")
    sigma_max: float = Field(100.0, gt=0, description="largest")

    def alpha_sigma(self, time: Tensor) -> Pair:
        return time.new_ones(time.shape), time

    def rates(self, time: Tensor) -> Pair:
        return time.new_zeros(time.shape), time.new_ones(time.shape)

    def time_at(self, t: Tensor) -> Tensor:
        return t / (1 - t)

    @property
    def span(self) -> tuple[float, float]:
        return self.sigma_min / (1 + self.sigma_min), self.sigma_max / (1 + self.sigma_max)


class EDM(VE):
    """VE with the state divided by its deviation, for data of deviation d (EDM, arXiv 2206.00364).

    alpha = 1 / sqrt(time^2 + d^2), sigma = time / sqrt(time^2 + d^2); time is EDM's sigma. In these terms
    EDM's preconditioned network F is the v-prediction with its sign changed: D = c_skip x + c_out F is
    x0 = d (d alpha x + sigma F). Nothing is divided by t or 1 - t, so nothing cancels at either end.
    """

    name: Literal["edm"] = "edm"  # type: ignore[assignment]
    sigma_min: float = Field(0.002, gt=0, description="smallest noise level that was trained")
    sigma_max: float = Field(80.0, gt=0, description="largest")
    sigma_data: float = Field(0.5, gt=0, description="d, the standard deviation of the data")

    def alpha_sigma(self, time: Tensor) -> Pair:
        norm = time.square().add(self.sigma_data**2).sqrt()
        return 1 / norm, time / norm

    def rates(self, time: Tensor) -> Pair:
        cube = time.square().add(self.sigma_data**2).pow(1.5)
        return -time / cube, self.sigma_data**2 / cube

    @property
    def deviation(self) -> float:
        return self.sigma_data


class _Diffusion(AffinePath):
    """B(time) = integral of beta = time beta_min + time^2 (beta_max - beta_min) / 2."""

    beta_min: float = Field(0.1, gt=0, description="rate of noise at time 0")
    beta_max: float = Field(20.0, gt=0, description="rate of noise at time 1")
    time_min: float = Field(1e-5, gt=0, lt=1, description="smallest time that was trained")

    def exponent(self, time: Tensor) -> Tensor:
        """B(time)."""
        return time * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * time)

    def exponent_rate(self, time: Tensor) -> Tensor:
        """beta(time)."""
        return self.beta_min + (self.beta_max - self.beta_min) * time

    def time_of(self, exponent: Tensor) -> Tensor:
        """The root of B(time) = exponent, in the form that does not cancel."""
        slope = self.beta_max - self.beta_min
        return 2 * exponent / (self.beta_min + (self.beta_min**2 + 2 * slope * exponent).sqrt())

    @property
    def span(self) -> tuple[float, float]:
        import torch

        low, high = self.t_at(torch.tensor([self.time_min, 1.0], dtype=torch.float64)).tolist()
        return low, high


class VP(_Diffusion):
    """alpha = exp(-B / 2), sigma = sqrt(1 - alpha^2): the variance is kept (arXiv 2011.13456, eq. 33)."""

    name: Literal["vp"] = "vp"

    def alpha_sigma(self, time: Tensor) -> Pair:
        exponent = self.exponent(time)
        return (-0.5 * exponent).exp(), (-(-exponent).expm1()).sqrt()

    def rates(self, time: Tensor) -> Pair:
        alpha, sigma = self.alpha_sigma(time)
        beta = self.exponent_rate(time)
        return -0.5 * beta * alpha, 0.5 * beta * alpha.square() / sigma

    def time_at(self, t: Tensor) -> Tensor:
        return self.time_of((t / (1 - t)).square().log1p())  # (sigma / alpha)^2 = e^B - 1

    @property
    def deviation(self) -> float:
        return 1.0


class SubVP(_Diffusion):
    """alpha = exp(-B / 2), sigma = 1 - alpha^2 (arXiv 2011.13456, eq. 29)."""

    name: Literal["sub-vp"] = "sub-vp"

    def alpha_sigma(self, time: Tensor) -> Pair:
        exponent = self.exponent(time)
        return (-0.5 * exponent).exp(), -(-exponent).expm1()

    def rates(self, time: Tensor) -> Pair:
        exponent, beta = self.exponent(time), self.exponent_rate(time)
        return -0.5 * beta * (-0.5 * exponent).exp(), beta * (-exponent).exp()

    def time_at(self, t: Tensor) -> Tensor:
        return self.time_of(2 * (0.5 * t / (1 - t)).asinh())  # sigma / alpha = 2 sinh(B / 2)


class DDPM(AffinePath):
    """A table of betas (Ho et al. 2020, arXiv 2006.11239); time is the index, 0 to steps - 1, and continuous.

    Between two entries log(alpha / sigma) is linear in time, so that a network which takes a fractional time
    is a velocity field at every t.
    """

    name: Literal["ddpm"] = "ddpm"
    betas: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = Field(
        "linear", description="rule of the table, by diffusers' names; iDDPM's is squaredcos_cap_v2"
    )
    beta_start: float = Field(1e-4, gt=0, lt=1, description="first beta, where the rule has one")
    beta_end: float = Field(0.02, gt=0, lt=1, description="last beta, where the rule has one")
    steps: int = Field(1000, ge=2, le=4000, description="entries of the table")
    zero_terminal_snr: bool = Field(
        False, description="betas rescaled so that the last state is pure noise (arXiv 2305.08891)"
    )

    def alpha_sigma(self, time: Tensor) -> Pair:
        log_snr, _ = self._log_ratio(time)
        return (2 * log_snr).sigmoid().sqrt(), (-2 * log_snr).sigmoid().sqrt()

    def rates(self, time: Tensor) -> Pair:
        alpha, sigma = self.alpha_sigma(time)
        _, slope = self._log_ratio(time)
        return alpha * sigma.square() * slope, -sigma * alpha.square() * slope

    def time_at(self, t: Tensor) -> Tensor:
        wanted = (1 - t).log() - t.log()
        table = self.log_ratios().to(t)
        # The table falls, searchsorted wants it to rise.
        index = (len(table) - 1 - _bucket(table.flip(0), wanted)).clamp(1, len(table) - 1)
        before, after = table[index - 1], table[index]
        share = ((before - wanted) / (before - after)).clamp(0, 1)
        return index - 1 + share

    def log_ratios(self) -> Tensor:
        """log(alpha / sigma) of the entries, [steps] float64, falling."""
        return _table(self)

    def nearest(self, time: Tensor) -> Tensor:
        """Index of the entry whose sigma / alpha is nearest to that at `time`, as EDM's iDDPM has it."""
        ratios = (-self.log_ratios()).exp().to(time)
        log_snr, _ = self._log_ratio(time)
        above = _bucket(ratios, (-log_snr).exp()).clamp(0, self.steps - 2)
        middle = 0.5 * (ratios[above] + ratios[above + 1])
        return (above + ((-log_snr).exp() > middle)).to(time)

    @property
    def span(self) -> tuple[float, float]:
        first, last = self.log_ratios()[[0, -1]].neg().sigmoid().tolist()
        return first, last

    @property
    def deviation(self) -> float:
        return 1.0

    def _log_ratio(self, time: Tensor) -> Pair:
        """log(alpha / sigma) and its slope."""
        table = self.log_ratios().to(time)
        index = time.floor().clamp(0, self.steps - 2).long()
        slope = table[index + 1] - table[index]
        return table[index] + (time - index) * slope, slope


Interpolant: TypeAlias = Annotated[
    Rectified | LFM | Cosine | VE | EDM | VP | SubVP | DDPM, Field(discriminator="name")
]

_SMALLEST_SHARE = 2.0**-24
"""In place of alpha^2 = 0 at the end of a table with zero terminal SNR, as diffusers has it."""


def _bucket(rising: Tensor, value: Tensor) -> Tensor:
    """Index of the last entry that is not above the value; -1 where all are."""
    import torch

    return torch.searchsorted(rising, value.contiguous(), right=True) - 1


@lru_cache(maxsize=16)
def _table(path: DDPM) -> Tensor:
    import torch

    if path.betas == "squaredcos_cap_v2":
        place = torch.arange(path.steps + 1, dtype=torch.float64) / path.steps
        share = ((place + 0.008) / 1.008 * (math.pi / 2)).cos().square()
        betas = (1 - share[1:] / share[:-1]).clamp(max=0.999)
    elif path.betas == "linear":
        betas = torch.linspace(path.beta_start, path.beta_end, path.steps, dtype=torch.float64)
    else:
        roots = torch.linspace(path.beta_start**0.5, path.beta_end**0.5, path.steps, dtype=torch.float64)
        betas = roots.square()
    log_share = (-betas).log1p().cumsum(0)  # of alpha^2
    if path.zero_terminal_snr:
        root = (0.5 * log_share).exp()
        share = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
        share[-1] = min(_SMALLEST_SHARE, float(share[-2]) / 4)  # the table has to fall
        log_share = share.log()
    return 0.5 * (log_share - (-log_share.expm1()).log())
