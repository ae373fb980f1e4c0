"""Stacked bars of where the time of a forward goes, from `end_to_end.py --profile --json FILE`.

pip install matplotlib
python benchmarks/plot_end_to_end.py results.json --out docs/where-time-goes.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Part of a profile -> colour, from the bottom of a bar to its top.
COLOURS = {
    "self-attention": "tab:red",
    "cross-attention": "tab:orange",
    "linear layers": "tab:blue",
    "QK norm and RoPE": "tab:purple",
    "norms, modulation, activations": "tab:green",
    "copies": "tab:brown",
    "between blocks, and idle": "tab:gray",
}
LABELS = {"flash": "dense, FA2", "cudnn": "dense, cuDNN"}
# Above its bar, a number needs a part of at least this share of the highest one.
_LABELLED = 0.045


def bars(rows: Sequence[Mapping[str, Any]], mode: str) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> bar -> part -> milliseconds of a whole forward, of rows that were profiled.

    Blocks are all alike, so a part is that of one block times their number. What the timed forward
    took beyond that is the last part.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in sorted(rows, key=_place):
        if row["attention"].endswith("unfused"):
            continue
        if row["mode"] != mode or not row.get("parts") or not row.get("milliseconds"):
            continue
        parts = {name: row["layers"] * time for name, time in row["parts"].items()}
        rest = row["milliseconds"] - sum(parts.values())
        found.setdefault(row["model"], {})[_label(row)] = {
            **parts,
            "between blocks, and idle": max(rest, 0.0),
        }
    return found


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The smaller model first; dense before sparse, the slowest of each first."""
    dense = row.get("sparsity") is None
    other = row.get("linear") != "bf16", row.get("sparse_dtype") not in (None, "int8")
    return row.get("length", 0), not dense, other, -(row.get("milliseconds") or 0.0)


def _label(row: Mapping[str, Any]) -> str:
    name = row["attention"]
    label = LABELS.get(name) or f"SLA2 {row['sparsity']:.0%}" + (
        "" if row["sparse_dtype"] == "int8" else f", {row['sparse_dtype']}"
    )
    return label if row["linear"] == "bf16" else f"{label}\nFP8 linear"


def plot(rows: Sequence[Mapping[str, Any]], mode: str, out: Path) -> None:
    """One group of bars for each model, each group on a scale of its own."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = bars(rows, mode)
    widths = [len(found) for found in models.values()]
    figure, all_axes = pyplot.subplots(
        1,
        len(models),
        figsize=(1.5 + 1.1 * sum(widths) + 0.6 * len(widths), 4.6),
        dpi=150,
        squeeze=False,
        gridspec_kw={"width_ratios": widths},
    )
    for axes, (model, found) in zip(all_axes[0], models.items(), strict=True):
        highest = max(sum(parts.values()) for parts in found.values())
        for place, parts in enumerate(found.values()):
            bottom = 0.0
            for part, colour in COLOURS.items():
                height = parts.get(part, 0.0)
                axes.bar(place, height, 0.7, bottom, color=colour, label=part if not place else "")
                if height > _LABELLED * highest:
                    middle = bottom + height / 2
                    axes.annotate(
                        _short(height), (place, middle), ha="center", va="center",
                        fontsize=7, color="white",
                    )  # fmt: skip
                bottom += height
            axes.annotate(
                _short(bottom), (place, bottom), ha="center", va="bottom", fontsize=8, weight="bold"
            )
        axes.set_xticks(range(len(found)), list(found), fontsize=8)
        axes.set_ylim(top=1.08 * highest)
        length = next(row["length"] for row in rows if row["model"] == model)
        axes.set_title(f"Wan {model}, {length:,} tokens", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0][0].set_ylabel(f"milliseconds of one forward, {mode}")
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    figure.legend(
        handles, labels, loc="lower center", ncols=min(4, len(labels)), fontsize=8, frameon=False
    )
    part_file = out.with_name(f".{out.name}.part")
    figure.savefig(part_file, format=out.suffix.lstrip(".") or "png")
    os.replace(part_file, out)
    pyplot.close(figure)


def _short(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="written by `end_to_end.py --profile --json`")
    parser.add_argument("--mode", choices=["eager", "compiled"], default="compiled")
    parser.add_argument("--out", type=Path, default=Path("docs/where-time-goes.png"))
    args = parser.parse_args(arguments)
    rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    if not bars(rows, args.mode):
        sys.exit(f"{args.json} has no {args.mode} row with a profile: measure with --profile")
    plot(rows, args.mode, args.out)
    print(args.out)


if __name__ == "__main__":
    main()
