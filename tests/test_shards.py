"""Claims on the shards job: one digest however it runs, reuse, resumption, rejection, clear errors."""

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from source_files import changed, run

from deedsr.dataset.recipe import Shard
from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from pipelines.data.dataset import Dataset
from pipelines.shards import generate, verify
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import plan_shards
from pipelines.shards.source import Source
from pipelines.storage import open_storage, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def digest(small_dataset) -> str:
    return Dataset.open(small_dataset).digest


@pytest.fixture
def copy(photos, tmp_path) -> Path:
    """The photographs at another place, with other modification times."""
    target = tmp_path / "elsewhere" / "pictures"
    shutil.copytree(photos, target, copy_function=shutil.copyfile)
    return target


def on_ray(sources, out, recipe, workers=2):
    return generate([str(source) for source in sources], str(out), recipe, workers, progress=False)


def rejected_lines(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "rejected.jsonl").read_text().splitlines()]


# One digest


def test_digest_is_the_same_for_one_worker_and_from_another_place(copy, tmp_path, small_recipe, digest):
    result = on_ray([copy], tmp_path / "out", small_recipe, workers=1)
    assert result.digest == digest
    assert (result.samples, result.rejected, result.reused) == (136, 0, 0)
    assert result.written == result.shards == len(list((tmp_path / "out").glob("*.tar")))


def test_digest_is_the_same_from_s3_into_s3(photos, bucket, tmp_path, small_recipe, digest):
    publish(photos, f"{bucket}/{tmp_path.name}/photos")
    out = f"{bucket}/{tmp_path.name}/out"
    assert on_ray([f"{bucket}/{tmp_path.name}/photos"], out, small_recipe).digest == digest
    again = on_ray([f"{bucket}/{tmp_path.name}/photos"], out, small_recipe)
    assert (again.digest, again.written, again.reused) == (digest, 0, again.shards)
    assert verify(out, progress=False).ok
    dataset = Dataset.open(out)
    assert dataset.read(dataset.index("train"), 5).hr.shape == (128, 128, 3)


def test_digest_is_the_same_from_a_list_file(photos, copy, tmp_path, small_recipe, digest):
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.jpg"))
    (copy / "relative.txt").write_text("\n".join(reversed(names)))
    (tmp_path / "absolute.txt").write_text("\n".join(f"file://{photos}/{name}" for name in names))
    assert run([copy / "relative.txt"], tmp_path / "out1", small_recipe).digest == digest
    assert run([tmp_path / "absolute.txt"], tmp_path / "out2", small_recipe).digest == digest


DRIVER = """
import sys
from deedsr.dataset.recipe import Recipe
from pipelines.shards import generate
generate([sys.argv[1]], sys.argv[2], Recipe.model_validate_json(sys.argv[3]), workers=1, progress=False)
"""


def test_a_killed_run_leaves_no_dataset_and_no_process_and_the_next_one_completes_it(
    photos, tmp_path, small_recipe, digest
):
    out = tmp_path / "out"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(photos), str(out), small_recipe.model_dump_json()])
    wait_for(lambda: list(out.glob("_state/shards/*.arrow")), "a first committed shard")
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (out / "manifest.json").exists()
    with pytest.raises(DatasetNotCommitted):
        Dataset.open(str(out))
    # Ray's two agents ask for the lost head for a minute before they end as well.
    agents = [child for child in children if alive(child) and "Agent" in child.name()]
    wait_for(lambda: not any(map(alive, set(children) - set(agents))), "Ray's end")
    for agent in filter(alive, agents):
        agent.kill()
    result = on_ray([photos], out, small_recipe)
    assert result.digest == digest
    assert result.reused > 0
    assert result.written > 0
    assert verify(str(out), progress=False).ok


def test_a_worker_that_dies_changes_nothing(photos, tmp_path, small_recipe, digest):
    killed = []

    def kill_one():
        while not killed:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):  # it may end while it is looked at
                    if "ray::FlatMap" in " ".join(process.cmdline()):
                        process.kill()
                        killed.append(process.pid)
                        return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    result = on_ray([photos], tmp_path / "out", small_recipe)
    killer.join(10)
    assert killed
    assert result.digest == digest


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for(condition, what: str, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


# Reuse


def test_only_shards_of_changed_sources_are_made_again(copy, tmp_path, small_recipe):
    out = tmp_path / "out"
    first = run([copy], out, small_recipe)
    again = on_ray([copy], out, small_recipe)
    assert (again.written, again.reused, again.digest) == (0, first.shards, first.digest)
    before = Dataset.open(str(out))

    (copy / "train" / "Wine.jpg").write_bytes((copy / "train" / "life.jpg").read_bytes())
    edited = on_ray([copy], out, small_recipe)
    assert (edited.written, edited.reused) == (1, first.shards - 1)
    assert edited.digest != first.digest

    (out / Dataset.open(str(out)).manifest.shards[-1].name).unlink()
    assert run([copy], out, small_recipe).digest == edited.digest
    assert verify(str(out), progress=False).ok

    # Readers of the older manifest still find every shard it names.
    for shard in before.manifest.shards:
        assert (out / shard.name).stat().st_size == shard.bytes


def test_another_recipe_or_seed_reuses_nothing(copy, tmp_path, small_recipe):
    few = copy / "validation"
    recipe = changed(small_recipe, variants=1)
    first = run([few], tmp_path / "out", recipe)
    manifest = (tmp_path / "out" / "manifest.json").read_bytes()
    other = on_ray([few], tmp_path / "out", changed(recipe, seed=1))
    assert (other.reused, other.written) == (0, other.shards)
    assert other.digest != first.digest
    assert Dataset.open(str(tmp_path / "out")).recipe.seed == 1
    # A run that ends just before its manifest leaves the older dataset readable.
    (tmp_path / "out" / "manifest.json").write_bytes(manifest)
    older = Dataset.open(str(tmp_path / "out"))
    assert older.recipe.seed == 0
    assert {older.read(older.index(), row).info["recipe_digest"] for row in range(5)} == {recipe.digest}


def names(count: int, root: int = 0) -> list[Source]:
    return [Source(root, f"photo-{number}.jpg", f"/photos/photo-{number}.jpg", 1, "1") for number in range(count)]


def shards_of(sources, recipe) -> set:
    return {(plan.split, plan.sources) for plan in plan_shards(sources, recipe)}


def test_a_plan_does_not_depend_on_the_order_of_the_listing(small_recipe):
    sources = [*names(300), *names(50, root=1)]
    shuffled = random.Random(0).sample(sources, len(sources))
    assert list(plan_shards(sources, small_recipe)) == list(plan_shards(shuffled, small_recipe))


def test_a_plan_sorted_through_files_is_the_one_sorted_in_memory(small_recipe, monkeypatch):
    sources = [*names(2000), *names(300, root=1)]
    in_memory = list(plan_shards(sources, small_recipe))
    monkeypatch.setattr("pipelines.shards.plan._IN_MEMORY", 64)
    assert list(plan_shards(iter(sources), small_recipe)) == in_memory


def test_adding_one_source_rewrites_at_most_two_shards(small_recipe):
    recipe = changed(small_recipe, shard={"min_sources": 4, "target_sources": 16, "max_sources": 64})
    sources = names(1000)
    rewritten = []
    for added in range(0, 1000, 20):
        without = shards_of([source for source in sources if source.path != f"photo-{added}.jpg"], recipe)
        rewritten.append(len(without - shards_of(sources, recipe)))
    assert max(rewritten) <= 2
    assert sum(rewritten) / len(rewritten) < 1.2


def test_a_changed_source_rewrites_one_shard_and_another_folder_none(small_recipe):
    recipe = changed(small_recipe, shard={"min_sources": 4, "target_sources": 16, "max_sources": 64})
    sources = names(1000)
    before = shards_of(sources, recipe)
    edited = [source._replace(version="2") if source.path == "photo-500.jpg" else source for source in sources]
    assert len(shards_of(edited, recipe) - before) == 1
    assert shards_of([*sources, *names(300, root=1)], recipe) > before


def test_shards_hold_between_the_least_and_the_most_sources(small_recipe):
    limits = Shard(min_sources=3, target_sources=8, max_sources=12)
    recipe = changed(small_recipe, shard=limits.model_dump())
    plans = list(plan_shards(names(1000), recipe))
    sizes = [len(plan.sources) for plan in plans]
    assert max(sizes) == 12
    assert min(sizes[:-1]) >= 3
    assert sum(sizes) == 1000
    assert [plan.number for plan in plans] == sorted(plan.number for plan in plans)


def test_without_patterns_the_share_decides_and_adding_a_source_moves_no_other(small_recipe):
    recipe = changed(small_recipe, split={"validation_patterns": [], "validation_share": 0.1})
    split = {s.path: plan.split for plan in plan_shards(names(2000), recipe) for s in plan.sources}
    assert 150 < sum(value == "validation" for value in split.values()) < 250
    fewer = {s.path: plan.split for plan in plan_shards(names(1000), recipe) for s in plan.sources}
    assert fewer == {path: split[path] for path in fewer}


# Rejection


def test_broken_sources_are_recorded_and_sources_add_up(copy, tmp_path, small_recipe):
    whole = (copy / "train" / "Wine.jpg").read_bytes()
    (copy / "train" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (copy / "train" / "empty.PNG").write_bytes(b"")
    (copy / "train" / "text.jpeg").write_text("not found")
    (copy / "train" / "notes.md").write_text("no picture, and not called one")
    (copy / "train" / "gone.tif").symlink_to(copy / "nowhere")
    with pytest.raises(DeeDSRError, match=r"4 of 21 sources were rejected .*no such file: 1"):
        run([copy], tmp_path / "out", changed(small_recipe, max_rejected_share=0.1))
    with pytest.raises(DatasetNotCommitted):
        Dataset.open(str(tmp_path / "out"))

    result = run([copy], tmp_path / "out", changed(small_recipe, max_rejected_share=0.2))
    manifest = Dataset.open(str(tmp_path / "out")).manifest
    assert (manifest.given, manifest.used, manifest.rejected) == (21, 17, 4)
    assert result.rejected == 4
    assert len(set(Dataset.open(str(tmp_path / "out")).index()["source"].to_pylist())) == 17
    lines = rejected_lines(tmp_path / "out")
    assert {line["source"]: line["reason"] for line in lines if line["kind"] == "source"} == {
        "train/cut.jpg": "truncated or broken image",
        "train/empty.PNG": "empty file",
        "train/text.jpeg": "not a JPEG, PNG, WebP or TIFF image",
        "train/gone.tif": "no such file",
    }
    smooth = [line for line in lines if line["kind"] == "crop"]
    assert smooth
    assert all(line["crop"][2:] == [128, 128] for line in smooth)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none", "does not exist"),
        (lambda folder: folder, "holds no pictures"),
        (lambda folder: folder / "file.jpg", "is a file"),
        (lambda folder: folder / "none.txt", "does not exist"),
        (lambda folder: folder / "empty.txt", "names no pictures"),
        (lambda folder: "s3://deedsr-nowhere/photos", "no bucket 'deedsr-nowhere'"),
        (lambda folder: "gs://bucket/photos", "locations are"),
    ],
    ids=["no folder", "empty folder", "a file", "no list", "empty list", "no bucket", "scheme"],
)
def test_sources_that_cannot_be_used_are_one_clear_error(s3_server, tmp_path, small_recipe, make, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    source = make(folder)
    if "file.jpg" in str(source):
        source.write_bytes(b"x")
    if "empty.txt" in str(source):
        source.write_text("\n\n")
    with pytest.raises(UsageError, match=message):
        on_ray([source], tmp_path / "out", small_recipe)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_only_broken_pictures_is_an_error_even_if_the_recipe_allows_all(tmp_path, small_recipe):
    folder = tmp_path / "broken"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_bytes(b"broken")
    with pytest.raises(DeeDSRError, match=r"3 of 3 sources were rejected \(not a JPEG, PNG, WebP or TIFF image: 3\)"):
        run([folder], tmp_path / "out", changed(small_recipe, max_rejected_share=1.0))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_out_that_cannot_be_written_is_one_clear_error(photos, s3_server, tmp_path, small_recipe):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        on_ray([photos], tmp_path / "file" / "out", small_recipe)
    with pytest.raises(UsageError, match="no bucket"):
        on_ray([photos], "s3://deedsr-nowhere/out", small_recipe)


def test_list_files_name_sources_below_their_common_folder(photos, tmp_path):
    (tmp_path / "a.txt").write_text(f"{photos}/train/Wine.jpg\nfile://{photos}/validation/Picture_0B.jpg\n\n")
    assert [source.path for source in list_sources([str(tmp_path / "a.txt")])] == [
        "train/Wine.jpg",
        "validation/Picture_0B.jpg",
    ]
    (tmp_path / "b.txt").write_text(f"{photos}/train/Wine.jpg\ns3://bucket/x.jpg")
    with pytest.raises(UsageError, match="mixes"):
        list(list_sources([str(tmp_path / "b.txt")]))


# Verification


def test_verify_is_clean_and_finds_what_was_damaged(small_dataset, tmp_path):
    clean = verify(small_dataset, progress=False)
    assert dataclasses.asdict(clean) == {
        "ok": True,
        "shards": len(Dataset.open(small_dataset).manifest.shards),
        "samples": 136,
        "replayed": 0,
        "problems": [],
    }
    damaged = tmp_path / "damaged"
    shutil.copytree(small_dataset, damaged)
    flipped, missing, cut, *_ = (shard.name for shard in Dataset.open(small_dataset).manifest.shards)
    data = bytearray((damaged / flipped).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / flipped).write_bytes(data)
    (damaged / missing).unlink()
    (damaged / cut).write_bytes((damaged / cut).read_bytes()[:50_000])
    result = verify(str(damaged), progress=False)
    assert not result.ok
    assert result.samples < clean.samples
    for name, problem in [(flipped, "its SHA-256"), (missing, "is missing"), (cut, "bytes, the manifest says")]:
        assert any(line.startswith(name) and problem in line for line in result.problems)


def test_verify_reads_the_samples_and_does_not_trust_hashes_alone(photos, tmp_path, small_recipe):
    out = tmp_path / "out"
    run([photos / "validation"], out, changed(small_recipe, variants=1))
    index = Dataset.open(str(out)).index()
    shifted = index.set_column(index.schema.get_field_index("lr_offset"), "lr_offset", index["hr_offset"])
    import hashlib

    import pyarrow.parquet

    pyarrow.parquet.write_table(shifted, out / "samples.parquet")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["samples.parquet"] = hashlib.sha256((out / "samples.parquet").read_bytes()).hexdigest()
    open_storage(out).write("manifest.json", json.dumps(manifest).encode())
    result = verify(str(out), progress=False)
    assert result.samples == 0
    assert any("points beside" in problem for problem in result.problems)
    (out / "samples.parquet").write_bytes(b"")
    assert "samples.parquet: its SHA-256 is not what the manifest says" in verify(str(out), progress=False).problems
