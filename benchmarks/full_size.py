"""One training step and one sampling step at the size of Stable Diffusion 2.1-base: seconds, memory, operations.

    python -m benchmarks.full_size [--threads 2] [--work FOLDER] [--arms plain checkpointing sampling]

A base with random weights is written in Stable Diffusion's layout (4 GB), then the paper's adapter and learner take one
step on a 512 px pair (128 px LR) as the trainer does: DeepSpeed engine, AdamW, fp32. Once as it is and once with
gradient checkpointing; a third arm enlarges 128 to 512 px by the pipeline with one step. Each arm has a process of its
own; the first needs 16 GB of memory. Operations (multiply and add) are counted by torch. The step is measured in its
parts, so that what `deedsr latents` saves is read off: encoding and the learner's vector. Prints tables, then what
precision, ZeRO and offload leave of the memory, computed from sizes and the measured activations, and, last, one JSON
line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ARMS = {
    "plain": "training step, activations held",
    "checkpointing": "training step, gradient checkpointing",
    "sampling": "sampling by the pipeline, one step",
}
GOAL = 1.5  # a step on pixels against one on latents
HR, SCALE = 512, 4
UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "sample_size": 512,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
}


def write_base(folder: Path) -> None:
    """Random weights in the layout of Stable Diffusion 2.1-base, and a learner of the paper's size."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    from deedsr.learner.resnet import DegradationLearner
    from deedsr.presets import LEARNER_PRESETS

    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "base" / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "base" / "vae")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "base" / "scheduler")
    DegradationLearner(**LEARNER_PRESETS["paper"]).save_pretrained(folder / "learner" / "learner")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


class Parts:
    """Seconds, operations and the highest memory so far of each part of the work."""

    def __init__(self) -> None:
        self.numbers: dict[str, Any] = {"loaded_gb": round(peak_gb(), 2)}

    def __call__(self, name: str, work: Callable[[], Any], count: bool = True) -> Any:
        from torch.utils.flop_counter import FlopCounterMode

        operations = FlopCounterMode(display=False)
        began = time.perf_counter()
        with operations if count else nullcontext():
            result = work()
        numbers = {"seconds": round(time.perf_counter() - began, 2), "peak_gb": round(peak_gb(), 2)}
        self.numbers[name] = numbers | ({"tflop": round(operations.get_total_flops() / 1e12, 3)} if count else {})
        return result


def held_for_backward(work: Callable[[], Any], weights: Iterable[Any]) -> tuple[Any, int]:
    """What `work` returns, and the bytes of activations that its graph holds."""
    import torch

    own = {weight.untyped_storage().data_ptr() for weight in weights}
    held: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    return result, sum(held.values())


def sampling_step(folder: Path, threads: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    import torch

    from deedsr import DeeDSRPipeline
    from deedsr.adapter import DegradationAwareAdapter
    from deedsr.hub.model_folder import BASE_PARTS, load_part
    from deedsr.sampling.autoencoder import decode_latents, encode_latents
    from deedsr.sampling.images import enlarge
    from deedsr.sampling.schedule import ddim

    torch.set_num_threads(threads)
    vae, unet, scheduler = (load_part(folder / "base", part) for part in BASE_PARTS)
    learner, adapter = load_part(folder / "learner", "learner"), DegradationAwareAdapter.for_unet(unet).eval()
    pipe = DeeDSRPipeline(vae, unet, ddim(scheduler), learner, adapter)
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(1, 3, HR // SCALE, HR // SCALE, generator=generator)
    noise = torch.randn(1, 4, HR // 8, HR // 8, generator=generator)
    part = Parts()
    with torch.no_grad():
        vector = part("learner's vector", lambda: learner(lr))
        z_lr = part("encode LR", lambda: encode_latents(vae, 2 * enlarge(lr, SCALE) - 1))
        z = part("one sampling step", lambda: adapter(noise, torch.tensor([981]), z_lr, vector))
        part("decode", lambda: decode_latents(vae, z))
    # Without noise guidance: the one step would be guided, and would not ask the UNet.
    part("128 to 512 px", lambda: pipe(lr[0], num_inference_steps=1, noise_guidance=0.0, generator=generator))
    return {"arm": "sampling"} | part.numbers


def training_step(folder: Path, checkpointing: bool, threads: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    import numpy as np
    import torch

    from deedsr.sampling.autoencoder import encode_latents
    from deedsr.sampling.images import enlarge
    from pipelines.training.adapter_stage import AdapterStage
    from pipelines.training.config import AdapterOptions, TrainOptions
    from pipelines.training.engine import Engine

    torch.set_num_threads(threads)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29599",
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
    }
    torch.distributed.init_process_group("gloo")
    plan = TrainOptions(lr=1e-5, global_batch_size=1, gradient_checkpointing=checkpointing)
    options = AdapterOptions(base=str(folder / "base"), learner=str(folder / "learner"), train=plan)
    stage = AdapterStage(options, SCALE)
    engine = Engine(stage.build(torch.device("cpu"), torch.float32), plan, micro=1, accumulation=1)
    rng = np.random.default_rng(0)
    lr = torch.from_numpy(rng.random((1, 3, HR // SCALE, HR // SCALE), dtype=np.float32))
    hr = torch.from_numpy(rng.random((1, 3, HR, HR), dtype=np.float32))
    noise = torch.from_numpy(rng.standard_normal((1, 4, HR // 8, HR // 8), dtype=np.float32))
    t = torch.tensor([500])
    part = Parts()

    with torch.no_grad():
        z_hr = part("encode HR", lambda: encode_latents(stage.vae, 2 * hr - 1))
        z_lr = part("encode LR", lambda: encode_latents(stage.vae, 2 * enlarge(lr, SCALE) - 1))
        vector = part("learner's vector", lambda: stage.learner(lr))
        part("one sampling step", lambda: engine.engine.module(noise, t, z_lr, vector))
    noisy = stage.scheduler.add_noise(z_hr, noise, t)
    weights = [p for network in (stage.unet, engine.engine.module) for p in network.parameters()]
    forward = lambda: held_for_backward(lambda: engine(noisy, t, z_lr, vector), weights)
    prediction, held = part("forward", forward)
    numbers = part.numbers
    loss = torch.nn.functional.mse_loss(prediction, noise)
    part("backward", lambda: engine.backward(loss))
    part("optimizer", lambda: engine.step(plan.lr), count=False)
    frozen = [p for network in (stage.unet, stage.vae, stage.learner) for p in network.parameters()]
    state = engine.base_optimizer.state
    numbers["frozen_bytes"] = sum(p.grad.nbytes for p in frozen if p.grad is not None) + sum(
        moment.nbytes for p in frozen for moment in state.get(p, {}).values()
    )
    numbers["trained_parameters"] = sum(p.numel() for _, p in engine.named)
    if not checkpointing:  # whose recomputed inputs the hooks do not see
        numbers["held_gb"] = round(held / 1e9, 3)
    torch.distributed.destroy_process_group()
    return {"arm": "checkpointing" if checkpointing else "plain"} | numbers


# Bytes a trained parameter costs one GPU of n: weight and gradient, Adam's two moments, and ZeRO's copy of the weight,
# all fp32; in bf16, autocast's copy of the weight besides, while a forward and its backward last.
STATES: dict[str, Callable[[int], float]] = {
    "fp32, ZeRO 0": lambda n: 4 + 4 + 8,
    "fp32, ZeRO 2": lambda n: 4 + (4 + 12) / n,
    "bf16, ZeRO 1": lambda n: 2 + 4 + 4 + 12 / n,
    "bf16, ZeRO 2": lambda n: 2 + 4 + (4 + 12) / n,
    "bf16, ZeRO 3": lambda n: 2 + (4 + 4 + 12) / n,
    "bf16, ZeRO 2, optimizer offloaded": lambda n: 2 + 4 + 4 / n,
}
FROZEN = {"unet": 865_910_724, "vae": 83_653_863}  # in the precision of training
LEARNER = 85_011_008  # always fp32


def memory(trained: int, held_gb: float) -> list[dict[str, Any]]:
    """GB on one GPU: states of what trains over 1 and 8 GPUs, frozen networks, activations of one 512 px sample."""
    rows = []
    for name, state in STATES.items():
        width = 4 if name.startswith("fp32") else 2
        frozen = (width * sum(FROZEN.values()) + 4 * LEARNER) / 1e9
        rows.append({"name": name, "frozen_gb": frozen, "sample_gb": held_gb * width / 4}
                    | {f"states_gb_{n}": trained * state(n) / 1e9 for n in (1, 8)})  # fmt: skip
    return rows


def print_arm(run: dict[str, Any]) -> None:
    print(f"{ARMS[run['arm']]}, fp32, batch 1, {HR} px")
    print(f"{'':20}{'seconds':>10}{'TFLOP':>10}{'peak GB':>10}\n{'networks loaded':40}{run['loaded_gb']:10.2f}")
    for name, numbers in run.items():
        if isinstance(numbers, dict):
            tflop = f"{numbers['tflop']:10.3f}" if "tflop" in numbers else f"{'':10}"
            print(f"{name:20}{numbers['seconds']:10.2f}{tflop}{numbers['peak_gb']:10.2f}")


def pixels_to_latents(plain: dict[str, Any]) -> dict[str, float]:
    """How much longer a step on pixels is than one on latents."""
    encoding, denoising = ("encode HR", "encode LR", "learner's vector"), ("forward", "backward", "optimizer")
    total = lambda parts, unit: sum(plain[part].get(unit, 0) for part in parts)
    return {u: (total(encoding, u) + total(denoising, u)) / total(denoising, u) for u in ("seconds", "tflop")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", help="where the base is written; a temporary folder otherwise")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="default: all")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        folder = Path(asked.work)
        if asked.one == "sampling":
            print(json.dumps(sampling_step(folder, asked.threads)))
        else:
            print(json.dumps(training_step(folder, asked.one == "checkpointing", asked.threads)))
        return
    runs = []
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        write_base(Path(work))
        for name in asked.arms:
            command = [sys.executable, "-m", "benchmarks.full_size", "--one", name, "--work", work]
            command += ["--threads", str(asked.threads)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
            print_arm(runs[-1])
    result: dict[str, Any] = {"threads": asked.threads, "runs": runs, "goal": GOAL}
    plain = next((run for run in runs if run["arm"] == "plain"), None)
    if plain:
        result["pixels_to_latents"] = ratio = pixels_to_latents(plain)
        print(f"a step on pixels / on latents: {ratio['tflop']:.2f} by operations, {ratio['seconds']:.2f} by the clock "
              f"(goal {GOAL})")  # fmt: skip
        print(f"gradients and optimizer state of frozen networks: {plain['frozen_bytes']} bytes")
        result["memory"] = memory(plain["trained_parameters"], plain["held_gb"])
        print(f"{'computed, GB on a GPU':36}{'states, 1 GPU':>14}{'8 GPUs':>8}{'frozen':>8}{'a sample':>10}")
        for row in result["memory"]:
            print(f"{row['name']:36}{row['states_gb_1']:14.2f}{row['states_gb_8']:8.2f}{row['frozen_gb']:8.2f}"
                  f"{row['sample_gb']:10.2f}")  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
