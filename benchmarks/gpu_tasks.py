"""What `benchmarks.gpu` measures, each task in a process of its own: JSON in, one JSON line out, as
`DS_ACCELERATOR=cuda python -m benchmarks.gpu_tasks TASK JSON`.

Batches are random and lie in the device's memory, so nothing but the networks is measured. No Ray.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.full_size import HR
from benchmarks.gpu_networks import DEVICE, DTYPES, Stage, batch_of, pipeline_of, process_group, stage_of, train_options
from deedsr.precision import set_tf32 as tf32
from pipelines.training.config import TrainOptions
from pipelines.training.engine import Engine

BOOKKEEPING = {f"aten::{name}" for name in ("as_strided", "empty", "empty_strided", "resize_", "view", "detach", "to")}


# ---- numbers


def losses(asked: dict[str, Any]) -> dict[str, Any]:
    """Losses of the optimizer steps of each of `runs`, one after the other; of one that failed, why.

    With `stop`, the run's engine ends after so many steps, and another one goes on. `nudge`: relative change of the
    initial weights.
    """
    tf32(False)
    process_group()
    return {"losses": [_losses(asked | run) for run in asked["runs"]]}


def _losses(asked: dict[str, Any]) -> list[float] | str:
    try:
        return list(_trained(asked))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _trained(asked: dict[str, Any]) -> Iterator[float]:
    torch.set_num_threads(asked.get("threads", 1))
    kind, steps, stop = asked["stage"], asked["steps"], asked.get("stop", 0)
    plan = train_options(asked, seed=0)
    kept: dict[str, dict[str, Tensor]] | None = None
    for first, last in ((0, stop), (stop, steps)) if stop else ((0, steps),):
        stage = stage_of(kind, asked["size"], asked["work"], plan)
        module = stage.build(torch.device(DEVICE), DTYPES[plan.precision])
        if nudge := asked.get("nudge", 0.0):
            with torch.no_grad():
                torch._foreach_mul_([p for p in module.parameters() if p.requires_grad], 1 + nudge)
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
            yield float(loss.detach())
        trained = {name: value.float().cpu().clone() for name, value in engine.full_parameters()}
        kept = {"trained": trained, "optimizer": engine.optimizer_state()}
        kept["stage"] = {name: tensor.cpu().clone() for name, tensor in stage.state().items()}


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
    if not asked.get("channels_last", True):
        stage.unet.to(memory_format=torch.contiguous_format)
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
    from diffusers.models.resnet import ResnetBlock2D

    from deedsr.sampling.autoencoder import latent_moments
    from pipelines.training.stage import compile_blocks

    tf32(True)
    vae = pipeline_of(asked["size"], asked["work"], asked["precision"]).vae.to(memory_format=torch.channels_last)
    side = HR if asked["size"] == "full" else 128
    x = torch.rand(asked["micro"], 3, side, side, device=DEVICE, dtype=DTYPES[asked["precision"]])
    with torch.no_grad():
        operations = counted(lambda: latent_moments(vae, x[:1]))
        if asked.get("compile"):
            compile_blocks(part for part in vae.encoder.modules() if isinstance(part, ResnetBlock2D))
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
    """Milliseconds of forward and backward of the DA blocks' per-sample convolution at the finest level, by each of
    DEPTHWISE, on a GPU also compiled; how far apart they are."""
    tf32(False)
    torch.manual_seed(0)
    channels, cells = (256, 64) if asked["size"] == "full" else (32, 16)
    placed = {"device": DEVICE, "dtype": DTYPES[asked["precision"]], "requires_grad": True}
    x = torch.randn(asked["micro"], channels, cells, cells, **placed)
    kernels = torch.randn(asked["micro"], channels, 3, 3, **placed)
    expected = DEPTHWISE["grouped"](x.float(), kernels.float()).detach()
    ways = dict(DEPTHWISE)
    if DEVICE == "cuda":
        ways["shifted_compiled"] = torch.compile(_shifted)
    answer = {}
    for name, way in ways.items():
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
    """The ten most expensive operators of a training step, with their share of the time; kernels that it launches, on a
    CPU the operators that compute."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    process_group()
    tf32(True)
    plan = train_options(asked)
    stage = stage_of(asked["stage"], asked["size"], asked["work"], plan)
    module = stage.build(torch.device(DEVICE), DTYPES[plan.precision])
    step = engine_step(stage, module, plan, asked["micro"])
    batch = batch_of(stage, asked["size"], asked["micro"], 0)
    step(batch)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
    with torch.profiler.profile(activities=activities) as found:
        step(batch)
        synchronize()
    on_gpu = DEVICE == "cuda"
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    cost = {average.key: float(getattr(average, name)) for average in found.key_averages()}
    total = sum(cost.values())
    first = sorted(cost, key=lambda key: -cost[key])[:10]
    events = found.events() or []
    kernels = sum(e.device_type == DeviceType.CUDA if on_gpu else _computes(e) for e in events)
    return {"operators": {key: round(cost[key] / total, 3) for key in first}, "milliseconds": total / 1000,
            "kernels": kernels}  # fmt: skip


def _computes(event: Any) -> bool:
    return event.name.startswith("aten::") and not event.cpu_children and event.name not in BOOKKEEPING


# ---- measuring


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak_reset() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
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
