"""Pictures side by side."""

import cv2
import numpy as np


def strip(lr: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """One picture: the LR with its pixels as squares, then the others, which have one size."""
    squares = cv2.resize(lr, others[0].shape[1::-1], interpolation=cv2.INTER_NEAREST)
    return np.concatenate([squares, *others], axis=1)
