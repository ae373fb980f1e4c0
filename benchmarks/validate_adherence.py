"""How far the adherence metric can be trusted: measured on clips whose content is known.

    python benchmarks/validate_adherence.py --scenes 2000 --size 256

Clips rendered from random prompts should pass every check, as they are and after they were
blurred, made noisy and compressed. Against a prompt that differs in one property, or after the
clip itself was spoiled, the check of that property should fail.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sla_video.pipelines.tiny_wan import adherence, placement, render
from sla_video.pipelines.tiny_wan.scenes import (
    CARDINALS,
    COLOURS,
    DIRECTIONS,
    OPPOSITE,
    PATTERNS,
    SHAPES,
    TONES,
    Motion,
    ObjectSpec,
    Scene,
    sample_scene,
)
from sla_video.pipelines.tiny_wan.segmentation import segment

Clip = NDArray[np.uint8]
Kinds = dict[str, Callable[[Clip], Clip] | None]
# Which check should fail, why, and the scene to hold against the clip.
Control = tuple[str, str, Scene]

# Standard deviations: in pixels of a full-size frame, and in gray levels.
BLUR = 1.5
NOISE = 6.0
JPEG_QUALITY = 50


def draw(scene: Scene, rng: random.Random, size: int) -> tuple[placement.ClipParams, Clip]:
    """What a scene was placed as, and its clip `[T, S, S, 3]`."""
    params = placement.place([scene], rng)
    return params, as_clip(render.render(params, size)[0])


def as_clip(video: torch.Tensor) -> Clip:
    """From `[3, T, S, S]` in [-1, 1] to `[T, S, S, 3]` in gray levels."""
    levels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 3, 0).numpy())


def degrade(clip: Clip, rng: np.random.Generator) -> Clip:
    """A clip after Gaussian blur, Gaussian noise and JPEG compression with halved colour."""
    from PIL import Image
    from scipy.ndimage import gaussian_filter

    frames = []
    blur = BLUR * clip.shape[1] / render.FRAME_SIZE
    for frame in clip:
        soft = gaussian_filter(frame.astype(np.float32), (blur, blur, 0))
        noisy = soft + NOISE * rng.standard_normal(soft.shape, dtype=np.float32)
        buffer = io.BytesIO()
        image = Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
        frames.append(np.asarray(Image.open(buffer)))
    return np.stack(frames)


def through_vae(folder: str) -> Callable[[Clip], Clip]:
    """A function that encodes a clip with a video VAE and decodes it again."""
    from diffusers import AutoencoderKLWan

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = AutoencoderKLWan.from_pretrained(folder).to(device).eval()

    @torch.no_grad()
    def reconstruct(clip: Clip) -> Clip:
        video = torch.from_numpy(clip).to(device).permute(3, 0, 1, 2)[None] / 127.5 - 1
        return as_clip(vae.decode(vae.encode(video).latent_dist.mode()).sample[0].cpu())

    return reconstruct


def wrong_prompts(scene: Scene, params: placement.ClipParams, rng: random.Random) -> list[Control]:
    """Meanings that differ in one property from what a clip of `scene` shows."""
    controls: list[Control] = []
    which = rng.randrange(len(scene.objects))
    objects, used = scene.objects, {o.colour for o in scene.objects}

    def other(values: tuple[str, ...], *but: str | None) -> str:
        return rng.choice([v for v in values if v not in but])

    def add(column: str, why: str, **changes: object) -> None:
        controls.append((column, why, replace(scene, **changes)))  # type: ignore[arg-type]

    def with_object(**changes: str) -> tuple[ObjectSpec, ...]:
        changed = replace(objects[which], **changes)  # type: ignore[arg-type]
        return tuple(changed if i == which else o for i, o in enumerate(objects))

    add("colour", "other colour", objects=with_object(colour=other(COLOURS, *used)))
    shape = other(SHAPES, objects[which].shape)
    add("shape", "other shape", objects=with_object(shape=shape))
    is_large = float(params.radius[0, which]) > sum(sum(r) for r in placement.RADIUS.values()) / 4
    add("size", "other size", objects=with_object(size="small" if is_large else "large"))
    if len(objects) == 2:
        shapes = [o.shape for o in objects]
        if shapes[0] != shapes[1]:
            swapped = tuple(
                replace(o, shape=s) for o, s in zip(objects, reversed(shapes), strict=True)
            )
            add("shape", "shapes exchanged", objects=swapped)
        add(
            "count",
            "one object asked for",
            objects=objects[:1],
            motions=(Motion(kind="still"),),
            relation="single",
        )
    else:
        extra = ObjectSpec(colour=other(COLOURS, *used), shape="circle")
        add(
            "count",
            "two objects asked for",
            objects=(*objects, extra),
            motions=scene.motions * 2,
            relation="independent",
        )
    for why, motion in _other_motions(scene.motions[0], rng):
        motions = (motion, *scene.motions[1:])
        relation = "single" if len(objects) == 1 else "independent"
        add("direction", why, motions=motions, relation=relation)
    controls += _wrong_relations(scene, rng)
    shown_pattern = PATTERNS[int(params.pattern[0])]
    shown_tone = TONES[int(params.tone[0])]
    tone = other(TONES, shown_tone)
    add("background", "other tone", tone=tone, pattern=shown_pattern)
    pattern = other(PATTERNS, shown_pattern)
    add("background", "other pattern", tone=shown_tone, pattern=pattern)
    return controls


def _other_motions(motion: Motion, rng: random.Random) -> list[tuple[str, Motion]]:
    def going(*but: str | None) -> str:
        return rng.choice([d for d in DIRECTIONS if d not in but])

    moving = ("still instead", Motion(kind="still"))
    if motion.kind == "still":
        return [("moving instead", Motion(kind="move", direction=going()))]
    if motion.kind == "meet":
        return [moving]
    others = [moving, ("other direction", Motion(kind="move", direction=going(motion.direction)))]
    if motion.kind == "bounce":
        other = rng.choice([d for d in CARDINALS if d != motion.direction])
        others.append(("bounce elsewhere", Motion(kind="bounce", direction=other)))
        others.append(("move, no bounce", Motion(kind="move", direction=motion.direction)))
    else:
        edge = next((d for d in CARDINALS if d in (motion.direction or "")), "left")
        others.append(("bounce, no move", Motion(kind="bounce", direction=edge)))
    return others


def _wrong_relations(scene: Scene, rng: random.Random) -> list[Control]:
    if len(scene.objects) == 1:
        return []
    first, second = scene.motions
    way = first.direction or second.direction or rng.choice(DIRECTIONS)
    move = Motion(kind="move", direction=way)
    back = Motion(kind="move", direction=OPPOSITE[way])
    meet = Motion(kind="meet")
    relations = {"same": (move, move), "opposite": (move, back), "meeting": (meet, meet)}
    controls = []
    for relation, motions in relations.items():
        # Independent objects may move as if tied, and those that meet do go opposite ways.
        fits = set(scene.motions) == set(motions) or scene.relation == relation
        if not fits and not (scene.relation == "meeting" and relation == "opposite"):
            column = "direction" if relation == "meeting" else "tied"
            wrong = replace(scene, relation=relation, motions=motions)
            controls.append((column, f"{relation} instead", wrong))
    return controls


def shift_background(params: placement.ClipParams, size: int, periods: float = 0.5) -> Clip:
    """The clip of one scene with its stripes or checks drifting by `periods` over time."""
    frames = params.path.shape[2]
    values = {n: v.expand(frames, *v.shape[1:]) for n, v in vars(params).items()}
    values["path"] = params.path[0].permute(1, 0, 2)[:, :, None]
    values["phase"] = params.phase + torch.linspace(0, periods, frames)
    # [3, T, S, S]
    video = render.render(placement.ClipParams(**values), size)[:, :, 0].transpose(0, 1)
    return as_clip(video)


def spoiled_clips(
    scene: Scene, params: placement.ClipParams, clip: Clip
) -> list[tuple[str, str, Clip]]:
    """Clips of a scene that went wrong: which check should fail, why, and the clip."""
    spoiled = []
    if any(m.kind != "still" for m in scene.motions):
        spoiled.append(("direction", "frozen", np.repeat(clip[:1], len(clip), axis=0)))
    if PATTERNS[int(params.pattern[0])] in ("striped", "checked"):
        spoiled.append(("steady", "drifting background", shift_background(params, clip.shape[1])))
    flicker = (clip * np.linspace(0.8, 1, len(clip))[:, None, None, None]).astype(np.uint8)
    if clip[0].mean() > 64:
        spoiled.append(("steady", "brightening", flicker))
    return spoiled


def agreement(
    scenes: int, size: int, seed: int = 0, kinds: Kinds | None = None
) -> tuple[dict[str, dict[str, float]], float]:
    """Hold clips against their own prompts.

    Returns:
        For each of `kinds` (by default "as rendered"), a function that changes a clip first, the
        percent of clips that pass each check; and the median of the seconds per clip.
    """
    rng = random.Random(seed)
    kinds = kinds or {"as rendered": None}
    results: dict[str, list[adherence.Adherence]] = {kind: [] for kind in kinds}
    seconds = []
    for i in range(scenes):
        scene = sample_scene(rng, held_out=i % 4 == 0)
        _, clip = draw(scene, rng, size)
        for kind, change in kinds.items():
            changed = change(clip) if change else clip
            start = time.perf_counter()
            results[kind].append(adherence.measure(changed, scene))
            seconds.append(time.perf_counter() - start)
    tables = {kind: adherence.summary(found) for kind, found in results.items()}
    return tables, statistics.median(seconds)


def control_rates(scenes: int, size: int, seed: int = 0) -> dict[tuple[str, str], list[bool]]:
    """For each kind of control, whether its check failed as it should."""
    rng = random.Random(seed)
    failed: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for _ in range(scenes):
        scene = sample_scene(rng)
        params, clip = draw(scene, rng, size)
        found = segment(clip)
        for column, why, wrong in wrong_prompts(scene, params, rng):
            failed[column, why].append(getattr(adherence.check(found, wrong), column) is False)
        for column, why, bad in spoiled_clips(scene, params, clip):
            failed[column, why].append(getattr(adherence.measure(bad, scene), column) is False)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--controls", type=int, help="scenes for the controls (default: a third)")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae", help="folder of an AutoencoderKLWan to pass the clips through too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    noise = np.random.default_rng(args.seed)
    kinds: Kinds = {"as rendered": None, "degraded": lambda clip: degrade(clip, noise)}
    if args.vae:
        kinds["through VAE"] = through_vae(args.vae)
    tables, seconds = agreement(args.scenes, args.size, args.seed, kinds)
    print(f"{args.scenes} clips of 25x{args.size}x{args.size}, {seconds:.3f} s each to measure")
    print(f"\n{'passed, %':<12}{'clips':>7}" + "".join(f"{kind:>13}" for kind in kinds))
    for name in adherence.COLUMNS:
        number = int(tables["as rendered"][f"{name}_n"])
        shares = "".join(f"{table[name]:>13.2f}" for table in tables.values())
        print(f"{name:<12}{number:>7}{shares}", flush=True)
    print(f"\n{'rightly failed, %':<36}{'clips':>7}")
    controls = args.controls or max(1, args.scenes // 3)
    for (column, why), failed in sorted(control_rates(controls, args.size, args.seed).items()):
        rate = 100 * sum(failed) / len(failed)
        print(f"{column:<12}{why:<24}{len(failed):>7}{rate:>10.2f}")


if __name__ == "__main__":
    main()
