"""Fixtures for the tests of attention without a running maximum."""

from __future__ import annotations

import pytest

from sla_video.kernels import launch_choice, triton_attend
from sla_video.kernels.launch_lists import LaunchConfig
from sla_video.kernels.triton_bounded import beyond_bound


@pytest.fixture
def choose(monkeypatch):
    """Tell whether attention is to be launched for bounded logits; other launches are the same."""

    def launches(kernel, *_):
        plain = LaunchConfig(8, 1, None, 32, 32)
        bounded = (plain._replace(bounded=True),) if choice[0] and kernel == "attend" else ()
        return (*bounded, plain)

    def change(bounded):
        choice[0] = bounded
        monkeypatch.setattr(launch_choice, "_chosen", {})

    choice = [False]
    monkeypatch.setattr(launch_choice, "launch_list", launches)
    change(True)
    return change


@pytest.fixture
def marks(monkeypatch):
    """What each attention launch found to be beyond the bound, `[B, H, M]` each."""
    found = []

    def record(*args):
        found.append(beyond_bound(*args))
        return found[-1]

    monkeypatch.setattr(triton_attend, "beyond_bound", record)
    return found
