"""Claims about upscaling: files from anywhere to anywhere, by a small model with random weights."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from small_networks import make_pipeline

from deedsr.errors import UsageError
from deedsr.sampling.pipeline import DeeDSRPipeline
from jobs.cli import main
from pipelines.inference.options import UpscaleOptions
from pipelines.inference.upscaler import Input, Upscaler
from pipelines.inference.upscaling import upscale
from pipelines.models import Model
from pipelines.storage import open_storage, publish


@pytest.fixture(scope="module")
def picture(photos) -> Image.Image:
    """A shipped photograph reduced to 24 x 16 pixels."""
    return Image.open(photos / "validation" / "Green-Maple.jpg").resize((24, 16), Image.Resampling.BOX)


@pytest.fixture
def folder(picture, tmp_path) -> Path:
    """in/a.png, in/deep/er/b.jpg, and files that are no pictures."""
    (tmp_path / "in" / "deep" / "er").mkdir(parents=True)
    picture.save(tmp_path / "in" / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "deep" / "er" / "b.jpg")
    (tmp_path / "in" / "notes.txt").write_text("not a picture")
    return tmp_path / "in"


def run(inputs, out, model, **options):
    return upscale(UpscaleOptions(input=[*map(str, inputs)], out=str(out), model=model, **options), progress=False)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_near_fp32_and_no_result_of_another_precision_is_reused(folder, model, tmp_path, precision):
    run([folder / "a.png"], tmp_path / "out", model)
    full = np.asarray(Image.open(tmp_path / "out" / "a.png"), np.float32)
    [image] = run([folder / "a.png"], tmp_path / "out", model, precision=precision).images
    assert not image["reused"]
    half = np.asarray(Image.open(tmp_path / "out" / "a.png"), np.float32)
    assert 0 < np.abs(half - full).mean() < (2 if precision == "fp16" else 10)
    [image] = run([folder / "a.png"], tmp_path / "out", model, precision=precision).images
    assert image["reused"]


def test_a_picture_that_half_precision_spoils_is_made_again_in_fp32_with_a_warning(folder, tmp_path, caplog):
    pipe = make_pipeline(num_inference_steps=2)
    with torch.no_grad():  # what is between them is beyond fp16
        pipe.vae.decoder.layers[4].weight.mul_(1e7)
        pipe.vae.decoder.layers[7].weight.mul_(1e-7)
    pipe.save_pretrained(tmp_path / "model")
    run([folder / "a.png"], tmp_path / "full", str(tmp_path / "model"), precision="fp32")
    run([folder / "a.png"], tmp_path / "half", str(tmp_path / "model"), precision="fp16")
    assert "a.png: black or not finite in half precision, made again in fp32" in caplog.text
    full, half = (np.asarray(Image.open(tmp_path / name / "a.png")) for name in ("full", "half"))
    assert full.any()
    assert np.array_equal(full, half)


def written(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def test_a_folder_is_searched_through_and_its_subfolders_are_kept(folder, model, tmp_path):
    result = run([folder], tmp_path / "out", model)
    assert written(tmp_path / "out") == ["a.png", "deep/er/b.png"]
    assert not result.failed
    assert [sorted(image) for image in result.images] == [["input", "output", "reused", "seconds"]] * 2
    assert [image["output"] for image in result.images] == [
        str(tmp_path / "out" / "a.png"),
        str(tmp_path / "out" / "deep" / "er" / "b.png"),
    ]
    assert Image.open(tmp_path / "out" / "a.png").size == (96, 64)
    assert Image.open(tmp_path / "out" / "deep" / "er" / "b.png").size == (64, 96)


def test_a_picture_comes_out_the_same_alone_in_a_folder_and_again(folder, model, tmp_path):
    run([folder], tmp_path / "all", model, seed=5)
    run([folder / "deep" / "er" / "b.jpg"], tmp_path / "alone", model, seed=5)
    run([folder / "deep" / "er" / "b.jpg"], tmp_path / "other", model, seed=6)
    run([f"{folder}/**/*.jpg"], tmp_path / "alone", model, seed=5)  # replaces
    alone = (tmp_path / "alone" / "b.png").read_bytes()
    assert alone == (tmp_path / "all" / "deep" / "er" / "b.png").read_bytes()
    assert alone != (tmp_path / "other" / "b.png").read_bytes()


def test_a_bad_file_is_reported_and_the_rest_goes_on(folder, model, tmp_path):
    (folder / "0-broken.png").write_bytes((folder / "a.png").read_bytes()[:200])
    (folder / "1-empty.jpg").write_bytes(b"")
    result = run([folder], tmp_path / "out", model)
    assert written(tmp_path / "out") == ["a.png", "deep/er/b.png"]
    assert [Path(failure["input"]).name for failure in result.failed] == ["0-broken.png", "1-empty.jpg"]
    assert [failure["reason"] for failure in result.failed] == ["truncated or broken image", "empty file"]
    assert len(result.images) == 2


def test_results_of_an_earlier_command_are_not_its_inputs(folder, model, tmp_path):
    for _ in range(2):
        result = run([folder], folder / "out", model)
        assert len(result.images) == 2
    assert written(folder / "out") == ["a.png", "deep/er/b.png"]


def test_no_result_replaces_an_input_or_another_result(folder, model, picture, tmp_path):
    before = (folder / "a.png").read_bytes()
    picture.save(folder / "a.jpg")
    (tmp_path / "link").symlink_to(folder)
    for overwrite in (False, True):
        for out in (folder, tmp_path / "link"):
            result = run([folder / "a.png", folder / "deep" / "er" / "b.jpg"], out, model, overwrite=overwrite)
            assert "its result would replace it" in result.failed[0]["reason"]
            assert (folder / "b.png").exists()
        result = run([folder / "a.jpg", folder / "a.png"], folder, model, overwrite=overwrite)
        assert f"would replace the input {folder}/a.png" in result.failed[0]["reason"]
        assert (folder / "a.png").read_bytes() == before

    result = run([folder / "a.jpg", folder / "a.png"], folder / "out", model)
    assert [Path(image["input"]).name for image in result.images] == ["a.jpg"]
    assert "would replace that of" in result.failed[0]["reason"]
    assert not run([folder / "a.jpg", folder / "a.png"], folder / "out", model, format="same").failed


def test_a_file_of_another_program_is_only_replaced_when_told(folder, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(before := (folder / "a.png").read_bytes())
    result = run([folder / "a.png"], tmp_path / "out", model)
    assert "exists and is no result of this command" in result.failed[0]["reason"]
    assert (tmp_path / "out" / "a.png").read_bytes() == before
    assert not run([folder / "a.png"], tmp_path / "out", model, overwrite=True).failed
    assert Image.open(tmp_path / "out" / "a.png").size == (96, 64)


def test_what_is_done_of_the_same_picture_model_and_settings_is_reused(folder, model, tmp_path):
    out = tmp_path / "out"
    again = lambda **options: run([folder], out, model, **options)
    states = lambda: {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*.*")}
    assert again().reused == 0
    before = states()
    result = again()
    assert (result.reused, [image["reused"] for image in result.images]) == (2, [True, True])
    assert states() == before
    assert again(quality=50).reused == 2  # PNG has none

    (out / "a.png").unlink()
    assert [image["reused"] for image in again().images] == [False, True]
    Image.open(folder / "a.png").rotate(180).save(folder / "a.png")
    assert [image["reused"] for image in again().images] == [False, True]
    assert again(overwrite=True).reused == 0
    for other in ({"seed": 1}, {"steps": 1}, {"temperature": 0.5}, {"eta": 0.5}):
        assert again(**other).reused == 0
    assert again(**other).reused == 2
    pipeline = make_pipeline(num_inference_steps=2)
    with torch.no_grad():
        next(pipeline.adapter.parameters()).add_(1)
    pipeline.save_pretrained(tmp_path / "other")
    assert run([folder], out, str(tmp_path / "other"), eta=0.5).reused == 0
    for format in ("jpeg", "webp"):
        assert [again(format=format, quality=90).reused for _ in range(2)] == [0, 2]
    assert again(format="jpeg", quality=91).reused == 0
    assert again(format="same", quality=91).reused == 1  # b.jpg


def test_inputs_and_outputs_may_lie_in_s3(folder, model, bucket, tmp_path):
    place = f"{bucket}/{tmp_path.name}"
    publish(folder, f"{place}/in")
    result = run([f"{place}/in"], f"{place}/out", model)
    assert [image["output"] for image in result.images] == [f"{place}/out/a.png", f"{place}/out/deep/er/b.png"]
    run([folder], tmp_path / "out", model)
    assert open_storage(f"{place}/out").read("a.png") == (tmp_path / "out" / "a.png").read_bytes()
    one = run([f"{place}/in/deep/er/b.jpg"], tmp_path / "one", model)
    assert written(tmp_path / "one") == ["b.png"]
    assert one.images[0]["input"] == f"{place}/in/deep/er/b.jpg"


def test_results_in_s3_are_reused_and_patterns_name_objects(folder, model, bucket, tmp_path):
    place = f"{bucket}/{tmp_path.name}"
    publish(folder, f"{place}/in")
    for pattern, names in (
        ("in/*.png", ["a.png"]), ("i[mn]/**/*.jpg", ["b.png"]), ("in/**", ["a.png", "b.png"]),
        ("*/deep/?r/b.*", ["b.png"]), ("in/*/*.jpg", None),
    ):  # fmt: skip
        if names is None:
            with pytest.raises(UsageError, match="has no picture to upscale"):
                run([f"{place}/{pattern}"], f"{place}/out", model)
            continue
        result = run([f"{place}/{pattern}"], f"{place}/out", model)
        assert [Path(image["output"]).name for image in result.images] == names
    assert result.reused == 1
    with pytest.raises(UsageError, match="the name of a bucket cannot be a pattern"):
        run(["s3://*/a.png"], f"{place}/out", model)


def test_a_picture_is_what_the_pipeline_makes_of_it(folder, model, tmp_path):
    run([folder / "a.png"], tmp_path / "out", model, seed=3, eta=0.5)
    pipeline = DeeDSRPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    [expected] = pipeline(Image.open(folder / "a.png"), generator=generator, eta=0.5).images
    np.testing.assert_array_equal(Image.open(tmp_path / "out" / "a.png"), expected)
    with pytest.raises(TypeError):
        run([folder / "a.png"], tmp_path / "out", model, no_such_setting=1)


def test_orientation_is_applied(picture, model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    run([tmp_path / "turned.png", tmp_path / "upright.png"], tmp_path / "out", model)
    turned, upright = (Image.open(tmp_path / "out" / name) for name in ("turned.png", "upright.png"))
    assert turned.size == (64, 96)
    np.testing.assert_array_equal(np.array(turned), np.array(upright))


def test_the_network_sees_sixteen_bits_and_grey_stays_grey(picture, model, tmp_path):
    grey = np.array(picture.convert("L"))
    fine = grey.astype(np.uint16) * 257 + np.arange(24, dtype=np.uint16) % 5  # lost in 8 bits
    for name, pixels in {"eight.png": grey, "sixteen.png": grey.astype(np.uint16) * 257, "fine.png": fine}.items():
        cv2.imwrite(str(tmp_path / name), pixels)
    run([tmp_path / name for name in ("eight.png", "sixteen.png", "fine.png")], tmp_path / "out", model)
    eight, sixteen, fine = (np.array(Image.open(tmp_path / "out" / f"{n}.png")) for n in ("eight", "sixteen", "fine"))
    assert [result.shape for result in (eight, sixteen, fine)] == [(64, 96)] * 3
    assert (eight.dtype, sixteen.dtype) == (np.uint8, np.uint16)
    assert np.abs(sixteen / 257 - eight).max() <= 0.51
    assert len(np.unique(sixteen)) > 256
    assert 0 < np.abs(sixteen.astype(int) - fine).max() < 500


def test_the_command_says_what_it_does_and_what_failed(folder, model, tmp_path, capsys):
    (folder / "empty.png").write_bytes(b"")
    words = ["upscale", f"{folder}/*.png", "--out", str(tmp_path / "out"), "--model", model, "--format", "webp"]
    assert main([*words, "--quality", "90", "--json"]) == 1
    said = capsys.readouterr()
    result = json.loads(said.out)
    assert [image["output"] for image in result["images"]] == [str(tmp_path / "out" / "a.webp")]
    assert result["failed"] == [{"input": str(folder / "empty.png"), "reason": "empty file"}]
    assert "2/2" in said.err
    assert "picture" in said.err.rpartition("<")[2]  # behind the time that is left: the rate
    (folder / "empty.png").unlink()
    assert main([*words, "--quality", "90"]) == 0


@pytest.fixture
def many(picture, tmp_path) -> Path:
    (tmp_path / "many").mkdir()
    for number in range(8):
        picture.rotate(20 * number).save(tmp_path / "many" / f"{number:02}.png")
    return tmp_path / "many"


def test_an_interrupted_command_leaves_whole_results_and_continues(many, model, tmp_path, capsys):
    out = tmp_path / "out"

    def terminate() -> None:
        while not whole(out):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as of a process that is one command
    killer = threading.Thread(target=terminate, daemon=True)
    killer.start()
    try:
        assert main(["upscale", str(many), "--out", str(out), "--model", model, "--steps", "4"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted; the same command continues where it stopped" in capsys.readouterr().err
    assert_continues(many, out, model, tmp_path)


class Command:
    """`deedsr upscale` as a process of its own."""

    def __init__(self, *words: str):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "deedsr", "upscale", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            # Tests that a shell runs in the background have SIGINT ignored, and what they start would too.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def interrupt(self, number: int, out: Path) -> str:
        """Sends a signal after the first result; what the command said to it."""
        while not whole(out) and self.process.poll() is None:
            time.sleep(0.02)
        self.process.send_signal(number)
        said = self.process.communicate(timeout=60)[1]
        assert self.process.returncode == 130, said
        return said


@pytest.mark.soak
@pytest.mark.parametrize("more", [[], ["--ray"]], ids=["here", "cluster"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_process_leaves_whole_results_and_continues(many, model, tmp_path, number, more):
    out = tmp_path / "out"
    said = Command(str(many), "--out", str(out), "--model", model, "--steps", "4", *more).interrupt(number, out)
    assert "interrupted; the same command continues where it stopped" in said
    assert "Traceback" not in said
    assert_continues(many, out, model, tmp_path)


def assert_continues(many: Path, out: Path, model: str, work: Path) -> None:
    done = written(out)
    assert 1 <= len(done) < len(list(many.iterdir()))
    assert len(done) == len(whole(out))
    for name in done:
        Image.open(out / name).load()
    assert run([many], out, model, steps=4).reused == len(done)
    run([many], work / "undisturbed", model, steps=4)
    assert contents(out) == contents(work / "undisturbed")


def whole(out: Path) -> list[Path]:
    """Results that are there, without what is still being written."""
    return list(out.glob("[!.]*"))


def contents(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in written(out)}


@pytest.mark.soak
def test_a_cluster_makes_the_same_bytes_also_when_a_worker_is_killed(ray_cluster, many, model, tmp_path):
    (many / "empty.png").write_bytes(b"")
    odd = os.fsdecode(b"caf\xe9 [1]\n.png")  # no Unicode, as names of files may be
    (many / odd).write_bytes((many / "00.png").read_bytes())
    out, killed = tmp_path / "out", []

    def kill() -> None:
        while not whole(out):
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            if not killed and "_Actor" in process.name() + "".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    result = run([many], out, model, steps=20, ray=True, workers=2)
    killer.join()
    assert killed
    assert [Path(failure["input"]).name for failure in result.failed] == ["empty.png"]
    names = [f"{number:02}.png" for number in range(8)]
    assert [Path(image["input"]).name for image in result.images] == [*names, odd]
    run([many], tmp_path / "plain", model, steps=20)
    assert contents(out) == contents(tmp_path / "plain")


@pytest.mark.parametrize("lacking", ["input", "out"])
def test_a_worker_that_has_other_disks_than_the_command_is_named_and_writes_nothing(folder, model, tmp_path, lacking):
    out = open_storage(str(tmp_path / "out"))
    found = Model.find(model)
    options = UpscaleOptions(input=[str(folder)], out=out.uri, model=model)
    work = Upscaler(options, "cpu", found, found.description.sampling, out, sentinel=".here")
    source = Input(open_storage(str(folder)), "a.png", "a.png")
    if lacking == "input":
        out.write(".here", b"")
        source = source._replace(storage=open_storage(str(tmp_path / "elsewhere")))
    with pytest.raises(UsageError) as error:
        work(source)
    place = tmp_path / ("elsewhere" if lacking == "input" else "out")
    assert str(error.value).startswith(f"on {socket.gethostname()}: {place} is missing, or another folder than")
    assert "give folders that all nodes share, or s3:// locations" in str(error.value)
    assert whole(tmp_path / "out") == []


def test_what_cannot_begin_is_refused_before_any_work(folder, model, tmp_path):
    (tmp_path / "bare").mkdir()
    for message, inputs, options in (
        ("missing.png does not exist", [folder, tmp_path / "missing.png"], {}),
        ("has no picture to upscale", [tmp_path / "bare"], {}),
        ("has no picture to upscale", [f"{tmp_path}/*.bmp"], {}),
        ("color_fix must be one of", [folder], {"color_fix": "sepia"}),
        ("no model folder", [folder], {"model": str(tmp_path / "nowhere")}),
        ("--quality must be 1 to 100, got 101", [folder], {"quality": 101}),
        ("--workers 2 is for --ray", [folder], {"workers": 2}),
    ):
        with pytest.raises(UsageError, match=message):
            run(inputs, tmp_path / "out", **{"model": model} | options)
    with pytest.raises(UsageError, match="part of that path is a file"):
        run([folder], folder / "a.png", model)
    assert not (tmp_path / "out").exists()
