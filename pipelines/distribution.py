"""Work on the parts of an input: in threads, or on the cluster in tasks or in actors, which keep what they load."""

import logging
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from deedsr.errors import DeeDSRError, UsageError
from pipelines import cluster
from pipelines.placement import NETWORK_WORKER, Device, WorkPlan, place_networks
from pipelines.storage.errors import not_shared

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_PER_ITEM = 8
_ITEMS_PER_WORKER = 32  # so many that the last item is short


def network_plan(command: str, device: Device, workers: int | None = None, parts: int | None = None) -> WorkPlan:
    """Where on the cluster `command` computes its networks; waits until the first worker can start there.

    `workers`: at a time, None = on every GPU, or every CPU where the device is the CPU; never more than `parts`.
    `device`: see `pipelines.placement.place_networks`. Raises UsageError where no worker could ever start.
    """
    cluster.connect()
    plan = place_networks(cluster.offer(), device, workers, command)
    plan = replace(plan, workers=min(plan.workers, parts or plan.workers))
    logger.info("%s: %s", command, plan)
    cluster.wait_for(plan, f"--device cpu runs `{command}` on CPUs")
    return plan


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int | None = None
) -> Iterator[Result]:
    """`function` of each item, in order. Items are taken and begun at most `ahead` places before the result in use, by
    default twice the threads."""
    rest = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        begun = deque(pool.submit(function, item) for item in islice(rest, ahead or 2 * threads))
        while begun:
            result = begun.popleft().result()
            begun.extend(pool.submit(function, item) for item in islice(rest, 1))
            yield result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def parts_per_item(parts: int, workers: int) -> int:
    return min(max(parts // (workers * _ITEMS_PER_WORKER), 1), _MOST_PER_ITEM)


def each(work: Callable[[Item], Result], parts: Sequence[Item], plan: WorkPlan, command: str) -> Iterator[Result]:
    """`work` on each part in actors that hold networks, see `distribute`."""
    size = parts_per_item(len(parts), plan.workers)
    need = f"{plan.workers} workers take {plan.workers * NETWORK_WORKER / 1e9:.1f} GB with a model such as tiny"
    return distribute(
        partial(_each, work),
        [parts[start : start + size] for start in range(0, len(parts), size)],
        actors=plan,
        failure=f"`{command}` failed on the cluster",
        less=f"{need}; fewer --workers or a smaller --tile need less",
    )


def _each(work: Callable[[Item], Result], parts: Sequence[Item]) -> Iterator[Result]:
    return map(work, parts)


def distribute(
    work: Callable[[Item], Iterable[Result]],
    items: Sequence[Item],
    *,
    failure: str,
    less: str,
    actors: WorkPlan | None = None,
    tasks: int | None = None,
    again: str = "run the same command again",
) -> Iterator[Result]:
    """The results of all items, in any order; the items of a killed worker are done again by another.

    `actors`: work in actors of this plan, of which each keeps its copy of `work`; else in `tasks` of one CPU at a time,
    None for as many as the cluster holds, nodes that an autoscaler adds included. `work` raises DeeDSRError for what
    would fail with every other item as well; it, items and results pickle. Where Ray fails, the error says `failure`,
    `less` (what needs less memory, where that ran out) and `again`.
    """
    data = _ray_data()
    from ray.exceptions import RayError

    rows = data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    if actors:
        most = min(actors.workers, len(items))
        results = rows.flat_map(
            _Actor,
            # On CPUs there is an actor for each of them.
            fn_constructor_kwargs={"work": work, "one_thread": actors.device == "cpu"},
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            compute=data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        )
    else:
        at_once = data.TaskPoolStrategy(size=tasks and min(tasks, len(items)))
        results = rows.flat_map(partial(_results, work), num_cpus=1, compute=at_once)
    try:
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, DeeDSRError):
                raise result
            yield result
    except RayError as error:
        raise DeeDSRError(f"{failure}: {cluster.failure_message(error, less)}; {again}") from error


def _ray_data() -> Any:
    """`ray.data` on the connected cluster, without its progress bars and log lines: the commands have their own."""
    cluster.connect()
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would log as an error is raised, too
    return ray.data


class _Actor:
    def __init__(self, work: Callable[[Any], Iterable[Any]], one_thread: bool):
        import torch

        from deedsr.degradation.chain import prepare_worker

        prepare_worker()
        if one_thread:
            torch.set_num_threads(1)
        self._work = work

    def __call__(self, row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
        return _results(self._work, row)


def _results(work: Callable[[Any], Iterable[Any]], row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
    """An error is a result as well: an exception would come back wrapped in Ray's traceback."""
    try:
        for result in work(pickle.loads(row["item"])):
            yield {"result": pickle.dumps(result)}
    except (DeeDSRError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError):  # local files have a `filename`
            removed = DeeDSRError(f"{error} is missing: it was removed meanwhile; run the same command again")
            error = not_shared(error.filename) if error.filename else removed
        kind = UsageError if isinstance(error, UsageError) else DeeDSRError  # others need not pickle
        text = str(error).encode(errors="backslashreplace").decode()  # names of files need not be Unicode
        yield {"result": pickle.dumps(kind(text))}
