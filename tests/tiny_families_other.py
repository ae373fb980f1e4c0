"""Tiny random pipelines of families other than Wan, with Diffusers' own classes."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from family_cases import Case, assemble, picture

from tiny_models import TEXT_DIM, seeded


def ltx_vae() -> Any:
    """4 x in space and time, 8 channels."""
    config = {
        "latent_channels": 8,
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
    }
    return seeded(diffusers.AutoencoderKLLTXVideo, config, 0)


def ltx(kind: str) -> Any:
    """LTX-Video of 3 layers."""
    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": TEXT_DIM,
    }
    transformer = seeded(diffusers.LTXVideoTransformer3DModel, config, 0)
    return assemble(kind, transformer, vae=ltx_vae())


def ltx2(**overrides: Any) -> Any:
    """LTX-2 of 3 layers; text comes as embeddings."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": 32,
        "audio_in_channels": 4,
        "audio_out_channels": 4,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 3,
        "caption_channels": TEXT_DIM,
        "rope_double_precision": False,
        **overrides,
    }
    stack = {
        f"{stream}_connector_{name}": value
        for stream in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    connectors = {
        "caption_channels": TEXT_DIM,
        "text_proj_in_factor": 2,
        "connector_rope_base_seq_len": 32,
        "rope_double_precision": False,
        **stack,
    }
    vae = {
        "latent_channels": 4,
        "block_out_channels": (8,),
        "decoder_block_out_channels": (8,),
        "layers_per_block": (1,),
        "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,),
        "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",),
        "upsample_residual": (False,),
        "upsample_factor": (1,),
        "patch_size": 1,
        "decoder_causal": False,
    }
    audio_vae = {
        "base_channels": 4,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "resolution": 32,
        "latent_channels": 2,
        "mel_bins": 8,
    }
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    pipe = diffusers.LTX2Pipeline(
        transformer=seeded(diffusers.LTX2VideoTransformer3DModel, config, 0),
        connectors=seeded(LTX2TextConnectors, connectors, 0),
        vae=seeded(diffusers.AutoencoderKLLTX2Video, vae, 0),
        audio_vae=seeded(diffusers.AutoencoderKLLTX2Audio, audio_vae, 0),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        text_encoder=None,
        tokenizer=None,
        vocoder=None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ltx2_text() -> dict[str, Any]:
    """A prompt and a negative one, as hidden states of two layers."""
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(2, 1, 8, 2 * TEXT_DIM, generator=generator)
    mask = torch.ones(1, 8, dtype=torch.long)
    return {
        "prompt": None,
        "prompt_embeds": embeds[0],
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds[1],
        "negative_prompt_attention_mask": mask,
    }


def allegro() -> Any:
    """Allegro of 3 layers."""
    config = {
        "patch_size": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 3,
        "cross_attention_dim": 48,
        "sample_height": 8,
        "sample_width": 8,
        "sample_frames": 3,
        "caption_channels": TEXT_DIM,
    }
    vae = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return assemble(
        "AllegroPipeline",
        seeded(diffusers.AllegroTransformer3DModel, config, 0),
        vae=seeded(diffusers.AutoencoderKLAllegro, vae, 0),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )


SMALL = {"height": 32, "width": 32}
# No guidance but what a case asks for.
PLAIN = {
    "stg_scale": 0.0,
    "audio_stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
}

CASES = {
    "ltx t2v": Case(lambda: ltx("LTXPipeline"), SMALL),
    "ltx i2v": Case(lambda: ltx("LTXImageToVideoPipeline"), {**SMALL, "image": picture(side=32)}),
    "ltx2": Case(ltx2, {**SMALL, **ltx2_text(), **PLAIN, "num_frames": 2}),
    # As in LTX-2.3: rotary embedding by head, gates, and guidance by perturbed blocks.
    "ltx2 perturbed": Case(
        lambda: ltx2(rope_type="split", gated_attn=True, perturbed_attn=True),
        {
            **SMALL,
            **ltx2_text(),
            **PLAIN,
            "num_frames": 2,
            "stg_scale": 1.0,
            "spatio_temporal_guidance_blocks": [1],
        },
    ),
    "allegro": Case(allegro, {"clean_caption": False}),
}
