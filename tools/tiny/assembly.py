"""Models of `tiny` on disk: written in half precision, with trained weights put in, with a gate."""

import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from deedsr import DeeDSRPipeline
from deedsr.hub.settings import SamplingSettings
from deedsr.sampling.gate import RestorationGate
from tools.tiny.training import averaged_weights

# The LR latent guides all steps but the last, which is the one that was trained on pictures.
ONE_STEP = SamplingSettings(num_inference_steps=20, noise_guidance_share=0.95, eta=0.0, color_fix="wavelet")


def write_model(pipeline: DeeDSRPipeline, to: Path) -> None:
    """Base, learner and adapter as one pipeline, without the card and licence of a model that stands alone."""
    pipeline.to(torch.float16).save_pretrained(to)
    for name in ("README.md", "LICENSE"):
        (to / name).unlink(missing_ok=True)
    for path in [to / "model_index.json", *to.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where the parts lay on the machine that made them
        path.write_text(json.dumps(config, indent=2) + "\n")


def assemble(work: Path, model: str, to: Path) -> None:
    """Write `model` with the averaged adapter and decoder of the stage `pictures`, sampled in one step."""
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32)
    state = averaged_weights(work / "pictures.pt", "model")
    for name, module in (("adapter", pipeline.adapter), ("decoder", pipeline.vae.decoder)):
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
    trailing = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    lineage = pipeline.config["lineage"]
    trained = DeeDSRPipeline(
        pipeline.vae, pipeline.unet, trailing, pipeline.learner, pipeline.adapter, pipeline.scale,
        ONE_STEP.as_dict(), lineage,
    )  # fmt: skip
    write_model(trained, to)
    curve = torch.load(work / "pictures.pt", weights_only=True, map_location="cpu")["curve"]
    path = to / "pretraining.json"
    curves = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(curves | {"pictures": curve}))


def set_gate(model: Path, gate: RestorationGate) -> None:
    """Store a gate in a model's folder."""
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": gate.as_dict()}, indent=2) + "\n")


def has_gate(model: Path) -> bool:
    path = model / "model_index.json"
    return path.exists() and json.loads(path.read_text()).get("gate") is not None
