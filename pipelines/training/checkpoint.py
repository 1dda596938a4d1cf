"""Checkpoints that belong to no world size: full fp32 tensors as safetensors, committed last.

`OUT/checkpoints/step-00000100/` holds `trained.safetensors` (what trains), `optimizer.safetensors` (its moments),
`state.safetensors` (queue, momentum encoder, averages, the loss window) and `checkpoint.json`, written last: step,
samples seen, loss, metrics, the SHA-256 of each file, and the MLflow run and attempt that wrote it. A folder without
`checkpoint.json` does not count. All workers continue from the checkpoint that rank 0 reads.
"""

import contextlib
import hashlib
import json
import logging
import math
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from deedsr.errors import DeeDSRError
from pipelines.claims import Superseded
from pipelines.storage import Storage, waiting
from pipelines.storage.errors import Faulty

logger = logging.getLogger(__name__)
PARTS = ("trained", "optimizer", "state")
RECORD = "checkpoint.json"
Tensors = dict[str, dict[str, Tensor]]  # by part, then by name


@dataclass
class Checkpoint:
    step: int
    samples_seen: int
    loss: float
    sha256: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)  # as logged last
    unsent: list[list] = field(default_factory=list)  # of earlier versions, see `metrics.py`
    run_id: str = ""  # MLflow run
    attempt: int = 0  # of the claim on the place, see `identity.py`

    @property
    def folder(self) -> str:
        return f"checkpoints/step-{self.step:08d}"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` newest, and the best one by `metric` if there is one."""

    last: int
    metric: str | None = None
    mode: Literal["min", "max"] = "min"

    def kept(self, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
        """Those of `checkpoints` (oldest first) that stay; of equally good ones the oldest."""
        known = [c for c in checkpoints if math.isfinite(c.metrics.get(self.metric or "", math.nan))]
        best = (min if self.mode == "min" else max)(known, key=lambda c: c.metrics[self.metric or ""], default=None)
        return [c for c in checkpoints if c is best or c in checkpoints[-self.last :]]


def write(
    out: Storage,
    checkpoint: Checkpoint,
    tensors: Tensors,
    keep: Keep,
    check: Callable[[], object] = lambda: None,
    beside: Mapping[str, bytes] = MappingProxyType({}),
) -> None:
    """Write, verify and commit; then drop what `keep` does not name and what earlier attempts left.

    `beside`: other files of `out`, which are there before the checkpoint is committed.
    `check` is called before each file, and raises Superseded where the place has become another's.
    """
    for part in PARTS:
        check()
        data, path = save(tensors[part]), f"{checkpoint.folder}/{part}.safetensors"
        with ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(hashlib.sha256, data)
            out.write(path, data)
        checkpoint.sha256[part] = hashed.result().hexdigest()
        # S3 has refused an upload whose checksum is another; a file is read again.
        whole = out.stat(path).size == len(data)
        if whole and out.local_path(path) is not None:
            whole = hashlib.sha256(out.read(path)).hexdigest() == checkpoint.sha256[part]
        if not whole:
            raise Faulty(f"{out.uri}/{path} is not what was written: the disk or the network damages data")
        del data
    for path, data in beside.items():
        check()
        out.write(path, data)
    check()
    out.write(f"{checkpoint.folder}/{RECORD}", json.dumps(asdict(checkpoint)).encode())
    kept = {c.folder for c in keep.kept(committed(out))}
    paths = [e.path for e in out.list("checkpoints/")]
    gone = [p for p in paths if (folder := p.rpartition("/")[0]) not in kept and folder <= checkpoint.folder]
    # The commit records go first: a half-deleted checkpoint no longer counts.
    out.delete_many(sorted(gone, key=lambda path: not path.endswith(f"/{RECORD}")))


def committed(out: Storage) -> list[Checkpoint]:
    """Every committed checkpoint, oldest first; one whose record cannot be read is left out with a warning."""
    found = []
    for path in [e.path for e in out.list("checkpoints/") if e.path.endswith(f"/{RECORD}")]:
        try:
            found.append(Checkpoint(**json.loads(out.read(path))))
        except (ValueError, TypeError) as error:
            logger.warning("%s/%s is damaged (%s): this checkpoint does not count", out.uri, path, error)
        except FileNotFoundError:  # dropped meanwhile
            continue
    return sorted(found, key=lambda c: c.step)


def read_latest(out: Storage) -> tuple[Checkpoint, Tensors] | None:
    """The newest checkpoint whose files are whole; a damaged one is skipped with a warning."""
    found = committed(out)
    for checkpoint in reversed(found):
        try:
            return checkpoint, read(out, checkpoint)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("checkpoint %s/%s is damaged (%s): trying the one before", out.uri, checkpoint.folder, error)
    if found:
        raise DeeDSRError(f"every checkpoint in {out.uri}/checkpoints is damaged: delete that folder to start again")
    return None


def read(out: Storage, checkpoint: Checkpoint) -> Tensors:
    """The tensors of a committed checkpoint. FileNotFoundError or ValueError where it is damaged."""
    tensors: Tensors = {}
    for part in PARTS:
        data = out.read(f"{checkpoint.folder}/{part}.safetensors")
        if hashlib.sha256(data).hexdigest() != checkpoint.sha256[part]:
            raise ValueError(f"{part}.safetensors does not match its SHA-256")
        tensors[part] = load(data)
    return tensors


class Writer:
    """Writes checkpoints, one at a time, and records of skipped steps while training goes on, each on a thread.

    What fails is tried again for as long as `pipelines.storage.waiting` says; then `start` or `wait` raises it, and
    `failure` returns it. `check`: see `write`. `say` gets the lines on what is waited for. A context, in which an
    exception gives up what is still tried.
    """

    def __init__(
        self,
        out: Storage,
        keep: Keep,
        check: Callable[[], object] = lambda: None,
        say: Callable[[str], object] = logger.warning,
    ):
        self.out, self.keep, self._check, self._say = out, keep, check, say
        self._pool, self._records = ThreadPoolExecutor(1, "checkpoint"), ThreadPoolExecutor(1, "incidents")
        self._given_up = threading.Event()
        self._running: Future[None] | None = None
        self.failing = False  # what is being written had to be tried again

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._given_up.set()
        for pool in (self._pool, self._records):
            pool.shutdown(wait=kind is None)

    def record(self, step: int, files: Mapping[str, bytes]) -> None:
        """Begin to write what is kept of a skipped step; dropped with a warning where storage does not take it."""
        self._records.submit(self._record, step, files)

    def _record(self, step: int, files: Mapping[str, bytes]) -> None:
        def write_all() -> None:
            for path, data in files.items():
                self._check()
                self.out.write(path, data)

        try:
            with waiting.within(over=self._given_up):
                waiting.patiently(write_all)
        except DeeDSRError as error:
            logger.warning("there is no record of step %d, which was not taken: %s", step, error)

    def end_records(self) -> None:
        """Until those so far are written or dropped; there may be no more."""
        self._records.shutdown()

    def start(
        self, checkpoint: Checkpoint, tensors: Tensors, beside: Mapping[str, bytes] = MappingProxyType({})
    ) -> None:
        """Begin to write, once the one before is committed. `beside`: see `write`.

        `tensors`: contiguous copies on the CPU, which nobody changes any more.
        """
        self.wait()
        self._running = self._pool.submit(self._persist, checkpoint, tensors, beside)

    def wait(self) -> None:
        """Until the last checkpoint is committed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def busy(self, seconds: float) -> bool:
        """Whether it still writes after so long."""
        return self._running is not None and not wait([self._running], seconds).done

    @property
    def failure(self) -> BaseException | None:
        """Why the last checkpoint was given up. Raises Superseded where the place is another's."""
        failure = self._running.exception() if self._running is not None and self._running.done() else None
        if isinstance(failure, Superseded):
            raise failure
        return failure

    def give_up(self) -> bool:
        """Ends the attempts of a checkpoint that could not be written so far; False where none failed."""
        if self.failing:
            self._given_up.set()
        return self.failing

    def _persist(self, checkpoint: Checkpoint, tensors: Tensors, beside: Mapping[str, bytes]) -> None:
        self.failing = False

        def say(text: str) -> None:
            self.failing = True
            self._say(f"checkpoint of step {checkpoint.step}: {text}; training goes on until the next one is due")

        try:
            with waiting.within(over=self._given_up, say=say):
                waiting.patiently(lambda: write(self.out, checkpoint, tensors, self.keep, self._check, beside))
        except Superseded:
            raise
        except DeeDSRError as error:
            if self.out.local_path("") is not None:  # of a full disk; elsewhere the next commit drops it
                with contextlib.suppress(DeeDSRError):
                    self._check()
                    self.out.delete_many(f"{checkpoint.folder}/{part}.safetensors" for part in PARTS)
            raise DeeDSRError(f"the checkpoint of step {checkpoint.step} could not be written: {error}") from error


def read_agreed(out: Storage, device: torch.device) -> tuple[Checkpoint, Tensors] | None:
    """Rank 0's newest whole checkpoint, on every worker; None where rank 0 finds none. A collective.

    Raises the DeeDSRError of rank 0 on every worker, and one where a worker cannot read what rank 0 has chosen.
    """
    rank = dist.get_rank()
    found: tuple[Checkpoint, Tensors] | None = None
    chosen: list[Any] = [None]
    if rank == 0:
        try:
            found = read_latest(out)
            chosen = [found and found[0]]
        except DeeDSRError as error:
            chosen = [error]
    dist.broadcast_object_list(chosen, src=0, device=device)
    [last] = chosen
    if isinstance(last, DeeDSRError):
        raise last
    if rank == 0 or last is None:
        return found
    try:
        return last, read(out, last)
    except (FileNotFoundError, ValueError) as reason:
        raise DeeDSRError(
            f"worker {rank} cannot read {out.uri}/{last.folder}, from which worker 0 continues ({reason}): "
            f"{out.uri} must be the same storage on every node"
        ) from reason
