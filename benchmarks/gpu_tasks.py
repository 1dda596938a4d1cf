"""What `benchmarks.gpu` measures, each task in a process of its own: JSON in, one JSON line out, as
`DS_ACCELERATOR=cuda python -m benchmarks.gpu_tasks TASK JSON`.

`size` is `tiny` (the shipped model) or `full` (Stable Diffusion 2.1-base's layout with random weights, in `work`).
Batches are random and lie in the device's memory, so nothing but the networks is measured. No Ray.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.full_size import HR, SCALE
from deedsr.dataset.manifest import LatentsSource
from deedsr.precision import set_tf32 as tf32
from pipelines.training.adapter_stage import AdapterStage
from pipelines.training.config import (
    AdapterModelOptions,
    AdapterOptions,
    ContrastOptions,
    DiffusionOptions,
    LearnerModelOptions,
    LearnerOptions,
    TrainOptions,
)
from pipelines.training.engine import Engine
from pipelines.training.learner_stage import LearnerStage
from pipelines.training.schedules import PRESETS

DEVICE = os.environ.get("DS_ACCELERATOR", "cpu")  # as DeepSpeed reads it
Size = Literal["tiny", "full"]
Stage = AdapterStage | LearnerStage
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR = HR // SCALE
LATENTS = {"tiny": LatentsSource("", "", "", "", "fp32", 4, 4), "full": LatentsSource("", "", "", "", "fp32", 8, 4)}
CELLS = {"tiny": 16, "full": HR // 8}  # of a latent, a side


def process_group() -> None:
    alone = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ.update(alone | {"MASTER_PORT": str(29000 + os.getpid() % 2000)})
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo")


def stage_of(kind: str, size: Size, work: str, train: TrainOptions, latents: bool = True) -> Stage:
    preset = PRESETS[kind]["tiny" if size == "tiny" else "paper"]
    if kind == "learner":
        block = preset["contrast"]["batch_block"]
        contrast = ContrastOptions(**preset["contrast"] | {"batch_block": min(block, train.global_batch_size)})
        return LearnerStage(
            LearnerOptions(model=LearnerModelOptions(**preset["model"]), contrast=contrast, train=train)
        )
    places = {"base": "tiny", "learner": "tiny"}
    if size == "full":
        places = {name: f"{work}/{name}" for name in places}
    options = AdapterOptions(
        **places, model=AdapterModelOptions(**preset["model"]), diffusion=DiffusionOptions(), train=train
    )
    return AdapterStage(options, SCALE, LATENTS[size] if latents else None)


def batch_of(stage: Stage, size: Size, micro: int, number: int, latents: bool = True) -> dict[str, Tensor]:
    """Random, the same on every device."""
    rng = torch.Generator().manual_seed(number)
    normal = lambda *shape: torch.randn(shape, generator=rng)
    uniform = lambda *shape: torch.rand(shape, generator=rng)
    batch: dict[str, Tensor]
    if isinstance(stage, LearnerStage):
        side = 48 if size == "tiny" else LR // 2
        batch = {"query": uniform(micro, 3, side, side), "key": uniform(micro, 3, side, side)}
        batch |= {"source": torch.arange(micro) + micro * number, "group": torch.full((micro,), -1)}
    else:
        cells = CELLS[size]
        batch = {"timestep": torch.randint(1000, (micro,), generator=rng), "guidance": torch.zeros(micro)}
        batch |= {"noise": normal(micro, stage.latent_channels, cells, cells)}
        if latents:
            width = 128 if size == "tiny" else 1024
            batch |= {"z_lr": normal(*batch["noise"].shape), "degradation": normal(micro, width)}
            batch |= {"z_hr": batch["z_lr"] + 0.3 * normal(*batch["noise"].shape)}
        else:
            pixels = cells * stage.vae_factor
            lr = uniform(micro, 3, pixels // SCALE, pixels // SCALE)
            batch |= {"lr": lr, "lr_crop": lr, "hr_crop": uniform(micro, 3, pixels, pixels)}
            batch |= {"encoding_noise": normal(micro, 2, *batch["noise"].shape[1:])}
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def train_options(asked: dict[str, Any], **more: Any) -> TrainOptions:
    kind = asked.get("stage", "adapter")
    rate = {"optimizer": "sgd", "lr": 0.01} if kind == "learner" and asked["size"] == "full" else {"lr": 1e-4}
    values = {
        "global_batch_size": asked["micro"],
        "precision": asked.get("precision", "fp32"),
        "zero_stage": asked.get("zero", 0),
        "clip_grad_norm": 1.0,
        "ema_decay": 0.999,
        "exact_sums": False,
        "gradient_checkpointing": asked.get("checkpointing", False),
        "compile": asked.get("compile", False),
    }
    return TrainOptions(**rate | values | more)


# ---- numbers


def losses(asked: dict[str, Any]) -> dict[str, Any]:
    """Losses of `steps` optimizer steps; with `stop`, an engine ends after so many, and another one goes on."""
    torch.set_num_threads(asked.get("threads", 1))
    tf32(False)
    process_group()
    kind, steps, stop = asked["stage"], asked["steps"], asked.get("stop", 0)
    plan = train_options(asked, seed=0)
    found: list[float] = []
    kept: dict[str, dict[str, Tensor]] | None = None
    for first, last in ((0, stop), (stop, steps)) if stop else ((0, steps),):
        stage = stage_of(kind, asked["size"], asked["work"], plan)
        module = stage.build(torch.device(DEVICE), DTYPES[plan.precision])
        if kept:
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if name in kept["trained"]:
                        parameter.copy_(kept["trained"][name])
            stage.load_state({name: tensor.to(DEVICE) for name, tensor in kept["stage"].items()})
        state = kept["optimizer"] if kept else None
        engine = Engine(module, plan, micro=asked["micro"], accumulation=1, optimizer_state=state)
        for number in range(first, last):
            loss, _ = stage.loss(engine, batch_of(stage, asked["size"], asked["micro"], number))
            engine.backward(loss)
            engine.step(plan.lr)
            stage.end_step(engine)
            found.append(float(loss.detach()))
        trained = {name: value.float().cpu().clone() for name, value in engine.full_parameters()}
        kept = {"trained": trained, "optimizer": engine.optimizer_state()}
        kept["stage"] = {name: tensor.cpu().clone() for name, tensor in stage.state().items()}
    return {"losses": found}


def picture(asked: dict[str, Any]) -> dict[str, Any]:
    """A sampled picture of fixed noise, written to `out` as float32."""
    torch.set_num_threads(asked.get("threads", 1))
    tf32(False)
    pipe = pipeline_of(asked["size"], asked["work"], asked["precision"])
    lr = torch.rand(3, asked["side"], asked["side"], generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    result = pipe(lr, num_inference_steps=asked["steps"], generator=generator, output_type="pt").images[0]
    np.save(asked["out"], result.float().cpu().numpy())
    return {}


# ---- speed


def train(asked: dict[str, Any]) -> dict[str, Any]:
    """Samples per second of a bare loop, or of the trainer's engine with EMA and clipping, after a warm-up."""
    torch.set_num_threads(1)
    tf32(asked.get("tf32", True))
    process_group()
    kind, size, micro = asked["stage"], asked["size"], asked["micro"]
    latents = asked.get("latents", True)
    plan = train_options(asked)
    stage = stage_of(kind, size, asked["work"], plan, latents)
    module = stage.build(torch.device(DEVICE), DTYPES[plan.precision])
    batches = [batch_of(stage, size, micro, number, latents) for number in range(4)]
    trained = [p for p in module.parameters() if p.requires_grad]
    bare = asked["loop"] == "bare"
    operations = None if asked.get("compile") else operations_of(stage, module, batches[0], micro)
    step = bare_step(stage, module, trained, plan) if bare else engine_step(stage, module, plan, micro)
    peak_reset()
    began = time.perf_counter()
    step(batches[0])
    synchronize()
    first = time.perf_counter() - began
    rate = per_second(lambda number: step(batches[number % len(batches)]), asked["seconds"]) * micro
    numbers = {"samples_per_second": rate, "first_step_seconds": first, "peak_gib": peak_gib()}
    if operations:
        numbers["tflop_per_sample"] = operations / 1e12
        numbers["tflops"] = rate * operations / 1e12
    return numbers


def bare_step(stage: Stage, module: nn.Module, trained: list[nn.Parameter], plan: TrainOptions) -> Callable[..., None]:
    fused = {"fused": True} if DEVICE == "cuda" else {}
    if plan.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(trained, plan.lr, momentum=0.9, **fused)
    else:
        optimizer = torch.optim.AdamW(trained, plan.lr, **fused)

    def step(batch: dict[str, Tensor]) -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=plan.precision == "bf16"):
            loss, _ = stage.loss(module, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        stage.drop_step()

    return step


def engine_step(stage: Stage, module: nn.Module, plan: TrainOptions, micro: int) -> Callable[..., None]:

    engine = Engine(module, plan, micro=micro, accumulation=1)

    def step(batch: dict[str, Tensor]) -> None:
        loss, _ = stage.loss(engine, batch)
        engine.backward(loss)
        engine.step(plan.lr)
        stage.end_step(engine)
        engine.average(0.999)

    return step


def latents(asked: dict[str, Any]) -> dict[str, Any]:
    """Pictures per second that the VAE encodes, LR and HR each, and operations of one."""
    from deedsr.sampling.autoencoder import latent_moments

    tf32(True)
    vae = pipeline_of(asked["size"], asked["work"], asked["precision"]).vae
    side = HR if asked["size"] == "full" else 128
    x = torch.rand(asked["micro"], 3, side, side, device=DEVICE, dtype=DTYPES[asked["precision"]])
    with torch.no_grad():
        operations = counted(lambda: latent_moments(vae, x[:1]))
        peak_reset()
        rate = per_second(lambda _: latent_moments(vae, x), asked["seconds"]) * asked["micro"]
    return {"pictures_per_second": rate, "samples_per_second": rate / 2, "tflop_per_sample": 2 * operations / 1e12,
            "tflops": rate * operations / 1e12, "peak_gib": peak_gib()}  # fmt: skip


def sampling(asked: dict[str, Any]) -> dict[str, Any]:
    """Seconds for `pictures` pictures together, after one that warms up."""
    tf32(asked.get("tf32", True))
    torch.set_num_threads(1)
    pipe = pipeline_of(asked["size"], asked["work"], asked["precision"])
    if asked.get("offload"):
        pipe.enable_model_cpu_offload(device=DEVICE)
    if asked.get("compile"):
        pipe.adapter.compile(mode="reduce-overhead")  # with CUDA graphs
    lrs = list(torch.rand(asked["pictures"], 3, asked["side"], asked["side"]))
    sample = lambda steps: pipe(
        lrs, num_inference_steps=steps, noise_guidance=0.0, output_type="pt", tile=asked.get("tile")
    )
    sample(2)
    synchronize()
    peak_reset()
    began = time.perf_counter()
    sample(asked["steps"])
    synchronize()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "seconds_per_picture": seconds / asked["pictures"], "peak_gib": peak_gib()}


def depthwise(asked: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of forward and backward of the DA blocks' per-sample convolution at the finest level, in three ways:
    as one group per sample and channel, as nine shifted products, as products of windows; how far apart they are."""
    tf32(False)
    torch.manual_seed(0)
    channels, cells = (256, 64) if asked["size"] == "full" else (32, 16)
    placed = {"device": DEVICE, "dtype": DTYPES[asked["precision"]], "requires_grad": True}
    x = torch.randn(asked["micro"], channels, cells, cells, **placed)
    kernels = torch.randn(asked["micro"], channels, 3, 3, **placed)
    expected = DEPTHWISE["grouped"](x.float(), kernels.float()).detach()
    answer = {}
    for name, way in DEPTHWISE.items():
        answer[f"{name}_off"] = float((way(x, kernels).float() - expected).detach().abs().max() / expected.abs().max())
        rate = per_second(lambda _, way=way: way(x, kernels).sum().backward(), asked["seconds"])
        answer[f"{name}_ms"] = 1000 / rate
    return answer


def _grouped(x: Tensor, kernels: Tensor) -> Tensor:
    groups = len(x) * x.shape[1]
    out = F.conv2d(x.reshape(1, groups, *x.shape[2:]), kernels.reshape(groups, 1, 3, 3), padding=1, groups=groups)
    return out.view_as(x)


def _shifted(x: Tensor, kernels: Tensor) -> Tensor:
    (height, width), padded, total = x.shape[2:], F.pad(x, [1] * 4), torch.zeros_like(x)
    for row, column in np.ndindex(3, 3):
        part = padded[:, :, row : row + height, column : column + width]
        total = torch.addcmul(total, part, kernels[:, :, row, column, None, None])
    return total


def _windows(x: Tensor, kernels: Tensor) -> Tensor:
    windows = F.pad(x, [1] * 4).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).flatten(2, 3)
    return (windows @ kernels.flatten(2)[..., None]).view_as(x)


DEPTHWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grouped": _grouped,
    "shifted": _shifted,
    "windows": _windows,
}


def matmul(asked: dict[str, Any]) -> dict[str, Any]:
    """TFLOP/s of a large product of matrices: what the card can do."""
    tf32(asked["precision"] == "tf32")
    side = 8192 if DEVICE == "cuda" else 1024
    one, other = (torch.rand(side, side, device=DEVICE, dtype=DTYPES.get(asked["precision"])) for _ in range(2))
    return {"tflops": per_second(lambda _: one @ other, asked["seconds"]) * 2 * side**3 / 1e12}


def profile(asked: dict[str, Any]) -> dict[str, Any]:
    """The ten most expensive operators of a training step, with their share of the time."""
    from torch.profiler import ProfilerActivity

    process_group()
    tf32(True)
    plan = train_options(asked)
    stage = stage_of("adapter", asked["size"], asked["work"], plan)
    module = stage.build(torch.device(DEVICE), DTYPES[plan.precision])
    step = engine_step(stage, module, plan, asked["micro"])
    batch = batch_of(stage, asked["size"], asked["micro"], 0)
    step(batch)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with torch.profiler.profile(activities=activities) as found:
        step(batch)
        synchronize()
    name = "self_device_time_total" if DEVICE == "cuda" else "self_cpu_time_total"
    cost = {average.key: float(getattr(average, name)) for average in found.key_averages()}
    total = sum(cost.values())
    first = sorted(cost, key=lambda key: -cost[key])[:10]
    return {"operators": {key: round(cost[key] / total, 3) for key in first}, "milliseconds": total / 1000}


# ---- helpers


def pipeline_of(size: Size, work: str, precision: str) -> Any:
    from deedsr import DeeDSRPipeline
    from deedsr.adapter import DegradationAwareAdapter
    from deedsr.hub.model_folder import BASE_PARTS, load_part
    from deedsr.sampling.schedule import ddim

    dtype = DTYPES[precision]
    if size == "tiny":
        pipe = DeeDSRPipeline.from_pretrained("tiny", torch_dtype=dtype)
    else:
        base = Path(work) / "base"
        vae, unet, scheduler = (load_part(base, part, torch_dtype=dtype) for part in BASE_PARTS)
        torch.manual_seed(0)
        adapter = DegradationAwareAdapter.for_unet(unet).eval().to(dtype)
        pipe = DeeDSRPipeline(vae, unet, ddim(scheduler), load_part(Path(work) / "learner", "learner"), adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_reset() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def per_second(work: Callable[[int], Any], seconds: float) -> float:
    """Calls per second, after two that warm up."""
    for number in range(2):
        work(number)
    synchronize()
    began, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - began < seconds:
        work(count)
        count += 1
        if count % 3 == 0:
            synchronize()
    synchronize()
    return count / (time.perf_counter() - began)


def counted(work: Callable[[], Any]) -> float:
    """Operations (multiply and add), as torch counts them."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def operations_of(stage: Stage, module: nn.Module, batch: dict[str, Tensor], micro: int) -> float:
    """Of forward and backward, for a sample."""

    def once() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=stage.options.train.precision == "bf16"):
            loss, _ = stage.loss(module, batch)
        loss.backward()

    total = counted(once)
    module.zero_grad(set_to_none=True)
    stage.drop_step()
    return total / micro


def finite(value: Any) -> Iterator[bool]:
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
        if isinstance(item, dict | list):
            yield from finite(item)
        elif isinstance(item, float):
            yield math.isfinite(item)


TASKS = {task.__name__: task for task in (losses, picture, train, latents, sampling, depthwise, matmul, profile)}

if __name__ == "__main__":
    answer = TASKS[sys.argv[1]](json.loads(sys.argv[2]))
    print("ANSWER" + json.dumps(answer | {"finite": all(finite(answer))}))
