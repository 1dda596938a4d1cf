"""Placement over machines and clusters that nobody here owns."""

import dataclasses
import itertools
import math

import pytest

from deedsr.errors import UsageError
from pipelines.placement import Nodes, Offer, place_networks, place_shards
from pipelines.training.config import ContrastOptions, TrainOptions, asked_micro_batch, check, micro_batch
from pipelines.training.placement import arithmetic, decided, place_training
from pipelines.training.schedules import PRESETS

CORES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
GPUS = (0, 1, 2, 3, 4, 6, 8)
GIB = 1 << 30
NAMES = [(stage, preset) for stage, presets in PRESETS.items() for preset in presets]


def machine(cores: int, gpus: int = 0, memory: int = 64 * GIB) -> Offer:
    return Offer((Nodes(cores, gpus),), local=True, memory=memory)


def cluster(*nodes: Nodes, growth: tuple[Nodes, ...] | None = ()) -> Offer:
    return Offer((Nodes(0), *nodes), growth)


def preset(stage: str, name: str) -> tuple[TrainOptions, int]:
    """Options of a preset, and the samples that must stay in one forward."""
    values = PRESETS[stage][name]
    unit = ContrastOptions(**values["contrast"]).batch_block if stage == "learner" else 1
    return TrainOptions(**values["train"]), unit


def require_valid(plan, offer, train, unit):
    fewest, most = plan.workers
    assert micro_batch(train, most, unit) == (plan.micro_batch, plan.accumulation)
    assert most * plan.micro_batch * plan.accumulation == train.global_batch_size
    assert plan.micro_batch % unit == 0
    assert offer.growth is None or offer.holds(plan.cpus, plan.gpus) >= fewest
    assert (plan.device, plan.backend) == (("cuda", "nccl") if plan.gpus else ("cpu", "gloo"))
    assert plan.threads == (1 if not plan.gpus and train.exact_sums is not False else max(1, int(plan.cpus)))
    assert plan.loader_threads >= 2
    assert plan.cpus > 0


@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_every_preset_has_a_plan_on_every_machine_with_default_options(stage, name):
    train, unit = preset(stage, name)
    for cores, gpus in itertools.product(range(1, 129), range(9)):
        plan = place_training(machine(cores, gpus), train, unit)
        require_valid(plan, machine(cores, gpus), train, unit)
        assert plan.gpus == bool(gpus)
        assert plan.workers[0] == plan.workers[1] <= (gpus or cores)
        assert plan.micro_batch == asked_micro_batch(train, unit)  # whole: rounding is the same everywhere


@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_every_preset_has_a_plan_on_every_cluster_that_has_or_starts_gpus(stage, name):
    train, unit = preset(stage, name)
    for cores, gpus, count in itertools.product(CORES, GPUS[1:], (1, 2, 4, 16)):
        nodes = Nodes(cores, gpus, count)
        for offer in (cluster(nodes), cluster(growth=(Nodes(16, 0, 32), nodes)), cluster(growth=None)):
            plan = place_training(offer, train, unit)
            require_valid(plan, offer, train, unit)
            assert plan.gpus == 1
    for cores, count in itertools.product(CORES, (1, 2, 4, 16)):
        offer = cluster(Nodes(cores, 0, count))
        plan = place_training(offer, dataclasses.replace(train, gpus_per_worker=0), unit)
        require_valid(plan, offer, train, unit)
        assert plan.gpus == 0


@pytest.mark.parametrize(("stage", "name"), NAMES)
def test_any_options_give_a_valid_plan_or_one_error_that_names_an_option(stage, name):
    preset_options, unit = preset(stage, name)
    changes = [
        {"num_workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus, "micro_batch_size": micro}
        for workers, cpus, gpus, micro in itertools.product(
            ("auto", 1, 2, 3, 8, "1..4"), (None, 1, 0.5, 4, 64), (None, 0, 1), (None, 1, 5, 32)
        )
    ]
    offers = [machine(cores, gpus) for cores, gpus in itertools.product((1, 2, 4, 16, 128), (0, 1, 8))]
    offers += [cluster(), cluster(Nodes(4)), cluster(Nodes(8, 2, 3)), cluster(growth=None),
               cluster(growth=(Nodes(16), Nodes(16, 1, 4)))]  # fmt: skip
    plans, refusals = 0, []
    for change, offer in itertools.product(changes, offers):
        train = dataclasses.replace(preset_options, **change)
        try:
            plan = place_training(offer, train, unit)
        except UsageError as error:
            refusals.append(str(error))
        else:
            plans += 1
            require_valid(plan, offer, train, unit)
    assert plans
    assert refusals
    assert all("train." in refusal and "\n" not in refusal for refusal in refusals)


@pytest.mark.parametrize(
    ("offer", "stage", "name", "expected"),
    [
        (machine(8), "learner", "tiny",
         "2 workers x 4 CPUs, no GPU, gloo, micro-batch 32 x 1, 1 + 4 threads (compute + loader)"),
        (machine(1), "learner", "tiny",
         "1 worker x 1 CPU, no GPU, gloo, micro-batch 32 x 2, 1 + 2 threads (compute + loader)"),
        (machine(4, memory=8 * GIB), "learner", "paper",
         "2 workers x 2 CPUs, no GPU, gloo, micro-batch 24 x 2, 1 + 2 threads (compute + loader)"),
        (machine(64, 8), "learner", "paper",
         "4 workers x 1 GPU and 8 CPUs, nccl, micro-batch 24 x 1, 8 + 8 threads (compute + loader); 4 of 8 GPUs idle: "
         "--train.global_batch_size 192 would use them all"),
        (machine(16, 1), "adapter", "fast",
         "1 worker x 1 GPU and 8 CPUs, nccl, micro-batch 8 x 32, 8 + 8 threads (compute + loader)"),
        (machine(4, 8), "adapter", "paper",
         "8 workers x 1 GPU and 0.5 CPUs, nccl, micro-batch 2 x 8, 1 + 2 threads (compute + loader)"),
        (machine(64, 8), "adapter", "tiny",
         "2 workers x 1 GPU and 8 CPUs, nccl, micro-batch 4 x 1, 8 + 8 threads (compute + loader); 6 of 8 GPUs idle: "
         "--train.micro_batch_size 1 would use them all"),
    ],
)  # fmt: skip
def test_the_line_says_where_a_training_runs_and_which_option_would_use_idle_gpus(offer, stage, name, expected):
    assert str(place_training(offer, *preset(stage, name))).startswith(expected)


def test_an_elastic_range_takes_what_fits_and_needs_the_fewest():
    train = TrainOptions(global_batch_size=12, num_workers="1..4")
    assert place_training(machine(2), train).workers == (1, 4)
    assert str(place_training(machine(4), train)).startswith("1 to 4 workers x 1 CPU, no GPU")
    with pytest.raises(UsageError, match="train.num_workers 3..4 needs 3 CPUs, this machine has 2 CPUs: ask"):
        place_training(machine(2), dataclasses.replace(train, num_workers="3..4"))


@pytest.mark.parametrize(
    ("offer", "change", "named"),
    [
        (cluster(Nodes(16, 0, 4)), {}, "no GPU and no autoscaler that could add one: --train.gpus_per_worker 0"),
        (cluster(growth=(Nodes(16, 0, 4),)), {}, "its autoscaler has no node type with one: --train.gpus_per_worker 0"),
        (machine(8), {"gpus_per_worker": 1}, "this machine has no GPU: --train.gpus_per_worker 0"),
        (machine(8, 2), {"num_workers": 4}, "train.num_workers 4 needs 4 GPUs, this machine has 2 GPUs: ask for fewer"),
        (cluster(Nodes(8, 2)), {"num_workers": 4}, "needs 4 GPUs, this cluster has 2 GPUs: ask for fewer"),
        (cluster(growth=(Nodes(8, 1, 2),)), {"num_workers": 4}, "this cluster has 2 GPUs at most: ask for fewer"),
        (
            machine(4),
            {"cpus_per_worker": 3, "num_workers": 2},
            "train.num_workers 2 with train.cpus_per_worker 3 needs 6 CPUs, this machine has 4 CPUs: ask for fewer",
        ),
        (
            machine(2),
            {"cpus_per_worker": 4},
            "train.cpus_per_worker 4: no node of this machine has more than 2: ask",
        ),
    ],
)
def test_what_could_never_start_is_refused_naming_the_option(offer, change, named):
    with pytest.raises(UsageError, match=named):
        place_training(offer, TrainOptions(**change))


def test_an_autoscaler_with_unknown_node_types_is_waited_for():
    assert place_training(cluster(Nodes(16), growth=None), TrainOptions(num_workers=4)).bundle == {"CPU": 1, "GPU": 1}
    assert place_networks(cluster(growth=None), "auto", None, "latents").bundle == {"CPU": 1, "GPU": 1}


@pytest.mark.parametrize("wrong", [0.5, 2, -1, 1.5])
def test_fractions_of_a_gpu_and_several_are_refused_with_the_reason(wrong):
    from pipelines.training.config import AdapterOptions

    with pytest.raises(UsageError, match="train.gpus_per_worker must be 0 or 1, got .*NCCL refuses"):
        check(AdapterOptions(train=TrainOptions(gpus_per_worker=wrong)))


def test_gpus_can_be_left_alone_on_a_machine_that_has_some():
    plan = place_training(machine(8, 2), TrainOptions(gpus_per_worker=0))
    assert (plan.device, plan.gpus) == ("cpu", 0)
    assert "2 GPUs idle (train.gpus_per_worker is 0)" in str(plan)
    assert place_networks(machine(8, 2), "cpu", None, "upscale").device == "cpu"


def test_networks_get_a_gpu_each_or_as_many_cpus_as_the_memory_does_for():
    for cores, gpus in itertools.product(range(1, 129), range(9)):
        for device in ("auto", "cpu"):
            plan = place_networks(machine(cores, gpus), device, None, "latents")
            assert plan.gpus == (device == "auto" and gpus > 0)
            assert plan.workers >= 1
            # Room is left on each node for the tasks that feed the actors.
            assert plan.cpus * (gpus if plan.gpus else min(plan.workers, cores)) < cores
    assert place_networks(machine(64, memory=16 * GIB), "auto", None, "latents").workers == 6
    assert place_networks(machine(64), "auto", 3, "latents").workers == 3
    grows = cluster(growth=(Nodes(16, 0, 32), Nodes(16, 1, 4)))
    assert (place_networks(grows, "auto", None, "x").workers, place_networks(grows, "cpu", None, "x").gpus) == (4, 0)
    with pytest.raises(UsageError, match="this cluster has no GPU and no autoscaler.*--device cpu runs `evaluate`"):
        place_networks(cluster(Nodes(8)), "auto", None, "evaluate")
    with pytest.raises(UsageError, match="this machine has no GPU: --device cpu"):
        place_networks(machine(8), "cuda", None, "upscale")


def test_shards_take_every_cpu_that_the_memory_does_for():
    assert place_shards(machine(16), None).workers == 16
    assert place_shards(machine(32, memory=16 * GIB), None).workers == math.floor(16 * GIB * 0.6 / 500e6)
    assert place_shards(machine(4, memory=GIB // 4), None).workers == 1
    assert place_shards(cluster(growth=(Nodes(16, 0, 32),)), None).workers == 512
    assert place_shards(machine(2), 8).workers == 8


def test_an_autoscaler_that_answers_is_asked_for_the_most_that_the_batch_divides_over_then_for_less():
    offer, (train, unit) = Offer((Nodes(0),), growth=None, answers=True), preset("learner", "fast")
    assert [place_training(offer, train, unit, most).fewest for most in (None, 7, 3, 1)] == [8, 4, 2, 1]


def test_exact_sums_compute_on_one_thread_unless_told_otherwise():
    threads = lambda **options: place_training(machine(16), TrainOptions(num_workers=2, **options)).threads
    assert (threads(), threads(exact_sums=False), threads(compute_threads=3)) == (1, 8, 3)


def test_little_shared_memory_between_gpus_is_said_with_the_remedy():
    docker = dataclasses.replace(machine(16, 2), shared_memory=64 << 20)
    assert "/dev/shm has 64 MiB free" in str(place_training(docker, TrainOptions()))
    for offer in (
        dataclasses.replace(docker, shared_memory=4 << 30),
        dataclasses.replace(docker, nodes=(Nodes(16, 1),)),
    ):
        assert "shm" not in str(place_training(offer, TrainOptions()))
    assert "shm" not in str(place_training(docker, TrainOptions(gpus_per_worker=0)))


def test_a_run_begins_with_the_arithmetic_of_its_device_and_keeps_it():
    paper = TrainOptions(**PRESETS["adapter"]["paper"]["train"])
    on_gpu, on_cpu = decided(paper, True), decided(paper, False)
    assert (on_gpu.exact_sums, on_gpu.tf32) == (False, True)
    assert (on_cpu.exact_sums, on_cpu.tf32) == (True, False)
    assert arithmetic(on_gpu) == "fp32 with TF32"
    assert arithmetic(decided(dataclasses.replace(paper, exact_sums=True), True)) == "fp32 without TF32, exact sums"
    assert decided(paper, True, dataclasses.asdict(on_cpu)) == on_cpu
    assert decided(paper, False, dataclasses.asdict(on_gpu)) == on_gpu
    asked = dataclasses.replace(paper, tf32=False)
    assert decided(asked, True, dataclasses.asdict(on_gpu)).tf32 is False


def test_a_run_of_an_earlier_version_keeps_exact_sums_and_pytorchs_tf32():
    paper = TrainOptions(**PRESETS["adapter"]["paper"]["train"])
    began = dataclasses.asdict(paper) | {"exact_sums": True}
    del began["tf32"]
    continued = decided(paper, True, began)
    assert (continued.exact_sums, continued.tf32) == (True, None)


@pytest.mark.parametrize(("stage", "sizes"), [("adapter", [8, 8, 16, 32]), ("learner", [48, 48, 96, 192])])
def test_fast_takes_its_micro_batch_from_the_card_once(stage, sizes):
    train, unit = preset(stage, "fast")
    cards = [0, 24 * GIB, 40 * GIB, 80 * GIB]
    begun = [decided(train, True, memory=card, unit=unit) for card in cards]
    assert [one.micro_batch_size for one in begun] == sizes
    for card in cards:
        assert decided(train, True, dataclasses.asdict(begun[3]), memory=card, unit=unit) == begun[3]
    # No GPU stays idle for it.
    for gpus in (1, 2, 4, 8):
        one = decided(train, True, memory=80 * GIB, workers=gpus, unit=unit)
        assert place_training(machine(64, gpus), one, unit).workers == (gpus, gpus)
