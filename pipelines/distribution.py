"""Work on the parts of an input on a cluster, with Ray Data: an actor keeps what the work loads for all its parts."""

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.placement import NETWORK_WORKER, Device, WorkPlan, place_networks

__all__ = ["place", "spread"]

logger = logging.getLogger(__name__)
Part = TypeVar("Part")
Result = TypeVar("Result")

_MAX_PARTS_PER_ROW = 8
_ROWS_PER_WORKER = 32  # enough that the last row does not keep one worker busy for long


def place(command: str, parts: int, device: Device, workers: int | None = None) -> WorkPlan:
    """Where on the cluster `command` computes its networks; waits until the first worker can start there.

    `workers`: at a time, None = on every GPU, or every CPU where the device is the CPU. `device`: see
    `pipelines.placement.place_networks`. Raises UsageError where no worker could ever start.
    """
    cluster.connect()
    plan = place_networks(cluster.offer(), device, workers, command)
    plan = replace(plan, workers=min(plan.workers, parts))
    logger.info("%s: %s", command, plan)
    cluster.wait_for(plan, f"--device cpu runs `{command}` on CPUs")
    return plan


def spread(work: Callable[[Part], Result], parts: Sequence[Part], plan: WorkPlan, command: str) -> Iterator[Result]:
    """The result of each part, in any order; what a killed worker had is done again by another.

    `work` raises DeeDSRError for what would fail with every other part as well. It, parts and results pickle.
    """
    data = cluster.data()
    from ray.exceptions import RayError

    per_row = min(max(len(parts) // (plan.workers * _ROWS_PER_WORKER), 1), _MAX_PARTS_PER_ROW)
    rows = [{"parts": pickle.dumps(parts[start : start + per_row])} for start in range(0, len(parts), per_row)]
    results = data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        _Actor,
        fn_constructor_kwargs={"work": work, "one_thread": plan.device == "cpu"},  # there is an actor for each CPU
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        compute=data.ActorPoolStrategy(min_size=1, max_size=plan.workers, initial_size=plan.workers),
    )
    try:
        for row in results.iter_rows():
            cluster.raise_error(row)
            yield pickle.loads(row["result"])
    except RayError as error:
        less = "fewer --workers or a smaller --tile need less"
        need = f"{plan.workers} workers take {plan.workers * NETWORK_WORKER / 1e9:.1f} GB with a model such as tiny"
        last = cluster.last_words(error, f"{need}; {less}")
        raise DeeDSRError(f"`{command}` failed on the cluster: {last}; run the same command again") from error


class _Actor:
    def __init__(self, work: Callable[[Any], Any], one_thread: bool):
        import torch

        from deedsr.dataset.worker import prepare_worker

        prepare_worker()
        if one_thread:
            torch.set_num_threads(1)
        self._work = work

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for part in pickle.loads(row["parts"]):
            try:
                result = self._work(part)
            except DeeDSRError as error:
                yield {"result": b""} | cluster.error_values(error)
            else:
                yield {"result": pickle.dumps(result)} | cluster.error_values()
