"""Checkpoints written while training goes on: storage that is away, full disks, which of them stay."""

import math
import shutil
import subprocess
import threading
import time

import pytest
from training_process import tensors

from deedsr.errors import DeeDSRError
from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint, Keep, Writer


def save(out, keep: Keep, *checkpoints: Checkpoint) -> list[int]:
    """Steps that stay."""
    with Writer(out, keep) as writer:
        for one in checkpoints:
            writer.start(one, tensors(one.step))
        writer.wait()
    return [c.step for c in checkpoint.committed(out)]


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_newest_and_the_best_stay(tmp_path):
    losses = [(1, 0.5), (2, 0.1), (3, 0.3), (4, math.nan), (5, 0.1)]
    made = [Checkpoint(step, 8 * step, loss, metrics={"loss": loss}) for step, loss in losses]
    assert save(open_storage(str(tmp_path / "min")), Keep(2, "loss"), *made) == [2, 4, 5]
    assert save(open_storage(str(tmp_path / "max")), Keep(2, "loss", "max"), *made) == [1, 4, 5]
    assert save(open_storage(str(tmp_path / "other")), Keep(1, "psnr"), *made) == [5]
    files = {path.parent.name for path in (tmp_path / "min" / "checkpoints").rglob("*.safetensors")}
    assert files == {"step-00000002", "step-00000004", "step-00000005"}


def test_what_a_killed_writer_left_goes_with_the_next_commit(tmp_path):
    out = open_storage(str(tmp_path))
    out.write("checkpoints/step-00000003/trained.safetensors", b"half")
    assert save(out, Keep(2), Checkpoint(5, 40, 0.1)) == [5]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000005"}


def test_a_record_that_cannot_be_read_is_skipped_with_a_warning(tmp_path, caplog):
    out = open_storage(str(tmp_path))
    save(out, Keep(2), Checkpoint(1, 8, 0.1), Checkpoint(2, 16, 0.1))
    (tmp_path / "checkpoints/step-00000002/checkpoint.json").write_text('{"step": 2, "samp')
    found = checkpoint.read_latest(out)
    assert found is not None
    assert found[0].step == 1
    assert "step-00000002/checkpoint.json is damaged" in caplog.text


def test_s3_that_is_away_delays_the_checkpoint_and_not_the_training(through, bucket, monkeypatch, tmp_path):
    away = threading.Event()
    proxy = through(lambda number: "reset" if away.is_set() else None)
    out = open_storage(f"{bucket}/{tmp_path.name}")
    with Writer(out, Keep(2)) as writer:
        writer.start(Checkpoint(1, 8, 0.1), tensors(1))
        writer.wait()
        away.set()
        writer.start(Checkpoint(2, 16, 0.1), tensors(2))
        until(lambda: proxy.injected["reset"] >= 2)
        assert writer.failure is None  # as long as it is tried again
        away.clear()
        writer.start(Checkpoint(3, 24, 0.1), tensors(3))  # waits for the one before
        writer.wait()
    found = checkpoint.read_latest(out)
    assert found is not None
    assert found[0].step == 3
    assert [c.step for c in checkpoint.committed(out)] == [2, 3]


def test_a_full_disk_is_one_clear_error_nothing_counts_and_space_ends_it(small_disk, monkeypatch):
    out = open_storage(str(small_disk / "out"))
    save(out, Keep(2), Checkpoint(1, 8, 0.1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - (100 << 10)))
    large = tensors(2, 40_000)  # 160 kB a part
    monkeypatch.setenv("DEEDSR_STORAGE_SECONDS", "0.5")
    with Writer(out, Keep(2)) as writer:
        writer.start(Checkpoint(2, 16, 0.1), large)
        with pytest.raises(DeeDSRError, match=r"the checkpoint of step 2 could not be written: .*no space left"):
            writer.wait()
    assert [c.step for c in checkpoint.committed(out)] == [1]
    assert not list((small_disk / "out/checkpoints").glob("step-00000002/*"))
    monkeypatch.delenv("DEEDSR_STORAGE_SECONDS")
    with Writer(out, Keep(2)) as writer:
        writer.start(Checkpoint(2, 16, 0.1), large)
        time.sleep(0.5)
        filler.unlink()
        writer.wait()
    assert [c.step for c in checkpoint.committed(out)] == [1, 2]


def test_a_training_that_fails_does_not_wait_for_a_checkpoint_that_cannot_be_written(small_disk):
    out = open_storage(str(small_disk / "out"))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - (100 << 10)))
    writer = Writer(out, Keep(2))

    def training() -> None:
        with writer:
            writer.start(Checkpoint(2, 16, 0.1), tensors(2, 40_000))
            raise RuntimeError("the training's own")

    with pytest.raises(RuntimeError, match="the training's own"):
        training()
    until(lambda: writer._running.done())
    assert not checkpoint.committed(out)


def test_a_full_disk_is_said_at_once_and_given_up_when_the_run_is_to_end(small_disk):
    out = open_storage(str(small_disk / "out"))
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - (100 << 10)))
    said: list[str] = []
    with Writer(out, Keep(2), say=said.append) as writer:
        assert not writer.give_up()  # nothing failed
        writer.start(Checkpoint(2, 16, 0.1), tensors(2, 40_000))
        until(lambda: said)
        assert "checkpoint of step 2" in said[0]
        assert "no space left" in said[0]
        assert writer.busy(0.1)
        assert writer.give_up()
        until(lambda: not writer.busy(0.1))
        assert "no space left" in str(writer.failure)
        with pytest.raises(DeeDSRError, match="the checkpoint of step 2 could not be written"):
            writer.wait()


def test_a_right_that_comes_back_ends_the_wait_for_it(small_disk):
    out = open_storage(str(small_disk / "out"))
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", small_disk], check=True)
    remount("ro")
    said: list[str] = []
    with Writer(out, Keep(2), say=said.append) as writer:
        writer.start(Checkpoint(2, 16, 0.1), tensors(2))
        until(lambda: said)
        remount("rw")
        writer.wait()
    assert "read-only" in said[0]
    assert [c.step for c in checkpoint.committed(out)] == [2]
