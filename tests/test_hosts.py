"""Jobs over several hosts, each with a name and an /etc/hosts of its own, yield what they yield on one machine."""

import hashlib
import json
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import boto3
import hosts
import mlflow
import pytest
import yaml
from hosts import ADDRESSES, BIN, BUCKET, MLFLOW, RAY, Host, Network, Process, wait_until

from deedsr.degradation.recipe import Recipe
from pipelines.storage import open_storage, publish
from pipelines.training import checkpoint

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
NODES = ("node1", "node2")
OBJECT_STORE = f"--object-store-memory={200 << 20}"
LEARNER = ["--preset=tiny", "--train.max_steps=40", "--train.checkpoint_every=5", "--train.log_every=1"]
ADAPTER = ["--preset=tiny", "--base=tiny", "--train.max_steps=6"]
Deedsr = Callable[..., Process]  # starts `deedsr` with these words


@pytest.fixture(scope="module")
def network(photos, tmp_path_factory) -> Iterator[Network]:
    """S3 and MLflow servers on hosts of their own, and the photographs in S3. The tests run on the S3 server's host."""
    if reason := hosts.unsupported():
        pytest.skip(reason)
    with Network(tmp_path_factory.mktemp("hosts")) as network, pytest.MonkeyPatch.context() as patch:
        for name, value in hosts.STORES.items():
            patch.setenv(name, value)
        for name in ("s3", "mlflow"):
            network[name].boot()
        with network["s3"].inside():
            moto = [BIN / "python", "-m", "moto.server", "-H", ADDRESSES["s3"], "-p", "5000"]
            s3 = network["s3"].start(*moto, log="server")
            words = [BIN / "mlflow", "server", "--host", ADDRESSES["mlflow"], "--port", "5000", "--workers", "1"]
            words += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "artifacts"]
            store = network["mlflow"].start(*words, "--serve-artifacts", "--allowed-hosts", "*", log="server")
            wait_until(lambda: answers(hosts.S3), s3)
            boto3.client("s3").create_bucket(Bucket="bucket")
            publish(photos, f"{BUCKET}/photos")
            wait_until(lambda: answers(f"{MLFLOW}/health"), store)
            yield network


def answers(url: str) -> bool:
    with suppress(OSError):
        return urllib.request.urlopen(url, timeout=2).status == 200
    return False


@pytest.fixture(scope="module")
def recipe(network, small_recipe) -> Recipe:
    """Enough work for a node to be lost in the middle of it: shards of one photograph, many variants."""
    fields = small_recipe.model_dump(mode="json")
    fields |= {"variants": 8, "shard": {"min_sources": 1, "target_sources": 1, "max_sources": 2}}
    for name in ("head", *NODES):
        (network[name].folder / "recipe.yaml").write_text(yaml.safe_dump(fields))
    return Recipe.model_validate(fields)


@contextmanager
def cluster(network: Network, names: str) -> Iterator[Deedsr]:
    """A Ray cluster of a head without CPUs and two nodes of one CPU; gives what runs a command on the head.

    `names`: what their /etc/hosts say of themselves. `ray start` is repeated on a node when it ends.
    """
    for name in ("head", *NODES):
        network[name].set_names(names)
        network[name].boot()
    try:
        joined(start_ray(network["head"], "--head", "--num-cpus=0"))
        for process in [start_node(network[name]) for name in NODES]:
            joined(process)
        yield lambda *words, log: network["head"].start(BIN / "deedsr", *words, "--json", log=log, RAY_ADDRESS=RAY)
    finally:
        for name in ("head", *NODES):
            network[name].kill()


def start_ray(host: Host, *words: str) -> Process:
    return host.keep(BIN / "ray", "start", "--block", OBJECT_STORE, *words, log="ray")


def start_node(host: Host) -> Process:
    return start_ray(host, f"--address={RAY}", "--num-cpus=1")


def joined(ray: Process) -> None:
    wait_until(lambda: "Ray runtime started" in ray.log.read_text(), ray)


def shards(deedsr: Deedsr, out: str) -> Process:
    places = ["--source", f"{BUCKET}/photos", "--out", f"{BUCKET}/{out}"]
    return deedsr("shards", *places, "--recipe", "recipe.yaml", log=out.replace("/", "-"))


def learner(deedsr: Deedsr, out: str, workers: int = 2) -> Process:
    places = [f"--data={BUCKET}/local/shards", f"--out={BUCKET}/{out}"]
    devices = [f"--train.num_workers={workers}", "--train.gpus_per_worker=0"]
    return deedsr("train", "learner", *places, *LEARNER, *devices, log=out.replace("/", "-"))


def adapter(deedsr: Deedsr, out: str, workers: int = 2) -> Process:
    places = [f"--data={BUCKET}/local/shards", f"--learner={BUCKET}/local/learner", f"--out={BUCKET}/{out}"]
    devices = [f"--train.num_workers={workers}", "--train.gpus_per_worker=0"]
    return deedsr("train", "adapter", *places, *ADAPTER, *devices, log=out.replace("/", "-"))


def weights(out: str) -> str:
    """SHA-256 of the safetensors files of a model in the bucket."""
    model = open_storage(f"{BUCKET}/{out}")
    files = [entry.path for entry in model.list() if entry.path.endswith(".safetensors") and "step-" not in entry.path]
    assert files
    return hashlib.sha256(b"".join(model.read(path) for path in files)).hexdigest()


def logged_steps(out: str) -> list[int]:
    """Steps of the loss curve in the MLflow store."""
    record = json.loads(open_storage(f"{BUCKET}/{out}").read("training.json"))
    return [metric.step for metric in mlflow.MlflowClient(MLFLOW).get_metric_history(record["run_id"], "loss")]


class Table:
    """What the scenarios made, a row each."""

    def __init__(self) -> None:
        self.rows = [f"{'scenario':<24}" + "".join(f"{part:>32}" for part in ("shards", "learner", "adapter"))]

    def add(self, scenario: str, **made: tuple[str, float]) -> None:
        cells = (f"{made[part][0]:.16} {made[part][1]:5.0f} s" if part in made else "" for part in
                 ("shards", "learner", "adapter"))  # fmt: skip
        self.rows.append(f"{scenario:<24}" + "".join(f"{cell:>32}" for cell in cells))


@pytest.fixture(scope="module")
def table(pytestconfig) -> Iterator[Table]:
    table = Table()
    yield table
    with pytestconfig.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *table.rows, sep="\n")


@pytest.fixture(scope="module")
def local(network, recipe, table) -> dict[str, str]:
    """Digest and weights of one machine that starts a Ray cluster of its own."""
    head = network["head"]
    head.set_names("right")
    head.boot()
    try:
        made = everything(lambda *words, log: head.start(BIN / "deedsr", *words, "--json", log=log), "local", workers=1)
    finally:
        head.kill()
    table.add("one machine", **made)
    return {part: value for part, (value, _) in made.items()}


def everything(deedsr: Deedsr, scenario: str, workers: int) -> dict[str, tuple[str, float]]:
    """Digest or weights, and seconds, of each command."""
    made = {}
    process = shards(deedsr, f"{scenario}/shards")
    made["shards"] = process.result()["digest"], process.seconds
    process = learner(deedsr, f"{scenario}/learner", workers)
    process.result()
    made["learner"] = weights(f"{scenario}/learner"), process.seconds
    process = adapter(deedsr, f"{scenario}/adapter", workers)
    process.result()
    made["adapter"] = weights(f"{scenario}/adapter"), process.seconds
    return made


@pytest.mark.parametrize("names", hosts.NAMES)
def test_every_job_yields_over_two_hosts_what_it_yields_on_one_whatever_etc_hosts_says(network, local, table, names):
    with cluster(network, names) as deedsr:
        made = everything(deedsr, names, workers=2)
    table.add(f"/etc/hosts: {names}", **made)
    assert {part: value for part, (value, _) in made.items()} == local


def kill(node: Host) -> None:
    """A crash, and a reboot at once."""
    node.kill()
    node.boot()
    start_node(node)


def cut(node: Host) -> None:
    """Cut off for 30 seconds."""
    node.cut()
    time.sleep(30)
    node.mend()


FAULTS = pytest.mark.parametrize("fault", [kill, cut], ids=lambda fault: fault.__name__)


@FAULTS
def test_a_shards_job_that_loses_a_node_yields_the_same_digest(network, local, table, fault):
    out = f"{fault.__name__}/shards"
    with cluster(network, "right") as deedsr:
        process = shards(deedsr, out)
        written = lambda: sum(entry.path.endswith(".tar") for entry in open_storage(f"{BUCKET}/{out}").list())
        wait_until(lambda: written() >= 3, process)
        fault(network["node2"])
        result = process.result()
    table.add(f"node2: {fault.__name__}", shards=(result["digest"], process.seconds))
    assert result["digest"] == local["shards"]
    assert result["written"] == written()


@FAULTS
def test_a_training_that_loses_a_node_yields_the_same_weights_and_a_whole_curve(network, local, table, fault):
    out = f"{fault.__name__}/learner"
    with cluster(network, "right") as deedsr:
        process = learner(deedsr, out)
        committed = lambda: [saved.step for saved in checkpoint.committed(open_storage(f"{BUCKET}/{out}"))]
        wait_until(lambda: max(committed(), default=0) >= 10, process)
        fault(network["node2"])
        process.result()
    table.add(f"node2: {fault.__name__}", learner=(weights(out), process.seconds))
    assert weights(out) == local["learner"]
    assert logged_steps(out) == list(range(1, 41))
