"""Page of an evaluation: its tables, and the pictures on which two methods differ most and least."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deedsr.metrics.metric import Metric
from pipelines.reports.page import PictureSet, picture_view, write_page

SHOWN = 3  # pictures of each group
LISTED = 1000  # pictures at most in the list
Record = Mapping[str, Any]  # of a picture, as in `results.json`


class Ranked(NamedTuple):
    """A picture and what it is sorted by."""

    value: float
    record: Record


def write_evaluation(
    out: str | Path,
    labels: Mapping[str, str],
    about: Mapping[str, str],
    tables: Sequence[Any],
    metrics: Mapping[str, Metric],
    records: Sequence[Record],
    rejected: Mapping[str, str],
    read: Callable[[Record], Mapping[str, np.ndarray]],
) -> None:
    """Write the page to `out`: pictures are sorted by how far the first method is ahead of the second, by the first
    metric that single pictures have.

    `labels`: what the methods are called; `tables`: of `pipelines.reports.tables`; `read`: the versions of a
    picture by name, `lr`, methods and `hr`.
    """
    metric = next((metric for metric in metrics.values() if metric.of_pictures), None)
    pair = list(labels)[:2]
    pictures = ranked(records, pair, metric) if metric else []
    names = [labels[method] for method in pair]
    sorting = f"{metric.title} of {' minus that of '.join(names)}" if metric else ""
    scenes = {}
    for group, numbers in groups(len(pictures)).items():
        assert metric is not None
        scenes[group] = [
            (number, picture_view(_scene(pictures[number], read, labels, metric, sorting))) for number in numbers
        ]
    write_page(
        out,
        "evaluation.html",
        title=" and ".join(filter(None, [", ".join([*labels.values()][:-1]), [*labels.values()][-1]])),
        about=about,
        tables=[table for table in tables if table.rows],
        definitions={name: metric.statement() for name, metric in metrics.items()},
        rejected=rejected,
        sorting=sorting,
        listed=pictures[:LISTED],
        scenes=scenes,
    )


def ranked(records: Sequence[Record], methods: Sequence[str], metric: Metric) -> list[Ranked]:
    """The best pictures of the first method first, by its difference from the second one, if there is one."""
    found = []
    for record in records:
        values = [record["metrics"][method][metric.name] for method in methods]
        if None not in values:
            found.append(Ranked(values[0] - sum(values[1:]), record))
    return sorted(found, key=lambda one: one.value, reverse=metric.higher_is_better)


def groups(count: int) -> dict[str, list[int]]:
    """Numbers of the pictures to show, of `count` sorted ones."""
    if count <= 3 * SHOWN:
        return {"All pictures": list(range(count))} if count else {}
    middle = (count - SHOWN) // 2
    return {
        "Best": list(range(SHOWN)),
        "Around the median": list(range(middle, middle + SHOWN)),
        "Worst": list(range(count - 1, count - 1 - SHOWN, -1)),
    }


def _scene(
    one: Ranked,
    read: Callable[[Record], Mapping[str, np.ndarray]],
    labels: Mapping[str, str],
    metric: Metric,
    sorting: str,
) -> PictureSet:
    first, *others = labels.values()
    shown = {"lr": "LR", "hr": "HR", **labels}
    versions = {shown[name]: picture for name, picture in read(one.record).items()}
    values = {labels[method]: found[metric.name] for method, found in one.record["metrics"].items()}
    return PictureSet(
        one.record["key"],
        versions,
        note=f"{sorting}: {one.value:{'+' if others else ''}.{metric.digits}f} {metric.unit}",
        shown=first if others or "HR" not in versions else "HR",
        against=others[0] if others else first,
        figures={
            label: f"{value:.{metric.digits}f} {metric.unit}" for label, value in values.items() if value is not None
        },
    )
