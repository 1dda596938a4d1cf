"""Work on storage that is repeated while the storage is away."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from deedsr.errors import DeeDSRError, UsageError
from pipelines.training.claim import Superseded

T = TypeVar("T")
LONGEST_WAIT = 30.0  # seconds between two attempts


def retried(
    work: Callable[[], T], seconds: float, failed: Callable[[DeeDSRError], None], given_up: threading.Event
) -> T:
    """The result of `work`, repeated for `seconds`, with longer and longer pauses, while it raises a DeeDSRError.

    `failed` gets the error of each attempt that will be repeated; the last error is raised. A UsageError and
    Superseded are raised at once. Setting `given_up` ends a pause and makes its error the last one.
    """
    began, pause = time.monotonic(), 1.0
    while True:
        try:
            return work()
        except (UsageError, Superseded):
            raise
        except DeeDSRError as error:
            left = seconds - (time.monotonic() - began)
            if left <= 0:
                raise
            failed(error)
            if given_up.wait(min(pause, left)):
                raise
            pause = min(2 * pause, LONGEST_WAIT)
