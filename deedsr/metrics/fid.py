"""FID (Heusel et al. 2017) as clean-fid computes it (Parmar et al. 2022): two sets of pictures, not pairs.

Letters: N pictures, F features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from deedsr.metrics.learned import LearnedMetric

if TYPE_CHECKING:
    from deedsr.metrics.networks import PublishedNetwork

__all__ = ["FID", "METRICS", "frechet_distance"]


def frechet_distance(x_NF: np.ndarray, y_NF: np.ndarray) -> float:
    """Distance of the Gaussians fitted to two sets of features: |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)).

    Of the root only the trace is needed: with A = X'X and B = Y'Y it is the sum of the singular values of X Y', which
    holds for covariances of any rank. Raises ValueError for fewer than two pictures in a set.
    """
    if min(len(x_NF), len(y_NF)) < 2:
        raise ValueError(f"FID needs two pictures in each set, got {len(x_NF)} and {len(y_NF)}")
    (x_mean, x_root), (y_mean, y_root) = (_mean_and_root(features_NF) for features_NF in (x_NF, y_NF))
    cross = np.linalg.svd(x_root @ y_root.T, compute_uv=False).sum()
    return float(np.sum((x_mean - y_mean) ** 2) + np.sum(x_root**2) + np.sum(y_root**2) - 2 * cross)


def _mean_and_root(features_NF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of features, and a matrix X with the covariance X'X."""
    features_NF = features_NF.astype(np.float64)
    mean_F = features_NF.mean(axis=0)
    centred_NF = (features_NF - mean_F) / np.sqrt(len(features_NF) - 1)
    if centred_NF.shape[0] <= centred_NF.shape[1]:
        return mean_F, centred_NF
    return mean_F, np.linalg.qr(centred_NF).R  # smaller, with the same covariance


class FID(LearnedMetric):
    name, title = "fid", "FID"
    definition = "border 0, Inception v3 of 2015-12-05, RGB at 299x299 by Pillow's bicubic, not rounded, over two sets"
    source = "Heusel et al. 2017, clean-fid 0.1.35 in its mode clean"
    of_pictures = False

    def network(self) -> "PublishedNetwork":
        from deedsr.metrics.networks import InceptionV3

        return InceptionV3()

    def features(self, picture: np.ndarray) -> np.ndarray:
        """2,048 features of a uint8 RGB picture (H, W, 3)."""
        import torch

        x_BCHW = torch.from_numpy(resized(picture)).permute(2, 0, 1)[None].to(self.setting.device)
        return self.compute((x_BCHW - 128) / 128)[0].cpu().numpy()

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        """Features of the picture and of its reference, (2, F)."""
        assert reference is not None
        return np.stack([self.features(picture), self.features(reference)])

    def summary(self, measured: Sequence[np.ndarray]) -> float | None:
        pictures_NF, references_NF = np.stack(measured, axis=1)
        return frechet_distance(pictures_NF, references_NF) if len(measured) >= 2 else None


def resized(picture: np.ndarray) -> np.ndarray:
    """A uint8 picture (H, W, 3) at the network's size, float32 in 0..255, each channel for itself."""
    from PIL import Image

    from deedsr.metrics.networks import SIDE

    channels = [
        Image.fromarray(channel.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for channel in np.moveaxis(picture, 2, 0)
    ]
    return np.stack([np.asarray(channel).clip(0, 255) for channel in channels], axis=2)


METRICS = (FID,)
