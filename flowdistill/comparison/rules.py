"""Rules of a gate, from text like `endpoint_error@student-4<=+2%` or from a YAML file.

KIND[@ROW] <= +2%      no more than 2 % above the baseline
KIND[@ROW] <= +0.01    no more than 0.01 above the baseline
KIND[@ROW] <= 0.15     no more than 0.15, whatever the baseline
KIND[@ROW] >= -1%      no more than 1 % below it, for metrics of which more is better
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from pydantic import Field, model_validator

from flowdistill import artifact
from flowdistill.errors import Problem, RecipeError, UsageError, quoted, unknown
from flowdistill.evaluation.kinds import KINDS
from flowdistill.settings import Settings, check
from flowdistill.yaml_nodes import Node, join, read_file

Form = Literal["relative", "difference", "value"]

DEFAULT = "endpoint_error<=+1%"
"""What a gate without rules asks of every row."""
_SHORT = {"endpoint": "endpoint_error"}
_NO_NOISE = ("throughput", "memory")
_JUDGED = [kind for kind in KINDS if kind not in _NO_NOISE and not kind.startswith("recall")]
_NUMBER = re.compile(r"([+-]?)([0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|\.[0-9]+(?:e[+-]?[0-9]+)?)\s*(%?)\s*", re.I)


@dataclass(frozen=True)
class Rule:
    """How far a metric may go."""

    text: str
    kind: str
    form: Form
    bound: float
    """A share of the baseline, a difference from it, or a value."""
    rows: tuple[str, ...] = ()
    """Ids of rows or names of models; empty for all."""
    alpha: float | None = None
    """Its own chance of a false alarm; None to share the gate's."""
    primary: bool = False

    @property
    def sign(self) -> int:
        """1 where less is better, so that sign times a change is how much worse it got."""
        return -KINDS[self.kind].better

    @property
    def operator(self) -> str:
        """`<=`, or `>=` where more is better."""
        return "<=" if self.sign > 0 else ">="

    @property
    def limit(self) -> str:
        """The number as it is written: `+2%`."""
        return self.text.rpartition(self.operator)[2]


class RuleError(ValueError):
    """What is wrong with the text of a rule, and at which of its characters."""


def parse(text: str) -> Rule:
    """The rule that a text stands for; RuleError where it stands for none."""
    found = re.match(r"\s*([^\s@<>=]*)\s*(?:@\s*([^\s<>=]*))?\s*", text)
    assert found is not None  # all of it may be empty
    kind = _SHORT.get(found[1], found[1])
    if kind not in KINDS:
        _refuse(found.start(1), unknown("metric", found[1], _JUDGED) if found[1] else "no metric")
    if kind in _NO_NOISE:
        _refuse(found.start(1), f"nothing is known of the noise of {kind}; latency can be judged")
    if kind not in _JUDGED:  # whether real samples are covered depends on all samples at once
        _refuse(found.start(1), f"the noise of {kind} is not known well enough; precision can be judged")
    if found[2] is not None and (not found[2] or found[2].isdecimal()):
        hint = "; the number of samples is no part of a rule" if found[2] else ""
        _refuse(found.start(2), f"expected the id of a row, found {quoted(found[2])}{hint}")
    position, operator = found.end(), "<=" if KINDS[kind].better < 0 else ">="
    if not text.startswith(operator, position):
        why = "less" if operator == "<=" else "more"
        there = re.match("[<>=]*", text[position:])
        seen = quoted(there[0] if there and there[0] else text[position : position + 1])
        _refuse(position, f"expected {operator} ({why} {kind} is better), found {seen}")
    position += 2 + len(text[position + 2 :]) - len(text[position + 2 :].lstrip())
    number = _NUMBER.fullmatch(text, position)
    if number is None:
        _refuse(position, f"expected a number like +2%, +0.01 or 0.15, found {quoted(text[position:])}")
    sign, digits, percent = number.groups()
    if percent and not sign:
        _refuse(position, f"write +{digits}% for a change, or {float(digits) / 100:g} for a value")
    value = float(digits) * (-1 if sign == "-" else 1) / (100 if percent else 1)
    if not math.isfinite(value):
        _refuse(position, f"expected a number like +2%, +0.01 or 0.15, found {quoted(text[position:])}")
    form: Form = "relative" if percent else "difference" if sign else "value"
    at = f"@{found[2]}" if found[2] else ""
    rows = (found[2],) if found[2] else ()
    return Rule(f"{kind}{at}{operator}{sign}{digits}{percent}", kind, form, value, rows)


def _refuse(position: int, message: str) -> NoReturn:
    raise RuleError(f"character {position + 1}: {message}")


class RuleSettings(Settings):
    """A rule with more than its text."""

    rule: str = Field(description="its text")
    rows: list[str] | None = Field(None, min_length=1, description="ids of rows; if left out, all")
    alpha: float | None = Field(None, gt=0, lt=0.5, description="of this rule alone, beside the gate's")
    primary: bool = Field(False, description="whether it takes half of the gate's alpha for itself")

    @model_validator(mode="after")
    def _one_share(self) -> RuleSettings:
        if self.primary and self.alpha is not None:
            raise ValueError("primary: the rule has an alpha of its own; leave one of them out")
        return self


OnInconclusive = Literal["fail", "exit-3", "warn"]


class Gates(Settings):
    """What a file of rules holds."""

    alpha: float = Field(0.01, gt=0, lt=0.5, description="chance of any false alarm of the gate")
    on_inconclusive: OnInconclusive = Field(
        "exit-3", description="exit with 1, with 3, or with 0 where too few samples leave a rule open"
    )
    rules: list[str | RuleSettings] = Field(
        default_factory=list, description="texts of rules, or mappings with `rule`"
    )


@dataclass(frozen=True)
class Policy:
    """The rules of a gate, and what it makes of them."""

    rules: tuple[Rule, ...]
    alpha: float = 0.01
    on_inconclusive: OnInconclusive = "exit-3"

    @property
    def needs_baseline(self) -> bool:
        """Whether any rule compares with one."""
        return any(rule.form != "value" for rule in self.rules)


def policy(file: Path | None = None, texts: Sequence[str] = ()) -> Policy:
    """Rules of a file and of the command line; the default one where there are none.

    Raises `RecipeError` with all that is wrong in the file, `UsageError` for the command line.
    """
    gates, rules = Gates(), list[Rule]()
    if file is not None:
        gates, rules = _read(file)
    for text in texts:
        try:
            rules.append(parse(text))
        except RuleError as error:
            raise UsageError(f"--rule {quoted(text)}: {error}") from None
    return Policy(tuple(rules) or (parse(DEFAULT),), gates.alpha, gates.on_inconclusive)


def _read(file: Path) -> tuple[Gates, list[Rule]]:
    with artifact.opened(file) as stream:
        root, problems = read_file(stream.read(), str(file))
    if not isinstance(root.value, dict):
        raise RecipeError([*problems, root.place.problem(f"expected rules, a mapping, found {root.shown()}")])
    gates = check(Gates, root, "")
    if isinstance(gates, list):
        raise RecipeError([*problems, *gates])
    nodes = root.value["rules"].value if "rules" in root.value else []
    assert isinstance(nodes, list)
    rules: list[Rule] = []
    for i, (each, node) in enumerate(zip(gates.rules, nodes, strict=True)):
        made = _rule(each, node, join("rules", i))
        if isinstance(made, Rule):
            rules.append(made)
        else:
            problems.append(made)
    if sum(rule.primary for rule in rules) > 1:
        problems.append(root.value["rules"].heading.problem("more than one rule is primary", "rules"))
    if problems:
        raise RecipeError(problems)
    return gates, rules


def _rule(written: str | RuleSettings, node: Node, key: str) -> Rule | Problem:
    text = written if isinstance(written, str) else written.rule
    if isinstance(node.value, dict):
        node, key = node.value["rule"], join(key, "rule")
    try:
        rule = parse(text)
    except RuleError as error:
        return node.place.problem(str(error), key)
    if isinstance(written, str):
        return rule
    if written.rows and rule.rows:
        return node.place.problem(f"names row {rule.rows[0]}, and there is a list of rows beside it", key)
    return replace(rule, rows=tuple(written.rows or rule.rows), alpha=written.alpha, primary=written.primary)
