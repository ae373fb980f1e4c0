"""Peak memory of one forward of Wan's transformers at true sizes, dense and SLA2.

    python benchmarks/peak_memory.py --json memory.json          # a GPU; within 90 s
    python benchmarks/peak_memory.py --alive 12                  # also what is alive at the peaks
    python benchmarks/peak_memory.py --tiny                      # a dry run, anywhere

Two blocks of each model with random weights: the peak of a forward is that of any block, above the
weights and inputs. "Output apart" is SLA2 with the output of attention, and rotated queries and
keys, in memory of their own; with --apart its blocks are compiled, too. It has to agree to the
last bit, as has the operator alone, several times over. Exit code 1 where it doesn't, or where
SLA2 takes 1 MiB more than dense attention by cuDNN.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from end_to_end_models import MODELS, Model, build, compiled_blocks, forward_inputs, tiny
from end_to_end_results import DENSE
from torch import Tensor, nn

from sla_video.kernels.api import sla2_attention
from sla_video.kernels.over_query import attention_over_query
from sla_video.kernels.triton_support import why_unavailable
from sla_video.pipelines import processor
from sla_video.pipelines.environment import device_name, versions
from sla_video.pipelines.families import wan
from sla_video.pipelines.patching import enable_sla

BLOCKS = 2
SPARSITY, SPARSE_DTYPE = 0.97, "int8"
DENSE_CUDNN, OVER_QUERY, APART = "dense cuDNN", "SLA2", "SLA2, output apart"
# A relative L2 distance above that of two ways to round the same block.
LARGEST_ERROR = 0.02
# Length, heads, head dimension; format and sparsity of the operator alone.
CASES = (
    (32760, 12, 128, "int8", 0.97),
    (32760, 12, 128, "bf16", 0.97),
    (32760, 12, 128, "int8_fp8", 0.97),
    (5001, 3, 128, "int8", 0.0),
    (7100, 4, 64, "int8", 0.9),
)
ATTEMPTS = 10
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model and one kind of attention; memory in MiB above weights and inputs."""

    model: str
    attention: str
    mode: str
    peak_mib: float
    milliseconds: float


def operator_failures(device: torch.device, *, small: bool) -> list[str]:
    """Calls of the operator over its query that differ from the usual ones."""
    failures = []
    for length, heads, head_dim, sparse_dtype, sparsity in CASES:
        if small:
            length, heads, head_dim = 63, 2, 32
        query, key, value = torch.randn(3, 1, length, heads, head_dim, device=device).bfloat16()
        settings: dict[str, Any] = {"sparsity": sparsity, "sparse_dtype": sparse_dtype}
        wanted = sla2_attention(query, key, value, **settings)
        case = f"{length}x{heads}x{head_dim} {sparse_dtype} at {sparsity}"
        for _ in range(1 if small else ATTEMPTS):
            own = query.clone()
            got = attention_over_query(own, key, value, **settings)
            if not small and got.data_ptr() != own.data_ptr():
                failures.append(f"{case}: not over the query")
            if not torch.equal(got, wanted):
                failures.append(f"{case}: {int((got != wanted).sum())} numbers differ")
    return failures


@contextmanager
def output_apart() -> Iterator[None]:
    """Nothing is written over Q and K."""
    with (
        mock.patch.object(processor, "attention_over_query", sla2_attention),
        mock.patch.object(wan, "_watched", lambda _: True),
    ):
        yield


@contextmanager
def attention(transformer: nn.Module, kind: str, mode: str) -> Iterator[None]:
    """The transformer attends in one of the three ways, its blocks compiled or not."""
    transformer.set_attention_backend(DENSE["cudnn"] if torch.cuda.is_available() else "native")
    with ExitStack() as stack:
        if kind != DENSE_CUDNN:
            patch = enable_sla(transformer, sparsity=SPARSITY, sparse_dtype=SPARSE_DTYPE)
            stack.enter_context(patch)
        if kind == APART:
            stack.enter_context(output_apart())
        if mode == "compiled":
            stack.enter_context(compiled_blocks(transformer))
        yield


def measure(
    forward: Callable[[], Tensor], device: torch.device, alive: int
) -> tuple[Tensor, float, float]:
    """Output, peak in MiB above what is there before, and milliseconds, after a warm-up."""
    for _ in range(2):
        output = forward()
    if device.type != "cuda":
        return output, float("nan"), float("nan")
    del output
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = forward()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    if alive:
        print_alive(forward, alive)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        forward()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return output, peak, median(times)


def print_alive(forward: Callable[[], Tensor], count: int) -> None:
    """The largest tensors that a forward has made and holds at its peak, and what made them."""
    torch.cuda.memory._record_memory_history(context="alloc", stacks="python")
    forward()
    torch.cuda.synchronize()
    events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    live: dict[int, Any] = {}
    largest, at_peak, total = 0, [], 0
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
            total += event["size"]
            if total > largest:
                largest, at_peak = total, list(live.values())
        elif event["action"] == "free_completed" and event["addr"] in live:
            total -= live.pop(event["addr"])["size"]
    print(f"  alive at a peak of {largest / MIB:,.0f} MiB:")
    for event in sorted(at_peak, key=lambda event: -event["size"])[:count]:
        print(f"  {event['size'] / MIB:8,.1f}  {_maker(event['frames'])}")


def _maker(frames: Sequence[dict[str, Any]]) -> str:
    """The innermost frame that is not PyTorch's own, or is of code that it generated."""
    for frame in frames:
        name = frame["filename"]
        if "torchinductor" in name or ("/torch/" not in name and name.endswith(".py")):
            return f"{Path(name).name}:{frame['line']} {frame['name']}"
    return "?"


def model_rows(name: str, model: Model, args: argparse.Namespace) -> tuple[list[Row], list[str]]:
    """Rows of one model, and what is wrong with them."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    transformer = build(model, device)
    inputs = forward_inputs(model, device)
    rows: dict[tuple[str, str], Row] = {}
    outputs: dict[tuple[str, str], Tensor] = {}
    kinds = [(kind, "eager") for kind in (DENSE_CUDNN, OVER_QUERY, APART)]
    kinds += [(kind, "compiled") for kind in (DENSE_CUDNN, OVER_QUERY)]
    kinds += [(APART, "compiled")] if args.apart else []
    for kind, mode in kinds:
        with attention(transformer, kind, mode):
            outputs[kind, mode], peak, took = measure(
                lambda: transformer(**inputs)[0], device, args.alive
            )
        rows[kind, mode] = Row(
            model=name, attention=kind, mode=mode, peak_mib=peak, milliseconds=took
        )
        print(f"| {name} | {kind} | {mode} | {peak:,.1f} | {took:.2f} |", flush=True)
    failures = []
    if not torch.equal(outputs[OVER_QUERY, "eager"], outputs[APART, "eager"]):
        failures.append(f"{name}: the output differs from that with the output apart")
    eager, compiled = (outputs[OVER_QUERY, mode].float() for mode in ("eager", "compiled"))
    error = ((compiled - eager).norm() / eager.norm()).item()
    if not error < LARGEST_ERROR:
        failures.append(f"{name}: compiled, the output differs by {error:.4f}")
    for mode in ("eager", "compiled"):
        ours, dense = (rows[kind, mode].peak_mib for kind in (OVER_QUERY, DENSE_CUDNN))
        if ours > dense + 1:
            failures.append(f"{name} {mode}: {ours:,.1f} MiB, dense {dense:,.1f}")
    return list(rows.values()), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["14B", "1.3B"])
    parser.add_argument("--alive", type=int, default=0, help="also list so many tensors")
    parser.add_argument("--apart", action="store_true", help="one more row, compiled")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a dry run")
    args = parser.parse_args()
    if not args.tiny and why_unavailable() is not None:
        parser.error(f"Triton is {why_unavailable()}; --tiny is a dry run without it")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.no_grad():
        failures = operator_failures(device, small=args.tiny)
        print("operator over its query:", "; ".join(failures) or "equal", flush=True)
        print("| model | attention | mode | peak, MiB | ms |\n|---|---|---|---|---|")
        rows = []
        for name in args.models:
            model = replace(tiny(MODELS[name]) if args.tiny else MODELS[name], layers=BLOCKS)
            found, wrong = model_rows(name, model, args)
            rows += found
            failures += wrong
            gc.collect()
    if args.json is not None:
        about = {"device_name": device_name(device), "versions": versions(), "blocks": BLOCKS}
        about |= {"sparsity": SPARSITY, "sparse_dtype": SPARSE_DTYPE, "failures": failures}
        args.json.write_text(json.dumps({**about, "rows": [vars(row) for row in rows]}, indent=1))
    if failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
