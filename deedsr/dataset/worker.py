"""What a process that makes samples sets up first."""

import cv2
import numpy as np

__all__ = ["prepare_worker"]

_BLOCK = 31 << 20  # glibc learns from blocks of up to 32 MiB


def prepare_worker() -> None:
    """One thread for OpenCV, and memory that stays with the process.

    By default glibc returns every freed image to the kernel, and the page faults of the next one cost as much as a
    blur. It stops once a block of that size has been freed (mallopt(3), M_MMAP_THRESHOLD); others ignore it.
    """
    cv2.setNumThreads(1)
    np.empty(_BLOCK, np.uint8)
