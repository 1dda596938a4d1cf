"""Runs that are compared, put together by kind and by data: what differs between them, and their results.

Results share a table only where they were taken on the same data: of two datasets, or of two splits of one, they never
do. Shards runs are the exception, since every one of them makes a dataset. Figures of a metric whose definition differs
among the runs of a table stand in a column for each definition.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypedDict

from deedsr.errors import DeeDSRError
from deedsr.metrics.intervals import differences
from pipelines.distribution import in_threads
from pipelines.reports.tables import best_of
from pipelines.tracking import EXPERIMENTS
from pipelines.tracking.description import PLACES, active_seconds
from pipelines.tracking.provenance import COMMIT_TAG, DIGEST_TAG, DIRTY_TAG
from pipelines.tracking.search import config_of, higher_is_better, metrics_of, parents, place_of, run_link, select
from pipelines.tracking.store import artifact_text, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

MAX_PAIRED = 8  # runs of a group whose samples are compared one by one
DEFINITION_PREFIX = "definitions."  # of the parameters that say how an evaluation's metrics are defined
DEFINED = ", definition"  # behind a metric's name: the definitions themselves are among the settings that differ
DATA, COMMIT = "data", "commit"  # among what differs, beside the options
THREADS = 8  # that ask the store


class Paired(TypedDict):
    """Mean difference to the first run of the group over the samples that both measured, with its 95 % interval."""

    difference: float
    low: float
    high: float
    samples: int


class BareRow(TypedDict):
    """What every run has."""

    run_id: str
    name: str
    experiment: str
    status: str
    started: str  # ISO 8601, UTC
    seconds: float | None  # without pauses; None before the end
    dataset_digest: str | None
    commit: str | None  # with `-dirty` behind it where the code had changes that were not committed
    metrics: dict[str, float]  # last values; `best/NAME`: the best one of a training
    link: str  # to MLflow's page of the run


class RunRow(BareRow):
    """One run of a comparison."""

    parents: dict[str, str]
    config: dict[str, str | None]  # only what differs among the runs of its section; of ancestors as `adapter.train.lr`
    steps: dict[str, int]  # of `metrics`, where not 0
    samples_per_second: float | None  # None where not logged
    against_best: dict[str, Paired]  # by metric; of evaluations, against the first one of its group


@dataclass(frozen=True)
class RunGroup:
    """Runs whose metrics may be compared. `ranked_by`: the metric that orders them, best first; "" = newest first."""

    title: str
    runs: list[RunRow]
    ranked_by: str = ""

    def metric_names(self) -> list[str]:
        names = {name for run in self.runs for name in run["metrics"]}
        return sorted(names, key=lambda name: (name != self.ranked_by, place_of(name)))

    def best(self, name: str) -> float | None:
        """The best value of a metric, where it has a direction and two runs differ in it."""
        values = {run["metrics"][name] for run in self.runs if name in run["metrics"]}
        return best_of(values, higher_is_better(metric_of(name)))


@dataclass(frozen=True)
class Section:
    """Runs of one kind in one experiment. `differing`: `data`, `commit` and the options that differ among them."""

    title: str
    differing: list[str]
    groups: list[RunGroup]

    @property
    def runs(self) -> list[RunRow]:
        return [run for group in self.groups for run in group.runs]


def sections_of(
    client: "MlflowClient", uri: str, runs: Sequence[tuple[str, "StoredRun"]], family: "Mapping[str, StoredRun]"
) -> list[Section]:
    """`runs` with their experiments; `family`: these and the runs that they were made from, by id."""
    order = {name: number for number, name in enumerate(EXPERIMENTS)}
    kinds: dict[tuple[str, str], list[StoredRun]] = {}
    for experiment, run in sorted(runs, key=lambda pair: order.get(pair[0], len(order))):
        kind = run.data.tags.get("deedsr.kind", experiment.removeprefix("deedsr-"))
        kinds.setdefault((experiment, kind), []).append(run)
    return [_section(client, uri, *key, members, family) for key, members in kinds.items()]


def _section(
    client: "MlflowClient", uri: str, experiment: str, kind: str, members: "Sequence[StoredRun]",
    family: "Mapping[str, StoredRun]",
) -> Section:  # fmt: skip
    configs = {run.info.run_id: config_of(run) for run in members}
    inherited = {run.info.run_id: _inherited(run, family) for run in members}
    options = sorted({*_differing(configs.values()) - {"out"}, *_differing(inherited.values(), absent=False)})
    groups: dict[tuple[str, ...], list[StoredRun]] = {}
    for run in members:
        groups.setdefault(_data_of(kind, run, configs[run.info.run_id]), []).append(run)
    made = []
    for key, of_group in groups.items():
        columns = _columns_of_metrics(of_group, configs)
        rows = []
        for run in of_group:
            row, run_id = row_of(experiment, run, uri), run.info.run_id
            settings = configs[run_id] | inherited[run_id]
            metrics = {columns[run_id, name]: value for name, value in row["metrics"].items()}
            rows.append(
                RunRow(
                    **row | {"metrics": metrics},
                    parents=parents(run),
                    config={name: settings.get(name) for name in options},
                    steps={columns[run_id, name]: step for name, (_, step) in metrics_of(run).items() if step},
                    samples_per_second=row["metrics"].get("samples_per_second"),
                    against_best={},
                )
            )
        data = [f"dataset {key[0] if ' ' in key[0] else key[0][:12]}", *key[1:]] if key else []
        made.append(_ranked(client, kind, " · ".join([experiment, *data]), rows, configs))
    commits = {row["commit"] for group in made for row in group.runs}
    return Section(experiment, [DATA] * (len(groups) > 1) + [COMMIT] * (len(commits) > 1) + options, made)


def _differing(configs: Collection[Mapping[str, str]], absent: bool = True) -> set[str]:
    """Names whose values differ. `absent`: to have none is another value."""
    values: dict[str, set[str | None]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, set()).add(value)
    return {n for n, v in values.items() if len(v) > 1 or (absent and any(n not in config for config in configs))}


def _inherited(
    run: "StoredRun", family: "Mapping[str, StoredRun]", known: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Options of the runs that it was made from, below their role: those of the model that an evaluation measured."""
    found: dict[str, str] = {}
    for role, run_id in parents(run).items():
        if run_id in family and run_id not in known:
            of_parent = config_of(family[run_id]) | {"commit": _commit(family[run_id]) or ""}
            found |= {f"{role}.{k}": v for k, v in of_parent.items() if k.rpartition(".")[2] not in PLACES | {"base"}}
            found = _inherited(family[run_id], family, known | {run_id}) | found
    return {name: value for name, value in found.items() if DEFINITION_PREFIX not in name}


def _data_of(kind: str, run: "StoredRun", config: Mapping[str, str]) -> tuple[str, ...]:
    """Runs with an equal key may stand in one table of results: dataset digest, split."""
    if kind == "shards":
        return ()
    # A run that recorded no dataset is comparable with itself only.
    digest = run.data.tags.get(DIGEST_TAG) or f"not recorded by run {run.info.run_id}"
    return (digest, config["split"]) if config.get("split") else (digest,)


def row_of(experiment: str, run: "StoredRun", uri: str | None = None) -> BareRow:
    info = run.info
    return BareRow(
        run_id=info.run_id,
        name=info.run_name,
        experiment=experiment,
        status=info.status,
        started=datetime.fromtimestamp(info.start_time / 1000, UTC).isoformat(timespec="seconds"),
        seconds=active_seconds(run),
        dataset_digest=run.data.tags.get(DIGEST_TAG),
        commit=_commit(run),
        metrics={name: value for name, (value, _) in metrics_of(run).items()},
        link=run_link(tracking_uri(uri), run),
    )


def rows_of(
    client: "MlflowClient", experiment: str | None = None, condition: str | None = None, last: int | None = None
) -> list[BareRow]:
    """Runs of the store in force, newest first; see `pipelines.tracking.search.select`."""
    names = {e.experiment_id: e.name for e in client.search_experiments()}
    chosen = select(client, (), experiment, condition, last).values()
    return [row_of(names[run.info.experiment_id], run) for run in chosen]


def _commit(run: "StoredRun") -> str | None:
    commit = run.data.tags.get(COMMIT_TAG)
    return f"{commit}-dirty" if commit and run.data.tags.get(DIRTY_TAG) == "true" else commit


def _columns_of_metrics(
    runs: "Sequence[StoredRun]", configs: Mapping[str, Mapping[str, str]]
) -> dict[tuple[str, str], str]:
    """(run id, metric) -> the column that it stands in: its name, with a number where the runs' definitions differ."""
    definitions: dict[str, dict[str, str]] = {}  # metric -> run id -> definition, empty where none was recorded
    for run in runs:
        for name in metrics_of(run):
            definition = configs[run.info.run_id].get(f"{DEFINITION_PREFIX}{name.rpartition('.')[2]}", "")
            definitions.setdefault(name, {})[run.info.run_id] = definition
    columns = {}
    for name, of_runs in definitions.items():
        numbers = {definition: number for number, definition in enumerate(sorted(set(of_runs.values()) - {""}), 1)}
        for run_id, definition in of_runs.items():
            marked = f"{name}{DEFINED} {numbers.get(definition, 'not recorded')}"
            columns[run_id, name] = marked if len(set(of_runs.values())) > 1 else name
    return columns


def metric_of(column: str) -> str:
    """The metric that a column holds, as runs call it."""
    return column.partition(DEFINED)[0]


def _ranked(
    client: "MlflowClient", kind: str, title: str, rows: list[RunRow], configs: Mapping[str, Mapping[str, str]]
) -> RunGroup:
    """Evaluations in the order of the first metric that they were asked for, with intervals against the best one."""
    group = RunGroup(title, rows)
    asked = next((config["metrics"] for run in rows if "metrics" in (config := configs[run["run_id"]])), "psnr")
    metric = f"model.{asked.strip('[]').split(',')[0].strip().strip(chr(34))}"
    higher = higher_is_better(metric)
    if kind != "evaluation" or higher is None or metric not in group.metric_names():
        return group
    worst = float("-inf") if higher else float("inf")
    rows = sorted(rows, key=lambda run: run["metrics"].get(metric, worst), reverse=higher)
    _add_intervals(client, rows)
    return RunGroup(title, rows, metric)


def _add_intervals(client: "MlflowClient", rows: list[RunRow]) -> None:
    """Differences of the first rows to the very first one, over the samples that both measured."""
    if len(rows) < 2:
        return
    first, *others = in_threads(lambda run: samples_of(client, run["run_id"]), rows[:MAX_PAIRED], THREADS)
    for row, samples in zip(rows[1:], others, strict=False):
        for name in rows[0]["metrics"].keys() & row["metrics"].keys():
            metric = name.removeprefix("model.")
            pairs = [(samples[key].get(metric), first[key].get(metric)) for key in samples.keys() & first.keys()]
            known = [pair for pair in pairs if None not in pair]
            if len(known) > 1 and name.startswith("model.") and DEFINED not in name:
                ours, best = zip(*known, strict=True)
                (found,) = differences(metric, {"ours": ours, "best": best}, bool(higher_is_better(name)))
                row["against_best"][name] = Paired(
                    difference=found.mean, low=found.low, high=found.high, samples=len(known)
                )


def samples_of(client: "MlflowClient", run_id: str) -> dict[str, dict[str, float | None]]:
    """The model's metrics of each sample of an evaluation by the sample's key; {} where its run has none."""
    try:
        results = json.loads(artifact_text(f"runs:/{run_id}/results.json", client))
    except (DeeDSRError, ValueError):
        return {}
    return {sample["key"]: sample["metrics"].get("model", {}) for sample in results["samples"]}
