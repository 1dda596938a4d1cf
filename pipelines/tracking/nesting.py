"""Runs that are children of another one: those of the steps of a chain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["PARENT_RUN_TAG", "children_of", "parent_tags"]

PARENT_RUN_TAG = "mlflow.parentRunId"  # MLflow's own name, by which its pages show children below their parent
_parent: ContextVar[Callable[[], str] | None] = ContextVar("parent", default=None)


@contextmanager
def children_of(parent: Callable[[], str]) -> Iterator[None]:
    """Every run that this thread starts or continues within becomes a child of the run whose id `parent` returns.

    `parent` is called when such a run begins, so that there need be no parent where there is no child.
    """
    token = _parent.set(parent)
    try:
        yield
    finally:
        _parent.reset(token)


def parent_tags() -> dict[str, str]:
    """The tag of a run that is about to begin."""
    parent = _parent.get()
    if parent is None:
        return {}
    token = _parent.set(None)  # `parent` may start a run, which has none above it
    try:
        return {PARENT_RUN_TAG: parent()}
    finally:
        _parent.reset(token)
