"""A shards job as a process of its own, on one or more Ray nodes, that kills parts of itself when it is told to.

    python shard_driver.py SOURCE OUT RECIPE_JSON NODES VICTIM SEED

VICTIM: `none`, `worker` (a Ray worker process), `node` (all processes of a Ray node but the head) or `driver` (this
process itself), killed by SIGKILL at a random moment of the work. Prints the digest, and on stderr whom it killed.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import ray
from ray.cluster_utils import Cluster

from deedsr.dataset.recipe import Recipe
from pipelines.shards import generate


def main() -> None:
    source, out, recipe, nodes, victim, seed = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    others = [cluster.add_node(num_cpus=1, object_store_memory=100 << 20) for _ in range(int(nodes) - 1)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    rng = random.Random(int(seed))
    if victim != "none":
        threading.Thread(target=kill, args=(victim, Path(out), rng, cluster, others), daemon=True).start()
    result = generate([source], out, Recipe.model_validate_json(recipe), int(nodes), progress=False)
    print(result.digest, flush=True)
    ray.shutdown()
    cluster.shutdown()


def kill(victim: str, out: Path, rng: random.Random, cluster: Cluster, others: list) -> None:
    """Waits until work has begun and a random time more, then kills."""
    while not list(out.glob("_state/attempts/*")):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1.5))
    if victim == "driver":
        print("killed the driver", file=sys.stderr, flush=True)
        for process in [*psutil.Process().children(recursive=True), psutil.Process()]:
            with contextlib.suppress(psutil.Error):
                process.kill()
    elif victim == "node":
        for process in rng.choice(others).all_processes.values():
            for info in process:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(info.process.pid, signal.SIGKILL)
        print("killed a node", file=sys.stderr, flush=True)
    else:
        while True:
            workers = [p for p in psutil.Process().children(recursive=True) if is_at_work(p)]
            if workers:
                rng.choice(workers).kill()
                print("killed a worker", file=sys.stderr, flush=True)
                return
            time.sleep(0.01)


def is_at_work(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return "ray::FlatMap" in " ".join(process.cmdline())
    return False


if __name__ == "__main__":
    main()
