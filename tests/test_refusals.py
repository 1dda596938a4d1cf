"""Claims on S3 servers that refuse, and on disks that are full."""

import json
import logging
import re
import shutil
import subprocess
import threading
import time
import traceback
import urllib.request
from functools import partial

import boto3
import numpy as np
import pytest

from deedsr.errors import DeeDSRError, UsageError
from pipelines.storage import localize, open_storage


def pattern(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def checked_keys(bucket, s3_server, monkeypatch, tmp_path):
    """The S3 server checks signatures and policies; a function makes keys that may do certain things.

    Yields the function: it sets the AWS variables and returns the secret.
    """
    iam = boto3.client("iam")

    def use(*actions: str) -> str:
        name = f"user-{len(actions)}-{tmp_path.name}"[:60]
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        if actions:
            policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
            iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        check("0")
        return key["SecretAccessKey"]

    def check(after: str) -> None:
        request = urllib.request.Request(
            f"{s3_server}/moto-api/reset-auth", after.encode(), {"Content-Type": "text/plain"}, method="POST"
        )
        urllib.request.urlopen(request).close()

    yield use
    check("inf")


def refused(call, caplog, secret) -> str:
    """The message of the UsageError that `call` raises; no secret is in it, its causes or a log."""
    caplog.set_level(logging.INFO)
    with pytest.raises(UsageError) as error:
        call()
    told = "".join(traceback.format_exception(error.value)) + caplog.text
    assert secret not in told
    return str(error.value)


def test_keys_that_may_not_write_are_told_before_the_work(checked_keys, bucket, caplog):
    secret = checked_keys("s3:GetObject", "s3:ListBucket")
    out = open_storage(f"{bucket}/out")
    assert f"no permission to write {bucket}/out" in refused(out.require_writable, caplog, secret)
    assert f"no permission to write {bucket}/out/x" in refused(lambda: out.write("x", b""), caplog, secret)


def test_keys_that_may_write_are_enough(checked_keys, bucket):
    checked_keys("s3:PutObject", "s3:AbortMultipartUpload")
    open_storage(f"{bucket}/out").require_writable()


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys_are_told_before_the_work(variable, checked_keys, bucket, caplog, monkeypatch):
    checked_keys("s3:*")
    monkeypatch.setenv(variable, "wrong/and+secret")
    message = refused(open_storage(bucket).require_writable, caplog, "wrong/and+secret")
    assert "the AWS credentials are not valid" in message


def test_a_missing_bucket_is_told_before_the_work(bucket, caplog):
    message = refused(open_storage("s3://deedsr-nowhere/x").require_writable, caplog, "test-secret")
    assert "no bucket 'deedsr-nowhere'" in message


@pytest.mark.parametrize("endpoint", ["http://user:{}@[::1", "user:{}@host"])
def test_an_endpoint_that_is_no_url_is_told_without_what_it_holds(endpoint, bucket, caplog, monkeypatch):
    secret = "pass-word"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.format(secret))
    assert "AWS_ENDPOINT_URL" in refused(open_storage(bucket).require_writable, caplog, secret)


def test_keys_in_a_location_are_refused_and_not_repeated(caplog):
    secret = "-".join(["pass", "word"])  # a traceback shows this line
    for uri in (f"s3://KEY:{secret}@bucket/x", f"https://KEY:{secret}@host/bucket"):
        refused(partial(open_storage, uri), caplog, secret)


def test_a_full_disk_is_one_clear_error_and_nothing_partial_stays(small_disk, tmp_path):
    storage = open_storage(small_disk / "out")
    (tmp_path / "large").write_bytes(pattern(2 << 20))
    for data in (pattern(2 << 20), tmp_path / "large"):
        with pytest.raises(DeeDSRError, match=re.escape(f"cannot write {small_disk}/out/x: no space left")):
            storage.write("x", data)
        assert not [file for file in small_disk.rglob("*") if file.is_file()]
    with pytest.raises(DeeDSRError, match=r"needs about 2,000,000 bytes and its disk has [0-9,]+ free"):
        storage.require_writable(2_000_000)
    storage.require_writable(500_000)
    storage.write("x", pattern(1_000_000))
    (small_disk / "rest").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(DeeDSRError, match="no space left"):
        storage.require_writable()


def test_a_disk_that_fills_while_objects_come_down_is_named(small_disk, bucket, tmp_path, monkeypatch):
    storage = open_storage(f"{bucket}/{tmp_path.name}")
    storage.write("x", pattern(2 << 20))
    monkeypatch.setenv("XDG_CACHE_HOME", str(small_disk / "cache"))
    with pytest.raises(DeeDSRError, match=f"cannot write {small_disk}/cache.*: no space left"):
        localize(storage.uri)
    assert not [file for file in small_disk.rglob("*") if file.is_file()]


def test_a_read_only_disk_is_told_before_the_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UsageError, match="read-only"):
        open_storage(small_disk / "out").require_writable()


def test_a_shard_waits_for_a_disk_that_is_full(small_disk, photos, one_crop_recipe, monkeypatch, caplog):
    from pipelines.shards.build import FromSources
    from pipelines.shards.listing import list_sources
    from pipelines.shards.plan import plan_shards
    from pipelines.storage.waiting import patiently

    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    plan = next(iter(plan_shards(list_sources([str(photos)]), one_crop_recipe)))

    def free_when_said() -> None:
        deadline = time.monotonic() + 60
        while "no space left" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        filler.unlink()

    thread = threading.Thread(target=free_when_said)
    thread.start()
    work = FromSources(one_crop_recipe)
    assert patiently(work.build, plan, open_storage(small_disk / "out")).samples > 0
    thread.join()
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0.3")
    with pytest.raises(DeeDSRError, match="no space left"):
        patiently(work.build, plan, open_storage(small_disk / "other"))
