"""`sla-video report` and `sla-video compare`. Heavy imports are inside the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command()(report)
    app.command()(compare)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN",
            help="Videos of `sla-video generate`, or folders of them.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the page and its pictures are written.")
    ] = Path("report"),
    frames: Annotated[int, typer.Option(help="Frames shown of each video.")] = 5,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report that exists.")
    ] = False,
) -> None:
    """Show what runs were, cost and lost: one HTML page that needs nothing else, and pictures.

    Recall by layer and step, error and density need runs made with `--record`. A run made with
    `--dense` of the same prompt, seed and size is what the others' PSNR and SSIM refer to.

    \b
    Examples:
      sla-video generate "a red circle moves left" --seed 0 --record --out runs
      sla-video generate "a red circle moves left" --seed 0 --dense --out runs
      sla-video report runs --out report
    """
    from sla_video.pipelines.progress import TerminalProgress
    from sla_video.pipelines.reports.report import write_report

    with TerminalProgress() as progress:
        page = write_report(runs, out=out, frames=frames, overwrite=overwrite, progress=progress)
    typer.echo(page)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.mp4", help="A video.")],
    second: Annotated[
        Path, typer.Argument(metavar="B.mp4", help="Another of the same size and length.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a video: A, B, and their difference."),
    ] = None,
    amplify: Annotated[
        float, typer.Option(help="How many times the difference is amplified there.")
    ] = 4.0,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every frame's numbers; - for stdout."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the video if it exists.")
    ] = False,
) -> None:
    """Measure how far two videos of one seed are apart: PSNR, SSIM, and LPIPS if it is at hand.

    \b
    Examples:
      sla-video compare dense.mp4 sparse.mp4
      sla-video compare dense.mp4 sparse.mp4 --out side-by-side.mp4 --json distance.json
    """
    from rich.console import Console
    from rich.table import Table

    from sla_video.pipelines.json_file import JsonFile
    from sla_video.pipelines.progress import TerminalProgress
    from sla_video.pipelines.reports.comparison import METRICS, compare_videos

    file = JsonFile(json_file)
    with TerminalProgress() as progress:
        result = compare_videos(
            first, second, out=out, amplify=amplify, overwrite=overwrite, progress=progress
        )
    found = result.to_dict()
    file.write(found)
    if file.is_stdout:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("", "mean", "worst", "at frame")
    for name in result.metrics:
        frame, value = result.distance.worst(name)
        table.add_row(
            METRICS[name], f"{result.distance.mean(name):.4g}", f"{value:.4g}", f"{frame}"
        )
    Console(width=100).print(table)
    for reason in found["left_out"]:
        typer.echo(f"left out: {reason}", err=True)
    if out is not None:
        typer.echo(out)
