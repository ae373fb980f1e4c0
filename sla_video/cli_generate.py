"""`sla-video generate`: prompts, pictures and videos to videos.

Heavy imports are inside the command.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sla_video.cli_options import (
    DenseSteps,
    Device,
    Dtype,
    Frames,
    Height,
    Model,
    Offload,
    Prompts,
    Record,
    TokenOrder,
    Width,
    given_prompts,
)
from sla_video.console import print_videos


def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="What the video shows; several prompts make several videos."),
    ] = None,
    prompts: Prompts = None,
    model: Model = "tiny-wan",
    routers: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of trained routers; none is the training-free mode.  "
            "[default: the model's own, or none]"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Settings that sla-video tune chose for the model at a video size, or a hub id.",
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the attention that is left to the cheap linear branch, from 0 to below "
            "1.  [default: the model's own, or the routers']"
        ),
    ] = None,
    dense: Annotated[
        bool, typer.Option("--dense", help="Use the model's own full attention, to compare.")
    ] = False,
    dense_steps: DenseSteps = None,
    token_order: TokenOrder = None,
    sparse_dtype: Annotated[
        str | None,
        typer.Option(
            help="Number format of the sparse branch: bf16, int8, int8_fp8 or int8_int8.  "
            "[default: that of low-bit routers; else bf16, on a GPU the fastest it has]"
        ),
    ] = None,
    compress: Annotated[
        float | None,
        typer.Option(
            help="Share of the query-key pairs, above 0 to 1, that half of the layers compute in "
            "three of four steps; 0.5 drops half of the keys.  [default: all]"
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Denoising steps.  [default: the model's own]")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the prompt; 1 or less turns guidance off and halves the time.  "
            "[default: the model's own]"
        ),
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What the video should not show; needs guidance.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Picture that the video starts with."),
    ] = None,
    last_image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Picture that it ends with.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Video to start from; with VACE, to control by or edit."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Video or picture, white where VACE makes --video anew.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Share of --video that a text-to-video model makes anew.  [default: 0.8]"
        ),
    ] = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames a second.  [default: the model's own]")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Seed of the first video; each next one adds 1.  [default: random]"),
    ] = None,
    num_videos: Annotated[int, typer.Option(help="Videos of each prompt.")] = 1,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="An .mp4 file, or a folder for files named after prompt and seed.  "
            "[default: this folder]",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that exist.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep what an earlier run with this --seed has finished."),
    ] = False,
    record: Record = False,
) -> None:
    """Generate videos from prompts, and from pictures or videos where the model takes them.

    Writes an MP4 and beside it a JSON file with all settings, and prints the MP4's path. Under
    torchrun or accelerate launch, each process makes its share of the videos.

    \b
    Examples:
      sla-video generate "a red circle moves left on a white background"
      sla-video generate "a cat surfing" --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --out cat.mp4
      sla-video generate "a red circle moves left" --compress 0.5 --out compressed.mp4
      sla-video generate "it turns" --image cat.jpg --model Wan-AI/Wan2.2-TI2V-5B-Diffusers
      torchrun --nproc_per_node 4 -m sla_video.cli generate --prompts FILE --seed 0 --resume
    """
    from sla_video.pipelines.generation import generate as generate_videos
    from sla_video.pipelines.generation_request import GenerationRequest
    from sla_video.pipelines.processes import Team
    from sla_video.pipelines.progress import TerminalProgress

    with Team.join() as team:
        request = GenerationRequest(
            prompts=given_prompts(prompt, prompts),
            model=model,
            routers=routers,
            recipe=recipe,
            sparsity=sparsity,
            dense=dense,
            dense_steps=dense_steps,
            token_order=token_order,
            sparse_dtype=sparse_dtype,
            compress=compress,
            steps=steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            image=image,
            last_image=last_image,
            video=video,
            mask=mask,
            strength=strength,
            frames=frames,
            height=height,
            width=width,
            fps=fps,
            seed=seed,
            num_videos=num_videos,
            device=device,
            dtype=dtype,
            offload=offload,
            out=out,
            overwrite=overwrite,
            resume=resume,
            record=record,
        )
        with TerminalProgress(team.rank == 0) as progress:
            print_videos(generate_videos(request, progress=progress, team=team), team)
