"""Means with bootstrap intervals, paired differences, and their tables."""

import numpy as np
import pytest

from deedsr.metrics.intervals import differences, means
from deedsr.metrics.registry import selected
from pipelines.inference.figures import differences_table, latex, markdown, means_table, plain


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
