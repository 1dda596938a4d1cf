"""Runs side by side, in a terminal and on a page: first what differs between them, then their results."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.distribution import in_threads
from pipelines.reports.charts import Curve, draw, tone
from pipelines.reports.page import data_uri, page_place, read_picture, write_page
from pipelines.reports.run_rows import (
    COMMIT,
    DATA,
    THREADS,
    RunGroup,
    RunRow,
    Section,
    metric_of,
    sections_of,
)
from pipelines.reports.tables import duration_text, metric_text, text_table
from pipelines.storage.lock import scratch_folder
from pipelines.tracking import masked_uri
from pipelines.tracking import tracking_uri as resolve_uri
from pipelines.tracking.search import BEST, ancestors, artifacts_of, select
from pipelines.tracking.store import existing_store, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_CURVES = 24  # runs of a group that have curves
MAX_PICTURES = 24  # in a page, over all runs
_ONLY_ON_THE_PAGE = ("memory/", "loss_timestep/", "validation/loss_timestep", "validation/seconds")


@dataclass(frozen=True)
class Comparison:
    """`page`: the HTML file, if one was asked for."""

    sections: list[Section]
    page: str | None

    @property
    def runs(self) -> list[RunRow]:
        return [run for section in self.sections for run in section.runs]

    @property
    def groups(self) -> list[RunGroup]:
        return [group for section in self.sections for group in section.groups]

    def text(self, width: int | None = None) -> str:
        """Tables for a terminal of so many columns, None = the window's."""
        parts = [part for section in self.sections for part in _section_text(section, width)]
        return "\n\n".join([*parts, f"page: {self.page}"] if self.page else parts)


def compare(
    experiment: str | None = None,
    out: str | Path | None = None,
    tracking_uri: str | None = None,
    *,
    runs: Sequence[str] = (),
    condition: str | None = None,
    last: int | None = None,
) -> Comparison:
    """Put runs side by side: chosen as in `pipelines.tracking.search.select`, in tables and, with `out`, on a page.

    Raises UsageError for a store, experiment or run that there is not, and for an `out` that cannot be written.
    """
    import mlflow  # noqa: F401  a missing one is reported before a missing store

    if out is not None:
        storage, _ = page_place(out)
        storage.require_writable()
    uri = resolve_uri(tracking_uri)
    client = existing_store("compare", uri)
    chosen = select(client, runs, experiment, condition, last)
    names = {e.experiment_id: e.name for e in client.search_experiments()}
    family = ancestors(client, chosen)
    sections = sections_of(client, uri, [(names[run.info.experiment_id], run) for run in chosen.values()], family)
    if out is not None:
        _write(client, out, experiment or ("Chosen runs" if runs else "All experiments"), uri, sections)
    return Comparison(sections, None if out is None else str(out))


def setting_text(run: RunRow, name: str) -> str:
    """What a run has of something that differs."""
    if name == DATA:
        return " ".join(filter(None, [(run["dataset_digest"] or "-")[:12], run["config"].get("split")]))
    if name == COMMIT:
        commit, dirty, _ = (run["commit"] or "-").partition("-dirty")
        return commit[:8] + dirty
    value = run["config"][name]
    return "-" if value is None else value


def figure_text(run: RunRow, column: str) -> str:
    if column not in run["metrics"]:
        return "-"
    text = metric_text(run["metrics"][column], metric_of(column).rpartition(".")[2])
    return f"{text} at {run['steps'][column]}" if column.startswith(BEST) and column in run["steps"] else text


def interval_text(run: RunRow, column: str) -> str:
    """Its mean difference to the best run of the group."""
    if (found := run["against_best"].get(column)) is None:
        return "-"
    figures = (found["difference"], found["low"], found["high"])
    values = [metric_text(figure, metric_of(column).rpartition(".")[2]) for figure in figures]
    signed = [value if value[0] in "−-" else f"+{value}" for value in values]
    return f"{signed[0]} [{signed[1]}, {signed[2]}]"


def _time_text(run: RunRow) -> str:
    return duration_text(run["seconds"]) if run["seconds"] is not None else "running"


def _section_text(section: Section, width: int | None) -> list[str]:
    parts = []
    if section.differing and len(section.runs) > 1:
        rows = [
            [run["name"], run["run_id"][:8], *(setting_text(run, n) for n in section.differing)] for run in section.runs
        ]
        parts.append(text_table(f"{section.title}: what differs", ["run", "id", *section.differing], rows, 2, width))
    for group in section.groups:
        header = ["run", "id", "status", "time"]
        rows = [[run["name"], run["run_id"][:8], run["status"].lower(), _time_text(run)] for run in group.runs]
        for name in group.metric_names():
            if name.startswith(_ONLY_ON_THE_PAGE):
                continue
            header.append(name)
            best, paired = group.best(name), any(name in run["against_best"] for run in group.runs)
            for run, row in zip(group.runs, rows, strict=True):
                mark = "*" if run["metrics"].get(name) == best is not None else ""
                row.append(figure_text(run, name) + mark)
                if name == group.ranked_by and paired:
                    row.append(interval_text(run, name))
            if name == group.ranked_by and paired:
                header.append(f"{name} against the best")
        ranked = f", best first by {group.ranked_by}" if group.ranked_by else ""
        marked = " (* = best)" if any(cell.endswith("*") for row in rows for cell in row) else ""
        parts.append(text_table(f"{group.title}: results{ranked}{marked}", header, rows, 2, width))
    return parts


def _write(client: "MlflowClient", out: str | Path, title: str, uri: str, sections: list[Section]) -> None:
    pictures_left = MAX_PICTURES
    shown = []
    for section in sections:
        tones = {run["run_id"]: number for group in section.groups for number, run in enumerate(group.runs)}
        groups = []
        for group in section.groups:
            pictures = _pictures(client, group, pictures_left)
            pictures_left -= sum(len(row["shots"]) for row in pictures)
            charts = _charts(client, group, tones)
            names = group.metric_names()
            best = {name: group.best(name) for name in names}
            groups.append({"group": group, "charts": charts, "pictures": pictures, "metrics": names, "best": best})
        shown.append({"section": section, "groups": groups, "tones": tones})
    write_page(
        out,
        "comparison.html",
        title=title,
        store=masked_uri(uri),
        sections=shown,
        known={run["run_id"]: 1 for section in sections for run in section.runs},
        serve=f"mlflow ui --backend-store-uri {uri}" if sqlite_path(uri) else "",
        tone=tone,
        setting=setting_text,
        figure=figure_text,
        interval=interval_text,
    )


def _charts(client: "MlflowClient", group: RunGroup, tones: dict[str, int]) -> list[str]:
    """Metrics that were logged over several steps, the runs of the group overlaid; losses by timestep share a chart."""
    runs = [run for run in group.runs if run["steps"]][:MAX_CURVES]
    wanted = [(name, run) for name in group.metric_names() for run in runs
              if name in run["steps"] and not name.startswith(BEST)]  # fmt: skip
    histories = in_threads(
        lambda pair: client.get_metric_history(pair[1]["run_id"], metric_of(pair[0])), wanted, THREADS
    )
    charts: dict[str, list[Curve]] = {}
    for (name, run), history in zip(wanted, histories, strict=True):
        family, _, member = name.rpartition("/")
        together = family.endswith("loss_timestep")
        points = sorted({(m.step, m.value) for m in history})
        if len(points) > 1:
            label = f"{_label(group, run)} · {member}" if together else _label(group, run)
            number = len(charts.get(family, [])) if together else tones[run["run_id"]]
            charts.setdefault(family if together else name, []).append(Curve(label, points, number))
    return [draw(curves, name) for name, curves in charts.items()]


def _label(group: RunGroup, run: RunRow) -> str:
    """Its name, with a piece of its id where names repeat."""
    twice = sum(other["name"] == run["name"] for other in group.runs) > 1
    return f"{run['name']} {run['run_id'][:6]}" if twice else run["name"]


def _pictures(client: "MlflowClient", group: RunGroup, at_most: int) -> list[dict[str, Any]]:
    """Pictures by name, those of most runs first, each with what every run made of it."""
    runs = group.runs[:at_most]
    runs_with: dict[str, list[RunRow]] = {}
    found = in_threads(lambda run: artifacts_of(client, run["run_id"], "pictures"), runs, THREADS)
    for run, paths in zip(runs, found, strict=True):
        for path in (path for path in paths if path.endswith(".png")):
            runs_with.setdefault(path, []).append(run)
    rows = []
    for path in sorted(runs_with, key=lambda p: (-len(runs_with[p]), p)):
        makers = runs_with[path]
        if len(makers) > at_most:
            break
        at_most -= len(makers)
        with scratch_folder() as folder:
            shots = [
                {
                    "label": _label(group, run),
                    "src": data_uri(read_picture(client.download_artifacts(run["run_id"], path, str(folder)))),
                }
                for run in makers
            ]
        rows.append({"name": Path(path).stem, "shots": shots})
    return rows
