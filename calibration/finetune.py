"""Stage 2: fine-tune a Wan model to its sparse attention.

    accelerate launch -m sla_video.calibration.finetune --trainable lora --minutes 10 --out run

The options are the fields of `FinetuneConfig`; see calibration/FINETUNE.md.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from sla_video.pipelines.errors import InputError, one_line

if TYPE_CHECKING:
    from sla_video.calibration.finetune_config import FinetuneConfig


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune as `config` says, in this process and in those launched beside it.

    Returns:
        "step", whether it is "finished", and the "history" of losses and validations. The trained
        routers are in `config.out / "routers"`, and with trainable="full" the model in
        `config.out / "transformer"`.

    Raises:
        InputError: settings, model or data that cannot be used, no memory or disk left, or a loss
            that is not finite.
    """
    from sla_video.calibration.finetune_run import run

    return run(config)


def main() -> None:
    """The command line of `accelerate launch`; `sla-video finetune` is the same in one process."""
    import typer

    from sla_video.calibration.finetune_command import make_command

    def call(config: FinetuneConfig) -> None:
        try:
            finetune(config)
        except InputError as error:
            print(f"finetune: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from error

    app = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    app.command()(make_command(call))
    app()


if __name__ == "__main__":
    main()
