"""NIQE: how far an image's local statistics are from those of natural photographs (Mittal et al. 2013).

Two definitions, whose figures are not comparable: `niqe`, one fit for each picture, as published tables have it; and
`niqe_set`, one fit over the blocks of many pictures, for crops too small for a fit of their own.

Letters: N blocks, S side of a block, F features of a block (18 at each of two scales).
The parameter file `niqe_parameters.npz` holds the multivariate Gaussian fitted by the authors to pristine
photographs, and the 7x7 window (sigma 7/6) of the local mean.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import as_file, files

import numpy as np
from scipy.ndimage import correlate, correlate1d
from scipy.special import gamma

from deedsr.metrics.fidelity import grey, luma
from deedsr.metrics.metric import Metric

__all__ = ["BLOCK", "METRICS", "MIN_SIDE", "niqe", "niqe_features", "niqe_of_features", "niqe_set"]

BLOCK = 96  # pixels a side; the second scale has the same blocks at half the size
MIN_SIDE = 512  # pixels: a smaller picture has too few blocks for its own fit
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))  # (down, right) shifts whose products are fitted


@cache
def _parameters() -> dict[str, np.ndarray]:
    with as_file(files("deedsr.metrics") / "niqe_parameters.npz") as path, np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


@cache
def _shape_table() -> tuple[np.ndarray, np.ndarray]:
    """Candidate shapes of a generalised Gaussian and their ratio (E|x|)^2 / E x^2, increasing in the shape."""
    shapes = np.arange(0.2, 10.001, 0.001)
    return shapes, gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes))


def _fit_asymmetric_gaussian(x_NSS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moment fit of an asymmetric generalised Gaussian to each block: shape, left scale, right scale, each (N,)."""
    square_NSS = x_NSS**2
    left_N, right_N = (np.sqrt((square_NSS * side).sum((1, 2)) / side.sum((1, 2))) for side in (x_NSS < 0, x_NSS > 0))
    skew_N = left_N / right_N
    ratio_N = np.abs(x_NSS).mean((1, 2)) ** 2 / square_NSS.mean((1, 2))
    ratio_N = ratio_N * (skew_N**3 + 1) * (skew_N + 1) / (skew_N**2 + 1) ** 2

    shapes, ratios = _shape_table()
    above_N = np.clip(np.searchsorted(ratios, ratio_N), 1, len(shapes) - 1)
    nearest_N = above_N - (ratio_N - ratios[above_N - 1] < ratios[above_N] - ratio_N)
    nearest_N[np.isnan(ratio_N)] = 0  # of a flat block, as in the authors' program
    shape_N = shapes[nearest_N]
    to_scale_N = np.sqrt(gamma(1 / shape_N) / gamma(3 / shape_N))
    return shape_N, left_N * to_scale_N, right_N * to_scale_N


def _block_features(x_NSS: np.ndarray) -> np.ndarray:
    """The 18 features of each block of normalised luma, (N, 18)."""
    shape_N, left_N, right_N = _fit_asymmetric_gaussian(x_NSS)
    columns = [shape_N, (left_N + right_N) / 2]
    for shift in _NEIGHBOURS:
        shape_N, left_N, right_N = _fit_asymmetric_gaussian(x_NSS * np.roll(x_NSS, shift, axis=(1, 2)))
        mean_N = (right_N - left_N) * gamma(2 / shape_N) / gamma(1 / shape_N)
        columns += [shape_N, mean_N, left_N, right_N]
    return np.stack(columns, axis=1)


def _normalise(y: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Luma minus its local mean, over its local deviation."""
    mean = correlate(y, window, mode="nearest")
    deviation = np.sqrt(np.abs(correlate(y**2, window, mode="nearest") - mean**2))
    return (y - mean) / (deviation + 1)


def _half_size(y: np.ndarray) -> np.ndarray:
    """MATLAB's antialiased bicubic imresize by 1/2: eight taps at every second pixel, edges mirrored."""
    x = np.abs(np.arange(-3.5, 4)) / 2
    taps = np.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    taps /= taps.sum()
    for axis in (0, 1):
        # an even window is centred right of its middle; origin -1 puts the taps at 2i-3 .. 2i+4
        y = correlate1d(y, taps, axis=axis, mode="reflect", origin=-1).take(np.arange(0, y.shape[axis], 2), axis)
    return y


def _features(y: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Of integer luma (H, W): 36 numbers of each whole block, (N, 36); some are NaN in blocks without variation."""
    rows, columns = (side // BLOCK for side in y.shape)
    if not rows or not columns:
        return np.empty((0, 36))
    y = y[: rows * BLOCK, : columns * BLOCK]
    scales = []
    for side in (BLOCK, BLOCK // 2):
        blocks = _normalise(y, window).reshape(rows, side, columns, side).swapaxes(1, 2).reshape(-1, side, side)
        with np.errstate(divide="ignore", invalid="ignore"):
            scales.append(_block_features(blocks))
        y = _half_size(y)
    return np.concatenate(scales, axis=1)


def niqe_of_features(features_NF: np.ndarray) -> float:
    """NIQE from the features of all blocks, of one image or of many. Raises ValueError for fewer than two blocks.

    As in the authors' program, blocks with a NaN count in the mean by their other features, and not in the covariance.
    """
    textured_NF = _textured(features_NF)
    if len(textured_NF) < 2:
        raise ValueError(
            f"NIQE needs two blocks of {BLOCK}x{BLOCK} pixels with texture, found {len(textured_NF)}: "
            "give larger images, or more of them"
        )
    parameters = _parameters()
    difference_F = parameters["mu_pris_param"][0] - np.nanmean(features_NF, axis=0)
    covariance_FF = (parameters["cov_pris_param"] + np.cov(textured_NF, rowvar=False)) / 2
    return float(np.sqrt(difference_F @ np.linalg.pinv(covariance_FF) @ difference_F))


def _textured(features_NF: np.ndarray) -> np.ndarray:
    """Features of the blocks with variation."""
    return features_NF[np.isfinite(features_NF).all(axis=1)]


def niqe(image: np.ndarray) -> float:
    """NIQE of one uint8 RGB image (H, W, 3), as published tables have it. Lower is more natural.

    A sharp photograph has 2.6 to 5, a bicubic enlargement by 4 has 7 to 10. Grain and over-sharpening lower it too.
    Below `MIN_SIDE` pixels a side the fit has too few blocks to mean much. Raises ValueError for fewer than two.
    """
    return niqe_of_features(_picture_features(image))


def _picture_features(image: np.ndarray) -> np.ndarray:
    """Features of one image for `niqe`, (N, 36)."""
    # In flat areas the sign of (luma - local mean) follows from the window's rounding to float32, and with it the fit.
    window = _parameters()["gaussian_window"].astype(np.float32).astype(np.float64)
    return _features(np.round(grey(image)), window)


def niqe_features(image: np.ndarray) -> np.ndarray:
    """Features of a uint8 RGB image (H, W, 3) for `niqe_set`: 36 numbers per whole block of 96 x 96 pixels, (N, 36).

    Blocks without variation are left out, so N may be 0.
    """
    return _textured(_features(np.round(luma(image)), _parameters()["gaussian_window"]))


def niqe_set(images: Iterable[np.ndarray]) -> float:
    """NIQE of a set of uint8 RGB images (H, W, 3): one fit over the blocks of all of them. Lower is more natural.

    For crops of 256 pixels, each too small for its own fit.
    Raises ValueError where fewer than two blocks of 96 x 96 pixels with texture are found.
    """
    return niqe_of_features(np.concatenate([np.empty((0, 36)), *map(niqe_features, images)]))


class NIQE(Metric):
    name, title = "niqe", "NIQE"
    definition = (
        "border 0, luma .299 R + .587 G + .114 B rounded to integers, blocks of 96 px, one fit for each picture of 512 "
        "px a side or more, mean over pictures"
    )
    source = "Mittal et al. 2013, as IQA-PyTorch's niqe"
    higher_is_better = False
    needs_reference = False

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float | None:
        features_NF = _picture_features(picture) if min(picture.shape[:2]) >= MIN_SIDE else np.empty((0, 36))
        return niqe_of_features(features_NF) if len(_textured(features_NF)) >= 2 else None  # fewer: it is flat


class SetNIQE(Metric):
    name, title = "niqe_set", "NIQE of the set"
    definition = "border 0, Y of BT.601 (16 to 235) rounded to integers, blocks of 96 px, one fit over all pictures"
    source = "Mittal et al. 2013; this project's own form for small crops"
    higher_is_better = False
    needs_reference = False
    of_pictures = False

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        return niqe_features(picture)

    def summary(self, measured: Sequence[np.ndarray]) -> float | None:
        features_NF = np.concatenate(measured)
        return niqe_of_features(features_NF) if len(features_NF) >= 2 else None  # fewer: the pictures are flat


METRICS = (NIQE, SetNIQE)
