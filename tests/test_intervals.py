"""Means with bootstrap intervals, paired differences, and their tables."""

import numpy as np
import pytest

from deedsr.metrics.fid import frechet_distance
from deedsr.metrics.intervals import differences, means, of_sets
from deedsr.metrics.registry import selected
from pipelines.reports.tables import differences_table, latex, markdown, means_table, plain


def test_an_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(25, 3, 400)
    found = means({"a": [*values]})["a"]
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found == pytest.approx((values.mean(), values.mean() - error, values.mean() + error), abs=0.02)
    assert means({"a": [*values]}) == means({"a": [*values]})
    assert means({"a": [3.0]})["a"] == (3, 3, 3)


def test_a_difference_is_paired():
    scenes = np.random.default_rng(1).normal(25, 5, 100)
    change = np.random.default_rng(2).normal(0.3, 0.5, 100)
    [found] = differences("psnr", {"a": [*(scenes + change)], "b": [*scenes]}, higher_is_better=True)
    assert found[:3] == ("psnr", "a", "b")
    assert 0.1 < found.low < change.mean() < found.high < 0.5  # the means themselves are known to +- 1
    assert found.mean == pytest.approx(change.mean())
    assert found.wins == np.mean(change > 0)
    [lower] = differences("niqe", {"a": [1.0, 2.0, 3.0, 4.0], "b": [2.0, 2.0, 1.0, 5.0]}, higher_is_better=False)
    assert lower.wins == (1 + 0.5 + 0 + 1) / 4


def test_a_picture_without_value_leaves_mean_and_differences_out():
    values = {"a": [1.0, None], "b": [1.0, 2.0], "c": [2.0, 3.0]}
    assert means(values)["a"] == (None, None, None)
    assert [(one.method, one.other) for one in differences("psnr", values, True)] == [("b", "c")]


def fid(measured):
    return frechet_distance(*np.stack(measured, axis=1)) if len(measured) > 1 else None


def test_intervals_of_sets_are_those_of_their_figures_and_differences_are_paired():
    values, change = np.random.default_rng(0).normal(25, 3, 15), np.random.default_rng(1).normal(0.3, 0.1, 15)
    mean = lambda rest: float(np.mean(rest))
    intervals, [difference] = of_sets("mean", {"a": [*(values + change)], "b": [*values]}, mean)
    for found, known in ((intervals["b"], values), (difference[3:6], change)):
        reach = 2.1448 * np.std(known, ddof=1) / np.sqrt(15)  # of Student's t with 14 degrees of freedom
        assert found == pytest.approx((np.mean(known), np.mean(known) - reach, np.mean(known) + reach), rel=1e-4)
    assert difference[:3] == ("mean", "a", "b")


def test_intervals_of_fid_hold_what_is_expected():
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        references = rng.normal(size=(60, 8)) / np.arange(1, 9)
        theirs = {name: references + rng.normal(shift, 0.1, (60, 8)) for name, shift in {"a": 0.1, "b": 0.12}.items()}
        found.append(of_sets("fid", {name: [*zip(x, references, strict=True)] for name, x in theirs.items()}, fid))
    figures = np.array([intervals["a"] for intervals, _ in found])
    changes = np.array([change[3:6] for _, [change] in found])
    for mean, low, high in (figures.T, changes.T):
        assert 0.85 <= np.mean((low <= mean.mean()) & (mean.mean() <= high)) <= 1
        assert 1 < np.mean(high - low) / (4 * mean.std()) < 1.5
    assert found[0][1][0].wins is None


def test_a_set_of_too_few_pictures_has_no_interval():
    features = np.random.default_rng(0).normal(size=(3, 2, 4))
    known = lambda count: of_sets("fid", {"a": [*features[:count]], "b": [*features[:count]]}, fid)
    assert known(1) == ({"a": (None, None, None), "b": (None, None, None)}, [])
    assert [found is None for found in known(2)[0]["a"]] == [False, True, True]
    assert known(2)[1] == []
    assert known(3)[1][0][3:6] == (0, 0, 0)


def test_tables_have_means_intervals_differences_and_wins():
    measures = selected(("psnr", "niqe"))
    values = {"psnr": {"a_1": [25.0, 26.0], "b": [24.0, 26.5]}, "niqe": {"a_1": [5.0, 6.0], "b": [4.0, None]}}
    found = {name: means(one) for name, one in values.items()}
    metrics = {method: {name: found[name][method] for name in measures} for method in ("a_1", "b")}
    labels = {"a_1": "a_1", "b": "b|c"}
    table = means_table(metrics, measures, labels)
    assert plain(table).splitlines() == [
        "     PSNR-Y dB ↑           NIQE ↓",
        "a_1  25.50 [25.00, 26.00]  5.50 [5.00, 6.00]",
        "b|c  25.25 [24.00, 26.50]  -",
    ]
    assert markdown(table).splitlines()[2:] == [
        "| a_1 | **25.50** [25.00, 26.00] | 5.50 [5.00, 6.00] |",
        "| b\\|c | 25.25 [24.00, 26.50] | - |",
    ]
    assert r"a\_1 & \textbf{25.50} {\scriptsize [25.00, 26.00]} & 5.50 {\scriptsize [5.00, 6.00]} \\" in latex(table)
    changes = differences("psnr", values["psnr"], True) + differences("niqe", values["niqe"], False)
    assert plain(differences_table(changes, measures, labels)).splitlines()[1:] == [
        "a_1 - b|c  +0.25 [-0.50, +1.00] 50%"
    ]
    _, changes = of_sets("niqe", {"a_1": [1.0, 2.0], "b": [1.0, 4.0]}, lambda rest: sum(rest) / len(rest))
    assert "%" not in plain(differences_table(changes, measures, labels))
