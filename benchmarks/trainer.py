"""What the trainer costs beside its arithmetic: steps/s of `deedsr train adapter` against a bare PyTorch loop.

    python -m benchmarks.trainer [--data LATENTS] [--steps 200] [--rounds 2]

Both arms train `tiny`'s adapter with the same options, networks, micro-batches and one compute thread. The bare loop
has its batches in memory and knows neither Ray, DeepSpeed, MLflow nor shards; the trainer is the command as a user
types it, its rate taken from its own MLflow run. Warm-up steps are left out of both. Arms run in turns, each in a
process of its own. Also: seconds from the command to its first step, and bytes of gradients and optimizer state that
belong to frozen networks. Without `--data`, latents of the shipped photographs are made first.
Prints a table and, last, one JSON line.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from typing import Any

from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions, TrainOptions
from pipelines.training.schedules import PRESETS

GOAL, START_GOAL_SECONDS = 0.95, 35
WARM_UP = 10
LOG_EVERY = 10


def options(data: str, out: str, steps: int) -> AdapterOptions:
    """The `tiny` preset, as `trainer_command` asks for it."""
    preset = PRESETS["adapter"]["tiny"]
    train = preset["train"] | {"max_steps": steps + WARM_UP}
    return AdapterOptions(
        data=data,
        learner="tiny",
        base="tiny",
        out=out,
        model=AdapterModelOptions(**preset["model"]),
        diffusion=DiffusionOptions(**preset["diffusion"]),
        train=TrainOptions(**train),
    )


def trainer_command(data: str, out: str, steps: int, log_every: int) -> list[str]:
    return [
        *(sys.executable, "-m", "deedsr", "train", "adapter", "--preset", "tiny", "--json"),
        *("--data", data, "--learner", "tiny", "--base", "tiny", "--out", out),
        *("--train.num_workers", "1", "--train.compute_threads", "1"),  # as the bare loop
        *("--train.max_steps", str(steps), "--train.checkpoint_every", str(10**6), "--train.validate_every", "0"),
        *("--train.log_every", str(log_every)),
    ]


def trained(data: str, work: str, steps: int, log_every: int) -> tuple[float, dict[str, list[Any]]]:
    """When the command was typed, and its run's metric histories."""
    from pipelines import tracking

    began = time.time()
    store = f"sqlite:///{work}/mlflow.db"
    with tempfile.TemporaryDirectory(dir=work) as out:
        done = subprocess.run(
            trainer_command(data, f"{out}/adapter", steps, log_every),
            env=os.environ | {"MLFLOW_TRACKING_URI": store},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    client, run_id = tracking.connect(store), json.loads(done.stdout)["run_id"]
    names = ("samples_per_second", "data_wait_share", "loss")
    return began, {name: client.get_metric_history(run_id, name) for name in names}


def trainer_arm(data: str, work: str, steps: int) -> tuple[float, float]:
    """Steps per second after the warm-up, and the mean share of a step that waited for data."""
    _, metrics = trained(data, work, steps + WARM_UP, LOG_EVERY)
    batch = PRESETS["adapter"]["tiny"]["train"]["global_batch_size"]
    rates = [m.value / batch for m in metrics["samples_per_second"] if m.step > WARM_UP]
    waits = [m.value for m in metrics["data_wait_share"] if m.step > WARM_UP]
    return statistics.harmonic_mean(rates), statistics.mean(waits)


def first_step_seconds(data: str, work: str) -> float:
    began, metrics = trained(data, work, 2, 1)
    return min(m.timestamp for m in metrics["loss"]) / 1000 - began


def bare_arm(data: str, steps: int) -> dict[str, float]:
    """The same arithmetic as a plain loop. Runs in a process of its own."""
    import numpy as np
    import torch

    from pipelines.data.dataset import Dataset
    from pipelines.training.adapter_stage import AdapterStage
    from pipelines.training.config import micro_batch
    from pipelines.training.schedules import learning_rate

    torch.set_num_threads(1)
    dataset = Dataset.open(data)
    plan = options(data, "", steps).train
    stage = AdapterStage(options(data, "", steps), dataset.scale, dataset.manifest.latents)
    module = stage.build(torch.device("cpu"), torch.float32)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, plan.lr, weight_decay=plan.weight_decay)
    averages = [p.detach().clone() for p in trained]
    micro, accumulation = micro_batch(plan, 1)
    index = dataset.index("train")
    samples = [stage.sample(dataset, index, row % index.num_rows, 0) for row in range(16 * micro)]
    batches = [
        {name: torch.from_numpy(np.stack([s[name] for s in samples[i : i + micro]])) for name in samples[0]}
        for i in range(0, len(samples), micro)
    ]
    for step in range(steps + WARM_UP):
        if step == WARM_UP:
            began = time.perf_counter()
        for part in range(accumulation):
            loss, _ = stage.loss(module, batches[(step * accumulation + part) % len(batches)])
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(trained, plan.clip_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, trained, 1 - plan.ema_decay)
    seconds = time.perf_counter() - began
    networks = [getattr(stage, name) for name in ("unet", "vae", "learner") if hasattr(stage, name)]
    frozen = [p for network in networks for p in network.parameters()]
    held = sum(p.grad.nbytes for p in frozen if p.grad is not None)
    held += sum(t.nbytes for p in frozen for t in optimizer.state.get(p, {}).values())
    return {"steps_per_second": steps / seconds, "frozen_bytes": held}


def in_process(data: str, steps: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.trainer", "--bare", "--data", data, "--steps", str(steps)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def shipped_latents(work: str) -> str:
    photos, store = files("deedsr") / "assets" / "photos" / "train", f"sqlite:///{work}/mlflow.db"
    for command in (
        f"shards --source {photos} --out {work}/shards",
        f"latents --data {work}/shards --base tiny --learner tiny --out {work}/latents",
    ):
        subprocess.run(
            [sys.executable, "-m", "deedsr", *command.split()],
            env=os.environ | {"MLFLOW_TRACKING_URI": store},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return f"{work}/latents"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.bare:
        print(json.dumps(bare_arm(asked.data, asked.steps)))
        return
    with tempfile.TemporaryDirectory() as work:
        data = asked.data or shipped_latents(work)
        bare, trainer, waits, frozen = [], [], [], 0.0
        for _ in range(asked.rounds):
            numbers = in_process(data, asked.steps)
            bare.append(numbers["steps_per_second"])
            frozen = max(frozen, numbers["frozen_bytes"])
            rate, wait = trainer_arm(data, work, asked.steps)
            trainer.append(rate)
            waits.append(wait)
        bare.append(in_process(data, asked.steps)["steps_per_second"])  # a machine that slows down shows
        start = first_step_seconds(data, work)
    share = statistics.mean(trainer) / statistics.mean(bare)
    print(f"{'steps/s':24}" + "".join(f"{f'round {i + 1}':>10}" for i in range(len(bare))))
    print(f"{'bare loop':24}" + "".join(f"{rate:10.3f}" for rate in bare))
    print(f"{'deedsr train adapter':24}" + "".join(f"{rate:10.3f}" for rate in trainer))
    print(f"trainer / bare loop {share:.1%} (goal {GOAL:.0%}); waiting for data {statistics.mean(waits):.1%} of a step")
    print(f"command to first step {start:.1f} s (goal {START_GOAL_SECONDS} s)")
    print(f"gradients and optimizer state of frozen networks: {frozen:.0f} bytes (goal 0)")
    result = {
        "steps": asked.steps,
        "bare_steps_per_second": [round(rate, 4) for rate in bare],
        "trainer_steps_per_second": [round(rate, 4) for rate in trainer],
        "share": round(share, 4),
        "goal": GOAL,
        "data_wait_share": round(statistics.mean(waits), 4),
        "first_step_seconds": round(start, 1),
        "first_step_goal": START_GOAL_SECONDS,
        "frozen_bytes": frozen,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
