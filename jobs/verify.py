"""Re-hash every shard against the manifest and read every sample of a dataset."""

import dataclasses

from jobs.command import Command, Outcome


@dataclasses.dataclass
class VerifyOptions:
    uri: str  # dataset: folder or s3://bucket/prefix


def run(options: VerifyOptions) -> Outcome:
    from pipelines.shards import verify

    result = verify(options.uri)
    return Outcome(dataclasses.asdict(result), complete=result.ok)


COMMAND = Command(VerifyOptions, run, operand="uri", example="deedsr verify s3://photos/shards")
