"""Runs of an experiment side by side: what differs in their configuration, their figures, curves and pictures.

Runs are put together by what they read: the figures of two datasets (or of two splits of one) never share a table or a
chart. Shards runs are the exception, since every one of them makes a dataset: they form one group. Figures of a metric
whose definition differs among the runs of a group stand in a row for each definition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from markupsafe import Markup

from deedsr.errors import UsageError
from pipelines.reports.charts import Curve, draw
from pipelines.reports.page import data_uri, duration_text, metric_text, page_place, read_picture, write_page
from pipelines.storage.lock import scratch_folder
from pipelines.tracking import EXPERIMENTS, connect, masked_uri
from pipelines.tracking import tracking_uri as resolve_uri
from pipelines.tracking.provenance import COMMIT_TAG, CONFIG_TAG, DIGEST_TAG, PARENT_TAG
from pipelines.tracking.store import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

MAX_PICTURES = 24  # in a page, over all runs
SYSTEM_PREFIX = "system/"
DEFINITION_PREFIX = "definitions."  # of the parameters that say how an evaluation's metrics are defined
DEFINED = ", definition"  # behind a metric's name: the definitions themselves are among the settings that differ


class RunRow(TypedDict):
    """One run of a comparison."""

    run_id: str
    name: str
    experiment: str
    status: str
    started: str  # ISO 8601, UTC
    seconds: float | None  # None while it runs
    dataset_digest: str | None
    parents: dict[str, str]
    commit: str | None
    config: dict[str, str | None]  # only the parameters in which the runs of its group differ
    metrics: dict[str, float]  # last values
    samples_per_second: float | None  # None where not logged


@dataclass(frozen=True)
class RunGroup:
    """Runs whose metrics may be compared. `title` names what they have in common."""

    title: str
    runs: list[RunRow]

    def metric_names(self) -> list[str]:
        return sorted({name for run in self.runs for name in run["metrics"]})

    def config_names(self) -> list[str]:
        return sorted({name for run in self.runs for name in run["config"]})


@dataclass(frozen=True)
class Comparison:
    """`runs`: in order of `groups`, newest first. `page`: the HTML file, if one was asked for."""

    runs: list[RunRow]
    page: str | None = None
    groups: list[RunGroup] = field(default_factory=list, repr=False)

    def text(self) -> str:
        """The groups as tables for a terminal."""
        parts = [_text_table(group) for group in self.groups]
        return "\n\n".join([*parts, f"page: {self.page}"] if self.page else parts)


def compare(
    experiment: str | None = None, out: str | Path | None = None, tracking_uri: str | None = None
) -> Comparison:
    """Put the runs of one experiment, or (None) of all `deedsr-*` experiments, side by side.

    Raises:
        UsageError: no store, no such experiment (the message lists those there are), no run in it, or an `out` that
            cannot be written.
    """
    import mlflow  # noqa: F401  a missing one is reported before a missing store

    if out is not None:
        storage, _ = page_place(out)
        storage.require_writable()
    uri = resolve_uri(tracking_uri)
    if (path := sqlite_path(uri)) and not path.exists():
        # Connecting would create an empty store here.
        raise UsageError(
            f"there is no MLflow store at {path}: go to the folder in which the runs were "
            "made, or set MLFLOW_TRACKING_URI"
        )
    client = connect(uri)
    names = {e.experiment_id: e.name for e in client.search_experiments()}
    wanted = {i: n for i, n in names.items() if n == experiment or (experiment is None and n.startswith("deedsr-"))}
    if not wanted:
        there = ", ".join(sorted(n for n in names.values() if n != "Default")) or "none"
        raise UsageError(
            f"no experiment {experiment or 'deedsr-*'} in the MLflow store {masked_uri(uri)}: there are: {there}"
        )
    stored = {run.info.run_id: run for run in _all_runs(client, list(wanted))}
    if not stored:
        raise UsageError(f"experiment {', '.join(wanted.values())} in {masked_uri(uri)} holds no run yet")
    groups = _grouped([(wanted[run.info.experiment_id], run) for run in stored.values()])
    if out is not None:
        _write(client, out, experiment or "All experiments", uri, groups, stored)
    page = None if out is None else str(out)
    return Comparison([run for group in groups for run in group.runs], page, groups)


def _all_runs(client: "MlflowClient", experiments: list[str]) -> list["StoredRun"]:
    runs, token = [], None
    while True:
        batch = client.search_runs(experiments, order_by=["attributes.start_time DESC"], page_token=token)
        runs += batch
        token = batch.token
        if not token:
            return runs


def _grouped(runs: Sequence[tuple[str, "StoredRun"]]) -> list[RunGroup]:
    order = {name: number for number, name in enumerate(EXPERIMENTS)}
    groups: dict[tuple[str, ...], list[tuple[str, StoredRun]]] = {}
    for experiment, run in sorted(runs, key=lambda pair: order.get(pair[0], len(order))):
        groups.setdefault(_comparable(experiment, run), []).append((experiment, run))
    return [RunGroup(_title(key), _described(members)) for key, members in groups.items()]


def _comparable(experiment: str, run: "StoredRun") -> tuple[str, ...]:
    """Runs with an equal key may stand in one table: experiment, kind, dataset digest, split."""
    kind = run.data.tags.get("deedsr.kind", experiment.removeprefix("deedsr-"))
    if kind == "shards":
        return experiment, kind
    # A run that recorded no dataset is comparable with itself only.
    digest = run.data.tags.get(DIGEST_TAG) or f"not recorded by run {run.info.run_id}"
    return experiment, kind, digest, _config(run).get("split", "")


def _title(key: tuple[str, ...]) -> str:
    experiment, _, *data = key
    if not data:
        return experiment
    digest, split = data
    return f"{experiment} · dataset {digest if ' ' in digest else digest[:12]}{f' · {split}' if split else ''}"


def _described(members: Sequence[tuple[str, "StoredRun"]]) -> list[RunRow]:
    configs = [_config(run) for _, run in members]
    names = {name for config in configs for name in config}
    different = sorted(name for name in names if len({config.get(name) for config in configs}) > 1)
    rows = _rows_of_metrics([run for _, run in members], configs)
    described = []
    for (experiment, run), config in zip(members, configs, strict=True):
        info, tags = run.info, run.data.tags
        shown = {k: v for k, v in sorted(run.data.metrics.items()) if not k.startswith(SYSTEM_PREFIX)}
        metrics = {rows[info.run_id, name]: value for name, value in shown.items()}
        described.append(
            RunRow(
                run_id=info.run_id,
                name=info.run_name,
                experiment=experiment,
                status=info.status,
                started=datetime.fromtimestamp(info.start_time / 1000, UTC).isoformat(timespec="seconds"),
                seconds=(info.end_time - info.start_time) / 1000 if info.end_time else None,
                dataset_digest=tags.get(DIGEST_TAG),
                parents={k.removeprefix(PARENT_TAG): v for k, v in tags.items() if k.startswith(PARENT_TAG)},
                commit=tags.get(COMMIT_TAG),
                config={name: config.get(name) for name in different},
                metrics=metrics,
                samples_per_second=metrics.get("samples_per_second"),
            )
        )
    return described


def _rows_of_metrics(runs: Sequence["StoredRun"], configs: Sequence[dict[str, str]]) -> dict[tuple[str, str], str]:
    """(run id, metric) -> the row that it stands in: its name, with a number where the runs' definitions differ."""
    definitions: dict[str, dict[str, str]] = {}  # metric -> run id -> definition, empty where none was recorded
    for run, config in zip(runs, configs, strict=True):
        for name in run.data.metrics:
            definition = config.get(f"{DEFINITION_PREFIX}{name.rpartition('.')[2]}", "")
            definitions.setdefault(name, {})[run.info.run_id] = definition
    rows = {}
    for name, of_runs in definitions.items():
        numbers = {definition: number for number, definition in enumerate(sorted(set(of_runs.values()) - {""}), 1)}
        for run_id, definition in of_runs.items():
            marked = f"{name}{DEFINED} {numbers.get(definition, 'not recorded')}"
            rows[run_id, name] = marked if len(set(of_runs.values())) > 1 else name
    return rows


def _metric_of(row: str) -> str:
    """The metric that a row holds, as runs call it."""
    return row.partition(DEFINED)[0]


def _config(run: "StoredRun") -> dict[str, str]:
    """Parameters in force: those that a resume has changed are recorded as tags."""
    changed = {k.removeprefix(CONFIG_TAG): v for k, v in run.data.tags.items() if k.startswith(CONFIG_TAG)}
    return run.data.params | changed


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _text_table(group: RunGroup) -> str:
    metrics, settings = group.metric_names(), group.config_names()
    header = ["run", "id", "status", "time", *metrics, *settings]
    rows = [
        [
            run["name"],
            run["run_id"][:8],
            run["status"].lower(),
            duration_text(run["seconds"]) if run["seconds"] is not None else "running",
            *(_figure(run["metrics"].get(row), row) for row in metrics),
            *(_short(run["config"][name]) for name in settings),
        ]
        for run in group.runs
    ]
    # One line for each figure, one column for each run: a terminal is narrow, configurations are long.
    columns = [header, *rows]
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    ]
    return "\n".join([group.title, *("  " + line for line in lines)])


def _figure(value: float | None, row: str) -> str:
    return "-" if value is None else metric_text(value, _metric_of(row).rpartition(".")[2])


def _short(value: str | None) -> str:
    value = "-" if value is None else value
    return value if len(value) <= 40 else value[:37] + "..."


# ---------------------------------------------------------------------------------------------------------------------
# Page


def _write(
    client: "MlflowClient",
    out: str | Path,
    title: str,
    uri: str,
    groups: list[RunGroup],
    stored: dict[str, "StoredRun"],
) -> None:
    pictures_left = MAX_PICTURES
    sections = []
    for group in groups:
        labels = _labels(group.runs)
        rows = _pictures(client, group, labels, pictures_left)
        pictures_left -= sum(len(row["shots"]) for row in rows)
        sections.append(
            {
                "title": group.title,
                "runs": [{**run, "label": labels[run["run_id"]]} for run in group.runs],
                "metrics": group.metric_names(),
                "settings": group.config_names(),
                "charts": _charts(client, group, labels),
                "pictures": rows,
            }
        )
    write_page(
        out, "comparison.html", title=title, store=masked_uri(uri), sections=sections, known=dict.fromkeys(stored, 1)
    )


def _labels(runs: Sequence[RunRow]) -> dict[str, str]:
    """Name of each run, with a piece of its id where names repeat."""
    names = [run["name"] for run in runs]
    return {
        run["run_id"]: run["name"] if names.count(run["name"]) == 1 else f"{run['name']} {run['run_id'][:6]}"
        for run in runs
    }


def _charts(client: "MlflowClient", group: RunGroup, labels: dict[str, str]) -> list[Markup]:
    """Metrics that were logged over several steps, the runs of the group overlaid; losses by timestep share a chart."""
    charts: dict[str, list[Curve]] = {}
    for name in group.metric_names():
        family, _, member = name.rpartition("/")
        together = family.endswith("loss_timestep")
        for run in group.runs:
            history = client.get_metric_history(run["run_id"], _metric_of(name)) if name in run["metrics"] else []
            points = sorted({(m.step, m.value) for m in history})
            if len(points) > 1:
                label = labels[run["run_id"]]
                curve = Curve(f"{label} · {member}" if together else label, points)
                charts.setdefault(family if together else name, []).append(curve)
    return [draw(curves, name) for name, curves in charts.items()]


def _pictures(client: "MlflowClient", group: RunGroup, labels: dict[str, str], at_most: int) -> list[dict[str, Any]]:
    """Pictures by name, those of most runs first, each with what every run made of it."""
    runs_with: dict[str, list[str]] = {}
    for run in group.runs:
        for path in _artifacts(client, run["run_id"], "pictures"):
            runs_with.setdefault(path, []).append(run["run_id"])
    rows = []
    for path in sorted(runs_with, key=lambda p: (-len(runs_with[p]), p)):
        ids = runs_with[path]
        if len(ids) > at_most:
            break
        at_most -= len(ids)
        with scratch_folder() as folder:
            shots = [
                {"label": labels[i], "src": data_uri(read_picture(client.download_artifacts(i, path, str(folder))))}
                for i in ids
            ]
        rows.append({"name": Path(path).stem, "shots": shots})
    return rows


def _artifacts(client: "MlflowClient", run_id: str, folder: str) -> list[str]:
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        found += _artifacts(client, run_id, item.path) if item.is_dir else [item.path]
    return [path for path in found if path.endswith(".png")]
