"""What to generate: the caller's settings, checked.

Nothing in this file imports torch or diffusers: a bad setting is refused at once.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass
from pathlib import Path

from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.model_source import EMBEDDED_MODEL
from sla_video.pipelines.sparse_format import check_format

_MAX_SEED = 2**63 - 1
# As `routers`: the training-free mode, also for a model that comes with routers.
NO_ROUTERS = "none"
# What a recipe holds.
_OF_RECIPE = ("routers", "sparsity", "token_order")
_MAX_STEPS = 1000  # noise levels that Wan's schedulers know


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Settings of `generate`. `None` means the model's own default.

    Attributes:
        prompts: one video, or `num_videos`, of each.
        model: "tiny-wan", a local folder or a hub id.
        routers: a folder or hub id of trained routers; "none" is the training-free mode. `None`
            takes the model's own, where it has any for the sparsity.
        recipe: a file or hub id of settings that `sla-video tune` chose, in the place of `routers`,
            `sparsity` and `token_order`; its video size is the default.
        sparsity: share of the key blocks left to the linear branch, in [0, 1).
        dense: keep the model's own full attention.
        dense_steps: how many of the first steps keep it; they fix the layout of the video.
        token_order: of `SLAConfig`; `None` takes that of the routers, or raster order.
        sparse_dtype: number format of the sparse branch; `None` takes that of routers trained with
            a low-bit one, else the fastest that the device has.
        compress: share of the query-key pairs that the layers and steps take which lose least by
            it, in (0, 1]; see `TokenCompression`, of which all else is left as it is. `None` takes
            all.
        steps: denoising steps.
        guidance_scale: weight of the prompt; 1 or less turns classifier-free guidance off.
        negative_prompt: what to move away from, with guidance.
        image, last_image: picture files that the video starts and ends with.
        video: a video file to start from.
        mask: a video or picture file, white where `video` is to be made anew.
        strength: how much of `video` a text-to-video model makes anew, in (0, 1].
        frames, height, width: of the video, in frames and pixels.
        fps: frames a second.
        seed: of the first video; the one at index i uses `seed + i`. `None` draws one, after
            which `seed` holds it.
        num_videos: videos of each prompt.
        device: "cpu", "cuda", "cuda:N" or "mps"; `None` takes a GPU if there is one.
        dtype: "fp32", "bf16" or "fp16"; `None` takes fp32 on a CPU and bf16 elsewhere.
        offload: keep idle components in host memory.
        out: a file that ends in .mp4, or a folder; `None` is the current folder.
        overwrite: replace a file that exists.
        resume: keep videos that an earlier run with the same prompts, seed and settings has
            finished, and make the rest.
        record: also measure, against full attention, what each layer loses in each step, and write
            it beside the video.

    Raises:
        InputError: a setting out of range, or two that contradict each other.
    """

    prompts: tuple[str, ...]
    model: str = EMBEDDED_MODEL
    routers: str | None = None
    recipe: str | None = None
    sparsity: float | None = None
    dense: bool = False
    dense_steps: int | None = None
    token_order: str | None = None
    sparse_dtype: str | None = None
    compress: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    mask: Path | None = None
    strength: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    seed: int | None = None
    num_videos: int = 1
    device: str | None = None
    dtype: str | None = None
    offload: bool = False
    out: Path | None = None
    overwrite: bool = False
    resume: bool = False
    record: bool = False

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError('no prompt given: for instance "a red circle moves left"')
        if any(not prompt.strip() for prompt in self.prompts):
            raise InputError("`prompt` is empty: say what the video should show")
        of_sparse = (
            "routers", "recipe", "sparsity", "dense_steps", "token_order", "sparse_dtype",
        )  # fmt: skip
        given = [name for name in of_sparse if getattr(self, name) is not None]
        if self.dense and given:
            raise InputError(f"`dense` is full attention and takes no `{given[0]}`: leave one out")
        if self.recipe is not None and (decided := [n for n in _OF_RECIPE if n in given]):
            raise InputError(f"`recipe` decides on `{decided[0]}`: leave one of the two out")
        if self.dense and self.record:
            raise InputError("`dense` loses nothing that `record` could show: leave one out")
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        if self.token_order is not None:
            check_token_order(self.token_order)
        if self.sparse_dtype is not None:
            check_format(self.sparse_dtype)
        if self.compress is not None and not 0 < self.compress <= 1:
            raise InputError(f"`compress` must be above 0 and at most 1, got {self.compress}")
        _check_whole("steps", self.steps, 1, _MAX_STEPS)
        _check_whole("dense_steps", self.dense_steps, 0, _MAX_STEPS)
        _check_whole("frames", self.frames, 1)
        _check_whole("height", self.height, 1)
        _check_whole("width", self.width, 1)
        _check_whole("num_videos", self.num_videos, 1)
        count = len(self.prompts) * self.num_videos
        _check_whole("seed", self.seed, 0, _MAX_SEED - count)
        if self.resume and self.overwrite:
            raise InputError("`resume` keeps what `overwrite` would replace: leave one out")
        if self.resume and self.seed is None:
            raise InputError("`resume` looks for the videos of a seed: give it with --seed")
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(2**31))
        scale, fps = self.guidance_scale, self.fps
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise InputError(f"`guidance_scale` must be a number of at least 0, got {scale}")
        # ffmpeg is told two decimals: less than that is 0 to it, and fails after the work.
        if fps is not None and not 0.01 <= fps <= 240:
            raise InputError(f"`fps` must be from 0.01 to 240, got {fps}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise InputError(f"`strength` must be above 0 and at most 1, got {self.strength}")


def check_sparsity(value: float) -> None:
    """Raise `InputError` unless `value` is in [0, 1)."""
    try:
        SLAConfig(sparsity=value)
    except (TypeError, ValueError) as error:
        raise InputError(str(error)) from error


def check_token_order(name: str) -> None:
    """Raise `InputError` unless `SLAConfig` knows the order."""
    try:
        SLAConfig(token_order=name)
    except ValueError as error:
        raise InputError(str(error)) from error


def _check_whole(name: str, value: int | None, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if value < low or (high is not None and value > high):
        limit = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"`{name}` must be {limit}, got {value}")


def read_prompts(path: Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; empty lines are skipped.

    Raises:
        InputError: the file cannot be read, is not UTF-8 text or holds no prompt.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read prompts from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read prompts from {path}: it is not UTF-8 text") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputError(f"{path} holds no prompts: write one a line")
    return prompts
