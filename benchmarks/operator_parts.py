"""Where the time of the Triton operator goes: each part alone, the whole, and dense attention.

    python benchmarks/operator_parts.py --json parts.json
    python benchmarks/operator_parts.py --shapes 7168x4x64 --sparsities 0.9 --backward
    python benchmarks/operator_parts.py --formats int8 --launches --json launches.json

The last takes every launch of the attention kernel's list in turn, those without a running maximum
too, and checks each at the size that is timed against the sampled reference in float64.
A correctness check comes first: nothing is timed that disagrees with `impl="torch"`. Times are
medians in milliseconds. On a machine without a GPU `--dry-run` runs everything once at a toy size.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The two shapes that stand for Wan 2.1 1.3B at 480p and 14B at 720p: tokens x heads x head dim.
SHAPES = ("32760x12x128", "75600x40x128")
CHECK = "1500x2x128"
TOLERANCE = {"bf16": 0.01, "int8": 0.03, "int8_fp8": 0.06}


def inputs(text: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value of a shape such as "7168x4x64"."""
    from sla_video.kernels.gpu_bench import Shape, gaussian_inputs

    length, heads, head_dim = (int(part) for part in text.split("x"))
    shape = Shape(length=length, heads=heads, head_dim=head_dim)
    return gaussian_inputs(shape, torch.device(device), dtype)


def parts(qkv: list[Tensor], sparsity: float, sparse_dtype: Any) -> dict[str, Callable[[], Any]]:
    """The steps of `sla2_triton`, each on what the ones before it made, all heads at a time."""
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.options import Options
    from sla_video.kernels.triton_attend import attend
    from sla_video.kernels.triton_bounded import wants_norms
    from sla_video.kernels.triton_linear import sum_dropped_states
    from sla_video.kernels.triton_prepare import prepare_keys
    from sla_video.kernels.triton_routing import plan_blocks
    from sla_video.kernels.triton_statistics import block_statistics

    query, key, value = qkv
    blocks = {"block_q": 128, "block_k": 64}
    options = Options(
        sparsity=sparsity,
        sparse_dtype=sparse_dtype,
        **blocks,
    )
    need_norms = wants_norms(query, options)

    def statistics() -> Any:
        return block_statistics(
            query,
            key,
            value,
            need_value_max=sparse_dtype == "int8_fp8",
            need_low_query=sparse_dtype != "bf16",
            need_query_norm=need_norms,
            **blocks,
        )

    found = statistics()
    means = (found.query_means, found.key_means, found.key_mean)

    def plan() -> Any:
        return plan_blocks(*means, query.shape[1], None, options, value.dtype)

    chosen = plan()

    def prepare() -> Any:
        return prepare_keys(
            key,
            value,
            found.key_mean,
            found.value_max,
            block_k=64,
            sparse_dtype=sparse_dtype,
            phi_k="smoothed",
            need_states=True,
            need_key_norm=need_norms,
        )

    operands = prepare()

    def sums() -> Any:
        return sum_dropped_states(operands.states, chosen.dropped)

    summed, out = sums(), torch.empty_like(query)

    def attention(mixed: bool) -> None:
        attend(
            query,
            key,
            value,
            chosen.indices,
            chosen.counts,
            found.key_mean,
            operands=operands,
            out=out,
            alpha=chosen.alpha if mixed else None,
            sums=summed if mixed else None,
            sparse_dtype=sparse_dtype,
            low_query=found.low_query,
            query_scale=found.query_scale,
            query_norm=found.query_norm,
            **blocks,
        )

    def whole() -> Any:
        return sla2_attention(
            query, key, value, sparsity=sparsity, sparse_dtype=sparse_dtype, impl="triton"
        )

    return {
        "statistics": statistics,
        "routing": plan,
        "prepare": prepare,
        "sums": sums,
        "sparse": lambda: attention(False),
        "sparse+mix": lambda: attention(True),
        "whole": whole,
    }


def backward(qkv: list[Tensor], sparsity: float, sparse_dtype: Any) -> Callable[[], Any]:
    from sla_video.kernels.api import sla2_attention

    leaves = [x.detach().requires_grad_() for x in qkv]
    out = sla2_attention(*leaves, sparsity=sparsity, sparse_dtype=sparse_dtype, impl="triton")
    assert isinstance(out, Tensor)
    gradient = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def check(device: str, dtype: torch.dtype, sparse_dtype: Any) -> float:
    """Relative L2 distance of the whole operator to `impl="torch"` unquantized."""
    from sla_video.kernels.api import sla2_attention

    qkv = inputs(CHECK if device == "cuda" else "200x1x64", device, dtype)
    got = sla2_attention(*qkv, sparsity=0.8, sparse_dtype=sparse_dtype, impl="triton")
    wanted = sla2_attention(*(x.float() for x in qkv), sparsity=0.8, impl="torch")
    assert isinstance(got, Tensor) and isinstance(wanted, Tensor)
    error = float((got.float() - wanted).norm() / wanted.norm())
    if not error <= TOLERANCE[sparse_dtype]:
        sys.exit(f"{sparse_dtype}: error {error:.4f} > {TOLERANCE[sparse_dtype]}: not timed")
    return error


def launch_rows(
    qkv: list[Tensor], sparsity: float, sparse_dtype: Any, dry: bool
) -> list[dict[str, Any]]:
    """Each launch of the kernel of both branches: its error, that kernel and the whole operator.

    Replayed from CUDA graphs in turns, so that neither clocks nor late launches count.
    """
    from sla_video.kernels.gpu_bench import check_error
    from sla_video.kernels.gpu_timing import time_runs
    from sla_video.kernels.launch_choice import LaunchCase, trying

    x = qkv[0]
    case = LaunchCase("attend", sparse_dtype, x.device, x.dtype, x.shape[-1], 128, 64)
    configs = list(case.candidates())
    if dry and sparse_dtype == "int8":
        configs.append(configs[0]._replace(bounded=True))
    errors, runs = [], {}
    for i, config in enumerate(configs):
        with trying({case: config}), torch.no_grad():
            errors.append(check_error(qkv, sparsity, sparse_dtype))
            for name, run in parts(qkv, sparsity, sparse_dtype).items():
                if name in ("sparse+mix", "whole"):
                    runs[f"{name} {i}", sparsity] = run if dry else captured(run)
    if dry:
        times = {name: 0.0 for name, _ in runs}
    else:
        rows = time_runs(runs, "forward", x.device)
        times = {row.attention: row.milliseconds or 0.0 for row in rows}
    return [
        {
            "sparse_dtype": sparse_dtype,
            "sparsity": sparsity,
            **config._asdict(),
            "error": error,
            "sparse+mix": times[f"sparse+mix {i}"],
            "whole": times[f"whole {i}"],
        }
        for i, (config, error) in enumerate(zip(configs, errors, strict=True))
    ]


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_of(run: Callable[[], Any], dry: bool) -> float:
    """Median milliseconds; 0 in a dry run."""
    if dry:
        run()
        return 0.0
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="median"))


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(report, indent=1))
        os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="tokens x heads x head dim")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.97, 0.95, 0.9])
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int8_fp8"])
    parser.add_argument("--backward", action="store_true", help="time the backward pass, too")
    parser.add_argument("--launches", action="store_true", help="times of every launch instead")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="once, at a toy size, on the CPU")
    args = parser.parse_args()
    dry = args.dry_run
    if dry:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        args.shapes, args.sparsities = ["200x1x64"], [0.5]
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run shows that the script works")
    # Triton looks at its environment when it is imported.
    from sla_video.kernels.gpu_timing import dense_runs

    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    report: dict[str, Any] = {"torch": torch.__version__, "rows": []}
    if not dry:
        report["device"] = torch.cuda.get_device_name()
    report["errors"] = {name: check(device, dtype, name) for name in args.formats}
    print("relative L2 error:", report["errors"], flush=True)
    for text in args.shapes:
        qkv = inputs(text, device, dtype)
        reference = 0.0
        if not dry:
            cudnn, flash = (time_of(run, dry) for run in dense_runs(qkv).values())
            row = {"shape": text, "cudnn": cudnn, "flash": flash}
            reference = row["cudnn"]
            report["rows"].append(row)
            print(
                f"{text} dense: cuDNN {row['cudnn']:.2f} ms, flash {row['flash']:.2f}", flush=True
            )
        for sparse_dtype in args.formats:
            for sparsity in args.sparsities:
                if args.launches:
                    for row in launch_rows(qkv, sparsity, sparse_dtype, dry):
                        report["rows"].append({"shape": text, **row})
                        print(text, *(f"{name}={value}" for name, value in row.items()), flush=True)
                    write(report, args.json)
                    continue
                runs = parts(qkv, sparsity, sparse_dtype)
                if args.backward:
                    runs["backward"] = backward(qkv, sparsity, sparse_dtype)
                times = {name: time_of(run, dry) for name, run in runs.items()}
                ratio = reference / times["whole"] if times["whole"] else 0.0
                row = {"shape": text, "sparse_dtype": sparse_dtype, "sparsity": sparsity}
                report["rows"].append({**row, **times, "speedup": ratio})
                line = " ".join(f"{name} {ms:.3f}" for name, ms in times.items())
                print(f"{text} {sparse_dtype} {sparsity}: {line} -> {ratio:.2f}x", flush=True)
                write(report, args.json)


if __name__ == "__main__":
    main()
