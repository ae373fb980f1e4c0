"""Measurements of a tuning that is not done, in a JSON file beside the recipe.

Written whole after each measurement, so that whatever ends a run loses one at most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sla_video import __version__
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.json_file import JsonFile

_KIND = "sla-video tuning"
_FORMAT_VERSION = 1


class TuningState:
    """What has been measured, by topic and name.

    Args:
        settings: what the measurements depend on, as JSON can hold it.
        anew: forget what is there if it cannot be used.

    Attributes:
        resumed: measurements that an earlier run had made.

    Raises:
        InputError: the file is corrupt, or holds measurements made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, anew: bool = False) -> None:
        self.path = path
        self._file = JsonFile(path)
        # Through JSON, so that a tuple equals the list that comes back from the file.
        self._settings = json.loads(json.dumps(dict(settings)))
        self._found: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self._found = self._read()
            except InputError:
                if not anew:
                    raise
        self.resumed = sum(len(values) for values in self._found.values())

    def get(self, topic: str, name: str) -> Any:
        """A measurement, or None."""
        return self._found.get(topic, {}).get(name)

    def put(self, topic: str, name: str, value: Any) -> None:
        """Keep a measurement.

        Raises:
            InputError: the file cannot be written.
        """
        self._found.setdefault(topic, {})[name] = json.loads(json.dumps(value))
        self._file.write(
            {
                "kind": _KIND,
                "format_version": _FORMAT_VERSION,
                "library_version": __version__,
                "settings": self._settings,
                "measured": self._found,
            }
        )

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        again = "--overwrite begins anew"
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            kind, version = values["kind"], values["format_version"]
            settings, found = dict(values["settings"]), dict(values["measured"])
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}, with the measurements of an earlier run, is corrupt "
                f"({type(error).__name__} {one_line(error, limit=80)}): {again}"
            ) from error
        if (kind, version) != (_KIND, _FORMAT_VERSION):
            raise InputError(
                f"{self.path} is a {kind!r} of version {version!r}, and sla-video {__version__} "
                f"goes on from a {_KIND!r} of version {_FORMAT_VERSION}: {again}"
            )
        different = [
            f"{name} {settings.get(name)!r} against {self._settings.get(name)!r} here"
            for name in sorted({*settings, *self._settings})
            if settings.get(name) != self._settings.get(name)
        ]
        if different:
            raise InputError(
                f"{self.path} holds measurements made with other settings: "
                f"{one_line(', '.join(different), limit=250)}; give these, or another --out, or "
                "--overwrite to begin anew"
            )
        return found
