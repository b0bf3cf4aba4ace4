"""Comparisons of evaluations: against closed forms, brute force, and what the real command measured."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import small_evaluations as small
import torch
from scipy import stats
from torch import Tensor

from flowdistill.cli import execute
from flowdistill.comparison import comparing, verdicts
from flowdistill.comparison.comparing import Normal
from flowdistill.comparison.joining import Evaluation, join
from flowdistill.errors import ArtifactError, UsageError
from flowdistill.evaluation import metrics


def normals(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(value: float, error: float, n: int = 1000) -> Normal:
    return Normal(value, n, "given", True, error, error)


# --- bounds ---------------------------------------------------------------------------------------


def test_bounds_of_many_samples_are_the_normal_ones() -> None:
    terms = normals(2500) + 0.1
    change = comparing.mean_change(terms)
    for alpha in (0.05, 0.001):
        reach = stats.norm.isf(alpha) * float(terms.std()) / 50
        assert change.low(alpha) == pytest.approx(change.value - reach)
        assert change.high(alpha) == pytest.approx(change.value + reach)
        assert change.p_above(change.low(alpha)) == pytest.approx(alpha)


def test_bounds_of_few_samples_are_those_of_the_shared_interval() -> None:
    """`metrics.paired_difference` at 95 %, but for the widening of few samples and the resamples' noise."""
    a, b = normals(400, seed=1).exp(), normals(400, seed=2).exp()
    change, shared = comparing.paired_change(a, b, relative=False), metrics.paired_difference(b, a)
    width = shared.high - shared.low
    assert change.value == pytest.approx(shared.value) and change.n == shared.n
    assert change.low(0.025) == pytest.approx(shared.low, abs=0.03 * width)
    assert change.high(0.025) == pytest.approx(shared.high, abs=0.03 * width)


@pytest.mark.parametrize("n", [30, 60, 700])
def test_p_values_and_bounds_say_the_same(n: int) -> None:
    change = comparing.mean_change(normals(n).exp())
    for alpha in (0.3, 0.05, 0.01):
        assert change.p_above(change.low(alpha)) == pytest.approx(alpha, rel=0.03)
        assert change.reversed().p_above(-change.high(alpha)) == pytest.approx(alpha, rel=0.03)
    assert change.reversed().low(0.05) == pytest.approx(-change.high(0.05), abs=1e-3)


def test_far_levels_go_beyond_the_resamples() -> None:
    change = comparing.mean_change(normals(300))
    lows = [change.low(alpha) for alpha in (1e-2, 1e-3, 1e-4, 1e-6)]
    assert lows == sorted(lows, reverse=True)
    assert lows[-1] == pytest.approx(change.value - stats.t.isf(1e-6, 299) * 300**-0.5, abs=0.02)


@pytest.mark.parametrize("n", [8, 30, 200])
def test_levels_are_widened_by_students_t(n: int) -> None:
    for z in (-3.0, -1.0, 0.5, 2.3):
        wide = comparing._widened(z, n)
        t = stats.t.ppf(stats.norm.cdf(z), n - 1) * math.sqrt(n / (n - 1))
        assert wide == pytest.approx(t, rel=0.01)
        assert comparing._narrowed(wide, n) == pytest.approx(z)


def test_a_bound_of_30_skewed_samples_is_wrong_as_often_as_it_says() -> None:
    """Lower bounds at 5 % of exponential values, whose mean is 1."""
    draws = torch.empty(600, 30, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(3))
    above = sum(comparing.mean_change(row).low(0.05) > 1 for row in draws)
    below = sum(comparing.mean_change(row).high(0.05) < 1 for row in draws)
    assert 12 <= above <= 54 and 12 <= below <= 60


def test_equal_values_have_no_width() -> None:
    a = small.errors(300)
    for relative in (False, True):
        change = comparing.paired_change(a, a.clone(), relative)
        assert (change.value, change.low(0.01), change.high(0.01)) == (0.0, 0.0, 0.0)
        assert change.paired and change.p_above(0.0) == 1.0


def share(n: int, more: int, fewer: int) -> comparing.Change:
    """Of n pairs `more` are so in the second alone, and `fewer` in the first alone."""
    a, b = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    b[:more], a[more : more + fewer] = True, True
    return comparing.paired_change(a, b, relative=False)


def test_bounds_of_shares_solve_the_score_equation() -> None:
    """Tango (1998), written out here and solved by a root finder."""
    from scipy.optimize import brentq

    n, more, fewer, z = 44, 1, 4, 1.959963984540054

    def score(d: float) -> float:
        b = -more - fewer + (2 * n - more + fewer) * d
        q = (math.sqrt(b * b - 8 * n * (-fewer * d * (1 - d))) - b) / (4 * n)
        return float((more - fewer - n * d) / math.sqrt(n * (2 * q + d * (1 - d))))

    change = share(n, more, fewer)
    assert change.value == pytest.approx(-3 / 44)
    assert change.low(0.025) == pytest.approx(brentq(lambda d: score(d) - z, -0.9, -3 / 44), abs=1e-9)
    assert change.high(0.025) == pytest.approx(brentq(lambda d: score(d) + z, -3 / 44, 0.9), abs=1e-9)
    assert change.p_above(0.0) == pytest.approx(stats.norm.sf(score(1e-12)), abs=1e-6)
    back = change.reversed()
    assert (back.value, back.low(0.1)) == pytest.approx((-change.value, -change.high(0.1)))


def test_no_pair_that_differs_is_no_proof() -> None:
    z = stats.norm.isf(0.01)
    change = share(200, 0, 0)
    assert change.value == 0.0
    assert change.high(0.01) == pytest.approx(z * z / (200 + z * z)) == -change.low(0.01)
    assert change.high(0.01) > -math.log(0.01) / 200  # the exact bound of a share of which none is seen


@pytest.mark.parametrize("n, differ", [(300, 0.01), (300, 0.02), (500, 0.02)])
def test_shares_of_which_few_differ_raise_few_false_alarms(n: int, differ: float) -> None:
    generator = torch.Generator().manual_seed(3)
    alarms, passes, runs = 0, 0, 2000
    for counts in torch.rand(runs, n, 2, generator=generator):
        apart, sign = counts[:, 0] < differ, counts[:, 1] < 0.5
        change = share(n, int((apart & sign).sum()), int((apart & ~sign).sum()))
        alarms += change.low(0.01) > 0
        worse = share(n, int(apart.sum()), 0)  # truly worse by just the margin
        passes += worse.high(0.01) <= differ
    assert stats.binom.sf(alarms - 1, runs, 0.013) > 1e-3
    assert stats.binom.sf(passes - 1, runs, 0.02) > 1e-3


def test_equal_resamples_are_counted_as_equal() -> None:
    """One value of 300 that differs: a third of all resamples leave it out, and their mean is 0."""
    terms = torch.zeros(300, dtype=torch.float64)
    terms[7] = 0.3
    change = comparing.mean_change(terms)
    assert change.low(0.01) <= 0 < change.high(0.01)
    assert change.p_above(0.0) > 0.1


def test_a_relative_change_is_that_of_the_ratio() -> None:
    """10 % more of everything is 10 % exactly; else the error is that of many ratios of fresh samples."""
    a = small.errors(3000)
    change = comparing.paired_change(a, 1.1 * a, relative=True)
    assert change.value == pytest.approx(0.1) and change.high(0.01) - change.low(0.01) < 1e-12
    noise = 1 + 0.3 * normals(400, 2500, seed=5)
    many = (noise * small.errors(400 * 2500, 7).reshape(400, 2500)).mean(1)
    many = many / small.errors(400 * 2500, 7).reshape(400, 2500).mean(1) - 1
    change = comparing.paired_change(a[:2500], a[:2500] * noise[0], relative=True)
    error = (change.high(0.025) - change.low(0.025)) / (2 * 1.96)
    assert error == pytest.approx(float(many.std()), rel=0.12)


def test_unpaired_errors_add_up() -> None:
    a, b = normal(2.0, 0.3), normal(3.0, 0.4)
    change = comparing.unpaired_change(a, b, relative=False)
    assert change.value == 1.0 and not change.paired
    assert change.low(0.05) == pytest.approx(1 - 0.5 * stats.norm.isf(0.05))
    ratio = comparing.unpaired_change(a, b, relative=True)
    error = 1.5 * math.hypot(0.3 / 2, 0.4 / 3)
    assert ratio.value == 0.5 and ratio.high(0.05) == pytest.approx(0.5 + error * stats.norm.isf(0.05))


# --- metrics that are no means --------------------------------------------------------------------


def features(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """Features [n, 8] of two models that share their noises."""
    eps, mixing = normals(n, 8, seed=seed), torch.eye(8).double() + 0.2 * normals(8, 8, seed=99).triu()
    return eps @ mixing + 0.3, (eps @ mixing + 0.1 * eps**2) * 1.05 + 0.33


def test_influences_replace_a_bootstrap_over_shared_indices() -> None:
    """The spread of such a bootstrap, and of fresh samples; the bootstrap is off by its second bias."""
    n, reference = 500, metrics.Reference(torch.zeros(8), torch.eye(8))
    a, b = features(0, n)
    (first, of_a), (second, of_b) = reference.measure(a), reference.measure(b)
    change = comparing.paired_change(first.value + of_a, second.value + of_b, relative=False)
    assert change.value == pytest.approx(second.value - first.value)
    error = (change.high(0.025) - change.low(0.025)) / (2 * 1.96)

    def distance(x: Tensor) -> float:
        return reference.distance(*metrics.moments(x))

    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(n, (n,), generator=generator) for _ in range(400)]
    resampled = torch.tensor([[distance(a[i]), distance(b[i])] for i in drawn], dtype=torch.float64)
    difference = resampled[:, 1] - resampled[:, 0]
    assert error == pytest.approx(float(difference.std()), rel=0.12)
    fresh = [features(seed, n) for seed in range(1, 401)]
    truth = torch.tensor([distance(y) - distance(x) for x, y in fresh], dtype=torch.float64)
    assert error == pytest.approx(float(truth.std()), rel=0.15)
    shift = resampled.mean(0) - torch.tensor([first.value, second.value]).double()
    assert (shift > 3 * resampled.std(0) / 20).all(), "the bootstrap's means lie above what they resample"
    apart = comparing.unpaired_change(
        *(
            Normal(x.value, n, "", False, *[float(i.std()) / n**0.5] * 2)
            for x, i in ((first, of_a), (second, of_b))
        ),
        relative=False,
    )
    assert change.high(0.025) - change.low(0.025) < 0.7 * (apart.high(0.025) - apart.low(0.025))


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_influences_of_quantiles(level: float) -> None:
    """The error of log-normal quantiles in closed form, sqrt(p (1 - p) / n) / f(q)."""
    n = 4000
    found = comparing.quantile_values(normals(n).exp(), level)
    q = math.exp(stats.norm.ppf(level))
    assert float(found.mean()) == pytest.approx(q, rel=0.06)
    exact = math.sqrt(level * (1 - level)) / float(stats.lognorm.pdf(q, 1))
    assert float(found.std()) == pytest.approx(exact, rel=0.2)


# --- p-values and verdicts ------------------------------------------------------------------------


def test_sign_flips_against_all_of_them() -> None:
    a, b = normals(11, seed=1), normals(11, seed=2) + 0.8
    d = b - a
    flips = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=11)), dtype=torch.float64)
    exact = float(((flips @ d).abs() >= abs(float(d.sum())) - 1e-12).double().mean())
    assert comparing.sign_flip_p(a, b) == pytest.approx(exact, abs=0.006)
    assert comparing.sign_flip_p(a, a) == 1.0


def test_sign_flips_of_many_samples_are_normal() -> None:
    a, b = normals(2100, seed=3), normals(2100, seed=4) + 0.05
    expected = stats.ttest_rel(a, b).pvalue
    assert comparing.sign_flip_p(a, b) == pytest.approx(expected, rel=0.05)
    assert comparing.sign_flip_p(a[:1999], b[:1999]) == pytest.approx(
        stats.ttest_rel(a[:1999], b[:1999]).pvalue, abs=0.02
    )


def test_holm() -> None:
    assert comparing.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert comparing.holm([]) == [] and comparing.holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "error", "less_is_better", "more_is_better"),
    [
        (0.05, 0.01, "worse", "better"),
        (-0.05, 0.01, "better", "worse"),
        (0.005, 0.002, "equivalent", "equivalent"),
        (0.0, 0.0, "equivalent", "equivalent"),
        (0.01, 0.004, "inconclusive", "inconclusive"),
        (0.0, 0.1, "inconclusive", "inconclusive"),
    ],
)
def test_verdicts(value: float, error: float, less_is_better: str, more_is_better: str) -> None:
    change = normal(value, error)
    assert comparing.verdict(change, -1, 0.01) == less_is_better
    assert comparing.verdict(change, 1, 0.01) == more_is_better


def test_with_the_samples_that_are_needed_four_in_five_are_settled() -> None:
    n, deviation, alpha = 100, 1.0, 0.025
    change = normal(0.03, deviation / n**0.5, n)
    needed = change.needed(0.01, alpha)
    assert needed is not None and needed > n
    error = deviation / needed**0.5
    lows = 0.03 + error * normals(20_000) - stats.norm.isf(alpha) * error
    assert float((lows > 0.01).double().mean()) == pytest.approx(0.8, abs=0.01)
    assert normal(0.01, 0.1).needed(0.01, alpha) is None, "no number of samples tells equal numbers apart"


# --- two evaluations ------------------------------------------------------------------------------


def pair(tmp_path: Path, factor: float = 1.05, n: int = 600, **changed: Any) -> tuple[Path, Path]:
    """Two evaluations of a student, the second with so much greater errors."""
    a = small.errors(n)
    b = a * (factor + 0.1 * normals(n, seed=9))
    old = small.write(tmp_path / "old", {"student-4": {"endpoint_error": a}})
    return old, small.write(tmp_path / "new", {"student-4": {"endpoint_error": b}}, **changed)


def compare(a: Path, b: Path, **how: Any) -> verdicts.Comparison:
    return verdicts.compare(Evaluation.open(a), Evaluation.open(b), **how)


def test_samples_are_joined_by_their_noise(tmp_path: Path) -> None:
    a, b = small.errors(500), small.errors(500) * 1.03
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    old = small.write(tmp_path / "old", {"s-4": {"endpoint_error": a}})
    new = small.write(tmp_path / "new", {"s-4": {"endpoint_error": b[order]}}, index=order)
    [line] = compare(old, new).lines
    assert line.relative is not None and line.relative.high(0.01) - line.relative.low(0.01) < 1e-9
    assert line.verdict == "worse" and line.change.paired
    assert line.p == pytest.approx(1e-4, rel=0.01), "10,000 flips can show no less"


def test_each_metric_has_its_verdict(tmp_path: Path) -> None:
    n = 3000
    a, noise = small.errors(n), normals(n, seed=2)
    right = torch.arange(n) % 10 != 0
    rows = {"endpoint_error": a, "correct": right, "fd.influence": noise * 0.1}
    other = {
        "endpoint_error": a * (1 + 0.01 * noise),
        "correct": right & (torch.arange(n) % 11 != 0),
        "fd.influence": noise * 0.1 + 0.001 * normals(n, seed=3),
    }
    told = {"fd": 0.5, "lpips": 0.2, "endpoint_error_median": float(a.median())}
    models = {"student": {"curvature": 0.2}}
    old = small.write(tmp_path / "old", {"student-4": rows}, {"student-4": told}, models)
    moved = {**told, "fd": 0.45, "lpips": 0.21}
    new = small.write(tmp_path / "new", {"student-4": other}, {"student-4": moved}, models)
    found = {line.kind: line for line in compare(old, new).lines}
    assert {kind: line.verdict for kind, line in found.items()} == {
        "endpoint_error": "equivalent",
        "accuracy": "worse",
        "fd": "better",
        "lpips": "inconclusive (unpaired)",
        "endpoint_error_median": "equivalent",
        "curvature": "equivalent",
    }
    error = math.hypot(0.02 * 0.2, 0.02 * 0.21)
    change = found["lpips"].change
    assert change.high(0.025) - change.value == pytest.approx(1.96 * error, rel=1e-3)
    error = 0.001 * float(normals(n, seed=3).std()) / n**0.5
    assert found["fd"].change.high(0.025) == pytest.approx(-0.05 + 1.96 * error, rel=1e-4), (
        "what is shared cancels"
    )
    p = found["accuracy"].p
    assert p is not None and p < 1e-6, "lost 245 of 2,700 and won none"
    assert all(line.p is not None and line.p <= 1 for line in found.values())


def test_rows_are_joined_by_id_then_by_how_they_are_sampled(tmp_path: Path) -> None:
    values = {"endpoint_error": small.errors(50)}
    a = Evaluation.open(small.write(tmp_path / "a", {"t-1": values, "old-2": values, "old-4": values}))
    b = Evaluation.open(small.write(tmp_path / "b", {"t-1": values, "new-4": values, "new-8": values}))
    joined = join(a, b)
    titles = [pair.title for pair in joined.pairs if pair.a.id in a.rows]
    assert titles == ["t-1", "old-4 → new-4"]
    assert (joined.only_a, joined.only_b) == (("old-2",), ("new-8",))
    chosen = join(a, b, ["old-2=new-8", "t-1"])
    assert [pair.title for pair in chosen.pairs][:2] == ["old-2 → new-8", "t-1"]
    with pytest.raises(UsageError, match="unknown row 'old-3', did you mean 'old-4'"):
        join(a, b, ["old-3=new-4"])
    c = Evaluation.open(small.write(tmp_path / "c", {"x-16": values}))
    with pytest.raises(UsageError, match="no row in common\n.*t-1, old-2, old-4\n.*x-16"):
        join(a, c)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1}, "seed 0 and 1"),
    ({"samples": 600, "extractor": "dinov2@abc"}, "extractor coordinates and dinov2@abc"),
    ({"preprocessing": "bicubic-299"}, "preprocessing none and bicubic-299"),
    ({"data": {"name": "shapes"}}, "data analytic:ring and shapes"),
    (
        {"reference": {"model": "teacher", "solver": "heun", "nfe": 15, "samples": 600}},
        "reference nfe 63 and 15",
    ),
    (
        {"reference": {"model": "student", "solver": "heun", "nfe": 63, "samples": 600}},
        "reference model teacher-dige and student-dige",
    ),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED, ids=[each[1] for each in REFUSED])
def test_what_cannot_be_paired_is_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    old, new = pair(tmp_path, **changed)
    with pytest.raises(ArtifactError, match=message):
        compare(old, new)
    found = compare(old, new, paired=False)
    assert [line.verdict for line in found.lines] == ["inconclusive (unpaired)"], "5 % of 600"
    assert found.differ == [message]


def test_other_numbers_of_samples_are_refused(tmp_path: Path) -> None:
    rows = {"s-1": {"endpoint_error": small.errors(60)}}
    old = small.write(tmp_path / "old", rows, {"s-1": {"fd": 1.0}})
    rows = {"s-1": {"endpoint_error": small.errors(80)}}
    new = small.write(tmp_path / "new", rows, {"s-1": {"fd": 1.0}})
    with pytest.raises(ArtifactError, match="samples 60 and 80"):
        compare(old, new)
    found = compare(old, new, paired=False)
    assert [line.kind for line in found.lines] == ["endpoint_error"]
    assert found.notes == [
        "fd of s-1 is not compared: it is of 60 and 80 samples, and depends on their number"
    ]


def test_other_labels_are_refused(tmp_path: Path) -> None:
    labels = torch.zeros(50, dtype=torch.int64)
    values = small.errors(50)
    from flowdistill import artifact

    both = []
    for name in ("a", "b"):
        folder = small.write(tmp_path / name, {"s-1": {"endpoint_error": values}})
        tensors = {"index": torch.arange(50), "label": labels, "s-1.endpoint_error": values}
        artifact.save_tensors(folder / "samples.safetensors", tensors, {"kind": "evaluation", "seed": 0})
        both.append(folder)
        labels = labels + 1
    with pytest.raises(ArtifactError, match="the label of samples"):
        compare(*both)


# --- the command ----------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = execute([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    return code, streams.out, streams.err


def test_the_table_and_the_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = pair(tmp_path)
    code, out, err = run(capsys, "compare", old, new)
    assert (code, err) == (0, "")
    row = next(line for line in out.splitlines() if line.startswith("student-4"))
    assert "endpoint_error@600" in row and "+5" in row and row.endswith("worse")
    code, out, _ = run(capsys, "compare", old / "eval.json", new, "--margin", "20%", "--json")
    document = json.loads(out)
    [metric] = document["metrics"]
    assert (code, document["margin"], document["paired"], document["differ"]) == (0, 0.2, True, [])
    assert metric["verdict"] == "equivalent" and metric["n"] == 600
    assert metric["difference"]["value"] == pytest.approx(metric["value_b"] - metric["value_a"])
    relative = metric["relative"]
    assert relative["low"] < relative["value"] < relative["high"] and relative["value"] == pytest.approx(
        0.05, abs=0.02
    )


def test_an_open_verdict_names_the_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = pair(tmp_path, factor=1.012, n=100)
    code, out, _ = run(capsys, "compare", old, new)
    assert code == 0 and "inconclusive; about " in out and "samples would tell" in out


def break_file(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flowdistill import artifact

    old, new = pair(tmp_path)
    corrupt, bare, mixed = (tmp_path / name for name in ("corrupt", "bare", "mixed"))
    pair(corrupt)
    break_file(corrupt / "new" / "eval.json")
    small.write(bare, {"student-4": {"endpoint_error": small.errors(600)}})
    (bare / "samples.safetensors").unlink()
    small.write(mixed, {"student-4": {"endpoint_error": small.errors(600)}})
    (mixed / "samples.safetensors").write_bytes((new / "samples.safetensors").read_bytes())
    artifact.save_json(tmp_path / "other.json", {"kind": "schedule"})
    artifact.save_json(tmp_path / "later.json", {"kind": "evaluation", "format": 99})
    artifact.save_json(tmp_path / "part.json", {"kind": "evaluation", "seed": 0})
    (tmp_path / "empty").mkdir()
    small.write(tmp_path / "else", {"other-8": {"endpoint_error": small.errors(600)}})
    bad = [
        ((corrupt / "new",), 4, "its checksum does not match"),
        ((tmp_path / "other.json",), 4, "expected an evaluation, found 'schedule'"),
        ((tmp_path / "later.json",), 4, "evaluation of format 99, expected 1"),
        ((tmp_path / "part.json",), 4, "samples: Field required"),
        ((mixed,), 4, "they are not of one evaluation"),
        ((bare,), 3, "samples.safetensors: no such file"),
        ((tmp_path / "empty",), 3, "no eval.json here"),
        ((tmp_path / "nowhere",), 3, "nowhere: no such file"),
        ((tmp_path / "else",), 2, "no row in common"),
        ((new, "--margin", "1"), 2, "--margin 1: expected a share"),
        ((new, "--row", "studnt-4"), 2, "unknown row 'studnt-4', did you mean 'student-4'"),
    ]
    for arguments, code, message in bad:
        found, out, err = run(capsys, "compare", old, *arguments)
        assert (found, out) == (code, "") and message in err, err
        assert err.startswith("error: ") and len(err.splitlines()) <= 3
    assert run(capsys, "compare", old, bare, "--unpaired")[0] == 0


def test_what_the_real_command_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two evaluations of one flow, the second with one step where the first has two; and another seed."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "teacher: {name: analytic:gaussian, dim: 2}\n"
        "stages:\n  - eval: {samples: 300, nfe: [1, 2], latency: true}\n"
    )
    assert execute(["eval", "r.yaml", "-q", "--out", "a"]) == 0
    assert execute(["eval", "r.yaml", "-q", "--out", "b", "-s", "eval.batch_size=50"]) == 0
    assert execute(["eval", "r.yaml", "-q", "--out", "c", "-s", "eval.seed=1"]) == 0
    code, out, _ = run(capsys, "compare", "a/eval", "b/eval", "--json")
    same = {(each["b"], each["metric"]): each for each in json.loads(out)["metrics"]}
    assert code == 0 and same["teacher-2", "endpoint_error"]["verdict"] == "equivalent"
    assert abs(same["teacher-2", "endpoint_error"]["difference"]["value"]) < 1e-5
    assert same["teacher-2", "fd"]["paired"], "the eval stage writes influences"
    assert same["teacher-2", "latency"]["p_holm"] is None
    code, out, _ = run(capsys, "compare", "a/eval", "b/eval", "--row", "teacher-2=teacher-1", "--json")
    worse = {
        each["metric"]: each["verdict"] for each in json.loads(out)["metrics"] if each["b"] == "teacher-1"
    }
    assert worse["endpoint_error"] == worse["fd"] == "worse"
    code, _, err = run(capsys, "compare", "a/eval", "c/eval")
    assert code == 4 and "seed 0 and 1" in err
    code, out, _ = run(capsys, "compare", "a/eval", "c/eval", "--unpaired")
    assert code == 0 and "(unpaired)" in out and "differ in: seed 0 and 1" in out
