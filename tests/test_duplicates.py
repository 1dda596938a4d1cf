"""Sources with the same content: found wherever they lie, kept once if the recipe says so."""

import pytest
from source_files import changed, listed, put, rejected, run, table_of, tar_of

from deedsr.errors import UsageError
from pipelines.data.dataset import Dataset
from pipelines.shards import duplicates
from pipelines.shards.duplicates import mark_duplicates
from pipelines.shards.source import Source


def test_of_equal_contents_the_first_by_root_and_path_is_kept(ray_cluster, tmp_path, pictures, monkeypatch):
    (one, data), (two, other), *_ = pictures.items()
    put({f"b/{one}": data, f"a/{one}": data, two: other, "gone.jpg": b"x", "lost.jpg": b"x"}, tmp_path / "0")
    put({"z.tar": tar_of({"y.jpg": other, "a.jpg": b"new", "b.jpg": b"new"})}, tmp_path / "1")
    put({"x.parquet": table_of({"image": [data, None, None]})}, tmp_path / "1")
    sources = listed(tmp_path / "0", tmp_path / "1")
    for name in ("gone.jpg", "lost.jpg"):
        (tmp_path / "0" / name).unlink()
    expected = {(0, f"b/{one}"), (1, "z.tar/y.jpg"), (1, "z.tar/b.jpg"), (1, "x.parquet/0000000000")}
    for reordered in (sources, sources[::-1]):
        marked = list(mark_duplicates(iter(reordered), workers=2))
        assert {(s.root, s.path) for s in marked if s.duplicate} == expected
        assert [s._replace(duplicate=False) for s in marked] == reordered
    monkeypatch.setattr(duplicates, "_FEW", 0)
    monkeypatch.setattr(duplicates, "_CHUNK", 2)
    monkeypatch.setattr(duplicates, "_WINDOW", 3)
    assert {(s.root, s.path) for s in mark_duplicates(iter(sources), workers=2) if s.duplicate} == expected
    assert list(mark_duplicates(iter([]), workers=2)) == []


def test_a_recipe_that_rejects_duplicates_counts_them_as_rejected(tmp_path, pictures, one_crop_recipe):
    (name, data), *rest = pictures.items()
    put(dict(rest[:2]) | {f"1-{name}": data, f"2-{name}": data}, tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "keep", one_crop_recipe)
    assert rejected(tmp_path / "keep") == {}
    result = run([tmp_path / "in"], tmp_path / "out", changed(one_crop_recipe, duplicates="reject"))
    assert rejected(tmp_path / "out") == {f"2-{name}": "the same content as an earlier source"}
    assert (result.samples, Dataset.open(str(tmp_path / "out")).manifest.used) == (3, 3)


def test_an_error_while_reading_is_one_clear_error(ray_cluster, bucket, monkeypatch):
    monkeypatch.setattr(duplicates, "_FEW", 0)
    with pytest.raises(UsageError, match="no bucket 'deedsr-nowhere'"):
        list(mark_duplicates([Source(0, "a.jpg", "s3://deedsr-nowhere/a.jpg", 1, "1")], workers=1))
