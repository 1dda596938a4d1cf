"""What happens to a training around it: kills, signals, bad batches, hung workers, storage that is away."""

import dataclasses
import json
import random
import shutil
import signal
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fault_proxy import FaultProxy
from training_process import Group, final, kill, run, run_script, variants

from pipelines.data.dataset import Dataset
from pipelines.data.order import SampleOrder
from pipelines.storage import open_storage, publish
from pipelines.training import checkpoint
from pipelines.training.health import WINDOW, LossWindow, record_of_skipped


def model(out: Path) -> bytes:
    """The exported weights."""
    return next(out.glob("*er/*.safetensors")).read_bytes()


@pytest.mark.parametrize(
    ("kind", "world_size", "zero_stage"),
    [("learner", 2, 0), pytest.param("adapter", 2, 2, marks=pytest.mark.soak)],
)
def test_a_run_killed_five_times_ends_as_an_undisturbed_one_bit_for_bit(
    kind, world_size, zero_stage, tmp_path, request
):
    """Curve, weights, moments, averages, queue, pointer, momentum encoder, statistics, loss window, data position."""
    options = request.getfixturevalue(f"{kind}_options")
    changes = {"max_steps": 14, "checkpoint_every": 2, "zero_stage": zero_stage, "clip_grad_norm": 0.5,
               "ema_decay": 0.9, "micro_batch_size": options.train.global_batch_size // world_size}  # fmt: skip
    undisturbed = run(variants(options, tmp_path / "undisturbed", **changes), world_size)
    rng = random.Random(0)
    killed = variants(options, tmp_path / "killed", **changes)
    for _ in range(5):
        group = Group(killed, world_size)
        done = checkpoint.committed(open_storage(killed.out))
        group.wait_for_step((done[-1].step if done else 0) + rng.randint(1, 2))
        kill(group, rng.randrange(world_size))
    group = run(killed, world_size)
    expected, got = undisturbed.curve(), group.curve()
    assert len(got) > len(expected)  # steps were lost and repeated
    assert dict(got) == dict(expected)
    assert all(loss == dict(expected)[step] for step, loss in got)
    assert final(tmp_path / "killed").step == 14
    assert final(tmp_path / "killed").sha256 == final(tmp_path / "undisturbed").sha256
    assert final(tmp_path / "killed").loss == final(tmp_path / "undisturbed").loss
    assert model(tmp_path / "killed") == model(tmp_path / "undisturbed")


def test_every_key_comes_once_per_epoch_over_kills_and_other_numbers_of_workers(learner_options, tmp_path):
    """Batch k is the same for 1, 2 and 3 workers; 88 samples in batches of 12: a batch ends an epoch and begins one."""
    options = variants(learner_options, tmp_path, global_batch_size=12, micro_batch_size=2, max_steps=15,
                       checkpoint_every=2)  # fmt: skip
    options = dataclasses.replace(options, contrast=dataclasses.replace(options.contrast, batch_block=2))
    for world_size, until in ((1, 4), (2, 8), (3, 11)):
        group = Group(options, world_size)
        group.wait_for_step(until)
        kill(group, world_size - 1)
    group = run(options, 2)
    dataset = Dataset.open(options.data)
    index = dataset.index("train")
    order = SampleOrder(index, dataset.digest, options.train.seed, together=True)
    batches = group.batches()
    for step, batch in batches:
        assert batch == order.slice(12 * (step - 1), 12 * step)
    by_step = dict(batches)
    assert sorted(by_step) == list(range(1, 16))
    seen = [item for step in sorted(by_step) for item in by_step[step]]
    for epoch in (0, 1):
        keys = [index["key"][row].as_py() for e, row in seen if e == epoch]
        assert sorted(keys) == sorted(index["key"].to_pylist())


@pytest.fixture(scope="module")
def first_rows(learner_options):
    """The rows of the learner's first global batches, as its order gives them."""
    dataset = Dataset.open(learner_options.data)
    order = SampleOrder(dataset.index("train"), dataset.digest, learner_options.train.seed, together=True)
    size = learner_options.train.global_batch_size
    return lambda step: [row for _, row in order.slice((step - 1) * size, step * size)]


@pytest.mark.parametrize(
    ("zero_stage", "kind", "exact_sums"),
    [(0, "gradient", True), (2, "nan", True), pytest.param(3, "gradient", True, marks=pytest.mark.soak),
     pytest.param(2, "gradient", False, marks=pytest.mark.soak), pytest.param(3, "nan", False, marks=pytest.mark.soak)],
)  # fmt: skip
def test_a_step_without_a_finite_loss_or_gradient_changes_nothing_and_is_written_down(
    zero_stage, kind, exact_sums, learner_options, first_rows, tmp_path
):  # fmt: skip
    options = variants(learner_options, tmp_path, max_steps=3, checkpoint_every=1, keep_checkpoints=9,
                       zero_stage=zero_stage, ema_decay=0.9, exact_sums=exact_sums)  # fmt: skip
    bad = first_rows(2)[-1]  # the last worker's, and no other step's
    run(options, 2, {bad: kind})
    before, at, after = checkpoint.committed(open_storage(str(tmp_path)))
    assert before.sha256["trained"] == at.sha256["trained"] != after.sha256["trained"]
    assert before.sha256["optimizer"] == at.sha256["optimizer"] != after.sha256["optimizer"]
    states = [checkpoint.read(open_storage(str(tmp_path)), c)["state"] for c in (before, at)]
    differing = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert differing == {"losses.counts"}
    if kind == "nan":  # nothing of it waits for the next step either: one that begins here is the same
        again = tmp_path / "again"
        shutil.copytree(tmp_path / "checkpoints/step-00000002", again / "checkpoints/step-00000002")
        run(dataclasses.replace(options, out=str(again)), 2)
        assert final(again).sha256 == after.sha256
    incident = json.loads((tmp_path / "incidents/step-00000002.json").read_text())
    keys = Dataset.open(options.data).index("train")["key"]
    assert [s["key"] for s in incident["samples"]] == [keys[row].as_py() for row in first_rows(2)]
    assert ("loss is nan" if kind == "nan" else "gradient is not finite") in incident["reason"]
    assert sorted(path.name for path in (tmp_path / "incidents").glob("*.safetensors")) == [
        "step-00000002-rank-0.safetensors", "step-00000002-rank-1.safetensors"
    ]  # fmt: skip


def test_a_bad_step_while_storage_is_away_stops_nothing_and_its_record_follows(
    learner_options, first_rows, bucket, s3_server, monkeypatch, tmp_path
):  # fmt: skip
    """The record of step 10 cannot be written; the steps after it are made meanwhile."""
    away = threading.Event()
    with FaultProxy(s3_server, lambda number: "reset" if away.is_set() else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        options = variants(learner_options, tmp_path / "run", max_steps=40, checkpoint_every=40)
        group = Group(options, 2, {first_rows(10)[0]: "nan"}, out=f"{bucket}/{tmp_path.name}")
        group.wait_for_step(1)
        away.set()
        group.wait_for_step(20)
        assert proxy.injected["reset"]
        away.clear()
        assert group.join() == [0, 0], group.log()
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert [step for step, _ in group.curve()] == list(range(1, 41))
    written = {entry.path for entry in open_storage(f"{bucket}/{tmp_path.name}").list("incidents/")}
    ends = (".json", "-rank-0.safetensors", "-rank-1.safetensors")
    assert written >= {f"incidents/step-00000010{end}" for end in ends}


def test_a_record_that_can_never_be_written_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "incidents").write_text("a file where a folder must be")
    files = record_of_skipped(3, {"reason": "the loss is nan"}, {"x": torch.zeros(2)}, 0)
    with checkpoint.Writer(open_storage(str(tmp_path)), checkpoint.Keep(1)) as writer:
        writer.record(3, files)
    assert "there is no record of step 3" in caplog.text


@pytest.mark.parametrize("damaged", [0, 1])
def test_workers_continue_from_the_checkpoint_that_worker_0_chose_or_not_at_all(
    damaged, learner_options, tmp_path
):  # fmt: skip
    """Each sees a storage of its own; the newest checkpoint of one cannot be read."""
    options = variants(learner_options, tmp_path / "run", max_steps=4, checkpoint_every=2)
    run(options, 2)
    for rank in range(2):
        shutil.copytree(tmp_path / "run", tmp_path / f"seen-by-{rank}")
    (tmp_path / f"seen-by-{damaged}/checkpoints/step-00000004/state.safetensors").write_bytes(b"damaged")
    group = Group(variants(options, tmp_path / "run", max_steps=6), 2, out=str(tmp_path / "seen-by-{rank}"))
    if damaged == 0:
        assert group.join() == [0, 0], group.log()
        undisturbed = run(variants(options, tmp_path / "undisturbed", max_steps=6), 2)
        assert final(tmp_path / "seen-by-0").sha256 == final(undisturbed.folder).sha256
    else:
        group.processes[1].join(120)
        group.kill()
        assert group.processes[1].exitcode == 1
        assert "worker 1 cannot read" in group.log()
        assert final(tmp_path / "seen-by-0").step == 4


def test_a_bad_step_ends_the_run_where_that_is_asked(learner_options, first_rows, tmp_path):
    options = variants(learner_options, tmp_path, max_steps=6, checkpoint_every=1, on_spike="stop")
    group = Group(options, 2, {first_rows(3)[0]: "nan"})
    assert group.join() == [1, 1]
    assert final(tmp_path).step == 2
    assert "step 3 was not taken, because the loss is nan, and train.on_spike is stop" in group.log()


def test_a_loss_far_above_the_last_ones_is_a_spike_and_a_continued_window_judges_alike():
    window = LossWindow(5.0)
    rng = random.Random(0)
    for _ in range(WINDOW + 20):
        loss = 1 + rng.gauss(0, 0.1)
        assert window.anomaly(loss) is None
        window.take(loss)
    continued = LossWindow(5.0)
    continued.load_state(window.state())
    for judge in (window, continued):
        assert judge.anomaly(1.45) is None
        assert "above" in judge.anomaly(1.8)
        assert judge.anomaly(0.2) is None
    assert LossWindow(0.0).anomaly(1e9) is None
    assert "nan" in LossWindow(0.0).anomaly(float("nan"))


def test_sigterm_to_one_worker_checkpoints_the_same_step_on_all(learner_options, tmp_path):
    options = variants(learner_options, tmp_path, max_steps=10_000, checkpoint_every=10_000)
    group = Group(options, 2)
    group.wait_for_step(2)
    group.send(1, signal.SIGTERM)
    assert group.join(60) == [1, 1]
    step = final(tmp_path).step
    assert step == group.curve()[-1][0]
    assert group.log().count(f"checkpointed at step {step}") >= 2


def test_a_worker_without_progress_says_where_it_is_and_dies(learner_options, first_rows, tmp_path):
    """The one that hangs, and those that wait for it; `test_restarts` stops one."""
    options = variants(learner_options, tmp_path, max_steps=99, hang_seconds=4.0)
    group = Group(options, 2, {first_rows(3)[-1]: "sleep"})
    group.wait_for_step(2)
    began = time.monotonic()
    assert group.join(60) == [1, 1]
    assert time.monotonic() - began < 30
    assert "Timeout (0:00:0" in group.log()
    assert "in _spoil" in group.log()


def test_a_checkpoint_goes_on_where_tensors_do_not_divide_among_workers_of_zero_3(tmp_path, request):
    options = request.getfixturevalue("learner_options")
    changes = {"global_batch_size": 24, "micro_batch_size": 4, "checkpoint_every": 3}
    for arm in ("whole", "parts"):
        run(variants(options, tmp_path / arm, max_steps=2, **changes), 1)
    whole = run(variants(options, tmp_path / "whole", max_steps=3, **changes), 1)
    parts = run(variants(options, tmp_path / "parts", max_steps=3, zero_stage=3, **changes), 3)
    assert dict(parts.curve())[3] == pytest.approx(dict(whole.curve())[3], rel=1e-5)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["learner", "adapter"])
def test_any_zero_stage_and_number_of_workers_goes_on_from_a_checkpoint_bit_for_bit(kind, tmp_path, request):
    """From step 5 of one worker without ZeRO, fifty steps on; asked for are 1e-5 at the first and 1e-3 at the last."""
    options = request.getfixturevalue(f"{kind}_options")
    changes = {"global_batch_size": 24, "micro_batch_size": 4, "max_steps": 55, "checkpoint_every": 55,
               "clip_grad_norm": 0.5}  # fmt: skip
    run(variants(options, tmp_path / "begun", **changes | {"max_steps": 5}), 1)
    curves = {}
    for world_size in (1, 2, 3):
        for zero_stage in range(4):
            out = tmp_path / f"{world_size}-{zero_stage}"
            shutil.copytree(tmp_path / "begun", out)
            group = run(variants(options, out, zero_stage=zero_stage, **changes), world_size)
            curves[world_size, zero_stage] = dict(group.curve())
            errors = [abs(curves[world_size, zero_stage][step] / curves[1, 0][step] - 1) for step in range(6, 56)]
            print(kind, world_size, zero_stage, f"first {errors[0]:.1e} last {errors[-1]:.1e} most {max(errors):.1e}")
            assert not any(errors)
            assert model(out) == model(tmp_path / "1-0")


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_a_training_whose_storage_is_away_for_a_minute_ends_as_an_undisturbed_one(
    cache_gb, learner_options, bucket, s3_server, monkeypatch, tmp_path
):  # fmt: skip
    """Shards and checkpoints are on S3. With copies of the shards it trains on meanwhile and waits with its checkpoint;
    without, all workers wait for the one whose read waits, far beyond the time after which a step counts as hung."""
    away = threading.Event()
    changes = {"max_steps": 300, "checkpoint_every": 20, "cache_gb": cache_gb, "hang_seconds": 10.0}
    undisturbed = run(variants(learner_options, tmp_path / "undisturbed", **changes), 2)
    remote = f"{bucket}/outage-{cache_gb:.0f}"
    publish(Path(learner_options.data), f"{remote}/shards")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with FaultProxy(s3_server, lambda number: "reset" if away.is_set() else None) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        options = dataclasses.replace(learner_options, data=f"{remote}/shards")
        options = variants(options, tmp_path / "disturbed", **changes)
        group = Group(options, 2, out=f"{remote}/out")
        group.wait_for_step(30)
        away.set()
        time.sleep(60)
        away.clear()
        assert group.join() == [0, 0], group.log()
        assert proxy.injected["reset"] > 5
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert dict(group.curve()) == dict(undisturbed.curve())
    last = [checkpoint.committed(open_storage(str(out)))[-1] for out in (f"{remote}/out", undisturbed.folder)]
    assert last[0].sha256 == last[1].sha256


ENDED = """
import json, sys
import torch
from pipelines.data.dataset import Dataset
from pydantic import TypeAdapter
from pipelines.training.config import LearnerOptions
from pipelines.training.health import Stop, Unwritable
from pipelines.training.learner_stage import LearnerStage
from pipelines.training.loop import Loop

options = TypeAdapter(LearnerOptions).validate_python(json.loads(sys.argv[1]))
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
said, shown = [], []
asked = lambda: Stop.END if said else Stop.NO  # the user hears of it on rank 0 alone, and ends the run
try:
    dataset = Dataset.open(options.data)
    report = lambda step, values: shown.append(step)
    Loop(LearnerStage(options), dataset, torch.device("cpu"), None, report, asked=asked, say=said.append).train()
except Unwritable as error:
    print(json.dumps([said[:1], str(error), shown]))
torch.distributed.destroy_process_group()
"""


def test_a_training_says_that_the_disk_is_full_and_ends_on_all_workers_when_it_is_asked_to(
    learner_options,
    small_disk,
    tmp_path,
):
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - (100 << 10)))
    options = variants(learner_options, small_disk / "out", max_steps=50, checkpoint_every=2, log_every=20)
    printed = run_script(ENDED, 2, [json.dumps(asdict(options))], tmp_path)
    [said], error, shown = json.loads(printed.splitlines()[-1])
    assert shown == [1]  # the first step, and no logged one yet
    assert "checkpoint of step 2" in said
    assert "no space left" in said
    assert "ended before storage took the checkpoint" in error or "no space left" in error
