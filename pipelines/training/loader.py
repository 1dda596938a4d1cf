"""Reads the micro-batches of one worker ahead of need, decoding on threads."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from pipelines.training.order import SampleOrder

Arrays = dict[str, Any]  # numpy arrays and numbers
Batch = dict[str, torch.Tensor]


def micro_batches(
    order: SampleOrder,
    sample: Callable[[int, int], Arrays],
    *,
    first_step: int,
    last_step: int,
    global_batch: int,
    micro: int,
    world_size: int,
    rank: int,
    threads: int = 2,
    ahead: int = 3,
) -> Iterator[Batch]:
    """The micro-batches of this rank for optimizer steps [first_step, last_step), in order.

    `sample(epoch, row)` gives one sample's arrays; those of a micro-batch are stacked. `ahead` micro-batches are in
    preparation while one is used.
    """
    share = global_batch // world_size

    def spans() -> Iterator[tuple[int, int]]:
        for step in range(first_step, last_step):
            start = step * global_batch + rank * share
            yield from ((begin, begin + micro) for begin in range(start, start + share, micro))

    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[list[Future[Arrays]]] = deque()
        try:
            for span in spans():
                waiting.append([pool.submit(sample, epoch, row) for epoch, row in order.slice(*span)])
                if len(waiting) > ahead:
                    yield _stack([future.result() for future in waiting.popleft()])
            while waiting:
                yield _stack([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stack(samples: list[Arrays]) -> Batch:
    return {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
