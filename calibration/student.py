"""The network that stage 2 trains, with all that is trainable under one roof, and its teacher.

Routers are in none of a transformer's parameters. DDP and FSDP see only those of the module that
they wrap, so `Student` holds transformer, routers and teacher, and computes the losses inside its
forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sla_video.calibration.alignment import Draw, LayerAlignment, put_alignment
from sla_video.calibration.finetune_config import FinetuneConfig
from sla_video.calibration.soft_attention import SoftAttention
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.lora import add_lora, lora_parameters
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan.flow_matching import DenseSelfAttention

_ROUTER_TENSORS = ("query_proj", "key_proj")


class Student(nn.Module):
    """Transformer with SLA2, its routers, and for trainable="full" a frozen copy as the teacher.

    Else the teacher is the transformer itself with dense attention and LoRA off.

    Args:
        transformer: a `WanTransformer3DModel` without SLA; it is patched.
        config: of the run.
        device: where the transformer is or will be.
    """

    def __init__(
        self, transformer: nn.Module, config: FinetuneConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.config = config
        self.teacher: nn.Module | None = None
        if config.trainable == "full" and config.velocity_loss == "distill":
            self.teacher = copy.deepcopy(transformer).requires_grad_(False)
            _attend_densely(self.teacher)
        self.transformer = transformer
        self.handle = _patch(transformer, config)
        self.routers = nn.ModuleDict(
            {name.replace(".", "/"): router for name, router in self.handle.routers.items()}
        )
        self.processors = {
            name: processor
            for name, processor in self.handle.processors.items()
            if processor.sparsity is not None
        }
        if not self.processors:
            raise InputError("all layers are dense, so there is nothing to train")
        self.alignments: list[LayerAlignment] = []
        self.draw: Draw | None = None
        if config.loss == "ssa":
            count = len(self.processors)
            factor = config.alignment_weight / count / config.accumulate
            self.draw = Draw(config.alignment, factor, device)
            self.alignments = put_alignment(self.processors, self.draw)
        elif config.soft_selection:
            for processor in self.processors.values():
                processor.attention = SoftAttention(config.tau)
        self._choose_trainable()
        self._attention = {name: p.attention for name, p in self.processors.items()}

    def _choose_trainable(self) -> None:
        kind = self.config.trainable
        self.transformer.requires_grad_(kind == "full")
        if kind == "lora":
            if not lora_parameters(self.transformer):
                try:
                    add_lora(
                        self.transformer,
                        rank=self.config.lora_rank,
                        alpha=self.config.lora_alpha,
                        targets=self.config.lora_targets,
                    )
                except ValueError as error:
                    raise InputError(one_line(error)) from error
            for parameter in lora_parameters(self.transformer).values():
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        for name, parameter in self.routers.named_parameters():
            is_alpha = name.rpartition(".")[2] not in _ROUTER_TENSORS
            # With LoRA or all weights, routers stay as stage 1 left them (SLA2, section 6).
            learns_alpha = kind != "router" and self.config.train_alpha
            wanted = learns_alpha if is_alpha else kind.startswith("router")
            parameter.requires_grad_(wanted)

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: "transformer.…" and "routers.…"."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def set_sparsity(self, sparsity: float) -> None:
        """Let all layers that follow `config.sparsity` leave out this share."""
        for processor in self.processors.values():
            processor.sparsity = sparsity

    @contextmanager
    def as_deployed(self) -> Iterator[None]:
        """Within the block the attention is that of inference: hard selection, no alignment."""
        for processor in self.processors.values():
            processor.attention = None
        try:
            yield
        finally:
            for name, processor in self.processors.items():
                processor.attention = self._attention[name]

    @torch.no_grad()
    def dense_velocity(self, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """The velocity of the original model, `[B, C, T, h, w]`."""
        if self.teacher is not None:
            return _velocity(self.teacher, noisy, timestep, text)
        with self.handle.dense():
            return _velocity(self.transformer, noisy, timestep, text)

    def forward(
        self, latents: Tensor, noise: Tensor, sigma: Tensor, text: Tensor, mode: str = "train"
    ) -> dict[str, Tensor]:
        """Losses of a batch, or what a validation needs.

        Args:
            latents, noise: `[B, C, T, h, w]` float32.
            sigma: `[B]` noise levels in (0, 1).
            text: `[B, S, C_text]` embeddings.
            mode: "train", or "compare".

        Returns:
            For "train": "velocity", the mean squared error to differentiate (the alignment's
            gradient comes with it), and "alignment" to look at. For "compare": "student",
            "dense" velocities and the "target" of flow matching.
        """
        noisy = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
        timestep = sigma * 1000
        if mode == "compare":
            with self.as_deployed():
                student = _velocity(self.transformer, noisy, timestep, text)
            dense = self.dense_velocity(noisy, timestep, text)
            return {"student": student, "dense": dense, "target": noise - latents}
        if self.config.velocity_loss == "distill":
            target = self.dense_velocity(noisy, timestep, text)
        else:
            target = noise - latents
        velocity = _velocity(self.transformer, noisy, timestep, text)
        losses = {"velocity": F.mse_loss(velocity, target)}
        if self.config.guidance:
            losses["velocity"] = losses["velocity"] + guided_error(
                velocity - target, self.config.guidance
            )
        if self.alignments:
            losses["alignment"] = torch.stack([layer.value for layer in self.alignments]).mean()
            if self.config.alignment == "full":
                # What only the sparse stream uses needs a gradient for DDP in the full one, too.
                unused = sum(p.sum() for p in self.routers.parameters() if p.requires_grad)
                losses["velocity"] = losses["velocity"] + 0 * unused
        return losses


def guided_error(error: Tensor, scale: float) -> Tensor:
    """Mean squared error of the velocity under classifier-free guidance, over `scale` squared.

    Args:
        error: `[B, …]` of the velocity, the first half with captions and the second without.
        scale: s in `bare + s (captioned - bare)`, which multiplies errors that differ.
    """
    captioned, bare = error.chunk(2)
    return (bare + scale * (captioned - bare)).square().mean() / scale**2


def _velocity(transformer: nn.Module, noisy: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    out: Tensor = transformer(noisy, timestep, text, return_dict=False)[0]
    return out.float()


def _attend_densely(transformer: nn.Module) -> None:
    """Stock self-attention in the form that compiles well."""
    for block in transformer.blocks:  # type: ignore[union-attr]
        block.attn1.processor = DenseSelfAttention()


def _patch(transformer: nn.Module, config: FinetuneConfig) -> SLAHandle:
    # First steps are counted by a pipeline, and there is none.
    changes: dict[str, Any] = {
        "sparse_dtype": config.sparse_dtype,
        "impl": config.impl,
        "dense_steps": 0,
    }
    if config.routers is None:
        handle = enable_sla(transformer, config=config.sla())
    else:
        try:
            handle = enable_sla(transformer, config.routers, sparsity=config.sparsity[0], **changes)
        except (TypeError, ValueError) as error:
            raise InputError(one_line(error)) from error
        if handle.config.key_orders:
            handle.remove()
            raise InputError(
                f"{config.routers} come with an order of keys (`key_orders`), which is chosen for "
                "routers that are trained already: train the routers that it was chosen for"
            )
    for processor in handle.processors.values():
        processor.original = DenseSelfAttention()
    return handle


def compile_blocks(student: Student) -> None:
    """Compile the block that the transformer repeats, once for all and for each kind of step."""
    # Kinds: full or sparse stream, teacher, several sparsities, validation.
    torch._dynamo.config.recompile_limit = 64
    # A block is smaller than a bucket of gradients: its graph need not be cut at their borders.
    torch._dynamo.config.optimize_ddp = False
    for transformer in (student.transformer, student.teacher):
        if transformer is not None:
            transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)  # type: ignore[operator]


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled blocks as they were written, for instance to look inside."""
    stance = getattr(torch.compiler, "set_stance", None)
    with nullcontext() if stance is None else stance("force_eager"):
        yield
