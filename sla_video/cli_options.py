"""Options that several commands have, in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sla_video.pipelines.errors import InputError

Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Read the prompts from a text file, one a line."),
]
Model = Annotated[
    str,
    typer.Option(help="The embedded tiny-wan, a folder of a Diffusers Wan pipeline, or a hub id."),
]
DenseSteps = Annotated[
    int | None,
    typer.Option(help="First steps with full attention.  [default: the model's own]"),
]
TokenOrder = Annotated[
    str | None,
    typer.Option(
        help="Order of the tokens that blocks are cut from: raster, hilbert, morton, tile:4,4,4 or "
        "axes:hwt.  [default: the routers', or raster]"
    ),
]
DenseLayers = Annotated[
    list[int] | None,
    typer.Option(
        "--dense-layer",
        help="Layer that keeps full attention, -1 for the last; may be repeated.",
    ),
]
DenoisingSteps = Annotated[
    int | None,
    typer.Option(help="Denoising steps.  [default: the model's own, at most 12; tiny-wan: 6]"),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="Weight of the prompt.  [default: the model's own]")
]
NegativePrompt = Annotated[
    str | None, typer.Option(help="What the videos should not show; needs guidance.")
]
CaptureMemory = Annotated[
    float,
    typer.Option(
        help="GiB of host memory for captures; where it is short the pipeline runs again for each "
        "group of layers."
    ),
]
Frames = Annotated[
    int | None,
    typer.Option(help="Number of frames, 4k+1 for Wan.  [default: the model's own]"),
]
Height = Annotated[int | None, typer.Option(help="Height in pixels.  [default: the model's own]")]
Width = Annotated[int | None, typer.Option(help="Width in pixels.  [default: the model's own]")]
Offload = Annotated[
    bool,
    typer.Option("--offload", help="Keep idle parts of the model in host memory (slower)."),
]
Record = Annotated[
    bool,
    typer.Option(
        "--record",
        help="Measure what attention loses in each step, for `sla-video report` (slower).",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:N or mps.  [default: a GPU if there is one]")
]
Dtype = Annotated[
    str | None, typer.Option(help="fp32, bf16 or fp16.  [default: fp32 on a CPU, else bf16]")
]


def given_prompts(prompt: list[str] | None, prompts: Path | None) -> tuple[str, ...]:
    """Prompts that were given as arguments, or in a file.

    Raises:
        InputError: both, or a file that cannot be read.
    """
    from sla_video.pipelines.generation_request import read_prompts

    if prompt and prompts is not None:
        raise InputError("give prompts as arguments or with --prompts, not both")
    return tuple(prompt or ()) if prompts is None else read_prompts(prompts)
