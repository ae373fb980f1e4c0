"""The networks of `tiny-wan`: Diffusers' own classes at a size that ships with the package.

Also the VAE's passes over a whole clip at once. Diffusers runs the Wan VAE chunk by chunk with a
feature cache, to save memory; its causal convolutions make one pass over all frames give the same
result, which is what training and bulk encoding want.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanResample,
    patchify,
    unpatchify,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from sla_video.pipelines.tiny_wan import checkpoints, grammar

LATENT_CHANNELS = 8
TEXT_DIM = 256
# Positions that a pipeline pads prompts to: ours, and WanPipeline's own default. Wan attends to the
# pads too, so that fewer of them make generating faster; the model is trained for both.
TEXT_POSITIONS = (64, 512)
FLOW_SHIFT = 5.0
# What the shipped weights were judged with; they go into its `defaults.json`.
STEPS = 12
GUIDANCE_SCALE = 3.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the grammar's vocabulary, closed by `</s>` as T5's is."""
    words = ["<pad>", "</s>", "<unk>", *grammar.vocabulary()]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=TEXT_DIM,
            d_kv=64,
            d_ff=512,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    read_locally(encoder)
    return encoder


@torch.no_grad()
def read_locally(encoder: UMT5EncoderModel) -> None:
    """Let places decide whom a word attends to: one head back, one ahead, one around, one anywhere.

    T5 starts with hardly any sense of place, and what words say soon drowns it: logits are not
    scaled down by the head dimension. So the query projections start small, too.
    """
    config = encoder.config
    for block in encoder.encoder.block:
        attention = block.layer[0].SelfAttention
        attention.q.weight.normal_(std=(config.d_model * config.d_kv) ** -0.5)
        table = attention.relative_attention_bias.weight
        table.zero_()
        # Buckets: half for words up to here and half for words after, exact below 8 words.
        half = len(table) // 2
        distance = torch.arange(half, dtype=table.dtype, device=table.device)
        table[:half, 0] = table[half:, 1] = -distance
        table[half:, 0] = table[1:half, 1] = -half / 2
        table[:half, 2] = table[half:, 2] = -distance / 2


def build_transformer() -> WanTransformer3DModel:
    """Deep and narrow: on a CPU most of its time is attention, as in the large models."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=256,
        ffn_dim=512,
        num_layers=8,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )


def build_vae(
    latents_mean: list[float] | None = None, latents_std: list[float] | None = None
) -> AutoencoderKLWan:
    """8x8 pixels and 4 frames a latent; the outermost 2x2 by pixel shuffle, as Wan 2.2's VAE."""
    return AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        latents_mean=latents_mean or [0.0] * LATENT_CHANNELS,
        latents_std=latents_std or [1.0] * LATENT_CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )


def load_weights(
    group: Mapping[str, Tensor], transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel
) -> None:
    """Fill both networks from one group of a training checkpoint.

    Raises:
        SystemExit: the checkpoint is of networks of another shape.
    """
    load_part("transformer.", group, transformer)
    load_part("text_encoder.", group, text_encoder)


def load_part(prefix: str, group: Mapping[str, Tensor], module: nn.Module) -> None:
    """Fill one network from the tensors of a checkpoint whose names begin with `prefix`.

    Raises:
        SystemExit: the checkpoint is of a network of another shape.
    """
    part = {k.removeprefix(prefix): v for k, v in group.items() if k.startswith(prefix)}
    if "shared.weight" in part:  # saved once, under the first of its two names
        part["encoder.embed_tokens.weight"] = part["shared.weight"]
    try:
        module.load_state_dict(part)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise SystemExit(f"the checkpoint does not fit {prefix[:-1]}: {reason}") from error


def load_text_encoder(folder: Path) -> UMT5EncoderModel:
    """The text encoder of a training checkpoint, or of a pipeline folder; float32."""
    if (folder / "model_index.json").is_file():
        return UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    found = checkpoints.newest(folder)
    if found is None:
        raise SystemExit(f"no checkpoint and no pipeline in {folder}")
    encoder = build_text_encoder(len(build_tokenizer()))
    load_part("text_encoder.", checkpoints.load_group(found, "weights"), encoder)
    return encoder


def load_vae(folder: Path) -> AutoencoderKLWan:
    """The VAE of a `train_vae` checkpoint, or of a pipeline folder."""
    if (folder / "vae" / "config.json").is_file():
        vae: AutoencoderKLWan = AutoencoderKLWan.from_pretrained(folder / "vae")
        return vae.eval().requires_grad_(False)
    found = checkpoints.newest(folder)
    if found is None:
        raise SystemExit(f"no checkpoint and no pipeline in {folder}")
    state = checkpoints.load_state(found)
    vae = build_vae(state["latents_mean"], state["latents_std"])
    vae.load_state_dict(checkpoints.load_group(found, "vae"))
    return vae.eval().requires_grad_(False)


def build_scheduler(shift: float = FLOW_SHIFT) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def encode_clip(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Moments of the latents of whole clips.

    Args:
        video: `[B, 3, 4k+1, H, W]` in [-1, 1].

    Returns:
        `[B, 2 * z_dim, k+1, H/8, W/8]`: means, then log-variances; equal to `vae.encode`.
    """
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size or 1))
    for layer in encoder.down_blocks:
        x = layer(x)
        if isinstance(layer, WanResample) and layer.mode == "downsample3d" and x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    x = encoder.mid_block(x)
    moments: Tensor = vae.quant_conv(encoder.conv_out(encoder.nonlinearity(encoder.norm_out(x))))
    return moments


def decode_clip(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Whole clips from latents `[B, z_dim, k+1, h, w]`; equal to `vae.decode` before its clamp."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        for layer in block.upsamplers or ():
            if layer.mode == "upsample3d" and x.shape[2] > 1:
                x = torch.cat([x[:, :, :1], _double_frames(layer, x[:, :, 1:])], dim=2)
            x = layer(x)
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    video: Tensor = unpatchify(x, vae.config.patch_size or 1)
    return video


def _double_frames(layer: WanResample, x: Tensor) -> Tensor:
    pairs = layer.time_conv(x)
    return torch.stack(pairs.chunk(2, dim=1), dim=3).flatten(2, 3)


def latent_stats(vae: AutoencoderKLWan, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, `[1, z_dim, 1, 1, 1]` each."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=device).view(shape)
    return mean, std


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
) -> None:
    """Write an ordinary Diffusers pipeline folder, weights in float16."""
    pipe = WanPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.half(),
        vae=vae.half(),
        scheduler=build_scheduler(),
        transformer=transformer.half(),
    )
    pipe.save_pretrained(folder, safe_serialization=True)
