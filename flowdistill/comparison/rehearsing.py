"""How often a gate raises a false alarm, and what it would catch, tried on the samples that it judges.

An A/A run has no difference to find: noises are drawn anew, with replacement, and of each that is drawn
the values of the baseline and the evaluation are swapped or not by the toss of a coin. So the two sides are
alike in distribution, and differ from sample to sample as much as the real ones do, or a little more where
one is truly worse. Metrics of as many samples share draws and coins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowdistill import randomness
from flowdistill.comparison import comparing
from flowdistill.comparison.gating import Check, judge, shares
from flowdistill.comparison.rules import Policy
from flowdistill.errors import UsageError
from flowdistill.evaluation import metrics
from flowdistill.evaluation.metrics import Estimate

REGRESSIONS = (0.01, 0.02, 0.05)
"""True changes for the worse, as shares of the baseline, whose detection is told."""
_CAUGHT = 0.95


@dataclass(frozen=True)
class Power:
    """What a check would catch."""

    name: str
    caught: Mapping[float, float]
    """Regression, as a share of the baseline -> share of runs in which this check alone finds it."""
    smallest: float
    """Regression, as a share of the baseline, that is found in 95 % of runs."""


@dataclass(frozen=True)
class Rehearsal:
    """Outcomes of A/A runs of a gate."""

    runs: int
    false_alarms: Estimate
    inconclusive: Estimate
    """Share of runs, of those without a false alarm, too."""
    powers: Sequence[Power]
    left_out: Sequence[str]
    """Tests that have no pairs of samples."""
    same: bool
    """Whether no sample differs, so that there is no noise to rehearse with."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        checks = [
            {
                "check": power.name,
                "caught": {f"{regression:g}": share for regression, share in power.caught.items()},
                "caught_95": power.smallest,
            }
            for power in self.powers
        ]
        return {
            "runs": self.runs,
            "false_alarms": self.false_alarms.as_dict(),
            "inconclusive": self.inconclusive.as_dict(),
            "checks": checks,
            "left_out": list(self.left_out),
            "no_sample_differs": self.same,
        }


def rehearse(checks: Sequence[Check], policy: Policy, runs: int, seed: int = 0) -> Rehearsal:
    """Judge `runs` A/A pairs made of the samples of the checks, by the same rules.

    What a check would catch is told by its lower bounds in these runs, moved by the regression. Raises
    `UsageError` where no check has pairs of samples.
    """
    usable = [check for check in checks if check.values is not None]
    left_out = [check.name for check in checks if check.values is None]
    if not usable:
        raise UsageError("nothing to rehearse: no rule compares samples in pairs")
    alarms, open_ = torch.zeros(runs, dtype=torch.int64), torch.zeros(runs, dtype=torch.int64)
    lows = torch.empty(len(usable), runs, dtype=torch.float64)
    weights = shares(usable)
    levels = [
        check.rule.alpha or policy.alpha * weight / sum(weights)
        for check, weight in zip(usable, weights, strict=True)
    ]
    for run in range(runs):
        null = _null(usable, seed, run)
        statuses = {outcome.status for outcome in judge(null, policy).outcomes}
        alarms[run], open_[run] = "regression" in statuses, "inconclusive" in statuses
        for i, (check, level) in enumerate(zip(null, levels, strict=True)):
            assert check.change is not None
            lows[i, run] = check.change.low(level)
    ones = torch.ones_like(alarms)
    return Rehearsal(
        runs,
        metrics.accuracy(alarms, ones),
        metrics.accuracy(open_, ones),
        [_power(check, low) for check, low in zip(usable, lows, strict=True)],
        left_out,
        all(torch.equal(*_values(check)) for check in usable),
    )


def _null(checks: Sequence[Check], seed: int, run: int) -> list[Check]:
    """The checks on an A/A pair."""
    generator = randomness.generator(seed, "rehearsal", run)
    sizes = sorted({len(_values(check)[0]) for check in checks})
    draws = {n: torch.randint(n, (n,), generator=generator) for n in sizes}
    coins = {n: torch.randint(2, (n,), generator=generator).bool() for n in sizes}
    made = []
    for check in checks:
        n = len(_values(check)[0])
        a, b = (side[draws[n]] for side in _values(check))
        left, right = torch.where(coins[n], b, a), torch.where(coins[n], a, b)
        change = comparing.paired_change(left, right, check.rule.form == "relative")
        made.append(replace(check, change=change if check.rule.sign > 0 else change.reversed()))
    return made


def _power(check: Check, lows: Tensor) -> Power:
    """From lower bounds [runs] of its A/A changes; a regression lifts all of them."""
    unit = 1.0 if check.rule.form == "relative" else abs(float(_values(check)[0].mean()))
    caught = {each: float((lows + each * unit > check.margin).double().mean()) for each in REGRESSIONS}
    smallest = (check.margin - torch.quantile(lows, 1 - _CAUGHT, interpolation="lower")) / unit
    return Power(check.name, caught, float(smallest))


def _values(check: Check) -> tuple[Tensor, Tensor]:
    assert check.values is not None
    return check.values
