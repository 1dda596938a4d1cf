"""Claims about pictures sampled in tiles, on small networks with random weights and on the shipped photographs."""

from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from small_networks import make_pipeline
from torch import nn

from benchmarks.seams import seam_energy
from deedsr.adapter.objective import clean_latent
from deedsr.hub.settings import COLOR_FIXES
from deedsr.sampling import autoencoder, images, pipeline
from deedsr.sampling.autoencoder import (
    cores,
    decode_in_tiles,
    decode_latents,
    encode_in_tiles,
    encode_latents,
    receptive_radius,
    sampled_windows,
)
from deedsr.sampling.color_fix import fix_color
from deedsr.sampling.images import enlarge, enlarge_window, to_uint8
from deedsr.sampling.pipeline import DeeDSRPipeline
from deedsr.sampling.tiles import Mosaic, Window


@pytest.fixture(scope="module")
def pipe() -> DeeDSRPipeline:
    return make_pipeline(num_inference_steps=3)


def pad_reflect(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    missing = ((0, 0), (0, 0), (0, height - x.shape[2]), (0, width - x.shape[3]))
    return torch.from_numpy(np.pad(x.numpy(), missing, mode="reflect"))


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
        for window in cores(height, width, side):
            window.of(count).add_(1)
        assert count.eq(1).all()
        windows = sampled_windows(height, width, side, 4)
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
    factor, cells = {"kl": 2, "tiny": 4}[kind], 33
    for part, step, channels, side in (("encoder", 1 / factor, 3, cells * factor), ("decoder", 1, 4, cells)):
        network = getattr(vae, part).double()
        x = torch.randn(1, channels, side, side, generator=seeded(), dtype=torch.float64)
        changed = x.clone()
        middle = cells // 2 * (factor if part == "encoder" else 1)
        changed[:, :, middle, middle] += 1
        difference = (network(x) - network(changed)).abs().sum((0, 1, 2)).nonzero().flatten()
        per_cell = 1 if part == "encoder" else factor
        seen = max(cells // 2 - int(difference.min()) // per_cell, int(difference.max()) // per_cell - cells // 2)
        assert seen <= receptive_radius(network, step) <= seen + 2


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
def test_normalisation_does_not_drift_between_tiles_of_the_kl_autoencoder(monkeypatch):
    """One half of the picture dark and flat, the other bright and noisy: their own statistics are far apart."""
    vae = make_pipeline("kl").vae
    for name, parameter in vae.named_parameters():  # as in a trained one, what residual branches add is small
        if ".conv2." in name or "to_out" in name:
            parameter.mul_(0.3)
    x = torch.cat([torch.full((1, 3, 128, 96), -0.8), torch.rand(1, 3, 128, 96, generator=seeded())], 3)
    z = encode_latents(vae, x)
    whole = decode_latents(vae, z)

    def errors() -> tuple[float, float]:
        tiled = encode_in_tiles(vae, lambda window: window.of(x), torch.zeros_like(z), 32)
        picture = torch.empty_like(whole)
        for window, piece in decode_in_tiles(vae, z, 32):
            window.of(picture).copy_(piece)
        encoding, decoding = (
            float((a - b).square().mean().sqrt() / b.std()) for a, b in ((tiled, z), (picture, whole))
        )
        return encoding, decoding

    shared = errors()
    monkeypatch.setattr(autoencoder, "shared_statistics", lambda *_: nullcontext())
    alone = errors()
    assert shared[0] < alone[0] / 2
    assert shared[1] < alone[1]


@torch.no_grad()
def test_statistics_of_tiles_in_half_precision_are_kept_in_fp32():
    """Activations around 300: their variance is beyond what fp16 holds."""
    norm = torch.nn.GroupNorm(2, 4).half()
    x = (300 * torch.randn(1, 4, 64, 64, generator=seeded())).half()
    expected = torch.nn.functional.group_norm(x.float(), 2)
    windows = lambda: cores(64, 64, 32)
    with autoencoder.shared_statistics(norm, 64, 64, 32, 0, lambda some: norm(torch.cat([w.of(x) for w in some]))):
        for window in windows():
            torch.testing.assert_close(norm(window.of(x)).float(), window.of(expected), atol=0.05, rtol=0.05)


def sampled(pipe: DeeDSRPipeline, picture: np.ndarray, tile: int, **options) -> torch.Tensor:
    return pipe(picture, tile=tile, generator=seeded(), output_type="pt", **options).images[0]


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_without_the_unet_tiles_change_nothing(pipe, lr, method):
    options = {"noise_guidance": 1.0, "noise_guidance_share": 1.0, "color_fix": method}
    whole, tiled = (sampled(pipe, lr[:29, :61], tile, **options) for tile in (0, 64))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


def test_a_picture_that_fits_one_tile_is_sampled_as_a_whole_to_the_last_bit(pipe, lr):
    assert torch.equal(sampled(pipe, lr[:30, :32], 128), sampled(pipe, lr[:30, :32], 0))
    assert not torch.equal(sampled(pipe, lr[:30, :33], 128), sampled(pipe, lr[:30, :33], 0))


def test_every_tile_is_denoised_before_a_step_is_taken_and_few_at_once(pipe, lr, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_SIDE", 128)  # four tiles of 64 pixels
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((int(args[1][0]), len(args[0]))))
    sampled(pipe, lr[:32, :48], 64, noise_guidance=0.0)
    hook.remove()
    tiles = len(Mosaic(32, 48, 16, 2))
    assert [t for t, _ in seen] == sorted((t for t, _ in seen), reverse=True)
    assert max(count for _, count in seen) == 4
    for t in {t for t, _ in seen}:
        assert sum(count for when, count in seen if when == t) == tiles
    assert tiles == 3 * 4


@pytest.mark.parametrize(("kind", "sides"), [("kl", (32, 48)), ("tiny", (56, 72))])
def test_what_the_networks_work_on_at_once_does_not_grow_with_the_picture(kind, sides, monkeypatch):
    """Beside the learner, which sees the LR as it is; `benchmarks.tile_memory` measures the bytes."""
    monkeypatch.setattr(pipeline, "BATCH_SIDE", 64)
    pipe = make_pipeline(kind, num_inference_steps=1, noise_guidance=0.0)
    largest = {}
    for part in (pipe.unet, pipe.adapter.condition_encoder, pipe.vae.encoder, pipe.vae.decoder):
        part.register_forward_pre_hook(
            lambda module, args: largest.update({module: max(args[0].numel(), largest.get(module, 0))})
        )
    found = []
    for side in sides:
        largest.clear()
        sampled(pipe, np.zeros((side, side, 3), np.uint8), 64)
        found.append(dict(largest))
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_tiles_of_several_pictures_go_through_the_unet_together_and_stay_apart(pipe, lr):
    pictures = [lr[:20, :20], lr[10:30, 30:50]]
    together = pipe(pictures, tile=64, generator=seeded(), output_type="pt").images
    for picture, one in zip(together, pictures, strict=True):
        torch.testing.assert_close(picture, sampled(pipe, one, 64), atol=1e-4, rtol=0)


def test_tiles_see_the_noise_of_the_whole_picture(lr):
    """A UNet that answers with what it was given: then tiles that share their noise cannot differ from the whole."""
    pipe = make_pipeline(num_inference_steps=4, noise_guidance=0.0)
    pipe.adapter.forward = lambda x_t, t, z_lr, degradation: x_t + 0.1 * z_lr
    whole, tiled = (sampled(pipe, lr, tile, eta=1.0) for tile in (0, 64))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_tiles_come_close_to_the_whole_picture(kind, lr):
    """The random UNet is the worst case: nothing taught it that far places matter little."""
    pipe = make_pipeline(kind, num_inference_steps=3, color_fix="none")
    crop = lr[:24, :32]
    whole, tiled = (sampled(pipe, crop, tile) for tile in (0, 64))
    other = pipe(crop, tile=0, color_fix="none", generator=seeded(1), output_type="pt").images[0]
    difference = lambda a, b: float((a - b).square().mean().sqrt())
    assert difference(tiled, whole) < difference(other, whole) / 3


def test_the_learner_looks_at_the_picture_once_or_at_each_tile_if_asked(pipe, lr):
    half = lr[:32, :48].copy()
    half[:, 24:] = np.random.default_rng(0).integers(0, 256, half[:, 24:].shape, dtype=np.uint8)
    seen = []
    hook = pipe.learner.register_forward_hook(lambda module, args, vector: seen.append((args[0].shape, vector)))
    per_picture = sampled(pipe, half, 64)
    assert [shape[2:] for shape, _ in seen] == [(32, 48)]
    seen.clear()
    per_tile = sampled(pipe, half, 64, degradation_per_tile=True)
    hook.remove()
    assert [shape[2:] for shape, _ in seen] == [(16, 16)] * 12
    assert not torch.allclose(seen[0][1], seen[3][1], atol=1e-3)
    assert not torch.allclose(per_tile, per_picture, atol=1e-3)


@pytest.mark.parametrize("rest", range(0, 64, 4))
def test_every_remainder_of_64_comes_out_right_in_tiles(pipe, lr, rest):
    height, width = (64 + rest) // 4, (128 + (7 * rest) % 64) // 4
    picture = sampled(pipe, lr[:height, :width], 64, num_inference_steps=1, noise_guidance=0.0)
    assert picture.shape == (3, 4 * height, 4 * width)
    assert picture.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2048), (2048, 1)])
def test_a_line_of_pixels_is_a_picture_too(pipe, shape):
    line = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    picture = sampled(pipe, line, 512, num_inference_steps=1, noise_guidance=0.0)
    assert picture.shape == (3, 4 * shape[0], 4 * shape[1])


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_either_solver_samples_in_tiles_and_returns_the_lr_where_it_is_guided_throughout(pipe, lr, solver):
    options = {"noise_guidance": 1.0, "noise_guidance_share": 1.0, "color_fix": "none", "eta": 0.0, "solver": solver}
    picture = sampled(pipe, lr[:30, :40], 64, num_inference_steps=10, **options)
    x = enlarge(as_tensor(lr[:30, :40]), 4)
    with torch.no_grad():
        expected = decode_latents(pipe.vae, encode_latents(pipe.vae, 2 * x - 1))[0] / 2 + 0.5
    torch.testing.assert_close(picture, expected.clamp(0, 1), atol=0.02, rtol=0)


@pytest.mark.parametrize(("eta", "draws"), [(0.0, 2), (1.0, 7)])
def test_the_dpm_solver_draws_noise_where_eta_asks_for_it(pipe, lr, eta, draws):
    generator, expected = seeded(), seeded()
    pipe(lr[:8, :8], generator=generator, solver="dpm", num_inference_steps=5, eta=eta)
    for _ in range(draws):  # of the posterior, of the start, and of each step
        torch.randn(4, 8, 8, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


def test_a_multistep_solver_starts_anew_where_guidance_ends(lr):
    """The first answer of the UNet after guided steps stands alone: a step of first order, which is DDIM's."""
    pipe = make_pipeline(num_inference_steps=6, noise_guidance_share=0.5, eta=0.0, solver="dpm")
    asked = []
    hook = pipe.adapter.register_forward_hook(lambda module, args, output: asked.append((*args[:2], output)))
    pipe(lr[:8, :8], generator=seeded())
    hook.remove()

    def by_first_order(call: int) -> torch.Tensor:
        (x, t, output), t_next = asked[call], asked[call + 1][1]
        abar, abar_next = (pipe.scheduler.alphas_cumprod[int(at)] for at in (t, t_next))
        x_0 = clean_latent(output, x, abar, "v_prediction")
        return abar_next.sqrt() * x_0 + (1 - abar_next).sqrt() * (x - abar.sqrt() * x_0) / (1 - abar).sqrt()

    torch.testing.assert_close(asked[1][0], by_first_order(0), atol=1e-3, rtol=0)
    assert not torch.allclose(asked[2][0], by_first_order(1), atol=1e-2)


def test_the_dpm_solver_takes_the_place_of_the_pipelines_scheduler_for_one_call_only(pipe, lr):
    own, steps = pipe.scheduler, []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: steps.append(int(args[1][0])))
    dpm = sampled(pipe, lr[:8, :8], 0, solver="dpm", num_inference_steps=5, noise_guidance=0.0)
    ddim = sampled(pipe, lr[:8, :8], 0, num_inference_steps=5, noise_guidance=0.0)
    hook.remove()
    assert pipe.scheduler is own
    assert len(steps) == 10
    assert steps[:5] != steps[5:]
    assert not torch.allclose(dpm, ddim, atol=1e-3)


def test_tiles_of_the_shipped_model_leave_no_seams(photos):
    """Three steps of which the UNet takes two: where tiles do not overlap, gradients across borders are half as high
    again. `benchmarks.seams` is the large version."""
    shipped = DeeDSRPipeline.from_pretrained("tiny")
    shipped.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 3, "noise_guidance_share": 0.0}
    at = [4 * end for window in Mosaic(32, 32, 16, 4).windows for end in (window.top, window.bottom)]
    ratios = []
    for seed, path in enumerate(sorted((photos / "validation").glob("*.jpg"))[:4]):
        photo = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        lr = cv2.resize(photo[:256, :256], (32, 32), interpolation=cv2.INTER_AREA)
        whole, tiled = (
            seam_energy(np.asarray(shipped(lr, tile=tile, generator=seeded(seed), **options).images[0]), at, at)
            for tile in (0, 64)
        )
        ratios.append(tiled / whole)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


def test_seam_energy_tells_a_step_at_a_border_from_none():
    image = np.random.default_rng(0).integers(100, 120, (64, 64, 3), dtype=np.uint8)
    assert seam_energy(image, [16, 32], [48]) == pytest.approx(1, abs=0.15)
    assert seam_energy(image, [0, 64], [30]) == seam_energy(image, [], [30])  # the picture's own borders are none
    stepped = image.copy()
    stepped[:, 32:] += 40
    assert seam_energy(stepped, [], [32]) > 4
    with pytest.raises(ValueError, match="none of the borders"):
        seam_energy(image, [0], [64])
