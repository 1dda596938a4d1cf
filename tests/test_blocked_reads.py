"""Workers whose reads wait for storage, and those that wait for them, are not taken for hung."""

from training_process import run_script

BLOCKED = """
import time
import torch
from pipelines.storage import waiting
from pipelines.storage.errors import Faulty
from pipelines.training.health import BlockedReads, Stop, Watchdog

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
store = torch.distributed.distributed_c10d._get_default_store()
away, said = time.monotonic() + 8, []

def read():
    if time.monotonic() < away:
        raise Faulty("the file system fails")

with Watchdog(2.0) as watchdog, BlockedReads(watchdog, store, rank, lambda: Stop.NO, said.append) as blocked:
    watchdog.beat()
    if rank == 1:
        with blocked.reading():
            waiting.patiently(read)
    torch.distributed.barrier()
    watchdog.beat()
print(said)
torch.distributed.destroy_process_group()
"""


def test_all_workers_outlast_the_limit_of_a_hang_while_the_read_of_one_waits_for_storage(tmp_path):
    assert "workers wait for storage" in run_script(BLOCKED, 2, [], tmp_path)
