"""Seconds of `deedsr compare`, table and page, on stores of 10, 100 and 1,000 runs: SQLite and a server.

    python -m benchmarks.comparison [--runs 10 100 1000]

A quarter of the runs are learners, a quarter adapters with curves of 50 points, the others evaluations of these with
results for 20 samples and, of each tenth, a picture. The server is MLflow's, on loopback, on the same SQLite file. Each
time is that of the whole command, from the start of Python on; processor time is the command's alone. Prints a table,
then one line of JSON.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mlflow.entities import Metric, Param, RunTag

from pipelines import tracking
from pipelines.tracking.store import experiment_id

CURVES = ("loss", "loss_smoothed", "grad_norm", "lr", "samples_per_second", "validation/loss", "validation/psnr_y")
POINTS, OPTIONS, SAMPLES = 50, 60, 20


def add_runs(uri: str, first: int, last: int) -> None:
    """Runs number `first` to `last`; every fourth is a learner, then an adapter of it, then two evaluations of that."""
    client = tracking.connect(uri)
    kinds = ("learner", "adapter", "evaluation", "evaluation")
    experiments = {kind: experiment_id(client, uri, f"deedsr-{kind}", None) for kind in kinds}
    made: dict[str, str] = {}
    for number in range(first, last):
        kind, rng = kinds[number % 4], np.random.default_rng(number)
        run_id = client.create_run(experiments[kind], run_name=f"{kind} {number}").info.run_id
        made = {role: run for role, run in made.items() if role != "evaluation" and kind != "learner"} | {kind: run_id}
        tags = {
            "deedsr.kind": kind,
            "deedsr.dataset.digest": f"{number % 3}" * 64,
            "mlflow.source.git.commit": "c" * 40,
        }
        tags |= {f"deedsr.version.{name}": "1.0" for name in range(8)}
        tags |= {f"deedsr.parent.{role}": run for role, run in made.items() if role != kind and kind != "learner"}
        params = {f"train.option{option}": str(option) for option in range(OPTIONS)} | {"train.lr": str(rng.random())}
        params |= {"metrics": "psnr,ssim", "split": "validation"} if kind == "evaluation" else {}
        points = [Metric(name, float(rng.random()), 0, step) for name in CURVES for step in range(1, POINTS + 1)]
        if kind == "evaluation":
            samples = [{"key": f"{n}", "metrics": {"model": {"psnr": 20 + rng.random()}}} for n in range(SAMPLES)]
            client.log_text(run_id, json.dumps({"samples": samples}), "results.json")
            points = [
                Metric(f"{m}.{name}", float(rng.random()), 0, 0)
                for m in ("model", "bicubic")
                for name in ("psnr", "ssim")
            ]
            if number % 10 == 2:
                client.log_image(run_id, rng.integers(0, 255, (64, 256, 3), np.uint8), artifact_file="pictures/a.png")
        client.log_batch(
            run_id,
            points,
            [Param(key, value) for key, value in params.items()],
            [RunTag(key, value) for key, value in tags.items()],
        )
        client.set_terminated(run_id)


@contextmanager
def server(uri: str, folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", *words], stdout=log, stderr=log)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def seconds(uri: str, folder: Path, *words: str) -> tuple[float, float]:
    """Of the wall clock and of processors."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "deedsr", "compare", *words]
    environment = os.environ | {"MLFLOW_TRACKING_URI": uri}
    subprocess.run(command, env=environment, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[10, 100, 1000])
    sizes = sorted(parser.parse_args().runs)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), 0
        uri = f"sqlite:///{folder}/mlflow.db"
        for size in sizes:
            add_runs(uri, before, size)
            before = size
            with server(uri, folder) as address:
                for store, place in (("SQLite", uri), ("server", address)):
                    page = folder / "page.html"
                    table, table_cpu = seconds(place, folder)
                    paged, page_cpu = seconds(place, folder, "--out", str(page))
                    size_mb = page.stat().st_size / 1e6
                    rows.append(
                        {"runs": size, "store": store, "table_s": table, "table_cpu_s": table_cpu, "page_s": paged}
                        | {"page_cpu_s": page_cpu, "page_mb": size_mb}
                    )
                    print(
                        f"{size:>6} runs  {store:<7} table {table:5.1f} s ({table_cpu:4.1f} s of processors)  "
                        f"page {paged:5.1f} s ({page_cpu:4.1f} s), {size_mb:.1f} MB",
                        flush=True,
                    )
    print(json.dumps({"benchmark": "comparison", "rows": rows}))


if __name__ == "__main__":
    main()
