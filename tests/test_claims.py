"""Claims on who may write into an `--out`: one command at a time, and only its newest group of workers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow_stores import begin, log
from training_process import tensors

from deedsr.errors import UsageError
from pipelines import tracking
from pipelines.claims import CLAIM, Superseded, held, of_this_process
from pipelines.storage import Storage, open_storage
from pipelines.training import checkpoint
from pipelines.training.checkpoint import Checkpoint, Keep, Writer
from pipelines.training.identity import Claim
from pipelines.training.metrics import record_part, recorded


@pytest.fixture(params=["local", "s3"])
def out(request, tmp_path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "out"))
    return open_storage(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def found(out: Storage) -> dict:
    return json.loads(out.read(CLAIM))


def test_an_out_is_one_command_s_until_it_ends(out):
    with held(Claim(out)):
        with pytest.raises(UsageError, match=rf"\(process {os.getpid()}\): .*`kill {os.getpid()}`"), held(Claim(out)):
            pass
        assert not found(out).get("ended")
    with held(Claim(out)) as second:
        assert second.holds()
        assert found(out)["attempt"] == 2


def test_of_many_commands_that_begin_together_one_holds_the_out(out):
    claims = [Claim(out, str(number)) for number in range(6)]
    refused = []
    start = threading.Barrier(len(claims))

    def take(claim: Claim) -> None:
        start.wait()
        try:
            claim.take()
        except UsageError:
            refused.append(claim.command)

    threads = [threading.Thread(target=take, args=[claim]) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 5
    assert [claim.command for claim in claims if claim.holds()] == [found(out)["command"]]
    assert found(out)["command"] not in refused


@pytest.mark.parametrize(
    ("claim", "alive"),
    [
        ({}, True),
        ({"pid": 1, "processes": "of another machine"}, True),
        ({"processes": "of another machine", "alive": time.time() - 601}, False),
        ({"pid": 2**22 + 1}, False),  # no process has this number
        ({"ended": True}, False),
    ],
)
def test_a_dead_command_is_followed_by_the_next_one(tmp_path, claim, alive):
    out = open_storage(str(tmp_path))
    out.write(CLAIM, json.dumps(of_this_process() | {"command": "before", "attempt": 7} | claim).encode())
    if alive:
        with pytest.raises(UsageError, match="is being trained by") as refused, held(Claim(out)):
            pass
        assert f"delete {tmp_path}/{CLAIM} to continue it at once" in str(refused.value)
        return
    before = Claim(out, "before")
    with held(Claim(out)) as now:
        assert found(out)["attempt"] == 8
        with pytest.raises(Superseded, match="in place of this command"):
            before.check()
        with pytest.raises(Superseded):
            before.beat()
        assert before.lost
        assert now.holds()


def test_a_killed_command_of_this_machine_is_not_waited_for(tmp_path):
    code = "import os, sys, signal; from pipelines import claims; from pipelines.storage import open_storage; "
    code += "claims.held(claims.Claim(open_storage(sys.argv[1]))).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    assert os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT).si_status == signal.SIGKILL
    with held(Claim(open_storage(str(tmp_path)))) as claim:  # nobody has waited for it: it is a zombie
        assert claim.holds()
    killed.wait()


def test_a_refused_command_leaves_no_claim_where_there_was_none(out):
    for stays in (False, True):
        with pytest.raises(UsageError, match="no such device"), held(Claim(out)):
            raise UsageError("no such device")
        assert out.exists(CLAIM) == stays
        with held(Claim(out)):
            pass


@pytest.mark.parametrize("damaged", [b'{"comm', b"\xff\xfe", b"[]", b"null", b'{"attempt": 1, "alive": 9e99}'])
def test_a_claim_that_is_damaged_or_removed_is_nobody_s(tmp_path, damaged):
    out = open_storage(str(tmp_path))
    out.write(CLAIM, damaged)
    with held(Claim(out)) as claim:
        assert claim.holds()
        (tmp_path / CLAIM).unlink()
        with pytest.raises(Superseded, match="was removed"):
            claim.check()
    assert not (tmp_path / CLAIM).exists()


def workers_of(claim: Claim) -> Claim:
    """As a new group of workers unpickles it and takes its number."""
    theirs = Claim(claim.out, claim.command, run_id=claim.run_id)
    theirs.next_attempt()
    return theirs


def test_a_group_of_workers_that_was_replaced_commits_nothing_and_sends_nothing(out, store):
    run = begin(store)
    run.close()
    with held(Claim(out)) as claim:
        claim.run_id = run.id
        old = workers_of(claim)
        old_run = tracking.open_run(store.uri, run.id, system_metrics=False, permit=old.holds)
        with Writer(out, Keep(9), old.check) as writer:
            log(old_run, 1, 5)
            old_run.flush()
            writer.start(Checkpoint(5, 40, 0.5, attempt=old.attempt), tensors(5))
            writer.wait()

            new = workers_of(claim)
            new_run = tracking.open_run(store.uri, run.id, system_metrics=False, permit=new.holds)
            log(old_run, 6, 10)
            began = time.monotonic()
            old_run.flush()
            part = record_part(old_run.logged(), old.attempt, 10)
            writer.start(Checkpoint(10, 80, 0.5, attempt=old.attempt), tensors(10), part)
            with pytest.raises(Superseded, match="other workers train into"):
                writer.wait()
            assert time.monotonic() - began < 30  # it is not tried again
            old_run.log_picture("one", np.zeros((8, 8, 3), np.uint8))
            assert old_run.close()  # nothing is left that a later process would have to send
            assert store.steps(run.id) == [1, 2, 3, 4, 5]

            log(new_run, 6, 8)
            part = record_part(new_run.logged(), new.attempt, 8)
            checkpoint.write(out, Checkpoint(8, 64, 0.5, attempt=new.attempt), tensors(8), Keep(9), new.check, part)
            assert new_run.close()
        assert [(c.step, c.attempt) for c in checkpoint.committed(out)] == [(5, old.attempt), (8, new.attempt)]
        assert new.attempt == old.attempt + 1
        assert {entry.path.split("/")[1] for entry in out.list("checkpoints")} == {"step-00000005", "step-00000008"}
        assert store.steps(run.id) == list(range(1, 9))
        assert [step for _, _, _, step in recorded(out)] == [6, 7, 8]


def test_a_command_that_was_replaced_leaves_the_status_of_the_run_to_the_other(out, store):
    claim = Claim(out, "first")
    claim.take()
    run = begin(store, permit=claim.holds)
    out.write(CLAIM, json.dumps(found(out) | {"command": "second"}).encode())
    with pytest.raises(Superseded), run:
        claim.check()
    assert MlflowClient(store.uri).get_run(run.id).info.status == "RUNNING"
