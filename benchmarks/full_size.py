"""One training step and one sampling step at the size of Stable Diffusion 2.1-base: seconds, memory, operations.

    python -m benchmarks.full_size [--threads 2] [--work FOLDER]

A base with random weights is written in Stable Diffusion's layout (4 GB), then the paper's adapter and learner take one
step on a 512 px pair (128 px LR) as the trainer does: DeepSpeed engine, AdamW, fp32. Once as it is and once with
gradient checkpointing, each in a process of its own. Operations (multiply and add) are counted by torch. The step is
measured in its parts, so that what `deedsr latents` saves is read off: encoding and the learner's vector. Prints a
table and, last, one JSON line.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    from deedsr.learner.resnet import LEARNER_PRESETS, DegradationLearner

    torch.manual_seed(0)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "base" / "unet")
    AutoencoderKL(**VAE).save_pretrained(folder / "base" / "vae")
    DDIMScheduler(**SCHEDULER).save_pretrained(folder / "base" / "scheduler")
    DegradationLearner(**LEARNER_PRESETS["paper"]).save_pretrained(folder / "learner" / "learner")


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def one_step(folder: Path, checkpointing: bool, threads: int) -> dict[str, Any]:
    """Runs in a process of its own."""
    import numpy as np
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from deedsr.sampling.latents import encode_latents, enlarge
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
    numbers: dict[str, Any] = {"checkpointing": checkpointing, "loaded_gb": peak_gb()}

    def part(name: str, work: Callable[[], Any], count: bool = True) -> Any:
        operations = FlopCounterMode(display=False)
        began = time.perf_counter()
        if count:
            with operations:
                result = work()
        else:
            result = work()
        numbers[name] = {"seconds": round(time.perf_counter() - began, 2), "peak_gb": round(peak_gb(), 2)}
        numbers[name] |= {"tflop": round(operations.get_total_flops() / 1e12, 3)} if count else {}
        return result

    with torch.no_grad():
        z_hr = part("encode HR", lambda: encode_latents(stage.vae, 2 * hr - 1))
        z_lr = part("encode LR", lambda: encode_latents(stage.vae, 2 * enlarge(lr, SCALE) - 1))
        vector = part("learner's vector", lambda: stage.learner(lr))
        part("one sampling step", lambda: engine.engine.module(noise, t, z_lr, vector))
    noisy = stage.scheduler.add_noise(z_hr, noise, t)
    prediction = part("forward", lambda: engine(noisy, t, z_lr, vector))
    loss = torch.nn.functional.mse_loss(prediction, noise)
    part("backward", lambda: engine.backward(loss))
    part("optimizer", lambda: engine.step(plan.lr), count=False)
    frozen = [p for network in (stage.unet, stage.vae, stage.learner) for p in network.parameters()]
    state = engine.base_optimizer.state
    numbers["frozen_bytes"] = sum(p.grad.nbytes for p in frozen if p.grad is not None) + sum(
        moment.nbytes for p in frozen for moment in state.get(p, {}).values()
    )
    numbers["trained_parameters"] = sum(p.numel() for _, p in engine.named)
    torch.distributed.destroy_process_group()
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", help="where the base is written; a temporary folder otherwise")
    parser.add_argument("--one", choices=("plain", "checkpointing"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(one_step(Path(asked.work), asked.one == "checkpointing", asked.threads)))
        return
    runs = []
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        write_base(Path(work))
        for name in ("plain", "checkpointing"):
            command = [sys.executable, "-m", "benchmarks.full_size", "--one", name, "--work", work]
            command += ["--threads", str(asked.threads)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    for run in runs:
        print(f"{'gradient checkpointing' if run['checkpointing'] else 'activations held'}, fp32, batch 1, {HR} px")
        print(f"{'':20}{'seconds':>10}{'TFLOP':>10}{'peak GB':>10}\n{'networks loaded':40}{run['loaded_gb']:10.2f}")
        for name, numbers in run.items():
            if isinstance(numbers, dict):
                tflop = f"{numbers['tflop']:10.3f}" if "tflop" in numbers else f"{'':10}"
                print(f"{name:20}{numbers['seconds']:10.2f}{tflop}{numbers['peak_gb']:10.2f}")
    plain = runs[0]
    encoding, denoising = ("encode HR", "encode LR", "learner's vector"), ("forward", "backward", "optimizer")
    ratio = {}
    for unit in ("seconds", "tflop"):
        total = lambda parts, unit=unit: sum(plain[part].get(unit, 0) for part in parts)
        ratio[unit] = (total(encoding) + total(denoising)) / total(denoising)
    print(f"a step on pixels / on latents: {ratio['tflop']:.2f} by operations, {ratio['seconds']:.2f} by the clock "
          f"(goal {GOAL})")  # fmt: skip
    print(f"gradients and optimizer state of frozen networks: {plain['frozen_bytes']} bytes")
    print(json.dumps({"threads": asked.threads, "runs": runs, "pixels_to_latents": ratio, "goal": GOAL}))


if __name__ == "__main__":
    main()
