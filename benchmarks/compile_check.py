"""Compile all launches on the lists for GPUs that need not be here, and compare with their memory.

    python benchmarks/compile_check.py
    python benchmarks/compile_check.py --capability 9.0 --columns 128 --formats int8 --backward

One line for each kernel that was compiled: shared memory of a program, and where CUDA's tools are
found, registers and bytes of stack of a thread, and of its longest inner loop with matrix products
how many instructions it has, how often it waits for such products, and how often it reads or writes
what registers could not hold. The exit code is 1 if one does not compile or needs more memory
than a program may have.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Before Triton is imported.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sla_video.kernels import launch_choice, triton_impl
from sla_video.kernels.launch_choice import LaunchCase, trying
from sla_video.kernels.launch_lists import LaunchConfig
from sla_video.kernels.options import Options

# Bytes of shared memory that one program may have (CUDA C++ Programming Guide, table of compute
# capabilities).
SHARED_BYTES = {"8.0": 166912, "8.6": 101376, "9.0": 232448, "10.0": 232448, "12.0": 101376}
# What of them cannot do FP8 is compiled for 8.9, which has the memory of 8.6.
FP8_FROM = (8, 9)
FORMATS = ("bf16", "int8", "int8_fp8", "int8_int8")
LENGTH, HEADS = 1000, 12


class _Target:
    """In the place of a GPU's driver: kernels are compiled for `capability`, and not run."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return int(self.target.arch)

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda


class Compiled:
    """Compiles what is launched, once, and writes down what it takes."""

    def __init__(self, label: str, shared_bytes: int) -> None:
        self.label, self.shared_bytes = label, shared_bytes
        self.seen: set[str] = set()
        self.failures: list[str] = []
        self.launch = JITFunction.run

    def __enter__(self) -> Compiled:
        compiled = self

        def run(self: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
            return compiled.compile(self, args, grid, keywords)

        JITFunction.run = run  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self.launch  # type: ignore[method-assign]

    def compile(self, kernel: Any, args: Any, grid: Any, keywords: dict[str, Any]) -> Any:
        start = time.perf_counter()
        launch = {name: keywords.get(name) for name in ("num_warps", "num_stages", "maxnreg")}
        about = f"{self.label} {kernel.__name__} {launch}"
        try:
            found = self.launch(kernel, *args, grid=grid, warmup=True, **keywords)
        except Exception as error:  # compilers fail in many ways
            self.failures.append(f"{about}: {str(error).strip().splitlines()[-1:]}")
            print(f"FAILED {self.failures[-1]}", flush=True)
            return None
        if found.hash in self.seen:
            return found
        self.seen.add(found.hash)
        shared = found.metadata.shared
        seconds = time.perf_counter() - start
        print(f"{about} shared {shared}{resources(found)} {seconds:.1f} s", flush=True)
        if shared > self.shared_bytes:
            self.failures.append(f"{about}: {shared} bytes of shared memory > {self.shared_bytes}")
        return found


def tool(name: str) -> str | None:
    """A program of CUDA: the one that came with Triton, or the one that is installed."""
    beside = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(beside) if beside.is_file() else shutil.which(name)


def said_of(compiled: Any, name: str, *options: str) -> str:
    """What a program of CUDA says of machine code; nothing without the program."""
    program = tool(name)
    if program is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [program, *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def resources(compiled: Any) -> str:
    """Registers and stack, and what the inner loop is made of."""
    found = re.search(
        r"REG:(\d+) STACK:(\d+)", said_of(compiled, "cuobjdump", "--dump-resource-usage")
    )
    words = f" registers {found[1]} stack {found[2]}" if found else ""
    loop = inner_loop(said_of(compiled, "nvdisasm", "-c"))
    if loop:
        waits, spills = (
            sum(bool(re.search(pattern, line)) for line in loop)
            for pattern in (r"WARPGROUP\.DEPBAR", r"\b(LDL|STL)\b")
        )
        words += f" loop {len(loop)} waits {waits} spills {spills}"
    return words


def inner_loop(assembly: str) -> list[str]:
    """Instructions of the longest loop that has matrix products and no loop with such in it."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(\S.*)", line):
            lines.append(instruction[1])
            # Back to what was there before, not to itself, as at the end of a program.
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            start = labels.get(target[1], len(lines)) if target else len(lines)
            if any("MMA." in x for x in lines[start:]):
                loops.append((start, len(lines)))
    inner = [
        (start, end)
        for start, end in loops
        if not any((start, end) != x and start <= x[0] and x[1] <= end for x in loops)
    ]
    start, end = max(inner, key=lambda x: x[1] - x[0], default=(0, 0))
    return lines[start:end]


def operator(dtype: torch.dtype, columns: int, sparse_dtype: Any, backward: bool) -> None:
    """Launch every kernel of the operator once. Nothing is computed."""
    options = Options(
        sparsity=0.9,
        block_q=128,
        block_k=64,
        sparse_dtype=sparse_dtype,
    )
    shape = (1, LENGTH, HEADS, columns)
    qkv = [torch.zeros(shape, dtype=dtype, requires_grad=backward) for _ in range(3)]
    out, _ = triton_impl.sla2_triton(*qkv, None, options, need_lse=False)
    if backward:
        out.sum().backward()


def check(capability: str, columns: int, sparse_dtype: str, backward: bool) -> list[str]:
    """Compile all launches of one format; returns what failed."""
    major, minor = (int(part) for part in capability.split("."))
    own = (major, minor)
    if sparse_dtype == "int8_fp8" and own < FP8_FROM:
        if own == (8, 0):
            return []
        own = FP8_FROM
    driver.set_active(_Target(own))  # type: ignore[arg-type]
    launch_choice.capability = lambda _device: own
    triton_impl.why_not = lambda *_: None
    label = f"{capability} D={columns} {sparse_dtype}"
    with Compiled(label, SHARED_BYTES[capability]) as compiled:
        known: dict[LaunchCase, LaunchConfig] = {}
        for i in itertools.count():
            lists = {case: case.candidates() for case in known}
            choices = {case: found[i] for case, found in lists.items() if i < len(found)}
            if i > 0 and not choices:
                return compiled.failures
            with trying(choices):
                operator(torch.bfloat16, columns, sparse_dtype, backward)
            known = choices if i == 0 else known
    raise AssertionError("lists end")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", nargs="+", default=list(SHARED_BYTES), choices=SHARED_BYTES)
    parser.add_argument("--columns", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--backward", action="store_true", help="and the backward pass")
    args = parser.parse_args()
    failures = []
    for what in itertools.product(args.capability, args.columns, args.formats):
        failures += check(*what, args.backward)
    print(f"Triton {triton.__version__}: {len(failures)} failures", *failures, sep="\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
