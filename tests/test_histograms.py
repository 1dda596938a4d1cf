"""Claims on how drawn values are counted, and that what they are compared with is what the recipes let be drawn."""

import numpy as np
import pytest

from deedsr.dataset.recipe import builtin_recipes, load_recipe
from deedsr.degradation.draws import (
    draw_degradation,
    parameter_limits,
    parameter_names,
    parameter_shares,
    parameter_step,
    scalar_parameters,
)
from pipelines.reports.charts import Histogram, NamedCounts


def test_the_limits_and_shares_of_a_recipe_are_those_of_its_draws():
    for name in builtin_recipes():
        ranges = load_recipe(name).degradation
        rng = np.random.default_rng(1)
        rows = [scalar_parameters(draw_degradation(ranges, (128, 128), 4, rng)) for _ in range(1500)]
        limits, shares = parameter_limits(ranges), parameter_shares(ranges)
        columns = {column: np.array([row[column] for row in rows]) for column in rows[0]}
        assert {column for column in columns if not parameter_names(column)} == set(limits)
        assert {column for column in columns if parameter_names(column)} == set(shares)
        for column, (low, high) in limits.items():
            values = columns[column][~np.isnan(columns[column])]
            if not len(values):
                continue
            assert low <= values.min(), (name, column)
            assert values.max() <= high, (name, column)
            if step := parameter_step(column):
                assert np.all((values - low) % step == 0), (name, column)
        for column, expected in shares.items():
            values = columns[column][~np.isnan(columns[column])]
            for number, one in enumerate(parameter_names(column) if len(values) > 200 else ()):
                assert np.mean(values == number) == pytest.approx(expected.get(one, 0), abs=0.08), (name, column, one)
            assert sum(expected.values()) == pytest.approx(1)


def test_a_histogram_counts_every_value_once_and_knows_what_lies_beyond():
    histogram = Histogram((0.0, 3.0), extremes=(-0.1, 1000.0))
    histogram.add(np.array([0.0, 1.5, 3.0, np.nan]))
    histogram.add(np.array([-0.1, 3.05, 1000.0]))
    assert (histogram.total, histogram.outside) == (6, 3)
    assert histogram.mean == pytest.approx(1007.45 / 6)
    assert [bar.count for bar in histogram.bars() if bar.outside and bar.count] == [1, 1, 1]
    assert sum(bar.count for bar in histogram.bars() if not bar.outside) == 3
    assert histogram.span[1] == pytest.approx(6)  # one far value does not squeeze the others


def test_values_in_steps_have_a_bin_each():
    histogram = Histogram((7, 21), extremes=(7, 23), step=2)
    histogram.add(np.array([7.0, 7, 9, 21, 23]))
    assert [bar.count for bar in histogram.bars()] == [2, 1, 0, 0, 0, 0, 0, 1, 1]
    assert [bar.outside for bar in histogram.bars()] == [False] * 8 + [True]
    one = Histogram((1.0, 1.0))
    one.add(np.ones(5))
    assert (one.total, one.outside, sum(bar.count for bar in one.bars())) == (5, 0, 5)


def test_names_are_counted_beside_their_share():
    named = NamedCounts(("a", "b", "c"), {"a": 0.5, "b": 0.5, "c": 0.0})
    named.add(np.array([0, 0, 1, 2, 7, np.nan]))
    assert named.rows() == [("a", 2, 0.4, 0.5), ("b", 1, 0.2, 0.5), ("c", 1, 0.2, 0.0), ("unknown", 1, 0.2, None)]
    assert named.outside == 2
