"""What attention among fewer tokens loses on the embedded model, and what it costs on a GPU.

    python benchmarks/token_compression.py                                  # layers and velocity
    python benchmarks/token_compression.py --adherence 40 --device cuda     # videos of prompts
    python benchmarks/token_compression.py --timing --json cost.json        # a GPU, Wan's sizes

Layers: relative L1 of the attention of each layer against full attention, mean over layers, in the
first and third step after a full one, all on the steps of the dense model. Velocity: relative L2
error of what the transformer makes of the dense model's latents, mean over the short steps, with
compression as `enable_sla` does it in the quiet half of the layers. Adherence: how well videos of
held-out prompts keep to them, beside the dense ones and by distance to these.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sla_video.config import SLAConfig
from sla_video.config_compression import TokenCompression
from sla_video.kernels.token_compression import (
    compressed_attention,
    gather_tokens,
    nearest_kept,
    select_tokens,
    short_attention,
)
from sla_video.kernels.token_scores import always_kept, rank_tokens, share_count, token_scores
from sla_video.pipelines.families.wan import project_in
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.loading import load_pipeline
from sla_video.pipelines.model_source import find_model
from sla_video.pipelines.patching import enable_sla

PROMPT = "a red circle and a blue square; the red circle moves left"
# mode, fill, residual
WAYS = (
    ("kv", "zero", False),
    ("kv", "zero", True),
    ("qkv", "zero", False),
    ("qkv", "linear", False),
    ("qkv", "neighbor", False),
    ("qkv", "prev", False),
    ("qkv", "prev", True),
)


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention of `[B, L, H, D]`."""
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2)


def describe(way: tuple[str, str, bool]) -> str:
    """The first cells of a row."""
    mode, fill, residual = way
    return f"{mode} | {fill if mode == 'qkv' else ''} | {'yes' if residual else ''}"


class Trajectory:
    """Latents and velocities of the dense model on its way from noise, without guidance."""

    def __init__(self, pipe: Any, steps: int, grid: tuple[int, int, int]) -> None:
        self.pipe, self.grid = pipe, grid
        device = pipe.transformer.device
        text, _ = pipe.encode_prompt(
            PROMPT, do_classifier_free_guidance=False, max_sequence_length=64, device=device
        )
        self.text = text.to(pipe.transformer.dtype)
        pipe.scheduler.set_timesteps(steps, device=device)
        generator = torch.Generator().manual_seed(0)
        channels = pipe.transformer.config.in_channels
        latent = torch.randn(1, channels, *grid, generator=generator).to(device)
        self.latents, self.velocities = [latent], []
        for index, time in enumerate(pipe.scheduler.timesteps):
            self.velocities.append(self.velocity(index, time))
            latent = pipe.scheduler.step(
                self.velocities[-1], time, self.latents[-1], return_dict=False
            )[0]
            self.latents.append(latent)

    def velocity(self, index: int, time: Tensor) -> Tensor:
        """What the transformer makes of the latent of a step."""
        latent = self.latents[index].to(self.pipe.transformer.dtype)
        output: Tensor = self.pipe.transformer(
            latent, time.expand(1), self.text, return_dict=False
        )[0]
        return output.float()

    def replay(self, short: Any) -> list[float]:
        """Relative errors of the velocity in the steps for which `short(step)` holds."""
        scheduler, wrong = self.pipe.scheduler, []
        scheduler.set_timesteps(len(self.velocities), device=self.latents[0].device)
        for index, time in enumerate(scheduler.timesteps):
            found, expected = self.velocity(index, time), self.velocities[index]
            if short(index):
                wrong.append(float((found - expected).norm() / expected.norm()))
            scheduler.step(expected, time, self.latents[index])
        return wrong


def capture(trajectory: Trajectory, steps: list[int]) -> dict[tuple[int, int], Any]:
    """(step, layer) -> query, key, value of the dense model."""
    found: dict[tuple[int, int], Any] = {}
    now = -1

    def watch(layer: int) -> Any:
        def hook(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rotary = kwargs.get("rotary_emb", args[3] if len(args) > 3 else None)
            found[now, layer] = project_in(attn, kwargs.get("hidden_states", *args[:1]), rotary)

        return hook

    blocks = trajectory.pipe.transformer.blocks
    hooks = [
        block.attn1.register_forward_pre_hook(watch(layer), with_kwargs=True)
        for layer, block in enumerate(blocks)
    ]
    trajectory.pipe.scheduler.set_timesteps(len(trajectory.velocities))
    for now in steps:
        trajectory.velocity(now, trajectory.pipe.scheduler.timesteps[now])
    for hook in hooks:
        hook.remove()
    return found


def layer_errors(trajectory: Trajectory, start: int, pairs: float) -> dict[str, list[float]]:
    """Way -> mean relative L1 one and three steps after `start`."""
    grid, later = trajectory.grid, (start + 1, start + 3)
    found = capture(trajectory, [start, *later])
    layers = sorted({layer for _, layer in found})
    always = always_kept(grid).to(trajectory.latents[0].device)
    errors: dict[str, list[list[float]]] = {describe(way): [[], []] for way in WAYS}
    for layer in layers:
        fulls = [sdpa(*found[step, layer]) for step in later]
        before = found[start, layer]
        whole = sdpa(*before)
        ranking = rank_tokens(token_scores(*before[:2], grid), always)
        for mode, fill, residual in WAYS:
            share = pairs if mode == "kv" else pairs**0.5
            count = share_count(whole.shape[1], int(always.sum()), share)
            selection = select_tokens(ranking, count)
            extra: dict[str, Tensor] = {
                "dropped_output": gather_tokens(whole, selection.dropped),
                "nearest": nearest_kept(selection, grid),
            }
            if residual:
                short = short_attention(*before, selection, sdpa, mode=mode)
                same = whole if mode == "kv" else gather_tokens(whole, selection.kept)
                extra["residual"] = same - short
            for place, step in enumerate(later):
                full = fulls[place]
                output = compressed_attention(
                    *found[step, layer], selection, sdpa, mode=mode, fill=fill, **extra
                )
                wrong = (output - full).abs().sum() / full.abs().sum()
                errors[describe((mode, fill, residual))][place].append(float(wrong))
    return {way: [sum(e) / len(e) for e in parts] for way, parts in errors.items()}


def settings_of(way: tuple[str, str, bool], pairs: float) -> TokenCompression:
    mode, fill, residual = way
    return TokenCompression(mode=mode, fill=fill, residual=residual, pairs=pairs)  # type: ignore[arg-type]


def velocity_error(trajectory: Trajectory, compression: TokenCompression) -> float:
    """Mean over the short steps, with attention that is dense but for compression."""
    layers = len(trajectory.pipe.transformer.blocks)
    config = SLAConfig(dense_layers=range(layers), compression=compression)
    first, every = compression.full_steps - 1, compression.refresh_every
    with enable_sla(trajectory.pipe, config=config):
        wrong = trajectory.replay(lambda step: step > first and (step - first) % every != 0)
    return sum(wrong) / len(wrong)


def quality(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """The table of layers and velocities."""
    grid = ((args.frames - 1) // 4 + 1, args.size // 8, args.size // 8)
    trajectory = Trajectory(pipe, args.steps, grid)
    start = args.steps // 3
    by_layer = layer_errors(trajectory, start, args.pairs)
    print("| mode | fill | residual | rel. L1, 1 step | rel. L1, 3 steps | velocity error |")
    print("|---|---|---|---|---|---|")
    rows = {}
    for way in WAYS:
        velocity = velocity_error(trajectory, settings_of(way, args.pairs))
        near, far = by_layer[describe(way)]
        rows[describe(way)] = {"rel_l1": [near, far], "velocity": velocity}
        print(f"| {describe(way)} | {near:.3f} | {far:.3f} | {velocity:.4f} |", flush=True)
    return rows


def adherence_of_videos(args: argparse.Namespace, pipe: Any) -> dict[str, Any]:
    """The table of adherence, dense attention inside and SLA2 inside."""
    from sla_video.pipelines.tiny_wan import adherence, evaluate
    from sla_video.pipelines.tiny_wan.models import GUIDANCE_SCALE, TEXT_POSITIONS

    options = argparse.Namespace(
        size=args.size,
        steps=args.steps,
        guidance_scale=GUIDANCE_SCALE,
        text_positions=TEXT_POSITIONS[0],
        batch_size=args.batch_size,
    )
    scenes, prompts = evaluate.held_out_prompts(args.adherence)
    layers = list(range(len(pipe.transformer.blocks)))
    ways: dict[str, dict[str, Any] | None] = {"dense": None}
    for way in (WAYS[0], WAYS[1], WAYS[-2], WAYS[-1]):
        compression = settings_of(way, args.pairs)
        ways[f"dense, {describe(way)}"] = {"dense_layers": layers, "compression": compression}
    ways[f"SLA2 {args.sparsity:.0%}"] = {"sparsity": args.sparsity}
    for way in (WAYS[1], WAYS[-1]):
        ways[f"SLA2 {args.sparsity:.0%}, {describe(way)}"] = {
            "sparsity": args.sparsity,
            "compression": settings_of(way, args.pairs),
        }
    baseline, rows = None, {}
    for name, keywords in ways.items():
        handle = None if keywords is None else enable_sla(pipe, **keywords)
        videos, seconds = evaluate.generate_all(pipe, prompts, list(range(len(prompts))), options)
        row: dict[str, Any] = {
            key: value
            for key, value in adherence.summary(adherence.measure_many(videos, scenes)).items()
            if value == value  # no number where nothing moves
        }
        row["seconds_per_video"] = seconds / len(prompts)
        if handle is not None:
            row["pairs"] = [layer.pairs for layer in handle.stats().layers]
            paired = evaluate.paired_distance(videos, baseline, torch.device(args.device))
            row |= {key: sum(values) / len(values) for key, values in paired.items()}
            handle.remove()
        baseline = videos if baseline is None else baseline
        rows[name] = row
        numbers = ", ".join(f"{k} {v:.3g}" for k, v in row.items() if not isinstance(v, list))
        print(f"{name}: {numbers}", flush=True)
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=float, default=0.5, help="query-key pairs that are kept")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=25)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--adherence", type=int, metavar="PROMPTS")
    parser.add_argument("--batch-size", type=int, default=40)
    parser.add_argument("--sparsity", type=float, default=0.97, help="of the inner SLA2")
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--sparse-dtype", default="int8_fp8", help="with --timing")
    parser.add_argument("--grid", type=int, nargs=3, help="with --timing: tokens, for a dry run")
    parser.add_argument("--heads", type=int, default=4, help="with --grid")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    file = JsonFile(args.json)
    if args.timing:
        import token_compression_cost as cost

        shapes = {"dry run": (tuple(args.grid), args.heads)} if args.grid else cost.SHAPES
        cost.print_head()
        rows: Any = [
            row
            for shape, (grid, heads) in shapes.items()
            for row in cost.measure(
                shape,
                grid,
                heads,
                pairs=args.pairs,
                sparsity=args.sparsity,
                low=args.sparse_dtype,
                device=args.device,
            )
        ]
    else:
        folder = find_model("tiny-wan").folder
        assert folder is not None
        device = torch.device(args.device)
        pipe = load_pipeline(folder, device=device, dtype=torch.float32, offload=False)
        pipe.set_progress_bar_config(disable=True)
        rows = adherence_of_videos(args, pipe) if args.adherence else quality(args, pipe)
    file.write({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": rows})


if __name__ == "__main__":
    main()
