"""The claim of a training: one command at a time trains into an `--out`, and one of its worker groups writes there and
to MLflow.

`OUT/claim.json` also counts attempts: each command and each group of workers takes the next number. A group that finds
another number there has been replaced, and writes nothing more.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from pipelines import claims
from pipelines.claims import Superseded

__all__ = ["Claim"]


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
