"""The command of stage 2, made of the settings: each field is an option with its help."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from sla_video.calibration.finetune_config import FinetuneConfig

HELP = """Fine-tune a model to its sparse attention: routers, LoRA or all weights.

Writes checkpoints, and at the end routers that `generate --routers` takes. For several GPUs:
accelerate launch -m sla_video.calibration.finetune, with the same options.

\b
Examples:
  sla-video finetune --trainable lora --sparsity 0.97 --minutes 10 --out run
  sla-video finetune --model WAN-FOLDER --data VIDEOS --max-steps 500 --out run
"""
_TYPES: dict[str, Any] = {
    "str": str,
    "str | None": str | None,
    "int": int,
    "int | None": int | None,
    "float": float,
    "float | None": float | None,
    "bool": bool,
    "bool | None": bool | None,
    "Path": Path,
    "Path | None": Path | None,
    "tuple[float, ...]": list[float],
    "tuple[str, ...]": list[str],
}


def make_command(call: Callable[[FinetuneConfig], None]) -> Callable[..., None]:
    """A function that Typer turns into a command: it builds the settings and hands them on."""
    parameters = []
    for field in dataclasses.fields(FinetuneConfig):
        flag = "--" + field.name.replace("_", "-")
        kind = _TYPES[str(field.type)]
        if kind in (bool, bool | None):
            flag += f"/--no-{flag[2:]}"
        default = field.default
        if default is dataclasses.MISSING:
            assert field.default_factory is not dataclasses.MISSING
            default = list(field.default_factory())
        option = typer.Option(flag, help=field.metadata["help"])
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, option],
            )
        )

    def finetune(**values: Any) -> None:
        call(FinetuneConfig(**values))

    finetune.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    finetune.__annotations__ = {p.name: p.annotation for p in parameters}
    finetune.__doc__ = HELP
    return finetune
