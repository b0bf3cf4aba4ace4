"""A gate: whether an evaluation is worse than its baseline, with a known chance of a false alarm.

A rule allows a metric to become worse by a margin. With d for how much worse it became, it is

    a regression    if d > margin is shown: the lower bound of d is above the margin,
    passed          if d <= margin is shown: the upper bound is no more than the margin,
    inconclusive    else: too few samples.

Each bound is one-sided. A gate raises a false alarm if any of its rules does, so lower bounds share
`alpha` (Holm 1979, with weights where a rule is primary). It passes only if all of its rules pass, so
each upper bound may have all of `alpha` (intersection-union test, Berger 1982): that chance bounds the
share of truly worse models that pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from flowdistill.comparison.comparing import Change
from flowdistill.comparison.joining import Evaluation, Joined, Pair, join
from flowdistill.comparison.rules import Policy, Rule
from flowdistill.comparison.verdicts import UNPAIRED, check_paired
from flowdistill.errors import UsageError, unknown
from flowdistill.evaluation.results import Measured

Status = Literal["pass", "regression", "inconclusive", "missing"]

PASSED, REGRESSION, INCONCLUSIVE = 0, 1, 3
"""Exit codes."""


@dataclass(frozen=True, eq=False)
class Check:
    """One rule, applied to one row."""

    rule: Rule
    row: str
    change: Change | None
    """How much worse it became, or its value with the sign of the rule; None where that is not known."""
    missing: str = ""
    """Why it is not."""
    values: tuple[Tensor, Tensor] | None = None
    """Of the baseline and the evaluation, noise by noise."""

    @property
    def name(self) -> str:
        """`endpoint_error<=+2% (student-4)`, unlike that of any other check of the gate."""
        return f"{self.rule.text} ({self.row})"

    @property
    def margin(self) -> float:
        """The most that `change` may be."""
        return self.rule.sign * self.rule.bound


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a check; `low` and `high` are bounds of its change, at levels of `level` and alpha."""

    check: Check
    status: Status
    low: float = 0.0
    high: float = 0.0
    level: float = 0.0
    needed: int | None = None

    @property
    def message(self) -> str:
        """`endpoint_error +3.12% [+2.20, +4.03] > +2%`, as the rule has the signs."""
        check, rule = self.check, self.check.rule
        if check.change is None:
            return f"{rule.kind}: {check.missing}"
        value, low, high = self._shown(check.change)
        if rule.form == "relative":
            text = f"{rule.kind} {100 * value:+.2f}% [{100 * low:+.2f}, {100 * high:+.2f}]"
        else:
            plus = "+" if rule.form == "difference" else ""
            text = f"{rule.kind} {value:{plus}.4g} [{low:{plus}.4g}, {high:{plus}.4g}]"
        if self.status == "regression":
            text += f" {'>' if rule.sign > 0 else '<'} {rule.limit}"
        elif self.status == "pass":
            text += f" {rule.operator} {rule.limit}"
        else:
            enough = f"about {self.needed:,} samples would" if self.needed else "more samples would hardly"
            text += f" may or may not be {rule.operator} {rule.limit}; {enough} tell"
        return text if check.change.paired or rule.form == "value" else f"{text} ({UNPAIRED})"

    def facts(self) -> dict[str, Any]:
        """For JSON; signs are those of the rule."""
        check = self.check
        found: dict[str, Any] = {"rule": check.rule.text, "row": check.row, "status": self.status}
        if check.change is not None:
            value, low, high = self._shown(check.change)
            found |= {
                "form": check.rule.form,
                "bound": check.rule.bound,
                "value": value,
                "low": low,
                "high": high,
                "level": self.level,
                "n": check.change.n,
                "paired": check.change.paired,
                "method": check.change.method,
                "needed": self.needed,
            }
        return {**found, "message": self.message}

    def _shown(self, change: Change) -> tuple[float, float, float]:
        """Value and bounds with the signs of the rule."""
        sign = self.check.rule.sign
        low, high = sorted((sign * self.low, sign * self.high))
        return sign * change.value + 0.0, low + 0.0, high + 0.0  # no -0.00


@dataclass(frozen=True, eq=False)
class Judgement:
    """All outcomes of a gate, in the order of its checks."""

    policy: Policy
    outcomes: Sequence[Outcome]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 a regression, 3 inconclusive; what is missing is never passed over."""
        statuses = {outcome.status for outcome in self.outcomes}
        strict = self.policy.on_inconclusive == "fail"
        if "regression" in statuses or (strict and statuses & {"inconclusive", "missing"}):
            return REGRESSION
        if "missing" in statuses or ("inconclusive" in statuses and self.policy.on_inconclusive != "warn"):
            return INCONCLUSIVE
        return PASSED

    @property
    def verdict(self) -> str:
        """`passed`, `regression` or `inconclusive`; `failed` where what is inconclusive is not let pass."""
        if self.exit_code == REGRESSION and all(each.status != "regression" for each in self.outcomes):
            return "failed"
        return {PASSED: "passed", REGRESSION: "regression", INCONCLUSIVE: "inconclusive"}[self.exit_code]

    @property
    def headline(self) -> str:
        """`regression: 1 of 8 checks`, `passed: 8 checks, 1 of them inconclusive`."""
        counts = Counter(outcome.status for outcome in self.outcomes)
        of = f"{len(self.outcomes)} {'check' if len(self.outcomes) == 1 else 'checks'}"
        odd = ", ".join(f"{counts[s]} {s}" for s in ("regression", "inconclusive", "missing") if counts[s])
        return f"{self.verdict}: {of}{f', {odd}' if odd else ''}"


# --- judging --------------------------------------------------------------------------------------


def judge(checks: Sequence[Check], policy: Policy) -> Judgement:
    """Judge all checks together."""
    known = {i: check for i, check in enumerate(checks) if check.change is not None}
    levels = _levels({i: check for i, check in known.items() if check.rule.alpha is None}, policy.alpha)
    levels |= {i: check.rule.alpha for i, check in known.items() if check.rule.alpha is not None}
    outcomes = [
        _outcome(check, levels[i], check.rule.alpha or policy.alpha)
        if i in levels
        else Outcome(check, "missing")
        for i, check in enumerate(checks)
    ]
    return Judgement(policy, outcomes)


def _levels(checks: Mapping[int, Check], alpha: float) -> dict[int, float]:
    """Level of each lower bound: Holm's method, stepping down from the clearest regression.

    A weight's share of those that are left is its share of `alpha`.
    """
    weights = shares(list(checks.values()))
    found: dict[int, tuple[float, float]] = {}
    for (i, check), weight in zip(checks.items(), weights, strict=True):
        assert check.change is not None
        found[i] = check.change.p_above(check.margin), weight
    levels, left = {}, sum(weights)
    for i in sorted(found, key=lambda i: found[i][0] / found[i][1]):
        p, weight = found[i]
        levels[i] = alpha * weight / left
        if p <= levels[i]:
            left -= weight
    return {i: min(level, alpha) for i, level in levels.items()}


def shares(checks: Sequence[Check]) -> list[float]:
    """Weight of each check: a primary rule has half of all, and so have the others; or all are equal."""
    primary = sum(check.rule.primary for check in checks)
    if primary in (0, len(checks)):
        return [1.0] * len(checks)
    return [0.5 / (primary if check.rule.primary else len(checks) - primary) for check in checks]


def _outcome(check: Check, level: float, alpha: float) -> Outcome:
    change, margin = check.change, check.margin
    assert change is not None
    low, high = change.low(level), change.high(alpha)
    if low > margin:
        return Outcome(check, "regression", low, high, level)
    if high <= margin:
        return Outcome(check, "pass", low, high, level)
    needed = change.needed(margin, level if change.value > margin else alpha)
    return Outcome(check, "inconclusive", low, high, level, needed)


# --- checks ---------------------------------------------------------------------------------------


def checks(
    policy: Policy, evaluation: Evaluation, baseline: Evaluation | None, paired: bool = True
) -> list[Check]:
    """Each rule for each of its rows.

    Raises `ArtifactError` where evaluation and baseline cannot be paired and that was wanted,
    `UsageError` where a rule names a row that neither has, where two rules are the same, or where a
    rule needs a baseline and there is none.
    """
    joined = None
    if baseline is not None and policy.needs_baseline:
        if paired:
            check_paired(baseline, evaluation)
        joined = join(baseline, evaluation)
    elif policy.needs_baseline:
        rule = next(rule for rule in policy.rules if rule.form != "value")
        raise UsageError(f"rule '{rule.text}' compares with a baseline; give one with --baseline")
    found: list[Check] = []
    for rule in policy.rules:
        if rule.form == "value":
            made = list(_alone(rule, evaluation))
        else:
            assert joined is not None
            made = list(_against(rule, joined, paired))
        if not made:
            reason = _skipped(evaluation, rule.kind)
            made = [Check(rule, "any row", None, f"no row has it{f' ({reason})' if reason else ''}")]
        found += made
    for name, count in Counter(check.name for check in found).items():
        if count > 1:
            raise UsageError(f"two rules are the same: {name}")
    return found


def _against(rule: Rule, joined: Joined, paired: bool) -> Iterator[Check]:
    """Tests of a rule that compares with the baseline."""
    known = {name for pair in joined.pairs for name in (pair.a.id, pair.b.id)}
    known |= {*joined.only_a, *joined.only_b}
    for row in rule.rows:
        if row not in known:
            raise UsageError(f"rule '{rule.text}': {unknown('row', row, sorted(known))}")
    for pair in joined.pairs:
        asked = pair.a.id in rule.rows or pair.b.id in rule.rows
        if asked or (not rule.rows and pair.a.has(rule.kind)):
            yield _test(rule, pair, paired)
    for name in joined.only_a:
        if name in rule.rows or not rule.rows:
            yield Check(rule, name, None, "the evaluation has no such row, nor one that is sampled like it")
    for name in joined.only_b:
        if name in rule.rows:
            yield Check(rule, name, None, "the baseline has no such row, nor one that is sampled like it")


def _test(rule: Rule, pair: Pair, paired: bool) -> Check:
    start, title = pair.a.alone(rule.kind), pair.title
    for whose, subject in (("baseline", pair.a), ("evaluation", pair.b)):
        if not subject.has(rule.kind):
            reason = subject.measured.skipped.get(rule.kind, "it was not measured")
            return Check(rule, title, None, f"the {whose} has none: {reason}")
    assert start is not None
    if why := pair.incomparable(rule.kind):
        return Check(rule, title, None, why)
    relative = rule.form == "relative"
    if relative and start.value <= 0:
        return Check(rule, title, None, f"the baseline is {start.value:g}, of which there are no per cent")
    change = pair.change(rule.kind, relative, paired)
    assert change is not None
    values = pair.values(rule.kind) if change.paired else None
    return Check(rule, title, change if rule.sign > 0 else change.reversed(), values=values)


def _alone(rule: Rule, evaluation: Evaluation) -> Iterator[Check]:
    """Tests of a rule that caps a value."""
    content = evaluation.content
    subjects = [evaluation.row(row.id) for row in content.rows]
    subjects += [evaluation.model(name) for name in content.models]
    known = [subject.id for subject in subjects]
    for row in rule.rows:
        if row not in known:
            raise UsageError(f"rule '{rule.text}': {unknown('row', row, known)}")
    for subject in subjects:
        value = subject.alone(rule.kind)
        if value is not None and (not rule.rows or subject.id in rule.rows):
            yield Check(rule, subject.id, value if rule.sign > 0 else value.reversed())
        elif subject.id in rule.rows or (not rule.rows and rule.kind in subject.measured.skipped):
            reason = subject.measured.skipped.get(rule.kind, "it was not measured")
            yield Check(rule, subject.id, None, f"the evaluation has none: {reason}")


def _skipped(evaluation: Evaluation, name: str) -> str:
    """Why no row has a metric of this kind, as far as the evaluation says."""
    measured: list[Measured] = [*evaluation.content.rows, *evaluation.content.models.values()]
    reasons = [each.skipped[name] for each in measured if name in each.skipped]
    return reasons[0] if reasons else ""
