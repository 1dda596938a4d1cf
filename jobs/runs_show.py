"""Show one MLflow run: what it is, its result, its configuration, and the command that makes it again.

In the store of MLFLOW_TRACKING_URI. The run is named by id, the beginning of an id, or name.
"""

from dataclasses import dataclass
from typing import Annotated

from jobs.command import Command, Outcome


@dataclass
class ShowOptions:
    run: Annotated[str, "id, beginning of an id, or name"]


def run(options: ShowOptions) -> Outcome:
    from pipelines.reports.run_rows import row_of
    from pipelines.tracking.description import NOTE_TAG, describe, repeat_command
    from pipelines.tracking.search import artifacts_of, config_of, parents, select
    from pipelines.tracking.store import existing_store

    client = existing_store("runs show")
    run = next(iter(select(client, [options.run]).values()))
    row, config = row_of(client.get_experiment(run.info.experiment_id).name, run), config_of(run)
    values = {
        **row,
        "description": describe(client, run),
        "again": repeat_command(run),
        "config": config,
        "tags": {key: value for key, value in run.data.tags.items() if key != NOTE_TAG},
        "parents": parents(run),
        "artifacts": artifacts_of(client, run.info.run_id),
    }
    settings = "\n".join(f"  {key}: {value}" for key, value in sorted(config.items()))
    head = f"{row['name']}  {row['run_id']}  {row['status'].lower()}  {row['link']}"
    return Outcome(values, text=f"{head}\n\n{values['description']}\n\n**Configuration**\n{settings}")


COMMAND = Command(ShowOptions, run, operand="run", example="deedsr runs show 3f2a91c0")
