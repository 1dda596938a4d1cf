"""Claims on what is in a dataset: samples, tars, index, manifest, crops."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError
from source_files import rewritten

from deedsr.dataset.crops import choose_crops, cut
from deedsr.dataset.manifest import SAMPLES, Manifest, kept_copy
from deedsr.dataset.members import decode_stored, encode
from deedsr.dataset.pictures import RejectedImage, decode
from deedsr.dataset.recipe import Crop
from deedsr.degradation.chain import degrade
from deedsr.errors import DatasetNotCommitted, DeeDSRError
from pipelines.data.dataset import Dataset
from pipelines.data.index import SampleIndex
from pipelines.reports.inspection import inspect
from pipelines.shards.build import FromSources
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import plan_shards
from pipelines.shards.shard import ShardTar
from pipelines.storage import open_storage, publish
from pipelines.storage.s3 import _ObjectFile


@pytest.fixture(scope="module")
def dataset(small_dataset) -> Dataset:
    return Dataset.open(small_dataset)


def file_bytes(image: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


def test_a_plain_webdataset_reader_reads_the_shards(dataset):
    import webdataset

    tars = [f"{dataset.uri}/{shard.name}" for shard in dataset.manifest.shards]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert len(samples) == dataset.manifest.samples
    assert sorted(sample["__key__"] for sample in samples) == sorted(dataset.index()["key"].to_pylist())
    for sample in samples[:3]:
        assert sample["hr.webp"].shape == (128, 128, 3)
        assert sample["lr.webp"].shape == (32, 32, 3)
        assert sample["json"]["recipe_digest"] == dataset.recipe.digest


def test_the_index_finds_every_sample_alone(dataset):
    table = dataset.index()
    assert table.num_rows == dataset.manifest.samples
    for row in range(0, table.num_rows, 7):
        sample = dataset.read(table, row)
        with tarfile.open(f"{dataset.uri}/{table['shard'][row].as_py()}") as tar:
            stored = {
                member.name: tar.extractfile(member).read() for member in tar if member.name.startswith(sample.key)
            }
        assert np.array_equal(sample.hr, decode_stored(stored[f"{sample.key}.hr.webp"]))
        assert np.array_equal(sample.lr, decode_stored(stored[f"{sample.key}.lr.webp"]))
        assert sample.info == json.loads(stored[f"{sample.key}.json"])
        assert np.array_equal(dataset.read_lr(table, row)[1], sample.lr)


def test_splits_share_no_source_and_follow_the_patterns(dataset):
    train, validation = (dataset.index(split) for split in ("train", "validation"))
    assert (train.num_rows, validation.num_rows) == (88, 48)
    assert all(path.startswith("validation/") for path in validation["source"].to_pylist())
    assert not any(path.startswith("validation/") for path in train["source"].to_pylist())


def test_keys_are_unique_without_dots_and_variants_of_a_crop_are_adjacent(dataset):
    table = dataset.index()
    keys, contents = table["key"].to_pylist(), table["content"].to_pylist()
    assert len(set(keys)) == len(keys)
    assert not any("." in key for key in keys)
    assert [contents[i : i + 4] for i in range(0, len(contents), 4)] == [[c] * 4 for c in contents[::4]]
    assert len(set(contents)) == len(contents) // 4


def test_variants_share_the_hr_and_differ_in_the_degradation(dataset):
    table = dataset.index()
    samples = [dataset.read(table, row) for row in range(4)]
    assert all(np.array_equal(sample.hr, samples[0].hr) for sample in samples)
    assert len({json.dumps(sample.info["degradation"]) for sample in samples}) == 4
    assert len({sample.lr.tobytes() for sample in samples}) == 4


def test_a_sample_says_where_it_was_cut_and_replays_to_its_lr(dataset, photos):
    table = dataset.index("validation")
    flips = set()
    for row in range(0, table.num_rows, 4):
        sample = dataset.read(table, row)
        top, left, height, width = sample.info["crop"]
        pixels = decode((photos / sample.info["source"]["path"]).read_bytes())[top : top + height, left : left + width]
        flips.add(sample.info["flip"])
        assert np.array_equal(sample.hr, pixels[:, ::-1] if sample.info["flip"] else pixels)
        assert np.array_equal(degrade(sample.hr, sample.info["degradation"]), sample.lr)
    assert flips == {True, False}


@pytest.mark.parametrize(("hr", "lr"), [("jpeg", "webp"), ("webp", "png")])
def test_the_lr_is_made_from_the_hr_as_stored(photos, small_recipe, tmp_path, hr, lr):
    fields = small_recipe.model_dump(mode="json")
    fields["formats"] = {"hr": hr, "hr_quality": 70, "lr": lr}
    recipe = type(small_recipe).model_validate(fields | {"variants": 1})
    out = open_storage(tmp_path)
    plan = next(iter(plan_shards(list_sources([str(photos / "train")]), recipe)))
    record = FromSources(recipe).build(plan, out)
    for row in record.rows.slice(0, 3).to_pylist():
        stored = {m: out.read_range(record.name, row[f"{m}_offset"], row[f"{m}_size"]) for m in ("hr", "lr", "json")}
        draws = json.loads(stored["json"])["degradation"]
        assert np.array_equal(degrade(decode_stored(stored["hr"]), draws), decode_stored(stored["lr"]))


def test_no_shard_holds_a_location_a_time_or_a_user(dataset, photos):
    for shard in dataset.manifest.shards:
        data = Path(dataset.uri, shard.name).read_bytes()
        assert str(photos).encode() not in data
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


MEMBERS = [("a", "bin", b"1" * 700), ("b", "lr.png", b""), ("a key/" * 9, "json", b"xyz" * 5000), ("u", "json", b"{}")]
TAR = "73c30fdef3b09d76"


def test_tar_offsets_and_hash_are_those_of_the_file(tmp_path):
    with (tmp_path / "x.tar").open("wb") as file:
        tar = ShardTar(file)
        offsets = {f"{key}.{ext}": tar.add(key, ext, data) for key, ext, data in MEMBERS}
        digest = tar.finish()
    data = (tmp_path / "x.tar").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    assert len(data) == tar.size
    with tarfile.open(tmp_path / "x.tar") as read:
        assert {member.name: member.offset_data for member in read} == offsets
    assert digest[:16] == TAR  # as ever: equal datasets have equal digests, whatever version made them


def test_a_folder_without_manifest_is_not_a_dataset(small_dataset, tmp_path):
    for file in Path(small_dataset).glob("*.tar"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DatasetNotCommitted, match=r"no manifest\.json"):
        Dataset.open(str(tmp_path))


def test_an_altered_or_newer_manifest_is_refused(dataset):
    fields = json.loads(dataset.manifest.to_json())
    assert Manifest.from_json(json.dumps(fields).encode(), "x") == dataset.manifest
    shorter = fields | {"shards": fields["shards"][1:]}
    for wrong, message in [
        (shorter, "altered"),
        (fields | {"format_version": 99}, "version 99"),
        ({}, "not a manifest"),
    ]:
        with pytest.raises(DeeDSRError, match=message):
            Manifest.from_json(json.dumps(wrong).encode(), "x")
    with pytest.raises(DeeDSRError, match="not a manifest"):
        Manifest.from_json(b"{", "x")


@pytest.mark.parametrize("format", ["png", "webp"])
def test_lossless_formats_are_lossless(format):
    image = noise(33, 65, 3)
    assert np.array_equal(decode_stored(encode(image, format)), image)


def test_crops_are_textured_inside_the_picture_and_do_not_overlap():
    image = np.full((300, 500, 3), 128, np.uint8)
    image[:, :300] = noise(300, 300, 3)
    crop = Crop(size=64, per_source=50, min_std=15, min_laplacian=40)
    chosen, smooth = choose_crops(image, crop, np.random.default_rng(1))
    assert len(chosen) + len(smooth) == (300 // 64) * (500 // 64)
    covered = np.zeros(image.shape[:2], int)
    for place in chosen + smooth:
        assert cut(image, place).shape == (64, 64, 3)
        cut(covered, place)[...] += 1
    assert covered.max() == 1
    assert chosen
    assert smooth
    assert all(place.left < 300 for place in chosen)
    assert all(place.left + 64 > 300 for place in smooth)
    few, _ = choose_crops(image, crop.model_copy(update={"per_source": 3}), np.random.default_rng(1))
    assert few == chosen[:3]
    for wrong, reason in [(image[:63], "smaller"), (image[:, 300:], "texture")]:
        with pytest.raises(RejectedImage, match=reason):
            choose_crops(wrong, crop, np.random.default_rng(1))


def test_a_crop_in_the_middle_is_one_and_a_picture_of_its_size_stays_whole():
    crop = Crop(size=64, place="center", per_source=1, min_std=0, min_laplacian=0)
    image = np.full((101, 300, 3), 128, np.uint8)
    assert choose_crops(image, crop, np.random.default_rng(1)) == ([(18, 118, 64)], [])
    assert choose_crops(image[:64, :64], crop, np.random.default_rng(2)) == ([(0, 0, 64)], [])
    with pytest.raises(ValidationError, match="per_source must be 1, got 2"):
        Crop(size=64, place="center", per_source=2, min_std=0, min_laplacian=0)


def test_crops_anywhere_are_as_many_as_asked_for_each_once_and_where_an_lr_has_whole_pixels():
    crop = Crop(size=64, place="anywhere", per_source=30, min_std=0, min_laplacian=0)
    image = noise(100, 200, 3)
    chosen, _ = choose_crops(image, crop, np.random.default_rng(1))
    assert len(chosen) == len(set(chosen)) == 30
    assert all(place.top % 12 == place.left % 12 == 0 and cut(image, place).shape == (64, 64, 3) for place in chosen)
    assert len({place.left for place in chosen}) > 5
    assert chosen != choose_crops(image, crop, np.random.default_rng(2))[0]
    one, _ = choose_crops(image[:64, :64], crop, np.random.default_rng(1))
    assert one == [(0, 0, 64)]


def test_columns_that_nobody_asked_for_are_not_read(small_dataset, bucket, tmp_path, monkeypatch):
    # Text that does not compress, as much as the rest of the index a hundred times.
    def pad(table: pa.Table) -> pa.Table:
        rng = np.random.default_rng(0)
        noise = [rng.bytes(20_000).hex() for _ in range(table.num_rows)]
        return table.append_column("source_note", pa.array(noise))

    padded = rewritten(small_dataset, tmp_path / "padded", pad)
    assert (padded / kept_copy(SAMPLES, Dataset.open(str(padded)).manifest.files[SAMPLES])).stat().st_size > 2e6
    read: list[int] = []
    readinto = _ObjectFile.readinto
    monkeypatch.setattr(_ObjectFile, "readinto", lambda file, buffer: read.append(n := readinto(file, buffer)) or n)
    publish(padded, f"{bucket}/padded")
    inspect(f"{bucket}/padded", tmp_path / "p.html", 2, progress=False)
    assert 0 < sum(read) < 1e6


def test_parts_and_batches_of_an_index_join_without_a_seam(small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("pipelines.data.index._BATCH", 7)
    parted = Dataset.open(str(rewritten(small_dataset, tmp_path / "parted", lambda table: table)))
    index, table = SampleIndex(parted), parted.index()
    assert [len(part) for part in index.parts] == [20] * 6 + [16]
    rows = [0, 19, 20, 77, 135]
    found = index.rows(rows)
    assert found["key"].to_pylist() == [table["key"][row].as_py() for row in rows]
    assert np.array_equal(parted.read(found, 3).lr, parted.read(table, 77).lr)
    quality = table["deg_jpeg2_quality"].drop_null().to_pylist()
    assert index.extremes("deg_jpeg2_quality") == (min(quality), max(quality))
