"""Claims on `deedsr inspect`: what its page says of a real dataset, and that nothing in a dataset can take it over."""

import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from browser import Loads
from source_files import rewritten, run

from deedsr.dataset.manifest import MANIFEST, REJECTED, SAMPLES, kept_copy
from deedsr.dataset.recipe import Recipe, load_recipe
from deedsr.errors import DatasetNotCommitted, DeeDSRError, UsageError
from jobs import cli
from pipelines.data.dataset import Dataset
from pipelines.data.index import left_out
from pipelines.reports.inspection import inspect
from pipelines.storage import open_storage, publish

SCRIPT = "<script>document.title='taken'<img src=x onerror=alert(1)>.jpg"
NOT_UTF8 = "caf\udce9.jpg"  # the byte 0xe9


@pytest.fixture(scope="module")
def page(small_dataset, tmp_path_factory) -> Path:
    return Path(inspect(small_dataset, tmp_path_factory.mktemp("page") / "p.html", samples=6, progress=False).page)


@pytest.fixture(scope="module")
def hostile(photos, small_recipe, tmp_path_factory) -> Path:
    """A dataset of photographs with hostile names, some of which are no pictures; the recipe's name is hostile too."""
    folder = tmp_path_factory.mktemp("hostile")
    sources = folder / "photos"
    sources.mkdir()
    shutil.copyfile(photos / "train" / "Bamboo.jpg", sources / SCRIPT)
    shutil.copyfile(photos / "train" / "Wine.jpg", sources / "plain.jpg")
    shutil.copyfile(photos / "train" / "Wine.jpg", sources / NOT_UTF8)
    for number in range(6):
        (sources / f"&<b>{number}.jpg").write_bytes(b"no picture")
    (sources / "empty.png").write_bytes(b"")
    fields = small_recipe.model_dump(mode="json") | {"name": "<i>small", "max_rejected_share": 0.9}
    run([sources], folder / "shards", Recipe.model_validate(fields))
    return folder / "shards"


def text_of(page: Path) -> str:
    return " ".join(" ".join(Loads(page.read_text()).shown).split())


def cards(page: Path) -> list[str]:
    return page.read_text().split('<article class="card pair')[1:]


# What the page says


def test_the_heading_counts_what_the_manifest_holds(page, small_dataset):
    manifest = Dataset.open(small_dataset).manifest
    text = text_of(page)
    for expected in (
        "small",
        manifest.digest,
        "Samples 136",
        "Train 88",
        "Validation 48",
        f"Shards {len(manifest.shards)}",
        f"Stored {sum(shard.bytes for shard in manifest.shards) / 1e6:.3g} MB",
        "17 sources given = 17 used + 0 rejected",
    ):
        assert expected in text


def test_every_shown_pair_is_there_with_its_pictures_and_its_chain(page, small_dataset):
    dataset = Dataset.open(small_dataset)
    table = dataset.index()
    keys = re.findall(r"<dt>Key</dt><dd><code>(.*?)</code>", page.read_text())
    assert len(keys) == len(set(keys)) == 6
    for key, card in zip(keys, cards(page), strict=True):
        row = table["key"].to_pylist().index(key)
        info = dataset.read(table, row).info
        shown = " ".join(" ".join(Loads(card).shown).split())
        assert info["source"]["path"] in shown
        assert "128×128 at {1}, {0}".format(*info["crop"]) in shown
        assert ("mirrored" in shown) == info["flip"]
        assert table["split"][row].as_py() in shown
        steps = [step["step"].rstrip("0123456789") for step in info["degradation"]["steps"]]
        assert [name.lower() for name in re.findall(r"<li><b>(.*?)</b>", card)] == steps
        for step in info["degradation"]["steps"]:
            if "quality" in step:
                assert f"quality {step['quality']}" in shown
            if step.get("sigma_y", 0) != step.get("sigma_x", 0):
                assert f"at {math.degrees(step['theta']):.0f}°" in shown
            if "factor" in step:
                assert f"×{step['factor']:.2f}" in shown
        assert len([src for src in Loads(card).loads if src.startswith("data:image/webp")]) == 2


def test_every_parameter_of_the_index_has_its_histogram(page, small_dataset):
    html = page.read_text()
    columns = [name for name in Dataset.open(small_dataset).index().column_names if name.startswith("deg_")]
    assert html.count('<figure class="histogram">') == len(columns)
    # Each number that was drawn is in one bin or behind one name.
    factors = html.split("<h3>First resize</h3>")[1].split("<h3>")[0]
    table = Dataset.open(small_dataset).index()
    drawn = table.num_rows - table["deg_resize1_factor"].null_count
    assert sum(int(count) for count in re.findall(r": (\d+)</title>", factors)) == drawn
    assert "recipe 0.3 to 1.5" in factors
    assert factors.count('class="limit"') == 2
    assert "beyond the recipe" not in text_of(page)


def test_a_wrong_distribution_is_told(small_dataset, tmp_path):
    def widen(table: pa.Table) -> pa.Table:
        number = table.column_names.index("deg_jpeg1_quality")
        values = [20.0] * 7 + table["deg_jpeg1_quality"].to_pylist()[7:]
        table = table.set_column(number, "deg_jpeg1_quality", pa.array(values, pa.float64()))
        modes = pa.array([math.nan] * 40 + [9.0] * (table.num_rows - 40), pa.float64())
        return table.set_column(table.column_names.index("deg_resize1_mode"), "deg_resize1_mode", modes)

    wrong = rewritten(small_dataset, tmp_path / "wrong", widen)
    html = Path(inspect(str(wrong), tmp_path / "p.html", 1, progress=False).page).read_text()
    jpeg = html.split("<h3>First JPEG</h3>")[1].split("<h3>")[0]
    assert "7 beyond the recipe" in jpeg
    assert [int(count) for count in re.findall(r'<rect class="beyond".*?: (\d+)</title>', jpeg)] == [7]
    resize = html.split("<h3>First resize</h3>")[1].split("<h3>")[0]
    assert "96 beyond the recipe" in resize
    assert "<span>unknown</span>" in resize
    assert "not drawn in 29.4 %" in resize  # 40 of 136, by NaN instead of null


def replaced(table: pa.Table, name: str, values: list, kind: pa.DataType) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, pa.array(values, kind))


def test_strata_and_groups_have_their_shares_beside_those_of_the_recipe(small_dataset, tmp_path):
    def add(table: pa.Table) -> pa.Table:
        table = replaced(table, "stratum", ["mild"] * 100 + ["<hard>"] * 34 + [None] * 2, pa.string())
        return replaced(table, "degradation_group", [0, 1] * 67 + [None] * 2, pa.int32())

    shares = {"mild": ("light", 0.75), "<hard>": ("deedsr", 0.2), "never": ("heavy", 0.05)}
    strata = {
        name: {"share": share, "degradation": load_recipe(recipe).degradation.model_dump(mode="json")}
        for name, (recipe, share) in shares.items()
    }
    mixed = rewritten(small_dataset, tmp_path / "mixed", add, {"strata": strata})
    page = Path(inspect(str(mixed), tmp_path / "p.html", samples=9, progress=False).page)
    text = text_of(page)
    for expected in ("mild 100 73.5 % 75.0 %", "<hard> 34 25.0 % 20.0 %", "never 0 0 % 5.0 %", "none 2 1.5 % –"):
        assert expected in text
    assert "134 samples in 2 groups of 67 to 67" in text
    shown = [re.findall(r"<span>(mild|&lt;hard&gt;)</span>", card) for card in cards(page)]
    assert sorted(len(found) for found in shown) == [0, 0] + [1] * 7  # two of no stratum: all there are
    assert 3 <= sum(found == ["&lt;hard&gt;"] for found in shown) <= 4
    widest = [load_recipe(name).degradation.jpeg1_quality for name, _ in shares.values()]
    assert f"recipe {min(low for low, _ in widest)} to {max(high for _, high in widest)}" in text


def test_columns_without_a_value_mean_no_strata_and_no_groups(small_dataset, tmp_path):
    text = text_of(Path(inspect(str(small_dataset), tmp_path / "p.html", 2, progress=False).page))
    assert "Severity" in text
    assert "Strata" not in text
    assert "Degradation groups" not in text
    assert "recipe 0.3 to 1.5" in text


def test_what_was_left_out_is_counted_by_reason_with_sources(hostile, tmp_path):
    result = inspect(str(hostile), tmp_path / "p.html", samples=4, progress=False)
    assert (result.samples, result.shown, result.rejected) == (16, 4, 8)
    text = text_of(tmp_path / "p.html")
    assert "10 sources given = 2 used + 8 rejected" in text
    assert "not a JPEG, PNG, WebP or TIFF image 6 75.0 %" in text
    assert "empty file 1 12.5 % empty.png" in text
    examples = (tmp_path / "p.html").read_text().split("TIFF image")[1].split("</tr>")[0]
    assert examples.count("<bdi>") == 4  # a few, however many there are


def test_nothing_left_out_reads_as_none(small_dataset, tmp_path):
    quiet = tmp_path / "quiet"
    shutil.copytree(small_dataset, quiet)
    manifest = json.loads((quiet / MANIFEST).read_bytes())
    manifest["files"][REJECTED] = hashlib.sha256(b"").hexdigest()
    (quiet / MANIFEST).write_text(json.dumps(manifest))
    (quiet / REJECTED).write_bytes(b"")
    text = text_of(Path(inspect(str(quiet), tmp_path / "p.html", 1, progress=False).page))
    assert "Rejected sources None. Crops left out None." in text


# Hostile names


def test_names_from_data_are_shown_and_never_run(hostile, tmp_path):
    page = Path(inspect(str(hostile), tmp_path / "p.html", samples=16, progress=False).page)
    html, text = page.read_text(encoding="utf-8"), text_of(page)
    assert SCRIPT in text
    assert "&<b>0.jpg" in text or "&<b>1.jpg" in text
    assert "<i>small" in text
    assert "caf\\udce9.jpg" in text
    assert html.count("<script") == 1  # the page's own
    for tag in ("<img src=x", "<b>0", "<i>small"):
        assert tag not in html


def test_hostile_names_do_nothing_in_a_browser(browser, hostile, tmp_path):
    page = Path(inspect(str(hostile), tmp_path / "p.html", samples=4, progress=False).page)
    browser.open_and_check(page, 390)
    assert browser.run("document.title").startswith("<i>small")
    assert browser.run("document.scripts.length") == 1


# Large and remote datasets


def test_pairs_are_chosen_by_the_seed_and_spread_over_the_dataset(small_dataset, tmp_path):
    def rows(seed: int) -> list[int]:
        page = Path(inspect(small_dataset, tmp_path / "p.html", 8, seed, progress=False).page)
        keys = re.findall(r"<dt>Key</dt><dd><code>(.*?)</code>", page.read_text())
        return [Dataset.open(small_dataset).index()["key"].to_pylist().index(key) for key in keys]

    first = rows(3)
    assert rows(3) == first
    assert rows(4) != first
    assert [row // 17 for row in first] == list(range(8))  # one of each eighth of the 136 rows


def test_a_remote_dataset_gives_the_same_page_and_only_what_is_shown_is_read(
    bucket, small_dataset, tmp_path, monkeypatch
):
    uri = f"{bucket}/{tmp_path.name}"
    publish(Path(small_dataset), uri)
    read: list[tuple[str, int]] = []
    storage = type(open_storage(uri))
    ranged, whole = storage.read_range, storage.read
    monkeypatch.setattr("pipelines.reports.inspection.MEASURED", 1)
    monkeypatch.setattr(storage, "read_range", lambda s, p, o, n: read.append((p, n)) or ranged(s, p, o, n))
    monkeypatch.setattr(storage, "read", lambda s, p: read.append((p, -1)) or whole(s, p))
    remote = Path(inspect(uri, tmp_path / "remote.html", 2, progress=False).page)
    local = Path(inspect(small_dataset, tmp_path / "local.html", 2, progress=False).page)
    assert remote.read_text().replace(uri, small_dataset) == local.read_text()
    assert [path for path, size in read if size < 0] == [MANIFEST]
    shards = [(path, size) for path, size in read if path.endswith(".tar")]
    assert 2 <= len(shards) <= 3
    index = Dataset.open(uri).index()
    sizes = {sum(index[f"{name}_size"][row].as_py() for name in ("hr", "lr", "json")) for row in range(len(index))}
    assert all(size <= max(sizes) + 3 * 1024 for _, size in shards)  # the members and the tar headers between them


@pytest.mark.parametrize("wanted", [100, 137])
def test_no_pair_is_chosen_twice_so_that_the_page_has_as_many_as_it_says(small_dataset, tmp_path, wanted):
    """Stretches of 1.36 rows: one that begins inside a row took the row that the one before had taken."""
    result = inspect(small_dataset, tmp_path / "p.html", wanted, progress=False)
    assert result.shown == len(cards(tmp_path / "p.html")) == min(wanted, 136)


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_a_page_is_written_to_any_location(request, small_dataset, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    folder = f"{request.getfixturevalue('bucket')}/{tmp_path.name}" if kind == "s3" else (tmp_path / "a").as_uri()
    assert cli.main(["inspect", small_dataset, "--samples", "1", "--out", f"{folder}/p.html", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["page"] == f"{folder}/p.html"
    assert open_storage(folder).read("p.html").startswith(b"<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ([] if kind == "s3" else ["a"])


# Damage and mistakes


def test_without_a_manifest_it_is_exit_1_and_nothing_is_written(capsys, tmp_path):
    assert cli.main(["inspect", str(tmp_path), "--out", str(tmp_path / "p.html")]) == DatasetNotCommitted.exit_code == 1
    assert "has no manifest.json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_bucket_and_a_page_without_a_place_are_exit_2(capsys, s3_server, small_dataset, tmp_path):
    assert cli.main(["inspect", "s3://no-such-bucket/shards"]) == 2
    assert "no-such-bucket" in capsys.readouterr().err
    for out, said in {
        "s3://no-such-bucket/p.html": "no bucket 'no-such-bucket'",
        "gs://b/p.html": "not gs://",
        f"{tmp_path}/": "names no file: write a file's location",
        "s3://bucket": "names no file",
    }.items():
        assert cli.main(["inspect", small_dataset, "--out", out]) == UsageError.exit_code
        assert said in capsys.readouterr().err
    assert cli.main(["inspect", small_dataset, "--samples", "0"]) == 2
    assert "--samples takes a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SAMPLES, lambda data: data[:-9]),
        (REJECTED, lambda data: data.splitlines(keepends=True)[0]),
        (REJECTED, lambda data: b"{}\n" + data),
    ],
    ids=["index-cut", "list-cut", "line-without-content"],
)
def test_a_damaged_kept_copy_is_refused(hostile, tmp_path, name, damage):
    broken = tmp_path / "broken"
    shutil.copytree(hostile, broken)
    kept = broken / kept_copy(name, json.loads((broken / MANIFEST).read_bytes())["files"][name])
    kept.write_bytes(damage(kept.read_bytes()))
    with pytest.raises(DeeDSRError, match=f"{name} is missing or altered"):
        inspect(str(broken), tmp_path / "p.html", 1, progress=False)
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("name", [SAMPLES, REJECTED])
def test_a_plain_file_of_another_manifest_is_refused(hostile, small_dataset, tmp_path, name):
    mixed = tmp_path / "mixed"
    shutil.copytree(hostile, mixed)
    shutil.rmtree(mixed / "_state")
    if name == SAMPLES:  # readable, of as many rows, and not what the manifest says
        table = pyarrow.parquet.read_table(mixed / SAMPLES)
        pyarrow.parquet.write_table(table.take(list(range(len(table)))[::-1]), mixed / SAMPLES)
    else:
        shutil.copyfile(Path(small_dataset) / REJECTED, mixed / REJECTED)
    with pytest.raises(DeeDSRError, match=f"{name} is missing or altered"):
        inspect(str(mixed), tmp_path / "p.html", 1, progress=False)


def test_the_plain_file_serves_where_the_kept_copy_is_gone(hostile, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(hostile, bare)
    shutil.rmtree(bare / "_state")
    assert inspect(str(bare), tmp_path / "p.html", 1, progress=False).shown == 1
    assert sum(line.kind == "source" for line in left_out(Dataset.open(str(bare)))) == 8


def test_the_command_says_where_the_page_is(capsys, small_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", small_dataset, "--samples", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "page": "inspection.html",
        "samples": 136,
        "shown": 3,
        "rejected": 0,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["inspection.html"]


# In a browser


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_and_nothing_is_requested(browser, page, width):
    browser.open_and_check(page, width)


def test_a_pair_is_compared_by_arrow_keys_with_the_lr_pixels_as_they_are(browser, page):
    browser.open(page, 1280)
    browser.run("document.querySelector('#pair-2 .stage input').focus()")
    for _ in range(10):
        browser.key("ArrowRight")
    assert browser.run("document.querySelector('#pair-2 .stage').style.getPropertyValue('--at')") == "60%"
    before = "document.querySelector('#pair-2 img.before')"
    assert browser.run(f"{before}.src == document.querySelector('#pair-2 [data-label=LR]').src")
    assert browser.run(f"getComputedStyle({before}).imageRendering") == "pixelated"
    assert browser.run(f"{before}.naturalWidth") == 32
