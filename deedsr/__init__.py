"""DeeDSR: degradation-aware real-world super-resolution."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deedsr.adapter.adapter import DegradationAwareAdapter
    from deedsr.learner.resnet import DegradationLearner
    from deedsr.sampling.pipeline import DeeDSRPipeline


def _version() -> str:
    """Of the installed package; of a source tree that is not installed, such as a job's working directory, its own."""
    try:
        return version("deedsr")
    except PackageNotFoundError:
        import tomllib

        project = Path(__file__).parent.parent / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["version"] if project.is_file() else "0+unknown"


__version__ = _version()
__all__ = ["DeeDSRPipeline", "DegradationAwareAdapter", "DegradationLearner", "__version__"]

# Loaded at first access: importing torch and diffusers takes seconds, and `deedsr --help` needs neither.
_HOMES = {
    "DeeDSRPipeline": "deedsr.sampling.pipeline",
    "DegradationAwareAdapter": "deedsr.adapter.adapter",
    "DegradationLearner": "deedsr.learner.resnet",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deedsr' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
