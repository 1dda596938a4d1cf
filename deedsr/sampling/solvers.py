"""Which solver takes the sampling steps."""

from typing import Any

SOLVERS = ("ddim", "dpm")


def solver_for(name: str, scheduler: Any, eta: float) -> Any:
    """`ddim`: the pipeline's own scheduler, whatever it was swapped for. `dpm`: DPM-Solver++ of second order (Lu et al.
    2022, arXiv 2211.01095) on the same timesteps and noise schedule, with fresh noise in every step unless eta is 0."""
    if name == "ddim":
        return scheduler
    from diffusers import DPMSolverMultistepScheduler  # takes seconds to load, which names alone need not

    kind = "sde-dpmsolver++" if eta else "dpmsolver++"
    return DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type=kind, solver_order=2)
