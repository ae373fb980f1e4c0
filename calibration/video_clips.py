"""Encoded clips of videos on disk: latents and text embeddings, made once and kept in shards.

    CACHE/<key of the settings>/000001.safetensors   some clips: latents.i, text.i
    CACHE/<key of the settings>/empty.safetensors    the embedding of no caption

A shard's metadata says which videos it holds, by path, size, time and caption, and which were bad.
Shards are written one after the other and atomically, so that an interrupted encoding goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sla_video.calibration.clip_source import ClipBatch
from sla_video.calibration.video_list import BadVideo, CaptionedVideo, find_videos, read_clip
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.progress import Progress

logger = logging.getLogger("sla_video")
SHARD_SIZE = 16
_FORMAT = 1
# (video `[1, 3, T, H, W]`) -> latents `[C, t, h, w]`, and (caption) -> embedding `[S, C_text]`.
EncodeVideo = Callable[[Tensor], Tensor]
EncodeText = Callable[[str], Tensor]


class VideoClips:
    """Videos as a `ClipSource`, read from the shards when they are used.

    Args:
        data: see `find_videos`.
        cache: folder of the shards.
        identity: what the encoding depends on, besides the videos: model and sizes.
        encoders: called where something has to be encoded; returns both encoders.
        size: frames, height, width.
        held_out: clips to validate with; at least one stays to train on.
        text_positions: what embeddings are padded to with zeros.

    Raises:
        InputError: no video can be used, or the cache cannot be written.

    Attributes:
        skipped: file -> why it is not used.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        data: str,
        *,
        cache: Path,
        identity: Mapping[str, Any],
        encoders: Callable[[], tuple[EncodeVideo, EncodeText]],
        size: tuple[int, int, int],
        held_out: int,
        text_positions: int,
        progress: Progress,
    ) -> None:
        self.accelerator = accelerator
        self.size = size
        self.text_positions = text_positions
        self._encoders = encoders
        key = hashlib.sha256(json.dumps([_FORMAT, identity, size], sort_keys=True).encode())
        self.folder = cache / key.hexdigest()[:16]
        videos, self.skipped = find_videos(data)
        self._places: dict[str, tuple[Path, int]] = {}
        self._encode_missing(videos, progress)
        usable = [v for v in videos if fingerprint(v) in self._places]
        if not usable:
            some = "; ".join(f"{name}: {why}" for name, why in list(self.skipped.items())[:3])
            raise InputError(f"none of the videos in {data} can be used: {some}")
        # By fingerprint, so that neighbours in the list are not in one part.
        usable.sort(key=fingerprint)
        aside = min(held_out, len(usable) - 1)
        self._aside, self._videos = usable[:aside] or usable, usable[aside:]
        self.validation_prompts = [video.caption for video in self._aside]
        self._empty = self._read(self.folder / "empty.safetensors", ["text"])[0]

    def _encode_missing(self, videos: Sequence[CaptionedVideo], progress: Progress) -> None:
        bad = self._index()
        # All share the work by one list: nobody writes before everybody has looked.
        self.accelerator.wait_for_everyone()
        missing = [
            v for v in videos if fingerprint(v) not in self._places and fingerprint(v) not in bad
        ]
        mine = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        complete = (self.folder / "empty.safetensors").is_file()
        if missing or not complete:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._encode(mine, progress)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"cannot write encoded clips to {self.folder}: {one_line(error)}; give another "
                    "--cache"
                ) from error
        self.accelerator.wait_for_everyone()
        bad = self._index()
        self.skipped.update({str(v.path): bad[p] for v in videos if (p := fingerprint(v)) in bad})

    def _encode(self, videos: Sequence[CaptionedVideo], progress: Progress) -> None:
        encode_video, encode_text = self._encoders()
        if self.accelerator.is_main_process:
            _write(self.folder / "empty.safetensors", {"text": encode_text("")}, {})
        frames, height, width = self.size
        progress.stage("encode videos", len(videos))
        for start in range(0, len(videos), SHARD_SIZE):
            tensors: dict[str, Tensor] = {}
            names: dict[str, int] = {}
            bad: dict[str, str] = {}
            for index, video in enumerate(videos[start : start + SHARD_SIZE]):
                mark = fingerprint(video)
                try:
                    clip = read_clip(video.path, frames=frames, height=height, width=width)
                except BadVideo as error:
                    bad[mark] = str(error)
                else:
                    tensors[f"latents.{index}"] = encode_video(clip).to("cpu", torch.bfloat16)
                    tensors[f"text.{index}"] = encode_text(video.caption).to("cpu")
                    names[mark] = index
                progress.advance()
            about = {"clips": json.dumps(names), "bad": json.dumps(bad)}
            every = sorted([*names, *bad])
            name = hashlib.sha256(json.dumps(every).encode()).hexdigest()[:16]
            _write(self.folder / f"{name}.safetensors", tensors, about)

    def _index(self) -> dict[str, str]:
        """Find what the shards hold; returns the bad videos' reasons by fingerprint."""
        bad: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    about = file.metadata() or {}
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path} is corrupt ({one_line(error, limit=120)}): remove it, and it is made "
                    "again"
                ) from error
            bad.update(json.loads(about.get("bad", "{}")))
            for mark, index in json.loads(about.get("clips", "{}")).items():
                self._places[mark] = (path, index)
        return bad

    def __len__(self) -> int:
        return len(self._videos)

    def num_held_out(self) -> int:
        """How many clips are not trained on; all of them where there is only one."""
        return len(self._aside)

    def load(self, clips: Sequence[int], captioned: Sequence[bool], seed: str) -> ClipBatch:
        """See `ClipSource.load`."""
        return self._batch([self._videos[i] for i in clips], captioned)

    def held_out(self, clips: Sequence[int]) -> ClipBatch:
        """See `ClipSource.held_out`."""
        return self._batch([self._aside[i] for i in clips], [True] * len(clips))

    def _batch(self, videos: Sequence[CaptionedVideo], captioned: Sequence[bool]) -> ClipBatch:
        device = self.accelerator.device
        latents, texts = [], []
        for video, with_caption in zip(videos, captioned, strict=True):
            path, index = self._places[fingerprint(video)]
            clip, text = self._read(path, [f"latents.{index}", f"text.{index}"])
            latents.append(clip)
            text = text if with_caption else self._empty
            texts.append(
                torch.nn.functional.pad(text, (0, 0, 0, self.text_positions - text.shape[0]))
            )
        return ClipBatch(
            torch.stack(latents).to(device, torch.float32, non_blocking=True),
            torch.stack(texts).to(device, torch.float32, non_blocking=True),
        )

    def _read(self, path: Path, names: Sequence[str]) -> list[Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return [file.get_tensor(name) for name in names]
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read {path}: {one_line(error)}; remove it") from error


def fingerprint(video: CaptionedVideo) -> str:
    """16 digits that change with the file or its caption."""
    try:
        stat = video.path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
    except OSError:
        state = []
    text = json.dumps([str(video.path.absolute()), state, video.caption])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, part, metadata=dict(about))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def list_skipped(skipped: Mapping[str, str]) -> Iterator[str]:
    """Lines that say which files were not used, and why."""
    if skipped:
        yield f"{len(skipped)} files were not used:"
        yield from (f"  {name}: {why}" for name, why in skipped.items())
