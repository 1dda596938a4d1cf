"""Training: the order of samples, ZeRO stages and worker counts that change nothing, checkpoints, continuation."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import TypeAdapter
from training_process import run_processes, variants

from deedsr.errors import DeeDSRError, UsageError
from deedsr.learner.moco import UNGROUPED
from pipelines.data.dataset import Dataset
from pipelines.data.order import SampleOrder
from pipelines.storage import open_storage
from pipelines.training import checkpoint
from pipelines.training.config import (
    AdapterOptions,
    DiffusionOptions,
    LearnerOptions,
    TrainOptions,
    check,
    micro_batch,
    worker_range,
)
from pipelines.training.learner_stage import LearnerStage
from pipelines.training.schedules import PRESETS
from pipelines.training.stage import unit


@pytest.fixture(scope="module")
def index():
    contents = [f"c{i // 4:03d}" for i in range(100)]
    return pa.table({"shard": [f"s{i // 20}" for i in range(100)], "content": contents})


@pytest.mark.parametrize("together", [True, False])
def test_every_epoch_holds_every_row_once_and_batches_follow_the_same_sequence_for_any_number_of_workers(
    index, together
):
    order = SampleOrder(index, "digest", 0, together=together)
    sequence = order.slice(0, 300)
    for epoch in range(3):
        assert sorted(row for e, row in sequence if e == epoch) == list(range(100))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    batch = 24
    for workers in (1, 2, 3):
        share = batch // workers
        seen = [
            item
            for step in range(10)
            for rank in range(workers)
            for item in order.slice(step * batch + rank * share, step * batch + (rank + 1) * share)
        ]
        assert seen == sequence[: 10 * batch]


def test_variants_of_one_content_stay_adjacent_and_the_order_depends_on_digest_and_seed(index):
    order = SampleOrder(index, "digest", 0, together=True)
    groups = order.epoch(0) // 4
    assert all(len(set(groups[i : i + 4])) == 1 for i in range(0, 100, 4))
    assert SampleOrder(index, "other", 0, together=True).epoch(0).tolist() != order.epoch(0).tolist()
    assert SampleOrder(index, "digest", 1, together=True).epoch(0).tolist() != order.epoch(0).tolist()


def test_samples_are_permuted_within_windows_of_shards(index):
    rows = SampleOrder(index, "digest", 0, together=False, window=2).epoch(0)
    shards = rows // 20
    assert [len(set(shards[i : i + 40])) for i in (0, 40)] == [2, 2]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_workers": "4..1"}, "train.num_workers"),
        ({"num_workers": "many"}, "train.num_workers"),
        ({"lr": -1.0}, "train.lr"),
        ({"max_steps": 0}, "train.max_steps"),
        ({"compile": True, "zero_stage": 3}, "train.compile"),
        ({"ema_decay": 1.0}, "train.ema_decay"),
        ({"schedule_steps": 100}, "train.schedule_steps"),
        ({"schedule": "cosine", "schedule_steps": 5, "warmup_steps": 5}, "train.schedule_steps"),
        ({"global_batch_size": 33}, "contrast.batch_block"),
    ],
)
def test_impossible_values_are_refused_by_name(change, named):
    options = LearnerOptions(train=TrainOptions(**change))
    with pytest.raises(UsageError, match=named):
        check(options)


@pytest.mark.parametrize("change", [{"noise_guidance": 1.5}, {"max_timestep": 0}, {"snr_gamma": -1}, {"lr_crop": -1}])
def test_impossible_questions_to_the_adapter_are_refused_by_name(change):
    with pytest.raises(UsageError, match=f"diffusion.{next(iter(change))}"):
        check(AdapterOptions(diffusion=DiffusionOptions(**change)))


def test_a_batch_that_does_not_divide_over_the_workers_is_refused():
    assert micro_batch(TrainOptions(global_batch_size=32, micro_batch_size=8), 2, 4) == (8, 2)
    with pytest.raises(UsageError, match="global_batch_size"):
        micro_batch(TrainOptions(global_batch_size=32), 3)
    with pytest.raises(UsageError, match="batch_block"):
        micro_batch(TrainOptions(global_batch_size=32), 4, unit=16)


def test_options_survive_json():
    options = AdapterOptions(data="d", sampling={"eta": 1.0}, train=TrainOptions(num_workers="1..4"))
    assert TypeAdapter(AdapterOptions).validate_python(json.loads(json.dumps(asdict(options)))) == options
    assert worker_range("1..4") == (1, 4)


def _checkpoint(step):
    tensors = {part: {"x": torch.full((3,), float(step))} for part in checkpoint.PARTS}
    return checkpoint.Checkpoint(step, step * 8, 0.5), tensors


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path, caplog):
    out = open_storage(str(tmp_path))
    assert checkpoint.read_latest(out) is None
    for step in (10, 20, 30):
        checkpoint.write(out, *_checkpoint(step), checkpoint.Keep(2))
    assert [c.step for c in checkpoint.committed(out)] == [20, 30]
    assert not (tmp_path / "checkpoints/step-00000010/trained.safetensors").exists()
    damaged = tmp_path / "checkpoints/step-00000030/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    found = checkpoint.read_latest(out)
    assert found is not None
    assert found[0].step == 20
    assert found[1]["trained"]["x"].tolist() == [20.0] * 3
    assert "step-00000030 is damaged" in caplog.text
    (tmp_path / "checkpoints/step-00000020/state.safetensors").unlink()
    with pytest.raises(DeeDSRError, match="every checkpoint"):
        checkpoint.read_latest(out)


def test_a_checkpoint_without_its_record_does_not_count(tmp_path):
    out = open_storage(str(tmp_path))
    checkpoint.write(out, *_checkpoint(10), checkpoint.Keep(2))
    (tmp_path / "checkpoints/step-00000010/checkpoint.json").unlink()
    assert checkpoint.read_latest(out) is None


# ---------------------------------------------------------------------------------------------------------------------
# Distributed arithmetic: real DeepSpeed engines in real processes over gloo, without the cost of a Ray Train start


@pytest.fixture(scope="module")
def trained_learner(learner_options, tmp_path_factory) -> Path:
    """Exported learner of a few steps, made by the ZeRO test's processes."""
    out = tmp_path_factory.mktemp("learner")
    run_processes(1, [dataclasses.replace(learner_options, out=str(out))])
    return out


def test_a_sample_knows_its_degradation_group_and_validation_counts_no_other_of_it_as_a_negative(learner_options):
    dataset = Dataset.open(learner_options.data)
    index = dataset.index("train")
    groups = pa.array([3, None, 3, 2**30] * (index.num_rows // 4), pa.int32())
    index = index.set_column(index.column_names.index("degradation_group"), "degradation_group", groups)
    stage = LearnerStage(learner_options)
    learner = stage.build(torch.device("cpu"), torch.float32).eval()
    samples = [stage.sample(dataset, index, row, 0) for row in range(4)]
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    assert batch["group"].tolist() == [3, UNGROUPED, 3, 2**30]
    with torch.no_grad():
        rows = stage.validation_step(learner, batch)
        query, key = (learner(unit(batch[part]), embedding=True) for part in ("query", "key"))
    scores = query @ key.T / learner_options.contrast.temperature
    scores[0, 2] = scores[2, 0] = -torch.inf
    torch.testing.assert_close(
        stage.validation_metrics(rows)["loss"], torch.nn.functional.cross_entropy(scores, torch.arange(4))
    )


def test_a_queue_from_before_there_were_groups_goes_on(learner_options):
    stage, fresh = LearnerStage(learner_options), LearnerStage(learner_options)
    for one in (stage, fresh):
        one.build(torch.device("cpu"), torch.float32)
    keys = torch.nn.functional.normalize(torch.randn(8, stage.contrast.queue_KD.shape[1]))
    stage.contrast.advance(keys, torch.arange(8), torch.arange(8))
    state = {name: tensor.clone() for name, tensor in stage.state().items()}
    fresh.load_state({name: tensor for name, tensor in state.items() if "groups" not in name})
    assert torch.equal(fresh.contrast.queue_KD, stage.contrast.queue_KD)
    assert fresh.contrast.queue_sources_K.tolist() == stage.contrast.queue_sources_K.tolist()
    assert set(fresh.contrast.queue_groups_K.tolist()) == {UNGROUPED}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_noisy_latent_pulled_to_the_lr_still_has_the_hr_as_its_answer(adapter_options, prediction):
    """A base that knows the HR latent has no loss, whatever share of x_t is the LR's."""
    from deedsr.adapter.objective import model_output
    from deedsr.sampling.autoencoder import encode_latents
    from deedsr.sampling.guidance import alpha_bar
    from pipelines.training.adapter_stage import AdapterStage

    diffusion = DiffusionOptions(lr_crop=16, noise_guidance=1.0, max_timestep=300)
    options = dataclasses.replace(adapter_options, diffusion=diffusion)
    stage = AdapterStage(options, 4)
    stage.build(torch.device("cpu"), torch.float32)
    stage.scheduler.register_to_config(prediction_type=prediction)
    dataset = Dataset.open(options.data)
    index = dataset.index("train")
    samples = [stage.sample(dataset, index, row, 0) for row in range(8)]
    assert max(s["timestep"] for s in samples) < 300
    strengths = [float(s["guidance"]) for s in samples]
    assert max(strengths) == 1
    assert min(strengths) < 1
    batch = {name: torch.from_numpy(np.stack([s[name] for s in samples])) for name in samples[0]}
    z_hr = encode_latents(stage.vae, 2 * unit(batch["hr_crop"]) - 1)

    def oracle(noisy, t, z_lr, degradation):
        abar = torch.stack([alpha_bar(stage.scheduler, one) for one in t.float()]).view(-1, 1, 1, 1)
        return model_output(z_hr, noisy, abar, prediction)

    loss, _ = stage.loss(oracle, batch)
    ignorant, _ = stage.loss(lambda noisy, t, z_lr, degradation: torch.zeros_like(noisy), batch)
    assert loss < 1e-6 * ignorant


def test_zero_stages_workers_and_accumulation_change_no_bit_of_a_loss(learner_options, adapter_options, tmp_path):
    """One worker that accumulates four equal micro-batches and two that share them, which add up in another order; the
    soak test has every ZeRO stage, three workers and fifty steps."""

    def runs(workers: int, learner_stages: tuple[int, ...], adapter_stages: tuple[int, ...]) -> dict[str, list]:
        options = [
            variants(o, tmp_path / f"{kind}-{workers}-{zero}", zero_stage=zero, micro_batch_size=micro, max_steps=3,
                     clip_grad_norm=0.5)
            for kind, o, micro, stages in (
                ("learner", variants(learner_options, tmp_path, global_batch_size=16), 4, learner_stages),
                ("adapter", variants(adapter_options, tmp_path, global_batch_size=8), 2, adapter_stages),
            )
            for zero in stages
        ]  # fmt: skip
        return {Path(o.out).name: curve for o, curve in zip(options, run_processes(workers, options), strict=True)}

    curves = runs(1, (0,), (0, 1)) | runs(2, (2,), (3,))
    for name, curve in curves.items():
        assert [step for step, _ in curve] == [1, 2, 3], name
        assert curve == curves[name.split("-")[0] + "-1-0"], name


@pytest.mark.parametrize(("stage", "preset"), [(s, p) for s, presets in PRESETS.items() for p in presets])
def test_presets_have_the_same_micro_batch_for_one_worker_and_for_two(stage, preset):
    values = PRESETS[stage][preset]
    train = TrainOptions(**values["train"])
    unit = values["contrast"]["batch_block"] if stage == "learner" else 1
    assert micro_batch(train, 1, unit)[0] == micro_batch(train, 2, unit)[0]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_other_micro_batches_differ_by_rounding_alone(learner_options, adapter_options, tmp_path):
    """In float64 one forward of the whole batch and accumulated halves stay together for fifty steps, although their
    fp32 losses drift apart by percents: what differs is rounding, which training amplifies.

    Statistics over eight samples: over the two of the other tests, whose last feature maps have one pixel, batch
    normalisation is a sign function, and no precision is enough for it.
    """
    learner_options = dataclasses.replace(
        learner_options,
        model=dataclasses.replace(learner_options.model, norm_group=8),
        contrast=dataclasses.replace(learner_options.contrast, batch_block=8),
        train=dataclasses.replace(learner_options.train, global_batch_size=16),
    )
    arms = [
        variants(o, tmp_path / f"{kind}-{parts}", max_steps=50, checkpoint_every=50,
                 micro_batch_size=o.train.global_batch_size // parts)
        for kind, o in (("learner", learner_options), ("adapter", adapter_options))
        for parts in (1, 2)
    ]  # fmt: skip
    curves = [np.array(curve)[:, 1] for curve in run_processes(1, arms, FLOAT64="1")]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-9, err_msg="learner")
    np.testing.assert_allclose(curves[3], curves[2], rtol=1e-9, err_msg="adapter")
