"""Claims on S3 storage behind a network that fails."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import boto3
import numpy as np
import pytest
import yaml

from deedsr.errors import DeeDSRError, UsageError
from pipelines.claims import running
from pipelines.cluster import scratch
from pipelines.data.dataset import Dataset
from pipelines.storage import Conflict, localize, open_storage, publish, waiting
from pipelines.storage import s3 as s3_module


def pattern(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.mark.parametrize(("share", "objects"), [(0.1, 30), (0.3, 6)])
def test_every_operation_is_right_on_a_network_that_fails(share, objects, through, bucket, tmp_path):
    proxy = through(share, seed=1)
    large = pattern(17 << 20)  # three parts
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for number in range(objects):
        (folder / "sub" / f"{number:02d}").write_bytes(pattern(3000 + 100_000 * (number % 3), number))
    (folder / "large").write_bytes(large)
    (folder / "made.json").write_bytes(b"{}")

    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.require_writable()
    publish(folder, storage.uri)
    expected = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert {entry.path: entry.size for entry in storage.list()} == {path: len(d) for path, d in expected.items()}
    assert all(storage.read(path) == data for path, data in expected.items())
    assert storage.stat("large").size == len(large)
    assert storage.read_range("large", 5_000_000, 9_000_000) == large[5_000_000:14_000_000]
    with storage.open("large") as file:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(large).digest()
        file.seek(-8, os.SEEK_END)
        assert file.read() == large[-8:]
    local = localize(storage.uri)
    assert {str(f.relative_to(local)): f.read_bytes() for f in local.rglob("*") if f.is_file()} == expected

    version = None
    for number in range(6):  # an attempt whose answer was lost is no conflict with oneself
        version = storage.write("commit", f"{number}".encode(), expected=version)
    with pytest.raises(Conflict):
        storage.write("commit", b"other", expected=None)
    storage.delete_many(expected)
    storage.delete("commit")
    assert not list(storage.list())
    storage.abort_uploads(timedelta(0))
    assert not list(storage.uploads())
    print(proxy.requests, "requests, of them", dict(proxy.injected))
    assert sum(proxy.injected.values()) > share * proxy.requests / 2


def test_a_body_that_breaks_continues_where_it_broke(through, bucket, tmp_path):
    data = pattern(4 << 20)
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.write("x", data)
    for read in (
        storage.read,
        lambda path: storage.open(path).read(),
        lambda path: storage.read_range(path, 0, 4 << 20),
    ):
        proxy = through(lambda number: "truncated" if number < 5 else None)
        assert read("x") == data
        assert proxy.injected["truncated"] == 5
        assert proxy.sent < 1.1 * len(data)


def test_bytes_that_the_network_changed_are_noticed(through, bucket, tmp_path):
    data = pattern(1 << 20)
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.write("x", data)
    for faults in ({0: "changed"}, {0: "truncated", 1: "changed"}):
        proxy = through(faults.get)
        assert storage.read("x") == data
        assert proxy.injected["changed"] == 1


def test_an_object_that_is_replaced_while_its_body_is_broken_is_read_again_from_the_start(
    through, bucket, s3_server, tmp_path
):
    old, new = pattern(1 << 20, 1), pattern(1 << 20, 2)
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.write("x", old)

    def replace_before_the_second(number):
        if number == 1:
            boto3.client("s3", endpoint_url=s3_server).put_object(
                Bucket=storage.bucket, Key=f"{storage.prefix}/x", Body=new
            )
        return "truncated" if number == 0 else None

    proxy = through(replace_before_the_second)
    assert storage.read("x") == new
    assert proxy.requests == 3
    storage.write("x", old)
    through(replace_before_the_second)
    with pytest.raises(Conflict):  # of a range there is no checksum that would notice
        storage.read_range("x", 0, len(old))


def test_a_conditional_write_whose_answer_was_lost_is_no_conflict_with_itself(through, bucket, tmp_path):
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    through({0: "lost", 2: "lost"}.get)
    first = storage.write("x", b"1", expected=None)
    assert storage.stat("x").version == first
    through({0: "lost"}.get)
    second = storage.write("x", b"2", expected=first)
    through({0: "lost"}.get)
    with pytest.raises(Conflict):
        storage.write("x", b"3", expected=first)
    assert storage.stat("x").version == second


def test_a_server_without_conditional_puts_is_asked_what_is_there(through, bucket, tmp_path):
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    through({0: "501"}.get)
    first = storage.write("x", b"1", expected=None)
    through({0: "501"}.get)
    with pytest.raises(Conflict):
        storage.write("x", b"2", expected=None)
    assert storage.stat("x").version == first


def test_an_answer_that_never_comes_ends_in_one_clear_error(through, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(s3_module, "_READ_SECONDS", 0.2)
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "1")
    proxy = through(1.0, ("slow",), slow=30)
    with pytest.raises(DeeDSRError, match=f"cannot read {bucket}/x: the S3 endpoint does not answer"):
        open_storage(bucket).read("x")
    assert proxy.requests >= 2


@pytest.mark.parametrize("fault", ["503", "reset"])
def test_storage_that_refuses_at_once_is_waited_for_by_time(fault, through, bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(waiting, "_LONGEST_PAUSE", 0.05)
    monkeypatch.setattr(waiting, "_UNSAID_SECONDS", 0.3)
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.write("x", b"1")
    proxy = through(lambda number: fault if number < 30 else None)
    assert storage.read("x") == b"1"
    assert proxy.injected[fault] == 30
    said = [record.message for record in caplog.records if "DEEDSR_STORAGE_SECONDS" in record.message]
    assert len(said) == 1  # a line every half minute
    assert "S3 at 127.0.0.1 fails" in said[0]
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0.2")
    through(lambda number: fault)
    with pytest.raises(DeeDSRError, match="cannot read"):
        storage.read("x")
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "soon")
    with pytest.raises(UsageError, match="DEEDSR_STORAGE_SECONDS must be a number of seconds, 0 or more, got 'soon'"):
        storage.read("x")


def test_a_command_that_is_asked_to_end_does_not_wait_for_storage(through, bucket, photos, tmp_path):
    """Threads that download wait too, and would hold the process."""
    open_storage(f"{bucket}/{tmp_path.name}").write("adapter/config.json", b"{}")
    proxy = through(lambda number: "reset" if number else None)
    words = ["upscale", str(photos / "validation"), "--model", f"{bucket}/{tmp_path.name}", "--out", str(tmp_path)]
    command = subprocess.Popen([sys.executable, "-m", "deedsr", *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while proxy.injected["reset"] < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 130, said
    assert "interrupted" in said


def test_what_is_larger_than_one_put_takes_is_uploaded_in_parts(bucket, tmp_path):
    """S3 takes 5 GB in one request; a part of a checkpoint may be more."""
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    data = pattern(17 << 20)
    version = storage.write("x", data)
    assert version.endswith("-3")  # S3's version of an object of three parts
    assert storage.read("x") == data
    assert storage.stat("x").version == version


def test_a_cleaning_that_fails_hides_no_cause(through, bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0")
    out = open_storage(f"{bucket}/{tmp_path.name}")
    away: list[bool] = []
    through(lambda number: "reset" if away else None)

    def fails() -> None:
        away.append(True)
        raise DeeDSRError("the cause")

    for left in (running(out), scratch(out.uri, "_ray-1")):
        away.clear()
        with pytest.raises(DeeDSRError, match="the cause"), left:
            fails()
    assert "what this run left in" in caplog.text


def test_several_processes_of_a_node_download_a_model_once(through, bucket, tmp_path):
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    data = pattern(2 << 20)
    storage.write("adapter/weights", data)
    stale = tmp_path / "cache" / "deedsr" / f"{'0' * 64}.partial"
    stale.mkdir(parents=True)  # of a process that was killed
    (stale / "weights").write_bytes(b"half")
    own = localize(storage.uri)
    own.rename(own.with_name(f"{own.name}.partial"))  # the same of this model
    proxy = through(1.0, ("slow",), slow=0.3)
    code = "import sys; from pipelines.storage import localize; print(localize(sys.argv[1]))"
    words = [sys.executable, "-c", code, storage.uri]
    processes = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    (folder,) = {process.communicate(timeout=120)[0].strip() for process in processes}
    with open(f"{folder}/adapter/weights", "rb") as file:
        assert file.read() == data
    assert proxy.sent < 1.5 * len(data)
    assert [path.name for path in stale.parent.iterdir() if path.suffix != ".used"] == [folder.rpartition("/")[2]]


def test_an_upload_that_fails_leaves_no_parts(through, bucket, tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(pattern(20 << 20))
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0")
    proxy = through({2: "500"}.get)
    with pytest.raises(DeeDSRError):
        storage.write("large", tmp_path / "large")
    assert proxy.injected
    assert not list(storage.uploads())
    assert not list(storage.list())


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_a_killed_writer_leaves_is_found_and_removed(place, bucket, tmp_path):
    uri = str(tmp_path / "store") if place == "local" else f"{bucket}/{tmp_path.name}"
    (tmp_path / "large").write_bytes(pattern(20 << 20))
    killed = (
        "import os, sys, pipelines.storage.local, pipelines.storage.s3 as s3, pathlib\n"
        "os.fsync = lambda *_: os._exit(9)\n"
        "storage = s3.S3Storage(*sys.argv[1][5:].split('/', 1)) if sys.argv[1][:3] == 's3:' else None\n"
        "if storage:\n"
        "    storage._client.meta.events.register('before-call.s3.UploadPart', lambda **_: os._exit(9))\n"
        "else:\n"
        "    storage = pipelines.storage.local.LocalStorage(pathlib.Path(sys.argv[1]))\n"
        "storage.write('a/large', pathlib.Path(sys.argv[2]))\n"
    )
    assert subprocess.run([sys.executable, "-c", killed, uri, tmp_path / "large"]).returncode == 9
    storage = open_storage(uri)
    assert not list(storage.list())
    assert [upload.path for upload in storage.uploads()] == ["a/large"]
    if place == "local":  # moto says of all uploads that they began in 2010
        assert storage.abort_uploads(timedelta(hours=1)) == 0
    assert storage.abort_uploads(timedelta(0)) == 1
    assert not list(storage.uploads())


def without_hash(path: str) -> str:
    return re.sub("[0-9a-f]{12,}", "HASH", path)


@pytest.mark.soak
def test_shards_made_on_a_network_that_fails_have_the_same_digest(
    small_dataset, small_recipe, photos, through, bucket, tmp_path
):
    place = f"{bucket}/{tmp_path.name}"
    publish(photos, f"{place}/photos")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(small_recipe.model_dump(mode="json")))
    proxy = through(0.1, seed=5)  # of the first 50 requests, 7 are hit, in 5 ways
    # A process with a cluster of its own, whose workers have the proxy's address from the start.
    words = ["shards", "--source", f"{place}/photos", "--out", f"{place}/out", "--workers", "2", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "deedsr", *words, "--recipe", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["digest"] == Dataset.open(small_dataset).digest
    print(proxy.requests, "requests, of them", dict(proxy.injected))
    assert len(proxy.injected) >= 5
    out = open_storage(f"{place}/out")
    made = [entry.path for entry in out.list()]
    expected = [entry.path for entry in open_storage(small_dataset).list()]
    assert [path for path in made if "/" not in path] == [path for path in expected if "/" not in path]
    # The names of the state hash where the sources lie.
    assert sorted(map(without_hash, made)) == sorted(map(without_hash, expected))
    out.abort_uploads(timedelta(0))
    assert not list(out.uploads())
