"""What a model is given besides the prompt, as its pipeline takes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.input_files import (
    Clip,
    as_mask,
    fit,
    is_picture,
    read_clip,
    read_picture,
    sha256_of,
    what_is_cut,
)
from sla_video.pipelines.model_defaults import Geometry, ModelDefaults
from sla_video.pipelines.pipeline_kinds import INPUTS, PipelineKind, option

if TYPE_CHECKING:
    from PIL.Image import Image

# What VACE takes for "not known": the middle of the range.
_UNKNOWN = (128, 128, 128)


@dataclass(frozen=True, kw_only=True)
class GenerationInputs:
    """Pictures and videos of a request, read and checked, before they have their size.

    Attributes:
        files: name in `INPUTS` -> file.
        pictures: name -> picture.
        video, mask: of a request with a video; the mask is as long as the video.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    pictures: Mapping[str, Image] = field(default_factory=dict)
    video: Clip | None = None
    mask: list[Image] | None = None

    def choose_size(
        self, given: Mapping[str, Any], defaults: ModelDefaults, geometry: Geometry
    ) -> dict[str, Any]:
        """Frames, height, width and frames a second: those `given`, else as the inputs have them.

        Raises:
            InputError: more frames than the video has.
        """
        chosen = {
            name: getattr(defaults, name) if given[name] is None else given[name]
            for name in ("frames", "height", "width", "fps")
        }
        if self.video is None and not self.pictures:
            return chosen
        if "last_image" in self.pictures and chosen["frames"] == 1:
            raise InputError("--image and --last-image need more than one of --frames")
        width, height = self.pictures["image"].size if self.video is None else self.video.size
        chosen["height"], chosen["width"] = geometry.size_like(
            height / width,
            area=defaults.height * defaults.width,
            height=given["height"],
            width=given["width"],
        )
        if self.video is None:
            return chosen
        found = len(self.video.frames)
        if given["frames"] is None:
            chosen["frames"] = geometry.longest(min(found, defaults.frames))
        elif given["frames"] > found:
            raise InputError(
                f"`frames` is {given['frames']}, but {self.video.path} has {found}: ask for "
                f"--frames {geometry.longest(found)}"
            )
        if given["fps"] is None and 0 < self.video.fps <= 240:
            chosen["fps"] = self.video.fps
        return chosen

    def arguments(self, kind: PipelineKind, frames: int, height: int, width: int) -> dict[str, Any]:
        """Arguments of the pipeline's call, at the size of its video."""
        fitted = {name: fit(picture, height, width) for name, picture in self.pictures.items()}
        if self.video is not None:
            found: dict[str, Any] = {
                "video": [fit(frame, height, width) for frame in self.video.frames[:frames]]
            }
            if self.mask is not None:
                found["mask"] = [fit(m, height, width, sharp=True) for m in self.mask[:frames]]
            return found
        if kind.name == "WanVACEPipeline" and fitted:
            return _vace_from_pictures(fitted, frames, height, width)
        return fitted

    def remarks(self, frames: int, height: int, width: int) -> tuple[str, ...]:
        """What the caller may not expect: what is cut off, and what is left out."""
        found = [
            what_is_cut(self.files[name], picture.size, height, width)
            for name, picture in self.pictures.items()
        ]
        if self.video is not None:
            found.append(what_is_cut(self.video.path, self.video.size, height, width))
            if len(self.video.frames) > frames:
                found.append(f"of {self.video.path} only the first {frames} frames are used")
        return tuple(remark for remark in found if remark)

    def digests(self) -> dict[str, str]:
        """ "image_sha256" and so on -> hexadecimal digits."""
        return {f"{name}_sha256": sha256_of(path) for name, path in self.files.items()}


def read_inputs(files: Mapping[str, Path], most_frames: int) -> GenerationInputs:
    """Read what is given.

    Args:
        files: name in `INPUTS` -> file, in a combination that the model takes.
        most_frames: how many frames of a video may be used.

    Raises:
        InputError: a file that cannot be read, or a mask of another size or length than its video.
    """
    files = {name: files[name].expanduser() for name in INPUTS if name in files}
    pictures = {
        name: read_picture(path, option(name))
        for name, path in files.items()
        if name not in ("video", "mask")
    }
    video = mask = None
    if "video" in files:
        # One more tells whether some are left out.
        video = read_clip(files["video"], "--video", most_frames + 1)
        mask = _read_mask(files["mask"], video, most_frames + 1) if "mask" in files else None
    return GenerationInputs(files=files, pictures=pictures, video=video, mask=mask)


def _read_mask(path: Path, video: Clip, most: int) -> list[Image]:
    if is_picture(path):
        pictures = [read_picture(path, "--mask")] * len(video.frames)
    else:
        pictures = read_clip(path, "--mask", most).frames
    if pictures[0].size != video.size:
        raise InputError(
            f"the mask {path} is {_size(pictures[0].size)}, but {video.path} is "
            f"{_size(video.size)}: a mask has the size of its video"
        )
    if len(pictures) != len(video.frames):
        raise InputError(
            f"the mask {path} has {_count(pictures, most)} frames, but {video.path} has "
            f"{_count(video.frames, most)}: give as many, or one picture for all"
        )
    return as_mask(pictures, path)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _count(frames: list[Image], most: int) -> str:
    return f"{len(frames)} or more" if len(frames) == most else str(len(frames))


def _vace_from_pictures(
    pictures: Mapping[str, Image], frames: int, height: int, width: int
) -> dict[str, Any]:
    """A video of which the first frame is known, or the first and the last, and its mask."""
    from PIL import Image

    video = [Image.new("RGB", (width, height), _UNKNOWN)] * frames
    mask = [Image.new("L", (width, height), 255)] * frames
    for name, index in (("image", 0), ("last_image", -1)):
        if name in pictures:
            video[index] = pictures[name]
            mask[index] = Image.new("L", (width, height), 0)
    return {"video": video, "mask": mask}
