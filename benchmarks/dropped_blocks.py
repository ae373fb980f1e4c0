"""What the blocks that are not selected cost in tiny-wan, and what other summaries of them would.

    python benchmarks/dropped_blocks.py --sparsity 0.97 --json dropped.json

One forward with full attention at each noise level of `fidelity`; on its Q, K, V, for every fourth
query block, means over layers of

    recall          softmax mass of the blocks that untrained routers select
    best recall     of the same number of blocks with the most mass, one choice for a query block
    sparse          relative L1 error of attention to the selected blocks alone
    SLA2            of SLA2, with its estimate of alpha; `best alpha`: with the exact recall of each
                    token as alpha
    means of P      of dropped keys read as one mean key and value for each P tokens, at best alpha

so the last rows say what a better summary than linear attention could win at all.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sla_video.kernels.options import num_selected
from sla_video.kernels.routing import block_means, mass_logit, router_scores
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan import evaluate, fidelity

BLOCK_Q, BLOCK_K = 128, 64
POOLS = (64, 8)
# Every how many-th query block is looked at.
STRIDE = 4


def capture(pipe: Any, level: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Q, K, V `[1, L, H, D]` of all layers in a forward of full attention."""
    probe = fidelity.make_probe(pipe, clips=1)
    found = []

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found.append((query, key, value))
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    with enable_sla(pipe.transformer, sparsity=0.9) as handle:
        for processor in handle.processors.values():
            processor.attention = attend
        one = slice(level, level + 1)
        pipe.transformer(probe.noisy[one], probe.timestep[one], probe.text[one], return_dict=False)
    return found


def measure(query: Tensor, key: Tensor, value: Tensor, sparsity: float) -> dict[str, float]:
    """The rows of the docstring for one layer; L is a multiple of both blocks."""
    num_q, num_k = query.shape[1] // BLOCK_Q, key.shape[1] // BLOCK_K
    query = query.unflatten(1, (num_q, BLOCK_Q))[:, ::STRIDE].flatten(1, 2)
    key = key - key.mean(1, keepdim=True)
    # [B, H, M, N]
    scores = router_scores(block_means(query, BLOCK_Q), block_means(key, BLOCK_K), None)
    q, k, v = (x.transpose(1, 2).float() for x in (query, key, value))
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    full_lse = logits.logsumexp(-1)
    full = torch.softmax(logits, -1) @ v
    # Mass of each key block, mean over the queries of a block: [B, H, M, N]
    mass = (logits - full_lse[..., None]).exp().unflatten(3, (num_k, BLOCK_K)).sum(4)
    mass = mass.unflatten(2, (-1, BLOCK_Q)).mean(3)
    kept = num_selected(sparsity, num_k)
    dropped = torch.ones_like(scores).scatter(-1, scores.topk(kept, -1).indices, 0.0)

    tokens = dropped.bool().repeat_interleave(BLOCK_Q, 2)
    selected = logits.masked_fill(tokens.repeat_interleave(BLOCK_K, 3), -torch.inf)
    recall = (selected.logsumexp(-1) - full_lse).exp()[..., None]
    sparse = torch.softmax(selected, -1) @ v

    phi_q, phi_k = q.softmax(-1), k.softmax(-1).unflatten(2, (num_k, BLOCK_K))
    states = torch.einsum("bhnkd,bhnke->bhnde", phi_k, v.unflatten(2, (num_k, BLOCK_K)))
    rows = phi_q.unflatten(2, (-1, BLOCK_Q))
    linear = rows @ torch.einsum("bhmn,bhnde->bhmde", dropped, states)
    total = rows @ torch.einsum("bhmn,bhnd->bhmd", dropped, phi_k.sum(3))[..., None]
    linear = (linear / total).flatten(2, 3)
    alpha = torch.sigmoid(mass_logit(scores, dropped)).repeat_interleave(BLOCK_Q, 2)[..., None]

    def error(out: Tensor) -> float:
        return float((out - full).abs().sum() / full.abs().sum())

    report = {
        "recall": float((mass * (1 - dropped)).sum(-1).mean()),
        "best recall": float(mass.topk(kept, -1).values.sum(-1).mean()),
        "sparse": error(sparse),
        "SLA2": error(alpha * sparse + (1 - alpha) * linear),
        "SLA2, best alpha": error(recall * sparse + (1 - recall) * linear),
    }
    for pool in POOLS:
        means = [x.unflatten(2, (-1, pool)).mean(3) for x in (k, v)]
        coarse = (q * q.shape[-1] ** -0.5) @ means[0].mT + math.log(pool)
        coarse = coarse.masked_fill(~tokens.repeat_interleave(BLOCK_K // pool, 3), -torch.inf)
        rest = torch.softmax(coarse, -1) @ means[1]
        report[f"means of {pool}"] = error(recall * sparse + (1 - recall) * rest)
    return report


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.97)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file = JsonFile(args.json)
    pipe = evaluate.load_pipeline("tiny-wan", None, "ema")
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    report: dict[str, dict[str, float]] = {}
    for place, level in enumerate(fidelity.NOISE_LEVELS):
        layers = [measure(*qkv, args.sparsity) for qkv in capture(pipe, place)]
        report[f"{level:g}"] = {
            name: sum(layer[name] for layer in layers) / len(layers) for name in layers[0]
        }
        values = ", ".join(f"{name} {x:.3f}" for name, x in report[f"{level:g}"].items())
        print(f"level {level:g}: {values}", flush=True)
        file.write(report)


if __name__ == "__main__":
    main()
