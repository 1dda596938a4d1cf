"""Claims on names that come from outside: whatever a system allows is read and written, and none leads elsewhere."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image
from source_files import listed, problems, put, table_of, tar_of

from deedsr.dataset.manifest import Manifest, ShardEntry, dataset_digest
from deedsr.errors import DeeDSRError, UsageError
from jobs.cli import main
from pipelines.data.shard_cache import ShardCache
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.upscaling import find_inputs, upscale
from pipelines.shards.source import read_source
from pipelines.storage import localize, open_storage
from pipelines.storage.location import matching, split_pattern

NAMES = [
    *("photos [2019]", "a*b", "what?", "{x,y}", "{1..3}", "100%", "a%20b", "a+b", "a#b", "a&b=c;d", "~nobody", "-dash"),
    *(" spaces ", "quote'\"`$(x)", "back\\slash", "naïve é", "e\u0301", "日本", "\u202eltr", "😀", "x" * 200, "dot."),
    *("%2F", "&amp;", "<b>", "a|b", "\\", "$HOME", "!", "Thumbs.db", ","),
    *("a..b", "con", "s3:", "list.txt", "x.tar", "..a", "new\nline", "tab\tbell\a"),
]


def names_of(place: str) -> list[str]:
    """Names for a place: the S3 server of the tests has none with control characters."""
    return [name for name in NAMES if name.isprintable() or name == "\u202eltr"] if "://" in place else NAMES


@pytest.fixture(scope="module")
def png() -> bytes:
    import cv2

    return cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8))[1].tobytes()


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def enlarged(inputs, out, model, **options):
    return upscale(UpscaleOptions(input=[*map(str, inputs)], out=str(out), model=model, **options), progress=False)


# What a name may hold


def test_every_name_is_listed_read_and_written_again(place, png):
    storage = open_storage(place)
    names = names_of(place)
    for name in names:
        storage.write(f"{name}/{name}.png", png + bytes([NAMES.index(name)]))
    sources = listed(place)
    assert {source.path for source in sources} == {f"{name}/{name}.png" for name in names if name != "..a"}
    for source in sources:
        number = NAMES.index(source.path.partition("/")[0])
        assert read_source(source)[0] == png + bytes([number])
    for name in names:
        found = listed(f"{place}/{name}") if name != "..a" else []
        assert [source.path for source in found] == ([f"{name}.png"] if found else [])
        assert open_storage(f"{place}/{name}").read(f"{name}.png") == png + bytes([NAMES.index(name)])


def test_pictures_of_any_name_are_upscaled_and_may_be_named_in_a_command(place, png, model):
    names = [name for name in names_of(place) if name != "..a"][:: 3 if "://" in place else 1]
    put({f"{name}/x{name}.png": png for name in names}, f"{place}/in")
    result = enlarged([f"{place}/in"], f"{place}/out", model, steps=1)
    assert not result.failed
    written = {f"{place}/out/{name}/x{name}.png" for name in names}
    assert {image["output"] for image in result.images} == written
    storage = open_storage(f"{place}/out")
    assert {f"{place}/out/{entry.path}" for entry in storage.list()} == written
    assert Image.open(storage.open(f"{names[0]}/x{names[0]}.png")).size == (48, 32)
    for name in names:
        given = f"{place}/in/{name}"
        for inputs in ([given], [f"{given}/x{name}.png"], [f"{given}/*.png"]):
            [source] = find_inputs(inputs, storage, "png")
            assert (source.uri, source.target) == (f"{given}/x{name}.png", f"x{name}.png")


def test_what_something_is_called_is_no_pattern(place):
    names = ["photos [2019]/a.jpg", "photos 2/b.jpg", "photos 2/.hidden.jpg", "[ab]/{c}/d*.jpg", "a/deep/er/e.jpg"]
    put(dict.fromkeys(names, b"x"), place)

    def found(pattern: str) -> list[str]:
        folder, rest = split_pattern(f"{place}/{pattern}")
        return [entry.path for entry in matching(open_storage(folder), rest)]

    assert split_pattern(f"{place}/photos [2019]/a.jpg") == (f"{place}/photos [2019]/a.jpg", "")
    assert found("photos [2019]/*.jpg") == ["a.jpg"]
    assert found("photos [1-3]/*") == ["photos 2/b.jpg"]
    assert found("photos [1-3]/.*") == ["photos 2/.hidden.jpg"]
    assert found("[ab]/{c}/d*.*") == ["d*.jpg"]
    assert found("[a]/deep/**") == ["a/deep/er/e.jpg"]
    assert found("{photos 2,a}/**/*.jpg") == ["a/deep/er/e.jpg", "photos 2/b.jpg"]
    assert [source.path for source in listed(f"{place}/**/[ae].jpg")] == ["a/deep/er/e.jpg", "photos [2019]/a.jpg"]


def test_a_pattern_looks_into_no_folder_that_it_cannot_match(tmp_path, monkeypatch):
    put(dict.fromkeys(["a/1.jpg", "a/deep/2.jpg", "b/deep/3.jpg", "4.jpg"], b"x"), tmp_path)
    looked: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda folder: looked.append(os.path.relpath(folder, tmp_path)) or scandir(folder)
    )
    storage = open_storage(tmp_path)
    assert [entry.path for entry in matching(storage, "a/*.jpg")] == ["a/1.jpg"]
    assert looked == [".", "a"]


def test_a_name_as_long_as_the_system_allows_is_written_and_what_was_begun_is_found_again(tmp_path, png, model):
    for name in ("x" * 251 + ".png", "é" * 125 + ".png"):
        put({f"in/{name}": png}, tmp_path)
    result = enlarged([tmp_path / "in"], tmp_path / "out", model)
    assert (len(result.images), result.failed) == (2, [])
    longer = enlarged([tmp_path / "in" / ("x" * 251 + ".png")], tmp_path / "out", model, format="webp")
    assert "x.webp" not in " ".join(os.listdir(tmp_path / "out"))
    assert longer.failed[0]["reason"] == f"cannot write {tmp_path}/out/{'x' * 251}.webp: File name too long"


def test_names_that_are_not_unicode_are_read_and_said(tmp_path, png, model):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(png)
    result = enlarged([tmp_path / "in"], tmp_path / "out", model)
    assert (result.failed, os.listdir(tmp_path / "out")) == ([], [name])
    words = f"from jobs import cli; cli.set_up_process(); print({result.images[0]['output']!r})"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    assert b"caf\\udce9.png" in said.stdout, said.stderr


def test_a_name_that_begins_with_a_dash_is_an_input(tmp_path, png, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put({"-x.png": png, "~nobody.png": png}, tmp_path)
    assert main(["upscale", "--out", "out", "--model", model, "--", "-x.png", "~nobody.png"]) == 0
    assert sorted(os.listdir("out")) == ["-x.png", "~nobody.png"]


# Lists


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_a_list_may_begin_with_a_byte_order_mark_and_end_its_lines_as_it_likes(encoding, place):
    names = ["a.jpg", "naïve 日本.jpg", " b c .jpg", "#d.jpg", "e\x0b\x85\u2028f.jpg"]
    put({name: name.encode() for name in names}, place)
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    for end in ("\n", "\r\n"):
        put({"list.txt": mark + (end.join(names) + end * 2).encode(encoding)}, place)
        sources = listed(f"{place}/list.txt")
        assert {source.path: read_source(source)[0].decode() for source in sources} == {name: name for name in names}


def test_a_line_that_names_nothing_costs_no_other_line(tmp_path):
    put({"a.jpg": b"a"}, tmp_path)
    lines = [b"a.jpg", b"caf\xe9.jpg", b"x" * 300 + b".jpg", b"a.jpg/b.jpg", b"gone.jpg"]
    (tmp_path / "list.txt").write_bytes(b"\n".join(lines))
    sources = listed(tmp_path / "list.txt")
    assert problems(sources) == {os.fsdecode(line): "gone" for line in lines[1:]}
    (tmp_path / "list.txt").write_bytes(b"\x89PNG\r\n\0\0")
    with pytest.raises(UsageError, match="is not a list file .*zero bytes"):
        listed(tmp_path / "list.txt")


# What lies in a folder besides pictures


def test_hidden_files_are_no_pictures_in_any_command(place, png, model):
    hidden = ["._a.png", ".thumbnails/a.png", "b/._c.png", ".a.tar"]
    put(dict.fromkeys(["a.png", "b/c.png", *hidden], png), place)
    put({"x.tar": tar_of({"d.png": png, "._d.png": png, "__MACOSX/._e.png": png})}, place)
    assert [source.path for source in listed(place)] == ["a.png", "b/c.png", "x.tar/d.png"]
    for given, names in ((place, ["a.png", "b/c.png"]), (f"{place}/**/*.png", ["a.png", "c.png"])):
        result = enlarged([given], f"{place}/out", model)
        assert [image["output"] for image in result.images] == [f"{place}/out/{name}" for name in names]
        assert not result.failed
    named = enlarged([f"{place}/._a.png", f"{place}/.thumbnails/*.png"], f"{place}/named", model)
    assert len(named.images) == 2


def test_hidden_files_beside_weights_change_no_digest(model, tmp_path):
    from deedsr.hub.weights import part_digest
    from pipelines.training.identity import weights_digest

    learner = Path(model) / "learner"
    before = part_digest(learner), weights_digest(learner)
    sidecar = learner / "._diffusion_pytorch_model.safetensors"
    sidecar.write_bytes(b"\0\5\x16\7")
    try:
        assert (part_digest(learner), weights_digest(learner)) == before
    finally:
        sidecar.unlink()


NOTHING = ["loop.png", "gone.png", "pipe.png", "device.png", "socket.png"]


@pytest.fixture
def odd_folder(tmp_path, png) -> Path:
    """a.png, and entries that are nothing to read."""
    folder = tmp_path / "odd"
    put({"a.png": png, "below/b.png": png}, folder)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "inside").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    (folder / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(folder):  # a socket's path is short
        server.bind("socket.png")
    (folder / "folder.png").mkdir()
    return folder


def test_an_entry_that_is_nothing_to_read_stops_no_folder_and_is_named(odd_folder, model, tmp_path):
    result = enlarged([odd_folder], tmp_path / "out", model)
    assert [Path(image["input"]).name for image in result.images] == ["a.png", "b.png"]
    assert {Path(failure["input"]).name for failure in result.failed} == set(NOTHING)
    assert {failure["reason"].partition(":")[0] for failure in result.failed} == {"there is no such file"}
    assert problems(listed(odd_folder)) == dict.fromkeys(NOTHING, "gone")
    with pytest.raises(UsageError, match=r"loop\.png does not exist"):
        enlarged([odd_folder / "a.png", odd_folder / "loop.png"], tmp_path / "out", model)


def test_a_folder_that_cannot_be_listed_is_named_and_the_others_are(tmp_path, png, caplog):
    put({"a.png": png}, tmp_path)
    depth, folder = 20, os.open(tmp_path, os.O_RDONLY)
    for _ in range(depth):  # a path longer than the system takes in one piece
        os.mkdir("d" * 250, dir_fd=folder)
        folder, above = os.open("d" * 250, os.O_RDONLY, dir_fd=folder), folder
        os.close(above)
    os.close(folder)
    assert [source.path for source in listed(tmp_path)] == ["a.png"]
    assert "cannot list" in caplog.text
    assert "it is left out" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a while")
def test_what_may_not_be_read_stops_no_folder_and_is_named(tmp_path, png, model, caplog):
    put({"a.png": png, "secret.png": png, "secret.tar": tar_of({"x.png": png}), "lost/b.png": png}, tmp_path / "in")
    (tmp_path / "out").mkdir(mode=0o777)
    for path, mode in (("in/secret.png", 0), ("in/secret.tar", 0), ("in/lost", 0), ("out", 0o777)):
        (tmp_path / path).chmod(mode)
    for parent in tmp_path.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o11)
    tmp_path.chmod(0o755)
    os.seteuid(65534)
    try:
        sources = listed(tmp_path / "in")
        left_out = problems(sources)
        with pytest.raises(UsageError, match="no permission to list"):
            listed(tmp_path / "in" / "lost")
    finally:
        os.seteuid(0)
    assert [source.path for source in sources] == ["a.png", "secret.png", "secret.tar"]
    assert left_out == dict.fromkeys(["secret.png", "secret.tar"], "no permission to read it")
    assert f"no permission to list {tmp_path}/in/lost; it is left out" in caplog.text


# Names that lead elsewhere


def keys(bucket: str, objects: dict[str, bytes]) -> None:
    for key, data in objects.items():
        boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=data)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..", "a\0b"])
def test_no_name_leads_out_of_a_directory(name, tmp_path):
    (tmp_path / "x").write_bytes(b"outside")
    (tmp_path / "in").mkdir()
    storage = open_storage(tmp_path / "in")
    for call in (
        storage.read, storage.open, storage.stat, storage.delete, storage.local_path, storage.child,
        lambda path: storage.write(path, b"?"), lambda path: storage.read_range(path, 0, 1),
        lambda path: storage.download(path, tmp_path / "copy"), lambda path: list(storage.list(f"x/../{path}")),
    ):  # fmt: skip
        with pytest.raises(DeeDSRError, match="is no name below .*in: it leads out of that folder"):
            call(name)
    assert everything(tmp_path) == {"x"}
    assert (tmp_path / "x").read_bytes() == b"outside"


def test_a_download_stays_in_its_folder_and_names_what_it_leaves_out(bucket, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "outside").mkdir()
    prefix = tmp_path.name
    bad = [f"/{tmp_path}/outside/absolute", "../dots", "a/../../../dots", "a//double", "./dot", "unet", "x" * 300]
    keys(bucket, {f"{prefix}/{name}": b"?" for name in bad})
    keys(bucket, {f"{prefix}/unet/config.json": b"{}", f"{prefix}/..a": b"fine"})
    folder = localize(f"{bucket}/{prefix}")
    assert everything(folder) == {"unet/config.json", "..a"}
    written = {name for name in everything(tmp_path) if not name.endswith(".used")}
    assert written == {str(folder.relative_to(tmp_path) / name) for name in ("unet/config.json", "..a")}
    for name in bad:
        assert f"{bucket}/{prefix}/{name} is left out: no file can be called so here" in caplog.text


def test_pictures_of_a_bucket_stay_in_out_and_are_read_from_the_bucket(bucket, tmp_path, png, model):
    prefix = tmp_path.name
    (tmp_path / "local.png").write_bytes(b"a file of this machine")
    names = [f"/{tmp_path}/local.png", "/2019/a.png", "../up.png", "b/./c.png", "fine.png"]
    keys(bucket, {f"{prefix}/{name}": png for name in names})
    for source in listed(f"{bucket}/{prefix}"):
        assert read_source(source)[0] == png
    for out in (tmp_path / "out", f"{bucket}/{prefix} out"):
        result = enlarged([f"{bucket}/{prefix}"], out, model)
        [failure] = result.failed
        assert failure["input"] == f"{bucket}/{prefix}/../up.png"
        assert "its name ../up.png leads out of --out" in failure["reason"]
        written = [entry.path for entry in open_storage(out).list()]
        assert written == sorted([str(tmp_path / "local.png")[1:], "2019/a.png", "b/c.png", "fine.png"])
    assert everything(tmp_path) == {"local.png", *(f"out/{name}" for name in written)}
    alone = enlarged([f"{bucket}/{prefix}//2019/a.png", f"{bucket}/{prefix}/../up.png"], tmp_path / "alone", model)
    assert everything(tmp_path / "alone") == {"a.png", "up.png"}
    assert not alone.failed


def test_a_table_of_a_bucket_names_nothing_on_this_machine(bucket, tmp_path, png):
    (tmp_path / "x.png").write_bytes(png)
    place = f"{bucket}/{tmp_path.name}"
    targets = [str(tmp_path / "x.png"), f"file://{tmp_path}/x.png", f"{place}/y.png", "y.png"]
    put({"y.png": png, "t.parquet": table_of({"url": targets})}, place)
    assert list(problems(listed(f"{place}/t.parquet")).values()) == ["neither a path nor an s3:// URI"] * 2


def manifest(**shard) -> Manifest:
    entry = ShardEntry(**{"name": "train-0-0.tar", "samples": 1, "bytes": 3, "sha256": "0" * 64} | shard)
    digest = dataset_digest([str(entry.sha256)])
    return Manifest(2, "", {}, "", "", 1, 1, 0, 1, digest, {}, {"samples.parquet": "1" * 64}, None, None, (entry,))


@pytest.mark.parametrize(
    "shard", [{"name": "../x"}, {"name": "/etc/x"}, {"name": ""}, {"sha256": "../x"}, {"bytes": "../x"}]
)
def test_a_manifest_names_only_files_beside_it(shard, bucket, tmp_path):
    data = manifest(**shard).to_json()
    assert Manifest.from_json(manifest().to_json(), "m").shards
    with pytest.raises(DeeDSRError, match="is not a manifest of a dataset"):
        Manifest.from_json(data, "m")
    with pytest.raises(DeeDSRError, match="is not a manifest of a dataset"):
        Manifest.from_json(json.dumps(json.loads(manifest().to_json()) | {"files": {"../x": "0" * 64}}).encode(), "m")
    assert ShardCache(1, tmp_path)  # whose copies are named after these hashes
