"""The order in which a run sees its samples: a pure function of (dataset digest, seed, epoch).

The sequence is infinite: epoch after epoch, each holding every sample exactly once; batch k is positions
[k B, (k + 1) B) of it, so a batch may end one epoch and begin the next, and the position of a run is one integer.
Shards are permuted, then contents are permuted inside windows of consecutive shards, so that a reader of remote
shards touches few of them at a time. Variants of one content stay adjacent: they are each other's hard negatives in
contrastive training. Workers read contiguous parts of the batch, rank by rank.
"""

import numpy as np
import pyarrow as pa

from deedsr.dataset.keys import generator


class SampleOrder:
    """Maps positions of the sequence to (epoch, row of the index).

    `index`: rows of `samples.parquet` with `shard` and `content`; `together`: keep the variants of a content adjacent.
    """

    def __init__(self, index: pa.Table, digest: str, seed: int, *, together: bool, window: int = 8):
        self.rows, self.digest, self.seed, self.window = index.num_rows, digest, seed, window
        names, self.shard = np.unique(np.asarray(index["shard"]), return_inverse=True)
        self.windows = -(-len(names) // window)
        content = np.asarray(index["content"]) if together else np.arange(self.rows)
        _, self.group = np.unique(content, return_inverse=True)
        self._epoch: tuple[int, np.ndarray, np.ndarray] = (-1, *np.empty((2, 0), np.int64))  # with windows' ends

    def epoch(self, epoch: int) -> np.ndarray:
        """Row numbers in the order of epoch `epoch`."""
        if self._epoch[0] != epoch:
            rng, window = self._window_of_rows(epoch)
            rank = rng.random(self.group.max() + 1)
            rows = np.lexsort((np.arange(self.rows), rank[self.group], window))
            self._epoch = (epoch, rows, np.cumsum(np.bincount(window)))
        return self._epoch[1]

    def _window_of_rows(self, epoch: int) -> tuple[np.random.Generator, np.ndarray]:
        rng = generator("order", self.digest, self.seed, epoch)
        return rng, rng.permutation(self.shard.max() + 1)[self.shard] // self.window

    def window_at(self, position: int) -> tuple[int, int]:
        """(epoch, number in that epoch) of the window of shards that a position of the sequence lies in."""
        epoch, place = divmod(position, self.rows)
        self.epoch(epoch)
        return epoch, int(np.searchsorted(self._epoch[2], place, side="right"))

    def rows_of_window(self, epoch: int, window: int) -> np.ndarray:
        """Rows of a window, in shard order; behind an epoch's last window the next epoch goes on."""
        epoch, window = epoch + window // self.windows, window % self.windows
        return np.flatnonzero(self._window_of_rows(epoch)[1] == window)

    def slice(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(epoch, row) of the positions [start, stop)."""
        return [(p // self.rows, int(self.epoch(p // self.rows)[p % self.rows])) for p in range(start, stop)]
