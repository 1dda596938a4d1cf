"""Metrics of pyiqa (IQA-PyTorch) and piq, for who has installed them. They are no dependencies: pyiqa's licence
(PolyForm Noncommercial) does not allow every use."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from deedsr.errors import DeeDSRError, UsageError
from deedsr.metrics.metric import Metric, Setting

__all__ = ["PROVIDERS"]


class ExternalMetric(Metric):
    """`compute` takes RGB in 0..1 as (1, 3, H, W), the reference behind the picture where one is needed."""

    digits = 4

    def __init__(
        self,
        package: str,
        name: str,
        setting: Setting,
        compute: Callable[..., Any],
        *,
        needs_reference: bool,
        higher_is_better: bool,
    ):
        super().__init__(setting)
        self.name = self.title = f"{package}:{name}"
        self.definition = f"{name} with the defaults of {package} {version(package)}, RGB in 0..1, mean over pictures"
        self.source = package
        self.needs_reference, self.higher_is_better, self.compute = needs_reference, higher_is_better, compute

    def measure(self, picture: np.ndarray, reference: np.ndarray | None) -> float:
        import torch

        pictures = (picture, reference) if self.needs_reference else (picture,)
        tensors = [torch.tensor(p).permute(2, 0, 1)[None].to(self.setting.device).float() / 255 for p in pictures]
        try:
            with torch.inference_mode():
                return float(self.compute(*tensors))
        except Exception as error:  # of any kind: it is another package's
            raise DeeDSRError(f"{self.name} failed: {type(error).__name__}: {error}") from error


def _imported(package: str, name: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError as error:
        raise UsageError(
            f"{package}:{name} needs the package {package}, which cannot be imported here ({error}): install it "
            "yourself, if its licence suits you"
        ) from error


def pyiqa(name: str, setting: Setting) -> Metric:
    """A metric of IQA-PyTorch by its name there: `musiq`, `maniqa-pipal`, `clipiqa`. Its weights are its own affair."""
    package = _imported("pyiqa", name)
    names = package.list_models()
    if name not in names or name.startswith("fid"):
        raise UsageError(f"pyiqa has no metric {name!r} of single pictures; it has {', '.join(names)}")
    try:
        metric = package.create_metric(name, device=setting.device)
    except Exception as error:  # of any kind: it is another package's, which may want to download weights
        raise UsageError(f"pyiqa:{name} cannot be loaded: {type(error).__name__}: {error}") from error
    return ExternalMetric(
        "pyiqa",
        name,
        setting,
        metric,
        needs_reference=metric.metric_mode == "FR",
        higher_is_better=not metric.lower_better,
    )


class Measure(NamedTuple):
    """A metric of piq: class or function, whether it takes a reference, whether more is better."""

    attribute: str
    needs_reference: bool = True
    higher_is_better: bool = True


PIQ: Mapping[str, Measure] = {
    "brisque": Measure("brisque", needs_reference=False, higher_is_better=False),
    "clip_iqa": Measure("CLIPIQA", needs_reference=False),
    "dists": Measure("DISTS", higher_is_better=False),
    "dss": Measure("dss"),
    "fsim": Measure("fsim"),
    "gmsd": Measure("gmsd", higher_is_better=False),
    "haarpsi": Measure("haarpsi"),
    "lpips": Measure("LPIPS", higher_is_better=False),
    "mdsi": Measure("mdsi", higher_is_better=False),
    "multi_scale_ssim": Measure("multi_scale_ssim"),
    "pieapp": Measure("PieAPP", higher_is_better=False),
    "srsim": Measure("srsim"),
    "vif_p": Measure("vif_p"),
    "vsi": Measure("vsi"),
}


def piq(name: str, setting: Setting) -> Metric:
    """A metric of piq, by a name of `PIQ`. Its weights are its own affair."""
    package = _imported("piq", name)
    if name not in PIQ:
        raise UsageError(f"unknown metric piq:{name}: there are {', '.join(PIQ)}")
    attribute, needs_reference, higher_is_better = PIQ[name]
    compute = getattr(package, attribute)
    compute = compute().to(setting.device) if isinstance(compute, type) else compute
    return ExternalMetric(
        "piq", name, setting, compute, needs_reference=needs_reference, higher_is_better=higher_is_better
    )


PROVIDERS: Mapping[str, Callable[[str, Setting], Metric]] = {"pyiqa": pyiqa, "piq": piq}
