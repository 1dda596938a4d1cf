"""Claims on storage, each on a local directory and on a real S3 server process."""

import os
import pickle
import time

import pytest

from deedsr.errors import UsageError
from pipelines.storage import localize, open_storage, publish


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
