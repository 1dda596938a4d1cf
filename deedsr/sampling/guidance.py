"""Noise guidance: in the first sampling steps the predicted clean latent is pulled to the LR latent.

The paper replaces it wholly in the very first step; here strength and number of steps are free, and every scheduler
that knows `alphas_cumprod` works, whatever its UNet predicts. The algebra is `deedsr.adapter.objective`'s, with x_t as
the UNet sees it (after `scale_model_input`).
"""

from typing import Any

import torch

from deedsr.errors import UsageError


def guidance_strengths(strength: float, share: float, steps: int) -> list[float]:
    """Strength of each of `steps` sampling steps: `strength` in the first `share` of them and always in the first."""
    guided = max(1, round(share * steps))
    return [strength if step < guided else 0.0 for step in range(steps)]


def alpha_bar(scheduler: Any, t: torch.Tensor) -> torch.Tensor:
    """Share of signal power in a noisy latent at timestep t.

    Raises UsageError for schedulers of another family (flow matching).
    """
    if not hasattr(scheduler, "alphas_cumprod"):
        raise UsageError(
            f"noise guidance needs a scheduler with alphas_cumprod, {type(scheduler).__name__} has none: "
            "use a DDIM-like scheduler or noise guidance 0"
        )
    return scheduler.alphas_cumprod[int(t.round())].to(torch.float32)
