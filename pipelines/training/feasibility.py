"""Whether a training will log the metric by which its best checkpoint is kept: asked before any work."""

from difflib import get_close_matches
from pathlib import Path

from deedsr.errors import UsageError
from pipelines.dataset import Dataset
from pipelines.training.config import AdapterOptions, LearnerOptions
from pipelines.training.metrics import bucket_names, middles

__all__ = ["logged_metrics", "require_best_metric"]

_ALWAYS = {"loss", "loss_smoothed", "lr", "grad_norm", "skipped_steps", "samples_per_second", "data_wait_share"}
_MEMORY = {"memory/rss_mib", "memory/gpu_allocated_mib", "memory/gpu_peak_mib"}
_RANKS = {"top1", "top5"}


def require_best_metric(options: LearnerOptions | AdapterOptions, dataset: Dataset, base: Path | None = None) -> None:
    """Raises UsageError for a `train.best_metric` that no checkpoint would hold. `base`: of the adapter."""
    train = options.train
    if train.best_metric is None:
        if train.best_mode != "min":
            raise UsageError(f"train.best_mode {train.best_mode} has no effect without train.best_metric: give both")
        return
    timesteps = _timesteps(options, base) if isinstance(options, AdapterOptions) and base else 0
    validates = 0 < train.validate_every <= train.max_steps and dataset.index("validation").num_rows > 0
    pictures = dataset.manifest.latents is None and train.validation_pictures > 0
    logged = logged_metrics(options, timesteps, validates, pictures)
    if train.best_metric in logged:
        return
    if train.best_metric in logged_metrics(options, timesteps, validates=True, pictures=True):
        needs = "pixels and train.validation_pictures" if validates else (
            "a validation split and a train.validate_every from 1 to train.max_steps"
        )  # fmt: skip
        raise UsageError(f"train.best_metric {train.best_metric} is never logged: it needs {needs}")
    close = get_close_matches(train.best_metric, sorted(logged), n=1)
    guess = f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(logged))}"
    raise UsageError(f"train.best_metric {train.best_metric} is never logged; {guess}")


def logged_metrics(
    options: LearnerOptions | AdapterOptions, timesteps: int, validates: bool, pictures: bool
) -> set[str]:
    """The metrics that checkpoints hold. `timesteps`: that the adapter trains on; `pictures`: in the validations."""
    adapter = isinstance(options, AdapterOptions)
    names = _ALWAYS | _MEMORY | (set(bucket_names(timesteps)) if adapter else _RANKS)
    if not validates:
        return names
    measured = {f"loss_timestep/{t:03d}" for t in middles(timesteps)} if adapter else set(_RANKS)
    if adapter and pictures:
        measured |= {"psnr_y", "psnr_y_bicubic"}
    return names | {f"validation/{name}" for name in ("loss", "seconds", *measured)}


def _timesteps(options: AdapterOptions, base: Path) -> int:
    from deedsr.sampling.model_folder import read_config

    steps = int(read_config(base, "scheduler").get("num_train_timesteps", 1000))
    return min(options.diffusion.max_timestep or steps, steps)
