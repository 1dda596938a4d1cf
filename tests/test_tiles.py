"""Claims about pictures sampled in tiles, on small networks with random weights and on the shipped photographs."""

import cv2
import numpy as np
import pytest
import torch
from small_networks import make_pipeline
from torch import nn

from deedsr.metrics.seams import seam_energy
from deedsr.sampling import images
from deedsr.sampling.color_fix import COLOR_FIXES, fix_color
from deedsr.sampling.images import pad_reflect, to_uint8
from deedsr.sampling.latents import decode_latents, encode_latents, enlarge, enlarge_window
from deedsr.sampling.pipeline import DeeDSRPipeline
from deedsr.sampling.tiled_vae import decode_in_tiles, encode_in_tiles, reach
from deedsr.sampling.tiles import Mosaic, Window, adjoining, spread


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipe() -> DeeDSRPipeline:
    return make_pipeline(num_inference_steps=3)


@pytest.fixture(scope="module")
def lr(photos) -> np.ndarray:
    image = cv2.cvtColor(cv2.imread(str(photos / "validation" / "Green-Maple.jpg")), cv2.COLOR_BGR2RGB)
    return cv2.resize(image, (64, 36), interpolation=cv2.INTER_AREA)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_tiles_cover_every_size_on_the_units_grid_with_weights_that_sum_to_one(multiple):
    for units in (1, 2, 3, 5, 8, 13, 31, 64):
        for side in (2, 3, 4, 7, 16):
            height, width = units * multiple, 5 * multiple
            mosaic = Mosaic(height, width, side * multiple, multiple)
            total = torch.zeros(1, height, width)
            for number, window in enumerate(mosaic.windows):
                assert window.top % multiple == window.left % multiple == 0
                assert (window.bottom - window.top, window.right - window.left) == (mosaic.height, mosaic.width)
                mosaic.add(total, number, torch.ones(1, mosaic.height, mosaic.width))
            torch.testing.assert_close(total, torch.ones_like(total))
            assert (len(mosaic) == 1) == (units <= side and side >= 5)


def test_weights_fall_smoothly_to_nothing_where_a_tile_ends_inside_the_picture():
    mosaic = Mosaic(64, 64, 32, 2)
    for number, window in enumerate(mosaic.windows):
        weights = torch.zeros(1, 64, 64)
        mosaic.add(weights, number, torch.ones(1, 32, 32))
        inside = window.of(weights)[0]
        if window.top:
            assert inside[0].max() < 0.05
        if window.bottom < 64:
            assert inside[-1].max() < 0.05
        assert inside.diff(dim=0).abs().max() < 0.25


def test_adjoining_windows_cover_each_cell_once_and_spread_ones_reach_the_corners():
    for height, width, side in ((7, 5, 3), (6, 6, 6), (1, 9, 2)):
        count = torch.zeros(height, width)
        for window in adjoining(height, width, side):
            window.of(count).add_(1)
        assert count.eq(1).all()
        windows = spread(height, width, side, 4)
        assert len(windows) == 16
        assert (windows[0].top, windows[0].left, windows[-1].bottom, windows[-1].right) == (0, 0, height, width)


def test_a_window_of_the_enlarged_picture_is_cut_from_the_whole_that_is_never_made(lr):
    x = as_tensor(lr)
    whole = pad_reflect(enlarge(x, 4), 160, 272)
    for window in (Window(0, 160, 0, 272), Window(3, 41, 7, 90), Window(100, 160, 200, 272), Window(150, 151, 0, 1)):
        assert torch.equal(enlarge_window(x, 4, window), window.of(whole))
    thin = as_tensor(lr[:1])
    assert torch.equal(enlarge_window(thin, 4, Window(0, 16, 8, 24)), pad_reflect(enlarge(thin, 4), 16, 256)[..., 8:24])


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_colours_corrected_in_strips_are_those_of_the_whole(method, monkeypatch):
    image, reference = (torch.rand(2, 3, 150, 20, generator=seeded(seed)) for seed in (1, 2))
    whole, parts = image.clone(), image.clone()
    fix_color(method, whole, lambda rows: reference[:, :, rows])
    for rows in (1, 7, 40):
        parts.copy_(image)
        monkeypatch.setattr(images, "STRIP", rows * 20)
        fix_color(method, parts, lambda rows: reference[:, :, rows])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(to_uint8(image[0]), (image[0] * 255).round().permute(1, 2, 0))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_the_halo_is_what_the_convolutions_see_and_no_less(kind):
    """Reach by reading the layers, against a change of one cell or pixel followed through the network."""
    vae = make_pipeline(kind).vae
    for norm in [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]:
        norm.forward = lambda x: x  # would carry any change everywhere
    for attention in [module for module in vae.modules() if hasattr(module, "to_q")]:
        attention.forward = lambda x, **_: x
    factor, cells = {"kl": 2, "tiny": 4}[kind], 81
    for part, step, channels, side in (("encoder", 1 / factor, 3, cells * factor), ("decoder", 1, 4, cells)):
        network = getattr(vae, part).double()
        x = torch.randn(1, channels, side, side, generator=seeded(), dtype=torch.float64)
        changed = x.clone()
        middle = cells // 2 * (factor if part == "encoder" else 1)
        changed[:, :, middle, middle] += 1
        difference = (network(x) - network(changed)).abs().sum((0, 1, 2)).nonzero().flatten()
        per_cell = 1 if part == "encoder" else factor
        seen = max(cells // 2 - int(difference.min()) // per_cell, int(difference.max()) // per_cell - cells // 2)
        assert seen <= reach(network, step) <= seen + 2


@torch.no_grad()
def test_the_tiny_autoencoder_in_tiles_is_that_of_the_whole_picture(lr):
    vae = make_pipeline("tiny").vae
    x = pad_reflect(2 * enlarge(as_tensor(lr), 4) - 1, 144, 256)
    z = encode_latents(vae, x)
    tiled = encode_in_tiles(vae, lambda window: window.of(x), torch.zeros_like(z), 10)
    torch.testing.assert_close(tiled, z, atol=1e-5, rtol=0)
    picture = torch.full_like(x, torch.nan)
    for window, piece in decode_in_tiles(vae, z, 10):
        window.of(picture).copy_(piece)
    torch.testing.assert_close(picture, decode_latents(vae, z), atol=1e-5, rtol=0)


@torch.no_grad()
def test_normalisation_does_not_drift_between_tiles_of_the_kl_autoencoder():
    """One half of the picture dark and flat, the other bright and noisy: their own statistics are far apart."""
    vae = make_pipeline("kl").vae
    x = torch.cat([torch.full((1, 3, 128, 64), -0.8), torch.rand(1, 3, 128, 64, generator=seeded())], 3)
    z = encode_latents(vae, x)
    whole = decode_latents(vae, z)

    def errors() -> list[float]:
        tiled = encode_in_tiles(vae, lambda window: window.of(x), torch.zeros_like(z), 32)
        picture = torch.empty_like(whole)
        for window, piece in decode_in_tiles(vae, z, 32):
            window.of(picture).copy_(piece)
        return [float((a - b).square().mean().sqrt() / b.std()) for a, b in ((tiled, z), (picture, whole))]

    shared = errors()
    for norm in [module for module in vae.modules() if isinstance(module, nn.GroupNorm)]:
        norm.register_forward_hook = lambda hook: norm.register_forward_pre_hook(lambda *_: None)  # each its own
    alone = errors()
    assert max(shared) < 0.1
    assert all(a > 3 * s for a, s in zip(alone, shared, strict=True))
