"""Tiny random pipelines of all that was built on Wan: Diffusers' own classes, through and through.

Clips of 9 frames of 64 x 64 pixels are 3 x 8 x 8 = 192 tokens, and a frame more or less where a
model adds or drops one.
"""

from __future__ import annotations

from typing import Any

import diffusers
from family_cases import Case, assemble, clip, picture
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny_models import (
    LATENT_CHANNELS,
    build_tiny_pipeline,
    build_tiny_transformer,
    seeded,
    transformer_config,
)

IMAGE_DIM = 24
# Of a CLIP that sees 2 x 2 patches and its class.
IMAGE_TOKENS = 5
# Latents, their conditions and the mask of known frames.
I2V_CHANNELS = 2 * LATENT_CHANNELS + 4


def image_encoder() -> dict[str, Any]:
    """The components that look at a picture."""
    config = CLIPVisionConfig(
        hidden_size=IMAGE_DIM,
        intermediate_size=32,
        projection_dim=IMAGE_DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return {
        "image_encoder": seeded(CLIPVisionModelWithProjection, {"config": config}, 5),
        "image_processor": CLIPImageProcessor(**sizes),
    }


def unipc() -> Any:
    """The scheduler of SkyReels-V2, Animate and ChronoEdit."""
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def wan_i2v(*, last: bool = False) -> Any:
    """Wan2.1 from a first picture, or from a first and a last one."""
    transformer = build_tiny_transformer(
        in_channels=I2V_CHANNELS,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=32,
        pos_embed_seq_len=2 * IMAGE_TOKENS if last else None,
    )
    return assemble("WanImageToVideoPipeline", transformer, **image_encoder())


def wan22_i2v() -> Any:
    """Wan2.2 A14B from a picture: two transformers, and no image encoder."""
    first, second = (build_tiny_transformer(seed=seed, in_channels=I2V_CHANNELS) for seed in (0, 1))
    return assemble("WanImageToVideoPipeline", first, transformer_2=second, boundary_ratio=0.5)


def ti2v(kind: str) -> Any:
    """Wan2.2 TI2V-5B: a timestep for each token."""
    transformer = build_tiny_transformer(patch_size=(1, 2, 2))
    return assemble(kind, transformer, expand_timesteps=True)


def vace(*, two: bool = False) -> Any:
    """VACE, with 3 blocks and 2 control blocks."""
    first, second = (
        seeded(
            diffusers.WanVACETransformer3DModel,
            transformer_config(vace_layers=[0, 2], vace_in_channels=2 * LATENT_CHANNELS + 64),
            seed,
        )
        for seed in (0, 1)
    )
    return assemble(
        "WanVACEPipeline",
        first,
        transformer_2=second if two else None,
        boundary_ratio=0.5 if two else None,
    )


def animate() -> Any:
    """Wan2.2 Animate; attention to faces after blocks 0 and 2."""
    config = transformer_config(
        in_channels=I2V_CHANNELS,
        latent_channels=LATENT_CHANNELS,
        num_layers=4,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    transformer = seeded(diffusers.WanAnimateTransformer3DModel, config, 0)
    return assemble("WanAnimatePipeline", transformer, scheduler=unipc(), **image_encoder())


def chronoedit() -> Any:
    """ChronoEdit: an edit as the last frame of a clip."""
    config = transformer_config(
        in_channels=I2V_CHANNELS,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=32,
        rope_temporal_skip_len=3,
    )
    transformer = seeded(diffusers.ChronoEditTransformer3DModel, config, 0)
    return assemble("ChronoEditPipeline", transformer, scheduler=unipc(), **image_encoder())


def skyreels(kind: str, *, image: bool = False, **overrides: Any) -> Any:
    """SkyReels-V2; `image` for the model that sees pictures."""
    if image:
        overrides |= {
            "in_channels": I2V_CHANNELS,
            "image_dim": IMAGE_DIM,
            "added_kv_proj_dim": 32,
        }
    config = transformer_config(**overrides)
    transformer = seeded(diffusers.SkyReelsV2Transformer3DModel, config, 0)
    others = image_encoder() if image else {}
    return assemble(kind, transformer, scheduler=unipc(), **others)


FORCING = "SkyReelsV2DiffusionForcing"
# Text of models that also see pictures: Wan takes the last 512 tokens for text.
LONG_TEXT = {"max_sequence_length": 512}

CASES = {
    "wan2.1 t2v": Case(build_tiny_pipeline),
    "wan2.1 i2v": Case(wan_i2v, {"image": picture(), **LONG_TEXT}),
    "wan2.1 flf2v": Case(
        lambda: wan_i2v(last=True), {"image": picture(), "last_image": picture(1), **LONG_TEXT}
    ),
    "wan2.2 t2v a14b": Case(lambda: build_tiny_pipeline(two_transformers=True)),
    "wan2.2 i2v a14b": Case(wan22_i2v, {"image": picture()}),
    "wan2.2 5b t2v": Case(lambda: ti2v("WanPipeline")),
    "wan2.2 5b i2v": Case(lambda: ti2v("WanImageToVideoPipeline"), {"image": picture()}),
    "video to video": Case(
        lambda: assemble("WanVideoToVideoPipeline", build_tiny_transformer()),
        {"video": clip(), "strength": 0.5, "num_inference_steps": 4, "num_frames": None},
    ),
    "vace": Case(vace, {"video": clip(), "mask": clip()}, layers=5),
    "vace a14b": Case(lambda: vace(two=True), {"video": clip(), "mask": clip()}, layers=5),
    "animate": Case(
        animate,
        {
            "image": picture(),
            "pose_video": clip(17),
            "face_video": clip(17, 16),
            "segment_frame_length": 9,
            "num_frames": None,
            **LONG_TEXT,
        },
        layers=4,
        segments=2,
    ),
    "chronoedit": Case(
        chronoedit,
        {
            "image": picture(),
            "enable_temporal_reasoning": True,
            "num_temporal_reasoning_steps": 1,
            **LONG_TEXT,
        },
    ),
    "skyreels t2v": Case(lambda: skyreels("SkyReelsV2Pipeline")),
    "skyreels i2v": Case(
        lambda: skyreels("SkyReelsV2ImageToVideoPipeline", image=True),
        {"image": picture(), **LONG_TEXT},
    ),
    "skyreels forcing": Case(lambda: skyreels(f"{FORCING}Pipeline", inject_sample_info=True)),
    "skyreels forcing i2v": Case(
        lambda: skyreels(f"{FORCING}ImageToVideoPipeline"), {"image": picture()}
    ),
    "skyreels forcing v2v": Case(
        lambda: skyreels(f"{FORCING}VideoToVideoPipeline"),
        {"video": clip(5), "overlap_history": 5, "base_num_frames": 9},
    ),
    "skyreels causal": Case(
        lambda: skyreels(f"{FORCING}Pipeline"),
        {"num_frames": 13, "ar_step": 1, "causal_block_size": 2},
        all_dense="an attention mask",
    ),
}
if hasattr(diffusers, "LucyEditPipeline"):
    CASES["lucy edit"] = Case(
        lambda: assemble(
            "LucyEditPipeline", build_tiny_transformer(in_channels=2 * LATENT_CHANNELS)
        ),
        {"video": clip()},
    )
