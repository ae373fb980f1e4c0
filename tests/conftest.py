"""Fixtures shared by the tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from triton_interpreter import interpret_without_gpu

interpret_without_gpu()
# Asserts outside of test files, with what their values were.
pytest.register_assert_rewrite("family_checks")

_MOST_WORKERS = 4
_HAS_AFFINITY = hasattr(os, "sched_getaffinity")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite in several processes, by pytest-xdist where it is installed.

    Named files, and whatever is run with `-n` or a debugger, are left as asked for: one process,
    whose output is seen as it comes. So are machines with a GPU, which the tests fill and time.
    """
    import torch

    workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)) if _HAS_AFFINITY else 1)
    chosen = config.args != config.getini("testpaths") or config.option.keyword
    if (
        not config.pluginmanager.hasplugin("xdist")
        or "PYTEST_XDIST_WORKER" in os.environ
        or config.option.numprocesses is not None
        or config.option.usepdb
        or config.option.collectonly
        or chosen
        or workers < 2
        or torch.cuda.is_available()
    ):
        return
    config.option.numprocesses, config.option.dist = workers, "worksteal"
    # Threads of several processes would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What was tuned on this machine is not read, and nothing is written there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLA_VIDEO_CACHE", str(folder))
        yield folder


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


@pytest.fixture
def frames_written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The frames of each video, before they are compressed."""
    from sla_video.pipelines import generation

    seen: list[Any] = []
    write = generation.write_video

    def spy(path: Path, frames: Any, *rest: Any) -> None:
        seen.append(frames)
        write(path, frames, *rest)

    monkeypatch.setattr(generation, "write_video", spy)
    return seen


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Name in `generate_cases.MODELS` -> folder of that tiny pipeline: do not write."""
    from generate_cases import MODELS

    folders: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("model") / name.replace(" ", "-")
            MODELS[name]().save_pretrained(folders[name])
        return folders[name]

    return folder


@pytest.fixture
def files(here: Path) -> Path:
    """A folder to work in, with the files of `generate_cases.write_inputs`."""
    from generate_cases import write_inputs

    write_inputs(here)
    return here
