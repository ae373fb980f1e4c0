"""Assemble the shipped pipeline folder from training checkpoints.

    python -m sla_video.pipelines.tiny_wan.export --vae runs/vae --transformer runs/tiny-wan \\
        --out sla_video/assets/tiny-wan
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from sla_video.pipelines.tiny_wan.evaluate import load_pipeline
from sla_video.pipelines.tiny_wan.models import (
    GUIDANCE_SCALE,
    STEPS,
    TEXT_POSITIONS,
    save_pipeline,
)
from sla_video.pipelines.tiny_wan.render import FPS, FRAME_SIZE, NUM_FRAMES


def _edit(path: Path, change: dict[str, Any]) -> None:
    data = json.loads(path.read_text())
    # Where the weights were loaded from before is of no use to others.
    data.pop("_name_or_path", None)
    path.write_text(json.dumps({**data, **change}, indent=2) + "\n")


def export(vae: Path | None, transformer: Path, out: Path, weights: str, defaults: Any) -> None:
    """Write `out` whole or not at all; float16 weights, loaded as float32."""
    pipe = load_pipeline(str(transformer), vae, weights)
    new, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    save_pipeline(new, pipe.vae, pipe.transformer, pipe.text_encoder)
    for part in ("transformer", "vae"):
        _edit(new / part / "config.json", {})
    # Transformers would otherwise keep the encoder in the precision of its file.
    _edit(new / "text_encoder" / "config.json", {"dtype": "float32"})
    # The name that both Transformers 4 and 5 know.
    _edit(new / "model_index.json", {"tokenizer": ["transformers", "PreTrainedTokenizerFast"]})
    tokenizer = new / "tokenizer" / "tokenizer_config.json"
    _edit(tokenizer, {"tokenizer_class": "PreTrainedTokenizerFast"})
    (new / "defaults.json").write_text(json.dumps(defaults, indent=2) + "\n")
    for path in new.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vae", type=Path, help="checkpoint of train_vae")
    parser.add_argument("--transformer", type=Path, required=True, help="checkpoint or pipeline")
    parser.add_argument("--weights", default="ema", choices=("ema", "weights"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance-scale", type=float, default=GUIDANCE_SCALE)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--dense-steps", type=int, default=1)
    args = parser.parse_args()
    defaults = {
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "sparsity": args.sparsity,
        "dense_steps": args.dense_steps,
        "num_frames": NUM_FRAMES,
        "height": FRAME_SIZE,
        "width": FRAME_SIZE,
        "fps": FPS,
        "max_sequence_length": TEXT_POSITIONS[0],
    }
    export(args.vae, args.transformer, args.out, args.weights, defaults)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
