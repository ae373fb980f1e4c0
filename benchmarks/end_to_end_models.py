"""Transformers of Wan at their true sizes with random weights: latency does not depend on values.

Letters: L tokens of one clip. Sizes are those of the published configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn

TEXT_POSITIONS = 512


@dataclass(frozen=True, kw_only=True)
class Model:
    """One transformer and the clip it is timed on.

    Attributes:
        title: for tables.
        layers, heads, head_dim, ffn_dim, channels, text_dim: of the transformer; `channels` are
            those of latents.
        frames, height, width: of the clip, in pixels.
        spatial: pixels of a latent, along one side.
        per_token_timesteps: Wan2.2 TI2V gives each token a timestep of its own.
    """

    title: str
    layers: int
    heads: int
    head_dim: int = 128
    ffn_dim: int
    channels: int = 16
    text_dim: int = 4096
    frames: int
    height: int
    width: int
    spatial: int = 8
    per_token_timesteps: bool = False

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Channels, frames, height, width of the latents."""
        frames = (self.frames - 1) // 4 + 1
        return self.channels, frames, self.height // self.spatial, self.width // self.spatial

    @property
    def length(self) -> int:
        """L: patches are 1 x 2 x 2 latents."""
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)


MODELS = {
    "1.3B": Model(
        title="Wan2.1 1.3B", layers=30, heads=12, ffn_dim=8960, frames=81, height=480, width=832
    ),
    "14B": Model(
        title="Wan2.1 14B", layers=40, heads=40, ffn_dim=13824, frames=81, height=720, width=1280
    ),
    "5B": Model(
        title="Wan2.2 TI2V-5B",
        layers=30,
        heads=24,
        ffn_dim=14336,
        channels=48,
        frames=121,
        height=704,
        width=1280,
        spatial=16,
        per_token_timesteps=True,
    ),
}


def tiny(model: Model) -> Model:
    """The same kind of model for a dry run on a CPU."""
    return replace(
        model, layers=3, heads=4, head_dim=32, ffn_dim=64, text_dim=32, frames=9,
        height=16 * model.spatial, width=16 * model.spatial,
    )  # fmt: skip


def build(model: Model, device: torch.device) -> WanTransformer3DModel:
    """Made on the device where it runs, in the dtypes that `from_pretrained` gives in bfloat16."""
    with _bfloat16_on(device):
        transformer = WanTransformer3DModel(
            num_attention_heads=model.heads,
            attention_head_dim=model.head_dim,
            num_layers=model.layers,
            ffn_dim=model.ffn_dim,
            in_channels=model.channels,
            out_channels=model.channels,
            text_dim=model.text_dim,
        ).eval()
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return transformer.requires_grad_(False)


def build_vae(model: Model, device: torch.device, *, small: bool) -> AutoencoderKLWan:
    """The autoencoder of Wan2.1 in bfloat16; `small`, in float32, for a dry run."""
    changes = {"base_dim": 8, "num_res_blocks": 1} if small else {}
    with _bfloat16_on(device):
        vae = AutoencoderKLWan(z_dim=model.channels, **changes).eval().requires_grad_(False)
    return vae.float() if small else vae


def forward_inputs(model: Model, device: torch.device) -> dict[str, Any]:
    """Arguments of one forward: noise, a timestep, embeddings of a text."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).bfloat16()

    timesteps = (1, model.length) if model.per_token_timesteps else (1,)
    return {
        "hidden_states": noise(1, *model.latents),
        "timestep": torch.full(timesteps, 700.0, device=device),
        "encoder_hidden_states": noise(1, TEXT_POSITIONS, model.text_dim),
        "return_dict": False,
    }


def quantize_linears(transformer: nn.Module, granularity: str) -> None:
    """FP8 weights, and activations quantized on the way, in all linear layers of the blocks.

    Args:
        granularity: "row", a scale for each token and each output channel, or "tensor".
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    # Compiler settings are left as they are, so that all rows are compiled alike.
    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow() if granularity == "row" else PerTensor(), set_inductor_config=False
    )
    for block in transformer.blocks:
        quantize_(block, config)


@contextmanager
def compiled_blocks(transformer: nn.Module) -> Iterator[None]:
    """Blocks compiled anew within, and not compiled after."""
    torch._dynamo.reset()
    transformer.compile_repeated_blocks(fullgraph=True)
    try:
        yield
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None


@contextmanager
def only_first_blocks(transformer: nn.Module, count: int) -> Iterator[None]:
    """With the first blocks alone a forward compiles and tunes what all of them need."""
    blocks = transformer.blocks
    transformer.blocks = nn.ModuleList(list(blocks)[:count])
    try:
        yield
    finally:
        transformer.blocks = blocks


class _Captured(Exception):
    """Ends a forward at its first block."""


def block_arguments(transformer: nn.Module, inputs: dict[str, Any]) -> tuple[Any, ...]:
    """What the first block is called with in a forward of `inputs`."""
    block = transformer.blocks[0]
    found: list[tuple[Any, ...]] = []

    def capture(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments)
        raise _Captured

    # A hook would have the block compiled anew.
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    hook = block.register_forward_pre_hook(capture)
    try:
        transformer(**inputs)
    except _Captured:
        pass
    finally:
        hook.remove()
        block._compiled_call_impl = compiled
    return found[0]


@contextmanager
def _bfloat16_on(device: torch.device) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)
