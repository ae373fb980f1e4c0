"""One forward of Wan's transformers, and a whole video, at the true sizes: dense against SLA2.

    python benchmarks/end_to_end.py --models 1.3B 14B --variants cudnn flash sla2-97 --json e2e.json
    python benchmarks/end_to_end.py --models 14B --variants sla2-97 --linear fp8 --json e2e.json
    python benchmarks/end_to_end.py --models 1.3B --variants cudnn sla2-97 --generate --json x.json
    python benchmarks/end_to_end.py --table --json e2e.json

Weights are random. `cudnn` and `flash` are dense attention of PyTorch; sla2-97 is SLA2 at 97%
sparsity with an INT8 sparse branch, sla2-97-int8_fp8 names another format, and sla2-97-unfused
leaves QK norm and rotary embedding to modules and the compiler. Every row is written to
--json as soon as it is measured and replaces the one of the same name there, so that a run may be
stopped, and the rest measured by another. Ratios are to dense rows of the same model and mode with
bfloat16 linear layers. `--tiny` is for machines without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from end_to_end_models import (
    MODELS,
    Model,
    block_arguments,
    build,
    compiled_blocks,
    forward_inputs,
    only_first_blocks,
    quantize_linears,
    tiny,
)
from end_to_end_profile import breakdown, profile
from end_to_end_results import DENSE, Results
from end_to_end_video import generate

from sla_video.kernels.gpu_timing import why_it_failed
from sla_video.pipelines.environment import device_name, versions
from sla_video.pipelines.errors import InputError
from sla_video.pipelines.families import rotary
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.progress import TerminalProgress

# Blocks of a forward that compiles and tunes; all are alike.
WARM_BLOCKS = 2


@dataclass(frozen=True, kw_only=True)
class Variant:
    """How a transformer attends; `sparsity` is None for dense attention."""

    name: str
    sparsity: float | None = None
    sparse_dtype: str = "int8"
    # QK norm and rotary embedding by modules and the compiler, not by one kernel.
    unfused: bool = False

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Of "cudnn", "flash", "sla2-97" or "sla2-97-int8_fp8"."""
        if text in DENSE:
            return cls(name=text)
        found = re.fullmatch(r"sla2-(\d\d)(?:-(bf16|int8|int8_fp8))?(-unfused)?", text)
        if found is None:
            raise argparse.ArgumentTypeError(
                f"got {text!r}: use {', '.join(DENSE)}, or sla2-97 and the like, with -bf16 or "
                "-int8_fp8 after it for another number format than int8"
            )
        sparsity, sparse_dtype, unfused = found.groups()
        return cls(
            name=text,
            sparsity=int(sparsity) / 100,
            sparse_dtype=sparse_dtype or "int8",
            unfused=unfused is not None,
        )


class Bench:
    """Measures the rows of one model, whose transformer is built once."""

    def __init__(self, args: argparse.Namespace, name: str, results: Results) -> None:
        self.args, self.name, self.results = args, name, results
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Model = tiny(MODELS[name]) if args.tiny else MODELS[name]
        self.progress = TerminalProgress()

    def run(self) -> None:
        """All rows that were asked for, FP8 last: it replaces the weights."""
        with self.progress:
            self.progress.stage(f"{self.name}: weights")
            start = time.perf_counter()
            self.transformer = build(self.model, self.device)
            self.inputs = forward_inputs(self.model, self.device)
            self._wait()
            _say(f"{self.model.title}: L = {self.model.length:,}, "
                 f"built in {time.perf_counter() - start:.1f} s")  # fmt: skip
            for linear in sorted(self.args.linear):
                if linear != "bf16":
                    quantize_linears(self.transformer, "tensor" if "tensor" in linear else "row")
                for mode in self.args.modes:
                    for variant in self.args.variants:
                        self._row(variant, mode, linear)

    def _row(self, variant: Variant, mode: str, linear: str) -> None:
        row: dict[str, Any] = {
            "model": self.name,
            "attention": variant.name,
            "mode": mode,
            "linear": linear,
            "tiny": self.args.tiny,
            "sparsity": variant.sparsity,
            "sparse_dtype": variant.sparse_dtype if variant.sparsity is not None else None,
            "length": self.model.length,
            "layers": self.model.layers,
            "note": "",
            "device_name": device_name(self.device),
            "versions": versions(),
        }
        self.progress.stage(f"{self.name} {variant.name} {mode} {linear}")
        try:
            compiled = mode == "compiled"
            blocks = compiled_blocks(self.transformer) if compiled else nullcontext()
            with self._attention(variant), blocks:
                row |= self._time_forward()
                if self.args.profile and self._on_gpu:
                    row["parts"], row["kernels"] = self._profile_block()
                # The autoencoder of Wan2.2 is another one.
                if self.args.generate and self.model.spatial == 8:
                    row["generation"] = generate(
                        self.transformer, self.model, steps=self.args.steps, small=self.args.tiny
                    )
        except Exception as error:  # one row that cannot run leaves the others alone
            if self.args.raise_errors:
                raise
            row["note"] = why_it_failed(error)
        self.results.add(row)
        _say(" | ".join(self.results.cells(row)))
        if "parts" in row:
            _say(breakdown(row))
        gc.collect()

    def _time_forward(self) -> dict[str, Any]:
        start = time.perf_counter()
        with only_first_blocks(self.transformer, WARM_BLOCKS):
            for _ in range(2):
                self.transformer(**self.inputs)
            self._wait()
        first = time.perf_counter() - start
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        times = []
        while len(times) < self.args.repeats and (not times or sum(times) < 1000 * self.args.limit):
            times.append(self._milliseconds())
        row = {
            "milliseconds": median(times),
            "fastest_milliseconds": min(times),
            "repeats": len(times),
            "first_call_seconds": first,
        }
        if self._on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return row

    def _milliseconds(self) -> float:
        if not self._on_gpu:
            start = time.perf_counter()
            self.transformer(**self.inputs)
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.transformer(**self.inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _profile_block(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Of one block, from the second on: the first call of a forward makes caches."""
        arguments = block_arguments(self.transformer, self.inputs)
        return profile(lambda: self.transformer.blocks[1](*arguments))

    @contextmanager
    def _attention(self, variant: Variant) -> Iterator[None]:
        # Cross-attention runs by cuDNN beside SLA2, too.
        backend = DENSE.get(variant.name, DENSE["cudnn"]) if self._on_gpu else "native"
        self.transformer.set_attention_backend(backend)
        patch = nullcontext()
        if variant.sparsity is not None:
            patch = enable_sla(
                self.transformer, sparsity=variant.sparsity, sparse_dtype=variant.sparse_dtype
            )
        modules = mock.patch.object(rotary, "_one_kernel", lambda *_: False)
        with patch, modules if variant.unfused else nullcontext():
            yield

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()


def _say(text: str) -> None:
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--variants",
        nargs="+",
        type=Variant.parse,
        default=[Variant.parse(name) for name in (*DENSE, "sla2-97", "sla2-95", "sla2-90")],
        metavar="VARIANT",
        help="cudnn, flash, sla2-97, sla2-97-int8_fp8 and the like",
    )
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["compiled"])
    parser.add_argument(
        "--linear",
        nargs="+",
        choices=["bf16", "fp8", "fp8-tensor"],
        default=["bf16"],
        help="fp8: torchao, a scale for each token and output channel; fp8-tensor: one for all",
    )
    parser.add_argument("--repeats", type=int, default=3, help="forwards that are timed")
    parser.add_argument("--limit", type=float, default=20, help="no repeat begins after S seconds")
    parser.add_argument("--profile", action="store_true", help="where the time of a block goes")
    parser.add_argument("--generate", action="store_true", help="a whole video, too")
    parser.add_argument("--steps", type=int, default=50, help="of that video")
    parser.add_argument("--json", type=Path, help="results: read, added to, written")
    parser.add_argument("--table", action="store_true", help="print what is in --json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a dry run")
    parser.add_argument("--raise-errors", action="store_true", help="stop where a row fails")
    args = parser.parse_args(arguments)
    if {"fp8", "fp8-tensor"} <= set(args.linear):
        parser.error("fp8 and fp8-tensor replace the weights: measure them in two runs")
    if not args.tiny and not args.table and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny is a dry run without one")
    try:
        results = Results(args.json)
    except InputError as error:
        parser.error(str(error))
    if not args.table:
        # As in Diffusers' pipelines.
        with torch.no_grad():
            for name in args.models:
                Bench(args, name, results).run()
                gc.collect()
    _say(results.table())


if __name__ == "__main__":
    main()
