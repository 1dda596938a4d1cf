"""Claims on what a `--source` holds: folders, lists, tars and Parquet tables, each with its accidents."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from source_files import changed, listed, problems, put, rejected, run, table_of, tar_of

from deedsr.errors import UsageError
from pipelines.data.dataset import Dataset
from pipelines.reports.inspection import inspect
from pipelines.shards import generate, verify
from pipelines.shards.listing import list_sources
from pipelines.shards.source import Source, list_tar, read_source
from pipelines.storage import open_storage

# Each kind gives the same bytes


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_every_kind_of_source_gives_its_pictures_in_order(place, pictures):
    names, data = list(pictures), list(pictures.values())
    put({f"folder/{name}": content for name, content in pictures.items()}, place)
    put({"shards/000.tar": tar_of(dict(list(pictures.items())[:5]))}, place)
    put({"shards/001.tar": tar_of(dict(list(pictures.items())[5:]))}, place)
    put({"bytes.parquet": table_of({"key": names, "jpg": data}, row_group_size=3)}, place)
    structs = [{"bytes": content, "path": name} for name, content in pictures.items()]
    put({"hf.parquet": table_of({"image": structs, "label": list(range(8))}, row_group_size=5)}, place)
    put({"uris.parquet": table_of({"url": [f"folder/{name}" for name in names]})}, place)
    put({"list.txt": "\n".join(["shards/001.tar", "shards/000.tar"]).encode()}, place)
    for source, paths in {
        "folder": names,
        "folder/*.*": names,
        "shards": [f"00{i // 5}.tar/{name}" for i, name in enumerate(names)],
        "shards/*.tar": [f"00{i // 5}.tar/{name}" for i, name in enumerate(names)],
        "shards/{000..001}.tar": [f"00{i // 5}.tar/{name}" for i, name in enumerate(names)],
        "shards/00[0]*.tar": [f"000.tar/{name}" for name in names[:5]],
        "list.txt": [f"shards/00{i // 5}.tar/{name}" for i, name in enumerate(names)],
        "bytes.parquet": [f"bytes.parquet/{i:010d}" for i in range(8)],
        "hf.parquet": [f"hf.parquet/{i:010d}" for i in range(8)],
        "uris.parquet": [f"uris.parquet/{i:010d}{Path(name).suffix}" for i, name in enumerate(names)],
    }.items():
        sources = listed(f"{place}/{source}")
        assert [s.path for s in sources] == paths, source
        assert [read_source(s)[0] for s in sources] == data[: len(paths)], source


def test_rows_come_back_right_in_any_order_and_when_the_table_was_replaced(tmp_path, pictures):
    data = list(pictures.values()) * 10
    put({"x.parquet": table_of({"image": data}, row_group_size=37)}, tmp_path)
    sources = listed(tmp_path / "x.parquet")
    for row in np.random.default_rng(0).permutation(80):
        assert read_source(sources[row])[0] == data[row]
    put({"x.parquet": table_of({"image": data[::-1][:70]})}, tmp_path)
    assert [read_source(s)[0] for s in listed(tmp_path / "x.parquet")] == data[::-1][:70]


def test_rows_in_order_read_a_table_once(tmp_path, monkeypatch):
    pixels = [np.random.default_rng(row).bytes(100_000) for row in range(100)]
    put({"x.parquet": table_of({"image": pixels}, row_group_size=20)}, tmp_path)
    sources = listed(tmp_path / "x.parquet")
    amounts: list[int] = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            amounts.append(super().readinto(buffer))
            return amounts[-1]

    storage = type(open_storage(tmp_path))
    monkeypatch.setattr(storage, "open", lambda self, path: io.BufferedReader(Counting(self.local_path(path))))
    assert [read_source(s)[0] for s in sources[:50]] == pixels[:50]
    assert sum(amounts) < 8e6  # of 10 MB: three of five row groups, and the footer


# Folders


def test_a_folder_lists_what_looks_like_a_picture_and_nothing_hidden(tmp_path, pictures):
    jpeg = next(data for name, data in pictures.items() if name.endswith(".jpg"))
    shown = ["a.GIF", "b/c.heic", "b/d.JPG", "e.cr2", "f.psd"]
    ignored = ["Thumbs.db", ".DS_Store", "._d.jpg", ".cache/e.jpg", "notes.txt", "info.json", "read.me", "x.jpg.part"]
    put(dict.fromkeys(shown + ignored, jpeg), tmp_path)
    put({"old.tar.gz": b"", "old.tgz": b""}, tmp_path)
    sources = listed(tmp_path)
    assert [s.path for s in sources] == sorted([*shown, "old.tar.gz", "old.tgz"])
    assert problems(sources) == dict.fromkeys(["old.tar.gz", "old.tgz"], "compressed tar file: it must be unpacked")


def test_what_is_given_is_used_or_rejected_with_a_reason(tmp_path, pictures, one_crop_recipe):
    folder = tmp_path / "folder"
    put(pictures | {"anim.gif": b"GIF89a...", "photo.heic": b"\0\0\0\x18ftypheic"}, folder)
    put({"cut.tar": tar_of(pictures)[: -10_000 - 30_000], "none.tar": b"", "none.parquet": b"PAR1"}, folder)
    put({"rows.parquet": table_of({"image": [*pictures.values(), None, b"", b"no picture"]})}, folder)
    result = run([folder], tmp_path / "out", one_crop_recipe)
    manifest = Dataset.open(str(tmp_path / "out")).manifest
    assert manifest.given == manifest.used + manifest.rejected == len(listed(folder))
    assert (result.rejected, result.samples) == (8, manifest.used)
    assert rejected(tmp_path / "out") == {
        "anim.gif": "not a JPEG, PNG, WebP or TIFF image",
        "photo.heic": "not a JPEG, PNG, WebP or TIFF image",
        "cut.tar": "not a whole tar file",
        "none.tar": "not a whole tar file",
        "none.parquet": "not a whole Parquet file",
        "rows.parquet/0000000008": "no image in this row",
        "rows.parquet/0000000009": "empty file",
        "rows.parquet/0000000010": "not a JPEG, PNG, WebP or TIFF image",
    }
    assert verify(str(tmp_path / "out"), progress=False).ok


def test_patterns_of_a_recipe_that_match_no_source_are_named(tmp_path, pictures, one_crop_recipe, caplog):
    put(dict(list(pictures.items())[:2]), tmp_path / "photos")
    name = next(iter(pictures))
    split = {"validation_patterns": ["vlaidation/*"], "validation_share": 0}
    weights = [{"pattern": name, "variants": 2}, {"pattern": "faces/*", "variants": 8}]
    run([tmp_path / "photos"], tmp_path / "out", changed(one_crop_recipe, split=split, weights=weights))
    said = [record.getMessage() for record in caplog.records]
    assert "recipe small: the pattern 'vlaidation/*' of split.validation_patterns matches no source" in said
    assert [line for line in said if "weights" in line] == [
        "recipe small: the pattern 'faces/*' of weights matches no source"
    ]


# Tars


def container(path) -> Source:
    return Source(0, Path(path).name, str(path), 0, "", container=Path(path).name)


def members(data: bytes, folder: Path) -> dict[str, str]:
    """Problem, or none, of each source of a tar, by its name in it."""
    put({"x.tar": data}, folder)
    return {s.path.removeprefix("x.tar/"): s.problem for s in list_tar(container(folder / "x.tar"))}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_a_tar_are_kept_as_they_are(tmp_path, pictures, format):
    names = ["/etc/a.jpg", "../../b.jpg", "./c.jpg", "d/" * 100 + "long.jpg", "é.jpg", "._d.jpg", ".x/e.jpg", "f.txt"]
    assert list(members(tar_of(dict.fromkeys(names, b"x"), format), tmp_path)) == names[:5]
    assert not any(Path(name).exists() for name in ("/etc/a.jpg", tmp_path / "../../b.jpg"))


def test_links_and_sparse_members_are_no_pictures_and_of_equal_names_the_last_counts(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, type, data in [
            ("a.jpg", tarfile.REGTYPE, b"first"),
            ("link.jpg", tarfile.SYMTYPE, b""),
            ("hard.jpg", tarfile.LNKTYPE, b""),
            ("folder.jpg", tarfile.DIRTYPE, b""),
            ("a.jpg", tarfile.REGTYPE, b"second"),
        ]:
            header = tarfile.TarInfo(name)
            header.type, header.size, header.linkname = type, len(data), "a.jpg"
            tar.addfile(header, io.BytesIO(data))
    put({"x.tar": buffer.getvalue()}, tmp_path)
    first, second = listed(tmp_path)
    assert first.problem == "replaced by a later member of that name"
    assert read_source(second)[0] == b"second"


def test_degradation_shards_as_a_source_give_their_hr(tmp_path):
    names = ["k-00.hr.png", "k-00.lr.png", "k-00.json", "alone.lr.png"]
    assert list(members(tar_of(dict.fromkeys(names, b"x")), tmp_path)) == ["k-00.hr.png", "alone.lr.png"]


def test_a_tar_that_is_not_whole_is_rejected_and_its_whole_members_are_used(tmp_path):
    data = {f"{number}.jpg": bytes([65 + number]) * 3000 for number in range(4)}
    whole = tar_of(data)
    broken = {"x.tar": "not a whole tar file"}
    assert members(whole, tmp_path) == dict.fromkeys(data, "")
    member = 512 + 3072
    assert members(whole[: 2 * member], tmp_path) == broken | {"0.jpg": "", "1.jpg": ""}  # between two members
    assert members(whole[: 2 * member + 300], tmp_path) == broken | {"0.jpg": "", "1.jpg": ""}  # in a header
    assert members(whole[: 2 * member + 1000], tmp_path) == broken | {"0.jpg": "", "1.jpg": ""}  # in a picture
    spoilt = whole[: 2 * member] + b"?" * 512 + whole[2 * member + 512 :]
    assert members(spoilt, tmp_path) == broken | {"0.jpg": "", "1.jpg": ""}
    assert members(whole + whole, tmp_path) == broken | dict.fromkeys(data, "")
    for garbage in (b"", b"x", b"PK\3\4" * 1000, np.random.default_rng(0).bytes(20_000), whole[512:]):
        assert members(garbage, tmp_path) == broken
    assert [s.problem for s in list_tar(container(tmp_path / "none.tar"))] == ["no such file"]


def test_an_empty_tar_is_whole_and_holds_nothing(tmp_path):
    assert members(tar_of({}), tmp_path) == {}
    with pytest.raises(UsageError, match="holds no pictures"):
        listed(tmp_path)


# Parquet


def test_the_column_of_pictures_is_found_by_name_and_type(tmp_path):
    def columns(**columns):
        put({"x.parquet": table_of(columns)}, tmp_path)
        return [(s.path, s.uri) for s in listed(tmp_path / "x.parquet")]

    table = str(tmp_path / "x.parquet")
    assert columns(url=["a.jpg"], image=[b"x"]) == [("x.parquet/0000000000", table)]
    assert columns(image=["not bytes"], PNG=pa.array([b"x"], pa.large_binary())) == [("x.parquet/0000000000", table)]
    assert columns(label=[b"x"], file_name=["s3://b/a.png"]) == [("x.parquet/0000000000.png", "s3://b/a.png")]
    assert columns(path=pa.array(["a.tif"]).dictionary_encode()) == [
        ("x.parquet/0000000000.tif", str(tmp_path / "a.tif"))
    ]
    with pytest.raises(UsageError, match=r"its columns are id \(int64\), photo \(binary\)"):
        columns(id=[1], photo=[b"x"])
    with pytest.raises(UsageError, match="holds no pictures"):
        columns(image=pa.array([], pa.binary()))


def test_rows_that_name_nothing_readable_are_rejected(tmp_path, pictures):
    name, data = next(iter(pictures.items()))
    targets = [
        name,
        None,
        " ",
        "gone.jpg",
        "https://example.com/a.jpg",
        "data:image/jpeg;base64," + "A" * 5000,
        "a\0.jpg",
    ]
    targets += ["other.parquet", f"file://{tmp_path}/{name}"]
    put({name: data, "x.parquet": table_of({"url": targets})}, tmp_path)
    assert list(problems(listed(tmp_path / "x.parquet")).values()) == [
        *("no image in this row", "no image in this row", "gone"),
        *["neither a path nor an s3:// URI"] * 3,
        "not a picture",
    ]


def test_a_table_in_a_folder_is_used_for_its_bytes_and_otherwise_named_in_a_warning(tmp_path, pictures, caplog):
    name, data = next(iter(pictures.items()))
    put({"metadata.parquet": table_of({"file_name": [name]})}, tmp_path)
    with pytest.raises(UsageError, match=r"metadata.parquet names pictures elsewhere, in its column file_name"):
        listed(tmp_path)
    put({name: data, "bytes.parquet": table_of({"image": [data]})}, tmp_path)
    assert {s.path for s in listed(tmp_path)} == {name, "bytes.parquet/0000000000"}
    assert "1 Parquet tables are not used" in caplog.text


def damage(path: Path, row_group: int) -> None:
    """Overwrites the beginning of a row group's first column."""
    where = pyarrow.parquet.ParquetFile(path).metadata.row_group(row_group).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[where : where + 20] = b"\xff" * 20
    path.write_bytes(bytes(data))


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    rows = [np.random.default_rng(row).bytes(2000) for row in range(20)]
    put({"x.parquet": table_of({"image": rows}, row_group_size=10, use_dictionary=False)}, tmp_path)
    damage(tmp_path / "x.parquet", 1)
    sources = listed(tmp_path / "x.parquet")
    damaged = {f"x.parquet/{row:010d}": "the Parquet table is damaged here" for row in range(10, 20)}
    assert problems(sources) == problems(sources[::-1]) == damaged
    assert [read_source(s)[0] for s in sources[:10]] == rows[:10]


def test_where_the_names_in_a_table_are_damaged_the_table_is_rejected(tmp_path, pictures):
    put(pictures | {"x.parquet": table_of({"url": list(pictures)}, row_group_size=4, use_dictionary=False)}, tmp_path)
    damage(tmp_path / "x.parquet", 1)
    sources = listed(tmp_path / "x.parquet")
    assert len(sources) == 5
    assert problems(sources) == {"x.parquet": "not a whole Parquet file"}
    text = table_of({"url": ["a.jpg", "fifty.jpg"]}, compression="none", use_dictionary=False)
    put({"x.parquet": text.replace(b"fifty", b"\xff" * 5)}, tmp_path)
    assert problems(listed(tmp_path / "x.parquet")) == {"x.parquet": "not a whole Parquet file"}


# Datasets of containers


@pytest.mark.usefixtures("ray_cluster")
def test_a_dataset_of_tars_is_the_same_for_any_workers_and_place_and_a_changed_tar_rewrites_its_own_shards(
    tmp_path, bucket, pictures, one_crop_recipe
):
    items = list(pictures.items())
    tars = {f"{part}.tar": tar_of(dict(items[part::4] + items[part + 1 :: 4][:1])) for part in range(4)}
    here, there = put(tars, tmp_path / "tars"), put(tars, f"{bucket}/{tmp_path.name}/tars")
    first = run([here], tmp_path / "one", one_crop_recipe)
    out = f"{bucket}/{tmp_path.name}/out"
    assert generate([f"{there}/*.tar"], out, one_crop_recipe, 2, progress=False).digest == first.digest
    assert verify(str(tmp_path / "one"), progress=False).ok
    index = Dataset.open(str(tmp_path / "one")).index()
    touched = {row["shard"] for row in index.to_pylist() if row["source"].startswith("2.tar/")}
    put({"2.tar": tar_of(dict(items[:2]))}, here)
    again = generate([here], str(tmp_path / "one"), one_crop_recipe, 2, progress=False)
    kept = {shard.name for shard in Dataset.open(str(tmp_path / "one")).manifest.shards}
    assert again.reused > 0
    assert set(index["shard"].to_pylist()) - kept <= touched


def test_pictures_of_any_name_make_a_dataset_that_is_verified_and_shown(tmp_path, pictures, one_crop_recipe):
    odd = ["a [1]", "100%", "what?", "new\nline", "é日本", "<script>alert(1)</script>", "x" * 200, "tab\t\"'", "..b"]
    data = [data for name, data in pictures.items() if name.endswith(".jpg")]
    folder = tmp_path / ("photos %20?" + os.fsdecode(b"\xe9"))  # no Unicode
    for number, name in enumerate(odd):
        put({f"{name.replace('/', '')}.jpg": data[number % len(data)]}, folder)
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(data[0])
    result = run([folder], tmp_path / "shards [2]", one_crop_recipe)
    assert (result.samples, result.rejected) == (len(odd) - 1, 1)  # ..b is hidden
    index = Dataset.open(str(tmp_path / "shards [2]")).index()
    assert set(index["source"].to_pylist()) == {f"{name.replace('/', '')}.jpg" for name in odd if name != "..b"}
    assert rejected(tmp_path / "shards [2]") == {os.fsdecode(b"caf\xe9.jpg"): "file name is not valid UTF-8"}
    assert verify(str(tmp_path / "shards [2]"), progress=False).ok
    page = tmp_path / "page ? 1.html"
    inspect(str(tmp_path / "shards [2]"), page, progress=False)
    text = page.read_text()
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "caf" in text


def test_a_dataset_of_a_table_on_s3_is_that_of_the_same_table_here(tmp_path, bucket, pictures, one_crop_recipe):
    table = {"x.parquet": table_of({"image": list(pictures.values())}, row_group_size=3)}
    here, there = put(table, tmp_path), put(table, f"{bucket}/{tmp_path.name}")
    first = run([f"{here}/x.parquet"], tmp_path / "out", one_crop_recipe)
    assert (first.samples, first.rejected) == (8, 0)
    assert run([there], tmp_path / "again", one_crop_recipe).digest == first.digest


def test_a_folder_that_is_gone_is_an_error_and_a_file_that_is_gone_a_rejection(photos, tmp_path):
    shutil.copytree(photos / "validation", tmp_path / "photos")
    first, second = list(list_sources([str(tmp_path / "photos")]))[:2]
    Path(first.uri).unlink()
    with pytest.raises(FileNotFoundError):
        read_source(first)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="photos is missing, or another folder than where the command was given"):
        read_source(second)
