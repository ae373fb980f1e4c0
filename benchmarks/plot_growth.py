"""Plot how time grows with the length, from what `sla-video bench --json FILE` has written.

pip install matplotlib
python benchmarks/plot_growth.py benchmarks/results/h100.json --out docs/time-by-length.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# As in the JSON -> in the legend, and its colour and mark.
CURVES = {
    "dense FlashAttention-2": ("dense, FlashAttention-2", "tab:gray", "s"),
    "dense cuDNN": ("dense, cuDNN", "tab:blue", "o"),
    "SLA2": ("SLA2, whole operator", "tab:red", "D"),
}


def curves(growth: Mapping[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Name -> lengths and milliseconds, where it ran."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for name in CURVES:
        rows = [row for row in growth["rows"] if name in row["milliseconds"]]
        if rows:
            times = [row["milliseconds"][name] for row in rows]
            found[name] = [row["length"] for row in rows], times
    return found


def tokens(length: int) -> str:
    """8192 -> "8k"."""
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def plot(result: Mapping[str, Any], out: Path) -> None:
    """Draw both axes in logarithms, so that a power of the length is a straight line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    growth = result["growth"]
    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150)
    for name, (lengths, times) in curves(growth).items():
        label, colour, mark = CURVES[name]
        axes.plot(lengths, times, color=colour, marker=mark, markersize=4, label=label)
        axes.annotate(
            f"{times[-1]:,.0f} ms" if times[-1] >= 10 else f"{times[-1]:.2g} ms",
            (lengths[-1], times[-1]),
            textcoords="offset points",
            xytext=(7, -3),
            ha="left",
            fontsize=8,
            color=colour,
        )
    lengths = [row["length"] for row in growth["rows"]]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [tokens(length) for length in lengths])
    # Room for the last label.
    axes.set_xlim(right=2 * lengths[-1])
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds, forward")
    axes.set_title(
        f"{growth['heads']} heads of {growth['head_dim']}, SLA2 at {growth['sparsity']:.0%} in "
        f"{result['sparse_dtype']}, {result['device_name']}",
        fontsize=10,
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    part = out.with_name(f".{out.name}.part")
    figure.savefig(part, format=out.suffix.lstrip(".") or "png")
    os.replace(part, out)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="written by `sla-video bench --json`")
    parser.add_argument("--out", type=Path, default=Path("docs/time-by-length.png"))
    args = parser.parse_args(arguments)
    result = json.loads(args.json.read_text(encoding="utf-8"))
    if not result.get("growth"):
        sys.exit(f"{args.json} has no growth: it was written without a GPU or with --no-growth")
    plot(result, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
