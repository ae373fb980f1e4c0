"""The quality table of tiny-wan: ways to attend at equal sparsity, trained alike.

    python benchmarks/quality_table.py --out runs/quality --steps 400
    python benchmarks/quality_table.py --out runs/quality --table

Each row of `ROWS` chooses blocks, mixes and trains in its own way. All are calibrated, fine-tuned
with the same number of steps, and judged on held-out prompts. What is finished lies in --out and is
not done again, so that a run may be stopped at any time. Several GPUs share the rows:
`CUDA_VISIBLE_DEVICES=0 … --shard 0/2`, `CUDA_VISIBLE_DEVICES=1 … --shard 1/2`. With `--together` a
row is trained once, for all sparsities in turns, and judged at each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from quality_rows import METHODS, ROWS, Row
from quality_training import starting_routers, train
from sla_attention import install_sla, load_projections

from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.tiny_wan import adherence, evaluate, fidelity
from sla_video.pipelines.tiny_wan.flow_matching import spread_rotary_positions
from sla_video.pipelines.tiny_wan.models import GUIDANCE_SCALE, STEPS, TEXT_POSITIONS
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE

# Of a report -> heading and factor.
COLUMNS = {
    "attention_rel_l1": ("rel-L1", 1),
    "recall": ("recall", 1),
    "velocity_error": ("velocity", 1),
    "psnr": ("PSNR", 1),
    "ssim": ("SSIM", 1),
    "colour": ("colour", 1),
    "shape": ("shape", 1),
    "direction": ("direction", 1),
    "all": ("all", 1),
    "seconds_per_video": ("ms", 1000),
}


class Table:
    """Makes the rows that `args` asks for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._judge: Judge | None = None

    def run(self) -> None:
        """Train and judge what is not finished; dense attention first."""
        args = self.args
        # A row that is judged again in another format follows the one that trains it.
        work: list[tuple[tuple[float, ...], list[str]]] = []
        turns = [tuple(args.sparsity)] if args.together else [(s,) for s in args.sparsity]
        for place, sparsities in enumerate(turns):
            groups: dict[str, list[str]] = {}
            for name in METHODS if args.few and place else args.rows or ROWS:
                groups.setdefault(ROWS[name].like or name, []).append(name)
            work += [(sparsities, names) for names in groups.values()]
        index, count = (int(x) for x in args.shard.split("/"))
        failed = False
        for sparsities, names in work[index::count]:
            for name in names:
                for sparsity in sparsities:
                    try:
                        self._make(name, sparsity, sparsities)
                    except (RuntimeError, ValueError, OSError):
                        # Out of memory, a loss that diverged, a full disk: others may still run.
                        print(f"{name} at {sparsity:g}: {traceback.format_exc()}", flush=True)
                        failed = True
        if failed:
            raise SystemExit(1)

    def _make(self, name: str, sparsity: float, sparsities: tuple[float, ...]) -> None:
        """Train a row as it asks, for all of `sparsities`, and judge it, unless that is done."""
        args, row = self.args, ROWS[name]
        report_file = self.folder(name, (sparsity,)) / "report.json"
        if report_file.is_file():
            return
        started = time.monotonic()
        folder = self.folder(row.like or name, sparsities)
        trained_as = ROWS[row.like or name]
        if trained_as.training is not None:
            train(trained_as, sparsities, args, folder)
        trained = time.monotonic()
        report = self.judge(row, sparsity, folder)
        report |= {"row": name, "sparsity": sparsity, "seed": args.seed}
        report |= {"trained_at": sparsities if trained_as.training is not None else (sparsity,)}
        report |= {"steps": args.steps, "seconds_to_train": trained - started}
        write(report_file, report)
        print(f"{trained - started:5.0f} s, {line(report)}", flush=True)

    def folder(self, name: str, sparsities: tuple[float, ...]) -> Path:
        """Where everything of a row lies that is trained at `sparsities`."""
        plain = "".join(c if c.isalnum() else "-" for c in name)
        at = "+".join(f"{sparsity:g}" for sparsity in sparsities)
        return Path(self.args.out) / f"{plain}@{at}-seed{self.args.seed}"

    def judge(self, row: Row, sparsity: float, folder: Path) -> dict[str, Any]:
        """What the held-out prompts say of a row whose training lies in `folder`."""
        if self._judge is None:
            self._judge = Judge(self.args, self.device)
            write(Path(self.args.out) / "dense.json", {"row": "dense", **self._judge.dense})
            print(f"        {line({'row': 'dense', **self._judge.dense})}", flush=True)
        routers = folder / "run" / "routers"
        if row.like is None and row.training is None:
            routers = starting_routers(row, sparsity, self.args)
        handle = enable_sla(
            self._judge.pipe,
            routers,
            sparsity=sparsity,
            dense_steps=0,
            sparse_dtype=row.judged_in,  # type: ignore[arg-type]
        )
        with handle:
            if row.sla:
                install_sla(handle, load_projections(folder / "projections.safetensors"))
            return self._judge.measure(handle)


class Judge:
    """The pipeline, its dense videos and the probe; all of it is made once.

    Args:
        args: `model`, `size` in pixels a side, and the number of `prompts`.
    """

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        self.pipe = evaluate.load_pipeline(args.model, None, "ema").to(device)
        self.pipe.set_progress_bar_config(disable=True)
        if args.size != FRAME_SIZE:
            spread_rotary_positions(self.pipe.transformer, args.size // 8, FRAME_SIZE // 8)
        self.device = torch.device(device)
        self.settings = argparse.Namespace(
            size=args.size,
            steps=STEPS,
            guidance_scale=GUIDANCE_SCALE,
            text_positions=TEXT_POSITIONS[0],
            batch_size=40,
        )
        self.scenes, self.prompts = evaluate.held_out_prompts(args.prompts)
        self.probe = fidelity.make_probe(self.pipe, size=args.size)
        self.videos, self.dense = self._generate()

    def _generate(self) -> tuple[Any, dict[str, Any]]:
        numbers = list(range(len(self.prompts)))
        videos, seconds = evaluate.generate_all(self.pipe, self.prompts, numbers, self.settings)
        found = adherence.summary(adherence.measure_many(videos, self.scenes))
        report: dict[str, Any] = {k: v for k, v in found.items() if not math.isnan(v)}
        return videos, {**report, "seconds_per_video": seconds / len(numbers)}

    def measure(self, handle: SLAHandle) -> dict[str, Any]:
        """Adherence, distance to the dense videos and fidelity with whatever is enabled."""
        videos, report = self._generate()
        paired = evaluate.paired_distance(videos, self.videos, self.device)
        report |= {name: sum(values) / len(values) for name, values in paired.items()}
        return report | fidelity.measure_fidelity(self.pipe, handle, self.probe)


def write(path: Path, value: Any) -> None:
    """JSON, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1))
    os.replace(part, path)


def line(report: dict[str, Any]) -> str:
    """A report as a row of a Markdown table."""
    cells = [
        f"{report[key] * factor:.3g}" if key in report else ""
        for key, (_, factor) in COLUMNS.items()
    ]
    sparsity = f"{report['sparsity']:.0%}" if "sparsity" in report else ""
    turns = ", in turns" if len(report.get("trained_at", ())) > 1 else ""
    return f"| {report['row']}{turns} | {sparsity} | {' | '.join(cells)} |"


def print_table(out: Path, collect: Path | None = None) -> None:
    """All reports of `out`, by sparsity and then as in `ROWS`; as one JSON file too, if wanted."""
    heads = [head for head, _ in COLUMNS.values()]
    print("| attention | sparsity | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 2) + "|")
    dense = out / "dense.json"
    reports = [json.loads(path.read_text()) for path in out.glob("*/report.json")]
    order = list(ROWS)
    reports.sort(key=lambda r: (r["sparsity"], order.index(r["row"]), r["seed"]))
    if dense.is_file():
        reports.insert(0, json.loads(dense.read_text()))
    for report in reports:
        print(line(report))
    if collect is not None:
        write(collect, reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.97, 0.95, 0.9, 0.8])
    parser.add_argument(
        "--few",
        action="store_true",
        help="at all sparsities but the first only the rows that tell methods apart",
    )
    parser.add_argument(
        "--together", action="store_true", help="train each row once, for all sparsities in turns"
    )
    parser.add_argument("--steps", type=int, default=400, help="of stage 2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--world-clips", type=int, default=4096)
    parser.add_argument("--calibration-steps", type=int, default=300, help="of stage 1")
    parser.add_argument("--calibration-prompts", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=200, help="to judge by")
    parser.add_argument("--size", type=int, default=FRAME_SIZE, help="pixels a side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th row from I")
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--table", action="store_true", help="print what is finished")
    parser.add_argument("--collect", type=Path, help="with --table: a JSON file of all reports")
    args = parser.parse_args()
    if args.table:
        print_table(args.out, args.collect)
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Table(args).run()


if __name__ == "__main__":
    main()
