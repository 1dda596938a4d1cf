"""Which runs of a store are meant, what they were made from, and what they hold."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from deedsr.errors import UsageError
from pipelines.tracking.mirror import SYSTEM
from pipelines.tracking.provenance import CONFIG_TAG, PARENT_TAG
from pipelines.tracking.store import cause, connect, masked_uri, quoted, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as StoredRun

_PAGE = 1000  # runs that a store gives at once
BEST = "best/"  # before the name of a validation's metric: its best value, at its step, from these tags
BEST_TAG, AT_STEP = "deedsr.best.", " at step "
_FIRST = (f"{BEST}psnr", BEST, "model.", "bicubic.", "validation/psnr", "validation/", "loss", "samples_per_second", "")
_HIGHER, _LOWER = ("psnr", "ssim", "top1", "top5", "samples_per_second"), ("loss",)


def select(
    client: "MlflowClient",
    runs: Sequence[str] = (),
    experiment: str | None = None,
    condition: str | None = None,
    last: int | None = None,
) -> "dict[str, StoredRun]":
    """Runs by id, newest first.

    Args:
        runs: ids, beginnings of ids, or names, in any experiment. () = all.
        experiment: name; None = all whose name begins with `deedsr-`.
        condition: a filter as MLflow's search takes it.
        last: at most so many, the newest.

    Raises UsageError where nothing is found, saying what there is.
    """
    names = {e.experiment_id: e.name for e in client.search_experiments()}
    where = masked_uri(tracking_uri())
    wanted = [
        i for i, n in names.items() if runs or n == experiment or (experiment is None and n.startswith("deedsr-"))
    ]
    if not wanted:
        there = ", ".join(sorted(n for n in names.values() if n != "Default")) or "none"
        raise UsageError(f"no experiment {experiment or 'deedsr-*'} in the MLflow store {where}: there are: {there}")
    found: list[StoredRun] = []
    for run in runs:
        parts = [f"attributes.run_id LIKE {quoted(f'{run}%')}", f"attributes.run_name = {quoted(run)}"]
        named = next(filter(None, (search(client, wanted, part) for part in parts)), [])
        if not named:
            raise UsageError(f"no run {run} in the MLflow store {where}: `deedsr runs list` shows those there are")
        found += named
    if not runs:
        found = search(client, wanted, condition or "", last)
    if not found:
        meant = f" that matches {condition}" if condition else " yet"
        raise UsageError(f"experiment {', '.join(names[i] for i in wanted)} in {where} holds no run{meant}")
    return {run.info.run_id: run for run in found}


def search(
    client: "MlflowClient", experiments: list[str], condition: str, last: int | None = None
) -> "list[StoredRun]":
    from mlflow.exceptions import MlflowException

    runs: list[StoredRun] = []
    token = None
    while experiments and (last is None or len(runs) < last):
        count = _PAGE if last is None else min(_PAGE, last - len(runs))
        try:
            page = client.search_runs(
                experiments, condition, max_results=count, order_by=["attributes.start_time DESC"], page_token=token
            )
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            raise UsageError(f"MLflow does not take the filter {condition!r}: {cause(error)}") from error
        runs, token = runs + list(page), page.token
        if not token:
            break
    return runs


def find_run(experiment: str | None, tags: Mapping[str, str], uri: str | None = None) -> str | None:
    """Id of the newest run with all these tags, in one experiment or (None) in all; None when there is none."""
    client = connect(tracking_uri(uri))
    experiments = [e.experiment_id for e in client.search_experiments() if experiment in (None, e.name)]
    condition = " and ".join(f"tags.`{key}` = {quoted(value)}" for key, value in tags.items())
    runs = search(client, experiments, condition, last=1)
    return runs[0].info.run_id if runs else None


def ancestors(client: "MlflowClient", runs: "Mapping[str, StoredRun]") -> "dict[str, StoredRun]":
    """All runs that these were made from, directly or not, as far as the store has them, and these."""
    known_runs = dict(runs)
    experiments = [e.experiment_id for e in client.search_experiments()]
    level: Iterable[StoredRun] = runs.values()
    while missing := sorted({i for run in level for i in parents(run).values()} - known_runs.keys()):
        level = []
        for start in range(0, len(missing), 200):
            ids = ", ".join(map(quoted, missing[start : start + 200]))
            level = [*level, *search(client, experiments, f"attributes.run_id IN ({ids})")]
        known_runs |= {run.info.run_id: run for run in level}
        if not level:
            break
    return known_runs


def parents(run: "StoredRun") -> dict[str, str]:
    """Ids of the runs that it was made from, by role."""
    return {k.removeprefix(PARENT_TAG): v for k, v in run.data.tags.items() if k.startswith(PARENT_TAG)}


def config_of(run: "StoredRun") -> dict[str, str]:
    """Parameters in force: those that a resume has changed are recorded as tags."""
    changed = {k.removeprefix(CONFIG_TAG): v for k, v in run.data.tags.items() if k.startswith(CONFIG_TAG)}
    return run.data.params | changed


def metrics_of(run: "StoredRun") -> dict[str, tuple[float, int]]:
    """Last value and its step of each metric but the system's, and the best ones of a training's validation."""
    found = {m.key: (m.value, m.step) for m in run.data._metric_objs if not m.key.startswith(SYSTEM)}
    for key, text in run.data.tags.items():
        if key.startswith(BEST_TAG):
            value, _, step = text.partition(AT_STEP)
            found[BEST + key.removeprefix(BEST_TAG)] = float(value), int(step)
    return {name: found[name] for name in sorted(found, key=place_of)}


def higher_is_better(metric: str) -> bool | None:
    """The direction of a metric by its name in a run; None where it has none."""
    from deedsr.metrics.registry import known

    name = metric.rpartition(".")[2].rpartition("/")[2]
    if name in known():
        return known()[name].higher_is_better
    if "loss_timestep" in metric or name.startswith(_LOWER):
        return False
    return True if name.startswith(_HIGHER) else None


def run_link(uri: str, run: "StoredRun") -> str:
    """Address of a run on MLflow's pages; of an SQLite store's at the address where `mlflow ui` serves it."""
    base = masked_uri(uri).replace("://***@", "://") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base.rstrip('/')}/{run_place(run)}"


def run_place(run: "StoredRun") -> str:
    """A run's place on MLflow's pages, which else would open as those for language models."""
    return f"#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"


def place_of(metric: str) -> tuple[int, str]:
    """Order of metrics: results first."""
    return next(number for number, start in enumerate(_FIRST) if metric.startswith(start)), metric


def artifacts_of(client: "MlflowClient", run_id: str, folder: str | None = None) -> list[str]:
    """Paths of a run's artifacts."""
    found: list[str] = []
    for item in client.list_artifacts(run_id, folder):
        found += artifacts_of(client, run_id, item.path) if item.is_dir else [item.path]
    return found
