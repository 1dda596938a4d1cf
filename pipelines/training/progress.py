"""The progress bar of a training: workers tell an actor where they are, the driver draws."""

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from pipelines.training.interruption import Stop

POLL_SECONDS = 0.5
LINE_SECONDS = 30.0  # between two lines where no terminal draws a bar
SHOWN = {  # metric: name and format on the bar
    "loss_smoothed": ("loss", "{:.4f}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
    "lr": ("lr", "{:.2e}"),
    "data_wait_share": ("waiting", "{:.0%}"),
}


class Progress:
    """Ray actor that holds the last word of rank 0, and of Ray Train's controller."""

    def __init__(self) -> None:
        self.step, self.values = 0, dict[str, float]()
        self.messages: list[str] = []
        self.asked = Stop.NO
        self.controller: Any = None
        self.requester = ""
        self.working = False

    def tell(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self.values = step, dict(values)

    def say(self, message: str) -> None:
        self.messages.append(message)

    def end(self) -> None:
        """Workers are to checkpoint and end."""
        self.asked = Stop.END

    def move(self) -> None:
        """Workers are to checkpoint and to be started again, as many as there is room for."""
        self.asked = self.asked or Stop.MOVE

    def stop(self) -> Stop:
        """What the workers are to do. They are asked to move once."""
        asked = self.asked
        if asked is Stop.MOVE:
            self.asked = Stop.NO
        return asked

    def controlled(self, controller: Any, requester: str) -> None:
        """`controller`: the actor that starts the workers; `requester`: its name where Ray reserves resources."""
        self.controller, self.requester = controller, requester

    def works(self, working: bool) -> None:
        """Whether there are workers that could checkpoint."""
        self.working = working

    def group(self) -> tuple[Any, bool]:
        """The controller, None before it has begun, and whether its workers are at work."""
        return self.controller, self.working

    def reserved_by(self) -> str:
        return self.requester

    def look(self) -> tuple[int, dict[str, float], list[str]]:
        messages, self.messages = self.messages, []
        return self.step, self.values, messages


class Lines:
    """Where a bar is no use: what tqdm would draw in place becomes one line each time."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(name: str, total: int, initial: int, show: bool) -> tqdm:
    """A bar on a terminal, with rate and ETA; elsewhere a line with the same now and then."""
    options: dict[str, Any] = {"total": total, "initial": initial, "desc": name, "unit": "step", "disable": not show}
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS, "miniters": 1}
    return tqdm(**options)


def postfix(values: Mapping[str, float]) -> dict[str, str]:
    """The metrics that the bar shows, as it shows them."""
    return {label: form.format(values[name]) for name, (label, form) in SHOWN.items() if name in values}


@contextmanager
def progress_bar(name: str, total: int, initial: int, show: bool) -> Iterator[Any]:
    """The actor's handle for the workers; a bar on stderr while the context lasts."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the command's own node: any other may be lost, and the workers would be lost without their answer.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(num_cpus=0, scheduling_strategy=here)(Progress).remote()
    stop = threading.Event()
    with bar(name, total, initial, show) as shown:

        def draw() -> None:
            step, values, messages = ray.get(actor.look.remote())
            for message in messages:
                tqdm.write(message, file=sys.stderr)
            if step > shown.n:
                shown.set_postfix(postfix(values), refresh=False)
                shown.update(step - shown.n)

        def watch() -> None:
            while not stop.wait(POLL_SECONDS):
                draw()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield actor
        finally:
            stop.set()
            thread.join()
            draw()
            ray.kill(actor)
