"""One step of Wan's transformers on several GPUs by Ulysses, dense and with SLA2: what it gains.

    torchrun --nproc_per_node 4 benchmarks/context_parallel.py --model 1.3B --json cp-1.3B-4.json
    torchrun --nproc_per_node 4 benchmarks/context_parallel.py --model 14B --compile

Weights are random: latency does not depend on them. Each GPU first runs the whole step alone,
which gives the time of one GPU in the same run and the output to compare with; then all run it
together by Diffusers' `enable_parallelism`. Times are of the slowest GPU. Differences to one GPU
are those of bfloat16 products over other tile sizes: dense attention has them too, and they grow
from block to block, so they are printed after two blocks and after all. `exchange` is the
all-to-all of all layers alone. `--tiny` is for machines without a GPU.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from end_to_end_models import (
    MODELS,
    build,
    compiled_blocks,
    forward_inputs,
    only_first_blocks,
    tiny,
)
from torch import Tensor

from sla_video.pipelines.environment import device_name, versions
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.parallel import Ulysses
from sla_video.pipelines.patching import enable_sla

# After two blocks; more means that something else than rounding differs.
TOLERANCE = 0.03


class Bench:
    """The rows of one model on the GPUs of this launch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model = tiny(MODELS[args.model]) if args.tiny else MODELS[args.model]
        self.on_gpu = torch.cuda.is_available()
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.on_gpu else "cpu"
        self.device = torch.device(self.device)
        # The same weights and inputs on all ranks.
        torch.manual_seed(0)
        self.transformer = build(self.model, self.device)
        self.inputs = forward_inputs(self.model, self.device)
        self.rows: list[dict[str, Any]] = []

    def run(self) -> None:
        """Alone first: Diffusers cannot take parallelism back."""
        alone = {name: self._measure(name) for name in ("dense", "sla2")}
        if self.ranks == 1:
            return
        self.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=self.ranks))
        for name, (row, outputs) in alone.items():
            together, parallel_outputs = self._measure(name, self.ranks)
            together["speed_up"] = row["milliseconds"] / together["milliseconds"]
            for key, ours, theirs in zip(
                ("error_of_two_blocks", "error"), parallel_outputs, outputs, strict=True
            ):
                together[key] = float((ours - theirs).norm() / theirs.norm())
            together["exchange_milliseconds"] = self._exchange()
            self._say(together)

    def _measure(self, name: str, gpus: int = 1) -> tuple[dict[str, Any], list[Tensor]]:
        """A row, and the outputs after two blocks and after all."""
        if self.on_gpu:
            self.transformer.set_attention_backend("_native_cudnn")
        patch = nullcontext()
        if name == "sla2":
            patch = enable_sla(
                self.transformer,
                sparsity=self.args.sparsity,
                sparse_dtype=self.args.sparse_dtype if self.on_gpu else "bf16",
            )
        with patch:
            with only_first_blocks(self.transformer, 2):
                # The hook that cuts the tokens wants to run once before it is compiled.
                first = self._forward()
            compiled = compiled_blocks(self.transformer) if self.args.compile else nullcontext()
            with compiled:
                self._forward()
                if self.on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                milliseconds = self._time(self._forward)
                outputs = [first.float(), self._forward().float()]
        row = {
            "model": self.args.model,
            "attention": name,
            "sparsity": self.args.sparsity if name == "sla2" else None,
            "gpus": gpus,
            "length": self.model.length,
            "compiled": self.args.compile,
            "milliseconds": milliseconds,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None,
        }
        self.rows.append(row)
        if gpus == 1:
            self._say(row)
        return row, outputs

    def _forward(self) -> Tensor:
        output: Tensor = self.transformer(**self.inputs)[0]
        return output

    def _time(self, call: Callable[[], Any]) -> float:
        """Median milliseconds of the slowest rank."""
        times = []
        for _ in range(self.args.repeats):
            self._wait()
            start = time.perf_counter()
            call()
            if self.on_gpu:
                torch.cuda.synchronize()
            times.append(1000 * (time.perf_counter() - start))
        slowest = torch.tensor(median(times), device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest)

    def _exchange(self) -> float:
        """Milliseconds of the all-to-all of all layers, with nothing between."""
        ulysses = Ulysses.of(self.transformer._parallel_config)
        assert ulysses is not None
        size = (1, self.model.length // self.ranks, self.model.heads, self.model.head_dim)
        dtype = self.inputs["hidden_states"].dtype
        qkv = [torch.randn(size, device=self.device, dtype=dtype) for _ in range(3)]

        def layers() -> None:
            for _ in range(self.model.layers):
                ulysses.attend(lambda query, key, value: query, *qkv)

        layers()
        return self._time(layers)

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        dist.barrier()

    def _say(self, row: dict[str, Any]) -> None:
        if self.rank:
            return
        text = f"{row['attention']:>6} on {row['gpus']} x {device_name(self.device)}"
        text += f", L {row['length']:,}: {row['milliseconds']:,.0f} ms"
        if row["gpus"] > 1:
            text += f", {row['speed_up']:.2f}x of one ({row['speed_up'] / row['gpus']:.0%})"
            text += f", exchange {row['exchange_milliseconds']:,.0f} ms, differs by "
            text += f"{row['error_of_two_blocks']:.1e} after two blocks, {row['error']:.1e} in all"
        if row["peak_gib"] is not None:
            text += f", {row['peak_gib']:.1f} GiB"
        print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), default="1.3B")
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--sparse-dtype", default="int8_fp8")
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a dry run of the smallest sizes")
    args = parser.parse_args()
    if args.tiny:
        args.repeats, args.sparsity = 2, 0.5
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny is a dry run without one")
    file = JsonFile(args.json)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # Diffusers takes the device's number modulo the count of accelerators, which is zero here.
        torch.accelerator.device_count = lambda: 1
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29581")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with torch.no_grad():
        bench = Bench(args)
        bench.run()
    failed = [r for r in bench.rows if r.get("error_of_two_blocks", 0) > TOLERANCE]
    if bench.rank == 0:
        about = {"gpu": device_name(bench.device), "versions": versions()}
        file.write({**about, "rows": bench.rows, "equal": not failed})
        for row in failed:
            print(f"{row['attention']} on {row['gpus']} GPUs does not give what one gives")
    dist.destroy_process_group()
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
