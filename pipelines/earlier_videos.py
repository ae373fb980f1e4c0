"""Which videos on disk an earlier run made of the same prompt, seed and settings."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sla_video.pipelines.pipeline_kinds import INPUTS

# Settings that may differ without a difference in the video, besides the last bits that every
# kind of device has of its own. Input files count by their SHA-256, which is a setting too.
_OF_NO_EFFECT = {"num_videos", "overwrite", "resume", "offload", "device", "dtype", *INPUTS}


class EarlierVideos:
    """Recognises the videos of an interrupted run.

    Args:
        settings: of this run, as `settings_of` gives them.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        # Through JSON, as those of the sidecars went: tuples become lists, paths text.
        self._settings = json.loads(json.dumps(settings, default=str))

    def made(self, sidecar: Path, prompt: str, seed: int) -> bool:
        """Whether `sidecar` was written for this very video."""
        try:
            record = json.loads(sidecar.read_text(encoding="utf-8"))
            settings = {**record["settings"]}
            same = (record["prompt"], record["seed"]) == (prompt, seed)
        except (OSError, ValueError, KeyError, TypeError):  # not written by us, or not whole
            return False
        names = (set(settings) | set(self._settings)) - _OF_NO_EFFECT
        if not self._settings.get("record"):  # a recording that nobody asks for does no harm
            names.discard("record")
        unequal = [n for n in names if settings.get(n) != self._settings.get(n)]
        # Asked last: it loads PyTorch.
        return same and not unequal and settings.get("dtype") == self._dtype

    @functools.cached_property
    def _dtype(self) -> str:
        """The number format of this run, as sidecars name it."""
        from sla_video.pipelines.loading import find_device, find_dtype

        dtype = find_dtype(self._settings["dtype"], find_device(self._settings["device"]))
        return str(dtype).removeprefix("torch.")
