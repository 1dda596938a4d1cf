"""Pictures and metrics written out plainly, independent of `deedsr.metrics`: one loop for each sum of a definition.

The pictures are made by integer arithmetic, so that they are the same everywhere.
"""

import math

import numpy as np
from scipy.special import gamma


def made_picture(seed: int, side: int = 512) -> np.ndarray:
    """A uint8 RGB picture with edges, fine grain, gradients and a flat area."""
    rng = np.random.Generator(np.random.PCG64(seed))
    picture = np.zeros((side, side, 3), np.int64)
    for cell, weight in ((64, 3), (16, 2), (4, 2), (1, 1)):
        cells = rng.integers(0, 256, (side // cell, side // cell, 3))
        picture += weight * np.kron(cells, np.ones((cell, cell, 1), np.int64))
    picture = picture // 8 + np.arange(side)[:, None, None] // 16
    picture[: side // 4, : side // 4] = (90, 140, 201)
    return np.clip(picture, 0, 255).astype(np.uint8)


def softened(picture: np.ndarray) -> np.ndarray:
    """The mean of each pixel and its right, lower and lower right neighbour."""
    wide = picture.astype(np.int64)
    total = wide + np.roll(wide, -1, 0) + np.roll(wide, -1, 1) + np.roll(wide, (-1, -1), (0, 1))
    return (total // 4).astype(np.uint8)


def y_of(picture: np.ndarray) -> np.ndarray:
    red, green, blue = (picture[..., i].astype(float) / 255 for i in range(3))
    return 16 + 65.481 * red + 128.553 * green + 24.966 * blue


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(1 / (((y_of(picture) - y_of(reference)) ** 2).mean() / 255**2 + 1e-8))


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    x, y = (np.rint(y_of(p)) for p in (picture, reference))
    rows, columns = x.shape[0] - 10, x.shape[1] - 10
    offsets = [(i, j, math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / (2 * 1.5**2))) for i in range(11) for j in range(11)]
    total = sum(weight for *_, weight in offsets)
    sums = {name: np.zeros((rows, columns)) for name in ("x", "y", "xx", "yy", "xy")}
    for i, j, weight in offsets:
        a, b = x[i : i + rows, j : j + columns], y[i : i + rows, j : j + columns]
        for name, values in {"x": a, "y": b, "xx": a * a, "yy": b * b, "xy": a * b}.items():
            sums[name] += weight / total * values
    variance = sums["xx"] - sums["x"] ** 2 + sums["yy"] - sums["y"] ** 2
    covariance = sums["xy"] - sums["x"] * sums["y"]
    structure = (2 * covariance + 58.5225) / (variance + 58.5225)
    luminance = (2 * sums["x"] * sums["y"] + 6.5025) / (sums["x"] ** 2 + sums["y"] ** 2 + 6.5025)
    return float((luminance * np.where(structure < 0, 0, structure)).mean())


def niqe(picture: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """`mean` (36,), `covariance` (36, 36): of pristine photographs."""
    total = np.zeros(picture.shape[:2])
    for i, weight in enumerate((0.299, 0.587, 0.114)):
        total += float(np.float32(weight)) * (picture[..., i].astype(np.float32) / np.float32(255)).astype(float)
    y = np.rint(total.astype(np.float32) * np.float32(255)).astype(float)
    rows, columns = y.shape[0] // 96, y.shape[1] // 96
    y = y[: 96 * rows, : 96 * columns]
    blocks: list[list[float]] = [[] for _ in range(rows * columns)]
    for side in (96, 48):
        z = normalised(y)
        for number in range(rows * columns):
            top, left = side * (number // columns), side * (number % columns)
            blocks[number] += block_features(z[top : top + side, left : left + side])
        y = half(y)
    features = np.array(blocks)
    off = mean - np.nanmean(features, 0)
    whole = features[~np.isnan(features).any(1)]
    deviations = whole - whole.mean(0)
    pooled = (covariance + deviations.T @ deviations / (len(whole) - 1)) / 2
    return math.sqrt(off @ np.linalg.pinv(pooled) @ off)


def normalised(y: np.ndarray) -> np.ndarray:
    window = np.array([[math.exp(-(i * i + j * j) / (2 * (7 / 6) ** 2)) for j in range(-3, 4)] for i in range(-3, 4)])
    window = (window / window.sum()).astype(np.float32).astype(float)
    padded = np.pad(y, 3, mode="edge")
    mean, square = np.zeros_like(y), np.zeros_like(y)
    for i in range(7):
        for j in range(7):
            part = padded[i : i + y.shape[0], j : j + y.shape[1]]
            mean += window[i, j] * part
            square += window[i, j] * part**2
    return (y - mean) / (np.sqrt(np.abs(square - mean**2)) + 1)


def half(y: np.ndarray) -> np.ndarray:
    """MATLAB's bicubic imresize by 1/2, rows first."""
    taps = []
    for number in range(8):
        x = abs(number - 3.5) / 2
        taps.append(1.5 * x**3 - 2.5 * x**2 + 1 if x <= 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2)
    for _ in range(2):
        padded = np.pad(y, ((3, 4), (0, 0)), mode="symmetric")
        y = sum(tap / sum(taps) * padded[number::2][: y.shape[0] // 2] for number, tap in enumerate(taps)).T
    return y


def block_features(z: np.ndarray) -> list[float]:
    shape, left, right = fitted(z)
    features = [shape, (left + right) / 2]
    for down, across in ((0, 1), (1, 0), (1, 1), (1, -1)):
        shape, left, right = fitted(z * np.roll(z, (down, across), (0, 1)))
        features += [shape, (right - left) * gamma(2 / shape) / gamma(1 / shape), left, right]
    return features


def fitted(z: np.ndarray) -> tuple[float, float, float]:
    """Asymmetric generalised Gaussian by moments: shape, left and right scale."""
    left, right = (math.sqrt((z[side] ** 2).mean()) if side.any() else math.nan for side in (z < 0, z > 0))
    skew = left / right
    ratio = np.abs(z).mean() ** 2 / (z**2).mean() * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes = np.arange(0.2, 10.001, 0.001)
    shape = shapes[np.abs(gamma(2 / shapes) ** 2 / (gamma(1 / shapes) * gamma(3 / shapes)) - ratio).argmin()]
    scale = math.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return float(shape), left * scale, right * scale
