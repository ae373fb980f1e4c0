"""What tuning costs and gains: seconds of first calls, and milliseconds at Wan's two shapes.

    python benchmarks/tune_check.py --json tune.json
    python benchmarks/tune_check.py --sparse-dtype bf16 --no-backward

Starts with nothing compiled and nothing tuned, in folders of its own. A correctness check with the
tuned launches comes before they are timed against the first of each list, in turns. `--dry-run`
does it at a toy size in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before Triton is imported; a later process finds what the first one compiled and tuned.
os.environ["TUNE_CHECK_FOLDER"] = os.environ.get("TUNE_CHECK_FOLDER") or tempfile.mkdtemp()
os.environ["TRITON_CACHE_DIR"] = os.environ["TUNE_CHECK_FOLDER"] + "/triton"
os.environ["SLA_VIDEO_CACHE"] = os.environ["TUNE_CHECK_FOLDER"] + "/sla_video"
os.environ["TRITON_INTERPRET"] = "1" if "--dry-run" in sys.argv else "0"

import torch

from sla_video.kernels.gpu_bench import Shape, check_error, forward, gaussian_inputs
from sla_video.kernels.gpu_timing import time_runs
from sla_video.kernels.launch_choice import trying
from sla_video.kernels.launch_tuning import Problem, tune_operator

SPARSITY = 0.97


def shapes(dry: bool) -> tuple[Shape, ...]:
    """The first is tuned at; the others are new to what was compiled."""
    if dry:
        return Shape(length=70, heads=1, head_dim=32), Shape(length=90, heads=2, head_dim=32)
    return (
        Shape(name="1.3B-480p", length=32760, heads=12, head_dim=128),
        Shape(name="14B-720p", length=75600, heads=40, head_dim=128),
    )


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def inputs(shape: Shape, device: torch.device) -> list[torch.Tensor]:
    """In what the interpreter computes without errors of its own, on a CPU."""
    return gaussian_inputs(
        shape, device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )


def first_call(shape: Shape, device: torch.device, sparse_dtype: Any) -> float:
    # Making inputs also makes the CUDA context, which is not ours.
    qkv = inputs(shape, device)
    seconds_of(lambda: qkv[0].sum(), device)
    return seconds_of(forward(qkv, SPARSITY, sparse_dtype), device)


def later_process(args: argparse.Namespace) -> float:
    """Seconds of the first call in a process that finds both caches."""
    command = [sys.executable, __file__, "--later", "--sparse-dtype", args.sparse_dtype]
    command += ["--dry-run"] if args.dry_run else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparse-dtype", default="int8")
    parser.add_argument("--no-backward", action="store_true", help="tune the forward only")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--later", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="at a toy size, on the CPU")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run shows that the script works")
    device = torch.device("cpu" if args.dry_run else "cuda:0")
    small, large = shapes(args.dry_run)
    if args.later:
        print(first_call(large, device, args.sparse_dtype))
        return
    report: dict[str, Any] = {"torch": torch.__version__, "sparse_dtype": args.sparse_dtype}
    report["seconds"] = found = {}
    found["first call, nothing compiled"] = first_call(small, device, args.sparse_dtype)
    found["first call at another shape"] = first_call(large, device, args.sparse_dtype)
    problem = Problem(
        length=small.length,
        heads=small.heads,
        head_dim=small.head_dim,
        dtype=inputs(small, device)[0].dtype,
        sparse_dtype=args.sparse_dtype,
        sparsity=SPARSITY,
        backward=not args.no_backward,
    )
    tuned: list[Any] = []
    found["tuning"] = seconds_of(lambda: tuned.extend(tune_operator(problem, device)), device)
    found["first call of a later process"] = later_process(args)
    for name, seconds in found.items():
        print(f"{name}: {seconds:.2f} s", flush=True)
    report["kernels"] = []
    for launch in tuned:
        print(launch.case)
        for config in [*launch.milliseconds, *launch.notes]:
            ms = launch.milliseconds.get(config)
            mark = "*" if config == launch.chosen else " "
            about = launch.notes[config] if ms is None else f"{ms:.3f} ms"
            print(f"  {mark} {tuple(config)}: {about}")
            row = {"kernel": launch.case, **config._asdict(), "milliseconds": ms}
            row |= {"chosen": config == launch.chosen, "note": launch.notes.get(config, "")}
            report["kernels"].append(row)
    report["rows"] = []
    for shape in (small, large):
        qkv = inputs(shape, device)
        error = check_error(qkv, SPARSITY, args.sparse_dtype)
        run = forward(qkv, SPARSITY, args.sparse_dtype)

        def first_of_lists(run: Callable[[], Any] = run) -> Any:
            with trying({}):
                return run()

        with torch.no_grad():
            runs = {("first of each list", None): first_of_lists, ("tuned", None): run}
            rows = time_runs(runs, "forward", device)  # type: ignore[arg-type]
        for row in rows:
            print(f"{shape.length}x{shape.heads} {row.attention}: {row.milliseconds} ms {row.note}")
            sizes = {"length": shape.length, "heads": shape.heads, "error": error}
            report["rows"].append({**sizes, **vars(row)})
    if args.json:
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(part, args.json)


if __name__ == "__main__":
    main()
