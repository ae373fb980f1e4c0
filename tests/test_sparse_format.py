"""`generate --sparse-dtype`: which number format the sparse branch takes, and where it is noted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generate_cases import generate

from sla_video.config import SLAConfig
from sla_video.kernels import triton_support
from sla_video.pipelines import sparse_format
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.router_files import save_routers
from sla_video.pipelines.sparse_format import choose_format
from tiny_models import build_tiny_pipeline

GPU, CPU = torch.device("cuda"), torch.device("cpu")
AMPERE, ADA, HOPPER, BLACKWELL = (8, 0), (8, 9), (9, 0), (10, 0)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that GPUs are of this compute capability, and that kernels are compiled for them."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        monkeypatch.setattr(triton_support, "interpreted", lambda: False)
        monkeypatch.setattr(triton_support, "why_unavailable", lambda: None)

    return pretend


@pytest.mark.parametrize(
    ("capability", "fastest"),
    [(AMPERE, "int8"), (ADA, "int8_fp8"), (HOPPER, "int8"), (BLACKWELL, "int8_fp8")],
)
def test_the_fastest_of_a_gpu_is_taken(on: Any, capability: tuple[int, int], fastest: str) -> None:
    on(capability)
    for dtype in (torch.bfloat16, torch.float16):
        assert choose_format(None, SLAConfig(), GPU, dtype) == fastest
    assert sparse_format.fastest_format(GPU) == fastest


@pytest.mark.parametrize(
    ("config", "dtype", "wanted"),
    [
        # What routers were trained with.
        (SLAConfig(sparse_dtype="int8_int8"), torch.bfloat16, "int8_int8"),
        # Not what the kernels are for: nothing to gain.
        (SLAConfig(), torch.float32, "bf16"),
        (SLAConfig(impl="torch"), torch.bfloat16, "bf16"),
        (SLAConfig(block_k=16), torch.bfloat16, "int8"),
    ],
)
def test_what_else_decides(on: Any, config: SLAConfig, dtype: torch.dtype, wanted: str) -> None:
    on(BLACKWELL)
    assert choose_format(None, config, GPU, dtype) == wanted
    assert choose_format("bf16", config, GPU, dtype) == "bf16", "a choice is a choice"


def test_without_kernels_nothing_changes(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_format(None, SLAConfig(), CPU, torch.bfloat16) == "bf16"
    assert choose_format(None, SLAConfig(sparse_dtype="int8_fp8"), CPU, torch.float32) == "int8_fp8"
    on(HOPPER)
    monkeypatch.setattr(triton_support, "why_unavailable", lambda: "not installed")
    assert choose_format(None, SLAConfig(), GPU, torch.bfloat16) == "bf16"


@pytest.mark.parametrize(
    ("asked", "trained", "words"),
    [("int8_fp8", "bf16", "`sparse_dtype` is"), (None, "int8_fp8", "the routers use")],
)
def test_a_gpu_without_fp8_is_told(on: Any, asked: str | None, trained: Any, words: str) -> None:
    on(AMPERE)
    with pytest.raises(InputError, match=f"{words} 'int8_fp8'.*use --sparse-dtype int8 or bf16"):
        choose_format(asked, SLAConfig(sparse_dtype=trained), GPU, torch.bfloat16)
    assert choose_format("int8", SLAConfig(sparse_dtype=trained), GPU, torch.bfloat16) == "int8"


def test_generate_uses_and_notes_it(
    tiny_pipeline_dir: Path, tmp_path: Path, frames_written: list[np.ndarray[Any, Any]]
) -> None:
    trained = tmp_path / "trained"
    save_routers(trained, enable_sla(build_tiny_pipeline(), sparsity=0.5, sparse_dtype="int8"))
    runs = {
        "bf16": ("--sparsity", 0.5),
        "int8": ("--routers", trained),
        "int8_int8": ("--routers", trained, "--sparse-dtype", "int8_int8"),
    }
    for used, arguments in runs.items():
        record = generate(tiny_pipeline_dir, *arguments, "--out", tmp_path / f"{used}.mp4")
        assert record["settings"]["sparse_dtype"] == ("int8_int8" if len(arguments) > 2 else None)
        assert record["attention"]["config"]["sparse_dtype"] == used
    exact, _, rounded = (frames.astype(int) for frames in frames_written)
    assert 0 < abs(exact - rounded).max() < 64, "another format, not another video"
