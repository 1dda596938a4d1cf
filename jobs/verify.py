"""Re-hash every shard against the manifest and read every sample of a dataset.

With --replay N, the LR of N samples is also recomputed from the stored HR and the recorded parameters, and compared.
"""

import dataclasses
from typing import Annotated

from pydantic import NonNegativeInt

from jobs.command import Command, Outcome


@dataclasses.dataclass
class VerifyOptions:
    uri: Annotated[str, "dataset: folder or s3://bucket/prefix"]
    replay: Annotated[NonNegativeInt, "number of samples whose LR is recomputed and compared"] = 0


def run(options: VerifyOptions) -> Outcome:
    from pipelines.shards import verify

    result = verify(options.uri, options.replay)
    return Outcome(dataclasses.asdict(result), complete=result.ok)


COMMAND = Command(VerifyOptions, run, operand="uri", example="deedsr verify s3://photos/shards --replay 100")
