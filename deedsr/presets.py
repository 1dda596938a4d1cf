"""Geometry of the networks: `paper`, and `tiny` for one CPU and few photographs.

Arguments of `DegradationLearner`, and of `DegradationAwareAdapter.for_unet`, which adds what follows from the UNet.
"""

from typing import Any

LEARNER_PRESETS: dict[str, dict[str, Any]] = {
    # ResNet-34's depth at double width (docs/method.md, 2.1): 85,011,008 parameters.
    "paper": {
        "stem": 64,
        "widths": (128, 256, 512, 1024),
        "blocks": (3, 4, 6, 3),
    },
    # For one CPU and few photographs: no convolutions, statistics of the picture.
    "tiny": {
        "stem": 0,
        "widths": (128,),
        "blocks": (),
        "statistics": (512, 512),
    },
}

ADAPTER_PRESETS: dict[str, dict[str, Any]] = {
    # docs/method.md, 3.2 to 3.5. With Stable Diffusion 2.1-base: 166,456,384 parameters.
    "paper": {
        "model_channels": 256,
        "attention_levels": (0, 1, 2),
        "attention_heads": 4,
        "degradation_dim": 1024,
        "reduction": 32,
        "feature_channels": 256,
        "modulation_hidden": 128,
    },
    # For one CPU; self-attention is left out where positions are many.
    "tiny": {
        "model_channels": 48,
        "attention_levels": (2,),
        "attention_heads": 2,
        "degradation_dim": 128,
        "reduction": 8,
        "feature_channels": 40,
        "modulation_hidden": 24,
    },
}
