"""SkyReels-V2: Wan with diffusion forcing, where each frame has a noise level of its own.

`num_frame_per_block` is no part of the identity: the pipeline sets it at each call. Above 1 it puts
a causal mask on self-attention, and such calls run dense.
"""

from __future__ import annotations

from dataclasses import replace

from sla_video.pipelines.families.wan import WAN

SKYREELS = replace(
    WAN,
    name="SkyReels-V2",
    transformers=("SkyReelsV2Transformer3DModel",),
    processors=("SkyReelsV2AttnProcessor",),
    identity_fields=(*WAN.identity_fields, "inject_sample_info"),
    # Diffusers has no plan for it, and a causal mask would have to be cut, too.
    shardable=False,
    # The mask, and the noise levels of frames, are in raster order.
    token_places=None,
)
