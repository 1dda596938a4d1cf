"""Claims about sampling, on small networks of the real classes with random weights and on the shipped photographs."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from PIL import Image
from small_networks import SCHEDULE, make_pipeline

from deedsr.adapter.objective import clean_latent, model_output
from deedsr.errors import UsageError
from deedsr.hub.settings import COLOR_FIXES, SamplingSettings
from deedsr.sampling.autoencoder import decode_latents, encode_latents
from deedsr.sampling.color_fix import fix_color
from deedsr.sampling.guidance import guidance_strengths
from deedsr.sampling.images import enlarge, mirrored, to_tensors
from deedsr.sampling.pipeline import DeeDSRPipeline


@pytest.fixture(scope="module")
def pipe() -> DeeDSRPipeline:
    return make_pipeline(num_inference_steps=4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(result) -> np.ndarray:
    return np.asarray(result.images[0]).astype(int)


def test_equal_seeds_give_equal_pictures_and_others_do_not(pipe, lr):
    first, again, other = (pixels(pipe(lr, generator=seeded(seed))) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_temperature_scales_the_first_noise_and_without_any_no_seed_matters(pipe, lr):
    started = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: started.append(args[0]))
    cold = [pixels(pipe(lr, generator=seeded(seed), temperature=0.0, eta=0.0)) for seed in (7, 8)]
    assert np.array_equal(*cold)
    started.clear()
    for temperature in (1.0, 0.25):
        pipe(lr, generator=seeded(7), temperature=temperature, noise_guidance=0.0, num_inference_steps=1)
    hook.remove()
    torch.testing.assert_close(started[1], 0.25 * started[0])


def test_a_second_call_with_the_same_generator_draws_anew(pipe, lr):
    generator = seeded()
    assert not np.array_equal(pixels(pipe(lr, generator=generator)), pixels(pipe(lr, generator=generator)))


def test_networks_are_offloaded_in_the_order_of_their_use_and_the_picture_stays(lr):
    """On a GPU only the network at work is there, and the adapter, which calls the UNet while it computes."""
    pipe = make_pipeline("kl")
    expected = pipe(lr, generator=seeded(0), num_inference_steps=2).images[0]
    pipe.enable_model_cpu_offload(device="cpu")
    assert [hook.model for hook in pipe._all_hooks] == [pipe.learner, pipe.unet, pipe.vae]
    assert not hasattr(pipe.adapter, "_hf_hook")
    again = pipe(lr, generator=seeded(0), num_inference_steps=2).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(expected))
    assert [hook.model for hook in pipe._all_hooks] == [pipe.learner, pipe.unet, pipe.vae]  # for the next call


def test_manual_seed_of_torch_is_followed_without_a_generator(pipe, lr):
    pictures = []
    for _ in range(2):
        torch.manual_seed(3)
        pictures.append(pixels(pipe(lr)))
    assert np.array_equal(*pictures)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_a_batch_of_several_sizes_equals_the_single_pictures(kind, lr):
    pipe = make_pipeline(kind, num_inference_steps=3)
    inputs = [lr[:20, :24], lr[10:27, 5:18], lr[30:50, 30:54]]  # first and last are sampled together
    batch = pipe(inputs, generator=seeded(), output_type="pt").images
    for picture, single_input in zip(batch, inputs, strict=True):
        single = pipe(single_input, generator=seeded(), output_type="pt").images[0]
        torch.testing.assert_close(picture, single, atol=1e-4, rtol=0)


def test_each_picture_may_have_its_own_generator(pipe, lr):
    batch = pipe([lr[:16, :16]] * 2, generator=[seeded(1), seeded(2)], output_type="pt").images
    single = pipe(lr[:16, :16], generator=seeded(2), output_type="pt").images[0]
    torch.testing.assert_close(batch[1], single, atol=1e-4, rtol=0)
    assert not torch.allclose(batch[0], batch[1])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 40), (8, 8), (13, 17), (33, 10)])
@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_any_size_comes_out_four_times_as_large(kind, size, lr):
    pipe = make_pipeline(kind, num_inference_steps=2)
    picture = pipe(np.ascontiguousarray(lr[: size[0], : size[1]]), generator=seeded()).images[0]
    assert picture.size == (4 * size[1], 4 * size[0])


def test_padding_mirrors_right_and_bottom_only_as_often_as_needed():
    for side in (2, 3):
        np.testing.assert_array_equal(mirrored(side, 0, 12), np.pad(np.arange(side), (0, 12 - side), mode="reflect"))
        assert mirrored(side, 0, side).tolist() == [*range(side)]
    assert mirrored(1, 0, 4).tolist() == [0] * 4


def test_padding_stops_at_the_next_whole_latent_cell_of_the_deepest_level(pipe, lr):
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[2:]))
    pipe(lr[:13, :16], num_inference_steps=2)  # 52 x 64 pixels, in multiples of 4 (autoencoder) x 2 (levels)
    hook.remove()
    assert seen == [(14, 16)]


def test_timesteps_of_fifty_steps_are_the_papers():
    scheduler = DDIMScheduler(**SCHEDULE)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.alphas_cumprod[[981, 961]].tolist() == pytest.approx([0.005776, 0.007282], abs=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_full_guidance_is_the_papers_first_step(prediction):
    """x = sqrt(a') z + sqrt(1 - a' - sigma^2) eps + sigma n with the eps that fits z, sigma = 0.4545."""
    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction)
    scheduler.set_timesteps(50)
    z, x_t = (torch.randn(1, 4, 8, 8, generator=seeded(seed)) for seed in (1, 2))
    a, a_prev = scheduler.alphas_cumprod[981], scheduler.alphas_cumprod[961]
    output = model_output(z, x_t, a, prediction)
    stepped = scheduler.step(output, 981, x_t, eta=1.0, generator=seeded(3)).prev_sample

    sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
    assert sigma == pytest.approx(0.4545, abs=5e-5)
    eps = (x_t - a.sqrt() * z) / (1 - a).sqrt()
    noise = torch.randn(z.shape, generator=seeded(3))
    expected = a_prev.sqrt() * z + (1 - a_prev - sigma**2).sqrt() * eps + sigma * noise
    torch.testing.assert_close(stepped, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_model_output_and_clean_latent_are_inverse(prediction):
    x_0, x_t = (torch.randn(2, 4, 8, 8, generator=seeded(seed), dtype=torch.float64) for seed in (1, 2))
    abar = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(clean_latent(model_output(x_0, x_t, abar, prediction), x_t, abar, prediction), x_0)


def test_guidance_acts_on_the_first_step_or_the_given_share():
    assert guidance_strengths(1.0, 0.0, 5) == [1, 0, 0, 0, 0]
    assert guidance_strengths(0.5, 0.4, 5) == [0.5, 0.5, 0, 0, 0]
    assert guidance_strengths(0.0, 1.0, 3) == [0, 0, 0]


def test_the_unet_is_not_asked_where_its_answer_would_be_thrown_away(pipe, lr):
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(args[1]))
    for guidance, share, expected in ((1.0, 0.0, 9), (1.0, 0.5, 5), (0.5, 0.5, 10), (0.0, 0.0, 10)):
        calls.clear()
        pipe(lr[:8, :8], num_inference_steps=10, noise_guidance=guidance, noise_guidance_share=share)
        assert len(calls) == expected
    hook.remove()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_guidance_in_every_step_returns_the_lr_latent_under_any_scheduler(pipe, lr, scheduler):
    own = pipe.scheduler
    pipe.scheduler = scheduler.from_config(own.config)
    crop = lr[:16, :16]
    options = {"num_inference_steps": 10, "color_fix": "none", "generator": seeded(), "output_type": "pt"}
    picture = pipe(crop, noise_guidance=1.0, noise_guidance_share=1.0, eta=0.0, **options).images
    pipe.scheduler = own

    x = enlarge(torch.from_numpy(crop).permute(2, 0, 1)[None] / 255, 4)
    with torch.no_grad():
        expected = decode_latents(pipe.vae, encode_latents(pipe.vae, 2 * x - 1)) / 2 + 0.5
    torch.testing.assert_close(picture, expected.clamp(0, 1), atol=0.02, rtol=0)


def test_stronger_guidance_brings_the_picture_closer_to_the_lr(pipe, lr):
    crop = lr[:24, :24]
    results = [
        pixels(pipe(crop, noise_guidance=strength, noise_guidance_share=1.0, generator=seeded()))
        for strength in (0.0, 0.5, 1.0)
    ]
    far, middle, near = (np.abs(result - results[2]).mean() for result in results)
    assert far > middle > near == 0


def test_what_the_model_recommends_holds_unless_overridden(lr):
    pipe = make_pipeline(num_inference_steps=3, color_fix="wavelet", noise_guidance_share=0.4)
    assert pipe.sampling == SamplingSettings(3, 1.0, 0.4, color_fix="wavelet")
    explicit = pipe(
        lr[:8, :8], num_inference_steps=3, color_fix="wavelet", noise_guidance_share=0.4, generator=seeded()
    )
    recommended = pipe(lr[:8, :8], generator=seeded())
    overridden = pipe(lr[:8, :8], color_fix="none", generator=seeded())
    assert np.array_equal(pixels(recommended), pixels(explicit))
    assert not np.array_equal(pixels(recommended), pixels(overridden))


def test_the_learner_sees_the_lr_as_it_is_and_once(pipe, lr):
    seen = []
    hook = pipe.learner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pipe(lr[:13, :11], num_inference_steps=3)
    hook.remove()
    assert len(seen) == 1
    torch.testing.assert_close(seen[0][0], torch.from_numpy(lr[:13, :11]).permute(2, 0, 1) / 255)


def test_the_picture_depends_on_the_degradation_vector(pipe, lr):
    before = pixels(pipe(lr[:16, :16], generator=seeded()))
    hook = pipe.learner.register_forward_hook(lambda module, args, vector: vector + 1)
    after = pixels(pipe(lr[:16, :16], generator=seeded()))
    hook.remove()
    assert not np.array_equal(before, after)


def test_pil_arrays_and_tensors_are_the_same_picture_and_pixels_are_rounded(pipe, lr):
    crop = np.ascontiguousarray(lr[:12, :12])
    tensor = torch.from_numpy(crop).permute(2, 0, 1) / 255
    floats = pipe(tensor, generator=seeded(), output_type="pt").images
    for given in (Image.fromarray(crop), crop, tensor[None], crop[None], [crop]):
        rounded = pixels(pipe(given, generator=seeded()))
        np.testing.assert_array_equal(rounded, (floats[0] * 255).round().permute(1, 2, 0))
    arrays = pipe(crop, generator=seeded(), output_type="np").images
    np.testing.assert_allclose(arrays, floats.permute(0, 2, 3, 1))


def test_deep_and_transparent_images_are_seen_as_they_are_shown(lr):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    [tensor] = to_tensors(Image.fromarray(deep))
    np.testing.assert_allclose(tensor, np.broadcast_to(deep / 65535, (3, 8, 8)), atol=1e-6)
    hole = Image.fromarray(np.dstack([lr, np.where(lr[..., :1] > 99, 255, 0)]).astype(np.uint8))
    palette = hole.convert("RGB").quantize(8)
    palette.info["transparency"] = 3
    for image in (hole, palette):
        shown = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")))
        np.testing.assert_array_equal(to_tensors(image)[0], to_tensors(shown[..., :3])[0])
    for mode in ("I", "F"):
        with pytest.raises(ValueError, match="have no known range"):
            to_tensors(Image.new(mode, (8, 8)))


def test_latents_are_what_the_decoder_makes_the_picture_of(pipe, lr):
    crop = np.ascontiguousarray(lr[:16, :16])
    latents = pipe(crop, generator=seeded(), output_type="latent").images
    picture = pipe(crop, generator=seeded(), color_fix="none", output_type="pt").images
    decoded = (decode_latents(pipe.vae, latents) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded[:, :, : picture.shape[2], : picture.shape[3]], picture)


@pytest.mark.parametrize("method", COLOR_FIXES)
def test_color_fixes_keep_the_size_and_match_each_picture_to_its_own_lr(method):
    image, reference = (torch.rand(2, 3, 20, 28, generator=seeded(seed)) for seed in (1, 2))
    reference = reference * 0.5 + torch.tensor([0.1, 0.4])[:, None, None, None]
    fixed, alone = image.clone(), image[1:].clone()
    fix_color(method, fixed, lambda rows: reference[:, :, rows])
    fix_color(method, alone, lambda rows: reference[1:, :, rows])
    torch.testing.assert_close(fixed[1:], alone)
    if method == "none":
        assert torch.equal(fixed, image)
        return
    torch.testing.assert_close(fixed.mean((2, 3)), reference.mean((2, 3)), atol=0.02, rtol=0)
    if method == "adain":
        torch.testing.assert_close(fixed.std((2, 3)), reference.std((2, 3)), atol=1e-3, rtol=0)
    else:  # detail stays the picture's
        step = lambda x: x[..., 1:] - x[..., :-1]
        torch.testing.assert_close(step(fixed), step(image), atol=0.02, rtol=0)


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_of_either_autoencoder_are_scaled_and_restored(kind, lr):
    vae = make_pipeline(kind).vae
    vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    x = torch.from_numpy(lr[:16, :16]).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        raw = vae.encode(x).latent_dist.mean if kind == "kl" else vae.encode(x).latents
        z = encode_latents(vae, x)
        torch.testing.assert_close(z, (raw - 0.25) * 0.5)
        torch.testing.assert_close(decode_latents(vae, z), vae.decode(raw).sample)
        noisy = encode_latents(vae, x, torch.ones_like(z))
    assert torch.equal(noisy, z) == (kind == "tiny")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps"),
        ({"noise_guidance": 1.5}, "noise_guidance must be a number from 0 to 1, got 1.5"),
        ({"noise_guidance_share": float("nan")}, "noise_guidance_share"),
        ({"eta": -1}, "eta"),
        ({"temperature": 1.1}, "temperature must be a number from 0 to 1, got 1.1"),
        ({"color_fix": "sepia"}, "color_fix must be one of none, adain, wavelet, got 'sepia'"),
        ({"solver": "euler"}, "solver must be one of ddim, dpm, got 'euler'"),
        ({"tile": -1}, "tile must be a whole number from 0"),
        ({"tile": 8}, "tile must be 16 pixels or more for this model, or 0 for none, got 8"),
        ({"degradation_per_tile": 1}, "degradation_per_tile must be true or false, got 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(pipe, lr, options, message):
    with pytest.raises(UsageError, match=message):
        pipe(lr, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degradation_per_tile": True, "tile": 0}, "degradation_per_tile True has no effect with tile 0"),
        ({"noise_guidance_share": 0.5, "noise_guidance": 0}, "noise_guidance_share 0.5 has no effect with noise_g"),
        ({"eta": 0.5, "solver": "dpm"}, "eta 0.5 has no effect with solver dpm, which has 0 and 1 alone"),
    ],
)
def test_a_setting_without_effect_beside_the_others_is_refused(options, message):
    recommended = SamplingSettings(noise_guidance_share=0.4, eta=0.5)
    with pytest.raises(UsageError, match=message):
        recommended.chosen(**options)
    for name, value in options.items():  # what the model recommends is no wish of the user's
        assert getattr(recommended.chosen(**{name: value}), name) == value


def test_inputs_that_are_no_pictures_are_refused(pipe, lr):
    for bad in ([], lr / 255, lr[..., :1], lr[:0], torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), torch.nan), "x"):
        with pytest.raises(ValueError):
            pipe(bad)
    with pytest.raises(ValueError, match="1 generators for 2 pictures"):
        pipe([lr, lr], generator=[seeded()])


def test_importing_the_pipeline_loads_neither_ray_nor_mlflow_nor_boto3():
    program = (
        "import sys, deedsr; assert 'torch' not in sys.modules; "
        "sys.modules['accelerate'] = None; "  # of an extra: diffusers imports it where it is, and it imports boto3
        "from deedsr import DeeDSRPipeline; "
        "print([name for name in ('ray', 'mlflow', 'boto3', 'pipelines', 'jobs') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
