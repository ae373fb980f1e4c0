"""How far a video is from another one of the same seed, frame by frame: PSNR, SSIM, LPIPS."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.progress import Progress
from sla_video.pipelines.reports.video_source import VideoSource

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# Frames that are equal have no PSNR; beyond 96 dB nobody could tell.
_LEAST_ERROR = 2.5e-10
# Width of the window that SSIM moves over a frame.
_SSIM_WINDOW = 11
_ALEXNET = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True, kw_only=True)
class VideoDistance:
    """Frame by frame.

    Attributes:
        psnr: in dB, at most 96, which frames that are equal have.
        ssim: at most 1.
        lpips: at least 0; None where its network is not at hand.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] | None

    def mean(self, name: str) -> float:
        """Mean over the frames of the metric `name`."""
        values = getattr(self, name)
        return float(sum(values) / len(values))

    def worst(self, name: str) -> tuple[int, float]:
        """The frame, counted from 0, that is farthest by the metric `name`, and its value."""
        values = getattr(self, name)
        worst = max(values) if name == "lpips" else min(values)
        return values.index(worst), worst


def why_no_metrics() -> str | None:
    """Why PSNR and SSIM cannot be computed here; None where they can."""
    if importlib.util.find_spec("torchmetrics") is None:
        return "torchmetrics is not installed: pip install 'sla-video[report]'"
    return None


def why_no_lpips() -> str | None:
    """Why LPIPS cannot be computed here; None where it can. Nothing is ever downloaded for it."""
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    import torch

    weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
    return None if weights.is_file() else f"its weights are not at hand ({_ALEXNET})"


def measure_distance(
    first: VideoSource, second: VideoSource, *, progress: Progress, lpips: bool = True
) -> VideoDistance:
    """Compare two videos, a frame of each in memory at a time.

    Args:
        lpips: also LPIPS (AlexNet), where its weights are at hand.

    Raises:
        InputError: they differ in size or length, are damaged or too small, or torchmetrics is
            missing.
    """
    first.check_pairs_with(second)
    reason = why_no_metrics()
    if reason is not None:
        raise InputError(f"cannot compare videos: {reason}")
    if min(first.height, first.width) < _SSIM_WINDOW:
        raise InputError(
            f"{first.path} has frames of {first.width}x{first.height}: SSIM needs at least "
            f"{_SSIM_WINDOW} pixels a side"
        )
    from torchmetrics.functional.image import structural_similarity_index_measure

    network = _lpips_network() if lpips and why_no_lpips() is None else None
    psnr, ssim, perceived = [], [], []
    progress.stage("comparing", first.frames)
    for a, b in zip(map(_to_tensor, first.read()), map(_to_tensor, second.read()), strict=True):
        error = (a - b).square().mean().clamp_min(_LEAST_ERROR)
        psnr.append(float(-10 * error.log10()))
        ssim.append(float(structural_similarity_index_measure(a, b, data_range=1.0)))  # type: ignore[arg-type]
        if network is not None:
            perceived.append(float(network(a, b)))
        progress.advance()
    return VideoDistance(
        psnr=tuple(psnr), ssim=tuple(ssim), lpips=tuple(perceived) if network is not None else None
    )


def _to_tensor(frame: np.ndarray[Any, Any]) -> Tensor:
    """`[1, 3, H, W]` in [0, 1]."""
    import torch

    return torch.from_numpy(frame.copy()).permute(2, 0, 1)[None].float() / 255


def _lpips_network() -> Any:
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
