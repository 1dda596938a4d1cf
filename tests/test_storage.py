"""Claims on storage, each on a local directory and on a real S3 server process."""

import hashlib
import os
import pickle
import re
import shutil
import socket
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from pipelines.inference.upscaler import TooLarge
from pipelines.shards.garbage import HeldBack
from pipelines.storage import Conflict, localize, open_storage, publish, require_here
from pipelines.training.health import Ended, Moved


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return open_storage(tmp_path / "store")
    return open_storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_objects_come_back_whole_and_in_ranges(storage, tmp_path):
    (tmp_path / "file").write_bytes(b"from a file")
    storage.write("a/b.bin", b"0123456789")
    storage.write("c.bin", tmp_path / "file")
    assert storage.read("a/b.bin") == b"0123456789"
    assert storage.read("c.bin") == b"from a file"
    assert storage.read_range("a/b.bin", 3, 4) == b"3456"
    assert storage.child("a").read("b.bin") == b"0123456789"
    storage.download("a/b.bin", tmp_path / "copy" / "b.bin")
    assert (tmp_path / "copy" / "b.bin").read_bytes() == b"0123456789"


def test_listing_is_recursive_sorted_and_below_a_folder_only(storage):
    for path in ("b", "a/z", "a/c/d", "ab/e"):
        storage.write(path, path.encode() * 3)
    assert [(entry.path, entry.size) for entry in storage.list()] == [("a/c/d", 15), ("a/z", 9), ("ab/e", 12), ("b", 3)]
    assert [entry.path for entry in storage.list("a")] == ["a/c/d", "a/z"]
    assert list(storage.list("none")) == []
    hard = {"n/x", "n-1", "n.d/x", "n0", "n/é", "n/z/1", "n/z-1", "n/z.png"}
    for path in hard:
        storage.write(f"hard/{path}", b"1")
    assert [e.path for e in storage.list("hard")] == sorted((f"hard/{path}" for path in hard), key=str.encode)


def test_a_version_changes_with_the_content(storage):
    storage.write("x", b"1")
    first = storage.stat("x")
    assert next(iter(storage.list())) == first
    time.sleep(0.02)
    storage.write("x", b"2")
    assert storage.stat("x").version != first.version


def test_what_is_missing_is_file_not_found_and_may_be_deleted(storage):
    for call in (storage.read, storage.stat, lambda path: storage.read_range(path, 0, 1)):
        with pytest.raises(FileNotFoundError):
            call("none")
    assert not storage.exists("none")
    storage.write("x", b"1")
    assert storage.exists("x")
    storage.delete("x")
    storage.delete("x")
    assert not storage.exists("x")


def test_a_write_that_fails_leaves_the_old_object_and_nothing_else(storage, tmp_path):
    storage.write("x", b"old")
    with pytest.raises(Exception):  # noqa: B017 - each storage has its own way of failing here
        storage.write("x", tmp_path)  # a directory cannot be read as a file
    assert storage.read("x") == b"old"
    assert [entry.path for entry in storage.list()] == ["x"]
    if storage.local_path("x"):  # a listing leaves out unfinished files, a directory has none to hide
        assert os.listdir(storage.uri) == ["x"]


def test_a_storage_travels_to_another_process(storage):
    storage.write("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read("x") == b"1"


@pytest.mark.parametrize(
    "error",
    [
        UsageError("what is wrong"), DatasetNotCommitted("s3://b/shards"), Conflict("s3://b/a"), Moved(3), Ended(4),
        HeldBack("s3://b/a", []), TooLarge(torch.zeros(3, 8, 6)),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_an_error_has_the_same_message_and_fields_in_another_process(error):
    there = pickle.loads(pickle.dumps(error))
    assert (type(there), str(there), there.__dict__) == (type(error), str(error), error.__dict__)


def test_a_folder_that_a_worker_lacks_is_named_with_the_worker(tmp_path, bucket):
    for place in (str(tmp_path), f"file://{tmp_path}", f"{bucket}/nothing"):  # what S3 has is the same for all
        require_here(place)
    with pytest.raises(UsageError, match=f"^on {socket.gethostname()}: {tmp_path}/none is missing, .* that all nodes"):
        require_here(f"file://{tmp_path}/none")


def test_file_uris_are_paths_and_other_schemes_are_refused(tmp_path):
    folder = tmp_path / "a b"
    assert open_storage(f"file://{tmp_path}/a%20b").uri == str(folder)
    for wrong in ("gs://bucket/x", "s3://", "file://host/x", ""):
        with pytest.raises(UsageError):
            open_storage(wrong)


def test_missing_bucket_and_missing_credentials_are_named(s3_server, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no bucket 'deedsr-nowhere'"):
        list(open_storage("s3://deedsr-nowhere/x").list())
    with pytest.raises(UsageError, match="no bucket 'deedsr-nowhere'"):
        open_storage("s3://deedsr-nowhere/x").write("y", b"")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="no bucket 'deedsr-nowhere'"):
        open_storage("s3://deedsr-nowhere/x").write("y", tmp_path / "file")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="AWS_ACCESS_KEY_ID"):
        open_storage("s3://deedsr-nowhere/x").read("y")


def test_localize_downloads_once_and_again_when_something_changed(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = f"{bucket}/{tmp_path.name}"
    open_storage(uri).write("a/x", b"1")
    first = localize(uri)
    assert (first / "a" / "x").read_bytes() == b"1"
    (first / "a" / "x").write_bytes(b"still the download")
    assert (localize(uri) / "a" / "x").read_bytes() == b"still the download"
    open_storage(uri).write("a/x", b"2")
    assert (localize(uri) / "a" / "x").read_bytes() == b"2"
    assert localize(tmp_path) == tmp_path
    for nothing in (tmp_path / "none", f"{bucket}/nothing-here"):
        with pytest.raises(UsageError):
            localize(nothing)


def test_publish_writes_the_json_that_vouches_for_the_rest_last(storage, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_bytes(b"w")
    (folder / "sub" / "config.json").write_bytes(b"{}")
    (folder / "a.json").write_bytes(b"{}")
    (folder / "z").symlink_to(folder / "gone")
    with pytest.raises(FileNotFoundError):
        publish(folder, storage.uri)
    assert "a.json" not in [entry.path for entry in storage.list()]
    (folder / "z").unlink()
    publish(folder, storage.uri)
    assert [entry.path for entry in storage.list()] == ["a.json", "sub/config.json", "weights"]


def test_of_several_writers_that_expect_the_same_one_writes(storage, monkeypatch):
    replace = Path.replace

    def late(self, target):
        time.sleep(0.005)  # time for another writer to compare, if nothing keeps it out
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)

    def attempt(text, expected):
        try:
            return storage.write("a/x", text.encode(), expected=expected)
        except Conflict:
            return None

    # moto compares and puts in two steps, between which another put may come: there, one after the other.
    at_once = 8 if storage.local_path("") else 1
    expected = None
    for step in range(3):
        texts = [f"{step} {writer}" for writer in range(8)]  # equal content is an equal version on S3
        with ThreadPoolExecutor(at_once) as threads:
            versions = [*threads.map(attempt, texts, [expected] * 8)]
        ((text, expected),) = [written for written in zip(texts, versions, strict=True) if written[1]]
        assert storage.read("a/x") == text.encode()
        assert storage.stat("a/x").version == expected
    assert [entry.path for entry in storage.list()] == ["a/x"]
    storage.delete("a/x")
    with pytest.raises(Conflict, match=re.escape(f"{storage.uri}/a/x was changed by another process")):
        storage.write("a/x", b"0", expected=expected)
    if storage.local_path(""):
        assert not os.listdir(storage.uri)


def test_a_write_returns_the_version_that_readers_see(storage, tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(9 << 20))  # more than one part
    for data in (b"1", b"2", tmp_path / "file"):
        version = storage.write("x", data)
        assert storage.stat("x").version == version
    assert storage.write("x", tmp_path / "file", expected=version)
    with pytest.raises(Conflict):
        storage.write("x", b"3", expected=None)
    assert storage.stat("x").size == 9 << 20


def test_a_version_changes_though_the_clock_does_not(tmp_path):
    storage = open_storage(tmp_path)
    storage.write("x", b"1")
    os.utime(tmp_path / "x", ns=(2**61, 2**61))  # later than any tick of the clock that the next write can get
    before = storage.stat("x").version
    version = storage.write("x", b"2", expected=before)
    assert version == storage.stat("x").version != before


def test_an_object_reads_as_a_file(storage, tmp_path):
    table = pa.table({"n": np.arange(2_000_000)})
    pa.parquet.write_table(table, tmp_path / "table", compression="none")
    with tarfile.open(tmp_path / "tar", "w") as tar:
        for name in ("table", "again"):
            tar.add(tmp_path / "table", name)
    storage.write("x.tar", tmp_path / "tar")
    with storage.open("x.tar") as file:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(storage.read("x.tar")).digest()
        file.seek(-5, os.SEEK_END)
        assert file.read() == storage.read("x.tar")[-5:]
        assert file.read(1) == b""
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            assert tar.getnames() == ["table", "again"]
            assert pa.parquet.read_table(tar.extractfile("again"), columns=["n"]).equals(table)
    with pytest.raises(FileNotFoundError):
        storage.open("none")


def test_a_file_that_is_open_never_mixes_two_versions(storage):
    storage.write("x", b"1" * (9 << 20))
    with storage.open("x") as file:
        start = file.read(10)
        storage.write("x", b"2" * (9 << 20))
        try:
            rest = file.read()
        except Conflict:
            rest = b""
    assert set(start + rest) == set(b"1")


def test_many_objects_are_deleted_together(storage):
    for number in range(5):
        storage.write(f"a/{number}", b"x")
    storage.delete_many(f"a/{number}" for number in (0, 2, 4, 2000, *range(3000, 4000)))
    assert [entry.path for entry in storage.list()] == ["a/1", "a/3"]


def test_a_place_that_can_be_written_is_left_as_it_was(storage):
    storage.child("deep/er").require_writable(needed_bytes=1000)
    assert not list(storage.list())
    assert not list(storage.uploads())
    local = storage.local_path("")
    assert local is None or not local.exists()


def test_too_small_a_disk_is_told_with_both_numbers(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(DeeDSRError, match=r"needs about [0-9,]{20,} bytes .* has [0-9,]{5,} free"):
        open_storage(tmp_path / "out").require_writable(needed_bytes=free * 1_000_000)


def test_the_last_objects_of_a_folder_are_deleted_by_several_at_once(tmp_path):
    storage = open_storage(tmp_path)
    for number in range(150):
        paths = [f"a{number}/b/{part}" for part in range(8)]
        for path in paths:
            storage.write(path, b"1")
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(storage.delete, paths))
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_deleted_with_marks_and_unfinished_writes(storage):
    storage.write("kept", b"1")
    child = storage.child("a")
    child.write("b/c", b"1")
    if storage.local_path("") is None:
        client, bucket, key = storage._client, storage.bucket, f"{storage.prefix}/a/"
        for mark in (key, f"{key}b/"):  # as Ray Train leaves them
            client.put_object(Bucket=bucket, Key=mark)
        client.create_multipart_upload(Bucket=bucket, Key=f"{key}begun")
        child.delete_all()
        assert "Contents" not in client.list_objects_v2(Bucket=bucket, Prefix=key)
    else:
        child.delete_all()
        assert not (storage.local_path("") / "a").exists()
    child.delete_all()
    assert not list(storage.uploads())
    assert [entry.path for entry in storage.list()] == ["kept"]


def test_what_ray_train_writes_leaves_nothing_in_a_bucket(bucket, tmp_path):
    import boto3

    from pipelines.cluster import scratch

    place = f"{bucket}/{tmp_path.name}/runs/learner"
    with scratch(place, "_ray-1") as (path, filesystem):
        for one in (filesystem, pickle.loads(pickle.dumps(filesystem))):
            one.create_dir(f"{path}/deedsr-learner", recursive=True)
            with one.open_output_stream(f"{path}/deedsr-learner/.validate_storage_marker") as file:
                file.write(b"1")
            assert one.get_file_info(f"{path}/deedsr-learner/.validate_storage_marker").size == 1
    listing = boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"), Prefix=f"{tmp_path.name}/")
    assert [item["Key"] for item in listing.get("Contents", ())] == []


def test_what_a_training_left_beside_a_model_is_not_downloaded(bucket, tmp_path, monkeypatch):
    from pipelines.models import Learner, Model

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = open_storage(f"{bucket}/{tmp_path.name}")
    model = {"deedsr.json", "training.json", "LICENSE", "README.md", "learner/config.json", "adapter/config.json"}
    model |= {f"{part}/diffusion_pytorch_model.safetensors" for part in ("learner", "adapter")}
    left = {"checkpoints/step-00000100/trained.safetensors", "incidents/step-00000007-rank-0.safetensors"}
    left |= {"_ray-1a2b3c4d/deedsr-learner/x.json", "pictures/validation/1.png", "metrics/000001-00000100.jsonl"}
    left |= {"text_encoder/model.safetensors", "v2-1_512-ema-pruned.safetensors"}
    for path in model | left:
        out.write(path, b"{}")
    folder = Model.find(out.uri).path
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == model
    assert Learner.find(f"{out.uri}/learner").path.is_dir()
