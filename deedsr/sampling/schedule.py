"""Builds the sampling scheduler of a base and rejects incompatible noise schedules.

A noisy latent is x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps. A schedule rescaled to zero terminal SNR (Lin et al. 2023,
arXiv 2305.08891) ends at abar = 0. There a v prediction is -x_0 and a sample prediction is x_0, but eps is x_t: an
epsilon prediction contains no information about x_0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deedsr.errors import UsageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# An abar below this counts as zero. Stable Diffusion's schedule ends at 0.0047; some schedulers of diffusers replace a
# final 0 by 2^-24.
NO_SIGNAL = 1e-6


def ddim(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The base's DDIM scheduler, or a DDIM scheduler with the base's noise schedule, as in the paper.

    A schedule with zero terminal SNR is sampled from its last timestep ("trailing" spacing).
    """
    from diffusers import DDIMScheduler

    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    spacing = "trailing" if scheduler.config.get("rescale_betas_zero_snr") else "leading"
    return DDIMScheduler.from_config(
        scheduler.config, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )


def usable_eta(scheduler: SchedulerMixin, eta: float) -> float:
    """`eta`, at most 0.9999 where the schedule has zero terminal SNR.

    With eta 1 the first step of such a schedule replaces all noise. diffusers' DDIM then takes the square root of the
    remaining noise power, which is zero and may be rounded to a negative number.
    """
    abars = getattr(scheduler, "alphas_cumprod", None)
    return eta if abars is None or abars[-1] > NO_SIGNAL else min(eta, 0.9999)


def require_prediction(scheduler: SchedulerMixin, trained: str | None) -> None:
    """Raises UsageError where the adapter was trained with another prediction type than the scheduler's.

    `trained`: the prediction type in the adapter's configuration; None (adapters of earlier versions) is accepted.
    """
    given = scheduler.config.get("prediction_type", "epsilon")
    if trained is not None and given != trained:
        raise UsageError(
            f"the adapter was trained with prediction_type {trained}, the scheduler {type(scheduler).__name__} has "
            f"{given}: give a scheduler with prediction_type {trained}, or the base that the adapter was trained on"
        )


def require_signal(scheduler: SchedulerMixin) -> None:
    """Raises UsageError for an epsilon prediction at a timestep with abar 0. Call after `set_timesteps`."""
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
    """The scheduler of a sampling run.

    `ddim`: `scheduler` itself. `dpm`: second-order DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095) with the same
    timesteps and noise schedule; stochastic unless eta is 0.
    """
    if name == "ddim":
        return scheduler
    from diffusers import DPMSolverMultistepScheduler  # takes seconds to import

    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=kind, solver_order=2)
