"""Real parts shared by the tests: shipped photographs, a small dataset of them, an S3 server, a local Ray cluster."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.25")
os.environ["DEEDSR_CPUS"] = "2"  # the tests ask for what they need, whatever the machine has
os.environ.pop("RAY_ADDRESS", None)
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Small networks and pictures are faster on one thread than on several that wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray's workers find the test modules whose functions they run.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH")]))

import cv2
import numpy as np
import pytest

from deedsr.dataset.recipe import Recipe

cv2.setNumThreads(1)

DISK = 2 << 30  # bytes: a run writes up to 0.8 GB, and frees it again where all passed


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs, but from the tests that are marked so: they run by themselves, with `pytest -m gpu`."""
    if config.getoption("-m") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_sessionstart(session: pytest.Session) -> None:
    """On a full disk tests fail minutes later, for reasons that name other things: the run ends here, in one line."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < DISK and not hasattr(session.config, "workerinput"):
        message = f"error: the tests need {DISK >> 30} GiB in {folder}, {free / 2**30:.1f} are free"
        pytest.exit(f"{message}: free some, or set TMPDIR to a folder on another disk", returncode=2)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of the shipped photographs: train/ and validation/."""
    return Path(str(files("deedsr") / "assets" / "photos"))


@pytest.fixture(scope="module")
def lr(photos) -> np.ndarray:
    """A small photograph, uint8 RGB (36, 64, 3)."""
    image = cv2.cvtColor(cv2.imread(str(photos / "validation" / "Green-Maple.jpg")), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, (64, 36), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="session")
def small_recipe():
    """Crops of 128 px in groups of four degradations; the photographs under validation/ are for validation."""
    from deedsr.dataset.recipe import Recipe, load_recipe

    fields = load_recipe("deedsr").model_dump(mode="json")
    fields["crop"] |= {"size": 128, "per_source": 2}
    fields |= {
        "name": "small",
        "variants": 4,
        "shard": {"min_sources": 1, "target_sources": 3, "max_sources": 4},
        "split": {"validation_patterns": ["validation/*"], "validation_share": 0},
    }
    return Recipe.model_validate(fields)


@pytest.fixture(scope="session")
def small_dataset(photos, small_recipe, tmp_path_factory) -> str:
    """A dataset of the shipped photographs, read only: 88 samples for training, 48 for validation, several shards."""
    from source_files import run

    out = str(tmp_path_factory.mktemp("small") / "dataset")
    run([photos], out, small_recipe)
    return out


@pytest.fixture(scope="session")
def stored(tmp_path_factory):
    """What version 0.1.0 wrote (tests/stored), unpacked, read only."""
    from stored_things import unpack

    return unpack("0.1.0", tmp_path_factory.mktemp("stored"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """Endpoint of a real S3 server process on loopback; the AWS variables point to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("wb")
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    endpoint = f"http://127.0.0.1:{port}"
    for _ in range(150):
        try:
            urllib.request.urlopen(endpoint, timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    variables = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test-key",
        "AWS_SECRET_ACCESS_KEY": "test-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield endpoint
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    server.terminate()
    server.wait(10)
    log.close()


@pytest.fixture(scope="session")
def bucket(s3_server) -> str:
    """A fresh bucket on the S3 server: `s3://NAME`."""
    import boto3

    boto3.client("s3").create_bucket(Bucket="deedsr-tests")
    return "s3://deedsr-tests"


@pytest.fixture(scope="session")
def ray_cluster(s3_server):
    """One local Ray cluster of two CPUs for every test that needs one; its workers know the S3 server."""
    import ray

    options = {"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": False, "log_to_driver": False}
    try:
        ray.init(address="local", **options)
    except Exception:  # a very busy machine is too slow for Ray's half minute once; all tests would fail for it
        ray.shutdown()
        ray.init(address="local", **options)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def chromium() -> str:
    """The binary of Chromium; tests that need one are skipped where there is none."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if binary is None:
        pytest.skip("no chromium binary on the PATH: the page was not looked at in a browser")
    return binary


@pytest.fixture(scope="session")
def browser(chromium, tmp_path_factory):
    """A page in headless Chromium."""
    from browser import Browser

    browser = Browser(chromium, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pictures(photos) -> dict[str, bytes]:
    """Eight of the shipped photographs, 240 px wide, as files of several formats."""
    found = {}
    for number, path in enumerate(sorted((photos / "train").glob("*.jpg"))[:8]):
        image = cv2.imread(str(path))
        small = cv2.resize(image, (240, 240 * image.shape[0] // image.shape[1]), interpolation=cv2.INTER_AREA)
        ext = (".png", ".jpg", ".webp")[number % 3]
        found[path.stem + ext] = cv2.imencode(ext, small)[1].tobytes()
    return found


@pytest.fixture(scope="module")
def one_crop_recipe(small_recipe) -> Recipe:
    """One crop of 64 px of each source, shards of two sources."""
    fields = small_recipe.model_dump(mode="json")
    fields["crop"] = {"size": 64, "per_source": 1, "min_std": 1, "min_laplacian": 0}
    fields["split"] = {"validation_patterns": ["nothing"], "validation_share": 0}
    fields |= {"variants": 1, "shard": {"min_sources": 1, "target_sources": 1, "max_sources": 2}}
    return Recipe.model_validate(fields | {"max_rejected_share": 0.9})


@pytest.fixture
def through(bucket, s3_server, monkeypatch, tmp_path):
    """A function that puts a proxy with these faults between this process and the S3 server."""
    from fault_proxy import FaultProxy

    proxies = []

    def start(*faults, **options):
        proxies.append(FaultProxy(s3_server, *faults, **options).__enter__())
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxies[-1].endpoint)
        return proxies[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield start
    for proxy in proxies:
        proxy.__exit__()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A randomly initialised base in diffusers layout, smaller than `tiny`."""
    import torch
    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

    from tools.tiny.base import SCHEDULER

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    AutoencoderTiny(
        encoder_block_out_channels=(16,) * 3, decoder_block_out_channels=(16,) * 3, latent_channels=4,
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(folder / "vae")  # fmt: skip
    UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, use_linear_projection=True, sample_size=8,
    ).save_pretrained(folder / "unet")  # fmt: skip
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module")
def learner_options(small_dataset):
    """A training of the small dataset in six steps."""
    from pipelines.training.config import ContrastOptions, LearnerModelOptions, LearnerOptions, TrainOptions

    return LearnerOptions(
        data=str(small_dataset),
        model=LearnerModelOptions(preset="tiny", norm_group=2),
        contrast=ContrastOptions(queue_size=24, momentum=0.9, temperature=0.1, batch_block=4, batch_negatives=True),
        train=TrainOptions(lr=1e-3, global_batch_size=8, max_steps=6, checkpoint_every=3, log_every=1),
    )


@pytest.fixture(scope="module")
def trained_learner() -> str:
    """The shipped one, in `adapter_options`."""
    return "tiny"


@pytest.fixture(scope="module")
def adapter_options(small_dataset, base, trained_learner):
    """A training of the small dataset on a small random base in six steps."""
    from pipelines.training.config import AdapterModelOptions, AdapterOptions, DiffusionOptions, TrainOptions

    return AdapterOptions(
        data=str(small_dataset),
        learner=str(trained_learner),
        base=str(base),
        model=AdapterModelOptions(preset="tiny"),
        diffusion=DiffusionOptions(lr_crop=16),
        train=TrainOptions(lr=1e-3, global_batch_size=4, max_steps=6, checkpoint_every=3, log_every=1, ema_decay=0.9),
    )


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An empty SQLite store of MLflow, to be copied: making one takes seconds."""
    from mlflow_stores import SqliteStore

    from pipelines import tracking

    store = SqliteStore(tmp_path_factory.mktemp("mlflow"))
    tracking.connect(store.uri)
    return store.path


@pytest.fixture(scope="session")
def new_store(empty_store):
    """A function that puts a new SQLite store of MLflow into a folder; its URI."""
    return lambda folder: f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}"


@pytest.fixture
def store(empty_store, tmp_path):
    """A new SQLite store of MLflow that can be taken away."""
    from mlflow_stores import SqliteStore

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return SqliteStore(tmp_path)


@pytest.fixture(scope="module")
def own_store(new_store, tmp_path_factory):
    """An MLflow store of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("MLFLOW_TRACKING_URI", new_store(tmp_path_factory.mktemp("mlflow")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A small model with random weights."""
    from small_networks import make_pipeline

    folder = tmp_path_factory.mktemp("models") / "small"
    make_pipeline(num_inference_steps=2).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps({"run_id": "run-of-the-adapter"}))
    return str(folder)


@pytest.fixture(scope="module")
def evaluated(own_store, model, small_dataset, tmp_path_factory):
    """Place, result and `results.json` of an evaluation of `model`."""
    from evaluations import evaluate

    out = tmp_path_factory.mktemp("evaluated") / "out"
    result = evaluate(model, small_dataset, str(out), limit=6, seed=3, progress=False)
    return out, result, json.loads((out / "results.json").read_text())


@pytest.fixture
def on_cluster(ray_cluster, monkeypatch):
    """The tests' cluster as one that `RAY_ADDRESS` names."""
    import ray

    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
