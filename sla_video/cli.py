"""The command line: parse, build a config, call the library once, print.

Heavy imports are inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sla_video import __version__, cli_finetune, cli_report
from sla_video.cli_calibrate import calibrate
from sla_video.cli_generate import generate
from sla_video.cli_options import Device, Dtype
from sla_video.cli_tune import tune
from sla_video.console import PROGRAM, run_command, set_up_messages

app = typer.Typer(
    name=PROGRAM,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say what is chosen, for instance which kernels.")
    ] = False,
) -> None:
    """Fast video diffusion: SLA2 sparse-linear attention for Wan pipelines in Diffusers.

    \b
    Example:
      sla-video generate "a red circle moves left on a white background"
    """
    set_up_messages(verbose=verbose)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(generate)
app.command()(calibrate)
app.command()(tune)
cli_finetune.register(app)
cli_report.register(app)


@app.command()
def bench(
    context: typer.Context,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens; may be repeated.  [default: 7168; on a GPU Wan's at 480p and 720p]"
        ),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads.  [default: 4; on a GPU 12]")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Numbers in a head.  [default: 64; on a GPU 128]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            help="Share left to the linear branch; may be repeated.  [default: 0.9, 0.95, 0.97]"
        ),
    ] = None,
    sparse_dtype: Annotated[
        str | None,
        typer.Option(
            help="bf16, int8, int8_fp8 or int8_int8.  [default: bf16; on a GPU the fastest it has]"
        ),
    ] = None,
    growth: Annotated[
        bool | None,
        typer.Option(help="Also time 8192 to 524288 tokens.  [default: on a GPU without a shape]"),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed runs; medians are shown.  [default: 5; on a GPU for seconds]"),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="First find the fastest launches of the kernels, for later runs too."
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write everything there; - for stdout."),
    ] = None,
) -> None:
    """Time dense attention and SLA2 on this machine.

    On a GPU each figure is preceded by a comparison with the float64 reference, and other
    attention packages are timed too where they are installed.

    \b
    Examples:
      sla-video bench
      sla-video bench --length 7168 --heads 4 --head-dim 64 --sparsity 0.97 --json times.json
    """
    from sla_video.pipelines.attention_bench import BenchRequest, bench_attention, bench_tables
    from sla_video.pipelines.json_file import JsonFile
    from sla_video.pipelines.progress import TerminalProgress

    request = BenchRequest(
        lengths=tuple(length) if length else None,
        heads=heads,
        head_dim=head_dim,
        batch=batch,
        sparsities=tuple(sparsity or (0.9, 0.95, 0.97)),
        sparse_dtype=sparse_dtype,
        growth=growth,
        device=device,
        dtype=dtype,
        repeats=repeats,
        tune=tune,
    )
    file = JsonFile(json_file)
    with TerminalProgress() as progress:
        result = bench_attention(request, progress=progress, command=context.obj)
    if file.is_stdout:
        typer.echo(json.dumps(result, indent=2))
        return
    file.write(result)
    _print_tables(bench_tables(result))


@app.command()
def info(
    grammar: Annotated[
        bool, typer.Option("--grammar", help="Print what prompts the embedded model understands.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Show versions, devices, implementations of the operator, and models and routers at hand.

    \b
    Examples:
      sla-video info
      sla-video info --grammar
    """
    if grammar:
        from sla_video.pipelines.tiny_wan.grammar import GRAMMAR_TEXT

        typer.echo(GRAMMAR_TEXT)
        return
    from sla_video.pipelines.environment import describe_environment, environment_lines

    found = describe_environment()
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(environment_lines(found)))


def _print_tables(tables: Sequence[Any]) -> None:
    from rich.console import Console

    for table in tables:
        Console(width=100).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (default `sys.argv`) and return its exit code."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(
        lambda: command.main(
            args=given,
            prog_name=PROGRAM,
            standalone_mode=False,
            obj=shlex.join([PROGRAM, *given]),
        )
    )


if __name__ == "__main__":
    sys.exit(main())
