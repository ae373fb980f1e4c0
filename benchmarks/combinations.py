"""What all combinations of settings cost on the embedded model: quality and seconds.

    python benchmarks/combinations.py --out runs/combinations --prompts 100
    python benchmarks/combinations.py --out runs/combinations --table --json combinations.json

A JSON file says what is combined (default: `combinations.json` beside this script): under "axes"
each axis with its choices by name, under "base" what holds for all. Choices are fields of
`SLAConfig`; "routers" (a folder), "recipe" (a file, in the place of all else) and
"choose_key_orders" (true: by a few prompts of the model's world, as `sla-video tune` does) are
understood, too. An entry of "also" is one more combination by name. Each is judged as in the
quality table: by videos of held-out prompts, whether they show what the prompt says and how far
they are from those of full attention; and by the velocity, attention and recall on noised held-out
clips. What is finished lies in --out and is not done again; several GPUs share the rest: `--shard
0/2`, `--shard 1/2`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from quality_table import COLUMNS, Judge, write

from sla_video.calibration.calibration_request import world_prompts
from sla_video.calibration.key_orders import choose_for_model
from sla_video.config import SLAConfig
from sla_video.pipelines.errors import InputError, one_line
from sla_video.pipelines.handle import SLAHandle
from sla_video.pipelines.json_file import JsonFile
from sla_video.pipelines.patching import enable_sla
from sla_video.pipelines.recipe import load_recipe
from sla_video.pipelines.router_files import load_routers
from sla_video.pipelines.tiny_wan import evaluate
from sla_video.pipelines.tiny_wan.models import GUIDANCE_SCALE, TEXT_POSITIONS
from sla_video.pipelines.tiny_wan.render import FRAME_SIZE, NUM_FRAMES

_SETTINGS = Path(__file__).with_name("combinations.json")
_BESIDE_CONFIG = ("routers", "recipe", "choose_key_orders")
# Of the velocity with everything selected, in bfloat16: the order of the tokens must not matter.
_EXACT = 0.02
# Prompts that key orders are chosen by; the last judges.
_CHOOSING_PROMPTS = 4

Combination = dict[str, Any]


def read_combinations(path: Path) -> dict[str, Combination]:
    """Name -> settings of every combination that the file asks for.

    Raises:
        InputError: it cannot be read, or asks for settings that do not exist.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        base, axes = dict(values.get("base", {})), dict(values.get("axes", {}))
        also = dict(values.get("also", {}))
        found: dict[str, Combination] = {}
        for choices in itertools.product(*(axis.items() for axis in axes.values())) if axes else ():
            settings = copy.deepcopy(base)
            for _, choice in choices:
                settings |= choice
            found[", ".join(name for name, _ in choices)] = settings
        found |= {name: base | settings for name, settings in also.items()}
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no combinations: {one_line(error)}") from error
    if not found:
        raise InputError(f'{path} holds no combinations: it has neither "axes" nor "also"')
    for name, settings in found.items():
        try:
            config_of(settings)
            if "recipe" in settings:
                load_recipe(settings["recipe"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{path}: {name}: {one_line(error)}") from error
    return found


def config_of(settings: Mapping[str, Any]) -> SLAConfig:
    """The settings of SLA attention of a combination."""
    fields = {name: value for name, value in settings.items() if name not in _BESIDE_CONFIG}
    return SLAConfig.from_dict(fields)


def enable(pipe: Any, settings: Mapping[str, Any], size: int) -> SLAHandle:
    """Put a combination in place."""
    if "recipe" in settings:
        return enable_sla(pipe, recipe=settings["recipe"])
    config = config_of(settings)
    if settings.get("choose_key_orders"):
        config = config.replace(key_orders=_key_orders(pipe, settings, config, size))
    return enable_sla(pipe, settings.get("routers"), config=config)


def _key_orders(
    pipe: Any, settings: Mapping[str, Any], config: SLAConfig, size: int
) -> dict[str, Any]:
    """An order of keys for each head, chosen on scenes that the model was trained on."""
    routers = load_routers(settings["routers"]).routers if "routers" in settings else None
    return choose_for_model(
        pipe,
        world_prompts(_CHOOSING_PROMPTS, 0),
        frames=NUM_FRAMES,
        height=size,
        width=size,
        denoising_steps=6,
        guidance_scale=GUIDANCE_SCALE,
        max_sequence_length=TEXT_POSITIONS[0],
        config=config,
        routers=routers,
    )


class Combinations:
    """Judges combinations, and keeps the reports in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.combinations = read_combinations(args.combinations)
        self._judge: Judge | None = None
        self._checked: set[str] = set()

    def run(self) -> bool:
        """Judge what is not finished of this shard; whether all could be."""
        index, count = (int(part) for part in self.args.shard.split("/"))
        done = True
        for name in list(self.combinations)[index::count]:
            if self.file(name).is_file():
                continue
            try:
                self._make(name, self.combinations[name])
            except (RuntimeError, ValueError, OSError) as error:
                # Others may still be possible.
                print(f"{name}: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
                done = False
        return done

    def file(self, name: str) -> Path:
        """The report of a combination."""
        plain = "".join(c if c.isalnum() else "-" for c in name)
        return Path(self.args.out) / f"{plain}.json"

    def _make(self, name: str, settings: Combination) -> None:
        judge = self._get_judge()
        started = time.monotonic()
        order = "recipe" if "recipe" in settings else config_of(settings).token_order
        if order not in self._checked | {"recipe"}:
            self._check_exact(judge, order)
            self._checked.add(order)
        with enable(judge.pipe, settings, self.args.size) as handle:
            self._warm_up(judge)
            report = {"combination": name, "settings": settings, **judge.measure(handle)}
        report |= {"prompts": self.args.prompts, "size": self.args.size}
        write(self.file(name), report)
        print(f"{line(report)}  {time.monotonic() - started:.0f} s", flush=True)

    def _get_judge(self) -> Judge:
        if self._judge is None:
            self._judge = Judge(self.args, self.args.device)
            dense = {"combination": "dense", **self._judge.dense, "prompts": self.args.prompts}
            write(Path(self.args.out) / "dense.json", dense)
            print(line(dense), flush=True)
        return self._judge

    def _check_exact(self, judge: Judge, order: str) -> None:
        """With all blocks selected, attention in any order is full attention."""
        from sla_video.pipelines.tiny_wan.fidelity import measure_fidelity

        with enable_sla(judge.pipe, config=SLAConfig(sparsity=0, token_order=order)) as handle:
            error = measure_fidelity(judge.pipe, handle, judge.probe)["velocity_error"]
        if not error < _EXACT:
            raise RuntimeError(f"with all blocks selected, {order} is wrong by {error:.3g}")

    def _warm_up(self, judge: Judge) -> None:
        """Compile and tune kernels before anything is timed."""
        steps, judge.settings.steps = judge.settings.steps, 2
        try:
            some = judge.prompts[: judge.settings.batch_size]
            evaluate.generate(judge.pipe, some, 0, judge.settings)
        finally:
            judge.settings.steps = steps


def line(report: Mapping[str, Any]) -> str:
    """A report as a row of a Markdown table."""
    cells = [
        f"{report[key] * factor:.3g}" if report.get(key) is not None else ""
        for key, (_, factor) in COLUMNS.items()
    ]
    return f"| {report['combination']} | {' | '.join(cells)} |"


def print_table(combinations: Combinations, output: JsonFile) -> None:
    """Dense attention, and what is finished, in the order of the file."""
    files = [Path(combinations.args.out) / "dense.json"]
    files += [combinations.file(name) for name in combinations.combinations]
    reports = [json.loads(file.read_text()) for file in files if file.is_file()]
    if output.is_stdout:
        print(json.dumps(reports, indent=2))
        return
    print("| combination | " + " | ".join(head for head, _ in COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for report in reports:
        print(line(report))
    output.write(reports)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the reports")
    parser.add_argument("--combinations", type=Path, default=_SETTINGS, metavar="FILE")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--size", type=int, default=FRAME_SIZE, help="pixels a side")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do every N-th from I")
    parser.add_argument("--model", default="tiny-wan")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--table", action="store_true", help="only print what is finished")
    parser.add_argument("--json", type=Path, help="all reports in one file; - for stdout")
    args = parser.parse_args()
    try:
        output = JsonFile(args.json)
        combinations = Combinations(args)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        done = args.table or combinations.run()
        print_table(combinations, output)
    except InputError as error:
        print(f"combinations: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from error
    if not done:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
