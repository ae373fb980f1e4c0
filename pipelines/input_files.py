"""Pictures and videos that a model is given: read, checked and brought to the size of its video.

Pictures are `PIL.Image.Image` in RGB, upright and without transparency; masks are in "L".
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sla_video.pipelines.errors import InputError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

# A model is told what it would see anyway where less than this share of a side is cut off.
_CUT_SILENTLY = 0.02
_WHITE = 128


@dataclass(frozen=True, kw_only=True)
class Clip:
    """The beginning of a video.

    Attributes:
        size: (width, height) as it is shown.
        fps: frames a second; 0 where the file does not tell.
    """

    path: Path
    frames: list[Image]
    size: tuple[int, int]
    fps: float


def read_picture(path: Path, option: str) -> Image:
    """The picture in a file, upright, in RGB; transparent parts become white.

    Args:
        option: of the command line, for messages.

    Raises:
        InputError: not a file, or nothing that Pillow can decode.
    """
    import numpy as np
    from PIL import Image, ImageOps

    picture = _decode_picture(path, option)
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        # 16 bits a pixel, of which `convert` would cut off all above 255.
        eight = np.clip(np.asarray(picture).astype(np.int64) // 257, 0, 255)
        picture = Image.fromarray(eight.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    below = Image.new("RGBA", above.size, "white")
    return Image.alpha_composite(below, above).convert("RGB")


def is_picture(path: Path) -> bool:
    """Whether a file holds a single picture."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) == 1
    except Exception:  # `_decode_picture` says why, where a picture is what is wanted
        return False


def _decode_picture(path: Path, option: str) -> Image:
    from PIL import Image

    _check_file(path, option)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.load()
                return picture.copy()
    except Exception as error:  # each format's plugin raises its own types
        raise InputError(
            f"cannot read a picture from {path} ({one_line(error, limit=120)}): {option} takes "
            "PNG, JPEG, WebP and what else Pillow reads"
        ) from error


def read_clip(path: Path, option: str, most: int) -> Clip:
    """The first `most` frames of a video, or all where it has fewer.

    Raises:
        InputError: not a file, a picture, or nothing that ffmpeg can decode.
    """
    import imageio_ffmpeg
    from PIL import Image

    _check_file(path, option)
    if is_picture(path):
        raise InputError(f"{option} takes a video, but {path} is a picture")
    frames: list[Image.Image] = []
    # It warns that pictures are upright where they were filmed on the side.
    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)
    try:
        reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
        about = next(reader)
        for pixels in itertools.islice(reader, most):
            frames.append(Image.frombytes("RGB", about["size"], pixels))
        reader.close()
    except Exception as error:  # what ffmpeg says comes as many types
        frames, text = [], str(error)
    else:
        text = "it has no frames"
    if not frames:
        # The last line of ffmpeg's report says what is wrong.
        reason = one_line(text.strip().splitlines()[-1] if text.strip() else "no reason", limit=120)
        raise InputError(
            f"cannot read a video from {path} ({reason}): {option} takes MP4, WebM, GIF and what "
            "else ffmpeg reads"
        )
    return Clip(path=path, frames=frames, size=about["size"], fps=float(about["fps"] or 0))


def as_mask(pictures: list[Image], path: Path) -> list[Image]:
    """Masks in black and white: `L`, of 0 and 255.

    Raises:
        InputError: black throughout, as where ones were written for white.
    """
    masks = [
        picture.convert("L").point(lambda value: 255 * (value >= _WHITE)) for picture in pictures
    ]
    if not any(mask.getbbox() for mask in masks):
        raise InputError(
            f"the mask {path} is black throughout: white (255) is what is made anew, and black kept"
        )
    return masks


def fit(picture: Image, height: int, width: int, *, sharp: bool = False) -> Image:
    """Scaled to cover `height` x `width`, and cropped around the centre.

    Args:
        sharp: take the nearest pixels, as for masks.
    """
    from PIL import Image, ImageOps

    if picture.size == (width, height):
        return picture
    how = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    return ImageOps.fit(picture, (width, height), how)


def what_is_cut(path: Path, size: tuple[int, int], height: int, width: int) -> str | None:
    """A remark on what `fit` cuts off a picture of `size` (width, height), if it is worth one."""
    scale = max(height / size[1], width / size[0])
    cut = {"height": 1 - height / (size[1] * scale), "width": 1 - width / (size[0] * scale)}
    side = max(cut, key=lambda name: cut[name])
    if cut[side] < _CUT_SILENTLY:
        return None
    return (
        f"{path} is {size[0]}x{size[1]}, the video {width}x{height}: {cut[side]:.0%} of its {side} "
        "is cut off; without --height and --width the video takes its shape"
    )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_file(path: Path, option: str) -> None:
    if not path.exists():
        raise InputError(f"{option}: there is no file {path}")
    if not path.is_file():
        raise InputError(f"{option}: {path} is not a file")
