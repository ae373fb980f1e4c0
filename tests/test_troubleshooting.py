"""The errors that `docs/troubleshooting.md` explains are those that the package raises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, flags=re.MULTILINE)


def texts() -> list[str]:
    """Every string of the package, with … for what is filled in."""
    found = []
    for part in ("kernels", "pipelines", "calibration"):
        for path in (ROOT / part).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub(r"%[rs]", "…", node.value))
                if isinstance(node, ast.JoinedStr):
                    pieces = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(pieces))
    return found


ALL = texts()


def test_each_error_has_one_heading():
    assert len(HEADINGS) >= 25 and len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize("heading", HEADINGS)
def test_the_package_says_what_the_page_quotes(heading):
    quoted = ".*".join(re.escape(piece) for piece in heading.split("…"))
    assert any(re.search(quoted, text) for text in ALL)
