"""How a training is asked to stop, and the ways in which it stops before its last step."""

import signal
import threading
from enum import Enum

from deedsr.errors import DeeDSRError

_terminated = threading.Event()


class Stop(Enum):
    NO = ""
    MOVE = "move"  # this worker's machine goes away, or there is room for more: checkpoint, and go on elsewhere
    END = "end"  # whoever started the training wants it to end

    def __bool__(self) -> bool:
        return self is not Stop.NO


class Moved(DeeDSRError):
    """Checkpointed because a machine goes away or more are there; the worker group is to be started again."""

    def __init__(self, step: int):
        self.step = step
        super().__init__(
            "the workers were told to end (SIGTERM to one, a drained node, or another number of workers): checkpointed "
            f"at step {step}"
        )

    def __reduce__(self) -> tuple[type["Moved"], tuple[int]]:
        return type(self), (self.step,)


class Ended(DeeDSRError):
    """Checkpointed because the user wants the run to end."""

    def __init__(self, step: int):
        super().__init__(f"checkpointed at step {step}")


class Untrainable(DeeDSRError):
    """The loss says that going on is of no use; starting the workers again is not either."""


class Unwritable(DeeDSRError):
    """Storage did not take a checkpoint or the model for as long as it is waited for, or until the run was to end."""


def listen() -> None:
    """SIGTERM asks this worker to checkpoint; a second one ends it. Call it on the main thread."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: object) -> None:
        _terminated.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, handle)


def terminated() -> Stop:
    """MOVE once the worker had its SIGTERM."""
    return Stop.MOVE if _terminated.is_set() else Stop.NO
