"""Every metric by its name, with those of pyiqa (IQA-PyTorch) and piq where they are installed.

Those two are no dependencies: pyiqa's licence (PolyForm Noncommercial) does not allow every use.

A module of this package that has `METRICS`, a tuple of `Metric` classes, adds them: a new metric is one new file. Other
packages add theirs as `PREFIX:NAME` through an entry point of the group `deedsr.metrics`: its name is the prefix, its
object a callable `(NAME, Setting) -> Metric` that raises ValueError for a name it does not know. Without an entry point
`package.module:CLASS` is a `Metric` class on Python's path.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points, version
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from deedsr.errors import DeeDSRError, UsageError
from deedsr.metrics.metric import Metric, Setting

__all__ = ["WITHOUT_WEIGHTS", "described", "find", "known", "named_in_errors", "selected"]

GROUP = "deedsr.metrics"
WITHOUT_WEIGHTS = ("psnr", "ssim", "niqe", "niqe_set")  # what `deedsr evaluate` computes unless told otherwise


@cache
def known() -> dict[str, type[Metric]]:
    """The metrics of this package by name."""
    package = importlib.import_module("deedsr.metrics")
    names = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name != "networks"]  # needs torch
    modules = [importlib.import_module(f"deedsr.metrics.{name}") for name in names]
    return {metric.name: metric for module in modules for metric in getattr(module, "METRICS", ())}


def find(name: str, setting: Setting = Setting()) -> Metric:
    """A metric by its name, or by `PREFIX:NAME` from another package. Raises UsageError where there is none."""
    prefix, colon, rest = name.partition(":")
    if not colon:
        if name not in known():
            raise UsageError(
                f"unknown metric {name!r}: there are {', '.join(known())}, and {_prefixes()}; "
                "`deedsr evaluate --help` says what each is"
            )
        return known()[name](setting)
    if prefix in PROVIDERS:
        return PROVIDERS[prefix](rest, setting)
    providers = _providers()
    if prefix not in providers and "." not in prefix:
        raise UsageError(f"no package here offers the metrics {prefix}:...; there are {_prefixes()}")
    try:
        if prefix in providers:
            metric = providers[prefix].load()(rest, setting)
        else:
            metric = EntryPoint(rest, name, GROUP).load()(setting)
    except ImportError as error:
        raise UsageError(f"the package that offers {prefix}:... cannot be imported: {error}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    except Exception as error:  # of any kind: it is another package's
        raise UsageError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(metric, Metric):
        raise UsageError(f"{name} is no metric: it gives {type(metric).__name__}")
    return metric


def selected(names: Sequence[str], setting: Setting = Setting()) -> dict[str, Metric]:
    """Metrics by their names. Raises UsageError for an unknown name and for none."""
    if not names:
        raise UsageError(f"no metric given: there are {', '.join(known())}, and {_prefixes()}")
    return {name: find(name, setting) for name in names}


@contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """What a metric of another package raises becomes a DeeDSRError that names it, but ValueErrors, see `Metric`."""
    try:
        yield
    except (DeeDSRError, ValueError):
        raise
    except Exception as error:
        if ":" not in name:
            raise
        raise DeeDSRError(f"{name} failed: {type(error).__name__}: {error}") from error


def described() -> str:
    """One line for each metric of this package, and where others come from."""
    lines = [f"  {name:<9} {metric().statement()}" for name, metric in known().items()]
    return "\n".join([*lines, f"  {'others':<9} {_prefixes()}"])


def _providers() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _prefixes() -> str:
    names = [*PROVIDERS, *sorted(_providers()), "package.module"]
    return ", ".join(f"{name}:NAME" for name in names) + " of packages that you install"


# Metrics of pyiqa and piq


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
        with named_in_errors(self.name), torch.inference_mode():
            return float(self.compute(*tensors))


def _imported(package: str, name: str) -> ModuleType:
    try:
        return __import__(package)
    except ImportError as error:
        raise UsageError(
            f"{package}:{name} needs the package {package}, which cannot be imported here ({error}): install it "
            "yourself, if its licence suits you"
        ) from error


def pyiqa(name: str, setting: Setting) -> Metric:
    """A metric of IQA-PyTorch by its name there, such as `musiq`. That package manages its weights."""
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
    """A metric of piq, by a name of `PIQ`. That package manages its weights."""
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
