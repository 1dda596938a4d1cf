"""What a GPU computes, and how fast: numbers against the CPU's, both trainings, latents, sampling, shards, a profile.

    python -m benchmarks.gpu [--arms numerics training sampling] [--minutes 6] [--work FOLDER] [--size full]

Without a GPU everything runs at a tiny size on the CPU, for form. With one, `training`, `learner`, `latents`,
`sampling` and `profile` run at Stable Diffusion 2.1-base's size, with random weights that are written into `--work`
first (5 GB, kept). Arms: numerics, training, sampling (the default set), more-training, layouts (compilation,
channels-last), trainer (with Ray), learner, latents, more-sampling (in tiles, offloaded, compiled), shards (with Ray),
profile (with the ways to compute the DA blocks' per-sample convolution); or `all`. An arm begins no further measurement
after `--minutes`, and each measurement has a process of its own, so that one that fails says so and the others go on.
What is measured is kept in `--work`/results.jsonl at once. Needs this checkout and its dependencies, and no network.
Prints tables and, last, one JSON line.

Bounds that are checked: the first loss on GPU and CPU within 1e-5 in fp32 (TF32 off); later ones no further apart than
twice what two CPU runs are whose rounding differs; bf16's mean loss of 50 steps within 1 % of fp32's; stopped
and continued equal to undisturbed; pictures in fp32, bf16 and fp16 at 60, 50 and 55 dB of the CPU's.
"""

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.machine import this_machine

DEFAULT = ("numerics", "training", "sampling")
DECIBELS = {"fp32": 60, "bf16": 50, "fp16": 55}
GOALS = {"samples_per_second": 180, "share": 0.95, "seconds": 0.8, "seconds_of_16": 0.25}
Row = dict[str, Any]


class Bench:
    """Runs tasks, and keeps what they gave. Rows: what was asked, what was measured, `ok` where there is a bound."""

    def __init__(self, work: Path, size: str, device: str, minutes: float):
        self.work, self.size, self.device, self.seconds = work, size, device, 60 * minutes
        self.rows: list[Row] = []
        self.arm, self._until = "", math.inf
        self._cards: dict[str, Row | None] = {}
        self.measured = 5.0 if device == "cuda" else 0.5  # seconds of a rate
        work.mkdir(parents=True, exist_ok=True)

    def begin(self, arm: str) -> None:
        self.arm, self._until = arm, time.monotonic() + self.seconds

    def task(self, task: str, device: str | None = None, **asked: Any) -> Row | None:
        """What a task answers; None, and a row that says why, where it failed or there is no time left."""
        left = self._until - time.monotonic()
        if left <= 0:
            self.keep({"task": task, **asked, "failed": "no time left"})
            return None
        device = device or self.device
        asked = {"size": self.size, "work": str(self.work), **asked}
        environment = os.environ | {"DS_ACCELERATOR": device, "OMP_WAIT_POLICY": "passive"}
        if device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        command = [sys.executable, "-m", "benchmarks.gpu_tasks", task, json.dumps(asked)]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=left + 60)
            said = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
            if said:
                return json.loads(said[-1].removeprefix("ANSWER"))
            why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")
        except subprocess.TimeoutExpired:
            why = "took too long"
        self.keep({"task": task, **asked, "failed": why[-300:]})
        return None

    def card(self, precision: str) -> Row | None:
        """The device's rate of a large product of matrices, measured once."""
        if precision not in self._cards:
            self._cards[precision] = self.task("matmul", precision=precision, seconds=1)
        return self._cards[precision]

    def keep(self, row: Row) -> None:
        row = {"arm": self.arm, **row}
        self.rows.append(row)
        with (self.work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {key: value for key, value in row.items() if key not in ("arm", "work", "operators")}
        print(f"{self.arm:14}" + "  ".join(f"{key} {_short(value)}" for key, value in shown.items()), flush=True)
        for name, share in row.get("operators", {}).items():
            print(f"{'':14}{share:6.1%}  {name}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- arms


def numerics(bench: Bench) -> None:
    """Losses and pictures of `tiny`, on this device and on the CPU."""
    for stage, micro in (("adapter", 2), ("learner", 32)):
        _losses(bench, stage, micro)
    folder = Path(tempfile.mkdtemp(dir=bench.work))
    sample = lambda name, **asked: (
        bench.task("picture", out=str(folder / name), steps=8, side=64, size="tiny", **asked) is not None
        and np.load(folder / name)
    )
    expected = sample("cpu.npy", device="cpu", precision="fp32")
    # On a CPU fp32 is what is expected, and fp16 takes minutes.
    for precision in DECIBELS if bench.device == "cuda" else ("bf16",):
        found = sample(f"{precision}.npy", precision=precision)
        if expected is not False and found is not False:
            psnr = float(-10 * np.log10(np.mean((found - expected) ** 2) + 1e-12))
            bench.keep({"what": f"picture, {precision} against the CPU", "psnr_db": psnr,
                        "ok": psnr >= DECIBELS[precision]})  # fmt: skip
    shutil.rmtree(folder)


def _losses(bench: Bench, stage: str, micro: int) -> None:
    def losses(runs: dict[str, Row], device: str | None = None) -> dict[str, list[float]]:
        asked = {"stage": stage, "micro": micro, "size": "tiny", "runs": list(runs.values())}
        answer = bench.task("losses", device, **asked)
        curves = dict(zip(runs, answer["losses"], strict=True)) if answer else {}
        for name, curve in curves.items():
            if isinstance(curve, str):
                bench.keep({"what": f"{stage}, {name}", "failed": curve[-300:]})
        return {name: curve for name, curve in curves.items() if not isinstance(curve, str)}

    on_cpu = bench.device == "cpu"
    stages = (2,) if on_cpu else (0, 1, 2, 3)
    whole = {f"ZeRO {zero}": {"steps": 20, "precision": "bf16", "zero": zero} for zero in stages}
    stopped = {f"{name}, stopped": run | {"stop": 10} for name, run in whole.items()}
    here = losses({"fp32": {"steps": 50}, "bf16": {"steps": 50, "precision": "bf16"}, **whole, **stopped})
    # Other threads alone round alike at this size: the weights differ by two units in the last place too.
    otherwise = {"steps": 20, "threads": 2, "nudge": 2**-22}
    reference = losses({"fp32": {"steps": 20}, "rounded otherwise": otherwise}, "cpu")
    if "fp32" in here and len(reference) == 2:
        cpu, other = reference.values()
        apart = lambda one, other: max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))
        first, later = apart(here["fp32"][:1], cpu[:1]), apart(here["fp32"][:20], cpu)
        bound = max(2 * apart(other, cpu), 1e-6)
        bench.keep({"what": f"{stage}, fp32 against the CPU", "first_step": first, "ok": first <= 1e-5})
        bench.keep({"what": f"{stage}, 20 steps", "apart": later, "bound": bound, "ok": later <= bound})
    if {"fp32", "bf16"} <= here.keys():
        off = float(abs(np.mean(here["bf16"]) / np.mean(here["fp32"]) - 1))
        bench.keep({"what": f"{stage}, bf16, mean loss of 50 steps", "off": off, "ok": off <= 0.01})
    for name in whole:
        if {name, f"{name}, stopped"} <= here.keys():
            what = f"{stage}, bf16, {name}, stopped at 10 and continued"
            bench.keep({"what": what, "ok": here[name] == here[f"{name}, stopped"]})


def training(
    bench: Bench,
    sizes: tuple[int, ...] = (8,),
    on_cpu: int = 2,
    loops: tuple[str, ...] = ("bare", "engine"),
    **asked: Any,
) -> None:
    """Adapter on latents: a bare loop and the trainer's engine in turns, with the device's matrix rate beside."""
    asked = {"stage": "adapter", "precision": "bf16", "seconds": bench.measured} | asked
    card = bench.card("tf32" if asked.get("tf32") else asked["precision"])
    for micro in sizes if bench.device == "cuda" else (on_cpu,):
        rates = {}
        for loop in loops:
            answer = bench.task("train", loop=loop, zero=2 if loop == "engine" else 0, micro=micro, **asked)
            if answer is None:
                continue
            rates[loop] = answer["samples_per_second"]
            of_card = {"share_of_card": answer["tflops"] / card["tflops"]} if card and "tflops" in answer else {}
            bench.keep({"loop": loop, "micro": micro, **asked, **answer, **of_card})
        if len(rates) == 2:
            share = rates["engine"] / rates["bare"]
            bench.keep({"what": f"engine / bare loop, micro-batch {micro}", "share": share, "goal": GOALS["share"]})


def more_training(bench: Bench) -> None:
    training(bench, (16, 32, 64))
    training(bench, (32,), checkpointing=True)
    training(bench, (4,), latents=False)
    for tf32 in (False, True):
        training(bench, (2,), loops=("bare",), precision="fp32", tf32=tf32)


def layouts(bench: Bench) -> None:
    """What compilation and channels-last are worth. Compiling takes minutes on a CPU, where tests do it."""
    if bench.device == "cuda":
        training(bench, (8, 32), compile=True)
    training(bench, (32,), loops=("bare",), channels_last=False)


def learner(bench: Bench) -> None:
    if bench.size == "full":
        training(bench, (48,), stage="learner")
    training(bench, (32,), on_cpu=32, stage="learner", size="tiny")


def latents(bench: Bench) -> None:
    for precision, compiled in (("bf16", False), ("fp32", False), ("bf16", True)):
        if compiled and bench.device == "cpu":
            continue  # takes minutes
        asked = {"micro": 16 if bench.device == "cuda" else 2, "precision": precision, "seconds": bench.measured}
        card = bench.card("bf16" if precision == "bf16" else "tf32")
        answer = bench.task("latents", compile=compiled, **asked)
        if answer and card:
            bench.keep(asked | {"compile": compiled} | answer | {"share_of_card": answer["tflops"] / card["tflops"]})


def sampling(
    bench: Bench,
    cases: tuple[tuple[int, int, int], ...] = ((128, 1, 50),),
    precisions: tuple[str, ...] = ("fp16",),
    **more: Any,
) -> None:
    """`cases`: (LR side, pictures, steps). A CPU is slow in half precision."""
    for precision in precisions if bench.device == "cuda" else ("fp32",):
        for side, pictures, steps in cases if bench.device == "cuda" else ((32, 1, 4),):
            asked = {"side": side, "pictures": pictures, "steps": steps, "precision": precision, **more}
            if answer := bench.task("sampling", **asked):
                bench.keep(asked | answer | ({"goal": GOALS["seconds"]} if (side, pictures) == (128, 1) else {}))


def more_sampling(bench: Bench) -> None:
    cases = ((128, 1, 15), (128, 4, 50), (128, 16, 50), (512, 1, 50))
    sampling(bench, cases)
    sampling(bench, ((128, 1, 50),), ("fp32", "bf16"))
    sampling(bench, ((128, 1, 50), (512, 1, 10)), offload=True)
    sampling(bench, ((512, 1, 10),), tile=512)
    if bench.device == "cuda":
        sampling(bench, ((128, 1, 50), (128, 16, 50)), compile=True)


def profile(bench: Bench) -> None:
    adapter: Row = {"stage": "adapter", "micro": 8 if bench.device == "cuda" else 2, "precision": "bf16"}
    statistics: Row = {"stage": "learner", "size": "tiny", "micro": 32, "precision": "bf16"}
    for task, asked in (("profile", adapter), ("profile", statistics), ("depthwise", adapter)):
        if answer := bench.task(task, **asked, **({"seconds": bench.measured} if task == "depthwise" else {})):
            bench.keep({"task": task} | asked | answer)


def shards(bench: Bench) -> None:
    """`deedsr shards` of 4K sources on all cores."""
    from benchmarks.sources_4k import make_sources

    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        count = 4 * this_machine().cpus if bench.device == "cuda" else 2
        make_sources(Path(folder) / "sources", count)
        command(bench, f"shards --source {folder}/sources --out {folder}/shards --tracking false")


def trainer(bench: Bench) -> None:
    """`deedsr train adapter` on latents of the shipped photographs, and a bare loop at its micro-batch."""
    from pipelines import tracking

    photographs = Path(__file__).parent.parent / "deedsr" / "assets" / "photos" / "train"
    places = "--base tiny --learner tiny"
    preset, steps = "tiny", 20
    if bench.size == "full":
        places, preset, steps = f"--base {bench.work}/base --learner {bench.work}/learner", "fast", 100
    device = "" if bench.device == "cuda" else "--train.gpus_per_worker 0 --train.num_workers 1"
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        made = command(bench, f"shards --source {photographs} --out {folder}/shards", **store)
        made = made and command(bench, f"latents --data {folder}/shards {places} --out {folder}/latents", **store)
        if made is None:
            return
        began = time.time()
        line = f"train adapter --preset {preset} --data {folder}/latents {places} --out {folder}/adapter {device}"
        trained = command(bench, f"{line} --train.max_steps {steps} --train.log_every 5", **store)
        ended = time.time()
        if trained is None:
            return
        client = tracking.connect(store["MLFLOW_TRACKING_URI"])
        history = lambda name: client.get_metric_history(trained["run_id"], name)
        rate = float(np.mean([m.value for m in history("samples_per_second") if m.step > 5]))
        at = [m.timestamp / 1000 for m in history("loss")]
        asked = client.get_run(trained["run_id"]).data.params
    micro, precision = int(asked["train.micro_batch_size"]), asked["train.precision"]
    row = {"micro": micro, "precision": precision, "samples_per_second": rate, "seconds_to_step_5": at[0] - began,
           "seconds_from_last_step": ended - at[-1]}  # fmt: skip
    if bare := bench.task("train", stage="adapter", loop="bare", micro=micro, precision=precision,
                          seconds=bench.measured):  # fmt: skip
        row |= {"share_of_bare_loop": rate / bare["samples_per_second"], "goal": GOALS["share"]}
    bench.keep(row)


def command(bench: Bench, line: str, **environment: str) -> Row | None:
    """The result of a command of `deedsr`; None, and a row that says why, where it failed."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deedsr", *line.split(), "--json"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=bench.seconds + 60,
    )
    row: Row = {"command": " ".join(line.split()[:2]), "seconds_in_all": time.monotonic() - began}
    if done.returncode:
        bench.keep(row | {"failed": done.stderr.strip().splitlines()[-1][-300:]})
        return None
    result = json.loads(done.stdout)
    bench.keep(row | {k: v for k, v in result.items() if isinstance(v, int | float)})
    return result


ARMS: dict[str, Callable[[Bench], None]] = {
    "numerics": numerics,
    "training": training,
    "sampling": sampling,
    "more-training": more_training,
    "layouts": layouts,
    "trainer": trainer,
    "learner": learner,
    "latents": latents,
    "more-sampling": more_sampling,
    "shards": shards,
    "profile": profile,
}


def surroundings(device: str) -> Row:
    import torch

    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit or "unknown"}
    return {"card": card, "cores": this_machine().cpus, **versions}


def wants(arms: list[str]) -> Iterator[str]:
    yield from ARMS if "all" in arms else arms


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(DEFAULT), choices=[*ARMS, "all"])
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--size", choices=("tiny", "full"))
    parser.add_argument("--work", type=Path)
    asked = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = asked.size or ("full" if device == "cuda" else "tiny")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(asked.work or Path(folder), size, device, asked.minutes)
        about = surroundings(device)
        bench.keep(about)
        if size == "full" and not (bench.work / "learner").exists() and set(asked.arms) - {"numerics", "shards"}:
            from benchmarks.full_size import write_base

            write_base(bench.work)
        for arm in wants(asked.arms):
            bench.begin(arm)
            ARMS[arm](bench)
    bounds = [row for row in bench.rows if "ok" in row]
    failed = [row for row in bench.rows if "failed" in row]
    print(f"{sum(row['ok'] for row in bounds)} of {len(bounds)} bounds hold; {len(failed)} measurements failed")
    print(json.dumps(about | {"device": device, "size": size, "rows": bench.rows[1:]}))
    sys.exit(bool(failed) or not all(row["ok"] for row in bounds))


if __name__ == "__main__":
    main()
