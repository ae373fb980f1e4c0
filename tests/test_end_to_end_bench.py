"""`benchmarks/end_to_end.py`: true sizes, rows that are kept, where a profile's time goes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import end_to_end
import plot_end_to_end
from end_to_end_models import MODELS, block_arguments, build, forward_inputs, tiny
from end_to_end_profile import PARTS, launched, part_of
from end_to_end_results import Results

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "length", "billions"),
    [("1.3B", 32760, 1.42), ("14B", 75600, 14.29), ("5B", 27280, 5.0)],
)
def test_sizes_are_those_of_the_published_models(name, length, billions):
    model = MODELS[name]
    assert model.length == length
    transformer = build(model, torch.device("meta"))
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, 0.01)
    # As `from_pretrained(torch_dtype=torch.bfloat16)` leaves them.
    assert transformer.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].attn1.norm_q.weight.dtype == torch.bfloat16
    assert transformer.blocks[0].norm2.weight.dtype == torch.float32
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32


def test_the_arguments_of_a_block_are_those_of_a_forward():
    model = tiny(MODELS["5B"])
    transformer, inputs = build(model, CPU), forward_inputs(model, CPU)
    seen = []
    with torch.no_grad():
        arguments = block_arguments(transformer, inputs)
        transformer.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args))
        transformer(**inputs)
    assert arguments[0].shape == (1, model.length, model.heads * model.head_dim)
    for ours, theirs in zip(arguments[:3], seen[0][:3], strict=True):
        assert torch.equal(ours, theirs)


def test_rows_are_measured_kept_and_replaced(tmp_path, capsys):
    out = tmp_path / "rows.json"
    common = ["--tiny", "--models", "1.3B", "--modes", "eager", "--repeats", "1", "--raise-errors"]
    end_to_end.main([*common, "--variants", "cudnn", "--json", str(out)])
    first = json.loads(out.read_text())["rows"]
    end_to_end.main([*common, "--variants", "sla2-90", "--json", str(out)])
    end_to_end.main([*common, "--variants", "cudnn", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["attention"] for row in rows] == ["cudnn", "sla2-90"]
    assert rows[1]["sparsity"] == 0.9
    assert rows[0]["milliseconds"] != first[0]["milliseconds"]
    capsys.readouterr()
    end_to_end.main(["--table", "--json", str(out)])
    line = capsys.readouterr().out.splitlines()[3]
    ratio = rows[0]["milliseconds"] / rows[1]["milliseconds"]
    assert f"| {ratio:.2f}x |" in line


def test_a_row_that_fails_says_why_and_leaves_the_others_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end.Bench, "_time_forward", lambda self: 1 / 0)
    out = tmp_path / "rows.json"
    end_to_end.main(
        ["--tiny", "--models", "1.3B", "--variants", "cudnn", "sla2-97", "--json", str(out)]
    )
    rows = json.loads(out.read_text())["rows"]
    assert [row["note"] for row in rows] == ["ZeroDivisionError: division by zero"] * 2


def test_a_variant_names_sparsity_format_and_whether_kernels_are_fused():
    variant = end_to_end.Variant.parse("sla2-95-int8_fp8-unfused")
    assert (variant.sparsity, variant.sparse_dtype, variant.unfused) == (0.95, "int8_fp8", True)
    variant = end_to_end.Variant.parse("sla2-97")
    assert (variant.sparsity, variant.sparse_dtype, variant.unfused) == (0.97, "int8", False)


@pytest.mark.parametrize("text", ["sla2", "sla2-9", "sla2-97-fp4", "dense"])
def test_unknown_variants_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        end_to_end.main(["--tiny", "--variants", text])
    assert "sla2-97 and the like" in capsys.readouterr().err


def test_a_foreign_file_is_refused(tmp_path, capsys):
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SystemExit):
        end_to_end.main(["--table", "--json", str(tmp_path / "other.json")])
    assert "not a file of this benchmark" in capsys.readouterr().err


def operator(name, parent=None, kernels=(), shapes=()):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        input_shapes=shapes,
        device_type=torch.autograd.DeviceType.CPU,
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel, us in kernels],
    )


def on_device(name, microseconds, **fields):
    return SimpleNamespace(
        name=name,
        device_type=torch.autograd.DeviceType.CUDA,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        **fields,
    )


def test_every_kernel_counts_once_for_the_part_that_launched_it():
    mixed = operator("sla_video::mixed_attention")
    sdpa = [[1, 2, 99, 64], [1, 2, 99, 64]], [[1, 2, 99, 64], [1, 2, 8, 64]]
    events = [
        mixed,
        operator("aten::bmm", mixed, [("nvjet_gemm", 5.0)]),
        operator("aten::addmm", None, [("nvjet_gemm", 7.0)]),
        *(
            operator(
                "aten::_scaled_dot_product_cudnn_attention", None, [("cudnn_sdpa", us)], shapes
            )
            for us, shapes in zip((20.0, 3.0), sdpa, strict=True)
        ),
        *(on_device("nvjet_gemm", us) for us in (5.0, 7.0, 11.0)),
        *(on_device("cudnn_sdpa", us) for us in (20.0, 3.0)),
        on_device("triton_red_fused_native_layer_norm", 2.0, is_user_annotation=False),
        on_device("## a range around all of it ##", 1000.0, is_user_annotation=True),
    ]
    found = sorted((part, round(1000 * ms)) for _, part, ms in launched(events))
    assert found == [
        ("cross-attention", 3),
        ("linear layers", 7),
        ("linear layers", 11),
        ("norms, modulation, activations", 2),
        ("self-attention", 5),
        ("self-attention", 20),
    ]


def test_the_kernel_of_norm_and_rotation_is_not_attention():
    event = operator("sla_video::norm_rotate")
    assert part_of("_norm_rotate_kernel", event) == "QK norm and RoPE"


def profiled(attention, milliseconds, **fields):
    parts = {**dict.fromkeys(PARTS, 0.0), "self-attention": 2.0, "linear layers": 1.0}
    return {
        "model": "1.3B",
        "attention": attention,
        "mode": "compiled",
        "linear": "bf16",
        "sparsity": None,
        "length": 10,
        "layers": 30,
        "milliseconds": milliseconds,
        "parts": parts,
        **fields,
    }


def test_bars_add_up_to_the_forward(tmp_path, capsys):
    rows = [
        profiled("cudnn", 100.0),
        profiled("sla2-97", 95.0, sparsity=0.97, sparse_dtype="int8", linear="fp8"),
        profiled("flash", 100.0, parts=None),
        profiled("sla2-97-unfused", 99.0, sparsity=0.97, sparse_dtype="int8"),
        profiled("flash", 100.0, mode="eager"),
    ]
    found = plot_end_to_end.bars(rows, "compiled")["1.3B"]
    assert list(found) == ["dense, cuDNN", "SLA2 97%\nFP8 linear"]
    assert sum(found["dense, cuDNN"].values()) == pytest.approx(100.0)
    assert found["dense, cuDNN"]["self-attention"] == 60.0
    assert {part for parts in found.values() for part in parts} == set(plot_end_to_end.COLOURS)
    pytest.importorskip("matplotlib", reason="matplotlib draws the picture; it is not a dependency")
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    picture = tmp_path / "bars.png"
    plot_end_to_end.main([str(tmp_path / "rows.json"), "--out", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rows_without_a_profile_make_no_picture(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [profiled("cudnn", 1.0, parts=None)]}))
    with pytest.raises(SystemExit, match="measure with --profile"):
        plot_end_to_end.main([str(tmp_path / "rows.json")])


def test_ratios_are_to_dense_attention_in_bfloat16():
    results = Results(None)
    for attention, linear, milliseconds in (
        ("cudnn", "bf16", 90.0),
        ("cudnn", "fp8", 60.0),
        ("sla2-97", "fp8", 20.0),
    ):
        results.add({**profiled(attention, milliseconds, linear=linear), "tiny": False, "note": ""})
    assert "| 4.50x |" in results.table().splitlines()[-1]
