"""`sla-video calibrate`: fit routers to a model. Heavy imports are inside the command."""

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


def calibrate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            help="Videos of the kind the model is for; two or more.  [default: for tiny-wan four "
            "scenes of its world]"
        ),
    ] = None,
    prompts: Prompts = None,
    model: Model = "tiny-wan",
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Share left to the linear branch; may be repeated, and makes one folder for "
            "each.  [default: 0.95]"
        ),
    ] = None,
    mean_sparsity: Annotated[
        float | None,
        typer.Option(help="Instead: this mean over the layers, each with what suits it."),
    ] = None,
    target_recall: Annotated[
        float | None,
        typer.Option(help="Instead: as sparse as this mean recall over the layers allows."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the routers are written.")
    ] = Path("routers"),
    steps: Annotated[int, typer.Option(help="Steps of the fit of each layer.")] = 300,
    trainable: Annotated[
        str,
        typer.Option(
            help="router+alpha; alpha keeps the heuristic router, router the training-free mix."
        ),
    ] = "router+alpha",
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the router.  [default: 0.003]")
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="Temperature of the soft top-k at the end.  [default: 0.03]"),
    ] = None,
    alpha: Annotated[
        str, typer.Option(help="adaptive, or per_block: the paper's table, for one resolution.")
    ] = "adaptive",
    router_per_head: Annotated[
        bool, typer.Option("--router-per-head", help="A router for each head, not each layer.")
    ] = False,
    phi_k: Annotated[
        str, typer.Option(help="Keys of the linear branch: smoothed (mean removed) or raw.")
    ] = "smoothed",
    token_order: Annotated[
        str,
        typer.Option(
            help="Order of the tokens that blocks are cut from: raster, hilbert, morton, "
            "tile:4,4,4 or axes:hwt. It is saved with the routers."
        ),
    ] = "raster",
    dense_layers: DenseLayers = None,
    dense_steps: DenseSteps = None,
    capture_steps: Annotated[
        int, typer.Option(help="Denoising steps captured of each prompt.")
    ] = 4,
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
            help="Keep captures on disk instead: the same command goes on after an interruption, "
            "and removes them when it is done.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of noise and samples.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    offload: Offload = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace routers that exist.")
    ] = False,
) -> None:
    """Fit routers to a model: minutes, no training data.

    Runs the model with full attention on a few prompts, fits the router of each layer to what its
    attention did there, and prints how close each layer comes. The folder is for
    `sla-video generate --routers` and `enable_sla`.

    \b
    Examples:
      sla-video calibrate --sparsity 0.95 --sparsity 0.97 --out routers
      sla-video calibrate --prompts prompts.txt --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      sla-video calibrate --mean-sparsity 0.95 --out routers-by-layer
    """
    from rich.console import Console

    from sla_video.calibration.calibrate import calibrate as run
    from sla_video.calibration.calibration_request import CalibrationRequest
    from sla_video.calibration.report import report_table
    from sla_video.pipelines.progress import TerminalProgress

    choices: dict[str, Any] = {"alpha": alpha, "phi_k": phi_k, "trainable": trainable}
    request = CalibrationRequest(
        prompts=given_prompts(prompt, prompts),
        model=model,
        sparsities=tuple(sparsity or ()),
        mean_sparsity=mean_sparsity,
        target_recall=target_recall,
        out=out,
        steps=steps,
        learning_rate=learning_rate,
        tau=tau,
        router_per_head=router_per_head,
        token_order=token_order,
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
    with TerminalProgress() as progress:
        result = run(request, progress=progress)
    console = Console(stderr=True, width=110)
    for routers in result.routers:
        console.print(report_table(routers))
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result.seconds.items())
    typer.echo(seconds, err=True)
    for routers in result.routers:
        typer.echo(routers.folder)
