"""Workers of a training as real processes over gloo, without Ray Train, that tests kill, stop and feed badly.

They are forked from a server that has imported everything, so that starting one costs little.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.config import AdapterOptions, LearnerOptions

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["deepspeed", "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_tiny",
     "diffusers.schedulers.scheduling_ddim", "pipelines.training.loop", "pipelines.training.learner_stage",
     "pipelines.training.adapter_stage"]
)  # fmt: skip


class Curve:
    """Stands where the MLflow run does: a line of JSON per logged step, on disk before a checkpoint is."""

    def __init__(self, folder: Path):
        self.file = (folder / "curve.jsonl").open("a", buffering=1)

    def log_metrics(self, values, step):
        if "loss" in values:
            print(json.dumps([step, values["loss"]]), file=self.file)

    def log_picture(self, name, picture, step): ...

    def logged(self):
        os.fsync(self.file.fileno())
        return []


def execute(source: str, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """Run a script as `python -c` would; what it prints is in `output`."""
    os.environ |= environment
    sys.argv = ["-c", *arguments]
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    exec(compile(source, "worker", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()


def run_script(source: str, world_size: int, arguments: list[str], folder: Path, **environment: str) -> str:
    """What rank 0 of a script printed that every rank of a process group runs."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    environment = environment | address | {"DS_ACCELERATOR": "cpu"}
    outputs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = [
        _context.Process(
            target=execute,
            args=(source, arguments, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output),
            daemon=True,
        )
        for rank, output in enumerate(outputs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1500)
    for process, output in zip(processes, outputs, strict=True):
        assert process.exitcode == 0, output.read_text()[-3000:]
    return outputs[0].read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def work(
    options: LearnerOptions | AdapterOptions,
    life: int,
    rank: int,
    world_size: int,
    port: int,
    bad: dict,
    out: str,
    environment: dict[str, str],
) -> None:
    """One worker. `bad`: what its batches do at which row of the index; see `_spoil`."""
    import numpy as np

    folder = Path(options.out)
    os.dup2(os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= environment
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    options = replace(options, out=out)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    from pipelines.data.dataset import Dataset
    from pipelines.storage import open_storage
    from pipelines.training import checkpoint, health
    from pipelines.training.loop import Loop, make_stage

    dataset = Dataset.open(options.data)
    stage = make_stage(options, dataset)
    sample, loss, end_step, drop_step = stage.sample, stage.loss, stage.end_step, stage.drop_step
    found = checkpoint.committed(open_storage(options.out))
    step, rows = found[-1].step if found else 0, []
    seen = (folder / f"rows-{life}-{rank}.jsonl").open("a", buffering=1)

    def sample_and_row(dataset, index, row, epoch):
        return sample(dataset, index, row, epoch) | {"row": np.int64(row), "epoch": np.int64(epoch)}

    def loss_of_rows(model, batch):
        here = list(zip(batch.pop("epoch").tolist(), batch.pop("row").tolist(), strict=True))
        rows.extend(here)
        return _spoil(loss(model, batch), [bad[row] for _, row in here if row in bad])

    def ended(end):
        def wrapped(*workers):
            nonlocal step
            step += 1
            print(json.dumps([step, rows]), file=seen)
            rows.clear()
            end(*workers)

        return wrapped

    stage.sample, stage.loss = sample_and_row, loss_of_rows
    stage.end_step, stage.drop_step = ended(end_step), ended(drop_step)
    health.listen()
    run = Curve(folder) if rank == 0 else None
    Loop(stage, dataset, torch.device("cpu"), run, asked=health.terminated).train()
    torch.distributed.destroy_process_group()


def _spoil(result, kinds: list[str]):
    """`nan`: the loss is; `gradient`: only its gradient is; `spike`: a thousandfold loss; `sleep`: none comes."""
    loss, numbers = result
    for kind in kinds:
        if kind == "sleep":
            time.sleep(600)
        loss = {"nan": loss * torch.nan, "gradient": loss + (loss * 0).sqrt(), "spike": loss * 1000}[kind]
    return loss, numbers


class Group:
    """The workers of one training, started. `bad` by row of the index; `out`: where not in `options.out` itself, with
    `{rank}` where each worker sees a storage of its own."""

    def __init__(self, options, world_size: int, bad: dict[int, str] | None = None, out: str = ""):
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        life = len(list(self.folder.glob("rows-*-0.jsonl")))
        port = free_port()
        self.processes = [
            _context.Process(
                target=work,
                args=(
                    options,
                    life,
                    rank,
                    world_size,
                    port,
                    bad or {},
                    (out or options.out).format(rank=rank),
                    dict(os.environ),
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def curve(self) -> list[list[float]]:
        path = self.folder / "curve.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] \
            if path.exists() else []  # fmt: skip

    def wait_for_step(self, step: int) -> None:
        """Until that many steps are logged, in this life of the run or an earlier one."""
        deadline = time.monotonic() + 120
        before = len(self.curve())
        while not any(s >= step for s, _ in self.curve()[before:]):
            assert time.monotonic() < deadline, self.log()
            assert self.processes[0].is_alive(), self.log()
            time.sleep(0.01)

    def send(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid, number)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(30)

    def join(self, seconds: float = 240) -> list[int | None]:
        """Exit codes; None for a process that is still there, which is killed then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def finish(self) -> None:
        codes = self.join()
        assert codes == [0] * len(codes), self.log()

    def log(self) -> str:
        return "\n".join(path.read_text()[-3000:] for path in sorted(self.folder.glob("rank-*.log")))

    def batches(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """(step, its global batch as (epoch, row)) of every step that all workers of one life of the run got to."""
        found = []
        for first in self.folder.glob("rows-*-0.jsonl"):
            paths = sorted(self.folder.glob(first.name.replace("-0.", "-*.")))
            parts = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
            for steps in zip(*parts, strict=False):
                found.append((steps[0][0], [tuple(item) for _, rows in steps for item in rows]))
        return found


def run(options, world_size: int, bad: dict[int, str] | None = None) -> Group:
    """A whole training, undisturbed."""
    group = Group(options, world_size, bad)
    group.finish()
    return group


def kill(group: Group, rank: int) -> None:
    """SIGKILL to one worker; the others would wait for it or fail, and are killed too, as Ray Train does."""
    group.send(rank, signal.SIGKILL)
    group.kill()


WORKER = """
import json, os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
if os.environ.get("FLOAT64"):  # all that the project computes in fp32
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    from deepspeed.accelerator import get_accelerator
    get_accelerator().supported_dtypes = lambda: [torch.float64]
dist.init_process_group("gloo")
from pipelines.data.dataset import Dataset
from pydantic import TypeAdapter
from pipelines.training.config import AdapterOptions, LearnerOptions
from pipelines.training.loop import Loop, make_stage

class Curve(list):
    def log_metrics(self, values, step):
        if "loss" in values: self.append([step, values["loss"]])
    def logged(self): return []

curves = []
for kind, tree in json.loads(sys.argv[1]):
    options = TypeAdapter({"learner": LearnerOptions, "adapter": AdapterOptions}[kind]).validate_python(tree)
    dataset = Dataset.open(options.data)
    stage = make_stage(options, dataset)
    def loss(model, batch, loss=stage.loss):
        return loss(model, {name: t.to(wide) if t.is_floating_point() else t for name, t in batch.items()})

    wide = torch.get_default_dtype()
    stage.loss = loss
    stage.build = lambda device, dtype, build=stage.build: build(device, wide)
    curve = Curve()
    Loop(stage, dataset, torch.device("cpu"), curve).train()
    curves.append(curve)
if dist.get_rank() == 0:
    print("CURVES" + json.dumps(curves))
dist.destroy_process_group()
"""


def run_processes(world_size: int, many_options: list, **environment: str) -> list[list[list[float]]]:
    """Loss curves `[[step, loss], ...]` of the trainings, one after the other in the same processes."""
    jobs = json.dumps([["learner" if isinstance(o, LearnerOptions) else "adapter", asdict(o)] for o in many_options])
    with tempfile.TemporaryDirectory() as folder:
        output = run_script(WORKER, world_size, [jobs], Path(folder), **environment)
    line = next(line for line in output.splitlines() if line.startswith("CURVES"))
    return json.loads(line.removeprefix("CURVES"))


def variants(options, out: Path, **changes):
    return replace(options, out=str(out), train=replace(options.train, **changes))


def final(out: Path) -> checkpoint.Checkpoint:
    return checkpoint.committed(open_storage(str(out)))[-1]


def tensors(step: int, values: int = 1000) -> checkpoint.Tensors:
    return {part: {"x": torch.full((values,), float(step))} for part in checkpoint.PARTS}
