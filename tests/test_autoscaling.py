"""Shipped job files on a cluster that starts from nothing: a head of 0 CPUs, whose autoscaler adds nodes on demand."""

import json
import re
import time
import uuid
from pathlib import Path

import cv2
import pytest
import yaml
from ray_head import ROOT, Head, running
from small_networks import make_pipeline

from pipelines.storage import open_storage, publish

NODE_TYPES = {"cpu": (2, {"CPU": 2}), "gpu": (1, {"CPU": 2, "GPU": 1})}
IDLE_SECONDS = 10
JOBS = {path.stem: path for path in (ROOT / "jobs").glob("*.yaml") if not path.name.startswith("site")}

# What makes the files' jobs small, and what does without GPUs.
TRAIN = {"max_steps": 1, "num_workers": 1, "gpus_per_worker": 0}
SMALL = {
    "chain": {
        "preset": "tiny", "shards": {"recipe": "RECIPE"}, "learner": {"train": TRAIN}, "adapter": {"train": TRAIN},
        "latents": {"precision": "fp32", "device": "cpu"},
        "evaluate": {"limit": 2, "device": "cpu", "metrics": "psnr,ssim"},
    },
    "learner": {"preset": "tiny", "train": TRAIN | {"num_workers": 2}},
    "latents": {"precision": "fp32", "device": "cpu"},
    "adapter": {"preset": "tiny", "train": TRAIN},
    "evaluate": {"limit": 2, "device": "cpu"},
    "upscale": {"device": "cpu"},
}  # fmt: skip


@pytest.fixture(scope="module")
def head(s3_server, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        head = Head(cpus=0, node_types=NODE_TYPES, idle_seconds=IDLE_SECONDS)
    with running(head) as head:
        yield head


@pytest.fixture(scope="module")
def place(bucket, photos, small_dataset, tmp_path_factory) -> str:
    """A prefix of S3 with everything that the job files read."""
    place = f"{bucket}/autoscaling"
    model = tmp_path_factory.mktemp("model")
    make_pipeline(num_inference_steps=2).save_pretrained(model)
    for name in ("adapter", "learner", "stable-diffusion-2-1-base"):  # a model stands for its learner and its base
        publish(model, f"{place}/{name}")
    publish(photos, f"{place}/photographs")
    publish(Path(small_dataset), f"{place}/shards/deedsr")
    picture = cv2.resize(cv2.imread(str(photos / "validation" / "Green-Maple.jpg")), (24, 16))
    open_storage(f"{place}/pictures").write("maple.png", cv2.imencode(".png", picture)[1].tobytes())
    return place


@pytest.fixture(scope="module")
def recipe(head, small_recipe) -> str:
    path = head.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    return str(path)


def job_of(name: str, place: str, head: Head, options: dict) -> dict:
    """A shipped job file with its places filled in and `options` over its own."""
    job = yaml.safe_load(JOBS[name].read_text().replace("s3://YOUR-BUCKET", place))
    job["options"]["out"] = f"{place}/out/{uuid.uuid4().hex}"
    for key, value in options.items():
        job["options"][key] = {**job["options"].get(key, {}), **value} if isinstance(value, dict) else value
    if "runtime_env" in job:
        job["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] = head.environment["MLFLOW_TRACKING_URI"]
    # Nodes of one machine share a session directory: each would unpack an upload over the one that the others work in.
    return job | {"working_dir": None}


@pytest.mark.soak
def test_a_shards_job_makes_nodes_start_and_end(head, place, recipe, small_dataset):
    assert head.nodes("ALIVE") == []
    job = job_of("shards", place, head, {"recipe": recipe})
    code, output, log = head.submit(job, "--wait")
    assert code == 0, log
    assert json.loads(output)["status"] == "SUCCEEDED"
    local = json.loads(Path(small_dataset, "manifest.json").read_text())
    assert json.loads(open_storage(job["options"]["out"]).read("manifest.json"))["digest"] == local["digest"]

    deadline = time.monotonic() + 60 + IDLE_SECONDS
    while head.nodes("ALIVE") and time.monotonic() < deadline:
        time.sleep(1)
    assert head.nodes("ALIVE") == []
    assert {(node.get("CPU"), node.get("GPU")) for node in head.nodes("DEAD")} == {(2, None)}


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_shipped_job_file_succeeds_on_a_cluster_without_gpus(head, place, recipe, name):
    assert {"shards", *SMALL} == set(JOBS)  # the shards job is submitted above
    job = job_of(name, place, head, json.loads(json.dumps(SMALL[name]).replace("RECIPE", recipe)))
    code, output, log = head.submit(job, "--wait")
    assert code == 0, log
    assert json.loads(output)["status"] == "SUCCEEDED"
    assert re.search(r": \d workers? x [\d.]+ CPUs?, no GPU", log), log  # which the head has not
    assert "Traceback" not in log
    assert {node.get("GPU") for node in head.nodes("ALIVE") + head.nodes("DEAD")} == {None}  # none was asked for


@pytest.mark.soak
def test_an_adapter_job_makes_a_gpu_node_start_and_says_what_it_waits_for(head, place):
    options = {"preset": "tiny", "train": {"max_steps": 1, "num_workers": 1}}
    code, _, log = head.submit(job_of("adapter", place, head, options), "--wait")
    assert code == 1, log
    assert (2, 1) in {(node.get("CPU"), node.get("GPU")) for node in head.nodes("ALIVE") + head.nodes("DEAD")}
    assert re.search(r"waiting \d+ s for 1 x \{CPU 1, GPU 1\}: .*--train.gpus_per_worker 0 trains on CPUs", log), log
    [error] = re.findall(r"^error: .*", log, re.MULTILINE)
    assert "can use no GPU" in error  # what the worker finds where the autoscaler promised one
    assert "Traceback" not in log
