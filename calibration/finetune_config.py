"""Settings of stage 2, fine-tuning. Each has its help text beside it: the command is made of them.

Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sla_video.config import SLAConfig, SparseDtype
from sla_video.pipelines.errors import InputError, one_line

Trainable = Literal["router", "router+alpha", "lora", "full"]
Loss = Literal["distill", "flow", "ssa"]
BaseLoss = Literal["distill", "flow"]
Alignment = Literal["both", "full", "sparse"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "trainable": get_args(Trainable),
    "loss": get_args(Loss),
    "base_loss": get_args(BaseLoss),
    "alignment": get_args(Alignment),
    "sparse_dtype": get_args(SparseDtype),
    "optimizer": ("adamw", "adamw8bit"),
    "schedule": ("linear", "cosine"),
    "levels": ("logit-normal", "uniform"),
    "mixed_precision": ("auto", "bf16", "no"),
    "weights": ("auto", "fp32", "bf16"),
    "impl": ("auto", "reference", "torch", "triton"),
}
# May differ between the run that was stopped and the one that goes on.
_FREE_ON_RESUME = {
    "out", "resume", "stop_after", "log_every", "save_every", "keep", "tracker",
    "validation_videos", "compile",
}  # fmt: skip
# What NumPy takes.
_MAX_SEED = 2**32 - 1
_QKV = ("to_q", "to_k", "to_v")


def _option(default: Any, text: str) -> Any:
    metadata = {"help": text}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: tuple(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a model with SLA2 attention is fine-tuned. Sizes are of the video, in pixels and frames.

    Raises:
        InputError: a setting is out of range, or two of them do not fit together.
    """

    out: Path = _option(Path("finetuned"), "Folder for checkpoints, settings and results.")
    model: str = _option(
        "tiny-wan", "The embedded tiny-wan, a folder of a Diffusers Wan pipeline, or a hub id."
    )
    routers: str | None = _option(None, "Routers to start from.  [default: untrained]")
    data: str = _option(
        "world",
        "A folder of videos with captions, a CSV or JSONL file with columns video and caption, or "
        "'world', the procedural world of tiny-wan.",
    )
    trainable: str = _option("lora", "What is trained: router, router+alpha, lora or full.")
    loss: str = _option(
        "distill",
        "distill: the velocity of the dense model; flow: the diffusion loss; ssa: alignment of "
        "full and sparse attention, on top of --base-loss.",
    )
    base_loss: str = _option("distill", "With --loss ssa: distill or flow.")
    alignment: str = _option(
        "both",
        "With --loss ssa, which outputs are pulled towards the others: both, full or sparse.",
    )
    alignment_weight: float = _option(1.0, "With --loss ssa, the weight of the alignment.")
    sparsity: tuple[float, ...] = _option(
        [0.97], "Share left to the linear branch; several are drawn from, one for each step."
    )
    sparse_dtype: str = _option(
        "bf16", "Format of the sparse branch in training: bf16, int8, int8_fp8 or int8_int8."
    )
    train_alpha: bool = _option(True, "Train alpha, the mix of the branches, too.")
    tau: float = _option(0.1, "Temperature of SoftTop-k, where routers are trained.")
    impl: str = _option("auto", "Implementation: auto, reference, torch or triton.")
    lora_rank: int = _option(16, "Rank of LoRA.")
    lora_alpha: float | None = _option(None, "LoRA is scaled by this over rank.  [default: rank]")
    lora_targets: tuple[str, ...] = _option(
        ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"],
        "Layers that get LoRA, by the ends of their names.",
    )
    frames: int | None = _option(None, "Frames of a clip.  [default: the model's own]")
    height: int | None = _option(None, "Height in pixels.  [default: the model's own]")
    width: int | None = _option(None, "Width in pixels.  [default: the model's own]")
    batch_size: int = _option(1, "Clips a step of one process.")
    accumulate: int = _option(1, "Forward passes of one optimizer step.")
    max_steps: int = _option(0, "Stop after this many optimizer steps; 0: --minutes decides.")
    minutes: float = _option(0.0, "Stop after so much training time; 0: --max-steps decides.")
    stop_after: int = _option(0, "Save and stop at this step, to be resumed later; 0: never.")
    learning_rate: float | None = _option(
        None, "Peak rate of LoRA or weights.  [default: 2e-4 for lora, 2e-5 for full]"
    )
    router_rate: float = _option(1e-3, "Peak rate of routers and alpha.")
    weight_decay: float = _option(0.01, "Of LoRA or weights; routers and alpha have none.")
    optimizer: str = _option("adamw", "adamw, or adamw8bit (needs bitsandbytes).")
    schedule: str = _option("linear", "How the rate falls at the end: linear or cosine.")
    warmup_steps: int = _option(50, "Steps until the full rate.")
    cooldown: float = _option(0.5, "Last share of the training in which the rate falls to 0.")
    clip_norm: float = _option(1.0, "Longest gradient.")
    ema: float = _option(0.0, "Decay of a moving average that becomes the result; 0: none.")
    mixed_precision: str = _option("auto", "auto, bf16 or no.  auto: bf16 on a GPU.")
    weights: str = _option("auto", "Format of frozen weights: auto, fp32 or bf16.")
    gradient_checkpointing: bool = _option(False, "Trade time for memory.")
    compile: bool | None = _option(None, "Compile the blocks.  [default: on a GPU, if possible]")
    shift: float | None = _option(
        None, "Shift of the noise levels.  [default: of the model's scheduler]"
    )
    levels: str = _option(
        "logit-normal",
        "Noise levels: logit-normal, or uniform in the time of a sampler, which has more at the "
        "noisy end, where the layout of a video is decided.",
    )
    guidance: float = _option(
        0.0,
        "With distill: every clip is taken with and without its caption, and the velocity under "
        "classifier-free guidance of this scale is matched too; 0: off.",
    )
    caption_dropout: float = _option(0.1, "Share of the clips that are trained without caption.")
    world_clips: int = _option(4096, "With --data world: clips rendered and encoded at the start.")
    encode_batch: int = _option(8, "Clips encoded at once.")
    cache: Path | None = _option(
        None, "Folder of encoded clips.  [default: .sla-video-cache beside the data]"
    )
    validate_every: int = _option(0, "Steps between validations; 0: only at the end.")
    validation_clips: int = _option(16, "Held-out clips of the validation.")
    validation_videos: int = _option(0, "Videos generated at each validation.")
    save_every: int = _option(200, "Steps between checkpoints.")
    keep: int = _option(2, "Checkpoints to keep.")
    log_every: int = _option(20, "Steps between lines of the log.")
    tracker: str | None = _option(None, "Also log to tensorboard, wandb, … (see Accelerate).")
    resume: bool = _option(False, "Go on from the newest checkpoint in --out.")
    seed: int = _option(0, "Of everything random.")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}")
        for name in ("sparsity", "lora_targets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.sparsity:
            raise InputError("`sparsity` must name at least one sparsity")
        at_least = {"lora_rank": 1, "batch_size": 1, "accumulate": 1, "max_steps": 0}
        at_least |= {"warmup_steps": 0, "stop_after": 0, "world_clips": 1, "encode_batch": 1}
        at_least |= {"validate_every": 0, "validation_clips": 1, "validation_videos": 0}
        at_least |= {"save_every": 1, "keep": 1, "log_every": 1}
        at_least |= {"frames": 1, "height": 1, "width": 1}
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"`{name}` must be at least {least}, got {value}")
        ranges: dict[str, tuple[float, float]] = {"ema": (0, 1), "cooldown": (0, 1)}
        ranges |= {"caption_dropout": (0, 1), "minutes": (0, math.inf), "tau": (1e-9, math.inf)}
        ranges |= {"learning_rate": (0, math.inf), "router_rate": (0, math.inf)}
        ranges |= {"alignment_weight": (0, math.inf), "clip_norm": (1e-12, math.inf)}
        ranges |= {"shift": (1e-9, math.inf), "weight_decay": (0, math.inf)}
        ranges |= {"guidance": (0, math.inf), "lora_alpha": (1e-9, math.inf)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"`{name}` must be in [{low:g}, {high:g}], got {value}")
        if not 0 <= self.seed <= _MAX_SEED:
            raise InputError(f"`seed` must be from 0 to {_MAX_SEED}, got {self.seed}")
        if not (self.max_steps or self.minutes):
            raise InputError("give --max-steps or --minutes: training has to end at some time")
        if self.guidance and (self.velocity_loss != "distill" or self.batch_size % 2):
            raise InputError(
                f"`guidance` {self.guidance} needs the loss distill and an even `batch_size`, got "
                f"{self.velocity_loss} and {self.batch_size}"
            )
        if self.trainable == "full" and self.weights == "bf16":
            raise InputError(
                "`weights` 'bf16' is for frozen weights, and with trainable 'full' none are: steps "
                "are smaller than what bfloat16 can hold; leave --weights out"
            )
        if self.trainable == "router+alpha" and not self.train_alpha:
            raise InputError("trainable 'router+alpha' trains alpha: take 'router' to leave it")
        self._check_alignment()
        try:
            self.sla()
            for sparsity in self.sparsity:
                SLAConfig(sparsity=sparsity)
        except (TypeError, ValueError) as error:
            raise InputError(one_line(error)) from error

    def _check_alignment(self) -> None:
        if self.loss != "ssa":
            return
        learns_qkv = self.trainable == "full" or (
            self.trainable == "lora"
            and all(any(t.split(".")[-1] == p for t in self.lora_targets) for p in _QKV)
        )
        if not learns_qkv:
            raise InputError(
                f"loss 'ssa' with trainable {self.trainable!r} leaves Q, K and V frozen, and then "
                "full attention cannot move towards sparse attention: train 'lora' on to_q, to_k "
                "and to_v, or 'full'; or take loss 'distill'"
            )

    @property
    def soft_selection(self) -> bool:
        """Whether training selects softly, which routers need to have gradients."""
        return self.trainable.startswith("router")

    @property
    def velocity_loss(self) -> str:
        """The loss of the velocity: "distill" or "flow"."""
        return self.base_loss if self.loss == "ssa" else self.loss

    @property
    def rate(self) -> float:
        """Peak learning rate of everything but routers and alpha."""
        default = 2e-4 if self.trainable == "lora" else 2e-5
        return default if self.learning_rate is None else self.learning_rate

    def sla(self) -> SLAConfig:
        """Settings of the attention where no routers are given; else these change single ones."""
        return SLAConfig(
            sparsity=self.sparsity[0],
            sparse_dtype=self.sparse_dtype,  # type: ignore[arg-type]
            impl=self.impl,  # type: ignore[arg-type]
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    def differences(self, stored: Mapping[str, Any]) -> str:
        """The settings in which a stored run differs, as "name: its value, here mine"."""
        own = self.to_dict()
        return "; ".join(
            f"{name}: {stored.get(name)!r} there, {own[name]!r} here"
            for name in own
            if name not in _FREE_ON_RESUME and own[name] != stored.get(name)
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
