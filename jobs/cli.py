"""The command line: finds the command, reads its options, runs it, prints the result.

stdout holds the result and nothing else; logs, progress bars and errors go to stderr. Exit codes: 0 done; 1 the work
failed, or part of it; 2 the command or its configuration is wrong; 3 a job that was followed goes on; 130 interrupted.
"""

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from deedsr import __version__
from deedsr.errors import DeeDSRError, UsageError
from jobs.command import Command, Outcome
from pipelines.machine import cache_folder
from pipelines.storage import waiting

if TYPE_CHECKING:
    from jobs.options import CommandParser

DONE, FAILED, INTERRUPTED = 0, 1, 130
# Modules that only `deedsr[pipeline]` installs.
PIPELINE = {"aiohttp", "alembic", "boto3", "botocore", "deepspeed", "grpc", "jinja2", "mlflow", "pandas"}
PIPELINE |= {"pyarrow", "ray", "requests", "s3transfer", "sqlalchemy", "webdataset"}

COMMANDS = {
    "demo": ("jobs.demo", "the whole chain on the shipped photographs, on this machine"),
    "shards": ("jobs.shards", "make degradation shards from photographs"),
    "verify": ("jobs.verify", "check every shard and sample of a dataset"),
    "inspect": ("jobs.inspect", "a page that shows a dataset: pairs, draws, histograms, rejects"),
    "latents": ("jobs.latents", "what the frozen networks make of a dataset, computed once for stage 2"),
    "train learner": ("jobs.train_learner", "stage 1: the degradation learner"),
    "train adapter": ("jobs.train_adapter", "stage 2: the degradation-aware adapter around a frozen base"),
    "evaluate": ("jobs.evaluate", "metrics of a model, beside bicubic, on a dataset"),
    "chain": ("jobs.chain", "shards, learner, latents, adapter and evaluation, one after the other"),
    "upscale": ("jobs.upscale", "enlarge pictures"),
    "export": ("jobs.export", "a trained model and its base in one folder"),
    "compare": ("jobs.compare", "the runs of an experiment side by side"),
    "runs list": ("jobs.runs_list", "MLflow runs in the terminal, newest first"),
    "runs show": ("jobs.runs_show", "one MLflow run: result, configuration, the command that makes it again"),
    "runs close-stale": ("jobs.runs_close_stale", "end runs in MLflow whose process was killed"),
    "doctor": ("jobs.doctor", "what this machine, a place for results, MLflow and a cluster lack"),
    "submit": ("jobs.submit", "send a job file to a Ray cluster, follow a job or stop one"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Never raises for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _run(argv)
    except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray handled SIGTERM while it was starting
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _report(error)


def set_up_process() -> None:
    """Settings of a process that runs one command: logs go to stderr, SIGTERM is handled as Ctrl-C, characters that
    stdout cannot encode (a file name need not be Unicode) are written as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for layer in ("deedsr", "pipelines", "jobs"):
        logging.getLogger(layer).setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    # Libraries cache there, too; the home may not be writable.
    os.environ["XDG_CACHE_HOME"] = str(cache_folder())


def _interrupt(number: int, frame: object) -> None:
    waiting.interrupted.set()  # threads that wait for storage end with the command
    raise KeyboardInterrupt


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return DONE
    if argv[0] == "--version":
        print(__version__)
        return DONE
    name, words = _command_of(argv)
    command, parser = load(name)
    try:
        request = parser.read(words)
    except SystemExit:  # --help was printed
        return DONE
    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        outcome: Outcome = command(request.options, request.about)
        print(_json(outcome.values) if request.as_json else outcome, file=results)
    return DONE if outcome.complete else FAILED


def _json(values: Any) -> str:
    """One line of strict JSON; NaN and infinity become null."""
    return json.dumps(json.loads(json.dumps(values), parse_constant=lambda name: None))


def _command_of(argv: list[str]) -> tuple[str, list[str]]:
    """(name of the command, the words behind it)."""
    for length in (2, 1):
        name = " ".join(argv[:length])
        if name in COMMANDS:
            return name, argv[length:]
    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if group:
        raise UsageError(f"`deedsr {argv[0]}` needs one of: {', '.join(group)}")
    close = get_close_matches(argv[0], COMMANDS, n=1)
    guess = f"did you mean `deedsr {close[0]}`?" if close else f"there are: {', '.join(COMMANDS)}"
    raise UsageError(f"unknown command {argv[0]!r}; {guess}")


def load(name: str) -> tuple[Command, "CommandParser"]:
    """A command and its parser."""
    from jobs.options import CommandParser

    module = importlib.import_module(COMMANDS[name][0])
    command: Command = module.COMMAND
    return command, CommandParser(name, command, f"{(module.__doc__ or '').strip()}\n\nexample:\n  {command.example}")


def overview() -> str:
    """The list of commands."""
    lines = [f"  {name:<14} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: deedsr COMMAND ...", "", *lines, "", "deedsr COMMAND --help explains a command."])


def _report(error: Exception) -> int:
    """Prints one error message; returns the exit code."""
    ours = next((link for link in _chain(error) if isinstance(link, DeeDSRError)), None)
    lacking = next((link.name or "" for link in _chain(error) if isinstance(link, ModuleNotFoundError)), "")
    if (package := lacking.partition(".")[0]) in PIPELINE:
        text = f"error: this needs {package}: pip install 'deedsr[pipeline]'"
    elif ours is not None:
        print(f"error: {ours}", file=sys.stderr)
        return ours.exit_code
    elif os.environ.get("DEEDSR_DEBUG") == "1":
        text = "".join(traceback.format_exception(error)).rstrip()
    elif isinstance(error, OSError) and error.strerror:
        text = f"error: {error.strerror}: {error.filename or ''}".rstrip(": ")
    else:
        first_line = (str(error).strip().splitlines() or [""])[0]
        text = f"internal error: {type(error).__name__}: {first_line}; set DEEDSR_DEBUG=1 for the traceback"
    print(text, file=sys.stderr)
    return FAILED


def _chain(error: BaseException | None) -> Iterator[Any]:
    """An error and its causes; Ray's wrappers around errors of a task are unwrapped."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        link = pending.pop(0)
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        # A wrapper of Ray is also an instance of the error it wraps, with the remote traceback as its text.
        inner = getattr(link, "cause", None)
        pending += [inner if isinstance(inner, BaseException) else None, link.__cause__, link.__context__]
        if not isinstance(inner, BaseException):
            yield link
