"""What an `--out` is: who trains into it (`claim.json`), and what is trained there (`training.json`).

One command at a time trains into an `--out`, and one of its groups of workers writes there and to MLflow.
`OUT/claim.json` also counts attempts: each command and each group of workers takes the next number. A group that finds
another number there has been replaced, and writes nothing more. `OUT/training.json` holds stage, configuration, digests
of the inputs and the MLflow run; a continuation may change what `MAY_CHANGE` names.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from deedsr.errors import UsageError
from pipelines import claims
from pipelines.claims import Superseded
from pipelines.storage import Storage
from pipelines.tracking.provenance import flatten
from pipelines.training.checkpoint import Checkpoint, committed
from pipelines.training.config import AdapterOptions, LearnerOptions
from pipelines.training.schedules import recorded_length

# What may change between the first command and a continuation of it.
MAY_CHANGE = {
    "out", "experiment", "train.max_steps", "train.num_workers", "train.micro_batch_size", "train.zero_stage",
    "train.cpus_per_worker", "train.compute_threads", "train.gpus_per_worker", "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every", "train.max_failures", "train.best_metric", "train.best_mode",
    "train.checkpoint_retry_seconds",  # of runs of earlier versions
    "train.spike_sigma", "train.on_spike", "train.hang_seconds",
    "train.cache_gb", "train.loader_threads", "train.gradient_checkpointing", "train.exact_sums", "train.tf32",
    "train.compile", "train.validate_every", "train.validation_samples", "train.validation_pictures",
    "register_as", "license",
}  # fmt: skip


@dataclass
class Claim(claims.Claim):
    doing: ClassVar[str] = "trained"

    attempt: int = 0  # the group of workers; 0 = the command, whichever of its groups is at work
    run_id: str = ""  # MLflow run that is trained

    def next_attempt(self) -> None:
        """For a new group of workers. Raises Superseded where the place is another command's."""
        self.attempt = 0
        self.attempt = self._change(lambda found: found | {"attempt": found["attempt"] + 1})["attempt"]

    def _is_own(self, found: dict[str, Any]) -> bool:
        return super()._is_own(found) and self.attempt in (0, found["attempt"])

    def _superseded(self, found: dict[str, Any]) -> Superseded:
        if super()._is_own(found):
            return Superseded(f"other workers train into {self.out.uri} in place of these")
        return super()._superseded(found)


RECORD = "training.json"


@dataclass
class TrainingRecord:
    """The record of a training, and the version of it that was read: a write over another version raises Conflict."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    run_id: str
    exported: int | None = None  # step of the checkpoint whose weights the model has
    published: int | None = None  # step that the MLflow store knows as the result
    version: str | None = None

    @classmethod
    def read(cls, out: Storage) -> Self | None:
        try:
            version = out.stat(RECORD).version
            return cls(**json.loads(out.read(RECORD)), version=version)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{out.uri}/{RECORD} is damaged ({error}): choose another --out") from error

    def write(self, out: Storage) -> None:
        fields = {key: value for key, value in vars(self).items() if key != "version" and value is not None}
        self.version = out.write(RECORD, json.dumps(fields, indent=1).encode(), expected=self.version)

    def refuse_differences(self, options: LearnerOptions | AdapterOptions, inputs: dict[str, str]) -> None:
        """Raises UsageError, naming what differs, where the training is of another stage, configuration or input."""
        where = f"{options.out} holds a training of"
        if self.stage != options.stage:
            raise UsageError(f"{where} the {self.stage}, not of the {options.stage}: choose another --out")
        # A training from before there was an option has its default.
        defaults, now = (flatten(json.loads(json.dumps(asdict(of)))) for of in (type(options)(), options))
        before = {key: value for key, value in defaults.items() if value != {}} | flatten(self.config)
        # Data, learner, base and initial weights are compared by content: they may have moved.
        same_by_content = MAY_CHANGE | {"data", "learner", "init", "base"}
        if before["train.schedule"] == "cosine":
            before["train.schedule_steps"] = recorded_length(self.config)
        lines = _differences({k: before.get(k) for k in before | now if k not in same_by_content}, now, repr)
        had = self.inputs
        if "base" in inputs and "base" not in had:  # a training from before the digest was kept: by name
            inputs = {name: digest for name, digest in inputs.items() if name != "base"}
            name, given = ({"base": values["base"].partition("@")[0]} for values in (before, now))
            lines += _differences(name, given, repr)
        lines += _differences({k: had.get(k) for k in had | inputs}, inputs, str)
        if lines:
            raise UsageError(
                f"{where} another configuration: {'; '.join(lines)}. Choose another --out, or the old values"
            )


def _differences(had: Mapping[str, Any], now: Mapping[str, Any], text: Callable[[Any], str]) -> list[str]:
    return [f"{k} was {text(had[k])}, is {text(now.get(k))}" for k in sorted(had) if had[k] != now.get(k)]


def continued(
    out: Storage, options: LearnerOptions | AdapterOptions, inputs: dict[str, str]
) -> tuple[TrainingRecord | None, Checkpoint | None]:
    """The record of what lies in `out`, if anything does, and the last checkpoint where all steps are done and the
    model is exported. Raises UsageError where it is another training."""
    record, last = TrainingRecord.read(out), None
    if record:
        record.refuse_differences(options, inputs)
    for last in committed(out):
        refuse_of_others(out, last, record.run_id if record else None)
    done = record and last and options.train.max_steps <= last.step == record.exported
    return record, last if done else None


def refuse_of_others(out: Storage, found: Checkpoint, run_id: str | None) -> None:
    if run_id is None:
        raise UsageError(f"{out.uri} has checkpoints and no {RECORD} that says of what: choose another --out")
    if found.run_id not in ("", run_id):  # "" = of an earlier version
        raise UsageError(
            f"{out.uri}/{found.folder} is of MLflow run {found.run_id}, and {RECORD} there of {run_id}: choose another "
            "--out, or delete what does not belong there"
        )


def weights_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
