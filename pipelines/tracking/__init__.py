"""MLflow runs: what was run, on what, from which parents, and how it went.

Every run holds its whole configuration (parameters, and `config.yaml` as artifact), the git commit, library versions,
the dataset's digest as an MLflow dataset input and as tag `deedsr.dataset.digest`, its parents as tags
`deedsr.parent.*`, metrics, system metrics and pictures. It holds no secret and no dump of the environment.

One process writes a run at a time. A training driver starts the run (`system_metrics=False`), rank 0's worker opens it
by (`tracking_uri`, `id`) with `open_run` and leaves it with `close`; the driver sets the final status with `finish`.

The store mirrors what a run logs. A fault-tolerant run outlives it: what the store does not take is sent when it is
back. A training keeps a record of its own (`pipelines.training.metrics`), of which the next process sends what the
store lacks.
"""

from pipelines.tracking.description import Origin
from pipelines.tracking.mirror import Point
from pipelines.tracking.provenance import DatasetInput
from pipelines.tracking.run import Run
from pipelines.tracking.search import find_run
from pipelines.tracking.session import begun_by, children_of, open_run, start_run
from pipelines.tracking.stale import close_stale
from pipelines.tracking.store import EXPERIMENTS, connect, masked_uri, require_shared_store, tracking_uri

__all__ = [
    "EXPERIMENTS",
    "DatasetInput",
    "Origin",
    "Point",
    "Run",
    "begun_by",
    "children_of",
    "close_stale",
    "connect",
    "find_run",
    "masked_uri",
    "open_run",
    "require_shared_store",
    "start_run",
    "tracking_uri",
]
