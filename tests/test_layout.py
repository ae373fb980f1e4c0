"""The layout of the repository: links, namespaces, and which part may import which."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("kernels", "pipelines", "calibration")
# What each part may import of this package, besides itself.
ALLOWED = {
    "kernels": set(),
    "pipelines": {"kernels", "config", "config_compression", "__version__"},
    "calibration": {"kernels", "pipelines", "config", "config_compression", "__version__"},
    "config": {"config_checks", "config_compression"},
    "config_checks": set(),
    "config_compression": {"config_checks"},
    "console": {"pipelines"},
    "cli": {
        "kernels",
        "pipelines",
        "calibration",
        "config",
        "console",
        "cli_calibrate",
        "cli_finetune",
        "cli_generate",
        "cli_options",
        "cli_report",
        "cli_tune",
        "__version__",
    },
    "cli_calibrate": {"pipelines", "calibration", "cli_options"},
    "cli_finetune": {"calibration"},
    "cli_generate": {"pipelines", "console", "cli_options"},
    "cli_options": {"pipelines"},
    "cli_report": {"pipelines"},
    "cli_tune": {"pipelines", "calibration", "cli_options"},
    "__init__": {"kernels", "pipelines", "config", "config_compression"},
}
FORBIDDEN_IN_KERNELS = {"diffusers", "transformers", "accelerate", "huggingface_hub", "typer"}
OWN_NAMES = {
    *PARTS, "config", "config_checks", "config_compression", "console", "cli", "cli_calibrate",
    "cli_finetune", "cli_generate", "cli_options", "cli_report", "cli_tune", "assets",
    "__version__",
}  # fmt: skip


def sources(part: str) -> list[Path]:
    folder = ROOT / part
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / "sla_video" / f"{part}.py"]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions included."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "sla_video":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write `from sla_video.x import y`"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "sla_video":
            # After `import sla_video` what counts is which of its names is used.
            yield node.lineno, f"sla_video.{node.attr}"


def violations(part: str, path: Path) -> list[str]:
    """Imports in `path` that `part` may not have."""
    found = []
    for line, name in imported(path):
        top, *rest = name.split(".")
        where = f"{path.name}:{line} {name}"
        if top in PARTS or (part == "kernels" and top in FORBIDDEN_IN_KERNELS):
            found.append(where)
        elif top == "sla_video":
            target = rest[0] if rest and rest[0] in OWN_NAMES else "__init__"
            if target != part and target not in ALLOWED[part]:
                found.append(where)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_link_is_relative_and_leads_to_the_code(part: str) -> None:
    link = ROOT / "sla_video" / part
    assert link.is_symlink()
    assert os.readlink(link) == f"../{part}"
    assert link.resolve() == (ROOT / part).resolve()


@pytest.mark.parametrize("part", PARTS)
def test_no_part_is_a_regular_package(part: str) -> None:
    assert [path for path in (ROOT / part).rglob("__init__.py")] == []


def test_the_rules_cover_every_module_of_the_face() -> None:
    modules = {path.stem for path in (ROOT / "sla_video").glob("*.py")}
    assert modules == set(ALLOWED) - set(PARTS)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_dependencies_point_one_way(part: str) -> None:
    assert [text for path in sources(part) for text in violations(part, path)] == []


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("kernels", "from sla_video.pipelines import patching"),
        ("kernels", "from sla_video.config import SLAConfig"),
        ("kernels", "import diffusers"),
        ("kernels", "from sla_video import enable_sla"),
        ("pipelines", "import sla_video.calibration.fit"),
        ("pipelines", "import sla_video; sla_video.enable_sla"),
        ("calibration", "from sla_video.cli import app"),
        ("cli", "from kernels import router"),
        ("config", "from sla_video.kernels.router import Router"),
    ],
)
def test_a_wrong_direction_is_noticed(part: str, line: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text(f"def f():\n    {line}\n", encoding="utf-8")
    assert len(violations(part, file)) == 1


@pytest.mark.parametrize("part", ["config", "__init__"])
def test_the_light_modules_import_the_standard_library_only(part: str) -> None:
    for path in sources(part):
        for line, name in imported(path):
            top = name.split(".")[0]
            assert top == "sla_video" or top in sys.stdlib_module_names, f"{path}:{line}: {name}"
