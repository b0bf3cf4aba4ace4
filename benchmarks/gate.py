"""How often a gate raises a false alarm, and what it catches, on errors of real samples.

    python benchmarks/gate.py

Samples builtin:shapes with 8 Euler steps from 2,048 noises, and again with something changed: other times,
or weights with noise on them. Endpoint errors are to Heun's 32 steps from the same noises. From the two
errors of each noise, 1,000 pairs of evaluations are made for each figure and judged as `flowdistill gate`
judges files:

A/A    the two errors of each noise are swapped or not by a coin, and 2,048 noises are drawn with
       replacement: what is judged has no difference on the average, and real differences sample by sample;
+x %   2,048 noises are drawn with replacement, and the second errors are moved by a constant, so that over
       all noises they are x % worse. Caught is what ends with exit code 1;
as is  the same without moving them: `mean` says how much worse they are.

Prints Markdown. `--quick` does it with an analytic flow and fewer of all.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowdistill import randomness, teachers
from flowdistill.comparison import gating, rules
from flowdistill.comparison.joining import Evaluation
from flowdistill.evaluation import metrics
from flowdistill.evaluation.results import Content
from flowdistill.schedule import Schedule, uniform
from flowdistill.solvers import SOLVERS, integrate

STEPS, BATCH = 8, 128
REGRESSIONS = (0.01, 0.02, 0.05)
POWER, NOISES = 1.02, (0.005, 0.01, 0.015)
"""Of the times, and deviations of the noise on weights as shares of each tensor's own."""


def sample(model: teachers.Model, schedule: Schedule, count: int, solver: str = "euler") -> Tensor:
    """Samples [count, *shape] from the first noises of a seed."""
    key, parts = randomness.key(0, "gate"), []
    for start in range(0, count, BATCH):
        indices = range(start, min(start + BATCH, count))
        eps, labels = randomness.noise(key, indices, model.card.shape), model.labels(key, indices)
        parts.append(integrate(model.field, eps, schedule, SOLVERS[solver], labels))
    return torch.cat(parts)


def disturb(model: teachers.Model, scale: float) -> None:
    """Add normal noise to each weight, of so much of the deviation of its tensor."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: value + scale * value.std() * torch.randn(value.shape, generator=generator)
        for name, value in model.network.state_dict().items()
        if value.is_floating_point() and value.numel() > 1
    }
    model.network.load_state_dict(state, strict=False)


def changed(name: str, count: int, noises: Sequence[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Endpoint errors [count] of a model, and of the same with something changed."""
    model = teachers.open_model(name)
    exact = sample(model, uniform(32), count, "heun")
    even = uniform(STEPS)
    warped = Schedule(tuple(t**POWER for t in even.times), "power")

    def errors(schedule: Schedule = even) -> Tensor:
        return metrics.endpoint_error(sample(model, schedule, count), exact)

    base = errors()
    found = {f"times to the power {POWER}": errors(warped)}
    weights = copy.deepcopy(model.network.state_dict())
    for scale in noises:
        disturb(model, scale)
        found[f"noise of {100 * scale:g} % on the weights"] = errors()
        model.network.load_state_dict(weights)
    return base, found


def evaluation(errors: Tensor) -> Evaluation:
    """What `flowdistill eval` would have written of one row with these errors [n]."""
    estimate = metrics.Estimate(float(errors.mean()), float("nan"), float("nan"), len(errors), "mean")
    row = {"id": "model-8", "model": "model", "solver": "euler", "schedule": "uniform", "nfe": STEPS}
    content = {
        "seed": 0,
        "samples": len(errors),
        "reference": {"model": "model", "nfe": STEPS},
        "data": {},
        "models": {"model": {"digest": ""}},
        "rows": [{**row, "metrics": {f"endpoint_error@{len(errors)}": estimate.as_dict()}}],
    }
    tensors = {"index": torch.arange(len(errors)), "model-8.endpoint_error": errors}
    return Evaluation(Path("eval.json"), Content.model_validate(content), tensors)


def pairs(a: Tensor, b: Tensor, count: int, worse: float | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Errors of two sides; without a difference where `worse` is None."""
    generator = randomness.generator(0, "gates", str(worse))
    moved = b if worse is None else b + (1 + worse) * a.mean() - b.mean()
    for _ in range(count):
        drawn = torch.randint(len(a), (len(a),), generator=generator)
        first, second = a[drawn], moved[drawn]
        swap = torch.randint(2, (len(a),), generator=generator).bool()
        if worse is None:
            first, second = torch.where(swap, second, first), torch.where(swap, first, second)
        yield first, second


def exit_codes(rule: str, sides: Iterator[tuple[Tensor, Tensor]]) -> Counter[int]:
    """How often the gate ends with which code."""
    policy, found = rules.policy(texts=[rule]), Counter[int]()
    for a, b in sides:
        checks = gating.checks(policy, evaluation(b), evaluation(a))
        found[gating.judge(checks, policy).exit_code] += 1
    return found


def share(count: int, of: int) -> str:
    """`99.1 % [98.3, 99.5]`."""
    hits = torch.arange(of) < count
    found = metrics.accuracy(hits, torch.ones_like(hits))
    return f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def table(rule: str, base: Tensor, others: dict[str, Tensor], gates: int) -> Iterator[Sequence[str]]:
    """A row for each change."""
    for what, errors in others.items():
        none = exit_codes(rule, pairs(base, errors, gates, None))
        real = float(errors.mean() / base.mean() - 1)
        caught = [exit_codes(rule, pairs(base, errors, gates, worse))[1] for worse in (*REGRESSIONS, real)]
        spread = float((errors - base).std() / base.mean())
        yield (
            what,
            f"{100 * real:+.1f} %",
            f"{100 * spread:.1f} %",
            share(none[1], gates),
            share(none[3], gates),
            *(share(count, gates) for count in caught),
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    base, others = changed("analytic:ring", 256, ()) if quick else changed("builtin:shapes", 2048, NOISES)
    gates = 40 if quick else 1000
    headings = ["changed", "mean", "deviation", "false alarms", "inconclusive"]
    headings += [*(f"{100 * each:+g} % caught" for each in REGRESSIONS), "as is caught"]
    for rule in (rules.DEFAULT, "endpoint_error<=+0%"):
        print(f"\n{rule}, {len(base)} noises, {gates} gates for each figure\n")
        print(f"| {' | '.join(headings)} |\n|{' --- |' * len(headings)}", flush=True)
        for row in table(rule, base, others, gates):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
