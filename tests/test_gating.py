"""Gates: rules and mistakes in them, judgements against closed forms, what other machines read."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import small_evaluations as small
import torch
import typer
from scipy import stats
from torch import Tensor

from flowdistill import artifact
from flowdistill.boundary import Invocation
from flowdistill.cli import execute
from flowdistill.cli.application import application
from flowdistill.comparison import announcing, gating, rehearsing, rules
from flowdistill.comparison.comparing import Normal
from flowdistill.comparison.gating import Check, Judgement
from flowdistill.comparison.joining import Evaluation
from flowdistill.comparison.rules import Policy
from flowdistill.errors import ArtifactError, RecipeError, UsageError
from flowdistill.yaml_nodes import read_file

ROOT = Path(__file__).parents[1]

# --- rules ----------------------------------------------------------------------------------------

RULES = [
    ("endpoint<=+2%", ("endpoint_error<=+2%", "endpoint_error", "relative", 0.02, ())),
    (" fd @ s-4  <=  +2.5 % ", ("fd@s-4<=+2.5%", "fd", "relative", 0.025, ("s-4",))),
    ("endpoint_error<=+0.01", ("endpoint_error<=+0.01", "endpoint_error", "difference", 0.01, ())),
    ("fd<=0.15", ("fd<=0.15", "fd", "value", 0.15, ())),
    ("kid<=1e-3", ("kid<=1e-3", "kid", "value", 0.001, ())),
    ("accuracy>=-1%", ("accuracy>=-1%", "accuracy", "relative", -0.01, ())),
    ("psnr>=-.5", ("psnr>=-.5", "psnr", "difference", -0.5, ())),
    ("latency<=+20%", ("latency<=+20%", "latency", "relative", 0.2, ())),
    ("endpoint_error<=-5%", ("endpoint_error<=-5%", "endpoint_error", "relative", -0.05, ())),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), RULES, ids=[text for text, _ in RULES])
def test_rules(text: str, expected: tuple[Any, ...]) -> None:
    rule = rules.parse(text)
    assert (rule.text, rule.kind, rule.form, rule.bound, rule.rows) == expected
    assert rules.parse(rule.text) == rule, "what is printed can be given again"


MISTAKES = [
    ("", "character 1: no metric"),
    ("endpont<=+2%", "character 1: unknown metric 'endpont', did you mean 'endpoint_error'?"),
    ("memory<=+5%", "character 1: nothing is known of the noise of memory"),
    ("recall>=-5%", "character 1: the noise of recall is not known well enough"),
    ("fd<=1e400", "character 5: expected a number like +2%"),
    ("fd", "character 3: expected <= (less fd is better), found ''"),
    ("fd<+2%", "character 3: expected <= (less fd is better), found '<'"),
    ("fd>=-2%", "character 3: expected <= (less fd is better), found '>='"),
    ("accuracy<=+1%", "character 9: expected >= (more accuracy is better), found '<='"),
    ("fd@5000<=1", "character 4: expected the id of a row, found '5000'; the number of samples is no part"),
    ("fd@<=1", "character 4: expected the id of a row, found ''"),
    ("fd<=2%", "character 5: write +2% for a change, or 0.02 for a value"),
    ("fd<= +2%x", "character 6: expected a number like +2%, +0.01 or 0.15, found '+2%x'"),
    ("fd<=nan", "character 5: expected a number"),
    ("fd<=", "character 5: expected a number"),
]


@pytest.mark.parametrize(("text", "message"), MISTAKES, ids=[text or "empty" for text, _ in MISTAKES])
def test_mistakes_in_rules(text: str, message: str) -> None:
    with pytest.raises(rules.RuleError) as error:
        rules.parse(text)
    assert str(error.value).startswith(message)
    with pytest.raises(UsageError, match="^--rule "):
        rules.policy(texts=[text])


def test_a_file_of_rules(tmp_path: Path) -> None:
    file = tmp_path / "gates.yaml"
    file.write_text(
        "alpha: 0.05\non_inconclusive: warn\nrules:\n  - endpoint<=+2%\n"
        "  - {rule: accuracy>=-1%, rows: [s-1, s-2], primary: true}\n  - {rule: fd<=0.2, alpha: 0.001}\n"
    )
    found = rules.policy(file, ["kid<=+1"])
    assert (found.alpha, found.on_inconclusive) == (0.05, "warn")
    assert [rule.text for rule in found.rules] == [
        "endpoint_error<=+2%",
        "accuracy>=-1%",
        "fd<=0.2",
        "kid<=+1",
    ]
    assert (found.rules[1].rows, found.rules[1].primary) == (("s-1", "s-2"), True)
    assert found.rules[2].alpha == 0.001
    assert rules.policy() == Policy((rules.parse("endpoint_error<=+1%"),), 0.01, "exit-3")


WRONG_FILES = [
    ("- fd<=1\n", "g.yaml:1:1: expected rules, a mapping, found a list of 1"),
    ("alpa: 0.1\n", "g.yaml:1:1: alpa: unknown key, did you mean 'alpha'?"),
    ("alpha: 0.7\n", "g.yaml:1:8: alpha: expected a number < 0.5, found 0.7"),
    ("on_inconclusive: fial\n", "g.yaml:1:18: on_inconclusive: unknown on_inconclusive 'fial', did you mean"),
    ("rules:\n  - fd<=1\n  - fx<=1\n", "g.yaml:3:5: rules[1]: character 1: unknown metric 'fx'"),
    ("rules:\n  - {rule: fd<=1, primary: true, alpha: 0.1}\n", "the rule has an alpha of its own"),
    ("rules:\n  - {rule: fd<=1%}\n", "g.yaml:2:12: rules[0].rule: character 5: write +1%"),
    ("rules:\n  - {rule: fd@a-1<=1, rows: [b-1]}\n", "g.yaml:2:12: rules[0].rule: names row a-1, and"),
    (
        "rules:\n  - {rule: fd<=1, primary: true}\n  - {rule: fd<=+1, primary: true}\n",
        "g.yaml:1:1: rules: more than one rule is primary",
    ),
    ("rules: &a []\n", "anchor"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG_FILES, ids=[text for text, _ in WRONG_FILES])
def test_mistakes_in_files_of_rules(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        rules.policy(Path("g.yaml"))
    assert message in str(error.value)


# --- judgements -----------------------------------------------------------------------------------


def check(value: float, error: float, text: str = "fd<=+1", **rule: Any) -> Check:
    """A check of a known change; its row is called by its value."""
    made = replace(rules.parse(text), **rule)
    return Check(made, f"r{value}", Normal(value, 1000, "given", True, error, error))


@pytest.mark.parametrize(
    ("value", "status", "code"),
    [
        (1 + 0.24, "regression", 1),
        (1 + 0.22, "inconclusive", 3),
        (1 - 0.22, "inconclusive", 3),
        (1 - 0.24, "pass", 0),
    ],
)
def test_the_bounds_decide(value: float, status: str, code: int) -> None:
    """At 1 % they lie 2.326 standard errors from the value."""
    found = gating.judge([check(value, 0.1)], Policy(()))
    [outcome] = found.outcomes
    assert (outcome.status, found.exit_code) == (status, code)
    assert outcome.low == pytest.approx(value - 0.1 * stats.norm.isf(0.01))
    assert outcome.high == pytest.approx(value + 0.1 * stats.norm.isf(0.01))
    assert (outcome.needed is None) == (status != "inconclusive")


def by_hand(values: list[float], weights: list[float], alpha: float) -> set[int]:
    """Indices that weighted Holm rejects, from its definition: the least p / w while p <= alpha w / W."""
    left, rejected = set(range(len(values))), set[int]()
    while left:
        p = {i: float(stats.norm.sf((values[i] - 1) / 0.1)) for i in left}
        i = min(left, key=lambda i: p[i] / weights[i])
        if p[i] > alpha * weights[i] / sum(weights[j] for j in left):
            break
        rejected.add(i)
        left.remove(i)
    return rejected


def test_false_alarms_are_shared_by_holms_method() -> None:
    generator = torch.Generator().manual_seed(0)
    decided = 0
    for _ in range(300):
        values = (1 + 0.1 * (1.5 + 1.2 * torch.randn(4, generator=generator))).tolist()
        for primary in (False, True):
            made = [check(value, 0.1, primary=primary and i == 0) for i, value in enumerate(values)]
            weights = [0.5, *[0.5 / 3] * 3] if primary else [1.0] * 4
            expected = by_hand(values, weights, 0.05)
            outcomes = gating.judge(made, Policy((), 0.05)).outcomes
            assert {i for i, each in enumerate(outcomes) if each.status == "regression"} == expected
            decided += 0 < len(expected) < 4
    assert decided > 100


def test_a_rule_with_an_alpha_of_its_own_stands_aside() -> None:
    value = 1 + 0.1 * 2.0  # p = 0.023
    many = [check(value, 0.1), *(check(-i, 0.1) for i in range(5))]
    assert gating.judge(many, Policy((), 0.05)).exit_code == 3
    many[0] = check(value, 0.1, alpha=0.05)
    outcome = gating.judge(many, Policy((), 0.05)).outcomes[0]
    assert (outcome.status, outcome.level) == ("regression", 0.05)


@pytest.mark.parametrize(
    ("statuses", "codes"),
    [
        ("pass", {"fail": 0, "exit-3": 0, "warn": 0}),
        ("pass inconclusive", {"fail": 1, "exit-3": 3, "warn": 0}),
        ("inconclusive regression", {"fail": 1, "exit-3": 1, "warn": 1}),
        ("pass missing", {"fail": 1, "exit-3": 3, "warn": 3}),
    ],
)
def test_exit_codes(statuses: str, codes: dict[str, int]) -> None:
    made = {
        "pass": check(0.0, 0.01),
        "inconclusive": check(1.0, 0.1),
        "regression": check(2.0, 0.1),
        "missing": Check(rules.parse("fd<=+1"), "gone", None, "it was not measured"),
    }
    for then, code in codes.items():
        policy = Policy((), on_inconclusive=then)  # type: ignore[arg-type]
        found = gating.judge([made[status] for status in statuses.split()], policy)
        assert [each.status for each in found.outcomes] == statuses.split()
        assert found.exit_code == code


def test_messages() -> None:
    found = gating.judge(
        [
            check(0.031, 0.004, "endpoint_error<=+2%", alpha=0.025),
            check(0.03, 0.004, "accuracy>=-1%", alpha=0.025),
            check(0.0, 0.0, "fd<=+0.01"),
            check(0.16, 0.002, "fd<=0.15", alpha=0.025),
            check(0.021, 0.004, "kid<=+2%", alpha=0.025),
        ],
        Policy((), 0.025),
    )
    assert [each.message for each in found.outcomes][:4] == [
        "endpoint_error +3.10% [+2.32, +3.88] > +2%",
        "accuracy -3.00% [-3.78, -2.22] < -1%",
        "fd +0 [+0, +0] <= +0.01",
        "fd 0.16 [0.1561, 0.1639] > 0.15",
    ]
    needed = 1000 * ((1.96 + 0.8416) * 0.004 / 0.001) ** 2
    message = found.outcomes[4].message
    assert message.startswith("kid +2.10% [+1.32, +2.88] may or may not be <= +2%; about ")
    assert int(re.sub(r".*about ([\d,]+) .*", r"\1", message).replace(",", "")) == pytest.approx(
        needed, rel=1e-3
    )


# --- tests from evaluations -----------------------------------------------------------------------


def noise(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()


def folders(tmp_path: Path, factor: float, n: int = 2048) -> tuple[Path, Path]:
    """Baseline, and an evaluation whose errors are so much greater on the average."""
    a = small.errors(n)
    b = a * (1 + 0.1 * noise(n))
    base = small.write(tmp_path / "base", {"s-4": {"endpoint_error": a}})
    return base, small.write(
        tmp_path / f"x{factor}", {"s-4": {"endpoint_error": b * factor * a.mean() / b.mean()}}
    )


def judge(evaluation: Path, base: Path | None, *texts: str, **how: Any) -> Judgement:
    policy = rules.policy(texts=texts)
    opened = None if base is None else Evaluation.open(base)
    return gating.judge(gating.checks(policy, Evaluation.open(evaluation), opened, **how), policy)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (0.9, 0), (1.02, 1), (1.01, 3)])
def test_the_default_rule_with_2048_samples(factor: float, code: int, tmp_path: Path) -> None:
    base, new = folders(tmp_path, factor)
    assert judge(new, base).exit_code == code


def test_an_evaluation_passes_against_itself(tmp_path: Path) -> None:
    base, _ = folders(tmp_path, 1.0, n=64)
    [outcome] = judge(base, base, "endpoint_error<=+0%").outcomes
    assert (outcome.status, outcome.low, outcome.high) == ("pass", 0.0, 0.0)


def test_rows_that_are_gone_are_not_passed_over(tmp_path: Path) -> None:
    values = {"endpoint_error": small.errors(64)}
    base = small.write(tmp_path / "base", {"t-1": values, "s-4": values})
    new = small.write(tmp_path / "new", {"t-1": values})
    found = judge(new, base)
    assert {each.check.row: each.status for each in found.outcomes} == {"t-1": "pass", "s-4": "missing"}
    assert found.exit_code == 3
    assert judge(base, new).exit_code == 0, "a new row has no baseline to be worse than"
    assert judge(new, base, "endpoint_error@t-1<=+1%").exit_code == 0
    assert (
        judge(base, new, "endpoint_error@s-4<=+1%")
        .outcomes[0]
        .message.endswith("the baseline has no such row, nor one that is sampled like it")
    )
    assert judge(new, base, "fd<=+1%").outcomes[0].status == "missing"
    with pytest.raises(UsageError, match="unknown row 's-5', did you mean 's-4'"):
        judge(new, base, "endpoint_error@s-5<=+1%")
    with pytest.raises(UsageError, match="two rules are the same"):
        judge(base, base, "endpoint<=+1%", "endpoint_error<=+1%")


def test_a_row_that_is_gone_is_not_taken_for_one_of_another_model(tmp_path: Path) -> None:
    values = small.errors(300)
    base = small.write(
        tmp_path / "base", {f"{name}-{k}": {"endpoint_error": values} for name in ("t", "s") for k in (1, 8)}
    )
    new = small.write(
        tmp_path / "new", {name: {"endpoint_error": 0.5 * values} for name in ("t-1", "t-8", "t-2", "s-8")}
    )
    found = judge(new, base, "endpoint_error<=+1%")
    assert {each.check.row: each.status for each in found.outcomes} == {
        "t-1": "pass", "t-8": "pass", "s-8": "pass", "s-1": "missing"
    }  # fmt: skip
    assert found.exit_code == 3


def test_a_cap_does_not_pass_over_what_was_skipped(tmp_path: Path) -> None:
    folder = small.write(
        tmp_path / "a", {"t-1": {"inversion": small.errors(300)}, "t-8": {"psnr": noise(300)}}
    )
    content = artifact.load_json(folder / "eval.json")
    content["rows"][1]["skipped"]["inversion"] = "it is not finite"
    artifact.save_json(folder / "eval.json", content)
    found = judge(folder, None, "inversion<=10")
    assert [each.status for each in found.outcomes] == ["pass", "missing"] and found.exit_code == 3


@pytest.mark.parametrize("changed, message", [
    ({"models": {"x": {"digest": "1"}}}, "row t-1 is of 't', which is not among its models"),
    ({"rows": 2}, "two rows have the same id"),
])  # fmt: skip
def test_an_evaluation_that_does_not_hang_together(changed: Any, message: str, tmp_path: Path) -> None:
    folder = small.write(tmp_path / "a", {"t-1": {"psnr": noise(300)}})
    content = artifact.load_json(folder / "eval.json")
    changed = {"rows": content["rows"] * changed["rows"]} if "rows" in changed else changed
    artifact.save_json(folder / "eval.json", {**content, **changed})
    with pytest.raises(ArtifactError, match=message):
        Evaluation.open(folder)


def test_what_is_let_fail_is_no_regression(tmp_path: Path) -> None:
    values = small.errors(300)
    shaken = values * (1 + 0.1 * noise(300).double())
    base, new = (
        small.write(tmp_path / n, {"t-1": {"endpoint_error": v}}) for n, v in (("a", values), ("b", shaken))
    )
    rule = rules.parse("endpoint_error<=+0.1%")
    found = gating.judge(
        gating.checks(Policy((rule,)), Evaluation.open(new), Evaluation.open(base)),
        Policy((rule,), on_inconclusive="fail"),
    )
    assert (found.outcomes[0].status, found.exit_code, found.verdict) == ("inconclusive", 1, "failed")


def test_caps_need_no_baseline(tmp_path: Path) -> None:
    right = (torch.arange(1000) % 20 != 0).double()
    rows = {"s-4": {"endpoint_error": small.errors(1000), "correct": right}}
    new = small.write(tmp_path / "new", rows, models={"s": {"curvature": 0.2}})
    for text, code in [
        ("endpoint_error<=0.08", 0),
        ("endpoint_error<=0.06", 1),
        ("accuracy>=0.9", 0),
        ("accuracy>=0.99", 1),
        ("accuracy>=0.95", 3),
        ("curvature@s<=0.3", 0),
        ("latency<=10", 3),
    ]:
        assert judge(new, None, text).exit_code == code, text
    with pytest.raises(UsageError, match="compares with a baseline; give one with --baseline"):
        judge(new, None)


def test_more_is_better(tmp_path: Path) -> None:
    n = 2500
    right = torch.arange(n) % 20 != 0
    base = small.write(tmp_path / "base", {"s-4": {"correct": right.double()}})
    new = small.write(tmp_path / "new", {"s-4": {"correct": (right & (torch.arange(n) % 33 != 0)).double()}})
    [outcome] = judge(new, base, "accuracy>=-1%").outcomes
    assert outcome.status == "regression" and outcome.message.startswith("accuracy -3.0")
    assert judge(base, new, "accuracy>=-1%").exit_code == 0


def test_latency_is_no_surer_than_the_spread_of_its_runs(tmp_path: Path) -> None:
    rows = {"s-4": {"endpoint_error": small.errors(64)}}

    def timed(name: str, p50: float, p95: float) -> Path:
        times = {"s-4": {"p50_ms": p50, "p95_ms": p95, "runs": 50}}
        return small.write(tmp_path / name, rows, latency=times)

    base, same, slow, much = (
        timed("a", 10, 10.5), timed("b", 10.1, 10.6), timed("c", 12, 13), timed("d", 15, 15.5)
    )  # fmt: skip
    found = [judge(each, base, "latency<=+20%").outcomes[0] for each in (same, slow, much)]
    assert [each.status for each in found] == ["pass", "inconclusive", "regression"]
    assert all(each.message.endswith("(unpaired)") for each in found)
    assert found[1].needed is None, "more samples are no help"


def test_per_cent_of_nothing(tmp_path: Path) -> None:
    rows = {"s-4": {"kid.influence": noise(300)}}
    base = small.write(tmp_path / "base", rows, {"s-4": {"kid": -0.001}})
    [outcome] = judge(base, base, "kid<=+2%").outcomes
    assert (outcome.status, outcome.message) == (
        "missing",
        "kid: the baseline is -0.001, of which there are no per cent",
    )
    assert judge(base, base, "kid<=+0.001").exit_code == 0


def test_evaluations_that_cannot_be_paired(tmp_path: Path) -> None:
    rows = {"s-4": {"endpoint_error": small.errors(512)}}
    base = small.write(tmp_path / "base", rows)
    other = small.write(tmp_path / "other", rows, seed=1)
    with pytest.raises(ArtifactError, match="they differ in: seed 0 and 1"):
        judge(other, base)
    [outcome] = judge(other, base, "endpoint_error<=+10%", paired=False).outcomes
    assert outcome.status == "pass" and outcome.message.endswith("(unpaired)")
    assert judge(other, base, "endpoint_error<=+1%", paired=False).exit_code == 3


# --- what other machines read ---------------------------------------------------------------------

HOSTILE = 'a|b<c> & "d" \x07\x00 %0A,:\n`x`]]>'


def judged() -> Judgement:
    hostile = replace(check(2.0, 0.1), row=HOSTILE)
    gone = Check(rules.parse("kid<=1"), "any row", None, "no row has it (no weights)")
    return gating.judge([check(0.0, 0.01), hostile, check(1.0, 0.1), gone], Policy(()))


def test_junit_is_xml_with_a_case_for_each_test() -> None:
    found = judged()
    text = announcing.junit(found)
    root = ElementTree.fromstring(text)
    [suite] = root
    cases = suite.findall("testcase")
    assert len({case.get("name") for case in cases}) == len(cases) == 4
    assert {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "1",
    }  # fmt: skip
    tags = [[child.tag for child in case] for case in cases]
    assert tags == [["system-out"], ["failure"], ["skipped"], ["error"]]
    failure = cases[1].find("failure")
    assert failure is not None and failure.get("message") == found.outcomes[1].message
    assert 'a|b<c> & "d" ?? %0A' in (cases[1].get("name") or "")
    strict = Judgement(replace(found.policy, on_inconclusive="fail"), found.outcomes)
    assert ElementTree.fromstring(announcing.junit(strict)).get("failures") == "2"


def test_markdown_has_a_row_for_each_test() -> None:
    lines = announcing.markdown(judged()).splitlines()
    assert lines[0] == "### flowdistill gate: regression: 4 checks, 1 regression, 1 inconclusive, 1 missing"
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 6
    for line in table:
        assert len(re.findall(r"(?<!\\)\|", line)) == 5, "bars in text do not make cells"
    assert "<c>" not in table[3]


def test_workflow_commands_are_escaped() -> None:
    lines = announcing.workflow_commands(judged())
    assert [line.split()[0] for line in lines] == ["::error", "::warning", "::warning"]
    for line in lines:
        assert "\n" not in line and re.fullmatch(r"::(error|warning) title=[^,:]*::.*", line)
    assert "%250A%2C%3A%0A" in lines[0]
    percent = gating.judge([check(0.05, 0.001, "fd<=+1%")], Policy(()))
    [line] = announcing.workflow_commands(percent)
    assert line.endswith("::fd +5.00%25 [+4.77, +5.23] > +1%25")


# --- rehearsal ------------------------------------------------------------------------------------


def rehearse(base: Path, new: Path, runs: int, alpha: float, *texts: str) -> rehearsing.Rehearsal:
    policy = replace(rules.policy(texts=texts), alpha=alpha)
    checks = gating.checks(policy, Evaluation.open(new), Evaluation.open(base))
    return rehearsing.rehearse(checks, policy, runs)


def test_false_alarms_come_as_often_as_alpha_says(tmp_path: Path) -> None:
    """Without a margin, where they are most frequent; and never with one of many standard errors."""
    base, new = folders(tmp_path, 1.0, n=2100)
    found = rehearse(base, new, 600, 0.1, "endpoint_error<=+0%")
    assert found.false_alarms.value == pytest.approx(0.1, abs=0.035)
    assert (found.same, list(found.left_out)) == (False, [])
    worse = rehearse(*folders(tmp_path, 1.2, n=2100), 300, 0.1, "endpoint_error<=+0%")
    assert worse.false_alarms.value == pytest.approx(0.1, abs=0.04), "what is truly worse is swapped, too"
    calm = rehearse(base, new, 100, 0.1, "endpoint_error<=+5%")
    assert (calm.false_alarms.value, calm.inconclusive.value) == (0.0, 0.0)


def test_power_is_that_of_the_normal_distribution(tmp_path: Path) -> None:
    base, new = folders(tmp_path, 1.0, n=2100)
    rule = "endpoint_error<=+1%"
    [made] = gating.checks(rules.policy(texts=[rule]), Evaluation.open(new), Evaluation.open(base))
    assert made.change is not None
    error = (made.change.value - made.change.low(0.05)) / stats.norm.isf(0.05)
    [power] = rehearse(base, new, 600, 0.05, rule).powers
    for regression, share in power.caught.items():
        expected = stats.norm.sf(stats.norm.isf(0.05) - (regression - 0.01) / error)
        assert share == pytest.approx(expected, abs=0.06)
    assert power.smallest == pytest.approx(0.01 + 2 * stats.norm.isf(0.05) * error, rel=0.06)


def test_evaluations_that_are_the_same_have_no_noise(tmp_path: Path) -> None:
    base, _ = folders(tmp_path, 1.0, n=64)
    assert rehearse(base, base, 5, 0.01).same
    lone = small.write(tmp_path / "lone", {"s-4": {"endpoint_error": small.errors(64)}})
    with pytest.raises(UsageError, match="nothing to rehearse"):
        rehearse(lone, lone, 5, 0.01, "endpoint_error<=1")


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flowdistill", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


RECIPE = """
teacher: analytic:ring
stages:
  - eval:
      models: [teacher, ./MODEL/student.safetensors]
      samples: 512
      reference: {steps: 8, samples: 512}
      nfe: {teacher: [1], ./MODEL/student.safetensors: [2]}
      straightness: 0
      latency: false
"""


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evaluations of a student, of it again with rounded weights, and of it with noise on its weights."""
    from flowdistill.teachers import Card, open_model

    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("train.yaml").write_text(
            "teacher: analytic:ring\nstages:\n"
            "  - pairs: {count: 512, solver: heun, steps: 4, batch_size: 256, shard_size: 256}\n"
            "  - reflow: {steps: 300, batch_size: 128, network: {name: mlp, width: 64, depth: 2}, "
            "loss: {name: squared-l2}, optimizer: {name: adam, lr: 3.0e-3}}\n"
        )
        assert execute(["run", "train.yaml", "-q"]) == 0
        model = open_model("runs/train/reflow")
        weights = {name: value.clone() for name, value in model.weights.state_dict().items()}
        card = Card.model_validate(model.card.model_dump(exclude_unset=True))
        generator = torch.Generator().manual_seed(0)
        for name, scale in (("base", 0.0), ("good", 1e-4), ("damaged", 0.1)):
            Path(name).mkdir()
            noisy = {
                key: value + scale * value.std() * torch.randn(value.shape, generator=generator)
                for key, value in weights.items()
            }
            card.write(Path(name, "student.safetensors"), noisy)
            Path(f"{name}.yaml").write_text(RECIPE.replace("MODEL", name))
            assert execute(["eval", f"{name}.yaml", "-q", "--out", f"runs/{name}"]) == 0
    return folder


def test_a_good_student_passes_and_a_damaged_one_fails(evaluated: Path, tmp_path: Path) -> None:
    base = evaluated / "runs" / "base" / "eval"
    files = ("--junit", tmp_path / "gate.xml", "--markdown", tmp_path / "gate.md", "--annotate")
    good = run("gate", evaluated / "runs" / "good" / "eval", "--baseline", base, *files)
    assert (good.returncode, good.stderr) == (0, "")
    assert "passed: 2 checks" in good.stdout and "::error" not in good.stdout
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "0"
    damaged = run("gate", evaluated / "runs" / "damaged" / "eval", "--baseline", base, *files)
    assert damaged.returncode == 1, damaged.stdout + damaged.stderr
    root = ElementTree.parse(tmp_path / "gate.xml").getroot()
    cases = {case.get("name"): [child.tag for child in case] for case in root.iter("testcase")}
    assert cases == {
        "endpoint_error<=+1% (teacher-1)": ["system-out"],
        "endpoint_error<=+1% (student-2)": ["failure"],
    }
    [message] = [failure.get("message") or "" for failure in root.iter("failure")]
    assert re.fullmatch(r"endpoint_error \+[\d.]+% \[\+[\d.]+, \+[\d.]+\] > \+1%", message)
    summary = (tmp_path / "gate.md").read_text("utf-8")
    assert f"| ❌ regression | student-2 | `endpoint_error<=+1%` | {message} |" in summary
    errors = [line for line in damaged.stdout.splitlines() if line.startswith("::error ")]
    assert errors == [f"::error title=gate%2C student-2::{message.replace('%', '%25')}"]


def test_documents_of_the_gate(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["gate", str(evaluated / "runs/damaged/eval"), "--baseline", str(evaluated / "runs/base/eval")]
    assert execute([*command, "--json", "--annotate"]) == 1
    streams = capsys.readouterr()
    document = json.loads(streams.out)
    assert (document["verdict"], document["exit_code"], document["alpha"]) == ("regression", 1, 0.01)
    assert streams.err.startswith("::error title=gate"), "stdout is one document"
    failed = next(each for each in document["checks"] if each["status"] == "regression")
    assert failed["bound"] == 0.01 < failed["low"] < failed["value"] < failed["high"]
    assert failed["paired"] and failed["n"] == 512
    assert execute([*command, "--rehearse", "30", "--json"]) == 0
    rehearsal = json.loads(capsys.readouterr().out)
    assert rehearsal["runs"] == 30 and 0 <= rehearsal["false_alarms"]["value"] < 0.2
    assert execute([*command, "--rehearse", "30", "--rule", "endpoint<=+1%", "--rule", "fd<=1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^false alarms: \d+ of 30 A/A gates, [\d.]+ % \[[\d.]+, [\d.]+\]$", out, re.MULTILINE)
    assert "left out, for it has no pairs of samples: fd<=1 (student-2)" in out


def test_bad_input(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = str(evaluated / "runs/base/eval")
    artifact.save_json(tmp_path / "other.json", {"kind": "schedule"})
    (tmp_path / "bad.yaml").write_text("rules: [fx<=1]\n")
    bad = [
        ([base], 2, "compares with a baseline; give one with --baseline"),
        ([base, "--baseline", str(tmp_path / "other.json")], 4, "expected an evaluation, found 'schedule'"),
        ([base, "--baseline", str(tmp_path / "none")], 3, "no such file"),
        ([base, "--baseline", base, "--rule", "endpont<=+2%"], 2, "did you mean 'endpoint_error'"),
        ([base, "--baseline", base, "--rules", str(tmp_path / "bad.yaml")], 2, "bad.yaml:1:9: rules[0]:"),
        ([base, "--baseline", base, "--rules", str(tmp_path / "none.yaml")], 3, "no such file"),
        ([base, "--baseline", base, "--junit", str(tmp_path / "no" / "x.xml")], 2, "no such folder"),
        ([base, "--baseline", base, "--rehearse", "3", "--junit", "x.xml"], 2, "--rehearse judges nothing"),
    ]  # fmt: skip
    for arguments, code, message in bad:
        found = execute(["gate", *arguments])
        streams = capsys.readouterr()
        assert (found, streams.out) == (code, "") and message in streams.err, streams
        assert len(streams.err.splitlines()) <= 3


# --- what is shown --------------------------------------------------------------------------------


def parse(command: list[str]) -> None:
    """Fail where a command of ours would be refused for its name or options."""
    group: Any = typer.main.get_command(application())
    _, name, *arguments = command
    group.commands[name].make_context(name, list(arguments), obj=Invocation(arguments))


def test_the_page_shows_what_works(tmp_path: Path) -> None:
    """Its commands are commands, its recipe is a recipe, its rules are rules."""
    page = (ROOT / "docs" / "gates.md").read_text("utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    lines = [line for kind, text in blocks if kind == "sh" for line in text.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("flowdistill ")]
    assert len(commands) >= 5
    for command in commands:
        parse(command)
    recipe, file = (text for kind, text in blocks if kind == "yaml")
    (tmp_path / "gate.yaml").write_text(recipe)
    assert execute(["validate", str(tmp_path / "gate.yaml")]) == 0
    (tmp_path / "gates.yaml").write_text(file)
    assert len(rules.policy(tmp_path / "gates.yaml").rules) == 4
    table = re.findall(r"^\| `([^`]*[<>]=[^`]*)` \|", page, re.MULTILINE)
    assert len([rules.parse(text) for text in table]) == 6


def test_the_workflow_only_calls_commands_that_exist() -> None:
    path = ROOT / "docs" / "gate-workflow.yml"
    node, problems = read_file(path.read_bytes(), path.name)
    assert problems == []
    [job] = node.plain()["jobs"].values()
    scripts = [step["run"] for step in job["steps"] if "run" in step]
    lines = [line.strip() for script in scripts for line in script.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("flowdistill ")]
    assert {command[1] for command in commands} >= {"eval", "gate"}
    for command in commands:
        parse(command)
    used = {step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step}
    assert used >= {"actions/checkout", "actions/setup-python", "actions/upload-artifact"}
    assert any("GITHUB_STEP_SUMMARY" in line for line in lines)


def test_the_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gate.py"), "--quick"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| times")]
    assert [row[3][:5] for row in rows] == ["0.0 %", "0.0 %"] or float(rows[1][3].split()[0]) < 12
    assert rows[0][6].startswith("100.0 %"), "2 % worse is caught"
