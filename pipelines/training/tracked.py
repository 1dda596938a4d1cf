"""What a training and its MLflow run owe each other while the store is away.

Points of the curves that the store has not taken are in every checkpoint, for whoever continues from it, and in
`OUT/unsent_metrics.jsonl` where a process ended before the store was back. Both are taken up by the next one; what the
store holds already is not sent again.
"""

import json
import logging
from collections.abc import Callable

from pipelines.storage import Storage
from pipelines.tracking import Run
from pipelines.training import checkpoint

logger = logging.getLogger(__name__)
UNSENT = "unsent_metrics.jsonl"  # beside the model: a list [name, value, timestamp in ms, step] on each line


def unsent(out: Storage) -> list[list]:
    """Points that earlier parts of the run could not send."""
    points = [point for saved in checkpoint.committed(out)[-1:] for point in saved.unsent]
    try:
        return [json.loads(line) for line in out.read(UNSENT).splitlines()] + points
    except FileNotFoundError:
        return points


def keep(out: Storage, points: list[list]) -> None:
    """Leave points for whoever comes next."""
    out.write(UNSENT, "".join(f"{json.dumps(point)}\n" for point in points).encode())


def conclude(run: Run, out: Storage, publish: Callable[[], object]) -> bool:
    """The end of a training: send what is left, then `publish` (tags, model), and finish the run.

    False when the store did not take it in time: the rest lies in UNSENT, and a warning says how to send it.
    """
    run.take_up(unsent(out))
    run.later(publish)
    if run.finish():
        out.delete(UNSENT)
        return True
    keep(out, run.unsent())
    logger.warning(
        "the model in %s is finished, but the MLflow store did not come back: what it has not got is in %s. "
        "The same command again sends it",
        out.uri,
        UNSENT,
    )
    return False
