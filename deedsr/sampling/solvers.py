"""Which solver takes the sampling steps."""

from typing import Any

from diffusers import DPMSolverMultistepScheduler

SOLVERS = ("ddim", "dpm")


def solver_for(name: str, scheduler: Any) -> Any:
    """`ddim`: the pipeline's own scheduler, whatever it was swapped for. `dpm`: DPM-Solver++ of second order (Lu et al.
    2022, arXiv 2211.01095) on the same noise schedule, which needs fewer steps."""
    if name == "ddim":
        return scheduler
    return DPMSolverMultistepScheduler.from_config(
        scheduler.config, algorithm_type="dpmsolver++", solver_order=2, timestep_spacing="linspace"
    )
