"""Settings of sampling: the model's recommendations and the caller's overrides."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from deedsr.errors import UsageError

COLOR_FIXES = ("none", "adain", "wavelet")
SOLVERS = ("ddim", "dpm")
LATER = {"temperature": 1.0}  # settings that stored results do not name, and their value in these


@dataclass(frozen=True)
class SamplingSettings:
    """The defaults are the paper's: 50 DDIM steps with eta 1, the first one guided wholly by the LR latent."""

    num_inference_steps: int = 50
    noise_guidance: float = 1.0  # strength, 0 (off) .. 1 (predicted clean latent replaced by the LR latent)
    noise_guidance_share: float = 0.0  # of the steps, from the first on; 0 = the first step only
    temperature: float = 1.0  # of the noise that sampling starts from: 1 = standard normal, 0 = none
    eta: float = 1.0  # 0 = no noise after the first, 1 = fresh noise in every step
    color_fix: str = "adain"  # none, adain or wavelet
    solver: str = "ddim"  # ddim = the pipeline's scheduler, dpm = DPM-Solver++ in its place
    tile: int = 1024  # pixels of the output a side; larger pictures are sampled in tiles; 0 = always as a whole
    degradation_per_tile: bool = False  # one degradation vector per tile instead of one for the whole LR
    # Weight of the sampled picture in the result, 0 to 1; the rest is the bicubic enlargement. None = the model's gate
    # decides, 1 without a gate.
    restoration: float | None = None

    def __post_init__(self) -> None:
        _require_number("num_inference_steps", self.num_inference_steps, 1, 1000, kind=int)
        for name in ("noise_guidance", "noise_guidance_share", "temperature", "eta"):
            _require_number(name, getattr(self, name), 0, 1, kind=int | float)
        if self.restoration is not None:
            _require_number("restoration", self.restoration, 0, 1, kind=int | float)
        _require_number("tile", self.tile, 0, 2**20, kind=int)
        for name, accepted in (("color_fix", COLOR_FIXES), ("solver", SOLVERS)):
            if getattr(self, name) not in accepted:
                raise UsageError(f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        if not isinstance(self.degradation_per_tile, bool):
            raise UsageError(f"degradation_per_tile must be true or false, got {self.degradation_per_tile!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a model's configuration. Raises UsageError for an unknown name."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise UsageError(f"unknown sampling setting {name!r}: there are {', '.join(known)}")
        return cls(**values)

    def override(self, **wanted: Any) -> Self:
        """A copy with every value that is not None replaced."""
        return replace(self, **{name: value for name, value in wanted.items() if value is not None})

    def chosen(self, **wanted: Any) -> Self:
        """`override`, but raises UsageError for a value that has no effect in combination with the others."""
        given = {name: value for name, value in wanted.items() if value is not None}
        settings = self.override(**given)
        for name, idle, beside in (
            ("degradation_per_tile", not settings.tile, "tile 0"),
            ("noise_guidance_share", not settings.noise_guidance, "noise_guidance 0"),
            ("eta", settings.solver == "dpm" and settings.eta < 1, "solver dpm, which has 0 and 1 alone"),
        ):
            if given.get(name) and idle:
                raise UsageError(f"{name} {given[name]} has no effect with {beside}: leave one of them out")
        return settings

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """What results are told apart by: a setting that came LATER counts where it is not what it was before."""
        return {name: value for name, value in asdict(self).items() if (name, value) not in LATER.items()}


def _require_number(name: str, value: Any, low: int, high: int, kind: Any) -> None:
    if not isinstance(value, kind) or isinstance(value, bool) or not low <= value <= high:
        noun = "a whole number" if kind is int else "a number"
        raise UsageError(f"{name} must be {noun} from {low} to {high}, got {value!r}")
