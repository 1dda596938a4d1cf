"""The learned boxes of the method, transcribed from docs/method.md in plain numpy: one sample, one loop at a time.

Shares nothing with `deedsr`; weights come by their names in the state dict. Images are (C, H, W), all in float64.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def inside(weights: Weights, name: str) -> Weights:
    """Weights of the part called `name`."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}


def correlate(plane: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """One plane with one kernel of odd size; zeros outside."""
    height, width = plane.shape
    reach = len(kernel) // 2
    result = np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        result[y, x] += plane[y + dy, x + dx] * kernel[dy + reach, dx + reach]
    return result


def convolution(image: np.ndarray, weights: Weights) -> np.ndarray:
    planes = [
        sum(correlate(plane, kernel) for plane, kernel in zip(image, kernels, strict=True)) + bias
        for kernels, bias in zip(weights["weight"], weights["bias"], strict=True)
    ]
    return np.stack(planes)


def two_layers(vector: np.ndarray, weights: Weights) -> np.ndarray:
    return weights["2.weight"] @ silu(weights["0.weight"] @ vector)


def da_convolution(image: np.ndarray, view: np.ndarray, weights: Weights) -> np.ndarray:
    """Conv1x1(SiLU(depthwise(x; K(v)))) + x * 2 sigmoid(gate(v))."""
    kernels = two_layers(view, inside(weights, "kernels")).reshape(len(image), 3, 3)
    gates = 2 / (1 + np.exp(-two_layers(view, inside(weights, "attention"))))
    filtered = np.stack([correlate(plane, kernel) for plane, kernel in zip(image, kernels, strict=True)])
    return convolution(silu(filtered), inside(weights, "mix")) + gates[:, None, None] * image


def da_group(image: np.ndarray, vector: np.ndarray, weights: Weights) -> np.ndarray:
    """Two DA convolutions, a 3x3 convolution behind each, and one at the end, added to the input."""
    view = silu(weights["view.weight"] @ vector)
    h = silu(da_convolution(image, view, inside(weights, "block.aware1")))
    h = silu(convolution(h, inside(weights, "block.conv1")))
    h = silu(da_convolution(h, view, inside(weights, "block.aware2")))
    h = convolution(h, inside(weights, "block.conv2"))
    return image + convolution(h, inside(weights, "conv"))


def modulation(image: np.ndarray, feature: np.ndarray, weights: Weights) -> np.ndarray:
    """h (1 + gamma) + beta."""
    shared = np.maximum(convolution(feature, inside(weights, "shared")), 0)
    gamma, beta = (convolution(shared, inside(weights, name)) for name in ("gamma", "beta"))
    return image * (1 + gamma) + beta


class Contrast:
    """A queue of the newest `size` keys with the photograph and the degradation group of each; group None = alone."""

    def __init__(self, size: int, temperature: float, block: int):
        self.size, self.temperature, self.block = size, temperature, block
        self.queue: list[tuple[np.ndarray, int, int | None]] = []

    def loss(self, queries, keys, photographs, groups) -> float:
        """InfoNCE, mean over the samples; the other samples of a block are negatives too."""
        losses = []
        for i, (query, photograph, group) in enumerate(zip(queries, photographs, groups, strict=True)):
            negatives = [key for key, p, g in self.queue if p != photograph and (g is None or g != group)]
            first = i - i % self.block
            for j in range(first, first + self.block):
                if j != i and (group is None or groups[j] != group):
                    negatives.append(keys[j])
            scores = [query @ key / self.temperature for key in (keys[i], *negatives)]
            losses.append(math.log(sum(math.exp(score - scores[0]) for score in scores)))
        return sum(losses) / len(losses)

    def advance(self, keys, photographs, groups) -> None:
        self.queue = [*self.queue, *zip(keys, photographs, groups, strict=True)][-self.size :]
