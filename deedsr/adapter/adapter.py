"""Degradation-aware adapter: the trained part around the frozen base (docs/method.md, 3).

Shape suffixes: B batch, C channels, H W space, N tokens, D token width or degradation vector.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from deedsr.adapter.condition_encoder import Condition, ConditionEncoder, PreparedDegradation
from deedsr.adapter.cross_attention import CrossAttentionProcessor, cross_attention
from deedsr.adapter.da_block import DegradationAwareGroup
from deedsr.adapter.modulation import Modulation
from deedsr.presets import ADAPTER_PRESETS

COMPILED = (ResnetBlock2D, BasicTransformerBlock, DegradationAwareGroup)  # none of them holds another
# Parts that can be left out of a training (docs/method.md, without a part).
ABLATIONS = ("vector", "global", "local", "da")
Network = TypeVar("Network", bound=nn.Module)


def check_ablations(ablate: Sequence[str]) -> None:
    """Raises ValueError for an unknown part, or where nothing of the LR image would reach the base."""
    for name in ablate:
        if name not in ABLATIONS:
            raise ValueError(f"ablate must be of {', '.join(ABLATIONS)}, got {name!r}")
    if {"global", "local"} <= set(ablate):
        raise ValueError("ablate without global and local branch leaves nothing that tells the base of the LR image")


def freeze(module: Network) -> Network:
    """Set a module that is not trained to evaluation mode without gradients."""
    return module.requires_grad_(False).eval()


def channels_last(module: Network, device: torch.device) -> Network:
    """`module` on `device` in the layout that is a fifth faster on CPUs, and that tensor cores want on GPUs."""
    return module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its annotations


def residual_blocks(unet: UNet2DConditionModel) -> list[tuple[str, int, ResnetBlock2D]]:
    """(name, level, block) of every residual block; level 0 is the finest."""
    deepest = len(unet.down_blocks) - 1
    parts = [(f"down_blocks.{i}", i, block) for i, block in enumerate(unet.down_blocks)]
    parts += [("mid_block", deepest, unet.mid_block)]
    parts += [(f"up_blocks.{i}", deepest - i, block) for i, block in enumerate(unet.up_blocks)]
    return [
        (f"{name}.resnets.{number}", level, resnet)
        for name, level, part in parts
        for number, resnet in enumerate(part.resnets)
    ]


def cross_attentions(unet: UNet2DConditionModel) -> list[tuple[str, Attention]]:
    """(name, attention) of every cross-attention."""
    return [(name, module) for name, module in unet.named_modules() if name.endswith(".attn2")]


class DegradationAwareAdapter(ModelMixin, ConfigMixin):
    """Condition encoder, cross-attention (global branch) and modulation (local branch) for one UNet geometry.

    `attach` hooks it into a UNet that stays as it is: not a submodule, same modules, same state dict. From then on call
    the adapter, not the UNet. Use `for_unet` to derive the geometry.

    Args:
        latent_channels: channels of the base's latents.
        residual_blocks: (name in the UNet, level, channels) of each residual block.
        cross_attentions: (name in the UNet, channels, heads) of each cross-attention.
        cross_attention_dim: width of the tokens that the base was trained with.
        tokens: "new_kv": the encoder's tokens enter new `to_k` and `to_v`; "project": a linear layer brings the tokens
            to the base's width, so that its `to_k` and `to_v` can be the initial values (docs/method.md, 3.4 and 3.9).
        widths, attention_levels, attention_heads, degradation_dim, reduction, feature_channels: see `ConditionEncoder`.
        modulation_hidden: channels between a feature map and gamma, beta.
        ablate: what is left out, with its parameters, of ABLATIONS. "vector": the learner's vector, in whose place one
            learned vector serves every image. "da": the degradation-aware groups. "local": the modulation and the
            feature maps. "global": the tokens; the base's own cross-attentions see one token of zeros.
        prediction_type: of the base's scheduler; None in adapters of earlier versions.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        residual_blocks: Sequence[tuple[str, int, int]],
        cross_attentions: Sequence[tuple[str, int, int]],
        cross_attention_dim: int,
        widths: Sequence[int],
        attention_levels: Sequence[int],
        attention_heads: int,
        degradation_dim: int,
        reduction: int,
        feature_channels: int,
        modulation_hidden: int,
        tokens: str = "new_kv",
        ablate: Sequence[str] = (),
        prediction_type: str | None = None,
    ):
        super().__init__()
        if tokens not in ("new_kv", "project"):
            raise ValueError(f'tokens must be "new_kv" or "project", got {tokens!r}')
        check_ablations(ablate)
        self.condition_encoder = ConditionEncoder(
            latent_channels, widths, attention_levels, attention_heads, degradation_dim, reduction, feature_channels,
            ablate, cross_attention_dim,
        )  # fmt: skip
        residual_blocks = [] if "local" in ablate else residual_blocks
        cross_attentions = [] if "global" in ablate else cross_attentions
        project = tokens == "project" and "global" not in ablate
        self.token_projection = nn.Linear(widths[-1], cross_attention_dim) if project else nn.Identity()
        token_width = cross_attention_dim if project else widths[-1]
        self.modulations = nn.ModuleList(
            Modulation(channels, feature_channels, modulation_hidden) for _, _, channels in residual_blocks
        )
        self.attentions = nn.ModuleList(
            cross_attention(channels, heads, token_width) for _, channels, heads in cross_attentions
        )
        # The UNet, the hooks on it and its own processors; in a tuple, so that torch registers no submodule.
        self._attached: tuple[UNet2DConditionModel, list, list] | None = None
        self._features: tuple[torch.Tensor, ...] | None = None

    @classmethod
    def for_unet(
        cls,
        unet: UNet2DConditionModel,
        preset: str = "paper",
        degradation_dim: int | None = None,
        tokens: str = "new_kv",
        ablate: Sequence[str] = (),
        prediction_type: str | None = None,
    ) -> "DegradationAwareAdapter":
        """A new adapter for the geometry of `unet`; `degradation_dim` is the learner's (default: the preset's).

        The encoder has the UNet's levels: `model_channels` wide in the finer half, twice as wide in the coarser half.
        """
        options = dict(ADAPTER_PRESETS[preset])
        levels, channels = len(unet.down_blocks), options.pop("model_channels")
        if degradation_dim is not None:
            options["degradation_dim"] = degradation_dim
        return cls(
            latent_channels=unet.config["in_channels"],
            residual_blocks=[(name, level, block.conv2.out_channels) for name, level, block in residual_blocks(unet)],
            cross_attentions=[(name, attn.query_dim, attn.heads) for name, attn in cross_attentions(unet)],
            cross_attention_dim=unet.config["cross_attention_dim"],
            widths=[channels if 2 * level < levels else 2 * channels for level in range(levels)],
            tokens=tokens,
            ablate=list(ablate),
            prediction_type=prediction_type,
            **options,
        )

    def initialize_from(self, unet: UNet2DConditionModel) -> None:
        """Copy the base's `to_q` and `to_out`, with projected tokens `to_k` and `to_v` too, as initial values."""
        attentions = cast(Sequence[Attention], self.attentions)
        for ours, (_, theirs) in zip(attentions, self._matching_attentions(unet), strict=False):
            ours.to_q.load_state_dict(theirs.to_q.state_dict())
            ours.to_out.load_state_dict(theirs.to_out.state_dict())
            if self.config["tokens"] == "project":
                ours.to_k.load_state_dict(theirs.to_k.state_dict())
                ours.to_v.load_state_dict(theirs.to_v.state_dict())

    def _matching_attentions(self, unet: UNet2DConditionModel) -> list[tuple[str, Attention]]:
        """The UNet's cross-attentions. ValueError when its geometry is another one than this adapter's."""
        blocks = [[name, level, block.conv2.out_channels] for name, level, block in residual_blocks(unet)]
        attentions = [[name, attn.query_dim, attn.heads] for name, attn in cross_attentions(unet)]
        for ours, theirs in ((self.config["residual_blocks"], blocks), (self.config["cross_attentions"], attentions)):
            if [list(item) for item in ours] != theirs:
                raise ValueError(
                    f"the adapter was made for another UNet: it expects (name, level or channels, channels or heads) "
                    f"{[tuple(i) for i in ours if list(i) not in theirs][:3]}, the UNet has "
                    f"{[tuple(i) for i in theirs if i not in [list(o) for o in ours]][:3]}"
                )
        return cross_attentions(unet)

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Hook both branches into `unet`. ValueError when its geometry is another one or it has an adapter already."""
        attentions = self._matching_attentions(unet)
        if any(isinstance(attn.processor, CrossAttentionProcessor) for _, attn in attentions):
            raise ValueError("the UNet has an adapter attached: detach that one first")
        self.detach()
        hooks = []
        # The geometry is the same; a branch that is left out has nothing to pair.
        modulations = cast(Sequence[Modulation], self.modulations)
        for (_, level, block), modulation in zip(residual_blocks(unet), modulations, strict=False):
            hooks.append(block.conv2.register_forward_hook(self._modulate(level, modulation)))
        processors = []
        for (_, attn), ours in zip(attentions, self.attentions, strict=False):
            processors.append((attn, attn.processor))
            attn.processor = CrossAttentionProcessor(ours)
        self._attached = (unet, hooks, processors)

    def blocks(self) -> Iterator[nn.Module]:
        """Parts of the attached UNet and of the adapter that are compiled one by one: few enough operations for a
        compiler, most of the arithmetic together."""
        assert self._attached is not None
        for network in (self._attached[0], self.condition_encoder):
            yield from (part for part in network.modules() if isinstance(part, COMPILED))
        yield from self.modulations

    def _modulate(self, level: int, modulation: Modulation):
        """Hook on a residual block's last convolution: after it comes nothing but the addition of the shortcut."""

        def hook(conv: nn.Module, inputs: tuple, h_BCHW: torch.Tensor) -> torch.Tensor:
            if self._features is None:
                raise RuntimeError("this UNet has an adapter attached: call the adapter, or detach() it first")
            return modulation(h_BCHW, self._features[level])

        return hook

    def detach(self) -> None:
        """Give the UNet back as it was."""
        if self._attached is not None:
            _, hooks, processors = self._attached
            for hook in hooks:
                hook.remove()
            for attn, processor in processors:
                attn.processor = processor
        self._attached = self._features = None

    def forward(
        self,
        noisy_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        z_lr_BCHW: torch.Tensor | None = None,
        degradation: torch.Tensor | PreparedDegradation | None = None,
        condition: Condition | None = None,
    ) -> torch.Tensor:
        """Output (B, C, H, W) of the attached UNet for noisy latents, conditioned on the LR image.

        Args:
            t_B: diffusion time (B,) or one number for all.
            z_lr_BCHW: scaled latent of the enlarged LR image, same size as `noisy_BCHW`.
            degradation: the learner's vector (B, D) of the LR image, or what `condition_encoder.prepare` made of it.
            condition: what `condition_encoder` says for these, if known already; replaces the two above.

        Raises ValueError when a side of the latents is not a multiple of 2^(levels - 1), RuntimeError before `attach`.
        """
        if self._attached is None:
            raise RuntimeError("attach the adapter to a UNet before calling it")
        t_B = torch.as_tensor(t_B, device=noisy_BCHW.device).expand(len(noisy_BCHW))
        if condition is None:
            condition = self.condition_encoder(z_lr_BCHW, t_B, degradation)
        before, self._features = self._features, condition.features
        try:
            tokens_BND = self.token_projection(condition.tokens)
            return self._attached[0](noisy_BCHW, t_B, encoder_hidden_states=tokens_BND).sample
        finally:
            # With gradients the features stay for the UNet's own recomputation in backward; without, a forward between
            # a training forward and its backward must leave no trace.
            if not torch.is_grad_enabled():
                self._features = before
