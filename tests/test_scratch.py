"""Claims on what processes leave on a machine: temporary folders of killed ones, and downloads that are kept."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deedsr.errors import UsageError
from pipelines.storage.lock import scratch_folder
from pipelines.storage.transfer import kept

SHARD = """
from pipelines.shards.build import shard_draft
from pipelines.shards.plan import ShardPlan
with shard_draft(ShardPlan(0, "train", "000", "id")):
    print("begun", flush=True)
    input()
"""
KEPT = """
import sys
from pipelines.storage.transfer import kept
for name in sys.argv[1:]:
    kept(name * 64, lambda folder: (folder / "weights").write_bytes(bytes(1000)))
print("kept", flush=True)
input()
"""


@pytest.fixture
def process(tmp_path, monkeypatch):
    """A function that starts a program, which then waits; temporary folder and cache of all of them are this test's."""
    begun: list[subprocess.Popen] = []
    for variable, name in {"TMPDIR": "tmp", "XDG_CACHE_HOME": "cache"}.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))

    def start(program: str, *words: str) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        begun.append(subprocess.Popen([sys.executable, "-c", program, *words], **pipes))
        assert begun[-1].stdout.readline()
        return begun[-1]

    yield start
    for one in begun:
        one.kill()
        one.communicate()


def test_the_tar_of_a_killed_worker_goes_with_the_next_one_and_that_of_a_living_one_stays(process, tmp_path):
    tars = lambda: sorted((tmp_path / "tmp").rglob("*.tar"))
    killed = process(SHARD)
    living = process(SHARD)
    assert len(tars()) == 2
    killed.kill()
    killed.wait()
    assert len(tars()) == 2
    with scratch_folder() as mine:
        assert len(tars()) == 1
        assert mine.is_dir()
    assert len(tars()) == 1
    living.communicate("\n")
    assert list((tmp_path / "tmp").iterdir()) == []


def names(folder: Path) -> set[str]:
    return {path.name[0] for path in folder.iterdir() if path.is_dir() and len(path.name) == 64}


def over(process: Callable[..., subprocess.Popen], *words: str) -> None:
    process(KEPT, *words).communicate("\n")


def test_downloads_that_nobody_uses_make_room_the_oldest_first(process, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "deedsr"
    monkeypatch.setenv("DEEDSR_CACHE_GB", str(3500 / 1e9))
    living = process(KEPT, "a")
    over(process, "b", "c")
    over(process, "b")  # used again: now c is the oldest that nobody uses
    over(process, "d")
    assert names(cache) == {"a", "b", "d"}
    living.kill()
    living.wait()
    over(process, "e")
    assert names(cache) == {"b", "d", "e"}
    assert {path.name[0] for path in cache.iterdir()} == {"b", "d", "e"}  # nothing else stays of what went


def test_what_this_process_uses_stays_whatever_the_limit_and_a_limit_that_is_none_is_refused(process, monkeypatch):
    monkeypatch.setenv("DEEDSR_CACHE_GB", "0")
    fill = lambda folder: (folder / "weights").write_bytes(bytes(1000))
    folders = [kept(name * 64, fill) for name in "ab"]
    assert all((folder / "weights").is_file() for folder in folders)
    monkeypatch.setenv("DEEDSR_CACHE_GB", "much")
    with pytest.raises(UsageError, match="DEEDSR_CACHE_GB must be a number of 1e9 bytes, 0 or more, got 'much'"):
        kept("c" * 64, fill)
