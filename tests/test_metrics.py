"""Claims about the metrics without weights, on the shipped photographs and on pictures made by integer arithmetic."""

import importlib
import sys

import cv2
import numpy as np
import plain_metrics
import pytest
from packages import install
from plain_metrics import made_picture, softened

from deedsr.errors import DeeDSRError, UsageError
from deedsr.metrics import niqe, niqe_set, psnr_y, registry, ssim_y
from deedsr.metrics.fidelity import luma
from deedsr.metrics.metric import Setting
from deedsr.metrics.niqe import _half_size, _parameters
from jobs import cli


def read(path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def bicubic_from_quarter(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    low = cv2.resize(image, (width // 4, height // 4), interpolation=cv2.INTER_AREA)
    return cv2.resize(low, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def sharp(photos) -> np.ndarray:
    return read(photos / "validation" / "Green-Maple.jpg")[200:712, 500:1012]


def test_luma_is_matlabs():
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours)[0], [16, 235, 81.481, 144.553, 40.966], atol=1e-9)


# Of plain_metrics, on softened(made_picture(n)), softened twice, and the negative against made_picture(n).
WRITTEN_DOWN = {
    (1, "softened"): (30.5982373100, 0.8044661318, 10.4167462616),
    (1, "twice"): (27.5941444318, 0.6371839063, 16.5669009030),
    (1, "negative"): (13.1197033000, 0.0575419987, 10.3484203984),
    (2, "softened"): (30.6553005285, 0.8043634270, 10.9800893637),
}


def changed(reference: np.ndarray, how: str) -> np.ndarray:
    soft = softened(reference)
    return {"softened": soft, "twice": softened(soft), "negative": 255 - reference}[how]


@pytest.mark.parametrize(("seed", "how"), WRITTEN_DOWN)
def test_psnr_ssim_and_niqe_are_those_of_the_definition_written_out(seed, how):
    reference = made_picture(seed)
    picture = changed(reference, how)
    found = psnr_y(picture, reference), ssim_y(picture, reference), niqe(picture)
    assert found == pytest.approx(WRITTEN_DOWN[seed, how], abs=2e-6)


def test_the_figures_written_down_are_those_of_the_plain_transcription():
    reference = made_picture(1)
    picture = changed(reference, "softened")
    pristine = _parameters()["mu_pris_param"][0], _parameters()["cov_pris_param"]
    found = plain_metrics.psnr(picture, reference), plain_metrics.ssim(picture, reference)
    assert (*found, plain_metrics.niqe(picture, *pristine)) == pytest.approx(WRITTEN_DOWN[1, "softened"], abs=1e-8)


def test_psnr_of_noise_of_known_strength(sharp):
    noise = np.random.default_rng(0).choice([-8, 8], sharp.shape[:2])
    image = np.clip(sharp.astype(int), 8, 247)
    noisy = (image + noise[..., None]).astype(np.uint8)
    # a grey step of 8 is a luma step of 8 * 219 / 255
    step = 8 * 219 / 255
    assert psnr_y(noisy, image.astype(np.uint8)) == pytest.approx(-10 * np.log10((step / 255) ** 2 + 1e-8), abs=1e-9)
    assert psnr_y(sharp, sharp) == pytest.approx(80)


def test_a_border_is_left_out_only_where_it_is_asked_for(sharp):
    framed = sharp.copy()
    framed[:4] = framed[-4:] = 0
    framed[:, :4] = framed[:, -4:] = 0
    for name, equal in {"psnr": 80, "ssim": 1}.items():
        bordered, whole = (registry.find(name, Setting(border=border)) for border in (4, 0))
        assert bordered.measure(framed, sharp) == pytest.approx(equal)
        assert registry.find(name, Setting(border=3)).measure(framed, sharp) < 40
        assert whole.measure(framed, sharp) == registry.find(name).measure(framed, sharp) < 0.999 * equal
        assert "border 4" in bordered.statement()
        assert "border 0" in whole.statement()


def test_ssim_is_one_for_itself_and_falls_with_blur(sharp):
    assert ssim_y(sharp, sharp) == pytest.approx(1)
    weak, strong = (cv2.GaussianBlur(sharp, (0, 0), sigma) for sigma in (1, 3))
    assert 1 > ssim_y(weak, sharp) > ssim_y(strong, sharp) > 0


def test_half_size_keeps_straight_lines_and_the_grid():
    ramp = np.tile(np.arange(96.0), (96, 1))
    for image in (_half_size(ramp), _half_size(ramp.T).T):
        np.testing.assert_allclose(image[:, 4:-4], np.tile(np.arange(48) * 2 + 0.5, (48, 1))[:, 4:-4])


def test_niqe_tells_photographs_from_their_bicubic_enlargement(photos):
    for name in ("Green-Maple.jpg", "Picture_0B.jpg", "Sea-of-Lanterns.jpg", "libjxl-flower.jpg"):
        image = read(photos / "validation" / name)
        image = image[: image.shape[0] // 4 * 4]
        assert 2.6 < niqe(image) < 5
        assert 7 < niqe(bicubic_from_quarter(image)) < 10


def test_niqe_of_a_set_is_one_fit_over_all_crops(sharp):
    crops = [sharp[top : top + 192, left : left + 192] for top in (0, 192) for left in (0, 192)]
    together, singles = niqe_set(crops), [niqe(crop) for crop in crops]
    assert together == pytest.approx(niqe(sharp[:384, :384]), rel=0.1)
    assert together < min(singles)


def test_niqe_of_small_and_of_flat_pictures_is_not_told(sharp):
    one, of_a_set = registry.find("niqe"), registry.find("niqe_set")
    flat = np.full((512, 512, 3), 128, np.uint8)
    assert one.measure(sharp, None) == niqe(sharp)
    assert one.measure(sharp[:511], None) is None
    assert one.measure(flat, None) is None
    assert one.summary([3.0, 5.0]) == 4.0
    assert one.summary([3.0, None]) is None
    crops = [sharp[:192, :192], sharp[192:384, 192:384]]
    assert of_a_set.summary([of_a_set.measure(crop, None) for crop in crops]) == niqe_set(crops)
    assert of_a_set.summary([of_a_set.measure(flat, None)]) is None


def test_metrics_refuse_what_they_cannot_measure(sharp):
    with pytest.raises(ValueError, match="differ in size"):
        psnr_y(sharp[:-1], sharp)
    with pytest.raises(ValueError, match="uint8 RGB"):
        psnr_y(sharp / 255, sharp / 255)
    with pytest.raises(ValueError, match="nothing inside"):
        psnr_y(sharp[:8], sharp[:8], 4)
    with pytest.raises(ValueError, match="SSIM needs 11"):
        ssim_y(sharp[:18], sharp[:18], 4)
    with pytest.raises(ValueError, match="uint8 RGB"):
        registry.find("niqe").measure(sharp / 255, None)
    with pytest.raises(ValueError, match="NIQE needs two blocks"):
        niqe(sharp[:96, :96])
    with pytest.raises(ValueError, match="with texture, found 0"):
        niqe(np.full((512, 512, 3), 128, np.uint8))


# --- the registry ------------------------------------------------------------------------------------------------


def test_every_metric_says_in_one_line_what_it_is_and_the_help_shows_it(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert {*registry.WITHOUT_WEIGHTS, "lpips", "dists", "fid"} <= set(registry.known())
    for name in registry.known():
        metric = registry.find(name)
        line = metric.statement()
        assert "\n" not in line
        assert line.startswith("border 0, ")
        assert f"{'higher' if metric.higher_is_better else 'lower'} is better; {metric.source}" in line
        assert [row for row in shown if row.split()[:1] == [name] and row.endswith(line)]
    # A picture nearer to the reference, or sharper, has the better figure.
    reference = made_picture(1)
    for name in registry.WITHOUT_WEIGHTS:
        metric = registry.find(name)
        better, worse = (
            metric.summary([metric.measure(changed(reference, how), reference)]) for how in ("softened", "twice")
        )
        assert (better > worse) == metric.higher_is_better


SHARPNESS = """
import numpy as np
from deedsr.metrics.metric import Metric

class Sharpness(Metric):
    name, title = "sharpness", "Sharpness"
    definition, source = "border 0, mean step between neighbours of all channels, mean over pictures", "a test"
    higher_is_better = True
    needs_reference = False

    def measure(self, picture, reference):
        return float(np.abs(np.diff(picture.astype(float), axis=1)).mean())

def provider(name, setting):
    if name == "nothing":
        return None
    if name != "steps":
        raise ValueError(f"there is only steps, not {name}")
    return Sharpness(setting)

METRICS = (Sharpness,)
"""


def test_a_new_metric_is_one_file(tmp_path, monkeypatch, sharp):
    (tmp_path / "sharpness.py").write_text(SHARPNESS)
    package = importlib.import_module("deedsr.metrics")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "deedsr.metrics.sharpness", raising=False)
    registry.known.cache_clear()
    try:
        assert registry.find("sharpness").measure(sharp, None) > 1
        assert "sharpness" in registry.described()
    finally:
        registry.known.cache_clear()
        sys.modules.pop("deedsr.metrics.sharpness", None)
        vars(package).pop("sharpness", None)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = set(sys.modules)
    yield lambda *package: install(tmp_path, *package)
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def test_a_package_adds_metrics_through_an_entry_point(installed, sharp):
    points = "[deedsr.metrics]\nsharp = sharp_metrics:provider\ngone = sharp_metrics_gone:provider\n"
    installed("sharp_metrics", SHARPNESS, points)
    metric = registry.find("sharp:steps")
    assert metric.measure(sharp, None) == registry.find("sharp:steps").measure(sharp, None) > 1
    assert "sharp:NAME" in registry.described()
    for name, message in {
        "sharp:other": "sharp:other: there is only steps, not other",
        "sharp:nothing": "is no metric",
        "gone:steps": "cannot be imported: No module named 'sharp_metrics_gone'",
        "blunt:steps": "no package here offers the metrics blunt:.*sharp:NAME",
    }.items():
        with pytest.raises(UsageError, match=message):
            registry.find(name)


def test_a_metric_class_on_the_path_needs_no_entry_point(sharp):
    assert registry.find("deedsr.metrics.fidelity:PSNR").measure(sharp, sharp) == pytest.approx(80)
    for name, message in {
        "deedsr.metrics.fidelity:SHARPNESS": "cannot be loaded: AttributeError: .*SHARPNESS",
        "deedsr.metrics.fidelity:luma": "cannot be loaded: AttributeError",
        "deedsr.errors:UsageError": "is no metric: it gives UsageError",
        "deedsr.nothing:PSNR": "cannot be imported: No module named 'deedsr.nothing'",
    }.items():
        with pytest.raises(UsageError, match=message):
            registry.find(name)


PYIQA = """
class Blockiness:
    metric_mode, lower_better = "FR", True

    def __call__(self, picture, reference):
        assert picture.shape == reference.shape == (1, 3, 512, 512)
        return (picture - reference).abs().mean()

def list_models():
    return ["blocks", "fid", "heavy"]

def create_metric(name, device):
    if name == "heavy":
        raise OSError("cannot download")
    return Blockiness()
"""
PIQ = """
def haarpsi(x, y):
    return 1 - (x - y).abs().mean()

class CLIPIQA:
    def to(self, device):
        return self

    def __call__(self, x):
        raise RuntimeError("no weights")
"""


def test_metrics_of_pyiqa_and_piq_are_taken_where_they_are_installed(installed, sharp):
    for package in ("pyiqa", "piq"):
        with pytest.raises(UsageError, match=f"{package}:x needs the package {package}.*install it yourself"):
            registry.find(f"{package}:x")
    installed("pyiqa", PYIQA)
    installed("piq", PIQ)
    darker = sharp // 2
    distance = np.abs(sharp.astype(float) - darker).mean() / 255
    blocks, haar = registry.find("pyiqa:blocks"), registry.find("piq:haarpsi")
    assert blocks.measure(darker, sharp) == pytest.approx(distance, rel=1e-5)
    assert haar.measure(darker, sharp) == pytest.approx(1 - distance, rel=1e-5)
    assert (blocks.higher_is_better, haar.higher_is_better, blocks.needs_reference) == (False, True, True)
    assert "blocks with the defaults of pyiqa 1.5" in blocks.statement()
    assert not registry.find("piq:clip_iqa").needs_reference
    with pytest.raises(DeeDSRError, match="piq:clip_iqa failed: RuntimeError: no weights"):
        registry.find("piq:clip_iqa").measure(sharp, None)
    for name, message in {
        "pyiqa:fid": "no metric 'fid' of single pictures; it has blocks, fid",
        "pyiqa:x": "no metric 'x'",
        "pyiqa:heavy": "pyiqa:heavy cannot be loaded: OSError: cannot download",
        "piq:x": "unknown metric piq:x: there are brisque",
        "x": "unknown metric 'x': there are .*psnr",
    }.items():
        with pytest.raises(UsageError, match=message):
            registry.find(name)
