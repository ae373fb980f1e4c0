"""Fixtures shared by the tests."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from triton_interpreter import interpret_without_gpu

interpret_without_gpu()


@pytest.fixture
def no_grad():
    """Nothing is differentiated."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture
def poisoned():
    """Uninitialised memory is full of NaN."""
    from triton_cases import poisoned_memory

    with poisoned_memory(warn_only=True):
        yield


@pytest.fixture(scope="session")
def tiny_pipeline():
    """A random `WanPipeline`, shared by the whole session: leave it unpatched and unchanged."""
    from tiny_models import build_tiny_pipeline

    return build_tiny_pipeline()


@pytest.fixture(scope="session")
def tiny_pipeline_dir(tiny_pipeline, tmp_path_factory):
    """The folder of `tiny_pipeline`, as `WanPipeline.from_pretrained` reads it: do not write."""
    folder = tmp_path_factory.mktemp("tiny-pipeline")
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def broken(tiny_pipeline_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline, to be broken."""
    return Path(shutil.copytree(tiny_pipeline_dir, tmp_path / "broken"))


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if bad input is noticed only after the model has been loaded."""
    from sla_video.pipelines import loading

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(loading, "load_pipeline", load)
