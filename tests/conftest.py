"""Fixtures shared by the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
