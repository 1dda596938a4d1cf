"""Models of `tiny` on disk: written in half precision, with trained weights put in, with a gate."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from deedsr import DeeDSRPipeline
from deedsr.hub.model_folder import find_folder
from deedsr.hub.settings import SamplingSettings
from deedsr.sampling.gate import RestorationGate
from tools.tiny.training import averaged_weights

CURVES = "pretraining.json"  # in a model's folder
# The LR latent guides all steps but the last, which is the one that was trained on pictures.
ONE_STEP = SamplingSettings(
    num_inference_steps=20, noise_guidance_share=0.95, temperature=0.0, eta=0.0, color_fix="wavelet"
)


def write_model(pipeline: DeeDSRPipeline, to: Path) -> None:
    """Base, learner and adapter as one pipeline, without the card and licence of a model that stands alone."""
    pipeline.to(torch.float16).save_pretrained(to)
    for name in ("README.md", "LICENSE"):
        (to / name).unlink(missing_ok=True)
    for path in [to / "model_index.json", *to.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where the parts lay on the machine that made them
        path.write_text(json.dumps(config, indent=2) + "\n")


def assemble(work: Path, model: str, to: Path, share: float = 1.0) -> None:
    """Write `model` with the averaged adapter and decoder of the stage `pictures`, sampled in one step.

    With a `share` below 1 the weights lie so far on the straight line from the model's to the trained ones (Wortsman et
    al. 2022): what was learnt by heart fades faster than what was learnt.
    """
    pipeline = DeeDSRPipeline.from_pretrained(model, torch_dtype=torch.float32)
    state = averaged_weights(work / "pictures.pt", "model")
    for name, module in (("adapter", pipeline.adapter), ("decoder", pipeline.vae.decoder)):
        before = module.state_dict()
        module.load_state_dict({k: torch.lerp(v, state[f"{name}.{k}"].float(), share) for k, v in before.items()})
    trailing = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    lineage = pipeline.config["lineage"]
    trained = DeeDSRPipeline(
        pipeline.vae, pipeline.unet, trailing, pipeline.learner, pipeline.adapter, pipeline.scale,
        ONE_STEP.as_dict(), lineage,
    )  # fmt: skip
    write_model(trained, to)
    earlier = curves(model)
    runs = sum(name.startswith("pictures") for name in earlier)
    name = f"pictures, run {runs + 1}" if runs else "pictures"
    curve = torch.load(work / "pictures.pt", weights_only=True, map_location="cpu")["curve"]
    (to / CURVES).write_text(json.dumps(earlier | {name: curve}))


def curves(model: str) -> dict[str, Any]:
    """Of all trainings that a model's weights come from, by name."""
    path = find_folder(model) / CURVES
    return json.loads(path.read_text()) if path.exists() else {}


def set_gate(model: Path, gate: RestorationGate) -> None:
    """Store a gate in a model's folder."""
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"gate": gate.as_dict()}, indent=2) + "\n")


def has_gate(model: Path) -> bool:
    path = model / "model_index.json"
    return path.exists() and json.loads(path.read_text()).get("gate") is not None
