"""Wan2.2 Animate: Wan with pose latents and attention to faces, which stays as it is."""

from __future__ import annotations

from dataclasses import replace

from sla_video.pipelines.families.wan import WAN

WAN_ANIMATE = replace(
    WAN,
    name="Wan Animate",
    transformers=("WanAnimateTransformer3DModel",),
    identity_fields=(
        *WAN.identity_fields,
        "latent_channels",
        "motion_encoder_size",
        "motion_style_dim",
        "motion_dim",
        "motion_encoder_dim",
        "face_encoder_hidden_dim",
        "face_encoder_num_heads",
        "inject_face_latents_blocks",
    ),
    # Attention to faces takes the tokens frame by frame, and a piece of them has no whole
    # frames, nor has a run of them in another order.
    shardable=False,
    token_places=None,
)
