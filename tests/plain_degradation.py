"""The degradation chain written down step by step, without any thought of speed: what the package's chain is held to.

Kernels at 21x21 by inverse covariance matrices, `cv2.filter2D` in float32, torch's `F.interpolate`, numpy's exact
samplers. The noise fields are other ones than the package's, from the same seeds.
"""

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F


def kernel_21(kernel, size, sigma_x=1.0, sigma_y=1.0, theta=0.0, beta=1.0, cutoff=1.0):
    half = size // 2
    place = np.stack(np.meshgrid(np.arange(size) - half, np.arange(size) - half), -1)
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    distance = np.einsum("yxi,ij,yxj->yx", place, inverse, place)
    if kernel == "sinc":
        radius = np.hypot(place[..., 0], place[..., 1])
        radius[half, half] = 1e-6
        inner = cutoff * bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    elif kernel.startswith("plateau"):
        inner = 1 / (distance**beta + 1)
    else:
        inner = np.exp(-0.5 * distance**beta)
    return np.pad(inner / inner.sum(), (21 - size) // 2)


def bessel_j1(x):
    """From its integral over a period; the trapezoidal rule converges as soon as there are more nodes than |x|."""
    angle = np.arange(96) * (2 * math.pi / 96)
    return np.cos(angle - x[..., None] * np.sin(angle)).mean(-1)


def degrade(hr, draws, clock=None):
    """`clock(step)` is a context manager around each step, for the benchmark."""
    image = hr.astype(np.float32)
    for step in draws["steps"]:
        if clock is None:
            image = apply(image, **step)
        else:
            with clock(step["step"]):
                image = apply(image, **step)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def apply(image, step, **parameters):
    if step in ("blur1", "blur2", "sinc"):
        return cv2.filter2D(image, -1, kernel_21(**parameters).astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    if step == "resize1":
        return interpolate(image, parameters["mode"], scale_factor=parameters["factor"])
    if step in ("resize2", "resize3"):
        return interpolate(image, parameters["mode"], size=tuple(parameters["size"]))
    if step in ("noise1", "noise2"):
        return np.clip(image + noise(image, **parameters), 0, 255).astype(np.float32)
    encoded = cv2.imencode(
        ".jpg", np.clip(np.rint(image), 0, 255).astype(np.uint8)[..., ::-1], [1, parameters["quality"]]
    )
    return cv2.imdecode(encoded[1], cv2.IMREAD_COLOR)[..., ::-1].astype(np.float32)


def interpolate(image, mode, **target):
    x_BCHW = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    aligned = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x_BCHW, mode=mode, **target, **aligned)[0].permute(1, 2, 0).numpy().copy()


def noise(image, family, gray, seed, sigma=0.0, scale=0.0):
    rng = np.random.default_rng(seed)
    if family == "gaussian":
        return sigma * rng.standard_normal(image.shape[:2] + ((1,) if gray else (3,)), dtype=np.float32)
    if gray:
        image = image @ np.array([[0.299], [0.587], [0.114]], np.float32)
    level = np.clip(np.rint(image), 0, 255)
    photons = 2 ** math.ceil(math.log2(len(np.unique(level))))
    return scale * (rng.poisson(level / 255 * photons) / photons * 255 - level)
