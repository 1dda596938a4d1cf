"""What `tiny`'s pictures are trained on is what `upscale` samples: see jobs/tiny_pictures.py."""

import torch
from small_networks import make_pipeline

from deedsr.sampling.latents import encode_latents, enlarge
from jobs.tiny_pictures import Sampler


def test_training_follows_the_pipelines_own_sampling():
    pipeline = make_pipeline(num_inference_steps=8, noise_guidance_share=0.6, eta=0.0, color_fix="none")
    lr = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    sampled = pipeline(lr, generator=[torch.Generator().manual_seed(7)], output_type="latent").images
    with torch.no_grad():
        z_lr = encode_latents(pipeline.vae, 2 * enlarge(lr, 4) - 1)
        vector = pipeline.learner(lr)
    draw = torch.Generator().manual_seed(7)
    _, noise = (torch.randn(z_lr.shape, generator=draw) for _ in range(2))  # the first is the VAE's
    sampler = Sampler(pipeline)
    times = sampler.times(sampler.share)
    assert len(times) == 3  # of eight steps five are guided
    ours = sampler.latent(z_lr, vector, noise, times)
    torch.testing.assert_close(ours.detach(), sampled.float(), rtol=1e-4, atol=1e-4)
    assert sampler.latent(z_lr, vector, noise, times[:1]).sub(ours).abs().max() > 1e-2
    ours.square().sum().backward()
    assert all(p.grad is None for p in pipeline.unet.parameters() if not p.requires_grad)
    assert any(p.grad is not None and p.grad.any() for p in pipeline.adapter.parameters())
