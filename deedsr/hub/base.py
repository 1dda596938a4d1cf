"""Requirements on a base, checked by its configurations and the headers of its weight files; nothing is loaded."""

from pathlib import Path
from typing import Any

from deedsr.errors import UsageError
from deedsr.hub.model_folder import BASE_PARTS, read_config
from deedsr.hub.weights import tensor_shapes

REMEDY = "give a text-to-image model such as Stable Diffusion 2.1-base"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# Inputs of a UNet besides noisy latents, timestep and tokens, which the adapter does not provide.
_OTHER_INPUTS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")


def check_base(path: Path, trained_timesteps: int | None = None) -> None:
    """Refuse a base that the adapter does not support.

    Args:
        path: folder with `vae/`, `unet/` and `scheduler/`; other content is ignored.
        trained_timesteps: timesteps from 0 to below this one are trained; None = all.

    Raises UsageError naming part, value and remedy.
    """
    vae, unet, scheduler = (read_config(path, part) for part in BASE_PARTS)
    _check_unet(path / "unet", unet)
    channels = vae.get("latent_channels", 4)
    if channels != unet.get("in_channels", 4):
        raise UsageError(
            f"vae and unet of {path} are not of one model: the VAE's latents have {channels} channels, "
            f"the UNet takes {unet.get('in_channels', 4)}"
        )
    tensor_shapes(path / "vae")
    _check_scheduler(path / "scheduler", scheduler, trained_timesteps)


def picture_unit(path: Path) -> int:
    """HR pixels that a side must be a multiple of, so that every level of VAE, UNet and adapter divides evenly."""
    vae, unet = read_config(path, "vae"), read_config(path, "unet")
    vae_levels = len(vae.get("encoder_block_out_channels") or vae.get("block_out_channels") or (64,))
    unet_levels = len(unet.get("block_out_channels") or (320, 640, 1280, 1280))
    return 2 ** (vae_levels - 1) * 2 ** (unet_levels - 1)


def _check_unet(folder: Path, config: dict[str, Any]) -> None:
    refusal = f"{folder} is not a UNet that the adapter supports:"
    given, made = config.get("in_channels", 4), config.get("out_channels", 4)
    if given != made:
        raise UsageError(
            f"{refusal} it takes {given} channels and gives {made}, as models for inpainting, depth or upscaling do; "
            + REMEDY
        )
    for name in _OTHER_INPUTS:
        if config.get(name) is not None:
            raise UsageError(f"{refusal} it has {name} {config[name]}; {REMEDY}")
    width = config.get("cross_attention_dim", 1280)
    if not isinstance(width, int):
        raise UsageError(f"{refusal} cross_attention_dim must be one number, got {width}; {REMEDY}")
    if not any("CrossAttn" in str(block) for block in config.get("down_block_types") or ["CrossAttnDownBlock2D"]):
        raise UsageError(f"{refusal} it has no cross-attention; {REMEDY}")
    first = (config.get("block_out_channels") or (320,))[0]
    shapes = tensor_shapes(folder)
    keys = [name for name in shapes if name.endswith("attn2.to_k.weight")]
    expected: dict[str, tuple] = {"conv_in.weight": (first, given, 3, 3), "conv_out.weight": (made, first, 3, 3)}
    expected |= {name: (shapes[name][0], width) for name in keys}
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            raise UsageError(
                f"the weights in {folder} are of another model than its config.json: {name} has shape "
                f"{shapes.get(name)}, by the configuration it is {shape}"
            )


def _check_scheduler(folder: Path, config: dict[str, Any], trained_timesteps: int | None) -> None:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UsageError(f"{folder} has prediction_type {prediction}, there are {', '.join(PREDICTIONS)}")
    if "FlowMatch" in str(config.get("_class_name")):
        raise UsageError(
            f"{folder} is of a flow-matching model ({config['_class_name']}), which has no noise schedule; {REMEDY}"
        )
    steps = config.get("num_train_timesteps", 1000)
    to_the_end = trained_timesteps is None or trained_timesteps >= steps
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr") and to_the_end:
        raise UsageError(
            f"{folder} has rescale_betas_zero_snr with prediction_type epsilon, which is undefined at the last "
            f"timestep, where no signal is left: give a base with v_prediction, or train below it "
            f"(--diffusion.max_timestep {steps - 1})"
        )
