"""SoftTop-k, which trains routers: error on captured inputs, time and memory of both passes.

    python benchmarks/soft_top_k.py --json soft.json
    python benchmarks/soft_top_k.py --dry-run       in Triton's interpreter, on the CPU

Errors are relative L2 distances to the float64 reference, beside those that the reference itself
has when the inputs, O and dO are rounded to bfloat16.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def gradients(
    qkv: list[Tensor], router: Any, impl: Any, gradient: Tensor, sparsity: float
) -> list[Tensor]:
    """The output, then the gradients of Q, K, V and of the router's parameters."""
    from sla_video.kernels.api import sla2_attention

    leaves = [x.detach().requires_grad_() for x in qkv]
    out = sla2_attention(*leaves, router, impl=impl, selection="soft_top_k", sparsity=sparsity)
    found = torch.autograd.grad(out, [*leaves, *router.parameters()], gradient.to(out.dtype))
    return [out.detach(), *found]


def relative(got: Tensor, wanted: Tensor) -> float:
    """Relative L2 distance."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def check(device: str, *, captured: bool) -> dict[str, dict[str, list[float]]]:
    """Case -> tensor -> error of the kernels, and of the reference on rounded tensors."""
    from sla_video.kernels.router import Router

    if captured:
        from captured import capture

        # A part of the sequence: the reference keeps all scores for its backward.
        cases = {f"layer {n}": [x[:, :3000, :2] for x in x3] for n, x3 in capture((0, 3)).items()}
    else:
        cases = {"random": list(torch.randn(3, 1, 200, 2, 64))}
    report: dict[str, dict[str, list[float]]] = {}
    for case, inputs in cases.items():
        torch.manual_seed(0)
        router = Router(2, 64).to(device)
        with torch.no_grad():
            for x in router.parameters():
                x += 0.05 * torch.randn_like(x)
        exact = Router(2, 64).to(device, torch.float64)
        exact.load_state_dict(router.state_dict())
        qkv = [x.to(torch.bfloat16) for x in inputs]
        gradient = torch.randn_like(qkv[0])
        wanted = gradients([x.double() for x in qkv], exact, "reference", gradient, 0.9)
        got = gradients(qkv, router, "triton", gradient, 0.9)
        rounded = gradients(qkv, router, "reference", gradient, 0.9)
        names = ["out", "query", "key", "value", *(n for n, _ in router.named_parameters())]
        report[case] = {
            name: [relative(a, w), relative(b, w)]
            for name, a, b, w in zip(names, got, rounded, wanted, strict=True)
        }
        for name, (own, reference) in report[case].items():
            print(f"{case:9s} {name:12s} triton {own:.1e}  reference, rounded {reference:.1e}")
    return report


def measure(length: int, heads: int, repeats: int = 4) -> dict[str, Any]:
    """Milliseconds, and MiB beyond the inputs, of one layer at 95%."""
    from sla_video.kernels.api import sla2_attention
    from sla_video.kernels.router import Router

    qkv = list(torch.randn(3, 1, length, heads, 128, device="cuda", dtype=torch.bfloat16))
    router, gradient = Router(heads, 128).cuda(), torch.randn_like(qkv[0])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first = gradients(qkv, router, "triton", gradient, 0.95)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = []
    for _ in range(repeats):
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        start.record()
        with torch.no_grad():
            sla2_attention(*qkv, router, impl="triton", selection="soft_top_k", sparsity=0.95)
        middle.record()
        second = gradients(qkv, router, "triton", gradient, 0.95)
        end.record()
        torch.cuda.synchronize()
        times.append((start.elapsed_time(middle), middle.elapsed_time(end)))
    report = {
        "length": length,
        "heads": heads,
        "forward_ms": min(forward for forward, _ in times),
        "forward_backward_ms": min(both for _, both in times),
        "peak_mib": peak,
        "equal_bits_twice": all(torch.equal(x, y) for x, y in zip(first, second, strict=True)),
    }
    print(report, flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        from triton_interpreter import interpret_without_gpu

        interpret_without_gpu()
    elif not torch.cuda.is_available():
        sys.exit("no GPU here; --dry-run shows that the script works")
    from sla_video.pipelines.json_file import JsonFile

    file = JsonFile(args.json)
    report: dict[str, Any] = {
        "errors": check("cpu" if args.dry_run else "cuda", captured=not args.dry_run)
    }
    if not args.dry_run:
        report["times"] = [measure(7168, 12), measure(32760, 12)]
    file.write(report)


if __name__ == "__main__":
    main()
