"""Jobs over several hosts, each with a name and an /etc/hosts of its own, yield what they yield on one machine."""

import hashlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import boto3
import hosts
import mlflow
import pytest
import yaml
from fault_proxy import FaultProxy
from hosts import ADDRESSES, BIN, BUCKET, MLFLOW, RAY, Host, Network, Process, wait_until

from deedsr.dataset.recipe import Recipe
from pipelines.storage import open_storage, publish
from pipelines.training import checkpoint

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]
NODES = ("node1", "node2")
OBJECT_STORE = f"--object-store-memory={200 << 20}"
LEARNER = ["--preset=tiny", "--train.max_steps=40", "--train.checkpoint_every=5", "--train.log_every=1"]
ADAPTER = ["--preset=tiny", "--base=tiny", "--train.max_steps=6"]
ENDLESS = ["--train.max_steps=1000000", "--train.schedule=constant", "--train.keep_checkpoints=1000"]
WORKER = "ray::RayTrainWorker"
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
def cluster(network: Network, names: str = "right", **environment: str) -> Iterator[Deedsr]:
    """A Ray cluster of a head without CPUs and two nodes of one CPU; gives what runs a command on the head.

    `names`: what their /etc/hosts say of themselves; `environment`: of Ray and of the command. `ray start` is repeated
    on a node when it ends.
    """
    for name in ("head", *NODES):
        network[name].set_names(names)
        network[name].boot()
    try:
        joined(start_ray(network["head"], "--head", "--num-cpus=0", **environment))
        for process in [start_node(network[name], **environment) for name in NODES]:
            joined(process)
        environment = {"RAY_ADDRESS": RAY} | environment
        yield lambda *words, log: network["head"].start(BIN / "deedsr", *words, "--json", log=log, **environment)
    finally:
        for name in ("head", *NODES):
            network[name].kill()


def start_ray(host: Host, *words: str, **environment: str) -> Process:
    (host.folder / "log" / "ray").unlink(missing_ok=True)  # `joined` reads there whether this one has started
    return host.keep(BIN / "ray", "start", "--block", OBJECT_STORE, *words, log="ray", **environment)


def start_node(host: Host, **environment: str) -> Process:
    return start_ray(host, f"--address={RAY}", "--num-cpus=1", **environment)


def joined(ray: Process) -> None:
    wait_until(lambda: "Ray runtime started" in ray.log.read_text(), ray)


def shards(deedsr: Deedsr, out: str) -> Process:
    places = ["--source", f"{BUCKET}/photos", "--out", f"{BUCKET}/{out}"]
    return deedsr("shards", *places, "--recipe", "recipe.yaml", log=out.replace("/", "-"))


def learner(deedsr: Deedsr, out: str, workers: int | str = 2, *options: str) -> Process:
    places = [f"--data={BUCKET}/local/shards", f"--out={BUCKET}/{out}"]
    devices = [f"--train.num_workers={workers}", "--train.gpus_per_worker=0"]
    return deedsr("train", "learner", *places, *LEARNER, *devices, *options, log=out.replace("/", "-"))


def saved(out: str) -> list[checkpoint.Checkpoint]:
    return checkpoint.committed(open_storage(f"{BUCKET}/{out}"))


def wait_for_step(out: str, step: int, process: Process) -> None:
    """Until a checkpoint of that step or a later one is committed."""
    wait_until(lambda: bool(done := saved(out)) and done[-1].step >= step, process)


def tars(out: str) -> int:
    return sum(entry.path.endswith(".tar") for entry in open_storage(f"{BUCKET}/{out}").list())


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


def run_id(out: str) -> str:
    return json.loads(open_storage(f"{BUCKET}/{out}").read("training.json"))["run_id"]


def logged_steps(out: str) -> list[int]:
    """Steps of the loss curve in the MLflow store."""
    return [metric.step for metric in mlflow.MlflowClient(MLFLOW).get_metric_history(run_id(out), "loss")]


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
    with cluster(network) as deedsr:
        process = shards(deedsr, out)
        wait_until(lambda: tars(out) >= 3, process)
        fault(network["node2"])
        result = process.result()
    table.add(f"node2: {fault.__name__}", shards=(result["digest"], process.seconds))
    assert result["digest"] == local["shards"]
    assert result["written"] == tars(out)


@FAULTS
def test_a_training_that_loses_a_node_yields_the_same_weights_and_a_whole_curve(network, local, table, fault):
    out = f"{fault.__name__}/learner"
    with cluster(network) as deedsr:
        process = learner(deedsr, out)
        wait_for_step(out, 10, process)
        fault(network["node2"])
        process.result()
    table.add(f"node2: {fault.__name__}", learner=(weights(out), process.seconds))
    assert weights(out) == local["learner"]
    assert logged_steps(out) == list(range(1, 41))


def test_a_node_that_dies_while_the_workers_connect_costs_no_failure(network, local, table):
    out = "connecting/learner"
    with cluster(network) as deedsr:
        process = learner(deedsr, out, 2, "--train.max_failures=0")
        wait_until(lambda: all(network[name].processes(WORKER) for name in NODES), process)
        kill(network["node2"])
        process.result()
    table.add("node2: killed at the start", learner=(weights(out), process.seconds))
    assert weights(out) == local["learner"]


def test_a_worker_that_loses_only_the_head_writes_nothing_beside_its_replacement(network, local, table):
    """It keeps S3 and MLflow, and trains on until it finds that it was replaced."""
    out, alone = "isolated/learner", "isolated/alone"
    quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "1000"}  # of a node's death
    with cluster(network, **quick) as deedsr:
        process = learner(deedsr, out, 1, *ENDLESS)
        wait_for_step(out, 10, process)
        [node] = [network[name] for name in NODES if network[name].processes(WORKER)]
        first = saved(out)[-1]
        node.lose("head")
        wait_until(lambda: saved(out)[-1].attempt > first.attempt, process)
        replaced = next(done for done in saved(out) if done.attempt > first.attempt)
        wait_until(lambda: not node.processes(WORKER), process)
        wait_for_step(out, saved(out)[-1].step + 5, process)
        process.terminate()
        assert process.code(60) == 130
        learner(deedsr, alone, 1, *ENDLESS, f"--train.max_steps={replaced.step}").result()
    table.add("worker without head", learner=(saved(alone)[-1].sha256["trained"], process.seconds))
    assert replaced.step > first.step + 5, "it trained on alone"
    attempts = [done.attempt for done in saved(out)]
    assert attempts == sorted(attempts)
    assert replaced.sha256 == saved(alone)[-1].sha256
    assert logged_steps(out) == list(range(1, saved(out)[-1].step + 1))


def test_a_training_that_waits_for_a_node_ends_when_it_is_told_to_and_is_continued(network, local, table):
    out = "waiting/learner"
    with cluster(network) as deedsr:
        process = learner(deedsr, out)
        wait_for_step(out, 10, process)
        network["node2"].kill()
        wait_until(lambda: "s for 2 x {CPU 1}: free: " in process.log.read_text(), process)
        process.terminate()
        began = time.monotonic()
        assert process.code(30) == 130
        ended = time.monotonic() - began
        assert "Traceback" not in process.log.read_text()
        assert not [entry.path for entry in open_storage(f"{BUCKET}/{out}").list() if entry.path.startswith("_ray")]
        assert mlflow.MlflowClient(MLFLOW).get_run(run_id(out)).info.status == "KILLED"
        time.sleep(3)
        assert not [process for name in ("head", "node1") for process in network[name].processes("ray::RayTrain")]
        network["node2"].boot()
        joined(start_node(network["node2"]))
        process = learner(deedsr, out)
        process.result()
    table.add(f"SIGTERM in a wait: {ended:.0f} s", learner=(weights(out), process.seconds))
    assert weights(out) == local["learner"]
    assert logged_steps(out) == list(range(1, 41))


def test_an_elastic_training_goes_on_without_a_node_and_with_it_when_it_is_back(network, local, table):
    out = "elastic/learner"
    with cluster(network) as deedsr:
        process = learner(deedsr, out, "1..2", *ENDLESS)

        def seconds_to(workers: int) -> float:
            """Until so many workers have committed a checkpoint."""
            began = time.monotonic()
            wait_until(lambda: sum(len(network[name].processes(WORKER)) for name in NODES) == workers, process)
            wait_for_step(out, max((done.step for done in saved(out)), default=0) + 5, process)
            return time.monotonic() - began

        seconds_to(2)
        network["node2"].kill()
        down = seconds_to(1)
        network["node2"].boot()
        start_node(network["node2"])
        up = seconds_to(2)
        process.terminate()
        assert process.code(60) == 130
    table.add(f"1..2: {down:.0f} s down, {up:.0f} s up")
    assert logged_steps(out) == list(range(1, saved(out)[-1].step + 1))


def test_shards_outlast_an_s3_that_refuses_for_a_minute_and_name_it_when_it_stays_so(network, local, table):
    refuses = threading.Event()
    server = FaultProxy(hosts.S3, lambda number: "reset" if refuses.is_set() else None, address=ADDRESSES["s3"])
    environment = {"AWS_ENDPOINT_URL": server.endpoint, "DEEDSR_STORAGE_SECONDS": "75"}
    with server, cluster(network, **environment) as deedsr:

        def begun(out: str) -> Process:
            process = shards(deedsr, out)
            wait_until(lambda: tars(out) >= 3, process)
            refuses.set()
            return process

        process = begun("refused/minute")
        time.sleep(60)
        refuses.clear()
        made = process.result()["digest"]
        table.add("S3 refuses for 60 s", shards=(made, process.seconds))
        assert made == local["shards"]

        process = begun("refused/ever")
        assert process.code(300) == 1
    [error] = [line for line in process.log.read_text().splitlines() if line.startswith("error: ")]
    table.add(f"S3 refuses: {error[:60]}")
    assert f"{BUCKET}/refused/ever" in error
    assert "no connection to the S3 endpoint" in error
    assert "cannot list" not in error
    assert "Traceback" not in process.log.read_text()


def test_folders_that_the_nodes_do_not_share_are_one_error_that_says_so(network, local, photos):
    head, learned, model = network["head"], f"{BUCKET}/local/learner", f"{BUCKET}/local/adapter"
    data, cpu = f"--data={BUCKET}/local/shards", "--device=cpu"
    training = ["--train.num_workers=2", "--train.gpus_per_worker=0"]
    commands = {  # /mnt is a disk of its own on each host
        "shards to": ["shards", f"--source={BUCKET}/photos", "--out=/mnt/new", "--recipe=recipe.yaml"],
        "shards from": ["shards", "--source=/mnt/photos", f"--out={BUCKET}/new", "--recipe=recipe.yaml"],
        "shards of HR": ["shards", "--hr-from=/mnt/shards", f"--out={BUCKET}/derived", "--recipe=light"],
        "learner to": ["train", "learner", data, "--out=/mnt/learner", *LEARNER, *training],
        "learner from": ["train", "learner", "--data=/mnt/shards", f"--out={BUCKET}/new/learner", *LEARNER, *training],
        "adapter with": ["train", "adapter", data, "--learner=/mnt/model", f"--out={BUCKET}/new/adapter", *ADAPTER,
                         *training],
        "latents to": ["latents", data, "--base=tiny", f"--learner={learned}", "--out=/mnt/latents", cpu],
        "latents from": ["latents", "--data=/mnt/shards", "--base=tiny", f"--out={BUCKET}/new/latents", cpu],
        "upscale from": ["upscale", "/mnt/photos/validation", f"--model={model}", f"--out={BUCKET}/new", "--ray", cpu],
    }  # fmt: skip
    with cluster(network) as deedsr:
        here = ["--source", "/mnt/photos", "--out", "/mnt/shards", "--recipe", "recipe.yaml"]
        assert head.start("cp", "-r", photos, "/mnt/photos", log="copy").code() == 0
        head.start(BIN / "deedsr", "shards", *here, "--json", log="here").result()
        copy = "import shutil; from pipelines.storage import localize; shutil.copytree(localize(%r), '/mnt/model')"
        assert head.start(BIN / "python", "-c", copy % learned, log="model").code() == 0
        for name, words in commands.items():
            process = deedsr(*words, log=name.replace(" ", "-"))
            code, log = process.code(), process.log.read_text()
            [error] = re.findall("^error: .*", log, re.MULTILINE)
            assert re.match(r"error: on node[12]: .*/mnt/.*Workers read .*by themselves: give", error), log
            assert (code, "Traceback" in log) == (2, False), log
            assert "workers failed" not in log  # what a worker lacks would be missing again
