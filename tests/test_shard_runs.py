"""Claims on runs of the shards job beside one another, after one another, and on what they leave behind."""

import json
import os
import pickle
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from source_files import changed, run

from deedsr.dataset.recipe import Recipe
from deedsr.errors import DatasetNotCommitted, DeeDSRError
from pipelines.claims import running
from pipelines.data.dataset import Dataset
from pipelines.distribution import _results
from pipelines.shards import Estimate, collect_garbage, estimate, garbage, generate, verify
from pipelines.shards.build import FromSources
from pipelines.shards.estimate import _Count
from pipelines.shards.execute import _built, _Item
from pipelines.shards.generate import Job, run_job
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import plan_shards
from pipelines.shards.samples import samples_of
from pipelines.shards.shard import Inventory
from pipelines.storage import open_storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def few(photos, small_recipe) -> Recipe:
    """One degradation a crop, for the folder of validation photographs."""
    fields = small_recipe.model_dump(mode="json") | {"variants": 1}
    return Recipe.model_validate(fields | {"shard": {"min_sources": 1, "target_sources": 2, "max_sources": 2}})


def objects(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_a_finished_run_leaves_nothing_but_the_dataset_and_its_records(photos, few, tmp_path):
    out = tmp_path / "out"
    result = generate([str(photos / "validation")], str(out), few, 2, progress=False)
    shards = {path for path in objects(out) if path.endswith(".tar")}
    assert len(shards) == result.shards
    state = objects(out) - shards - {"manifest.json", "samples.parquet", "rejected.jsonl"}
    assert len([path for path in state if path.startswith("_state/shards/")]) == result.shards
    assert len(state) == result.shards + 2  # and a lasting copy of samples.parquet and of rejected.jsonl
    assert not list(out.glob("_state/runs/*"))
    assert collect_garbage(str(out)).objects == []


def test_an_older_version_stays_readable_until_garbage_is_collected(photos, few, tmp_path):
    out = str(tmp_path / "out")
    source = [str(photos / "validation")]
    run(source, out, few)
    older = Dataset.open(out)
    newer = run(source, out, changed(few, seed=1))
    assert older.read(older.index(), 1).hr.shape == (128, 128, 3)
    (tmp_path / "out" / "_state" / "attempts").mkdir()
    (tmp_path / "out" / "_state" / "attempts" / "of-a-killed-run").write_bytes(b"")
    (tmp_path / "out" / "notes.md").write_text("not ours")

    garbage = collect_garbage(out)
    assert len(garbage.objects) == 2 * len(older.manifest.shards) + 2 + 1
    assert garbage.bytes > sum(shard.bytes for shard in older.manifest.shards)
    assert {shard.name for shard in Dataset.open(out).manifest.shards} == {p.name for p in Path(out).glob("*.tar")}
    assert (tmp_path / "out" / "notes.md").exists()
    assert verify(out, progress=False).ok
    with pytest.raises(DeeDSRError, match="is missing"):
        older.read(older.index(), 1)
    again = generate(source, out, changed(few, seed=1), 2, progress=False)
    assert (again.written, again.digest) == (0, newer.digest)


def test_garbage_is_not_collected_under_a_run_that_works_nor_where_no_dataset_is(photos, few, tmp_path):
    with pytest.raises(DatasetNotCommitted):
        collect_garbage(str(tmp_path))
    out = str(tmp_path / "out")
    run([photos / "validation"], out, few)
    with running(open_storage(out)) as folder:
        claim = f"{folder.uri}/claim.json"
        with pytest.raises(DeeDSRError, match=f"process {os.getpid()}.*delete {claim} to go on at once"):
            collect_garbage(out)
        for damaged in (b'{"ho', b"\xff", b"[]", b"{}"):
            Path(claim).write_bytes(damaged)
            with pytest.raises(DeeDSRError, match=f"{claim} is damaged. A run at work writes it again"):
                collect_garbage(out)
    # A killed run leaves its claim; after ten minutes without a sign of life it counts as dead.
    dead = Path(out) / "_state" / "runs" / "0123"
    dead.mkdir(parents=True)
    (dead / "claim.json").write_text(json.dumps({"host": "gone", "pid": 1, "started": 0, "alive": time.time() - 601}))
    assert len(collect_garbage(out).objects) == 1
    assert not dead.exists()


def test_two_runs_at_once_into_one_output_converge(photos, few, tmp_path):
    out = str(tmp_path / "out")
    results = []
    threads = [
        threading.Thread(
            target=lambda: results.append(generate([str(photos / "validation")], out, few, 1, progress=False))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({result.digest for result in results}) == 1
    assert len(results) == 2
    assert verify(out, progress=False).ok


def test_of_two_runs_with_different_recipes_the_second_to_end_stops_and_leaves_the_first_whole(photos, few, tmp_path):
    """The other run's whole life falls into this one's planning."""
    out = str(tmp_path / "out")
    other = changed(few, seed=1)
    source = [str(photos / "validation")]

    def plans():
        planned = list(plan_shards(list_sources(source), few))
        yield planned[0]
        run(source, out, other)
        yield from planned[1:]

    with pytest.raises(DeeDSRError, match="another run replaced .*/manifest.json meanwhile .*that one stands"):
        run_job(Job(plans, FromSources(few), open_storage(out), few), 1, False)
    assert Dataset.open(out).recipe.seed == 1
    assert verify(out, progress=False).ok
    first = run(source, tmp_path / "alone", few)
    again = generate(source, out, few, 1, progress=False)
    assert (again.digest, again.written) == (first.digest, 0)


def deadly(source, data, lr_data, recipe, share):
    """Samples as always, but for a picture that kills whoever reads it, as a broken decoder would."""
    if "deadly" in source.path:
        os.kill(os.getpid(), signal.SIGKILL)
    return samples_of(source, data, lr_data, recipe, share)


def test_a_source_that_kills_its_worker_is_left_out_and_the_rest_goes_on(photos, few, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos / "validation", folder)
    shutil.copy(folder / "Picture_0B.jpg", folder / "deadly.jpg")
    plans = lambda: plan_shards(list_sources([str(folder)]), few)
    result = run_job(Job(plans, FromSources(few, deadly), open_storage(out), few), 2, False)
    assert result.rejected == 1
    manifest = Dataset.open(str(out)).manifest
    assert (manifest.given, manifest.used, manifest.rejected) == (7, 6, 1)
    [line] = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines() if "deadly" in line]
    assert (line["kind"], line["source"], line["reason"]) == ("source", "deadly.jpg", "kills its worker")
    assert not (out / "_state" / "attempts").exists()


def test_shards_without_a_validation_split_say_so_and_how_to_have_one(photos, one_crop_recipe, tmp_path, caplog):
    def said(split: dict) -> str:
        recipe = changed(one_crop_recipe, split=split)
        caplog.clear()
        result = run([photos / "validation"], tmp_path / "out", recipe)
        assert (result.validation == 0) == (split["validation_share"] < 1)
        return caplog.text

    told = said({"validation_patterns": [], "validation_share": 0.001})
    assert f"{tmp_path}/out has no validation split: split.validation_share 0.001 of recipe small took none" in told
    assert "`split: {validation_share: 0.2}`" in told
    assert "match no source that was used" in said({"validation_patterns": ["x/*"], "validation_share": 0})
    assert "no validation split" not in said({"validation_patterns": [], "validation_share": 0})
    assert "no validation split" not in said({"validation_patterns": [], "validation_share": 1})


def test_a_plan_counts_exactly_and_estimates_from_a_probe(photos, few, tmp_path):
    source = [str(photos / "validation")]
    planned = estimate(source, str(tmp_path / "out"), few, nodes=4, cores=8, price=2.0, progress=False)
    assert not (tmp_path / "out").exists()
    result = run(source, tmp_path / "out", few)
    assert (planned.sources, planned.shards, planned.shards_to_make) == (6, result.shards, result.shards)
    assert planned.samples == result.samples  # six sources are all probed
    written = sum(shard.bytes for shard in Dataset.open(str(tmp_path / "out")).manifest.shards)
    assert 0.8 * written < planned.written_bytes < written  # tar headers are not counted
    assert planned.cores == 32
    assert planned.cost == pytest.approx(8 * planned.hours, abs=0.01)
    rest = estimate(source, str(tmp_path / "out"), few, progress=False)
    assert (rest.shards, rest.shards_to_make, rest.samples, rest.hours) == (result.shards, 0, 0, 0)
    assert rest.text() == f"nothing to do: 6 sources in {result.shards} shards, and all of them are there"


def test_a_plan_reads_in_units_of_people():
    planned = Estimate(
        sources=1_200_000, shards=10_400, shards_to_make=400, samples=14_400_000, samples_error=1200,
        read_bytes=3_100_000_000_000, written_bytes=4_200_000_000, probed_sources=16, samples_per_second=30.94,
        cores=2048, nodes=64, hours=2.0833, cost=200.0,
    )  # fmt: skip
    assert planned.text().splitlines() == [
        "sources  1,200,000 sources in 10,400 shards, 400 to be made",
        "samples  14,400,000 to make, give or take 1,200",
        "read     3.1 TB",
        "written  4.2 GB",
        "time     2 h 05 min on 64 machines with 2,048 cores in all (30.9 samples/s a core, measured on 16 sources)",
        "cost     200.00",
    ]


def test_a_plan_takes_no_less_time_than_the_largest_shard_does_unless_shards_are_few(photos, small_recipe):
    sizes = {"min_sources": 1, "target_sources": 3, "max_sources": 9}
    recipe = Recipe.model_validate(small_recipe.model_dump(mode="json") | {"shard": sizes})
    plans = list(plan_shards(list_sources([str(photos)]), recipe))
    count = _Count()
    sources = list(count.missing(plans, Inventory({}, {})))
    largest = max(len(plan.sources) for plan in plans)
    assert largest * len(plans) > 1.5 * len(sources)
    assert count.sources_of_a_core(1) == len(sources)
    assert count.sources_of_a_core(len(plans)) == largest
    assert count.sources_of_a_core(100) < 1


def test_a_sign_of_life_that_fails_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.claims._HEARTBEAT", 0.02)
    out = open_storage(tmp_path)
    with running(out) as folder:
        claim = folder.local_path("claim.json")
        claim.unlink()
        claim.mkdir()  # what is in its place cannot be replaced by a file
        time.sleep(0.2)
        assert claim.is_dir()
        claim.rmdir()
        deadline = time.monotonic() + 10
        while not claim.is_file() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(garbage.live_runs(out)) == 1


def test_files_of_others_beside_the_records_are_named_and_stop_nothing(tmp_path, caplog):
    folder = tmp_path / "_state" / "shards"
    folder.mkdir(parents=True)
    record = f"{'a' * 64}-{'b' * 12}-10240.arrow"
    foreign = [f"._{record}", "notes.arrow", f"{'a' * 64}-{'b' * 12}-10240 (copy).arrow", "a-b-c-d.arrow"]
    for name in (record, *foreign):
        (folder / name).write_bytes(b"")
    assert Inventory.of(open_storage(tmp_path)).records == {"a" * 64: ("b" * 12, 10240)}
    assert all(name in caplog.text for name in foreign)


def test_a_plan_that_cannot_be_read_is_the_error_of_its_row(bucket, s3_server, tmp_path, monkeypatch):
    """An exception would come back through Ray Data, with a traceback and advice on Ray Data's options."""
    folder = open_storage(f"{bucket}/{tmp_path.name}")
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0")
    with FaultProxy(s3_server, lambda number: "reset") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        work = partial(_built, folder, None, folder)
        [row] = _results(work, {"item": pickle.dumps(_Item("plan-0000000.jsonl", [0]))})
    with pytest.raises(DeeDSRError, match="cannot read .*/plan-0000000.jsonl: no connection to the S3 endpoint"):
        raise pickle.loads(row["result"])
