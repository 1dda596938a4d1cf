"""The progress bar of a training: workers tell an actor where they are, the driver draws."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

POLL_SECONDS = 0.5


class Progress:
    """Ray actor that holds the last word of rank 0."""

    def __init__(self) -> None:
        self.step, self.loss = 0, float("nan")
        self.messages: list[str] = []
        self.ended = False

    def tell(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss

    def say(self, message: str) -> None:
        self.messages.append(message)

    def end(self) -> None:
        """Workers are to checkpoint and end."""
        self.ended = True

    def ending(self) -> bool:
        return self.ended

    def look(self) -> tuple[int, float, list[str]]:
        messages, self.messages = self.messages, []
        return self.step, self.loss, messages


@contextmanager
def progress_bar(name: str, total: int, initial: int, show: bool) -> Iterator[Any]:
    """The actor's handle for the workers; a bar with rate and ETA on stderr while the context lasts."""
    import ray

    actor = ray.remote(num_cpus=0)(Progress).remote()
    stop = threading.Event()
    with tqdm(total=total, initial=initial, desc=name, unit="step", disable=not show) as bar:

        def draw() -> None:
            step, loss, messages = ray.get(actor.look.remote())
            for message in messages:
                tqdm.write(message)
            if step > bar.n:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update(step - bar.n)

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
