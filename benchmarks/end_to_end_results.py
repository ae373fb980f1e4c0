"""The rows of `end_to_end.py`: kept in a file, put beside dense attention in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sla_video.pipelines.errors import InputError
from sla_video.pipelines.json_file import JsonFile

# Name of a dense variant -> Diffusers' name of its backend.
DENSE = {"cudnn": "_native_cudnn", "flash": "_native_flash"}
# What makes a row another one.
KEYS = ("model", "attention", "mode", "linear", "tiny")


class Results:
    """The rows measured so far, in the order of their first measurement."""

    def __init__(self, path: Path | None) -> None:
        self._file = JsonFile(path)
        self.rows: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            try:
                self.rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is not a file of this benchmark: {error}") from error

    def add(self, row: dict[str, Any]) -> None:
        """Put in a row, for one of the same name if there is one: what that had beside is kept."""
        for old in self.rows:
            if all(old[key] == row[key] for key in KEYS):
                old.update(row)
                break
        else:
            self.rows.append(row)
        self._file.write({"rows": self.rows})

    def table(self) -> str:
        """All rows in Markdown."""
        heads = [
            "model",
            "attention",
            "mode",
            "linear",
            "forward, ms",
            "to cuDNN",
            "to FA2",
            "peak, GiB",
            "video, s: denoise + decode",
            "note",
        ]
        lines = [heads, ["---"] * len(heads), *(self.cells(row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def cells(self, row: dict[str, Any]) -> list[str]:
        """One line of the table."""
        video = row.get("generation")
        return [
            row["model"],
            row["attention"],
            row["mode"],
            row["linear"],
            _number(row.get("milliseconds"), "{:,.1f}"),
            *(_number(self._ratio(row, dense), "{:.2f}x") for dense in DENSE),
            _number(row.get("peak_gib"), "{:.2f}"),
            f"{video['denoise_seconds']:.1f} + {video['decode_seconds']:.1f}" if video else "",
            row.get("note", ""),
        ]

    def _ratio(self, row: dict[str, Any], dense: str) -> float | None:
        same = {**row, "attention": dense, "linear": "bf16"}
        for base in self.rows:
            if all(base[key] == same[key] for key in KEYS):
                times = base.get("milliseconds"), row.get("milliseconds")
                return times[0] / times[1] if times[0] and times[1] else None
        return None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
