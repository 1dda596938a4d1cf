"""Every metric by its name.

A module of this package that has `METRICS`, a tuple of `Metric` classes, adds them: a new metric is one new file. Other
packages add theirs as `PREFIX:NAME` through an entry point of the group `deedsr.metrics`: its name is the prefix, its
object a callable `(NAME, Setting) -> Metric` that raises ValueError for a name it does not know.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from deedsr.errors import UsageError
from deedsr.metrics import external
from deedsr.metrics.metric import Metric, Setting

__all__ = ["WITHOUT_WEIGHTS", "described", "find", "known", "selected"]

GROUP = "deedsr.metrics"
WITHOUT_WEIGHTS = ("psnr", "ssim", "niqe", "niqe_set")  # what `deedsr evaluate` computes unless told otherwise


@cache
def known() -> dict[str, type[Metric]]:
    """The metrics of this package by name."""
    package = importlib.import_module("deedsr.metrics")
    modules = [
        importlib.import_module(f"deedsr.metrics.{found.name}") for found in pkgutil.iter_modules(package.__path__)
    ]
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
    if prefix in external.PROVIDERS:
        return external.PROVIDERS[prefix](rest, setting)
    providers = _providers()
    if prefix not in providers:
        raise UsageError(f"no package here offers the metrics {prefix}:...; there are {_prefixes()}")
    try:
        metric = providers[prefix].load()(rest, setting)
    except ImportError as error:
        raise UsageError(f"the package that offers {prefix}:... cannot be imported: {error}") from error
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if not isinstance(metric, Metric):
        raise UsageError(f"{prefix}:... is no metric: the entry point gives {type(metric).__name__}")
    return metric


def selected(names: Sequence[str], setting: Setting = Setting()) -> dict[str, Metric]:
    """Metrics by their names. Raises UsageError for an unknown name and for none."""
    if not names:
        raise UsageError(f"no metric given: there are {', '.join(known())}, and {_prefixes()}")
    return {name: find(name, setting) for name in names}


def described() -> str:
    """One line for each metric of this package, and where others come from."""
    lines = [f"  {name:<9} {metric().statement()}" for name, metric in known().items()]
    return "\n".join([*lines, f"  {'others':<9} {_prefixes()}"])


def _providers() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _prefixes() -> str:
    names = [*external.PROVIDERS, *sorted(_providers())]
    return ", ".join(f"{name}:NAME" for name in names) + " of packages that you install"
