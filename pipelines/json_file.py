"""A file for results that take a while: refused early, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError


class JsonFile:
    """Where results go.

    Args:
        path: a file, `-` for standard output, or `None` for nowhere.

    Raises:
        InputError: a file that cannot be written there.
    """

    def __init__(self, path: Path | None) -> None:
        self.is_stdout = path == Path("-")
        self.path = None if self.is_stdout else path
        if self.path is None:
            return
        folder = self.path.parent
        if self.path.is_dir():
            raise InputError(f"cannot write {self.path}: it is a folder; name a file")
        if not folder.is_dir():
            raise InputError(f"cannot write {self.path}: there is no folder {folder}")
        if not os.access(folder, os.W_OK):
            raise InputError(f"cannot write {self.path}: no permission to write in {folder}")

    def write(self, result: Any) -> None:
        """Write `result` as JSON, replacing what is there; nothing without a path.

        Raises:
            InputError: the file cannot be written.
        """
        if self.path is None:
            return
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            os.replace(part, self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            reason = error.strerror or error
            raise InputError(f"cannot write {self.path}: {reason}") from error
