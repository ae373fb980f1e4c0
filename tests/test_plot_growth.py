"""`benchmarks/plot_growth.py`: which points are drawn, and that a picture comes out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "plot_growth.py"
RESULT = {
    "sparse_dtype": "int8_fp8",
    "device_name": "Some GPU",
    "growth": {
        "heads": 12,
        "head_dim": 128,
        "sparsity": 0.97,
        "rows": [
            {"length": 8192, "milliseconds": {"dense cuDNN": 0.8, "SLA2": 0.3}, "notes": {}},
            {"length": 16384, "milliseconds": {"SLA2": 0.5}, "notes": {"dense cuDNN": "left out"}},
            {"length": 32768, "milliseconds": {}, "notes": {"SLA2": "out of memory"}},
        ],
    },
}


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("plot_growth", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_what_ran_is_drawn(script):
    assert script.curves(RESULT["growth"]) == {
        "dense cuDNN": ([8192], [0.8]),
        "SLA2": ([8192, 16384], [0.3, 0.5]),
    }
    assert [script.tokens(length) for length in (8192, 524288, 1000)] == ["8k", "512k", "1,000"]


def test_names_are_those_of_the_benchmark(script):
    from sla_video.kernels.gpu_timing import CUDNN, FLASH

    assert set(script.CURVES) == {CUDNN, FLASH, "SLA2"}


def test_a_picture_comes_out(script, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture; it is not a dependency")
    (tmp_path / "times.json").write_text(json.dumps(RESULT))
    picture = tmp_path / "growth.png"
    script.main([str(tmp_path / "times.json"), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.strip() == str(picture)


def test_a_file_without_growth_is_refused(script, tmp_path):
    (tmp_path / "times.json").write_text(json.dumps({"shapes": []}))
    with pytest.raises(SystemExit, match="has no growth"):
        script.main([str(tmp_path / "times.json")])
