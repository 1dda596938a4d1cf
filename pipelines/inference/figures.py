"""Figures of an evaluation: means with intervals, differences, win rates; their tables and rows."""

import io
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet

from deedsr.metrics.intervals import Difference, Interval, differences, means, of_sets
from deedsr.metrics.metric import Metric
from deedsr.metrics.registry import named_in_errors
from pipelines.inference.evaluator import Measured
from pipelines.reports.tables import Cell, Table, latex, markdown, metric_title, plain

ROWS, TABLE = "rows.parquet", "table.txt"


Figures = dict[str, dict[str, Interval]]  # by method and metric


def figures_of(
    samples: Sequence[Measured], methods: Sequence[str], measures: Mapping[str, Metric]
) -> tuple[Figures, list[Difference]]:
    """Figures of each method, and differences of each two."""
    figures: Figures = {method: {} for method in methods}
    changes: list[Difference] = []
    for name, metric in measures.items():
        if metric.of_pictures:
            values = {method: [one.record["metrics"][method][name] for one in samples] for method in methods}
            found, change = means(values), differences(name, values, metric.higher_is_better)
        else:
            with named_in_errors(name):
                features = {method: [one.features[method][name] for one in samples] for method in methods}
                found, change = of_sets(name, features, metric.summary)
        changes += change
        for method in methods:
            figures[method][name] = found[method]
    return figures, changes


def table_files(tables: Sequence[Table]) -> dict[str, bytes]:
    """Files with the tables for a terminal, in Markdown and in LaTeX, by name."""
    forms = {TABLE: plain, "table.md": markdown, "table.tex": latex}
    return {
        name: ("\n\n".join(form(table) for table in tables if table.rows) + "\n").encode()
        for name, form in forms.items()
    }


def rows_file(samples: Sequence[Measured]) -> bytes:
    """A Parquet file with a row for each picture, method and metric."""
    rows = [
        {"picture": sample.record["key"], "method": method, "metric": name, "value": value}
        for sample in samples
        for method, found in sample.record["metrics"].items()
        for name, value in found.items()
    ]
    schema = pa.schema({"picture": pa.string(), "method": pa.string(), "metric": pa.string(), "value": pa.float64()})
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, schema), file)
    return file.getvalue()


def means_table(metrics: Figures, measures: Mapping[str, Metric], labels: Mapping[str, str]) -> Table:
    """A row for each method; the best mean of each metric is marked."""
    best = {}
    for name, metric in measures.items():
        told = [found[name].mean for found in metrics.values()]
        known = [mean for mean in told if mean is not None]
        best[name] = (max if metric.higher_is_better else min)(known) if len(known) > 1 else None
    rows = [
        (
            labels[method],
            [_cell(found[name], metric, found[name].mean == best[name]) for name, metric in measures.items()],
        )
        for method, found in metrics.items()
    ]
    return Table([metric_title(metric) for metric in measures.values()], rows)


def differences_table(
    changes: Sequence[Difference], measures: Mapping[str, Metric], labels: Mapping[str, str]
) -> Table:
    """A row for each two methods: mean difference, interval, and on how many pictures the first one is better."""
    names = [name for name in measures if any(change.metric == name for change in changes)]
    rows: dict[str, dict[str, Cell]] = {}
    for change in changes:
        metric, label = measures[change.metric], f"{labels[change.method]} - {labels[change.other]}"
        cell = _cell(Interval(change.mean, change.low, change.high), metric, sign="+")
        wins = f" {100 * change.wins:.0f}%" if change.wins is not None else ""
        rows.setdefault(label, {})[change.metric] = cell._replace(note=cell.note + wins)
    return Table(
        [metric_title(measures[name]) for name in names],
        [(label, [cells.get(name, Cell("-")) for name in names]) for label, cells in rows.items()],
    )


def _cell(figure: Interval, metric: Metric, best: bool = False, sign: str = "") -> Cell:
    if figure.mean is None:
        return Cell("-")
    number = f"{sign}.{metric.digits}f"
    note = f"[{figure.low:{number}}, {figure.high:{number}}]" if figure.low is not None else ""
    return Cell(f"{figure.mean:{number}}", note, best)
