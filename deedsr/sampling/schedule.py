"""Builds the sampling scheduler of a base and rejects incompatible noise schedules.

A noisy latent is x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps. A schedule rescaled to zero terminal SNR (Lin et al. 2023,
arXiv 2305.08891) ends at abar = 0. There a v prediction is -x_0 and a sample prediction x_0, but eps is x_t itself:
its prediction says nothing of x_0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deedsr.errors import UsageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# Share of signal power that counts as none. Stable Diffusion's schedule ends at 0.0047; where one ends at zero, some
# schedulers of diffusers put 2^-24 in its place.
NO_SIGNAL = 1e-6


def ddim(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A base's own DDIM scheduler, or its noise schedule under DDIM as the paper samples.

    A schedule that ends without signal is sampled from its very end ("trailing"), which it was rescaled for.
    """
    from diffusers import DDIMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    spacing = "trailing" if scheduler.config.get("rescale_betas_zero_snr") else "leading"
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )


def usable_eta(scheduler: SchedulerMixin, eta: float) -> float:
    """`eta`, or a little less than 1 where the schedule ends without signal.

    There fresh noise of eta 1 is all the noise of the next latent, and diffusers' DDIM takes the root of what is left
    of it: zero, which rounding makes negative.
    """
    abars = getattr(scheduler, "alphas_cumprod", None)
    return eta if abars is None or abars[-1] > NO_SIGNAL else min(eta, 0.9999)


def require_prediction(scheduler: SchedulerMixin, trained: str | None) -> None:
    """UsageError where an adapter was trained for another prediction type than the scheduler's.

    `trained`: as the adapter's configuration has it; None, of older adapters, fits all.
    """
    given = scheduler.config.get("prediction_type", "epsilon")
    if trained is not None and given != trained:
        raise UsageError(
            f"the adapter was trained with prediction_type {trained}, the scheduler {type(scheduler).__name__} has "
            f"{given}: give a scheduler with prediction_type {trained}, or the base that the adapter was trained on"
        )


def require_signal(scheduler: SchedulerMixin) -> None:
    """UsageError where a sampling step asks for eps at a timestep without signal. Call after `set_timesteps`."""
    abars = getattr(scheduler, "alphas_cumprod", None)
    if abars is None or scheduler.config.get("prediction_type", "epsilon") != "epsilon":
        return
    first = int(scheduler.timesteps.max().round())
    if abars[first] <= NO_SIGNAL:
        raise UsageError(
            f"prediction_type epsilon is undefined at timestep {first}, where the schedule leaves no signal "
            "(rescale_betas_zero_snr): give a base with v_prediction, or a scheduler with timestep_spacing leading"
        )


def solver_for(name: str, scheduler: SchedulerMixin, eta: float) -> SchedulerMixin:
    """`ddim`: the pipeline's own scheduler. `dpm`: DPM-Solver++ of second order (Lu et al.
    2022, arXiv 2211.01095) on the same timesteps and noise schedule, with fresh noise in every step unless eta is 0."""
    if name == "ddim":
        return scheduler
    from diffusers import DPMSolverMultistepScheduler  # takes seconds to load, which names alone need not

    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=kind, solver_order=2)
