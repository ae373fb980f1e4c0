"""`sla-video finetune`: its options are the settings of stage 2."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from sla_video.calibration.finetune_command import make_command

if TYPE_CHECKING:
    from sla_video.calibration.finetune_config import FinetuneConfig


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="finetune")(make_command(_finetune))


def _finetune(config: FinetuneConfig) -> None:
    from sla_video.calibration.finetune import finetune

    result = finetune(config)
    if not result["finished"]:
        typer.echo(f"stopped at step {result['step']}; --resume goes on", err=True)
        return
    typer.echo(config.out / "routers")
    sys.stdout.flush()
