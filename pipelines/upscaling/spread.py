"""Upscaling on a cluster with Ray Data: a row is a few pictures, an actor keeps the model for all of its rows."""

import json
import logging
import posixpath
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

from deedsr.errors import DeeDSRError
from pipelines import cluster
from pipelines.placement import Device, place_networks
from pipelines.storage import Storage, open_storage
from pipelines.storage.local import begun_name
from pipelines.upscaling.sources import Source
from pipelines.upscaling.work import Done, Upscaler

__all__ = ["spread"]

logger = logging.getLogger(__name__)

_MAX_PICTURES_PER_ROW = 8
_ROWS_PER_WORKER = 32  # enough that the last row does not keep one worker busy for long


def spread(work: Upscaler, sources: list[Source], workers: int | None, device: Device) -> Iterator[Done]:
    """What comes of each picture, in any order; what a killed worker had is done again by another.

    `workers`: actors at a time, None = on every GPU, or every CPU where the device is the CPU. `device`: see
    `pipelines.placement.place_networks`.
    """
    if not sources:
        return
    data = cluster.data()
    from ray.exceptions import RayError

    plan = place_networks(cluster.offer(), device, workers, "upscale")
    parallel = min(plan.workers, len(sources))
    logger.info("upscale: %s", replace(plan, workers=parallel))
    cluster.wait_for(plan, "--device cpu upscales on CPUs")
    work = replace(work, device=plan.device)
    per_row = min(max(len(sources) // (parallel * _ROWS_PER_WORKER), 1), _MAX_PICTURES_PER_ROW)
    places = [[source.storage.uri, source.path, source.target] for source in sources]
    # As JSON: names of files need not be Unicode, which the strings of Ray's rows must be.
    rows = [{"sources": json.dumps(places[start : start + per_row])} for start in range(0, len(places), per_row)]
    done = data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        _Actor,
        fn_constructor_kwargs={"work": work},
        num_cpus=plan.cpus,
        num_gpus=plan.gpus,
        compute=data.ActorPoolStrategy(min_size=1, max_size=parallel, initial_size=parallel),
    )
    try:
        for row in done.iter_rows():
            cluster.raise_error(row)
            yield Done(*json.loads(row["done"]))
    except RayError as error:
        last = str(error).strip().splitlines()[-1]
        raise DeeDSRError(
            f"upscaling on the cluster failed: {last}; run the same command again, it reuses what is done"
        ) from error
    finally:
        _remove_parts(work.out, {source.target for source in sources})


class _Actor:
    def __init__(self, work: Upscaler):
        import torch

        from deedsr.dataset.worker import prepare_worker

        prepare_worker()
        if work.device == "cpu":
            torch.set_num_threads(1)  # there is an actor for each CPU
        self._work = work

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for uri, path, target in json.loads(row["sources"]):
            try:
                done = self._work(Source(open_storage(uri), path, target))
            except DeeDSRError as error:
                yield {"done": ""} | cluster.error_values(error)
            else:
                yield {"done": json.dumps(done)} | cluster.error_values()


def _remove_parts(out: Storage, targets: set[str]) -> None:
    """Removes what killed workers had begun to write; on S3 nothing is seen of it."""
    if out.local_path("") is None:
        return
    begun = {posixpath.join(posixpath.dirname(path), begun_name(posixpath.basename(path))) for path in targets}
    for upload in out.abandoned_uploads(timedelta(0)):
        if upload.path in begun:
            out.abort(upload)
