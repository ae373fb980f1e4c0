"""`sla-video tune`: choose settings by measuring. Heavy imports are inside the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sla_video.cli_options import (
    CaptureMemory,
    DenoisingSteps,
    DenseLayers,
    DenseSteps,
    Device,
    Dtype,
    Frames,
    GuidanceScale,
    Height,
    Model,
    NegativePrompt,
    Offload,
    Prompts,
    Width,
    given_prompts,
)


def tune(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            help="Videos of the kind the model is for; the last of several judges.  [default: for "
            "tiny-wan four scenes of its world]"
        ),
    ] = None,
    prompts: Prompts = None,
    model: Model = "tiny-wan",
    target_recall: Annotated[
        float | None,
        typer.Option(help="As sparse as this mean recall over the layers allows.  [default: 0.95]"),
    ] = None,
    mean_sparsity: Annotated[
        float | None,
        typer.Option(help="Instead: this mean over the layers, at the least error."),
    ] = None,
    seconds_per_step: Annotated[
        float | None,
        typer.Option(help="Instead: a denoising step in this time here, at the least error."),
    ] = None,
    time_ratio: Annotated[
        float | None,
        typer.Option(help="Instead: in this share of the time that full attention takes."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where the recipe is written.")] = Path(
        "recipe.json"
    ),
    token_order: Annotated[
        list[str] | None,
        typer.Option(
            help="Order of the tokens to try: raster, hilbert, morton, tile:4,4,4 or axes:hwt; may "
            "be repeated.  [default: several, or the routers']"
        ),
    ] = None,
    routers: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of trained routers.  [default: training-free]"),
    ] = None,
    key_orders: Annotated[
        bool,
        typer.Option(help="Also try an order of the keys for each head; needs two prompts."),
    ] = True,
    compression: Annotated[
        bool,
        typer.Option(help="Also try attention among fewer tokens in most steps, by layer."),
    ] = True,
    sparse_dtype: Annotated[
        str, typer.Option(help="Number format of the recipe: bf16, int8, int8_fp8 or int8_int8.")
    ] = "bf16",
    max_minutes: Annotated[
        float | None,
        typer.Option(
            help="Stop after so long with the best so far; the same command goes on from there."
        ),
    ] = None,
    dense_layers: DenseLayers = None,
    dense_steps: DenseSteps = None,
    capture_steps: Annotated[
        int, typer.Option(help="Denoising steps looked at of each prompt.")
    ] = 2,
    denoising_steps: DenoisingSteps = None,
    guidance_scale: GuidanceScale = None,
    negative_prompt: NegativePrompt = None,
    frames: Frames = None,
    height: Height = None,
    width: Width = None,
    memory: CaptureMemory = 8.0,
    spill: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep captures on disk instead, until all is measured.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of noise and samples.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a recipe that exists.")
    ] = False,
) -> None:
    """Choose token order and sparsity of each layer by measuring: minutes, no training.

    Runs the model with full attention on a few prompts, measures what each layer would lose, and
    writes the choice as a recipe for `sla-video generate --recipe` and `enable_sla`. It holds for
    this model at this video size. What is measured is kept beside it until all is: the same command
    goes on after an interruption.

    \b
    Examples:
      sla-video tune --target-recall 0.9 --out recipe.json
      sla-video tune --time-ratio 0.5 --token-order raster --token-order hilbert
      sla-video tune --prompts prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --max-minutes 20
    """
    from rich.console import Console

    from sla_video.calibration.tune import tune as run
    from sla_video.calibration.tune_request import TuneRequest, state_of
    from sla_video.calibration.tuning_report import recipe_tables, summary
    from sla_video.pipelines.progress import TerminalProgress

    choices: dict[str, Any] = {"sparse_dtype": sparse_dtype}
    request = TuneRequest(
        out=out,
        target_recall=target_recall,
        mean_sparsity=mean_sparsity,
        seconds_per_step=seconds_per_step,
        time_ratio=time_ratio,
        token_orders=tuple(token_order or ()),
        routers=routers,
        key_orders=key_orders,
        compression=compression,
        max_minutes=max_minutes,
        prompts=given_prompts(prompt, prompts),
        model=model,
        dense_layers=tuple(dense_layers or ()),
        dense_steps=dense_steps,
        capture_steps=capture_steps,
        denoising_steps=denoising_steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        frames=frames,
        height=height,
        width=width,
        memory=memory,
        spill=spill,
        seed=seed,
        device=device,
        dtype=dtype,
        offload=offload,
        overwrite=overwrite,
        **choices,
    )
    try:
        with TerminalProgress() as progress:
            result = run(request, progress=progress)
    except (KeyboardInterrupt, SystemExit):
        state = state_of(out)
        if state.exists():
            typer.echo(f"what was measured is in {state}: the same command goes on", err=True)
        raise
    console = Console(stderr=True, width=110)
    for table in recipe_tables(result.recipe):
        console.print(table)
    for line in summary(result.recipe):
        typer.echo(line, err=True)
    if result.resumed:
        typer.echo(f"{result.resumed} measurements were there from an earlier run", err=True)
    if not result.complete:
        typer.echo("the time was up: the same command measures the rest", err=True)
    typer.echo(f"{result.seconds:.1f} s", err=True)
    typer.echo(result.path)
