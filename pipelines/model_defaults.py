"""The sizes a model can generate, and its settings where the caller gives none.

Nothing in this file imports torch or diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError

# `WanPipeline` itself refuses anything but multiples of 16 pixels.
_PIPELINE_MULTIPLE = 16
# Of models whose position embedding ends nowhere.
_ENDLESS = 2**31


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """Settings used where the caller gives none: `defaults.json` of the model, or Wan 2.1's own.

    `max_sequence_length` is the number of text tokens that the model was trained with; Wan pads to
    it and attends to the padding, so that it is no matter of taste. `routers` is a folder of the
    model's own, trained for sparsities of `routers_sparsity` and more and used for these.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance_scale: float = 5.0
    fps: float = 16
    sparsity: float = 0.9
    dense_steps: int = 0
    max_sequence_length: int = 512
    routers: str | None = None
    routers_sparsity: float = 0.0


# Names of a model's `defaults.json` (those of a Diffusers call) and ours.
_DEFAULTS_KEYS = {
    "num_frames": "frames",
    "height": "height",
    "width": "width",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "fps": "fps",
    "sparsity": "sparsity",
    "dense_steps": "dense_steps",
    "max_sequence_length": "max_sequence_length",
    "routers_sparsity": "routers_sparsity",
}


def defaults_of(
    stored: Mapping[str, Any], path: Path, otherwise: ModelDefaults | None = None
) -> ModelDefaults:
    """The settings in a model's `defaults.json`, which was read from `path`.

    Args:
        otherwise: where the file is silent.

    Raises:
        InputError: a value of another type than it should have.
    """
    known: dict[str, Any] = {
        ours: stored[key] for key, ours in _DEFAULTS_KEYS.items() if key in stored
    }
    for ours, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{path}: `{ours}` must be a number, got {value!r}")
    if "routers" in stored:
        if not isinstance(stored["routers"], str):
            raise InputError(
                f"{path}: `routers` must be the name of a folder, got {stored['routers']!r}"
            )
        known["routers"] = str(path.parent / stored["routers"])
    return ModelDefaults(**{**vars(otherwise or ModelDefaults()), **known})


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The sizes a model can generate. All in pixels and frames of the video, not of its latents.

    Attributes:
        multiple: `(height, width)` have to be multiples of these.
        temporal: frames have to be `temporal * k + 1`.
        maximum: the largest `(frames, height, width)` that the position embedding covers.
    """

    multiple: tuple[int, int]
    temporal: int
    maximum: tuple[int, int, int] = (_ENDLESS, _ENDLESS, _ENDLESS)

    def check(self, frames: int, height: int, width: int) -> None:
        """Raise `InputError` naming the nearest valid sizes unless all three are valid."""
        nearest_frames = _nearest(frames - 1, self.temporal, 0, self.maximum[0] - 1) + 1
        if frames != nearest_frames:
            limit = "" if self.maximum[0] == _ENDLESS else f" and at most {self.maximum[0]}"
            raise InputError(
                f"`frames` must be {self.temporal}k+1{limit} for this "
                f"model, got {frames}; the nearest valid number is {nearest_frames}"
            )
        nearest = self._nearest_size(height, width)
        if (height, width) != nearest:
            multiples = " and ".join(str(m) for m in dict.fromkeys(self.multiple))
            largest = self.maximum[1:]
            limit = "" if _ENDLESS in largest else f", at most {largest[0]} and {largest[1]},"
            raise InputError(
                f"`height` and `width` must be multiples of {multiples}{limit} for this model, "
                f"got {height} and {width}; the nearest valid size is --height {nearest[0]} "
                f"--width {nearest[1]}"
            )

    def longest(self, frames: int) -> int:
        """The largest valid number of frames up to `frames`."""
        return (min(frames, self.maximum[0]) - 1) // self.temporal * self.temporal + 1

    def size_like(
        self, aspect: float, *, area: int, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """A valid `(height, width)` of about the shape `aspect`, which is height over width.

        Args:
            area: about how many pixels a frame has, where neither side is given.
            height, width: kept as they are where they are given.
        """
        if height is not None and width is not None:
            return height, width
        if height is not None:
            return height, self._nearest_size(height, round(height / aspect))[1]
        if width is not None:
            return self._nearest_size(round(width * aspect), width)[0], width
        return self._nearest_size(round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)))

    def _nearest_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = (
            _nearest(size, multiple, multiple, maximum)
            for size, multiple, maximum in zip(
                (height, width), self.multiple, self.maximum[1:], strict=True
            )
        )
        return rows, columns


def wan_geometry(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> Geometry:
    """What a Wan model can generate, by the configurations of two of its components."""
    spatial = int(vae.get("scale_factor_spatial") or 8)
    temporal = int(vae.get("scale_factor_temporal") or 4)
    patch = transformer.get("patch_size") or (1, 2, 2)
    positions = int(transformer.get("rope_max_seq_len") or 1024)
    multiple = (
        math.lcm(_PIPELINE_MULTIPLE, spatial * int(patch[1])),
        math.lcm(_PIPELINE_MULTIPLE, spatial * int(patch[2])),
    )
    return Geometry(
        multiple=multiple,
        temporal=temporal,
        maximum=(
            (positions * int(patch[0]) - 1) * temporal + 1,
            positions * spatial * int(patch[1]) // multiple[0] * multiple[0],
            positions * spatial * int(patch[2]) // multiple[1] * multiple[1],
        ),
    )


def _nearest(value: int, multiple: int, low: int, high: int) -> int:
    """The multiple of `multiple` nearest to `value` in `[low, high]`; ties go up."""
    return min(max((2 * value + multiple) // (2 * multiple) * multiple, low), high)
