"""Global branch: the adapter's own cross-attention in place of the base's (docs/method.md, 3.4).

Shape suffixes: B batch, L positions of the base, C channels, N tokens, D token width.
"""

import torch
from diffusers.models.attention_processor import Attention


class CrossAttentionProcessor:
    """Attention processor that replaces the UNet's cross-attention with the adapter's.

    Not an `nn.Module`, so that the adapter's weights stay out of the UNet's state dict.
    """

    def __init__(self, attention: Attention):
        self.attention = attention

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Positions (B, L, C) and tokens (B, N, D) to (B, L, C)."""
        return self.attention(hidden_states, encoder_hidden_states, attention_mask)


def cross_attention(channels: int, heads: int, token_width: int) -> Attention:
    """to_q, to_k, to_v without bias and to_out with one, as in Stable Diffusion."""
    return Attention(channels, token_width, heads=heads, dim_head=channels // heads)
