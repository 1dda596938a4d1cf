"""Claims on shards whose pieces are made on several CPUs at a time: the same bytes, all CPUs, one source's death."""

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from source_files import made, run

from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.errors import DeeDSRError, UsageError
from pipelines.data.dataset import Dataset
from pipelines.shards import generate, hr_job, run_job
from pipelines.shards.build import FromSources, _cuts
from pipelines.shards.execute import _shares, in_order
from pipelines.shards.generate import Job
from pipelines.shards.listing import list_sources
from pipelines.shards.plan import plan_shards
from pipelines.shards.samples import samples_of
from pipelines.shards.shard import Inventory, read_record
from pipelines.shards.source import Source
from pipelines.storage import open_storage

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def one_shard(small_recipe) -> Recipe:
    """Every source in the same shard."""
    fields = small_recipe.model_dump(mode="json") | {
        "shard": {"min_sources": 99, "target_sources": 99, "max_sources": 99},
        "split": {"validation_patterns": ["nothing"], "validation_share": 0},
    }
    return Recipe.model_validate(fields | {"max_rejected_share": 0.9})


@pytest.fixture(scope="module")
def mixed(photos, tmp_path_factory) -> Path:
    """Photographs as files and in a table, some of which give less than all samples, or none."""
    import pyarrow as pa
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("mixed")
    found = sorted((photos / "validation").glob("*.jpg"))
    for path in found[:3]:
        shutil.copy(path, folder)
    data = found[0].read_bytes()
    (folder / "cut-off.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    table = pa.table({"image": [path.read_bytes() for path in found[3:5]] + [None, data[:1000]]})
    pyarrow.parquet.write_table(table, folder / "table.parquet")
    return folder


def contents(out: Path | str) -> dict[str, bytes]:
    """All but what it knows of datasets that other tests made of it."""
    files = {str(path.relative_to(out)): path for path in Path(out).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("_state/derived/")}


def test_one_shard_has_the_same_bytes_for_any_number_of_workers(mixed, one_shard, tmp_path):
    alone = run([mixed], tmp_path / "1", one_shard)
    assert (alone.shards, alone.samples, alone.rejected) == (1, 40, 4)
    for workers in (2, 4):
        spread = generate([str(mixed)], str(tmp_path / str(workers)), one_shard, workers, progress=False)
        assert spread.digest == alone.digest
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")  # index and rejects in the same order too


def test_a_few_shards_have_the_same_digest_for_more_workers(photos, small_recipe, small_dataset, tmp_path):
    result = generate([str(photos)], str(tmp_path / "out"), small_recipe, 16, progress=False)
    assert result.shards < 16
    assert result.digest == Dataset.open(small_dataset).digest
    assert contents(tmp_path / "out") == contents(small_dataset)


def test_new_degradations_of_one_shard_have_the_same_bytes_for_any_number_of_workers(mixed, one_shard, tmp_path):
    run([mixed], tmp_path / "hr", one_shard)
    heavy = Recipe.model_validate(load_recipe("heavy").model_dump(mode="json") | {"variants": 3})
    made(hr_job(str(tmp_path / "hr"), str(tmp_path / "lr1"), heavy))
    for workers in (2, 4):
        run_job(hr_job(str(tmp_path / "hr"), str(tmp_path / f"lr{workers}"), heavy), workers, progress=False)
        assert contents(tmp_path / f"lr{workers}") == contents(tmp_path / "lr1")


@pytest.mark.parametrize("hr", ["webp", "jpeg"])
def test_one_photograph_is_made_in_pieces_with_the_same_bytes(photos, one_shard, tmp_path, hr):
    shutil.copy(photos / "validation" / "Picture_0B.jpg", tmp_path)
    fields = one_shard.model_dump(mode="json")
    recipe = Recipe.model_validate(fields | {"variants": 5, "formats": {"hr": hr, "hr_quality": 90, "lr": "png"}})
    [plan] = plan_shards(list_sources([str(tmp_path)]), recipe)
    records = {cpus: FromSources(recipe).build(plan, open_storage(tmp_path / str(cpus)), cpus) for cpus in (1, 2, 4)}
    assert records[1].samples == 10
    for cpus in (2, 4):  # 4 pieces are cut between the variants of a crop
        assert contents(tmp_path / str(cpus)) == contents(tmp_path / "1")


def meeting(source, data, lr_data, recipe, share, folder, count=2):
    """Samples as always, once so many processes are at it at the same time."""
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 50 * count
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline, "alone"
        time.sleep(0.01)
    return samples_of(source, data, lr_data, recipe, share)


@pytest.mark.parametrize("count", [1, 2])
def test_a_shard_of_few_sources_is_made_by_several_processes_at_a_time(photos, one_shard, tmp_path, count):
    """One by one, the first would wait in vain for the second."""
    folder = tmp_path / "photos"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    for path in sorted((photos / "validation").glob("*.jpg"))[:count]:
        shutil.copy(path, folder)
    plans = lambda: plan_shards(list_sources([str(folder)]), one_shard)
    work = FromSources(one_shard, partial(meeting, folder=tmp_path / "here"))
    result = run_job(Job(plans, work, open_storage(tmp_path / "out"), one_shard), 2, False)
    assert (result.shards, result.samples) == (1, count * 8)


@pytest.mark.soak
def test_three_shards_keep_sixteen_cpus_busy(photos, one_shard, tmp_path):
    """On a cluster of its own, of 16 CPUs, in a process of its own."""
    (tmp_path / "here").mkdir()
    (tmp_path / "photos").mkdir()
    for number, path in enumerate(sorted((photos / "validation").glob("*.jpg"))[:6] * 3):
        shutil.copy(path, tmp_path / "photos" / f"{number}.jpg")
    six = {"min_sources": 6, "target_sources": 6, "max_sources": 6}
    recipe = Recipe.model_validate(one_shard.model_dump(mode="json") | {"shard": six})
    script = f"import test_pieces; test_pieces.sixteen({str(tmp_path)!r}, {recipe.model_dump_json()!r})"
    environment = {**os.environ, "DEEDSR_CPUS": "16", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards, samples = map(int, (tmp_path / "made").read_text().split())
    assert (shards, samples) == (3, 18 * 8)
    assert len(list((tmp_path / "here").iterdir())) == 16


def sixteen(folder: str, recipe_json: str) -> None:
    recipe, place = Recipe.model_validate_json(recipe_json), Path(folder)
    plans = lambda: plan_shards(list_sources([str(place / "photos")]), recipe)
    work = FromSources(recipe, partial(meeting, folder=place / "here", count=16))
    result = run_job(Job(plans, work, open_storage(place / "out"), recipe), None, False)
    (place / "made").write_text(f"{result.shards} {result.samples}")


def deadly(source, data, lr_data, recipe, share, kills, times):
    """Samples as always, but so many times the last ones of a picture kill whoever makes them."""
    if "deadly" in source.path and share.number == share.of - 1 and len(list(kills.iterdir())) < times:
        (kills / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return samples_of(source, data, lr_data, recipe, share)


@pytest.mark.parametrize(
    ("others", "times"),
    [(3, 99), pytest.param(0, 99, marks=pytest.mark.soak), pytest.param(0, 2, marks=pytest.mark.soak)],
)
def test_only_a_source_that_kills_every_worker_is_left_out(photos, one_shard, tmp_path, others, times):
    """By itself in pieces, or one of several; dying twice is what being killed from outside looks like."""
    (tmp_path / "kills").mkdir()
    (tmp_path / "photos").mkdir()
    found = sorted((photos / "validation").glob("*.jpg"))
    for path in found[:others]:
        shutil.copy(path, tmp_path / "photos")
    shutil.copy(found[3], tmp_path / "photos" / "deadly.jpg")
    plans = lambda: plan_shards(list_sources([str(tmp_path / "photos")]), one_shard)
    work = FromSources(one_shard, partial(deadly, kills=tmp_path / "kills", times=times))
    if others or times == 2:
        result = run_job(Job(plans, work, open_storage(tmp_path / "out"), one_shard), 2, False)
        assert result.samples == 8 * (others + (times == 2))
    else:
        with pytest.raises(DeeDSRError, match="1 of 1 sources were rejected"):
            run_job(Job(plans, work, open_storage(tmp_path / "out"), one_shard), 2, False)
    out, [plan] = open_storage(tmp_path / "out"), plans()
    record = read_record(Inventory.of(out).record(plan), out)
    rejected = [(row["source"], row["reason"]) for row in record.rejected if row["kind"] == "source"]
    assert rejected == [("deadly.jpg", "kills its worker")] * (times > 2)
    assert dict(record.sources)["deadly.jpg"]


def test_pieces_wait_for_no_more_than_a_few_of_the_first(tmp_path):
    taken = []
    pieces = (taken.append(number) or (number, tmp_path) for number in range(20))
    results = in_order(last_of_three, pieces, 2)
    assert next(results) == 0
    assert 4 <= len(taken) <= 5  # the first, as many as may be finished before it, and one since it was given
    assert list(results) == list(range(1, 20))


def last_of_three(piece):
    """The first one ends after three others."""
    number, folder = piece
    deadline = time.monotonic() + 100
    while number == 0 and len(list(folder.iterdir())) < 3:
        assert time.monotonic() < deadline, "alone"
        time.sleep(0.01)
    (folder / str(number)).touch()
    return number


def test_an_error_of_a_piece_is_raised_as_it_is():
    with pytest.raises(UsageError, match="^number 2 is wrong$"):
        list(in_order(refuse_two, range(5), 2))


def test_a_piece_that_cannot_be_read_is_an_error():
    def pieces():
        yield from (3, 4, 5, 6, 7)
        raise UsageError("that one cannot be read")

    with pytest.raises(UsageError, match="^that one cannot be read$"):
        list(in_order(refuse_two, pieces(), 2))


def refuse_two(number):
    if number == 2:
        raise UsageError("number 2 is wrong")
    return number


def test_cpus_are_all_given_and_most_to_the_largest_shards():
    assert _shares([3, 3, 3], 16) == [6, 5, 5]
    assert _shares([4, 64, 16], 16) == [1, 12, 3]
    assert _shares([5, 1], 2) == [1, 1]
    for sizes, cpus in ([(7, 9, 30), 3], [(1, 1), 64], [(40,), 5]):
        shares = _shares(list(sizes), cpus)
        assert sum(shares) == cpus
        assert min(shares) >= 1


def test_the_last_sources_are_made_in_pieces_so_that_they_occupy_all_cpus(small_recipe):
    recipe = small_recipe.model_copy(update={"variants": 8})  # 16 samples of a source
    sources = [Source(0, f"{number}.jpg", "", 1, "1") for number in range(40)]
    cuts = lambda count, cpus: _cuts(tuple(sources[:count]), recipe, cpus)
    assert cuts(7, 1) == [1] * 7
    assert cuts(32, 16) == [1] * 32
    assert cuts(3, 2) == [1, 1, 2]
    assert cuts(4, 16) == [4] * 4
    assert cuts(1, 16) == [16]
    assert cuts(1, 64) == [16]  # no more than it has samples
    assert cuts(15, 16) == [1] * 15  # to decode all of them again would take longer than a CPU is idle
