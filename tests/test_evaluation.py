"""Claims about evaluation, on the small dataset of shipped photographs and a small model with random weights."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from evaluations import actors, assert_same, evaluate
from metric_weights import write_weights
from small_networks import make_pipeline
from source_files import run as make_dataset

from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from deedsr.metrics import niqe_set, psnr_y, registry, ssim_y
from deedsr.metrics.metric import Setting
from pipelines.data.dataset import Dataset
from pipelines.storage import open_storage, publish

pytestmark = pytest.mark.usefixtures("own_store")


def mean_of(found: dict) -> dict[str, float | None]:
    """Means of a method's metrics."""
    return {name: figure["mean"] for name, figure in found.items()}


def read(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def test_the_result_names_its_figures_its_dataset_and_its_run(evaluated, small_dataset):
    out, result, results = evaluated
    assert result.samples == len(results["samples"]) == 6
    assert set(result.metrics) == {"model", "bicubic"}
    assert set(result.metrics["model"]) == {"psnr", "ssim", "niqe", "niqe_set"}
    assert result.metrics["model"]["niqe"]["mean"] is None  # crops of 128 px
    assert results["definitions"] == {name: registry.find(name).statement() for name in result.metrics["model"]}
    assert result.metrics == results["metrics"]
    assert results["dataset"]["digest"] == result.dataset_digest == Dataset.open(small_dataset).digest
    assert (results["run_id"], results["sampling"]["num_inference_steps"]) == (result.run_id, 2)
    assert result.results == str(out / "results.json")


def test_every_figure_can_be_told_again_from_the_pictures(evaluated):
    out, result, results = evaluated
    pictures = {
        name: [read(out / sample["pictures"][name]) for sample in results["samples"]]
        for name in ("lr", "bicubic", "model", "hr")
    }
    for lr, bicubic in zip(pictures["lr"], pictures["bicubic"], strict=True):
        np.testing.assert_array_equal(cv2.resize(lr, (128, 128), interpolation=cv2.INTER_CUBIC), bicubic)
    for method in ("model", "bicubic"):
        psnr, ssim = (
            [measure(*pair) for pair in zip(pictures[method], pictures["hr"], strict=True)]
            for measure in (psnr_y, ssim_y)
        )
        assert [sample["metrics"][method]["psnr"] for sample in results["samples"]] == pytest.approx(psnr)
        assert mean_of(result.metrics[method]) == pytest.approx(
            {"psnr": np.mean(psnr), "ssim": np.mean(ssim), "niqe": None, "niqe_set": niqe_set(pictures[method])}
        )


def test_pairs_are_the_datasets_own_and_of_the_split(evaluated, small_dataset):
    out, _, results = evaluated
    dataset = Dataset.open(small_dataset)
    index = dataset.index("validation")
    rows = {index["key"][row].as_py(): row for row in range(index.num_rows)}
    for record in results["samples"]:
        sample = dataset.read(index, rows[record["key"]])
        np.testing.assert_array_equal(read(out / record["pictures"]["hr"]), sample.hr)
        np.testing.assert_array_equal(read(out / record["pictures"]["lr"]), sample.lr)


def test_a_samples_picture_does_not_depend_on_what_else_is_measured(evaluated, model, small_dataset, tmp_path):
    out, _, results = evaluated
    evaluate(model, small_dataset, str(tmp_path), limit=2, seed=3, metrics=["psnr"], progress=False)
    fewer = json.loads((tmp_path / "results.json").read_text())
    assert [sample["key"] for sample in fewer["samples"]] == [results["samples"][i]["key"] for i in (0, 3)]
    for sample in fewer["samples"]:
        name = sample["pictures"]["model"]
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert fewer["metrics"]["model"].keys() == {"psnr"}


def test_the_seed_and_the_settings_reach_the_sampling(evaluated, model, small_dataset, tmp_path):
    out, _, results = evaluated
    evaluate(model, small_dataset, str(tmp_path), limit=1, seed=4, steps=1, metrics=["psnr"], progress=False)
    other = json.loads((tmp_path / "results.json").read_text())
    name = other["samples"][0]["pictures"]["model"]
    assert (tmp_path / name).read_bytes() != (out / name).read_bytes()
    assert (other["seed"], other["sampling"]["num_inference_steps"]) == (4, 1)


def test_learned_metrics_and_a_border_go_through_an_evaluation(model, small_dataset, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    write_weights(weights)
    names = ["lpips", "fid", "psnr"]
    options = {"limit": 2, "steps": 1, "metrics": names, "metric_weights": str(weights), "border": 8}
    result = evaluate(model, small_dataset, str(tmp_path / "out"), **options, progress=False)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    lpips = registry.find("lpips", Setting(weights=weights))
    for method, values in ((method, mean_of(found)) for method, found in result.metrics.items()):
        pairs = [
            [read(tmp_path / "out" / sample["pictures"][name]) for name in (method, "hr")]
            for sample in results["samples"]
        ]
        assert values["lpips"] == pytest.approx(np.mean([lpips.measure(*pair) for pair in pairs]), rel=1e-5)
        assert values["psnr"] == pytest.approx(np.mean([psnr_y(*pair, 8) for pair in pairs]))
        assert values["fid"] > 0
    assert results["samples"][0]["metrics"]["model"].keys() == {"lpips", "psnr"}
    assert results["definitions"]["lpips"] == lpips.statement()
    assert "border 8" in results["definitions"]["psnr"]


def test_the_mlflow_run_holds_configuration_dataset_parent_figures_and_pictures(evaluated):
    from mlflow import MlflowClient

    from pipelines import tracking

    _, result, _ = evaluated
    client = MlflowClient(tracking.tracking_uri())
    run = client.get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["deedsr.parent.adapter"] == "run-of-the-adapter"
    assert run.data.tags["deedsr.dataset.digest"] == result.dataset_digest
    assert run.inputs.dataset_inputs[0].dataset.digest == result.dataset_digest[:36]
    assert run.data.params["steps"] == "2"
    assert run.data.params["definitions.psnr"] == registry.find("psnr").statement()
    for method, found in result.metrics.items():
        for name, value in mean_of(found).items():
            if value is None:
                continue
            assert run.data.metrics[f"{method}.{name}"] == pytest.approx(value)
    assert len(client.list_artifacts(result.run_id, "pictures")) == 6
    artifacts = {artifact.path for artifact in client.list_artifacts(result.run_id)}
    assert {"results.json", "rows.parquet", "table.txt", "table.md", "table.tex"} <= artifacts


def test_model_dataset_and_output_may_lie_in_s3(evaluated, model, small_dataset, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = f"{bucket}/{tmp_path.name}"
    publish(Path(model), f"{place}/model")
    publish(Path(small_dataset), f"{place}/dataset")
    result = evaluate(
        f"{place}/model", f"{place}/dataset", f"{place}/out", limit=1, seed=3, metrics=["psnr"], progress=False
    )
    out, _, local = evaluated
    results = json.loads(open_storage(f"{place}/out").read("results.json"))
    assert result.results == f"{place}/out/results.json"
    assert results["samples"] == [
        {**local["samples"][0], "metrics": {m: {"psnr": v["psnr"]} for m, v in local["samples"][0]["metrics"].items()}}
    ]
    name = results["samples"][0]["pictures"]["model"]
    assert open_storage(f"{place}/out").read(name) == (out / name).read_bytes()


def test_what_cannot_be_measured_is_refused_before_any_work(
    model, small_dataset, tmp_path, photos, small_recipe, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no weights of anybody

    other = tmp_path / "model-x2"
    make_pipeline(scale=2).save_pretrained(other)
    empty = tmp_path / "empty"
    fields = small_recipe.model_dump(mode="json")
    fields["crop"] |= {"size": 64, "per_source": 1}
    (tmp_path / "one.txt").write_text(str(photos / "train" / "life.jpg"))
    make_dataset([tmp_path / "one.txt"], empty, type(small_recipe).model_validate(fields))

    out = tmp_path / "out"
    for error, message, arguments in (
        (UsageError, "enlarges by 2, the pairs of .* differ by 4", {"model": str(other)}),
        (UsageError, "unknown metric 'psrn': there are .*psnr, ssim", {"metrics": ["psnr", "psrn"]}),
        (
            UsageError,
            "fid needs pt_inception-.*--metric-weights",
            {"metrics": ["psnr", "fid"]},
        ),
        (UsageError, "nowhere does not exist", {"metric_weights": str(tmp_path / "nowhere")}),
        (UsageError, "border must leave 11 pixels of HR crops of 128, got 59", {"border": 59}),
        (UsageError, "border must leave 11 pixels of HR crops of 128, got -1", {"border": -1}),
        (UsageError, "no metric given", {"metrics": []}),
        (UsageError, "has no validation split", {"data": str(empty)}),
        (UsageError, "niqe_set needs HR crops of 96 pixels", {"data": str(empty), "split": "train"}),
        (UsageError, "noise_guidance must be", {"noise_guidance": 2.0}),
        (UsageError, "no model folder", {"model": str(tmp_path / "nowhere")}),
        (DatasetNotCommitted, "has no manifest.json", {"data": str(tmp_path)}),
    ):
        with pytest.raises(error, match=message):
            evaluate(**{"model": model, "data": small_dataset, "out": str(out), "progress": False} | arguments)
    assert not out.exists()


def test_progress_goes_to_stderr_only(model, small_dataset, tmp_path, capsys):
    evaluate(model, small_dataset, str(tmp_path), limit=1, metrics=["psnr"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "evaluate" in printed.err


def test_a_cluster_computes_the_same_where_paths_are_relative_to_the_command(
    on_cluster, evaluated, model, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data, relative_model = os.path.relpath(small_dataset), os.path.relpath(model)
    evaluate(relative_model, data, "out", base=relative_model, limit=6, seed=3, device="cpu", progress=False)
    assert_same(tmp_path / "out", evaluated[0])


@pytest.mark.soak
def test_a_killed_actor_is_replaced_and_its_pairs_are_repeated(on_cluster, model, small_dataset, tmp_path):
    options = {"limit": 8, "steps": 20, "progress": False, "device": "cpu"}
    killed = []

    def kill() -> None:
        while not list(tmp_path.glob("cluster/pictures/[!.]*")):
            time.sleep(0.02)
        for process in actors()[:1]:
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    evaluate(model, small_dataset, str(tmp_path / "cluster"), **options)
    killer.join()
    assert killed
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS")
        evaluate(model, small_dataset, str(tmp_path / "here"), **options)
    assert_same(tmp_path / "cluster", tmp_path / "here")


def test_what_is_wrong_with_the_data_is_said_in_the_same_words_by_an_actor(on_cluster, model, small_dataset, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_dataset, data)
    for shard in data.glob("validation-*.tar"):
        shard.unlink()
    with pytest.raises(DeeDSRError, match=rf"^{data}/validation-\S+\.tar is missing: run `deedsr verify {data}`$"):
        evaluate(model, str(data), str(tmp_path / "out"), limit=1, device="cpu", progress=False)
