"""Claims about the metrics, on the shipped photographs."""

import cv2
import numpy as np
import pytest

from deedsr.metrics import niqe, niqe_set, psnr_y, ssim_y
from deedsr.metrics.luma import luma
from deedsr.metrics.niqe import _half_size


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


def test_psnr_of_noise_of_known_strength(sharp):
    noise = np.random.default_rng(0).choice([-8, 8], sharp.shape[:2])
    image = np.clip(sharp.astype(int), 8, 247)
    noisy = (image + noise[..., None]).astype(np.uint8)
    # a grey step of 8 is a luma step of 8 * 219 / 255
    assert psnr_y(noisy, image.astype(np.uint8), 4) == pytest.approx(20 * np.log10(255 / (8 * 219 / 255)), abs=1e-9)
    assert psnr_y(sharp, sharp, 4) == np.inf


def test_border_is_left_out(sharp):
    framed = sharp.copy()
    framed[:4] = framed[-4:] = 0
    framed[:, :4] = framed[:, -4:] = 0
    assert psnr_y(framed, sharp, 4) == np.inf
    assert psnr_y(framed, sharp, 3) < 40


def test_ssim_is_one_for_itself_and_falls_with_blur(sharp):
    assert ssim_y(sharp, sharp, 4) == pytest.approx(1)
    weak, strong = (cv2.GaussianBlur(sharp, (0, 0), sigma) for sigma in (1, 3))
    assert 1 > ssim_y(weak, sharp, 4) > ssim_y(strong, sharp, 4) > 0


def test_ssim_follows_wang_2004(sharp):
    """The definition written out: Gaussian moments where the 11x11 window lies inside."""
    blurred = cv2.GaussianBlur(sharp, (0, 0), 2)
    x, y = luma(blurred, 4), luma(sharp, 4)
    taps = cv2.getGaussianKernel(11, 1.5)
    mean = lambda z: cv2.sepFilter2D(z, -1, taps, taps)[5:-5, 5:-5]
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    assert ssim_y(blurred, sharp, 4) == pytest.approx(ssim.mean(), abs=1e-6)


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


def test_metrics_refuse_what_they_cannot_measure(sharp):
    with pytest.raises(ValueError, match="differ in size"):
        psnr_y(sharp[:-1], sharp, 4)
    with pytest.raises(ValueError, match="uint8 RGB"):
        psnr_y(sharp / 255, sharp / 255, 4)
    with pytest.raises(ValueError, match="nothing inside"):
        psnr_y(sharp[:8], sharp[:8], 4)
    with pytest.raises(ValueError, match="SSIM needs 11"):
        ssim_y(sharp[:18], sharp[:18], 4)
    with pytest.raises(ValueError, match="NIQE needs two blocks"):
        niqe(sharp[:96, :96])
    with pytest.raises(ValueError, match="with texture, found 0"):
        niqe(np.full((512, 512, 3), 128, np.uint8))
