"""What the cases of `parallel_cases` and `parallel_gradients` share.

Without a GPU, Diffusers and gloo each lack something that context parallelism needs; both are
filled in here, and nothing of ours is replaced.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel
from diffusers.hooks import context_parallel
from torch import Tensor

from sla_video import SLAConfig, enable_sla
from sla_video.pipelines.handle import SLAHandle
from tiny_models import build_tiny_transformer, transformer_inputs

Case = Callable[[], None]
CASES: dict[str, Case] = {}
# 192 tokens are 12 x 24 blocks of these sizes.
BLOCKS: dict[str, Any] = {"block_q": 16, "block_k": 8, "impl": "torch"}
HEADS = 4


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def parallelize(model: Any, **settings: Any) -> None:
    settings = {"ulysses_degree": dist.get_world_size(), **settings}
    model.enable_parallelism(config=ContextParallelConfig(**settings))


def scramble(handle: SLAHandle) -> None:
    """Routers that differ from head to head, the same in each process."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for router in handle.routers.values():
            for parameter in router.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def patched(
    config: SLAConfig, *, parallel: str = "", heads: int = HEADS, layers: int = 3, **settings: Any
) -> tuple[WanTransformer3DModel, SLAHandle]:
    """A patched tiny transformer; `parallel` is "before" or "after" enabling, or "" for never."""
    model = build_tiny_transformer(num_attention_heads=heads, num_layers=layers)
    if parallel == "before":
        parallelize(model, **settings)
    handle = enable_sla(model, config=config)
    scramble(handle)
    if parallel == "after":
        parallelize(model, **settings)
    return model, handle


def run(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(**transformer_inputs(**inputs))[0]
    return output


def assert_same(config: SLAConfig, *, inputs: Any = None, **settings: Any) -> None:
    """N processes, made parallel before and after `enable_sla`, give what one process gives."""
    inputs = inputs or {}
    expected = run(patched(config, heads=settings.get("heads", HEADS))[0], **inputs)
    for order in ("before", "after"):
        output = run(patched(config, parallel=order, **settings)[0], **inputs)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def refusal(function: Callable[[], Any]) -> str:
    try:
        function()
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return str(error)
    raise AssertionError("nothing was refused")


def gather_unequal(tensor: Tensor, dim: int, group: Any) -> Tensor:
    """Diffusers' gathering of unequal pieces; gloo, unlike NCCL, sends equal ones only."""
    lengths = torch.zeros(dist.get_world_size(group), dtype=torch.long)
    lengths[dist.get_rank(group)] = tensor.shape[dim]
    dist.all_reduce(lengths, group=group)
    padded = torch.zeros(int(lengths.max()), *tensor.transpose(0, dim).shape[1:])
    padded[: tensor.shape[dim]] = tensor.transpose(0, dim)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    whole = [part[:length] for part, length in zip(parts, lengths.tolist(), strict=True)]
    return torch.cat(whole).transpose(0, dim)


def work(rank: int, ranks: int, folder: Path) -> None:
    """Run all cases in one of `ranks` processes, and write what became of each."""
    # Diffusers takes the device's number modulo the count of accelerators, which is zero here.
    torch.accelerator.device_count = lambda: 1
    context_parallel._all_gather_anything = gather_unequal
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        # A case that fails in one process only leaves the others waiting.
        timeout=timedelta(seconds=180),
    )
    results = {}
    for name, function in CASES.items():
        results[name] = ""
        try:
            function()
        except Exception:
            # Of any kind: the test that reads the results fails with it, and the processes still
            # meet at the barrier, so that one failure does not take the other cases along.
            results[name] = traceback.format_exc()
        dist.barrier()
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
