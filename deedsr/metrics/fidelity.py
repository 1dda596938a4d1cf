"""Full-reference metrics on the Y channel: PSNR and SSIM."""

import math

import numpy as np

from deedsr.metrics.luma import luma

SSIM_WINDOW = 11  # side of the Gaussian window, sigma 1.5 (Wang et al. 2004)


def _pair(image: np.ndarray, reference: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    if image.shape != reference.shape:
        raise ValueError(f"image and reference differ in size: {image.shape} and {reference.shape}")
    return luma(image, border), luma(reference, border)


def psnr_y(image: np.ndarray, reference: np.ndarray, border: int) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 RGB images (H, W, 3) on BT.601 Y; infinite for equal images.

    `border` pixels on each side are left out (the scale factor, as the field does). Peak value 255.
    """
    y, y_reference = _pair(image, reference, border)
    mean_square = float(np.mean((y - y_reference) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf


def ssim_y(image: np.ndarray, reference: np.ndarray, border: int) -> float:
    """Structural similarity (-1..1) of two uint8 RGB images (H, W, 3) on BT.601 Y.

    Wang et al. 2004 as scikit-image computes it: Gaussian window of 11 pixels with sigma 1.5, population
    covariance, data range 255, averaged where the window lies inside. Libraries differ in these choices by up to
    0.15 on one pair: compare only figures of the same definition.
    """
    from skimage.metrics import structural_similarity

    y, y_reference = _pair(image, reference, border)
    if min(y.shape) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM needs {SSIM_WINDOW} pixels a side inside the border of {border}, got an image of "
            f"{image.shape[0]}x{image.shape[1]}"
        )
    return float(
        structural_similarity(
            y,
            y_reference,
            data_range=255,
            win_size=SSIM_WINDOW,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
