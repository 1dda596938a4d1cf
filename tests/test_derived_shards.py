"""Claims on datasets made of datasets: new degradations of stored HR, and their export as self-contained pairs."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import Loads
from source_files import made, run

from deedsr.dataset.manifest import dataset_digest
from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.errors import DeeDSRError, UsageError
from jobs import cli
from pipelines.claims import running
from pipelines.data.dataset import Dataset
from pipelines.reports.inspection import inspect
from pipelines.shards import HeldBack, collect_garbage, hr_job, join_job, run_job, verify
from pipelines.storage import open_storage, publish

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def heavy(small_recipe) -> Recipe:
    return Recipe.model_validate(
        load_recipe("heavy").model_dump(mode="json") | {"variants": 2, "seed": small_recipe.seed}
    )


@pytest.fixture(scope="module")
def heavy_lr(small_dataset, heavy, tmp_path_factory) -> str:
    """New degradations of the small dataset's HR, read only."""
    out = str(tmp_path_factory.mktemp("derived") / "heavy")
    run_job(hr_job(small_dataset, out, heavy), workers=2, progress=False)
    return out


def bytes_of(uri: str) -> int:
    return sum(shard.bytes for shard in Dataset.open(uri).manifest.shards)


def test_new_degradations_hold_lr_only_under_the_same_keys_and_name_their_hr_by_digest(small_dataset, heavy_lr, heavy):
    hr, lr = Dataset.open(small_dataset), Dataset.open(heavy_lr)
    assert lr.manifest.hr_from.digest == hr.digest
    assert lr.recipe.degradation == heavy.degradation
    assert lr.recipe.crop == hr.recipe.crop
    contents = set(hr.index()["content"].to_pylist())
    assert set(lr.index()["key"].to_pylist()) == {f"{content}-{v:02d}" for content in contents for v in range(2)}
    assert (lr.manifest.given, lr.manifest.used) == (hr.manifest.given, hr.manifest.used)
    assert lr.manifest.source_digest == hr.manifest.source_digest
    assert bytes_of(heavy_lr) / lr.manifest.samples < bytes_of(small_dataset) / hr.manifest.samples / 4
    assert verify(heavy_lr, replay=10, progress=False).problems == []


def test_readers_join_the_hr_without_being_told(small_dataset, heavy_lr):
    hr, lr = Dataset.open(small_dataset), Dataset.open(heavy_lr)
    wanted = {key: row for row, key in enumerate(hr.index()["key"].to_pylist())}
    index = lr.index("validation")
    for row in range(0, index.num_rows, 7):
        sample = lr.read(index, row)
        same = hr.read(hr.index(), wanted[f"{sample.key[:-3]}-00"])
        assert np.array_equal(sample.hr, same.hr)
        assert sample.lr.shape == (32, 32, 3)


def test_a_joined_dataset_is_the_one_that_the_sources_give(photos, small_dataset, heavy_lr, tmp_path):
    joined = run_job(join_job(heavy_lr, str(tmp_path / "joined")), workers=2, progress=False)
    direct = run([photos], tmp_path / "direct", Dataset.open(heavy_lr).recipe)
    assert joined.digest == direct.digest
    assert joined.samples == direct.samples
    assert verify(str(tmp_path / "joined"), replay=3, progress=False).ok
    assert run_job(join_job(heavy_lr, str(tmp_path / "joined")), progress=False).written == 0


def test_both_may_move_together_and_hr_that_moved_alone_is_named_anew(small_dataset, heavy_lr, heavy, tmp_path):
    shutil.copytree(small_dataset, tmp_path / "there" / "hr")
    moved = made(hr_job(str(tmp_path / "there" / "hr"), str(tmp_path / "there" / "lr"), heavy))
    (tmp_path / "there").rename(tmp_path / "here")
    dataset = Dataset.open(str(tmp_path / "here" / "lr"))
    assert dataset.digest == moved.digest == Dataset.open(heavy_lr).digest
    assert dataset.read(dataset.index(), 0).hr.shape == (128, 128, 3)

    (tmp_path / "here" / "hr").rename(tmp_path / "away")
    with pytest.raises(DeeDSRError, match="which is not there: put it there, or name its place"):
        Dataset.open(str(tmp_path / "here" / "lr")).read(dataset.index(), 0)
    again = run_job(hr_job(str(tmp_path / "away"), str(tmp_path / "here" / "lr"), heavy), 2, progress=False)
    assert (again.written, again.digest) == (0, moved.digest)
    assert Dataset.open(str(tmp_path / "here" / "lr")).read(dataset.index(), 0).hr.shape == (128, 128, 3)


def test_degradations_of_degradations_take_the_hr_from_where_it_is(small_dataset, heavy_lr, small_recipe, tmp_path):
    light = Recipe.model_validate(load_recipe("light").model_dump(mode="json"))
    made(hr_job(heavy_lr, str(tmp_path / "light"), light))
    assert Dataset.open(str(tmp_path / "light")).hr_dataset().uri == Dataset.open(small_dataset).uri


def test_the_same_digest_on_s3_beside_its_hr(small_dataset, heavy_lr, heavy, bucket, tmp_path):
    place = f"{bucket}/{tmp_path.name}"
    publish(Path(small_dataset), f"{place}/hr")
    result = run_job(hr_job(f"{place}/hr", f"{place}/lr", heavy), 2, progress=False)
    assert result.digest == Dataset.open(heavy_lr).digest
    dataset = Dataset.open(f"{place}/lr")
    assert dataset.manifest.hr_from.uri == "../hr"
    assert dataset.read(dataset.index(), 3).hr.shape == (128, 128, 3)


def test_the_page_of_new_degradations_names_the_dataset_of_the_hr(small_dataset, heavy_lr, tmp_path):
    inspect(heavy_lr, tmp_path / "p.html", 1, progress=False)
    text = " ".join(" ".join(Loads((tmp_path / "p.html").read_text()).shown).split())
    assert f"HR images from the dataset at {small_dataset}" in text
    assert f"HR dataset {Dataset.open(small_dataset).digest}" in text


@pytest.fixture
def regenerated(small_dataset, heavy, tmp_path) -> tuple[Path, Path]:
    """HR that was generated anew with another seed since LR was made of it; both lie beside each other."""
    hr, lr = tmp_path / "hr", tmp_path / "lr"
    shutil.copytree(small_dataset, hr)
    shutil.rmtree(hr / "_state" / "derived", ignore_errors=True)  # of what other tests made of the small dataset
    made(hr_job(str(hr), str(lr), heavy))
    manifest = json.loads((hr / "manifest.json").read_bytes())
    kept = manifest["shards"][1:]
    manifest |= {"shards": kept, "samples": sum(shard["samples"] for shard in kept)}
    manifest["digest"] = dataset_digest(shard["sha256"] for shard in kept)
    (hr / "manifest.json").write_text(json.dumps(manifest))  # as after one photograph less
    return hr, lr


def test_what_another_dataset_is_made_of_is_not_collected(regenerated, heavy, tmp_path, capsys):
    hr, lr = regenerated
    before = {path for path in hr.rglob("*") if path.is_file()}
    assert cli.main(["shards", "--gc", "--out", str(hr)]) == 1
    assert f"made of older versions of it: {lr} (made of the version" in capsys.readouterr().err
    assert cli.main(["shards", "--gc", "--dry-run", "--out", str(hr), "--json"]) == 0
    would = json.loads(capsys.readouterr().out)
    assert would["held_by"] == [str(lr)]
    assert len([one for one in would["would_remove"] if one["object"].endswith(".tar")]) == 1
    assert would["bytes"] == sum((hr / one["object"]).stat().st_size for one in would["would_remove"])
    assert cli.main(["shards", "--gc", "--dry-run", "--out", str(hr)]) == 0
    assert f"refused without --force, for these would lose what they are made of:\n  {lr}" in capsys.readouterr().out
    assert {path for path in hr.rglob("*") if path.is_file()} == before
    assert verify(str(lr), progress=False).ok

    # What is made anew of the present version, or gone, holds nothing back; its old record goes, too.
    tmp_path.joinpath("lr").rename(tmp_path / "away")
    assert collect_garbage(str(hr), dry_run=True).held_by == []
    tmp_path.joinpath("away").rename(lr)
    manifest = json.loads((lr / "manifest.json").read_bytes())
    manifest["hr_from"]["digest"] = Dataset.open(str(hr)).digest
    (lr / "manifest.json").write_text(json.dumps(manifest))
    removed = [entry.path for entry in collect_garbage(str(hr)).objects]
    assert len([path for path in removed if path.endswith(".tar")]) == 1
    assert len([path for path in removed if path.startswith("_state/derived/")]) == 1


def test_a_derived_dataset_that_cannot_be_read_holds_back_and_is_named(regenerated):
    hr, lr = regenerated
    (lr / "manifest.json").write_text("{")
    with pytest.raises(HeldBack, match=f"{lr} .it cannot be read: .*is not a manifest"):
        collect_garbage(str(hr))
    shutil.rmtree(lr)
    [record] = (hr / "_state" / "derived").iterdir()
    about = json.loads(record.read_bytes())
    record.write_text(json.dumps(about | {"host": "another"}))
    with pytest.raises(HeldBack, match=f"{lr} .a folder of another, which cannot be seen from here"):
        collect_garbage(str(hr))
    record.write_text(json.dumps(about | {"uri": "s3://no-such-bucket/lr"}))
    with pytest.raises(HeldBack, match="s3://no-such-bucket/lr .it cannot be read: there is no bucket"):
        collect_garbage(str(hr))


def test_a_dataset_that_is_being_made_holds_back_what_it_reads(regenerated):
    hr, lr = regenerated
    (lr / "manifest.json").unlink()
    with running(open_storage(str(lr))), pytest.raises(HeldBack, match=str(lr)):
        collect_garbage(str(hr))
    assert collect_garbage(str(hr), dry_run=True).held_by == []


def test_where_the_hr_was_collected_every_reader_names_the_cause(regenerated, tmp_path, capsys, monkeypatch):
    hr, lr = regenerated
    collect_garbage(str(hr), force=True)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    cause = f"{hr}, which holds the HR, was generated anew .* and its older shards were removed by --gc"
    [problem] = verify(str(lr), progress=False).problems
    assert re.search(f"1 of the [0-9]+ shards with its HR are gone: {cause}", problem)
    for words in (
        ["inspect", str(lr), "--out", str(tmp_path / "p.html")],
        ["evaluate", "--model", "tiny", "--data", str(lr), "--out", str(tmp_path / "e")],
        ["shards", "--join", str(lr), "--out", str(tmp_path / "joined"), "--tracking", "false"],
        ["train", "learner", "--preset", "tiny", "--data", str(lr), "--out", str(tmp_path / "t")],
        ["latents", "--base", "tiny", "--data", str(lr), "--out", str(tmp_path / "l"), "--tracking", "false"],
    ):
        assert cli.main(words) == 1
        assert re.search(cause, capsys.readouterr().err), words
    dataset = Dataset.open(str(lr))
    index = dataset.index()
    names = {shard.name for shard in Dataset.open(str(hr)).manifest.shards}
    row = next(row for row, name in enumerate(index["hr_shard"].to_pylist()) if name not in names)
    with pytest.raises(DeeDSRError, match=cause):  # of whoever reads already when it goes
        dataset.read(index, row)


def test_wrong_wishes_are_refused(small_dataset, heavy_lr, heavy, tmp_path):
    with pytest.raises(UsageError, match="is the dataset that the HR comes from"):
        run_job(hr_job(small_dataset, small_dataset, heavy), progress=False)
    with pytest.raises(UsageError, match="holds its HR images itself"):
        run_job(join_job(small_dataset, str(tmp_path)), progress=False)
    with pytest.raises(UsageError, match="one of the datasets to join"):
        run_job(join_job(heavy_lr, small_dataset), progress=False)


def test_a_replay_finds_an_lr_that_its_hr_and_draws_do_not_give(small_dataset, heavy_lr, tmp_path):
    """Two draws are exchanged inside their JSON: every file is whole, only the replay sees it."""
    import hashlib

    out = tmp_path / "forged"
    shutil.copytree(heavy_lr, out)
    dataset = Dataset.open(str(out))
    row = dataset.index().slice(0, 1).to_pylist()[0]
    path = out / row["shard"]
    data = bytearray(path.read_bytes())
    place = slice(row["json_offset"], row["json_offset"] + row["json_size"])
    info = json.loads(bytes(data[place]))
    quality = next(step for step in info["degradation"]["steps"] if step["step"] == "jpeg1")
    quality["quality"] = 99 if quality["quality"] != 99 else 98
    forged = json.dumps(info, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(forged) == row["json_size"]
    data[place] = forged
    path.write_bytes(data)
    manifest = json.loads((out / "manifest.json").read_text())
    for shard in manifest["shards"]:
        if shard["name"] == row["shard"]:
            shard["sha256"] = hashlib.sha256(data).hexdigest()
    manifest["digest"] = hashlib.sha256("".join(f"{s['sha256']}\n" for s in manifest["shards"]).encode()).hexdigest()
    manifest["hr_from"]["uri"] = small_dataset
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert verify(str(out), progress=False).ok
    result = verify(str(out), replay=5, progress=False)
    assert [problem for problem in result.problems if row["key"] in problem and "give another LR" in problem]
    assert result.replayed == 4
